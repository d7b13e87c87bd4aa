"""`rnas.kernels.mixed_op`, one mixed edge by itself, on the widths and sizes that search spaces use."""

from __future__ import annotations

from functools import partial

import measure
import module_per_operation
import pytest
import torch
from comparison import MEASURED, Gate, Row, compare
from conftest import device_of
from jobs import GRADIENT_TOLERANCE, relative_error
from providers import Prepared
from report import CLOCK, Session, broken, replay
from torch import Tensor

from rnas.seeding import generator
from rnas.spaces import DARTS
from rnas.supernet import MixedOperation

WIDTHS = (16, 24, 36, 48, 64)
SIZES = ((28, 28), (8, 8), (33, 17))
BATCHES, CUDA_BATCHES = (64,), (256, 64)
PROVIDERS = ("eager", "channels_last", "rnas")
CUDA_PROVIDERS = (*PROVIDERS, "channels_last_bf16", "rnas_bf16")
CUDA_WIDTHS, CUDA_SIZES = (16, 36), SIZES[:1]  # of a search, and of the networks that are trained
MODES = ("training", "attack")  # all gradients on batch statistics; the gradient to the images on fixed ones


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = device_of(metafunc.config)
    widths, sizes = (CUDA_WIDTHS, CUDA_SIZES) if device == "cuda" else (WIDTHS, SIZES)
    if metafunc.config.getoption("--quick"):
        widths, sizes = widths[:2], sizes[-2:]
    metafunc.parametrize("provider", _providers(device))
    metafunc.parametrize("batch", CUDA_BATCHES if device == "cuda" else BATCHES)
    metafunc.parametrize("size", sizes, ids=lambda size: f"{size[0]}x{size[1]}")
    metafunc.parametrize("channels", widths)
    metafunc.parametrize("mode", MODES)


@pytest.mark.benchmark(timer=CLOCK.read)
def test_mixed_op_speed(
    session: Session, benchmark, mode: str, channels: int, size: tuple[int, int], batch: int, provider: str
):
    """One row: this width, size, batch and provider."""
    job = f"mixed_edge_{mode}_{channels}_{size[0]}x{size[1]}"
    batch = 2 if session.quick else batch
    row = session.row((job, batch), provider, lambda: measure_edge(session, job, mode, channels, size, batch))
    reason = replay(benchmark, row)
    if reason:
        (pytest.fail if broken(row) else pytest.skip)(reason)


def _providers(device: str) -> tuple[str, ...]:
    return CUDA_PROVIDERS if device == "cuda" else PROVIDERS


def measure_edge(
    session: Session, job: str, mode: str, channels: int, size: tuple[int, int], batch: int
) -> list[Row]:
    """All providers on one edge."""
    draw = generator(0, "benchmark", job)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        edge = MixedOperation(DARTS.primitives, channels, stride=1)
    x, grad_out = torch.randn(2, batch, channels, *size, generator=draw)
    weights = torch.randn(len(DARTS.primitives), generator=draw).softmax(0)
    edge, x, grad_out, weights = (each.to(session.device) for each in (edge, x, grad_out, weights))
    edge(x, weights)  # so that the running statistics are those of some images
    edge.train(mode == "training")
    rows = compare(
        job,
        batch,
        {name: partial(_prepare, name, mode, edge, x, weights, grad_out) for name in _providers(session.device)},
        Gate(relative_error, GRADIENT_TOLERANCE),
        device=session.device,
        budget_seconds=session.budget_seconds / 10,
        network=edge,
    )
    with measure.ConvolutionCounter() as counter:
        _gradients("eager", mode, edge, x[:1], weights, grad_out[:1])
    for row in rows:
        row.flops = batch * counter.total if row.status == MEASURED else None
    return rows


def _prepare(provider: str, mode: str, edge: MixedOperation, x: Tensor, weights: Tensor, grad_out: Tensor) -> Prepared:
    layout = torch.contiguous_format if provider == "eager" else torch.channels_last
    x, grad_out = (each.clone(memory_format=layout) for each in (x, grad_out))
    run = partial(_gradients, provider, mode, edge, x, weights, grad_out)
    return Prepared(run, run, run, autocast=torch.bfloat16 if provider.endswith("_bf16") else None)


def _gradients(provider: str, mode: str, edge: MixedOperation, x: Tensor, weights: Tensor, grad_out: Tensor):
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_(mode == "training")
    parameters = list(edge.parameters()) if mode == "training" else []
    edge.requires_grad_(mode == "training")
    fused = provider.startswith("rnas")
    with torch.autocast(x.device.type, torch.bfloat16, enabled=provider.endswith("_bf16")):
        out = edge(x, weights) if fused else module_per_operation.edge(edge, x, weights.unbind())
    wanted = [x, *parameters, *([weights] if mode == "training" else [])]
    return list(torch.autograd.grad(out, wanted, grad_out.to(out.dtype)))
