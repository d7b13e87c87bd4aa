"""Certified lower bounds of margins over a whole ball of images, differentiable in the architecture and the weights.

Legend: N images, C channels, H W pixels, K classes, S = K - 1 margins per image, E edges.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..attack_inputs import check_choice, check_images, check_labels, check_per_image
from .interval import Ball, Interval, arranged
from .linear import Linear
from .network import Mixture, Weights
from .relaxation import SLOPES
from .tape import Tape

METHODS = ("crown-ibp", "interval")


def certified_margin(
    network: nn.Module,
    mixing: Weights | None,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    *,
    norm: Literal["linf", "l2"] = "linf",
    edge_weights: Weights | None = None,
    relu_slope: Literal["adaptive", "cnn-cert"] = "adaptive",
    lower: float | None = 0.0,
    upper: float | None = 1.0,
    method: Literal["crown-ibp", "interval"] = "crown-ibp",
    save_memory: bool = False,
) -> Tensor:
    """Lower bounds of `f_y(x') - f_t(x')` over all x' of a ball, for every class t: (N, K), +inf at t = y.

    network     in eval mode, with running statistics: a Supernet, a FixedMixture of one, a derived Network, or an
                nn.Sequential of modules that have rules (`rnas.certify.RULES`).
    mixing, edge_weights   of a Supernet: cell type -> (E, number of operations) and (E,), of any sign; else None.
    x, y        images (N, C, H, W) inside the box, and their labels (N,). The bounds are computed in the dtype of x,
                float32 or float64, whatever that of the weights.
    epsilon     radius of the ball in the units of x: a number, or (N,) with one per image.
    norm        "linf" or "l2": all x' with ||x' - x|| <= epsilon and lower <= x' <= upper; None for no bound.
    relu_slope  lower line of a ReLU of unknown sign: "adaptive", 0 or 1, or "cnn-cert", parallel to the upper line.
    method      "crown-ibp": element-wise bounds forward and one linear pass back; the result is the better of the
                margins by either. "interval": the element-wise bounds alone, at about the cost of two forward passes.
    save_memory   compute parts of the linear pass again for the derivative rather than store them (our option).

    Differentiable in mixing, edge_weights and the network's parameters, by autograd through the bounds; once.
    With epsilon 0 the bounds are the margins. They hold in exact arithmetic: in floating point they are sound up to
    rounding, as no rounding is directed outwards. Where they leave the range of the dtype the result is -inf and its
    derivative NaN: the widths of the intervals grow by a factor with every layer. float64 reaches further.

    Raises ValueError for a network in training mode or with batch norms without running statistics (before any work),
    modules without a rule, weights of a wrong shape, and, as `rnas.attacks.pgd`, images, labels and epsilon.
    Source: CROWN-IBP, arXiv 1906.06316, section 3; CROWN, arXiv 1811.00866; interval bounds, arXiv 1810.12715.
    """
    check_choice("relu_slope", relu_slope, SLOPES)
    check_choice("method", method, METHODS)
    problem = Mixture(network, mixing, edge_weights, relu_slope)
    ball = make_ball(x, y, epsilon, norm, lower, upper)
    return margins(problem, ball, y, method, save_memory)


def make_ball(
    x: Tensor, y: Tensor, epsilon: float | Tensor, norm: str, lower: float | None, upper: float | None
) -> Ball:
    """The ball, checked together with the labels."""
    check_choice("norm", norm, ("linf", "l2"))
    check_images(x, -math.inf if lower is None else lower, math.inf if upper is None else upper)
    check_labels(y, x.shape[0])
    epsilon = torch.as_tensor(check_per_image("epsilon", epsilon, x), dtype=x.dtype, device=x.device)
    return Ball(arranged(x), epsilon.expand(x.shape[0]).view(-1, *[1] * (x.dim() - 1)), norm, lower, upper)


def margins(problem: Mixture, ball: Ball, y: Tensor, method: str, save_memory: bool = False) -> Tensor:
    """What `certified_margin` returns, without its checks."""
    tape, count, y = Tape(save_memory), ball.x.shape[0], y.to(ball.x.device, torch.int64)
    source = tape.input(ball.interval())
    features, last = problem.features(tape, source)
    if last is None:
        identity = torch.eye(features.bounds.shape[0], dtype=ball.x.dtype, device=ball.x.device)
        last = Linear(identity)
    last = last.cast(ball.x.dtype)
    classes = last.weight.shape[0]
    if count and int(y.max()) >= classes:
        raise ValueError(f"labels must be below the number of logits, {classes}, got {int(y.max())}")
    # (S, N): the classes other than y, in their order.
    others = torch.arange(classes - 1, device=y.device).view(-1, 1).expand(-1, count)
    others = others + (others >= y)
    rows = last.weight[y] - last.weight[others]  # (S, N, D): e_y - e_t folded into the last layer
    shift = 0 if last.constant is None else last.constant[y] - last.constant[others]

    bound = _least(rows, features.bounds) + shift
    known = torch.isfinite(bound)  # else the bounds of some layer have left the range of the floating point numbers
    if method == "crown-ibp":
        coefficients, constant = tape.back(rows.flatten(0, 1), features, source)
        linear = (ball.minimum(coefficients) + constant).view(-1, count) + shift
        bound = torch.where(torch.isfinite(linear), torch.maximum(bound, linear), bound)
    bound = torch.where(known, bound, -math.inf)
    result = bound.new_full((count, classes), math.inf)
    return result.scatter(1, others.T, bound.T)


def _least(rows: Tensor, bounds: Interval) -> Tensor:
    """min <rows, features> over the interval: rows (S, N, D) -> (S, N)."""
    center, radius = bounds.center, bounds.radius
    return torch.einsum("snd,nd->sn", rows, center) - torch.einsum("snd,nd->sn", rows.abs(), radius)
