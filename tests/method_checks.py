"""What the tests of the search methods share: a small search step, finite differences, and a resumed search."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import REPOSITORY, final_state
from torch import Tensor

from rnas import data, search, seeding
from rnas.config import AttackConfig, SearchConfig
from rnas.loop import Interrupted, Loop
from rnas.methods import Method, SearchStep, options_for
from rnas.settings import load_toml, merge
from rnas.supernet import Supernet


@dataclass
class Problem:
    """A supernet whose averages have moved, a method, and two batches (x, y), as a search step sees them."""

    supernet: Supernet
    method: Method
    step: SearchStep
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]

    def prepared(self) -> tuple:
        return (
            self.method.prepare(self.supernet, *self.train, self.step, "weights"),
            self.method.prepare(self.supernet, *self.valid, self.step, "architecture"),
        )

    def architecture_step(self):
        return self.method.architecture_step(self.supernet, *self.prepared(), self.step)


def problem(config: SearchConfig, *, dtype=torch.float64, epoch: int = 0, images: int = 8) -> Problem:
    """Its architecture parameters are drawn from N(0, 1), so that no weight is like another; batches of `images`."""
    dataset = data.load(config.data)
    supernet, method = search.build(config, dataset)
    supernet, method = supernet.to(dtype), method.to(dtype)
    batches = ((x.to(dtype), y) for x, y in data.batches(dataset.train, images, seed=0, epoch=0))
    train, valid = next(batches), next(batches)
    generator = seeding.generator(5, "architecture")
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        supernet.train()
        for _ in range(3):
            supernet(train[0], method.mixing(), method.edge_weights())
    attack = AttackConfig(epsilon=8 / 255, step_size=4 / 255, steps=2)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9)
    step = SearchStep(epoch, 0, attack, optimizer, lambda purpose: seeding.generator(0, purpose))
    return Problem(supernet, method, step, train, valid)


def assert_gradients(method: Method, value: Callable[[], float], *, per_parameter: int = 3, rel: float = 1e-4) -> None:
    """`.grad` of every parameter, at a few places, against central differences of `value`, which reads the method."""
    for name, parameter in method.named_parameters():
        flat = parameter.detach().view(-1)
        places = torch.randperm(len(flat), generator=seeding.generator(1, name))[:per_parameter]
        for place in places.tolist():
            kept, h = flat[place].item(), 1e-6
            flat[place] = kept + h
            above = value()
            flat[place] = kept - h
            below = value()
            flat[place] = kept
            found = parameter.grad.view(-1)[place].item()
            assert found == pytest.approx((above - below) / (2 * h), rel=rel, abs=1e-8), (name, place)


def assert_step_leaves_the_supernet_alone(one: Problem) -> None:
    """Weights, averages, flags and `.grad` of the supernet survive an architecture step, and the method gets its own."""

    def state() -> dict:
        held = {name: value.clone() for name, value in one.supernet.state_dict().items()}
        return held | {f"{name}.grad": p.grad.clone() for name, p in one.supernet.named_parameters()}

    for parameter in one.supernet.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, modes = state(), [module.training for module in one.supernet.modules()]
    parameters = {name: p.detach().clone() for name, p in one.method.named_parameters()}
    result = one.architecture_step()
    after = state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modes == [module.training for module in one.supernet.modules()]
    assert all(p.requires_grad for p in one.supernet.parameters())
    assert 0 <= result.accuracy <= 1
    for name, p in one.method.named_parameters():
        assert torch.equal(p, parameters[name])
        assert p.grad.isfinite().all() and p.grad.norm() > 0, name


def assert_single_precision_agrees(config: SearchConfig, **how) -> None:
    """The architecture gradient in float32, by the fused ops where they are built, is that in float64 to 1e-3."""
    exact, single = problem(config, **how), problem(config, dtype=torch.float32, **how)
    batches = [replace(b, x_adv=None if b.x_adv is None else b.x_adv.double()) for b in single.prepared()]
    batches = [replace(b, x=b.x.double()) for b in batches]
    exact.method.architecture_step(exact.supernet, *batches, exact.step)
    single.architecture_step()
    for (name, p), q in zip(exact.method.named_parameters(), single.method.parameters()):
        assert (p.grad - q.grad.double()).norm() <= 1e-3 * p.grad.norm(), name


def assert_resumes_to_the_same_bits(config: SearchConfig, tmp_path, monkeypatch, *, batches: int) -> dict:
    """A search stopped after `batches` batches goes on to the bits of an uninterrupted one; returns its records."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no pictures, which take longer than the search
    whole = search.search(config)
    stopped = replace(config, run=str(tmp_path / "stopped"))
    done, counted = Loop.done, []

    def stop(loop, images, **numbers):
        counted.append(images)
        loop.stop_requested = len(counted) == batches
        return done(loop, images, **numbers)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "done", stop)
        with pytest.raises(Interrupted):
            search.search(stopped)
    result = search.resume(stopped.run, quiet=True)
    first, second = final_state(whole.run), final_state(result.run)
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert result.genotype == whole.genotype
    return search.Run.open(whole.run, "search").read_metrics()


def published_config(method: str) -> SearchConfig:
    """The configuration in configs/ for a method, all of whose keys must exist."""
    return merge(SearchConfig(options=options_for(method)), load_toml(REPOSITORY / "configs" / f"{method}.toml"))
