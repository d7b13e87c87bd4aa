"""A step before and after `rnas.accelerate`, of supernets in the styles of other code and of one cell of each."""

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
from one_cell import OneCell, seed_drop_path
from providers import Prepared
from report import CLOCK, Session, broken, replay
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rnas
from rnas.seeding import generator

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from supernets import darts, hooked, nasbench201, pcdarts, smooth  # noqa: E402

WHOLE, CELL = "accelerate, ", "accelerate one cell, "
BATCH = 64
STYLES: dict[str, Callable[..., nn.Module]] = {
    "DARTS": darts.build,
    "PC-DARTS": pcdarts.build,
    "a list of candidates per edge": smooth.build,
    "likewise, drop path": partial(smooth.build, edge_drop=0.2),
    "weights as attributes": partial(hooked.build, hooks=()),
    "NAS-Bench-201": nasbench201.build,
    "NAS-Bench-201, 8 samples, one hot": partial(nasbench201.build, mode="hard"),
    "NAS-Bench-201, 8 samples, chosen ones": partial(nasbench201.build, mode="chosen"),
}
LAYOUTS = {  # of the images and weights, and whether the model is accelerated
    "eager": (torch.contiguous_format, False),
    "channels_last": (torch.channels_last, False),
    "accelerate": (torch.contiguous_format, True),
    "accelerate_last": (torch.channels_last, True),
}


@pytest.mark.parametrize("provider", LAYOUTS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("what", [WHOLE, CELL])
@pytest.mark.benchmark(timer=CLOCK.read)
def test_accelerate_speed(session: Session, benchmark, what: str, style: str, provider: str):
    """One row: this style and provider."""
    batch = 2 if session.quick else BATCH
    row = session.row((what + style, batch), provider, lambda: measure_style(session, what, style, batch))
    reason = replay(benchmark, row)
    if reason:
        (pytest.fail if broken(row) else pytest.skip)(reason)


def measure_style(session: Session, what: str, style: str, batch: int) -> list[Row]:
    """All providers on one supernet, or on its first cell."""
    size, draw, samples = session.size, generator(0, "benchmark", style), 2 if session.quick else 8
    seeds = range(samples if "samples" in style else 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = STYLES[style](8 if session.quick else size.channels, 3 if session.quick else size.layers, 10)
    model = model.to(session.device).train()
    x = torch.rand(batch, 3, size.image, size.image, generator=draw).to(session.device)
    y = torch.randint(10, (batch,), generator=draw).to(session.device)
    if what == CELL:
        model = OneCell(model, x, seeds)
        prepare, share = partial(_prepare_cell, model), 1
    else:
        prepare, share = partial(_prepare, model, x, y, seeds), 3
    rows = compare(
        what + style,
        batch,
        {name: partial(prepare, *how) for name, how in LAYOUTS.items()},
        Gate(relative_error, GRADIENT_TOLERANCE),
        device=session.device,
        budget_seconds=share * session.budget_seconds,
        network=model,
    )
    with measure.ConvolutionCounter() as counter:
        prepare(*LAYOUTS["eager"]).run()
    for row in rows:
        row.flops = counter.total if row.status == MEASURED else None
    return rows


def _prepare(
    model: nn.Module, x: Tensor, y: Tensor, seeds: range, layout: torch.memory_format, accelerated: bool
) -> Prepared:
    model = copy.deepcopy(model).to(memory_format=layout)
    note = _accelerate(model) if accelerated else ""
    run = partial(_steps, model, _leaves(model), x.clone(memory_format=layout), y, seeds)
    return Prepared(run, run, run, note)


def _prepare_cell(cell: OneCell, layout: torch.memory_format, accelerated: bool) -> Prepared:
    cell = copy.deepcopy(cell).arranged(layout)
    note = _accelerate(cell) if accelerated else ""
    run = partial(cell.gradients, cell.leaves())
    return Prepared(run, run, run, note)


def _accelerate(model: nn.Module) -> str:
    left = rnas.accelerate(model).left
    return f"{len(left)} modules left as they are" if left else ""


def _leaves(model: nn.Module) -> list[Tensor]:
    """What an optimizer holds: weights and alpha, each once."""
    leaves = {id(each): each for each in (*model.parameters(), *model.arch_parameters())}
    return [each for each in leaves.values() if each.requires_grad]


def _steps(model: nn.Module, leaves: list[Tensor], x: Tensor, y: Tensor, seeds: range) -> list[Tensor]:
    """Gradients of the cross entropy to the leaves, a step for each seed: of the sample, where the style takes one."""
    found: list[Tensor | None] = []
    for seed in seeds:
        model.seed = seed
        seed_drop_path(seed, x.device)
        found += torch.autograd.grad(cross_entropy(model(x), y), leaves, allow_unused=True)
    return [each for each in found if each is not None]
