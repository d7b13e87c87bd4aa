"""What a search method decides, and what all methods share.

A method owns the architecture parameters and says how they become mixing weights, which inputs each level of the search
sees, and what each level minimises. The job in `rnas.search` owns data, optimizers, checkpoints and progress.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..config import AttackConfig
from ..genotype import Genotype
from ..seeding import generator
from ..spaces import Space
from ..supernet import FixedMixture, Supernet

if TYPE_CHECKING:
    from ..graphs import Graphs

Mixing = dict[str, Tensor]
Level = Literal["weights", "architecture"]


@dataclass(frozen=True)
class Batch:
    """One level's input: x (N, C, H, W) in [0, 1], y (N,), and perturbed images where the method made some."""

    x: Tensor
    y: Tensor
    x_adv: Tensor | None = None
    draws: Mapping[str, Tensor] = field(default_factory=dict)
    """Random numbers of the level's step, by name: a step that may become a CUDA graph draws none itself."""

    @property
    def inputs(self) -> Tensor:
        """The perturbed images where there are any, else the clean ones."""
        return self.x if self.x_adv is None else self.x_adv


@dataclass(frozen=True)
class SearchStep:
    """Where the search stands, for methods whose rules depend on it."""

    epoch: int
    index: int
    attack: AttackConfig
    weight_optimizer: torch.optim.Optimizer
    generator: Callable[[str], torch.Generator]
    """Gives the generator of a purpose; its numbers depend on seed, purpose, epoch and batch alone."""
    epochs: int = 0
    """Epochs of the whole search, for schedules; 0: not known."""
    graphs: Graphs | None = None
    """The CUDA graphs of the search; None: everything runs eagerly."""
    captured: bool = False
    """Whether this step is for a function that may become a graph."""


@dataclass(frozen=True)
class SearchPlan:
    """What is known of a search before it starts, for methods to refuse what could not work."""

    epochs: int
    warmup_epochs: int
    """Epochs at the start without an architecture step; fewer than `epochs`."""
    num_classes: int


@dataclass(frozen=True)
class LevelResult:
    """What one level reports: mean loss, accuracy in [0, 1] on the inputs it saw, and other numbers worth logging."""

    loss: float
    accuracy: float
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Uncaptured:
    """Why the step of a level cannot become a CUDA graph: the predicate of a sentence about the method."""

    reason: str


class Method(nn.Module, ABC):
    """Base of the search methods. Its parameters and buffers are the architecture's, and go into checkpoints.

    Args:
        options: the method's knobs, an instance of its `Options`.
        space: the search space.
        seed: of the initial architecture parameters.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    spaces: ClassVar[tuple[str, ...]] = ()
    """Names of the spaces it can search; empty: all."""
    searches: ClassVar[bool] = True
    """Whether it learns. If not, the search job writes the architecture that the method starts with."""

    def __init__(self, options: Any, space: Space, seed: int) -> None:
        super().__init__()
        self.options = options
        self.space = space

    @classmethod
    def check(cls, options: Any, plan: SearchPlan) -> None:
        """Refuse options that do not fit the search, above all a part of the method that would never act in it.

        options: an instance of `Options`. Raises ValueError with key, value, and what to type instead.
        """

    @property
    def partial(self) -> int:
        """K of partial channels (PC-DARTS) in the supernet that the method searches; 1: all channels."""
        return 1

    @abstractmethod
    def mixing(self) -> Mixing:
        """Mixing weights of every cell type, (E, K), differentiable in the architecture parameters."""

    def edge_weights(self) -> dict[str, Tensor] | None:
        """Weights of the edges of every cell type, (E,), differentiable likewise; None: all edges weigh 1."""
        return None

    def logits(self, supernet: Supernet, x: Tensor, *, constant: bool = False) -> Tensor:
        """Logits (N, classes) of the supernet on x under the method's weights; constant: without a graph to them."""
        if constant:
            return FixedMixture(supernet, self.mixing(), self.edge_weights())(x)
        return supernet(x, self.mixing(), self.edge_weights())

    def classifier(self, supernet: Supernet) -> FixedMixture:
        """The supernet under the method's weights as they are now, as attacks want it."""
        return FixedMixture(supernet, self.mixing(), self.edge_weights())

    def capture_key(self, level: Level, step: SearchStep) -> Hashable | Uncaptured:
        """What the step of `level` depends on beside tensors, options and `step.attack`: its CUDA graph is for that.

        The step is `weight_loss` ("weights") or `architecture_step`. It may become a graph if it reads no number from
        the device but by `number` and `accuracy`, draws no random numbers (see `Batch.draws`), and keeps no tensor that
        it made.
        """
        return Uncaptured("does not say what it depends on")

    @abstractmethod
    def prepare(self, supernet: Supernet, x: Tensor, y: Tensor, step: SearchStep, level: Level) -> Batch:
        """The batch that `level` will see: attacks and noise are made here, before either level moves."""

    @abstractmethod
    def weight_loss(self, supernet: Supernet, train: Batch, step: SearchStep) -> tuple[Tensor, Tensor]:
        """Loss of the weights on D_T and the logits (N, classes); the architecture is a constant here."""

    @abstractmethod
    def architecture_step(self, supernet: Supernet, train: Batch, valid: Batch, step: SearchStep) -> LevelResult:
        """Put the gradient of the architecture's objective into `.grad` of the method's parameters.

        Must leave weights, BN statistics and `.grad` of the supernet as they were.
        """

    def remarks(self) -> list[str]:
        """What the user of the result should know, a sentence each, such as a constraint that does not hold.

        Read when the search has ended, from parameters and buffers alone: a resumed search says the same.
        """
        return []

    def genotype(self) -> Genotype:
        """The architecture that the parameters stand for now."""
        with torch.no_grad():
            return discretise(self.space, self.mixing(), self.edge_weights())


