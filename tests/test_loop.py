"""The loop by itself: the seconds of an epoch, whoever worked on it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rnas import loop as loop_module
from rnas.loop import Loop
from rnas.runs import Run, load_tensors, save_tensors


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def batch(self, loop: Loop, seconds: float) -> None:
        self.now += seconds
        loop.done(4, loss=1.0)


def make(run: Run, *, checkpoint_seconds: float = 1e9) -> Loop:
    """Two epochs of three batches of four images."""
    parts = {"network": torch.nn.Linear(1, 1)}
    return Loop(
        run, parts, epochs=2, batches=3, batch_size=4, images=12, checkpoint_seconds=checkpoint_seconds, quiet=True
    )


class Killed(Exception):
    pass


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path / "run", "search", {})


def test_an_epoch_counts_the_seconds_of_all_processes_and_not_what_was_lost(run, monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(Killed), make(run) as first:
        for _ in first.epochs():
            clock.batch(first, 10)
            first.save()
            clock.batch(first, 20)  # lost: no checkpoint holds it
            raise Killed
    for seconds, lost in ((30, 0), (0, 5)):  # the second of these dies with nothing done since its start
        clock.now += 1000
        with pytest.raises(Killed), make(run) as again:
            for _ in again.epochs():
                if seconds:
                    clock.batch(again, seconds)
                    again.save()
                clock.now += lost
                again.save()
                raise Killed
    clock.now += 1000
    with make(run) as last:
        assert (last.epoch, last.batch) == (0, 2)
        for _ in last.epochs():
            while last.batch < 3:
                clock.batch(last, 2)
            clock.now += 500  # validation, pictures: not the batches'
            last.end_epoch()
    records = run.read_metrics()
    assert [record["seconds"] for record in records] == [10 + 30 + 2, 6]
    assert [record["images_per_second"] for record in records] == [2, 2]  # of the process that ended the epoch


def test_a_checkpoint_after_an_epoch_holds_no_seconds_of_it(run, monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(Killed), make(run) as first:
        for _ in first.epochs():
            for _ in range(3):
                clock.batch(first, 10)
            first.end_epoch()
            assert load_tensors(run.checkpoint_path)["place"]["seconds"] == 0
            raise Killed


def test_a_checkpoint_without_seconds_still_loads(run, monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(Killed), make(run, checkpoint_seconds=0) as first:
        for _ in first.epochs():
            clock.batch(first, 10)
            raise Killed
    state = load_tensors(run.checkpoint_path)
    assert state["place"].pop("seconds") == 10
    save_tensors(run.checkpoint_path, {name: value for name, value in state.items() if name != "rnas"})
    with make(run) as last:
        assert last.batch == 1
        for _ in last.epochs():
            while last.batch < 3:
                clock.batch(last, 2)
            last.end_epoch()
    assert [record["seconds"] for record in run.read_metrics()] == [4, 6]
