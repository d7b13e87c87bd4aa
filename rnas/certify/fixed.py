"""Linear maps without parameters: pools, reshapes and the zero map.

Legend: N images, C channels, H W pixels, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .interval import Ellipsoid, Interval, arranged
from .linear import LinearMap


@dataclass(frozen=True)
class _Fixed(LinearMap):
    """A map without parameters whose coefficients are not negative."""

    def scaled(self, factor: Tensor) -> LinearMap:
        raise NotImplementedError(f"{type(self).__name__} takes no factor: put a Scale behind it")


@dataclass(frozen=True)
class AvgPool(_Fixed):
    """Average pooling. Each window divides by its own number of pixels, unless padding or `divisor` counts."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None

    @property
    def _options(self) -> tuple:
        return self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor

    def apply(self, x: Tensor, magnitude: bool = False) -> Tensor:
        return F.avg_pool2d(x, *self._options)

    def transpose(self, a: Tensor, shape: torch.Size) -> Tensor:
        # Of its second argument this op reads the shape and the memory format.
        like = arranged(a.new_empty((a.shape[0], *shape)))
        return torch.ops.aten.avg_pool2d_backward(arranged(a), like, *self._options)


@dataclass(frozen=True)
class GlobalAverage(_Fixed):
    """The mean over the pixels: (N, C, H, W) -> (N, C), or (N, C, 1, 1) with `keep`."""

    keep: bool = False

    def apply(self, x: Tensor, magnitude: bool = False) -> Tensor:
        return x.mean(dim=(2, 3), keepdim=self.keep)

    def transpose(self, a: Tensor, shape: torch.Size) -> Tensor:
        a = (a if self.keep else a[:, :, None, None]) / (shape[1] * shape[2])
        return arranged(a.expand(-1, -1, *shape[1:]))


@dataclass(frozen=True)
class Flatten(_Fixed):
    """(N, ...) -> (N, D)."""

    def apply(self, x: Tensor, magnitude: bool = False) -> Tensor:
        return x.flatten(1)

    def transpose(self, a: Tensor, shape: torch.Size) -> Tensor:
        return a.unflatten(1, shape)

    def image(self, bounds: Interval) -> Interval:
        """The same bounds, and the same ball."""
        ball = bounds.ellipsoid
        if ball is not None:
            scale = ball.scale.expand_as(ball.center[:1]).flatten(1)
            ball = Ellipsoid(ball.center.flatten(1), scale, ball.epsilon.flatten(1))
        return Interval(bounds.lower.flatten(1), bounds.upper.flatten(1), ball)


@dataclass(frozen=True)
class Zero(_Fixed):
    """The `none` primitive."""

    stride: int = 1

    def apply(self, x: Tensor, magnitude: bool = False) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])

    def transpose(self, a: Tensor, shape: torch.Size) -> Tensor:
        return a.new_zeros((a.shape[0], *shape))

    def scaled(self, factor: Tensor) -> Zero:
        return self
