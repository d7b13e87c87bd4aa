"""Where the CPU kernels spend their time, by kind of work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rnas.kernels import backend

KINDS = (
    "tiles",
    "depthwise",
    "depthwise_input",
    "depthwise_weight",
    "pointwise",
    "pointwise_input",
    "pointwise_weight",
    "norms",
    "pools",
    "nodes",
)
"""rnas::cpu::Work in csrc/include/rnas/profile.h, in its order."""

_running = threading.Lock()  # the compiled module has one set of counters


@dataclass
class Profile:
    """What `profile` has measured. Kinds are those of its docstring.

    seconds         kind -> seconds of all threads together
    multiply_adds   kind -> multiply-adds, two floating-point operations each; zero where a kind has none to count
    total           seconds of all threads from the beginning to the end of each kernel
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    multiply_adds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    total: float = 0.0

    @property
    def other(self) -> float:
        """Seconds of all threads in no kind: waiting for each other, small tables, packing of parameters."""
        return max(0.0, self.total - sum(self.seconds.values()))

    def __str__(self) -> str:
        """A table: kind, milliseconds, share of the total, GFLOP/s of one thread while it is at this kind."""
        if self.total == 0.0:
            return "no CPU kernel has run; `rnas env` prints which implementation serves each operation and why"
        lines = [f"{'kind':<18}{'ms':>12}{'share':>9}{'GFLOP/s':>10}"]
        for kind, seconds in [*self.seconds.items(), ("other", self.other), ("total", self.total)]:
            adds = sum(self.multiply_adds.values()) if kind == "total" else self.multiply_adds.get(kind, 0)
            rate = f"{2e-9 * adds / seconds:.1f}" if adds and seconds else "-"
            lines.append(f"{kind:<18}{1e3 * seconds:>12.3f}{seconds / self.total:>9.1%}{rate:>10}")
        return "\n".join(lines)


@contextmanager
def profile() -> Iterator[Profile]:
    """Measures where the CPU kernels of `mixed_op`, `mixed_cell`, `relu_conv_norm` and `factorized_reduce` spend time.

    Yields:
        A `Profile`, which is filled when the block ends, by an exception too: `seconds` and `multiply_adds` by kind of
        work, and `total`. Printed, it is a table.

    The seconds of all threads are added up: a kernel that keeps two threads busy for 1 ms counts 2 ms. `total` is taken
    from the beginning to the end of each kernel and so holds what is in no kind (`other`): waiting for other threads,
    small tables, packing of parameters. What happens outside the kernels, in Python or other operations, is in neither.

    The kinds:
        tiles               states and activations read through their ReLU into tiles with a border
        depthwise           depthwise convolutions, and the gathering of pixels for the other ones
        depthwise_input     their gradients to the input
        depthwise_weight    their gradients to the weights
        pointwise           products over channels: 1x1 convolutions, and dense ones, tap by tap or by Winograd's
                            algorithm with its transforms
        pointwise_input     their gradients to the input
        pointwise_weight    their gradients to the weights
        norms               moments of a batch, gradients through a norm and to its parameters
        pools               max and average pools and their gradients
        nodes               adding candidates up to a node or to the gradient of a state, and storing these
    What a backward pass computes again counts where the forward pass counts it. Multiply-adds are counted for the
    convolutions alone, at the border as inside and without what vectors are padded with.

    One profile at a time, and while it runs one kernel at a time: those that other threads of the program start would
    be mixed up with these. Calls that plain PyTorch serves are not measured: where no compiled kernel has run, because
    rnas._cpu is not built, `RNAS_BACKEND=reference` is set or the tensors are on a GPU, all numbers are zero and the
    table says so. Without a profile the kernels read no clock; with one the results are the same bits.

    Raises:
        RuntimeError: another profile is running.
    """
    if not _running.acquire(blocking=False):
        raise RuntimeError("another profile is running; end its `with` block first")
    try:
        found, loaded = Profile(), backend.load("cpu")
        if isinstance(loaded, str):  # not there
            yield found
            return
        loaded.start_profile()
        try:
            yield found
        finally:
            seconds, multiply_adds, found.total = loaded.stop_profile()
            found.seconds = dict(zip(KINDS, seconds, strict=True))
            found.multiply_adds = {kind: int(count) for kind, count in zip(KINDS, multiply_adds, strict=True)}
    finally:
        _running.release()
