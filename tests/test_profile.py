"""The profile of the CPU kernels: it counts what was computed, and changes nothing of it."""

from __future__ import annotations

import re
import time

import pytest
import torch
from conftest import REPOSITORY
from torch import Tensor, nn

from rnas import kernels
from rnas.kernels import backend
from rnas.kernels.profile import KINDS
from rnas.spaces import DARTS
from rnas.supernet import MixedOperation, Supernet

# Convolutions of the eight DARTS candidates: each sep_conv has two of either kind, each dil_conv one.
DEPTHWISE_TAPS = 2 * 9 + 2 * 25 + 9 + 25
POINTWISE = 6
CONVOLUTIONS = {"depthwise", "depthwise_input", "depthwise_weight", "pointwise", "pointwise_input", "pointwise_weight"}


@pytest.fixture
def built(compiled) -> None:
    """Forces the compiled kernels; skips where they are not built."""
    if not compiled:
        pytest.skip("rnas._cpu is not built")


def edge_and_images(shape: tuple[int, ...], training: bool) -> tuple[MixedOperation, Tensor, Tensor]:
    torch.manual_seed(0)
    edge = MixedOperation(DARTS.primitives, shape[1], stride=1).train(training)
    return edge, torch.randn(shape), torch.randn(len(DARTS.primitives)).softmax(0)


def supernet_gradients() -> list[Tensor]:
    """All gradients of a small supernet, whose cells and inputs use every fused op, and its averages after that."""
    torch.manual_seed(0)
    supernet = Supernet(DARTS, channels=4, layers=3, num_classes=4)
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    alpha = {name: torch.zeros(len(DARTS.edges), len(DARTS.primitives)) for name in DARTS.cell_types}
    loss = supernet(x, {name: each.softmax(1) for name, each in alpha.items()}).square().sum()
    found = torch.autograd.grad(loss, [x, *supernet.parameters()])
    return [loss.detach(), *found, *(buffer for buffer in supernet.buffers())]


def assert_zero(profile: kernels.Profile) -> None:
    assert list(profile.seconds) == list(profile.multiply_adds) == list(KINDS)
    assert {*profile.seconds.values(), *profile.multiply_adds.values(), profile.total, profile.other} == {0}


def test_the_kinds_are_those_of_the_header():
    header = (REPOSITORY / "csrc" / "include" / "rnas" / "profile.h").read_text()
    (body,) = re.findall(r"enum class Work \{(.*?)\}", header, flags=re.DOTALL)
    *names, count = re.findall(r"\w+", re.sub(r"//.*", "", body))
    assert (tuple(names), count) == (KINDS, "count")
    for kind in KINDS:
        assert re.search(rf"^        {kind} +\S", kernels.profile.__doc__, flags=re.MULTILINE), kind


def test_times_make_sense(built):
    with kernels.profile() as found:
        start = time.perf_counter()
        supernet_gradients()
        wall = time.perf_counter() - start
    assert list(found.seconds) == list(found.multiply_adds) == list(KINDS)
    for kind in KINDS:
        assert found.seconds[kind] > 0
        assert (found.multiply_adds[kind] > 0) == (kind in CONVOLUTIONS)
    assert sum(found.seconds.values()) <= 1.05 * found.total
    assert found.total <= 1.05 * torch.get_num_threads() * wall
    assert found.other == pytest.approx(max(0, found.total - sum(found.seconds.values())))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (3, 1, 5, 7), (1, 17, 3, 31), (2, 33, 4, 1)])
def test_multiply_adds_of_a_forward_pass_are_exact(built, level, shape, training, threads):
    edge, x, weights = edge_and_images(shape, training)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), kernels.profile() as found:
            edge(x, weights)
    finally:
        torch.set_num_threads(before)
    expected = dict.fromkeys(KINDS, 0)
    expected["depthwise"] = x.numel() * DEPTHWISE_TAPS
    expected["pointwise"] = x.numel() * shape[1] * POINTWISE
    assert found.multiply_adds == expected
    assert all((found.seconds[kind] > 0) == (count > 0) for kind, count in expected.items() if kind in CONVOLUTIONS)


