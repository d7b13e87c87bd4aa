"""Batches of gradients, as `is_grads_batched`, vectorised Jacobians and `vmap` around `autograd.grad` make them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch import pyfunctorch


def one_at_a_time(backward: Callable) -> Callable:
    """The backward method of an autograd.Function for batches of gradients too: called for each in turn.

    Compiled code takes one.
    """

    @functools.wraps(backward)
    def each(ctx, *gradients):
        batch = _innermost(gradients)
        if batch is None:
            return backward(ctx, *gradients)
        parts = [None if gradient is None else batch.parts(gradient) for gradient in gradients]
        sizes = [len(part) for part in parts if part is not None]
        with batch.outside():  # where they may be in another batch
            if not sizes:
                return each(ctx, *gradients)
            ctx, found = _ReadOnce(ctx), []
            for index in range(sizes[0]):
                one = [gradient if part is None else part[index] for gradient, part in zip(gradients, parts)]
                made = each(ctx, *one)
                found.append(made if isinstance(made, tuple) else (made,))
            stacked = [None if values[0] is None else torch.stack(values) for values in zip(*found)]
        return tuple([None if value is None else batch.wrap(value) for value in stacked])

    return each


class _ReadOnce:
    """A context of an autograd.Function whose saved tensors are read once, as a checkpoint counts the reads."""

    def __init__(self, ctx) -> None:
        self._ctx = ctx

    @functools.cached_property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """Those of the context."""
        return self._ctx.saved_tensors

    def __getattr__(self, name: str):
        return getattr(self._ctx, name)


class _Batch(NamedTuple):
    """One that tensors are in."""

    parts: Callable[[Tensor], Tensor | None]
    """All of a tensor, along its first dimension; None where the batch does not hold it."""
    wrap: Callable[[Tensor], Tensor]
    """The opposite."""
    outside: Callable[[], contextlib.AbstractContextManager]
    """In which the parts are what they look like."""


def _innermost(gradients: tuple[Tensor | None, ...]) -> _Batch | None:
    """The batch that was made last. There are two kinds: those of autograd itself lie inside those of torch.func."""
    tensors = [gradient for gradient in gradients if gradient is not None]
    legacy = [tensor for tensor in tensors if _functorch.is_legacy_batchedtensor(tensor)]
    if legacy:

        def at(level: int, tensor: Tensor) -> Tensor | None:
            if not _functorch.is_legacy_batchedtensor(tensor):
                return None
            parts = torch._remove_batch_dim(tensor, level, 0, 0)  # none of a tensor that the batch does not hold
            return parts if len(parts) else None

        # How many there are is known to the thread that made them, and a GPU's backward pass runs in another.
        level = next(level for level in range(63, 0, -1) if any(at(level, each) is not None for each in legacy))
        parts, wrap = functools.partial(at, level), functools.partial(torch._add_batch_dim, batch_dim=0, level=level)
        return _Batch(parts, wrap, contextlib.nullcontext)
    if _functorch.peek_interpreter_stack() is None:
        return None
    interpreter = pyfunctorch.retrieve_current_functorch_interpreter()
    if interpreter.key() != _functorch.TransformType.Vmap:
        return None
    level = interpreter.level()

    def of_func(tensor: Tensor) -> Tensor | None:
        value, place = _functorch._unwrap_batched(tensor, level)
        return None if place is None else value.movedim(place, 0)

    return _Batch(of_func, lambda tensor: _functorch._add_batch_dim(tensor, 0, level), interpreter.lower)
