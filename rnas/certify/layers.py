"""From PyTorch modules to the layers that bounds go through. A rule is found by the exact type of a module.

Batch norms are folded into the linear map before them. A subclass is not its base here: it may compute anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import network, operations
from .fixed import AvgPool, Flatten, GlobalAverage, Zero
from .linear import Conv, Linear, Scale
from .relaxation import MaxPool, ReLU
from .tape import Step

RULES: dict[type[nn.Module], Callable[[nn.Module, str], list[Step]]] = {}
"""Type of a module -> function (module, relu_slope) -> its layers in their order."""


def steps_of(module: nn.Module, relu_slope: str = "adaptive") -> list[Step]:
    """The layers of a module. Raises ValueError for one whose type has no rule."""
    rule = RULES.get(type(module))
    if rule is None:
        known = ", ".join(each.__name__ for each in RULES)
        raise ValueError(f"no bounds are known for a {type(module).__name__}; they are for {known}")
    return rule(module, relu_slope)


def folded(steps: list[Step]) -> list[Step]:
    """The same function with every scale per channel that follows a convolution inside it."""
    result: list[Step] = []
    for step in steps:
        if isinstance(step, Scale) and step.scale.dim() == 1 and result and isinstance(result[-1], Conv):
            shift = torch.zeros_like(step.scale) if step.constant is None else step.constant
            result[-1] = result[-1].then(step.scale, shift)
        else:
            result.append(step)
    return result


def norm_scale(norm: nn.BatchNorm2d | nn.BatchNorm1d) -> Scale:
    """A batch norm with its running statistics, which it must have, as a scale and a shift per channel."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return Scale(scale, shift if norm.bias is None else shift + norm.bias)


def check_evaluation(model: nn.Module) -> None:
    """Raise ValueError unless every module is in eval mode and every batch norm has running statistics."""
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"bounds hold for one function, but {name or 'the network'} is in training mode: type network.eval(), "
                "or use rnas.attacks.frozen with statistics='running'"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(f"bounds need running statistics, and {name} uses those of the batch")


def _rule(*types: type[nn.Module]) -> Callable:
    def register(function: Callable[[nn.Module, str], list[Step]]) -> Callable[[nn.Module, str], list[Step]]:
        RULES.update(dict.fromkeys(types, function))
        return function

    return register


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


@_rule(nn.Sequential, operations.ConvBN, operations.ReLUConvBN, operations.SeparableConv)
def _sequential(module: nn.Module, slope: str) -> list[Step]:
    return folded([step for each in module.children() for step in steps_of(each, slope)])


@_rule(nn.Identity, nn.Dropout, nn.Dropout2d, network.DropPath)
def _identity(module: nn.Module, slope: str) -> list[Step]:
    return []  # in eval mode


@_rule(nn.ReLU)
def _relu(module: nn.Module, slope: str) -> list[Step]:
    return [ReLU(slope)]


@_rule(nn.Conv2d)
def _conv(module: nn.Conv2d, slope: str) -> list[Step]:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError(f"convolutions need a padding of zeros given in pixels; got {module}")
    options = (module.stride, module.padding, module.dilation, module.groups)
    return [Conv(module.weight, module.bias, *options)]


@_rule(nn.BatchNorm1d, nn.BatchNorm2d)
def _norm(module: nn.BatchNorm2d, slope: str) -> list[Step]:
    return [norm_scale(module)]


@_rule(operations.Normalize)
def _normalize(module: operations.Normalize, slope: str) -> list[Step]:
    return [Scale(1 / module.std.flatten(), -(module.mean / module.std).flatten())]


@_rule(nn.Linear)
def _linear(module: nn.Linear, slope: str) -> list[Step]:
    return [Linear(module.weight, module.bias)]


@_rule(nn.MaxPool2d)
def _max_pool(module: nn.MaxPool2d, slope: str) -> list[Step]:
    if _pair(module.dilation) != (1, 1) or module.return_indices:
        raise ValueError(f"max pools need dilation 1 and return_indices=False; got {module}")
    sizes = (module.kernel_size, module.stride, module.padding)
    return [MaxPool(*map(_pair, sizes), module.ceil_mode)]


@_rule(nn.AvgPool2d)
def _avg_pool(module: nn.AvgPool2d, slope: str) -> list[Step]:
    sizes = (module.kernel_size, module.stride, module.padding)
    return [AvgPool(*map(_pair, sizes), module.ceil_mode, module.count_include_pad, module.divisor_override)]


@_rule(nn.AdaptiveAvgPool2d)
def _global_average(module: nn.AdaptiveAvgPool2d, slope: str) -> list[Step]:
    if _pair(module.output_size) != (1, 1):
        raise ValueError(f"adaptive average pools need an output of one pixel; got {module}")
    return [GlobalAverage(keep=True)]


@_rule(nn.Flatten)
def _flatten(module: nn.Flatten, slope: str) -> list[Step]:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise ValueError(f"only all dimensions of an image can be flattened; got {module}")
    return [Flatten()]


@_rule(operations.Zero)
def _zero(module: operations.Zero, slope: str) -> list[Step]:
    return [Zero(module.stride)]


@_rule(operations.FactorizedReduce)
def _factorized_reduce(module: operations.FactorizedReduce, slope: str) -> list[Step]:
    """One convolution with a 2x2 kernel: top left that of the even pixels, bottom right that of the odd."""
    even = module.conv_1.weight
    weight = nn.functional.pad(even, (0, 1, 0, 1))
    if module.conv_2 is not None:
        weight = torch.cat([weight, nn.functional.pad(module.conv_2.weight, (1, 0, 1, 0))])
    return folded([ReLU(slope), Conv(weight, stride=(2, 2), even=True), norm_scale(module.bn)])


def split_last(steps: list[Step], like: Tensor, factor: Tensor) -> tuple[list[Step], Step]:
    """The layers but for the last linear map, and that map times `factor`; the identity where there is none.

    Pools and the like take no factor; a scale behind them does.
    """
    if steps and isinstance(steps[-1], Conv | Linear | Scale | Zero):
        return steps[:-1], steps[-1].scaled(factor)
    return steps, Scale(like.new_ones(())).scaled(factor)
