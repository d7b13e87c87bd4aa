"""PC-DARTS (Xu et al., ICLR 2020, arXiv 1907.05737): partial channel connections and edge normalisation."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from ..config import at_least
from ..spaces import Space
from ..supernet import Supernet
from .levels import Levels, first_order, pgd_batch
from .method import (
    Batch,
    Level,
    LevelResult,
    Method,
    Mixing,
    SearchStep,
    accuracy,
    edge_softmax,
    initial_alpha,
    initial_beta,
    number,
)


@dataclass(frozen=True)
class PcDartsOptions:
    """Knobs of PC-DARTS. Its 15 epochs of warm-up are `warmup_epochs` of the search."""

    partial: int = 4
    """K: one in K channels goes through the mixed edges. Must divide the channels C; 1: all."""
    adversarial: Levels = "none"
    """Which level of the search sees PGD examples in place of clean images; the paper's search is clean."""

    def __post_init__(self) -> None:
        at_least(1, "options", self, "partial")


class PcDarts(Method):
    """`min L_V(w, alpha, beta)` to first order; node j is `sum_i beta_ij sum_o alpha_ij,o o(x_i)`, both by softmaxes.

    The softmax of beta is over the edges into a node, that of alpha over the operations of an edge (sections 3.2 and
    3.3). A genotype keeps the edges whose product of both weights is largest.
    """

    name = "pcdarts"
    Options = PcDartsOptions

    def __init__(self, options: PcDartsOptions, space: Space, seed: int) -> None:
        super().__init__(options, space, seed)
        self.alpha = initial_alpha(space, seed)
        self.beta = initial_beta(space, seed)

    @property
    def partial(self) -> int:
        """K of partial channels."""
        return self.options.partial

    def mixing(self) -> Mixing:
        """softmax(alpha) over the operations of each edge, (E, K) per cell type."""
        return {cell_type: alpha.softmax(dim=1) for cell_type, alpha in self.alpha.items()}

    def edge_weights(self) -> dict[str, Tensor]:
        """softmax(beta) over the edges into each node, (E,) per cell type; the edges lie node by node."""
        return edge_softmax(self.space, self.beta)

    def capture_key(self, level: Level, step: SearchStep) -> Hashable:
        """Nothing else."""
        return ()

    def prepare(self, supernet: Supernet, x: Tensor, y: Tensor, step: SearchStep, level: Level) -> Batch:
        """PGD examples against the supernet as it is now, where `adversarial` names this level."""
        return pgd_batch(self, supernet, x, y, step, level, self.options.adversarial)

    def weight_loss(self, supernet: Supernet, train: Batch, step: SearchStep) -> tuple[Tensor, Tensor]:
        """Cross entropy of the supernet on its batch of D_T."""
        logits = self.logits(supernet, train.inputs, constant=True)
        return cross_entropy(logits, train.y), logits

    def architecture_step(self, supernet: Supernet, train: Batch, valid: Batch, step: SearchStep) -> LevelResult:
        """First-order gradient of the cross entropy on D_V by alpha and beta, by batch statistics; BN averages stay."""

        def objective() -> tuple[Tensor, Tensor]:
            logits = self.logits(supernet, valid.inputs)
            return cross_entropy(logits, valid.y), logits

        loss, logits = first_order(self, supernet, objective)
        return LevelResult(number(loss), accuracy(logits, valid.y))
