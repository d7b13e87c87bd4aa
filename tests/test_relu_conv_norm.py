"""relu_conv_norm against its float64 definition, and as a citizen of PyTorch.

Where the compiled kernels are built, they are forced, so that the reference cannot stand in for them unseen.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_checks import (
    LAYOUTS,
    MODES,
    Call,
    Recorder,
    compare,
    distance,
    draw_input,
    draw_norm,
    evaluate,
    noise,
    of_a_mean,
    opcheck,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from rnas import kernels
from rnas.kernels import backend, relu_conv_norm
from rnas.kernels.reference import relu_conv_norm as reference

KINDS = ("inputs", "parameters", "affine")
AFFINE = {"weight and bias": (), "weight": ("bias",), "bias": ("weight",)}  # name: what is taken from an affine norm

pytestmark = pytest.mark.usefixtures("compiled", "poisoned_allocations")


@dataclass
class Layer(Call):
    """The arguments of one call."""

    KINDS = KINDS
    x: Tensor
    weight: Tensor
    norm: nn.BatchNorm2d

    def copy(self, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Layer:
        x, weight = (LAYOUTS[layout](each.detach().to(dtype, copy=True)) for each in (self.x, self.weight))
        return Layer(x, weight, copy.deepcopy(self.norm).to(dtype))

    def run(self, implementation=kernels) -> Tensor:
        return implementation.relu_conv_norm(self.x, self.weight, self.norm)

    def modules(self) -> list[nn.BatchNorm2d]:
        return [self.norm]

    def leaves(self, kind: str) -> list[Tensor]:
        found = {"inputs": [self.x], "parameters": [self.weight], "affine": [self.norm.weight, self.norm.bias]}[kind]
        return [leaf for leaf in found if leaf is not None]

    def all_leaves(self) -> list[Tensor]:
        """The tensors of all kinds."""
        return [leaf for kind in KINDS for leaf in self.leaves(kind)]


def draw(
    seed: int = 0,
    shape: tuple[int, ...] = (3, 5, 7, 9),
    outputs: int = 4,
    mode: str = "train affine",
    affine: str = "weight and bias",
) -> Layer:
    """A random problem.

    Args:
        shape: (N, C, H, W) of x.
        outputs: K.
        mode: a name of `MODES`.
        affine: a name of `AFFINE`; it counts where the mode is affine.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((outputs, shape[1], 1, 1), generator=generator) / shape[1] ** 0.5
    norm = draw_norm(outputs, mode, generator)
    for name in AFFINE[affine]:
        setattr(norm, name, None)
    return Layer(draw_input(shape, generator), weight, norm)


def check(implementation=kernels, wanted=KINDS, **how) -> None:
    """Compares an implementation with the float64 reference on a random problem, see `compare` and `draw` for `how`."""
    compare(draw, reference, implementation, wanted=wanted, **how)


# Values and gradients ------------------------------------------------------------------------------------------------

CHANNELS = [1, 3, 16, 17, 36, 64, 144]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modes_and_layouts(layout, mode):
    check(mode=mode, layout=layout)
    check(mode=mode, layout=layout, shape=(2, 17, 5, 3), outputs=16)


@pytest.mark.parametrize("mode", ["train", "eval affine"])
@pytest.mark.parametrize("outputs", CHANNELS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_numbers_of_channels(channels, outputs, mode):
    if channels == outputs == 1 and mode == "train":
        mode = "train, other numbers"  # a lone weight has no gradient but through eps: with a small one all is rounding
    check(shape=(3, channels, 5, 7), outputs=outputs, mode=mode, layout="channels_last" if channels % 2 else "slice")


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("affine", AFFINE)
def test_a_norm_may_have_one_affine_parameter(affine, mode):
    for wanted in (KINDS, ("inputs",), ("affine",)):
        check(affine=affine, mode=mode, wanted=wanted)
    if affine != "bias":  # plain PyTorch cannot
        check(affine=affine, mode=mode, first=("inputs", "affine"))


SIZES = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 5, 4), (2, 1, 6), (2, 6, 1), (1, 3, 3), (3, 9, 7), (1, 1, 129)]


