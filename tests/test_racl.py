"""RACL: the constraint and its gradient, the dual step, the bound's schedule, both derivations, whole searches."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY, final_state
from torch.nn.functional import cross_entropy

from rnas import attacks, data, search, seeding
from rnas.config import SearchConfig
from rnas.genotype import Genotype
from rnas.methods import SearchStep, options_for
from rnas.methods.racl import Racl, RaclOptions
from rnas.runs import load_tensors
from rnas.settings import load_toml, merge
from rnas.spaces import DARTS

TWO_NODES = replace(DARTS, nodes=2)
TYPES = [spec.cell_type for spec in TWO_NODES.layout(3, 4)]
TARGETS = [target - 2 for _, target in TWO_NODES.edges]


def constants(layers: int = 3) -> torch.Tensor:
    """Random lambda (L, E, K) of the order of those of a network; `none` 0."""
    found = 0.5 + 3 * torch.rand(layers, 5, 8, dtype=torch.float64)
    found[:, :, 0] = 0
    return found


def randomise(method: Racl, size: float = 0.3) -> Racl:
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(size * torch.randn_like(parameter))
    return method


def make_step(config, optimizer=None, epoch: int = 0, epochs: int = 5) -> SearchStep:
    attack = replace(config.attack, epsilon=8 / 255, step_size=2 / 255)
    return SearchStep(epoch, 0, attack, optimizer, lambda purpose: seeding.generator(epoch, purpose), epochs)


@pytest.fixture
def level(search_config):
    """A supernet, its optimizer and two batches, as a search step sees them."""
    dataset = data.load(search_config.data)
    supernet, _ = search.build(search_config, dataset)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9)
    batches = data.batches(dataset.train, 16, seed=0, epoch=0)
    return supernet.train(), optimizer, next(batches), next(batches)


def sampled_log_lambda(method: Racl, lambdas: torch.Tensor, count: int) -> torch.Tensor:
    """ln lambda_F of sampled architectures, by its definition; every cell its own sample or one per type."""
    source, total, kept = torch.Generator().manual_seed(0), 0.0, {}
    for index, cell_type in enumerate(TYPES):
        if method.options.cells == "independent" or cell_type not in kept:
            draws = []
            for parameter in (method.alpha[cell_type], method.beta[cell_type]):
                mu, covariance = parameter.log_normal()
                z = torch.randn(count, len(mu), generator=source, dtype=torch.float64)
                draws.append((mu + z @ torch.linalg.cholesky(covariance).T).exp().detach())
            kept[cell_type] = draws
        alpha, beta = kept[cell_type]
        edges = beta * (alpha.view(count, 5, 8) * lambdas[index].double()).sum(2)
        for node in (0, 1):
            total = total + edges[:, [target == node for target in TARGETS]].sum(1).log()
    return total


def test_alpha_and_beta_start_uniform_and_are_means_outside_of_a_step():
    method = Racl(RaclOptions(), DARTS, 0)
    raised = math.exp(0.1**2 / 2)
    for name, weights in method.mixing().items():
        torch.testing.assert_close(weights, torch.full((14, 8), raised / 8))
        incoming = torch.tensor([2.0] * 2 + [3.0] * 3 + [4.0] * 4 + [5.0] * 5)
        torch.testing.assert_close(method.edge_weights()[name], raised / incoming)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_step_samples_once_for_both_levels(search_config, covariance):
    method = randomise(Racl(RaclOptions(covariance=covariance), TWO_NODES, 0))
    mean, step = method.mixing()["normal"], make_step(search_config)
    samples = []
    for each in (step, step, make_step(search_config, epoch=1)):
        with method.sampled(method.draw(each.generator("sample"))):
            samples.append((method.mixing()["normal"], method.edge_weights()["reduction"]))
    assert torch.equal(samples[0][0], samples[1][0]) and torch.equal(samples[0][1], samples[1][1])
    assert not torch.equal(samples[0][0], samples[2][0]) and not torch.equal(samples[0][1], samples[2][1])
    assert not torch.equal(samples[0][0], mean) and torch.equal(method.mixing()["normal"], mean)
    assert all((weights > 0).all() for pair in samples for weights in pair)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("cells", ["independent", "shared"])
def test_the_quantile_is_that_of_samples_and_its_gradient_that_of_finite_differences(covariance, cells):
    method = randomise(Racl(RaclOptions(covariance=covariance, cells=cells), TWO_NODES, 0).double())
    lambdas = constants()
    quantile = method.quantile(lambdas)
    samples = sampled_log_lambda(method, lambdas, 100_000)
    assert float((samples <= quantile).double().mean()) == pytest.approx(0.9, abs=0.01)
    parameters = list(method.parameters())
    gradients = torch.autograd.grad(quantile, parameters)
    for parameter, gradient in zip(parameters, gradients):
        direction, h = torch.randn_like(parameter), 1e-5
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * h * direction
                values.append(float(method.quantile(lambdas)))
            parameter += h * direction
        expected = (values[0] - values[1]) / (2 * h)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_the_architecture_step_moves_nothing_but_its_own_gradients(search_config, level, statistics, covariance):
    supernet, optimizer, train, valid = level
    method = Racl(RaclOptions(statistics=statistics, covariance=covariance), TWO_NODES, 0)
    step = make_step(search_config, optimizer)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    modes = [module.training for module in supernet.modules()]
    batches = [method.prepare(supernet, *batch, step, name) for batch, name in ((train, "weights"), (valid, "both"))]
    result = method.architecture_step(supernet, *batches, step)
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())
    assert modes == [module.training for module in supernet.modules()]
    assert all(p.requires_grad and p.grad is None for p in supernet.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.norm() > 0 for p in method.parameters())
    assert set(result.numbers) == {
        "constraint", "confidence", "log_lipschitz_quantile", "log_lipschitz_bound", "theta", "sigma", "input_gradient"
    }  # fmt: skip
    assert all(math.isfinite(value) for value in (result.loss, *result.numbers.values()))
    assert result.numbers["sigma"] == pytest.approx(0.1) and result.numbers["input_gradient"] > 0


def test_the_gradient_is_that_of_the_augmented_lagrangian(search_config, level):
    """In float64 against central differences of the whole objective, written out by its definition."""
    supernet, optimizer, _, (x, y) = level
    supernet, x = supernet.double(), x.double()
    options = RaclOptions(zeta=0.5, rho=0.3, bound_start=0.5, bound_end=0.5, power_iterations=1)
    method = Racl(options, TWO_NODES, 0).double()
    method.theta.fill_(0.7)
    step = make_step(search_config, optimizer)
    batch = method.prepare(supernet, x, y, step, "architecture")
    result = method.architecture_step(supernet, batch, batch, step)
    lambdas, bound = method.lipschitz.values.clone(), result.numbers["log_lipschitz_bound"]
    assert result.numbers["constraint"] > 0.1
    samples = sampled_log_lambda(method, lambdas, 100_000)
    assert result.numbers["confidence"] == pytest.approx(float((samples <= bound).double().mean()), abs=0.01)
    assert result.numbers["confidence"] < 0.9 and "raise options.rho (now 0.3)" in method.remarks()[0]

    def objective() -> float:
        with method.sampled(method.draw(step.generator("sample"))), attacks.frozen(supernet):
            images = x.clone().requires_grad_()
            logits = supernet(images, method.mixing(), method.edge_weights())
            loss = cross_entropy(logits, y)
            (grad_x,) = torch.autograd.grad(loss, images)
        lengths = len(x) * grad_x.flatten(1).norm(dim=1)
        g = method.quantile(lambdas).item() - bound
        return loss.item() + 0.5 * float(lengths.mean()) + 0.7 * g + 0.15 * max(0.0, g) ** 2

    for parameter in (method.alpha["normal"].mu_offset, method.beta["reduction"].log_sigma_offset):
        direction, h, values = torch.randn_like(parameter), 1e-6, []
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * h * direction
                with torch.enable_grad():
                    values.append(objective())
            parameter += h * direction
        expected = (values[0] - values[1]) / (2 * h)
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, rel=1e-4)
    g = result.numbers["constraint"]
    assert float(method.theta) == pytest.approx(0.7 + 0.3 * g)
    method.theta.fill_(0.0)
    with torch.no_grad():
        for alpha in method.alpha.values():
            alpha.mu_offset -= 3.0
    numbers = method.architecture_step(supernet, batch, batch, step).numbers
    assert numbers["constraint"] < 0 and numbers["confidence"] > 0.9
    assert float(method.theta) == 0 and method.remarks() == []


@pytest.mark.parametrize(("start", "ends"), [(10.0, (9.0, 7.0)), (-10.0, (-11.0, -13.0))])
def test_the_bound_tightens_linearly_whatever_its_sign(search_config, start, ends):
    method = Racl(RaclOptions(), TWO_NODES, 0)
    found = [method.log_bound(start if epoch == 15 else 99.0, make_step(search_config, None, epoch, 50))
             for epoch in range(15, 50)]  # fmt: skip
    assert found[0] == pytest.approx(ends[0]) and found[-1] == pytest.approx(ends[1])
    steps = [a - b for a, b in zip(found, found[1:])]
    assert min(steps) == pytest.approx(max(steps)) and min(steps) > 0 and found[0] < start
    unknown = Racl(RaclOptions(), TWO_NODES, 0)
    assert {unknown.log_bound(start, make_step(search_config, None, e, 0)) for e in (3, 9)} == {found[0]}


def test_the_score_is_beta_times_the_strongest_alpha():
    method = Racl(RaclOptions(), TWO_NODES, 0)
    alpha, beta = method.alpha["normal"].mu_offset, method.beta["normal"].mu_offset
    with torch.no_grad():
        alpha[:, 0] = 5.0  # `none`
        alpha[2, 4], alpha[3, 5], alpha[4, 6] = 1.0, 1.2, 1.4
        beta[3] = -1.0
    assert method.genotype().cells["normal"][1] == (("sep_conv_3x3", 0), ("dil_conv_3x3", 2))
    with torch.no_grad():
        method.alpha["normal"].log_sigma_offset[3, 7] = 2.5  # exp(s^2 / 2) counts: E[alpha], not the median
        beta[3] = 0.0
    assert method.genotype().cells["normal"][1] != (("sep_conv_3x3", 0), ("dil_conv_3x3", 2))


def test_the_sampled_derivation_prefers_the_smallest_quantile(search_config, level):
    supernet, _, _, _ = level
    options = RaclOptions(derive="sampled", samples=40, sigma=0.5)
    method = Racl(options, TWO_NODES, 0)
    assert isinstance(method.genotype(), Genotype)  # by the score: no lambda is known
    lambdas = constants()
    lambdas[:, :, 1:] = 4.0
    lambdas[:, :, 3] = 1e-3  # skip connections
    method.lipschitz._keep("last", lambdas)
    found = method.genotype()
    assert found == method.genotype() and found != Racl(options, TWO_NODES, 0).genotype()

    def skips(genotype: Genotype) -> int:
        return sum(name == "skip_connect" for nodes in genotype.cells.values() for node in nodes for name, _ in node)

    few = Racl(replace(options, samples=1), TWO_NODES, 0)
    few.lipschitz._keep("last", lambdas)
    assert skips(found) > 0
    quantiles = [float(each.quantile(each.kept_constants(each.genotype(), lambdas))) for each in (method, few)]
    assert quantiles[0] < quantiles[1]


def test_the_kept_constants_are_those_of_the_genotype():
    method, lambdas = Racl(RaclOptions(), TWO_NODES, 0), constants()
    genotype = method.genotype()
    kept = method.kept_constants(genotype, lambdas)
    assert int((kept > 0).sum()) == 3 * 4
    for index, cell_type in enumerate(TYPES):
        for node, pairs in enumerate(genotype.cells[cell_type]):
            for name, source in pairs:
                place = (index, TWO_NODES.edges.index((source, 2 + node)), DARTS.primitives.index(name))
                assert kept[place] == lambdas[place]


@pytest.mark.parametrize(("adversarial", "levels"), [("none", (0, 0)), ("weights", (1, 0)), ("both", (1, 1))])
def test_the_named_levels_see_pgd_examples(search_config, level, adversarial, levels):
    supernet, optimizer, train, _ = level
    method = Racl(RaclOptions(adversarial=adversarial), TWO_NODES, 0)
    for name, attacked in zip(("weights", "architecture"), levels):
        batch = method.prepare(supernet, *train, make_step(search_config, optimizer), name)
        assert (batch.x_adv is not None) == attacked
        if attacked:
            assert 0 < (batch.x_adv - batch.x).abs().max() <= 8 / 255 + 1e-7


BAD = {
    "eta": (0.0, 1.0, 1.5, math.nan),
    "zeta": (-0.1, math.inf),
    "rho": (0.0, -1.0),
    "bound_start": (0.0, -1.0),
    "bound_end": (0.95, 0.0),
    "log_sigma_min": (0.5, math.nan),
    "sigma": (0.001, 2.0),
    "covariance": ("block",),
    "cells": ("apart",),
    "derive": ("best",),
    "adversarial": ("all",),
    "power_iterations": (0,),
    "samples": (0,),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name):
    for value in BAD[name]:
        with pytest.raises(ValueError, match=rf"^{name} must be .*; got {value}|^{name} must be .*; got '{value}'"):
            RaclOptions(**{name: value})


@pytest.fixture
def racl_config(search_config, monkeypatch) -> SearchConfig:
    """A search of three epochs, the first without the architecture, that draws no pictures: they take longer."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    return replace(search_config, method="racl", options=options_for("racl"), layers=3, warmup_epochs=1, epochs=3)


