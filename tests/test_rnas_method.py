"""RNAS: its regularisers, its noise, one forward for both halves, its gradients, and a whole search."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from method_checks import (
    assert_gradients,
    assert_resumes_to_the_same_bits,
    assert_single_precision_agrees,
    assert_step_leaves_the_supernet_alone,
    problem,
    published_config,
)
from torch.nn import functional as F

from rnas import attacks, seeding
from rnas.config import SearchConfig
from rnas.consistency import CONSISTENCIES, kl
from rnas.methods import options_for
from rnas.methods.rnas import RnasOptions, noisy
from rnas.settings import set_value


@pytest.fixture
def config(search_config):
    def with_options(**options):
        return replace(search_config, method="rnas", options=RnasOptions(**options))

    return with_options


# ---- regularisers ----------------------------------------------------------------------------------------------------


def by_hand(name: str, clean: list, perturbed: list, labels: list) -> float:
    """One image and one class after the other."""
    total = 0.0
    for a, b, label in zip(clean, perturbed, labels):
        p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (a, b))
        total += {
            "kl": sum(pk * math.log(pk / qk) for pk, qk in zip(p, q)),
            "squared": sum((u - v) ** 2 for u, v in zip(a, b)),
            "cross_entropy": -math.log(q[label]),
        }[name]
    return total / len(labels)


def draw_logits(count: int = 5, classes: int = 4) -> tuple:
    torch.manual_seed(count)
    clean, perturbed = (2 * torch.randn(count, classes, dtype=torch.float64) for _ in range(2))
    return clean, perturbed, torch.randint(classes, (count,))


@pytest.mark.parametrize("name", CONSISTENCIES)
@pytest.mark.parametrize("count", [1, 3, 17])
def test_a_regulariser_is_its_definition(name, count):
    clean, perturbed, y = draw_logits(count)
    expected = by_hand(name, clean.tolist(), perturbed.tolist(), y.tolist())
    assert CONSISTENCIES[name](clean, perturbed, y).item() == pytest.approx(expected, rel=1e-12)
    swapped = CONSISTENCIES[name](perturbed, clean, y).item()
    assert (swapped == pytest.approx(expected, rel=1e-3)) == (name == "squared"), "clean comes first"


@pytest.mark.parametrize("name", CONSISTENCIES)
def test_a_regulariser_is_differentiated_in_both_answers(name):
    clean, perturbed, y = draw_logits()
    clean.requires_grad_(), perturbed.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: CONSISTENCIES[name](a, b, y), (clean, perturbed))
    gradients = torch.autograd.grad(
        CONSISTENCIES[name](clean, perturbed, y), (clean, perturbed), allow_unused=True, materialize_grads=True
    )
    assert gradients[1].norm() > 0.01
    assert (gradients[0].norm() > 0.01) == (name != "cross_entropy")


def test_equal_answers_cost_nothing_and_sure_ones_stay_finite():
    clean, _, y = draw_logits()
    assert kl(clean, clean, y) == 0
    sure = torch.tensor([[500.0, -500.0]], requires_grad=True)
    loss = kl(sure, -sure, y[:1])
    assert loss.item() == 1000.0
    assert torch.autograd.grad(loss, sure)[0].isfinite().all()


# ---- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_noise_stays_in_the_range_of_pixels_and_in_its_ball(noise, norm):
    x = torch.rand(17, 3, 5, 7, generator=seeding.generator(0, "x"))
    x[0], x[1] = 0.0, 1.0
    scale = 8 / 255 if norm == "linf" else 0.5
    x_n = noisy(x, scale, noise, norm, seeding.generator(0, "noise"))
    assert x_n.min() >= 0 and x_n.max() <= 1 and (x_n[:2] != x[:2]).any()
    moved = (x_n - x).flatten(1)
    if noise == "uniform":
        lengths = moved.abs().amax(dim=1) if norm == "linf" else moved.norm(dim=1)
        assert 0.5 * scale < lengths.max() <= scale * (1 + 1e-5)
    assert torch.equal(x_n, noisy(x, scale, noise, norm, seeding.generator(0, "noise")))
    assert not torch.equal(x_n, noisy(x, scale, noise, norm, seeding.generator(1, "noise")))


def test_the_size_of_the_noise_is_its_scale():
    x = torch.full((64, 3, 16, 16), 0.5)

    def drawn(noise, norm, scale):
        return noisy(x, scale, noise, norm, seeding.generator(0, "noise")) - x

    uniform, gaussian = drawn("uniform", "linf", 0.1), drawn("gaussian", "linf", 0.1)
    assert uniform.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.02)
    assert gaussian.std().item() == pytest.approx(0.1, rel=0.02) and gaussian.abs().max() > 0.3
    length = drawn("gaussian", "l2", 0.5).flatten(1).square().sum(dim=1).mean().sqrt()
    assert length.item() == pytest.approx(0.5, rel=0.02)


def test_the_scale_is_epsilon_unless_given(config):
    for scale, expected in ((None, 8 / 255), (0.1, 0.1)):
        one = problem(config(noise_scale=scale))
        for batch in one.prepared():
            assert (batch.x_adv - batch.x).abs().max().item() == pytest.approx(expected, rel=0.02)


def test_each_level_has_its_own_noise(config):
    one = problem(config())
    first, again = (one.method.prepare(one.supernet, *one.train, one.step, "weights") for _ in range(2))
    other = one.method.prepare(one.supernet, *one.train, one.step, "architecture")
    assert torch.equal(first.x_adv, again.x_adv) and not torch.equal(first.x_adv, other.x_adv)


def test_pgd_may_take_the_place_of_noise(config):
    one = problem(config(inputs="pgd"))
    for batch, purpose in zip(one.prepared(), ("attack-weights", "attack-architecture")):
        classifier = one.method.classifier(one.supernet)
        expected = attacks.perturb(classifier, batch.x, batch.y, one.step.attack, generator=one.step.generator(purpose))
        assert torch.equal(batch.x_adv, expected) and not torch.equal(batch.x_adv, batch.x)


# ---- levels ----------------------------------------------------------------------------------------------------------


class Calls:
    """Counts the images of every forward pass of a supernet."""

    def __init__(self, supernet) -> None:
        self.images = []
        supernet.register_forward_pre_hook(lambda module, inputs: self.images.append(len(inputs[0])))

    def since(self) -> list:
        found, self.images = self.images, []
        return found


def test_both_halves_go_through_one_forward(config):
    one = problem(config())
    calls = Calls(one.supernet)
    train, valid = one.prepared()
    assert calls.since() == [], "noise does not look at the supernet"
    one.method.architecture_step(one.supernet, train, valid, one.step)
    assert calls.since() == [16]
    one.method.weight_loss(one.supernet, train, one.step)
    assert calls.since() == [16]
    attacked = problem(config(inputs="pgd"))
    calls = Calls(attacked.supernet)
    attacked.prepared()
    assert calls.since() == [8] * 2 * attacked.step.attack.steps


def test_both_halves_share_their_batch_statistics(config):
    one = problem(config())
    train, _ = one.prepared()
    convolution, norm = one.supernet.stem
    before = norm.running_mean.clone()
    one.method.weight_loss(one.supernet, train, one.step)

    def expected(x):
        y = F.conv2d(one.supernet.normalize(x), convolution.weight, padding=1)
        return 0.9 * before + 0.1 * y.mean(dim=(0, 2, 3))

    torch.testing.assert_close(norm.running_mean, expected(torch.cat([train.x, train.x_adv])))
    assert (norm.running_mean - expected(train.x)).norm() > 1e-4 * norm.running_mean.norm(), "the clean half alone"


def objective(one, batch, name: str, weight: float) -> float:
    """CE(f(x), y) + lambda R(x, x_n) with the supernet in training mode, by hand."""
    with torch.no_grad():
        logits = one.supernet(torch.cat([batch.x, batch.x_adv]), one.method.mixing()).tolist()
    clean, moved, labels = logits[: len(batch.y)], logits[len(batch.y) :], batch.y.tolist()
    return by_hand("cross_entropy", clean, clean, labels) + weight * by_hand(name, clean, moved, labels)


@pytest.mark.parametrize("name", CONSISTENCIES)
def test_the_architecture_gradient_is_that_of_the_objective(config, name):
    one = problem(config(regulariser=name, weight=20.0, noise_scale=0.2))
    result = one.architecture_step()
    _, valid = one.prepared()
    assert result.loss == pytest.approx(objective(one, valid, name, 20.0), rel=1e-10)
    assert_gradients(one.method, lambda: objective(one, valid, name, 20.0))
    with pytest.raises(AssertionError):  # without the regulariser the gradient is another
        assert_gradients(one.method, lambda: objective(one, valid, name, 0.0))


def test_loss_accuracy_and_numbers_say_what_they_mean(config):
    one = problem(config(weight=3.0, noise_scale=0.9))
    train, valid = one.prepared()
    result = one.method.architecture_step(one.supernet, train, valid, one.step)
    with torch.no_grad():
        logits = one.supernet(torch.cat([valid.x, valid.x_adv]), one.method.mixing())
    clean, moved = logits.chunk(2)
    assert result.accuracy == (clean.argmax(1) == valid.y).double().mean().item()
    assert result.numbers["architecture_perturbed_accuracy"] == (moved.argmax(1) == valid.y).double().mean().item()
    assert result.loss == pytest.approx(
        F.cross_entropy(clean, valid.y).item() + 3.0 * result.numbers["architecture_regulariser"]
    )
    loss, returned = one.method.weight_loss(one.supernet, train, one.step)
    assert returned.shape == (8, 4)
    assert loss.item() == pytest.approx(objective(one, train, "kl", 3.0), rel=1e-10)


def test_the_regulariser_may_act_on_the_architecture_alone(config):
    one = problem(config(levels="architecture", weight=3.0))
    train, valid = one.prepared()
    assert train.x_adv is None and valid.x_adv is not None
    loss, logits = one.method.weight_loss(one.supernet, train, one.step)
    with torch.no_grad():
        expected = one.supernet(train.x, one.method.mixing())
    torch.testing.assert_close(logits.detach(), expected)
    assert loss.item() == pytest.approx(F.cross_entropy(expected, train.y).item(), rel=1e-10)
    result = one.method.architecture_step(one.supernet, train, valid, one.step)
    assert result.loss == pytest.approx(objective(one, valid, "kl", 3.0), rel=1e-10)


@pytest.mark.parametrize("inputs", ["noise", "pgd"])
def test_the_architecture_step_moves_nothing_else(config, inputs):
    assert_step_leaves_the_supernet_alone(problem(config(inputs=inputs), dtype=torch.float32))


def test_single_precision_gives_the_same_gradient(config):
    assert_single_precision_agrees(replace(config(weight=5.0), channels=4))


# ---- the job ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"inputs": "pgd", "levels": "architecture", "regulariser": "squared"}])
def test_a_stopped_search_resumes_to_the_same_bits(config, tmp_path, monkeypatch, options):
    records = assert_resumes_to_the_same_bits(config(**options), tmp_path, monkeypatch, batches=4)
    for record in records:
        assert record["architecture_regulariser"] > 0 and 0 <= record["architecture_perturbed_accuracy"] <= 1


@pytest.mark.parametrize(("key", "value"), [("weight", -1.0), ("weight", math.nan), ("noise_scale", -0.1)])
def test_bad_options_are_named(key, value):
    with pytest.raises(ValueError, match=rf"options\.{key} must be a finite number of at least 0; got {value}"):
        RnasOptions(**{key: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("options.regulariser=kld", "'kl' or 'squared' or 'cross_entropy'"),
        ("options.inputs=fgsm", "'noise' or 'pgd'"),
        ("options.lambda=2", "unknown configuration key 'options.lambda'"),
        ("options.weight=-2", r"options\.weight must be"),
    ],
)
def test_bad_settings_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        set_value(SearchConfig(options=options_for("rnas")), text)


def test_noise_wider_than_the_pixel_range_is_refused(config):
    with pytest.raises(ValueError, match="options.noise_scale is in pixel units"):
        problem(config(noise_scale=8.0)).prepared()


def test_the_published_configuration_is_a_configuration():
    found = published_config("rnas")
    assert found.options == RnasOptions() and (found.warmup_epochs, found.attack.epsilon) == (15, 8 / 255)
