"""`torch.stack` of deferred tensors, weighted and summed over the stack: another way to write a mixed operation.

Zeros behind the stack, for no operation at all, are parts of it too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .calls import Scale, scale_of
from .deferred import HANDLERS, Deferred, Finish, copied, is_open, plus, times, value_of
from .partial import layout


@dataclass(frozen=True)
class Stack(Finish):
    """Stacks tensors along a new first dimension."""

    parts: tuple[Tensor, ...]

    def takes(self, other: Tensor) -> bool:
        """One number for each part, (K, 1, ..., 1)."""
        like = self.parts[0]._rnas_like
        shape = (len(self.parts), *[1] * self.parts[0].dim())
        return tuple(other.shape) == shape and other.dtype == like.dtype and other.device == like.device

    def times(self, scale: Scale) -> Stack | None:
        """Of the parts times a number, or each times its own."""
        if all(map(_is_zero, self.parts)):  # the gradient of the number is zero, and not None
            return None
        number = scale_of(scale)
        own = isinstance(number, Tensor) and number.numel() > 1
        numbers = number.reshape(-1).unbind() if own else [number] * len(self.parts)
        pairs = zip(self.parts, numbers)
        return Stack(tuple([part if _is_zero(part) else times(part, each) for part, each in pairs]))

    def finished(self, total: None, scope) -> Tensor:
        """What torch.stack makes of the values."""
        return torch.stack([value_of(part) for part in self.parts])


@dataclass(frozen=True)
class Zero(Finish):
    """Zeros (N, C, H, W), a part of a stack."""

    shape: torch.Size
    like: Tensor

    def finished(self, total: None, scope) -> Tensor:
        """They."""
        zeros = torch.zeros(self.shape, dtype=self.like.dtype, device=self.like.device)
        return zeros.contiguous(memory_format=layout(self.like))


@dataclass(frozen=True)
class View(Finish):
    """Some tensors of a stack, for who asks for them."""

    of: Deferred
    index: tuple[slice, ...]

    def finished(self, total: None, scope) -> Tensor:
        """A view of its value."""
        return value_of(self.of)[self.index]


def _stack(tensors, dim=0, *, out=None):
    tensors = tuple(tensors)
    first = next(each for each in tensors if type(each) is Deferred)
    if out is not None or dim not in (0, -1 - first.dim()) or not all(map(is_open, tensors)):
        return NotImplemented
    scope, shape = first._rnas_scope, first._rnas_shape
    if any(each._rnas_scope is not scope or each._rnas_shape != shape for each in tensors):
        return NotImplemented
    return _made(first, tuple([copied(each) for each in tensors]))


def _made(like: Deferred, parts: tuple[Deferred, ...]) -> Deferred:
    shape = torch.Size((len(parts), *parts[0]._rnas_shape))
    return Deferred.make(like._rnas_scope, shape, like._rnas_like, (), (), Stack(parts))


def _sum(x, dim=None, keepdim=False, *, dtype=None, out=None):
    if not _is_stack(x) or keepdim or dtype is not None or out is not None:
        return NotImplemented
    if dim not in (0, -x.dim(), (0,), [0]):
        return NotImplemented
    parts = [part for part in x._rnas_finish.parts if not _is_zero(part)]
    if not parts:
        return NotImplemented
    first, *others = parts
    for other in others:
        first = plus(first, other)
    return first if others else plus(first, 0)


def _item(x, index):
    """Some tensors of a stack. Of others all or nothing, as where partial channels are all channels."""
    index = index if type(index) is tuple else (index,)
    if not is_open(x) or len(index) > x.dim() or not all(map(_is_simple, index)):
        return NotImplemented
    shape = torch.empty(x._rnas_shape, device="meta")[index].shape
    if _is_stack(x):
        return Deferred.make(x._rnas_scope, shape, x._rnas_like, (), (), View(x, index))
    if not shape.numel():
        return x._rnas_like.new_empty(shape)
    return x if shape == x._rnas_shape else NotImplemented


def _zeros_like(x):
    """Of parts of a stack."""
    of = x._rnas_finish.of if is_open(x) and isinstance(x._rnas_finish, View) else x
    if not _is_stack(of) or x.dim() != of.dim() or 0 in x._rnas_shape:
        return NotImplemented
    zero = Zero(x._rnas_shape[1:], x._rnas_like)
    part = Deferred.make(x._rnas_scope, zero.shape, x._rnas_like, (), (), zero)
    return _made(x, (part,) * x._rnas_shape[0])


def _cat(tensors, dim=0, *, out=None):
    """Of stacks, along the dimension of the stack; of others, along that of channels."""
    tensors = tuple(tensors)
    if out is not None or dim not in (0, -5) or not all(map(_is_stack, tensors)):
        return _cat_channels(tensors, dim, out=out)
    parts = tuple([copied(part) for each in tensors for part in each._rnas_finish.parts])
    scope, shape = tensors[0]._rnas_scope, parts[0]._rnas_shape
    if any(each._rnas_scope is not scope or each._rnas_shape != shape for each in parts):
        return NotImplemented
    return _made(tensors[0], parts)


def _is_stack(x) -> bool:
    return is_open(x) and isinstance(x._rnas_finish, Stack)


def _is_zero(x: Deferred) -> bool:
    return isinstance(x._rnas_finish, Zero)


def _is_simple(index) -> bool:
    """Whether it is a slice whose result has no other order."""
    return type(index) is slice and all(each is None or type(each) is int for each in (index.start, index.stop))


_cat_channels = HANDLERS[torch.cat]
HANDLERS.update(dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat))
HANDLERS[torch.stack] = _stack
HANDLERS[torch.zeros_like] = _zeros_like
HANDLERS[Tensor.__getitem__] = _item
HANDLERS.update(dict.fromkeys((torch.sum, Tensor.sum), _sum))
