"""The loop by itself: the seconds of an epoch, whoever worked on it, and a stop that comes after the last batch."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import final_state

from rnas import cli, search, train
from rnas import loop as loop_module
from rnas.loop import Interrupted, Loop
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


def stop_at_the_end(monkeypatch, job, moment: str, number: int) -> None:
    """Send the signal when the last batch is done: before the last checkpoint, or while the results are written."""
    place = {"last checkpoint": (Loop, "end_epoch"), "results": (job, "write_text")}[moment]
    work = getattr(*place)

    def interrupted(*arguments, **named):
        if place[0] is not Loop or arguments[0].epoch == arguments[0].total_epochs - 1:
            os.kill(os.getpid(), number)
        return work(*arguments, **named)

    monkeypatch.setattr(*place, interrupted)


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.parametrize("moment", ["last checkpoint", "results"])
@pytest.mark.parametrize(("job", "number"), [(search, signal.SIGTERM), (train, signal.SIGINT)])
def test_a_stop_after_the_last_batch_keeps_the_result_and_is_not_forgotten(
    search_config, train_config, tmp_path, monkeypatch, no_pictures, job, number, moment
):
    config, work = {search: (search_config, search.search), train: (train_config, train.train)}[job]
    whole = work(config)
    stopped = replace(config, run=str(tmp_path / "stopped"))
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        stop_at_the_end(patch, job, moment, number)
        with pytest.raises(Interrupted, match="is finished") as stop:
            work(stopped)
    assert stop.value.finished and stop.value.run == stopped.run
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    for path in whole.files:
        assert (tmp_path / "stopped" / path.name).is_file(), path.name
    first, second = final_state(whole.run), final_state(tmp_path / "stopped")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "stopped" / "genotype.json").read_bytes() == (whole.run / "genotype.json").read_bytes()
    with Run(stopped.run, "").locked():
        pass  # no process holds it any more


def test_a_failure_while_results_are_written_hides_behind_no_stop(search_config, monkeypatch, no_pictures):
    def fails(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        raise OSError("disk full")

    monkeypatch.setattr(search, "write_text", fails)
    with pytest.raises(OSError, match="disk full"):
        search.search(search_config)


def test_the_command_line_says_that_a_job_stopped_at_its_end_is_finished(
    small_images, tmp_path, monkeypatch, no_pictures, capsys
):
    pytest.importorskip("tyro", reason="the command line needs tyro")
    stop_at_the_end(monkeypatch, search, "last checkpoint", signal.SIGINT)
    run = tmp_path / "s"
    arguments = ["--nodes", "2", "--channels", "2", "--layers", "3", "--epochs", "1", "--batch-size", "16", "--quiet"]
    arguments += ["--attack.steps", "1", "--device", "cpu", "--data.dataset", str(small_images), "--run", str(run)]
    assert cli.main(["search", *arguments]) == 130
    error = capsys.readouterr().err
    assert f"{run} is finished" in error and "--resume" not in error
    assert (run / "genotype.json").is_file()