@pytest.mark.parametrize("training", [True, False])
def test_each_gradient_takes_the_products_of_the_forward_pass_once(built, training):
    edge, x, weights = edge_and_images((2, 17, 5, 7), training)
    out = edge(x.requires_grad_(), weights)
    with kernels.profile() as found:
        torch.autograd.grad(out.sum(), [x, *edge.parameters()])
    for kind in ("depthwise_input", "depthwise_weight"):
        assert found.multiply_adds[kind] == x.numel() * DEPTHWISE_TAPS
    for kind in ("pointwise_input", "pointwise_weight"):
        assert found.multiply_adds[kind] == x.numel() * 17 * POINTWISE


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 3, 7, 5)])
def test_the_layers_of_a_cell_count_too(built, shape):
    n, c, h, w = shape
    x = torch.randn(shape, requires_grad=True)
    weight, norm = torch.randn(5, c, 1, 1, requires_grad=True), nn.BatchNorm2d(5)
    with kernels.profile() as found:
        kernels.relu_conv_norm(x, weight, norm).sum().backward()
    for kind in ("pointwise", "pointwise_input", "pointwise_weight"):
        assert found.multiply_adds[kind] >= n * h * w * c * 5, kind
    with kernels.profile() as found:
        kernels.factorized_reduce(x, weight, None, norm)
    assert found.multiply_adds["pointwise"] >= n * -(-h // 2) * -(-w // 2) * c * 5
    assert sum(found.multiply_adds.values()) == found.multiply_adds["pointwise"]


def test_results_are_the_same_bits(built):
    plain = supernet_gradients()
    with kernels.profile():
        profiled = supernet_gradients()
    assert len(plain) == len(profiled)
    assert all(torch.equal(one, other) for one, other in zip(plain, profiled))


def test_without_a_profile_nothing_is_counted(built):
    with kernels.profile() as found:
        pass
    module = backend.module("cpu")
    supernet_gradients()
    seconds, multiply_adds, total = module.stop_profile()  # what the counters hold now, though nothing was started
    assert {*seconds, *multiply_adds, total} == {0}
    assert_zero(found)


def test_only_what_runs_in_the_block_is_counted(built):
    edge, x, weights = edge_and_images((2, 3, 5, 7), training=True)
    edge(x, weights)
    with kernels.profile() as found:
        edge(x, weights)
        assert_zero(found)
    copy = (dict(found.seconds), dict(found.multiply_adds), found.total)
    edge(x, weights)
    assert copy == (found.seconds, found.multiply_adds, found.total)
    assert found.multiply_adds["depthwise"] == x.numel() * DEPTHWISE_TAPS


def test_an_exception_ends_the_profile(built):
    edge, x, weights = edge_and_images((2, 3, 5, 7), training=True)
    with pytest.raises(ValueError, match="of the block"), kernels.profile() as found:
        edge(x, weights)
        raise ValueError("of the block")
    assert found.multiply_adds["depthwise"] == x.numel() * DEPTHWISE_TAPS
    with kernels.profile() as found:
        pass
    assert_zero(found)


@pytest.mark.parametrize("there", [True, False])
def test_one_at_a_time(monkeypatch, there):
    if not there:
        monkeypatch.setenv("RNAS_BACKEND", "reference")
        monkeypatch.setattr(backend, "load", lambda name: f"rnas._{name} is not built")
    edge, x, weights = edge_and_images((2, 3, 5, 7), training=True)
    with kernels.profile() as outer:
        edge(x, weights)
        with pytest.raises(RuntimeError, match="another profile is running"), kernels.profile():
            raise AssertionError("two profiles at a time")
        edge(x, weights)
    served = there and not isinstance(backend.load("cpu"), str)
    assert outer.multiply_adds["depthwise"] == (2 * x.numel() * DEPTHWISE_TAPS if served else 0)


@pytest.mark.parametrize("reason", ["not built", "reference", "float64"])
def test_what_plain_pytorch_serves_is_not_measured(monkeypatch, reason):
    edge, x, weights = edge_and_images((2, 3, 5, 7), training=True)
    if reason == "not built":
        monkeypatch.setattr(backend, "load", lambda name: f"rnas._{name} is not built")
    if reason == "float64":
        edge, x, weights = edge.double(), x.double(), weights.double()
    else:
        monkeypatch.setenv("RNAS_BACKEND", "reference")
    with kernels.profile() as found:
        assert_zero(found)
        edge(x, weights)
    assert_zero(found)
    assert str(found).startswith("no CPU kernel has run")


def test_the_table_says_everything():
    seconds, adds = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
    seconds |= {"pointwise": 0.002, "norms": 0.001}
    adds |= {"pointwise": 50_000_000}
    lines = str(kernels.Profile(seconds, adds, total=0.004)).splitlines()
    assert [line.split() for line in lines if line.split()[0] in ("kind", "pointwise", "norms", "other", "total")] == [
        ["kind", "ms", "share", "GFLOP/s"],
        ["pointwise", "2.000", "50.0%", "50.0"],
        ["norms", "1.000", "25.0%", "-"],
        ["other", "1.000", "25.0%", "-"],
        ["total", "4.000", "100.0%", "25.0"],
    ]
    assert [line.split()[0] for line in lines] == ["kind", *KINDS, "other", "total"]
    assert len({len(line) for line in lines}) == 1
