"""pgd_step against its float64 definition, on every device and every instruction set this machine has."""

from __future__ import annotations

import math
import os
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rnas.kernels import backend, pgd_step
from rnas.kernels.pgd_step import OP
from rnas.kernels.reference.pgd_step import pgd_step as reference

# Distance to the float64 reference, |a - r| / |r| over the whole tensor.
TOLERANCE = {
    torch.float64: 1e-10,  # the same formula, sums in another order
    torch.float32: 1e-6,  # and three times what plain float32 PyTorch misses, see `assert_close`
    torch.float16: 2.0**-11,  # computed in float32, rounded once: half a unit in the last place of 11 bits
    torch.bfloat16: 2.0**-8,  # likewise, 8 bits
}
BALLS = {"linf": (8 / 255, 2 / 255), "l2": (0.5, 0.2)}  # norm -> epsilon, step size
SHAPES = [(1, 1), (3, 17), (2, 3, 31, 33), (1, 3, 17, 1), (5, 1, 33, 31), (33, 3, 4, 4), (0, 3, 8, 8), (4, 0), (3,)]
SHAPES += [(2, 2, 32, 32)]  # so many pixels that every part of a norm has some
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run in NumPy, on CPU tensors
LARGE = [(3, 1, 129, 131), (70, 3, 17, 11)]  # enough pixels for several threads, within a sample and across samples


def implementations():
    """Every compiled implementation: the CPU's at each SIMD level, CUDA's, and Triton's."""
    loaded = backend.load("cpu")
    levels = [] if isinstance(loaded, str) else loaded.simd_levels()
    yield from (pytest.param(("cpu", level), id=f"cpu-{level}") for level in levels)
    if not levels:
        yield pytest.param(("cpu", ""), id="cpu", marks=pytest.mark.skip(reason=str(loaded)))
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    yield pytest.param(("cuda", ""), id="cuda", marks=[pytest.mark.gpu, no_gpu])
    yield pytest.param(("triton", ""), id="triton", marks=[] if INTERPRETED else [pytest.mark.gpu, no_gpu])


@pytest.fixture(params=implementations())
def device(request, monkeypatch):
    """The device of an implementation that is forced, so that the reference cannot stand in for it unseen."""
    name, level = request.param
    monkeypatch.setenv("RNAS_BACKEND", name)
    if level:
        before = backend.module("cpu").simd_level()
        backend.module("cpu").set_simd_level(level)
        request.addfinalizer(lambda: backend.module("cpu").set_simd_level(before))
    if name == "triton":
        pytest.importorskip("triton")
        if INTERPRETED:
            monkeypatch.setitem(backend._DEVICES, "triton", ("cpu",))
            return torch.device("cpu")
    return torch.device("cpu" if name == "cpu" else "cuda")


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Memory that PyTorch allocates without a value holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(shape, dtype, device, norm="linf"):
    """x_adv, grad, x. Gradients span 1e-12 to 1 with exact zeros in them; some pixels lie on the border of the box."""
    x = torch.rand(shape, dtype=torch.float64)
    x = torch.where(torch.rand(shape) < 0.1, x.round(), x)
    epsilon = BALLS[norm][0]
    x_adv = (x + epsilon * (2 * torch.rand(shape) - 1)).clamp(0, 1)
    scale = 10.0 ** -(12 * torch.rand(shape[:1])).reshape(-1, *[1] * (len(shape) - 1))
    grad = torch.randn(shape, dtype=torch.float64) * scale
    grad[torch.rand(shape) < 0.1] = 0
    return [tensor.to(device, dtype) for tensor in (x_adv, grad, x)]


def distance(a, b):
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item() if b.numel() else 0.0


def assert_close(step, inputs, norm, epsilon, step_size):
    """The gate: `step(x_adv, grad, x, **numbers)` against the float64 definition."""
    numbers = {"norm": norm, "epsilon": epsilon, "step_size": step_size}
    exact = {key: value.double() if torch.is_tensor(value) else value for key, value in numbers.items()}
    expected = reference(*(tensor.double() for tensor in inputs), **exact)
    result = step(*inputs, **numbers)
    dtype = inputs[0].dtype
    assert result.shape == inputs[0].shape and result.dtype == dtype and result.device == inputs[0].device
    allowed = TOLERANCE[dtype]
    if dtype == torch.float32:
        allowed += 3 * distance(reference(*inputs, **numbers), expected)
    assert distance(result, expected) <= allowed
    if norm == "linf":  # no sums: the same operations in the same order
        assert torch.equal(result, reference(*inputs, **numbers))


