"""`rnas.kernels.pgd_step` against the three operations that attacks usually write, on small and on large images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from comparison import Gate, Row, compare
from jobs import relative_error
from problem import EPSILON, STEP_SIZE
from providers import Prepared
from report import CLOCK, Session, broken, replay
from torch import Tensor

from rnas.kernels import pgd_step
from rnas.seeding import generator

# name -> pixels per side, batch, calls per timed round on a CPU and on a GPU. The small images fit in a cache, the
# large do not.
SIZES = {"pgd_step_32": (32, 64, 20, 200), "pgd_step_224": (224, 64, 2, 50)}


def usual(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Step, projection, clamp, as attack code has it."""
    x_adv = x_adv + STEP_SIZE * grad.sign()
    x_adv = torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON)
    return x_adv.clamp(0.0, 1.0)


def usual_in_place(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """The same, its result in the caller's buffer."""
    return x_adv.copy_(usual(x_adv, grad, x))


def three_in_place(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """The same with as few new tensors as eager PyTorch can do with."""
    x_adv.add_(grad.sign(), alpha=STEP_SIZE)
    torch.max(x_adv, x - EPSILON, out=x_adv)
    torch.min(x_adv, x + EPSILON, out=x_adv)
    return x_adv.clamp_(0.0, 1.0)


def fused(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """The op, writing where it reads."""
    return pgd_step(x_adv, grad, x, epsilon=EPSILON, step_size=STEP_SIZE, out=x_adv)


# Large new tensors cost a CPU page faults, several times what the arithmetic costs. So that a ratio to `eager` cannot
# pass for the gain of fusing, there is an eager form in place, and the compiled form is in place as well.
PROVIDERS = ("eager", "eager_in_place", "compile", "rnas")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("job", SIZES)
@pytest.mark.benchmark(timer=CLOCK.read)
def test_pgd_step_speed(session: Session, benchmark, job: str, provider: str) -> None:
    """One row: this size and provider."""
    row = session.row((job,), provider, lambda: measure_step(session, job))
    reason = replay(benchmark, row)
    if reason:
        (pytest.fail if broken(row) else pytest.skip)(reason)


def measure_step(session: Session, job: str) -> list[Row]:
    """All providers on images of one size."""
    side, batch, calls, calls_gpu = SIZES[job]
    if session.quick:
        side, batch, calls = 8, 2, 2
    draw = generator(0, "benchmark", job)
    x, grad, noise = (torch.rand(batch, 3, side, side, generator=draw) for _ in range(3))
    grad, x_adv = grad - 0.5, (x + EPSILON * (2 * noise - 1)).clamp(0.0, 1.0)
    tensors = [each.to(session.device) for each in (x_adv, grad, x)]
    compiled = torch.compile(usual_in_place, backend=session.backend)
    steps = dict(zip(PROVIDERS, (usual, three_in_place, compiled, fused), strict=True))
    rows = compare(
        job,
        batch,
        {name: partial(_prepare, step, tensors) for name, step in steps.items()},
        Gate(relative_error, tolerance=1e-6),
        device=session.device,
        budget_seconds=session.budget_seconds / 4,
        repeats=calls_gpu if session.device == "cuda" else calls,
    )
    for row in rows:
        row.bytes_moved = 4 * x.nbytes  # three tensors read, one written
    return rows


def _prepare(step: Callable[..., Tensor], tensors: list[Tensor]) -> Prepared:
    # Each call steps from where the last one came to, as an attack does. All move in copies of their own.
    x_adv, grad, x = (each.clone() for each in tensors)
    run = partial(_advance, step, [x_adv], grad, x)
    return Prepared(run, run, run)


def _advance(step: Callable[..., Tensor], state: list[Tensor], grad: Tensor, x: Tensor) -> list[Tensor]:
    state[0] = step(state[0], grad, x)
    return state
