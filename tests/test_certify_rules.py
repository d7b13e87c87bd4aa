"""Each rule of the certified bounds by itself, in float64, against samples of the interval that it starts from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rnas import operations
from rnas.certify import fixed, interval, layers, linear, relaxation, tape
from rnas.seeding import generator

ROUNDING = 1e-10
LINEAR = {  # name: module, shape of one image
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6)),
    "strided": (lambda: nn.Conv2d(3, 4, 3, 2, padding=1), (3, 7, 6)),
    "strided by 3": (lambda: nn.Conv2d(3, 4, 3, 3, padding=0), (3, 8, 10)),
    "pointwise": (lambda: nn.Conv2d(3, 5, 1, bias=False), (3, 3, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 5, padding=2, groups=4), (4, 5, 3)),
    "dilated": (lambda: nn.Conv2d(3, 3, 5, padding=4, dilation=2, groups=3), (3, 7, 6)),
    "dilated, strided": (lambda: nn.Conv2d(3, 3, 3, 2, 2, dilation=2, groups=3), (3, 8, 7)),
    "dilated 5x5, strided": (lambda: nn.Conv2d(2, 2, 5, 2, 4, dilation=2, groups=2), (2, 5, 8)),
    "more padding than reach": (lambda: nn.Conv2d(3, 3, 1, padding=1), (3, 4, 4)),
    "multiplier": (lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2), (2, 5, 5)),
    "conv and norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (3, 5, 5)),
    "norm": (lambda: nn.BatchNorm2d(3), (3, 4, 4)),
    "normalize": (lambda: operations.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), (3, 4, 4)),
    "avg pool": (lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False), (3, 5, 4)),
    "avg pool, strided": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), (3, 6, 7)),
    "avg pool with padding": (lambda: nn.AvgPool2d(2, 2, 1), (3, 5, 4)),
    "avg pool, ceil": (lambda: nn.AvgPool2d(3, 2, 0, ceil_mode=True), (2, 6, 5)),
    "global average": (lambda: nn.AdaptiveAvgPool2d(1), (3, 4, 5)),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2)),
    "norm of features": (lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)), (3, 2, 2)),
    "none": (lambda: operations.Zero(2), (3, 5, 4)),
    "identity": (lambda: nn.Sequential(nn.Identity(), nn.Dropout(), nn.Flatten()), (3, 2, 2)),
}
CURVED = {
    "relu": (lambda: nn.ReLU(), (3, 4, 4)),
    "max pool": (lambda: nn.MaxPool2d(3, 1, 1), (3, 5, 4)),
    "max pool, strided": (lambda: nn.MaxPool2d(3, 2, 1), (3, 6, 7)),
    "max pool 2x2, ceil": (lambda: nn.MaxPool2d(2, 2, ceil_mode=True), (3, 5, 7)),
    "max pool 3x2": (lambda: nn.MaxPool2d((3, 2), (2, 1), (1, 0)), (2, 5, 4)),
    "reduce": (lambda: operations.FactorizedReduce(3, 4, affine=True), (3, 6, 4)),
    "reduce, odd": (lambda: operations.FactorizedReduce(3, 5, affine=False), (3, 5, 7)),
    "reduce, one channel": (lambda: operations.FactorizedReduce(1, 1, affine=False), (1, 3, 4)),
    "separable": (lambda: operations.SeparableConv(3, 2, True, kernel_size=3, dilation=1, depth=2), (3, 5, 6)),
    "relu, conv, norm": (lambda: operations.ReLUConvBN(3, 2, affine=True), (3, 3, 3)),
}


def draw(case: str, seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The module of a case with random numbers everywhere, and a random interval of two images."""
    build, shape = (LINEAR | CURVED)[case]
    rng = generator(seed, case)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build().double().eval()
    for each in module.modules():
        if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d):
            each.running_mean.copy_(torch.randn(each.num_features, generator=rng))
            each.running_var.copy_(torch.rand(each.num_features, generator=rng) + 0.1)
            if each.affine:
                nn.init.normal_(each.weight, generator=rng)
                nn.init.normal_(each.bias, generator=rng)
    center = torch.randn(2, *shape, generator=rng, dtype=torch.float64)
    radius = torch.rand(2, *shape, generator=rng, dtype=torch.float64) ** 2
    radius = radius * (torch.rand(radius.shape, generator=rng) < 0.8)  # some elements are known
    return module, center - radius, center + radius


