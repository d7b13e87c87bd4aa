"""Memory formats of images: channels last, as the kernels have them, and channels first, and from one to the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnas.kernels import backend, batched, fused


def layout(x: Tensor) -> torch.memory_format:
    """channels_last where the images are dense in that order and not in the usual one, else contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def pixels_first(tensor: Tensor) -> Tensor:
    """(N, C, H, W) as a dense (N, H, W, C); no copy where it is channels_last."""
    return arranged(tensor, torch.channels_last).permute(0, 2, 3, 1).contiguous()


def arranged(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Images (N, C, H, W) in a memory format, themselves where they are; differentiable.

    What computed x gets its gradient in the format of x, of which its own kernels are fast, unless that are ours.

    Equivalent to: x.contiguous(memory_format=layout)
    """
    matrices = None if x.is_contiguous(memory_format=layout) else _matrices(x, layout)
    if matrices is None:
        return x.contiguous(memory_format=layout)
    if not torch.is_grad_enabled() or not x.requires_grad:
        return _transposed(x, layout, matrices)
    back = torch.contiguous_format if layout == torch.channels_last and not takes_any_format(x) else None
    return _Arranged.apply(x, layout, matrices, back)


def _matrices(x: Tensor, layout: torch.memory_format) -> tuple[int, int, int] | None:
    """Rows, columns and what lies between two rows, where the images are matrices that compiled code transposes."""
    if not fused.compiled_serves((x,)) or x.numel() < _SMALLEST:
        return None
    _, channels, height, width = x.shape
    _, channel, row, pixel = x.stride()
    if layout == torch.channels_last:
        fits, made = pixel == 1 and row == width, (channels, height * width, channel)
    else:
        fits, made = channel == 1 and row == width * pixel, (height * width, channels, pixel)
    return made if fits else None


_SMALLEST = 2**15
"""Elements from which on a call of compiled code pays."""


def _transposed(x: Tensor, layout: torch.memory_format, matrices: tuple[int, int, int]) -> Tensor:
    rows, columns, between = matrices
    out = empty_in(layout, x, *x.shape[1:])
    place = (x.data_ptr(), x.stride(0), between, out.data_ptr())
    backend.module("cpu").transpose(x.shape[0], rows, columns, *place, torch.get_num_threads())
    return out


_WITH_ANY_FORMAT: list[type] = []


def with_any_format(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Decorates functions whose backward pass takes gradients of images in either memory format."""
    _WITH_ANY_FORMAT.append(function._backward_cls)
    return function


def takes_any_format(x: Tensor) -> bool:
    """Whether one of those has computed x."""
    return isinstance(x.grad_fn, tuple(_WITH_ANY_FORMAT))


@with_any_format
class _Arranged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layout, matrices, back):
        ctx.set_materialize_grads(False)
        ctx.back = back  # the format of the gradient; None: as it comes
        return _transposed(x, layout, matrices)

    @staticmethod
    @batched.one_at_a_time
    def backward(ctx, gradient):
        if gradient is not None and ctx.back is not None:
            gradient = arranged(gradient, ctx.back)
        return gradient, None, None, None


def taken(x: Tensor) -> Tensor:
    """Images in the memory format of the CPU's kernels, for both passes: to be called in front of a registered op.

    A compiler, and a GPU, are given x itself: the op rearranges it.
    """
    return x if is_taken(x) else arranged(x, torch.channels_last)


def all_taken(images: Sequence[Tensor]) -> list[Tensor]:
    """`taken` of each; of what comes several times, once."""
    if torch.compiler.is_compiling():
        return list(images)
    found = {key: taken(x) for key, x in {id(x): x for x in images}.items()}
    return [found[id(x)] for x in images]


def is_taken(x: Tensor) -> bool:
    """Whether `taken` gives x itself."""
    return not x.is_cpu or x.is_contiguous(memory_format=torch.channels_last) or torch.compiler.is_compiling()


def empty_image(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An empty (N, channels, height, width), channels_last."""
    return empty_in(torch.channels_last, like, channels, height, width)


def empty_in(layout: torch.memory_format, like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An empty (N, channels, height, width) in a memory format."""
    return fused.empty(like, (like.shape[0], channels, height, width), layout)
