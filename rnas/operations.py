"""The primitives of the DARTS family as PyTorch modules, with the layer order of Liu et al. (ICLR 2019).

`affine` says whether BN has a learned scale and shift: False in a supernet, where it would compete with the mixing
weights, True in a derived network.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from . import kernels


class ReLUConvBN(nn.Sequential):
    """ReLU, 1x1 convolution, BN: (N, channels_in, H, W) -> (N, channels_out, H, W)."""

    def __init__(self, channels_in: int, channels_out: int, affine: bool) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(channels_in, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels_in, H, W) -> (N, channels_out, H, W)."""
        _, convolution, norm = self
        return kernels.relu_conv_norm(x, convolution.weight, norm)


class ConvBN(nn.Sequential):
    """Convolution and BN, the stem of a network: (N, channels_in, H, W) -> (N, channels_out, ceil(H / stride), ...)."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, stride: int = 1) -> None:
        padding = kernel_size // 2
        super().__init__(
            nn.Conv2d(channels_in, channels_out, kernel_size, stride, padding, bias=False), nn.BatchNorm2d(channels_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels_in, H, W) -> (N, channels_out, ceil(H / stride), ceil(W / stride))."""
        convolution, norm = self
        (stride, _), (padding, _) = convolution.stride, convolution.padding
        return kernels.conv_norm(x, convolution.weight, norm, stride=stride, padding=padding)


class SeparableConv(nn.Sequential):
    """`depth` times (ReLU, depthwise, pointwise, BN); the stride is in the first."""

    def __init__(
        self, channels: int, stride: int, affine: bool, *, kernel_size: int, dilation: int, depth: int
    ) -> None:
        padding = dilation * (kernel_size - 1) // 2
        layers: list[nn.Module] = []
        for step in range(depth):
            layers += [
                nn.ReLU(),
                nn.Conv2d(
                    channels,
                    channels,
                    kernel_size,
                    stride if step == 0 else 1,
                    padding,
                    dilation,
                    groups=channels,
                    bias=False,
                ),
                nn.Conv2d(channels, channels, 1, bias=False),
                nn.BatchNorm2d(channels, affine=affine),
            ]
        super().__init__(*layers)


class FactorizedReduce(nn.Module):
    """Halve the resolution by two 1x1 convolutions of stride 2, the second shifted by one pixel: H -> ceil(H / 2).

    For odd H or W the shifted half is padded with zeros at the end, so that both halves have the same size.
    """

    def __init__(self, channels_in: int, channels_out: int, affine: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(channels_in, channels_out - channels_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(channels_in, channels_out // 2, 1, stride=2, bias=False) if channels_out > 1 else None
        self.bn = nn.BatchNorm2d(channels_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels_in, H, W) -> (N, channels_out, ceil(H / 2), ceil(W / 2))."""
        odd = None if self.conv_2 is None else self.conv_2.weight
        return kernels.factorized_reduce(x, self.conv_1.weight, odd, self.bn)


class Zero(nn.Module):
    """The `none` primitive: zeros of the output's shape, without a gradient path to the input."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


def _max_pool(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.MaxPool2d(3, stride, padding=1)


def _avg_pool(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)


def _none(channels: int, stride: int, affine: bool) -> nn.Module:
    return Zero(stride)


BUILDERS = {
    "none": _none,
    "max_pool_3x3": _max_pool,
    "avg_pool_3x3": _avg_pool,
    "skip_connect": _skip,
    "sep_conv_3x3": partial(SeparableConv, kernel_size=3, dilation=1, depth=2),
    "sep_conv_5x5": partial(SeparableConv, kernel_size=5, dilation=1, depth=2),
    "dil_conv_3x3": partial(SeparableConv, kernel_size=3, dilation=2, depth=1),
    "dil_conv_5x5": partial(SeparableConv, kernel_size=5, dilation=2, depth=1),
}


def build(primitive: str, channels: int, stride: int, affine: bool) -> nn.Module:
    """The module of `primitive`: (N, channels, H, W) -> (N, channels, ceil(H/stride), ceil(W/stride)).

    Raises ValueError for a name that is no primitive.
    """
    if primitive not in BUILDERS:
        raise ValueError(f"unknown primitive {primitive!r}; known: {', '.join(BUILDERS)}")
    return BUILDERS[primitive](channels, stride, affine)


class Normalize(nn.Module):
    """(x - mean) / std per channel, inside the network, so that attacks work on pixels in [0, 1]."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
