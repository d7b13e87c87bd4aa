"""What a candidate operation computes: a primitive of `rnas.kernels.mixed_op`, or why it is none.

Names decide nothing. The layers that a module holds give a first guess; then a copy of the module with random weights
runs against the definition of the guessed primitive: values, gradients and running averages, in float64, in training
and eval mode, on several sizes. What the code of its forward reads besides its layers is found in `reads.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..kernels.reference import mixed_op as definition
from ..kernels.reference import relu_conv_norm as in_front
from .reads import Foreign, Reads, is_simple, reads

__all__ = ["Guess", "Layers", "recognise"]


@dataclass(frozen=True)
class Guess:
    """A primitive of the mixed operation, or one of the two layers that stand in front of a cell."""

    primitive: str
    """A name of `kernels.mixed_op.PRIMITIVES`, or relu_conv_norm or factorized_reduce where channels change."""
    stride: int
    channels: int
    """Of the input."""
    pool_norm: bool = False
    """Whether a pool has a BN behind it."""


@dataclass(frozen=True)
class Layers:
    """The layers of a candidate in the order in which the kernels take their tensors."""

    convolutions: tuple[nn.Conv2d, ...]
    norms: tuple[nn.BatchNorm2d, ...]


def recognise(module: nn.Module, memory: dict) -> tuple[Guess, Layers, Reads] | str:
    """What the module computes, its layers and what its code reads; or, as text, why the kernels cannot take it.

    memory: what was found out of other modules of the same kind and settings; filled here.
    """
    try:
        found = reads(module)
        layers = _layers(module)
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
        return f"it cannot be examined: {_failed(error)}"


# ---- the guess -------------------------------------------------------------------------------------------------------

_PLAIN = (nn.ReLU, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ConstantPad2d, nn.ZeroPad2d)
_KNOWN = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, *_PLAIN)


def kind_of(module: nn.Module) -> type:
    """The layer of PyTorch that the module is, where a subclass computes nothing else too; else its class."""
    for kind in _KNOWN:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            if kind is not nn.Conv2d or type(module)._conv_forward is nn.Conv2d._conv_forward:
                return kind
    return getattr(type(module), "_rnas_original", type(module))


def _layers(module: nn.Module) -> Layers:
    """Raises Foreign where a layer is of a kind that no primitive holds, or set up in a way that none has."""
    convolutions, norms = [], []
    for each in module.modules():
        kind = kind_of(each)
        if "forward" in each.__dict__:
            raise Foreign(f"a {kind.__name__} has a forward of its own on the instance")
        if kind is nn.Conv2d:
            _check_convolution(each)
            convolutions.append(each)
        elif kind is nn.BatchNorm2d:
            norms.append(each)
        elif kind in (nn.MaxPool2d, nn.AvgPool2d) or kind in _PLAIN:
            pass
        elif kind.__module__.startswith("torch."):
            raise Foreign(f"{_article(kind.__name__)} is none of the layers of the primitives")
        elif any(value is not None for value in (*each._parameters.values(), *each._buffers.values())):
            raise Foreign(f"{kind.__name__} holds parameters or buffers of its own")
    return Layers(tuple(convolutions), tuple(norms))


def _check_convolution(convolution: nn.Conv2d) -> None:
    if convolution.bias is not None:
        raise Foreign("a convolution has a bias")
    if convolution.padding_mode != "zeros":
        raise Foreign(f"a convolution pads by {convolution.padding_mode!r}")
    if isinstance(convolution.padding, str):
        raise Foreign(f"a convolution has padding={convolution.padding!r}")
    square = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
    if any(len(set(pair)) != 1 for pair in square):
        raise Foreign("a convolution is not square")


def _verified(module: nn.Module, layers: Layers, extras: list[None]) -> Guess:
    """extras: the arguments that its forward takes behind the images."""
    guesses = _guesses(module, layers, extras)
    for index, guess in enumerate(guesses):
        try:
            _check_values(module, guess, extras)
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
    return [_guess(module, layers)]


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
    for name, (size, dilation, depth) in definition.SEPARABLE.items():
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
    x = _images(2, 6, 6, seed=0)
    try:
        out = _randomised(module)(x, *extras)
    except Exception as error:  # whatever a foreign forward raises
        raise Foreign(f"its forward raised {_failed(error)}") from None
    if not isinstance(out, Tensor) or out.dim() != 4 or out.shape[:2] != x.shape[:2] or out.shape[2:] not in _HALVED:
        raise Foreign("it has no layers and returns something else than an image of the same channels")
    if out.shape == x.shape and torch.equal(out, x):
        return [Guess("skip_connect", 1, 0)]
    if bool((out == 0).all()):
        return [Guess("none", 6 // out.shape[2], 0)]
    return _pools(0, False)


_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
_HALVED = ((6, 6), (3, 3))


# ---- against the definition ------------------------------------------------------------------------------------------

_SIZES = ((2, 6, 6), (3, 8, 4), (1, 7, 5))  # N, H, W; the last odd, which some cannot take


def _check_values(module: nn.Module, guess: Guess, extras: list[None]) -> None:
    """Raises Foreign where a copy of the module with random weights does something else than the definition."""
    original = _randomised(module)
    defined = copy.deepcopy(original)
    own = _layers(defined)  # in the copy
    run = partial(_definition(guess), layers=own)
    for training in (True, False):
        for each in (original, defined):
            each.train(training)
        for index, (n, h, w) in enumerate(_SIZES):
            x = _images(n, h, w, seed=index, channels=guess.channels or 4)
            odd = bool(h % 2 or w % 2)
            try:
                found = _everything(lambda images: original(images, *extras), original, x)
            except Foreign:
                raise
            except Exception as error:  # whatever a foreign forward raises
                if odd and guess.stride == 2:
                    continue  # some take even sizes only, and raise before and after
                raise Foreign(f"its forward raised {_failed(error)}") from None
            for name, a, b in zip(("values", "gradients", "averages"), found, _everything(run, defined, x)):
                _compare(name, a, b, guess)


def _definition(guess: Guess) -> Callable[..., Tensor]:
    if guess.primitive == "relu_conv_norm":
        return lambda x, layers: in_front.relu_conv_norm(x, layers.convolutions[0].weight, layers.norms[0])
    if guess.primitive == "factorized_reduce":
        return lambda x, layers: in_front.factorized_reduce(
            x, layers.convolutions[0].weight, layers.convolutions[1].weight, layers.norms[0]
        )

    def primitive(x: Tensor, layers: Layers) -> Tensor:
        return definition.mixed_op(
            x,
            torch.ones(1, dtype=x.dtype),
            [each.weight for each in layers.convolutions],
            layers.norms,
            primitives=(guess.primitive,),
            stride=guess.stride,
            pool_norm=guess.pool_norm,
        )

    return primitive


def _randomised(module: nn.Module) -> nn.Module:
    """A copy in float64 whose parameters and averages say what they are used for. No hooks, no gradients."""
    generator = torch.Generator().manual_seed(0)
    made = copy.deepcopy(module).to("cpu", torch.float64)
    for each in made.modules():
        for name, value in each.__dict__.items():
            if name.endswith("_hooks") and isinstance(value, dict):
                each.__dict__[name] = type(value)()
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
            tensor.requires_grad_(True)
        for tensor in made.buffers():
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return made


def _images(n: int, h: int, w: int, seed: int, channels: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, h, w, generator=generator, dtype=torch.float64)


def _everything(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> tuple[list, list, list]:
    """The output; the gradients of a random sum of it to the image and the parameters; the buffers."""
    leaf = x.clone().requires_grad_()
    images = leaf * 1
    version, state = images._version, torch.get_rng_state()
    out = run(images)
    if not isinstance(out, Tensor):
        raise Foreign(f"its forward returns a {type(out).__name__}")
    if images._version != version:
        raise Foreign("it changes its input in place")
    if not torch.equal(state, torch.get_rng_state()):
        raise Foreign("it draws random numbers")
    parameters = list(module.parameters())
    gradients: list[Tensor | None] = [None] * (1 + len(parameters))
    if out.requires_grad:
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
        gradients = list(torch.autograd.grad(out, [leaf, *parameters], noise, allow_unused=True))
    return [out.detach()], gradients, [buffer.clone() for buffer in module.buffers()]


def _compare(name: str, found: list[Tensor | None], expected: list[Tensor | None], guess: Guess) -> None:
    if guess.primitive == "none" and name == "gradients":
        return  # zeros, or none at all
    for a, b in zip(found, expected):
        if a is None or b is None:
            same = a is b
        else:
            same = a.shape == b.shape and a.dtype == b.dtype
            same = same and torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-9)
        if not same:
            raise Foreign(f"its {name} are not those of {guess.primitive} at stride {guess.stride}")


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


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"


def _failed(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
