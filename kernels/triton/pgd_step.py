"""The PGD step in Triton.

What a pixel goes through is that of csrc/include/rnas/pgd_step_math.h, in the same order, so that all backends round
alike: launches forbid FMAs, and the divisions are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

# Pixels that a program holds at a time: 8 per thread, which is one 128-bit access per array in half precision.
LINF_BLOCK, LINF_OPTIONS = 1024, {"num_warps": 4, "enable_fp_fusion": False}
L2_BLOCK, L2_OPTIONS = 2048, {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _clamp(value, low, high):
    """min(max(value, low), high), NaN where any of the three is NaN."""
    value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _number(scalar, per_sample, sample):
    """A sample's epsilon or step size."""
    if per_sample is None:
        return scalar
    else:
        return tl.load(per_sample + sample)


@triton.jit(do_not_specialize=["blocks"])
def linf_kernel(
    out,  # (N, D), like x_adv, grad and x
    x_adv,
    grad,
    x,
    epsilons,  # (N) or None
    step_sizes,  # (N) or None
    size,  # D
    blocks,  # cdiv(D, BLOCK)
    epsilon,
    step_size,
    lower,
    upper,
    BLOCK: tl.constexpr,
):
    """Program i: block i % blocks of sample i // blocks."""
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    pixel = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < size
    offset = sample * size + pixel
    epsilon = _number(epsilon, epsilons, sample)
    step_size = _number(step_size, step_sizes, sample)

    start = tl.load(x_adv + offset, mask=mask).to(tl.float32)
    g = tl.load(grad + offset, mask=mask).to(tl.float32)
    clean = tl.load(x + offset, mask=mask).to(tl.float32)
    sign = tl.where(g != g, g, (g > 0).to(tl.float32) - (g < 0).to(tl.float32))  # NaN stays NaN
    moved = _clamp(start + step_size * sign, clean - epsilon, clean + epsilon)
    # Adding 0 turns -0 into +0: which of two equal zeros min and max return is left open.
    moved = _clamp(moved, lower, upper) + 0.0
    tl.store(out + offset, moved.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _delta(x_adv, grad, x, offset, mask, divisor, step_size):
    """The perturbation of some pixels after an L2 step, before its projection, and the clean pixels."""
    start = tl.load(x_adv + offset, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    clean = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    return start + step_size * tl.div_rn(g, divisor) - clean, clean


@triton.jit(do_not_specialize=["blocks"])
def l2_kernel(
    out,  # (N, D), like x_adv, grad and x
    x_adv,
    grad,
    x,
    epsilons,  # (N) or None
    step_sizes,  # (N) or None
    size,  # D
    blocks,  # cdiv(D, BLOCK)
    epsilon,
    step_size,
    lower,
    upper,
    BLOCK: tl.constexpr,
):
    """One program per sample, three sweeps: norm of the gradient, norm of the perturbation, output.

    Norms are summed in float64, where the square of no float32 vanishes or overflows, each lane its pixels in order and
    the lanes by a fixed tree: the same bits in every run. Perturbations are computed twice rather than stored, as out
    may be any of the inputs.
    """
    sample = tl.program_id(0).to(tl.int64)
    first = sample * size
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    width = tl.full([], BLOCK, tl.int64)
    epsilon = _number(epsilon, epsilons, sample)
    step_size = _number(step_size, step_sizes, sample)

    squares = tl.zeros([BLOCK], tl.float64)
    for block in range(blocks):
        pixel = block * width + lanes
        g = tl.load(grad + first + pixel, mask=pixel < size, other=0.0).to(tl.float64)
        squares += g * g
    norm = tl.sqrt(tl.sum(squares)).to(tl.float32)
    divisor = tl.where(norm == 0, 1.0, norm)  # a zero gradient makes no step

    squares = tl.zeros([BLOCK], tl.float64)
    for block in range(blocks):
        pixel = block * width + lanes
        delta, _ = _delta(x_adv, grad, x, first + pixel, pixel < size, divisor, step_size)
        wide = delta.to(tl.float64)
        squares += wide * wide
    norm = tl.sqrt(tl.sum(squares)).to(tl.float32)
    scale = tl.where(norm <= epsilon, 1.0, tl.div_rn(epsilon + tl.zeros_like(norm), norm))

    for block in range(blocks):
        pixel = block * width + lanes
        mask = pixel < size
        delta, clean = _delta(x_adv, grad, x, first + pixel, mask, divisor, step_size)
        moved = _clamp(clean + delta * scale, lower, upper) + 0.0
        tl.store(out + first + pixel, moved.to(out.dtype.element_ty), mask=mask)


def pgd_step(
    out: Tensor,
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    epsilon: float,
    step_size: float,
    epsilons: Tensor | None,
    step_sizes: Tensor | None,
    norm: str,
    lower: float,
    upper: float,
) -> None:
    """Writes the step to `out` on the current stream of its device.

    out, x_adv, grad, x     (N, D), dense with the sample slowest; the order of the D pixels is free but common to all.
                            `out` may be any of the inputs but must not overlap them otherwise.
    epsilons, step_sizes    (N) float32, or None: then the number beside them holds for every sample.
    """
    if out.numel() == 0:
        return
    linf = norm == "linf"
    samples = 1 if linf and epsilons is None and step_sizes is None else out.shape[0]
    size = out.numel() // samples
    kernel, block, options = (linf_kernel, LINF_BLOCK, LINF_OPTIONS) if linf else (l2_kernel, L2_BLOCK, L2_OPTIONS)
    blocks = triton.cdiv(size, block)
    arguments = (out, x_adv, grad, x, epsilons, step_sizes, size, blocks, epsilon, step_size, lower, upper)
    with torch.cuda.device_of(out):
        kernel[(samples * blocks if linf else samples,)](*arguments, BLOCK=block, **options)


def resource_cases() -> Iterator[dict]:
    """What scripts/kernel_resources.py compiles: the kernels in every dtype, and their costliest variant.

    Each case has a `name`, a `kernel`, the `signature` by argument, the `constants`, the arguments that are `aligned`
    (multiples of 16, as the memory of PyTorch and the sizes of most images are) and the `options` of the launch.
    """
    images = ("out", "x_adv", "grad", "x")
    numbers = dict.fromkeys(("epsilon", "step_size", "lower", "upper"), "fp32")
    for kernel, block, options in ((linf_kernel, LINF_BLOCK, LINF_OPTIONS), (l2_kernel, L2_BLOCK, L2_OPTIONS)):
        for dtype, costly in (("fp32", False), ("bf16", False), ("fp16", False), ("fp32", True)):
            vectors = dict.fromkeys(("epsilons", "step_sizes"), "*fp32" if costly else "constexpr")
            signature = dict.fromkeys(images, f"*{dtype}") | vectors | {"size": "i32", "blocks": "i32"} | numbers
            yield {
                "name": f"{kernel.__name__}<{dtype}{', per sample, unaligned' if costly else ''}>",
                "kernel": kernel,
                "signature": signature | {"BLOCK": "constexpr"},
                "constants": {"BLOCK": block} | ({} if costly else dict.fromkeys(vectors)),
                "aligned": () if costly else (*images, "size"),
                "options": options,
            }
