"""Certified margins of whole networks: sound against attacks, tight where theory says so, differentiable, checked."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from certify_problems import CLASSES, draw, excess, give_statistics, margin, smallest_margin
from torch import nn

from rnas import attacks
from rnas.certify import certified_epsilon, certified_margin, fixed, layers, linear, relaxation
from rnas.genotype import published
from rnas.network import Network
from rnas.seeding import generator
from rnas.spaces import DARTS
from rnas.supernet import FixedMixture, Supernet

ROUNDING = 1e-9  # relative, in float64
NETWORKS = 24


@pytest.mark.parametrize("chunk", range(4))
def test_sound_against_attacks(chunk):
    """No margin that PGD or a random corner reaches lies below its bound; some come near it, so the test can fail."""
    nearest = 0.0
    for seed in range(chunk, NETWORKS, 4):
        problem = draw(seed)
        bound, reached = problem.bound().detach(), smallest_margin(problem, seed, steps=10, restarts=1)
        assert excess(bound, reached) < ROUNDING, f"seed {seed}"
        others, clean = torch.isfinite(reached), problem.margin(problem.x).detach()
        nearest = max(nearest, float((clean - reached)[others].max() / (clean - bound)[others].max()))
        assert (bound >= problem.bound(method="interval")).all(), f"seed {seed}"
    assert nearest > 0.5


def test_sound_against_a_stronger_attack():
    for seed in range(1000, 1001):
        problem = draw(seed)
        assert excess(problem.bound().detach(), smallest_margin(problem, seed, steps=100, restarts=2)) < ROUNDING


@pytest.mark.parametrize("partial", [2, 4])
def test_sound_with_partial_channels(partial):
    for seed in range(2):
        problem = draw(seed, partial=partial)
        assert excess(problem.bound().detach(), smallest_margin(problem, seed, steps=10, restarts=1)) < ROUNDING
        torch.testing.assert_close(problem.bound(epsilon=0.0), problem.margin(problem.x))


def test_negative_weights_are_sound():
    """Mixing weights of both signs: the magnitudes, not the signs, multiply the radii."""
    for seed in range(2):
        problem = draw(seed)
        problem.mixing = {name: -weights if seed % 2 else weights - 0.2 for name, weights in problem.mixing.items()}
        assert excess(problem.bound().detach(), smallest_margin(problem, seed, steps=10, restarts=1)) < ROUNDING


def test_exact_without_a_ball():
    for seed in range(5):
        problem = draw(seed)
        torch.testing.assert_close(problem.bound(epsilon=0.0), problem.margin(problem.x))
        torch.testing.assert_close(problem.bound(epsilon=0.0, method="interval"), problem.margin(problem.x))


def test_a_small_ball_is_bounded_by_the_gradient():
    """Where no sign changes the margin is linear: the bound is the margin less epsilon times its gradient's norm."""
    for norm, dual in {"linf": 1, "l2": 2}.items():
        problem = draw(3, norm=norm)
        x = problem.x.clamp(0.1, 0.9).requires_grad_()
        problem.x, epsilon = x.detach(), 1e-11
        clean = problem.margin(x)
        for t in range(CLASSES):
            for n in range(len(x)):
                if t != problem.y[n]:
                    row = torch.autograd.grad(clean[n, t], x, retain_graph=True)[0]
                    expected = row.norm(p=dual)
                    found = (clean - problem.bound(epsilon=epsilon))[n, t].detach() / epsilon
                    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_exact_for_linear_networks(norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.AvgPool2d(3, 1, 1), nn.Flatten(), nn.Linear(36, 3)]
    network = nn.Sequential(*layers).double().eval()
    x, y, epsilon = torch.rand(3, 2, 6, 6).double().requires_grad_(), torch.tensor([0, 2, 1]), 0.2
    found = certified_margin(network, None, x.detach(), y, epsilon, norm=norm, lower=None, upper=None)
    clean = margin(network(x), y)
    for n in range(3):
        for t in set(range(3)) - {int(y[n])}:
            row = torch.autograd.grad(clean[n, t], x, retain_graph=True)[0]
            torch.testing.assert_close(found[n, t], clean[n, t] - epsilon * row.norm(p=1 if norm == "linf" else 2))


