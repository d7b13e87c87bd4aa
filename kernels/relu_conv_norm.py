"""Convolution and batch norm in one op: behind a ReLU, what a cell does to each of its inputs; without, the stem."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rnas.kernels import backend, batched, formats, fused, pixels
from rnas.kernels.reference import relu_conv_norm as reference
from rnas.kernels.registration import define_constant_op, define_differentiable_op


def relu_conv_norm(x: Tensor, weight: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """A batch norm of a 1x1 convolution of a ReLU.

    Args:
        x: (N, C, H, W), float32 or float64, contiguous or channels_last.
        weight: (K, C, 1, 1) of the convolution, as PyTorch stores it.
        norm: the BN module, used as if it were called: its training flag decides between batch and running statistics,
            and in training mode its running averages move.

    Returns:
        (N, K, H, W), channels_last where `x` is and else contiguous.

    Differentiable, twice too, in x, weight and the norm's affine parameters. Neither relu(x) nor what enters the norm
    is kept for backward: `x`, in channels_last, and the result are, and where statistics are fixed and nothing but `x`
    requires a gradient only its signs. The fused kernel serves float32 on a CPU; other calls, and a second derivative
    on batch statistics, go to plain PyTorch.

    Equivalent to: norm(conv2d(relu(x), weight))

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message says what was expected.
        RuntimeError: an input carries a forward-mode tangent on the fused path, or `RNAS_BACKEND` forces a backend that
            cannot serve the call.
    """
    _check_weight(x, "weight", weight)
    _check_norm(norm, weight.shape[0])
    norms = fused.read_norms([norm], norm.num_features)
    n, _, h, w = x.shape
    if norms.on_batch and n * h * w == 1:
        raise ValueError(f"batch statistics need more than 1 value per channel, got x of shape {tuple(x.shape)}")
    run = OP.choose(x.device, x.dtype, fused.obstacle(x, norms))
    return formats.arranged(run(x, weight, norm, norms), formats.layout(x))


def factorized_reduce(x: Tensor, even: Tensor, odd: Tensor | None, norm: nn.BatchNorm2d) -> Tensor:
    """Halves the resolution: a ReLU, two 1x1 convolutions of stride 2, the second shifted by one pixel, a batch norm.

    Args:
        x: (N, C, H, W), float32 or float64, contiguous or channels_last.
        even: (K', C, 1, 1), for the pixels (2i, 2j).
        odd: (K'', C, 1, 1), for the pixels (2i + 1, 2j + 1), zeros where they lie beyond an odd border; or None.
        norm: the BN module of the K' + K'' channels, used as in `relu_conv_norm`.

    Returns:
        (N, K' + K'', ceil(H / 2), ceil(W / 2)), channels_last where `x` is and else contiguous.

    Derivatives, coverage and errors are those of `relu_conv_norm`; kept is the gathered copy of x (N, 2C, H', W').
    Where x is not finite, the fused form spreads that to all channels of the pixel, as each half is computed with
    zeros for the other.

    Equivalent to: norm(cat([conv2d(relu(x), even, stride=2), conv2d(relu(x)[:, :, 1:, 1:], odd, stride=2)], dim=1))

    Source: Zoph et al., Learning Transferable Architectures (CVPR 2018), as FactorizedReduce in the DARTS code.
    """
    channels = x.shape[1] if isinstance(x, Tensor) and x.dim() == 4 else 0
    for name, weight in (("even", even), ("odd", odd)):
        if weight is not None or name == "even":
            _check_weight(x, name, weight)
    outputs = even.shape[0] + (0 if odd is None else odd.shape[0])
    _check_norm(norm, outputs)
    norms = fused.read_norms([norm], norm.num_features)
    n, _, h, w = x.shape
    if norms.on_batch and n * -(-h // 2) * -(-w // 2) == 1:
        raise ValueError(f"batch statistics need more than 1 value per channel, got x of shape {tuple(x.shape)}")
    if OP.choose(x.device, x.dtype, fused.obstacle(x, norms)) is _reference:
        out = reference.factorized_reduce(x, even, odd, norm)
    elif odd is None:
        out = _fused(pixels.gather(x)[:, :channels], even, norm, norms)
    else:
        weight = torch.block_diag(even.flatten(1), odd.flatten(1))[:, :, None, None]
        out = _fused(pixels.gather(x), weight, norm, norms)
    return formats.arranged(out, formats.layout(x))


def conv_norm(x: Tensor, weight: Tensor, norm: nn.BatchNorm2d, *, stride: int = 1, padding: int = 0) -> Tensor:
    """A batch norm of a convolution, for images of few channels: the stem of a network.

    Args:
        x: (N, C, H, W), float32 or float64, contiguous or channels_last.
        weight: (K, C, h, w), as PyTorch stores it; h <= H + 2 padding, w <= W + 2 padding.
        norm: the BN module of the K channels, used as in `relu_conv_norm`.
        stride, padding: of the convolution, in both directions.

    Returns:
        (N, K, H', W') with H' = floor((H + 2 padding - h) / stride) + 1 and W' likewise, channels_last where `x` is and
        else contiguous.

    The fused form multiplies patches (N, C * h * w, H', W') of the images, which are what it keeps for backward besides
    the result; for many channels that is more memory than the convolution takes elsewhere. Derivatives, coverage and
    errors are those of `relu_conv_norm`.

    Equivalent to: norm(conv2d(x, weight, stride=stride, padding=padding))
    """
    _check_images(x, "weight", weight)
    _check_norm(norm, weight.shape[0])
    (n, c, h, w), (k, channels, *kernel) = x.shape, weight.shape
    if k == 0 or channels != c:
        raise ValueError(f"weight must have shape (K, {c}, h, w), got {tuple(weight.shape)}")
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if kernel[0] > h + 2 * padding or kernel[1] > w + 2 * padding:
        raise ValueError(f"a kernel of {tuple(kernel)} does not fit into images of {h} x {w} with padding {padding}")
    height, width = (h + 2 * padding - kernel[0]) // stride + 1, (w + 2 * padding - kernel[1]) // stride + 1
    norms = fused.read_norms([norm], norm.num_features)
    if norms.on_batch and n * height * width == 1:
        raise ValueError(f"batch statistics need more than 1 value per channel, got x of shape {tuple(x.shape)}")
    if OP.choose(x.device, x.dtype, fused.obstacle(x, norms)) is _reference:
        out = reference.conv_norm(x, weight, norm, stride=stride, padding=padding)
    else:
        shape = pixels.PatchShape(*kernel, stride, padding, height, width)
        out = _fused(pixels.patches(x, shape), weight.reshape(k, -1, 1, 1), norm, norms, relu=False)
    return formats.arranged(out, formats.layout(x))


def _reference(x: Tensor, weight: Tensor, norm: nn.BatchNorm2d, norms) -> Tensor:
    return reference.relu_conv_norm(x, weight, norm)


def _fused(x: Tensor, weight: Tensor, norm: nn.BatchNorm2d, norms, relu: bool = True) -> Tensor:
    x = formats.taken(x)
    tables = [None if table is None else table[0] for table in (*norms.affine(weight), *norms.statistics(weight))]
    settings = _Settings(norms.eps, relu, fused.what_to_keep([x], (weight, *tables[:2]), norms.on_batch))
    out, mean, variance, _ = _forward_op(x, weight, *tables, *settings)
    if norms.on_batch:
        norms.move_averages(mean[None], variance[None], out.shape[0] * out.shape[2] * out.shape[3])
    return out


class _Settings(NamedTuple):
    """The arguments of the registered ops that are not tensors. keep: as in rnas.kernels.fused."""

    eps: float
    relu: bool
    keep: int


def _sizes(x: Tensor, weight: Tensor, relu: bool) -> tuple[tuple[int, int, int], int, int]:
    """(pixels, C, K), bytes of the masks, bytes of the workspace."""
    n, c, h, w = (int(size) for size in x.shape)
    shape = (n * h * w, c, int(weight.shape[0]))
    return shape, *_sizes_cached(shape, relu, torch.get_num_threads(), backend.module("cpu").simd_level())


@functools.lru_cache(maxsize=256)
def _sizes_cached(shape: tuple[int, int, int], relu: bool, threads: int, level: str) -> tuple[int, int]:
    """level: the instruction set in use, on which the memory layout depends."""
    return backend.module("cpu").relu_conv_norm_sizes(*shape, relu, threads)


def _outputs(x, weight, batch_statistics, relu, keep, take):
    _, masks, _ = _sizes(x, weight, relu)
    k, (_, _, h, w) = weight.shape[0], x.shape
    statistics = (k,) if batch_statistics else (0,)
    kept = take(masks if keep == fused.MASKS else 0)
    return formats.empty_image(x, k, h, w), x.new_empty(statistics), x.new_empty(statistics), kept


def _forward(x, weight, gamma, beta, mean, variance, eps, relu, keep):
    shape, _, size = _sizes(x, weight, relu)
    if any(table is not None and table.shape != (shape[2],) for table in (gamma, beta, mean, variance)):
        raise ValueError(f"expected tables of {shape[2]} channels")
    outputs = _outputs(x, weight, mean is None, relu, keep, fused.POOL.take)
    tensors = fused.dense(formats.pixels_first(x), weight, gamma, beta, mean, variance)
    backend.module("cpu").relu_conv_norm_forward(
        *shape,
        fused.addresses(tensors),
        eps,
        mean is None,
        relu,
        keep,
        *fused.addresses([*outputs, fused.workspace(size)]),
        torch.get_num_threads(),
    )
    return outputs


def _forward_fake(x, weight, gamma, beta, mean, variance, eps, relu, keep):
    return _outputs(x, weight, mean is None, relu, keep, fused.empty_bytes)


def _gradients(x, weight, gamma, beta, wanted) -> list[Tensor | None]:
    """Empty tensors for the gradients that are wanted."""
    _, c, h, w = x.shape
    tables = [t.new_empty(t.shape) if want else None for t, want in zip((weight, gamma, beta), wanted[1:])]
    return [formats.empty_image(x, c, h, w) if wanted[0] else None, *tables]


def _backward(grad_out, x, out, kept, weight, gamma, beta, mean, variance, batch_statistics, wanted, eps, relu, keep):
    shape, _, size = _sizes(x, weight, relu)
    gradients = _gradients(x, weight, gamma, beta, wanted)
    masks = keep == fused.MASKS
    images = [None if masks else formats.pixels_first(image) for image in (x, out)]
    tables = fused.dense(weight, gamma, beta, mean, variance)
    grad_out = formats.pixels_first(grad_out)
    backend.module("cpu").relu_conv_norm_backward(
        *shape,
        fused.addresses([images[0], *tables]),
        eps,
        batch_statistics,
        relu,
        keep,
        *fused.addresses([images[1], kept, grad_out, *gradients, fused.workspace(size)]),
        torch.get_num_threads(),
    )
    return [gradient for gradient in gradients if gradient is not None]


def _backward_fake(grad_out, x, out, kept, weight, gamma, beta, mean, variance, batch_statistics, wanted, *settings):
    return [gradient for gradient in _gradients(x, weight, gamma, beta, wanted) if gradient is not None]


def _double_backward(direction, grad_out, x, kept, weight, gamma, beta, mean, variance, wanted, eps, relu, keep):
    shape, _, size = _sizes(x, weight, relu)
    _, grad_weight, grad_gamma, _ = _gradients(x, weight, gamma, beta, [False, *wanted, False])
    _, k, h, w = grad_out.shape
    grad_grad_out = formats.empty_image(grad_out, k, h, w)
    image = None if keep == fused.MASKS else formats.pixels_first(x)
    tables = fused.dense(weight, gamma, beta, mean, variance)
    grad_out, direction = formats.pixels_first(grad_out), formats.pixels_first(direction)
    outputs = [grad_grad_out, grad_weight, grad_gamma]
    backend.module("cpu").relu_conv_norm_double_backward(
        *shape,
        fused.addresses([image, *tables]),
        eps,
        relu,
        keep,
        *fused.addresses([kept, grad_out, direction, *outputs, fused.workspace(size)]),
        torch.get_num_threads(),
    )
    return [output for output in outputs if output is not None]


def _double_backward_fake(direction, grad_out, x, kept, weight, gamma, beta, mean, variance, wanted, eps, relu, keep):
    _, grad_weight, grad_gamma, _ = _gradients(x, weight, gamma, beta, [False, *wanted, False])
    _, k, h, w = grad_out.shape
    outputs = [formats.empty_image(grad_out, k, h, w), grad_weight, grad_gamma]
    return [output for output in outputs if output is not None]


class _Forward(torch.autograd.Function):
    """link: to x where only masks are kept, else None."""

    @staticmethod
    def forward(ctx, settings, weight, gamma, beta, mean, variance, x, link):
        with torch._C._AutoDispatchBelowAutograd():
            out, batch_mean, batch_variance, kept = _forward_op(x, weight, gamma, beta, mean, variance, *settings)
        ctx.settings, ctx.batch_statistics = settings, mean is None
        statistics = (batch_mean, batch_variance) if mean is None else (mean, variance)
        images, tables = (x, out), (weight, gamma, beta, *statistics)
        if link is not None:  # masks say all that counts of the images, and the tables are constants from here on
            images = (fused.shape_of(x), fused.shape_of(out))
            tables = [None if table is None else table.detach() for table in tables]
        ctx.save_for_backward(*images, kept, *tables, link)
        ctx.mark_non_differentiable(batch_mean, batch_variance, kept)
        ctx.set_materialize_grads(False)
        return out, batch_mean, batch_variance, kept

    @staticmethod
    @batched.one_at_a_time
    def backward(ctx, grad_out, *_):
        needs = ctx.needs_input_grad
        if grad_out is None:
            return (None,) * len(needs)
        *tensors, link = ctx.saved_tensors
        wanted = [needs[6], *needs[1:4]]
        if link is not None and torch.is_grad_enabled():
            found = _Backward.apply(ctx.batch_statistics, wanted, ctx.settings, grad_out, *tensors, link)
        else:
            found = _backward_op(grad_out, *tensors, ctx.batch_statistics, wanted, *ctx.settings)
        found = iter(found)
        grad_x, *gradients = [next(found) if want else None for want in wanted]
        return None, *gradients, None, None, grad_x, None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, batch_statistics, wanted, settings, *tensors):
        *of_op, _ = tensors
        with torch._C._AutoDispatchBelowAutograd():
            found = _backward_op(*of_op, batch_statistics, wanted, *settings)
        ctx.batch_statistics, ctx.wanted, ctx.settings = batch_statistics, wanted, settings
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @batched.one_at_a_time
    def backward(ctx, *directions):
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        if all(direction is None for direction in directions):
            return (None,) * len(ctx.needs_input_grad)
        only_x = ctx.wanted[0] and all(direction is None for direction in directions[1:])
        if only_x and not ctx.batch_statistics and not torch.is_grad_enabled():
            return None, None, None, *_second_linear(ctx, directions[0])
        if ctx.settings.keep == fused.MASKS:
            raise RuntimeError(
                "relu_conv_norm: only masks were kept, as nothing but x required a gradient; they do not give third "
                "derivatives. Let the weight require a gradient, or set RNAS_BACKEND=reference"
            )
        statistics = (None, None) if ctx.batch_statistics else tensors[7:9]

        def layer(x, weight, gamma, beta):
            norm = functools.partial(_norm, *statistics, gamma, beta, ctx.settings.eps)
            return reference.relu_conv_norm(x, weight, norm) if ctx.settings.relu else norm(F.conv2d(x, weight))

        positions = (_X, _WEIGHT, _GAMMA, _BETA)
        found = fused.differentiate_twice(
            layer,
            [tensors[position] for position in positions],
            tensors[_GRAD_OUT],
            ctx.wanted,
            directions,
            [needs[position] for position in (_GRAD_OUT, *positions)],
        )
        gradients = [None] * len(needs)
        for position, gradient in zip((_GRAD_OUT, *positions), found):
            gradients[position] = gradient
        return None, None, None, *gradients


# Positions of the tensors that _Backward takes and can be differentiated by.
_GRAD_OUT, _X, _WEIGHT, _GAMMA, _BETA = 0, 1, 4, 5, 6


def _second_linear(ctx, direction):
    """On fixed statistics the layer is linear between the kinks of its ReLU."""
    saved = ctx.saved_tensors  # read once: a checkpoint counts the reads
    grad_out, x, _, kept, *tables, _ = saved
    needs = ctx.needs_input_grad[3:]
    wanted = [needs[_WEIGHT], needs[_GAMMA]]
    found = iter(_double_backward_op(direction, grad_out, x, kept, *tables, wanted, *ctx.settings))
    gradients = [None] * len(needs)
    for position in (_X, _BETA, len(needs) - 1):  # the last is the link
        gradients[position] = torch.zeros_like(saved[position]) if needs[position] else None
    gradients[_GRAD_OUT] = next(found)
    for position, want in zip((_WEIGHT, _GAMMA), wanted):
        gradients[position] = next(found) if want else None
    return gradients


def _norm(mean, variance, gamma, beta, eps: float, x: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, training=mean is None, eps=eps)


def _forward_autograd(x, weight, gamma, beta, mean, variance, *settings):
    settings = _Settings(*settings)
    link = fused.Link.apply(x) if settings.keep == fused.MASKS else None
    return _Forward.apply(settings, weight, gamma, beta, mean, variance, x, link)


def _backward_autograd(*arguments):
    *tensors, batch_statistics, wanted = arguments[:-3]
    return list(_Backward.apply(batch_statistics, wanted, _Settings(*arguments[-3:]), *tensors, None))


_TABLES = "Tensor weight, Tensor? gamma, Tensor? beta"
_SETTINGS = "float eps, bool relu, int keep"

_forward_op = define_differentiable_op(
    f"relu_conv_norm_forward(Tensor x, {_TABLES}, Tensor? mean, Tensor? variance, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _forward_autograd,
)
_backward_op = define_differentiable_op(
    f"relu_conv_norm_backward(Tensor grad_out, Tensor x, Tensor out, Tensor kept, {_TABLES}, Tensor mean, "
    f"Tensor variance, bool batch_statistics, bool[] wanted, {_SETTINGS}) -> Tensor[]",
    _backward,
    _backward_fake,
    _backward_autograd,
)
_double_backward_op = define_constant_op(
    f"relu_conv_norm_double_backward(Tensor direction, Tensor grad_out, Tensor x, Tensor kept, {_TABLES}, Tensor mean, "
    f"Tensor variance, bool[] wanted, {_SETTINGS}) -> Tensor[]",
    _double_backward,
    _double_backward_fake,
)

OP = backend.Op(
    "relu_conv_norm",
    {
        "reference": backend.Implementation(_reference),
        "cpu": backend.Implementation(_fused, (torch.float32,)),
    },
)


def _check_images(x: Tensor, name: str, weight: Tensor, kernel: str = "h, w") -> None:
    """Images and the weight of a convolution, as far as they do not depend on each other's sizes."""
    for argument, tensor, shape in (("x", x, "(N, C, H, W)"), (name, weight, f"(K, C, {kernel})")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument} must be a tensor of shape {shape}, got {type(tensor).__name__}")
        if tensor.dim() != 4 or 0 in tensor.shape[1:]:
            raise ValueError(f"{argument} must have shape {shape} without zeros, got {tuple(tensor.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}; convert with .float()")
    if weight.dtype not in fused.dtypes_beside(x):
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}; got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}; got {weight.device}")


def _check_weight(x: Tensor, name: str, weight: Tensor) -> None:
    """Images and the weight of a 1x1 convolution of them."""
    _check_images(x, name, weight, "1, 1")
    if weight.shape[0] == 0 or weight.shape[1:] != (x.shape[1], 1, 1):
        raise ValueError(f"{name} must have shape (K, {x.shape[1]}, 1, 1), got {tuple(weight.shape)}")


def _check_norm(norm: nn.BatchNorm2d, outputs: int) -> None:
    if not isinstance(norm, nn.BatchNorm2d):
        raise TypeError(f"norm must be an nn.BatchNorm2d, got {type(norm).__name__}")
    if norm.num_features != outputs:
        raise ValueError(f"norm must have {outputs} features, as many as there are outputs; got {norm.num_features}")
