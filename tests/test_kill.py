"""A search killed with SIGKILL at any moment ends, resumed, in the same bits as one that was never killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
from conftest import final_state

from rnas import search
from rnas.settings import to_dict

# The child dies without any clean-up at the given event: before or after a checkpoint's temporary file is written, in
# the middle of writing it, before or after its rename, after a metrics line, or in the middle of one.
CHILD = textwrap.dedent(
    """
    import json, os, signal, sys
    import torch
    from rnas import runs, search
    from rnas.config import SearchConfig
    from rnas.settings import merge
    from rnas.loop import Loop
    from rnas.methods import options_for

    event, count = sys.argv[2], int(sys.argv[3])

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def dies(function, when):
        def wrapped(*arguments, **named):
            global count
            count -= 1
            if count == 0 and when == "before":
                die()
            result = function(*arguments, **named)
            if count == 0 and when == "after":
                die()
            return result
        return wrapped

    def half_written(state, file):
        global count
        count -= 1
        if count == 0:
            file.write(b"PK" * 1000)
            file.flush()
            os.fsync(file.fileno())
            die()
        save(state, file)

    def half_line(run, record):
        global count
        count -= 1
        if count == 0:
            with run.metrics_path.open("a") as file:
                file.write(json.dumps(record)[:20])
            die()
        log(run, record)

    save, log = torch.save, runs.Run.log
    if event == "batch":
        Loop.done = dies(Loop.done, "before")
    elif event == "half checkpoint":
        torch.save = half_written
    elif event == "half metrics":
        runs.Run.log = half_line
    elif event == "metrics":
        runs.Run.log = dies(runs.Run.log, "after")
    elif "folder" in event:
        os.rename = dies(os.rename, event.split()[0])
    else:
        os.replace = dies(os.replace, event.split()[0])

    values = json.loads(sys.argv[1])
    search.search(merge(SearchConfig(options=options_for("darts")), values))
    """
)

EVENTS = [
    ("batch", 1),
    ("batch", 2),
    ("batch", 5),
    ("half checkpoint", 1),
    ("half checkpoint", 3),
    ("before rename", 3),
    ("after rename", 3),
    ("after rename", 4),  # the epoch's last batch is in the checkpoint, its record is not in the metrics
    ("after rename", 5),
    ("metrics", 1),
    ("half metrics", 2),
    ("after folder", 1),
]


@pytest.fixture(scope="module")
def uninterrupted(small_images, tmp_path_factory):
    from rnas.config import AttackConfig, DataConfig, SearchConfig
    from rnas.methods import options_for

    config = SearchConfig(
        options=options_for("darts"), nodes=2, channels=2, layers=3, epochs=2, batch_size=16, checkpoint_seconds=0.0,
        data=DataConfig(dataset=str(small_images)), attack=AttackConfig(steps=2, epsilon=8 / 255, step_size=2 / 255),
        run=str(tmp_path_factory.mktemp("kill") / "whole"), device="cpu", threads=1, quiet=True,
    )  # fmt: skip
    return config, search.search(config)


def killed(config, event: str, count: int) -> None:
    """Run the search in a child that dies at the event."""
    arguments = [sys.executable, "-c", CHILD, json.dumps(to_dict(config)), event, str(count)]
    child = subprocess.run(arguments, capture_output=True, text=True)
    assert child.returncode == -9, f"the child was to die at {event} number {count}: {child.stderr}"


def test_a_kill_while_the_run_folder_is_made_leaves_none(uninterrupted, tmp_path):
    config = replace(uninterrupted[0], run=str(tmp_path / "killed"))
    killed(config, "before folder", 1)
    assert not (tmp_path / "killed").exists()


def test_a_kill_at_a_random_moment_loses_nothing(uninterrupted, tmp_path):
    """Killed from outside again and again, each time a little later, until it ends by itself."""
    config, whole = uninterrupted
    config = replace(config, run=str(tmp_path / "killed"))
    command = [sys.executable, "-c", CHILD, json.dumps(to_dict(config)), "batch", "1000"]
    again = [sys.executable, "-m", "rnas.cli", "search", "--resume", config.run, "--quiet"]
    rng = random.Random(os.getpid())
    kills = 0
    for _ in range(12):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if not (tmp_path / "killed").exists():
            while not (tmp_path / "killed").exists() and child.poll() is None:
                time.sleep(0.01)
            delay = rng.uniform(0, 1.0)
        else:
            delay = rng.uniform(1.5, 5.0)
        try:
            child.wait(timeout=delay)
            break
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            kills, command = kills + 1, again
    else:
        subprocess.run(again, check=True, stdout=subprocess.DEVNULL)
    assert kills > 0
    expected, found = final_state(whole.run), final_state(tmp_path / "killed")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert (tmp_path / "killed" / "genotype.json").read_bytes() == (whole.run / "genotype.json").read_bytes()


@pytest.mark.parametrize(("event", "count"), EVENTS)
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, event, count):
    config, whole = uninterrupted
    config = replace(config, run=str(tmp_path / "killed"))
    killed(config, event, count)
    result = search.resume(config.run, quiet=True)
    expected, found = final_state(whole.run), final_state(result.run)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert (result.run / "genotype.json").read_bytes() == (whole.run / "genotype.json").read_bytes()
    assert not (result.run / "checkpoint.pt.tmp").exists()
