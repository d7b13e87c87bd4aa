"""DSRNA with the certificate itself, where test_dsrna.py has a stand-in: gradients, and a search."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from rnas import attacks, seeding
from rnas.certify import certified_margin
from rnas.config import AttackConfig
from rnas.methods.dsrna import Dsrna, DsrnaOptions
from rnas.methods.method import Batch, SearchStep
from rnas.search import search
from rnas.spaces import DARTS
from rnas.supernet import Supernet

SPACE = replace(DARTS, nodes=2)
EPSILON = 1e-3


@pytest.fixture(scope="module")
def level():
    """A float64 supernet with running statistics as after some training, and a batch of images."""
    torch.manual_seed(3)
    net = Supernet(SPACE, channels=2, layers=3, num_classes=3).double()
    valid = Batch(torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.randint(3, (4,)))
    mixing = {name: torch.full((5, 8), 1 / 8, dtype=torch.float64) for name in SPACE.cell_types}
    with torch.no_grad():
        for _ in range(10):
            net(valid.x, mixing)
    return net, valid


def make(**options) -> Dsrna:
    """With operations that weigh differently, so that alpha matters."""
    options = {"variant": "certified", "epsilon": EPSILON, "epsilon_ramp": 0.0, "certified_images": 3} | options
    method = Dsrna(DsrnaOptions(**options), SPACE, 0).double()
    with torch.no_grad():
        for name, alpha in method.alpha.items():
            alpha.copy_(torch.randn(alpha.shape, generator=seeding.generator(1, name), dtype=alpha.dtype))
    return method


def make_step() -> SearchStep:
    attack = AttackConfig(epsilon=8 / 255, step_size=2 / 255, steps=1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    return SearchStep(0, 0, attack, optimizer, seeding.purposes(0, 0, 0), epochs=10)


def measure(net: Supernet, method: Dsrna, valid: Batch) -> float:
    """R_cb by definition."""
    with attacks.frozen(net), torch.no_grad():
        margins = certified_margin(net, method.mixing(), valid.x[:3], valid.y[:3], EPSILON)
    found = []
    for row, y in zip(margins.tolist(), valid.y.tolist()):
        highest = max(-m for k, m in enumerate(row) if k != y)
        soft = -highest - math.log(sum(math.exp(-m - highest) for k, m in enumerate(row) if k != y))
        found.append(math.copysign(math.log1p(abs(soft)), soft))
    return sum(found) / len(found)


def test_the_measure_and_its_gradient_are_those_of_the_certified_margins(level):
    net, valid = level
    method = make(gamma=0.5)
    result = method.architecture_step(net, None, valid, make_step())

    def objective() -> float:
        with attacks.frozen(net, statistics="batch"), torch.no_grad():
            loss = cross_entropy(net(valid.x, method.mixing()), valid.y).item()
        return loss - 0.5 * measure(net, method, valid)

    assert result.loss == pytest.approx(objective(), rel=1e-9)
    assert result.numbers["certified"] == pytest.approx(measure(net, method, valid), rel=1e-9)
    for name, alpha in method.alpha.items():
        direction = torch.randn(alpha.shape, generator=seeding.generator(2, name), dtype=alpha.dtype)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                alpha += sign * 1e-6 * direction
            values.append(objective())
            with torch.no_grad():
                alpha -= sign * 1e-6 * direction
        expected = (values[0] - values[1]) / 2e-6
        assert float((alpha.grad * direction).sum()) == pytest.approx(expected, rel=1e-3)


def test_a_float32_supernet_is_certified_in_float64(level):
    net, valid = level
    single = Supernet(SPACE, channels=2, layers=3, num_classes=3)
    single.load_state_dict(net.state_dict())
    single.eval()
    net.eval()
    exact, _ = make().robustness(net, valid, make_step())
    method = make().float()
    found, _ = method.robustness(single, Batch(valid.x.float(), valid.y), make_step())
    assert found.dtype == torch.float64 and found.item() == pytest.approx(exact.item(), rel=1e-4)
    gradients = torch.autograd.grad(found, list(method.parameters()))
    assert all(gradient.dtype == torch.float32 and bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("variant", ["certified", "combined"])
def test_a_search_with_the_certificate_ends_with_finite_numbers(search_config, tmp_path, variant):
    options = DsrnaOptions(variant=variant, epsilon=EPSILON, epsilon_ramp=0.0, certified_images=2, gamma=1.0)
    config = replace(search_config, method="dsrna", options=options, run=str(tmp_path / "run"), quiet=True)
    found = search(config)
    assert (found.run / "genotype.json").is_file()
    text = (found.run / "metrics.jsonl").read_text()
    assert '"certified"' in text and "NaN" not in text
