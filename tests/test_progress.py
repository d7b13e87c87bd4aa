"""Progress: plain lines, the bar, silence; the rate, the time left and what happens when the job breaks."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from rnas.progress import Progress


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def plain(text: str) -> str:
    """What a terminal shows of a text: without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_plain_lines_come_at_most_every_so_often_and_once_at_the_end(clock):
    log = io.StringIO()
    with Progress("search", 40_000, stream=log, every_seconds=10, clock=clock) as progress:
        for batch in range(100):
            clock.now += 0.5
            progress.advance(400, epoch=batch // 50, loss=2.0 - 0.01 * batch, accuracy=0.43219)
    assert log.getvalue().splitlines() == [
        "search  8,000/40,000 images  800 images/s  0:40 left  epoch 0  loss 1.81  accuracy 0.432",
        "search  16,000/40,000 images  800 images/s  0:30 left  epoch 0  loss 1.61  accuracy 0.432",
        "search  24,000/40,000 images  800 images/s  0:20 left  epoch 1  loss 1.41  accuracy 0.432",
        "search  32,000/40,000 images  800 images/s  0:10 left  epoch 1  loss 1.21  accuracy 0.432",
        "search  40,000/40,000 images  800 images/s  0:00 left  epoch 1  loss 1.01  accuracy 0.432",
        "search  40,000/40,000 images  800 images/s  took 0:50  epoch 1  loss 1.01  accuracy 0.432",
    ]


def test_resumed_images_count_as_done_but_not_towards_the_rate(clock):
    log = io.StringIO()
    with Progress("train", 10_000, done_images=9_000, stream=log, every_seconds=0, clock=clock) as progress:
        clock.now += 10
        progress.advance(100)
    first, last = log.getvalue().splitlines()
    assert first == "train  9,100/10,000 images  10 images/s  1:30 left"
    assert last == "train  9,100/10,000 images  10 images/s  took 0:10"


def test_the_rate_follows_a_change_of_speed(clock):
    log = io.StringIO()
    with Progress("search", 10**6, stream=log, every_seconds=1, clock=clock) as progress:
        for speed in [1000] * 200 + [100] * 61:
            clock.now += 1
            progress.advance(speed)
        *_, line = log.getvalue().splitlines()
        assert "  100 images/s" in line
        assert len(progress._samples) < 100, "a long job must not collect samples without end"


@pytest.mark.parametrize(
    "seconds, shown", [(59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (100 * 3600 + 62, "100:01:02")]
)
def test_times_are_written_as_clocks_write_them(clock, seconds, shown):
    log = io.StringIO()
    with Progress("search", 2, stream=log, every_seconds=0, clock=clock) as progress:
        clock.now += seconds
        progress.advance(1)
    assert log.getvalue().splitlines()[0].split("  ")[3] == f"{shown} left"


def test_nothing_known_and_nothing_to_do_are_written_without_crashing(clock):
    log = io.StringIO()
    with Progress("empty", 0, stream=log, every_seconds=0, clock=clock) as progress:
        progress.advance(0)
    with Progress("still", 10, stream=log, every_seconds=0, clock=clock) as progress:
        progress.advance(0, loss=float("nan"))
        progress.advance(20)
    assert log.getvalue().splitlines() == [
        "empty  0/0 images  - images/s  0:00 left",
        "empty  0/0 images  - images/s  took 0:00",
        "still  0/10 images  - images/s  -:-- left  loss nan",
        "still  20/10 images  - images/s  0:00 left  loss nan",
        "still  20/10 images  - images/s  took 0:00  loss nan",
    ]


def test_notes_are_lines_of_their_own_and_come_at_once(clock):
    log = io.StringIO()
    with Progress("search", 10, stream=log, clock=clock) as progress:
        progress.note("epoch 0: loss [1.2] 50%")
        assert log.getvalue() == "epoch 0: loss [1.2] 50%\n"


@pytest.mark.parametrize("kind", ["file", "terminal"])
def test_quiet_writes_nothing(kind, clock, terminal, capfd):
    stream = io.StringIO() if kind == "file" else terminal
    with Progress("search", 10, quiet=True, stream=stream, every_seconds=0, clock=clock) as progress:
        progress.advance(5, loss=1.0)
        progress.note("epoch 0")
    with Progress("search", 10, quiet=True, every_seconds=0) as progress:
        progress.advance(5)
    assert stream.getvalue() == "" and capfd.readouterr() == ("", "")


def test_lines_go_to_standard_error_so_that_results_have_standard_output(capfd):
    with Progress("search", 10, every_seconds=0) as progress:
        progress.advance(10)
    out, err = capfd.readouterr()
    assert out == "" and err.count("search  10/10 images") == 2


def test_the_bar_shows_counts_rate_and_time_left_below_the_notes(clock, terminal):
    with Progress("search", 1000, stream=terminal, clock=clock) as progress:
        clock.now += 5
        progress.advance(500, loss=1.25)
        progress.note("epoch 0: [bold]50%")
        progress._live.refresh()
        shown = plain(terminal.getvalue())
        assert "500/1,000 images  100 images/s  0:05 left  loss 1.25" in shown
        assert "epoch 0: [bold]50%\n" in shown, "square brackets are text, not markup"
        clock.now += 5
        progress.advance(500, loss=1.0)
    last = plain(terminal.getvalue()).splitlines()[-1]
    assert "1,000/1,000 images  100 images/s  took 0:10  loss 1" in last


def test_the_bar_draws_itself_while_a_batch_takes_long(terminal):
    with Progress("search", 1000, stream=terminal) as progress:
        progress.advance(10)
        before = len(terminal.getvalue())
        deadline = time.monotonic() + 5
        while len(terminal.getvalue()) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(terminal.getvalue()) > before


@pytest.mark.parametrize("columns", [20, 60, 200])
def test_a_bar_is_one_line_however_narrow_the_terminal(columns, monkeypatch, terminal, clock):
    monkeypatch.setenv("COLUMNS", str(columns))
    with Progress("search", 10**6, stream=terminal, clock=clock) as progress:
        progress.advance(10, loss=1.0, accuracy=0.5, epsilon=0.031)
    lines = plain(terminal.getvalue()).replace("\r", "\n").splitlines()
    assert all(len(line) <= columns for line in lines)
    assert "\x1b[1A" not in terminal.getvalue(), "the cursor never moves up: the bar was never higher than a line"


@pytest.mark.parametrize("total, done", [(0, 0), (10, 10), (10, 15)])
def test_a_finished_or_empty_job_has_a_bar_too(total, done, terminal, clock):
    with Progress("search", total, done_images=done, stream=terminal, clock=clock):
        pass
    assert f"{done}/{total} images  - images/s  took 0:00" in plain(terminal.getvalue())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_passes_through_and_leaves_the_terminal_as_it_was(error, terminal, clock):
    out, err = sys.stdout, sys.stderr
    with pytest.raises(error), Progress("search", 10, stream=terminal, clock=clock) as progress:
        clock.now += 3
        progress.advance(5)
        raise error
    text = terminal.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"
    assert "5/10 images  1.7 images/s  stopped after 0:03" in plain(text)
    assert text.endswith(("\n", "\x1b[?25h")) and sys.stdout is out and sys.stderr is err
    log = io.StringIO()
    with pytest.raises(error), Progress("search", 10, stream=log, clock=clock) as progress:
        raise error
    assert "stopped after 0:00" in log.getvalue()


def test_a_dumb_terminal_and_a_forced_colour_log_get_plain_lines(monkeypatch, terminal, clock):
    monkeypatch.setenv("FORCE_COLOR", "1")
    log = io.StringIO()
    with Progress("search", 10, stream=log, clock=clock):
        pass
    monkeypatch.setenv("TERM", "dumb")
    with Progress("search", 10, stream=terminal, every_seconds=0, clock=clock) as progress:
        progress.advance(5)
    assert "\x1b" not in log.getvalue() + terminal.getvalue()
    assert terminal.getvalue().startswith("search  5/10 images") and terminal.getvalue().count("\n") == 2


def test_ctrl_c_on_a_real_terminal_shows_the_cursor_again_and_stops_the_job():
    pty = pytest.importorskip("pty")
    code = (
        "import time\nfrom rnas.progress import Progress\n"
        "with Progress('search', 1000) as progress:\n"
        "    progress.advance(10)\n"
        "    print('result', flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=child, env=environment)
    os.close(child)
    try:
        readable, _, _ = select.select([process.stdout], [], [], 20)
        assert readable and process.stdout.readline() == b"result\n", "what is printed into a pipe stays in the pipe"
        process.send_signal(signal.SIGINT)
        shown = read_until_closed(parent)
        assert process.wait(timeout=10) == -signal.SIGINT
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(parent)
    assert b"10/1,000 images" in shown and b"KeyboardInterrupt" in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


def read_until_closed(terminal: int) -> bytes:
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # how Linux says that the other side has closed
        pass
    return shown


@pytest.mark.parametrize("kind", ["lines", "bar", "quiet"])
def test_advancing_costs_next_to_nothing(kind, terminal):
    stream = terminal if kind == "bar" else io.StringIO()
    with Progress("search", 10**9, stream=stream, quiet=kind == "quiet") as progress:
        best = float("inf")
        for _ in range(20):  # the best of several, because other work shares this machine
            start = time.perf_counter()
            for _ in range(100):
                progress.advance(64, loss=1.234, accuracy=0.5)
            best = min(best, (time.perf_counter() - start) / 100)
    assert best < 50e-6


def test_numbers_are_read_only_when_shown(clock):
    class OnDevice:
        reads = 0

        def __float__(self):
            OnDevice.reads += 1
            return 0.5

    log = io.StringIO()
    with Progress("search", 100, stream=log, every_seconds=10, clock=clock) as progress:
        for _ in range(50):
            progress.advance(1, loss=OnDevice())
        assert OnDevice.reads == 0, "reading a tensor would wait for the device"
    assert OnDevice.reads == 1 and log.getvalue().endswith("loss 0.5\n")


@pytest.mark.parametrize(
    "value, shown", [(3, "3"), (12345, "12,345"), (1234.5, "1,234"), (8 / 255, "0.0314"), (1e-7, "1e-07")]
)
def test_numbers_are_short(value, shown, clock):
    log = io.StringIO()
    with Progress("search", 1, stream=log, clock=clock) as progress:
        progress.advance(1, step_size=value)
    assert log.getvalue().endswith(f"  step size {shown}\n")


def test_bad_arguments_are_refused(clock):
    with pytest.raises(ValueError, match="total_images must be at least 0, got -1"):
        Progress("search", -1)
    with pytest.raises(ValueError, match="done_images must be at least 0, got -2"):
        Progress("search", 1, done_images=-2)
    with pytest.raises(ValueError, match="every_seconds must be at least 0"):
        Progress("search", 1, every_seconds=float("nan"))
    progress = Progress("search", 1, stream=io.StringIO(), clock=clock)
    with pytest.raises(RuntimeError, match="with Progress"):
        progress.advance(1)
    with progress, pytest.raises(ValueError, match="images must be at least 0, got -5"):
        progress.advance(-5)