@pytest.mark.parametrize("channels", [3, 16, 33])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_small_images(size, channels):
    shape = (size[0], channels, *size[1:])
    for mode in ("eval", "eval affine"):
        check(shape=shape, mode=mode)
        check(shape=shape, mode=mode, outputs=40)  # more than there are pixels
    if math.prod(size) >= 5:
        check(shape=shape, mode="train affine")
        check(shape=shape, mode="train affine", outputs=40)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3, 16, 17])
def test_two_values_per_channel(channels, layout):
    # On two values a batch norm is nearly a sign, and its gradient nearly all cancellation: plain PyTorch is the yardstick.
    check(shape=(2, channels, 1, 1), outputs=17, mode="train, other numbers", layout=layout, kink=1e-4)
    check(shape=(2, channels, 1, 1), outputs=17, wanted=("affine",), layout=layout, kink=1e-4)


@pytest.mark.parametrize("mode", ["train affine", "eval"])
def test_large_images(mode):
    check(shape=(2, 48, 28, 28), outputs=16, mode=mode, layout="channels_last")
    check(shape=(1, 64, 28, 31), outputs=36, mode=mode)


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("size", [12, 32])
def test_gradients_behind_a_global_mean(size, mode):
    check(shape=(4, 16, size, size), outputs=16, mode=mode, cotangent=of_a_mean, kink=1e-3)


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("outputs", [1, 3, 16, 17, 36])
@pytest.mark.parametrize("channels", [3, 16, 17, 64])
def test_every_simd_level(level, channels, outputs, mode):
    check(shape=(2, channels, 9, 7), outputs=outputs, mode=mode)
    check(shape=(2, channels, 9, 7), outputs=outputs, mode=mode, layout="channels_last", first=("inputs",))


@pytest.mark.parametrize("wanted", [("inputs",), ("parameters",)], ids="+".join)
def test_every_simd_level_on_what_a_narrow_graph_keeps(level, wanted):
    for shape, outputs in (((2, 5, 9, 7), 17), ((1, 48, 8, 8), 16)):
        check(shape=shape, outputs=outputs, mode="eval", wanted=wanted)
        check(shape=shape, outputs=outputs, mode="eval", wanted=("inputs",), first=("inputs",))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_call(data):
    shape = tuple(data.draw(st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))))
    many = shape[0] * shape[2] * shape[3] >= 12  # values a channel, for its variance
    check(
        shape=shape,
        outputs=data.draw(st.integers(1, 40)),
        mode=data.draw(st.sampled_from([*MODES] if many else ["eval", "eval affine"])),
        affine=data.draw(st.sampled_from(list(AFFINE))),
        layout=data.draw(st.sampled_from(list(LAYOUTS))),
        wanted=data.draw(st.sampled_from([KINDS, *((kind,) for kind in KINDS)])),
        first=data.draw(st.sampled_from([(), (), ("inputs",), ("parameters",)])),
    )


def wrong(change):
    """An implementation with one error in it."""

    def layer(x, weight, norm):
        if change == "another eps":
            norm = nn.BatchNorm2d(norm.num_features, 2 * norm.eps, affine=False)
        if change == "no running statistics":
            norm = copy.deepcopy(norm)
        if change == "a gradient lost":
            weight = weight.detach()
        if change == "no relu":
            return norm(nn.functional.conv2d(x, weight))
        output = reference.relu_conv_norm(x, weight, norm)
        if change == "last pixel forgotten":
            output = torch.cat([output[..., :-1], output[..., -1:] * math.nan], dim=-1)
        return output

    return SimpleNamespace(relu_conv_norm=layer)


WRONG = ["another eps", "no running statistics", "a gradient lost", "no relu", "last pixel forgotten"]


@pytest.mark.parametrize("change", WRONG)
def test_the_gate_turns_red_for_a_wrong_layer(change):
    check(wrong(None), mode="train")
    with pytest.raises(AssertionError):
        check(wrong(change), mode="train")


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
def test_the_relu_of_zero_has_no_gradient(mode):
    def zeros(layer):
        layer.x[:, ::2] = 0.0
        layer.x[:, 1::4, ::2] = -0.0

    check(change=zeros, mode=mode)
    check(change=zeros, mode=mode, first=("inputs",))
    if mode == "eval affine":
        check(change=zeros, mode="eval", wanted=("inputs",))


