"""The rest of a node with partial channels: what went around its edges, joined to what went through them, shuffled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rnas.kernels import backend, batched, formats, fused


def join(
    mixed: Tensor,
    arounds: Sequence[Tensor],
    scales: Tensor | None,
    groups: int,
    layout: torch.memory_format,
    first: bool = True,
) -> Tensor:
    """`mixed` and the weighted sum of what went around, concatenated along the channels and shuffled.

    mixed: (N, M, H, W); arounds: (N, A, H, W) of each edge; scales: their weights (E,), None for ones; first: whether
    `mixed` comes before the others. The result (N, M + A, H, W) is of the layout that is asked for. Differentiable in
    everything, as often as wanted.

    Equivalent to::

        around = sum(scale * tensor for scale, tensor in zip(scales, arounds))
        F.channel_shuffle(torch.cat([mixed, around] if first else [around, mixed], dim=1), groups)
    """
    if not _covers(mixed, arounds, scales, layout):
        return _composed(mixed, arounds, scales, groups, layout, first)
    return _Join.apply((groups, layout, first), mixed, scales, *arounds)


def _covers(mixed: Tensor, arounds: Sequence[Tensor], scales: Tensor | None, layout: torch.memory_format) -> bool:
    """Whether compiled code takes the tensors as they lie."""
    shapes = {each.shape for each in arounds}
    if len(shapes) > 1 or (mixed.shape[0], *mixed.shape[2:]) != (arounds[0].shape[0], *arounds[0].shape[2:]):
        return False
    if not fused.compiled_serves([mixed, *arounds, *(() if scales is None else (scales,))]):
        return False
    return all([_steps(each, layout) is not None for each in arounds])


def _steps(x: Tensor, layout: torch.memory_format) -> tuple[int, int] | None:
    """From image to image, and from pixel to pixel or from channel to channel; None where they do not lie so."""
    _, channels, height, width = x.shape
    image, channel, row, pixel = x.stride()
    if layout == torch.channels_last:
        fits = (channel == 1 or channels == 1) and (row == width * pixel or height == 1)
        return (image, pixel if width > 1 else row) if fits else None
    fits = (pixel == 1 or width == 1) and (row == width or height == 1)
    return (image, channel) if fits else None


def _composed(mixed, arounds, scales, groups, layout, first) -> Tensor:
    """By plain PyTorch."""
    total = weighted_sum(arounds, scales)
    mixed = mixed.contiguous(memory_format=layout)
    joined = torch.cat([mixed, total] if first else [total, mixed], dim=1)
    return F.channel_shuffle(joined, groups).contiguous(memory_format=layout)


def weighted_sum(tensors: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """weights (E,), None for ones."""
    total = tensors[0] if weights is None else weights[0] * tensors[0]
    for index, each in enumerate(tensors[1:], start=1):
        total = total + each if weights is None else torch.addcmul(total, each, weights[index])
    return total


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, mixed, scales, *arounds):
        ctx.settings, ctx.sizes = settings, (mixed.shape, arounds[0].shape)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scales, *(arounds if ctx.needs_input_grad[2] else ()))
        groups, layout, first = settings
        n, channels, height, width = mixed.shape
        out = formats.empty_in(layout, mixed, channels + arounds[0].shape[1], height, width)
        through = formats.pixels_first(mixed)
        numbers = None if scales is None else scales.contiguous()
        backend.module("cpu").join_channels(
            (n, height * width, channels, arounds[0].shape[1], groups, len(arounds)),
            first,
            layout == torch.channels_last,
            through.data_ptr(),
            fused.addresses(arounds),
            [step for each in arounds for step in _steps(each, layout)],
            *fused.addresses([numbers, out]),
            torch.get_num_threads(),
        )
        return out

    @staticmethod
    @batched.one_at_a_time
    def backward(ctx, gradient):
        scales, *arounds = ctx.saved_tensors
        of_mixed, of_scales, *of_arounds = ctx.needs_input_grad[1:]
        groups, layout, first = ctx.settings
        (n, channels, height, width), around = ctx.sizes
        if gradient is None:
            return (None,) * len(ctx.needs_input_grad)
        steps = [_steps(each, layout) for each in arounds]  # hooks on what is saved may have lost the layout
        if torch.is_grad_enabled() or fused.is_watched([gradient]) or None in steps:
            return None, *_gradients(ctx, gradient, scales, arounds)
        gradient = formats.arranged(gradient, layout)
        grad_mixed = formats.empty_image(gradient, channels, height, width) if of_mixed else None
        one, numbers = scales is None, None if scales is None else scales.contiguous()  # one: the same for all edges
        wanted = [any(of_arounds)] if one else of_arounds
        grad_arounds = [formats.empty_in(layout, gradient, *around[1:]) if want else None for want in wanted]
        grad_scales = torch.empty_like(scales, memory_format=torch.contiguous_format) if of_scales else None
        backend.module("cpu").join_channels_backward(
            (n, height * width, channels, around[1], groups, len(wanted)),
            first,
            layout == torch.channels_last,
            fused.addresses(arounds) if arounds else [0] * len(wanted),
            [step for each in steps or [(0, 0)] * len(wanted) for step in each],
            *fused.addresses([numbers, gradient, grad_mixed]),
            fused.addresses(grad_arounds),
            *fused.addresses([grad_scales]),
            torch.get_num_threads(),
        )
        if one:
            grad_arounds = [grad_arounds[0] if want else None for want in of_arounds]
        return None, grad_mixed, grad_scales, *grad_arounds


def _gradients(ctx, gradient: Tensor, scales: Tensor | None, arounds: Sequence[Tensor]) -> list[Tensor | None]:
    """Those of `_Join` by plain PyTorch, to be differentiated once more."""
    groups, _, first = ctx.settings
    of_mixed, of_scales, *of_arounds = ctx.needs_input_grad[1:]
    (_, channels, _, _), (_, others, _, _) = ctx.sizes
    joined = F.channel_shuffle(gradient, (channels + others) // groups)
    parts = joined.split([channels, others] if first else [others, channels], dim=1)
    mixed, around = parts if first else parts[::-1]
    factors = [None] * len(of_arounds) if scales is None else scales.unbind()
    return [
        mixed if of_mixed else None,
        torch.stack([(around * each).sum() for each in arounds]) if of_scales else None,
        *[None if not want else around if s is None else s * around for want, s in zip(of_arounds, factors)],
    ]
