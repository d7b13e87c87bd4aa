"""Mixed operations in which one candidate looks like a primitive and is none; the others are what they seem.

`FOREIGN` maps a name to a `Case`: call it with a number of channels for a module (N, C, H, W) -> (N, C, H', W') with a
parameter `alpha`, one number per candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


@dataclass(frozen=True)
class Case:
    """A module by its constructor, and why nothing, or not all of it, is a mixture of known primitives."""

    build: Callable[[int], nn.Module]
    why: str
    foreign: tuple[int, ...] | None = None
    """The places of the candidates that are no primitives; None where the mixing itself is another one."""

    def __call__(self, channels: int = 16) -> nn.Module:
        """A fresh module on that many channels."""
        return self.build(channels)


class Mixture(nn.Module):
    """A true mixed operation: softmax weights, one per candidate, and the sum."""

    def __init__(self, ops: Sequence[nn.Module]):
        super().__init__()
        self.ops = nn.ModuleList(ops)
        self.alpha = nn.Parameter(torch.linspace(-0.5, 0.5, len(self.ops)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        return sum(w * op(x) for w, op in zip(self.alpha.softmax(0), self.ops))


def separable(
    C: int, size=3, stride: int = 1, *, depth: int = 2, act=nn.ReLU, norm=nn.BatchNorm2d, conv=nn.Conv2d, **more
) -> nn.Sequential:
    """`depth` times act, depthwise, pointwise, norm; `more` goes to the depthwise convolution."""
    more = {"padding": more.get("dilation", 1) * (size // 2), "groups": C, "bias": False, **more}
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [act(), conv(C, C, size, stride if i == 0 else 1, **more), nn.Conv2d(C, C, 1, bias=False), norm(C)]
    return nn.Sequential(*layers)


def beside(op: nn.Module, C: int) -> Mixture:
    """`op` as the second of four candidates."""
    return Mixture([nn.Identity(), op, nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(C)), separable(C)])


class Standardized(nn.Conv2d):
    """A convolution whose filters have mean 0, with the parameters of any other."""

    def forward(self, x: Tensor) -> Tensor:
        """As Conv2d."""
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Halved(nn.BatchNorm2d):
    """BN of which half comes out."""

    def forward(self, x: Tensor) -> Tensor:
        """As BatchNorm2d, times 0.5."""
        return super().forward(x) * 0.5


class Shortcut(nn.Sequential):
    """A chain of the right modules whose own forward adds the input."""

    def forward(self, x: Tensor) -> Tensor:
        """x plus what the chain makes of it."""
        return x + super().forward(x)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """function(x)."""
        return self.function(x)


class Halve(nn.Module):
    """A skip connection of stride 2 with one thing changed: the shift, the order of the halves, or the ReLU."""

    def __init__(self, C: int, shift: int = 1, swapped: bool = False, relu: bool = True):
        super().__init__()
        self.relu, self.bn = nn.ReLU(), nn.BatchNorm2d(C)
        self.conv_1 = nn.Conv2d(C, C // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C, C // 2, 1, stride=2, bias=False)
        self.shift, self.swapped, self.first = shift, swapped, relu

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H / 2, W / 2)."""
        x = self.relu(x) if self.first else x
        halves = [self.conv_1(x), self.conv_2(x[:, :, self.shift :, self.shift :])]
        return self.bn(torch.cat(halves[::-1] if self.swapped else halves, 1))


def moved(C: int, order: Sequence[int], **more) -> nn.Sequential:
    """A dilated separable convolution with its four modules in another order."""
    modules = list(separable(C, depth=1, dilation=2, **more))
    return nn.Sequential(*(modules[i] for i in order))


def pool(C: int, op: nn.Module) -> nn.Sequential:
    """A pool and its norm."""
    return nn.Sequential(op, nn.BatchNorm2d(C))


def spectral(C: int) -> nn.Sequential:
    """A separable convolution whose first pointwise weight is computed."""
    chain = separable(C)
    spectral_norm(chain[2])
    return chain


