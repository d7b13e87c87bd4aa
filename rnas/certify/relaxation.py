"""Layers that are not linear: their bounds, and linear bounds between which they run on an interval.

Legend: N images, S margins per image, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .interval import Interval

SLOPES = ("adaptive", "cnn-cert")


def _constants(coefficients: Tensor, values: Tensor) -> Tensor:
    """<coefficients, values> per margin and image: (S, N, ...), (N, ...) -> (S * N,)."""
    return torch.einsum("snd,nd->sn", coefficients.flatten(2), values.flatten(1)).flatten()


@dataclass(frozen=True)
class ReLU:
    """max(0, x) between two lines per element.

    Where l < 0 < u the upper line is u / (u - l) * (x - l). The lower line goes through 0 with slope 1 where u >= -l,
    else 0 ("adaptive", CROWN, arXiv 1811.00866, section 3.3), or parallel to the upper one ("cnn-cert", CNN-Cert,
    arXiv 1811.12395, section 3.2).
    """

    slope: str = "adaptive"

    def image(self, bounds: Interval) -> Interval:
        """Bounds of max(0, x) from those of x."""
        return Interval(bounds.lower.relu(), bounds.upper.relu())

    def pull(self, a: Tensor, bounds: Interval) -> tuple[Tensor, Tensor]:
        """Coefficients of x, (S * N, ...), and the constant (S * N,) of the lower bound with coefficients `a`."""
        lower, upper = bounds.lower, bounds.upper
        crossing = (lower < 0) & (upper > 0)
        width = torch.where(crossing, upper - lower, torch.ones_like(upper))  # no 0 / 0, in derivatives either
        active = (lower >= 0).to(a.dtype)
        above = torch.where(crossing, upper / width, active)
        intercept = torch.where(crossing, -lower * upper / width, torch.zeros_like(lower))
        below = above if self.slope == "cnn-cert" else torch.where(crossing, (upper >= -lower).to(a.dtype), active)
        rows = a.unflatten(0, (-1, lower.shape[0]))
        negative = rows.clamp(max=0)
        result = rows * below if self.slope == "cnn-cert" else rows * below + negative * (above - below)
        return result.flatten(0, 1), _constants(negative, intercept)


@dataclass(frozen=True)
class MaxPool:
    """The largest value of each window, bounded by its pixel with the largest l and by the largest u.

    Where that pixel's l is at least every other u of the window it is the largest for sure, and the bounds are exact.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False

    def image(self, bounds: Interval) -> Interval:
        """Bounds of the largest values from those of x."""
        options = (self.kernel, self.stride, self.padding, 1, self.ceil_mode)
        return Interval(F.max_pool2d(bounds.lower, *options), F.max_pool2d(bounds.upper, *options))

    def pull(self, a: Tensor, bounds: Interval) -> tuple[Tensor, Tensor]:
        """Coefficients of x, (S * N, C, H, W), and the constant (S * N,) of the lower bound with coefficients `a`."""
        options = (self.kernel, self.stride, self.padding, 1, self.ceil_mode)
        count, (channels, height, width) = bounds.lower.shape[0], bounds.shape
        lowest, winner = F.max_pool2d(bounds.lower, *options, return_indices=True)
        highest = F.max_pool2d(bounds.upper, *options)
        certain = self._others(bounds.upper, winner) <= lowest
        rows = a.unflatten(0, (-1, count))
        negative = torch.where(certain, torch.zeros_like(rows), rows.clamp(max=0))
        routed = (rows - negative).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        winner = winner.expand(rows.shape).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        like = routed.new_empty((a.shape[0], channels, height, width)).contiguous(memory_format=torch.channels_last)
        result = torch.ops.aten.max_pool2d_with_indices_backward(routed, like, *options, winner)
        return result, _constants(negative, highest)

    @torch.no_grad()
    def _others(self, upper: Tensor, winner: Tensor) -> Tensor:
        """The largest u of each window but for the winner's, (N, C, H', W'); it decides only which rule holds."""
        count, channels, height, width = upper.shape
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w) = self.kernel, self.stride, self.padding
        out_h, out_w = winner.shape[2:]
        end_h = max(0, (out_h - 1) * stride_h + kernel_h - height - pad_h)
        end_w = max(0, (out_w - 1) * stride_w + kernel_w - width - pad_w)
        padded = F.pad(upper, (pad_w, end_w, pad_h, end_h), value=-torch.inf)
        windows = padded.unfold(2, kernel_h, stride_h).unfold(3, kernel_w, stride_w)[:, :, :out_h, :out_w].flatten(4)
        top = torch.arange(out_h, device=upper.device).view(-1, 1) * stride_h - pad_h
        left = torch.arange(out_w, device=upper.device) * stride_w - pad_w
        place = (winner // width - top) * kernel_w + winner % width - left
        return windows.scatter(4, place.unsqueeze(4), -torch.inf).amax(dim=4)
