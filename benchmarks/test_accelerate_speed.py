"""`rnas.accelerate` on supernets in the styles of other code: a training step before and after."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measure
import pytest
import torch
from comparison import MEASURED, Gate, Row, compare
from jobs import GRADIENT_TOLERANCE, relative_error
from providers import Prepared
from report import CLOCK, Session, broken, replay
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rnas
from rnas.seeding import generator

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from supernets import darts, hooked, nasbench201, pcdarts, smooth  # noqa: E402

PREFIX = "accelerate, "
BATCH = 64
STYLES: dict[str, Callable[..., nn.Module]] = {
    "DARTS": darts.build,
    "PC-DARTS": pcdarts.build,
    "a list of candidates per edge": smooth.build,
    "weights as attributes": partial(hooked.build, hooks=()),
    "NAS-Bench-201": nasbench201.build,
    "NAS-Bench-201, one hot": partial(nasbench201.build, mode="hard"),
    "NAS-Bench-201, chosen ones": partial(nasbench201.build, mode="chosen"),
}
LAYOUTS = {  # of the images and weights, and whether the model is accelerated
    "eager": (torch.contiguous_format, False),
    "channels_last": (torch.channels_last, False),
    "accelerate": (torch.contiguous_format, True),
    "accelerate_last": (torch.channels_last, True),
}


@pytest.mark.parametrize("provider", LAYOUTS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.benchmark(timer=CLOCK.read)
def test_accelerate_speed(session: Session, benchmark, style: str, provider: str):
    """One row: this style and provider."""
    batch = 2 if session.quick else BATCH
    row = session.row((PREFIX + style, batch), provider, lambda: measure_style(session, style, batch))
    reason = replay(benchmark, row)
    if reason:
        (pytest.fail if broken(row) else pytest.skip)(reason)


def measure_style(session: Session, style: str, batch: int) -> list[Row]:
    """All providers on one supernet."""
    size, draw = session.size, generator(0, "benchmark", style)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = STYLES[style](8 if session.quick else size.channels, 3 if session.quick else size.layers, 10)
    model = model.to(session.device).train()
    x = torch.rand(batch, 3, size.image, size.image, generator=draw).to(session.device)
    y = torch.randint(10, (batch,), generator=draw).to(session.device)
    rows = compare(
        PREFIX + style,
        batch,
        {name: partial(_prepare, model, x, y, *how) for name, how in LAYOUTS.items()},
        Gate(relative_error, GRADIENT_TOLERANCE),
        device=session.device,
        budget_seconds=3 * session.budget_seconds,
        network=model,
    )
    with measure.ConvolutionCounter() as counter:
        _step(model, _leaves(model), x[:2], y[:2])
    for row in rows:
        row.flops = batch * counter.total // 2 if row.status == MEASURED else None
    return rows


def _prepare(model: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format, accelerated: bool) -> Prepared:
    model, note = copy.deepcopy(model).to(memory_format=layout), ""
    if accelerated:
        report = rnas.accelerate(model)
        note = "" if not report.left else f"{len(report.left)} modules left as they are"
    run = partial(_step, model, _leaves(model), x.clone(memory_format=layout), y)
    return Prepared(run, run, run, note)


def _leaves(model: nn.Module) -> list[Tensor]:
    """What an optimizer holds: weights and alpha, each once."""
    leaves = {id(each): each for each in (*model.parameters(), *model.arch_parameters())}
    return [each for each in leaves.values() if each.requires_grad]


def _step(model: nn.Module, leaves: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """Gradients of the cross entropy to the leaves."""
    torch.manual_seed(0)
    found = torch.autograd.grad(cross_entropy(model(x), y), leaves, allow_unused=True)
    return [each for each in found if each is not None]
