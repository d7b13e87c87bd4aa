"""The CUDA kernels of mixed_op and mixed_cell as citizens of PyTorch: memory, repeatability, fake tensors, streams, graphs.

Every test runs on a GPU where there is one (-m gpu), and on the same kernels compiled for the host, see
tests/cuda_on_host.py.
"""

from __future__ import annotations

import pytest
import torch
from op_checks import Recorder, distance, draw_norm, evaluate, noise
from test_mixed_op import KINDS, MODES, draw
from test_mixed_op_cuda import CASES, FEW, leaves_of, same, values_and_gradients
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rnas import kernels
from rnas.kernels import backend, engine, fused
from rnas.kernels.mixed_op import OP, arrange
from rnas.kernels.mixed_registered import Settings
from rnas.kernels.reference import mixed_op as reference

only_on_gpu = pytest.mark.parametrize("cuda_device", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
only_on_host = pytest.mark.parametrize("cuda_device", ["host"], indirect=True)


# Saved tensors, memory, repeatability --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW)
def test_two_gradients_through_one_graph_agree(case, cuda_device):
    problem = draw(**CASES[case]).copy(device=cuda_device).require(KINDS)
    leaves, output = leaves_of(problem), problem.run()
    incoming = noise(output, 1)
    before, kept = output.detach().clone(), incoming.clone()
    runs = [torch.autograd.grad(output, leaves, incoming, retain_graph=True, materialize_grads=True) for _ in range(2)]
    assert same(list(runs[0]), list(runs[1]))
    part = torch.autograd.grad(output, problem.states, incoming)
    assert distance(list(part), list(runs[0][: len(part)])) <= 1e-6
    assert torch.equal(output, before) and torch.equal(incoming, kept)


@pytest.mark.parametrize("case", CASES)
def test_same_bits_every_time_and_in_every_order_of_a_block_s_threads(case, cuda_device, request):
    """Else a thread reads what another one writes between two barriers."""
    runs = []
    for order in (0, 0, 1) if cuda_device == "cpu" else (0, 0):
        if cuda_device == "cpu":
            request.getfixturevalue("kernels_on_host").set_host_thread_order(order)
        runs.append(evaluate(kernels, draw(**CASES[case]).copy(device=cuda_device), KINDS))
    assert all(same(runs[0][kind], other[kind]) for other in runs[1:] for kind in runs[0])


def test_memory_of_a_call_holds_nan(cuda_device):
    """Else none of these tests could tell that a kernel reads what nobody has written."""
    x = torch.rand(1, device=cuda_device)
    for memory in (engine.of(x).memory(64), engine.of(x).workspace(64)):
        assert memory.device == x.device and memory.view(torch.float32).isnan().all()
    assert x.new_empty(3).isnan().all()


def test_every_call_has_its_own_workspace(cuda_device):
    on = engine.of(torch.empty(0, device=cuda_device))
    held = [on.workspace(2**10) for _ in range(3)]
    assert len({each.data_ptr() for each in held}) == 3


@pytest.mark.parametrize(
    ("mode", "wanted", "expected"),
    [
        ("eval", (), fused.NOTHING),
        ("train", (), fused.NOTHING),
        ("eval", ("inputs",), fused.ACTIVATIONS),
        ("train", ("weights",), fused.ACTIVATIONS),
        ("train", KINDS, fused.ACTIVATIONS),
    ],
)
def test_activations_are_kept_or_nothing(mode, wanted, expected, cuda_device):
    problem = draw(mode=mode, shape=(2, 4, 6, 6)).copy(device=cuda_device).require(wanted)
    with Recorder("mixed_cell_forward") as recorder:
        problem.run()
    assert [Settings(*arguments[8:]).keep for _, arguments, _ in recorder.calls] == [expected]


@pytest.mark.parametrize("keep", [fused.MASKS, fused.OUTPUTS])
def test_what_the_kernels_do_not_keep_is_refused(keep, cuda_device):
    problem = draw(mode="train", shape=(2, 4, 6, 6)).copy(device=cuda_device)
    theta = torch.cat([tensor.reshape(-1) for tensor in problem.leaves("parameters")])
    settings = Settings(",".join(problem.primitives), 1, 1, True, 1e-5, keep, False, False, False)
    with pytest.raises(ValueError):
        torch.ops.rnas.mixed_cell_forward(
            problem.states, problem.weights[None], theta, *[None] * 5, *settings
        )


@pytest.mark.parametrize("way", ["momenta", "cumulative", "shared", "shared buffers", "no counter", "not tracking"])
def test_averages_move_as_those_of_pytorch(way, cuda_device):
    results = []
    for implementation in (reference, kernels):
        norms = [
            draw_norm(3, "train affine", torch.Generator().manual_seed(index)).to(cuda_device) for index in range(4)
        ]
        if way == "momenta":
            for norm, momentum in zip(norms, (0.1, 0.5, -0.1, 0.0)):
                norm.momentum = momentum
        elif way == "cumulative":
            norms[1].momentum = norms[2].momentum = None
        elif way == "shared":  # in one call, so that it moves twice
            norms[0].momentum, norms[3] = None, norms[0]
        elif way == "shared buffers":
            norms[2].running_var = norms[1].running_var
        elif way == "no counter":
            norms[0].num_batches_tracked = norms[1].num_batches_tracked = norms[1].momentum = None
        else:
            norms[1].track_running_stats = False
        problem = draw(space=(("sep_conv_3x3", "sep_conv_5x5"), True)).copy(device=cuda_device)
        problem.norms = [norms]
        for _ in range(2):
            problem.run(implementation)
        results.append([t for norm in norms for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked)])
    for found, expected in zip(results[1], results[0]):
        assert (found is None) == (expected is None)
        assert expected is None or distance([found], [expected]) <= 1e-5


