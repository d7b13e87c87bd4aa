"""Random architectures, the control of every search: one drawn uniformly from the space, without a search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import attacks
from ..seeding import generator
from ..spaces import Space
from ..supernet import Supernet
from .method import Batch, Level, LevelResult, Method, Mixing, SearchStep, accuracy


@dataclass(frozen=True)
class RandomOptions:
    """A random architecture has no knobs: its seed decides it."""


class Random(Method):
    """Per node two distinct inputs and per input an operation other than `none`, all uniform and independent.

    The search job trains nothing for it. Mixing weights are 1 where the architecture has the operation and 0 elsewhere,
    so that the supernet under them computes that architecture.

    Source: the control of Li and Talwalkar (UAI 2019, arXiv 1902.07638), here without their evaluation of several.
    """

    name = "random"
    Options = RandomOptions
    searches = False

    def __init__(self, options: RandomOptions, space: Space, seed: int) -> None:
        super().__init__(options, space, seed)
        self.chosen = nn.ParameterDict(
            {
                # a parameter and not a buffer, because an optimizer refuses to have none
                cell_type: nn.Parameter(draw_cell(space, generator(seed, "random", cell_type)), requires_grad=False)
                for cell_type in space.cell_types
            }
        )

    def mixing(self) -> Mixing:
        """1 for the operations of the architecture and 0 for all others, (E, K) per cell type."""
        return dict(self.chosen.items())

    def prepare(self, supernet: Supernet, x: Tensor, y: Tensor, step: SearchStep, level: Level) -> Batch:
        """The clean images."""
        return Batch(x, y)

    def weight_loss(self, supernet: Supernet, train: Batch, step: SearchStep) -> tuple[Tensor, Tensor]:
        """Cross entropy of the architecture on clean images."""
        logits = self.logits(supernet, train.x, constant=True)
        return cross_entropy(logits, train.y), logits

    def architecture_step(self, supernet: Supernet, train: Batch, valid: Batch, step: SearchStep) -> LevelResult:
        """The architecture stays; its loss on D_V, by batch statistics."""
        with attacks.frozen(supernet, statistics="batch"), torch.no_grad():
            logits = self.logits(supernet, valid.x, constant=True)
        return LevelResult(cross_entropy(logits, valid.y).item(), accuracy(logits, valid.y))


def draw_cell(space: Space, source: torch.Generator, inputs_per_node: int = 2) -> Tensor:
    """Mixing weights (E, K), zero but for a 1 on each of the `inputs_per_node` edges drawn for every node."""
    candidates = [index for index, primitive in enumerate(space.primitives) if primitive != "none"]
    weights = torch.zeros(len(space.edges), len(space.primitives))
    for state in space.concat:
        edges = [index for index, (_, target) in enumerate(space.edges) if target == state]
        for place in torch.randperm(len(edges), generator=source)[:inputs_per_node].tolist():
            operation = int(torch.randint(len(candidates), (), generator=source))
            weights[edges[place], candidates[operation]] = 1.0
    return weights
