"""One step of projected gradient ascent, and the random point it starts from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rnas.kernels import backend
from rnas.kernels.reference import pgd_step as reference
from rnas.kernels.registration import define_constant_op

NORMS = ("linf", "l2")


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
    out: Tensor | None = None,
) -> Tensor:
    """One ascent step on the loss, projected on the epsilon-ball around `x` and clamped to the box.

    Args:
        x_adv: (N, ...) the images attacked so far, pixels in [lower, upper].
        grad: (N, ...) gradient of the loss with respect to `x_adv`.
        x: (N, ...) the clean images. All three have the same shape, device and dtype (float64, float32, float16 or
            bfloat16) and any memory layout.
        epsilon: radius of the ball in pixel units (8/255 for pixels in [0, 1]): a number, or a tensor of shape (N,) or
            (). Numbers must not be negative; tensors are not looked at, as that would wait for the GPU.
        step_size: length of the step in pixel units, likewise; negative to descend.
        norm: "linf" or "l2" (per sample, over all its pixels).
        lower, upper: the box of valid pixels.
        out: (N, ...) buffer for the result, of the same shape, dtype and device. May be `x_adv`: in place.

    Returns:
        (N, ...) the new images: `out`, or a new tensor, channels_last where `x_adv` is and else contiguous.

    Computed in float32 (float64 for float64 inputs) and rounded once. A zero gradient makes no step. A NaN in an
    operand gives a NaN pixel; with "l2" a NaN in a gradient reaches its whole sample. Deterministic; the CPU kernel
    gives the same bits for every instruction set and number of threads.

    Equivalent to, for "linf"::

        moved = x_adv + step_size * grad.sign()
        moved = torch.minimum(torch.maximum(moved, x - epsilon), x + epsilon)
        return moved.clamp(lower, upper)

    and for "l2", with norms per sample::

        delta = x_adv + step_size * grad / grad.norm() - x
        delta = delta * min(1, epsilon / delta.norm())
        return (x + delta).clamp(lower, upper)

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message says what was expected.
        RuntimeError: an input requires a gradient in grad mode or carries a forward-mode tangent (the step is not
            differentiable), or `RNAS_BACKEND` forces a backend that cannot serve the call.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks (ICLR 2018), section 2.1.
    """
    _check_image("x_adv", x_adv)
    for name, tensor in (("grad", grad), ("x", x), ("out", out)):
        if tensor is not None or name != "out":
            _check_like(name, tensor, x_adv)
    _check_out(out)
    _check_norm(norm)
    _check_box(lower, upper)
    epsilon, epsilons = _split("epsilon", epsilon, x_adv, least=0.0)
    step_size, step_sizes = _split("step_size", step_size, x_adv, least=-math.inf)
    arguments = (x_adv, grad, x, epsilon, step_size, epsilons, step_sizes, norm, float(lower), float(upper))
    if out is None:
        return _pgd_step(*arguments)
    _pgd_step_out(*arguments, out)
    return out


def random_start(
    x: Tensor,
    *,
    epsilon: float | Tensor,
    norm: str = "linf",
    lower: float = 0.0,
    upper: float = 1.0,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A random point of the epsilon-ball around each image, clamped to the box: where PGD starts.

    Args:
        x: (N, ...) the clean images.
        epsilon: radius in pixel units: a number, or a tensor of shape (N,) or ().
        norm: "linf", uniform in the cube of half-width epsilon, or "l2", uniform in the ball (a Gaussian direction and
            a radius of epsilon * u^(1/D), with D pixels in an image).
        lower, upper: the box of valid pixels.
        generator: source of the random numbers, on any device; None for PyTorch's default generator of x's device.
        out: (N, ...) buffer for the result. May be `x`.

    Returns:
        (N, ...) a constant to autograd, in x's dtype, channels_last where `x` is and else contiguous. The numbers are
        drawn in the order N, C, H, W whatever the layout of `x`, so the layout does not change the values.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message says what was expected.
    """
    _check_image("x", x)
    if out is not None:
        _check_like("out", out, x, of="x")
        _check_out(out)
    _check_norm(norm)
    _check_box(lower, upper)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    number, numbers = _split("epsilon", epsilon, x, least=0.0)
    with torch.no_grad():
        epsilon = number if numbers is None else numbers
        start = reference.random_start(
            x.detach(), epsilon=epsilon, norm=norm, lower=lower, upper=upper, generator=generator
        )
        return start.contiguous(memory_format=_layout(x)) if out is None else out.copy_(start)


def _reference(out, x_adv, grad, x, epsilon, step_size, epsilons, step_sizes, norm, lower, upper):
    out.copy_(
        reference.pgd_step(
            x_adv,
            grad,
            x,
            epsilon=epsilon if epsilons is None else epsilons,
            step_size=step_size if step_sizes is None else step_sizes,
            norm=norm,
            lower=lower,
            upper=upper,
        )
    )


def _compiled_arguments(out, x_adv, grad, x, epsilon, step_size, epsilons, step_sizes, norm, lower, upper):
    """The arguments of the bindings: addresses, sizes, names and numbers."""
    samples = x_adv.shape[0]
    size = x_adv.numel() // samples if samples else 0
    addresses = (out.data_ptr(), x_adv.data_ptr(), grad.data_ptr(), x.data_ptr())
    per_sample = (0 if numbers is None else numbers.data_ptr() for numbers in (epsilons, step_sizes))
    dtype = str(x_adv.dtype).removeprefix("torch.")
    return (*addresses, samples, size, dtype, norm, epsilon, step_size, *per_sample, lower, upper)


