"""Layers that are linear maps plus a constant: their bounds, and linear bounds through them from output to input.

Bounds are exact for one map: center and radius go through the map and through the map of absolute values. A lower
bound `<a, y> + c` of a quantity becomes `<W^T a, x> + <a, b> + c` where y = W x + b.

Legend: N images, S margins per image, C channels, H W pixels, K output channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .interval import TINY, Ellipsoid, Interval, arranged


class LinearMap(ABC):
    """y = W x + constant, the constant one number per channel of y."""

    constant: Tensor | None = None
    """(K,) or None."""

    @abstractmethod
    def apply(self, x: Tensor, magnitude: bool = False) -> Tensor:
        """W x, or |W| x with `magnitude`: x (N, ...) -> (N, ...), without the constant."""

    @abstractmethod
    def transpose(self, a: Tensor, shape: torch.Size) -> Tensor:
        """W^T a: a (S * N, *shape of y) -> (S * N, *shape), `shape` that of x without N."""

    @abstractmethod
    def scaled(self, factor: Tensor) -> LinearMap:
        """The map times a number of any sign."""

    def cast(self, dtype: torch.dtype) -> LinearMap:
        """The map with its numbers in another precision."""
        numbers = {each.name: getattr(self, each.name) for each in fields(self)}
        numbers = {name: value for name, value in numbers.items() if isinstance(value, Tensor) and value.dtype != dtype}
        return replace(self, **{name: value.to(dtype) for name, value in numbers.items()}) if numbers else self

    def image(self, bounds: Interval) -> Interval:
        """Bounds of y from those of x."""
        center, radius = self.apply(bounds.center), self.apply(bounds.radius, magnitude=True)
        if self.constant is not None:
            center = center + per_channel(self.constant, center)
        return Interval(center - radius, center + radius)

    def pull(self, a: Tensor, bounds: Interval) -> tuple[Tensor, Tensor | None]:
        """Coefficients of x and the constant (S * N,) of the lower bound with the coefficients `a` of y."""
        constant = None if self.constant is None else channel_sums(a) @ self.constant
        return self.transpose(a, bounds.shape), constant


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """(C,) in the shape that broadcasts with (N, C, ...)."""
    return values.view(-1, *[1] * (like.dim() - 2))


def channel_sums(a: Tensor) -> Tensor:
    """(S * N, C, ...) -> (S * N, C)."""
    return a.flatten(2).sum(dim=2) if a.dim() > 2 else a


def absolute(factor: Tensor) -> Tensor:
    """|factor| with the derivative 1 at 0, where a mixing weight has only a right side."""
    return torch.where(factor >= 0, factor, -factor)


def _within(bounds: Interval, ball: Interval) -> Interval:
    return Interval(torch.maximum(bounds.lower, ball.lower), torch.minimum(bounds.upper, ball.upper))


class _Dense(LinearMap):
    """A map with a weight; its rows' L2 norms bound the image of an L2 ball (the dual norm of L2 is L2)."""

    def image(self, bounds: Interval) -> Interval:
        """Bounds of y from those of x, within those of the L2 ball where x has one."""
        result, ball = super().image(bounds), bounds.ellipsoid
        if ball is None:
            return result
        center = self.apply(ball.center)
        if self.constant is not None:
            center = center + per_channel(self.constant, center)
        squares = self.squared().apply((ball.scale**2).expand_as(ball.center[:1]))
        radius = ball.epsilon.view(-1, *[1] * (center.dim() - 1)) * squares.clamp_min(TINY).sqrt()
        return _within(result, Interval(center - radius, center + radius))

    @abstractmethod
    def squared(self) -> LinearMap:
        """The map whose weights are the squares."""