def test_derived_network():
    """A published genotype: exact without a ball, sound in one; FixedMixture gives what its supernet does."""
    torch.manual_seed(0)
    rng = generator(0)
    network = Network(published()["RACL"], channels=2, layers=3, num_classes=3, auxiliary=True).double()
    x, y = torch.rand(2, 3, 8, 8).double(), torch.tensor([0, 2])
    give_statistics(network, x, network, rng, 4.0)
    torch.testing.assert_close(certified_margin(network, None, x, y, 0.0), margin(network(x), y))
    for epsilon in (1e-5, 1e-3):
        x_adv = attacks.pgd(network, x, y, epsilon=epsilon, step_size=epsilon / 4, steps=20, loss="margin")
        bound = certified_margin(network, None, x, y, epsilon)
        assert excess(bound.detach(), margin(network(x_adv), y).detach()) < ROUNDING
    problem = draw(0, edge_weights=None)
    model = FixedMixture(problem.supernet, problem.mixing)
    expected = problem.bound(epsilon=1e-3, norm="linf", relu_slope="adaptive")
    assert torch.equal(certified_margin(model, None, problem.x, problem.y, 1e-3), expected)


@pytest.mark.parametrize("seed", [1, 2])
def test_gradients_are_finite_differences(seed):
    """To mixing, edge weights, and parameters, in random directions; the same with memory saved."""
    problem = draw(seed, epsilon=1e-3)
    rng = generator(seed, "directions")
    mixing = {name: weights.requires_grad_() for name, weights in problem.mixing.items()}
    shape = len(problem.supernet.space.edges)
    problem.edge_weights = {name: torch.rand(shape, generator=rng).double().requires_grad_() for name in mixing}
    groups = [list(mixing.values()), list(problem.edge_weights.values()), list(problem.supernet.parameters())]
    weights = torch.rand(len(problem.x), CLASSES, generator=rng).double()

    def value(**options):
        bound = problem.bound(**options)
        return (weights * bound)[torch.isfinite(bound)].sum()

    gradients = torch.autograd.grad(value(), sum(groups, []), materialize_grads=True)
    again = torch.autograd.grad(value(save_memory=True), sum(groups, []), materialize_grads=True)
    for one, two in zip(gradients, again):
        torch.testing.assert_close(one, two)
    # Where the weights need no derivative the convolutions take another path.
    problem.supernet.requires_grad_(False)
    alone = torch.autograd.grad(value(), groups[0], materialize_grads=True)
    for one, two in zip(alone, gradients):
        torch.testing.assert_close(one, two)
    start = 0
    for group in groups:
        directions = [torch.randn(each.shape, generator=rng).double() * each.detach().abs() for each in group]
        expected = sum(float((g * d).sum()) for g, d in zip(gradients[start:], directions))
        values = []
        with torch.no_grad():
            for step in (1e-7, -1e-7):
                for each, direction in zip(group, directions):
                    each.add_(step * direction)
                values.append(float(value()))
                for each, direction in zip(group, directions):
                    each.sub_(step * direction)
        start += len(group)
        assert math.isclose((values[0] - values[1]) / 2e-7, expected, rel_tol=1e-3)


def test_bisection():
    problem = draw(7, norm="linf")
    logits = problem.supernet(problem.x, problem.mixing, problem.edge_weights)
    options = {"norm": "linf", "edge_weights": problem.edge_weights}

    def search(y, **more):
        return certified_epsilon(problem.supernet, problem.mixing, problem.x, y, **(options | more))

    right, wrong = logits.argmax(dim=1), logits.argmin(dim=1)
    largest = 1.0
    found = search(right, largest=largest, steps=30)
    assert (found > 0).all() and (found < largest).all()
    assert (search(wrong, largest=largest, steps=3) == 0).all()

    def certified(epsilon):
        bound = certified_margin(problem.supernet, problem.mixing, problem.x, right, epsilon, **options)
        return (bound > 0).all(dim=1)

    assert certified(found).all()
    assert not certified(found + largest * 2.0**-30).any()
    assert torch.equal(search(right, largest=float(found.min()) / 2), torch.full_like(found, float(found.min()) / 2))
    coarse = search(right, largest=largest, steps=8)
    assert (coarse <= found).all() and (found - coarse <= largest * 2.0**-8).all()
    assert (search(right, largest=largest, steps=30, method="interval") <= found).all()
    with pytest.raises(ValueError, match="steps"):
        search(right, largest=0.1, steps=0)


def test_float32_violations_are_rounding():
    """The bounds of float32 images and weights exceed those of float64 by rounding alone."""
    for seed in range(4):
        problem = draw(seed)
        double = problem.bound().detach()
        problem.supernet, problem.x, problem.epsilon = (
            problem.supernet.float(),
            problem.x.float(),
            problem.epsilon.float(),
        )
        problem.mixing = {name: weights.float() for name, weights in problem.mixing.items()}
        single = problem.bound().detach().double()
        others = torch.isfinite(double)
        size = double[others].abs().max() + 1
        assert ((single - double)[others].max() / size) < 1e-4