def _cpu(*arguments):
    backend.module("cpu").pgd_step(*_compiled_arguments(*arguments))


def _cuda(out, *arguments):
    stream = torch.cuda.current_stream(out.device).cuda_stream
    backend.module("cuda").pgd_step(*_compiled_arguments(out, *arguments), out.device.index, stream)


def _triton(*arguments):
    from rnas.kernels.triton import pgd_step as launcher  # imports triton, which takes a second

    launcher.pgd_step(*arguments)


OP = backend.Op(
    "pgd_step",
    {
        "reference": backend.Implementation(_reference),
        "cpu": backend.Implementation(_cpu, (torch.float32, torch.float64)),
        "cuda": backend.Implementation(_cuda, (torch.float32, torch.float16, torch.bfloat16)),
        "triton": backend.Implementation(_triton, (torch.float32, torch.float16, torch.bfloat16)),
    },
)


def _implementation(x_adv, grad, x, epsilon, step_size, epsilons, step_sizes, norm, lower, upper):
    out = torch.empty_like(x_adv, memory_format=_layout(x_adv))
    _implementation_out(x_adv, grad, x, epsilon, step_size, epsilons, step_sizes, norm, lower, upper, out)
    return out


def _implementation_out(x_adv, grad, x, epsilon, step_size, epsilons, step_sizes, norm, lower, upper, out):
    run = OP.choose(out.device, out.dtype)
    # The kernels walk all arrays in one order: that of `out` where it is dense, so that no result need be copied.
    layout = _layout(out)
    direct = out.is_contiguous(memory_format=layout) and not any(_overlaps(out, t) for t in (x_adv, grad, x))
    target = out if direct else torch.empty_like(x_adv, memory_format=layout)
    images = [tensor.contiguous(memory_format=layout) for tensor in (x_adv, grad, x)]
    numbers = (epsilon, step_size, *(_of_samples(tensor, out) for tensor in (epsilons, step_sizes)))
    run(target, *images, *numbers, norm, lower, upper)
    if not direct:
        out.copy_(target)


def _fake(x_adv, grad, x, epsilon, step_size, epsilons, step_sizes, norm, lower, upper):
    return torch.empty_like(x_adv, memory_format=_layout(x_adv))


def _fake_out(x_adv, grad, x, epsilon, step_size, epsilons, step_sizes, norm, lower, upper, out):
    return None


_ARGUMENTS = (
    "Tensor x_adv, Tensor grad, Tensor x, float epsilon, float step_size, Tensor? epsilons, Tensor? step_sizes, "
    "str norm, float lower, float upper"
)
_pgd_step = define_constant_op(f"pgd_step({_ARGUMENTS}) -> Tensor", _implementation, _fake)
_pgd_step_out = define_constant_op(
    f"pgd_step_out({_ARGUMENTS}, Tensor(a!) out) -> ()", _implementation_out, _fake_out, mutates=(10,)
)


def _layout(tensor: Tensor) -> torch.memory_format:
    """channels_last where the tensor is dense in that order and not in the usual one, else contiguous."""
    if not tensor.is_contiguous():
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _overlaps(out: Tensor, other: Tensor) -> bool:
    """Whether two tensors share memory without being the same view of it."""
    if out.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    return out.data_ptr() != other.data_ptr() or out.stride() != other.stride()


def _of_samples(numbers: Tensor | None, images: Tensor) -> Tensor | None:
    """epsilon or step_size as a dense tensor of shape (N,) in the dtype that is computed in."""
    if numbers is None:
        return None
    compute = torch.float64 if images.dtype == torch.float64 else torch.float32
    return numbers.to(compute).expand(images.shape[0]).contiguous()


def _check_image(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (N, ...), got {type(tensor).__name__}")
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}; use .float()")
    if tensor.dim() == 0:
        raise ValueError(f"{name} must have shape (N, ...), got a tensor without dimensions; add one with [None]")


def _check_like(name: str, tensor: Tensor, model: Tensor, of: str = "x_adv") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor like {of}, got {type(tensor).__name__}")
    if tensor.shape != model.shape:
        raise ValueError(f"{name} must have the shape of {of}, {tuple(model.shape)}; got {tuple(tensor.shape)}")
    if tensor.dtype != model.dtype:
        raise TypeError(f"{name} must have the dtype of {of}, {model.dtype}; got {tensor.dtype}")
    if tensor.device != model.device:
        raise ValueError(f"{name} must be on the device of {of}, {model.device}; got {tensor.device}")


def _check_out(out: Tensor | None) -> None:
    if out is not None and out.numel() and any(n > 1 and stride == 0 for n, stride in zip(out.shape, out.stride())):
        raise ValueError(f"out must not overlap itself, got strides {out.stride()} for shape {tuple(out.shape)}")


def _check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")


def _check_box(lower: float, upper: float) -> None:
    if not lower <= upper:
        raise ValueError(f"lower must not exceed upper, got lower={lower} and upper={upper}")


def _split(name: str, value: float | Tensor, images: Tensor, least: float) -> tuple[float, Tensor | None]:
    """A number as (number, None), a tensor as (0, tensor), checked."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number or a tensor of shape (N,), got {type(value).__name__}")
        if not value >= least:
            raise ValueError(f"{name} must be a number of at least {least}, got {value}")
        return float(value), None
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}; convert with .float()")
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != images.shape[0]):
        raise ValueError(
            f"{name} must have shape ({images.shape[0]},), one number per image, or (); got {tuple(value.shape)}"
        )
    if value.device != images.device:
        raise ValueError(f"{name} must be on the device of the images, {images.device}; got {value.device}")
    return 0.0, value
