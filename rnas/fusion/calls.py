"""What a sum of candidates is made of: calls of candidates, numbers, and tensors that are read later.

Legend: K candidates of an edge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Held(NamedTuple):
    """A tensor that will be read later, and its version: it must not have been written to until then."""

    tensor: Tensor
    version: int


UNKNOWN = -1
"""The version of a tensor that has no value yet."""

Scale = Held | float
"""A number, or a tensor that holds one, or (N, 1, 1, 1) one for each image."""


def hold(x: Tensor) -> Held:
    """For `seen`. A deferred tensor is marked: `Scope.before_writing` sees to it that it stays what it is."""
    if type(x) is Tensor or not hasattr(x, "_rnas_source"):
        return Held(x, version_of(x))
    x._rnas_source = True
    return Held(x, UNKNOWN)


def version_of(x: Tensor) -> int:
    """Changes whenever the tensor is written to. Tensors of inference mode do not know."""
    return 0 if x.is_inference() else x._version


def seen(held: Held) -> Tensor:
    """The tensor. Raises RuntimeError where it has been written to in the meantime."""
    x, version = held
    if version == UNKNOWN:  # it has one where it has a value
        x, version = getattr(x, "_rnas_value", None), getattr(x, "_rnas_version", UNKNOWN)
    if x is not None and version_of(x) != version:
        raise RuntimeError(
            "rnas.accelerate: a tensor that a candidate operation was called on, or its result was multiplied with or "
            "added to, has been changed in place before the sum was computed; write `x = x + ...` for `x += ...` "
            "there, or call rnas.restore(model)"
        )
    return held.tensor


def scale_of(scale: Scale) -> Tensor | float:
    """The number or tensor that a sum is multiplied with."""
    return seen(scale) if type(scale) is Held else scale


def is_of_images(scale: Scale | None) -> bool:
    """Whether it is a number for each image, as those of drop path."""
    return type(scale) is Held and scale.tensor.dim() == 4 and scale.tensor.numel() > 1


def product(scales: tuple[Scale, ...]) -> Tensor | float:
    """Of all of them; of none 1."""
    first, *others = map(scale_of, scales or (1.0,))
    for scale in others:
        first = scale * first
    return first


def number_dtype(like: Tensor) -> torch.dtype:
    """In which numbers are added up and multiplied that images like these are multiplied with."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def stacked(scales: list[Tensor | float], like: Tensor) -> Tensor:
    """(len(scales),) in the dtype of `like`, in float32 for those of 16 bits, where a number multiplies in float32."""
    dtype = number_dtype(like)
    tensors, numbers = [], {}
    for scale in scales:
        if not isinstance(scale, Tensor):
            if scale not in numbers:
                numbers[scale] = like.new_tensor(scale, dtype=dtype)
            scale = numbers[scale]
        elif scale.dim():
            scale = scale.reshape(())
        tensors.append(scale if scale.dtype == dtype else scale.to(dtype))
    return torch.stack(tensors)


class Call:
    """A candidate, called on a state. `x` is a tensor or, where a node is not computed yet, a Deferred."""

    __slots__ = ("__weakref__", "consumed", "extras", "held", "own", "plan", "state", "x")

    def __init__(self, plan, x: Tensor, extras: tuple[tuple, dict]) -> None:
        self.plan, self.held, self.x = plan, hold(x), x
        self.state = plan.state()
        """Its weights and modes when it was called."""
        self.extras = extras
        """What it was called with behind x: arguments and options."""
        self.consumed = False
        """Whether its batch norms have seen it."""
        self.own: Held | None = None
        """Its own result, where that was asked for."""

    @property
    def value(self) -> Tensor | None:
        """Its own result, where there is one that nobody has written to."""
        return None if self.own is None or version_of(self.own.tensor) != self.own.version else self.own.tensor


def root_of(x: Tensor) -> Tensor:
    """x, or what it is a view of: to write to one is to write to both."""
    return x._base if x._is_view() else x


def held_by_modules(groups: Iterable[Group]) -> frozenset[int]:
    """The ids of the states that the graph of the modules would hold, or of their roots: pools are called on them."""
    pools = [call for group in groups for call in group.calls if "pool" in call.plan.guess.primitive]
    states = [getattr(call.x, "_rnas_value", call.x) for call in pools]
    return frozenset([id(root_of(x)) for x in states if x is not None and x.requires_grad])


class Group(NamedTuple):
    """`prod(outer) * sum_k scales[k] * calls[k]`: candidates on one state. A scale of None is 1."""

    outer: tuple[Scale, ...]
    calls: tuple[Call, ...]
    scales: tuple[Scale | None, ...]
