"""`torch.stack` of deferred tensors, weighted and summed over the stack: another way to write a mixed operation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .calls import Scale, scale_of
from .deferred import HANDLERS, Deferred, Finish, copied, is_open, plus, times, value_of


@dataclass(frozen=True)
class Stack(Finish):
    """Stacks tensors along a new first dimension."""

    parts: tuple[Tensor, ...]

    def takes(self, other: Tensor) -> bool:
        """One number for each part, (K, 1, ..., 1)."""
        like = self.parts[0]._rnas_like
        shape = (len(self.parts), *[1] * self.parts[0].dim())
        return tuple(other.shape) == shape and other.dtype == like.dtype and other.device == like.device

    def times(self, scale: Scale) -> Stack:
        """Of the parts times a number, or each times its own."""
        number = scale_of(scale)
        own = isinstance(number, Tensor) and number.numel() > 1
        numbers = number.reshape(-1).unbind() if own else [number] * len(self.parts)
        return Stack(tuple([times(part, each) for part, each in zip(self.parts, numbers)]))

    def finished(self, total: None, scope) -> Tensor:
        """What torch.stack makes of the values."""
        return torch.stack([value_of(part) for part in self.parts])


def _stack(tensors, dim=0, *, out=None):
    tensors = tuple(tensors)
    first = next(each for each in tensors if type(each) is Deferred)
    if out is not None or dim not in (0, -1 - first.dim()) or not all(map(is_open, tensors)):
        return NotImplemented
    scope, shape = first._rnas_scope, first._rnas_shape
    if any(each._rnas_scope is not scope or each._rnas_shape != shape for each in tensors):
        return NotImplemented
    parts = tuple([copied(each) for each in tensors])
    return Deferred.make(scope, torch.Size((len(tensors), *shape)), first._rnas_like, (), (), Stack(parts))


def _sum(x, dim=None, keepdim=False, *, dtype=None, out=None):
    if not is_open(x) or not isinstance(x._rnas_finish, Stack) or keepdim or dtype is not None or out is not None:
        return NotImplemented
    if dim not in (0, -x.dim(), (0,), [0]):
        return NotImplemented
    first, *others = x._rnas_finish.parts
    for other in others:
        first = plus(first, other)
    return first if others else plus(first, 0)


HANDLERS[torch.stack] = _stack
HANDLERS.update(dict.fromkeys((torch.sum, Tensor.sum), _sum))
