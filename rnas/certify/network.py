"""Bounds through whole networks: chains of layers, derived networks, and the supernet with its mixed edges.

On a mixed edge the architecture weights multiply the bounds of the candidates: `sum_o p_o * bound_o`.

Legend: E edges, K candidate operations, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..network import Network
from ..spaces import NUM_INPUTS
from ..supernet import FixedMixture, MixedCell, MixedOperation, Supernet
from .fixed import GlobalAverage
from .layers import check_evaluation, split_last, steps_of
from .linear import Linear, LinearMap, Scale
from .relaxation import MaxPool
from .tape import Tape, Value

Weights = Mapping[str, Tensor]


class Mixture:
    """A network with the architecture weights that it needs, checked: what bounds are computed of.

    network: a Supernet, a FixedMixture of one (its weights are used), a derived Network, or a chain of modules that
    have rules. mixing, edge_weights: as `Supernet.forward` takes them, None for all but a Supernet.
    Raises ValueError for weights that are missing, superfluous, not finite or of a wrong shape, for a network in
    training mode and for batch norms without running statistics.
    """

    def __init__(self, network: nn.Module, mixing: Weights | None, edge_weights: Weights | None, slope: str) -> None:
        if isinstance(network, FixedMixture):  # whose own flag says nothing
            if mixing is not None or edge_weights is not None:
                raise ValueError("a FixedMixture has its own mixing and edge weights: give None, or its supernet")
            network, mixing, edge_weights = network.supernet, network.mixing, network.edge_weights
        check_evaluation(network)
        self.network, self.mixing, self.edge_weights, self.slope = network, mixing, edge_weights, slope
        if isinstance(network, Supernet):
            space = network.space
            _check("mixing", mixing, space.cell_types, (len(space.edges), len(space.primitives)))
            if edge_weights is not None:
                _check("edge_weights", edge_weights, space.cell_types, (len(space.edges),))
        elif mixing is not None or edge_weights is not None:
            raise ValueError(f"only a Supernet takes mixing and edge weights, and this is a {type(network).__name__}")

    def features(self, tape: Tape, x: Value) -> tuple[Value, Linear | None]:
        """The bounds of what the last linear layer reads, and that layer, None where a chain ends in another."""
        network = self.network
        if not isinstance(network, Supernet | Network):
            steps = steps_of(network, self.slope)
            last = steps.pop() if steps and isinstance(steps[-1], Linear) else None
            return tape.chain(steps, x), last
        # The order of modules, not one joined chain: the batch norm of a stem belongs to its own convolution.
        x = tape.chain(steps_of(network.normalize, self.slope) + steps_of(network.stem, self.slope), x)
        s0 = s1 = x
        for index, cell in enumerate(network.cells):
            tape.mark()
            states = [tape.chain(steps_of(each, self.slope), s) for each, s in zip(cell.preprocess, (s0, s1))]
            if isinstance(cell, MixedCell):
                output = self._mixed_cell(tape, cell, states, network.cell_types[index])
            else:
                output = self._derived_cell(tape, cell, states)
            s0, s1 = s1, output
        tape.mark()
        classifier = network.classifier
        return tape.apply(GlobalAverage(), s1), Linear(classifier.weight, classifier.bias)

    def _derived_cell(self, tape: Tape, cell: nn.Module, states: list[Value]) -> Value:
        for paths, sources in zip(cell.nodes, cell.sources):
            terms = []
            for path, source in zip(paths, sources):
                one = states[source].bounds.lower.new_ones(())
                terms.append(self._term(tape, path, states[source], one))
            states.append(tape.combine(terms))
        return tape.concatenate([states[state] for state in cell.concat])

    def _mixed_cell(self, tape: Tape, cell: MixedCell, states: list[Value], cell_type: str) -> Value:
        like = states[0].bounds.lower
        weights = self.mixing[cell_type].to(like)
        scales = like.new_ones(len(weights)) if self.edge_weights is None else self.edge_weights[cell_type].to(like)
        edges = iter(zip(cell.mixed, weights, scales))
        for _ in range(cell.nodes):
            tape.mark()
            terms = []
            for source, (edge, p, scale) in zip(tuple(states), edges):
                if edge.partial == 1:
                    p = p if self.edge_weights is None else scale * p
                    terms += self._candidates(tape, edge, source, p)
                else:
                    terms.append((Scale(like.new_ones(())).scaled(scale), self._partial(tape, edge, source, p)))
            states.append(tape.combine(terms))
        return tape.concatenate(states[NUM_INPUTS:])

    def _candidates(self, tape: Tape, edge: MixedOperation, source: Value, p: Tensor) -> list[tuple[LinearMap, Value]]:
        return [self._term(tape, candidate, source, weight) for candidate, weight in zip(edge.candidates, p.unbind())]

    def _term(self, tape: Tape, module: nn.Module, source: Value, factor: Tensor) -> tuple[LinearMap, Value]:
        """One summand of a node. What candidates have in common, their ReLU and their pools, the tape shares."""
        steps, last = split_last(steps_of(module, self.slope), source.bounds.lower, factor)
        return last, tape.chain(steps, source)

    def _partial(self, tape: Tape, edge: MixedOperation, source: Value, p: Tensor) -> Value:
        """The first C / partial channels through the candidates, the others around them, shuffled."""
        count = source.bounds.shape[0]
        share = count // edge.partial
        mixed = tape.combine(self._candidates(tape, edge, tape.select(source, tuple(range(share))), p))
        around = tape.select(source, tuple(range(share, count)))
        if edge.stride == 2:
            around = tape.apply(MaxPool((2, 2), (2, 2), ceil_mode=True), around)
        order = tuple(part * share + channel for channel in range(share) for part in range(edge.partial))
        return tape.select(tape.concatenate([mixed, around]), order)


def _check(name: str, weights: Weights | None, cell_types: tuple[str, ...], shape: tuple[int, ...]) -> None:
    given = () if weights is None else tuple(weights)
    if set(given) != set(cell_types):
        raise ValueError(f"{name} needs the cell types {', '.join(cell_types)}, got {', '.join(given) or None}")
    for cell_type in cell_types:
        came = tuple(weights[cell_type].shape)
        if came != shape:
            raise ValueError(f"{name} of {cell_type!r} must have shape {shape}, got {came}")
        if not torch.isfinite(weights[cell_type]).all():
            raise ValueError(f"{name} of {cell_type!r} must be finite")
