"""Layers that are not linear: their bounds, and linear bounds between which they run on an interval.

Legend: N images, S margins per image, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .interval import Interval, arranged, products

SLOPES = ("adaptive", "cnn-cert")


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
        intercept = torch.where(crossing, -lower * above, torch.zeros_like(lower))
        below = above if self.slope == "cnn-cert" else torch.where(crossing, (upper >= -lower).to(a.dtype), active)
        rows, constant = _Lines.apply(a.unflatten(0, (-1, lower.shape[0])), below, above, intercept)
        return rows.flatten(0, 1), constant.flatten()


class _Lines(torch.autograd.Function):
    """Positive coefficients times the lower line's slope, negative ones times the upper's, and the latter's constant.

    Written out because autograd would store three tensors of the size of `rows` where one will do; most of what the
    derivative of a linear pass stores is this.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, below: Tensor, above: Tensor, intercept: Tensor) -> tuple[Tensor, Tensor]:
        """rows (S, N, ...); below, above, intercept (N, ...) -> (S, N, ...), (S, N)."""
        ctx.save_for_backward(rows, below, above, intercept)
        negative = rows.clamp(max=0)
        return rows * below + negative * (above - below), products(negative, intercept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_rows: Tensor, grad_constant: Tensor):
        rows, below, above, intercept = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 4
        if ctx.needs_input_grad[0]:
            outer = grad_constant.view(*grad_constant.shape, *[1] * (rows.dim() - 2))
            grads[0] = torch.where(rows < 0, torch.addcmul(grad_rows * above, outer, intercept), grad_rows * below)
        if any(ctx.needs_input_grad[1:]):
            negative = rows.clamp(max=0)
            through = grad_rows * negative
            grads[1] = (grad_rows * rows - through).sum(dim=0)
            grads[2] = through.sum(dim=0)
            grads[3] = torch.einsum("sn,sn...->n...", grad_constant, negative)
        return tuple(grads)


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
        routed = arranged((rows - negative).flatten(0, 1))
        winner = winner.expand(rows.shape).flatten(0, 1)
        like = arranged(routed.new_empty((a.shape[0], channels, height, width)))
        result = torch.ops.aten.max_pool2d_with_indices_backward(routed, like, *options, winner)
        return result, products(negative, highest).flatten()

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
