"""From sums of weighted candidates to calls of the fused operation: of a whole cell, or node by node.

Legend: J nodes of a cell, S states that enter it, E edges, K candidates of an edge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..kernels import engine, formats
from .calls import Call, Group, Scale, held_by_modules, hold, product, scale_of, seen
from .deferred import Deferred, is_open, value_of
from .edges import Edge, as_edge, parts_of, pays, pool_norms
from .invoke import alone, fused_cell
from .parts import Slice

# ---- cells -----------------------------------------------------------------------------------------------------------


def open_ancestors(x: Deferred) -> list[Deferred]:
    """The nodes without a value on which x depends, and x: each behind those that it depends on."""
    found: list[Deferred] = []
    _add_ancestors(x, found)
    return found


def _add_ancestors(x, found: list[Deferred]) -> None:
    if type(x) is not Deferred or x._rnas_value is not None or any(x is other for other in found):
        return
    for group in x._rnas_groups:
        for call in group.calls:
            if call.value is None:
                _add_ancestors(call.x, found)
    found.append(x)


def whole_cell(nodes: list[Deferred], scope, last: bool) -> Tensor | None:
    """All nodes by one call, where they make a cell; else None, and nothing is done.

    What mixed_cell returns: the nodes, (N, J * C, H', W'), or with `last` the last alone, (N, C, H', W'). Who asks for
    another one then gets what its candidates make of the states by themselves.

    A cell: each node is the sum of at most one edge from each of the S states and each node before it. A tensor from
    which several edges enter a node counts as so many states.
    """
    if _shared(group for node in nodes for group in node._rnas_groups):
        return None
    if any(node._rnas_finish is not None or not _are_numbers(node._rnas_addends) for node in nodes):
        return None
    made = [[edge for group in node._rnas_groups for edge in _whole(group)] for node in nodes]
    if any(edge is None for into in made for edge in into):
        return None
    own = {id(node) for node in nodes}
    inputs = [x for x in _sources(made) if id(x) not in own]
    edges = _complete(made, [*inputs, *nodes])
    if edges is None or not inputs or any(is_open(each) for each in inputs):
        return None
    found = [edge for edge in edges if edge is not None]
    strides = {(edge.stride, id(edge.x) in own) for edge in found}
    of_inputs = {stride for stride, inside in strides if not inside}
    if len(of_inputs) != 1 or any(stride != 1 for stride, inside in strides if inside):
        return None
    if len({_shape(each) for each in inputs}) != 1 or len(pool_norms(found)) > 1:
        return None
    # A state from which only candidates `none` leave may have no gradient at all.
    used = {id(edge.x) for edge in found if any(call.plan.guess.has_gradient for call in edge.calls)}
    if any(id(each) not in used for each in (*inputs, *(nodes[:-1] if last else ()))):
        return None
    if any(edge.of_images for edge in found) and (
        any(node._rnas_addends for node in nodes) or not _take_scales(inputs[0], found)
    ):
        return None
    states = [value_of(each) for each in inputs]
    addends = [node._rnas_addends for node in nodes]
    layout = formats.layout(states[0])
    known = held_by_modules(group for node in nodes for group in node._rnas_groups)
    out = fused_cell(states, edges, len(nodes), of_inputs.pop(), last, known, addends)
    scope.counts.cells += 1
    scope.counts.edges += len(found)
    if last:
        return out
    channels = out.shape[1] // len(nodes)
    for index, node in enumerate(nodes):
        node._rnas_groups, node._rnas_addends = (), ()
        node._rnas_finish = Slice(hold(out), index * channels, channels, layout)
    return out


def _whole(group: Group) -> list[Edge | None]:
    """The edges that the group is: one, or where it holds candidates of several on one state, those. None: no edge."""
    edge = as_edge(group, empty=True)
    if edge is not None:
        return [edge]
    parts, others = parts_of(group, set())
    return [None] if others else [as_edge(part, empty=True) for part in parts]


def _sources(made: list[list[Edge]]) -> list[Tensor]:
    """What edges begin at, each as often as edges of one node do. made: the edges of each node."""
    most: Counter[int] = Counter()
    for into in made:
        most |= Counter([id(edge.x) for edge in into])
    tensors = {id(edge.x): edge.x for into in made for edge in into}
    return [tensors[key] for key, count in most.items() for _ in range(count)]


def _complete(made: list[list[Edge]], states: list[Tensor]) -> list[Edge | None] | None:
    """The edges into each node, one from each state before it, None where there is none; None where they are others.

    made: those of each node. states: the inputs and the nodes.
    """
    edges: list[Edge | None] = []
    for index, into in enumerate(made):
        left = list(into)
        for source in states[: len(states) - len(made) + index]:
            edges.append(next((edge for edge in left if edge.x is source), None))
            left = [edge for edge in left if edge is not edges[-1]]
        if left:
            return None
    return edges


def _are_numbers(addends) -> bool:
    """Whether what is added to a node is the same everywhere."""
    return all([held.tensor.numel() == 1 and type(held.tensor) is not Deferred for _, held in addends])


def _take_scales(x: Tensor, edges: Sequence[Edge]) -> bool:
    """Whether the kernels multiply each image of edges like these, on a state like x, by a number of its own."""
    on_batch = [each for edge in edges for call in edge.calls for each in call.plan.layers.on_batch()]
    return engine.of(x).SCALES_ON_FIXED or all(on_batch)


# ---- nodes -----------------------------------------------------------------------------------------------------------


def node(x: Deferred, scope) -> None:
    """Gives x its value; what it depends on has one."""
    groups = x._rnas_groups
    if len(groups) == 1 and not x._rnas_addends and x._rnas_finish is None and not groups[0].outer:
        if len(groups[0].calls) == 1 and groups[0].scales[0] is None:  # nothing was made of it: as it would have been
            x.has_become(alone(groups[0].calls[0]))
            scope.counts.alone += 1
            return
    total = _sum(groups, scope)
    for scales, addend in x._rnas_addends:
        tensor, scales = seen(addend), list(map(scale_of, scales))
        if any([isinstance(scale, Tensor) and scale.requires_grad for scale in scales]):
            tensor = tensor.clone()  # which the graph is to hold: that of the modules holds the sum
        for scale in scales:
            tensor = tensor * scale
        total = tensor if total is None else total + tensor
    if x._rnas_finish is not None:
        total = x._rnas_finish.apart(held_by_modules(groups)).finished(total, scope)
    x.has_become(total)


def _sum(groups: Sequence[Group], scope) -> Tensor | None:
    """The sum of the groups: one call for all edges of a stride, and what no edge can hold by itself."""
    batches: dict[tuple, list[Edge]] = {}
    total: Tensor | None = None
    shared, found, known = _shared(groups), [], held_by_modules(groups)
    for group in groups:
        edges, others = _edges(group, shared)
        found += edges
        for call, scale in others:
            value = alone(call)
            for each in (scale, *group.outer):
                value = value if each is None else value * scale_of(each)
            total = value if total is None else total + value
            scope.counts.alone += 1
    norms = pool_norms(found)
    scaled = [edge for edge in found if edge.of_images]
    apart = bool(scaled) and not _take_scales(value_of(scaled[0].x), found)
    for edge in scaled if apart else ():
        state = scope.arranged(value_of(edge.x))
        made = fused_cell([state], [edge._replace(outer=edge.numbers)], 1, edge.stride, False, known)
        made = made * product(edge.of_images)
        total = made if total is None else total + made
        scope.counts.edges += 1
    for edge in found:
        if apart and edge.of_images:
            continue
        pool_norm = edge.pool_norm if len(norms) > 1 else None
        batches.setdefault((pool_norm, edge.stride, value_of(edge.x).shape), []).append(edge)
    for edges in batches.values():
        states = [scope.arranged(value_of(edge.x)) for edge in edges]
        made = fused_cell(states, edges, 1, edges[0].stride, False, known)
        total = made if total is None else total + made
        scope.counts.edges += len(edges)
    return total


def _shared(groups: Iterable[Group]) -> set[int]:
    """The ids of calls whose result is used more than once: batch norms see it once."""
    counted = Counter(id(call) for group in groups for call in group.calls)
    return {each for each, count in counted.items() if count > 1}


def _edges(group: Group, shared: set[int]) -> tuple[list[Edge], list[tuple[Call, Scale | None]]]:
    """The group as edges that the kernels take, and the calls that they do not."""
    edge = as_edge(group) if not shared else None
    if edge is not None and pays(edge):
        return [edge], []
    parts, others = parts_of(group, shared)
    edges = []
    for part in parts:
        made = as_edge(part)
        if made is None or not pays(made):
            others += zip(part.calls, part.scales)
        else:
            edges.append(made)
    return edges, others


def _shape(x: Tensor) -> torch.Size:
    return x._rnas_shape if type(x) is Deferred else x.shape


def is_edge(x: Deferred) -> bool:
    """Whether a deferred tensor is of candidates on one state: what an edge returns."""
    sources = {id(group.calls[0].x) for group in x._rnas_groups}
    return len(sources) == 1
