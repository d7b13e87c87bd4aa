"""mixed_op and mixed_cell against their float64 definition, and as citizens of PyTorch.

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
from rnas.kernels import backend, engine, formats, mixed_cell, mixed_op
from rnas.kernels.reference import mixed_op as reference

DARTS = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect")
DARTS += ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
NAS_BENCH_201 = ("none", "skip_connect", "conv_1x1", "conv_3x3", "avg_pool_3x3")
SPACES = {  # name: primitives, pool_norm
    "darts": (DARTS, True),
    "nas-bench-201": (NAS_BENCH_201, False),
    "skip and sep": (("skip_connect", "sep_conv_3x3"), True),
    "no parameters": (("avg_pool_3x3", "skip_connect", "max_pool_3x3"), True),
    "another order": (("dil_conv_5x5", "conv_3x3", "ones", "max_pool_3x3", "dil_conv_3x3", "sep_conv_5x5"), False),
}
CELLS = {  # name: input states, nodes, stride
    "normal": (2, 4, 1),
    "reduction": (2, 4, 2),
    "two nodes": (2, 2, 1),
    "one input": (1, 3, 1),
    "small reduction": (1, 2, 2),
}
KINDS = ("inputs", "weights", "parameters", "affine")

pytestmark = pytest.mark.usefixtures("compiled", "poisoned_allocations")


@dataclass
class Problem(Call):
    """The arguments of one call: of mixed_cell, or of mixed_op where `nodes` is 0 (then with one state and one edge)."""

    KINDS = KINDS
    states: list[Tensor]
    weights: Tensor
    parameters: list[list[Tensor]]
    norms: list[list[nn.BatchNorm2d]]
    primitives: reference.Primitives
    nodes: int
    stride: int
    pool_norm: bool
    partial: int = 1
    edge_weights: Tensor | None = None
    last: bool = False
    image_scales: Tensor | None = None

    def copy(self, dtype: torch.dtype = torch.float32, layout: str = "contiguous", device: str = "cpu") -> Problem:
        arrange = LAYOUTS[layout]
        return type(self)(
            [arrange(state.detach().to(device, dtype, copy=True)) for state in self.states],
            self.weights.detach().to(device, dtype, copy=True),
            [[arrange(tensor.detach().to(device, dtype, copy=True)) for tensor in edge] for edge in self.parameters],
            [[copy.deepcopy(norm).to(device, dtype) for norm in edge] for edge in self.norms],
            self.primitives,
            self.nodes,
            self.stride,
            self.pool_norm,
            self.partial,
            None if self.edge_weights is None else self.edge_weights.detach().to(device, dtype, copy=True),
            self.last,
            None if self.image_scales is None else self.image_scales.to(device, dtype, copy=True),
        )

    def arguments(self) -> tuple:
        """The positional arguments of the public function."""
        if self.nodes:
            return self.states, self.weights, self.parameters, self.norms
        return self.states[0], self.weights, self.parameters[0], self.norms[0]

    def options(self) -> dict:
        """The keyword arguments of the public function."""
        options = {"primitives": self.primitives, "stride": self.stride, "pool_norm": self.pool_norm}
        options["partial"] = self.partial
        cell = {"nodes": self.nodes, "edge_weights": self.edge_weights, "last": self.last}
        cell["image_scales"] = self.image_scales
        return options | cell if self.nodes else options

    def run(self, implementation=kernels) -> Tensor:
        """The result of `implementation.mixed_cell` or `implementation.mixed_op`."""
        function = implementation.mixed_cell if self.nodes else implementation.mixed_op
        return function(*self.arguments(), **self.options())

    def modules(self) -> list[nn.BatchNorm2d]:
        return [norm for edge in self.norms for norm in edge]

    def leaves(self, kind: str) -> list[Tensor]:
        if kind == "inputs":
            return self.states
        if kind == "weights":
            return [self.weights] if self.edge_weights is None else [self.weights, self.edge_weights]
        if kind == "parameters":
            return [tensor for edge in self.parameters for tensor in edge]
        return [tensor for norm in self.modules() for tensor in (norm.weight, norm.bias) if tensor is not None]


MIXING = {  # name: (E, K) normal numbers -> mixing weights
    "softmax": lambda z: z.softmax(-1),
    "one-hot": lambda z: nn.functional.one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype),
    "zero": torch.zeros_like,
    "negative": lambda z: -z.abs(),
    "large": lambda z: (1.5 * z).exp() * z.sign(),
}


def draw(
    seed: int = 0,
    space: str | tuple = "darts",
    cell: str | tuple | None = None,
    shape: tuple[int, ...] = (2, 3, 8, 8),
    stride: int = 1,
    mode: str = "train",
    mixing: str = "softmax",
    partial: int = 1,
    edge_weights: bool = False,
    last: bool = False,
    own: bool = False,
    image_scales: bool = False,
    sampled: int | None = None,
) -> Problem:
    """A random problem.

    Args:
        space: a name of `SPACES`, or (primitives, pool_norm).
        cell: a name of `CELLS`, whose stride then counts, or (input states, nodes, stride); None for a single edge.
        shape: (N, C, H, W) of the states.
        mode: a name of `MODES`, or "mixed" for BN modules that differ.
        mixing: a name of `MIXING`.
        partial: as in mixed_op; it divides C.
        edge_weights: whether a cell has them.
        last: whether the last node of a cell alone is wanted.
        own: whether each edge of a cell has some of the primitives, in an order of its own, or none at all.
        image_scales: whether a cell has them; a third of them are zero.
        sampled: not None: each edge of a cell has one of the primitives, other ones for each number.
    """
    generator = torch.Generator().manual_seed(seed + 1000 * (sampled or 0))
    primitives, pool_norm = SPACES[space] if isinstance(space, str) else space
    inputs, nodes, stride = CELLS.get(cell, cell) if cell else (1, 0, stride)
    sources = [source for node in range(nodes) for source in range(inputs + node)] if cell else [0]
    parameters, norms, channels, rows = [], [], shape[1] // partial, [primitives] * len(sources)
    if own or sampled is not None:
        orders = [torch.randperm(len(primitives), generator=generator).tolist() for _ in sources]
        counts = torch.randint(len(primitives) + 1, (len(sources),), generator=generator).tolist()
        counts = counts if own else [1] * len(sources)
        rows = [tuple(primitives[each] for each in order[:count]) for order, count in zip(orders, counts)]
        rows[0] = rows[0] or primitives[-1:]
    for source, row in zip(sources, rows):
        edge_stride = stride if source < inputs else 1
        shapes = reference.parameter_shapes(row, channels, edge_stride)
        parameters.append([torch.randn(s, generator=generator) / math.prod(s[1:]) ** 0.5 for s in shapes])
        edge = []
        for _ in range(reference.norm_count(row, edge_stride, pool_norm)):
            index = int(torch.randint(len(MODES), (), generator=generator))
            edge.append(draw_norm(channels, list(MODES)[index] if mode == "mixed" else mode, generator))
        norms.append(edge)
    normal = torch.randn((len(sources), max(map(len, rows))), generator=generator)
    primitives = primitives if own is False and sampled is None else tuple(rows)
    weights = MIXING[mixing](normal if cell else normal[0])
    states = [draw_input(shape, generator) for _ in range(inputs)]
    of_edges = torch.randn(len(sources), generator=generator) if cell and edge_weights else None
    scales = torch.randn(len(sources), shape[0], generator=generator) if image_scales else None
    if image_scales:
        scales *= torch.rand(scales.shape, generator=generator) > 1 / 3
    options = (nodes, stride, pool_norm, partial, of_edges, last, scales)
    return Problem(states, weights, parameters, norms, primitives, *options)


def check(implementation=kernels, wanted=KINDS, **how) -> None:
    """Compares an implementation with the float64 reference on a random problem, see `compare` and `draw` for `how`.

    What the kernels do not cover, an empty batch and norms that differ, is left to the usual choice of a backend; all
    else is forced, see `compiled`.
    """
    uncovered = how.get("mode") == "mixed" or how.get("shape", (1,))[0] == 0
    if how.get("image_scales"):
        on = engine.of(torch.empty(0, device=how.get("device", "cpu")))
        fixed = "eval" in how["mode"] or how["mode"].endswith("no buffers")
        uncovered |= (fixed and not on.SCALES_ON_FIXED) or how.get("partial", 1) > 1
    with pytest.MonkeyPatch.context() as patch:
        if uncovered:
            patch.setenv("RNAS_BACKEND", "auto")
        compare(draw, reference, implementation, wanted=wanted, **how)


# Values and gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train affine", "eval"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("primitive", "pool_norm"),
    [*((name, True) for name in reference.PRIMITIVES), *((p, False) for p in reference.POOLS)],
)
def test_every_primitive_alone(primitive, pool_norm, stride, mode):
    check(space=((primitive,), pool_norm), shape=(2, 5, 9, 7), stride=stride, mode=mode)


@pytest.mark.parametrize("mode", [*MODES, "mixed"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("space", SPACES)
def test_edge(space, stride, mode):
    check(
        space=space,
        stride=stride,
        mode=mode,
        shape=(3, 4, 7, 9),
        layout="channels_last" if stride == 2 else "contiguous",
    )


@pytest.mark.parametrize("mode", ["train", "train affine", "eval", "mixed"])
@pytest.mark.parametrize("space", ["darts", "nas-bench-201", "no parameters"])
@pytest.mark.parametrize("cell", CELLS)
def test_cell(cell, space, mode):
    check(space=space, cell=cell, mode=mode, shape=(2, 4, 8, 8))


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("size", [12, 32])
@pytest.mark.parametrize("space", ["darts", "nas-bench-201"])
def test_gradients_behind_a_global_mean(space, size, mode):
    check(space=space, shape=(3, 4, size, size), mode=mode, cotangent=of_a_mean, kink=1e-3)


@pytest.mark.parametrize("mode", ["train affine", "eval affine", "mixed"])
@pytest.mark.parametrize("partial", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("cell", ["reduction", "two nodes", "one input"])
def test_last_node_alone(cell, layout, partial, mode):
    check(space="nas-bench-201", cell=cell, mode=mode, shape=(2, 4, 8, 8), layout=layout, partial=partial, last=True)


@pytest.mark.parametrize("mode", ["train", "train affine", "eval affine", "mixed"])
@pytest.mark.parametrize("partial", [1, 2])
@pytest.mark.parametrize("space", ["darts", "nas-bench-201", "another order"])
@pytest.mark.parametrize("cell", CELLS)
def test_every_edge_with_candidates_of_its_own(cell, space, partial, mode):
    shape, layout = (2, 4, 8, 8), "channels_last" if cell == "normal" else "contiguous"
    check(space=space, cell=cell, mode=mode, shape=shape, layout=layout, partial=partial, own=True, edge_weights=True)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("channels", [3, 16, 20])
def test_every_simd_level_with_candidates_of_their_own(level, channels, mode):
    check(space="another order", cell="reduction", mode=mode, shape=(2, channels, 9, 7), own=True)


@pytest.mark.parametrize("mode", ["train affine", "eval affine", "mixed"])
@pytest.mark.parametrize("first", ["inputs", "weights", "parameters"])
@pytest.mark.parametrize("space", ["darts", "another order"])
def test_second_derivatives_with_candidates_of_their_own(space, first, mode):
    check(space=space, first=(first,), wanted=KINDS[:3], cell="normal", mode=mode, own=True)


def test_the_same_candidates_for_every_edge_are_common_ones():
    problem = draw(cell="reduction", mode="train affine")
    own = problem.copy()
    own.primitives = (problem.primitives,) * 14
    assert torch.equal(own.run(), problem.run())


def test_an_edge_without_candidates_is_one_of_none():
    problem = draw(space="no parameters", cell=(1, 2, 1), shape=(2, 4, 5, 5), mode="train")
    problem.norms = [problem.norms[0], [], problem.norms[2]]
    results = []
    for absent in ((), [], ("none",)):
        each = problem.copy()
        each.primitives = (problem.primitives, absent, problem.primitives)
        results.append(each.run())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    problem.primitives = (problem.primitives, ())
    with pytest.raises(ValueError, match="one for each of the 3 edges; got 2"):
        problem.run()


@pytest.mark.parametrize("mode", ["train", "train affine", "eval affine", "mixed"])
@pytest.mark.parametrize("space", ["darts", "nas-bench-201", "no parameters", "another order"])
@pytest.mark.parametrize("cell", CELLS)
def test_image_scales(cell, space, mode):
    layout = "channels_last" if cell == "reduction" else "contiguous"
    check(space=space, cell=cell, mode=mode, shape=(3, 4, 7, 9), layout=layout, image_scales=True)


@pytest.mark.parametrize("partial", [1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_image_scales_beside_the_other_options(last, partial):
    options = {"partial": partial, "last": last, "own": True, "edge_weights": True, "image_scales": True}
    check(space="another order", cell="normal", mode="train affine", shape=(3, 4, 8, 8), **options)


@pytest.mark.parametrize("wanted", [*((kind,) for kind in KINDS), ("inputs", "weights"), ("parameters", "affine")])
@pytest.mark.parametrize("space", ["darts", "nas-bench-201"])
def test_image_scales_and_some_gradients(space, wanted):
    check(space=space, cell="reduction", mode="train affine", shape=(3, 4, 8, 8), image_scales=True, wanted=wanted)


@pytest.mark.parametrize("size", [(7, 16, 8, 8), (5, 33, 6, 8)], ids=str)
def test_image_scales_of_images_that_go_together(size):
    check(space="nas-bench-201", cell="two nodes", mode="train affine", shape=size, image_scales=True)


@pytest.mark.parametrize("channels", [3, 16, 20])
@pytest.mark.parametrize("space", ["darts", "nas-bench-201"])
def test_image_scales_at_every_simd_level(level, space, channels):
    check(space=space, cell="small reduction", mode="train affine", shape=(3, channels, 9, 7), image_scales=True)


@pytest.mark.parametrize("first", ["inputs", "weights", "parameters"])
@pytest.mark.parametrize("space", ["darts", "nas-bench-201"])
def test_second_derivatives_with_image_scales(space, first):
    check(space=space, first=(first,), wanted=KINDS[:3], cell="two nodes", mode="train affine", image_scales=True)


def test_image_scales_of_one_change_nothing_and_of_zero_leave_nothing():
    problem = draw(cell="normal", mode="train affine", shape=(3, 4, 8, 8))
    scaled = [problem.copy() for _ in range(2)]
    scaled[0].image_scales, scaled[1].image_scales = torch.ones(14, 3), torch.ones(14, 3)
    scaled[1].image_scales[:, 1] = 0.0
    plain, one, zero = (each.run() for each in (problem, *scaled))
    assert distance([one], [plain]) <= 1e-6
    assert not zero[1].any() and zero[0].any() and zero[2].any()


@pytest.mark.parametrize("shape", [(3, 4, 7, 6), (2, 3, 1, 1), (1, 3, 1, 1)], ids=str)
def test_image_scales_without_norms(shape):
    space = (("max_pool_3x3", "skip_connect", "ones"), False)
    check(space=space, cell="two nodes", mode="train", shape=shape, image_scales=True)


def test_a_gradient_to_image_scales():
    problem = draw(cell="two nodes", mode="train affine", image_scales=True)
    found = []
    for each, implementation in ((problem.copy(torch.float64), reference), (problem.copy(), kernels)):
        each.image_scales.requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RNAS_BACKEND", "auto")
            out = each.run(implementation)
        found.append(torch.autograd.grad(out.square().sum(), each.image_scales)[0])
    assert distance(found[1:], found[:1]) <= 1e-5


@pytest.mark.parametrize(
    ("scales", "error", "text"),
    [
        ([[1.0] * 2] * 5, TypeError, "must be a tensor of shape"),
        (torch.ones(4, 2), ValueError, r"must have shape \(5, 2\)"),
        (torch.ones(5, 2, 1, 1), ValueError, r"must have shape \(5, 2\)"),
        (torch.ones(5, 2, dtype=torch.float64), TypeError, "dtype of the states"),
        (torch.ones(5, 2, device="meta"), ValueError, "on the device of the states"),
    ],
)
def test_refuses_other_image_scales(scales, error, text):
    problem = draw(cell="two nodes", mode="train")
    problem.image_scales = scales
    with pytest.raises(error, match=text):
        problem.run()


def test_a_state_that_enters_twice_is_rearranged_once(monkeypatch, compiled):
    transposed, original = [], formats._transposed
    monkeypatch.setattr(formats, "_transposed", lambda *a: transposed.append(a) or original(*a))
    problem, found = draw(cell="two nodes", space="nas-bench-201", mode="train affine", shape=(2, 16, 32, 32)), []
    for each, implementation in ((problem.copy(torch.float64), reference), (problem.copy(), kernels)):
        x = each.states[0].requires_grad_()
        each.states = [x, x]
        out = each.run(implementation)
        found.append([out, *torch.autograd.grad(out, x, noise(out, 1))])
    assert distance(found[1], found[0]) <= 1e-5
    assert len(transposed) == (1 if compiled else 0)


WAITING = {  # rows of the edges of three nodes, of one candidate each
    "ones behind all else": ("avg_pool_3x3", "avg_pool_3x3", "ones", "avg_pool_3x3", "avg_pool_3x3", "none"),
    "a node of nothing": ("avg_pool_3x3", "none", "none", "avg_pool_3x3", "none", "skip_connect"),
    "identities of identities": ("skip_connect", "none", "skip_connect", "none", "none", "avg_pool_3x3"),
    "one node is read by nobody": ("avg_pool_3x3", "skip_connect", "none", "ones", "none", "skip_connect"),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("rows", WAITING.values(), ids=list(WAITING))
def test_edges_that_wait_until_their_node_is_read(rows, layout, last, mode):
    def one_each(problem):
        problem.primitives, problem.weights = tuple((row,) for row in rows), problem.weights[:, :1]
        problem.norms = [norms if "pool" in row else [] for row, norms in zip(rows, problem.norms)]

    space = (("avg_pool_3x3", "skip_connect", "ones", "none"), True)
    check(space=space, cell=(1, 3, 1), shape=(2, 4, 6, 5), mode=mode, layout=layout, last=last, change=one_each)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [4, 16, 20])
@pytest.mark.parametrize("seed", range(10))
def test_sampled_cells(seed, channels, layout):
    names = ("none", "skip_connect", "conv_1x1", "conv_3x3", "avg_pool_3x3", "avg_pool_3x3", "max_pool_3x3")
    check(
        sampled=seed,
        mixing="negative",
        space=(names, seed % 5 == 4),
        cell=(1 + seed % 2, 3, 2 if seed % 5 == 3 else 1),
        shape=(3, channels, 6, 70 if seed % 5 == 2 else 5),
        mode="train affine",
        layout=layout,
        last=seed % 4 < 2,
        image_scales=seed % 3 == 2,
    )


@pytest.mark.parametrize("wanted", [("inputs",), ("weights",), ("parameters",), ("weights", "parameters")], ids=str)
def test_some_gradients_of_sampled_cells(wanted):
    for seed in range(6):
        space = (("skip_connect", "conv_1x1", "conv_3x3", "avg_pool_3x3", "max_pool_3x3"), False)
        check(sampled=seed, space=space, cell=(1, 3, 1), shape=(2, 16, 6, 5), mode="train", wanted=wanted)


def test_an_absent_candidate_passes_no_nan_on():
    # An edge without a pool or identity must not multiply the gradient of its node by zero.
    problem = draw(space="no parameters", cell=(1, 2, 1), shape=(2, 4, 5, 5), mode="train")
    problem.primitives = (("avg_pool_3x3", "skip_connect"), ("none",), ("skip_connect",))
    problem.weights, problem.norms = problem.weights[:, :2], [problem.norms[0][:1], [], []]
    (x,) = problem.require(("inputs",)).states
    output = problem.run()
    cotangent = torch.zeros_like(output)
    (clean,) = torch.autograd.grad(output, x, cotangent, retain_graph=True)
    cotangent[:, 4:] = math.nan  # of the second node, which only an identity of the first reaches
    (found,) = torch.autograd.grad(output, x, cotangent)
    assert not clean.isnan().any() and found.isnan().all()
    problem.primitives = (("avg_pool_3x3", "skip_connect"), ("none",), ("none",))
    (found,) = torch.autograd.grad(problem.run(), x, cotangent)
    assert not found.isnan().any()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("channels", [4, 16])
def test_where_no_candidate_passes_a_gradient_on_it_is_zero(channels, mode):
    # From the first state none leaves but `none`, nor from the first node, which is not asked for.
    problem = draw(space="nas-bench-201", cell="two nodes", shape=(2, channels, 5, 5), mode=mode, last=True)
    problem.primitives = (("none",), ("conv_1x1",), ("none",), ("conv_1x1", "skip_connect"), ("none",))
    has_parameters = [any("conv" in name for name in row) for row in problem.primitives]
    problem.parameters = [edge[:1] if has else [] for edge, has in zip(problem.parameters, has_parameters)]
    problem.norms = [edge[:1] if has else [] for edge, has in zip(problem.norms, has_parameters)]
    problem.weights = problem.weights[:, :2]
    (first, second), weights = problem.require(("inputs", "weights")).states, problem.weights
    output = problem.run()
    found = torch.autograd.grad(output, [first, second, weights], noise(output, 1))
    assert not found[0].any() and found[1].all()
    assert not found[2][[0, 1, 2, 4]].any() and found[2][3].all()


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("kind", ["inputs", "parameters"])
def test_second_derivatives_of_the_last_node(kind, mode):
    check(first=(kind,), wanted=KINDS[:3], cell="two nodes", mode=mode, last=True)


@pytest.mark.parametrize("makes", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["train", "eval affine"])
def test_the_last_node_alone_is_that_of_all(mode, layout, makes, monkeypatch):
    # Not all kernels make one node alone, or take the gradient of one.
    monkeypatch.setattr(engine.Cpu, "MAKES_LAST", makes)
    problem = draw(space="nas-bench-201", cell="two nodes", shape=(2, 4, 5, 5), mode=mode, last=True)
    problem = problem.copy(layout=layout).require(KINDS)
    found, leaves = problem.run(), [leaf for kind in KINDS for leaf in problem.leaves(kind)]
    problem.last = False
    expected = problem.run()[:, 4:]
    assert torch.equal(found, expected) and formats.layout(found) == formats.layout(problem.states[0])
    cotangent = noise(found, 1)
    found, expected = (torch.autograd.grad(each, leaves, cotangent) for each in (found, expected))
    assert distance(found, expected) <= 1e-6


def test_the_last_node_takes_no_memory_for_the_others():
    problem = draw(space="nas-bench-201", cell="two nodes", shape=(2, 4, 5, 5), mode="train", last=True)
    assert problem.run().untyped_storage().nbytes() < 2 * 4 * 2 * 4 * 25


@pytest.mark.parametrize("mode", ["train", "eval affine"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [1, 3, 16, 17, 24, 36])
def test_every_simd_level_and_number_of_channels(level, channels, stride, mode):
    check(shape=(2, channels, 9, 7), stride=stride, mode=mode, layout="channels_last" if channels % 2 else "contiguous")


@pytest.mark.parametrize("cell", ["normal", "reduction"])
@pytest.mark.parametrize("mode", ["train affine", "eval"])
def test_every_simd_level_in_a_cell(level, cell, mode):
    check(shape=(1, 16, 8, 8), cell=cell, mode=mode)
    check(space="nas-bench-201", shape=(1, 17, 8, 8), cell=cell, mode=mode, layout="channels_last")


@pytest.mark.parametrize("first", ["inputs", "parameters"])
def test_every_simd_level_twice_differentiated(level, first):
    check(shape=(1, 17, 8, 8), mode="train affine", first=(first,))
    check(shape=(1, 16, 8, 8), mode="eval affine", first=(first,), stride=2)


SIZES = [(1, 1, 1), (3, 1, 1), (1, 5, 4), (2, 1, 6), (2, 6, 1), (1, 2, 2), (1, 3, 3), (0, 5, 4), (3, 9, 7)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_small_images(size, stride):
    shape = (size[0], 3, *size[1:])
    for mode in ("eval", "eval affine"):
        check(shape=shape, stride=stride, mode=mode)
        check(space="nas-bench-201", shape=shape, stride=stride, mode=mode)
    if math.prod(size) >= 20 or size[0] == 0:
        check(shape=shape, stride=stride, mode="train affine")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_large_images(mode):
    check(shape=(2, 16, 28, 28), mode=mode)
    check(shape=(1, 8, 28, 31), mode=mode, stride=2)
    check(space="nas-bench-201", shape=(2, 17, 22, 37), mode=mode)
    check(space="nas-bench-201", shape=(2, 3, 5, 70), mode=mode)  # more windows in a row than go through together
    check(space="nas-bench-201", shape=(2, 3, 2, 70), mode=mode)


ONE_BY_ONE = (("conv_1x1",), False), (("skip_connect", "conv_1x1", "sep_conv_3x3", "avg_pool_3x3"), True)


@pytest.mark.parametrize("mode", ["train", "train affine", "train, no buffers"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(3, 3, 4, 3), (2, 16, 5, 9), (2, 20, 7, 9), (1, 33, 12, 10), (2, 65, 9, 8), (1, 3, 2, 150)], ids=str
)
@pytest.mark.parametrize("space", ONE_BY_ONE, ids=["alone", "with others"])
def test_1x1_convolutions_on_batch_statistics(space, shape, layout, mode, level):
    """Up to 64 channels, and where there are at least as many pixels, their outputs are never made."""
    check(space=space, cell="two nodes", shape=shape, layout=layout, mode=mode)
    check(space=space, cell="small reduction", shape=shape, layout=layout, mode=mode, last=True, own=True)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("wanted", [("inputs",), ("weights",), ("parameters",), ("affine",), KINDS], ids=str)
def test_gradients_of_1x1_convolutions_that_are_asked_for(wanted, threads):
    torch.set_num_threads(threads)
    for space in ONE_BY_ONE:
        check(space=space, cell="two nodes", shape=(4, 16, 8, 8), mode="train affine", wanted=wanted)


@pytest.mark.parametrize("primitives", [("conv_1x1",), ("conv_1x1", "conv_3x3", "sep_conv_3x3")], ids=["alone", "others"])
@pytest.mark.parametrize("size", [4, 32])
def test_1x1_convolutions_whose_terms_cancel(size, primitives, level):
    """The variance of a small difference of large channels is all but lost in their covariance."""

    def differences(problem):
        (x,), ((weight, *_),) = problem.states, problem.parameters
        x.copy_(1 + x[:, :1].abs() + 0.03 * x)
        weight -= weight.mean(1, keepdim=True)

    how = {"space": (primitives, False), "cell": (1, 1, 1), "shape": (5, 16, size, size), "mode": "train"}
    check(**how, change=differences, kink=1e-3)


@pytest.mark.parametrize("cotangent", [noise, of_a_mean])
def test_1x1_convolutions_far_from_zero(cotangent):
    problem = draw(space=(("conv_1x1",), False), cell=(2, 1, 1), shape=(3, 16, 24, 24), mode="train")
    for state in problem.states:
        state += 50
    calls = (kernels, torch.float32), (reference, torch.float64)
    ours, exact = (evaluate(of, problem.copy(dtype), KINDS, noise=cotangent) for of, dtype in calls)
    for kind in ("gradient of inputs", "gradient of weights", "gradient of parameters"):
        assert distance(ours[kind], exact[kind]) < 1e-6, kind  # plain PyTorch's of the parameters are 1e-4 to 2e-3 off


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cell", [None, "two nodes", "small reduction"])
@pytest.mark.parametrize("size", [(7, 16, 8, 8), (18, 3, 3, 4), (5, 33, 6, 8), (3, 8, 20, 17)], ids=str)
def test_images_that_go_together(size, cell, threads):
    """Dense convolutions take a few small images at once, where statistics are those of the batch."""
    torch.set_num_threads(threads)
    try:
        check(space="nas-bench-201", cell=cell, mode="train affine", shape=size)
        for wanted in (("inputs",), ("parameters",)):
            check(space="nas-bench-201", cell=cell, mode="train", shape=size, wanted=wanted, layout="channels_last")
        problem = draw(space="nas-bench-201", cell=cell, mode="train affine", shape=size)
        runs = [evaluate(kernels, problem.copy(), KINDS) for _ in range(2)]
        for kind in runs[0]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0][kind], runs[1][kind])), kind
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("cell", [None, "two nodes"])
@pytest.mark.parametrize("mode", ["train affine", "eval"])
@pytest.mark.parametrize("mixing", MIXING)
def test_mixing_weights(mixing, mode, cell):
    check(mixing=mixing, mode=mode, cell=cell, shape=(2, 4, 8, 8))
    check(mixing=mixing, mode=mode, cell=cell, shape=(2, 4, 8, 8), space="nas-bench-201")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("cell", [None, "reduction"])
def test_layouts(cell, mode, layout):
    check(layout=layout, mode=mode, cell=cell, shape=(2, 5, 8, 6))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edge_or_cell(data):
    chosen = data.draw(st.lists(st.sampled_from(reference.PRIMITIVES), min_size=1, max_size=5, unique=True))
    cell = data.draw(st.sampled_from([None, None, *CELLS]))
    shape = tuple(data.draw(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))))
    partial = data.draw(st.sampled_from([1, 1, 2, 3]))
    shape = (shape[0], shape[1] * partial, *shape[2:])
    many = shape[0] * math.ceil(shape[2] / 2) * math.ceil(shape[3] / 2) >= 12  # values a channel, for its variance
    check(
        space=(tuple(chosen), data.draw(st.booleans())),
        cell=cell,
        shape=shape,
        stride=data.draw(st.sampled_from([1, 2])),
        mode=data.draw(st.sampled_from([*MODES, "mixed"] if many else ["eval", "eval affine"])),
        mixing=data.draw(st.sampled_from(["softmax", "large", "one-hot"])),
        layout=data.draw(st.sampled_from(list(LAYOUTS))),
        wanted=data.draw(st.sampled_from([KINDS, *((kind,) for kind in KINDS)])),
        partial=partial,
        edge_weights=data.draw(st.booleans()),
    )


def wrong(change):
    """An implementation of one edge with one error in it."""

    def edge(x, weights, parameters, norms, **options):
        if change == "weights of other primitives":
            weights = weights.roll(1)
        if change == "another eps":
            norms = [nn.BatchNorm2d(n.num_features, 2 * n.eps, affine=False) for n in norms]
        if change == "no running statistics":
            norms = copy.deepcopy(norms)
        if change == "a gradient lost":
            parameters = [parameters[0].detach(), *parameters[1:]]
        if change == "statistics held constant":
            norms = [lambda y: y - y.mean((0, 2, 3)).detach().view(1, -1, 1, 1) for _ in norms]
        output = reference.mixed_op(x, weights, parameters, norms, **options)
        if change == "last pixel forgotten":
            output = torch.cat([output[..., :-1], output[..., -1:] * math.nan], dim=-1)
        return output

    return SimpleNamespace(mixed_op=edge)


WRONG = ["weights of other primitives", "another eps", "no running statistics", "a gradient lost"]
WRONG += ["statistics held constant", "last pixel forgotten"]


@pytest.mark.parametrize("change", WRONG)
def test_the_gate_turns_red_for_a_wrong_edge(change):
    check(wrong(None))
    with pytest.raises(AssertionError):
        check(wrong(change))


# Which gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("cell", [None, "reduction"])
@pytest.mark.parametrize("wanted", [(), *((kind,) for kind in KINDS), KINDS[:2], KINDS[1:]], ids="+".join)
def test_only_the_gradients_asked_for(wanted, cell, mode):
    check(wanted=wanted, cell=cell, mode=mode, shape=(2, 4, 8, 8))
    problem = draw(cell=cell, mode=mode).require(wanted)
    output = problem.run()
    assert output.requires_grad == bool(wanted)
    if wanted:
        output.sum().backward()
    for kind in KINDS:
        assert all((leaf.grad is not None) == (kind in wanted) for leaf in problem.leaves(kind))


@pytest.mark.parametrize("wanted", [*((kind,) for kind in KINDS), KINDS[1:]], ids="+".join)
@pytest.mark.parametrize("pool_norm", [True, False])
@pytest.mark.parametrize("others", [("skip_connect",), ("conv_1x1",)], ids=str)
@pytest.mark.parametrize("pool", reference.POOLS)
def test_only_the_gradients_of_a_pool_that_are_asked_for(pool, others, pool_norm, wanted):
    check(space=((pool, *others), pool_norm), cell="two nodes", wanted=wanted, shape=(2, 4, 8, 8))


@pytest.mark.parametrize("kind", ["inputs", "parameters", "affine"])
@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
def test_one_tensor_of_many(kind, mode):
    for index in range(0, len(draw(cell="two nodes", mode=mode).leaves(kind)), 7 if kind != "inputs" else 1):
        results = []
        for implementation in (reference, kernels):
            problem = draw(cell="two nodes", mode=mode).copy(torch.float32)
            leaf = problem.leaves(kind)[index].requires_grad_()
            for other in (t for name in KINDS for t in problem.leaves(name) if t is not leaf):
                other.requires_grad_(False)
            output = problem.run(implementation)
            output.backward(noise(output, 1))
            others = [t for name in KINDS for t in problem.leaves(name) if t is not leaf]
            assert all(other.grad is None for other in others)
            results.append(leaf.grad)
        torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4 * results[0].abs().max().item())


@pytest.mark.parametrize("mode", ["train affine", "eval"])
@pytest.mark.parametrize("cell", [None, "reduction"])
def test_two_gradients_through_one_graph_agree(cell, mode):
    problem = draw(cell=cell, mode=mode).require(KINDS)
    leaves = [leaf for kind in KINDS for leaf in problem.leaves(kind)]
    output = problem.run()
    incoming = noise(output, 1)
    before, kept = output.detach().clone(), incoming.clone()
    runs = [torch.autograd.grad(output, leaves, incoming, retain_graph=True, materialize_grads=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    part = torch.autograd.grad(output, problem.states, incoming, retain_graph=True)
    assert distance(list(part), list(runs[0][: len(part)])) <= 1e-6
    assert torch.equal(output, before) and torch.equal(incoming, kept)


@pytest.mark.parametrize("incoming", ["channels_last", "transposed", "every other pixel", "expanded"])
def test_any_layout_of_the_incoming_gradient(incoming):
    problem = draw(cell="two nodes", mode="train affine").require(KINDS)
    leaves = [leaf for kind in KINDS for leaf in problem.leaves(kind)]
    output = problem.run()
    gradient = torch.ones(()).expand(output.shape) if incoming == "expanded" else LAYOUTS[incoming](noise(output, 1))
    plain = torch.autograd.grad(output, leaves, gradient.contiguous(), retain_graph=True, materialize_grads=True)
    other = torch.autograd.grad(output, leaves, gradient, materialize_grads=True)
    assert distance(list(other), list(plain)) <= 1e-6


def test_a_graph_survives_another_call_with_the_same_norms():
    expected = None
    for implementation in (reference, kernels):
        problem = draw(mode="train affine").require(KINDS)
        leaves = [leaf for kind in KINDS for leaf in problem.leaves(kind)]
        outputs = [problem.run(implementation) for _ in range(2)]
        total = (outputs[0] * noise(outputs[0], 1)).sum() - (outputs[1] * noise(outputs[1], 2)).sum()
        found = list(torch.autograd.grad(total, leaves)) + [norm.running_var for norm in problem.modules()]
        expected = expected or found
    assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize("kind", ["inputs", "weights"])
def test_a_graph_notices_that_a_saved_tensor_was_overwritten(kind):
    problem = draw(cell="two nodes").copy(layout="channels_last").require(KINDS)  # of other images it has a copy
    output = problem.run()
    with torch.no_grad():
        problem.leaves(kind)[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        output.sum().backward()


@pytest.mark.parametrize("kind", ["parameters", "affine"])
@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
def test_a_graph_keeps_the_parameters_of_its_forward_pass(mode, kind, compiled):
    if not compiled:
        pytest.skip("plain PyTorch raises where a parameter was overwritten")
    for first in (False, True):  # the gradients, and those of the gradients
        results = []
        for overwrite in (False, True):
            problem = draw(cell="two nodes", mode=mode).copy().require(KINDS)
            leaves = [leaf for name in KINDS for leaf in problem.leaves(name)]
            output = problem.run()
            if overwrite:
                with torch.no_grad():
                    for leaf in problem.leaves(kind):
                        leaf.mul_(2)
            incoming = noise(output, 1)
            if first:
                gradients = torch.autograd.grad(output, problem.states, incoming, create_graph=True)
                output, incoming = sum((g * noise(g, 2)).sum() for g in gradients), None
            results.append(torch.autograd.grad(output, leaves, incoming, materialize_grads=True))
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_arguments_are_left_as_they_were():
    problem = draw(cell="reduction", mode="eval affine").require(KINDS)
    tensors = [leaf for kind in KINDS for leaf in problem.leaves(kind)]
    tensors += [norm.running_mean for norm in problem.modules()] + [norm.running_var for norm in problem.modules()]
    before = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
    problem.run().sum().backward()
    assert all(torch.equal(t, value) and t._version == version for t, (value, version) in zip(tensors, before))


@pytest.mark.parametrize("cell", [None, "two nodes"])
def test_without_grad_mode(cell):
    problem = draw(cell=cell, mode="train affine")
    expected = problem.copy().require(KINDS).run()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            output = problem.copy().require(KINDS).run()
        assert not output.requires_grad
        torch.testing.assert_close(output, expected.detach(), rtol=1e-5, atol=1e-5)


# Second derivatives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train affine", "eval affine", "mixed"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("space", ["darts", "nas-bench-201"])
@pytest.mark.parametrize("first", [*((kind,) for kind in KINDS), KINDS], ids="+".join)
def test_second_derivatives_of_an_edge(first, space, stride, mode):
    check(first=first, space=space, stride=stride, mode=mode, shape=(2, 3, 8, 8))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("cell", ["reduction", "two nodes"])
@pytest.mark.parametrize("first", ["inputs", "weights", "parameters"])
def test_second_derivatives_of_a_cell(first, cell, mode):
    check(first=(first,), wanted=KINDS[:3], cell=cell, mode=mode, shape=(2, 3, 8, 8), layout="channels_last")


@pytest.mark.parametrize("mixing", ["one-hot", "zero", "large"])
def test_second_derivatives_at_special_mixing_weights(mixing):
    for mode in ("train affine", "eval"):
        check(first=("inputs",), mixing=mixing, mode=mode)
        check(first=("parameters",), mixing=mixing, mode=mode)


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("kind", ["inputs", "weights", "parameters", "affine"])
def test_one_second_derivative_alone(kind, mode):
    check(first=("inputs",), wanted=(kind,), mode=mode)


@pytest.mark.parametrize("pool_norm", [True, False])
@pytest.mark.parametrize("cell", [None, "two nodes", "small reduction"])
def test_second_derivatives_on_masks(cell, pool_norm):
    results = []
    for implementation in (reference, kernels):
        problem = draw(space=(DARTS, pool_norm), cell=cell, mode="eval affine").copy(layout="channels_last")
        states = problem.require(("inputs",)).states
        output = problem.run(implementation)
        cotangent = noise(output, 1).requires_grad_()
        gradients = torch.autograd.grad(output, states, cotangent, create_graph=True)
        total = sum((gradient * noise(gradient, 2 + i)).sum() for i, gradient in enumerate(gradients))
        options = {"retain_graph": True, "materialize_grads": True}
        *by_states, by_cotangent = torch.autograd.grad(total, [*states, cotangent], **options)
        assert all(each.shape == state.shape and not each.any() for each, state in zip(by_states, states))
        if implementation is kernels:
            assert not any(each.any() for each in torch.autograd.grad(total, states, retain_graph=True))  # not "unused"
            assert torch.equal(torch.autograd.grad(total, cotangent)[0], by_cotangent)
            for index, state in enumerate(states):  # one state alone
                problem.require(())
                state.requires_grad_()
                (alone,) = torch.autograd.grad(problem.run(), state, cotangent.detach())
                assert distance([alone], [gradients[index].detach()]) <= 1e-6
        results.append([*(gradient.detach() for gradient in gradients), by_cotangent])
    assert distance(results[1], results[0]) <= 1e-5


@pytest.mark.parametrize("cell", [None, "two nodes"])
def test_no_third_derivatives_on_masks(cell, compiled):
    if not compiled:
        pytest.skip("the reference has them")
    problem = draw(cell=cell, mode="eval").require(("inputs",))
    output = problem.run()
    cotangent = noise(output, 1).requires_grad_()
    gradients = torch.autograd.grad(output, problem.states, cotangent, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives"):
        torch.autograd.grad(sum(gradient.sum() for gradient in gradients), cotangent, create_graph=True)


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("cell", [None, "one input"])
def test_derivatives_in_float64(cell, mode, monkeypatch):
    monkeypatch.setenv("RNAS_BACKEND", "auto")
    problem = draw(cell=cell, mode=mode, shape=(2, 2, 3, 3)).copy(torch.float64)
    parameters = [tensor for tensor in problem.leaves("parameters")[:6]]

    def call(states, weights, *some):
        problem.states, problem.weights = [states], weights
        problem.parameters[0] = [*some, *problem.parameters[0][len(some) :]]
        return problem.run()

    inputs = [t.requires_grad_() for t in (problem.states[0], problem.weights, *parameters)]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("what", ["inputs", "weights", "parameters"])
@pytest.mark.parametrize("cell", [None, "two nodes"])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_mode_is_refused(what, cell, grad_mode, compiled):
    if not compiled:
        pytest.skip("the reference has forward-mode derivatives")
    problem = draw(cell=cell, mode="eval")

    def call(value):
        changed = problem.copy()
        if what == "weights":
            changed.weights = value
        else:
            (changed.states if what == "inputs" else changed.parameters[0])[0] = value
        return changed.run()

    value = problem.leaves(what)[0]
    with torch.set_grad_enabled(grad_mode):
        with pytest.raises(RuntimeError):
            torch.func.jvp(call, (value,), (torch.ones_like(value),))
        with forward_ad.dual_level(), pytest.raises(RuntimeError):
            call(forward_ad.make_dual(value, torch.ones_like(value)))


# Ties, NaN, layout, repeatability ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("values", ["constants", "integers", "zeros"])
def test_ties_go_where_pytorch_sends_them(values, layout, stride):
    def tie(problem):
        x = problem.states[0]
        if values == "integers":
            x.copy_(torch.randint(-2, 3, x.shape, generator=torch.Generator().manual_seed(0)))
        else:
            x.fill_(0.5 if values == "constants" else 0.0)

    for shape in ((2, 17, 9, 7), (1, 3, 8, 8)):
        check(space=(("max_pool_3x3",), False), change=tie, layout=layout, stride=stride, shape=shape)
        check(
            space=(("max_pool_3x3", "skip_connect"), True),
            mode="eval",
            change=tie,
            layout=layout,
            stride=stride,
            shape=shape,
        )
        check(mode="eval affine", change=tie, layout=layout, stride=stride, shape=shape)
        if values == "integers":
            check(mode="train affine", change=tie, layout=layout, stride=stride, shape=shape)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("primitive", reference.PRIMITIVES)
def test_nan_propagates(primitive, mode, stride):
    for shape, place in (((2, 3, 9, 7), (1, 2, 4, 4)), ((2, 17, 8, 8), (0, 16, 7, 7)), ((2, 1, 5, 4), (0, 0, 0, 0))):
        problem = draw(space=((primitive,), True), mode=mode, shape=shape, stride=stride)
        problem.states[0][place] = math.nan
        # The kernel of FactorizedReduce multiplies what belongs to the other half of the channels by zero; the CPU's
        # algorithm for dense convolutions takes windows of 4x4 outputs.
        windows = primitive == "conv_3x3" and stride == 1
        spreads = windows or (primitive == "skip_connect" and stride == 2)
        expected = evaluate(reference, problem.copy(), wanted=("weights",))
        for layout in ("contiguous", "channels_last"):
            result = evaluate(kernels, problem.copy(layout=layout), wanted=("weights",))
            for kind in ("output", "running_mean", "running_var", "gradient of weights"):
                for found, wanted in zip(result[kind], expected[kind]):
                    if spreads and kind != "gradient of weights":
                        assert found.isnan()[wanted.isnan()].all(), kind
                    else:
                        assert torch.equal(found.isnan(), wanted.isnan()), kind
            if spreads and mode == "eval":  # to the other channels of the pixel or of its window, and not beyond it
                found, wanted = (each["output"][0].isnan().any(dim=1).float() for each in (result, expected))
                reach = nn.functional.max_pool2d(wanted, 7, 1, 3) if windows else wanted
                assert (wanted <= found).all() and (found <= reach).all()


@pytest.mark.parametrize("channels", [3, 6, 16])
def test_a_gradient_that_is_not_finite_stays_with_its_edge(level, channels):
    edges = (("conv_3x3",), ("sep_conv_3x3",), ("skip_connect",))
    parameters = [[torch.randn(shape) for shape in reference.parameter_shapes(edge, channels, 1)] for edge in edges]
    leaves = [parameter.requires_grad_() for edge in parameters for parameter in edge]
    x, weights = torch.randn(4, channels, 8, 8), torch.ones(3, 1)
    found = []
    for function in (reference.mixed_cell, kernels.mixed_cell):
        norms = [[nn.BatchNorm2d(channels) for _ in range(reference.norm_count(edge, 1, True))] for edge in edges]
        out = function([x], weights, parameters, norms, primitives=edges, nodes=2)
        gradient = torch.ones_like(out)
        gradient[:, :channels] = math.nan  # of the first node
        found.append(torch.autograd.grad(out, leaves, gradient))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("cell", [None, "normal", "reduction"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_output(layout, cell):
    problem = draw(cell=cell, mode="eval", shape=(2, 4, 8, 6))
    for index, state in enumerate(problem.states):  # the first decides
        problem.states[index] = LAYOUTS["contiguous" if index else layout](state)
    for wanted in ((), KINDS):
        output = problem.require(wanted).run()
        assert output.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
        assert output.is_contiguous() == (layout != "channels_last")


def test_a_state_in_both_layouts_gives_a_contiguous_output():
    assert draw(shape=(2, 1, 8, 8)).copy(layout="channels_last").run().is_contiguous()
    assert draw(shape=(2, 3, 1, 1), mode="eval").copy(layout="channels_last").run().is_contiguous()


@pytest.mark.parametrize("others", ["channels_last", "slice"])
def test_states_may_differ_in_layout(others):
    problem = draw(cell="two nodes", shape=(2, 4, 8, 8))
    expected = problem.copy().run()
    mixed = problem.copy()
    mixed.states[1] = LAYOUTS[others](mixed.states[1])
    assert distance([mixed.run()], [expected]) <= 1e-5


def test_weights_may_be_views():
    problem = draw(cell="two nodes", shape=(2, 4, 8, 8))
    expected = problem.copy().run()
    view = problem.copy()
    view.weights = view.weights.t().contiguous().t()
    assert torch.equal(view.run(), expected)
    one = draw(shape=(2, 4, 8, 8))
    expected, view = one.copy().run(), one.copy()
    view.weights = torch.stack([view.weights, view.weights], dim=1)[:, 0]
    assert torch.equal(view.run(), expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cell", [None, "reduction"])
@pytest.mark.parametrize("mode", ["train affine", "eval"])
def test_threads_and_same_bits_every_time(mode, cell, threads):
    torch.set_num_threads(threads)
    try:
        for shape in ((5, 17, 9, 7), (1, 4, 28, 28)):
            check(cell=cell, mode=mode, shape=shape, layout="channels_last")
            problem = draw(cell=cell, mode=mode, shape=shape)
            for first in ((), ("inputs",)):
                runs = [evaluate(kernels, problem.copy(), KINDS, first) for _ in range(2)]
                for kind in runs[0]:
                    assert all(torch.equal(a, b) for a, b in zip(runs[0][kind], runs[1][kind])), kind
    finally:
        torch.set_num_threads(1)


# Compilers, backends and refusals ------------------------------------------------------------------------------------


def registered_calls(problem: Problem) -> list:
    """Every registered op that a call, its backward and its second backward go through, with arguments."""
    with Recorder("mixed_") as recorder:
        evaluate(kernels, problem.copy(), KINDS)
        evaluate(kernels, problem.copy(), KINDS, first=("inputs", "parameters"))
        evaluate(kernels, problem.copy(), ("weights",), first=("inputs",))
    return recorder.one_each()


@pytest.mark.parametrize("mode", ["train affine", "eval"])
@pytest.mark.parametrize(("cell", "last"), [(None, False), ("small reduction", False), ("small reduction", True)])
def test_opcheck(cell, last, mode):
    scaled = last and mode == "train affine"
    few = (("max_pool_3x3", "skip_connect", "sep_conv_3x3"), True)
    how = {"mode": mode, "shape": (2, 3, 5, 4), "last": last, "image_scales": scaled}
    calls = registered_calls(draw(space=few, cell=cell, **how))
    if not calls:
        pytest.skip("no op called rnas::mixed_... is registered")
    for function, arguments, options in calls:
        opcheck(function, arguments, options)


class Edge(nn.Module):
    """A module around mixed_op."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.options = problem.options()
        self.parameters_of_edge = nn.ParameterList(problem.parameters[0])
        self.norms = nn.ModuleList(problem.norms[0])

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return mixed_op(x, weights, list(self.parameters_of_edge), list(self.norms), **self.options).relu()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("mode", "partial"), [("train affine", 1), ("train, cumulative", 1), ("eval", 1), ("train affine", 2)]
)
def test_compiles_whole_and_once(mode, partial, stride):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    how = {"mode": mode, "stride": stride, "shape": (2, 3 * partial, 8, 8), "partial": partial}
    problem = draw(**how)
    eager, module = Edge(problem.copy()), Edge(problem.copy())
    compiled_module = torch.compile(module, fullgraph=True, backend=counter)
    for seed in range(2):
        fresh = draw(seed, **how)
        results = []
        for call, owner in ((eager, eager), (compiled_module, module)):
            x, weights = fresh.states[0].clone().requires_grad_(), fresh.weights.clone().requires_grad_()
            owner.zero_grad()
            output = call(x, weights)
            output.backward(noise(output, 1))
            tensors = [output.detach(), x.grad, weights.grad, *(p.grad for p in owner.parameters()), *owner.buffers()]
            results.append([tensor.clone() for tensor in tensors])
        assert distance(results[1], results[0]) <= 1e-6
        assert all(a.stride() == b.stride() for a, b in zip(*results))
    assert counter.frame_count == 1


