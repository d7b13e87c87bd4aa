"""random_start: where it lands, how it is distributed, and which random numbers it uses."""

from __future__ import annotations

import pytest
import torch

from rnas.kernels import random_start

BALLS = {"linf": 8 / 255, "l2": 0.5}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def sizes(delta, norm):
    delta = delta.flatten(1).double()
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lands_in_the_ball_and_the_box(device, norm, dtype):
    x = torch.rand(9, 3, 17, 31, device=device).to(dtype)
    start = random_start(x, epsilon=BALLS[norm], norm=norm, generator=seeded())
    assert start.shape == x.shape and start.dtype == dtype and start.device == x.device
    assert start.min() >= 0 and start.max() <= 1
    # Rounding to the dtype of pixels up to 1 adds at most half a unit in the last place per pixel.
    slack = torch.finfo(dtype).eps / 2 * (1 if norm == "linf" else (3 * 17 * 31) ** 0.5)
    assert sizes(start - x, norm).max() <= BALLS[norm] + 2 * slack


@pytest.mark.parametrize("device", DEVICES)
def test_linf_fills_the_cube_evenly(device):
    x = torch.full((64, 3, 32, 32), 0.5, device=device)
    delta = (random_start(x, epsilon=0.1, generator=seeded()) - x).flatten().double() / 0.1
    # 196,608 draws: the mean of a uniform on [-1, 1] has a deviation of 0.0013, its tenths hold 10% give or take 0.07%.
    assert abs(delta.mean()) < 0.01
    shares = torch.histc(delta, bins=10, min=-1, max=1) / delta.numel()
    assert (shares - 0.1).abs().max() < 0.005


@pytest.mark.parametrize("device", DEVICES)
def test_l2_fills_the_ball_evenly(device):
    x = torch.full((20000, 1, 1, 3), 0.5, device=device)
    delta = (random_start(x, epsilon=0.4, norm="l2", generator=seeded()) - x).flatten(1).double() / 0.4
    radius = delta.norm(dim=1)
    # In three dimensions a ball of half the radius holds an eighth of the volume.
    for part in (0.5, 0.8, 0.95):
        assert (radius <= part).double().mean().item() == pytest.approx(part**3, abs=0.015)
    direction = delta / radius[:, None]
    assert direction.mean(0).abs().max() < 0.02  # no side is preferred
    assert (direction.square().mean(0) - 1 / 3).abs().max() < 0.02  # no axis either


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", BALLS)
def test_layout_changes_no_pixel(device, norm):
    x = torch.rand(3, 3, 17, 5, device=device)
    plain = random_start(x, epsilon=0.1, norm=norm, generator=seeded())
    last = random_start(x.to(memory_format=torch.channels_last), epsilon=0.1, norm=norm, generator=seeded())
    strided = random_start(x.transpose(2, 3).contiguous().transpose(2, 3), epsilon=0.1, norm=norm, generator=seeded())
    assert torch.equal(plain, last) and torch.equal(plain, strided)
    assert plain.is_contiguous() and strided.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", BALLS)
def test_the_generator_alone_decides(norm):
    x = torch.rand(3, 3, 5, 5)
    before = torch.get_rng_state()
    first, second = (random_start(x, epsilon=0.1, norm=norm, generator=seeded(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    generator = seeded(1)
    random_start(x, epsilon=0.1, norm=norm, generator=generator)
    assert not torch.equal(random_start(x, epsilon=0.1, norm=norm, generator=generator), first)
    assert not torch.equal(random_start(x, epsilon=0.1, norm=norm, generator=seeded(2)), first)


def test_without_a_generator_the_default_one_is_used():
    x = torch.rand(3, 3, 5, 5)
    torch.manual_seed(5)
    first = random_start(x, epsilon=0.1)
    assert not torch.equal(random_start(x, epsilon=0.1), first)
    torch.manual_seed(5)
    assert torch.equal(random_start(x, epsilon=0.1), first)


@pytest.mark.parametrize("norm", BALLS)
def test_each_sample_has_its_own_epsilon(norm):
    x, epsilon = torch.full((4, 3, 9, 9), 0.5), torch.tensor([0.0, 0.01, 0.1, 0.2])
    together = random_start(x, epsilon=epsilon, norm=norm, generator=seeded())
    assert torch.equal(together[0], x[0])
    for n in range(1, 4):
        alone = random_start(x, epsilon=epsilon[n].item(), norm=norm, generator=seeded())
        torch.testing.assert_close(together[n], alone[n], rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", BALLS)
def test_out_and_batch_zero_and_autograd(norm):
    x = torch.rand(3, 3, 5, 5)
    expected = random_start(x, epsilon=0.1, norm=norm, generator=seeded())
    out = torch.full_like(x, torch.nan)
    assert random_start(x, epsilon=0.1, norm=norm, generator=seeded(), out=out) is out and torch.equal(out, expected)
    buffer = x.clone()
    random_start(buffer, epsilon=0.1, norm=norm, generator=seeded(), out=buffer)
    assert torch.equal(buffer, expected)
    for empty in ((0, 3, 5, 5), (3, 0)):
        assert random_start(torch.rand(empty), epsilon=0.1, norm=norm).shape == empty
    wanted = x.clone().requires_grad_()
    assert not random_start(wanted, epsilon=0.1, norm=norm, generator=seeded()).requires_grad


REFUSED = [
    ({"epsilon": -0.1}, ValueError, "epsilon must be a number of at least 0"),
    ({"epsilon": torch.ones(5)}, ValueError, "epsilon must have shape"),
    ({"norm": "l1"}, ValueError, "norm must be"),
    ({"lower": 2.0}, ValueError, "lower must not exceed upper"),
    ({"x": torch.zeros(2, 3, dtype=torch.uint8)}, TypeError, "x must be float64"),
    ({"out": torch.zeros(3, 3)}, ValueError, "out must have the shape of x"),
    ({"generator": 7}, TypeError, "generator must be a torch.Generator or None, got int"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_bad_arguments_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        random_start(**{"x": torch.rand(2, 3), "epsilon": 0.1, **change})
