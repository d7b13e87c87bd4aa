"""The layers that a module holds, as far as the primitives have such layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from .reads import Foreign


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
    has_gradient: bool = True
    """Whether a gradient gets to the input, of zeros as it may be."""


@dataclass(frozen=True)
class Layers:
    """The layers of a candidate in the order in which the kernels take their tensors."""

    convolutions: tuple[nn.Conv2d, ...]
    norms: tuple[nn.BatchNorm2d, ...]

    @property
    def biased(self) -> bool:
        """Whether a convolution has a bias."""
        return any([each.bias is not None for each in self.convolutions])

    def parameters(self) -> Iterator[Tensor]:
        """All that there are."""
        for layer in (*self.convolutions, *self.norms):
            yield from (each for each in layer._parameters.values() if each is not None)

    def on_batch(self) -> list[bool]:
        """Whether each norm takes the statistics of the batch."""
        return [norm.training or norm.running_mean is None for norm in self.norms]

    def before_norms(self) -> list[list[nn.Conv2d]]:
        """The convolutions whose outputs, side by side, each norm takes."""
        count = len(self.convolutions) // max(1, len(self.norms))
        parts = [self.convolutions[index * count : (index + 1) * count] for index in range(len(self.norms))]
        return [[each for each in part if count == 1 or each.kernel_size == (1, 1)] for part in parts]

    def check_biases(self) -> None:
        """Raises Foreign where a bias is followed by something else than a norm, or is one of some channels only."""
        groups = self.before_norms()
        biased = [[each.bias is not None for each in group] for group in groups]
        if sum(map(sum, biased)) < sum(each.bias is not None for each in self.convolutions):
            raise Foreign("a convolution without a norm behind it has a bias")
        if any(any(each) and not all(each) for each in biased):
            raise Foreign("a convolution has a bias, and one beside it has none")


_PLAIN = (nn.ReLU, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ConstantPad2d, nn.ZeroPad2d)
_KNOWN = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, *_PLAIN)


def kind_of(module: nn.Module) -> type:
    """The layer of PyTorch that the module is, where a subclass computes nothing else too; else its class."""
    for kind in _KNOWN:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            if kind is not nn.Conv2d or type(module)._conv_forward is nn.Conv2d._conv_forward:
                return kind
    return getattr(type(module), "_rnas_original", type(module))


def layers_of(module: nn.Module) -> Layers:
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
    if convolution.padding_mode != "zeros":
        raise Foreign(f"a convolution pads by {convolution.padding_mode!r}")
    if isinstance(convolution.padding, str):
        raise Foreign(f"a convolution has padding={convolution.padding!r}")
    square = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
    if any(len(set(pair)) != 1 for pair in square):
        raise Foreign("a convolution is not square")


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"
