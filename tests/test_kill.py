"""A search killed with SIGKILL at any moment ends, resumed, in the same bits as one that was never killed."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from rnas import search
from rnas.config import to_dict
from rnas.runs import load_tensors

# The child dies without any clean-up at the given event: before or after a checkpoint's temporary file is written, in
# the middle of writing it, before or after its rename, after a metrics line, or in the middle of one.
CHILD = textwrap.dedent(
    """
    import json, os, signal, sys
    import torch
    from rnas import runs, search
    from rnas.config import SearchConfig, merge
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
    ("after rename", 5),
    ("metrics", 1),
    ("half metrics", 2),
]


def bits(run) -> dict:
    parts = load_tensors(run / "checkpoint.pt")["parts"]
    return {f"{part}.{name}": value for part in ("supernet", "method") for name, value in parts[part].items()}


@pytest.fixture(scope="module")
def uninterrupted(small_images, tmp_path_factory):
    from rnas.config import AttackConfig, DataConfig, SearchConfig
    from rnas.methods import options_for

    config = SearchConfig(
        options=options_for("darts"), nodes=2, channels=2, layers=3, epochs=2, batch_size=16, checkpoint_seconds=0.0,
        data=DataConfig(dataset=str(small_images)), attack=AttackConfig(steps=2, epsilon=8 / 255, step_size=2 / 255),
        run=str(tmp_path_factory.mktemp("kill") / "whole"), device="cpu", threads=1, quiet=True,
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        return config, search.search(config)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("event", "count"), EVENTS)
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, event, count):
    config, whole = uninterrupted
    config = replace(config, run=str(tmp_path / "killed"))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(to_dict(config)), event, str(count)], capture_output=True, text=True
    )
    assert child.returncode == -9, f"the child was to die at {event} number {count}: {child.stderr}"
    threads = torch.get_num_threads()
    try:
        result = search.resume(config.run, quiet=True)
    finally:
        torch.set_num_threads(threads)
    expected, found = bits(whole.run), bits(result.run)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert (result.run / "genotype.json").read_bytes() == (whole.run / "genotype.json").read_bytes()
    assert not (result.run / "checkpoint.pt.tmp").exists()