@pytest.mark.parametrize("mode", ["train", "eval", "eval affine"])
def test_nan_propagates(mode):
    for shape, place in (((2, 3, 9, 7), (1, 2, 4, 4)), ((2, 17, 8, 8), (0, 16, 7, 7)), ((2, 1, 5, 4), (0, 0, 0, 0))):
        layer = draw(shape=shape, mode=mode)
        layer.x[place] = math.nan
        for wanted in ((), ("inputs",), ("parameters",)):
            expected = evaluate(reference, layer.copy(), wanted)
            for layout in ("contiguous", "channels_last"):
                result = evaluate(kernels, layer.copy(layout=layout), wanted)
                for kind, tensors in expected.items():
                    assert torch.equal(result[kind][0].isnan(), tensors[0].isnan()), (kind, wanted)


@pytest.mark.parametrize("value", [3.0, 30.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_pixel_far_from_the_others(layout, value):
    for place in ((0, slice(None), 0, 0), (1, slice(None), 3, 4), (2, slice(None), -1, -1)):

        def put(layer, place=place):
            layer.x[place] = value

        check(mode="train", shape=(3, 16, 18, 20), outputs=16, change=put, wanted=(), layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_values_far_from_zero(layout):
    def shift(layer):
        layer.x.add_(100)

    check(mode="train", shape=(3, 16, 18, 20), outputs=16, change=shift, wanted=(), layout=layout, kink=1e-3)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_infinity_is_no_reason_to_crash(mode):
    layer = draw(mode=mode)
    layer.x[0, 0, 0, 0], layer.x[1, 1, 1, 1] = math.inf, -math.inf
    expected, result = (evaluate(implementation, layer.copy()) for implementation in (reference, kernels))
    assert torch.equal(result["output"][0].isfinite(), expected["output"][0].isfinite())


# Which gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("wanted", [(), *((kind,) for kind in KINDS), KINDS[:2], KINDS[1:]], ids="+".join)
def test_only_the_gradients_asked_for(wanted, mode):
    check(wanted=wanted, mode=mode)
    layer = draw(mode=mode).require(wanted)
    output = layer.run()
    assert output.requires_grad == bool(wanted)
    if wanted:
        output.sum().backward()
    for kind in KINDS:
        assert all((leaf.grad is not None) == (kind in wanted) for leaf in layer.leaves(kind))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
def test_one_affine_parameter_alone(mode, name):
    found = []
    for implementation in (reference, kernels):
        layer = draw(mode=mode).copy().require(())
        leaf = getattr(layer.norm, name).requires_grad_()
        output = layer.run(implementation)
        output.backward(noise(output, 1))
        assert all(other.grad is None for other in layer.all_leaves() if other is not leaf)
        found.append(leaf.grad)
    assert distance(found[1:], found[:1]) <= 1e-5


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("wanted", [("inputs",), KINDS], ids="+".join)
def test_two_gradients_through_one_graph_agree(wanted, mode):
    layer = draw(mode=mode).require(wanted)
    leaves = [leaf for kind in wanted for leaf in layer.leaves(kind)]
    output = layer.run()
    incoming = noise(output, 1)
    before, kept = output.detach().clone(), incoming.clone()
    runs = [torch.autograd.grad(output, leaves, incoming, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    part = torch.autograd.grad(output, layer.x, incoming, retain_graph=True)
    assert distance(list(part), list(runs[0][:1])) <= 1e-6
    assert torch.equal(output, before) and torch.equal(incoming, kept)


@pytest.mark.parametrize("incoming", ["channels_last", "transposed", "every other pixel", "expanded"])
@pytest.mark.parametrize("wanted", [("inputs",), KINDS], ids="+".join)
def test_any_layout_of_the_incoming_gradient(wanted, incoming):
    layer = draw(mode="eval affine").require(wanted)
    leaves = [leaf for kind in wanted for leaf in layer.leaves(kind)]
    output = layer.run()
    gradient = torch.ones(()).expand(output.shape) if incoming == "expanded" else LAYOUTS[incoming](noise(output, 1))
    plain = torch.autograd.grad(output, leaves, gradient.contiguous(), retain_graph=True)
    other = torch.autograd.grad(output, leaves, gradient)
    assert distance(list(other), list(plain)) <= 1e-6


def test_a_graph_survives_another_call_with_the_same_norm():
    expected = None
    for implementation in (reference, kernels):
        layer = draw().copy().require(KINDS)
        outputs = [layer.run(implementation) for _ in range(2)]
        total = (outputs[0] * noise(outputs[0], 1)).sum() - (outputs[1] * noise(outputs[1], 2)).sum()
        found = [*torch.autograd.grad(total, layer.all_leaves()), layer.norm.running_var]
        expected = expected or found
    assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_graph_notices_that_its_input_was_overwritten(layout, compiled):
    layer = draw().require(KINDS)
    layer.x = layer.x.detach().contiguous(memory_format=layout).requires_grad_()
    output, like = layer.run(), torch.randn(*layer.run().shape)
    expected = torch.autograd.grad(output, layer.x, like, retain_graph=True)
    with torch.no_grad():
        layer.x.mul_(-2)
    if compiled and layout == torch.contiguous_format:  # the kernels have a copy in their own format
        assert torch.equal(*expected, *torch.autograd.grad(output, layer.x, like))
        return
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        output.sum().backward()


def test_a_graph_on_masks_does_not_hold_its_input(compiled):
    if not compiled:
        pytest.skip("plain PyTorch holds it")
    layer = draw(mode="eval", shape=(4, 8, 16, 16)).require(("inputs",))
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: stored.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        output = layer.run()
    assert sum(stored) < layer.x.untyped_storage().nbytes() / 4
    (expected,) = torch.autograd.grad(output.sum(), layer.x, retain_graph=True)
    with torch.no_grad():
        layer.x.fill_(1.0)
        output.detach().fill_(1.0)
    assert torch.equal(torch.autograd.grad(output.sum(), layer.x)[0], expected)


def test_arguments_are_left_as_they_were():
    layer = draw(mode="eval affine").require(KINDS)
    tensors = [*layer.all_leaves(), layer.norm.running_mean, layer.norm.running_var, layer.norm.num_batches_tracked]
    before = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
    layer.run().sum().backward()
    assert all(torch.equal(t, value) and t._version == version for t, (value, version) in zip(tensors, before))


def test_without_grad_mode():
    layer = draw()
    expected = layer.copy().require(KINDS).run()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            output = layer.copy().require(KINDS).run()
        assert not output.requires_grad
        torch.testing.assert_close(output, expected.detach(), rtol=1e-5, atol=1e-5)


# Second derivatives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "train affine", "train, other numbers", "eval", "eval affine"])
@pytest.mark.parametrize("first", [*((kind,) for kind in KINDS), KINDS], ids="+".join)
def test_second_derivatives(first, mode):
    if first == ("affine",) and "affine" not in mode and "other" not in mode:
        pytest.skip("has no affine parameters")
    check(first=first, mode=mode)
    check(first=first, mode=mode, shape=(2, 16, 6, 5), outputs=17, layout="channels_last")


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_one_second_derivative_alone(first, kind, mode):
    check(first=(first,), wanted=(kind,), mode=mode)


@pytest.mark.parametrize("affine", [False, True])
def test_second_derivatives_on_masks(affine):
    results = []
    for implementation in (reference, kernels):
        layer = draw(mode="eval affine" if affine else "eval").copy(layout="channels_last").require(("inputs",))
        output = layer.run(implementation)
        cotangent = noise(output, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(output, layer.x, cotangent, create_graph=True)
        total = (gradient * noise(gradient, 2)).sum()
        options = {"retain_graph": True, "materialize_grads": True}
        by_x, by_cotangent = torch.autograd.grad(total, [layer.x, cotangent], **options)
        assert by_x.shape == layer.x.shape and not by_x.any()
        if implementation is kernels:
            (alone,) = torch.autograd.grad(total, layer.x, retain_graph=True)  # not "unused"
            assert not alone.any()
            assert torch.equal(torch.autograd.grad(total, cotangent, retain_graph=True)[0], by_cotangent)
        results.append([gradient.detach(), by_cotangent])
    assert distance(results[1], results[0]) <= 1e-6


def test_no_third_derivatives_on_masks(compiled):
    if not compiled:
        pytest.skip("the reference has them")
    layer = draw(mode="eval").require(("inputs",))
    output = layer.run()
    cotangent = noise(output, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(output, layer.x, cotangent, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives"):
        torch.autograd.grad(gradient.sum(), cotangent, create_graph=True)


def test_third_derivatives_on_fixed_statistics():  # on those of a batch, plain PyTorch has none
    results = []
    for implementation in (reference, kernels):
        layer = draw(mode="eval affine").copy().require(KINDS)
        output = layer.run(implementation)
        for order in range(2):
            total = (output * noise(output, order)).sum()
            found = torch.autograd.grad(total, layer.all_leaves(), create_graph=True, allow_unused=True)
            output = sum((each * noise(each, 10 * order)).sum() for each in found if each is not None)
        results.append(list(torch.autograd.grad(output, layer.all_leaves(), materialize_grads=True)))
    assert distance(results[1], results[0]) <= 1e-4


@pytest.mark.parametrize("mode", ["train affine", "eval affine", "eval"])
def test_derivatives_in_float64(mode, monkeypatch):
    monkeypatch.setenv("RNAS_BACKEND", "auto")
    layer = draw(mode=mode, shape=(2, 3, 3, 3)).copy(torch.float64).require(KINDS)
    assert torch.autograd.gradcheck(lambda x, weight: relu_conv_norm(x, weight, layer.norm), (layer.x, layer.weight))
    assert torch.autograd.gradgradcheck(
        lambda x, weight: relu_conv_norm(x, weight, layer.norm), (layer.x, layer.weight)
    )


@pytest.mark.parametrize("what", ["x", "weight"])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_mode_is_refused(what, grad_mode, compiled):
    if not compiled:
        pytest.skip("the reference has forward-mode derivatives")
    layer = draw(mode="eval")

    def call(value):
        changed = layer.copy()
        setattr(changed, what, value)
        return changed.run()

    value = getattr(layer, what)
    with torch.set_grad_enabled(grad_mode):
        with pytest.raises(RuntimeError):
            torch.func.jvp(call, (value,), (torch.ones_like(value),))
        with forward_ad.dual_level(), pytest.raises(RuntimeError):
            call(forward_ad.make_dual(value, torch.ones_like(value)))


# Layout, repeatability -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_output(layout):
    layer = draw(mode="eval", shape=(2, 4, 8, 6)).copy(layout=layout)
    for wanted in ((), ("inputs",), KINDS):
        output = layer.require(wanted).run()
        assert output.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
        assert output.is_contiguous() == (layout != "channels_last")


def test_an_image_in_both_layouts_gives_a_contiguous_output():
    assert draw(shape=(2, 1, 8, 8)).copy(layout="channels_last").run().is_contiguous()
    assert draw(shape=(2, 3, 1, 1), mode="eval").copy(layout="channels_last").run().is_contiguous()


def test_weights_may_be_views():
    layer = draw()
    expected = layer.copy().run()
    layer.weight = layer.weight.transpose(0, 1).contiguous().transpose(0, 1)
    assert not layer.weight.is_contiguous() and torch.equal(layer.run(), expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", ["train affine", "eval", "eval affine"])
def test_threads_and_same_bits_every_time(mode, threads):
    torch.set_num_threads(threads)
    try:
        for shape, outputs in (((5, 17, 9, 7), 36), ((1, 3, 1, 2), 64), ((2, 36, 28, 28), 16)):
            kinds = KINDS if shape[3] > 2 or "eval" in mode else ("affine",)  # two values: see above
            check(mode=mode, shape=shape, outputs=outputs, layout="channels_last", wanted=kinds, kink=1e-4)
            layer = draw(mode=mode, shape=shape, outputs=outputs)
            for wanted, first in ((KINDS, ()), (KINDS, ("inputs",)), (("inputs",), ())):
                runs = [evaluate(kernels, layer.copy(), wanted, first) for _ in range(2)]
                for kind in runs[0]:
                    assert all(torch.equal(a, b) for a, b in zip(runs[0][kind], runs[1][kind])), kind
    finally:
        torch.set_num_threads(1)


# Compilers, backends and refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train affine", "eval", "eval affine"])
def test_opcheck(mode, compiled):
    if not compiled:
        pytest.skip("the reference calls no registered op")
    layer = draw(mode=mode, shape=(2, 3, 5, 4))
    with Recorder("relu_conv_norm_") as recorder:
        evaluate(kernels, layer.copy(), KINDS)
        evaluate(kernels, layer.copy(), KINDS, first=("inputs", "parameters"))
        evaluate(kernels, layer.copy(), ("inputs",), first=("inputs",))
    names = {function.name() for function, _, _ in recorder.one_each()}
    expected = {"forward", "backward"} | ({"double_backward"} if "eval" in mode else set())
    assert names == {f"rnas::relu_conv_norm_{name}" for name in expected}
    for function, arguments, options in recorder.one_each():
        opcheck(function, arguments, options)


class Block(nn.Module):
    """A module around the op."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.weight = nn.Parameter(layer.weight)
        self.norm = layer.norm

    def forward(self, x: Tensor) -> Tensor:
        return relu_conv_norm(x, self.weight, self.norm).sigmoid()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["train affine", "train, cumulative", "train, no buffers", "eval", "eval affine"])
def test_compiles_whole_and_once(mode, layout):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = draw(mode=mode, shape=(2, 3, 8, 8))
    eager, module = Block(layer.copy()), Block(layer.copy())
    compiled_module = torch.compile(module, fullgraph=True, backend=counter)
    for seed in range(2):
        x = draw(seed, mode=mode, shape=(2, 3, 8, 8)).copy(layout=layout).x
        results = []
        for call, owner in ((eager, eager), (compiled_module, module)):
            leaf = x.clone().requires_grad_()
            owner.zero_grad()
            output = call(leaf)
            output.backward(noise(output, 1))
            tensors = [output.detach(), leaf.grad, *(p.grad for p in owner.parameters()), *owner.buffers()]
            results.append([tensor.clone() for tensor in tensors])
        assert distance(results[1], results[0]) <= 1e-6
        assert all(a.stride() == b.stride() for a, b in zip(*results))
    assert counter.frame_count == 1


def test_compiles_on_masks():
    torch._dynamo.reset()
    layer = draw(mode="eval").require(("inputs",))
    compiled_call = torch.compile(
        lambda x: relu_conv_norm(x, layer.weight, layer.norm), fullgraph=True, backend="aot_eager"
    )
    gradients = []
    for call in (compiled_call, lambda x: relu_conv_norm(x, layer.weight, layer.norm)):
        output = call(layer.x)
        gradients.append(torch.autograd.grad(output, layer.x, noise(output, 1))[0])
    assert torch.equal(*gradients)


def test_the_reference_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("RNAS_BACKEND", "reference")
    layer = draw()
    results = [evaluate(implementation, layer.copy(), KINDS) for implementation in (kernels, reference)]
    assert all(torch.equal(a, b) for kind in results[0] for a, b in zip(results[0][kind], results[1][kind]))


def test_float64_goes_to_the_reference_and_is_refused_where_the_kernel_is_forced(compiled, monkeypatch):
    layer = draw()
    if compiled:
        with pytest.raises(backend.BackendError, match="float64"):
            layer.copy(torch.float64).run()
    monkeypatch.setenv("RNAS_BACKEND", "auto")
    results = [layer.copy(torch.float64).run(implementation) for implementation in (kernels, reference)]
    assert torch.equal(*results)


def test_the_kernel_says_what_it_does_not_cover(compiled, monkeypatch):
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    own, empty, half, lone = draw(), draw(shape=(0, 5, 7, 9), mode="eval"), draw(), draw(mode="eval")
    own.norm, lone.norm.running_mean = Doubled(4), None
    half.norm.double()
    for layer, reason in (
        (own, "forward of its own"),
        (empty, "empty"),
        (half, "float32"),
        (lone, "without the other"),
    ):
        monkeypatch.setenv("RNAS_BACKEND", "cpu")
        if compiled:
            with pytest.raises(backend.BackendError, match=f"cannot serve relu_conv_norm .*{reason}"):
                layer.run()
        monkeypatch.setenv("RNAS_BACKEND", "auto")
        if layer is own or layer is empty:
            assert torch.equal(layer.copy().run(), layer.copy().run(reference))
    with torch.autocast("cpu", torch.bfloat16):
        assert draw().run().dtype == draw().run(reference).dtype
        behind = draw()  # another layer: its images have been cast, its weight has not
        behind.x = behind.x.bfloat16()
        assert torch.equal(behind.run(), behind.copy().run(reference).to(torch.bfloat16))


@pytest.mark.parametrize("batch", [0, 2])
def test_an_empty_batch_gives_an_empty_output(batch, monkeypatch):
    monkeypatch.setenv("RNAS_BACKEND", "auto")
    assert draw(shape=(batch, 3, 5, 4), mode="eval").run().shape == (batch, 4, 5, 4)


def test_batch_statistics_need_more_than_one_value():
    for mode in ("train", "eval, no buffers"):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            draw(shape=(1, 3, 1, 1), mode=mode).run()


X, WEIGHT, NORM = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 1, 1), nn.BatchNorm2d(4)
REFUSED = [
    ({"x": [0.5]}, TypeError, "x .*list"),
    ({"x": X.byte()}, TypeError, "x .*uint8"),
    ({"x": X[0]}, ValueError, r"x .*\(N, C, H, W\).*\(3, 8, 8\)"),
    ({"x": X[:, :, :0]}, ValueError, r"x .*\(2, 3, 0, 8\)"),
    ({"x": X[:, :2]}, ValueError, r"weight .*\(K, 2, 1, 1\).*\(4, 3, 1, 1\)"),
    ({"weight": None}, TypeError, "weight .*NoneType"),
    ({"weight": WEIGHT[:, :, 0, 0]}, ValueError, r"weight .*\(K, C, 1, 1\).*\(4, 3\)"),
    ({"weight": torch.rand(4, 3, 3, 3)}, ValueError, r"weight .*\(K, 3, 1, 1\).*\(4, 3, 3, 3\)"),
    ({"weight": WEIGHT[:0]}, ValueError, r"weight .*\(0, 3, 1, 1\)"),
    ({"weight": WEIGHT.double()}, TypeError, "weight .*float32.*float64"),
    ({"weight": WEIGHT.to("meta")}, ValueError, "weight .*cpu.*meta"),
    ({"norm": nn.Identity()}, TypeError, "norm .*BatchNorm2d.*Identity"),
    ({"norm": nn.BatchNorm2d(3)}, ValueError, "norm .*4 features.*3"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_refuses_bad_arguments(changes, error, message):
    arguments = {"x": X, "weight": WEIGHT, "norm": NORM}
    relu_conv_norm(**arguments)
    with pytest.raises(error, match=message):
        relu_conv_norm(**arguments | changes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 4, 6, 8), (3, 5, 7, 5), (4, 3, 3, 3), (2, 16, 1, 4)])
def test_factorized_reduce(shape, training):
    """Against its definition in float64: values, averages, gradients, and a second derivative."""
    torch.manual_seed(0)
    channels, outputs = shape[1], max(1, shape[1] - 1)
    even = torch.randn(outputs - outputs // 2, channels, 1, 1)
    odd = torch.randn(outputs // 2, channels, 1, 1) if outputs > 1 else None
    norm = nn.BatchNorm2d(outputs)
    norm.running_var.uniform_(0.5, 2.0)
    norm.train(training)
    x = draw_away_from_zero(shape)

    def derivatives(function, dtype):
        own = copy.deepcopy(norm).to(dtype)
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (x, even, odd)]
        out = function(*leaves, own)
        given = [leaf for leaf in leaves if leaf is not None] + [own.weight, own.bias]
        noise = torch.cos(torch.arange(out.numel(), dtype=dtype)).view(out.shape)
        first = torch.autograd.grad(out, given, noise, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), given[1:-1], allow_unused=True)
        return [out, *first, *second, own.running_mean, own.running_var]

    found = derivatives(kernels.factorized_reduce, torch.float32)
    expected = derivatives(reference.factorized_reduce, torch.float64)
    usual = derivatives(reference.factorized_reduce, torch.float32)
    for ours, theirs, plain in zip(found, expected, usual, strict=True):
        size = theirs.norm().item() or 1.0
        error, of_plain = ((each.double() - theirs).norm().item() / size for each in (ours, plain))
        assert error <= 3 * of_plain + 2e-5


def draw_away_from_zero(shape) -> Tensor:
    """Images without values near the kink of a ReLU."""
    signs = torch.randint(2, shape) * 2 - 1
    return signs * (0.1 + torch.rand(shape))
