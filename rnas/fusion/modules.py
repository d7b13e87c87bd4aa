"""Modules that hand their work on to the fused operation, and back to their own forward where it does not take it.

An accelerated module is of a class made from its own: a subclass of the same name with another `__call__` or `forward`.
So everything that looks at the module finds what it found before: its attributes, parameters, hooks, `isinstance`.
Copies and pickles are accelerated too.
"""

from __future__ import annotations

import copyreg
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import fused
from ..kernels.backend import OPS
from . import scope as scopes
from .deferred import value_of, values
from .reads import Reads
from .recognise import Guess, Layers, kind_of

PLAN, COUNTS, POOL = "_rnas_plan", "_rnas_counts", "_rnas_pool"
"""Where an accelerated module keeps what it needs: a `Plan`, the counts of a report, or nothing but the name."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


_SETTINGS = {  # what decides on what a layer of PyTorch computes; eps and momentum of norms are read at every call
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.ReLU: ("inplace",),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.ConstantPad2d: ("padding", "value"),
    nn.ZeroPad2d: ("padding",),
}


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
        if any([each.__dict__[name] for each in self._modules for name in _HOOKS]):
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


class Unregistered:
    """Keeps what a class does with its subclasses from accelerated ones."""

    def __init_subclass__(cls, **options) -> None:
        pass


class Candidate(Unregistered):
    """Mixed into the class of a candidate operation: on a state, it hands back a result that is not computed yet."""

    def __call__(self, *arguments, **options):
        if not torch.compiler.is_compiling():
            scope, plan = scopes.current(), self.__dict__.get(PLAN)
            if scope is not None and plan is not None and plan.module is self:
                if plan.takes(arguments, options) and plan.holds():
                    made = scope.defer(plan, arguments, options)
                    if made is not None:
                        return made
            if scope is not None:  # the module's own code sees values
                arguments, options = values(arguments), values(options)
        return super().__call__(*arguments, **options)


class Pool(Unregistered):
    """Mixed into the class of a pool beside candidates: what it makes of the channels that go around them can wait."""

    def __call__(self, *arguments, **options):
        if torch.compiler.is_compiling():
            return super().__call__(*arguments, **options)
        scope, x = scopes.current(), arguments[0] if arguments else None
        hooked = any([self.__dict__[name] for name in _HOOKS]) or "forward" in self.__dict__
        if scope is not None and type(x) is Tensor and not options and not hooked:
            with torch.no_grad(), scopes.suspended():
                shape = super().__call__(torch.empty(x.shape, device="meta")).shape
            made = scope.pool(self, x, shape)
            if made is not None:
                return made
        return super().__call__(*values(arguments), **values(options))


class InFront(Unregistered):
    """Mixed into the class of a layer in front of a cell: (ReLU, 1x1 convolution, BN) or a FactorizedReduce."""

    def __call__(self, *arguments, **options):
        if not torch.compiler.is_compiling():
            plan = self.__dict__.get(PLAN)
            known = plan is not None and plan.module is self and not nn.modules.module._has_any_global_hook()
            if known and plan.takes(arguments, options) and plan.holds():
                x = value_of(arguments[0])
                if _is_image(x, plan.guess.channels):
                    return in_front(plan, x)
        return super().__call__(*values(arguments), **values(options))


def _is_image(x, channels: int) -> bool:
    """Whether the kernels in front of a cell take x."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != channels or 0 in x.shape or fused.is_watched((x,)):
        return False
    if x.shape[0] * x.shape[2] * x.shape[3] <= 4 or torch.is_autocast_enabled(x.device.type):
        return False
    return OPS["relu_conv_norm"].decide(x.device, x.dtype)[0] not in (None, "reference")


def in_front(plan: Plan, x: Tensor) -> Tensor:
    """What such a layer computes, fused where the kernels take x."""
    (norm,) = plan.layers.norms
    if plan.guess.stride == 1:
        return kernels.relu_conv_norm(x, *plan.weights(), norm)
    return kernels.factorized_reduce(x, *plan.weights(), norm)


