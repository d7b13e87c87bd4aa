"""The eight candidates of the DARTS space, as a table of constructors: shared by the styles that descend from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CANDIDATES = {
    "none": lambda C, stride, affine, track: Nothing(stride),
    "max_pool_3x3": lambda C, stride, affine, track: nn.MaxPool2d(3, stride=stride, padding=1),
    "avg_pool_3x3": lambda C, stride, affine, track: nn.AvgPool2d(3, stride, 1, count_include_pad=False),
    "skip_connect": lambda C, stride, affine, track: Pass() if stride == 1 else Halve(C, C, affine, track),
    "sep_conv_3x3": lambda C, stride, affine, track: TwiceSeparable(C, 3, stride, affine, track),
    "sep_conv_5x5": lambda C, stride, affine, track: TwiceSeparable(C, 5, stride, affine, track),
    "dil_conv_3x3": lambda C, stride, affine, track: Dilated(C, 3, stride, affine, track),
    "dil_conv_5x5": lambda C, stride, affine, track: Dilated(C, 5, stride, affine, track),
}
PRIMITIVES = list(CANDIDATES)


class Pass(nn.Module):
    """x -> x."""

    def forward(self, x: Tensor) -> Tensor:
        """The argument itself, not a copy."""
        return x


class Nothing(nn.Module):
    """Zeros that keep the graph: the input, thinned out and multiplied by 0."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> zeros (N, C, ceil(H / stride), ceil(W / stride))."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return x.mul(0.0)


class Halve(nn.Module):
    """A skip connection of stride 2: two 1x1 convolutions, one of them shifted by a pixel. Even sizes only."""

    def __init__(self, channels_in: int, C: int, affine: bool = True, track: bool = True):
        super().__init__()
        self.relu = nn.ReLU(inplace=False)
        self.conv_1 = nn.Conv2d(channels_in, C // 2, 1, stride=2, padding=0, bias=False)
        self.conv_2 = nn.Conv2d(channels_in, C - C // 2, 1, stride=2, padding=0, bias=False)
        self.bn = nn.BatchNorm2d(C, affine=affine, track_running_stats=track)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, C, H / 2, W / 2)."""
        positive = self.relu(x)
        halves = (self.conv_1(positive), self.conv_2(positive[..., 1:, 1:]))
        return self.bn(torch.cat(halves, dim=1))


class ReLUConvBN(nn.Module):
    """ReLU, 1x1 convolution, BN: what brings the inputs of a cell to its width."""

    def __init__(self, channels_in: int, C: int, affine: bool = True, track: bool = True):
        super().__init__()
        norm = nn.BatchNorm2d(C, affine=affine, track_running_stats=track)
        self.op = nn.Sequential(nn.ReLU(inplace=False), nn.Conv2d(channels_in, C, 1, bias=False), norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, C, H, W)."""
        return self.op(x)


def separable(C: int, size: int, stride: int, dilation: int, affine: bool, track: bool) -> list[nn.Module]:
    """ReLU, depthwise convolution, pointwise convolution, BN."""
    padding = (size - 1) // 2 * dilation
    depthwise = nn.Conv2d(C, C, size, stride=stride, padding=padding, dilation=dilation, groups=C, bias=False)
    pointwise = nn.Conv2d(C, C, kernel_size=1, padding=0, bias=False)
    return [nn.ReLU(inplace=False), depthwise, pointwise, nn.BatchNorm2d(C, affine=affine, track_running_stats=track)]


class TwiceSeparable(nn.Module):
    """Two separable convolutions in one Sequential of eight modules; the stride is in the first."""

    def __init__(self, C: int, size: int, stride: int, affine: bool, track: bool):
        super().__init__()
        first = separable(C, size, stride, 1, affine, track)
        self.op = nn.Sequential(*first, *separable(C, size, 1, 1, affine, track))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride))."""
        return self.op(x)


class Dilated(nn.Module):
    """One separable convolution of dilation 2."""

    def __init__(self, C: int, size: int, stride: int, affine: bool, track: bool):
        super().__init__()
        self.op = nn.Sequential(*separable(C, size, stride, 2, affine, track))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride))."""
        return self.op(x)
