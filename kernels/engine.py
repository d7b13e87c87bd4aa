"""What runs the compiled mixed operation on a device: its module, memory for a call, and what else a call needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rnas.kernels import backend, formats, fused


@functools.lru_cache(maxsize=256)
def rows(primitives: str) -> list[list[str]]:
    """The names of the candidates as the modules take them: one row for all edges, or one for each.

    primitives: with commas between names and semicolons between rows.
    """
    return [row.split(",") for row in primitives.split(";")]


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

    MAKES_LAST = True
    """Whether it makes the last node alone, and takes the gradient to that alone, where no other is asked for."""

    TAKES_PLANES = True
    """Whether it writes results and gradients of states, and reads gradients of results, channels first too."""

    SCALES_ON_FIXED = False
    """Whether it multiplies each image of an edge by a number of its own on fixed statistics too."""

    READS_NODES = False
    """Whether a backward pass reads the nodes that the forward pass has returned, rather than what is kept of them."""

    @property
    def module(self) -> ModuleType:
        """The compiled module."""
        return backend.module("cpu")

    def autocast_dtype(self, x: Tensor) -> torch.dtype | None:
        """The dtype that images like `x` are cast to where autocast is on and the kernels follow it, else None."""
        return None

    def image_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which the compiled functions take images like `x`."""
        return x.dtype

    def sizes(self, shape: tuple[int, ...], primitives: str, images: torch.dtype) -> Sizes:
        """Those of a shape as the module takes it; primitives: as `rows` takes them; images: their dtype."""
        return _cpu_sizes(shape, primitives, torch.get_num_threads(), self.module.simd_level())

    def what_to_keep(self, states: Sequence[Tensor], tables: Sequence[Tensor | None], on_batch: bool) -> int:
        """What the backward pass will need; tables: weights, theta, gamma and beta."""
        keep = fused.what_to_keep(states, tables, on_batch)
        if keep == fused.ACTIVATIONS and on_batch and not tables[1].requires_grad:
            return fused.OUTPUTS  # without gradients to theta, computing them again would be most of the backward pass
        return keep

    def holds_states(self, states: Sequence[Tensor], others: Sequence[Tensor], on_batch: bool) -> bool:
        """Whether a graph will hold the states themselves; others: all else that may require a gradient."""
        return fused.what_to_keep(states, others, on_batch) not in (fused.NOTHING, fused.MASKS)

    def obstacle(self, channels: int) -> str | None:
        """Why it does not take images of so many channels, or None."""
        return None

    def memory(self, size: int) -> Tensor:
        """An empty uint8 tensor of `size` bytes for what a forward pass keeps."""
        return fused.POOL.take(size)

    def workspace(self, size: int) -> Tensor:
        """Memory for one call."""
        return fused.workspace(size)

    def images(self, tensors: Sequence[Tensor], images: torch.dtype) -> list[Tensor]:
        """(N, C, H, W) each, as the compiled functions take them: dense (N, H, W, C) of that dtype."""
        return [formats.pixels_first(tensor) for tensor in tensors]

    def tables(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """Everything else that the compiled functions read, as they take it: dense."""
        return fused.dense(*tensors)

    def place(self, images: torch.dtype) -> tuple[int, ...]:
        """What the compiled functions take last: the number of threads."""
        return (torch.get_num_threads(),)


class Cuda:
    """`rnas._cuda` on PyTorch's current stream of a device, in memory of PyTorch's allocator.

    The allocator hands memory on in the order of the stream, and keeps what a CUDA graph has captured for the graph: so
    every call takes its own and lets go of it when its kernels are queued.
    """

    MAKES_LAST = False
    """As `Cpu.MAKES_LAST`."""

    TAKES_PLANES = False
    """As `Cpu.TAKES_PLANES`."""

    SCALES_ON_FIXED = True
    """As `Cpu.SCALES_ON_FIXED`."""

    READS_NODES = True
    """As `Cpu.READS_NODES`."""

    MOST_CHANNELS = 960
    """What a block's shared memory holds: kMostChannels in csrc/cuda/mixed/plan.h."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def module(self) -> ModuleType:
        """The compiled module."""
        return backend.module("cuda")

    def autocast_dtype(self, x: Tensor) -> torch.dtype | None:
        """As `Cpu.autocast_dtype`: that of autocast. float64 is left as it is, by PyTorch too."""
        if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
            return None
        dtype = torch.get_autocast_dtype(x.device.type)
        return dtype if dtype in fused.HALVES else None

    def image_dtype(self, x: Tensor) -> torch.dtype:
        """As `Cpu.image_dtype`: that of `x`, but float32 where the kernels for 16 bits do not take so many channels."""
        return x.dtype if x.shape[1] % 4 == 0 else torch.float32

    def sizes(self, shape: tuple[int, ...], primitives: str, images: torch.dtype) -> Sizes:
        """As `Cpu.sizes`. Needs no device."""
        return _cuda_sizes(self.module, shape, primitives, str(images).removeprefix("torch."))

    def what_to_keep(self, states: Sequence[Tensor], tables: Sequence[Tensor | None], on_batch: bool) -> int:
        """As `Cpu.what_to_keep`: activations or nothing."""
        return fused.ACTIVATIONS if fused.what_to_keep(states, tables, on_batch) else fused.NOTHING

    def holds_states(self, states: Sequence[Tensor], others: Sequence[Tensor], on_batch: bool) -> bool:
        """As `Cpu.holds_states`."""
        return fused.what_to_keep(states, others, on_batch) != fused.NOTHING

    def obstacle(self, channels: int) -> str | None:
        """As `Cpu.obstacle`."""
        most = self.MOST_CHANNELS
        return f"the CUDA kernels mix at most {most} channels, not {channels}" if channels > most else None

    def memory(self, size: int) -> Tensor:
        """As `Cpu.memory`."""
        return fused.empty_bytes(size, self.device)

    workspace = memory

    def images(self, tensors: Sequence[Tensor], images: torch.dtype) -> list[Tensor]:
        """As `Cpu.images`. Those of 16 bits begin where the kernels can load four elements at once."""
        found = [formats.pixels_first(tensor.to(images)) for tensor in tensors]
        return found if images == torch.float32 else [_aligned(image) for image in found]

    def tables(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """As `Cpu.tables`, aligned."""
        return [None if tensor is None else _aligned(tensor) for tensor in fused.dense(*tensors)]

    def place(self, images: torch.dtype) -> tuple[str | int, ...]:
        """What the compiled functions take last: the images' dtype, the device's index, its current stream's handle."""
        return (str(images).removeprefix("torch."), *self.stream())

    def stream(self) -> tuple[int, int]:
        """The device's index and the handle of its current stream."""
        return self.device.index, torch.cuda.current_stream(self.device).cuda_stream


_CPU = Cpu()


def of(x: Tensor) -> Cpu | Cuda:
    """The engine for tensors on the device of `x`."""
    return Cuda(x.device) if x.is_cuda else _CPU


@functools.lru_cache(maxsize=256)
def _cpu_sizes(shape: tuple[int, ...], primitives: str, threads: int, level: str) -> Sizes:
    """level: the instruction set in use, on which the memory layout depends."""
    return Sizes(*backend.module("cpu").mixed_sizes(shape, rows(primitives), threads))


@functools.lru_cache(maxsize=256)
def _cuda_sizes(module: ModuleType, shape: tuple[int, ...], primitives: str, images: str) -> Sizes:
    return Sizes(*module.mixed_sizes(shape, rows(primitives), images))


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, where 16 bytes can be loaded at once."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
