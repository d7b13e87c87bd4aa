"""The architecture gradient through one step of the weights (Liu et al., ICLR 2019, equations 6 to 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]
Loss = Callable[[Weights], tuple[Tensor, Tensor]]
"""Weights -> (loss, logits), differentiable in the weights and in the architecture parameters."""


class Unrolled(NamedTuple):
    """Gradients in the order of the architecture parameters, and what the validation batch gave at w'."""

    gradients: list[Tensor]
    loss: Tensor
    logits: Tensor


def virtual_step(gradients: Weights, weights: Weights, optimizer: torch.optim.SGD) -> Weights:
    """`w' = w - xi * (momentum * buffer + gradient + weight_decay * w)`: where w's `optimizer` would go next."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    moved = {}
    for name, weight in weights.items():
        group = groups[id(weight)]
        momentum = optimizer.state.get(weight, {}).get("momentum_buffer")
        direction = gradients[name] + group["weight_decay"] * weight.detach()
        if momentum is not None:
            direction = direction + group["momentum"] * momentum
        moved[name] = weight.detach() - group["lr"] * direction
    return moved


def unrolled_gradients(
    train_loss: Loss,
    valid_loss: Loss,
    weights: Weights,
    architecture: list[nn.Parameter],
    optimizer: torch.optim.SGD,
    *,
    radius: float,
) -> Unrolled:
    """Gradient of `L_V(w'(alpha), alpha)`, the product with the mixed second derivative taken by central differences:

    `g_alpha L_V(w', alpha) - xi * [g_alpha L_T(w+, alpha) - g_alpha L_T(w-, alpha)] / (2e)` with
    `w+- = w +- e * g_{w'} L_V` and `e = radius / ||g_{w'} L_V||`.

    Args:
        train_loss, valid_loss: losses on the two batches as functions of the weights.
        weights: the supernet's parameters by name, those that `optimizer` moves; neither they nor their `.grad` change.
        architecture: parameters to differentiate.
        optimizer: SGD with one learning rate (xi) for all.
    """
    return unrolled_gradients_of_each(train_loss, [valid_loss], weights, architecture, optimizer, radius=radius)[0]


def unrolled_gradients_of_each(
    train_loss: Loss,
    valid_losses: Sequence[Loss],
    weights: Weights,
    architecture: list[nn.Parameter],
    optimizer: torch.optim.SGD,
    *,
    radius: float,
) -> list[Unrolled]:
    """`unrolled_gradients` of several validation losses behind one and the same step of the weights.

    Equivalent to: [unrolled_gradients(train_loss, valid_loss, ...) for valid_loss in valid_losses], but w' is computed
    once. For n losses that is 1 pass for w', n at w' and 2n for the differences, each along its own g_{w'} L_V.
    """
    xi = optimizer.param_groups[0]["lr"]
    current = {name: w.detach().requires_grad_() for name, w in weights.items()}
    gradients = dict(zip(current, torch.autograd.grad(train_loss(current)[0], list(current.values()))))
    moved = {name: w.requires_grad_() for name, w in virtual_step(gradients, weights, optimizer).items()}

    def architecture_gradient(directions: Sequence[Tensor], step: Tensor) -> tuple[Tensor, ...]:
        shifted = {name: w.detach() + step * d for (name, w), d in zip(weights.items(), directions)}
        return torch.autograd.grad(train_loss(shifted)[0], architecture)

    results = []
    for valid_loss in valid_losses:
        loss, logits = valid_loss(moved)
        gradients = torch.autograd.grad(loss, architecture + list(moved.values()))
        direct, directions = gradients[: len(architecture)], gradients[len(architecture) :]
        length = torch.stack([direction.norm() for direction in directions]).norm()
        step = radius / length.clamp_min(torch.finfo(length.dtype).tiny).double()  # not read: that would wait for a GPU
        above, below = architecture_gradient(directions, +step), architecture_gradient(directions, -step)
        result = [d - xi * (a - b) / (2 * step) for d, a, b in zip(direct, above, below)]
        results.append(Unrolled(result, loss.detach(), logits.detach()))
    return results
