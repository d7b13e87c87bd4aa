"""The jobs of a search that cost time, each as one function on a `Problem` that returns the tensors it computes.

Every job also has a sample: a cheaper run of the same code, on which providers are compared with each other and memory
is measured. It is the job itself but for PGD, whose seven chained signs amplify rounding until images of two correct
implementations differ: there it is one step from the clean images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from problem import EPSILON, STEP_SIZE, STEPS, Problem
from torch import Tensor
from torch.nn.functional import cross_entropy

from rnas import attacks, kernels

Work = Callable[[Problem], list[Tensor]]


@dataclass(frozen=True)
class Job:
    """One row group of the table.

    run, sample     what is timed, and its cheaper twin (None: the same); the job is `repeats` samples long.
    captured, captured_sample   the same work without reads from the device, for a CUDA graph (None: run, sample).
    distance, tolerance         how far a sample may be from the reference's, and in what measure.
    training        the supernet's mode.
    compiles        "" or why torch.compile cannot serve.
    batches         the batches that fit on a CPU (None: all of the size).
    countable       whether all its arithmetic is in convolutions that can be counted.
    """

    name: str
    run: Work
    distance: Callable[[list[Tensor], list[Tensor]], float]
    tolerance: float
    sample: Work | None = None
    captured: Work | None = None
    captured_sample: Work | None = None
    repeats: int = 1
    training: bool = True
    compiles: str = ""
    cpu_batches: tuple[int, ...] | None = None
    countable: bool = True


def forward(problem: Problem) -> list[Tensor]:
    """Logits with batch statistics, no graph."""
    with torch.no_grad():
        return [problem.supernet(problem.x, problem.mixing())]


def training_step(problem: Problem) -> list[Tensor]:
    """Gradient of the cross entropy to all weights; alpha is a constant."""
    loss = cross_entropy(problem.supernet(problem.x, problem.mixing()), problem.y)
    return list(torch.autograd.grad(loss, list(problem.supernet.parameters())))


def alpha_gradient(problem: Problem) -> list[Tensor]:
    """Gradient of the cross entropy to alpha; the weights are constants, BN uses the batch and its averages stay."""
    alpha = {name: each.clone().requires_grad_() for name, each in problem.alpha.items()}
    with attacks.frozen(problem.supernet, statistics="batch"):
        loss = cross_entropy(problem.supernet(problem.x, problem.mixing(alpha)), problem.y)
        return list(torch.autograd.grad(loss, list(alpha.values())))


def pgd(problem: Problem) -> list[Tensor]:
    """PGD-7 as the package offers it, from a random start."""
    generator = torch.Generator(problem.x.device).manual_seed(0)
    return [_attack(problem, steps=STEPS, random_start=True, generator=generator)]


def pgd_sample(problem: Problem) -> list[Tensor]:
    """One step from the clean images."""
    return [_attack(problem, steps=1, random_start=False)]


def _attack(problem: Problem, **options) -> Tensor:
    return attacks.pgd(problem.fixed(), problem.x, problem.y, epsilon=EPSILON, step_size=STEP_SIZE, **options)


def captured_pgd(problem: Problem) -> list[Tensor]:
    """PGD-7 without argument checks, which read from the device."""
    # A number would be copied to the device in the middle of the capture, which CUDA forbids.
    epsilon = problem.x.new_full((), EPSILON)
    return [_ascend(problem, kernels.random_start(problem.x, epsilon=epsilon), STEPS)]


def captured_pgd_sample(problem: Problem) -> list[Tensor]:
    """One step from the clean images, without argument checks."""
    return [_ascend(problem, problem.x.clone(), 1)]


def _ascend(problem: Problem, x_adv: Tensor, steps: int) -> Tensor:
    model = problem.fixed()
    with attacks.frozen(model, statistics="running"):
        for _ in range(steps):
            leaf = x_adv.detach().requires_grad_()
            loss = cross_entropy(model(leaf), problem.y, reduction="sum")
            (grad_x,) = torch.autograd.grad(loss, leaf)
            kernels.pgd_step(x_adv, grad_x, problem.x, epsilon=EPSILON, step_size=STEP_SIZE, out=x_adv)
    return x_adv


def search_iteration(problem: Problem, attack: Work = pgd) -> list[Tensor]:
    """What an adversarial search does with a batch on each level: PGD-7 and the gradient to alpha, then to the weights.

    Both levels see the same images here; updates of weights and alpha are not timed.
    """
    found = []
    for level in (alpha_gradient, training_step):
        problem.supernet.eval()
        (x_adv,) = attack(problem)
        problem.supernet.train()
        found += level(replace(problem, x=x_adv))
    return found


def jacobian_norm(problem: Problem) -> list[Tensor]:
    """Gradient to weights and alpha of the cross entropy plus the squared norm of d(v . logits)/dx.

    v is a random projection (Hoffman, Roberts, Yaida, arXiv 1908.02729), and running statistics are used.
    """
    x = problem.x.detach().requires_grad_()
    alpha = {name: each.clone().requires_grad_() for name, each in problem.alpha.items()}
    logits = problem.supernet(x, problem.mixing(alpha))
    (grad_x,) = torch.autograd.grad((logits * problem.projection).sum(), x, create_graph=True)
    loss = cross_entropy(logits, problem.y) + grad_x.square().sum() / len(x)
    return list(torch.autograd.grad(loss, [*problem.supernet.parameters(), *alpha.values()]))


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """|found - expected| / |expected| over all tensors together, in float64."""
    found, expected = (torch.cat([each.detach().double().flatten() for each in side]) for side in (found, expected))
    return float((found - expected).norm() / expected.norm())


def share_of_other_pixels(found: list[Tensor], expected: list[Tensor]) -> float:
    """Share of the pixels that differ by more than rounding: where the sign of the gradient came out otherwise."""
    return float(((found[0] - expected[0]).abs() <= 1e-5).logical_not().double().mean())


# Logits are continuous in rounding, gradients are not: of the 10^8 ReLU inputs of the full size about one in 10^5 lies
# within rounding of its kink, and each that falls on the other side changes its share of the gradient. The square root
# of that, 2e-3 to 4e-3, is what NCHW and channels_last were seen to differ by, whatever the batch. Smaller faults are
# for the tests of the kernels to find.
LOGITS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-2

JOBS = {
    job.name: job
    for job in (
        Job("forward", forward, relative_error, LOGITS_TOLERANCE),
        Job("training_step", training_step, relative_error, GRADIENT_TOLERANCE),
        Job("alpha_gradient", alpha_gradient, relative_error, GRADIENT_TOLERANCE),
        Job(
            "pgd_7",
            pgd,
            share_of_other_pixels,
            tolerance=0.01,
            sample=pgd_sample,
            captured=captured_pgd,
            captured_sample=captured_pgd_sample,
            repeats=STEPS,
            training=False,
        ),
        Job(
            "search_iteration",
            search_iteration,
            relative_error,
            2 * GRADIENT_TOLERANCE,  # of images that differ in a few pixels, see pgd_7
            sample=partial(search_iteration, attack=pgd_sample),
            captured=partial(search_iteration, attack=captured_pgd),
            captured_sample=partial(search_iteration, attack=captured_pgd_sample),
            cpu_batches=(),  # there it is what its parts are
            countable=False,
        ),
        Job(
            "jacobian_norm",
            jacobian_norm,
            relative_error,
            GRADIENT_TOLERANCE,
            training=False,
            compiles="torch.compile does not support double backward",
            cpu_batches=(2, 16),  # batch 64 would need more memory than most machines have
            countable=False,
        ),
    )
}
