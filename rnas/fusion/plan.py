"""What a recognised module computes, and what must not have changed since: it is compared at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import NamedTuple

import torch
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


_ITS_OWN = {  # what such a layer takes from its class or its parameters and buffers, unless it has one of its own
    nn.Conv2d: ("_conv_forward", "weight", "bias"),
    nn.BatchNorm2d: ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
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
    norms: tuple[tuple, ...]
    """Their other settings, and the identities of their averages."""


_NOTHING = State((), (), ())


class _Watched(NamedTuple):
    """A module in a recognised one, and what it held: compared at every call, so in as few steps as can be."""

    module: nn.Module
    kind: type | None
    """None: of the recognised module, which is to get another class."""
    children: list[nn.Module | None]
    settings: Callable[[dict], object] | None
    """What reads its settings from its __dict__."""
    values: object
    """What that gave."""
    absent: tuple[str, ...]
    """Attributes of its class, parameters and buffers that count as long as it has none of its own in their place."""

    @staticmethod
    def of(module: nn.Module, reads: Reads, is_first: bool) -> _Watched:
        """As it is now. is_first: whether it is the recognised module."""
        held, known = module.__dict__, kind_of(module)
        names = [name for holder, name, _ in reads.values if holder is module]
        names += [name for name in _SETTINGS.get(known, ()) if name in held]
        settings = itemgetter(*dict.fromkeys(names)) if names else None
        values = None if settings is None else settings(held)
        absent = [name for holder, name in reads.absent if holder is module]
        absent += [name for name in _ITS_OWN.get(known, ()) if name not in held]
        kind, children = None if is_first else type(module), list(module._modules.values())
        return _Watched(module, kind, children, settings, values, tuple(dict.fromkeys(absent)))


class Plan:
    """What a recognised module computes, and what must not have changed since it was recognised."""

    def __init__(self, module: nn.Module, guess: Guess, layers: Layers, reads: Reads) -> None:
        self.module, self.guess, self.layers, self.reads = module, guess, layers, reads
        modules = list(module.modules())
        self._forwards = [(kind, kind.forward) for kind in dict.fromkeys(map(original_class, modules))]
        self._watched = [_Watched.of(each, reads, is_first=each is module) for each in modules]
        self._of_classes = [each for each in reads.values if isinstance(each[0], type)]
        self.biased = layers.biased
        self._biases = [each.bias is not None for each in layers.convolutions]
        self._before_norms = layers.before_norms() if self.biased else []
        self.has_layers = bool(layers.convolutions or layers.norms)

    def holds(self) -> bool:
        """Whether the module is as it was: the same layers without hooks, the same settings."""
        try:
            for module, kind, children, settings, values, absent in self._watched:
                held = module.__dict__
                if (
                    held["_forward_hooks"]  # `is_hooked`, without its calls
                    or held["_forward_pre_hooks"]
                    or held["_backward_hooks"]
                    or held["_backward_pre_hooks"]
                    or "forward" in held
                    or (kind is not None and type(module) is not kind)
                    or (settings is not None and settings(held) != values)
                    or (absent and not held.keys().isdisjoint(absent))
                ):
                    return False
                modules = held["_modules"]
                if (modules or children) and list(modules.values()) != children:
                    return False
            for kind, name, value in self._of_classes:
                if kind.__dict__.get(name) != value:
                    return False
        except (KeyError, RuntimeError):  # a setting is gone, or is a tensor that cannot be compared
            return False
        for kind, forward in self._forwards:
            if kind.forward is not forward:
                return False
        for each, biased in zip(self.layers.convolutions, self._biases):
            if (each._parameters.get("bias") is not None) != biased:
                return False
        return True

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

    def biases(self) -> list[Tensor | None]:
        """Of the channels in front of each norm."""
        if not self.biased:
            return [None] * len(self.layers.norms)
        return [each[0] if len(each) == 1 or each[0] is None else torch.cat(each) for each in self._all_biases()]

    def _all_biases(self) -> list[list[Tensor | None]]:
        """Of each convolution in front of each norm; none at all where all are None."""
        return [[each._parameters.get("bias") for each in group] for group in self._before_norms]

    def state(self) -> State:
        """Of now."""
        return State(self._weights_state(), self.modes(), self._norms_state()) if self.has_layers else _NOTHING

    def modes(self) -> tuple[bool, ...]:
        """The training flags of the norms."""
        return tuple([norm.training for norm in self.layers.norms])

    def _norms_state(self) -> tuple[tuple, ...]:
        found = []
        for norm in self.layers.norms:
            held, buffers = norm.__dict__, norm._buffers
            averages = id(buffers.get("running_mean")), id(buffers.get("running_var"))
            found.append((held.get("eps"), held.get("momentum"), held.get("track_running_stats"), *averages))
        return tuple(found)

    def _held(self) -> list[Tensor]:
        return [*self.weights(), *(each for group in self._all_biases() for each in group if each is not None)]

    def _weights_state(self) -> tuple[tuple[int, int, bool], ...]:
        return tuple(
            [(id(each), 0 if each.is_inference() else each._version, each.requires_grad) for each in self._held()]
        )

    def check(self, state: State) -> None:
        """Raises RuntimeError where the weights, or what belongs to norms, are others than in `state`."""
        if self.layers.convolutions and state.weights != self._weights_state():
            raise RuntimeError(
                "rnas.accelerate: the weights of a candidate operation were replaced, written to or frozen before its "
                "result was used; call .contiguous() on the result before, or rnas.restore(model)"
            )
        if self.layers.norms and state.norms != self._norms_state():
            raise RuntimeError(
                "rnas.accelerate: settings or averages of a candidate operation's batch norm were replaced before its "
                "result was used; call .contiguous() on the result before, or rnas.restore(model)"
            )

    @contextmanager
    def in_modes(self, state: State) -> Iterator[None]:
        """The training flags of the norms as in `state`."""
        before = self.modes()
        try:
            for norm, training in zip(self.layers.norms, state.modes):
                norm.training = training
            yield
        finally:
            for norm, training in zip(self.layers.norms, before):
                norm.training = training
