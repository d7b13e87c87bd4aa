"""One step of the architecture by every search method, against plain DARTS on the same supernet."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from comparison import Gate, Row, compare
from problem import CLASSES, EPSILON, STEP_SIZE, STEPS
from providers import Prepared
from report import CLOCK, Session, broken, replay
from torch import Tensor

from rnas import seeding
from rnas.config import AttackConfig, WeightOptimizerConfig
from rnas.methods import METHODS, Batch, Method, SearchStep, options_for
from rnas.spaces import get_space
from rnas.supernet import Supernet

JOB = "architecture_step"
BATCH = 16
EPOCHS, EPOCH = 100, 60  # of the search: every method has left its warm-up and its first stage behind
STEPS_OF = {  # name of the row: the method, and the options that are not its defaults
    "darts": ("darts", {"adversarial": "none"}),
    "darts, second order": ("darts", {"adversarial": "none", "order": 2}),
    "darts, PGD-7": ("darts", {}),
    "pcdarts": ("pcdarts", {}),
    "advrush": ("advrush", {}),
    "rnas": ("rnas", {}),
    "rnas, PGD-7": ("rnas", {"inputs": "pgd"}),
    "racl": ("racl", {}),
    "dsrna, jacobian": ("dsrna", {}),
    "dsrna, jacobian of all classes": ("dsrna", {"estimator": "exact"}),
    "dsrna, certified on 1 image": ("dsrna", {"variant": "certified", "certified_images": 1}),
    "dsara, stage 1": ("dsara", {"stages": "one-adversarial"}),
    "dsara, stage 2": ("dsara", {}),
}


@pytest.mark.parametrize("name", STEPS_OF)
@pytest.mark.benchmark(timer=CLOCK.read)
def test_method_step_speed(session: Session, benchmark, name: str) -> None:
    """One row: this method."""
    row = session.row((JOB,), name, lambda: measure_steps(session))
    reason = replay(benchmark, row)
    if reason:
        (pytest.fail if broken(row) else pytest.skip)(reason)


def measure_steps(session: Session) -> list[Row]:
    """All methods on one batch of D_T and one of D_V."""
    return compare(
        JOB,
        2 if session.quick else BATCH,
        {name: partial(_prepare, session, *how) for name, how in STEPS_OF.items()},
        Gate(lambda found, _: float(found[0]), tolerance=0.0),  # they need not agree, but with numbers
        device=session.device,
        budget_seconds=2 * session.budget_seconds,
    )


def _prepare(session: Session, method_name: str, changes: dict) -> Prepared:
    size, quick = session.size, session.quick
    options = replace(options_for(method_name), **changes)
    space = get_space(METHODS[method_name].spaces[0] if METHODS[method_name].spaces else "darts")
    space = replace(space, nodes=size.nodes)
    method = METHODS[method_name](options, space, 0).to(session.device)
    torch.manual_seed(0)
    layers = max(size.layers, 4)  # the least that the space of DSARA can have
    supernet = Supernet(space, channels=size.channels, layers=layers, num_classes=CLASSES, partial=method.partial)
    supernet = supernet.to(session.device, memory_format=torch.channels_last).train()
    draw = seeding.generator(0, "benchmark", JOB)
    shape = (2, 3, 8, 8) if quick else (BATCH, 3, size.image, size.image)
    train, valid = (
        (torch.rand(shape, generator=draw).to(session.device), torch.randint(CLASSES, shape[:1], generator=draw))
        for _ in range(2)
    )
    with torch.no_grad():  # running statistics as a search has them
        for _ in range(3):
            method.logits(supernet, train[0])
    weights = WeightOptimizerConfig()
    step = SearchStep(
        epoch=EPOCH,
        index=0,
        attack=AttackConfig(epsilon=EPSILON, step_size=STEP_SIZE, steps=1 if quick else STEPS),
        weight_optimizer=torch.optim.SGD(
            supernet.parameters(), weights.learning_rate, weights.momentum, weight_decay=weights.weight_decay
        ),
        generator=seeding.purposes(0, EPOCH, 0, device=torch.device(session.device)),
        epochs=EPOCHS,
    )
    # The examples of D_T are made for the step of the weights; a second order only reads them.
    train = method.prepare(supernet, train[0], train[1].to(session.device), step, "weights")
    run = partial(_step, method, supernet, train, valid[0], valid[1].to(session.device), step)
    return Prepared(run, run, run)


def _step(method: Method, supernet: Supernet, train: Batch, x: Tensor, y: Tensor, step: SearchStep) -> list[Tensor]:
    """The examples of D_V, then the gradient. Returns how many of its numbers are not finite, or 1 if all are zero."""
    method.architecture_step(supernet, train, method.prepare(supernet, x, y, step, "architecture"), step)
    gradient = torch.cat([each.grad.flatten() for each in method.parameters() if each.grad is not None])
    bad = (~gradient.isfinite()).sum() + (gradient == 0).all()
    return [bad.double()]