def test_the_reference_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("RNAS_BACKEND", "reference")
    for cell, partial in ((None, 1), ("reduction", 1), ("reduction", 3)):
        problem = draw(cell=cell, mode="train affine", partial=partial, edge_weights=partial > 1)
        results = [evaluate(implementation, problem.copy(), KINDS) for implementation in (kernels, reference)]
        assert all(torch.equal(a, b) for kind in results[0] for a, b in zip(results[0][kind], results[1][kind]))


def test_the_kernel_refuses_other_dtypes_where_it_is_forced(compiled, monkeypatch):
    if not compiled:
        pytest.skip("rnas._cpu is not built")
    problem = draw(cell="two nodes")
    with pytest.raises(backend.BackendError, match="float64"):
        problem.copy(torch.float64).run()
    monkeypatch.setenv("RNAS_BACKEND", "auto")
    results = [problem.copy(torch.float64).run(implementation) for implementation in (kernels, reference)]
    assert distance(*([result] for result in results)) <= 1e-10


UNCOVERED = [("darts", 1, "mixed", 2, "differ"), ("darts", 2, "eval", 0, "empty"), ("darts", 1, "train", 0, "empty")]


@pytest.mark.parametrize(("space", "stride", "mode", "batch", "reason"), UNCOVERED)
def test_the_kernel_says_what_it_does_not_cover(space, stride, mode, batch, reason, compiled):
    if not compiled:
        pytest.skip("rnas._cpu is not built")
    with pytest.raises(backend.BackendError, match=f"RNAS_BACKEND=cpu cannot serve mixed_op .*{reason}"):
        draw(space=space, stride=stride, mode=mode, shape=(batch, 3, 8, 8)).run()