# As citizens of PyTorch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train affine", "eval"])
def test_opcheck(mode, cuda_device):
    problem = draw(space="skip and sep", stride=2, mode=mode, shape=(2, 3, 5, 4)).copy(device=cuda_device)
    with Recorder("mixed_") as recorder:
        evaluate(kernels, problem, KINDS)
    calls = recorder.one_each()
    assert len(calls) == 2
    for function, arguments, options in calls:
        # Compilation is the same on every device: the tests of the CPU's kernels look at that.
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(function, arguments, options, test_utils=utilities)


class Launches(TorchDispatchMode):
    """Counts what may launch kernels: calls of operations that return no view."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if not function.is_view and "empty" not in function.name():
            self.names.append(function.name())
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("mode", ["train", "train affine", "train, cumulative", "eval affine"])
def test_a_call_takes_as_few_operations_for_many_edges_as_for_one(mode, cuda_device):
    """However many parameters and norms there are, they are gathered, moved and given their gradients together."""
    counts = []
    for cell in ((1, 1, 1), (2, 4, 1)):
        problem = draw(cell=cell, mode=mode, shape=(2, 3, 6, 6)).copy(layout="channels_last", device=cuda_device)
        leaves = leaves_of(problem.require(KINDS))
        incoming = noise(problem.run().detach(), 1)
        with Launches() as launches:
            torch.autograd.grad(problem.run(), leaves, incoming)
        counts.append([name for name in launches.names if name != "aten::detach"])
    assert counts[0] == counts[1] and len(counts[0]) <= 16, counts


@only_on_host
@pytest.mark.parametrize("case", CASES)
def test_fake_tensors_of_a_gpu(case, cuda_device):
    """Shapes, strides, dtypes and devices, of what is kept too, where there is no GPU."""

    def described(found):
        return [(tuple(each.shape), each.stride(), each.dtype) for each in found]

    with Recorder("mixed_cell") as recorder:
        values_and_gradients(draw(**CASES[case]).copy().require(KINDS))
    directions = {function.name() for function, _, _ in recorder.calls}
    assert directions == {"rnas::mixed_cell_forward", "rnas::mixed_cell_backward"}
    for function, arguments, options in recorder.calls:
        with torch.no_grad():
            real = function(*arguments, **options)
            with FakeTensorMode(allow_non_fake_inputs=True):
                moved = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("cuda"), arguments)
                fake = function(*moved, **options)
        assert described(fake) == described(real) and {each.device.type for each in fake} == {"cuda"}


@only_on_host
@pytest.mark.parametrize("case", FEW)
def test_a_call_on_fake_tensors_of_a_gpu(case, cuda_device, monkeypatch):
    """From the public function down, without gradients: PyTorch computes those on a GPU's own thread."""
    real = draw(**CASES[case]).copy().run()
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    moved = draw(**CASES[case]).copy()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        moved.states = [state.to("cuda") for state in moved.states]
        moved.parameters = [[tensor.to("cuda") for tensor in edge] for edge in moved.parameters]
        moved.weights = moved.weights.to("cuda")
        moved.edge_weights = moved.edge_weights if moved.edge_weights is None else moved.edge_weights.to("cuda")
        moved.norms = [[norm.to("cuda") for norm in edge] for edge in moved.norms]
        fake = moved.run()
    assert (fake.shape, fake.stride(), fake.device.type) == (real.shape, real.stride(), "cuda")