class _Constant(torch.autograd.Function):
    """A linear map whose weights need no derivative: its argument is not stored, as autograd would."""

    @staticmethod
    def forward(ctx, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.transposed = backward
        return forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transposed(grad), None, None


@dataclass(frozen=True)
class Conv(_Dense):
    """A convolution with zero padding: (N, C, H, W) -> (N, K, H', W').

    `even` pads odd images by one row or column of zeros at the end first, as FactorizedReduce does.
    """

    weight: Tensor
    """(K, C / groups, h, w)"""
    constant: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    even: bool = False
    magnitude: Tensor = field(default=None, repr=False)
    """|weight|, given only where its derivative is to be one-sided."""

    def __post_init__(self) -> None:
        if self.magnitude is None:
            object.__setattr__(self, "magnitude", self.weight.abs())

    @property
    def pointwise(self) -> bool:
        """A product of channels at each pixel, without stride."""
        return self.weight.shape[2:] == (1, 1) and self.stride == (1, 1) and self.groups == 1 and not any(self.padding)

    def apply(self, x: Tensor, magnitude: bool = False) -> Tensor:
        weight = self.magnitude if magnitude else self.weight
        if x.requires_grad and not weight.requires_grad:
            fixed = replace(self, weight=weight, constant=None, magnitude=weight)
            return _Constant.apply(x, fixed._apply, partial(fixed._transpose, shape=x.shape[1:]))
        return self._apply(x, weight)

    def transpose(self, a: Tensor, shape: torch.Size) -> Tensor:
        if a.requires_grad and not self.weight.requires_grad:
            return _Constant.apply(a, partial(self._transpose, shape=shape), self._apply)
        return self._transpose(a, shape)

    def _apply(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        if self.even:
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        weight = self.weight if weight is None else weight
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def _transpose(self, a: Tensor, shape: torch.Size) -> Tensor:
        size = [n + n % 2 if self.even else n for n in shape[1:]]
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:])]
        border = [r - p for r, p in zip(reach, self.padding)]
        depthwise = self.weight.shape[0] == self.groups
        rest = [
            n - ((out - 1) * s - 2 * p + r + 1)
            for n, out, s, p, r in zip(size, a.shape[2:], self.stride, self.padding, reach)
        ]
        if min(border) >= 0 and (self.groups == 1 or depthwise) and (self.stride == (1, 1) or depthwise):
            # The transpose is itself a convolution, of the output with zeros in between, for which the CPU has faster
            # code: up to 10 times at stride 1, 18 times where depthwise convolutions have a stride and a dilation.
            if self.stride != (1, 1):
                height, width = ((out - 1) * s + 1 + e for out, s, e in zip(a.shape[2:], self.stride, rest))
                spread = arranged(a.new_zeros((*a.shape[:2], height, width)))
                spread[:, :, :: self.stride[0], :: self.stride[1]][:, :, : a.shape[2], : a.shape[3]] = a
                a = spread
            weight = self.weight.flip(2, 3)
            weight = weight if depthwise and self.groups > 1 else weight.transpose(0, 1)
            result = F.conv2d(a, weight, None, 1, border, self.dilation, self.groups)
        else:
            result = F.conv_transpose2d(
                a, self.weight, None, self.stride, self.padding, rest, self.groups, self.dilation
            )
        return result[:, :, : shape[1], : shape[2]]

    def scaled(self, factor: Tensor) -> Conv:
        constant = None if self.constant is None else self.constant * factor
        return replace(
            self, weight=self.weight * factor, constant=constant, magnitude=self.magnitude * absolute(factor)
        )

    def squared(self) -> Conv:
        return replace(self, weight=self.weight**2, constant=None, magnitude=None)

    def then(self, scale: Tensor, shift: Tensor) -> Conv:
        """This convolution, then a scale and a shift per channel, (K,) each, as one."""
        constant = shift if self.constant is None else shift + scale * self.constant
        column = scale.view(-1, 1, 1, 1)
        return replace(self, weight=self.weight * column, constant=constant, magnitude=self.magnitude * column.abs())


@dataclass(frozen=True)
class Linear(_Dense):
    """(N, D) -> (N, K)."""

    weight: Tensor
    """(K, D)"""
    constant: Tensor | None = None

    def apply(self, x: Tensor, magnitude: bool = False) -> Tensor:
        return F.linear(x, self.weight.abs() if magnitude else self.weight)

    def transpose(self, a: Tensor, shape: torch.Size) -> Tensor:
        return a @ self.weight

    def scaled(self, factor: Tensor) -> Linear:
        return Linear(self.weight * factor, None if self.constant is None else self.constant * factor)

    def squared(self) -> Linear:
        return Linear(self.weight**2)


@dataclass(frozen=True)
class Scale(LinearMap):
    """A scale and a shift per channel (batch norm, input normalisation), or one number for all (a skip connection)."""

    scale: Tensor
    """(C,) or ()"""
    constant: Tensor | None = None
    magnitude: Tensor = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.magnitude is None:
            object.__setattr__(self, "magnitude", self.scale.abs())

    def apply(self, x: Tensor, magnitude: bool = False) -> Tensor:
        scale = self.magnitude if magnitude else self.scale
        return x * (per_channel(scale, x) if scale.dim() else scale)

    def transpose(self, a: Tensor, shape: torch.Size) -> Tensor:
        return self.apply(a)

    def scaled(self, factor: Tensor) -> Scale:
        constant = None if self.constant is None else self.constant * factor
        return Scale(self.scale * factor, constant, self.magnitude * absolute(factor))

    def image(self, bounds: Interval) -> Interval:
        """Bounds of y from those of x; an L2 ball becomes an ellipsoid."""
        result, ball = super().image(bounds), bounds.ellipsoid
        if ball is None:
            return result
        center = self.apply(ball.center)
        if self.constant is not None:
            center = center + per_channel(self.constant, center)
        return replace(result, ellipsoid=Ellipsoid(center, self.apply(ball.scale, magnitude=True), ball.epsilon))