def dtypes():
    """Those of the forced implementation."""
    found = OP.implementations[backend.forced()].dtypes
    # Triton's interpreter cuts a float32 off to bfloat16, where a GPU rounds.
    return [dtype for dtype in found if not (INTERPRETED and dtype == torch.bfloat16)]


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_equals_the_float64_reference(device, shape, norm):
    for dtype in dtypes():
        assert_close(pgd_step, draw(shape, dtype, device, norm), norm, *BALLS[norm])


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("kind", ["both", "epsilon", "step_size", "scalar tensors"])
def test_each_sample_has_its_own_epsilon_and_step(device, norm, kind):
    shape = (5, 3, 17, 3)
    for dtype in dtypes():
        per_sample = [value * (0.5 + torch.arange(5, device=device) / 2).to(dtype) for value in BALLS[norm]]
        if kind == "scalar tensors":
            per_sample = [value[1] for value in per_sample]
        epsilon = BALLS[norm][0] if kind == "step_size" else per_sample[0]
        step_size = BALLS[norm][1] if kind == "epsilon" else per_sample[1]
        assert_close(pgd_step, draw(shape, dtype, device, norm), norm, epsilon, step_size)


def wrong(change):
    """An implementation with one error in it."""

    def step(x_adv, grad, x, *, norm, epsilon, step_size):
        if change == "sign of zero":
            grad = torch.where(grad == 0, 1.0, grad)
        if change == "no projection":
            epsilon = 10.0
        if change == "no box":
            return reference(x_adv, grad, x, norm=norm, epsilon=epsilon, step_size=step_size, lower=-9, upper=9)
        if change == "descent":
            step_size = -step_size
        if change == "wrong sample":
            x = x.roll(1, 0)
        result = reference(x_adv, grad, x, norm=norm, epsilon=epsilon, step_size=step_size)
        if change == "last pixel forgotten":
            result.view(-1)[-1] = math.nan
        return result

    return step


WRONG = ["sign of zero", "no projection", "no box", "descent", "wrong sample", "last pixel forgotten"]


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("change", WRONG)
def test_the_gate_turns_red_for_a_wrong_step(norm, change):
    inputs = draw((5, 3, 17, 31), torch.float32, "cpu", norm)
    assert_close(wrong(None), inputs, norm, *BALLS[norm])
    with pytest.raises(AssertionError):
        assert_close(wrong(change), inputs, norm, *BALLS[norm])


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every other pixel": lambda t: torch.stack([t, torch.full_like(t, math.nan)], dim=-1)[..., 0],
    "offset": lambda t: torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("norm", BALLS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_layout(device, norm, data):
    size = st.integers(0, 9) | st.sampled_from([17, 31, 33])
    shape = tuple(data.draw(st.tuples(st.integers(0, 4), st.integers(1, 4), size, size)))
    inputs = [LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))](t) for t in draw(shape, torch.float32, device, norm)]
    assert_close(pgd_step, inputs, norm, *BALLS[norm])
    out = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))](torch.full(shape, math.nan, device=device))
    assert_close(lambda *a, **numbers: pgd_step(*a, out=out, **numbers), inputs, norm, *BALLS[norm])


@pytest.mark.parametrize("norm", BALLS)
def test_layout_changes_no_pixel_and_channels_last_stays(device, norm):
    numbers = {"norm": norm, "epsilon": BALLS[norm][0], "step_size": BALLS[norm][1]}
    inputs = draw((3, 3, 17, 31), torch.float32, device, norm)
    plain = pgd_step(*inputs, **numbers)
    last = pgd_step(*(LAYOUTS["channels_last"](t) for t in inputs), **numbers)
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain, last, rtol=0, atol=0 if norm == "linf" else 1e-7)


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every other pixel"])
def test_out_may_be_any_of_the_inputs(device, norm, layout):
    numbers = {"norm": norm, "epsilon": BALLS[norm][0], "step_size": BALLS[norm][1]}
    inputs = draw((3, 3, 17, 5), torch.float32, device, norm)
    expected = pgd_step(*inputs, **numbers)
    for position in range(3):
        copies = [LAYOUTS[layout](t.clone()) for t in inputs]
        versions = [t._version for t in copies]
        assert pgd_step(*copies, out=copies[position], **numbers) is copies[position]
        torch.testing.assert_close(copies[position], expected, rtol=0, atol=0 if norm == "linf" else 1e-7)
        changed = [t._version != version for t, version in zip(copies, versions, strict=True)]
        assert changed == [i == position for i in range(3)]
        assert all(torch.equal(copies[i], inputs[i]) for i in range(3) if i != position)


