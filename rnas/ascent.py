"""The inner loop of an attack: start, gradient, projected step.

Legend: N images, K classes. `rnas.attacks` checks the arguments and freezes the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .attack_inputs import Images

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Ascent:
    """The model and the settings of one attack. `direction` is 1 to ascend the loss, -1 to descend it (targeted)."""

    model: Model
    loss: Loss
    direction: int
    steps: int
    random_start: bool
    norm: str
    lower: float
    upper: float
    generator: torch.Generator | None
    highest_label: int

    def climb(self, images: Images) -> Tensor:
        x_adv = self.start(images)
        self.ascend(x_adv, images)
        return x_adv

    def ascend(self, x_adv: Tensor, images: Images) -> int:
        """All steps, written into x_adv. Returns the number of logits, K."""
        for _ in range(self.steps):
            logits, grad_x = self.gradient(x_adv, images)
            self.step(x_adv, grad_x, images)
        return logits.shape[1]

    def start(self, images: Images) -> Tensor:
        if not self.random_start:
            return images.x.clone()
        return kernels.random_start(
            images.x,
            epsilon=images.epsilon,
            norm=self.norm,
            lower=self.lower,
            upper=self.upper,
            generator=self.generator,
        )

    def step(self, x_adv: Tensor, grad_x: Tensor, images: Images) -> None:
        kernels.pgd_step(
            x_adv,
            grad_x,
            images.x,
            epsilon=images.epsilon,
            step_size=images.step_size,
            norm=self.norm,
            lower=self.lower,
            upper=self.upper,
            out=x_adv,
        )

    def gradient(self, x_adv: Tensor, images: Images) -> tuple[Tensor, Tensor]:
        leaf = x_adv.detach().requires_grad_()
        logits = self.logits(leaf, images)
        total = self.value(logits, images).sum()
        grad_x = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
        if grad_x is None:
            raise ValueError(
                "the loss does not depend on the images: is there a no_grad or a detach inside the model "
                "or the loss? An attack needs the gradient through both"
            )
        return logits.detach(), grad_x

    @torch.no_grad()
    def measure(self, x_adv: Tensor, images: Images) -> Tensor:
        return self.logits(x_adv, images)

    def logits(self, x: Tensor, images: Images) -> Tensor:
        logits = self.model(x)
        expected = f"the model must return logits of shape (N, K) = ({images.count}, K)"
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{expected}, got a {type(logits).__name__}: wrap it in a function that returns the "
                "logits alone, and put the model in rnas.attacks.frozen meanwhile"
            )
        if logits.dim() != 2 or logits.shape[0] != images.count:
            raise ValueError(f"{expected}, got {tuple(logits.shape)}")
        self.check_labels(logits.shape[1])
        # Half precision loses the small differences between losses that the ascent lives on.
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def check_labels(self, classes: int) -> None:
        if self.highest_label >= classes:
            raise ValueError(f"labels must be below the number of logits, {classes}, got {self.highest_label}")

    def value(self, logits: Tensor, images: Images) -> Tensor:
        value = self.loss(logits, images.y)
        if not isinstance(value, Tensor) or value.shape != images.y.shape:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"loss must return one value per image, shape ({images.count},), got {came}: type reduction='none'"
            )
        return self.direction * value

    def fooled(self, logits: Tensor, images: Images) -> Tensor:
        predicted = logits.argmax(dim=1)
        return predicted == images.y if self.direction < 0 else predicted != images.y


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    own = y.unsqueeze(1)
    return logits.scatter(1, own, -math.inf).amax(dim=1) - logits.gather(1, own).squeeze(1)


LOSSES: dict[str, Loss] = {"cross_entropy": _cross_entropy, "margin": _margin}
