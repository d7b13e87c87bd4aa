"""What the code of a module's forward reads and writes besides its input and its layers.

A candidate was compared with a primitive once. It stays that primitive as long as nothing changes on which its forward
depends: so that must be known, and be something that can be compared at every call. Numbers and words that the module,
a module in it or its class holds are; a helper's code is read in turn. Anything else, and code that stores something or
decides by what the images are, is a reason to leave the module alone.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from .branches import decides_by_input

DEPTH = 4
"""How many calls deep helpers are read."""


class Foreign(Exception):
    """Why a module is none of the primitives."""


@dataclass(frozen=True)
class Reads:
    """What to compare at a call, and what the forward of the candidate takes beside the images."""

    values: list[tuple[object, str, object]] = field(default_factory=list)
    """(a module or class, attribute, its value): numbers and words on which a forward depends."""
    absent: list[tuple[nn.Module, str]] = field(default_factory=list)
    """(a module, attribute): those of a class, of which the module has none of its own."""
    ignores_extras: bool = False
    """Whether arguments behind the images are never looked at."""
    may_be_none: tuple[str, ...] = ()
    """The arguments behind the images, in order, for which None was tried."""
    required: int = 0
    """How many of them have to be given."""


def reads(module: nn.Module) -> Reads:
    """Raises Foreign where the module's code, or that of a module in it, reads something that cannot be compared."""
    found = Reads()
    for each in module.modules():
        if type(each).__call__ is not nn.Module.__call__ and not hasattr(type(each), "_rnas_original"):
            raise Foreign(f"{type(each).__name__} has a __call__ of its own")
        if not is_of_torch(type(each)):
            _Reader(each, found).read(type(each).forward, DEPTH)
    if is_of_torch(type(module)):
        return found
    forward = inspect.unwrap(type(module).forward)
    names, required = _may_be_none(forward)
    return replace(found, ignores_extras=_ignores_extras(forward), may_be_none=names, required=required)


def is_of_torch(kind: type) -> bool:
    """Whether the forward of a module class is PyTorch's own."""
    return _is_torch(getattr(kind.forward, "__module__", ""))


def is_simple(value: object) -> bool:
    """Whether it is a number, a word, None, or a tuple of them: nothing that can change from within."""
    if isinstance(value, tuple):
        return all(map(is_simple, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _is_torch(name: str | None) -> bool:
    return name == "torch" or (name or "").startswith("torch.")


class _Reader:
    """Reads the code that runs in the forward of one module."""

    def __init__(self, module: nn.Module, found: Reads) -> None:
        self.module, self.found = module, found
        self.holders = list(module.modules())

    def read(self, function, depth: int) -> None:
        """A function of Python, and the helpers that it calls."""
        function = inspect.unwrap(getattr(function, "__func__", function))
        code, name = getattr(function, "__code__", None), getattr(function, "__qualname__", str(function))
        if code is None or depth == 0:
            raise Foreign(f"the code of {name} cannot be read")
        if any(variable != "__class__" for variable in code.co_freevars):
            raise Foreign(f"{name} reads a variable of the function around it")
        if not all(map(is_simple, (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))):
            raise Foreign(f"{name} has a default that may change")
        if decides_by_input(function):
            raise Foreign(f"{name} decides by what it is called on")
        for kind, found in _names(code):
            if kind == "store":
                raise Foreign(f"{name} stores {found}")
            if kind == "global":
                self._check_global(function, found, depth)
            else:
                self._check_attribute(found, depth)

    def _check_global(self, function, name: str, depth: int) -> None:
        value = function.__globals__.get(name, getattr(builtins, name, None))
        if value is getattr:  # which attribute, bytecode does not say: all that can be compared are
            for each in list(self.module.__dict__):
                if each != "training" and not each.startswith("_"):
                    self._check_attribute(each, depth)
        elif isinstance(value, types.ModuleType):
            if not _is_torch(value.__name__) and value.__name__ not in ("math", "operator"):
                raise Foreign(f"its forward reads the module {name}")
        elif isinstance(value, type):
            known = _is_torch(value.__module__) or value.__module__ in ("builtins", "typing")
            if not known and value not in type(self.module).__mro__:
                raise Foreign(f"its forward reads the class {name}")
        elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
            module = getattr(value, "__module__", None)
            if isinstance(value, types.FunctionType) and not _is_torch(module):
                self.read(value, depth - 1)
        else:
            raise Foreign(f"its forward reads the global {name}")

    def _check_attribute(self, name: str, depth: int) -> None:
        """name: an attribute that the code reads, of `self` or of something else, which bytecode does not say."""
        if name == "training":
            return
        for holder in self.holders:
            if name in holder.__dict__:
                value = holder.__dict__[name]
                if not is_simple(value):
                    raise Foreign(f"its forward reads {name}, {type(value).__name__}, which cannot be watched")
                self.found.values.append((holder, name, value))
            elif name not in holder._modules and name not in holder._parameters and name not in holder._buffers:
                if not is_of_torch(type(holder)):
                    self.found.absent.append((holder, name))
                    self._check_class(type(holder), name, depth)

    def _check_class(self, kind: type, name: str, depth: int) -> None:
        owner = next((each for each in kind.__mro__ if name in each.__dict__), None)
        if owner is None or _is_torch(owner.__module__) or owner is object:
            return
        value = owner.__dict__[name]
        if is_simple(value):
            self.found.values.append((owner, name, value))
            return
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not isinstance(value, types.FunctionType):
            raise Foreign(f"its forward reads {name} of its class, which cannot be watched")
        if not _is_torch(getattr(value, "__module__", "")):
            self.read(value, depth - 1)


_STORES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF"}


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[tuple[str, str], ...]:
    return tuple(_each_name(code))


def _each_name(code: types.CodeType) -> Iterator[tuple[str, str]]:
    """("global", "attribute" or "store", name) of the code, and of the functions and comprehensions in it."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield "global", instruction.argval
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            yield "attribute", instruction.argval
        elif instruction.opname in _STORES:
            yield "store", instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _each_name(constant)


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
    read = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")):
            value = instruction.argval
            read.update(value if isinstance(value, tuple) else (value,))
    return not (extras & (read | set(code.co_cellvars)))
