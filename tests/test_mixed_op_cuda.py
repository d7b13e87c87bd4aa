"""The CUDA kernels of mixed_op and mixed_cell against the float64 definition.

Every test runs on a GPU where there is one (-m gpu), and on the same kernels compiled for the host, see
tests/cuda_on_host.py.
"""

from __future__ import annotations

import pytest
import torch
from op_checks import distance, evaluate, noise
from test_mixed_op import KINDS, MODES, NAS_BENCH_201, check, draw
from torch import Tensor

from rnas import kernels
from rnas.kernels.reference import mixed_op as reference

ALL = reference.PRIMITIVES
CASES = {  # arguments of `draw`; cell: input states, nodes, stride
    "one channel": {"space": (ALL, True), "shape": (2, 1, 7, 5), "mode": "train affine"},
    "three channels, stride 2": {"space": (ALL, False), "shape": (1, 3, 9, 7), "stride": 2, "mode": "eval affine"},
    "four channels": {"cell": (2, 2, 1), "shape": (3, 4, 6, 9), "mode": "train, other numbers"},
    "reduction": {"cell": (2, 2, 2), "shape": (2, 16, 7, 8), "mode": "train affine"},
    "three inputs": {"cell": (3, 1, 1), "shape": (1, 20, 8, 5), "mode": "eval"},
    "three inputs, stride 2": {
        "cell": (3, 2, 2),
        "shape": (2, 3, 5, 8),
        "mode": "train",
        "space": (NAS_BENCH_201, True),
    },
    "three nodes": {"cell": (1, 3, 1), "shape": (2, 16, 5, 5), "mode": "eval affine", "space": "nas-bench-201"},
    "three nodes, stride 2": {"cell": (1, 3, 2), "shape": (1, 4, 9, 8), "mode": "train affine", "space": (ALL, True)},
    "36 channels": {"shape": (1, 36, 7, 6), "mode": "train affine", "space": (ALL, True)},
    "36 channels, stride 2": {"shape": (2, 36, 6, 5), "stride": 2, "mode": "eval", "space": "another order"},
    "a partial edge": {"shape": (2, 16, 7, 6), "partial": 4, "mode": "train affine"},
    "a partial cell": {
        "cell": (2, 2, 2),
        "shape": (2, 8, 7, 6),
        "partial": 2,
        "edge_weights": True,
        "mode": "eval affine",
    },
    "no parameters": {"space": "no parameters", "cell": (2, 2, 1), "shape": (2, 4, 7, 5), "mode": "eval"},
    "nothing": {"space": (("none",), True), "cell": (1, 2, 2), "shape": (2, 3, 4, 5), "mode": "eval"},
    "one pixel": {"shape": (3, 5, 1, 1), "mode": "eval affine", "space": (ALL, True)},
    "many pixels": {"shape": (2, 4, 37, 45), "mode": "train affine", "space": (ALL, True)},
    "many images": {"shape": (33, 3, 4, 3), "stride": 2, "mode": "train affine", "space": (ALL, True)},
}
FEW = ("reduction", "three nodes", "a partial cell")  # where every case would say the same again


def leaves_of(problem) -> list[Tensor]:
    return [leaf for kind in KINDS for leaf in problem.leaves(kind)]


def values_and_gradients(problem, incoming: Tensor | None = None) -> list[Tensor]:
    output = problem.run()
    incoming = noise(output, 1) if incoming is None else incoming
    return [output.detach(), *torch.autograd.grad(output, leaves_of(problem), incoming, materialize_grads=True)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether they agree bit for bit."""
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))


# Values and gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients(case, cuda_device):
    check(device=cuda_device, **CASES[case])


@pytest.mark.parametrize("layout", ["channels_last", "slice"])
def test_layouts(layout, cuda_device):
    check(device=cuda_device, layout=layout, cell=(2, 1, 2), shape=(2, 4, 7, 6), mode="train affine")


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("wanted", [(), *((kind,) for kind in KINDS), KINDS[1:]], ids="+".join)
def test_only_the_gradients_asked_for(wanted, case, cuda_device):
    how = CASES[case]
    check(device=cuda_device, wanted=wanted, **how)
    problem = draw(**how).copy(device=cuda_device).require(wanted)
    output = problem.run()
    assert output.requires_grad == bool(wanted)
    if wanted:
        output.sum().backward()
    for kind in KINDS:
        assert all((leaf.grad is not None) == (kind in wanted) for leaf in problem.leaves(kind))


@pytest.mark.parametrize("mode", ["train affine", "eval"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("primitive", "pool_norm"), [*((name, True) for name in ALL), *((name, False) for name in reference.POOLS)]
)
def test_every_primitive_alone(primitive, pool_norm, stride, mode, cuda_device):
    check(device=cuda_device, space=((primitive,), pool_norm), shape=(2, 5, 9, 7), stride=stride, mode=mode)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [45, 72])
def test_more_channels_than_a_block_takes_at_once(channels, stride, cuda_device):
    """Of a depthwise convolution, one at a time and by fours; of a norm's statistics and of a matrix it takes all."""
    space = (("sep_conv_5x5", "dil_conv_5x5", "dil_conv_3x3"), False)
    check(device=cuda_device, space=space, shape=(1, channels, 10, 9), stride=stride, mode="train affine")
    check(device=cuda_device, space=space, shape=(1, channels, 7, 5), stride=stride, mode="eval affine", first=KINDS)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode, cuda_device):
    check(
        device=cuda_device,
        mode=mode,
        shape=(3, 4, 7, 6),
        space=(("sep_conv_3x3", "max_pool_3x3", "skip_connect"), True),
    )


