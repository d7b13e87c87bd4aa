"""What the fused ops share: memory that is handed on, and averages of batch norms."""

from __future__ import annotations

import copy
import gc
import threading
from functools import partial

import pytest
import torch
from op_checks import distance, draw_norm, noise
from test_mixed_op import KINDS, draw
from torch import nn

from rnas import kernels
from rnas.kernels import fused
from rnas.kernels.reference import mixed_op as reference

pytestmark = pytest.mark.usefixtures("compiled")

LARGE = 2 * fused.Pool.SMALLEST


@pytest.fixture
def pool():
    return fused.Pool()


def in_threads(*functions) -> None:
    """Runs them all at once."""
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# Memory --------------------------------------------------------------------------------------------------------------


def test_a_pool_hands_memory_on_when_its_last_holder_is_gone(pool):
    first = pool.take(LARGE)
    assert first.dtype == torch.uint8 and first.shape == (LARGE,)
    address, view = first.data_ptr(), first[5:].view(-1)
    del first
    other = pool.take(LARGE)  # a view still holds the first
    assert other.data_ptr() != address
    view.fill_(1)
    other.fill_(2)
    assert (view == 1).all()
    del view
    assert pool.take(LARGE).data_ptr() == address


@pytest.mark.parametrize("holder", ["graph", "storage", "numpy", "detached"])
def test_a_pool_knows_all_holders(pool, holder):
    piece = pool.take(LARGE)
    address = piece.data_ptr()
    if holder == "graph":

        class Keep(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, kept):
                ctx.save_for_backward(kept)
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                return gradient * ctx.saved_tensors[0][0], None

        held = Keep.apply(torch.ones(1, requires_grad=True), piece)
    else:
        held = {"storage": piece.untyped_storage, "numpy": piece.numpy, "detached": piece.detach}[holder]()
    del piece
    assert pool.take(LARGE).data_ptr() != address
    del held
    gc.collect()
    assert address in {pool.take(LARGE).data_ptr(), pool.take(LARGE).data_ptr()}


def test_a_pool_never_hands_out_memory_that_is_in_use(pool):
    draws = torch.Generator().manual_seed(0)
    held: list[tuple[int, torch.Tensor]] = []
    for step in range(200):
        size = LARGE + int(torch.randint(LARGE, (), generator=draws))
        piece = pool.take(size)
        assert piece.numel() == size and piece.data_ptr() % 64 == 0
        piece.fill_(step)
        held.append((step, piece))
        while len(held) > 5:
            value, old = held.pop(int(torch.randint(len(held), (), generator=draws)))
            assert old[0] == old[-1] == value and bool((old[:: 4096 - 1] == value).all())
            del old
    spans = sorted((piece.data_ptr(), piece.data_ptr() + piece.numel()) for _, piece in held)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))
    assert all(bool((piece == value).all()) for value, piece in held)


