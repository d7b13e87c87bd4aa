"""Random architectures, the control of every search: one drawn from the space, without a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """Knobs of random architectures; which one it is, the seed decides."""

    probabilities: tuple[float, ...] = ()
    """Of the space's operations other than `none`, in its order. Empty: all alike, as in the literature; ours."""

    def __post_init__(self) -> None:
        given = self.probabilities
        if given and not (all(0 <= each <= 1 for each in given) and math.isclose(sum(given), 1, abs_tol=1e-6)):
            raise ValueError(
                f"options.probabilities must be numbers from 0 to 1 that sum to 1; got {given}, sum {sum(given):g}"
            )


class Random(Method):
    """Per node two distinct inputs and per input an operation other than `none`, all independent.

    Inputs are uniform, operations too unless `probabilities` says otherwise.

    The search job trains nothing for it. Mixing weights are 1 where the architecture has the operation and 0 elsewhere,
    so that the supernet under them computes that architecture.

    Source: the control of Li and Talwalkar (UAI 2019, arXiv 1902.07638), here without their evaluation of several.
    """

    name = "random"
    Options = RandomOptions
    searches = False

    def __init__(self, options: RandomOptions, space: Space, seed: int) -> None:
        super().__init__(options, space, seed)
        self.chosen = nn.ParameterDict()
        for cell_type in space.cell_types:
            drawn = draw_cell(space, generator(seed, "random", cell_type), options.probabilities)
            # a parameter and not a buffer, because an optimizer refuses to have none
            self.chosen[cell_type] = nn.Parameter(drawn, requires_grad=False)

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


def draw_cell(
    space: Space, source: torch.Generator, probabilities: Sequence[float] = (), inputs_per_node: int = 2
) -> Tensor:
    """Mixing weights (E, K), zero but for a 1 on each of the `inputs_per_node` edges drawn for every node.

    probabilities: of the operations other than `none`; empty: all alike. Raises ValueError for a wrong number of them.
    """
    candidates = [index for index, primitive in enumerate(space.primitives) if primitive != "none"]
    if probabilities and len(probabilities) != len(candidates):
        names = ", ".join(space.primitives[index] for index in candidates)
        raise ValueError(
            f"options.probabilities must have one number for each of the {len(candidates)} operations {names}; "
            f"got {len(probabilities)}"
        )
    chances = torch.tensor(probabilities, dtype=torch.float64)
    weights = torch.zeros(len(space.edges), len(space.primitives))
    for state in space.concat:
        edges = [index for index, (_, target) in enumerate(space.edges) if target == state]
        for place in torch.randperm(len(edges), generator=source)[:inputs_per_node].tolist():
            if probabilities:
                operation = int(torch.multinomial(chances, 1, generator=source))
            else:
                operation = int(torch.randint(len(candidates), (), generator=source))
            weights[edges[place], candidates[operation]] = 1.0
    return weights
