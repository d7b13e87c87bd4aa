"""Progress of a job: a bar for people at a terminal, plain lines for logs, nothing when asked to be quiet.

Everything goes to one stream, standard error unless told otherwise. Standard output stays free for results, so that
`rnas evaluate RUN > table.txt` writes the table and nothing else; `2>&1 | tee log` puts the plain lines into a log.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

WINDOW_SECONDS = 60.0  # images/s follows changes of speed within this time and yet stays steady over slow batches


class Progress:
    """Counts images and shows how many, how fast, and how long is left.

        with Progress("search", total_images=40_000) as progress:
            for x, y in batches:
                ...
                progress.advance(len(x), loss=loss)
            progress.note("epoch 1  accuracy 0.43")

    On a terminal (one that can move its cursor) a bar that redraws itself, with `note` writing above it. Elsewhere
    plain lines, at most one every `every_seconds` and one when the block ends. quiet=True writes nothing at all.

    total_images: images in the whole job; 0 is allowed. done_images: those finished before this process started (a
    resumed run): they count as done but not towards images/s or the time left. stream: where to write, sys.stderr if
    None. clock: seconds, never going back. An exception inside the block, KeyboardInterrupt too, restores the terminal
    and passes through. advance() costs a few microseconds: it neither draws nor reads the numbers it is given.

    Raises ValueError for negative counts or seconds.
    """

    def __init__(
        self,
        title: str,
        total_images: int,
        *,
        done_images: int = 0,
        quiet: bool = False,
        stream: TextIO | None = None,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        for name, value in (("total_images", total_images), ("done_images", done_images)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not every_seconds >= 0:
            raise ValueError(f"every_seconds must be at least 0, got {every_seconds}")
        self.title, self.total, self.done = title, total_images, done_images
        self._resumed_from = done_images
        self._quiet, self._stream = quiet, stream
        self._every, self._clock = every_seconds, clock
        self._numbers: dict[str, object] = {}
        self._live = None
        self._start = None

    def __enter__(self):
        if self._stream is None:
            self._stream = sys.stderr
        self._start = self._last_line = self._clock()
        self._samples = deque([(self._start, self.done)])  # (seconds, images done), at most about one a second
        if not self._quiet and _can_draw(self._stream):
            self._live = self._make_bar()
            self._live.start(refresh=True)
        return self

    def advance(self, images: int, **numbers: float) -> None:
        """Counts `images` more as done. numbers (loss=..., accuracy=...) are shown as given, the latest of each name;
        anything that float() takes will do, and it is read only when shown."""
        if images < 0:
            raise ValueError(f"images must be at least 0, got {images}")
        if self._start is None:
            raise RuntimeError("advance() outside its block: write `with Progress(...) as progress:` around the loop")
        self.done += images
        self._numbers.update(numbers)
        now = self._clock()
        if now - self._samples[-1][0] >= 1.0:
            self._samples.append((now, self.done))
            while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW_SECONDS:
                self._samples.popleft()
        if self._live is None and not self._quiet and now - self._last_line >= self._every:
            self._last_line = now
            self._write(self._line(self._rate(now), f"{self._time_left(now)} left"))

    def note(self, text: str) -> None:
        """Writes a line of its own, above the bar where there is one."""
        if self._quiet:
            return
        if self._live is None:
            self._write(text)
        else:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, kind, error, trace) -> None:
        now = self._clock()
        seconds = now - self._start
        rate = (self.done - self._resumed_from) / seconds if seconds > 0 else math.nan
        took = f"{'took' if kind is None else 'stopped after'} {_duration(seconds)}"
        if self._live is not None:
            self._ending = (rate, took)
            self._live.stop()
            self._live = None
        elif not self._quiet:
            self._write(self._line(rate, took))
        self._start = None

    # -- figures -----------------------------------------------------------------------------------------------------

    def _rate(self, now: float) -> float:
        """Images per second over the last minute of this process; nan before there is anything to measure."""
        since, done = self._samples[0]
        return (self.done - done) / (now - since) if now > since else math.nan

    def _time_left(self, now: float) -> str:
        if self.done >= self.total:
            return "0:00"
        rate = self._rate(now)
        return _duration((self.total - self.done) / rate) if rate > 0 else "-:--"

    def _figures(self, rate: float, ending: str) -> list[str]:
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
        numbers = [f"{name.replace('_', ' ')} {_number(value)}" for name, value in list(self._numbers.items())]
        counts = f"{self.done:,}/{self.total:,} images"
        return [counts, f"{speed if rate > 0 else '-'} images/s", ending, *numbers]

    def _line(self, rate: float, ending: str) -> str:
        return "  ".join([self.title, *self._figures(rate, ending)])

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    # -- bar ---------------------------------------------------------------------------------------------------------

    def _make_bar(self):
        from rich.console import Console
        from rich.live import Live

        self._ending = None
        # Redirecting a stream that is not a terminal would move what the caller prints into a file onto the terminal.
        return Live(
            console=Console(file=self._stream, force_terminal=True),
            get_renderable=self._bar,
            refresh_per_second=8,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
        )

    def _bar(self):
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = self._clock()
        rate, ending = self._ending or (self._rate(now), f"{self._time_left(now)} left")
        row = Table.grid(padding=(0, 1), expand=False)
        row.add_column(no_wrap=True)
        row.add_column()
        row.add_column(no_wrap=True, overflow="ellipsis")
        # A job of no images is done, and its bar full.
        bar = ProgressBar(total=max(self.total, 1), completed=min(self.done, self.total) if self.total else 1, width=24)
        row.add_row(Text(self.title, style="bold"), bar, Text("  ".join(self._figures(rate, ending))))
        return row


def _can_draw(stream: TextIO) -> bool:
    # Only the stream decides: FORCE_COLOR and the like must not put cursor movements into a log file.
    return bool(getattr(stream, "isatty", lambda: False)()) and os.environ.get("TERM", "") not in ("dumb", "unknown")


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-:--"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _number(value) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    value = float(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
