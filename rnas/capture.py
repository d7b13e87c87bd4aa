"""What a CUDA graph cannot hold, found while a step runs eagerly; and a simulation of graphs on the CPU.

A graph is a list of kernels on fixed memory. A step that reads a number from the device, whose shapes depend on values,
that copies from the host or draws random numbers either fails when it is captured or, worse, replays a constant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

PACKAGE = str(Path(__file__).parent)
_OWN = ("capture.py", "graphs.py", "updates.py")
_READS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu", Tensor.__array__: "__array__"}
_MASKED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
_TAGS = {
    torch.Tag.data_dependent_output: "reads a number from the device",
    torch.Tag.dynamic_output_shape: "has an output whose shape depends on values",
    torch.Tag.nondeterministic_seeded: "draws random numbers",
}


class CaptureError(RuntimeError):
    """A step does what no graph can hold."""


class Guard:
    """Within the block, notes in `found` the first thing that no graph on `device_type` could hold; None: nothing.

    Everything runs as it would without the guard. Calls that go around PyTorch's dispatcher are not seen.
    """

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.found: str | None = None

    def __enter__(self) -> Guard:
        self._modes = ExitStack()
        self._modes.enter_context(_Reads(self._note))
        self._modes.enter_context(_Operations(self._note, self.device_type))
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def _note(self, reason: str) -> None:
        self.found = self.found or f"{reason} ({_place()})"


class Tape:
    """CUDA graphs played on the CPU: a backend of `rnas.graphs.Graphs` for tests, and for methods made without a GPU.

    A capture records every operation with the very tensors it took and gave, leaves all memory that was there before as
    it was, and what is new without a value; a replay runs the operations again, on that memory. So Python numbers are
    constants, as in a graph, and code that no graph can hold raises CaptureError.
    """

    device_type = "cpu"

    def aside(self, function: Callable[[], Any]) -> Any:
        """The result of the function."""
        return function()

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A replay, and what the function returned, which a replay fills. Raises CaptureError."""
        recorder = _Recorder()

        def refuse(reason: str) -> None:
            raise CaptureError(f"{reason} ({_place()})")

        try:
            with _Reads(refuse), recorder, _Operations(refuse, self.device_type):
                outputs = function()
        finally:
            recorder.roll_back()
        recorder.poison()
        return recorder.replay, outputs

    def settle(self) -> None:
        """Nothing is under way on a CPU."""


def unsafe(function: Any, arguments: Any, device_type: str) -> str | None:
    """Why a graph on `device_type` cannot hold this call of an operation, or None."""
    name = function._schema.name
    for tag, reason in _TAGS.items():
        if tag in function.tags and not name.startswith(_MASKED):
            return f"{name} {reason}"
    tensors = [each for each in tree_iter(arguments) if isinstance(each, Tensor)]
    if name in _MASKED and any(each.dtype in (torch.bool, torch.uint8) for each in tensors[1:]):
        return f"{name} takes a mask, so it looks at its values"
    if name == "aten::lift_fresh" and tensors[0].device.type == device_type:
        return "a tensor is made of Python numbers, which are copied from the host"
    if name in ("aten::_to_copy", "aten::copy_"):
        target = arguments[1].get("device") if name == "aten::_to_copy" else tensors[0].device
        source = tensors[0].device if name == "aten::_to_copy" else tensors[-1].device
        if target is not None and torch.device(target).type != source.type:
            return f"{name} copies between {source.type} and {torch.device(target).type}"
    return None


class _Reads(TorchFunctionMode):
    """Sees the reads that do not pass the dispatcher."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _READS:
            self.note(f"Tensor.{_READS[function]} reads from the device")
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None], device_type: str) -> None:
        super().__init__()
        self.note, self.device_type = note, device_type

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reason = unsafe(function, (args, kwargs), self.device_type)
        if reason is not None:
            self.note(reason)
        return function(*args, **kwargs)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        args, kwargs = _kept((args, kwargs or {}))
        for tensor in _written(function, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = (storage, storage.clone())
        result = function(*args, **kwargs)
        returns = function._schema.returns
        results = [result] if len(returns) == 1 else list(result or ())
        fresh = [each for each, kind in zip(results, returns) if kind.alias_info is None]
        writes = any(each.alias_info is not None and each.alias_info.is_write for each in function._schema.arguments)
        if function.namespace != "profiler" and (fresh or writes):
            self.operations.append((function, args, kwargs, fresh))
        return result

    def roll_back(self) -> None:
        """Give memory that was written what it held before."""
        for storage, held in self.before.values():
            storage.copy_(held)
        self.before.clear()

    def poison(self) -> None:
        """A graph's memory holds nothing before its first replay."""
        for *_, fresh in self.operations:
            for tensor in tree_iter(fresh):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    tensor.detach().fill_(float("nan"))

    def replay(self) -> None:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, held in self.operations:
                result = function(*args, **kwargs)
                returns = function._schema.returns
                results = [result] if len(returns) == 1 else list(result or ())
                fresh = [each for each, kind in zip(results, returns) if kind.alias_info is None]
                for old, new in zip(tree_iter(held), tree_iter(fresh)):
                    if isinstance(old, Tensor):
                        old.copy_(new)


def _kept(arguments: Any) -> Any:
    """The arguments in containers of our own: a caller may go on to fill its lists."""
    return tree_map_only(Tensor, lambda tensor: tensor, arguments)


def _written(function: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    schema = function._schema.arguments
    named = dict(zip([each.name for each in schema], args)) | kwargs
    for each in schema:
        if each.alias_info is not None and each.alias_info.is_write:
            yield from (tensor for tensor in tree_iter(named.get(each.name)) if isinstance(tensor, Tensor))
    if "batch_norm" in function._schema.name:  # moves its averages without saying so
        averages = (named.get("running_mean"), named.get("running_var"))
        yield from (tensor for tensor in averages if tensor is not None)


def _place() -> str:
    """Where in the package the call comes from that is being looked at, else where outside of PyTorch."""
    frame, outside, torch_folder = sys._getframe(1), "", str(Path(torch.__file__).parent)
    while frame is not None:
        name = frame.f_code.co_filename
        place = f"{Path(name).name}:{frame.f_lineno}"
        if Path(name).name not in _OWN or not name.startswith(PACKAGE):
            if name.startswith(PACKAGE):
                return place
            if not outside and not name.startswith((torch_folder, "<")) and "contextlib" not in name:
                outside = place
        frame = frame.f_back
    return outside or "unknown place"