@pytest.mark.parametrize("mixing", ["one-hot", "zero", "large"])
def test_mixing_weights(mixing, cuda_device):
    for mode in ("train affine", "eval"):
        check(device=cuda_device, mixing=mixing, mode=mode, cell=(1, 2, 1), shape=(2, 4, 6, 6))


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("first", [("inputs",), ("weights",), KINDS], ids="+".join)
@pytest.mark.parametrize("cell", [None, (1, 2, 2)])
def test_second_derivatives(cell, first, mode, cuda_device):
    check(device=cuda_device, first=first, cell=cell, mode=mode, shape=(2, 3, 6, 6))


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("space", ["darts", "another order"])
def test_every_edge_with_candidates_of_its_own(space, mode, cuda_device):
    for cell in ((2, 3, 1), (1, 3, 2)):
        check(device=cuda_device, own=True, space=space, cell=cell, mode=mode, shape=(2, 4, 6, 6))


@pytest.mark.parametrize("mode", ["train affine", "eval affine", "eval"])
@pytest.mark.parametrize("space", [(ALL, True), (ALL, False), "no parameters"], ids=["all", "bare pools", "no parameters"])
@pytest.mark.parametrize("cell", [(1, 2, 1), (2, 2, 2)])
def test_image_scales(cell, space, mode, cuda_device):
    check(device=cuda_device, space=space, cell=cell, mode=mode, shape=(3, 4, 6, 5), image_scales=True)


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("wanted", [*((kind,) for kind in KINDS), KINDS[1:]], ids="+".join)
def test_image_scales_and_some_gradients(wanted, mode, cuda_device):
    how = {"own": True, "last": True, "edge_weights": True, "wanted": wanted}
    check(device=cuda_device, cell=(2, 2, 2), mode=mode, shape=(3, 4, 6, 6), image_scales=True, **how)


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("first", [("inputs",), ("weights",)], ids="+".join)
def test_second_derivatives_with_image_scales(first, mode, cuda_device):
    how = {"first": first, "wanted": KINDS[:3], "image_scales": True}
    check(device=cuda_device, cell=(1, 2, 2), mode=mode, shape=(3, 4, 6, 6), **how)


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("first", [(), ("inputs",)], ids=["first derivatives", "second derivatives"])
def test_last_node_alone(first, mode, cuda_device):
    how = {"first": first, "wanted": ("inputs", "weights", "parameters")}
    check(device=cuda_device, last=True, cell=(2, 2, 1), mode=mode, shape=(2, 4, 6, 6), **how)


def test_second_derivatives_where_only_the_states_require_a_gradient(cuda_device):
    """As in a Jacobian norm of a frozen network; unlike a CPU's kernels, which keep masks alone, with third ones."""
    problem = draw(cell=(1, 2, 1), mode="eval", shape=(2, 3, 6, 6)).copy(device=cuda_device).require(("inputs",))
    results = []
    for implementation in (reference, kernels):
        output = problem.run(implementation)
        cotangent = noise(output, 1).requires_grad_()
        first = torch.autograd.grad(output, problem.states, cotangent, create_graph=True)
        (second,) = torch.autograd.grad(first[0].square().sum(), cotangent, create_graph=True)
        results.append([first[0].detach(), second.detach(), *torch.autograd.grad(second.square().sum(), cotangent)])
    assert distance(results[1], results[0]) <= 1e-5


@pytest.mark.parametrize("stride", [1, 2])
def test_ties_go_where_pytorch_sends_them(stride, cuda_device):
    def tie(problem):
        x = problem.states[0]
        x.copy_(torch.randint(-2, 3, x.shape, generator=torch.Generator().manual_seed(0)))

    for space in ((("max_pool_3x3",), False), (("max_pool_3x3", "sep_conv_3x3"), True)):
        check(device=cuda_device, space=space, mode="eval affine", change=tie, stride=stride, shape=(2, 17, 9, 7))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("primitive", [name for name in ALL if name != "skip_connect"])
def test_nan_propagates(primitive, mode, cuda_device):
    for shape, place, stride in (((2, 3, 9, 7), (1, 2, 4, 4), 1), ((2, 8, 8, 8), (0, 7, 7, 7), 2)):
        problem = draw(space=((primitive,), True), mode=mode, shape=shape, stride=stride)
        problem.states[0][place] = float("nan")
        results = [evaluate(reference, problem.copy(), wanted=("weights",))]
        results.append(evaluate(kernels, problem.copy(device=cuda_device), wanted=("weights",)))
        for kind in ("output", "running_mean", "running_var", "gradient of weights"):
            for expected, found in zip(*(each[kind] for each in results)):
                assert torch.equal(found.isnan().cpu(), expected.isnan()), kind