@only_on_host
def test_which_dtypes_of_a_gpu_cuda_serves(cuda_device, monkeypatch):
    monkeypatch.delenv(backend.VARIABLE)
    with FakeTensorMode():
        x = torch.empty(2, 4, 6, 6, device="cuda")
        assert arrange(x).is_contiguous(memory_format=torch.channels_last)
        assert arrange(x.half()).is_contiguous(memory_format=torch.channels_last)
        assert arrange(x.double()).is_contiguous()
        assert OP.decide(x.device, torch.float64)[0] == "reference"
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert OP.decide(x.device, dtype)[0] == "cuda"
        assert backend.OPS["relu_conv_norm"].decide(x.device, torch.float32)[0] == "reference"


def test_the_table_of_backends_names_what_serves(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    row = next(row for row in backend.describe() if (row.op, row.backend) == ("mixed_op", "cuda"))
    if torch.cuda.is_available() and not isinstance(backend.load("cuda"), str):
        assert row.serves == "cuda float32, bfloat16, float16"
    else:
        assert not row.serves and row.reason


# On a GPU alone ------------------------------------------------------------------------------------------------------


@only_on_gpu
@pytest.mark.parametrize("case", FEW)
def test_it_runs_on_the_current_stream(case, cuda_device):
    problem = draw(**CASES[case] | {"mode": "eval affine"}).copy(device=cuda_device).require(KINDS)
    expected = values_and_gradients(problem)
    stream = torch.cuda.Stream()
    incoming, states = noise(expected[0], 1), [state.detach() for state in problem.states]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        problem.states = [torch.zeros_like(state) for state in states]
        torch.cuda._sleep(100_000_000)
        for late, state in zip(problem.states, states):
            late.copy_(state)  # a kernel on another stream would read the zeros
        problem.require(KINDS)
        found = values_and_gradients(problem, incoming)
    stream.synchronize()
    assert same(found, expected)


@only_on_gpu
@pytest.mark.parametrize("mode", ["train affine", "train, cumulative", "eval"])
@pytest.mark.parametrize("case", FEW)
def test_a_graph_captures_a_call_and_its_gradients(case, mode, cuda_device):
    """Replays on other images give the bits of plain calls, running averages included."""
    draws = [draw(seed, **CASES[case] | {"mode": mode}).copy(device=cuda_device) for seed in range(3)]
    captured = draws[0].copy(device=cuda_device).require(KINDS)
    start = {name: buffer.clone() for name, buffer in _buffers(captured)}
    incoming = noise(captured.run().detach(), 1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            values_and_gradients(captured, incoming)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = values_and_gradients(captured, incoming)
    for name, buffer in _buffers(captured):
        buffer.copy_(start[name])
    plain = draws[0].copy(device=cuda_device).require(KINDS)
    for other in draws[1:]:
        with torch.no_grad():
            for problem in (captured, plain):
                for mine, theirs in zip(problem.states, other.states):
                    mine.copy_(theirs)
        graph.replay()
        expected = values_and_gradients(plain, incoming)
        assert same(found, expected)
        assert same([b for _, b in _buffers(captured)], [b for _, b in _buffers(plain)])


def _buffers(problem) -> list[tuple[str, Tensor]]:
    return [(f"{i}.{name}", b) for i, norm in enumerate(problem.modules()) for name, b in norm.named_buffers()]


@only_on_gpu
def test_nothing_waits_for_the_device(cuda_device):
    problems = [draw(cell=(2, 2, 2), mode=mode).copy(device=cuda_device).require(KINDS) for mode in MODES]
    incoming = [noise(problem.run().detach(), 1) for problem in problems]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for problem, each in zip(problems, incoming):
            values_and_gradients(problem, each)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@only_on_gpu
def test_tensors_of_a_device_that_is_not_current(cuda_device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    problem = draw(cell=(2, 2, 2), mode="train affine")
    expected = values_and_gradients(problem.copy(device="cuda:0").require(KINDS))
    found = values_and_gradients(problem.copy(device="cuda:1").require(KINDS))
    assert torch.cuda.current_device() == 0 and {each.device.index for each in found} == {1}
    assert same([each.cpu() for each in found], [each.cpu() for each in expected])


# What a GPU is asked to do ---------------------------------------------------------------------------------------------


@only_on_host
@pytest.mark.parametrize(
    ("mode", "wanted", "forward", "backward"),
    [
        ("train", KINDS, 24, 56),
        ("train", ("weights",), 24, 31),
        ("eval", ("inputs",), 11, 29),
    ],
)
def test_how_many_kernels_a_cell_takes(mode, wanted, forward, backward, cuda_device, request):
    """Of the DARTS space: some 80 for a training step, 40 for a step of an attack, at any size."""
    launches = request.getfixturevalue("kernels_on_host").launches
    problem = draw(cell=(2, 4, 1), shape=(2, 4, 5, 5), mode=mode).copy(device=cuda_device).require(wanted)
    start = launches()
    output = problem.run()
    middle = launches()
    output.sum().backward()
    assert (middle - start, launches() - middle) == (forward, backward)


@only_on_host
def test_shapes_that_the_kernels_do_not_take(cuda_device, kernels_on_host):
    """More convolutions and pools on one edge than there is room for, the last node alone, too large ones."""

    def sizes(primitives: list[str], last: int = 0, batch: int = 2, channels: int = 4, height: int = 8, nodes: int = 1):
        shape = (batch, channels, height, 8, 1, nodes, 1, 1, last, 0, 0, 0)
        return kernels_on_host.mixed_sizes(shape, [primitives], "float32")

    sizes(list(reference.PRIMITIVES))
    assert sizes(["sep_conv_3x3"] * 9)
    with pytest.raises(ValueError, match="at most 9"):
        sizes(["sep_conv_3x3"] * 10)
    with pytest.raises(ValueError, match="all nodes"):
        sizes(["sep_conv_3x3"], last=1)
    with pytest.raises(ValueError, match="at most 960 channels"):
        sizes(["sep_conv_3x3"], channels=961)
    assert sizes(["none"], batch=2**28 - 1)
    with pytest.raises(ValueError, match="at most 2147483647 rows"):
        sizes(["none"], batch=2**28)
    assert sizes(["none"], height=2**26 - 1)
    for large in ({"height": 2**26}, {"height": 2**25, "nodes": 2}):
        with pytest.raises(ValueError, match="images of at most 2147483647 elements"):
            sizes(["none"], **large)


@only_on_host
def test_the_largest_number_of_channels_fits(cuda_device):
    problem = draw(space=(("dil_conv_5x5",), True), shape=(1, 960, 2, 3), mode="eval")
    expected, found = problem.copy().run(reference), problem.copy(device=cuda_device).run()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_image_scales_of_another_dtype_are_left_to_plain_pytorch(cuda_device, monkeypatch):
    monkeypatch.setenv("RNAS_BACKEND", "auto")
    problem = draw(cell=(2, 1, 1), mode="train affine", shape=(3, 4, 8, 8), image_scales=True)
    problem = problem.copy(torch.bfloat16, device=cuda_device)
    problem.image_scales = problem.image_scales.float()
    out, plain = problem.copy(torch.bfloat16).run(), problem.run(reference)
    assert problem.run().dtype == plain.dtype == torch.float32 and out.dtype == torch.bfloat16
