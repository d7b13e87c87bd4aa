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
        batch = _batch_of(gradients)
        if batch is None:
            return backward(ctx, *gradients)
        unwrapped = [None if gradient is None else batch.unwrap(gradient) for gradient in gradients]
        sizes = [len(gradient) for gradient, inside in zip(unwrapped, map(batch.holds, gradients)) if inside]
        with batch.outside():
            found = []
            for i in range(sizes[0]):
                made = backward(ctx, *[g[i] if batch.holds(given) else g for g, given in zip(unwrapped, gradients)])
                found.append(made if isinstance(made, tuple) else (made,))
            stacked = [None if values[0] is None else torch.stack(values) for values in zip(*found)]
        return tuple([None if value is None else batch.wrap(value) for value in stacked])

    return each


class _Batch(NamedTuple):
    """The innermost of the batches that tensors are in."""

    holds: Callable[[Tensor | None], bool]
    """Whether a tensor is in it."""
    unwrap: Callable[[Tensor], Tensor]
    """All of a tensor, along its first dimension; itself where the batch does not hold it."""
    wrap: Callable[[Tensor], Tensor]
    """The opposite."""
    outside: Callable[[], contextlib.AbstractContextManager]
    """In which what is unwrapped is an ordinary tensor."""


def _batch_of(gradients: tuple[Tensor | None, ...]) -> _Batch | None:
    tensors = [gradient for gradient in gradients if gradient is not None]
    if any(map(_functorch.is_legacy_batchedtensor, tensors)):
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()

        def holds(tensor: Tensor | None) -> bool:
            return tensor is not None and _functorch.is_legacy_batchedtensor(tensor)

        def unwrap(tensor: Tensor) -> Tensor:
            return torch._remove_batch_dim(tensor, level, 1, 0) if holds(tensor) else tensor

        return _Batch(holds, unwrap, lambda tensor: torch._add_batch_dim(tensor, 0, level), contextlib.nullcontext)
    if _functorch.peek_interpreter_stack() is None:
        return None
    interpreter = pyfunctorch.retrieve_current_functorch_interpreter()
    level = interpreter.level()

    def inside(tensor: Tensor | None) -> bool:
        is_one = tensor is not None and _functorch.is_batchedtensor(tensor)
        return is_one and _functorch.maybe_get_level(tensor) == level

    def taken_out(tensor: Tensor) -> Tensor:
        value, place = _functorch._unwrap_batched(tensor, level)
        return value if place is None else value.movedim(place, 0)

    if not any(map(inside, tensors)):
        return None
    return _Batch(inside, taken_out, lambda tensor: _functorch._add_batch_dim(tensor, 0, level), interpreter.lower)
