"""What a candidate operation computes: a primitive of `rnas.kernels.mixed_op`, or why it is none.

Names decide nothing. The layers that a module holds give a first guess; then a copy of the module with random weights
runs against the definition of the guessed primitive: values, gradients and running averages, in float64, in training
and eval mode, on several sizes. What the code of its forward reads besides its layers is found in `reads.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels.mixed_op import PRIMITIVES
from ..kernels.reference.mixed_op import SEPARABLE
from .layers import Guess, Layers, layers_of
from .reads import Foreign, Reads, is_simple, reads
from .verify import check_values, failed, images, randomised


def recognise(module: nn.Module, memory: dict) -> tuple[Guess, Layers, Reads] | str:
    """What the module computes, its layers and what its code reads; or, as text, why the kernels cannot take it.

    memory: what was found out of other modules of the same kind and settings; filled here.
    """
    try:
        found = reads(module)
        layers = layers_of(module)
        key = _key(module)
        if key not in memory:
            try:
                memory[key] = _verified(module, layers, [None] * found.required)
            except Foreign as reason:
                memory[key] = str(reason)
        guess = memory[key]
        return guess if isinstance(guess, str) else (guess, layers, found)
    except Foreign as reason:
        return str(reason)
    except Exception as error:  # a module that cannot be copied, has no code, ...
        return f"it cannot be examined: {failed(error)}"


# ---- the guess -------------------------------------------------------------------------------------------------------

def _verified(module: nn.Module, layers: Layers, extras: list[None]) -> Guess:
    """extras: the arguments that its forward takes behind the images."""
    guesses = _guesses(module, layers, extras)
    for index, guess in enumerate(guesses):
        try:
            check_values(module, guess, extras)
            return guess
        except Foreign:
            if len(guesses) == 1:
                raise
            if index + 1 == len(guesses):
                raise Foreign("it computes none of the primitives") from None
    raise AssertionError("there is always a guess")


def _guesses(module: nn.Module, layers: Layers, extras: list[None]) -> list[Guess]:
    """What it might be. A pool by a function leaves no layer behind."""
    if not layers.convolutions and not any(isinstance(each, _POOLS) for each in module.modules()):
        if len(layers.norms) > 1:
            raise Foreign("batch norms without a convolution")
        if layers.norms:
            return _pools(layers.norms[0].num_features, True)
        return _guess_empty(module, extras)
    guess = _guess(module, layers)
    if layers.biased:
        if guess.primitive not in PRIMITIVES:
            raise Foreign("a convolution has a bias")
        layers.check_biases()
    return [guess]


def _pools(channels: int, norm: bool) -> list[Guess]:
    return [Guess(f"{kind}_pool_3x3", stride, channels, norm) for kind in ("max", "avg") for stride in (1, 2)]


def _guess(module: nn.Module, layers: Layers) -> Guess:
    convolutions, norms = layers.convolutions, layers.norms
    pools = [each for each in module.modules() if isinstance(each, _POOLS)]
    if pools:
        return _guess_pool(pools, layers)
    first, channels = convolutions[0], convolutions[0].in_channels
    stride, sizes = first.stride[0], [each.kernel_size[0] for each in convolutions]
    if stride not in (1, 2):
        raise Foreign(f"stride {stride}")
    if len(norms) == 1:
        guess = _guess_halves(convolutions) if sizes == [1, 1] else None
        guess = _guess_dense(first) if len(sizes) == 1 else guess
        if guess is not None:
            return guess
    for name, (size, dilation, depth) in SEPARABLE.items():
        if sizes == [size, 1] * depth and len(norms) == depth and _is_separable(convolutions, dilation, stride):
            return Guess(name, stride, channels)
    shown = ", ".join(_shown(each) for each in convolutions)
    raise Foreign(f"no primitive has the convolutions {shown} with {len(norms)} batch norms")


def _guess_halves(convolutions: Sequence[nn.Conv2d]) -> Guess | None:
    """Two 1x1 convolutions of stride 2 on one input: a FactorizedReduce."""
    even, odd = convolutions
    total = even.out_channels + odd.out_channels
    if even.stride[0] != 2 or odd.stride[0] != 2 or even.in_channels != odd.in_channels:
        return None
    if (even.out_channels, even.groups, odd.groups) != (total - total // 2, 1, 1):
        return None
    return Guess("skip_connect" if total == even.in_channels else "factorized_reduce", 2, even.in_channels)


def _guess_dense(convolution: nn.Conv2d) -> Guess | None:
    """One convolution on all channels."""
    size, padding, dilation = (pair[0] for pair in (convolution.kernel_size, convolution.padding, convolution.dilation))
    channels, same = convolution.in_channels, convolution.in_channels == convolution.out_channels
    if convolution.groups != 1 or padding != size // 2 or size not in (1, 3) or (size == 3 and dilation != 1):
        return None
    if same:
        return Guess(f"conv_{size}x{size}", convolution.stride[0], channels)
    return Guess("relu_conv_norm", 1, channels) if size == 1 and convolution.stride[0] == 1 else None


def _is_separable(convolutions: Sequence[nn.Conv2d], dilation: int, stride: int) -> bool:
    channels = convolutions[0].in_channels
    for index, each in enumerate(convolutions):
        depthwise, size = index % 2 == 0, each.kernel_size[0]
        expected = (
            channels,
            channels,
            channels if depthwise else 1,
            stride if index == 0 else 1,
            dilation if depthwise else each.dilation[0],
            dilation * (size // 2) if depthwise else 0,
        )
        settings = (
            each.in_channels, each.out_channels, each.groups, each.stride[0], each.dilation[0], each.padding[0]
        )  # fmt: skip
        if settings != expected:
            return False
    return True


def _guess_pool(pools: list[nn.Module], layers: Layers) -> Guess:
    if len(pools) != 1 or layers.convolutions or len(layers.norms) > 1:
        raise Foreign("a pool together with other layers than one batch norm")
    (pool,) = pools
    size, stride, padding = (_pair(each) for each in (pool.kernel_size, pool.stride, pool.padding))
    if size != (3, 3) or padding != (1, 1) or stride not in ((1, 1), (2, 2)):
        raise Foreign(f"a pool of size {size}, stride {stride}, padding {padding}: the kernels have 3x3, stride 1 or 2")
    if pool.ceil_mode:
        raise Foreign("a pool has ceil_mode=True")
    if isinstance(pool, nn.MaxPool2d) and (_pair(pool.dilation) != (1, 1) or pool.return_indices):
        raise Foreign("a max pool with a dilation or with indices")
    if isinstance(pool, nn.AvgPool2d) and (pool.count_include_pad or pool.divisor_override is not None):
        raise Foreign("an average pool that counts the border (count_include_pad=True) or has a divisor of its own")
    name = "max_pool_3x3" if isinstance(pool, nn.MaxPool2d) else "avg_pool_3x3"
    channels = layers.norms[0].num_features if layers.norms else 0  # 0: any
    return Guess(name, stride[0], channels, bool(layers.norms))


def _guess_empty(module: nn.Module, extras: list[None]) -> list[Guess]:
    """A module without layers: the identity, zeros or a pool, at any number of channels."""
    x, made = images(2, 6, 6, seed=0).requires_grad_(), randomised(module)
    try:
        with torch.enable_grad():
            out = made(x * 1, *extras)
            has_gradient = isinstance(out, Tensor) and out.requires_grad and made.eval()(x * 1, *extras).requires_grad
    except Exception as error:  # whatever a foreign forward raises
        raise Foreign(f"its forward raised {failed(error)}") from None
    if not isinstance(out, Tensor) or out.dim() != 4 or out.shape[:2] != x.shape[:2] or out.shape[2:] not in _HALVED:
        raise Foreign("it has no layers and returns something else than an image of the same channels")
    if out.shape == x.shape and torch.equal(out, x):
        return [Guess("skip_connect", 1, 0)]
    if bool((out == 0).all()):
        return [Guess("none", 6 // out.shape[2], 0, has_gradient=has_gradient)]
    return _pools(0, False)


_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
_HALVED = ((6, 6), (3, 3))


# ---- words -----------------------------------------------------------------------------------------------------------


def _key(module: nn.Module) -> tuple:
    """What decides on the function of a module, up to the values of its tensors."""
    return tuple(
        (name, type(each), type(each).forward, tuple(sorted(simple_attributes(each).items(), key=lambda item: item[0])))
        for name, each in module.named_modules()
    ) + tuple((name, tuple(each.shape), each.dtype) for name, each in module.named_parameters())


def simple_attributes(module: nn.Module) -> dict[str, object]:
    """The attributes of a module that are numbers, words or tuples of them; not its training flag."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if name != "training" and not name.startswith("_") and is_simple(value)
    }


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _shown(convolution: nn.Conv2d) -> str:
    depthwise = convolution.groups == convolution.in_channels == convolution.out_channels != 1
    groups = "depthwise" if depthwise else f"groups {convolution.groups}"
    return (
        f"{convolution.kernel_size[0]}x{convolution.kernel_size[1]} ({convolution.in_channels} -> "
        f"{convolution.out_channels}, {groups}, stride {convolution.stride[0]}, padding {convolution.padding[0]}, "
        f"dilation {convolution.dilation[0]})"
    )
