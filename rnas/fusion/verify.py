"""Whether a module computes what a primitive is defined as: in numbers, on random weights and images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..kernels.reference import mixed_op as definition
from ..kernels.reference import relu_conv_norm as in_front
from .layers import Guess, Layers, layers_of
from .reads import Foreign

_SIZES = ((2, 6, 6), (3, 8, 4), (1, 7, 5))  # N, H, W; the last odd, which some cannot take


def check_values(module: nn.Module, guess: Guess, extras: list[None]) -> None:
    """Raises Foreign where a copy of the module with random weights does something else than the definition."""
    original = randomised(module)
    defined = copy.deepcopy(original)
    own = layers_of(defined)
    run = partial(_definition(guess), layers=own)
    for training in (True, False):
        for each in (original, defined):
            each.train(training)
        for index, (n, h, w) in enumerate(_SIZES):
            x = images(n, h, w, seed=index, channels=guess.channels or 4)
            odd = bool(h % 2 or w % 2)
            try:
                found = _everything(lambda images: original(images, *extras), original, x)
            except Foreign:
                raise
            except Exception as error:  # whatever a foreign forward raises
                if odd and guess.stride == 2:
                    continue  # some take even sizes only, and raise before and after
                raise Foreign(f"its forward raised {failed(error)}") from None
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
            list(map(_behind_biases, layers.norms, layers.before_norms())),
            primitives=(guess.primitive,),
            stride=guess.stride,
            pool_norm=guess.pool_norm,
        )

    return primitive


def _behind_biases(norm: nn.BatchNorm2d, convolutions: list[nn.Conv2d]) -> Callable[[Tensor], Tensor]:
    biases = [each.bias for each in convolutions if each.bias is not None]
    return (lambda x: norm(x + torch.cat(biases)[:, None, None])) if biases else norm


def randomised(module: nn.Module) -> nn.Module:
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


def images(n: int, h: int, w: int, seed: int, channels: int = 4) -> Tensor:
    """Random images (n, channels, h, w) in float64."""
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


def failed(error: Exception) -> str:
    """An error in words."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