def test_out_of_range_is_minus_infinity():
    problem = draw(0)
    network = problem.supernet.float()
    with torch.no_grad():
        network.stem[0].weight.mul_(1e38)
        network.classifier.weight.mul_(1e6)
    x, mixing = problem.x.float(), {name: weights.float() for name, weights in problem.mixing.items()}
    bound = certified_margin(network, mixing, x, problem.y, 0.1)
    assert (bound.gather(1, problem.y[:, None]) == math.inf).all()
    assert (bound.scatter(1, problem.y[:, None], -math.inf) == -math.inf).all()


def test_leaves_the_network_alone():
    problem = draw(0)
    before = {name: value.clone() for name, value in problem.supernet.state_dict().items()}
    problem.bound()
    assert all(torch.equal(value, before[name]) for name, value in problem.supernet.state_dict().items())
    assert all(parameter.grad is None for parameter in problem.supernet.parameters())


PLANTED = {
    "radius too small": lambda patch: patch.setattr(
        "rnas.certify.interval.Interval.radius", property(lambda bounds: 0.4 * (bounds.upper - bounds.lower))
    ),
    "relu constant forgotten": lambda patch: patch.setattr(
        relaxation, "products", lambda rows, values: rows.new_zeros(rows.shape[:2])
    ),
    "divisor of padding": lambda patch: patch.setattr(
        fixed.AvgPool, "_options", property(lambda pool: (pool.kernel, pool.stride, pool.padding, False, True, None))
    ),
    "statistics of training": lambda patch: patch.setitem(
        layers.RULES, nn.BatchNorm2d, lambda norm, slope: [linear.Scale(torch.ones_like(norm.running_var))]
    ),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_caught(error, monkeypatch):
    PLANTED[error](monkeypatch)
    for seed in range(12):
        problem = draw(seed)
        # The smaller ball comes nearest to the bounds.
        problem.epsilon = problem.epsilon.clamp(max=1e-5)
        if excess(problem.bound().detach(), smallest_margin(problem, seed, steps=10, restarts=1)) > ROUNDING:
            return
    pytest.fail("the soundness test is blind to it")


def test_errors():
    problem = draw(0, edge_weights=None, norm="linf")
    supernet, mixing, x, y = problem.supernet, problem.mixing, problem.x, problem.y
    with pytest.raises(ValueError, match="relu_slope must be one of"):
        problem.bound(relu_slope="parallel")
    with pytest.raises(ValueError, match="method must be one of"):
        problem.bound(method="crown")
    with pytest.raises(ValueError, match="norm must be one of"):
        problem.bound(norm="l1")
    with pytest.raises(ValueError, match="epsilon must be finite"):
        problem.bound(epsilon=-0.1)
    with pytest.raises(ValueError, match=r"must lie in \[lower, upper\]"):
        certified_margin(supernet, mixing, x + 1, y, 0.1)
    with pytest.raises(ValueError, match="labels must be below the number of logits, 3"):
        certified_margin(supernet, mixing, x, y + 3, 0.1)
    with pytest.raises(ValueError, match="mixing needs the cell types"):
        certified_margin(supernet, None, x, y, 0.1)
    with pytest.raises(ValueError, match="mixing of .* must have shape"):
        certified_margin(supernet, {name: weights[1:] for name, weights in mixing.items()}, x, y, 0.1)
    with pytest.raises(ValueError, match="must be finite"):
        certified_margin(supernet, {name: weights * math.nan for name, weights in mixing.items()}, x, y, 0.1)
    with pytest.raises(ValueError, match="edge_weights of .* must have shape"):
        certified_margin(supernet, mixing, x, y, 0.1, edge_weights={name: torch.ones(99) for name in mixing})
    with pytest.raises(ValueError, match="a FixedMixture has its own"):
        certified_margin(FixedMixture(supernet, mixing), mixing, x, y, 0.1)
    with pytest.raises(ValueError, match="only a Supernet takes mixing"):
        certified_margin(nn.Sequential(nn.Flatten()).eval(), mixing, x, y, 0.1)
    with pytest.raises(ValueError, match="no bounds are known for a Sigmoid"):
        certified_margin(nn.Sequential(nn.Sigmoid()).eval(), None, x, y, 0.1)
    with attacks.frozen(supernet, statistics="batch"), pytest.raises(ValueError, match="in training mode"):
        problem.bound()
    supernet.cells[0].train()
    with pytest.raises(ValueError, match="cells.0 is in training mode"):
        problem.bound()
    plain = Supernet(replace(DARTS, nodes=1), channels=2, layers=3, num_classes=3).eval()
    plain.stem[1].running_mean = plain.stem[1].running_var = None
    with pytest.raises(ValueError, match="stem.1 uses those of the batch"):
        certified_margin(plain, mixing, x, y, 0.1)
