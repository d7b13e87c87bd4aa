"""The radius up to which an image's prediction is certified."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .margin import certified_margin
from .network import Weights


@torch.no_grad()
def certified_epsilon(
    network: nn.Module,
    mixing: Weights | None,
    x: Tensor,
    y: Tensor,
    *,
    norm: Literal["linf", "l2"] = "linf",
    largest: float,
    steps: int = 15,
    edge_weights: Weights | None = None,
    relu_slope: Literal["adaptive", "cnn-cert"] = "adaptive",
    lower: float | None = 0.0,
    upper: float | None = 1.0,
    method: Literal["crown-ibp", "interval"] = "crown-ibp",
) -> Tensor:
    """Radius (N,) of a ball around each image in which every margin is certified to be positive, found by bisection.

    The result is a radius at which `certified_margin` was positive for all classes, 0 where no such radius was found,
    so for every image that is classified wrong. It is at most `largest`, and unless it equals that, a radius by
    2**-steps * largest larger was not certified. largest: in the units of x.

    The other arguments and the errors are those of `certified_margin`; ValueError for steps below 1, too.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")

    def certified(epsilon: Tensor) -> Tensor:
        bounds = certified_margin(
            network,
            mixing,
            x,
            y,
            epsilon,
            norm=norm,
            edge_weights=edge_weights,
            relu_slope=relu_slope,
            lower=lower,
            upper=upper,
            method=method,
        )
        return (bounds > 0).all(dim=1)

    low = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
    high = torch.full_like(low, largest)
    low = torch.where(certified(high), high, low)
    for _ in range(steps):
        middle = (low + high) / 2
        holds = certified(middle)
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return low
