"""What goes around the candidates, joined and shuffled, against plain PyTorch in float64; memory formats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rnas.kernels import backend, formats, fused, mixed_op, partial

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(params=LAYOUTS)
def layout(request) -> torch.memory_format:
    return LAYOUTS[request.param]


def defined(mixed: Tensor, arounds: list[Tensor], scales: Tensor | None, groups: int, first: bool) -> Tensor:
    around = sum(arounds) if scales is None else sum(s * each for s, each in zip(scales, arounds))
    return F.channel_shuffle(torch.cat([mixed, around] if first else [around, mixed], dim=1), groups)


class Problem:
    """Leaves in float64, and what of them enters `join` in float32: slices of states, as they lie, and others.

    sliced: whether the first is a slice.
    """

    def __init__(self, layout, shape=(3, 4, 5, 7), edges=3, groups=4, scaled=True, sliced=True, seed=0) -> None:
        self.layout, self.groups, self.sliced = layout, groups, sliced
        generator = torch.Generator().manual_seed(seed)
        n, self.channels, h, w = shape
        all_channels = self.channels * groups
        self.leaves = [
            torch.randn(s, generator=generator, dtype=torch.float64)
            for s in (shape, *[(n, all_channels, h, w)] * edges, *[(edges,)] * scaled)
        ]
        self.scaled = scaled

    def run(self, join, dtype: torch.dtype, first: bool = True, layout=None):
        """(leaves, result); join takes mixed, what goes around and the scales."""
        layout = layout or self.layout
        leaves = [
            each.to(dtype, memory_format=layout if each.dim() == 4 else torch.preserve_format, copy=True)
            for each in self.leaves
        ]
        for leaf in leaves:
            leaf.requires_grad_()
        mixed, *states = leaves[:-1] if self.scaled else leaves
        arounds = [state[:, self.channels :] for state in states]
        for edge in range(int(self.sliced), len(arounds), 2):  # every other one is no slice
            arounds[edge] = arounds[edge].contiguous(memory_format=layout)
        return leaves, join(mixed, arounds, leaves[-1] if self.scaled else None, first)

    def gradients(self, join, dtype: torch.dtype, twice: bool, **options) -> list[Tensor]:
        """The result, the gradients of the leaves, and those of a sum of them."""
        leaves, out = self.run(join, dtype, **options)
        noise = [torch.randn(each.shape, generator=torch.Generator().manual_seed(5)).to(dtype) for each in leaves]
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(dtype).requires_grad_()
        found = torch.autograd.grad(out, leaves, cotangent, create_graph=twice)
        made = [out, *found]
        if twice:
            total = sum((a * b).sum() for a, b in zip(found, noise))
            made += torch.autograd.grad(total, [*leaves, cotangent], materialize_grads=True)
        return [each.detach() for each in made]


def check(problem: Problem, first: bool = True, twice: bool = False) -> None:
    def join(mixed, arounds, scales, first):
        assert partial._covers(mixed, arounds, scales, problem.layout)
        made = partial.join(mixed, arounds, scales, problem.groups, problem.layout, first)
        assert made.is_contiguous(memory_format=problem.layout) and not made._is_view()
        return made

    exact = problem.gradients(lambda m, a, s, f: defined(m, a, s, problem.groups, f), torch.float64, twice, first=first)
    found = problem.gradients(join, torch.float32, twice, first=first)
    plain = problem.gradients(lambda m, a, s, f: defined(m, a, s, problem.groups, f), torch.float32, twice, first=first)
    for a, b, c in zip(found, exact, plain, strict=True):  # the first contract of the ops
        assert (a.double() - b).norm() <= 3 * (c.double() - b).norm() + 1e-6 * b.norm()


@pytest.mark.parametrize("shape", [(3, 4, 32, 32), (2, 5, 5, 7), (3, 1, 1, 1), (2, 17, 1, 9), (0, 4, 8, 8)])
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("scaled", [True, False])
def test_values_and_gradients(compiled, level, layout, scaled, groups, shape):
    assert compiled
    for sliced in (True, False):
        check(Problem(layout, shape, groups=groups, scaled=scaled, sliced=sliced), first=sliced)


@pytest.mark.parametrize("edges", [1, 2, 14])
@pytest.mark.parametrize("first", [True, False])
def test_any_number_of_edges_and_either_order(compiled, layout, first, edges):
    check(Problem(layout, edges=edges), first=first)


@pytest.mark.parametrize("scaled", [True, False])
def test_second_derivatives(compiled, layout, scaled):
    check(Problem(layout, (3, 5, 5, 7), scaled=scaled), twice=True)  # 4 groups of 5: unlike their own inverse


def test_only_the_gradients_that_are_asked_for(compiled, layout):
    problem = Problem(layout)
    leaves, out = problem.run(lambda m, a, s, f: partial.join(m, a, s, 4, layout, f), torch.float32)
    expected = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    for leaf, gradient in zip(leaves, expected):
        for other in leaves:
            other.requires_grad_(other is leaf)
        mixed, *states, scales = leaves
        out = partial.join(mixed, [state[:, 4:] for state in states], scales, 4, layout)
        assert torch.allclose(torch.autograd.grad(out.square().sum(), leaf)[0], gradient, rtol=1e-4, atol=1e-4)


def test_what_goes_around_is_kept_for_the_gradient_of_scales_alone(compiled, layout):
    saved: list[Tensor] = []
    for wanted in (True, False):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            problem = Problem(layout, edges=3)
            leaves = [each.float().requires_grad_(each.dim() == 4 or wanted) for each in problem.leaves]
            states = [each.contiguous(memory_format=layout) for each in leaves[1:-1]]
            out = partial.join(leaves[0], [state[:, 4:] for state in states], leaves[-1], 4, layout)
        assert sum(each.dim() == 4 for each in saved) == (3 if wanted else 0)
        out.sum().backward()
        assert torch.allclose(leaves[2].grad[:, 4:], leaves[-1][1].expand(3, 12, 5, 7))


def test_gradients_after_hooks_that_lose_the_layout(compiled, layout):
    problem = Problem(layout)
    expected = problem.gradients(lambda m, a, s, f: partial.join(m, a, s, 4, layout, f), torch.float32, False)
    lose = lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() == 4 else t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lose, lambda t: t):
        found = problem.gradients(lambda m, a, s, f: partial.join(m, a, s, 4, layout, f), torch.float32, False)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected))


def test_the_same_bits_for_any_number_of_threads(compiled, layout):
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            Problem(layout, (7, 4, 32, 32)).gradients(
                lambda m, a, s, f: partial.join(m, a, s, 4, layout, f), torch.float32, False
            )
        )
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0]))


def test_shapes_that_differ_are_left_to_pytorch(compiled, layout):
    mixed, around = torch.zeros(2, 4, 5, 5), torch.zeros(2, 12, 5, 5).contiguous(memory_format=layout)
    assert partial._covers(mixed, [around], None, layout)
    assert not partial._covers(mixed, [around, around[:, 1:]], None, layout)
    assert not partial._covers(mixed[:, :, 1:], [around], None, layout)


@pytest.mark.parametrize("reason", ["float64", "another layout", "reference"])
def test_what_compiled_code_does_not_take_goes_to_pytorch(monkeypatch, layout, reason):
    problem, dtype = Problem(layout), torch.float64 if reason == "float64" else torch.float32
    other = next(each for each in LAYOUTS.values() if each != layout) if reason == "another layout" else layout
    if reason == "reference":
        monkeypatch.setenv("RNAS_BACKEND", "reference")

    def join(mixed, arounds, scales, first):
        assert not partial._covers(mixed, arounds, scales, layout)
        return partial.join(mixed, arounds, scales, 4, layout, first)

    exact = problem.gradients(lambda m, a, s, f: defined(m, a, s, 4, f), torch.float64, True)
    for a, b in zip(problem.gradients(join, dtype, True, layout=other), exact, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4)


def test_groups_that_do_not_divide_the_channels_are_refused():
    module, x = backend.module("cpu"), torch.zeros(64)
    sizes, at = (1, 4, 4, 5, 4, 1), x.data_ptr()
    with pytest.raises(ValueError, match="the groups must divide the channels"):
        module.join_channels(sizes, True, True, at, [at], [20, 5], 0, at, 1)
    with pytest.raises(ValueError, match="an address and two steps"):
        module.join_channels(sizes, True, True, at, [at], [20], 0, at, 1)


# ---- memory formats --------------------------------------------------------------------------------------------------


@pytest.fixture
def transposed(compiled, monkeypatch) -> list:
    """The calls of the compiled transpose."""
    calls, transpose = [], backend.module("cpu").transpose
    monkeypatch.setattr(backend.module("cpu"), "transpose", lambda *a: calls.append(a) or transpose(*a))
    return calls


@pytest.mark.parametrize("part", ["all", "channels", "rows"])
@pytest.mark.parametrize("shape", [(3, 17, 33, 35), (2, 64, 32, 32), (2, 5, 80, 80), (2, 9, 5, 1000), (100, 130, 3, 3)])
def test_images_are_arranged_as_pytorch_does_it(transposed, layout, shape, part):
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    cut = {"all": x, "channels": x[:, 1:], "rows": x[:, :, : max(1, shape[2] - 2)]}[part]
    wanted = next(each for each in LAYOUTS.values() if each != layout)
    made = formats.arranged(cut, wanted)
    assert torch.equal(made, cut) and made.stride() == cut.contiguous(memory_format=wanted).stride()
    assert formats.arranged(made, wanted) is made and len(transposed) == 1
    weights = torch.randn(made.shape).requires_grad_()
    (gradient,) = torch.autograd.grad((made * weights).sum(), x, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad((cut * weights).sum(), x, retain_graph=True)[0])
    (second,) = torch.autograd.grad(gradient.square().sum(), weights)
    assert torch.equal(second, 2 * weights)


def test_what_compiled_code_does_not_transpose(transposed, monkeypatch):
    x = torch.randn(8, 16, 32, 32)
    for other in (x.double(), x[..., ::2], x[:1, :2], x[:, :, :1, :1], x[:, :, ::2].expand(8, 16, 16, 32)):
        made = formats.arranged(other, torch.channels_last)
        assert torch.equal(made, other) and made.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setenv("RNAS_BACKEND", "reference")
    assert torch.equal(formats.arranged(x, torch.channels_last), x) and not transposed


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_no_gradient_stays_none(compiled, layout):
    x, others = torch.randn(8, 16, 32, 32).requires_grad_(), torch.randn(8, 12, 32, 32).requires_grad_()
    wanted = next(each for each in LAYOUTS.values() if each != layout)
    made = formats.arranged(x.contiguous(memory_format=layout) * 1, wanted)
    assert torch.autograd.grad(NoGradient.apply(made).sum(), x, allow_unused=True) == (None,)
    joined = partial.join(x[:, :4], [others.contiguous(memory_format=layout)], None, 4, layout)
    assert torch.autograd.grad(NoGradient.apply(joined).sum(), (x, others), allow_unused=True) == (None, None)


@pytest.mark.parametrize("make", [fused.empty, lambda like, shape: formats.empty_image(like, *shape[1:])])
def test_new_images_are_views_of_nothing(make):
    assert not make(torch.zeros(64), (64, 32, 64, 64))._is_view()


def test_what_computed_the_images_gets_its_gradient_in_their_format_unless_that_is_a_kernel(transposed):
    seen_in = []

    def seen(gradient):
        seen_in.append([gradient.is_contiguous(memory_format=each) for each in LAYOUTS.values()])

    x = torch.randn(4, 16, 32, 32, requires_grad=True)
    plain = x * 1
    plain.register_hook(seen)
    last = formats.arranged(plain, torch.channels_last)
    back = formats.arranged(last * 1, torch.contiguous_format)  # as the result of a kernel
    back.register_hook(seen)
    formats.arranged(back, torch.channels_last).backward(torch.randn(4, 16, 32, 32).contiguous(memory_format=torch.channels_last))
    assert seen_in == [[False, True], [True, False]] and len(transposed) == 4


def test_a_cell_takes_contiguous_states_once_for_both_passes(transposed):
    x = torch.randn(4, 16, 32, 32, requires_grad=True)
    norms, weight = [torch.nn.BatchNorm2d(16)], torch.randn(16, 16, 3, 3)
    state = x * 1
    out = mixed_op(state, torch.ones(1), [weight], norms, primitives=("conv_3x3",))
    assert out.is_contiguous() and len(transposed) == 1
    state.mul_(2)  # the graph has a copy of its own
    (gradient,) = torch.autograd.grad(out, x, torch.randn_like(out))
    assert gradient.is_contiguous() and len(transposed) == 1  # the kernels write it, and read that of the result


def test_between_two_cells_gradients_stay_as_the_kernels_have_them(transposed):
    seen_in = []
    x, weight = torch.randn(4, 16, 32, 32, requires_grad=True), torch.randn(16, 16, 3, 3)

    def cell(state):
        return mixed_op(state, torch.ones(1), [weight], [torch.nn.BatchNorm2d(16)], primitives=("conv_3x3",))

    between = cell(x)
    between.register_hook(lambda gradient: seen_in.append(formats.layout(gradient)))
    (gradient,) = torch.autograd.grad(cell(between), x, torch.randn_like(between))
    assert between.is_contiguous() and gradient.is_contiguous()
    assert seen_in == [torch.channels_last] and len(transposed) == 2  # the two states
