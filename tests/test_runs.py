"""Run folders: checkpoints are whole or absent, and broken ones are named."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from rnas.runs import Run, load_tensors, save_tensors


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path / "run", "search", {"epochs": 3})


def test_a_checkpoint_comes_back_as_it_was(run):
    state = {"place": {"epoch": 2, "sums": {"loss": 0.1}}, "parts": {"net": {"w": torch.randn(3)}}}
    run.save_checkpoint(state)
    found = run.load_checkpoint()
    assert found["place"] == state["place"] and torch.equal(found["parts"]["net"]["w"], state["parts"]["net"]["w"])
    assert Run.open(run.path, "search").read_config() == {"epochs": 3}


def test_metrics_go_back_to_the_checkpoint(run):
    run.log({"epoch": 0})
    run.save_checkpoint({})
    run.log({"epoch": 1})
    with run.metrics_path.open("a") as file:
        file.write('{"epoch": 2, "cut')
    assert run.read_metrics() == [{"epoch": 0}, {"epoch": 1}]
    run.load_checkpoint()
    assert run.read_metrics() == [{"epoch": 0}]


def test_an_existing_folder_is_never_written_into(run):
    before = run.config_path.read_text()
    with pytest.raises(FileExistsError, match=r"exists: resume it with `rnas search --resume"):
        Run.create(run.path, "search", {"epochs": 99})
    assert run.config_path.read_text() == before


def test_folders_of_other_jobs_and_no_folders_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="a run of `rnas search`, not of `rnas train`"):
        Run.open(run.path, "train")
    with pytest.raises(FileNotFoundError, match="no run folder"):
        Run.open(tmp_path, "search")
    run.config_path.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        Run.open(run.path, "search")


@pytest.mark.parametrize("keep", [0, 1, 100, -20])
def test_a_truncated_checkpoint_is_named(run, keep):
    run.save_checkpoint({"w": torch.randn(1000)})
    content = run.checkpoint_path.read_bytes()
    run.checkpoint_path.write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read: truncated"):
        run.load_checkpoint()


def test_foreign_checkpoints_are_refused(run, tmp_path):
    torch.save({"state_dict": {}}, run.checkpoint_path)
    with pytest.raises(ValueError, match="not written by rnas"):
        run.load_checkpoint()
    torch.save({"rnas": 99}, run.checkpoint_path)
    with pytest.raises(ValueError, match="format 99; this version of rnas reads format 1"):
        run.load_checkpoint()
    save_tensors(run.checkpoint_path, {"job": "train"})
    with pytest.raises(ValueError, match="a checkpoint of 'train', expected 'search'"):
        run.load_checkpoint()
    torch.save(Run, tmp_path / "pickled.pt")  # anything but tensors and plain values must not be unpickled
    with pytest.raises(ValueError, match="cannot be read"):
        load_tensors(tmp_path / "pickled.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_tensors(tmp_path / "missing.pt")


def test_checkpoints_open_with_the_defaults_of_torch_load(run):
    run.save_checkpoint({"w": torch.ones(2)})
    assert torch.equal(torch.load(run.checkpoint_path)["w"], torch.ones(2))


def test_a_full_disk_leaves_the_old_checkpoint(run):
    """A file-size limit makes the kernel refuse the write, as a full disk does."""
    save_tensors(run.checkpoint_path, {"job": "search", "metrics_bytes": 0, "epoch": 1})
    script = textwrap.dedent(
        f"""
        import resource, signal, torch
        from rnas.runs import Run
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            Run({str(run.path)!r}, "search").save_checkpoint({{"epoch": 2, "w": torch.randn(1_000_000)}})
        except OSError as error:
            print("refused:", error)
        """
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "could not write" in result.stdout and "the previous checkpoint.pt is untouched" in result.stdout
    assert run.load_checkpoint()["epoch"] == 1
    assert sorted(os.listdir(run.path)) == ["checkpoint.pt", "config.json", "metrics.jsonl"]
