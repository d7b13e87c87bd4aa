"""DARTS (Liu, Simonyan, Yang, ICLR 2019), clean or adversarial: a softmax over the operations of each edge."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from .. import attacks
from ..spaces import Space
from ..supernet import Supernet
from .levels import first_order, pgd_batch
from .method import Batch, Level, LevelResult, Method, Mixing, SearchStep, accuracy, initial_alpha, number
from .unrolled import unrolled_gradients


@dataclass(frozen=True)
class DartsOptions:
    """Knobs of DARTS."""

    order: Literal[1, 2] = 1
    """1: the architecture's gradient at the current weights (xi = 0). 2: through one unrolled step of the weights."""
    radius: float = 0.01
    """Length of the weight perturbation in the second order's finite difference. The kinks of ReLU and max pooling lie
    within any but a tiny one: of a small network on MNIST the difference had a cosine of 0.2 to 0.3 with the derivative
    at 0.01, the published value, and 0.5 to 0.6 at 0.1; at 1e-7 in float64 it is the derivative."""
    adversarial: Literal["both", "weights", "architecture", "none"] = "both"
    """Which level of the search sees PGD examples in place of clean images."""


class Darts(Method):
    """`min_alpha L_V(w*(alpha), alpha)` with w* by gradient descent; L: cross entropy, on PGD examples if asked."""

    name = "darts"
    Options = DartsOptions

    def __init__(self, options: DartsOptions, space: Space, seed: int) -> None:
        super().__init__(options, space, seed)
        self.alpha = initial_alpha(space, seed)

    def mixing(self) -> Mixing:
        """softmax(alpha) over the operations of each edge, (E, K) per cell type."""
        return {cell_type: alpha.softmax(dim=1) for cell_type, alpha in self.alpha.items()}

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
        """First- or second-order gradient of the cross entropy on D_V, by batch statistics; BN averages stay."""

        def objective() -> tuple[Tensor, Tensor]:
            logits = self.logits(supernet, valid.inputs)
            return cross_entropy(logits, valid.y), logits

        if self.options.order == 1:
            loss, logits = first_order(self, supernet, objective)
            return LevelResult(number(loss), accuracy(logits, valid.y))

        def loss_on(batch: Batch):
            def loss(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                logits = functional_call(supernet, weights, (batch.inputs, self.mixing(), self.edge_weights()))
                return cross_entropy(logits, batch.y), logits

            return loss

        weights = dict(supernet.named_parameters())
        parameters = list(self.parameters())
        with attacks.frozen(supernet, statistics="batch"), torch.enable_grad():
            gradients, loss, logits = unrolled_gradients(
                loss_on(train), loss_on(valid), weights, parameters, step.weight_optimizer, radius=self.options.radius
            )
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        return LevelResult(number(loss), accuracy(logits, valid.y))
