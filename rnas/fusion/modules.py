"""Modules that hand their work on to the fused operation, and back to their own forward where it does not take it.

An accelerated module is of a class made from its own: a subclass of the same name with another `__call__` or `forward`.
So everything that looks at the module finds what it found before: its attributes, parameters, hooks, `isinstance`.
Copies and pickles are accelerated too.
"""

from __future__ import annotations

import copyreg
import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import engine, formats, fused
from ..kernels.backend import OPS
from . import scope as scopes
from .deferred import value_of, values
from .partial import copy_of
from .plan import Plan, is_hooked, original_class

PLAN, COUNTS, POOL, NODE = "_rnas_plan", "_rnas_counts", "_rnas_pool", "_rnas_node"
"""Where an accelerated module keeps what it needs: a `Plan`, the counts of a report, or nothing but the name."""

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


class Beside(Candidate):
    """Mixed into the class of a skip connection beside candidates: one of them where it is called on their state."""

    def __call__(self, *arguments, **options):
        scope = None if torch.compiler.is_compiling() else scopes.current()
        if scope is None or not arguments or not scope.is_state(arguments[0]):
            return super(Candidate, self).__call__(*arguments, **options)
        return super().__call__(*arguments, **options)


class Pool(Unregistered):
    """Mixed into the class of a pool beside candidates: what it makes of the channels that go around them can wait."""

    def __call__(self, *arguments, **options):
        if torch.compiler.is_compiling():
            return super().__call__(*arguments, **options)
        scope, x = scopes.current(), arguments[0] if arguments else None
        hooked = is_hooked(self) or "forward" in self.__dict__
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
    """What such a layer computes, fused where the kernels take x.

    Copied is what the graph would hold and that of the modules does not, x and the result: they may be written to.
    """
    (norm,) = plan.layers.norms
    holds = torch.is_grad_enabled()
    holds = holds and engine.of(x).holds_states([x], [*plan.layers.parameters()], any(plan.layers.on_batch()))
    if plan.guess.stride == 1:
        out = kernels.relu_conv_norm(copy_of(x) if holds and formats.is_taken(x) else x, *plan.weights(), norm)
    else:  # which gathers the pixels of x
        out = kernels.factorized_reduce(x, *plan.weights(), norm)
    return copy_of(out) if holds and formats.is_taken(out) else out


class Holder(Unregistered):
    """Mixed into the class of a module whose forward calls candidates, or calls modules that do."""

    def __call__(self, *arguments, **options):
        if _stands_back(self):
            return super().__call__(*arguments, **options)
        if is_hooked(self):
            arguments, options = values(arguments), values(options)
        if "forward" not in self.__dict__:
            return super().__call__(*arguments, **options)
        if is_hooked(self):  # hooks run in here, behind a forward that is not the one below
            with scopes.suspended():
                return super().__call__(*arguments, **options)
        with scopes.opened(self.__dict__[COUNTS]) as (scope, is_new):
            return scope.close(super().__call__(*arguments, **options), force=is_new)


def run_holder(forward: Callable, self: nn.Module, arguments: tuple, options: dict):
    """The forward of a holder, with candidates whose results wait until they are used."""
    if _stands_back(self):
        return forward(self, *arguments, **options)
    outer = scopes.current()
    with scopes.opened(self.__dict__[COUNTS]) as (scope, is_new):
        mark = scope.mark()
        if is_new and outer is not None:  # what waits out there has another one
            arguments, options = values(arguments), values(options)
        try:
            results = forward(self, *arguments, **options)
            return scope.close(results, force=is_new or is_hooked(self), node=NODE in self.__dict__)
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


# ---- classes ---------------------------------------------------------------------------------------------------------


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
    for key in (PLAN, COUNTS, POOL, NODE):
        module.__dict__.pop(key, None)
    if original is type(module):
        return False
    module.__class__ = original
    return True