def test_a_norm_with_a_forward_of_its_own_is_called(compiled, monkeypatch):
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    problem = draw(space="skip and sep")
    problem.norms = [[Doubled(3), Doubled(3)]]
    if compiled:
        with pytest.raises(backend.BackendError, match="forward of its own"):
            problem.run()
    monkeypatch.setenv("RNAS_BACKEND", "auto")
    expected = problem.copy().run(reference)
    assert torch.equal(problem.run(), expected)


def test_batch_statistics_need_more_than_one_value():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        draw(shape=(1, 3, 1, 1), mode="train").run()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        draw(shape=(1, 3, 2, 2), mode="train", stride=2).run()


def edge_call(**changes):
    """Calls mixed_op with good arguments but for `changes`."""
    problem = draw(space="skip and sep")
    names = ("x", "weights", "parameters", "norms")
    arguments = dict(zip(names, problem.arguments())) | problem.options() | changes
    return mixed_op(*[arguments.pop(name) for name in names], **arguments)


def cell_call(**changes):
    """Calls mixed_cell with good arguments but for `changes`."""
    problem = draw(space=(("conv_1x1", "avg_pool_3x3"), True), cell="two nodes")
    names = ("states", "weights", "parameters", "norms")
    arguments = dict(zip(names, problem.arguments())) | problem.options() | changes
    return mixed_cell(*[arguments.pop(name) for name in names], **arguments)


