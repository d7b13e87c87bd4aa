"""What the tests of kernels on images of 16 bits need beside op_checks: draws away from kinks, two kinds of models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_checks import distance, evaluate, noise
from test_mixed_op import KINDS, Problem, draw
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rnas import kernels
from rnas.kernels.reference import mixed_op as reference

HALVES = (torch.bfloat16, torch.float16)
TIMES = 1.5
"""A kind of result may be so many times as far from float64 as plain PyTorch at that precision, plus `PLUS`. Plain
PyTorch rounds the result of every operation, the kernels their own alone: 0.3 to 0.9 of its error, measured."""
PLUS = {torch.bfloat16: 2**-9, torch.float16: 2**-12}
"""Relative to the size: half a unit in the last place, for where plain PyTorch rounds only once too, or a second time
to the same number."""
MARGINS = {torch.bfloat16: 2**-6, torch.float16: 2**-8}
"""How near a draw may come to a kink, relative to the typical size of what is rectified or pooled there: twice the
error of a node whose norms take the statistics of eight values, the largest that was seen; four times for float16."""
DRAWS = 1000


class Kinks(TorchDispatchMode):
    """Finds how near what is rectified comes to zero, and the two largest values of a window to each other.

    Relative to the typical size. Equal values do not count: all implementations take the first. A norm of a channel that
    does not vary counts as a kink: it divides by the root of eps, and rounding grows some 300 times.
    """

    def __init__(self):
        super().__init__()
        self.nearest = float("inf")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.name() == "aten::relu":
            self.note(arguments[0], arguments[0])
        elif function.name() == "aten::max_pool2d_with_indices":
            x, stride = arguments[0], arguments[2]
            windows = F.unfold(F.pad(x, (1, 1, 1, 1), value=-1e9), 3, stride=stride).unflatten(1, (x.shape[1], 9))
            first, second = windows.topk(2, dim=2).values.unbind(2)
            self.note((first - second)[first != second], x)
        elif function.name() == "aten::native_batch_norm" and arguments[5]:  # on statistics of the batch
            if arguments[0].numel() and arguments[0].var((0, 2, 3), correction=0).min() < 1e-4:
                self.nearest = 0.0
        return function(*arguments, **(options or {}))

    def note(self, distances: Tensor, x: Tensor) -> None:
        """Some distances from kinks of an operation on x."""
        if distances.numel() and x.count_nonzero():
            self.nearest = min(self.nearest, (distances.abs().min() / x.square().mean().sqrt()).item())


class MixedPrecision(Problem):
    """A problem whose states and image scales alone have 16 bits, under autocast. In a wider dtype, as any other."""

    def copy(self, dtype: torch.dtype = torch.float32, layout: str = "contiguous", device: str = "cpu") -> Problem:
        copied = super().copy(torch.float32 if dtype in HALVES else dtype, layout, device)
        if dtype in HALVES:
            copied.states = [state.to(dtype) for state in copied.states]
            copied.image_scales = None if copied.image_scales is None else copied.image_scales.to(dtype)
        return copied

    def run(self, implementation=kernels) -> Tensor:
        x = self.states[0]
        if x.dtype not in HALVES:
            return super().run(implementation)
        with torch.autocast(x.device.type, x.dtype):
            return super().run(implementation)


def draw_half(dtype: torch.dtype, kind: type[Problem] = Problem, **how) -> Problem:
    """A problem of `draw(**how)` whose numbers are those of `dtype`, in float32. kind: see `check_half`."""
    problem = draw(**how)
    if kind is Problem:
        problem = problem.copy(dtype).copy(torch.float32)
    problem.states = [state.to(dtype).float() for state in problem.states]
    if problem.image_scales is not None:
        problem.image_scales = problem.image_scales.to(dtype).float()
    return kind(**vars(problem))


def coarse_noise(like: Tensor, seed: int) -> Tensor:
    """`noise` that is the same in every dtype: rounding it changes nothing."""
    return noise(torch.empty(like.shape, dtype=torch.bfloat16), seed).to(like.device, like.dtype)


def check_half(
    dtype: torch.dtype,
    device: str,
    *,
    kind: type[Problem] = Problem,
    layout: str = "contiguous",
    wanted=KINDS,
    first=(),
    change: Callable[[Problem], None] | None = None,
    seed: int = 0,
    **how,
) -> None:
    """Compares the kernels with float64 on the first draw that is away from kinks; see `evaluate` for wanted and first.

    kind: Problem for a model that has been converted, MixedPrecision for autocast. `change` edits the problem in place.
    """
    for each in range(seed, seed + DRAWS):
        problem = draw_half(dtype, kind, seed=each, **how)
        if change:
            change(problem)
        with Kinks() as kinks:
            exact = evaluate(reference, problem.copy(torch.float64), wanted, first, coarse_noise)
        if kinks.nearest > MARGINS[dtype]:
            break
    else:
        pytest.fail(f"none of {DRAWS} draws is away from the kinks")
    plain = evaluate(reference, problem.copy(dtype), wanted, first, coarse_noise)
    found = evaluate(kernels, problem.copy(dtype, layout, device), wanted, first, coarse_noise)
    assert found.keys() == exact.keys()
    for name, expected in exact.items():
        tensors = [tensor.cpu() for tensor in found[name]]
        assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in plain[name]], name
        error, usual = distance(tensors, expected), distance(plain[name], expected)
        assert error <= TIMES * usual + PLUS[dtype], f"{name}: {error:.2e}, usual {usual:.2e}"
