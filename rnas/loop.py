"""The loop under every long job: epochs of batches with progress, metrics, checkpoints, Ctrl-C and exact resume."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch

from .config import WeightOptimizerConfig
from .progress import Progress
from .runs import Run


class Stateful(Protocol):
    """What a checkpoint keeps: a network, an optimizer, a search method."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> Any: ...


class Interrupted(Exception):
    """The job was asked to stop (Ctrl-C, SIGTERM) and has written its checkpoint into the folder `run`.

    finished: the stop came after the last batch, and the folder holds all results too; nothing is left to resume.
    """

    def __init__(self, run: str, *, finished: bool = False) -> None:
        super().__init__(f"stopped; {run} {'is finished' if finished else 'can be resumed'}")
        self.run, self.finished = run, finished


class Loop:
    """Where a job stands, and what has to survive a kill.

    Args:
        run: folder for checkpoints and metrics.
        parts: everything with state, by name; restored in place when a checkpoint is there.
        epochs, batches, batch_size, images: epochs in all; batches in an epoch; images in a batch and in an epoch.

    Holds the run's lock from its creation on. Use as a context manager; inside, iterate `epochs()`, start each epoch at
    batch `loop.batch`, call `done(...)` after each batch and `end_epoch(...)` after the last; then write the results,
    still inside: a stop that comes after the last batch waits for the end of the block, and raises Interrupted there.
    """

    def __init__(
        self,
        run: Run,
        parts: dict[str, Stateful],
        *,
        epochs: int,
        batches: int,
        batch_size: int,
        images: int,
        checkpoint_seconds: float,
        quiet: bool,
    ) -> None:
        self.run, self.parts = run, parts
        self.total_epochs, self.batches = epochs, batches
        self.checkpoint_seconds = checkpoint_seconds
        self.epoch = self.batch = 0
        self.sums: dict[str, float] = {}
        self.images = 0
        self.stop_requested = False
        self.saved_at = self.epoch_started = self.last_batch_at = time.monotonic()
        self.earlier_seconds = 0.0  # of this epoch, by processes before this one
        self.images_this_process = 0
        self.lock, self.shown = ExitStack(), ExitStack()
        self.lock.enter_context(run.locked())  # before load_checkpoint, which cuts metrics.jsonl back
        try:
            state = run.load_checkpoint()
            if state is not None:
                self._restore(state)
        except BaseException:
            self.lock.close()
            raise
        done_images = self.epoch * images + min(self.batch * batch_size, images)
        self.progress = Progress(run.job, epochs * images, done_images=done_images, quiet=quiet)

    def __enter__(self) -> Loop:
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.handlers[number] = signal.signal(number, self._request_stop)
            except ValueError:  # not the main thread: an embedding program keeps its own handling
                break
        self.shown.enter_context(self.progress)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        try:
            self.shown.__exit__(kind, *error)
        finally:
            self.lock.close()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        if kind is None and self.stop_requested:  # or a caller with more to do would never hear of it
            raise Interrupted(str(self.run.path), finished=True)

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, each yielded before its first or next batch."""
        while self.epoch < self.total_epochs:
            self.epoch_started, self.images_this_process = time.monotonic(), 0
            yield self.epoch
        self.shown.close()  # the writing of results is not the batches' time

    def done(self, images: int, **numbers: float) -> None:
        """Count one batch; `numbers` are means over its images, averaged into the epoch's record.

        Writes a checkpoint when one is due. Raises Interrupted after writing one when a stop was asked for, and
        FloatingPointError when a number is not finite, before anything that is not finite reaches a checkpoint.
        """
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise self._diverged(f"{name} became {value}")
            self.sums[name] = self.sums.get(name, 0.0) + value * images
        self.batch += 1
        self.images += images
        self.images_this_process += images
        self.progress.advance(images, epoch=self.epoch, **numbers)
        self.last_batch_at = time.monotonic()
        if self.stop_requested or self.last_batch_at - self.saved_at >= self.checkpoint_seconds:
            self.save()
        if self.stop_requested:
            # said here and not in the handler, which may have interrupted a write to the same stream
            self.progress.note("stopped by request")
            raise Interrupted(str(self.run.path))

    def end_epoch(self, **extra: Any) -> dict:
        """Log the epoch's means and `extra`, move on to the next epoch and write a checkpoint. Returns the record.

        Its `seconds` are those of all processes that worked on the epoch, without work that a kill lost;
        `images_per_second` is the speed of this process.
        """
        seconds = self._seconds()
        means = {name: total / max(self.images, 1) for name, total in self.sums.items()}
        speed = {
            "seconds": round(self.earlier_seconds + seconds, 3),
            "images_per_second": round(self.images_this_process / max(seconds, 1e-9), 1),
        }
        record = {"kind": "epoch", "epoch": self.epoch, **means, **extra, **speed}
        self.run.log(record)
        self.epoch, self.batch, self.sums, self.images = self.epoch + 1, 0, {}, 0
        self.earlier_seconds, self.epoch_started = 0.0, time.monotonic()
        self.save()
        return record

    def save(self) -> None:
        """Write a checkpoint of this moment. Raises FloatingPointError instead where a number is not finite."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        for name, part in parts.items():
            if not _finite(part):
                raise self._diverged(f"the state of {name} is not finite any more")
        place = {"epoch": self.epoch, "batch": self.batch, "images": self.images, "sums": self.sums}
        place["seconds"] = self.earlier_seconds + self._seconds()
        self.run.save_checkpoint({"place": place, "parts": parts})
        self.saved_at = time.monotonic()

    def _seconds(self) -> float:
        """Of this process in this epoch, without what came after the last batch."""
        return max(self.last_batch_at - self.epoch_started, 0.0)

    def _diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what} in epoch {self.epoch}, batch {self.batch}; the checkpoint in {self.run.path} is from before. "
            "Start anew with a smaller learning rate or epsilon."
        )

    def _restore(self, state: dict) -> None:
        path = self.run.checkpoint_path
        try:
            place, parts = state["place"], state["parts"]
            for name, part in self.parts.items():
                part.load_state_dict(parts[name])
            self.epoch, self.batch, self.images = place["epoch"], place["batch"], place["images"]
            self.sums = dict(place["sums"])
            self.earlier_seconds = place.get("seconds", 0.0)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} does not fit the configuration in {self.run.config_path}: {error}") from None

    def _request_stop(self, number: int, frame: object) -> None:
        if self.stop_requested:  # asked twice: at once
            raise KeyboardInterrupt
        self.stop_requested = True


def _finite(state: Any) -> bool:
    """Whether every floating-point number in nested dicts and lists of tensors is finite."""
    if isinstance(state, torch.Tensor):
        return not state.is_floating_point() or bool(state.isfinite().all())
    if isinstance(state, dict):
        return all(_finite(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return all(_finite(value) for value in state)
    return not isinstance(state, float) or math.isfinite(state)


def learning_rate(config: WeightOptimizerConfig, epoch: int, epochs: int) -> float:
    """The weight optimizer's learning rate in `epoch` (0-based) of `epochs`."""
    if config.schedule == "step":
        drops = sum(epoch >= milestone * epochs for milestone in config.milestones)
        return config.learning_rate * 0.1**drops
    span = config.learning_rate - config.learning_rate_min
    return config.learning_rate_min + span * (1 + math.cos(math.pi * epoch / epochs)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)  # a captured step reads it there
        else:
            group["lr"] = rate


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run the block with `count` CPU threads, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run the block with the default generators of the CPU and of `device` seeded, then with what they held before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda where there is one. Raises ValueError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"--device {name}: PyTorch sees {count} CUDA devices here; use --device cpu or auto")
    elif device.type != "cpu":
        raise ValueError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device