def initial_alpha(space: Space, seed: int) -> nn.ParameterDict:
    """Architecture parameters alpha, (E, K) per cell type, drawn from 1e-3 * N(0, 1) as in DARTS."""
    shape = (len(space.edges), len(space.primitives))
    return nn.ParameterDict(
        {
            cell_type: nn.Parameter(1e-3 * torch.randn(shape, generator=generator(seed, "alpha", cell_type)))
            for cell_type in space.cell_types
        }
    )


def initial_beta(space: Space, seed: int) -> nn.ParameterDict:
    """Edge parameters beta, (E,) per cell type, drawn from 1e-3 * N(0, 1)."""
    count = len(space.edges)
    return nn.ParameterDict(
        {
            cell_type: nn.Parameter(1e-3 * torch.randn(count, generator=generator(seed, "beta", cell_type)))
            for cell_type in space.cell_types
        }
    )


def edge_softmax(space: Space, beta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """softmax(beta) over the edges into each node, (E,) per cell type; the edges lie node by node (PC-DARTS)."""
    targets = [target for _, target in space.edges]
    into = [targets.count(target) for target in space.concat]
    return {
        cell_type: torch.cat([node.softmax(dim=0) for node in each.split(into)]) for cell_type, each in beta.items()
    }


def discretise(
    space: Space, mixing: Mixing, edge_weights: dict[str, Tensor] | None = None, inputs_per_node: int = 2
) -> Genotype:
    """The DARTS rule: per node keep the edges whose strongest operation other than `none` weighs most, each with it.

    mixing: cell type -> weights (E, K). edge_weights: cell type -> (E,), by which those count, as in PC-DARTS. Ties go
    to the earlier edge and operation.
    """
    candidates = [index for index, primitive in enumerate(space.primitives) if primitive != "none"]
    cells = {}
    for cell_type in space.cell_types:
        strengths, winners = mixing[cell_type][:, candidates].max(dim=1)
        if edge_weights is not None:
            strengths = strengths * edge_weights[cell_type]
        nodes = []
        for state in space.concat:
            edges = [index for index, (_, target) in enumerate(space.edges) if target == state]
            kept = sorted(edges, key=lambda index: -float(strengths[index]))[:inputs_per_node]
            nodes.append(
                tuple(
                    (space.primitives[candidates[int(winners[index])]], space.edges[index][0]) for index in sorted(kept)
                )
            )
        cells[cell_type] = tuple(nodes)
    return Genotype(cells, space.concat)


def entropy(mixing: Mixing) -> dict[str, float]:
    """Mean entropy of the edges' normalised mixing weights per cell type, in nats: from ln K (undecided) to 0."""
    result = {}
    for cell_type, weights in mixing.items():
        share = weights.detach() / weights.detach().sum(dim=1, keepdim=True).clamp_min(1e-12)
        result[cell_type] = float(torch.special.entr(share).sum(dim=1).mean())
    return result


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of correct predictions; logits (N, classes), y (N,). A `number`."""
    return number((logits.argmax(dim=1) == y).float().mean())


def number(value: Tensor) -> float:
    """The value of a tensor of one element; inside `deferred` a float64 tensor of no dimension in its place.

    Arithmetic on float64 tensors gives the bits of that on Python numbers, so a formula need not know which it has.
    """
    return value.detach().double() if _deferred.get() else value.item()


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, `number` does not wait for the device."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


_deferred: ContextVar[bool] = ContextVar("deferred", default=False)
