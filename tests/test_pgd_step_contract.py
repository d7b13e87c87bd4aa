"""pgd_step as a citizen of PyTorch: refusals, autograd, torch.compile, threads and instruction sets."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from rnas.kernels import backend, pgd_step

MODULE = sys.modules["rnas.kernels.pgd_step"]
BALLS = {"linf": (8 / 255, 2 / 255), "l2": (0.5, 0.2)}  # norm -> epsilon, step size


def draw(*shape):
    x = torch.rand(shape)
    return (x + 0.02 * torch.randn(shape)).clamp(0, 1), torch.randn(shape), x


def cpu_module():
    loaded = backend.load("cpu")
    return pytest.skip(loaded) if isinstance(loaded, str) else loaded


IMAGE = torch.rand(2, 3, 4, 4)
REFUSED = [
    ({"epsilon": -0.1}, ValueError, "epsilon must be a number of at least 0"),
    ({"epsilon": float("nan")}, ValueError, "epsilon must be a number"),
    ({"epsilon": "8/255"}, TypeError, "epsilon must be a number or a tensor"),
    ({"epsilon": torch.full((3,), 0.1)}, ValueError, r"epsilon must have shape \(2,\).*got \(3,\)"),
    ({"epsilon": torch.full((2, 1), 0.1)}, ValueError, r"epsilon must have shape \(2,\)"),
    ({"epsilon": torch.tensor([1, 2])}, TypeError, "epsilon must be a floating-point tensor, got torch.int64"),
    ({"epsilon": torch.full((2,), 0.1, device="meta")}, ValueError, "epsilon must be on the device"),
    ({"step_size": float("nan")}, ValueError, "step_size must be a number"),
    ({"step_size": None}, TypeError, "step_size must be a number"),
    ({"step_size": torch.full((1, 2), 0.1)}, ValueError, r"step_size must have shape \(2,\)"),
    ({"norm": "l1"}, ValueError, "norm must be 'linf' or 'l2', got 'l1'"),
    ({"norm": 2}, ValueError, "norm must be"),
    ({"lower": 1.0, "upper": 0.0}, ValueError, "lower must not exceed upper"),
    ({"lower": float("nan")}, ValueError, "lower must not exceed upper"),
    ({"x_adv": [0.5]}, TypeError, "x_adv must be a tensor"),
    ({"x_adv": IMAGE.mul(255).byte()}, TypeError, "x_adv must be float64, .*got torch.uint8"),
    ({"x_adv": torch.tensor(0.5)}, ValueError, r"x_adv must have shape \(N, ...\)"),
    ({"grad": None}, TypeError, "grad must be a tensor like x_adv, got NoneType"),
    ({"grad": IMAGE[:1]}, ValueError, r"grad must have the shape of x_adv, \(2, 3, 4, 4\); got \(1, 3, 4, 4\)"),
    ({"grad": IMAGE.double()}, TypeError, "grad must have the dtype of x_adv"),
    ({"x": IMAGE[..., :3]}, ValueError, "x must have the shape of x_adv"),
    ({"x": IMAGE.to("meta")}, ValueError, "x must be on the device of x_adv, cpu; got meta"),
    ({"out": IMAGE.half()}, TypeError, "out must have the dtype"),
    ({"out": IMAGE[0]}, ValueError, "out must have the shape"),
    ({"out": IMAGE[:1].expand(2, 3, 4, 4)}, ValueError, "out must not overlap itself"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_bad_arguments_are_refused(change, error, message):
    arguments = {"x_adv": IMAGE, "grad": IMAGE, "x": IMAGE, "epsilon": 0.1, "step_size": 0.1, **change}
    before = IMAGE.clone()
    with pytest.raises(error, match=message):
        pgd_step(**arguments)
    assert torch.equal(IMAGE, before)


@pytest.mark.parametrize("name", ["x_adv", "grad", "x", "epsilon", "step_size", "out"])
def test_derivatives_are_refused(name):
    values = dict(zip(("x_adv", "grad", "x"), draw(2, 3, 5, 5), strict=True))
    values |= {"epsilon": torch.full((2,), 0.1), "step_size": torch.full((2,), 0.1)}
    values |= {"out": torch.empty(2, 3, 5, 5)} if name == "out" else {}
    expected = pgd_step(**values).clone()

    def step(value):
        return pgd_step(**values | {name: value})

    wanted = values[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable"):
        step(wanted)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(step, (values[name],), (torch.ones_like(values[name]),))
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.func.grad(lambda value: step(value).sum())(values[name])
    with torch.no_grad():
        assert torch.equal(step(wanted), expected)


def test_a_graph_notices_that_a_saved_tensor_was_overwritten():
    x_adv, grad, x = draw(2, 3, 5, 5)
    weight = torch.ones_like(x, requires_grad=True)
    loss = (weight * x_adv).sum()
    pgd_step(x_adv, grad, x, epsilon=0.1, step_size=0.1, out=x_adv)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("numbers", ["scalars", "tensors"])
def test_opcheck(norm, layout, numbers):
    inputs = list(draw(2, 3, 5, 7))
    if layout == "channels_last":
        inputs = [t.to(memory_format=torch.channels_last) for t in inputs]
    if layout == "transposed":
        inputs[0] = inputs[0].transpose(2, 3).contiguous().transpose(2, 3)
    per_sample = [torch.full((2,), value) if numbers == "tensors" else None for value in BALLS[norm]]
    arguments = (*inputs, *BALLS[norm], *per_sample, norm, 0.0, 1.0)
    torch.library.opcheck(MODULE._pgd_step, arguments)
    torch.library.opcheck(MODULE._pgd_step_out, (*arguments, torch.empty_like(inputs[2])))
    torch.library.opcheck(MODULE._pgd_step_out, (*arguments, inputs[0]))


def test_compiles_whole_and_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attack(x_adv, grad, x, buffer, epsilons):
        moved = pgd_step(x_adv, grad, x, epsilon=0.1, step_size=0.05)
        pgd_step(moved, -grad, x, epsilon=epsilons, step_size=0.2, norm="l2", out=buffer)
        return buffer + moved

    compiled = torch.compile(attack, fullgraph=True, backend=counter)
    for _ in range(2):
        inputs, epsilons = draw(2, 3, 5, 5), torch.tensor([0.1, 0.2])
        expected_buffer, buffer = torch.empty(2, 3, 5, 5), torch.empty(2, 3, 5, 5)
        expected = attack(*inputs, expected_buffer, epsilons)
        assert torch.equal(compiled(*inputs, buffer, epsilons), expected)
        assert torch.equal(buffer, expected_buffer)
    assert counter.frame_count == 1


def test_fake_tensors_have_the_true_strides():
    images = torch.rand(2, 3, 4, 5)
    views = [images, images.to(memory_format=torch.channels_last), images.transpose(2, 3), images[:, :, ::2]]
    views += [images[:, :1], torch.rand(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d), torch.rand(4, 2).t()]
    for view in views:
        with torch._subclasses.FakeTensorMode() as mode:
            fake = mode.from_tensor(view)
            promised = pgd_step(fake, fake, fake, epsilon=0.1, step_size=0.1)
        real = pgd_step(view, view, view, epsilon=0.1, step_size=0.1)
        assert promised.stride() == real.stride() and promised.shape == real.shape and promised.dtype == real.dtype


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("shape", [(3, 3, 129, 131), (70, 3, 33, 17), (1, 3, 224, 224), (1, 31)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_and_instruction_sets_change_no_bit(shape, norm, dtype, monkeypatch):
    module, threads = cpu_module(), torch.get_num_threads()
    monkeypatch.setenv("RNAS_BACKEND", "cpu")
    inputs = [tensor.to(dtype) for tensor in draw(*shape)]
    epsilon, step_size = BALLS[norm]
    before, results = module.simd_level(), []
    try:
        for level in module.simd_levels():
            module.set_simd_level(level)
            assert module.simd_level() == level
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(pgd_step(*inputs, norm=norm, epsilon=epsilon, step_size=step_size))
    finally:
        module.set_simd_level(before)
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_more_pixels_than_fit_in_32_bits(norm, name, monkeypatch):
    pytest.importorskip("triton") if name == "triton" else backend.module("cuda")
    monkeypatch.setenv("RNAS_BACKEND", name)
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.full((1, 2**31 + 33), 0.5, device="cuda", dtype=torch.bfloat16)
    result = pgd_step(x, x, x, epsilon=1e9, step_size=0.25 if norm == "linf" else 0.25 * x.shape[1] ** 0.5, norm=norm)
    assert (result[0, [0, -1]] == 0.75).all() and result.min() == result.max()
