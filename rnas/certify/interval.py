"""Where the images may be, and the element-wise bounds that a layer's values then have.

Legend: N images, S margins per image, C channels, H W pixels. Coefficients of linear bounds carry the margins in the
batch dimension, margin by margin: (S * N, C, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-30  # keeps the derivative of a square root finite where all weights of a row are zero


def arranged(tensor: Tensor) -> Tensor:
    """(N, C, H, W) in the memory format in which its convolutions are fast: on a CPU 10 times in float32."""
    if tensor.dim() != 4:
        return tensor
    double = tensor.dtype == torch.float64
    return tensor.contiguous(memory_format=torch.contiguous_format if double else torch.channels_last)


def products(rows: Tensor, values: Tensor) -> Tensor:
    """<row, value> per margin and image: (S, N, ...), (N, ...) -> (S, N)."""
    if values.dim() == 4:  # pixels first: as the numbers lie in memory, so that none are copied
        rows, values = rows.permute(0, 1, 3, 4, 2), values.permute(0, 2, 3, 1)
    return torch.einsum("snd,nd->sn", rows.flatten(2), values.flatten(1))


@dataclass(frozen=True)
class Ellipsoid:
    """All `center + epsilon * scale * z` with ||z||_2 <= 1: what an L2 ball becomes under scales per element."""

    center: Tensor
    """(N, ...)"""
    scale: Tensor
    """Broadcastable to (N, ...), not negative."""
    epsilon: Tensor
    """(N, 1, ...)"""


@dataclass(frozen=True)
class Interval:
    """lower <= value <= upper, element by element, both (N, ...)."""

    lower: Tensor
    upper: Tensor
    ellipsoid: Ellipsoid | None = None
    """Where the values are that of an L2 ball, that ball as well: the next linear map gains from it."""

    @property
    def center(self) -> Tensor:
        """Midpoints, (N, ...)."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half of the widths, (N, ...)."""
        return (self.upper - self.lower) / 2

    @property
    def shape(self) -> torch.Size:
        """Shape of one image's values, without N."""
        return self.lower.shape[1:]


@dataclass(frozen=True)
class Ball:
    """The images x' with ||x' - x|| <= epsilon, in the Linf or the L2 norm, and lower <= x' <= upper.

    x: (N, ...). epsilon: (N, 1, ...), in the units of x. lower, upper: the box, None for no box.
    """

    x: Tensor
    epsilon: Tensor
    norm: str
    lower: float | None
    upper: float | None

    def interval(self) -> Interval:
        """The smallest and largest value of every pixel, and the ball itself where the norm is L2."""
        ellipsoid = None
        if self.norm == "l2":
            ellipsoid = Ellipsoid(self.x, torch.ones_like(self.x[:1]), self.epsilon)
        return Interval(
            (self.x - self.epsilon).clamp(min=self.lower) if self.lower is not None else self.x - self.epsilon,
            (self.x + self.epsilon).clamp(max=self.upper) if self.upper is not None else self.x + self.epsilon,
            ellipsoid,
        )

    def minimum(self, coefficients: Tensor) -> Tensor:
        """A lower bound of `min <coefficients, x'>` over the ball, (S * N,); exact for Linf and for L2 without a box.

        coefficients: (S * N, ...). In the L2 ball with a box it is the better of the bounds over the ball alone and
        over the box alone, in which the ball's own smallest and largest pixels count as a box.
        """
        count = self.x.shape[0]
        rows = coefficients.unflatten(0, (-1, count))
        interval = self.interval()
        box = products(rows, interval.center) - products(rows.abs(), interval.radius)
        if self.norm == "linf":
            return box.flatten()
        length = torch.linalg.vector_norm(rows.flatten(2), dim=2)
        return torch.maximum(box, products(rows, self.x) - self.epsilon.view(count) * length).flatten()
