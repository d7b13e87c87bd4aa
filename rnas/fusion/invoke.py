"""Calls: of `kernels.mixed_cell` for some edges, and of a candidate by itself.

Legend: E edges, K candidates of an edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor

from ..kernels import engine, formats
from ..kernels.mixed_op import mixed_cell
from .calls import Call, hold, product, root_of, scale_of, seen, stacked
from .deferred import is_open, value_of
from .edges import Edge, pool_norms
from .partial import copy_of


def fused_cell(
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
    with_norms = pool_norms(edge for edge in edges if edge is not None)
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
        pool_norm=with_norms.pop() if with_norms else True,
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

    known: as `fused_cell`.
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