def test_the_recommended_configuration_is_valid():
    values = load_toml(REPOSITORY / "configs" / "racl.toml")
    config = merge(SearchConfig(options=options_for("racl")), values)
    assert (config.method, config.warmup_epochs, config.batch_size) == ("racl", 15, 128)
    assert config.weights.learning_rate == 0.1 and config.architecture.learning_rate == 6e-4


@pytest.mark.parametrize("cells", ["independent", "shared"])
def test_the_constraint_holds_at_the_end_with_the_confidence_it_reports(racl_config, cells):
    options = RaclOptions(rho=5.0, bound_start=1.0, bound_end=0.9, cells=cells, zeta=0.0)
    architecture = replace(racl_config.architecture, learning_rate=0.02)
    result = search.search(replace(racl_config, options=options, epochs=14, architecture=architecture))
    assert result.remarks == () and not (result.run / "remarks.txt").exists()
    records = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert "constraint" not in records[0] and records[1]["constraint"] > -1 and records[-1]["constraint"] <= 0
    method = Racl(options, TWO_NODES, 0)
    method.load_state_dict(load_tensors(result.run / "checkpoint.pt")["parts"]["method"])
    bound = records[-1]["log_lipschitz_bound"]
    assert bound < method.start_quantile
    lambdas = method.lipschitz.values
    assert float(method.quantile(lambdas)) <= bound
    held = float((sampled_log_lambda(method, lambdas, 100_000) <= bound).double().mean())
    assert held >= 0.9 - 0.01
    fresh = sampled_log_lambda(Racl(options, TWO_NODES, 0), lambdas, 20_000)
    assert float((fresh <= bound).double().mean()) < 0.9 - 0.01, "the untrained distribution must not hold it"


