"""What the fused ops on images share: memory for a call, batch norms, second derivatives by plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rnas.kernels import backend

NOTHING, MASKS, ACTIVATIONS, OUTPUTS = 0, 1, 2, 3
"""What a forward pass keeps: rnas::Keep in csrc/include/rnas/mixed_op.h."""

HALVES = (torch.bfloat16, torch.float16)

# ---- memory ----------------------------------------------------------------------------------------------------------

_memory = threading.local()


def workspace(size: int) -> Tensor:
    """Memory for one call, kept for the next one of this thread: fresh pages cost more than many kernels."""
    found = getattr(_memory, "buffer", None)
    if found is None or found.numel() < size:
        _memory.buffer = None  # the old one first
        _memory.buffer = found = POOL.take(size)
    return found


class Pool:
    """Memory of results and of what forward passes keep, handed on from one step of a search to the next.

    Where the compiled module is not built, it is PyTorch's.
    """

    SMALLEST = 2**20  # bytes; below, the C library does well
    MOST = 256  # free pieces

    def __init__(self) -> None:
        self._memory = None  # an rnas._cpu.FreeMemory, made at the first use

    def take(self, size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """An empty tensor of `size` bytes; its memory comes back when its last holder lets go of it."""
        if size >= self.SMALLEST:
            if self._memory is None and not isinstance(module := backend.load("cpu"), str):
                self._memory = module.FreeMemory(self.MOST)
            if self._memory is not None:
                return torch.frombuffer(self._memory.take(size), dtype=dtype)
        return torch.empty(size // dtype.itemsize, dtype=dtype, device="cpu")

    def free(self) -> list[int]:
        """The bytes of each free piece, oldest first."""
        return [] if self._memory is None else self._memory.sizes

    def empty(self) -> None:
        """Gives free memory back to the C library."""
        if self._memory is not None:
            self._memory.empty()


POOL = Pool()


def empty_bytes(size: int, device: torch.device | str = "cpu") -> Tensor:
    """An empty uint8 tensor of `size` bytes."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def empty_cache() -> None:
    """Gives back the memory that the CPU kernels hold for their next calls and no tensor is using.

    Of the memory that a call works in, that of the calling thread.
    """
    _memory.buffer = None
    POOL.empty()


