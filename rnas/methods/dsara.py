"""DSARA (arXiv 2212.14049; ARNAS, CVPR 2024): accurate and robust cells, searched in two stages for two objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from .. import attacks
from ..spaces import Space
from ..supernet import Supernet
from .levels import pgd_batch
from .method import Batch, Level, LevelResult, Method, Mixing, SearchPlan, SearchStep, accuracy, initial_alpha, number
from .min_norm import min_norm
from .unrolled import Unrolled, Weights, unrolled_gradients_of_each


@dataclass(frozen=True)
class DsaraOptions:
    """Knobs of DSARA."""

    order: Literal[1, 2] = 2
    """2: the architecture's gradients through one unrolled step of the weights. 1: at the current weights (xi = 0)."""
    radius: float = 0.01
    """Length of the weight perturbation in the second order's finite differences, as in DARTS."""
    stages: Literal["two", "one-adversarial", "one-both"] = "two"
    """two: the first stage, then the second. one-adversarial, one-both: only the first or only the second."""
    switch_epoch: int = 20
    """First epoch (from 0, warm-up included) of the second stage; with stages "two" it must lie between the warm-up and
    the last epoch. Inferred, not published."""
    combination: Literal["min-norm", "sum"] = "min-norm"
    """How the second stage combines the gradients u1 and u2: the shortest convex combination, or u1 + u2."""
    adversarial_weight: float = 0.1
    """c, the factor of the adversarial loss in the second stage. The smaller, the shorter u2, and the min-norm
    combination leans to the shorter gradient."""

    def __post_init__(self) -> None:
        for name, known in (
            ("order", (1, 2)),
            ("stages", ("two", "one-adversarial", "one-both")),
            ("combination", ("min-norm", "sum")),
        ):
            if getattr(self, name) not in known:
                expected = ", ".join(map(repr, known))
                raise ValueError(f"options.{name} must be one of {expected}; got {getattr(self, name)!r}")
        for name in ("radius", "adversarial_weight"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"options.{name} must be a finite number above 0; got {getattr(self, name)}")
        if self.switch_epoch < 0:
            raise ValueError(f"options.switch_epoch must be at least 0; got {self.switch_epoch}")


