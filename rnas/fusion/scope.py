"""One run of the forward of a mixed operation or a cell: what its candidates were called on, and computing it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..kernels import engine, formats, fused
from ..kernels.backend import OPS
from . import (
    invoke,
    lower,
    stacked,  # noqa: F401  (for what it adds to the functions that leave a tensor deferred)
)
from .calls import Call, Group, hold, version_of
from .deferred import Deferred, flat, is_alias, is_open, is_raw, value_of, values
from .partial import Pooled, concatenated
from .parts import Slice

_current = threading.local()


def _saved_tensor_hooks():
    """What autograd's saved tensors go through at the moment, as in a checkpoint."""
    look = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if look is None else look(True)


def current() -> Scope | None:
    """The scope of this thread that is open."""
    return getattr(_current, "scope", None)


@contextmanager
def suspended():
    """Candidates that are called inside compute at once."""
    before = current()
    _current.scope = None
    try:
        yield
    finally:
        _current.scope = before


@contextmanager
def _saved_through(hooks):
    """Saved tensors go through these hooks: a checkpoint begun since must not count what it will not repeat."""
    popped = []
    while (now := _saved_tensor_hooks()) is not None and now != hooks:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        popped.append(now)
    try:
        yield
    finally:
        for each in reversed(popped):
            torch._C._autograd._push_saved_tensors_default_hooks(*each)


