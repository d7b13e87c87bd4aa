"""conv_norm against its float64 definition, and as a citizen of PyTorch."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from op_checks import LAYOUTS, MODES, Call, compare, distance, draw_input, draw_norm, evaluate, noise
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from rnas import kernels
from rnas.kernels import pixels
from rnas.kernels.reference import relu_conv_norm as reference

KINDS = ("inputs", "parameters", "affine")
KERNELS = [  # (h, w), stride, padding
    ((3, 3), 1, 1),
    ((3, 3), 2, 1),
    ((1, 1), 1, 0),
    ((5, 5), 1, 2),
    ((5, 3), 2, 0),
    ((3, 3), 3, 2),
    ((2, 4), 1, 3),
]

pytestmark = pytest.mark.usefixtures("compiled", "poisoned_allocations")


@dataclass
class Stem(Call):
    """The arguments of one call."""

    KINDS = KINDS
    x: Tensor
    weight: Tensor
    norm: nn.BatchNorm2d
    stride: int
    padding: int

    def copy(self, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Stem:
        x = LAYOUTS[layout](self.x.detach().to(dtype, copy=True))
        weight = self.weight.detach().to(dtype, copy=True)
        return Stem(x, weight, copy.deepcopy(self.norm).to(dtype), self.stride, self.padding)

    def run(self, implementation=kernels) -> Tensor:
        return implementation.conv_norm(self.x, self.weight, self.norm, stride=self.stride, padding=self.padding)

    def modules(self) -> list[nn.BatchNorm2d]:
        return [self.norm]

    def leaves(self, kind: str) -> list[Tensor]:
        found = {"inputs": [self.x], "parameters": [self.weight], "affine": [self.norm.weight, self.norm.bias]}[kind]
        return [leaf for leaf in found if leaf is not None]


def draw(seed: int = 0, shape=(3, 2, 8, 7), outputs: int = 5, mode: str = "train affine", kernel=KERNELS[0]) -> Stem:
    """A random problem. shape: (N, C, H, W) of x; mode: a name of `MODES`; kernel: one of `KERNELS`."""
    generator = torch.Generator().manual_seed(seed)
    size, stride, padding = kernel
    weight = torch.randn((outputs, shape[1], *size), generator=generator) / (shape[1] * size[0] * size[1]) ** 0.5
    return Stem(draw_input(shape, generator), weight, draw_norm(outputs, mode, generator), stride, padding)


def check(wanted=KINDS, **how) -> None:
    """Compares the op with the float64 reference on a random problem, see `compare` and `draw` for `how`."""
    compare(draw, reference, kernels, wanted=wanted, **how)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modes_and_layouts(layout, mode):
    check(mode=mode, layout=layout)


@pytest.mark.parametrize("mode", ["train affine", "eval"])
@pytest.mark.parametrize("channels", [1, 3, 17])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_kernels(kernel, channels, mode):
    check(kernel=kernel, shape=(3, channels, 7, 9), outputs=16, mode=mode)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1), (2, 2), (33, 17)])
@pytest.mark.parametrize("kernel", [KERNELS[0], KERNELS[1], KERNELS[5]], ids=str)
def test_sizes(kernel, size):
    check(kernel=kernel, shape=(5, 3, *size), outputs=48)
    check(kernel=kernel, shape=(1, 3, *size), mode="eval affine")


@pytest.mark.parametrize("mode", ["train affine", "eval affine"])
def test_every_simd_level(level, mode):
    check(shape=(2, 3, 9, 9), outputs=20, mode=mode)
    check(shape=(2, 3, 9, 9), outputs=20, mode=mode, wanted=("inputs",))


@pytest.mark.parametrize("mode", ["train affine", "eval affine", "eval"])
@pytest.mark.parametrize("wanted", [(), *((kind,) for kind in KINDS), KINDS[:2], KINDS[1:]], ids="+".join)
def test_only_the_gradients_asked_for(wanted, mode):
    check(mode=mode, wanted=wanted)


@pytest.mark.parametrize("mode", ["train affine", "eval", "eval affine"])
@pytest.mark.parametrize("first", [*((kind,) for kind in KINDS), KINDS], ids="+".join)
def test_second_derivatives(first, mode):
    first = tuple(kind for kind in first if kind != "affine" or "affine" in mode) or KINDS[:1]
    check(mode=mode, first=first, kernel=KERNELS[1])


def test_the_gradient_to_the_images_alone_keeps_nothing_of_them():
    stem = draw(mode="eval", shape=(2, 3, 16, 16)).require(("inputs",))
    out = stem.run()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = stem.run()
    assert sum(t.untyped_storage().nbytes() for t in kept) < out.nbytes / 4
    images = [t for t in kept if t.dim() == 4 and t.untyped_storage().nbytes() >= stem.x.nbytes]
    assert not images


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_patches_are_those_of_unfold(padding, stride):
    x = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    height, width = (6 + 2 * padding - 3) // stride + 1, (5 + 2 * padding - 2) // stride + 1
    shape = pixels.PatchShape(3, 2, stride, padding, height, width)
    found, gradients = [], []
    for dtype in (torch.float32, torch.float64):  # float64 goes through plain PyTorch
        leaf = x.to(dtype).requires_grad_()
        out = pixels.patches(leaf, shape)
        gradient = torch.autograd.grad(out, leaf, noise(out, 1).requires_grad_(), create_graph=True)[0]
        found.append(out.detach())
        gradients.append(gradient)
    unfolded = nn.functional.unfold(x, (3, 2), padding=padding, stride=stride).view(found[0].shape)
    assert torch.equal(found[0], unfolded) and torch.equal(found[1].float(), unfolded)
    assert distance([gradients[0].detach()], [gradients[1].detach()]) < 1e-6


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", ["train affine", "eval"])
def test_same_bits_every_time(mode, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        stem = draw(mode=mode, shape=(8, 3, 32, 32), outputs=48)
        first, again = (evaluate(kernels, stem.copy(), wanted=KINDS) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for kind in first for a, b in zip(first[kind], again[kind]))


@pytest.mark.parametrize("mode", ["train affine", "eval"])
def test_compiles_whole(mode):
    stem = draw(mode=mode)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stem.run, backend=counter, fullgraph=True)
    exact = copy.deepcopy(stem).run()
    assert distance([compiled()], [exact]) < 1e-6
    assert counter.frame_count == 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layout_of_the_output(layout):
    out = draw().copy(layout=layout).run()
    assert out.is_contiguous(memory_format=getattr(torch, layout, torch.contiguous_format))


def test_float64_and_empty_batches_go_to_plain_pytorch(monkeypatch):
    monkeypatch.setenv("RNAS_BACKEND", "auto")
    assert draw().copy(torch.float64).run().dtype == torch.float64
    assert draw(shape=(0, 2, 8, 7), mode="eval").run().shape == (0, 5, 8, 7)


REFUSED = [
    ({"x": "nothing"}, TypeError, "x must be a tensor"),
    ({"x": torch.zeros(2, 3, 4)}, ValueError, r"x must have shape \(N, C, H, W\)"),
    ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, TypeError, r"\.float\(\)"),
    ({"weight": torch.zeros(5, 4, 3, 3)}, ValueError, r"weight must have shape \(K, 3, h, w\), got \(5, 4, 3, 3\)"),
    ({"weight": torch.zeros(5, 3, 3, 3).double()}, TypeError, "dtype of x"),
    ({"norm": nn.BatchNorm2d(4)}, ValueError, "5"),
    ({"stride": 0}, ValueError, "stride must be an integer of at least 1, got 0"),
    ({"padding": -1}, ValueError, "padding must be an integer of at least 0, got -1"),
    ({"padding": True}, ValueError, "padding must be an integer"),
    ({"weight": torch.zeros(5, 3, 7, 3)}, ValueError, r"kernel of \(7, 3\) does not fit into images of 4 x 4"),
    ({"x": torch.zeros(1, 3, 3, 3), "padding": 0}, ValueError, "more than 1 value per channel"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_refuses_bad_arguments(changes, error, message):
    arguments = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(5, 3, 3, 3), "norm": nn.BatchNorm2d(5)}
    x, weight, norm, *_ = (arguments | changes).values()
    options = {"stride": 1, "padding": 1} | {name: changes[name] for name in ("stride", "padding") if name in changes}
    with pytest.raises(error, match=message):
        kernels.conv_norm(x, weight, norm, **options)