X = torch.rand(2, 3, 8, 8)
SEP = [torch.rand(shape) for shape in ((3, 1, 3, 3), (3, 3, 1, 1), (3, 1, 3, 3), (3, 3, 1, 1))]
BN = [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
CELL_PARAMETERS, CELL_NORMS = [[SEP[1]]] * 5, [BN] * 5
REFUSED_EDGES = [
    ({"x": [0.5]}, TypeError, "x"),
    ({"x": X.byte()}, TypeError, "x .*uint8"),
    ({"x": X[0]}, ValueError, r"x .*\(N, C, H, W\).*\(3, 8, 8\)"),
    ({"weights": [0.5, 0.5]}, TypeError, "weights"),
    ({"weights": torch.rand(3)}, ValueError, r"weights .*\(2,\).*\(3,\)"),
    ({"weights": torch.rand(1, 2)}, ValueError, r"weights .*\(2,\).*\(1, 2\)"),
    ({"weights": torch.rand(2).double()}, TypeError, "weights .*float32.*float64"),
    ({"parameters": SEP[:3]}, ValueError, "parameters.* 4.* 3"),
    ({"parameters": [*SEP, SEP[0]]}, ValueError, "parameters.* 4.* 5"),
    ({"parameters": [*SEP[:3], SEP[0]]}, ValueError, r"parameters.*\(3, 3, 1, 1\).*\(3, 1, 3, 3\)"),
    ({"parameters": [*SEP[:3], SEP[3].double()]}, TypeError, "parameters.*float32.*float64"),
    ({"parameters": [*SEP[:3], 1.0]}, TypeError, "parameters.*float"),
    ({"norms": BN[:1]}, ValueError, "norms.* 2.* 1"),
    ({"norms": [BN[0], nn.BatchNorm2d(4)]}, ValueError, "norms.* 3.* 4"),
    ({"norms": [BN[0], nn.Identity()]}, TypeError, "norms.*BatchNorm2d.*Identity"),
    ({"primitives": ("sep_conv_3x3", "conv_7x7")}, ValueError, "conv_7x7"),
    ({"primitives": ("sep_conv_3x3", "sep_conv_3x3")}, ValueError, "sep_conv_3x3"),
    ({"primitives": ()}, ValueError, "primitives"),
    ({"primitives": "skip_connect"}, TypeError, "primitives.*str"),
    ({"primitives": (0, 1)}, TypeError, "primitives.*str"),
    ({"parameters": None}, TypeError, "parameters.*NoneType"),
    ({"norms": iter(BN)}, TypeError, "norms.*iterator"),
    ({"stride": 3}, ValueError, "stride .*3"),
    ({"stride": "1"}, (TypeError, ValueError), "stride"),
]
REFUSED_CELLS = [
    ({"states": []}, ValueError, "states"),
    ({"states": [X, X[:1]]}, ValueError, r"states.*\(2, 3, 8, 8\).*\(1, 3, 8, 8\)"),
    ({"states": [X, X.double()]}, TypeError, "states.*float32.*float64"),
    ({"states": [X, None]}, TypeError, "states.*NoneType"),
    ({"states": [X.long(), X.long()]}, TypeError, "states.*int64"),
    ({"weights": torch.rand(4, 2)}, ValueError, r"weights .*\(5, 2\).*\(4, 2\)"),
    ({"weights": torch.rand(10)}, ValueError, r"weights .*\(5, 2\).*\(10,\)"),
    ({"weights": torch.rand(5, 2).double()}, TypeError, "weights .*float32.*float64"),
    ({"parameters": CELL_PARAMETERS[:4]}, ValueError, "parameters.* 5.* 4"),
    ({"parameters": [*CELL_PARAMETERS[:4], []]}, ValueError, "parameters.* 1.* 0"),
    ({"norms": CELL_NORMS[:4]}, ValueError, "norms.* 5.* 4"),
    ({"norms": [*CELL_NORMS[:4], BN[:1]]}, ValueError, "norms.* 2.* 1"),
    ({"nodes": 0}, ValueError, "nodes .*0"),
    ({"nodes": 3}, ValueError, r"weights .*\(9, 2\).*\(5, 2\)"),
    ({"stride": 3}, ValueError, "stride .*3"),
    ({"primitives": ("conv_1x1", "conv_1x1")}, ValueError, "conv_1x1"),
    ({"partial": 3}, ValueError, r"parameters.*\(1, 1, 1, 1\).*\(3, 3, 1, 1\)"),
    ({"edge_weights": [1.0] * 5}, TypeError, "edge_weights .*list"),
    ({"edge_weights": torch.rand(4)}, ValueError, r"edge_weights .*\(5,\).*\(4,\)"),
    ({"edge_weights": torch.rand(5, 1)}, ValueError, r"edge_weights .*\(5,\).*\(5, 1\)"),
    ({"edge_weights": torch.rand(5).double()}, TypeError, "edge_weights .*float32.*float64"),
    ({"edge_weights": torch.rand(5, device="meta")}, ValueError, "edge_weights .*cpu.*meta"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED_EDGES)
def test_refuses_bad_arguments_of_an_edge(changes, error, message):
    edge_call()
    with pytest.raises(error, match=message):
        edge_call(**changes)


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED_CELLS)
def test_refuses_bad_arguments_of_a_cell(changes, error, message):
    cell_call()
    with pytest.raises(error, match=message):
        cell_call(**changes)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("partial", "stride", "shape"), [(4, 1, (3, 16, 8, 8)), (4, 2, (2, 16, 8, 6)), (2, 2, (2, 6, 7, 5))])
