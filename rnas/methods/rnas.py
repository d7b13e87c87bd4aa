"""RNAS (arXiv 2304.02845): noise examples in the place of adversarial ones, and a regulariser that compares answers."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import kernels
from ..config import at_least
from ..consistency import CONSISTENCIES, both_logits
from ..spaces import Space
from ..supernet import Supernet
from .levels import first_order, pgd_batch
from .method import Batch, Level, LevelResult, Method, Mixing, SearchStep, accuracy, initial_alpha, number


@dataclass(frozen=True)
class RnasOptions:
    """Knobs of RNAS. Our defaults: the abstract names the regulariser and the noise, not their form or size."""

    regulariser: Literal["kl", "squared", "cross_entropy"] = "kl"
    """R(x, x_n). kl: KL(softmax f(x) || softmax f(x_n)). squared: ||f(x) - f(x_n)||^2. cross_entropy: CE(f(x_n), y)."""
    weight: float = 1.0
    """lambda, the weight of the regulariser beside the cross entropy of the clean images."""
    inputs: Literal["noise", "pgd"] = "noise"
    """What x_n is: random noise on x, or a PGD example (the comparison that the paper is about)."""
    noise: Literal["uniform", "gaussian"] = "uniform"
    """uniform: in the ball of attack.norm. gaussian: independent per pixel, and bounded by [0, 1] alone."""
    noise_scale: float | None = None
    """Radius of the uniform noise. Of Gaussian noise the standard deviation of a pixel for linf, the root mean square
    length for l2. In pixel units; None: attack.epsilon."""
    levels: Literal["both", "architecture"] = "both"
    """Where the regulariser acts. architecture: the weights see clean images and cross entropy alone."""

    def __post_init__(self) -> None:
        at_least(0, "options", self, "weight")
        if self.noise_scale is not None:
            at_least(0, "options", self, "noise_scale")


class Rnas(Method):
    """Both levels minimise `CE(f(x), y) + lambda * R(x, x_n)` on their own half of the images, to first order.

    x and x_n go through one forward pass and share batch statistics. Losses are of both; accuracies are on the clean
    images, and the architecture's on x_n is a number of its own.
    """

    name = "rnas"
    Options = RnasOptions

    def __init__(self, options: RnasOptions, space: Space, seed: int) -> None:
        super().__init__(options, space, seed)
        self.alpha = initial_alpha(space, seed)

    def mixing(self) -> Mixing:
        """softmax(alpha) over the operations of each edge, (E, K) per cell type."""
        return {cell_type: alpha.softmax(dim=1) for cell_type, alpha in self.alpha.items()}

    def capture_key(self, level: Level, step: SearchStep) -> Hashable:
        """Nothing else."""
        return ()

    def prepare(self, supernet: Supernet, x: Tensor, y: Tensor, step: SearchStep, level: Level) -> Batch:
        """The clean images and, where the regulariser acts, x_n; drawn without a look at the supernet for noise."""
        if self.options.levels != "both" and level != self.options.levels:
            return Batch(x, y)
        if self.options.inputs == "pgd":
            return pgd_batch(self, supernet, x, y, step, level)
        scale = step.attack.epsilon if self.options.noise_scale is None else self.options.noise_scale
        generator = step.generator(f"noise-{level}")
        return Batch(x, y, noisy(x, scale, self.options.noise, step.attack.norm, generator))

    def weight_loss(self, supernet: Supernet, train: Batch, step: SearchStep) -> tuple[Tensor, Tensor]:
        """The objective on D_T, and the logits of the clean images."""
        loss, clean, _ = self._objective(supernet, train, constant=True)
        return loss, clean

    def architecture_step(self, supernet: Supernet, train: Batch, valid: Batch, step: SearchStep) -> LevelResult:
        """First-order gradient of the objective on D_V, by batch statistics; BN averages stay."""
        loss, clean, moved = first_order(self, supernet, lambda: self._objective(supernet, valid, constant=False))
        numbers = {
            "architecture_regulariser": number(CONSISTENCIES[self.options.regulariser](clean, moved, valid.y)),
            "architecture_perturbed_accuracy": accuracy(moved, valid.y),
        }
        return LevelResult(number(loss), accuracy(clean, valid.y), numbers)

    def _objective(self, supernet: Supernet, batch: Batch, *, constant: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and the logits of x and of x_n; both those of x where the batch has no x_n."""

        def logits_of(x: Tensor) -> Tensor:
            return self.logits(supernet, x, constant=constant)

        if batch.x_adv is None:
            clean = logits_of(batch.x)
            return cross_entropy(clean, batch.y), clean, clean
        clean, moved = both_logits(logits_of, batch.x, batch.x_adv)
        regulariser = CONSISTENCIES[self.options.regulariser](clean, moved, batch.y)
        return cross_entropy(clean, batch.y) + self.options.weight * regulariser, clean, moved


def noisy(
    x: Tensor,
    scale: float,
    noise: Literal["uniform", "gaussian"],
    norm: Literal["linf", "l2"],
    generator: torch.Generator,
) -> Tensor:
    """`clip(x + d, 0, 1)` with random d; x (N, C, H, W) in [0, 1], scale in pixel units. See RnasOptions.

    Raises ValueError for uniform noise wider than the pixel range.
    """
    if noise == "uniform":
        if norm == "linf" and scale > 1:
            raise ValueError(f"options.noise_scale is in pixel units of [0, 1], so at most 1 for linf; got {scale}")
        return kernels.random_start(x, epsilon=scale, norm=norm, generator=generator)
    deviation = scale if norm == "linf" else scale / math.sqrt(x[0].numel())
    drawn = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return (x + deviation * drawn).clamp(0, 1)
