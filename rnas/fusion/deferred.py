"""Results of candidate operations that are not computed yet, and the sums that code makes of them.

The code around the candidates runs as its author wrote it; each candidate hands it a `Deferred` tensor in place of its
result. Multiplied by a number and added to others it stays deferred, as a sum of weighted candidates: what the fused
operation computes. Whatever else is done to it, it is computed first, and the code goes on with the value. So nothing
has to be guessed about that code: what it multiplies and adds is fused, and all else is what it was.

Legend: N images, C channels, H W pixels, K candidates of an edge, E edges.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .calls import Group, Held, Scale, hold, is_of_images, number_dtype, version_of


class Finish:
    """What is done to a sum behind all. One that is not said to be linear is computed before anything is made of it."""

    parts: tuple[Tensor, ...] = ()
    """The deferred tensors that it is made of, where it is no sum of candidates."""

    is_view = False
    """Whether it is a view of a tensor that somebody else may have."""

    def times(self, scale: Scale) -> Finish | None:
        """Of the sum times a number, or as many as `takes` says; None where it has to be computed."""

    def plus(self, other: Finish) -> Finish | None:
        """Of the sum of both; None where they have to be computed."""

    def takes(self, other: Tensor) -> bool:
        """Whether `times` takes this tensor of several numbers."""
        return False

    def apart(self, held: frozenset[int]) -> Finish:
        """Itself, but so that the graph holds nothing that others may write to. held: as `calls.held_by_modules`."""
        return self

    def finished(self, total: Tensor | None, scope) -> Tensor:
        """What the deferred tensor is, from its sum."""
        raise NotImplementedError


class Deferred(Tensor):
    """`sum(groups) + sum(addends)`, (N, C, H, W), until somebody looks at it; from then on its value."""

    _rnas_value: Tensor | None = None
    _rnas_source = False  # whether candidates were called on it
    _rnas_taken = False  # whether something was made of it that waits
    _rnas_viewed = False  # whether there is a view of it that waits
    _rnas_groups: tuple[Group, ...]
    _rnas_addends: tuple[tuple[tuple[Scale, ...], Held], ...]  # scales, and a tensor that broadcasts
    _rnas_finish: Finish | None

    @staticmethod
    def make(scope, shape: torch.Size, like: Tensor, groups, addends=(), finish=None) -> Deferred:
        """like: of its dtype and on its device. finish: what is done to the sum behind all."""
        made = Tensor._make_wrapper_subclass(
            Deferred, shape, dtype=like.dtype, device=like.device, requires_grad=scope.grad
        )
        made._rnas_scope, made._rnas_shape, made._rnas_like = scope, shape, like
        made._rnas_groups, made._rnas_addends, made._rnas_finish = groups, addends, finish
        return made

    def has_become(self, value: Tensor) -> None:
        """From here on it is this tensor."""
        self._rnas_value, self._rnas_version = value, version_of(value)

    # ---- what keeps it deferred --------------------------------------------------------------------------------------

    def __mul__(self, other):
        return times(self, other)

    __rmul__ = __mul__

    def __add__(self, other):
        return plus(self, other)

    def __radd__(self, other):
        return plus(self, other, other_first=True)

    def __sub__(self, other):
        if is_number(other) or (isinstance(other, Tensor) and other.is_floating_point()):
            return plus(self, other * -1.0)
        return value_of(self) - other

    def __rsub__(self, other):
        return plus(times(self, -1.0), other, other_first=True)

    def __neg__(self):
        return times(self, -1.0)

    def __truediv__(self, other):
        if _divides(other):
            return times(self, 1.0 / other)
        return value_of(self) / value_of(other)

    def __iadd__(self, other):
        taken = self._rnas_taken
        made = plus(self, other) if _takes_part(self) and not is_raw(self) else None
        if is_open(made):  # what it is now is seen by all who hold it
            self._rnas_taken = taken
            self._rnas_groups, self._rnas_addends, self._rnas_finish = (
                made._rnas_groups, made._rnas_addends, made._rnas_finish
            )  # fmt: skip
            return self
        return Tensor.__iadd__(self, other)

    # ---- what computes it --------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        deferred = flat((args, kwargs))
        for each in deferred:
            _refuse_gradients(each)
            if function in _ABOUT_ITS_GRADIENT and each._rnas_value is None and each._rnas_scope.has_used(each):
                raise RuntimeError(
                    "rnas.accelerate: the result of a candidate operation was fused into a sum before its gradient was "
                    "asked for, and has none of its own; ask for it (retain_grad, register_hook) before it is used"
                )
        handler = HANDLERS.get(function)
        known = handler is not None and (not kwargs or kwargs.keys() <= _names_of(handler))
        if known and all([each._rnas_scope.is_as_before() for each in deferred]):
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if function in _ABOUT_THE_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function in _OF_ITS_KIND and type(args[0]) is Deferred:
            return function(args[0]._rnas_like, *values(args[1:]), **values(kwargs))
        if writes(function, kwargs):
            _refuse_views(kwargs.get("out", args[0] if args else None))
            for each in deferred:
                each._rnas_scope.before_writing(each)
        return function(*values(args), **values(kwargs))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(
            f"rnas.accelerate: {function} was called on the result of a candidate operation in a way that PyTorch does "
            "not show to Python; call rnas.restore(model), or leave this module out"
        )

    def __repr__(self, *, tensor_contents=None):
        return repr(value_of(self))

    def __reduce_ex__(self, protocol):
        return value_of(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return value_of(self).__deepcopy__(memo)


_ABOUT_ITS_GRADIENT = {
    Tensor.register_hook, Tensor.retain_grad, Tensor.grad.__get__, Tensor.backward, torch.autograd.grad,
}  # fmt: skip

HANDLERS: dict = {}
"""Functions of PyTorch that leave a deferred tensor deferred, where gradients are asked for as when candidates were
called: they take the arguments and may return NotImplemented."""

_ABOUT_THE_SHAPE = {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.__len__, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__, Tensor.device.__get__,
    Tensor.is_cuda.__get__, Tensor.get_device, Tensor.element_size,
}  # fmt: skip


_OF_ITS_KIND = {Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor}
"""What makes tensors of the same dtype, on the same device, of no value of it."""


@functools.cache
def _names_of(handler) -> set[str]:
    """The arguments that it takes by name."""
    arguments = inspect.signature(handler).parameters.values()
    return {each.name for each in arguments if each.kind is not each.VAR_POSITIONAL}


def value_of(x):
    """The value of a deferred tensor, computed where it is not; anything else as it is."""
    if type(x) is not Deferred:
        return x
    if x._rnas_value is None:
        _refuse_gradients(x)
        x._rnas_scope.compute(x)
    return x._rnas_value


def values(arguments):
    """The arguments with values in place of deferred tensors, in lists, tuples and dicts too; all else untouched."""
    kind = type(arguments)
    if kind is Deferred:
        return value_of(arguments)
    if kind in (list, tuple):  # no subclasses: a torch.Size has to stay one
        return kind([values(each) for each in arguments])
    if kind is dict:
        return {key: values(each) for key, each in arguments.items()}
    return arguments


def _refuse_gradients(x: Deferred) -> None:
    """A gradient to the placeholder itself, from an autograd.Function that it was given to, would be lost."""
    if x._rnas_scope.grad and not x.__dict__.get("_rnas_refuses"):
        x._rnas_refuses = True
        with torch._C.DisableTorchFunctionSubclass():
            x.register_hook(_raise)


def _refuse_views(written) -> None:
    """A tensor and a view of it would no longer be one."""
    if not is_open(written):
        return
    is_view = written._rnas_finish is not None and written._rnas_finish.is_view
    if is_view or written._rnas_viewed:
        raise RuntimeError(
            "rnas.accelerate: the result of candidate operations, or a view of it, is written to while the other "
            "waits; call .contiguous() on the result before, or leave this module out"
        )


def _raise(_):
    raise RuntimeError(
        "rnas.accelerate: an autograd.Function was applied to the result of a candidate operation before it was "
        "computed, and its gradient would be lost; multiply the result by 1.0 and call .contiguous() first, or leave "
        "this module out"
    )


def is_open(x) -> bool:
    """Whether x is a deferred tensor that nobody has looked at."""
    return type(x) is Deferred and x._rnas_value is None


def _takes_part(x) -> bool:
    """Whether a sum can take over what x is made of. A state of a cell is computed once, for all who use it."""
    return x._rnas_value is None and not x._rnas_source and x._rnas_scope.is_as_before()


def flat(args) -> list[Deferred]:
    """All deferred tensors among the arguments, in lists too."""
    return [each for each in tree_leaves(args) if type(each) is Deferred]


def writes(function, kwargs: dict) -> bool:
    """Whether a function of PyTorch changes one of its arguments."""
    name = getattr(function, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _IN_PLACE or kwargs.get("out") is not None or bool(kwargs.get("inplace"))


_IN_PLACE = {f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()}
_IN_PLACE |= {"__setitem__", "__set__"}


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def is_number(value) -> bool:
    """Whether it is a number of Python."""
    return type(value) in (int, float)


def is_raw(x: Deferred) -> bool:
    """Whether it is the result of a candidate itself."""
    if x._rnas_value is not None or len(x._rnas_groups) != 1 or x._rnas_addends or x._rnas_finish is not None:
        return False
    return x._rnas_groups[0].scales == (None,) and not x._rnas_groups[0].outer


def copied(x: Deferred) -> Deferred:
    """What x is now, whatever is added to it afterwards."""
    made = (x._rnas_groups, x._rnas_addends, x._rnas_finish)
    return Deferred.make(x._rnas_scope, x._rnas_shape, x._rnas_like, *made)


def times(x: Deferred, other) -> Tensor:
    """x * other."""
    scale = _scale(x, other) if _takes_part(x) else None
    finish = None
    if scale is not None and x._rnas_finish is not None:
        finish = x._rnas_finish.times(scale)
        scale = None if finish is None else scale  # it cannot wait any longer
    if scale is None:
        return value_of(x) * value_of(other)
    x._rnas_taken = True
    groups = tuple([_times_group(group, scale) for group in x._rnas_groups])
    addends = x._rnas_addends and tuple([((*scales, scale), held) for scales, held in x._rnas_addends])
    return Deferred.make(x._rnas_scope, x._rnas_shape, x._rnas_like, groups, addends, finish)


def _times_group(group: Group, scale: Scale) -> Group:
    if not is_of_images(scale) and len(group.calls) == 1 and group.scales[0] is None and not group.outer:
        return Group((), group.calls, (scale,))
    return Group((*group.outer, scale), group.calls, group.scales)


def _scale(x: Deferred, other) -> Scale | None:
    """`other`, where x * other is the same candidates with other weights."""
    if is_number(other):
        return other
    if not isinstance(other, Tensor) or type(other) is Deferred:
        return None
    like, dimensions = x._rnas_like, other.dim()
    if _is_of_images(x, other):
        takes = x._rnas_finish is None and other.dtype == like.dtype and other.device == like.device
    elif dimensions and other.numel() != 1:
        takes = x._rnas_finish is not None and x._rnas_finish.takes(other)
    # A tensor with dimensions takes part in the choice of the result's dtype, and in its shape.
    elif dimensions and (other.dtype != like.dtype or dimensions > 4):
        takes = False
    else:
        takes = not other.is_complex() and other.device == like.device
    if not takes:
        return None
    if other.dtype not in (torch.float32, torch.float64):  # its products and sums would be rounded, or run over
        other = other.to(number_dtype(like))
    # Code without gradients may fill one tensor with one weight after the other; else that is an error anyhow.
    return hold(other if x._rnas_scope.grad else other.clone())


def _is_of_images(x: Deferred, other: Tensor) -> bool:
    """Whether it is a number for each image, and a constant."""
    plain = type(other) in (Tensor, torch.nn.Parameter) and other.layout == torch.strided
    return tuple(other.shape) == (x._rnas_shape[0], 1, 1, 1) and plain and other.numel() > 1 and not other.requires_grad


def _divides(other) -> bool:
    return is_number(other) and other != 0


def plus(x: Deferred, other, other_first: bool = False) -> Tensor:
    """x + other, or other + x."""
    first, second = (other, x) if other_first else (x, other)
    if _takes_part(x):
        if is_open(other) and not other._rnas_source and _agree(x, other):
            if first._rnas_finish is None and second._rnas_finish is None:
                return _joined(first, second, None)
            if first._rnas_finish is not None and second._rnas_finish is not None:
                finish = first._rnas_finish.plus(second._rnas_finish)
                if finish is not None:
                    return _joined(first, second, finish)
        elif is_number(other) and other == 0:  # where sum() begins
            groups = x._rnas_groups
            x._rnas_taken = True
            if is_raw(x):  # a new tensor, and not the result of the candidate itself
                groups = (Group((), groups[0].calls, (1.0,)),)
            return Deferred.make(x._rnas_scope, x._rnas_shape, x._rnas_like, groups, x._rnas_addends, x._rnas_finish)
        elif x._rnas_finish is None and _is_addend(x, other):  # a state of a cell too, by its value
            x._rnas_taken = True
            addends = (*x._rnas_addends, ((), hold(value_of(other))))
            return Deferred.make(x._rnas_scope, x._rnas_shape, x._rnas_like, x._rnas_groups, addends)
    return value_of(first) + value_of(second)


def _agree(x: Deferred, other: Deferred) -> bool:
    return other._rnas_scope is x._rnas_scope and other._rnas_shape == x._rnas_shape


def _joined(first: Deferred, second: Deferred, finish) -> Deferred:
    first._rnas_taken = second._rnas_taken = True
    groups = first._rnas_groups
    for group in second._rnas_groups:
        last = groups[-1] if groups else None
        if last is not None and not last.outer and not group.outer and last.calls[0].x is group.calls[0].x:
            groups = (*groups[:-1], Group((), last.calls + group.calls, last.scales + group.scales))
        else:
            groups = (*groups, group)
    addends = first._rnas_addends + second._rnas_addends
    return Deferred.make(first._rnas_scope, first._rnas_shape, first._rnas_like, groups, addends, finish)


def _is_addend(x: Deferred, other) -> bool:
    """Whether x + other has the shape and dtype of x and can wait."""
    if is_open(other) and other._rnas_source and _agree(x, other):
        return True
    other = other._rnas_value if type(other) is Deferred else other
    if not isinstance(other, Tensor) or other.dtype != x._rnas_like.dtype or other.device != x._rnas_like.device:
        return False
    shape = x._rnas_shape
    if other.dim() > len(shape):
        return False
    return all(a in (1, b) for a, b in zip(reversed(other.shape), reversed(shape)))


def _handle(*functions):
    def keep(handler):
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return keep


@_handle(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def _multiply(a, b, *, out=None):
    if out is not None:
        return NotImplemented
    return times(a, b) if type(a) is Deferred else times(b, a)


@_handle(torch.div, Tensor.div, torch.divide, Tensor.divide, torch.true_divide, Tensor.true_divide)
def _divide(a, b, *, rounding_mode=None, out=None):
    if out is not None or rounding_mode is not None or type(a) is not Deferred or not _divides(b):
        return NotImplemented
    return times(a, 1.0 / b)


@_handle(Tensor.div_, Tensor.divide_, Tensor.true_divide_, Tensor.__itruediv__, Tensor.__idiv__)
def _divide_in_place(a, b, *, rounding_mode=None):
    return _become_times(a, 1.0 / b) if rounding_mode is None and _divides(b) else NotImplemented


@_handle(Tensor.mul_, Tensor.multiply_, Tensor.__imul__)
def _become_times(x, other):
    """x, from here on times a number, or one for each image: what it is now is seen by all who hold it."""
    if type(x) is not Deferred or not _takes_part(x) or x._rnas_finish is not None or is_alias(x):
        return NotImplemented
    if _scale(x, other) is None:
        return NotImplemented
    taken, made = x._rnas_taken, times(x, other)
    x._rnas_groups, x._rnas_addends, x._rnas_taken = made._rnas_groups, made._rnas_addends, taken
    return x


def is_alias(x: Deferred) -> bool:
    """Whether its value is the very state that a candidate was called on."""
    if not is_raw(x):
        return False
    guess = x._rnas_groups[0].calls[0].plan.guess
    return guess.primitive == "skip_connect" and guess.stride == 1


@_handle(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(a, b, *, alpha=1, out=None):
    if out is not None or alpha != 1:
        return NotImplemented
    return plus(a, b) if type(a) is Deferred else plus(b, a, other_first=True)


@_handle(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors, dim=0, *, out=None):
    if out is not None or dim not in (1, -3) or not all(isinstance(each, Tensor) for each in tensors):
        return NotImplemented
    scope = next(each for each in tensors if type(each) is Deferred)._rnas_scope
    return scope.concatenate(tensors)
