"""From sums of weighted candidates to calls of `kernels.mixed_op` and `kernels.mixed_cell`.

Legend: J nodes of a cell, S states that enter it, E edges, K candidates of an edge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import engine, formats
from ..kernels.mixed_op import PRIMITIVES, mixed_cell
from ..kernels.reference.mixed_op import SEPARABLE
from .calls import Call, Group, Scale, held_by_modules, hold, is_of_images, product, root_of, scale_of, seen, stacked
from .deferred import Deferred, is_open, value_of
from .partial import copy_of
from .parts import Slice

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
    if len({_shape(each) for each in inputs}) != 1 or len(_pool_norms(found)) > 1:
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
    out = _fused(states, edges, len(nodes), of_inputs.pop(), last, known, addends)
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
    edge = _as_edge(group, empty=True)
    if edge is not None:
        return [edge]
    parts, others = _parts(group, set())
    return [None] if others else [_as_edge(part, empty=True) for part in parts]


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


def _pool_norms(edges: Iterable[Edge]) -> set[bool]:
    """Whether pools are followed by norms, as far as there are pools."""
    return {edge.pool_norm for edge in edges if edge.pool_norm is not None}


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
    norms = _pool_norms(found)
    scaled = [edge for edge in found if edge.of_images]
    apart = bool(scaled) and not _take_scales(value_of(scaled[0].x), found)
    for edge in scaled if apart else ():
        state = scope.arranged(value_of(edge.x))
        made = _fused([state], [edge._replace(outer=edge.numbers)], 1, edge.stride, False, known)
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
        made = _fused(states, edges, 1, edges[0].stride, False, known)
        total = made if total is None else total + made
        scope.counts.edges += len(edges)
    return total


def _shared(groups: Iterable[Group]) -> set[int]:
    """The ids of calls whose result is used more than once: batch norms see it once."""
    counted = Counter(id(call) for group in groups for call in group.calls)
    return {each for each, count in counted.items() if count > 1}


def _edges(group: Group, shared: set[int]) -> tuple[list[Edge], list[tuple[Call, Scale | None]]]:
    """The group as edges that the kernels take, and the calls that they do not."""
    edge = _as_edge(group) if not shared else None
    if edge is not None and _pays(edge):
        return [edge], []
    parts, others = _parts(group, shared)
    edges = []
    for part in parts:
        made = _as_edge(part)
        if made is None or not _pays(made):
            others += zip(part.calls, part.scales)
        else:
            edges.append(made)
    return edges, others


def _parts(group: Group, shared: set[int]) -> tuple[list[Group], list[tuple[Call, Scale | None]]]:
    """The group as groups that may be edges, with each primitive once, and the calls that the kernels do not take."""
    parts: list[list[tuple[Call, Scale | None]]] = []
    others = []
    for call, scale in zip(group.calls, group.scales):
        if id(call) in shared or not _can_be_fused(call):
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


def _pays(edge: Edge) -> bool:
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


def _as_edge(group: Group, empty: bool = False) -> Edge | None:
    """The group as one edge, its candidates in the order of the kernels' primitives; None where it is none.

    empty: whether the candidate `none` by itself is an edge.
    """
    pairs = sorted(zip(group.calls, group.scales), key=lambda pair: _ORDER[pair[0].plan.guess.primitive])
    pairs, also = _merged(pairs)
    calls, scales = zip(*pairs)
    guesses = [call.plan.guess for call in calls]
    primitives = tuple([guess.primitive for guess in guesses])
    if len(set(primitives)) != len(primitives) or not all(map(_can_be_fused, calls)):
        return None
    if len({guess.stride for guess in guesses}) != 1 or (not empty and primitives == ("none",)):
        return None
    pool_norms = {guess.pool_norm for guess in guesses if "pool" in guess.primitive}
    if len(pool_norms) > 1:
        return None
    pool_norm = pool_norms.pop() if pool_norms else None
    return Edge(primitives, guesses[0].stride, pool_norm, calls, scales, group.outer, also)


def _merged(pairs: list[tuple[Call, Scale | None]]) -> tuple[list[tuple[Call, Scale | None]], tuple[Call, ...]]:
    """One call of each primitive without layers, such as a second skip connection, and the others of it."""
    kept: list[tuple[Call, Scale | None]] = []
    also: list[Call] = []
    for call, scale in pairs:
        before = kept[-1][0] if kept else call
        same = before is not call and before.plan.guess == call.plan.guess and not before.plan.has_layers
        if same and _can_be_fused(before) and _can_be_fused(call):
            both = [1.0 if each is None else scale_of(each) for each in (kept[-1][1], scale)]
            total = both[0] + both[1]
            kept[-1] = before, hold(total) if isinstance(total, Tensor) else total
            also.append(call)
        else:
            kept.append((call, scale))
    return kept, tuple(also)


def _can_be_fused(call: Call) -> bool:
    """Whether its batch norms have not seen it, and it is in the modes in which it was called."""
    return not call.consumed and call.value is None and call.state.modes == call.plan.modes()


def _shape(x: Tensor) -> torch.Size:
    return x._rnas_shape if type(x) is Deferred else x.shape


def is_edge(x: Deferred) -> bool:
    """Whether a deferred tensor is of candidates on one state: what an edge returns."""
    sources = {id(group.calls[0].x) for group in x._rnas_groups}
    return len(sources) == 1


# ---- calls -----------------------------------------------------------------------------------------------------------


def _fused(
    states: list[Tensor],
    edges: Sequence[Edge | None],
    nodes: int,
    stride: int,
    last: bool,
    known: frozenset[int],
    addends=(),
) -> Tensor:
    """What a cell of these edges computes; None: there is none.

    known: what the graph of the modules holds. addends: numbers that are added to each node.
    """
    calls = [() if edge is None else edge.calls for edge in edges]
    for call in chain(*calls, *[() if edge is None else edge.also for edge in edges]):
        seen(call.held)
        call.plan.check(call.state)
        call.consumed = True
    like, names = states[0], [() if edge is None else edge.primitives for edge in edges]
    given = [() if edge is None else edge.scales for edge in edges]
    scales = [[1.0 if each is None else scale_of(each) for each in row] for row in given]
    outer = [[1.0 if edge is None else product(edge.numbers)] for edge in edges]
    if any(addends):
        outer = [each * len(row) for each, row in zip(outer, scales)]
        for index, total in _totals(addends, edges, like):
            names[index] += ("ones",)
            scales[index].append(total)
            outer[index].append(1.0)
    weights = _table(scales, like)
    if any(edge is not None and edge.numbers for edge in edges):
        weights = weights * _table(outer, like)
    pool_norms = _pool_norms(edge for edge in edges if edge is not None)
    biases = None
    if any([call.plan.biased for row in calls for call in row]):
        biases = [[bias for call in row for bias in call.plan.biases()] for row in calls]
    out = mixed_cell(
        _free(states, edges, weights, known),
        weights,
        [[weight for call in row for weight in call.plan.weights()] for row in calls],
        [[norm for call in row for norm in call.plan.layers.norms] for row in calls],
        primitives=tuple(names),
        nodes=nodes,
        stride=stride,
        pool_norm=pool_norms.pop() if pool_norms else True,
        partial=1,
        edge_weights=None,
        last=last,
        biases=biases,
        image_scales=_image_scales(edges, like),
    )
    if out.requires_grad and not last and engine.of(like).READS_NODES:
        if out.is_contiguous(memory_format=torch.channels_last) and _are_held(states, edges, weights):
            return copy_of(out)
    return out


def _free(
    states: list[Tensor], edges: Sequence[Edge | None], weights: Tensor, known: frozenset[int]
) -> list[Tensor]:
    """The states, by a copy where only this graph would hold them, and not that of the modules: they may be written to.

    known: as `_fused`.
    """
    if not torch.is_grad_enabled() or not any(map(formats.is_taken, states)):
        return states
    given = {id(value_of(edge.x)) for edge in edges if edge is not None and not is_open(edge.x)}  # and not rearranged
    free = {id(x): x for x in states if formats.is_taken(x) and id(x) in given and id(root_of(x)) not in known}
    if not free or not _are_held(states, edges, weights):
        return states
    copies = {key: copy_of(x) for key, x in free.items()}
    return [copies.get(id(x), x) for x in states]


def _are_held(states: list[Tensor], edges: Sequence[Edge | None], weights: Tensor) -> bool:
    """Whether the graph of a cell holds its states, and on a GPU its nodes."""
    there = [edge for edge in edges if edge is not None]
    layers = [call.plan.layers for edge in there for call in edge.calls]
    tables = [weights, *[each for found in layers for each in found.parameters()]]
    on_batch = any([any(found.on_batch()) for found in layers])
    # Beside numbers for each image, what has no norms counts as on statistics of the batch.
    on_batch = on_batch or any([edge.of_images for edge in there])
    return engine.of(states[0]).holds_states(states, tables, on_batch)


def _image_scales(edges: Sequence[Edge | None], like: Tensor) -> Tensor | None:
    """(E, N), by which the images of each edge are multiplied; None for ones."""
    of_images = [() if edge is None else edge.of_images for edge in edges]
    if not any(of_images):
        return None
    ones = like.new_ones(like.shape[0])
    return torch.stack([product(each).reshape(-1) if each else ones for each in of_images])


def _table(rows: Sequence[Sequence[Tensor | float]], like: Tensor) -> Tensor:
    """Numbers and tensors (E, K), rows filled up with zeros, as `stacked` makes them."""
    most = max(map(len, rows))
    return stacked([each for row in rows for each in (*row, *[0.0] * (most - len(row)))], like).view(len(rows), most)


def _totals(addends, edges: Sequence[Edge | None], like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What is added to a node, and the first edge that there is into it."""
    nodes, first = len(addends), 0
    totals = _table([[product((*scales, held)) for scales, held in terms] for terms in addends], like).sum(1).unbind()
    for node, (terms, total) in enumerate(zip(addends, totals)):
        sources = (len(edges) - nodes * (nodes - 1) // 2) // nodes + node
        if terms:
            yield next(index for index in range(first, first + sources) if edges[index] is not None), total
        first += sources


def alone(call: Call) -> Tensor:
    """The candidate's own forward on its state, once: its batch norms see each call once, however often it is used."""
    value = call.value
    if value is None:
        x, (arguments, options) = value_of(seen(call.held)), call.extras
        call.plan.check(call.state)
        with call.plan.in_modes(call.state), _averages_kept(call.plan.layers.norms if call.consumed else ()):
            value = call.plan.original(x, *arguments, **options)
        call.own, call.consumed = hold(value), True
    return value


@contextmanager
def _averages_kept(norms):
    """Other buffers in place of the norms' own, which a graph may have saved, for as long as it lasts."""
    kept = [(norm, dict(norm._buffers)) for norm in norms if norm.training]
    try:
        for norm, buffers in kept:
            norm._buffers.update({name: None if each is None else each.clone() for name, each in buffers.items()})
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)
