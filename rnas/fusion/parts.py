"""Parts and copies of what has been computed, for who asks for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .calls import Held, seen
from .deferred import HANDLERS, Deferred, Finish, is_open, value_of


@dataclass(frozen=True)
class Detached(Finish):
    """What `.data` of a deferred tensor is."""

    of: Deferred

    def finished(self, total: None, scope) -> Tensor:
        """Its value, part of no graph."""
        return value_of(self.of).data


@dataclass(frozen=True)
class Slice(Finish):
    """Channels of a cell's output: one of its nodes, for who asks for it."""

    out: Held
    start: int
    channels: int
    layout: torch.memory_format

    def finished(self, total: None, scope) -> Tensor:
        """A copy, as the node and the output are tensors of their own."""
        return seen(self.out).narrow(1, self.start, self.channels).clone(memory_format=self.layout)


def _data(x):
    # In the forward of an autograd.Function, which a candidate was called in, it has to be a tensor that can leave it.
    if not is_open(x):
        return NotImplemented
    return Deferred.make(x._rnas_scope, x._rnas_shape, x._rnas_like, (), (), Detached(x))


HANDLERS[Tensor.data.__get__] = _data
