"""Candidates as edges of the kernels: on one state, each primitive once, of one stride.

Legend: K candidates of an edge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from ..kernels.mixed_op import PRIMITIVES
from ..kernels.reference.mixed_op import SEPARABLE
from .calls import Call, Group, Scale, hold, is_of_images, scale_of

_ORDER = {name: index for index, name in enumerate(PRIMITIVES)}


class Edge(NamedTuple):
    """Candidates that one fused edge can hold: on one state, each primitive once, of one stride."""

    primitives: tuple[str, ...]
    stride: int
    pool_norm: bool | None
    """None where there are no pools."""
    calls: tuple[Call, ...]
    scales: tuple[Scale | None, ...]
    outer: tuple[Scale, ...]
    also: tuple[Call, ...] = ()
    """Calls that compute the same as one of `calls`, and are part of its scale."""

    @property
    def x(self) -> Tensor:
        """The state."""
        return self.calls[0].x

    @property
    def numbers(self) -> tuple[Scale, ...]:
        """Those of `outer` that are one number."""
        return self.outer and tuple([each for each in self.outer if not is_of_images(each)])

    @property
    def of_images(self) -> tuple[Scale, ...]:
        """Those of `outer` that are a number for each image."""
        return self.outer and tuple([each for each in self.outer if is_of_images(each)])


def pool_norms(edges: Iterable[Edge]) -> set[bool]:
    """Whether pools are followed by norms, as far as there are pools."""
    return {edge.pool_norm for edge in edges if edge.pool_norm is not None}


def parts_of(group: Group, shared: set[int]) -> tuple[list[Group], list[tuple[Call, Scale | None]]]:
    """The group as groups that may be edges, with each primitive once, and the calls that the kernels do not take."""
    parts: list[list[tuple[Call, Scale | None]]] = []
    others = []
    for call, scale in zip(group.calls, group.scales):
        if id(call) in shared or not can_be_fused(call):
            others.append((call, scale))
            continue
        for part in parts:
            names = {each.plan.guess.primitive for each, _ in part}
            if call.plan.guess.primitive not in names and _alike(call, part[0][0]):
                part.append((call, scale))
                break
        else:
            parts.append([(call, scale)])
    return [Group(group.outer, *map(tuple, zip(*part))) for part in parts], others


def pays(edge: Edge) -> bool:
    """Whether the kernels are faster than the modules: not for one candidate without depthwise convolutions.

    To rearrange its images takes longer than is gained (one-hot NAS-Bench-201, C=16, batch 64, two AVX-512 cores: a
    step took 204 ms fused and 159 ms as it was).
    """
    return len(edge.calls) > 1 or edge.primitives[0] in SEPARABLE


def _alike(a: Call, b: Call) -> bool:
    first, second = a.plan.guess, b.plan.guess
    if first.stride != second.stride:
        return False
    pools = [each.pool_norm for each in (first, second) if "pool" in each.primitive]
    return len(set(pools)) < 2


def as_edge(group: Group, empty: bool = False) -> Edge | None:
    """The group as one edge, its candidates in the order of the kernels' primitives; None where it is none.

    empty: whether the candidate `none` by itself is an edge.
    """
    pairs = sorted(zip(group.calls, group.scales), key=lambda pair: _ORDER[pair[0].plan.guess.primitive])
    pairs, also = _merged(pairs)
    calls, scales = zip(*pairs)
    guesses = [call.plan.guess for call in calls]
    primitives = tuple([guess.primitive for guess in guesses])
    if len(set(primitives)) != len(primitives) or not all(map(can_be_fused, calls)):
        return None
    if len({guess.stride for guess in guesses}) != 1 or (not empty and primitives == ("none",)):
        return None
    with_norms = {guess.pool_norm for guess in guesses if "pool" in guess.primitive}
    if len(with_norms) > 1:
        return None
    pool_norm = with_norms.pop() if with_norms else None
    return Edge(primitives, guesses[0].stride, pool_norm, calls, scales, group.outer, also)


def _merged(pairs: list[tuple[Call, Scale | None]]) -> tuple[list[tuple[Call, Scale | None]], tuple[Call, ...]]:
    """One call of each primitive without layers, such as a second skip connection, and the others of it."""
    kept: list[tuple[Call, Scale | None]] = []
    also: list[Call] = []
    for call, scale in pairs:
        before = kept[-1][0] if kept else call
        same = before is not call and before.plan.guess == call.plan.guess and not before.plan.has_layers
        if same and can_be_fused(before) and can_be_fused(call):
            both = [1.0 if each is None else scale_of(each) for each in (kept[-1][1], scale)]
            total = both[0] + both[1]
            kept[-1] = before, hold(total) if isinstance(total, Tensor) else total
            also.append(call)
        else:
            kept.append((call, scale))
    return kept, tuple(also)


def can_be_fused(call: Call) -> bool:
    """Whether its batch norms have not seen it, and it is in the modes in which it was called."""
    return not call.consumed and call.value is None and call.state.modes == call.plan.modes()
