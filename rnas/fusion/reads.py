"""What the code of a module's forward reads besides its input and its layers.

A candidate was compared with a primitive once. It stays that primitive as long as nothing changes on which its forward
depends: so that must be known, and be something that can be compared at every call. Numbers and words that the module
holds are; a helper's code is read in turn; anything else is a reason to leave the module alone.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

DEPTH = 4
"""How many calls deep helpers are read."""


class Foreign(Exception):
    """Why a module is none of the primitives."""


@dataclass(frozen=True)
class Reads:
    """What to compare at a call, and what the forward of the candidate takes beside the images and ignores."""

    values: list[tuple[nn.Module, str, object]] = field(default_factory=list)
    """(module, attribute, its value): numbers and words on which a forward depends."""
    ignores_extras: bool = False
    """Whether arguments behind the images are never looked at."""
    may_be_none: tuple[str, ...] = ()
    """The arguments behind the images, in order, for which None was tried."""
    required: int = 0
    """How many of them have to be given."""


def reads(module: nn.Module) -> Reads:
    """Raises Foreign where the module's code, or that of a module in it, reads something that cannot be compared."""
    values: list[tuple[nn.Module, str, object]] = []
    for each in module.modules():
        if not is_of_torch(type(each)):
            _read_function(type(each).forward, each, values, DEPTH)
    if is_of_torch(type(module)):
        return Reads(values)
    forward = inspect.unwrap(type(module).forward)
    return Reads(values, _ignores_extras(forward), *_may_be_none(forward))


def is_of_torch(kind: type) -> bool:
    """Whether the forward of a module class is PyTorch's own."""
    return getattr(kind.forward, "__module__", "").startswith("torch.")


def is_simple(value: object) -> bool:
    """Whether it is a number, a word, None, or a tuple of them: nothing that can change from within."""
    if isinstance(value, tuple):
        return all(map(is_simple, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _read_function(function, module: nn.Module, values: list, depth: int) -> None:
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(function, "__code__", None)
    if code is None or depth == 0:
        raise Foreign(f"the code of {getattr(function, '__qualname__', function)} cannot be read")
    held = inspect.getclosurevars(function).nonlocals if code.co_freevars else {}
    for value in held.values():
        if not is_simple(value) and not isinstance(value, type):
            raise Foreign(f"{function.__qualname__} reads a variable of the function around it")
    for kind, name in _names(code):
        if kind == "global":
            _check_global(function, name, module, values, depth)
        else:
            _check_attribute(name, module, values, depth)


def _check_global(function, name: str, module: nn.Module, values: list, depth: int) -> None:
    value = function.__globals__.get(name, getattr(builtins, name, None))
    if isinstance(value, (types.ModuleType, type)):
        return
    if value is getattr:  # which attribute, bytecode does not say: all that can be compared are
        for each in list(module.__dict__):
            if each != "training" and not each.startswith("_"):
                _check_attribute(each, module, values, depth)
        return
    if isinstance(value, types.BuiltinFunctionType) or getattr(value, "__module__", "").startswith("torch"):
        return
    if isinstance(value, types.FunctionType):
        _read_function(value, module, values, depth - 1)
        return
    raise Foreign(f"its forward reads the global {name}")


def _check_attribute(name: str, module: nn.Module, values: list, depth: int) -> None:
    """name: an attribute that the code reads, of `self` or of something else, which bytecode does not say."""
    if name == "training" or name in module._modules or name in module._parameters or name in module._buffers:
        return
    if name in module.__dict__:
        value = module.__dict__[name]
        if is_simple(value):
            values.append((module, name, value))
            return
        if isinstance(value, list) and all(map(is_simple, value)):
            raise Foreign(f"its forward reads the list {name}, which may change")
        raise Foreign(f"its forward reads {name}, {type(value).__name__}, which cannot be watched")
    value = inspect.getattr_static(type(module), name, None)
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, (types.FunctionType, staticmethod, classmethod)):
        function = getattr(value, "__func__", value)
        if not getattr(function, "__module__", "").startswith("torch."):
            _read_function(function, module, values, depth - 1)
    elif value is not None and not is_simple(value) and not isinstance(value, (type, types.BuiltinFunctionType)):
        if not type(value).__module__.startswith(("builtins", "torch")):
            raise Foreign(f"its forward reads {name} of its class, which cannot be watched")


def _names(code: types.CodeType) -> Iterator[tuple[str, str]]:
    """("global" or "attribute", name) of what the code, and the functions and comprehensions in it, read."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield "global", instruction.argval
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            yield "attribute", instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _may_be_none(forward) -> tuple[tuple[str, ...], int]:
    """The names of the arguments behind x that have no default or None for one, and how many have none."""
    names, required = [], 0
    for parameter in list(inspect.signature(forward).parameters.values())[2:]:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY):
            break
        if parameter.default is not None and parameter.default is not parameter.empty:
            break
        names.append(parameter.name)
        required += parameter.default is parameter.empty
    return tuple(names), required


def _ignores_extras(forward) -> bool:
    """Whether a forward(self, x, ...) never reads what comes behind x."""
    code = forward.__code__
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    extras = set(code.co_varnames[2:count])
    loads = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_FAST_CHECK", "LOAD_FAST_AND_CLEAR")
    read = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(loads):
            value = instruction.argval
            read.update(value if isinstance(value, tuple) else (value,))
    return not (extras & read) and not (extras & set(code.co_cellvars))