def test_partial_channels(partial, stride, shape, layout):
    """A quarter of the channels through the candidates, the rest around them, shuffled, as in PC-DARTS."""
    torch.manual_seed(0)
    channels, primitives = shape[1] // partial, DARTS
    parameters = [
        (0.5 * torch.randn(s)).requires_grad_() for s in reference.parameter_shapes(primitives, channels, stride)
    ]
    norms = [nn.BatchNorm2d(channels, affine=False) for _ in range(reference.norm_count(primitives, stride, True))]
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    weights, edge_weight = torch.rand(len(primitives)).requires_grad_(), torch.tensor(0.7, requires_grad=True)
    of = [x, weights, edge_weight, *parameters]

    def expected(x, weights, edge_weight, *parameters):
        through, around = x[:, :channels], x[:, channels:]
        copies = [copy.deepcopy(norm).to(x.dtype) for norm in norms]
        mixed = reference.mixed_op(through, weights, parameters, copies, primitives=primitives, stride=stride)
        if stride == 2:
            around = nn.functional.max_pool2d(around, 2, 2, ceil_mode=True)
        out, shuffled = torch.cat([mixed, around], dim=1), []
        for channel in range(channels):
            shuffled += [out[:, channel + group * channels] for group in range(partial)]
        return edge_weight * torch.stack(shuffled, dim=1)

    doubles = [tensor.detach().double().requires_grad_() for tensor in of]
    reference_out = expected(*doubles)
    noise = torch.randn_like(reference_out)
    reference_gradients = torch.autograd.grad(reference_out, doubles, noise)
    out = edge_weight * kernels.mixed_op(
        x, weights, parameters, norms, primitives=primitives, stride=stride, partial=partial
    )
    assert out.is_contiguous(memory_format=layout)
    torch.testing.assert_close(out.double(), reference_out, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(torch.autograd.grad(out, of, noise.float()), reference_gradients):
        error = (found.double() - wanted).norm() / max(wanted.norm(), 1e-2)
        assert error <= 1e-3


@pytest.mark.parametrize("partial", [3, 0, -1, 2.0, True + 0.5])
def test_refuses_a_part_that_does_not_divide_the_channels(partial):
    x = torch.randn(1, 4, 4, 4)
    with pytest.raises(ValueError, match="partial must be an integer that divides the 4 channels"):
        kernels.mixed_op(x, torch.ones(1), [], [], primitives=("skip_connect",), partial=partial)
    with pytest.raises(ValueError, match="partial must be an integer that divides the 4 channels"):
        mixed_cell([x], torch.ones(1, 1), [[]], [[]], primitives=("skip_connect",), nodes=1, partial=partial)


@pytest.mark.parametrize("edge_weights", [False, True])
@pytest.mark.parametrize("partial", [1, 2, 4])
@pytest.mark.parametrize("mode", ["train affine", "eval"])
@pytest.mark.parametrize("cell", ["two nodes", "small reduction"])
def test_partial_cell(cell, mode, partial, edge_weights):
    how = {"cell": cell, "mode": mode, "partial": partial, "edge_weights": edge_weights, "shape": (2, 8, 7, 6)}
    check(layout="channels_last" if partial == 4 else "contiguous", **how)
    check(wanted=("inputs",), **how)


@pytest.mark.parametrize("mode", ["mixed", "train, cumulative", "eval affine"])
def test_every_mode_of_a_partial_cell(mode):
    check(cell="reduction", mode=mode, partial=3, edge_weights=True, shape=(2, 6, 8, 8), space="nas-bench-201")


@pytest.mark.parametrize("mode", ["train", "eval affine"])
@pytest.mark.parametrize("first", [("inputs",), ("inputs", "weights", "parameters")], ids="+".join)
def test_second_derivatives_of_a_partial_cell(first, mode):
    how = {"first": first, "mode": mode, "edge_weights": True}
    check(cell="small reduction", partial=2, shape=(2, 4, 6, 6), **how)
    check(cell="two nodes", partial=1, shape=(2, 2, 6, 6), space="skip and sep", **how)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize(("cell", "partial"), [("normal", 1), ("normal", 4), ("reduction", 2)])
def test_a_partial_cell_is_the_sum_of_its_edges(cell, partial, mode, layout):
    """Edge after edge through mixed_op, in float32, averages and gradients included."""

    def edge_by_edge(states, weights, parameters, norms, *, nodes, stride, edge_weights, last, image_scales, **options):
        states, inputs, edges = list(states), len(states), iter(zip(edge_weights, weights, parameters, norms))
        for _ in range(nodes):
            total = 0
            for source, state in enumerate(states):
                scale, *edge = next(edges)
                total = total + scale * mixed_op(state, *edge, stride=stride if source < inputs else 1, **options)
            states.append(total)
        return torch.cat(states[inputs:], dim=1)

    problem = draw(cell=cell, mode=mode, shape=(2, 8, 8, 6), partial=partial, edge_weights=True)
    results = []
    for implementation in (kernels, SimpleNamespace(mixed_cell=edge_by_edge)):
        results.append(evaluate(implementation, problem.copy(layout=layout), KINDS))
    for kind, found in results[0].items():
        assert distance(found, results[1][kind]) <= 1e-5, kind
    output = problem.copy(layout=layout).run()
    assert LAYOUTS[layout](output).stride() == output.stride()


def small_cell(shape, training, dtype=torch.float32):
    """Two states, a cell of two nodes on them, and its noise, all from one seed."""
    torch.manual_seed(0)
    channels, primitives = shape[1], ("skip_connect", "max_pool_3x3", "avg_pool_3x3", "sep_conv_3x3", "dil_conv_5x5")
    shapes = reference.parameter_shapes(primitives, channels, 1)
    parameters = [[(0.3 * torch.randn(s)).to(dtype).requires_grad_() for s in shapes] for _ in range(5)]
    count = reference.norm_count(primitives, 1, True)
    norms = [[nn.BatchNorm2d(channels, affine=False).to(dtype).train(training) for _ in range(count)] for _ in range(5)]
    states, noise = [torch.randn(shape).to(dtype) for _ in range(2)], torch.randn(shape[0], 2 * channels, *shape[2:])
    weights = torch.rand(5, len(primitives)).to(dtype).requires_grad_()
    return states, weights, parameters, norms, primitives, noise.to(dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_one_state_alone_may_require_a_gradient(which, training):
    states, weights, parameters, norms, primitives, noise = small_cell((2, 5, 6, 6), training)
    options = {"primitives": primitives, "nodes": 2}

    def gradients(wanted):
        inputs = [state.clone().requires_grad_(index in wanted) for index, state in enumerate(states)]
        out = kernels.mixed_cell(inputs, weights, parameters, norms, **options)
        return torch.autograd.grad(out, [*(inputs[index] for index in wanted), weights, *parameters[0]], noise)

    alone, both = gradients([which]), gradients([0, 1])
    assert torch.equal(alone[0], both[which])
    assert all(torch.equal(a, b) for a, b in zip(alone[1:], both[2:], strict=True))
    none = gradients([])
    assert all(torch.equal(a, b) for a, b in zip(none, both[2:], strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_sums_over_a_large_image_keep_their_digits(training):
    found, exact = (small_cell((1, 3, 90, 70), training, dtype) for dtype in (torch.float32, torch.float64))
    results = []
    for function, cell in ((kernels.mixed_cell, found), (reference.mixed_cell, exact)):
        states, weights, parameters, norms, primitives, noise = cell
        out = function(states, weights, parameters, norms, primitives=primitives, nodes=2)
        last = 4  # the edge into the last node alone: no kink lies between it and the loss
        results.append(torch.autograd.grad(out, [weights, *parameters[last][-2:]], noise))
    for ours, theirs in zip(*results, strict=True):
        assert (ours.double() - theirs).norm() <= 3e-6 * theirs.norm()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitive", ["sep_conv_3x3", "dil_conv_5x5", "conv_3x3"])
def test_weight_gradients_of_a_huge_image_keep_their_digits(primitive, stride):
    """All terms have one sign, so that float32 sums over the whole image would drift."""
    results = []
    for dtype, implementation in ((torch.float64, reference), (torch.float32, kernels)):
        problem = draw(space=((primitive,), True), shape=(1, 1, 640, 600), stride=stride, mode="eval").copy(dtype)
        problem.require(("parameters",))
        with torch.no_grad():
            for tensor in problem.leaves("parameters"):
                tensor.abs_()
        problem.run(implementation).sum().backward()
        results.append([tensor.grad for tensor in problem.leaves("parameters")])
    for found, expected in zip(*reversed(results), strict=True):
        assert distance([found], [expected]) <= 5e-7


def test_gradients_after_hooks_that_lose_the_layout():
    """Saved tensors may come back in another memory format, as from an offload to other memory."""
    states, weights, parameters, norms, primitives, noise = small_cell((2, 5, 6, 6), True)
    states = [state.to(memory_format=torch.channels_last).requires_grad_() for state in states]

    def gradients():
        out = kernels.mixed_cell(states, weights, parameters, norms, primitives=primitives, nodes=2)
        return torch.autograd.grad(out, [*states, weights, *parameters[0]], noise)

    plain = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.contiguous().clone(), lambda tensor: tensor):
        hooked = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, hooked, strict=True))


def test_norms_of_another_length_are_not_read():
    states, weights, parameters, norms, primitives, _ = small_cell((2, 5, 6, 6), False)
    norms[0][0].running_mean = torch.zeros(3)
    with pytest.raises(backend.BackendError, match="one number per feature"):
        kernels.mixed_cell(states, weights, parameters, norms, primitives=primitives, nodes=2)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4, 8, 16, 18, 32])