def test_a_constraint_that_does_not_hold_is_said_by_the_result_the_run_and_a_resumed_one(
    racl_config, tmp_path, monkeypatch
):
    options = RaclOptions(rho=1e-4, bound_start=0.5, bound_end=0.5, first_power_iterations=20)
    config, steps, step = replace(racl_config, options=options), [], Racl.architecture_step

    def watched(method, *arguments):
        steps.append(step(method, *arguments))
        return steps[-1]

    monkeypatch.setattr(Racl, "architecture_step", watched)
    whole = search.search(config)
    last = steps[-1].numbers
    assert last["constraint"] > 0 and len(steps) == 6
    (remark,) = whole.remarks
    assert f"g = {last['constraint']:.3g} above 0" in remark and f"= {last['confidence']:.3g} where" in remark
    assert f"<= {last['log_lipschitz_bound']:.4g})" in remark and "options.eta asks for 0.9" in remark
    assert (whole.run / "remarks.txt").read_text() == remark + "\n" and whole.run / "remarks.txt" in whole.files
    with monkeypatch.context() as patch:
        stop_after(patch, 9)  # all batches: nothing but the checkpoint knows the last step
        with pytest.raises(search.Interrupted):
            search.search(replace(config, run=str(tmp_path / "stopped")))
    assert not (tmp_path / "stopped" / "remarks.txt").exists()
    assert search.resume(tmp_path / "stopped", quiet=True).remarks == whole.remarks


