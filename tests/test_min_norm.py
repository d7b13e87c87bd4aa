"""The min-norm combination of two gradients against brute force."""

from __future__ import annotations

import math

import pytest
import torch

from rnas.methods.min_norm import min_norm

GRID = torch.linspace(0, 1, 20001, dtype=torch.float64)
SPACING = 1 / 20000


def drawn(seed: int, kind: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two lists of tensors of uneven shapes that stand to each other as `kind` says."""
    rng = torch.Generator().manual_seed(seed)
    u1, u2 = ([torch.randn(s, generator=rng, dtype=torch.float64) for s in ((3, 7), (5,), ())] for _ in range(2))
    size, tiny = 10 ** float(4 * torch.rand((), generator=rng) - 2), 1e-200
    return {
        "random": (u1, [size * u for u in u2]),
        "close": (u1, [a + 0.1 * size * b for a, b in zip(u1, u2)]),
        "parallel": (u1, [size * u for u in u1]),
        "opposite": (u1, [-size * u for u in u1]),
        "equal": (u1, [u.clone() for u in u1]),
        "first zero": ([0 * u for u in u1], u2),
        "second zero": (u1, [0 * u for u in u2]),
        "both zero": ([0 * u for u in u1], [0 * u for u in u2]),
        "tiny": ([tiny * u for u in u1], [tiny * size * u for u in u2]),
    }[kind]


KINDS = ("random", "close", "parallel", "opposite", "equal", "first zero", "second zero", "both zero", "tiny")


def assert_minimal(u1, u2, gamma: float) -> None:
    """gamma is where the norm is smallest on a fine grid of [0, 1]; any gamma where all are equal."""
    a, b = (torch.cat([u.flatten() for u in us]) for us in (u1, u2))
    scale = max(float(a.abs().max()), float(b.abs().max())) or 1.0
    a, b = a / scale, b / scale
    norms = (GRID[:, None] * a + (1 - GRID[:, None]) * b).norm(dim=1)
    assert 0 <= gamma <= 1
    assert (gamma * a + (1 - gamma) * b).norm() <= norms.min() + 1e-12
    if not torch.equal(a, b):
        assert abs(gamma - float(GRID[norms.argmin()])) <= SPACING


@pytest.mark.parametrize("kind", KINDS)
def test_gamma_is_the_minimum_over_a_fine_grid(kind):
    inside = 0
    for seed in range(25):
        u1, u2 = drawn(seed, kind)
        gamma, combined = min_norm(u1, u2)
        assert_minimal(u1, u2, gamma)
        inside += 0 < gamma < 1
        for g, a, b in zip(combined, u1, u2):
            torch.testing.assert_close(g, gamma * a + (1 - gamma) * b, rtol=1e-14, atol=0)
        dot = lambda x, y: sum(float((p * q).sum()) for p, q in zip(x, y))  # noqa: E731
        for u in (u1, u2):  # a step along -g lowers both
            assert dot(combined, u) >= dot(combined, combined) - 1e-12 * (dot(u1, u1) + dot(u2, u2))
    assert inside or kind in ("parallel", "first zero", "second zero"), "the grid must be tried between its ends too"


@pytest.mark.parametrize("wrong", [lambda g: 1 - g, lambda g: g + 2 * SPACING, lambda g: 0.5], ids=["1 - g", "g + 2 d", "0.5"])
def test_the_grid_finds_a_wrong_gamma(wrong):
    u1, u2 = drawn(4, "close")
    u2 = [0.8 * u for u in u2]
    gamma = min_norm(u1, u2).gamma
    assert_minimal(u1, u2, gamma)
    with pytest.raises(AssertionError):
        assert_minimal(u1, u2, wrong(gamma))


def test_the_combination_keeps_its_ends_and_its_dtype():
    short, long = [torch.tensor([0.5, 0.0])], [torch.tensor([2.0, 0.3])]
    for u1, u2, expected in ((short, long, 1.0), (long, short, 0.0), (short, short, 0.5)):
        gamma, (combined,) = min_norm(u1, u2)
        assert gamma == expected and combined.dtype == torch.float32 and torch.equal(combined, short[0])
    half = [torch.tensor([1e-30, 0.0])], [torch.tensor([0.0, 1e-30])]  # squares that float32 cannot hold
    assert min_norm(*half).gamma == pytest.approx(0.5)
    for broken in (math.nan, math.inf):
        assert math.isnan(min_norm([torch.tensor([broken, 1.0])], long).gamma)
    for u1, u2 in (([], []), (short, []), (short, [torch.zeros(3)])):
        with pytest.raises(ValueError, match="two lists of tensors of the same shapes, not empty; got"):
            min_norm(u1, u2)
