"""What methods share that take one gradient at the current weights, and that may see PGD examples on a level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .. import attacks
from ..supernet import Supernet
from .method import Batch, Level, Method, SearchStep

Levels = Literal["both", "weights", "architecture", "none"]
"""Levels of the search to which something applies."""


def pgd_batch(
    method: Method, supernet: Supernet, x: Tensor, y: Tensor, step: SearchStep, level: Level, levels: Levels = "both"
) -> Batch:
    """The batch, on `levels` with PGD examples against the supernet under the method's weights as they are now."""
    if levels not in ("both", level):
        return Batch(x, y)
    generator = step.generator(f"attack-{level}")
    return Batch(
        x, y, attacks.perturb(method.classifier(supernet), x, y, step.attack, generator=generator, graphs=step.graphs)
    )


def first_order(method: Method, supernet: Supernet, objective: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Put the gradient of `objective`, at the current weights, into `.grad` of the method's parameters (xi = 0).

    objective: gives the loss and whatever else it has, such as logits. It is called with the supernet on batch
    statistics and its averages held; weights, statistics, flags and `.grad` of the supernet stay as they were.
    Returns all that the objective gave, part of no graph.
    """
    parameters = list(method.parameters())
    with attacks.frozen(supernet, statistics="batch"), torch.enable_grad():
        loss, *others = objective()
        gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    return (loss.detach(), *(other.detach() for other in others))