@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
@pytest.mark.parametrize("space, cell", [("darts", "small reduction"), ("nas-bench-201", "two nodes")])
def test_memory_formats_are_the_same_numbers(space, cell, mode, channels, last):
    height, width = (6, 8) if channels % 4 else (5, 7)  # whole blocks of pixels, and others
    problem = draw(space=space, cell=cell, shape=(3, channels, height, width), mode=mode, last=last)
    found = {}
    for layout in ("contiguous", "channels_last"):
        call = problem.copy(layout=layout).require(KINDS)
        out, leaves = call.run(), [leaf for kind in KINDS for leaf in call.leaves(kind)]
        assert formats.layout(out) == formats.layout(call.states[0])
        gradients = {}
        for name, arrange in LAYOUTS.items():
            gradients[name] = torch.autograd.grad(out, leaves, arrange(noise(out, 1)), retain_graph=True)
        states = gradients["contiguous"][: len(call.states)]
        assert [formats.layout(each) for each in states] == [formats.layout(each) for each in call.states]
        for each in gradients.values():
            assert all(map(torch.equal, each, gradients["channels_last"]))
        found[layout] = [out, *gradients["channels_last"]]
    assert all(map(torch.equal, *found.values()))


@pytest.mark.parametrize("partial", [1, 2])
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@pytest.mark.parametrize("mode", ["train", "train affine", "train, no buffers", "eval", "eval affine", "eval, no buffers"])
def test_biases_in_front_of_norms(mode, backend_name, partial, monkeypatch):
    if backend_name == "reference":
        monkeypatch.setenv("RNAS_BACKEND", backend_name)
    problem = draw(space="nas-bench-201", cell="two nodes", mode=mode, shape=(2, 8, 6, 5), partial=partial)
    generator, results = torch.Generator().manual_seed(1), {}
    drawn = [[torch.randn(8 // partial, generator=generator), None] for _ in problem.norms]
    for dtype in (torch.float64, torch.float32):
        call = problem.copy(dtype).require(KINDS)
        biases = [[None if b is None else b.to(dtype).requires_grad_() for b in row] for row in drawn]
        leaves = [*(leaf for kind in KINDS for leaf in call.leaves(kind)), *(b for row in biases for b in row if b is not None)]
        if dtype == torch.float32:
            out = kernels.mixed_cell(*call.arguments(), **call.options(), biases=biases)
        else:
            norms = [list(map(behind, *pair)) for pair in zip(call.norms, biases)]
            out = reference.mixed_cell(call.states, call.weights, call.parameters, norms, **call.options())
        gradients = torch.autograd.grad(out, leaves, noise(out, 1))
        buffers = [buffer for norm in call.modules() for buffer in norm.buffers()]
        results[dtype] = [out, *gradients, *buffers]
    scale = max(each.abs().max().item() for each in results[torch.float64])
    for found, expected in zip(results[torch.float32], results[torch.float64], strict=True):
        assert torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-6 * scale)


def behind(norm, bias):
    return norm if bias is None else lambda y: norm(y + bias[:, None, None])


@pytest.mark.parametrize(
    ("biases", "error"),
    [([], ValueError), ([[None]] * 5, ValueError), ([[None, 1.0]] * 5, TypeError), ([[None, torch.ones(3)]] * 5, ValueError),
     ([[None, torch.ones(4).double()]] * 5, TypeError)],
)  # fmt: skip
def test_biases_are_checked(biases, error):
    problem = draw(space="nas-bench-201", cell="two nodes", shape=(2, 4, 5, 5))
    with pytest.raises(error, match="biases"):
        kernels.mixed_cell(*problem.arguments(), **problem.options(), biases=biases)