@pytest.mark.parametrize("norm", BALLS)
def test_out_may_overlap_an_input_by_a_shift(device, norm):
    numbers = {"norm": norm, "epsilon": BALLS[norm][0], "step_size": BALLS[norm][1]}
    x_adv, grad, x = draw((40000, 3), torch.float32, device, norm)
    expected = pgd_step(x_adv, grad, x, **numbers)
    memory = torch.cat([x_adv, torch.zeros(1, 3, device=device)])
    pgd_step(memory[:-1], grad, x, out=memory[1:], **numbers)
    assert torch.equal(memory[1:], expected)


@pytest.mark.parametrize("norm", BALLS)
def test_result_is_inside_the_ball_and_the_box(device, norm):
    epsilon = BALLS[norm][0]
    x_adv, grad, x = draw((4, 3, 33, 33), torch.float32, device, norm)
    for _ in range(5):
        x_adv = pgd_step(x_adv, grad, x, norm=norm, epsilon=epsilon, step_size=3 * epsilon, lower=0.1, upper=0.9)
        assert x_adv.min() >= torch.tensor(0.1) and x_adv.max() <= torch.tensor(0.9)
        # The box may push a pixel of x that lies outside of it beyond the ball.
        delta = (x_adv - x.clamp(0.1, 0.9)).flatten(1).double()
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert size.max() <= epsilon * (1 + 1e-5)


@pytest.mark.parametrize("norm", BALLS)
def test_zero_gradient_makes_no_step(device, norm):
    x = torch.rand(3, 3, 17, 17, device=device)
    for zero in (0.0, -0.0):
        grad = torch.full_like(x, zero)
        assert torch.equal(pgd_step(x, grad, x, norm=norm, epsilon=0.1, step_size=0.1), x)


def test_zeros_come_out_positive(device):
    zeros = (0.0, -0.0)
    for x_adv, grad, x, step_size, epsilon in product(zeros, (1.0, -1.0, *zeros), zeros, zeros, (0.0, 0.1)):
        triple = [torch.full((1, 40), value, device=device) for value in (x_adv, grad, x)]
        result = pgd_step(*triple, epsilon=epsilon, step_size=step_size, lower=-1.0)  # lower=0 would already clamp -0
        assert not result.signbit().any() and torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("norm", BALLS)
def test_a_small_gradient_makes_a_whole_step_in_l2(device, norm):
    x = torch.full((2, 3, 5, 5), 0.5, device=device)
    for scale in (1e-30, 1e-44, 1e30):  # their squares are no float32 numbers
        delta = pgd_step(x, torch.full_like(x, scale), x, norm=norm, epsilon=1.0, step_size=0.1) - x
        size = delta.abs().amax() if norm == "linf" else delta[0].norm()
        assert size.item() == pytest.approx(0.1, rel=0.2 if scale < 1e-40 else 1e-4)  # 1e-44 has 3 bits


@pytest.mark.parametrize("norm", BALLS)
def test_nan_stays_nan(device, norm):
    for dtype in dtypes():
        for position in range(3):
            inputs = draw((3, 3, 17, 9), dtype, device, norm)
            inputs[position][1, 2, 3, 4] = math.nan
            expected = reference(*inputs, norm=norm, epsilon=0.5, step_size=0.1)
            result = pgd_step(*inputs, norm=norm, epsilon=0.5, step_size=0.1)
            assert result[1, 2, 3, 4].isnan() and not result[[0, 2]].isnan().any()
            assert torch.equal(result.isnan(), expected.isnan())


@pytest.mark.parametrize("norm", BALLS)
def test_same_bits_every_time(device, norm):
    inputs = draw((3, 1, 129, 131), torch.float32, device, norm)
    results = [pgd_step(*inputs, norm=norm, epsilon=0.5, step_size=0.1) for _ in range(5)]
    assert all(torch.equal(result, results[0]) for result in results)
