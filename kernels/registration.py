"""Registers an op with torch.library so that the dispatcher, fake tensors and torch.compile know it.

Ops registered here are constants to autograd: they raise when an input carries a gradient or a tangent, where PyTorch's
default for a custom op would drop it silently.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("rnas", "DEF")


def define_constant_op(
    schema: str, implementation: Callable, fake: Callable, mutates: tuple[int, ...] = ()
) -> Callable:
    """Defines `rnas::<name>` with one implementation for all devices and no derivatives. Returns the op overload.

    schema          torch.library schema, such as "pgd_step(Tensor x_adv, ...) -> Tensor"
    fake            returns an empty tensor of the true shape, strides and dtype (None for a mutating op)
    mutates         positions of the arguments that the op writes
    """
    name = schema.partition("(")[0]
    # Exact strides: a compiler may not hand over inputs in another layout than the one `fake` was asked about.
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rnas::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.rnas, name).default

    def refuse_derivatives(*arguments):
        _refuse_derivatives(name, arguments)
        with torch._C._AutoDispatchBelowAutograd():
            result = op(*arguments)
        for position in mutates:  # else a graph that saved the tensor would not notice that it has changed
            torch.autograd.graph.increment_version(arguments[position])
        return result

    LIBRARY.impl(name, refuse_derivatives, "Autograd")
    return op


def _refuse_derivatives(name: str, arguments: tuple) -> None:
    for argument in arguments:
        if not isinstance(argument, Tensor):
            continue
        if argument.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} is not differentiable, and an input requires a gradient; call it under torch.no_grad() or "
                "detach the input"
            )
        if forward_ad.unpack_dual(argument).tangent is not None:
            raise RuntimeError(f"{name} is not differentiable, and an input carries a forward-mode tangent; detach it")
