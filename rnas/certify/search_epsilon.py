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
    smallest: float | None = None,
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

    smallest: bisect the logarithm of the radius between `smallest` and `largest`, for radii of which not even the
    decade is known. A radius by the factor (largest / smallest)**(2**-steps) larger was not certified then, and the
    result is 0 where `smallest` itself was not.

    The other arguments and the errors are those of `certified_margin`; ValueError for steps below 1, and for `smallest`
    outside (0, largest), too.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if smallest is not None and not 0 < smallest < largest:
        raise ValueError(f"smallest must lie above 0 and below largest, {largest}; got {smallest}")

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

    low = torch.full((x.shape[0],), smallest or 0.0, dtype=x.dtype, device=x.device)
    high = torch.full_like(low, largest)
    if smallest is not None:
        low = torch.where(certified(low), low, 0)
    low = torch.where(certified(high), high, low)
    for _ in range(steps):
        middle = (low + high) / 2 if smallest is None else (low * high).sqrt()
        holds = (middle > 0) & certified(middle)
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return low
