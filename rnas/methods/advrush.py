"""AdvRush (Mok et al., ICCV 2021): DARTS whose architecture loss adds the curvature of the input loss landscape."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import attacks
from ..config import at_least
from ..spaces import Space
from ..supernet import Supernet
from .method import Batch, Level, LevelResult, Method, Mixing, SearchPlan, SearchStep, accuracy, initial_alpha, number


@dataclass(frozen=True)
class AdvRushOptions:
    """Knobs of AdvRush."""

    gamma: float = 0.01
    """Weight of the curvature in the architecture's loss."""
    h: float = 0.375
    """L2 length of the finite difference z over the whole image, in pixel units. The authors' code steps 1.5 in images
    divided by their standard deviation, which is about 0.25 for CIFAR-10."""
    start_epoch: int | None = None
    """First epoch with the curvature; before it the architecture learns from the cross entropy alone. Must be below the
    epochs of the search. None: after five sixths of them, the authors' 50 of 60."""
    statistics: Literal["running", "batch"] = "running"
    """BN statistics of the curvature. running, as in the authors' code: images do not mix. batch: those of the cross
    entropy; an image's gradient then holds its influence on the others too, and its second derivative is plain PyTorch,
    8 times as slow (measured with C=8, 5 cells, 32 x 32 pixels, one thread)."""

    def __post_init__(self) -> None:
        at_least(0, "options", self, "gamma")
        if self.start_epoch is not None:
            at_least(0, "options", self, "start_epoch")
        at_least(0, "options", self, "h")
        if self.h == 0:
            raise ValueError("options.h must be above 0: without a step there is no curvature; got 0")


class AdvRush(Method):
    """`min_alpha L_V + gamma * curvature`, to first order, on clean images; the weights learn as in DARTS.

    The curvature is that of `curvature`, in pixel units and per image. The authors' code has another scale: its images
    are standardised (a quarter), it multiplies by 4, and its gradients are those of the mean loss (1/N), so that its
    gamma of 0.01 at batch 32 is about 0.0003 here.
    """

    name = "advrush"
    Options = AdvRushOptions

    def __init__(self, options: AdvRushOptions, space: Space, seed: int) -> None:
        super().__init__(options, space, seed)
        self.alpha = initial_alpha(space, seed)

    @classmethod
    def check(cls, options: AdvRushOptions, plan: SearchPlan) -> None:
        """Refuse a curvature that would never count."""
        if options.gamma and options.start_epoch is not None and options.start_epoch >= plan.epochs:
            raise ValueError(
                f"options.start_epoch={options.start_epoch} of epochs={plan.epochs}: the curvature would never count; "
                "set it below epochs, or options.gamma=0 to do without"
            )

    def is_curved(self, step: SearchStep) -> bool:
        """Whether the curvature counts at this step."""
        start = self.options.start_epoch
        return step.epoch >= ((step.epochs or 60) * 5 // 6 if start is None else start)

    def mixing(self) -> Mixing:
        """softmax(alpha) over the operations of each edge, (E, K) per cell type."""
        return {cell_type: alpha.softmax(dim=1) for cell_type, alpha in self.alpha.items()}

    def capture_key(self, level: Level, step: SearchStep) -> Hashable:
        """Of the architecture: whether the curvature counts."""
        return level == "architecture" and self.is_curved(step)

    def prepare(self, supernet: Supernet, x: Tensor, y: Tensor, step: SearchStep, level: Level) -> Batch:
        """The clean images on both levels."""
        return Batch(x, y)

    def weight_loss(self, supernet: Supernet, train: Batch, step: SearchStep) -> tuple[Tensor, Tensor]:
        """Cross entropy of the supernet on its batch of D_T."""
        logits = self.logits(supernet, train.x, constant=True)
        return cross_entropy(logits, train.y), logits

    def architecture_step(self, supernet: Supernet, train: Batch, valid: Batch, step: SearchStep) -> LevelResult:
        """Gradient of the cross entropy on D_V, by batch statistics, and late in the search of the curvature."""
        parameters, options = list(self.parameters()), self.options
        with attacks.frozen(supernet, statistics="batch"), torch.enable_grad():
            logits = self.logits(supernet, valid.x)
            loss = cross_entropy(logits, valid.y)
            gradients = torch.autograd.grad(loss, parameters)
        total, numbers = number(loss), {}
        if self.is_curved(step):
            with attacks.frozen(supernet, options.statistics), torch.enable_grad():
                curved = curvature(lambda x: self.logits(supernet, x), valid.x, valid.y, options.h)
                gradients = [
                    plain + options.gamma * more
                    for plain, more in zip(gradients, torch.autograd.grad(curved, parameters))
                ]
            numbers["architecture_curvature"] = number(curved)
            total = total + options.gamma * number(curved)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        return LevelResult(total, accuracy(logits, valid.y), numbers)


def curvature(logits_of: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, h: float) -> Tensor:
    """`mean_n ||g(x_n + z_n) - g(x_n)||_2` with g the gradient of an image's cross entropy by its pixels.

    `z_n = h * sign(g(x_n)) / ||sign(g(x_n))||_2` is a step along the direction in which the loss rises; x + z may leave
    [0, 1]. logits_of: x (N, C, H, W) -> logits (N, K). y (N,). h in pixel units. Returns a number, exactly
    differentiable in whatever the logits depend on: sign has no gradient, so z is a constant.

    Source: Mok et al., ICCV 2021, after Moosavi-Dezfooli et al. (CVPR 2019, arXiv 1811.09716), whose norm is squared.
    """

    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        loss = cross_entropy(logits_of(at), y, reduction="sum")  # a sum, so that g does not depend on N
        return torch.autograd.grad(loss, at, create_graph=True)[0]

    here = gradient(x)
    sign = here.detach().sign()
    length = sign.flatten(1).norm(dim=1).clamp_min(1)  # at least 1, but where the gradient is zero
    z = h * sign / length.view(-1, *[1] * (x.dim() - 1))
    return (gradient(x + z) - here).flatten(1).norm(dim=1).mean()
