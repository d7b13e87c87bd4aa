"""AdvRush: the curvature where it is known in closed form, its exact gradient, when it counts, and a whole search."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

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

from rnas.config import SearchConfig
from rnas.methods import options_for
from rnas.methods.advrush import AdvRushOptions, curvature
from rnas.settings import set_value


@pytest.fixture
def config(search_config):
    def with_options(**options):
        return replace(search_config, method="advrush", options=AdvRushOptions(**options))

    return with_options


def quadratic(matrix: torch.Tensor, bias: torch.Tensor):
    """Logits whose cross entropy for class 0 is exactly q(x) = x'Ax/2 + b'x + 2: log(1 + e^-u) with u = -log(e^q - 1)."""

    def logits_of(x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        q = 0.5 * (flat @ matrix * flat).sum(dim=1) + flat @ bias + 2
        return torch.stack([-q.expm1().log(), torch.zeros_like(q)], dim=1)

    return logits_of


def draw_quadratic(count: int) -> tuple:
    torch.manual_seed(count)
    pixels = 2 * 3 * 3
    half = torch.randn(pixels, pixels, dtype=torch.float64)
    matrix = half @ half.T / pixels
    return torch.rand(count, 2, 3, 3, dtype=torch.float64), matrix, torch.randn(pixels, dtype=torch.float64) / 4


@pytest.mark.parametrize("count", [1, 3, 17])
@pytest.mark.parametrize("h", [0.1, 0.375])
def test_the_curvature_of_a_quadratic_is_that_of_its_matrix(count, h):
    x, matrix, bias = draw_quadratic(count)
    found = curvature(quadratic(matrix, bias), x, torch.zeros(count, dtype=torch.int64), h)
    expected = 0.0
    for image in x.flatten(1):
        z = h * (matrix @ image + bias).sign() / math.sqrt(image.numel())
        assert z.norm().item() == pytest.approx(h)
        expected += (matrix @ z).norm().item() / count
    assert found.item() == pytest.approx(expected, rel=1e-8)


def test_the_gradient_of_the_curvature_is_exact():
    """By the matrix of the quadratic: ||A s|| for fixed signs s has the gradient (A s) s' / ||A s||."""
    x, matrix, bias = draw_quadratic(1)
    matrix.requires_grad_()
    found = curvature(quadratic(matrix, bias), x, torch.zeros(1, dtype=torch.int64), 0.375)
    (gradient,) = torch.autograd.grad(found, matrix)
    with torch.no_grad():
        z = 0.375 * (matrix @ x.flatten() + bias).sign() / math.sqrt(x.numel())
        moved = matrix @ z
        # the form is symmetric in A whatever A is: x'Ax has the gradient (A + A')x / 2
        outer = torch.outer(moved, z) / moved.norm()
    torch.testing.assert_close(gradient, (outer + outer.T) / 2, rtol=1e-6, atol=1e-9)


def test_a_flat_image_has_no_curvature_and_a_finite_gradient():
    x, matrix, _ = draw_quadratic(2)
    x[0] = 0  # the gradient of x'Ax/2 is zero there, and so is its sign
    matrix.requires_grad_()
    logits_of = quadratic(matrix, torch.zeros(18, dtype=torch.float64))
    y = torch.zeros(2, dtype=torch.int64)
    found = curvature(logits_of, x, y, 0.375)
    assert found.item() == pytest.approx(curvature(logits_of, x[1:], y[1:], 0.375).item() / 2, rel=1e-10)
    assert torch.autograd.grad(found, matrix)[0].isfinite().all()


def curvature_by_hand(one, h: float) -> float:
    """One image after the other, on the supernet's running averages."""
    x, y = one.valid
    one.supernet.eval()
    norms = []
    for image, label in zip(x.split(1), y.split(1)):

        def gradient(at, label=label):
            at = at.clone().requires_grad_()
            logits = one.supernet(at, {name: w.detach() for name, w in one.method.mixing().items()})
            return torch.autograd.grad(F.cross_entropy(logits, label), at)[0]

        here = gradient(image)
        z = here.sign() / here.sign().norm() * h
        norms.append((gradient(image + z) - here).norm().item())
    one.supernet.train()
    return sum(norms) / len(norms)


def cross_entropy_by_hand(one) -> float:
    with torch.no_grad():  # in training mode: batch statistics
        return F.cross_entropy(one.supernet(one.valid[0], one.method.mixing()), one.valid[1]).item()


def frozen_averages(one):
    """Gives the supernet's averages back after forward passes in training mode."""
    kept = {name: value.clone() for name, value in one.supernet.named_buffers()}

    def restore() -> None:
        for name, value in one.supernet.named_buffers():
            value.copy_(kept[name])

    return restore