class Dsara(Method):
    """Stage 1: `min_alpha L_adv(w'(alpha), alpha)`. Stage 2: L_nat and c * L_adv, as a two-task problem.

    L_nat and L_adv are the cross entropies on the clean images of D_V and on PGD examples of them. The weights descend
    the cross entropy on PGD examples of D_T, and w'(alpha) is one step of just that: L_T is the same adversarial loss
    for both objectives of stage 2, so they share w' and differ in the direction `g_{w'} L_V` of the finite difference.
    The examples are made against (w, alpha) before either level moves and count as constants in every derivative.

    `u1 = g_alpha L_nat(w'(alpha), alpha)`, `u2 = g_alpha [c * L_adv(w'(alpha), alpha)]`, and alpha follows
    `gamma* u1 + (1 - gamma*) u2` with one gamma* for all cell types together (see `min_norm`).
    """

    name = "dsara"
    Options = DsaraOptions
    spaces = ("dsara",)

    def __init__(self, options: DsaraOptions, space: Space, seed: int) -> None:
        super().__init__(options, space, seed)
        self.alpha = initial_alpha(space, seed)

    @classmethod
    def check(cls, options: DsaraOptions, plan: SearchPlan) -> None:
        """Refuse two stages of which one has no step of the architecture."""
        if options.stages != "two":
            return
        switch = options.switch_epoch
        if switch >= plan.epochs:
            raise ValueError(
                f"options.switch_epoch={switch} of epochs={plan.epochs}: the second stage would never begin; set it "
                "below epochs, or options.stages=one-adversarial to do without"
            )
        if switch <= plan.warmup_epochs:
            raise ValueError(
                f"options.switch_epoch={switch} after warmup_epochs={plan.warmup_epochs}: the first stage would have "
                "no step of the architecture; set it above warmup_epochs, or options.stages=one-both to do without"
            )

    def mixing(self) -> Mixing:
        """softmax(alpha) over the operations of each edge, (E, K) per cell type."""
        return {cell_type: alpha.softmax(dim=1) for cell_type, alpha in self.alpha.items()}

    def stage(self, epoch: int) -> Literal[1, 2]:
        """The stage that `epoch` (from 0) belongs to."""
        if self.options.stages == "two":
            return 1 if epoch < self.options.switch_epoch else 2
        return 1 if self.options.stages == "one-adversarial" else 2

    def capture_key(self, level: Level, step: SearchStep) -> Hashable:
        """Of the architecture: the stage."""
        return level == "architecture" and self.stage(step.epoch)

    def prepare(self, supernet: Supernet, x: Tensor, y: Tensor, step: SearchStep, level: Level) -> Batch:
        """PGD examples against the supernet as it is now, for both levels; the clean images stay beside them."""
        return pgd_batch(self, supernet, x, y, step, level)

    def weight_loss(self, supernet: Supernet, train: Batch, step: SearchStep) -> tuple[Tensor, Tensor]:
        """Cross entropy of the supernet on the PGD examples of D_T."""
        logits = self.logits(supernet, train.inputs, constant=True)
        return cross_entropy(logits, train.y), logits

    def objectives(self, supernet: Supernet, train: Batch, valid: Batch, step: SearchStep) -> dict[str, Unrolled]:
        """Gradient to alpha, loss and logits of every objective of the stage, by batch statistics; BN averages stay.

        Keys: "adversarial" (L_adv, without the factor c), and in stage 2 "natural" (L_nat) before it.
        """
        inputs = {"adversarial": valid.inputs}
        if self.stage(step.epoch) == 2:
            inputs = {"natural": valid.x} | inputs

        def loss_on(x: Tensor, y: Tensor) -> Callable[[Weights], tuple[Tensor, Tensor]]:
            def loss(weights: Weights) -> tuple[Tensor, Tensor]:
                logits = functional_call(supernet, weights, (x, self.mixing(), self.edge_weights()))
                return cross_entropy(logits, y), logits

            return loss

        architecture, weights = list(self.parameters()), dict(supernet.named_parameters())
        losses = [loss_on(x, valid.y) for x in inputs.values()]
        with attacks.frozen(supernet, statistics="batch"), torch.enable_grad():
            if self.options.order == 1:
                found = []
                for loss_of in losses:
                    loss, logits = loss_of(weights)
                    gradients = list(torch.autograd.grad(loss, architecture))
                    found.append(Unrolled(gradients, loss.detach(), logits.detach()))
            else:
                found = unrolled_gradients_of_each(
                    loss_on(train.inputs, train.y),
                    losses,
                    weights,
                    architecture,
                    step.weight_optimizer,
                    radius=self.options.radius,
                )
        return dict(zip(inputs, found))

    def architecture_step(self, supernet: Supernet, train: Batch, valid: Batch, step: SearchStep) -> LevelResult:
        """The gradient of the stage's objective.

        The loss reported is the objective that the step descends, the accuracy that on all images the stage looks at.
        Numbers: stage, loss and accuracy on the PGD examples; in stage 2 also those on the clean images, and gamma
        where there is one.
        """
        found = self.objectives(supernet, train, valid, step)
        numbers: dict[str, float] = {"stage": float(self.stage(step.epoch))}
        for name, each in found.items():
            numbers |= {f"{name}_loss": number(each.loss), f"{name}_accuracy": accuracy(each.logits, valid.y)}
        if "natural" not in found:
            gradients, loss = found["adversarial"].gradients, numbers["adversarial_loss"]
        else:
            c = self.options.adversarial_weight
            natural, adversarial = numbers["natural_loss"], c * numbers["adversarial_loss"]
            u1, u2 = found["natural"].gradients, [c * gradient for gradient in found["adversarial"].gradients]
            if self.options.combination == "sum":
                gradients, loss = [a + b for a, b in zip(u1, u2)], natural + adversarial
            else:
                gamma, gradients = min_norm(u1, u2)
                loss = gamma * natural + (1 - gamma) * adversarial
                numbers["gamma"] = gamma
        for parameter, gradient in zip(self.parameters(), gradients):
            parameter.grad = gradient
        seen = [numbers[f"{name}_accuracy"] for name in found]
        return LevelResult(loss, sum(seen) / len(seen), numbers)
