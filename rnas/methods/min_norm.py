"""The shortest convex combination of two gradients, a direction along which both losses fall or neither can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .method import number


class MinNorm(NamedTuple):
    """The weight gamma of the first gradient, in [0, 1], and `gamma * u1 + (1 - gamma) * u2` tensor by tensor."""

    gamma: float
    gradients: list[Tensor]


def min_norm(u1: Sequence[Tensor], u2: Sequence[Tensor]) -> MinNorm:
    """The combination of u1 and u2 with the smallest L2 norm over all their tensors together.

    `gamma* = clip_[0,1](((u2 - u1) . u2) / ||u2 - u1||^2)`, computed in float64 at unit scale. The result g has
    `g . u1 >= ||g||^2` and `g . u2 >= ||g||^2`: a step along -g raises neither loss to first order. It leans to the
    shorter of the two. Where u1 equals u2 every gamma gives the same, and it is 1/2. With entries that are not finite
    gamma is NaN.

    u1, u2: the gradients of two losses, as lists of tensors of the same shapes; not empty. Raises ValueError otherwise.
    Equivalent to: minimize_scalar(lambda gamma: norm(gamma * u1 + (1 - gamma) * u2), bounds=(0, 1))
    Source: Sener and Koltun, NeurIPS 2018, section 3.2, algorithm 1; Desideri, C. R. Acad. Sci. Paris 350, 2012 (MGDA).
    """
    if not u1 or [u.shape for u in u1] != [u.shape for u in u2]:
        shapes = " and ".join(str([tuple(u.shape) for u in us]) for us in (u1, u2))
        raise ValueError(f"min_norm takes two lists of tensors of the same shapes, not empty; got {shapes}")
    first, second = (torch.cat([u.detach().double().flatten() for u in us]) for us in (u1, u2))
    difference = second - first
    scale = difference.abs().max()
    unit = difference / scale  # its square neither overflows nor vanishes, whatever the gradients' size
    best = (unit.dot(second / scale) / unit.dot(unit)).clamp(0, 1)
    gamma = number(torch.where(scale == 0, torch.full_like(best, 0.5), best))
    return MinNorm(gamma, [gamma * a + (1 - gamma) * b for a, b in zip(u1, u2)])