def test_the_architecture_gradient_is_that_of_loss_and_curvature(config):
    one = problem(config(gamma=5.0, start_epoch=0), images=3)
    restore = frozen_averages(one)
    result = one.architecture_step()

    def total(gamma: float = 5.0) -> float:
        value = gamma * curvature_by_hand(one, 0.375)
        value += cross_entropy_by_hand(one)
        restore()
        return value

    assert result.loss == pytest.approx(total(), rel=1e-9)
    assert result.numbers["architecture_curvature"] == pytest.approx(curvature_by_hand(one, 0.375), rel=1e-9)
    assert_gradients(one.method, total, per_parameter=2)
    with pytest.raises(AssertionError):  # without the curvature the gradient is another
        assert_gradients(one.method, lambda: total(0.0))


def test_the_gradient_on_batch_statistics_is_exact_too(config):
    one = problem(config(gamma=5.0, start_epoch=0, statistics="batch"), images=4)
    one.architecture_step()
    x, y = one.valid

    def total() -> float:
        def gradient(at):
            at = at.clone().requires_grad_()
            logits = one.supernet(at, {name: w.detach() for name, w in one.method.mixing().items()})
            return torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), at)[0]

        here = gradient(x)
        z = 0.375 * here.sign() / here.sign().flatten(1).norm(dim=1)[:, None, None, None]
        moved = (gradient(x + z) - here).flatten(1).norm(dim=1).mean().item()
        return cross_entropy_by_hand(one) + 5.0 * moved

    assert_gradients(one.method, total, per_parameter=2)


def test_the_curvature_counts_in_the_last_sixth_unless_told_otherwise(config):
    method = problem(config()).method
    for epochs in (1, 4, 6, 50, 60, 0):
        starts = [epoch for epoch in range(60) if method.is_curved(SimpleNamespace(epoch=epoch, epochs=epochs))]
        assert starts[0] == {1: 0, 4: 3, 6: 5, 50: 41, 60: 50, 0: 50}[epochs]


@pytest.mark.parametrize(("epoch", "counts"), [(0, False), (1, False), (2, True), (3, True)])
def test_the_curvature_counts_from_its_epoch_on(config, epoch, counts):
    one = problem(config(gamma=5.0, start_epoch=2), epoch=epoch)
    result = one.architecture_step()
    assert ("architecture_curvature" in result.numbers) == counts
    found = [p.grad for p in one.method.parameters()]
    loss = F.cross_entropy(one.supernet(one.valid[0], one.method.mixing()), one.valid[1])
    plain = torch.autograd.grad(loss, list(one.method.parameters()))
    for ours, theirs in zip(found, plain):
        same = (ours - theirs).norm() <= 1e-9 * theirs.norm()
        assert same != counts
    assert (result.loss == pytest.approx(loss.item(), rel=1e-9)) != counts


def test_both_levels_see_clean_images(config):
    assert all(batch.x_adv is None for batch in problem(config()).prepared())


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_the_architecture_step_moves_nothing_else(config, statistics):
    options = config(start_epoch=0, statistics=statistics)
    assert_step_leaves_the_supernet_alone(problem(options, dtype=torch.float32))


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_single_precision_gives_the_same_gradient(config, statistics):
    options = config(gamma=5.0, start_epoch=0, statistics=statistics)
    assert_single_precision_agrees(replace(options, channels=4))


def test_a_stopped_search_resumes_to_the_same_bits(config, tmp_path, monkeypatch):
    records = assert_resumes_to_the_same_bits(config(start_epoch=1), tmp_path, monkeypatch, batches=4)
    assert ["architecture_curvature" in record for record in records] == [False, True]
    assert records[1]["architecture_curvature"] > 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gamma", -0.01, "at least 0; got -0.01"),
        ("gamma", math.inf, "at least 0; got inf"),
        ("h", -1.0, "at least 0; got -1.0"),
        ("h", 0.0, "must be above 0"),
        ("start_epoch", -1, "at least 0; got -1"),
    ],
)
def test_bad_options_are_named(key, value, message):
    with pytest.raises(ValueError, match=rf"options\.{key} .*{message}"):
        AdvRushOptions(**{key: value})


@pytest.mark.parametrize("text", ["options.gama=1", "options.statistics=both", "options.gamma=-1"])
def test_bad_settings_are_refused(text):
    with pytest.raises(ValueError, match="options"):
        set_value(SearchConfig(options=options_for("advrush")), text)


def test_the_published_configuration_is_a_configuration():
    found = published_config("advrush")
    assert found.options == AdvRushOptions(start_epoch=50)
    assert (found.epochs, found.batch_size, found.options.start_epoch) == (60, 32, 50)