def test_a_pool_does_not_waste_large_memory_on_small_needs(pool):
    address = pool.take(4 * LARGE).data_ptr()
    assert len(pool.free()) == 1
    small = pool.take(LARGE)
    assert small.data_ptr() != address and len(pool.free()) == 1
    nearly = pool.take(4 * LARGE - LARGE // 4)
    assert nearly.data_ptr() == address and not pool.free()


def test_small_memory_is_left_to_the_allocator(pool):
    for size in (0, 1, fused.Pool.SMALLEST - 1):
        assert pool.take(size).shape == (size,)
    assert not pool.free()


def test_a_pool_holds_so_many_pieces_and_gives_them_back(pool):
    held = [pool.take(fused.Pool.SMALLEST) for _ in range(fused.Pool.MOST + 6)]
    held.clear()
    assert len(pool.free()) == fused.Pool.MOST
    in_use = pool.take(fused.Pool.SMALLEST)
    in_use.fill_(3)
    pool.empty()
    assert not pool.free() and bool((in_use == 3).all())
    del in_use  # memory in use comes back afterwards
    assert len(pool.free()) == 1


def test_a_pool_stays_small_where_sizes_vary(pool):
    for size in range(2, 60):
        held = [pool.take(size * LARGE // 10) for _ in range(3)]
        assert sum(pool.free()) + sum(map(len, held)) <= 1.25 * 3 * size * LARGE / 10 + 1
        del held
    pool.empty()
    piece = pool.take(LARGE)
    del piece
    assert sum(pool.free()) == LARGE  # what was in use before counts no more


def test_a_pool_serves_several_threads(pool):
    wrong = []

    def work(value):
        for _ in range(200):
            piece = pool.take(fused.Pool.SMALLEST)
            piece.fill_(value)
            if not bool((piece == value).all()):
                wrong.append(value)

    in_threads(*(partial(work, value) for value in range(4)))
    assert not wrong and len(pool.free()) <= 8


def test_threads_that_take_at_once_get_different_memory(pool):
    pool.take(LARGE)  # one free piece for all
    held, barrier = [], threading.Barrier(4)

    def work():
        barrier.wait()
        held.append(pool.take(LARGE))

    in_threads(*[work] * 4)
    assert len({piece.data_ptr() for piece in held}) == 4 and not pool.free()


def test_memory_in_use_outlives_its_pool(pool):
    piece = fused.Pool().take(LARGE)
    gc.collect()
    piece.fill_(7)
    assert bool((piece == 7).all())


def large_problem(**how):
    """One whose kept activations come from the pool."""
    return draw(space="skip and sep", cell="two nodes", shape=(8, 16, 32, 32), mode="train affine", **how)


def held_bytes() -> int:
    return sum(fused.POOL.free())


def test_a_step_gets_the_memory_of_the_step_before_and_empty_cache_gives_it_back(compiled):
    if not compiled:
        pytest.skip("plain PyTorch keeps its own memory")
    kernels.empty_cache()
    assert not fused.POOL.free() and fused._memory.buffer is None
    problem = large_problem().require(KINDS)
    output = problem.run()
    assert held_bytes() <= 4 * output.numel()  # the nodes before they were rearranged: the graph holds all else
    output.sum().backward()
    del output
    assert held_bytes() >= fused.Pool.SMALLEST and fused._memory.buffer is not None
    before = held_bytes()
    for _ in range(3):
        problem.run().sum().backward()
        assert held_bytes() == before
    kernels.empty_cache()
    assert not fused.POOL.free() and fused._memory.buffer is None
    problem.run().sum().backward()  # and on it goes


def test_several_graphs_at_once_keep_their_own_memory():
    problems = [large_problem(seed=seed).require(KINDS) for seed in range(3)]
    leaves = [[leaf for kind in KINDS for leaf in problem.leaves(kind)] for problem in problems]
    alone = []
    for problem, wanted in zip(problems, leaves):
        output = problem.run()
        alone.append(torch.autograd.grad(output, wanted, noise(output, 1)))
    outputs = [problem.run() for problem in problems]
    for index in (1, 2, 0):
        found = torch.autograd.grad(outputs[index], leaves[index], noise(outputs[index], 1))
        assert all(torch.equal(a, b) for a, b in zip(found, alone[index]))


# Threads -------------------------------------------------------------------------------------------------------------


def test_every_thread_has_its_workspace():
    mine = fused.workspace(LARGE)
    assert fused.workspace(LARGE // 2).data_ptr() == mine.data_ptr()
    assert fused.workspace(2 * LARGE).numel() >= 2 * LARGE
    buffers, barrier = [fused.workspace(1)], threading.Barrier(2)

    def work():
        buffers.append(fused.workspace(LARGE))
        barrier.wait()

    in_threads(work, work)
    spans = sorted((buffer.data_ptr(), buffer.data_ptr() + buffer.numel()) for buffer in buffers)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))
    kernels.empty_cache()


@pytest.mark.parametrize("mode", ["train affine", "eval"])
def test_calls_from_two_threads_at_once(mode):
    def results(seed):
        found = []
        for shape in ((2, 16, 16, 16), (3, 5, 9, 7), (4, 16, 24, 24)):
            problem = draw(seed, cell="two nodes", mode=mode, shape=shape).require(KINDS)
            leaves = [leaf for kind in KINDS for leaf in problem.leaves(kind)]
            output = problem.run()
            found += [output.detach(), *torch.autograd.grad(output, leaves, noise(output, 1), materialize_grads=True)]
            layer = nn.Conv2d(shape[1], 8, 1, bias=False)
            with torch.no_grad():
                layer.weight.copy_(noise(layer.weight, 3))
            norm = draw_norm(8, mode, torch.Generator().manual_seed(seed))
            found.append(kernels.relu_conv_norm(problem.states[0].detach(), layer.weight, norm).detach())
        return found

    expected = {seed: results(seed) for seed in range(2)}
    wrong, barrier = [], threading.Barrier(2)

    def work(seed):
        barrier.wait()
        try:
            for _ in range(5):
                if not all(torch.equal(a, b) for a, b in zip(results(seed), expected[seed])):
                    wrong.append(seed)
        except Exception as error:
            wrong.append(error)

    in_threads(*(partial(work, seed) for seed in range(2)))
    assert not wrong


# Batch norms ---------------------------------------------------------------------------------------------------------


def run_norms(norms, implementation) -> None:
    """An edge of two separable convolutions, which has four norms."""
    problem = draw(space=(("sep_conv_3x3", "sep_conv_5x5"), True), mode="train")
    problem.norms = [norms]
    problem.run(implementation)


@pytest.mark.parametrize("way", ["momenta", "cumulative", "one in eval", "no counter", "shared", "not tracking", "negative"])
def test_averages_move_as_those_of_pytorch(way, monkeypatch):
    found = []
    for implementation in (reference, kernels):
        norms = [draw_norm(3, "train", torch.Generator().manual_seed(index)) for index in range(4)]
        if way == "momenta":
            for norm, momentum in zip(norms, (0.1, 0.5, 0.1, 0.0)):
                norm.momentum = momentum
        elif way == "cumulative":
            norms[1].momentum = norms[2].momentum = None
        elif way == "one in eval":
            norms[2].eval()
            monkeypatch.setenv("RNAS_BACKEND", "auto")
        elif way == "no counter":
            norms[0].num_batches_tracked = None
        elif way == "shared":
            norms[3] = norms[0]
        elif way == "negative":  # as odd as it is, PyTorch takes it
            norms[0].momentum, norms[0].num_batches_tracked = -0.1, None
            norms[1].momentum = -0.5
        elif way == "not tracking":
            norms[1].track_running_stats = False
        for _ in range(2):
            run_norms(norms, implementation)
        tensors = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
        counters = [None if norm.num_batches_tracked is None else int(norm.num_batches_tracked) for norm in norms]
        found.append((tensors, counters))
    assert found[0][1] == found[1][1]
    assert all(distance([b], [a]) <= 1e-5 for a, b in zip(found[0][0], found[1][0]))


@pytest.mark.parametrize("way", ["watched", "strided", "float64 elsewhere"])
def test_averages_that_compiled_code_may_not_move_are_moved_by_pytorch(way, monkeypatch):
    found = []
    for changed in (False, True):
        norms = [draw_norm(3, "train", torch.Generator().manual_seed(index)) for index in range(4)]
        norms[1].momentum = None
        if changed and way == "watched":
            monkeypatch.setattr(fused, "is_watched", lambda tensors: True)
        elif changed and way == "strided":
            norms[0].running_mean = norms[0].running_mean.repeat_interleave(2)[::2]
            norms[2].running_var = norms[2].running_var.repeat_interleave(2)[::2]
        elif changed:
            norms[3].num_batches_tracked = norms[3].num_batches_tracked.double()
        for _ in range(2):
            run_norms(norms, kernels)
        found.append([t for norm in norms for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked)])
    assert all(distance([b], [a]) <= 1e-6 for a, b in zip(*found))


@pytest.mark.parametrize("watched", [False, True])
def test_a_graph_of_pytorch_that_has_saved_an_average_still_runs_backward(watched, monkeypatch):
    """Its batch norm moves averages without a new version; else no norm could run by itself and fused in one graph."""
    if watched:
        monkeypatch.setattr(fused, "is_watched", lambda tensors: True)
    norms = [draw_norm(3, "train", torch.Generator().manual_seed(index)) for index in range(4)]
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = norms[2](x).square().sum()
    versions = [norms[2].running_mean._version, norms[2].running_var._version]
    run_norms(norms, kernels)
    assert [norms[2].running_mean._version, norms[2].running_var._version] == versions
    loss.backward()


def test_statistics_of_one_norm_are_copied_for_the_backward_pass():
    """Fixed ones, that move before it: what they were counts."""
    norm = draw_norm(3, "eval", torch.Generator().manual_seed(0))
    weight = torch.randn(3, 3, 1, 1, requires_grad=True)
    x, grads = torch.randn(2, 3, 4, 4), []
    for moves in (False, True):
        out = kernels.relu_conv_norm(x, weight, norm.eval())
        if moves:
            kernels.relu_conv_norm(x, weight, norm.train())
        grads.append(torch.autograd.grad(out.square().sum(), weight)[0])
    assert torch.equal(*grads)


def test_results_stay_as_they_are_while_someone_holds_them():
    draws = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(16, affine=False)
    weight, size = torch.rand(16, 16, 1, 1, generator=draws), (5, 16, 64, 64)
    assert 4 * torch.Size(size).numel() > fused.Pool.SMALLEST
    xs = [torch.randn(size, generator=draws) for _ in range(3)]
    held = [kernels.relu_conv_norm(x, weight, norm) for x in xs]
    copies = [each.clone() for each in held]
    del held[1]
    held.append(kernels.relu_conv_norm(xs[1], weight, norm))  # into the memory that has become free
    assert torch.equal(held[-1], copies.pop(1))
    assert all(torch.equal(a, b) for a, b in zip(held, copies))
    held[0].resize_(1)  # as any tensor


class OwnNorm(nn.BatchNorm2d):
    """A class of its own, though it does the same."""


class OwnParameter(nn.Parameter):
    """Likewise."""


def change_norm(norm: nn.BatchNorm2d, way: str) -> nn.BatchNorm2d:
    """The norm made unusual in one way."""
    if way == "class":
        other = OwnNorm(norm.num_features, affine=False)
        other.load_state_dict(norm.state_dict())
        return other
    if way == "hook":
        norm.register_forward_hook(lambda *_: None)
    elif way == "pre-hook":
        norm.register_forward_pre_hook(lambda *_: None)
    elif way == "forward":
        norm.forward = norm.forward
    elif way == "eps":
        norm.eps = 1e-3
    elif way == "mode":
        norm.train(not norm.training)
    elif way == "float64":
        norm.running_mean = norm.running_mean.double()
    elif way == "strided":
        norm.running_var = norm.running_var.repeat_interleave(2)[::2]
    elif way == "length":
        norm.running_mean = torch.zeros(4)
    elif way == "one average":
        norm.running_var = None
    elif way == "affine":
        norm.weight = nn.Parameter(torch.ones(3))
    elif way == "meta":
        norm.running_mean = norm.running_mean.to("meta")
    elif way == "features":
        norm.num_features = 4
    elif way == "no memory":
        norm.running_mean.untyped_storage().resize_(0)
    elif way == "counter":
        norm.num_batches_tracked = norm.num_batches_tracked.float()
    elif way == "attribute":
        del norm._buffers["running_mean"]
        norm.running_mean = torch.zeros(3)
    return norm


WAYS = "class hook pre-hook forward eps mode float64 strided length affine meta features attribute".split()
WAYS += ["no memory"]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("way", [*WAYS, "one average", "counter"])
def test_compiled_code_leaves_unusual_norms_to_python(way, mode, compiled):
    if not compiled:
        pytest.skip("nothing is compiled")
    if way == "counter" and mode == "eval":
        pytest.skip("not read in eval mode")
    norms = [draw_norm(3, mode, torch.Generator()) for _ in range(3)]
    assert fused.compiled_norms(norms, 3) is not None
    norms[1] = change_norm(norms[1], way)
    assert fused.compiled_norms(norms, 3) is None
    assert fused.compiled_norms([*norms, "no norm"], 3) is None


@pytest.mark.parametrize("way", ["shape", "float64", "transposed", "class", "meta", "no tensor", "too few"])
def test_compiled_code_leaves_unusual_parameters_to_python(way, compiled):
    if not compiled:
        pytest.skip("nothing is compiled")
    groups = [[torch.rand(2, 3), nn.Parameter(torch.rand(4))], [torch.rand(5, 1, 2)]]
    shapes = [[(2, 3), (4,)], [(5, 1, 2)]]
    arrays = fused.read_arrays(groups, shapes)
    out = torch.empty(20)
    arrays.copy(out.data_ptr())
    assert arrays.size == 20 and torch.equal(out, torch.cat([t.detach().flatten() for group in groups for t in group]))
    changed = {
        "shape": torch.rand(3, 2),
        "float64": torch.rand(2, 3).double(),
        "transposed": torch.rand(3, 2).t(),
        "class": OwnParameter(torch.rand(2, 3)),
        "meta": torch.rand(2, 3, device="meta"),
        "no tensor": [1.0] * 6,
    }
    if way == "too few":
        groups[0].pop()
    else:
        groups[0][0] = changed[way]
    assert fused.read_arrays(groups, shapes) is None


@pytest.mark.parametrize("exchange", [None, 3, "older"])
def test_without_dlpack_python_reads(exchange, monkeypatch, compiled):
    if not compiled:
        pytest.skip("nothing is compiled")
    norms = [draw_norm(3, "train", torch.Generator()) for _ in range(2)]
    assert fused.compiled_norms(norms, 3) is not None
    if exchange is None:
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    else:
        monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", exchange)
    assert fused.compiled_norms(norms, 3) is None and fused.read_arrays([[]], [[]]) is None
    assert isinstance(fused.read_norms(norms, 3), fused.Norms)


def test_a_trace_holds_the_numbers_that_compiled_code_reads():
    norm, x, weight = draw_norm(4, "eval", torch.Generator()), torch.rand(2, 3, 5, 5), torch.rand(4, 3, 1, 1)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: kernels.relu_conv_norm(x, weight, norm), x)
        assert distance([traced(x)], [kernels.relu_conv_norm(x, weight, norm)]) < 1e-6


