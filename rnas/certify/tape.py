"""The record of a forward pass in bounds, along which linear bounds run back from the output to the input.

A value is computed once however many layers read it, and what its readers ask of it is added up before it goes through
its own layer: bounds of a sum are tighter than sums of bounds, and cheaper.

Legend: N images, S margins per image, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .fixed import Zero
from .interval import Interval
from .linear import Conv, LinearMap, channel_sums, per_channel
from .relaxation import MaxPool, ReLU

Step = LinearMap | ReLU | MaxPool
Pull = Callable[[Tensor], tuple[list[Tensor], Tensor | None]]


@dataclass(frozen=True)
class Value:
    """A place in the tape and the bounds of what stands there."""

    index: int
    bounds: Interval


@dataclass(frozen=True)
class _Record:
    output: int
    inputs: tuple[int, ...]
    pull: Pull


class Tape:
    """Bounds forward, one linear pass back.

    save_memory: compute the linear pass of each section (between two calls of `mark`) again for its derivative.
    """

    def __init__(self, save_memory: bool = False) -> None:
        self._count = 0
        self._sections: list[list[_Record]] = [[]]
        self._shared: dict[tuple, Value] = {}
        self._save_memory = save_memory

    def mark(self) -> None:
        """Begin a section."""
        self._sections.append([])

    def input(self, bounds: Interval) -> Value:
        """A value that no layer computed."""
        self._count += 1
        return Value(self._count - 1, bounds)

    def _add(self, bounds: Interval, inputs: Sequence[Value], pull: Pull) -> Value:
        value = self.input(bounds)
        self._sections[-1].append(_Record(value.index, tuple(each.index for each in inputs), pull))
        return value

    def apply(self, step: Step, value: Value) -> Value:
        """One layer. A layer without parameters is computed once per value that it is applied to."""
        if isinstance(step, LinearMap):
            step = step.cast(value.bounds.lower.dtype)
        key = (value.index, step) if not any(isinstance(v, Tensor) for v in vars(step).values()) else None
        if key in self._shared:
            return self._shared[key]

        def pull(a: Tensor) -> tuple[list[Tensor], Tensor | None]:
            coefficients, constant = step.pull(a, value.bounds)
            return [coefficients], constant

        result = self._add(step.image(value.bounds), [value], pull)
        if key is not None:
            self._shared[key] = result
        return result

    def chain(self, steps: Sequence[Step], value: Value) -> Value:
        """Layer after layer."""
        for step in steps:
            value = self.apply(step, value)
        return value

    def combine(self, terms: Sequence[tuple[LinearMap, Value]]) -> Value:
        """The sum of linear maps of several values, all of one shape."""
        terms = [(each, value) for each, value in terms if not isinstance(each, Zero)] or list(terms[:1])
        terms = [(each.cast(value.bounds.lower.dtype), value) for each, value in terms]
        dense = [(each, value) for each, value in terms if isinstance(each, Conv) and each.pointwise]
        others = [(each, value) for each, value in terms if not (isinstance(each, Conv) and each.pointwise)]
        center, radius = 0, 0
        for each, value in others:
            center = center + each.apply(value.bounds.center)
            radius = radius + each.apply(value.bounds.radius, magnitude=True)
        # All 1x1 convolutions of a node are one: its sum over the candidates is part of the matrix product.
        if dense:
            weight = torch.cat([each.weight for each, _ in dense], dim=1)
            magnitude = torch.cat([each.magnitude for each, _ in dense], dim=1)
            center = center + F.conv2d(torch.cat([value.bounds.center for _, value in dense], dim=1), weight)
            radius = radius + F.conv2d(torch.cat([value.bounds.radius for _, value in dense], dim=1), magnitude)
        constants = [each.constant for each, _ in terms if each.constant is not None]
        constant = sum(constants[1:], constants[0]) if constants else None
        if constant is not None:
            center = center + per_channel(constant, center)

        def pull(a: Tensor) -> tuple[list[Tensor], Tensor | None]:
            found = [each.transpose(a, value.bounds.shape) for each, value in others]
            if dense:
                found += F.conv2d(a, weight.transpose(0, 1)).split([each.weight.shape[1] for each, _ in dense], dim=1)
            return found, None if constant is None else channel_sums(a) @ constant

        values = [value for _, value in others + dense]
        return self._add(Interval(center - radius, center + radius), values, pull)

    def concatenate(self, values: Sequence[Value]) -> Value:
        """Channel after channel."""
        bounds = Interval(
            torch.cat([value.bounds.lower for value in values], dim=1),
            torch.cat([value.bounds.upper for value in values], dim=1),
        )
        sizes = [value.bounds.shape[0] for value in values]
        return self._add(bounds, values, lambda a: (list(a.split(sizes, dim=1)), None))

    def select(self, value: Value, channels: tuple[int, ...]) -> Value:
        """Some channels of a value, no two the same, in that order; computed once per value and order."""
        key = (value.index, channels)
        if key in self._shared:
            return self._shared[key]
        order = torch.tensor(channels, device=value.bounds.lower.device)
        bounds, shape = Interval(value.bounds.lower[:, order], value.bounds.upper[:, order]), value.bounds.shape

        def pull(a: Tensor) -> tuple[list[Tensor], Tensor | None]:
            return [a.new_zeros((a.shape[0], *shape)).index_copy(1, order, a)], None

        self._shared[key] = self._add(bounds, [value], pull)
        return self._shared[key]

    def back(self, a: Tensor, output: Value, source: Value) -> tuple[Tensor, Tensor]:
        """Turn the lower bound <a, output> into <coefficients, source> + constant.

        a: (S * N, *shape of the output) -> coefficients (S * N, *shape of the source), constant (S * N,).
        """
        waiting, constant = {output.index: a}, a.new_zeros(a.shape[0])
        for section in reversed(self._sections):
            if self._save_memory and torch.is_grad_enabled():
                waiting, constant = checkpoint(_back, section, waiting, constant, use_reentrant=False)
            else:
                waiting, constant = _back(section, waiting, constant)
        if source.index not in waiting:  # nothing but zeros lead from the source to the output
            return a.new_zeros((a.shape[0], *source.bounds.shape)), constant
        return waiting[source.index], constant


def _back(records: list[_Record], waiting: dict[int, Tensor], constant: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    waiting = dict(waiting)
    for record in reversed(records):
        a = waiting.pop(record.output, None)
        if a is None:
            continue
        found, more = record.pull(a)
        for index, coefficients in zip(record.inputs, found):
            waiting[index] = waiting[index] + coefficients if index in waiting else coefficients
        if more is not None:
            constant = constant + more
    return waiting, constant