def empty(like: Tensor, shape: Sequence[int], layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """An empty tensor of the dtype and on the device of `like`, from the pool where nobody is watching.

    No view of another, so that what becomes a result may be changed in place. layout: of images (N, C, H, W).
    """
    if like.is_cpu and not is_watched((like,)):
        memory = POOL.take(like.element_size() * math.prod(shape), like.dtype)
        return memory.resize_(shape, memory_format=layout)  # one step, where views and `detach` are three
    if layout == torch.contiguous_format:
        return like.new_empty(shape)
    _, c, h, w = shape
    return like.new_empty_strided(shape, (c * h * w, 1, w * c, c))


def addresses(tensors) -> list[int]:
    """Where the tensors begin, 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, contiguous."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


_PLAIN = {Tensor, nn.Parameter}


def is_watched(tensors: Sequence[Tensor]) -> bool:
    """Whether a compiler, a tracer, forward mode, a transform or a subclass must see what happens to these tensors."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return True
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return bool(set(map(type, tensors)) - _PLAIN)


def is_plain(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether compiled code may take these tensors by their addresses, unseen by PyTorch."""
    if is_watched(tensors) or {tensor.dtype for tensor in tensors} - {dtype}:
        return False
    return all([tensor.is_cpu and tensor.is_contiguous() for tensor in tensors])


def compiled_serves(tensors: Sequence[Tensor]) -> bool:
    """Whether compiled code for the CPU is there and wanted, and takes tensors of this kind."""
    if is_watched(tensors):
        return False
    wanted = backend.forced() in ("auto", "cpu") and not isinstance(backend.load("cpu"), str)
    fit = all([each.is_cpu and each.dtype == torch.float32 for each in tensors])
    return wanted and fit


def shape_of(tensor: Tensor) -> Tensor:
    """A tensor of this shape without memory of its own, for where only the shape counts."""
    return tensor.new_empty(()).expand(tensor.shape)


class Link(torch.autograd.Function):
    """An empty tensor that hangs on `x` in the graph and holds none of its memory.

    A backward pass on masks does not read x, and its derivative by x is zero almost everywhere; the link says so to
    autograd, which would else call x unused.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, gradient):
        return None if gradient is None else gradient.new_zeros(ctx.shape)


def what_to_keep(x: Sequence[Tensor], others: Sequence[Tensor | None], on_batch: bool) -> int:
    """What the backward pass will need: masks are enough for the gradient to images on fixed statistics."""
    if not torch.is_grad_enabled():
        return NOTHING
    if any([tensor is not None and tensor.requires_grad for tensor in others]):
        return ACTIVATIONS
    if any([tensor.requires_grad for tensor in x]):
        return ACTIVATIONS if on_batch else MASKS
    return NOTHING


# ---- batch norms -----------------------------------------------------------------------------------------------------


class Norms:
    """BN modules, and what they hold, read once."""

    def __init__(self, modules: list[nn.BatchNorm2d]) -> None:
        self.modules = modules
        self.weights, self.biases = _held(modules, "_parameters", "weight"), _held(modules, "_parameters", "bias")
        self.means = _held(modules, "_buffers", "running_mean")
        self.variances = _held(modules, "_buffers", "running_var")
        running = [m is not None or v is not None for m, v in zip(self.means, self.variances)]
        on_batch = [norm.training or not there for norm, there in zip(modules, running)]
        self.on_batch = any(on_batch)
        """Whether any of them takes the statistics of the batch."""
        self.differ = len(modules) > 0 and (self.on_batch != all(on_batch) or len({norm.eps for norm in modules}) > 1)
        """In eps, or in where they take the statistics from."""
        self.eps = modules[0].eps if modules else 0.0

    def obstacle(self, x: Tensor, images: torch.dtype) -> str | None:
        """Why no fused kernel covers them on images like `x` of this dtype, or None."""
        if self.differ:
            return "the norms differ in eps or in mode"
        if any([kind.forward is not nn.BatchNorm2d.forward for kind in set(map(type, self.modules))]):
            return "a norm has a forward of its own"
        held = [norm.__dict__ for norm in self.modules]
        if any([d["_forward_hooks"] or d["_forward_pre_hooks"] or "forward" in d for d in held]):
            return "a norm has hooks or a forward of its own"
        if [m is None for m in self.means] != [v is None for v in self.variances]:
            return "a norm has one running average without the other"
        lengths = [(norm.num_features,) for norm in self.modules]
        taken = {images, torch.float32} if images in HALVES else {images}  # norms are often left in float32
        for tensors in (self.weights, self.biases, self.means, self.variances):
            there = [tensor for tensor in tensors if tensor is not None]
            if not there:
                continue
            dtypes = {tensor.dtype for tensor in there}
            if dtypes - taken or {tensor.device for tensor in there} - {x.device}:
                return f"a norm's tensors are not {images} on {x.device}"
            if len(dtypes) > 1:
                return "the norms differ in dtype"
            expected = [length for length, tensor in zip(lengths, tensors) if tensor is not None]
            if [tensor.shape for tensor in there] != expected:
                return "a norm's tensors have not one number per feature"  # plain PyTorch says which
        return None

    def affine(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Their scales and shifts (B, C), for images like `x`; None where no norm has one."""
        return _table(self.weights, 1.0), _table(self.biases, 0.0)

    def statistics(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Their running means and variances (B, C); None where they take those of the batch."""
        if self.on_batch:
            return None, None
        empty = x.new_empty(0, x.shape[1])
        # Copies: a backward pass needs them as they are now.
        return tuple([torch.stack(rows) if rows else empty for rows in (self.means, self.variances)])

    def move_averages(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Moves the running averages towards the batch's mean and unbiased variance (B, C), as nn.BatchNorm2d does.

        variance: the biased one, of `count` values per channel.
        """
        counters = _held(self.modules, "_buffers", "num_batches_tracked")
        # Without a counter an average of all batches does not move.
        rows = [
            row
            for row, (norm, average, counter) in enumerate(zip(self.modules, self.means, counters))
            if norm.training and norm.track_running_stats and average is not None
            if counter is not None or norm.momentum is not None
        ]
        if not rows:
            return
        stored = [table[row] for table in (self.means, self.variances, counters) for row in rows]
        stored = [tensor for tensor in stored if tensor is not None]
        # Tensors that several norms share move several times, one after another.
        parts = [rows] if len(set(stored)) == len(stored) else [[row] for row in rows]
        averages = [table[row] for table in (self.means, self.variances) for row in rows]
        if not torch.compiler.is_compiling():
            averages = [each for each in averages if not each.is_inference()]  # those have no version
        # As in PyTorch, a graph that saved an average does not mind that it moves.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(averages)):
            batch = list(zip(mean.unbind(), (variance * (count / (count - 1))).unbind()))
            for part in parts:
                self._move(part, counters, batch)

    def _move(self, rows: list[int], counters: list[Tensor | None], batch: list[tuple[Tensor, Tensor]]) -> None:
        """Moves the averages of these rows, in a few calls for all: on a GPU each is a few kernels."""
        counted = [counters[row] for row in rows if counters[row] is not None]
        if counted:
            torch._foreach_add_(counted, 1)
        momenta = {row: self.modules[row].momentum for row in rows}
        fixed = [row for row in rows if momenta[row] is not None]
        cumulative = [row for row in rows if momenta[row] is None]
        for index, averages in enumerate((self.means, self.variances)):
            if fixed:
                moving, towards = [averages[row] for row in fixed], [batch[row][index] for row in fixed]
                _move_towards(moving, towards, [momenta[row] for row in fixed])
            if cumulative:
                moving, towards = [averages[row] for row in cumulative], [batch[row][index] for row in cumulative]
                counts = torch.stack([counters[row] for row in cumulative]).to(towards[0].dtype)
                shares = counts.reciprocal()[:, None].repeat(1, towards[0].shape[0])
                _move_towards(moving, towards, list(shares.unbind()))


def _move_towards(averages: list[Tensor], values: list[Tensor], shares: list) -> None:
    """averages += shares * (values - averages), in the dtype of the values and rounded once."""
    if averages[0].dtype == values[0].dtype:
        torch._foreach_lerp_(averages, values, shares)
        return
    moved = list(torch.stack(averages).to(values[0].dtype).unbind())
    torch._foreach_lerp_(moved, values, shares)
    torch._foreach_copy_(averages, moved)


class NormsOfShifted(Norms):
    """`Norms` of images to which a number for each channel has been added, a bias: they take them without.

    On batch statistics that number leaves with the mean, in whose running average it stays; its gradient is zero. On
    fixed ones it is a part of what is added behind.
    """

    def __init__(self, modules: list[nn.BatchNorm2d], biases: list[Tensor | None]) -> None:
        super().__init__(modules)
        self.shifts = biases
        """(C,) each, None where nothing was added."""

    def affine(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """As `Norms.affine`."""
        gamma, beta = super().affine(x)
        scale = 0.0
        if not self.on_batch:
            scale = (_table(self.variances, 1.0) + self.eps).rsqrt()
            scale = scale if gamma is None else gamma * scale
        moved = scale * _table(self.shifts, 0.0)
        return gamma, moved if beta is None else beta + moved

    def move_averages(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """As `Norms.move_averages`; mean: without what was added."""
        super().move_averages(mean + _table(self.shifts, 0.0).detach().to(mean.dtype), variance, count)


class CompiledNorms:
    """`Norms` as compiled code has read them: of one mode and eps, without affine parameters, float32 on the CPU."""

    def __init__(self, found, shape: tuple[int, int]) -> None:
        self._found, self._shape = found, shape  # an rnas._cpu.Norms, and (B, C) of what it holds
        self.on_batch, self.eps = found.on_batch, found.eps

    def obstacle(self, x: Tensor, images: torch.dtype) -> str | None:
        """Why no fused kernel covers them on images like `x` of this dtype, or None."""
        return None if x.is_cpu and images == torch.float32 else f"a norm's tensors are not {images} on {x.device}"

    def affine(self, x: Tensor) -> tuple[None, None]:
        """They have none."""
        return None, None

    def statistics(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Their running means and variances (B, C); None where they take those of the batch."""
        if self.on_batch:
            return None, None
        mean, variance = x.new_empty(self._shape), x.new_empty(self._shape)
        self._found.averages(*addresses([mean, variance]))
        return mean, variance

    def move_averages(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """As `Norms.move_averages`."""
        if self._found.moved:
            # As in PyTorch, a graph that saved an average does not mind that it moves: versions stay.
            self._found.update(*addresses([mean, variance]), count / (count - 1))


def read_norms(
    modules: list[nn.BatchNorm2d], channels: int, biases: list[Tensor | None] | None = None
) -> Norms | CompiledNorms:
    """What the modules of so many channels hold. biases: see `NormsOfShifted`."""
    if biases is not None and any([bias is not None for bias in biases]):
        return NormsOfShifted(modules, biases)
    found = compiled_norms(modules, channels)
    return Norms(modules) if found is None else found


def compiled_norms(modules: list, channels: int) -> CompiledNorms | None:
    """What the modules hold, if all are nn.BatchNorm2d of so many channels as compiled code takes them."""
    reader = None if is_watched(()) else _reader()
    found = None if reader is None or not modules else reader.norms(modules, channels)
    return None if found is None else CompiledNorms(found, (len(modules), channels))


def read_arrays(groups: list[list[Tensor]], shapes: list[list[tuple[int, ...]]]):
    """An rnas._cpu.Arrays of the tensors, float32 on the CPU and of these shapes; None where that cannot be said."""
    reader = None if is_watched(()) else _reader()
    return None if reader is None else reader.arrays(groups, shapes)


def _reader():
    """The rnas._cpu.Reader; None where it is not built or PyTorch does not show its tensors to compiled code."""
    module = backend.load("cpu")
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return None if isinstance(module, str) or exchange is None else _make_reader(module, exchange)


@functools.cache
def _make_reader(module, exchange):
    try:
        return module.Reader(exchange, Tensor, nn.Parameter, nn.BatchNorm2d)
    except (TypeError, ValueError):  # of another kind or version
        return None


def _held(norms: list[nn.BatchNorm2d], store: str, name: str) -> list[Tensor | None]:
    """The attribute `name` of each, read where nn.Module keeps it: `getattr` would take most of a small call's time."""
    try:
        if store == "_buffers":
            return [norm._buffers[name] for norm in norms]
        return [norm._parameters[name] for norm in norms]
    except KeyError:  # parametrized, or replaced by a plain attribute
        return [getattr(norm, name) for norm in norms]


def obstacle(x: Tensor, norms: Norms | CompiledNorms, autocast: torch.dtype | None = None) -> str | None:
    """Why a fused kernel does not cover a call on these images and norms, or None.

    autocast: what the kernel casts the images to where autocast is on; None where it does not follow it.
    """
    if torch.is_autocast_enabled(x.device.type) and autocast is None:
        return "autocast is on"
    if 0 in x.shape:
        return "the batch is empty"
    return norms.obstacle(x, autocast or x.dtype)


def dtypes_beside(x: Tensor, mixing: bool = False) -> tuple[torch.dtype, ...]:
    """The dtypes that parameters may have beside images like `x`: its own, under autocast all that it brings together.

    mixing: of numbers by which images are multiplied. float32 ones go with images of 16 bits too, as in PyTorch.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype in (torch.float32, *HALVES):
        return torch.float32, *HALVES
    return (x.dtype, torch.float32) if mixing and x.dtype in HALVES else (x.dtype,)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Inside, operations on the device of `x` run in the dtypes that they are given."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _stack(rows: list[Tensor]) -> Tensor:
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _table(rows: list[Tensor | None], default: float) -> Tensor | None:
    """The rows (C,) as a table (B, C), `default` where there is none; None where there are none at all."""
    if all([row is None for row in rows]):
        return None
    if not any([row is None for row in rows]):  # `None in rows` would compare whole tensors
        return _stack(rows)
    filler = torch.full_like(next(row for row in rows if row is not None), default)
    return torch.stack([filler if row is None else row for row in rows])


# ---- second derivatives ----------------------------------------------------------------------------------------------


def differentiate_twice(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad_out: Tensor,
    wanted: Sequence[bool],
    directions: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The derivative of `sum(direction * gradient)` over the gradients of `sum(grad_out * function(*inputs))`.

    By plain PyTorch: the gradients once more as a graph of usual operations, and that differentiated.

    wanted          which inputs the gradients are for; directions has one entry for each of them
    needs           which of (grad_out, *inputs) to differentiate by
    Returns one gradient for each of (grad_out, *inputs), None where not needed.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a tensor that came in twice is told apart from itself.
        leaves = [None if t is None else t.view_as(t) for t in inputs]
        leaves = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in leaves]
        grad_out = grad_out.view_as(grad_out) if grad_out.requires_grad else grad_out.detach().requires_grad_()
        targets = [leaf for leaf, want in zip(leaves, wanted) if want]
        options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad(function(*leaves), targets, grad_out, **options)
        pairs = [(f, along) for f, along in zip(first, directions) if along is not None and f.requires_grad]
        sources = [grad_out, *leaves]
        asked = [source for source, need in zip(sources, needs) if need]
        found = [None] * len(asked)
        if pairs and asked:
            found = torch.autograd.grad(
                [f for f, _ in pairs],
                asked,
                [along for _, along in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
    found = iter(torch.zeros_like(s) if f is None else f for s, f in zip(asked, found))
    return [next(found) if need else None for need in needs]