def test_read_parameters_stay_while_they_are_in_use(compiled):
    if not compiled:
        pytest.skip("nothing is compiled")
    groups = [[torch.full((1000,), float(each)) for each in range(50)]]
    arrays = fused.read_arrays(groups, [[(1000,)] * 50])
    groups.clear()
    gc.collect()
    others = [torch.full((1000,), -1.0) for _ in range(50)]
    out = torch.empty(50, 1000)
    arrays.copy(out.data_ptr())
    assert torch.equal(out[:, 0], torch.arange(50.0)) and len(others) == 50


def test_read_norms_reads_what_a_norm_holds():
    norms = [draw_norm(3, mode, torch.Generator()) for mode in ("train affine", "train")]
    read = fused.read_norms(norms, 3)
    assert read.weights == [norms[0].weight, None] and read.biases == [norms[0].bias, None]
    assert read.means[0] is norms[0].running_mean and read.variances[1] is norms[1].running_var
    assert read.on_batch and not read.differ
    assert fused.read_norms([norms[0], copy.deepcopy(norms[1]).eval()], 3).differ
    assert fused.read_norms([norms[0], draw_norm(3, "train, other numbers", torch.Generator())], 3).differ
    nothing = fused.read_norms([], 3)
    assert not nothing.on_batch and not nothing.differ


def test_a_parametrized_weight_is_read_anew():
    norm = draw_norm(3, "eval affine", torch.Generator().manual_seed(0))
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    assert torch.equal(fused.read_norms([norm], 3).weights[0], norm.weight)
    x, weight = torch.rand(2, 5, 4, 4), torch.rand(3, 5, 1, 1)
    plain = norm(nn.functional.conv2d(x.relu(), weight))
    assert distance([kernels.relu_conv_norm(x, weight, norm)], [plain]) <= 1e-5
