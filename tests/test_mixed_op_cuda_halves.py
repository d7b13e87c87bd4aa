"""The CUDA kernels of mixed_op and mixed_cell on images of bfloat16 and float16, against the float64 definition.

Tolerances stand at the top of half_checks.py. Every test runs on a GPU where there is one (-m gpu), and on the same
kernels compiled for the host, see tests/cuda_on_host.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from half_checks import HALVES, PLUS, TIMES, MixedPrecision, check_half, draw_half
from op_checks import BUFFERS, Recorder, distance, evaluate, noise
from test_mixed_op import KINDS, Problem, draw
from test_mixed_op_cuda import leaves_of, same, values_and_gradients
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from rnas import kernels
from rnas.kernels import backend, engine, mixed_cell, mixed_op
from rnas.kernels.reference import mixed_op as reference
from rnas.spaces import DARTS
from rnas.supernet import Supernet

ALL = (reference.PRIMITIVES, True)
FEW = (("sep_conv_3x3", "skip_connect", "max_pool_3x3"), True)
CASES = {  # arguments of `draw`; small: every value must be away from the kinks
    "all": {"space": ALL, "shape": (1, 4, 4, 5), "mode": "train affine"},
    "all, stride 2": {"space": ALL, "shape": (2, 4, 5, 4), "stride": 2, "mode": "train affine"},
    "16 channels": {"shape": (1, 16, 3, 2), "mode": "eval affine"},
    "nodes": {"space": FEW, "cell": (1, 2, 1), "shape": (1, 4, 3, 3), "mode": "eval affine"},
    "reduction": {"space": FEW, "cell": (2, 1, 2), "shape": (2, 4, 5, 4), "mode": "train affine"},
    "many edges": {"space": ALL, "cell": (3, 1, 2), "shape": (1, 4, 3, 4), "mode": "eval affine"},
    "three channels": {"cell": (2, 1, 2), "shape": (2, 3, 5, 4), "mode": "train affine"},
    "one channel": {"space": ALL, "shape": (1, 1, 5, 4), "mode": "eval"},
    "partial": {
        "space": FEW,
        "cell": (1, 2, 1),
        "shape": (1, 8, 3, 3),
        "partial": 2,
        "edge_weights": True,
        "mode": "eval affine",
    },
    "scales": {"space": FEW, "cell": (1, 2, 1), "shape": (2, 4, 3, 3), "mode": "train affine", "image_scales": True},
    "scales, eval": {"space": FEW, "cell": (1, 2, 1), "shape": (2, 4, 3, 3), "mode": "eval", "image_scales": True},
    "many pixels": {
        "space": (("avg_pool_3x3", "dil_conv_5x5", "conv_3x3"), False),
        "shape": (2, 4, 19, 18),
        "mode": "train affine",
    },
}

pytestmark = pytest.mark.parametrize("dtype", HALVES, ids=str)
both_kinds = pytest.mark.parametrize("kind", [Problem, MixedPrecision], ids=["converted", "autocast"])
only_on_host = pytest.mark.parametrize("cuda_device", ["host"], indirect=True)


# Values and gradients ------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients(case, kind, dtype, cuda_device):
    check_half(dtype, cuda_device, kind=kind, **CASES[case])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitive", reference.PRIMITIVES)
def test_every_primitive_alone(primitive, stride, dtype, cuda_device):
    """But for the gradient of its weight, a single number, which plain PyTorch may meet by luck."""
    how = {"space": ((primitive,), True), "shape": (2, 4, 5, 3), "stride": stride}
    for mode in ("train affine", "eval"):
        check_half(dtype, cuda_device, wanted=("inputs", "parameters", "affine"), mode=mode, **how)


@pytest.mark.parametrize("wanted", [(), *((kind,) for kind in KINDS)], ids="+".join)
def test_only_the_gradients_asked_for(wanted, dtype, cuda_device):
    check_half(dtype, cuda_device, wanted=wanted, **CASES["reduction"])
    problem = draw(**CASES["reduction"]).copy(dtype, device=cuda_device).require(wanted)
    assert problem.run().requires_grad == bool(wanted)


@both_kinds
@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("first", [("inputs",), KINDS], ids="+".join)
def test_second_derivatives(first, mode, kind, dtype, cuda_device):
    check_half(dtype, cuda_device, kind=kind, first=first, mode=mode, space=ALL, shape=(2, 4, 3, 3))


@pytest.mark.parametrize("channels", [3, 4])
def test_second_derivatives_of_a_cell(channels, dtype, cuda_device):
    check_half(
        dtype, cuda_device, first=KINDS, mode="eval affine", space=FEW, cell=(1, 2, 2), shape=(1, channels, 5, 4)
    )


@pytest.mark.parametrize("first", [(), ("inputs",)], ids=["first derivatives", "second derivatives"])
@pytest.mark.parametrize("channels", [3, 4])
def test_last_node_alone(channels, first, dtype, cuda_device):
    how = {"space": FEW, "cell": (1, 2, 2), "shape": (2, channels, 5, 4), "last": True}
    check_half(dtype, cuda_device, first=first, mode="eval affine", **how)
    if not first:
        check_half(dtype, cuda_device, mode="train affine", **how)


@pytest.mark.parametrize("layout", ["channels_last", "slice"])
def test_layouts(layout, dtype, cuda_device):
    check_half(dtype, cuda_device, layout=layout, **CASES["reduction"])


# Roundings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.3, 3.0, 1e-3])
def test_every_number_is_read_and_rounded_as_pytorch_does(weight, dtype, cuda_device):
    """All 65,536, the infinities, NaN and those below the normal ones too; times a weight, so that most are rounded."""
    x = torch.arange(2**16).to(torch.uint16).view(dtype).reshape(1, 4, 128, 128).to(cuda_device)
    weights = torch.tensor([weight], device=cuda_device)
    found = mixed_op(x, weights, (), (), primitives=("skip_connect",))
    torch.testing.assert_close(found, (x.float() * weights).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_a_node_is_rounded_once(dtype, cuda_device):
    """However many launches its edges take: here two, and the last edge is in the second."""
    problem = draw(space=ALL, cell=(4, 1, 1), shape=(2, 4, 5, 5), mode="eval").copy(dtype, device=cuda_device)
    problem.weights.zero_()[:, reference.PRIMITIVES.index("skip_connect")] = 1
    exact = sum(state.double() for state in problem.states).to(dtype)
    assert torch.equal(problem.run(), exact)


def test_the_gradient_of_a_state_is_rounded_once(dtype, cuda_device):
    """However many nodes it comes from. Those of nodes are rounded too, where they are complete."""
    states = [noise(torch.empty(2, 4, 5, 3), seed).to(cuda_device, dtype).requires_grad_() for seed in range(2)]
    weights = torch.ones(2 + 3 + 4, 1, device=cuda_device)
    out = mixed_cell(states, weights, [()] * 9, [()] * 9, primitives=("skip_connect",), nodes=3)
    incoming = noise(out, 5)
    first, second, third = incoming.double().chunk(3, dim=1)
    second = (second + third).to(dtype).double()
    first = (first + second + third).to(dtype).double()
    expected = (first + second + third).to(dtype)
    for found in torch.autograd.grad(out, states, incoming):
        assert torch.equal(found, expected)


# Parameters and norms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train affine", "train, cumulative", "eval affine"])
@pytest.mark.parametrize(
    "names", [("weight", "bias", "running_mean", "running_var"), BUFFERS[:2], BUFFERS[:1]], ids=str
)
def test_norms_may_be_float32(names, mode, dtype, cuda_device):
    """As they are often left in a converted model, as a whole or in part; what they hold stays in its dtype."""
    problem = draw_half(dtype, space=FEW, shape=(2, 4, 6, 5), mode=mode)
    exact, plain = (evaluate(reference, problem.copy(each)) for each in (torch.float64, dtype))
    problem = problem.copy(dtype, device=cuda_device)
    for tensor in [getattr(norm, name) for norm in problem.modules() for name in names]:
        if tensor is not None:
            tensor.data = tensor.data.float()
    before = [tensor.dtype for norm in problem.modules() for tensor in norm.state_dict().values()]
    found = evaluate(kernels, problem)
    assert [tensor.dtype for norm in problem.modules() for tensor in norm.state_dict().values()] == before
    assert found["output"][0].dtype == dtype
    for name in ("output", *BUFFERS[:2]):
        usual = TIMES * distance(plain[name], exact[name]) + PLUS[dtype]
        assert distance([tensor.cpu() for tensor in found[name]], exact[name]) <= usual, name


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_averages_are_rounded_once(momentum, dtype, cuda_device):
    """They move in float32: towards the values of the batch, not towards what those are rounded to."""
    problem = draw(space=(("conv_1x1",), True), shape=(2, 4, 5, 3), mode="train").copy(dtype, device=cuda_device)
    (norm,) = problem.modules()
    norm.momentum = momentum
    share = 0.25 if momentum is None else momentum  # of three batches before and this one
    before = [norm.running_mean.double(), norm.running_var.double()]
    problem.run()
    y = F.conv2d(problem.states[0].double().relu(), problem.parameters[0][0].double())
    for old, new, batch in zip(before, (norm.running_mean, norm.running_var), (y.mean((0, 2, 3)), y.var((0, 2, 3)))):
        expected = (1 - share) * old + share * batch
        half_a_unit = expected.abs() * torch.finfo(dtype).eps / 2
        assert ((new.double() - expected).abs() <= 1.01 * half_a_unit).all()


def test_norms_of_two_dtypes_go_to_plain_pytorch(dtype, cuda_device):
    problem = draw(**CASES["reduction"]).copy(dtype, device=cuda_device)
    problem.modules()[0].float()
    with pytest.raises(backend.BackendError, match="the norms differ in dtype"):
        problem.run()


def test_mixing_weights_may_be_float32(dtype, cuda_device):
    problem = draw(cell=(1, 2, 1), shape=(1, 4, 5, 4), mode="eval").copy(dtype, device=cuda_device)
    expected = problem.run()
    problem.weights = problem.weights.float().requires_grad_()
    output = problem.run()
    assert torch.equal(output, expected)
    (gradient,) = torch.autograd.grad(output, problem.weights, noise(output, 1))
    assert gradient.dtype == torch.float32


def test_parameters_of_another_dtype_are_refused(dtype, cuda_device):
    problem = draw(shape=(1, 4, 5, 4)).copy(dtype, device=cuda_device)
    problem.parameters = [[tensor.float() for tensor in edge] for edge in problem.parameters]
    with pytest.raises(TypeError, match=rf"parameters\[0\] must have the dtype of the states, {dtype}"):
        problem.run()


# Autocast ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["all, stride 2", "nodes", "partial"])
def test_autocast_casts_states_and_nothing_else(case, dtype, cuda_device):
    """float32 states give the bits of those cast beforehand, and gradients in their own dtype."""
    problem = draw(**CASES[case]).copy(device=cuda_device).require(KINDS)
    with torch.autocast(cuda_device, dtype):
        output = problem.run()
    incoming = noise(output, 1)
    found = torch.autograd.grad(output, leaves_of(problem), incoming, materialize_grads=True)
    assert output.dtype == dtype and {each.dtype for each in found} == {torch.float32}
    cast = MixedPrecision(**vars(draw(**CASES[case]))).copy(dtype, device=cuda_device).require(KINDS)
    with torch.autocast(cuda_device, dtype):
        expected = cast.run()
    assert torch.equal(output, expected)
    for mine, theirs in zip(found, torch.autograd.grad(expected, leaves_of(cast), incoming, materialize_grads=True)):
        assert torch.equal(mine.to(theirs.dtype), theirs)


def test_states_of_two_dtypes_under_autocast(dtype, cuda_device):
    problem = draw(cell=(2, 1, 1), shape=(1, 4, 5, 4), mode="eval").copy(device=cuda_device)
    with pytest.raises(TypeError, match="states must have one dtype"):
        mixed_cell((problem.states[0], problem.states[1].to(dtype)), *problem.arguments()[1:], **problem.options())
    with torch.autocast(cuda_device, dtype):
        expected = problem.run()
        problem.states[1] = problem.states[1].to(dtype)
        assert torch.equal(problem.run(), expected)


def test_what_autocast_leaves_to_plain_pytorch(dtype, cuda_device):
    problem = draw(shape=(1, 4, 5, 4), mode="eval").copy(device=cuda_device)
    problem.parameters[0][0] = problem.parameters[0][0].to(dtype)
    with torch.autocast(cuda_device, dtype), pytest.raises(backend.BackendError, match="parameters differ in dtype"):
        problem.run()
    wide = draw(shape=(1, 4, 5, 4), mode="eval").copy(torch.float64, device=cuda_device)
    with torch.autocast(cuda_device, dtype), pytest.raises(backend.BackendError, match="autocast is on"):
        wide.run()


@pytest.mark.parametrize("way", ["converted", "autocast"])
def test_a_supernet(way, dtype, cuda_device, monkeypatch):
    """Its cells run fused, the rest as plain PyTorch; logits near those of float32, gradients as wide as what they are of."""
    monkeypatch.setenv(backend.VARIABLE, "auto")
    torch.manual_seed(0)
    supernet = Supernet(dataclasses.replace(DARTS, nodes=2), channels=4, layers=3, num_classes=4).to(cuda_device)
    shape = (len(supernet.space.edges), len(DARTS.primitives))
    mixing = {name: torch.randn(shape, device=cuda_device).softmax(1).requires_grad_() for name in DARTS.cell_types}
    x = torch.rand(4, 3, 16, 16, device=cuda_device)
    expected = supernet(x, mixing)
    supernet = supernet.to(dtype) if way == "converted" else supernet
    with torch.autocast(cuda_device, dtype, enabled=way == "autocast"), Recorder("mixed_cell_forward") as recorder:
        logits = supernet(x.to(dtype) if way == "converted" else x, mixing)
    assert len(recorder.calls) == 3 and logits.dtype == dtype
    assert distance([logits.float()], [expected]) <= 20 * torch.finfo(dtype).eps
    logits.float().square().sum().backward()
    for leaf in (*supernet.parameters(), *mixing.values()):
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.isfinite().all()


# As citizens of PyTorch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["inputs", "incoming", "all"])
def test_any_alignment(which, dtype, cuda_device):
    """What does not begin where four elements can be loaded at once is copied."""

    def shifted(tensor: Tensor) -> Tensor:
        moved = tensor.new_empty(tensor.numel() + 1)[1:].as_strided(tensor.shape, tensor.stride(), 1)
        assert moved.copy_(tensor).data_ptr() % 16 == tensor.element_size()
        return moved

    problem = draw(cell=(2, 1, 2), shape=(2, 8, 5, 4), mode="eval affine").copy(dtype, "channels_last", cuda_device)
    for norm in problem.modules():
        norm.float()
    expected = values_and_gradients(problem.require(KINDS))
    incoming = noise(expected[0], 1).to(memory_format=torch.channels_last)
    if which != "incoming":
        problem.states = [shifted(state.detach()) for state in problem.states]
    if which == "all":
        problem.weights = shifted(problem.weights.detach())
        for norm in problem.modules():
            norm.running_mean, norm.running_var = shifted(norm.running_mean), shifted(norm.running_var)
    found = values_and_gradients(problem.require(KINDS), incoming if which == "inputs" else shifted(incoming))
    assert same(found, expected)


@pytest.mark.parametrize("case", ["reduction", "three channels"])
def test_same_bits_every_time_and_in_every_order_of_a_block_s_threads(case, dtype, cuda_device, request):
    runs = []
    for order in (0, 0, 1) if cuda_device == "cpu" else (0, 0):
        if cuda_device == "cpu":
            request.getfixturevalue("kernels_on_host").set_host_thread_order(order)
        runs.append(evaluate(kernels, draw(**CASES[case]).copy(dtype, device=cuda_device), KINDS))
    assert all(same(runs[0][kind], other[kind]) for other in runs[1:] for kind in runs[0])


@pytest.mark.parametrize("case", ["reduction", "three channels", "partial"])
def test_opcheck_and_fake_tensors(case, dtype, cuda_device):
    """Shapes, strides and dtypes, of what is kept too; those of a GPU where there is none."""
    problem = draw(**CASES[case]).copy(dtype, device=cuda_device)
    with Recorder("mixed_cell") as recorder:
        values_and_gradients(problem.require(KINDS))
    for function, arguments, options in recorder.one_each():
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(function, arguments, options, test_utils=utilities)
        with torch.no_grad():
            real = function(*arguments, **options)
            with FakeTensorMode(allow_non_fake_inputs=True):
                fake = function(
                    *torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("cuda"), arguments), **options
                )
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    images = [each for each in real if each.dim() == 4 or each.dim() == 5]
    assert images and {each.dtype for each in images} == {dtype}


def test_activations_and_workspace_take_half_the_memory(dtype, cuda_device):
    x = torch.empty(2, 4, 32, 32, device=cuda_device)
    shape = (2, 4, 32, 32, 2, 4, 1, 1, 0, 0, 0, 0)
    wide, narrow = (engine.of(x).sizes(shape, "sep_conv_3x3,skip_connect", each) for each in (torch.float32, dtype))
    assert narrow.kept_activations == wide.kept_activations / 2 > 0
    assert narrow.workspace < wide.workspace


@only_on_host
def test_the_compiled_functions_refuse_what_they_do_not_take(dtype, cuda_device, kernels_on_host):
    name, images = str(dtype).removeprefix("torch."), torch.zeros(64, dtype=dtype)
    tables = [0, 0, 0, 0, 0, 0]

    def forward(channels: int, offset: int, dtype_name: str):
        address = images.data_ptr() + offset
        rest = (1e-5, False, 0, address, 0, 0, 0, torch.zeros(2**16).data_ptr(), dtype_name, 0, 0)
        weights = torch.ones(1)
        shape = (1, channels, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0)
        kernels_on_host.mixed_forward(shape, [["skip_connect"]], [address, weights.data_ptr(), *tables], *rest)

    forward(4, 0, name)
    for arguments in ((3, 0, name), (4, 2, name), (4, 0, "float64")):
        with pytest.raises(ValueError, match="images"):
            forward(*arguments)


@pytest.mark.parametrize("autocast", [False, True])
def test_torch_compile(autocast, dtype, cuda_device):
    """Without a break in the graph, and without compiling again for other numbers."""
    torch._dynamo.reset()
    problem = draw(cell=(1, 2, 1), shape=(2, 4, 5, 4), mode="eval")
    problem = problem.copy(torch.float32 if autocast else dtype, device=cuda_device)
    counter = CompileCounterWithBackend("aot_eager")

    def cell(x: Tensor) -> Tensor:
        return mixed_cell((x,), *problem.arguments()[1:], **problem.options())

    compiled = torch.compile(cell, fullgraph=True, backend=counter)
    with torch.autocast(cuda_device, dtype, enabled=autocast):
        for x in (problem.states[0], -problem.states[0]):
            assert torch.equal(compiled(x), cell(x)) and compiled(x).dtype == dtype
    assert counter.frame_count == 1