CHANGED: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "bias": (lambda C: separable(C, bias=True), "depthwise convolutions with a bias"),
    "leaky relu": (lambda C: separable(C, act=nn.LeakyReLU), "LeakyReLU for ReLU"),
    "gelu": (lambda C: separable(C, act=nn.GELU), "GELU for ReLU"),
    "relu6": (lambda C: separable(C, act=nn.ReLU6), "ReLU6 for ReLU, the same below 6"),
    "no activation": (lambda C: separable(C, act=nn.Identity), "no ReLU"),
    "no norm": (lambda C: separable(C, norm=lambda C: nn.Identity()), "no BN"),
    "group norm": (lambda C: separable(C, norm=lambda C: nn.GroupNorm(2, C)), "GroupNorm for BN"),
    "instance norm": (lambda C: separable(C, norm=nn.InstanceNorm2d), "InstanceNorm for BN"),
    "dilation 3": (lambda C: separable(C, depth=1, dilation=3), "dilation 3"),
    "reflect": (lambda C: separable(C, padding_mode="reflect"), "padding by reflection"),
    "circular": (lambda C: separable(C, padding_mode="circular"), "padding by wrapping round"),
    "kernel 7": (lambda C: separable(C, 7), "a 7x7 kernel"),
    "groups": (lambda C: separable(C, groups=2), "two groups, not one per channel"),
    "once": (lambda C: separable(C, depth=1), "a separable convolution of dilation 1 only once"),
    "thrice": (lambda C: separable(C, depth=3), "three separable convolutions"),
    "dilated twice": (lambda C: separable(C, dilation=2), "two separable convolutions of dilation 2"),
    "relu last": (lambda C: moved(C, (1, 2, 3, 0)), "convolutions, BN, ReLU"),
    "norm first": (lambda C: moved(C, (3, 0, 1, 2)), "BN, ReLU, convolutions"),
    "pointwise first": (lambda C: moved(C, (0, 2, 1, 3)), "the pointwise convolution before the depthwise one"),
    "shortcut": (lambda C: Shortcut(*separable(C)), "a subclass of Sequential whose forward adds the input"),
    "standardized": (lambda C: separable(C, conv=Standardized), "a subclass of Conv2d with another forward"),
    "halved norm": (lambda C: separable(C, norm=Halved), "a subclass of BatchNorm2d with another forward"),
    "spectral": (spectral, "a weight that is computed from other parameters"),
    "dropout": (lambda C: nn.Sequential(*separable(C), nn.Dropout2d(0.5)), "dropout behind the chain"),
    "doubled": (lambda C: nn.Sequential(*separable(C), Apply(lambda x: 2 * x)), "a factor behind the chain"),
    "count pad": (lambda C: pool(C, nn.AvgPool2d(3, 1, 1)), "an average pool that counts the padding"),
    "divisor": (lambda C: pool(C, nn.AvgPool2d(3, 1, 1, False, False, 8)), "an average pool that divides by 8"),
    "pool 5": (lambda C: pool(C, nn.MaxPool2d(5, 1, 2)), "a 5x5 max pool"),
    "pool relu": (lambda C: nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.ReLU()), "a pool followed by ReLU, not BN"),
    "norm pool": (lambda C: nn.Sequential(nn.BatchNorm2d(C), nn.AvgPool2d(3, 1, 1)), "BN before the pool"),
    "scaled skip": (lambda C: Apply(lambda x: x * 0.5), "half the input"),
    "noise": (lambda C: Apply(torch.randn_like), "noise, other numbers in each call"),
    "detached skip": (lambda C: Apply(torch.Tensor.detach), "the input without its gradient"),
    "leaking none": (lambda C: Apply(lambda x: x * 1e-3), "nearly zeros"),
    "self-gated": (lambda C: Apply(lambda x: x * x.sigmoid()), "a skip connection with a gate"),
}
PAIRS: dict[str, tuple[Callable[[int], list[nn.Module]], str, tuple[int, ...]]] = {
    "halve, unshifted": (lambda C: [Halve(C, shift=0), separable(C, 3, 2)], "both halves see the even pixels", (0,)),
    "halve, swapped": (lambda C: [Halve(C, swapped=True), separable(C, 3, 2)], "the shifted half comes first", (0,)),
    "halve, no relu": (lambda C: [Halve(C, relu=False), separable(C, 3, 2)], "a halving without ReLU", (0,)),
    "ceil": (
        lambda C: [pool(C, nn.MaxPool2d(3, 2, 1, ceil_mode=True)), pool(C, nn.AvgPool2d(3, 2, 1, True, False))],
        "pools whose even sizes are rounded up",
        (0, 1),
    ),
    "dilated pool": (
        lambda C: [pool(C, nn.MaxPool2d(3, 1, 1, dilation=2)), separable(C, depth=1, padding=0)],
        "a dilated pool, and a convolution without padding: the image shrinks",
        (0, 1),
    ),
    "strides": (
        lambda C: [separable(C), nn.Sequential(separable(C, 3, 2), nn.Upsample(scale_factor=2))],
        "the second candidate has stride 2 and is enlarged again",
        (1,),
    ),
    "interpolated": (
        lambda C: [nn.Identity(), Apply(lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2))],
        "a coarse skip connection",
        (1,),
    ),
}
FOREIGN: dict[str, Case] = {
    **{
        name: Case(lambda C, make=make: beside(make(C), C), f"one candidate: {why}", (1,))
        for name, (make, why) in CHANGED.items()
    },
    **{name: Case(lambda C, make=make: Mixture(make(C)), why, foreign) for name, (make, why, foreign) in PAIRS.items()},
}
