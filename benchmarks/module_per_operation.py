"""The supernet as the code bases of this field write it: every candidate a module, called in a loop.

This is what `rnas` is compared with. The modules, their parameters and their averages are the supernet's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from rnas.kernels.reference.relu_conv_norm import factorized_reduce
from rnas.operations import ConvBN, FactorizedReduce, ReLUConvBN
from rnas.spaces import NUM_INPUTS
from rnas.supernet import MixedCell, MixedOperation, Supernet

Edge = Callable[[MixedOperation, Tensor, tuple[Tensor, ...]], Tensor]


def edge(mixed: MixedOperation, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """sum_o weights[o] * o(x), one candidate after the other."""
    return sum(weight * candidate(x) for weight, candidate in zip(weights, mixed.candidates))


def use(supernet: Supernet, run: Callable[[MixedOperation], Edge] = lambda mixed: edge) -> None:
    """Makes a supernet compute in this way, in place. run: gives each edge the function that computes it."""
    for module in supernet.modules():
        if isinstance(module, MixedCell):
            module.forward = partial(_cell, module, [run(mixed) for mixed in module.mixed])
        elif isinstance(module, (ConvBN, ReLUConvBN)):
            module.forward = partial(nn.Sequential.forward, module)
        elif isinstance(module, FactorizedReduce):
            module.forward = partial(_factorized_reduce, module)
    supernet.forward = partial(_supernet, supernet)


def _factorized_reduce(module: FactorizedReduce, x: Tensor) -> Tensor:
    return factorized_reduce(x, module.conv_1.weight, module.conv_2.weight, module.bn)


def _cell(cell: MixedCell, runs: list[Edge], s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
    states = [cell.preprocess[0](s0), cell.preprocess[1](s1)]
    edges = iter(zip(cell.mixed, runs, weights.unbind()))
    for _ in range(cell.nodes):
        pending = [(state, *next(edges)) for state in states]
        states.append(sum(run(mixed, state, row.unbind()) for state, mixed, run, row in pending))
    return torch.cat(states[NUM_INPUTS:], dim=1)


def _supernet(supernet: Supernet, x: Tensor, mixing: dict[str, Tensor], edge_weights: None = None) -> Tensor:
    s0 = s1 = supernet.stem(supernet.normalize(x))
    for cell, cell_type in zip(supernet.cells, supernet.cell_types):
        s0, s1 = s1, cell(s0, s1, mixing[cell_type])
    return supernet.classifier(s1.mean(dim=(2, 3)))
