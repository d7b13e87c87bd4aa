"""Instruments: interleaved times, peak memory, what autograd saves, kernel launches, arithmetic of convolutions."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rnas import kernels

Function = Callable[[], object]


def seconds(function: Function, device: str, repeats: int = 1) -> float:
    """Wall-clock time of one call, the mean over `repeats` calls in a row, all launched work finished."""
    _finish(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _finish(device)
    return (time.perf_counter() - start) / repeats


def interleaved(functions: dict[str, Function], device: str, rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Times of all functions, one call of each per round, so that a drift of the machine meets all of them alike.

    The one that begins moves on with every round, and garbage is collected between rounds only.
    """
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        gc.collect()
        gc.disable()
        try:
            for name in names[first:] + names[:first]:
                times[name].append(seconds(functions[name], device, repeats))
        finally:
            gc.enable()
    return times


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(function: Function, device: str) -> int | None:
    """The most memory that a call holds beside what was there before it. CPU: resident memory; None where unknown."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/statm").exists():
        return None
    _return_freed_memory()
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present
    except OSError:
        return _sampled_peak(function) - before
    function()
    return _status("VmHWM") - before


def _return_freed_memory() -> None:
    """Memory that an earlier call freed and an allocator kept would hide what this call needs."""
    kernels.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _sampled_peak(function: Function) -> int:
    """The largest resident memory seen by looking every millisecond, for kernels that keep no resettable mark."""
    seen, done = [0], threading.Event()

    def look() -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not done.is_set():
            seen[0] = max(seen[0], page * int(Path("/proc/self/statm").read_text().split()[1]))
            time.sleep(0.001)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return seen[0]


def saved_bytes(function: Function, network: nn.Module) -> int:
    """The most bytes held for backward at one time: unique storages, parameters and buffers of `network` excluded."""
    known = {each.untyped_storage().data_ptr() for each in (*network.parameters(), *network.buffers())}
    ledger = _Ledger(known)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(tensor, ledger), lambda saved: saved.tensor):
        function()
    return ledger.most


class _Ledger:
    """Counts how often each storage is held, and the largest sum of their sizes."""

    def __init__(self, ignored: Collection[int]) -> None:
        self.ignored = ignored
        self.holders: dict[int, int] = {}
        self.now = self.most = 0

    def hold(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address in self.ignored:
            return
        self.holders[address] = self.holders.get(address, 0) + 1
        if self.holders[address] == 1:
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)

    def release(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address not in self.holders:
            return
        self.holders[address] -= 1
        if self.holders[address] == 0:
            del self.holders[address]
            self.now -= storage.nbytes()


class _Saved:
    """One tensor that autograd saved; known to the ledger for as long as autograd keeps it."""

    def __init__(self, tensor: Tensor, ledger: _Ledger) -> None:
        self.tensor = tensor.detach()  # the tensor itself would hold its own graph, and never be freed
        self.ledger = ledger
        ledger.hold(self.tensor.untyped_storage())

    def __del__(self) -> None:
        self.ledger.release(self.tensor.untyped_storage())


def launches(function: Function) -> int:
    """How often the host starts work on the GPU: kernels, and CUDA graphs as one each."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    # The parsed events of torch.profiler take a minute for 100,000 launches, the raw ones a moment.
    names = (event.name() for event in profiler.profiler.kineto_results.events())
    return sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")) for name in names)


class ConvolutionCounter(TorchDispatchMode):
    """Counts the floating-point operations of convolutions, forward and first backward; a multiply-add is two.

    PyTorch's own counter takes the weight gradient of a depthwise convolution for a dense one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.total += self._product(result, args[1])
        elif func is torch.ops.aten.convolution_backward.default:
            to_input, to_weight, _ = args[10]
            self.total += (int(to_input) + int(to_weight)) * self._product(args[0], args[2])
        return result

    @staticmethod
    def _product(output: Tensor, weight: Tensor) -> int:
        return 2 * output.numel() * weight[0].numel()  # weight (C_out, C_in / groups, kernel, kernel)