class Holder(Unregistered):
    """Mixed into the class of a module whose forward calls candidates, or calls modules that do."""

    def __call__(self, *arguments, **options):
        if _stands_back(self):
            return super().__call__(*arguments, **options)
        if _is_hooked(self):
            arguments, options = values(arguments), values(options)
        if "forward" not in self.__dict__:
            return super().__call__(*arguments, **options)
        if _is_hooked(self):  # hooks run in here, behind a forward that is not the one below
            with scopes.suspended():
                return super().__call__(*arguments, **options)
        with scopes.opened(self.__dict__[COUNTS]) as (scope, is_new):
            return scope.close(super().__call__(*arguments, **options), force=is_new)


def run_holder(forward: Callable, self: nn.Module, arguments: tuple, options: dict):
    """The forward of a holder, with candidates whose results wait until they are used."""
    if _stands_back(self):
        return forward(self, *arguments, **options)
    with scopes.opened(self.__dict__[COUNTS]) as (scope, is_new):
        mark = scope.mark()
        try:
            return scope.close(forward(self, *arguments, **options), force=is_new or _is_hooked(self))
        except (TypeError, AttributeError, AssertionError) as error:
            if not scope.is_unused_since(mark):
                raise
            reason = error
    # Code that looks at the very class of a tensor, say. Nothing has been computed yet: it can begin anew.
    with scopes.suspended():
        results = forward(self, *values(arguments), **values(options))
    _stand_back_for_good(self, reason)
    return results


def _stands_back(module: nn.Module) -> bool:
    """Whether the module's own code is to run as if nothing had been accelerated."""
    if torch.compiler.is_compiling():
        return True
    return COUNTS not in module.__dict__ or nn.modules.module._has_any_global_hook()


def _stand_back_for_good(module: nn.Module, reason: Exception) -> None:
    counts = module.__dict__.pop(COUNTS)
    counts.given_back += 1
    warnings.warn(
        f"rnas.accelerate: the forward of a {type(module).__name__} does not take results that are not computed yet "
        f"({type(reason).__name__}: {reason}); it runs as before from now on",
        stacklevel=4,
    )


def _is_hooked(module: nn.Module) -> bool:
    """Whether something looks at what the module takes or returns."""
    return any([module.__dict__[name] for name in _HOOKS])


# ---- classes ---------------------------------------------------------------------------------------------------------


def original_class(module: nn.Module) -> type:
    """The class of a module before it was accelerated."""
    return getattr(type(module), "_rnas_original", type(module))


@functools.cache
def accelerated_class(original: type, mixins: tuple[type, ...]) -> type:
    """A subclass of `original` with the same name."""

    def reduce(self, protocol):
        function, arguments, *state = original.__reduce_ex__(self, protocol)
        if function is copyreg.__newobj__:
            return _new, (original, mixins, *arguments[1:]), *state
        return function, arguments, *state

    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce,
        "_rnas_original": original,
    }
    if Holder in mixins:
        # Looked up at every call: the class may get another forward.
        body["forward"] = functools.wraps(original.forward)(
            lambda self, *arguments, **options: run_holder(original.forward, self, arguments, options)
        )
    return type(original)(original.__name__, (*mixins, original), body)


def _new(original: type, mixins: tuple[type, ...], *arguments):
    """How copies and pickles begin."""
    made = accelerated_class(original, mixins)
    return made.__new__(made, *arguments)


def accelerate_module(module: nn.Module, mixin: type, key: str, value: object) -> None:
    """Mixes `mixin` into the class of this one module, which keeps `value` under `key`."""
    before = type(module)
    mixins = () if original_class(module) is before else before.__bases__[:-1]
    module.__class__ = accelerated_class(original_class(module), (mixin, *mixins))
    module.__dict__[key] = value


def restore_module(module: nn.Module) -> bool:
    """Gives the module back its class; whether it had another."""
    original = original_class(module)
    for key in (PLAN, COUNTS, POOL):
        module.__dict__.pop(key, None)
    if original is type(module):
        return False
    module.__class__ = original
    return True
