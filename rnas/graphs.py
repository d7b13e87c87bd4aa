"""Steps of a search as CUDA graphs: recorded once, then started with one call instead of thousands of kernel launches.

What is captured: a whole PGD attack (all its steps; `rnas.attacks.pgd(graphs=...)`), and the steps of the weights and
of the architecture with their optimizers (`rnas.updates`). The first calls of a step run eagerly on a side stream; they
are steps of the search like any other, nothing is computed twice. The last of them runs under `rnas.capture.Guard`:
what no graph can hold is found before anything is captured, and such a step goes on eagerly, with one line that says
why and where.

A replay reads weights, statistics and the state of optimizers where they lie, so it sees what earlier steps changed.
Everything else that changes from call to call must be

- an input: copied into a buffer of the graph before each replay. Random numbers are always drawn outside, from the
  generator of their purpose, and come in like this, so that graph and eager loop see the same;
- or part of the key: a call with another key, shape, dtype, memory layout, training flag or address of a weight is
  another graph, with its own warm-up. The last `keep` graphs of a step are kept.

Attributes of modules other than parameters, buffers, submodules and `training` are constants of a graph.
Results are clones: all graphs of a search share one memory pool, and the next replay writes over it.

On a CPU nothing is captured. `rnas.capture.Tape` plays graphs there, for tests. Not measured on a GPU yet.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .capture import Guard
from .kernels import backend as kernel_backend

Outputs = dict[str, Any]
"""Tensors by name, and constants of the step."""


class Backend(Protocol):
    """What records and replays: CudaGraphs, or rnas.capture.Tape on a CPU."""

    device_type: str

    def aside(self, function: Callable[[], Outputs]) -> Outputs:
        """Run the function where captures run, so that it prepares what a capture cannot."""
        ...

    def capture(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """A replay of the function, and its outputs, which only a replay fills; the function changes no memory."""
        ...

    def settle(self) -> None:
        """Wait until no replay is under way."""
        ...


class CudaGraphs:
    """CUDA graphs of one device, in one memory pool, captured on one side stream."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def aside(self, function: Callable[[], Outputs]) -> Outputs:
        """Run the function on the side stream, behind and before all work of the current one."""
        # Memory that is freed goes back to the side stream, whose next work waits for the current stream again.
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                return function()
        finally:
            current.wait_stream(self.stream)

    def capture(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """A replay on the stream that is current at its call, and the outputs. Raises what the capture raises."""
        current = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: another thread may pin memory meanwhile.
            how = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
            with torch.cuda.device(self.device), torch.cuda.graph(graph, **how):
                outputs = function()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
        return graph.replay, outputs

    def settle(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)


@dataclass
class _Entry:
    """One step with one key: eager calls so far, and its graph once there is one."""

    calls: int = 0
    inputs: dict[str, Tensor] | None = None
    outputs: Outputs | None = None
    replay: Callable[[], None] | None = None


class Graphs:
    """The graphs of one job.

    Args:
        backend: what records and replays.
        warmup: eager calls of a step before its capture, at least 1; cuDNN and the allocator want about 3.
        keep: graphs and beginnings of graphs kept for each step; the one unused for longest goes.
        most: a step that has begun so many without as many replays eight times over goes on eagerly.
        report: takes the one line about a step that stays eager; None: a warning of the logger `rnas`.

    counts says of every step how many calls were eager, captures and replays.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        warmup: int = 3,
        keep: int = 4,
        most: int = 32,
        report: Callable[[str], None] | None = None,
    ) -> None:
        if warmup < 1 or keep < 1:
            raise ValueError(f"warmup and keep must be at least 1; got {warmup} and {keep}")
        self.backend, self.warmup, self.keep, self.most = backend, warmup, keep, most
        self.report = logging.getLogger("rnas").warning if report is None else report
        self.counts: dict[str, dict[str, int]] = {}
        self.reasons: dict[str, str] = {}
        """Steps that stay eager, and why."""
        self._entries: dict[str, OrderedDict[Hashable, _Entry]] = {}
        self._begun: dict[str, int] = {}
        self._failed = False

    def run(
        self,
        name: str,
        function: Callable[..., Outputs],
        inputs: Mapping[str, Tensor],
        *,
        key: Hashable = (),
        watch: Callable[[], Hashable] = tuple,
        check: Callable[[Outputs], None] | None = None,
    ) -> Outputs:
        """`function(**inputs)`: eagerly at first, then from a graph. Returns clones, part of no autograd graph.

        name: of the step, in messages. function: may change memory in place that lives longer than the call, and its
        inputs; every call with one key must do the same. key: all that it depends on beside inputs, and memory that
        `watch` names (see `fingerprint`). check: is given the outputs of the capture before a replay, for what holds
        of every call, and raises where this call's arguments do not fit; read no tensors there.
        """
        count = self.counts.setdefault(name, {"eager": 0, "captures": 0, "replays": 0})
        if name in self.reasons or self._failed:
            count["eager"] += 1
            return _plain(function(**inputs))
        inputs = {each: tensor.detach() for each, tensor in inputs.items()}
        state = watch()
        entry = self._entry(name, (_surroundings(), _layouts(inputs), key, state))
        if entry is None or entry.calls < self.warmup:
            count["eager"] += 1
            return _plain(self._warm_up(name, entry, partial(function, **inputs)))
        if entry.replay is None:
            reason = self._capture(entry, function, inputs, watch, state)
            if reason is not None:
                self.refuse(name, reason)
                count["eager"] += 1
                return _plain(function(**inputs))
            count["captures"] += 1
        if check is not None:
            check(entry.outputs)
        for each, tensor in inputs.items():
            entry.inputs[each].copy_(tensor)
        entry.replay()
        count["replays"] += 1
        return {each: value.clone() if isinstance(value, Tensor) else value for each, value in entry.outputs.items()}

    def refuse(self, name: str, reason: str) -> None:
        """Let a step run eagerly from now on, and say so once."""
        if name not in self.reasons:
            self.reasons[name] = reason
            self._entries.pop(name, None)
            self.report(f"without a CUDA graph, {name}: {reason}")

    def _entry(self, name: str, key: Hashable) -> _Entry | None:
        entries = self._entries.setdefault(name, OrderedDict())
        if key in entries:
            entries.move_to_end(key)
            return entries[key]
        begun = self._begun[name] = self._begun.get(name, 0) + 1
        if begun > self.most and self.counts[name]["replays"] < 8 * begun:
            self.refuse(name, f"its shapes or settings have changed {begun - 1} times")
            return None
        while len(entries) >= self.keep:
            if entries.popitem(last=False)[1].replay is not None:
                self.backend.settle()
        return entries.setdefault(key, _Entry())

    def _warm_up(self, name: str, entry: _Entry | None, function: Callable[[], Outputs]) -> Outputs:
        if entry is None:
            return function()
        entry.calls += 1
        if entry.calls < self.warmup:
            return self.backend.aside(function)
        with Guard(self.backend.device_type) as guard:
            outputs = self.backend.aside(function)
        if guard.found is not None:
            self.refuse(name, guard.found)
        return outputs

    def _capture(self, entry: _Entry, function, inputs, watch, state: Hashable) -> str | None:
        """Fill the entry; or say why not, with all memory as it was."""
        buffers = {each: torch.empty_like(tensor).copy_(tensor) for each, tensor in inputs.items()}
        try:
            replay, outputs = self.backend.capture(partial(function, **buffers))
        except Exception as error:
            # A capture that broke off may leave PyTorch's allocator in a doubtful state, and the guard saw nothing.
            self._failed = True
            self._entries.clear()
            first = (str(error).splitlines() or [""])[0]
            return f"its capture failed, so this job captures nothing more: {type(error).__name__}: {first}"
        if watch() != state:  # what the function made anew lies in the graph's memory, where nothing stays
            return "it replaced tensors that have to stay where they are"
        entry.inputs, entry.outputs, entry.replay = buffers, _plain(outputs), replay
        return None


def _plain(outputs: Outputs) -> Outputs:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in outputs.items()}


def fingerprint(*things: nn.Module | torch.optim.Optimizer) -> tuple:
    """Where the tensors of modules and optimizers lie, and what of their settings decides which kernels run.

    Of modules: addresses of parameters and buffers, requires_grad, training. Of optimizers: addresses of their state
    and all settings; of a setting that is a tensor its address alone.
    """
    found: list = []
    seen: set[int] = set()
    for thing in things:
        if isinstance(thing, nn.Module):
            _add_module(thing, found, seen)
        else:
            _add_optimizer(thing, found)
    return tuple(found)


def _add_module(module: nn.Module, found: list, seen: set[int]) -> None:
    # Not `modules()`, which takes several times as long, and this runs before every replay.
    waiting = [module]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        found.append(one.training)
        for tensor in one._parameters.values():
            found.append(None if tensor is None else (tensor.data_ptr(), tensor.requires_grad))
        for tensor in one._buffers.values():
            found.append(None if tensor is None else tensor.data_ptr())
        waiting.extend(each for each in one._modules.values() if each is not None)


def _add_optimizer(optimizer: torch.optim.Optimizer, found: list) -> None:
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name != "params":
                found.append(value.data_ptr() if isinstance(value, Tensor) else value)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            found.append(tuple(each.data_ptr() for each in state.values() if isinstance(each, Tensor)))


def _layouts(inputs: Mapping[str, Tensor]) -> tuple:
    return tuple((name, x.shape, x.stride(), x.dtype, x.device) for name, x in inputs.items())


def _surroundings() -> tuple:
    """Global settings that decide which kernels run."""
    autocast = tuple(
        (kind, torch.get_autocast_dtype(kind)) for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)
    )
    return (
        kernel_backend.forced(),
        autocast,
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
    )


def choose(option: Literal["auto", "on", "off"], device: torch.device) -> Literal["on", "off"]:
    """Whether a job on this device captures graphs. Raises ValueError for "on" without a CUDA device."""
    if option == "on" and device.type != "cuda":
        raise ValueError(f"graphs = on needs a CUDA device; got {device}: type graphs=auto")
    return "on" if option != "off" and device.type == "cuda" else "off"