def samples(lower, upper, rng, count=40):
    """Values of the interval, half of them corners of it."""
    for index in range(count):
        share = torch.rand(lower.shape, generator=rng, dtype=torch.float64)
        yield lower + (share if index % 2 else share.round()) * (upper - lower)


def least(values, coefficients):
    return (coefficients.unflatten(0, (3, 2)) * values).flatten(2).sum(dim=2).flatten()


def check(case: str, seed: int, slope: str = "adaptive") -> float:
    """Bounds hold at samples. Returns the smallest gap between the linear bound and what it bounds, over all samples."""
    module, lower, upper = draw(case, seed)
    rng = generator(seed, case, "samples")
    record = tape.Tape()
    source = record.input(interval.Interval(lower, upper))
    output = record.chain(layers.steps_of(module, slope), source)
    a = torch.randn(6, *output.bounds.shape, generator=rng, dtype=torch.float64)
    coefficients, constant = record.back(a, output, source)
    smallest = torch.inf
    with torch.no_grad():
        for x in samples(lower, upper, rng):
            y = module(x)
            assert y.shape == output.bounds.lower.shape
            assert (y >= output.bounds.lower - ROUNDING).all(), "below the lower bound"
            assert (y <= output.bounds.upper + ROUNDING).all(), "above the upper bound"
            gap = least(y, a) - least(x, coefficients) - constant
            assert (gap >= -ROUNDING).all(), "above the linear bound's quantity"
            if case in LINEAR:
                assert (gap <= ROUNDING).all(), "a linear map is its own bound"
            smallest = min(smallest, float(gap.min()))
    return smallest


@pytest.mark.parametrize("case", LINEAR)
def test_linear_rules_are_equalities(case):
    for seed in range(2):
        check(case, seed)


@pytest.mark.parametrize("slope", relaxation.SLOPES)
@pytest.mark.parametrize("case", CURVED)
def test_curved_rules_hold_everywhere(case, slope):
    for seed in range(2):
        check(case, seed, slope)


@pytest.mark.parametrize("case", ["conv", "dilated", "strided", "avg pool", "linear", "reduce, odd"])
def test_interval_is_the_smallest(case):
    """Each bound of a linear map, and of one behind a ReLU, is reached at the corner that its row's signs name."""
    module, lower, upper = draw(case, 0)
    record = tape.Tape()
    output = record.chain(layers.steps_of(module), record.input(interval.Interval(lower, upper))).bounds
    for place in range(output.lower[0].numel()):
        # Where a ReLU passes anything: at the upper end, as far as it is open at all.
        x = upper.clone().requires_grad_()
        row = torch.autograd.grad(module(x).flatten(1)[:, place].sum(), x)[0]
        corner = torch.where(row > 0, lower, upper)
        torch.testing.assert_close(module(corner).flatten(1)[:, place], output.lower.flatten(1)[:, place])


def test_relu_lines():
    """Slopes and intercepts of the upper line at hand-computed intervals, and both choices of the lower line."""
    bounds = interval.Interval(
        torch.tensor([[-1.0, -3.0, 1.0, -2.0, 0.0]]).double(), torch.tensor([[3.0, 1.0, 2.0, -1.0, 0.0]]).double()
    )
    for slope, below in {"adaptive": [1.0, 0.0, 1.0, 0.0, 1.0], "cnn-cert": [0.75, 0.25, 1.0, 0.0, 1.0]}.items():
        step = relaxation.ReLU(slope)
        lower, constant = step.pull(torch.ones(1, 5).double(), bounds)
        assert lower.tolist() == [below] and constant.item() == 0
        upper, constant = step.pull(-torch.ones(1, 5).double(), bounds)
        assert (-upper).tolist() == [[0.75, 0.25, 1.0, 0.0, 1.0]] and -constant.item() == 0.75 + 0.75