@pytest.mark.parametrize("channels", [3, 4, 20])
@pytest.mark.parametrize("primitive", ["conv_1x1", "conv_3x3", "dil_conv_3x3"])
def test_infinities_go_through_a_matrix_as_they_are(primitive, channels, cuda_device):
    """Made of two halves for a tensor core, what is left of one is not a number; no weight here is a half alone."""
    problem = draw(space=((primitive,), True), mode="eval", shape=(2, channels, 9, 7))
    problem.states[0][1, 2, 4, 4] = float("inf")
    expected, found = problem.copy().run(reference), problem.copy(device=cuda_device).run().cpu()
    infinite = expected.isinf()
    assert infinite[1, :, 4, 4].any() and torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[infinite], expected[infinite]) and found[~infinite & ~expected.isnan()].isfinite().all()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pool_norm", [True, False])
@pytest.mark.parametrize("pool", reference.POOLS)
def test_a_nan_wins_its_max_pools_and_spoils_no_gradient(pool, pool_norm, stride, cuda_device):
    problem = draw(space=((pool,), pool_norm), mode="eval", shape=(2, 8, 9, 7), stride=stride)
    problem.states[0][1, 2, 4, 4] = float("nan")
    results = []
    for implementation, copied in ((reference, problem.copy()), (kernels, problem.copy(device=cuda_device))):
        output = copied.require(("inputs",)).run(implementation)
        (gradient,) = torch.autograd.grad(output, copied.states, noise(output, 1))
        results.append(gradient.cpu())
    assert not results[0].isnan().any() and results[0][1, 2, 4, 4] != 0
    assert distance([results[1]], [results[0]]) <= 1e-6


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitive", ["dil_conv_3x3", "dil_conv_5x5"])
def test_a_nan_spoils_the_weights_alone_that_read_it(primitive, stride, cuda_device):
    """At the right border of an image whose width is no multiple of what a thread takes at once."""
    problem = draw(space=((primitive,), True), mode="eval", shape=(2, 8, 9, 7), stride=stride)
    problem.states[0][1, 2, 4, 6] = float("nan")
    results = []
    for implementation, copied in ((reference, problem.copy()), (kernels, problem.copy(device=cuda_device))):
        output = copied.require(("parameters",)).run(implementation)
        (gradient,) = torch.autograd.grad(output, copied.parameters[0][0], torch.ones_like(output))
        results.append(gradient.cpu().isnan())
    assert torch.equal(*results)
    assert results[0].any() and not results[0][2].all()


@pytest.mark.parametrize("training", [True, False])
def test_one_state_alone_may_require_a_gradient(training, cuda_device):
    problem = draw(cell=(2, 2, 1), mode="train" if training else "eval", shape=(2, 5, 6, 6)).copy(device=cuda_device)

    def gradients(wanted):
        for index, state in enumerate(problem.states):
            state.requires_grad_(index in wanted)
        weights = problem.weights.requires_grad_()
        of = [problem.states[index] for index in wanted]
        output = problem.run()
        return torch.autograd.grad(output, [*of, weights], noise(output, 1))

    both = gradients([0, 1])
    for which in (0, 1):
        assert same(list(gradients([which])), [both[which], both[2]])
    assert same(list(gradients([])), [both[2]])


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("which", ["inputs", "incoming", "all"])
def test_any_alignment(which, mode, cuda_device):
    """Four channels are read at once only where every array allows it."""

    def shifted(tensor):
        moved = tensor.new_empty(tensor.numel() + 1)[1:].as_strided(tensor.shape, tensor.stride(), 1)
        assert moved.copy_(tensor).data_ptr() % 16 == 4
        return moved

    problem = draw(cell=(2, 1, 2), shape=(2, 8, 7, 6), mode=mode).copy(layout="channels_last", device=cuda_device)
    expected = values_and_gradients(problem.require(KINDS))
    incoming = noise(expected[0], 1).to(memory_format=torch.channels_last)
    if which != "incoming":
        problem.states = [shifted(state.detach()) for state in problem.states]
    if which == "all":
        problem.weights = shifted(problem.weights.detach())
        for norm in problem.modules():
            norm.running_mean, norm.running_var = shifted(norm.running_mean), shifted(norm.running_var)
    problem.require(KINDS)
    found = values_and_gradients(problem, incoming if which == "inputs" else shifted(incoming))
    for index, (ours, theirs) in enumerate(zip(found, expected)):
        assert distance([ours], [theirs]) <= 1e-5, index


@pytest.mark.parametrize("cuda_device", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_batch_as_large_as_in_a_search(stride, cuda_device):
    """Values that change little where a rounding turns a ReLU around: among so many, one does."""
    check(device=cuda_device, wanted=("weights",), shape=(64, 16, 32, 32), stride=stride, mode="train affine")
