"""Registers an op with torch.library so that the dispatcher, fake tensors and torch.compile know it.

A constant op raises when an input carries a gradient, and every op when an input carries a forward-mode tangent, where
PyTorch's default for a custom op would drop it silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch.autograd import forward_ad

from rnas.kernels.fused import is_watched

LIBRARY = torch.library.Library("rnas", "DEF")


def define_constant_op(
    schema: str, implementation: Callable, fake: Callable, mutates: tuple[int, ...] = ()
) -> Callable:
    """Defines `rnas::<name>` with one implementation for all devices and no derivatives. Returns the op overload.

    schema          torch.library schema, such as "pgd_step(Tensor x_adv, ...) -> Tensor"
    fake            returns an empty tensor of the true shape, strides and dtype (None for a mutating op)
    mutates         positions of the arguments that the op writes
    """
    name, op = _define(schema, implementation, fake)

    def refuse_derivatives(*arguments):
        _refuse_derivatives(name, arguments)
        with torch._C._AutoDispatchBelowAutograd():
            result = op(*arguments)
        for position in mutates:  # else a graph that saved the tensor would not notice that it has changed
            torch.autograd.graph.increment_version(arguments[position])
        return result

    LIBRARY.impl(name, refuse_derivatives, "Autograd")
    return op


def define_differentiable_op(schema: str, implementation: Callable, fake: Callable, autograd: Callable) -> Callable:
    """Defines `rnas::<name>` with one implementation for all devices and derivatives. Returns a function that calls it.

    schema, fake    as in define_constant_op
    autograd        takes the op's arguments where one of them requires a gradient, and returns its outputs in a graph;
                    it calls the function that is returned here

    The function passes the dispatcher by where nobody could tell: a call through it costs more than some kernels.
    """
    name, op = _define(schema, implementation, fake)

    def differentiate(*arguments):
        _refuse_tangents(name, arguments)
        if _needs_graph(_tensors(arguments)):
            return autograd(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    places = [place for place, argument in enumerate(op._schema.arguments) if "Tensor" in str(argument.type)]

    def call(*arguments):
        tensors = list(_tensors([arguments[place] for place in places]))
        if is_watched(tensors) or torch.autograd._profiler_enabled() or _len_torch_function_stack():
            return op(*arguments)
        return (autograd if _needs_graph(tensors) else implementation)(*arguments)

    LIBRARY.impl(name, differentiate, "Autograd")
    return call


def _define(schema: str, implementation: Callable, fake: Callable) -> tuple[str, Callable]:
    """The op without its rules for autograd: its name and overload."""
    name = schema.partition("(")[0]
    # Exact strides: a compiler may not hand over inputs in another layout than the one `fake` was asked about.
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rnas::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.rnas, name).default
    return name, op


def _needs_graph(tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])


def _tensors(arguments: Sequence) -> Iterator[Tensor]:
    """The tensors among the arguments, those in lists too."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from (each for each in argument if isinstance(each, Tensor))


def _refuse_derivatives(name: str, arguments: tuple) -> None:
    if _needs_graph(_tensors(arguments)):
        raise RuntimeError(
            f"{name} is not differentiable, and an input requires a gradient; call it under torch.no_grad() or "
            "detach the input"
        )
    _refuse_tangents(name, arguments)


def _refuse_tangents(name: str, arguments: tuple) -> None:
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in _tensors(arguments)):
        raise RuntimeError(f"{name} has no forward-mode derivative, and an input carries a tangent; detach it")