def test_a_checkpoint_without_the_last_constraint_still_loads():
    method = Racl(RaclOptions(), TWO_NODES, 0)
    state = {name: value for name, value in method.state_dict().items() if name != "last_constraint"}
    Racl(RaclOptions(), TWO_NODES, 1).load_state_dict(state)
    del state["theta"]
    with pytest.raises(RuntimeError, match="theta"):
        Racl(RaclOptions(), TWO_NODES, 1).load_state_dict(state)


@pytest.mark.parametrize(
    "options",
    [
        RaclOptions(first_power_iterations=20),
        RaclOptions(
            first_power_iterations=20, covariance="full", derive="sampled", statistics="batch", adversarial="both"
        ),
    ],
    ids=["defaults", "others"],
)
def test_a_stopped_search_resumes_to_the_same_bits(racl_config, tmp_path, monkeypatch, options):
    config = replace(racl_config, options=options)
    whole = search.search(config)
    for batches in (2, 5):  # in the warm-up, when no vector of a power iteration exists, and within a searching epoch
        stopped = replace(config, run=str(tmp_path / f"stopped-{batches}"))
        with monkeypatch.context() as patch:
            stop_after(patch, batches)
            with pytest.raises(search.Interrupted):
                search.search(stopped)
        result = search.resume(stopped.run, quiet=True)
        first, again = final_state(whole.run), final_state(result.run)
        assert first.keys() == again.keys() and "/method/lipschitz.last" in first
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        assert result.genotype == whole.genotype


def stop_after(monkeypatch, batches: int) -> None:
    left, done = [batches], search.Loop.done

    def counted(loop, images, **numbers):
        left[0] -= 1
        loop.stop_requested = left[0] == 0
        return done(loop, images, **numbers)

    monkeypatch.setattr(search.Loop, "done", counted)
