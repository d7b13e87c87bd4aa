"""What runs the compiled mixed operation on a device: its module, memory for a call, and what else a call needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rnas.kernels import backend, fused


class Sizes(NamedTuple):
    """What `mixed_sizes` in csrc/include/rnas/mixed_op.h returns."""

    edges: int
    norms: int
    theta: int
    height_out: int
    width_out: int
    kept_masks: int
    kept_activations: int
    kept_outputs: int
    kept_linear: int
    workspace: int


class Cpu:
    """`rnas._cpu` on PyTorch's threads, in memory that is handed on from call to call."""

    @property
    def module(self) -> ModuleType:
        """The compiled module."""
        return backend.module("cpu")

    def sizes(self, shape: tuple[int, ...], primitives: str) -> Sizes:
        """Those of a shape as the module takes it; primitives: names with commas between."""
        return _cpu_sizes(shape, primitives, torch.get_num_threads(), self.module.simd_level())

    def what_to_keep(self, states: Sequence[Tensor], tables: Sequence[Tensor | None], on_batch: bool) -> int:
        """What the backward pass will need; tables: weights, theta, gamma and beta."""
        keep = fused.what_to_keep(states, tables, on_batch)
        if keep == fused.ACTIVATIONS and on_batch and not tables[1].requires_grad:
            return fused.OUTPUTS  # without gradients to theta, computing them again would be most of the backward pass
        return keep

    def obstacle(self, channels: int) -> str | None:
        """Why it does not take images of so many channels, or None."""
        return None

    def memory(self, size: int) -> Tensor:
        """An empty uint8 tensor of `size` bytes for what a forward pass keeps."""
        return fused.POOL.take(size)

    def workspace(self, size: int) -> Tensor:
        """Memory for one call."""
        return fused.workspace(size)

    def place(self) -> tuple[int, ...]:
        """What the compiled functions take last: the number of threads."""
        return (torch.get_num_threads(),)


class Cuda:
    """`rnas._cuda` on PyTorch's current stream of a device, in memory of PyTorch's allocator.

    The allocator hands memory on in the order of the stream, and keeps what a CUDA graph has captured for the graph: so
    every call takes its own and lets go of it when its kernels are queued.
    """

    MOST_CHANNELS = 960
    """What a block's shared memory holds: kMostChannels in csrc/cuda/mixed/plan.h."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def module(self) -> ModuleType:
        """The compiled module."""
        return backend.module("cuda")

    def sizes(self, shape: tuple[int, ...], primitives: str) -> Sizes:
        """As `Cpu.sizes`. Needs no device."""
        return _cuda_sizes(self.module, shape, primitives)

    def what_to_keep(self, states: Sequence[Tensor], tables: Sequence[Tensor | None], on_batch: bool) -> int:
        """As `Cpu.what_to_keep`: activations or nothing."""
        return fused.ACTIVATIONS if fused.what_to_keep(states, tables, on_batch) else fused.NOTHING

    def obstacle(self, channels: int) -> str | None:
        """As `Cpu.obstacle`."""
        most = self.MOST_CHANNELS
        return f"the CUDA kernels mix at most {most} channels, not {channels}" if channels > most else None

    def memory(self, size: int) -> Tensor:
        """As `Cpu.memory`."""
        return fused.empty_bytes(size, self.device)

    workspace = memory

    def place(self) -> tuple[int, ...]:
        """What the compiled functions take last: the device's index and the handle of its current stream."""
        return self.device.index, torch.cuda.current_stream(self.device).cuda_stream


_CPU = Cpu()


def of(x: Tensor) -> Cpu | Cuda:
    """The engine for tensors on the device of `x`."""
    return _cuda(x.device) if x.is_cuda else _CPU


_cuda = functools.cache(Cuda)


@functools.lru_cache(maxsize=256)
def _cpu_sizes(shape: tuple[int, ...], primitives: str, threads: int, level: str) -> Sizes:
    """level: the instruction set in use, on which the memory layout depends."""
    return Sizes(*backend.module("cpu").mixed_sizes(shape, primitives.split(","), threads))


@functools.lru_cache(maxsize=256)
def _cuda_sizes(module: ModuleType, shape: tuple[int, ...], primitives: str) -> Sizes:
    return Sizes(*module.mixed_sizes(shape, primitives.split(",")))
