"""What a recognised module computes, and what must not have changed since: it is compared at every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from .layers import Guess, Layers, kind_of
from .reads import Reads

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_SETTINGS = {  # what decides on what a layer of PyTorch computes; eps and momentum of norms are read at every call
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.ReLU: ("inplace",),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.ConstantPad2d: ("padding", "value"),
    nn.ZeroPad2d: ("padding",),
}


def original_class(module: nn.Module) -> type:
    """The class of a module before it was accelerated."""
    return getattr(type(module), "_rnas_original", type(module))


def is_hooked(module: nn.Module) -> bool:
    """Whether something looks at what the module takes or returns."""
    return any([module.__dict__[name] for name in _HOOKS])


class State(NamedTuple):
    """Of a module at one moment: what its result depends on beside the images."""

    weights: tuple[tuple[int, int, bool], ...]
    """Identity, version and requires_grad of each convolution's weight."""
    modes: tuple[bool, ...]
    """Training flags of the norms."""


class Plan:
    """What a recognised module computes, and what must not have changed since it was recognised."""

    def __init__(self, module: nn.Module, guess: Guess, layers: Layers, reads: Reads) -> None:
        self.module, self.guess, self.layers, self.reads = module, guess, layers, reads
        self._modules = list(module.modules())
        self._types = list(map(type, self._modules[1:]))  # the first is to get another
        kinds = dict.fromkeys(map(original_class, self._modules))
        self._forwards = [(kind, kind.forward) for kind in kinds]
        self._children = [(each, tuple(each._modules.values())) for each in self._modules if each._modules]
        self._settings = reads.values + [
            (each, name, each.__dict__[name])
            for each in self._modules
            for name in _SETTINGS.get(kind_of(each), ())
            if name in each.__dict__
        ]

    def holds(self) -> bool:
        """Whether the module is as it was: the same layers without hooks, the same settings."""
        if any([each.__dict__[name] for each in self._modules for name in _HOOKS]):  # `is_hooked`, without its calls
            return False
        if any([holder.__dict__.get(name) != value for holder, name, value in self._settings]):
            return False
        if any([tuple(module._modules.values()) != children for module, children in self._children]):
            return False
        if any(["forward" in each.__dict__ for each in self._modules]):
            return False
        if any([kind.forward is not forward for kind, forward in self._forwards]):
            return False
        if any([each._parameters.get("bias") is not None for each in self.layers.convolutions]):
            return False
        return list(map(type, self._modules[1:])) == self._types

    def takes(self, arguments: tuple, options: dict) -> bool:
        """Whether a call with these arguments is one on the images alone."""
        if len(arguments) == 1 and not options:
            return not self.reads.required
        if not arguments or self.reads.ignores_extras:
            return bool(arguments)
        names = self.reads.may_be_none
        given = {*names[: len(arguments) - 1], *options}
        nothing = not any([each is not None for each in (*arguments[1:], *options.values())])
        return nothing and len(arguments) <= 1 + len(names) and given <= {*names}

    def original(self, x: Tensor, *arguments, **options) -> Tensor:
        """The module's own forward."""
        return nn.Module.__call__(self.module, x, *arguments, **options)

    def weights(self) -> list[Tensor]:
        """The convolution weights in the order of the kernels."""
        try:
            return [each._parameters["weight"] for each in self.layers.convolutions]
        except KeyError:  # a plain attribute in its place
            return [each.weight for each in self.layers.convolutions]

    def state(self) -> State:
        """Of now."""
        weights = [
            (id(each), 0 if each.is_inference() else each._version, each.requires_grad) for each in self.weights()
        ]
        return State(tuple(weights), tuple([norm.training for norm in self.layers.norms]))

    def check(self, state: State) -> None:
        """Raises RuntimeError where the weights are others than in `state`."""
        if state.weights != self.state().weights:
            raise RuntimeError(
                "rnas.accelerate: the weights of a candidate operation were replaced, written to or frozen before its "
                "result was used; call .contiguous() on the result before, or rnas.restore(model)"
            )

    @contextmanager
    def in_modes(self, state: State) -> Iterator[None]:
        """The training flags of the norms as in `state`."""
        before = [norm.training for norm in self.layers.norms]
        try:
            for norm, training in zip(self.layers.norms, state.modes):
                norm.training = training
            yield
        finally:
            for norm, training in zip(self.layers.norms, before):
                norm.training = training
