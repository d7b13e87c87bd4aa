"""The PGD step and its random start in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    norm: str = "linf",
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """One projected ascent step; what `rnas.kernels.pgd_step` computes. No argument checks.

    Computes in float32, or in float64 for float64 inputs, and returns the dtype of `x_adv`.
    """
    dtype, compute = x_adv.dtype, _compute_dtype(x_adv)
    x_adv, grad, x = x_adv.to(compute), grad.to(compute), x.to(compute)
    epsilon, step_size = _per_sample(epsilon, x), _per_sample(step_size, x)
    if norm == "linf":
        moved = x_adv + step_size * _sign(grad)
        moved = _clamp(moved, x - epsilon, x + epsilon)
    else:
        grad_norm = _sample_norm(grad)
        grad_norm = torch.where(grad_norm == 0, 1.0, grad_norm)
        delta = x_adv + step_size * (grad / grad_norm) - x
        delta_norm = _sample_norm(delta)
        moved = x + delta * torch.where(delta_norm <= epsilon, 1.0, epsilon / delta_norm)
    lower, upper = moved.new_tensor(lower), moved.new_tensor(upper)
    # Adding zero turns -0.0 into 0.0: which of two equal zeros a minimum returns is left open by PyTorch.
    return (_clamp(moved, lower, upper) + 0.0).to(dtype)


def random_start(
    x: Tensor,
    *,
    epsilon: float | Tensor,
    norm: str = "linf",
    lower: float = 0.0,
    upper: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A random point of the epsilon-ball around each image, clamped to the box. No argument checks.

    The numbers are drawn in the order N, C, H, W in float32 (float64 for float64 images), on the generator's device, so
    that neither the memory format nor the device of the images changes them.
    """
    compute = _compute_dtype(x)
    epsilon = _per_sample(epsilon, x)
    device = x.device if generator is None else generator.device
    draw = {"generator": generator, "dtype": compute, "device": device}
    if norm == "linf":
        delta = epsilon * (2 * torch.rand(x.shape, **draw).to(x.device) - 1)
    else:
        direction = torch.randn(x.shape, **draw).to(x.device)
        radius = torch.rand(x.shape[:1], **draw).to(x.device) ** (1 / max(1, math.prod(x.shape[1:])))
        length = _sample_norm(direction)
        delta = direction * (epsilon * _per_sample(radius, x) / torch.where(length == 0, 1.0, length))
    return (x.to(compute) + delta).clamp(lower, upper).to(x.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_sample(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A tensor of shape (N,) as (N, 1, ...), a number or a 0-d tensor as a scalar, in the dtype computed in."""
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=_compute_dtype(x), device=x.device)
    value = value.to(_compute_dtype(x))
    return value.reshape(-1, *[1] * (x.dim() - 1)) if value.dim() else value


def _sign(grad: Tensor) -> Tensor:
    """-1, 0 or 1, and NaN for NaN (`torch.sign` says 0)."""
    return torch.where(grad.isnan(), grad, grad.sign())


def _clamp(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """min(max(value, low), high), NaN where any of the three is NaN."""
    return torch.minimum(torch.maximum(value, low), high)


def _sample_norm(value: Tensor) -> Tensor:
    """The L2 norm of each sample, summed in float64, where the square of a small gradient does not vanish."""
    samples = value.reshape(value.shape[0], math.prod(value.shape[1:]))
    norm = torch.linalg.vector_norm(samples, dim=1, dtype=torch.float64).to(value.dtype)
    return norm.reshape(-1, *[1] * (value.dim() - 1))
