"""Run folders: resolved config, metrics, and checkpoints that survive a kill at any moment."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1


class Run:
    """A folder with everything one job writes: config.json, metrics.jsonl, checkpoint.pt, and its results.

    Make one with `Run.create` or `Run.open`.
    """

    def __init__(self, path: str | Path, job: str) -> None:
        self.path = Path(path)
        self.job = job

    @classmethod
    def create(cls, path: str | Path, job: str, config: dict, files: Mapping[str, str] | None = None) -> Run:
        """Make the folder with the resolved config and text `files`, at once: a kill leaves it whole or absent.

        Raises FileExistsError where something is there already.
        """
        run = cls(path, job)
        cls.refuse_existing(path, job)
        building = cls(run.path.with_name(f"{run.path.name}.tmp-{os.getpid()}"), job)
        building.path.mkdir(parents=True)
        write_text(building.config_path, json.dumps({"job": job, "config": config}, indent=2) + "\n")
        building.metrics_path.touch()
        for name, text in (files or {}).items():
            write_text(building.path / name, text)
        os.rename(building.path, run.path)
        _sync_folder(run.path.parent)
        return run

    @staticmethod
    def refuse_existing(path: str | Path, job: str) -> None:
        """Raise FileExistsError where `path` is there already, with what to type."""
        if Path(path).exists():
            raise FileExistsError(
                f"run folder {path} exists: resume it with `rnas {job} --resume {path}`, "
                "choose another with --run FOLDER, or delete it"
            )

    @classmethod
    def open(cls, path: str | Path, job: str) -> Run:
        """An existing folder of the same job. Raises FileNotFoundError or ValueError where it is none."""
        run = cls(path, job)
        if not run.config_path.is_file():
            raise FileNotFoundError(f"{run.path} is no run folder: it has no config.json")
        try:
            found = json.loads(run.config_path.read_text(encoding="utf-8"))["job"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{run.config_path} is damaged or was not written by rnas") from None
        if found != job:
            raise ValueError(f"{run.path} is a run of `rnas {found}`, not of `rnas {job}`")
        return run

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint_path(self) -> Path:
        return self.path / "checkpoint.pt"

    def read_config(self) -> dict:
        """The resolved config as plain dicts. Raises ValueError where the file is damaged."""
        config = json.loads(self.config_path.read_text(encoding="utf-8")).get("config")
        if not isinstance(config, dict):
            raise ValueError(f"{self.config_path} is damaged: it has no table 'config'")
        return config

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process. Raises FileExistsError while another process works on it."""
        with self.config_path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileExistsError(f"another process is working on {self.path}") from None
            yield

    def log(self, record: dict) -> None:
        """Append one record to metrics.jsonl."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the next checkpoint records this length, and must not outlive the line

    def read_metrics(self) -> list[dict]:
        """All records of metrics.jsonl; a line cut off by a kill is left out."""
        records = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace checkpoint.pt at once: whenever the process dies, the old or the new one is there, whole.

        `state` holds tensors, numbers, strings, lists and dicts. Raises OSError where it cannot be written (disk full);
        the old checkpoint then stays.
        """
        size = self.metrics_path.stat().st_size
        save_tensors(self.checkpoint_path, {"job": self.job, "metrics_bytes": size, **state})

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, with metrics.jsonl cut back to what it held then; None where there is none yet.

        Raises ValueError for a truncated or foreign file.
        """
        if not self.checkpoint_path.exists():
            os.truncate(self.metrics_path, 0)
            return None
        state = load_tensors(self.checkpoint_path)
        if state.get("job") != self.job:
            raise ValueError(f"{self.checkpoint_path} is a checkpoint of {state.get('job')!r}, expected {self.job!r}")
        os.truncate(self.metrics_path, min(state["metrics_bytes"], self.metrics_path.stat().st_size))
        return state


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """torch.save through a temporary file and a rename, so that `path` is never half written. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"rnas": FORMAT_VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
        temporary.unlink(missing_ok=True)
        kept = f"; the previous {path.name} is untouched" if path.exists() else ""
        raise OSError(f"could not write {path} ({error}){kept}") from error
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> Path:
    """Write a small text file through a temporary file and a rename. Returns `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_tensors(path: str | Path) -> dict[str, Any]:
    """A file written by `save_tensors`, tensors on the CPU. Raises FileNotFoundError, or ValueError for other files."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a different class for every way in which a file can be broken
        reason = (str(error).splitlines() or ["empty file"])[0]
        raise ValueError(
            f"{path} cannot be read: truncated, or not a checkpoint ({type(error).__name__}: {reason})"
        ) from None
    if not isinstance(state, dict) or "rnas" not in state:
        raise ValueError(f"{path} was not written by rnas: it lacks the key 'rnas'")
    if state["rnas"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has checkpoint format {state['rnas']}; this version of rnas reads format {FORMAT_VERSION}"
        )
    return state


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: without this a power cut may bring the old name back."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