def test_max_pool_is_exact_where_the_winner_is_certain():
    """A window whose largest pixel is known passes its coefficients of both signs on; another passes only positive."""
    lower = torch.tensor([[[[5.0, 0.0, 0.0, 0.0]]]]).double()
    upper = torch.tensor([[[[6.0, 1.0, 1.0, 2.0]]]]).double()
    pool = relaxation.MaxPool((1, 2), (1, 2))
    coefficients, constant = pool.pull(-torch.ones(1, 1, 1, 2).double(), interval.Interval(lower, upper))
    assert coefficients.flatten().tolist() == [-1.0, 0.0, 0.0, 0.0] and constant.item() == -2.0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ball_minimum_is_reached(norm):
    """Without a box the minimum is the closed form at its own minimiser; with one it is not above any sample."""
    rng = generator(0, norm)
    x, a = torch.rand(2, 3, 2, 2, generator=rng).double(), torch.randn(6, 3, 2, 2, generator=rng).double()
    epsilon = torch.tensor([0.1, 0.5 if norm == "linf" else 5.0]).double().view(2, 1, 1, 1)
    rows = a.unflatten(0, (3, 2))
    direction = rows.sign() if norm == "linf" else rows / rows.flatten(2).norm(dim=2)[..., None, None, None]
    found = interval.Ball(x, epsilon, norm, None, None).minimum(a)
    torch.testing.assert_close(found, (rows * (x - epsilon * direction)).flatten(2).sum(dim=2).flatten())
    boxed = interval.Ball(x, epsilon, norm, 0.0, 1.0).minimum(a)
    assert (boxed >= found).all() and (boxed > found).any()
    reached = (rows * (x - epsilon * direction).clamp(0, 1)).flatten(2).sum(dim=2).flatten()
    assert (boxed <= reached + ROUNDING).all()


def shift_factorized_reduce(monkeypatch):
    rule = layers.RULES[operations.FactorizedReduce]

    def wrong(module, slope):
        relu, conv = rule(module, slope)
        return [relu, linear.Conv(conv.weight.flip(2, 3), conv.constant, stride=(2, 2), even=True)]

    monkeypatch.setitem(layers.RULES, operations.FactorizedReduce, wrong)


def swap_relu_bounds(monkeypatch):
    pull = relaxation.ReLU.pull
    swapped = lambda self, a, bounds: pull(self, a, interval.Interval(-bounds.upper, -bounds.lower))  # noqa: E731
    monkeypatch.setattr(relaxation.ReLU, "pull", swapped)


PLANTED = {
    "divisor of padding": (
        "avg pool",
        lambda patch: patch.setattr(
            fixed.AvgPool, "_options", property(lambda s: (s.kernel, s.stride, s.padding, False, True, None))
        ),
    ),
    "relu bounds swapped": ("relu", swap_relu_bounds),
    "winner always certain": (
        "max pool",
        lambda patch: patch.setattr(relaxation.MaxPool, "_others", lambda s, u, w: torch.full(w.shape, -torch.inf)),
    ),
    "constant forgotten": (
        "conv",
        lambda patch: patch.setattr(linear, "channel_sums", lambda a: torch.zeros(a.shape[:2]).double()),
    ),
    "radius without magnitudes": (
        "conv",
        lambda patch: patch.setattr(
            linear.Conv, "__post_init__", lambda s: object.__setattr__(s, "magnitude", s.weight)
        ),
    ),
    "odd pixels first": ("reduce", shift_factorized_reduce),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_caught(error, monkeypatch):
    case, plant = PLANTED[error]
    check(case, 0)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(3):
            check(case, seed)
