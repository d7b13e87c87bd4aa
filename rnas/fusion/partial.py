"""Partial channels: what goes around the candidates is concatenated to what went through, and they are shuffled.

Both are linear, so that the edges into a node can be summed first and concatenated and shuffled once. A deferred tensor
carries here what is to be done to its sum.

Legend: N images, C channels, H W pixels, G groups of the shuffle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import fused
from ..kernels.partial import join, weighted_sum
from .calls import UNKNOWN, Held, Scale, hold, product, root_of, seen, stacked
from .deferred import HANDLERS, Deferred, Finish, is_open, value_of

# What has been done to the concatenated tensor: nothing, (N, G, C / G, H, W), (N, C / G, G, H, W), (N, C, H, W) again.
JOINED, SPLIT, SWAPPED, SHUFFLED = range(4)


@dataclass(frozen=True)
class Around(Finish):
    """Concatenates the sum to `sum(scale * tensor)` and shuffles the channels as far as `stage` says."""

    tensors: tuple[tuple[tuple[Scale, ...], Held], ...]  # scales, and what goes around
    first: bool
    """Whether the sum comes before what goes around it."""
    stage: int = JOINED
    groups: int = 1
    held: frozenset[int] | None = None
    """As `calls.held_by_modules`: all else that goes around may be written to later. None: nothing may."""

    @property
    def is_view(self) -> bool:
        """As `Finish.is_view`; what is shuffled is a copy."""
        return self.stage in (SPLIT, SWAPPED)

    def times(self, scale: Scale) -> Around:
        """Of the sum times `scale`."""
        return replace(self, tensors=tuple([((*scales, scale), held) for scales, held in self.tensors]))

    def plus(self, other: Finish) -> Around | None:
        """Of the sum of both; None where they do different things."""
        if not isinstance(other, Around):
            return None
        if (self.first, self.stage, self.groups) != (other.first, other.stage, other.groups):
            return None
        return replace(self, tensors=self.tensors + other.tensors)

    def apart(self, held: frozenset[int]) -> Around:
        """As `Finish.apart`."""
        return replace(self, held=held)

    def finished(self, total: Tensor, scope) -> Tensor:
        """What the deferred tensor is, from its sum."""
        held = [each for _, each in self.tensors]
        arounds = [scope.pooled(each.tensor) if is_open(each.tensor) else value_of(seen(each)) for each in held]
        scales = None
        if any(each for each, _ in self.tensors):
            scales = stacked([product(each) for each, _ in self.tensors], arounds[0])
        if self.held is not None and scales is not None and scales.requires_grad:  # the graph holds what goes around
            own = [not is_open(each.tensor) and id(root_of(x)) not in self.held for x, each in zip(arounds, held)]
            arounds = [copy_of(x) if copy else x for x, copy in zip(arounds, own)]
        if self.stage == SHUFFLED:
            return join(total, arounds, scales, self.groups, layout(arounds[0]), self.first)
        around = weighted_sum(arounds, scales)
        total = total.contiguous(memory_format=layout(around))  # most channels only go around
        total = torch.cat([total, around] if self.first else [around, total], dim=1)
        n, channels, height, width = total.shape
        if self.stage == JOINED:
            return total
        total = total.reshape(n, self.groups, channels // self.groups, height, width)
        return total if self.stage == SPLIT else total.transpose(1, 2)


@dataclass(frozen=True)
class Pooled(Finish):
    """What a pool makes of a tensor."""

    module: nn.Module
    x: Held

    def finished(self, total: None, scope) -> Tensor:
        """Its value."""
        return nn.Module.__call__(self.module, seen(self.x))


def copy_of(x: Tensor) -> Tensor:
    """x, in memory of its own; differentiable."""
    return fused.empty(x, x.shape, layout(x)).copy_(x)


def layout(x: Tensor) -> torch.memory_format:
    """channels_last where the images, or those of which they are a slice of channels, lie so; else contiguous."""
    last = x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1 and x.stride(3) != 1
    return torch.channels_last if last else torch.contiguous_format


def concatenated(scope, tensors: Sequence[Tensor]) -> Deferred | None:
    """torch.cat of a sum of candidates and of a tensor that goes around them; None where it is something else."""
    if len(tensors) != 2:
        return None
    mixed, around = tensors if is_open(tensors[0]) else tensors[::-1]
    if not is_open(mixed) or mixed._rnas_finish is not None or mixed._rnas_addends or mixed._rnas_source:
        return None
    if is_open(around) and not isinstance(around._rnas_finish, Pooled):
        return None
    n, channels, height, width = mixed._rnas_shape
    if around.dim() != 4 or (around.shape[0], *around.shape[2:]) != (n, height, width):
        return None
    around = around if is_open(around) else scope.interned(value_of(around))
    if around.dtype != mixed._rnas_like.dtype or around.device != mixed._rnas_like.device:
        return None
    held = Held(around, UNKNOWN) if is_open(around) else hold(around)
    finish = Around((((), held),), first=mixed is tensors[0])
    shape = torch.Size((n, channels + around.shape[1], height, width))
    return Deferred.make(scope, shape, mixed._rnas_like, mixed._rnas_groups, (), finish)


def _staged(x: Deferred, shape: tuple[int, ...], **changes) -> Deferred:
    finish = replace(x._rnas_finish, **changes)
    x._rnas_viewed |= finish.is_view
    return Deferred.make(x._rnas_scope, torch.Size(shape), x._rnas_like, x._rnas_groups, (), finish)


def _is_around(x, *stages: int) -> bool:
    return is_open(x) and isinstance(x._rnas_finish, Around) and x._rnas_finish.stage in stages


def _view(x, *shape):
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if not _is_around(x, JOINED, SWAPPED) or not all(isinstance(each, int) for each in shape):
        return NotImplemented
    sizes = x._rnas_shape
    if x._rnas_finish.stage == JOINED and len(shape) == 5 and -1 not in shape:
        n, groups, each, height, width = shape
        if (n, groups * each, height, width) == tuple(sizes):
            return _staged(x, shape, stage=SPLIT, groups=groups)
    if x._rnas_finish.stage == SWAPPED and len(shape) == 4:
        n, each, groups, height, width = sizes
        wanted = (n, each * groups, height, width)
        if all(a in (b, -1) for a, b in zip(shape, wanted)) and shape.count(-1) < 2:
            return _staged(x, wanted, stage=SHUFFLED)
    return NotImplemented


def _transpose(x, first, second):
    if not _is_around(x, SPLIT) or {first % 5, second % 5} != {1, 2}:
        return NotImplemented
    n, groups, each, height, width = x._rnas_shape
    return _staged(x, (n, each, groups, height, width), stage=SWAPPED)


def _contiguous(x, memory_format=torch.contiguous_format):
    if _is_around(x, SWAPPED, SHUFFLED) and memory_format == torch.contiguous_format:
        return x
    return NotImplemented


def _channel_shuffle(x, groups):
    if not _is_around(x, JOINED) or x._rnas_shape[1] % groups:
        return NotImplemented
    return _staged(x, x._rnas_shape, stage=SHUFFLED, groups=groups)


HANDLERS.update(dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _view))
HANDLERS.update(dict.fromkeys((Tensor.transpose, torch.transpose), _transpose))
HANDLERS[Tensor.contiguous] = _contiguous
HANDLERS.update(dict.fromkeys((torch.channel_shuffle, F.channel_shuffle), _channel_shuffle))
