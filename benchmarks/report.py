"""The results file of a device, and the session that fills it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import machine
import profiles
from comparison import FAILED, MEASURED, REFUSED, Row
from problem import Size, size_of


class ReplayClock:
    """A timer for pytest-benchmark that gives back times measured before.

    pytest-benchmark times one function after the other; here all providers of a job are timed in turns. So the rounds
    are measured first, and each row's test then plays its own times back: `tick` is the function that is "timed", and
    moves the clock on by the next of them.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.times: list[float] = []

    def read(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += self.times.pop(0) if self.times else 0.0


CLOCK = ReplayClock()


class Session:
    """Measures each group of rows once, when its first row is asked for, and writes the file after each group."""

    def __init__(
        self, device: str, quick: bool, folder: Path | None, command: str, channels: int | None = None
    ) -> None:
        self.device = device
        self.quick = quick
        self.size: Size = size_of(device, quick, channels)
        self.head = {**machine.describe(device, command, quick), "size": asdict(self.size)}
        name = machine.slug(device) + (f".c{channels}" if channels else "")
        self.path = None if folder is None else folder / f"{name}.json"
        self.groups: dict[tuple, dict[str, Row]] = {}
        self.last_job = ""

    @property
    def number_of_rows(self) -> int:
        """Rows so far, those without times too."""
        return sum(len(group) for group in self.groups.values())

    @property
    def budget_seconds(self) -> float:
        """For the timed rounds of one group."""
        return 0.2 if self.quick else 3.0 if self.device == "cuda" else 10.0

    @property
    def backend(self) -> str:
        """Of torch.compile: with small sizes only the way through it matters, and inductor takes a minute."""
        return "eager" if self.quick else "inductor"

    def row(self, group: tuple, provider: str, measure_group: Callable[[], list[Row]]) -> Row:
        """The row of a provider in a group (job, batch), measured by `measure_group` if it has not been yet."""
        if group not in self.groups:
            rows = measure_group()
            self.groups[group] = {row.provider: row for row in rows}
            for row in rows:
                print("\n".join(self.lines(row)), flush=True)
            self.write(complete=False)
        return self.groups[group][provider]

    def lines(self, row: Row) -> list[str]:
        """A row for the terminal, and below it where its time goes, if that was measured."""
        if row.profile is None:
            return [self.line(row)]
        peak = self.head["ceilings"]["flops_per_second"]
        return [self.line(row), *profiles.lines(row.profile, self.head["threads"], peak)]

    def line(self, row: Row) -> str:
        """A row for the terminal, with its distance to the machine's ceilings."""
        text = f"{row.job:<15} batch {row.batch:<4} {row.provider:<20}"
        if row.status != MEASURED:
            return f"{text} {row.status}: {row.note}"
        best = min(row.seconds)
        text += f" {best * 1e3:10.3f} ms"
        if row.flops is not None:
            text += f"  {row.flops / best / self.head['ceilings']['flops_per_second']:6.1%} of the arithmetic ceiling"
        if row.bytes_moved is not None:
            share = row.bytes_moved / best / self.head["ceilings"]["in_place_bytes_per_second"]
            text += f"  {row.bytes_moved / best / 1e9:.1f} GB/s, {share:.0%} of what an addition in place reaches"
        return text

    def write(self, complete: bool) -> None:
        """The file as far as it goes; an older one stays whole until the new one is."""
        if self.path is None or not self.groups:
            return
        rows = [row.as_dict() for group in self.groups.values() for row in group.values()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({**self.head, "complete": complete, "rows": rows}, indent=1) + "\n")
        os.replace(partial, self.path)


def replay(benchmark, row: Row) -> str:
    """Hands a row's times to pytest-benchmark. Returns why there are none, "" otherwise."""
    if row.status != MEASURED:
        return f"{row.status}: {row.note}"
    benchmark.group = f"{row.job}, batch {row.batch}"
    benchmark.extra_info.update(row.as_dict())
    CLOCK.times = list(row.seconds)
    benchmark.pedantic(CLOCK.tick, rounds=len(row.seconds), iterations=1)
    return ""


def broken(row: Row) -> bool:
    """Whether a row without times is a fault, and not merely something that a provider does not offer."""
    return row.status in (REFUSED, FAILED)
