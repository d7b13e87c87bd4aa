"""Training step, alpha gradient, PGD-7, Jacobian norm and forward of the module-per-operation DARTS supernet."""

from __future__ import annotations

import gc
from functools import partial

import measure
import module_per_operation
import pytest
import torch
from comparison import MEASURED, Gate, Row, compare
from conftest import device_of
from jobs import JOBS, Job
from problem import Problem, build, size_of
from providers import prepare, providers
from report import CLOCK, Session, broken, replay
from torch import Tensor
from torch.nn.functional import cross_entropy


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device = device_of(config)
    size = size_of(device, config.getoption("--quick"), config.getoption("--channels"))
    cases = [
        pytest.param(job, batch, provider.name, id=f"{job.name}-{batch}-{provider.name}")
        for job in JOBS.values()
        for batch in size.batches
        if device == "cuda" or job.cpu_batches is None or batch in job.cpu_batches
        for provider in providers(device)
    ]
    metafunc.parametrize(("job", "batch", "provider"), cases)


@pytest.mark.benchmark(timer=CLOCK.read)
def test_supernet_speed(session: Session, benchmark, job: Job, batch: int, provider: str) -> None:
    """One row: this job, batch and provider."""
    row = session.row((job.name, batch), provider, lambda: measure_job(session, job, batch))
    reason = replay(benchmark, row)
    if reason:
        (pytest.fail if broken(row) else pytest.skip)(reason)


def measure_job(session: Session, job: Job, batch: int) -> list[Row]:
    """All providers of a job on one batch."""
    if session.last_job != job.name:
        torch._dynamo.reset()  # one set of graphs serves both batches of a job, and no other job
        session.last_job = job.name
    gc.collect()  # graphs and networks of the group before
    if session.device == "cuda":
        torch.cuda.empty_cache()
    problem = build(session.size, batch, session.device)
    problem.supernet.train(job.training)
    candidates = {
        provider.name: partial(prepare, provider, job, problem, session.backend)
        for provider in providers(session.device)
    }
    gate = Gate(job.distance, job.tolerance, partial(loss_reached, problem) if job.sample else None)
    rows = compare(
        job.name,
        batch,
        candidates,
        gate,
        device=session.device,
        budget_seconds=session.budget_seconds,
        network=problem.supernet,
        sample_of=job.repeats,
        profiled=("rnas",) if session.device == "cpu" else (),
    )
    flops = batch * job.repeats * flops_per_image(job, problem) if job.countable else None
    for row in rows:
        row.flops = flops if row.status == MEASURED else None
    return rows


def flops_per_image(job: Job, problem: Problem) -> int:
    """Floating-point operations of the convolutions in one sample on one image, module by module."""
    single = problem.arranged(torch.contiguous_format).first_image()
    module_per_operation.use(single.supernet)  # a fused op shows no convolutions
    with measure.ConvolutionCounter() as counter:
        (job.sample or job.run)(single)
    return counter.total


def loss_reached(problem: Problem, images: list[Tensor]) -> float:
    """Mean cross entropy of the attacked images: what a whole attack is about."""
    with torch.no_grad():
        return float(cross_entropy(problem.supernet.eval()(images[0], problem.mixing()), problem.y))