class _State(NamedTuple):
    """What candidates are called on, read once for all of them."""

    given: Tensor | None
    x: Tensor | None
    """What stands for it: see `Scope.interned`."""
    size: torch.Size | None
    """(N, C, H, W) of a tensor; None of one that is not computed yet."""
    like: Tensor | None
    channels: int
    shape: torch.Size | None
    """(N, C, H, W) of a result. None where a channel is one value: of its statistics PyTorch says what is wrong."""
    halved: torch.Size | None
    """Likewise, at stride 2."""

    @staticmethod
    def of(given: Tensor, x: Tensor) -> _State:
        """x: (N, C, H, W)."""
        is_open = type(x) is Deferred
        size, like = (x._rnas_shape, x._rnas_like) if is_open else (x.shape, x)
        n, c, h, w = size
        shapes = [torch.Size((n, c, *each)) for each in ((h, w), (-(-h // 2), -(-w // 2)))]
        shapes = [None if each.numel() == c else each for each in shapes]
        return _State(given, x, None if is_open else size, like, c, *shapes)


_NO_STATE = _State(None, None, None, None, 0, None, None)


class Scope:
    """One run of the forward of a module that holds candidates."""

    def __init__(self, counts) -> None:
        self.grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._hooks = _saved_tensor_hooks()
        self.counts = counts
        """Where is counted what was computed how: `report.Counts`."""
        self._calls: list[Call] = []  # those computed long ago are left out
        self._left: list[weakref.ref[Call]] = []  # behind the end: those that were not computed
        self._others: list[weakref.ref[Deferred]] = []  # nodes of cells of which the last alone was computed
        self._called = self._open = 0
        self._called_before: set[int] = set()  # the ids of plans
        self._state = _NO_STATE  # the last one that the kernels cover
        self._slices: dict[tuple, Tensor] = {}
        self._arranged: dict[tuple, tuple[Tensor, Tensor]] = {}  # (what is kept alive for its id, the value)
        self._pooled: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._serving: dict[tuple[torch.device, torch.dtype], bool] = {}

    # ---- calls of candidates -----------------------------------------------------------------------------------------

    def defer(self, plan, arguments: tuple, options: dict) -> Deferred | None:
        """The result of a candidate, to be computed later; None where the kernels do not cover the call."""
        x = arguments[0]
        if type(x) is Deferred and x._rnas_value is not None:
            x = x._rnas_value
        state = self._state
        known = x is state.given or x is state.x
        if not known or (state.size is not None and x.shape != state.size):  # that may change in place
            if not self._covers(x):
                return None
            state = self._state = _State.of(x, self.interned(x))
        guess = plan.guess
        if guess.channels not in (0, state.channels) or not self.is_as_before():
            return None
        if not self.saves_as_before():  # a checkpoint that begins inside has to see what runs in it
            return None
        shape = state.shape if guess.stride == 1 else state.halved
        if shape is None:
            return None
        call = Call(plan, state.x, (arguments[1:], options))
        self._remember(call)
        return Deferred.make(self, shape, state.like, (Group((), (call,), (None,)),))

    def is_state(self, x) -> bool:
        """Whether candidates were called on x, and on nothing since."""
        x = x._rnas_value if type(x) is Deferred and x._rnas_value is not None else x
        return x is not None and (x is self._state.given or x is self._state.x)

    def _remember(self, call: Call) -> None:
        """Of calls of one candidate, batch norms see the first first."""
        if id(call.plan) in self._called_before:
            before = [each for each in self._calls if each.plan is call.plan and not each.consumed]
            moves = any(call.state.modes) or any([any(each.state.modes) for each in before])
            if moves and any([each.x is not call.x or each.state.modes != call.state.modes for each in before]):
                with self._as_before():
                    for each in before:
                        invoke.alone(each)
        self._called_before.add(id(call.plan))
        self._called += 1
        self._calls.append(call)
        if len(self._calls) > 2 * self._open + 64:  # what has been computed need not be kept alive
            self._calls = [each for each in self._calls if not each.consumed]
            self._open = len(self._calls)

    def _covers(self, x) -> bool:
        """Whether the fused operation takes such a state."""
        if is_open(x):
            return x._rnas_scope is self and len(x._rnas_shape) == 4
        if not isinstance(x, Tensor) or x.dim() != 4 or 0 in x.shape or fused.is_watched((x,)):
            return False
        if torch.is_autocast_enabled(x.device.type) or engine.of(x).obstacle(x.shape[1]) is not None:
            return False
        key = (x.device, x.dtype)
        if key not in self._serving:
            name, _ = OPS["mixed_op"].decide(*key)
            self._serving[key] = name not in (None, "reference")
        return self._serving[key]

    def interned(self, x: Tensor) -> Tensor:
        """x, or the slice of the same tensor that the candidates of another edge were called on before.

        Partial channels are cut out anew for every edge. As one tensor they are converted and differentiated once.
        """
        if type(x) is Deferred or not x._is_view() or x.is_inference():
            return x
        links = None
        if x.grad_fn is not None:
            if x.grad_fn.name() != "SliceBackward0":
                return x
            links = x.grad_fn.next_functions[0][0]
        key = (id(x._base), x._version, x.storage_offset(), x.shape, x.stride(), x.requires_grad, links)
        found = self._slices.setdefault(key, x)
        return found if found._base is x._base and not found._backward_hooks and not x._backward_hooks else x

    def arranged(self, x: Tensor) -> Tensor:
        """A state in the memory format of the kernels where it is a slice, converted once for all edges."""
        if not x._is_view() or x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
            return x
        key = (id(x), version_of(x))
        if key not in self._arranged:
            self._arranged[key] = (x, formats.arranged(x, torch.channels_last))
        return self._arranged[key][1]

    def pool(self, module: nn.Module, x: Tensor, shape: torch.Size) -> Deferred | None:
        """What a pool makes of what goes around the candidates."""
        if not self.is_as_before() or not self._covers(x) or type(x) is Deferred:
            return None
        return Deferred.make(self, shape, x, (), (), Pooled(module, hold(self.interned(x))))

    def pooled(self, x: Deferred) -> Tensor:
        """Its value, computed once for all edges around which it goes: nobody writes to it."""
        pool: Pooled = x._rnas_finish
        key = (id(pool.x.tensor), pool.x.version, repr(pool.module))
        if key not in self._pooled:
            self._pooled[key] = (pool.x.tensor, pool.finished(None, self))
        return self._pooled[key][1]

    def is_as_before(self) -> bool:
        """Whether gradients are asked for as they were when the forward began."""
        return torch.is_grad_enabled() == self.grad

    def saves_as_before(self) -> bool:
        """Whether saved tensors go through what they went through when the forward began."""
        return self._hooks == _saved_tensor_hooks()

    def mark(self) -> int:
        """For `is_unused_since`."""
        return self._called

    def is_unused_since(self, mark: int) -> bool:
        """Whether no candidate called since has been computed; those are forgotten then."""
        count = self._called - mark
        calls = self._calls[len(self._calls) - count :] if count else []
        if not calls or len(calls) < count or any(call.consumed for call in calls):
            return False
        del self._calls[len(self._calls) - count :]
        return True

    # ---- computing ---------------------------------------------------------------------------------------------------

    def compute(self, x: Deferred) -> None:
        """Gives x its value."""
        with self._as_before():
            nodes = lower.open_ancestors(x)
            last = not self._inference  # else nobody would notice that a state changes before another node is read
            out = lower.whole_cell(nodes, self, last) if len(nodes) > 1 else None
            if out is not None and last:
                x.has_become(out)
                x._rnas_groups, x._rnas_addends = (), ()
                self._others += map(weakref.ref, nodes[:-1])
                return
            for node in (x,) if out is not None else nodes:
                lower.node(node, self)

    def concatenate(self, tensors: Sequence[Tensor]):
        """torch.cat(tensors, dim=1): the nodes of a cell, or what went through the candidates and what went around."""
        made = concatenated(self, tensors)
        if made is not None:
            return made
        nodes = [each for each in tensors if is_open(each) and each._rnas_scope is self]
        if len(nodes) < 2:
            return NotImplemented
        first = next(index for index, each in enumerate(tensors) if each is nodes[0])
        behind = first + len(nodes)
        if any(a is not b for a, b in zip(tensors[first:behind], nodes)):
            return NotImplemented
        with self._as_before():
            out = lower.whole_cell(nodes, self, last=False)
        if out is None:
            return NotImplemented
        around = values([*tensors[:first], *tensors[behind:]])  # states that the cell was called on, say
        return torch.cat([*around[:first], out, *around[first:]], dim=1) if around else out

    def has_used(self, x: Deferred) -> bool:
        """Whether the sum x, or a candidate of it, has been computed as a part of another sum."""
        calls = [call for group in x._rnas_groups for call in group.calls]
        parts = () if x._rnas_finish is None else x._rnas_finish.parts
        without_x = x._rnas_taken and not is_raw(x)  # by the results of candidates, of which a raw x is one
        used = any([call.consumed and (call.value is None or without_x) for call in calls])
        used = used or any(map(self.has_used, parts))
        return used or isinstance(x._rnas_finish, Slice)

    def before_writing(self, x: Deferred) -> None:
        """x is about to be changed in place: what was called on it, or on what it is an alias of, sees it before."""
        if x._rnas_source or is_alias(x):
            self._settle()
        if is_raw(x):
            (call,) = x._rnas_groups[0].calls
            value_of(x)
            call.own = None  # sums that it is part of compute it once more

    def _settle(self) -> None:
        with self._as_before():
            for call in (*self._calls, *(each() for each in self._left)):
                if call is not None and not call.consumed:
                    invoke.alone(call)
        self._compute_others()

    def _compute_others(self) -> None:
        """While all is as it was when the last node of their cell was computed. Where it is not, reading one raises."""
        others, self._others = self._others, []
        for each in others:
            node = each()
            if node is not None:
                with suppress(RuntimeError):
                    value_of(node)

    @contextmanager
    def _as_before(self):
        """PyTorch in the state in which candidates were called, for computing what they yield."""
        autocast = [each for each in ("cpu", "cuda") if torch.is_autocast_enabled(each)]  # it was off
        same = self._inference == torch.is_inference_mode_enabled() and self._hooks == _saved_tensor_hooks()
        with suspended():
            if same and self.is_as_before() and not autocast:  # as a rule; all of them take longer than a kernel
                yield
                return
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode(self._inference))
                stack.enter_context(torch.set_grad_enabled(self.grad))
                for device in autocast:
                    stack.enter_context(torch.autocast(device, enabled=False))
                stack.enter_context(_saved_through(self._hooks))
                yield

    def close(self, results, force: bool, node: bool = False):
        """What the forward returns; with `force`, or where it is no single edge and no node, computed."""
        if is_open(results) and not force and (node or lower.is_edge(results)):
            return results
        if type(results) is Deferred:
            return value_of(results)
        return tree_map_only(Deferred, value_of, results) if flat(results) else results

    def end(self) -> None:
        """What is still to be done behind a forward, and has to see what the forward saw."""
        self._move_averages()
        self._forget()
        self._compute_others()  # those that somebody still has

    def _move_averages(self) -> None:
        """Calls whose result nobody used still move the averages of their batch norms."""
        moving = [call for call in self._calls if not call.consumed and any(call.plan.modes())]
        if moving:
            with self._as_before():
                for call in moving:
                    if not call.consumed:  # by one before it
                        invoke.alone(call)

    def let_go(self) -> None:
        """Keeps nothing alive from here on: what is still deferred, elsewhere, holds what it is made of.

        Else scope and nodes would hold one another, and with them the states, until Python looks for such circles.
        """
        self._forget()
        self._others = []

    def _forget(self) -> None:
        self._left += [weakref.ref(call) for call in self._calls if not call.consumed]
        self._calls, self._state = [], _NO_STATE
        for each in (self._called_before, self._slices, self._arranged, self._pooled):
            each.clear()


@contextmanager
def opened(counts):
    """The scope of this thread and whether it is new: where none is open, or a checkpoint has begun inside of it."""
    before = current()
    if before is not None and before.saves_as_before():
        yield before, False
        return
    scope = _current.scope = Scope(counts)
    try:
        yield scope, True
        _current.scope = None
        scope.end()
    finally:
        _current.scope = before
        scope.let_go()
