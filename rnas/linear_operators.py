"""The linear operators inside a network's layers, run together where they have one shape, and the norms of pools.

Legend: G operators of one layout, C channels, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size = tuple[int, int]
Step = tuple[nn.Conv2d, ...]
"""One convolution of an operator, or several that read different channels and write different channels."""


class Spec(NamedTuple):
    """One convolution of an operator, as F.conv2d takes it."""

    channels_in: int
    channels_out: int
    kernel: Size = (1, 1)
    stride: Size = (1, 1)
    padding: Size = (0, 0)
    dilation: Size = (1, 1)
    groups: int = 1

    @staticmethod
    def of(convolution: nn.Conv2d) -> Spec:
        """That of a module."""
        c = convolution
        return Spec(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, c.dilation, c.groups)

    def output(self, size: Size) -> Size:
        """H, W of its output."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel)]
        return tuple((n + 2 * p - r) // s + 1 for n, p, r, s in zip(size, self.padding, reach, self.stride))

    @property
    def is_matrix(self) -> bool:
        """Whether it is one matrix over the channels, the same at every pixel."""
        return self.kernel == (1, 1) == self.stride and self.padding == (0, 0) and self.groups == 1


class Layout(NamedTuple):
    """What operators that run together have in common: convolutions, size of the input, channels of the norm behind.

    own_norm: the operator norm where it is known, of an operator without convolutions.
    """

    specs: tuple[Spec, ...]
    size: Size
    channels: int
    own_norm: float = 1.0


@dataclass
class Group:
    """G operators of one layout, their batch norms (module and which of its channels), and their places in a result."""

    layout: Layout
    steps: list[tuple[Step, ...]] = field(default_factory=list)
    norms: list[tuple[nn.BatchNorm2d, slice]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(G, C, H, W) of what `apply` takes."""
        return (len(self.places), self.layout.specs[0].channels_in, *self.layout.size)

    def norm_scale(self) -> Tensor:
        """|gamma| / sqrt(var + eps) of every batch norm by its running statistics, (G, C)."""
        variance = torch.stack([norm.running_var[rows] for norm, rows in self.norms])
        eps = variance.new_tensor([norm.eps for norm, _ in self.norms]).unsqueeze(1)
        scale = (variance + eps).rsqrt()
        if any(norm.affine for norm, _ in self.norms):
            ones = torch.ones_like(variance[0])
            scale = scale * torch.stack([norm.weight[rows].abs() if norm.affine else ones for norm, rows in self.norms])
        return scale

    def weights(self, scale: Tensor | None = None) -> list[Tensor]:
        """The weights of every convolution, (G, C', C / groups, h, w); `scale` (G, C') goes into the last."""
        weights = [torch.stack([_joined(step) for step in steps]) for steps in zip(*self.steps)]
        if scale is not None:
            weights[-1] = weights[-1] * scale.view(*scale.shape, 1, 1, 1)
        return weights

    def apply(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """All operators, each on its own part of x (G, C, H, W)."""
        for spec, weight in zip(self.layout.specs, weights):
            if spec.is_matrix:
                x = (weight.flatten(2) @ x.flatten(2)).unflatten(2, x.shape[2:])
            else:
                options = (spec.stride, spec.padding, spec.dilation, len(x) * spec.groups)
                result = F.conv2d(x.flatten(0, 1).unsqueeze(0), weight.flatten(0, 1), None, *options)
                x = result.view(len(x), spec.channels_out, *result.shape[2:])
        return x

    def apply_transposed(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """The transposes of all operators: from outputs back to (G, C, H, W)."""
        sizes = [self.layout.size]
        for spec in self.layout.specs:
            sizes.append(spec.output(sizes[-1]))
        for spec, weight, size in reversed(list(zip(self.layout.specs, weights, sizes))):
            if spec.is_matrix:
                x = (weight.flatten(2).mT @ x.flatten(2)).unflatten(2, x.shape[2:])
                continue
            # the rows and columns at the border that no window of a stride reaches exactly
            left_over = [
                n - ((o - 1) * stride - 2 * p + d * (k - 1) + 1)
                for n, o, k, stride, p, d in zip(
                    size, x.shape[2:], spec.kernel, spec.stride, spec.padding, spec.dilation
                )
            ]
            x = F.conv_transpose2d(
                x.flatten(0, 1).unsqueeze(0),
                weight.flatten(0, 1),
                None,
                spec.stride,
                spec.padding,
                tuple(left_over),
                len(x) * spec.groups,
                spec.dilation,
            ).view(len(x), spec.channels_in, *size)
        return x


def _joined(step: Step) -> Tensor:
    if len(step) == 1:
        return step[0].weight
    return torch.block_diag(*(convolution.weight.flatten(1) for convolution in step))[..., None, None]


def pool_norm(pool: nn.MaxPool2d | nn.AvgPool2d, size: Size) -> float:
    """How much a pool can stretch an L2 distance on images of H x W pixels; exact.

    Average: rows and columns are averaged one after the other, divisors included, so it is the product of the largest
    singular values of two small matrices; a little over 1 where the padding is not counted. Maximum: the root of the
    largest number of windows that share a pixel, reached by one bright pixel there.
    """
    reads = [_windows(pool, n, axis) for axis, n in enumerate(size)]
    if isinstance(pool, nn.MaxPool2d):
        return math.prod(math.sqrt(float(windows.sum(0).max())) for windows in reads)
    if pool.count_include_pad or pool.divisor_override:
        raise ValueError(f"the norm of an average pool needs count_include_pad=False and no divisor; got {pool}")
    return math.prod(float(torch.linalg.matrix_norm(w / w.sum(1, keepdim=True), ord=2)) for w in reads)


def _windows(pool: nn.MaxPool2d | nn.AvgPool2d, pixels: int, axis: int) -> Tensor:
    """Which pixels of a line every output reads, (outputs, pixels) of 0 and 1."""
    sizes = (pool.kernel_size, pool.stride, pool.padding)
    kernel, stride, padding = (each if isinstance(each, int) else each[axis] for each in sizes)
    starts = torch.arange((pixels + 2 * padding - kernel) // stride + 1).unsqueeze(1) * stride - padding
    column = torch.arange(pixels).unsqueeze(0)
    return ((column >= starts) & (column < starts + kernel)).double()
