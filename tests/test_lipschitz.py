"""Lipschitz constants of the candidates against dense matrices of the real operators, and against what they bound."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from rnas import operations
from rnas.linear_operators import pool_norm
from rnas.lipschitz import LipschitzConstants
from rnas.spaces import DARTS
from rnas.supernet import Supernet

TWO_NODES = replace(DARTS, nodes=2)
SPATIAL = ((8, 8), (7, 5))
TOLERANCE = 0.01  # of the largest singular value, from below; an iteration cannot pass it but by rounding
FREE = DARTS.primitives.index("none"), DARTS.primitives.index("skip_connect")


def supernet(image_size: tuple[int, int] = (8, 8), **options) -> Supernet:
    """A float64 network with BN averages of its own and statistics far from 1."""
    torch.manual_seed(int(torch.randint(2**31, ()).item()))
    net = Supernet(TWO_NODES, **({"channels": 4, "layers": 3, "num_classes": 4} | options)).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.2, 3)
            module.running_mean.normal_()
    return net


def dense(function, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix of a linear function on (1, C, H, W), column by column."""
    size = torch.Size(shape).numel()
    return function(torch.eye(size, dtype=torch.float64).view(size, *shape)).flatten(1).T


def layers(candidate: nn.Module) -> list[tuple]:
    """(convolutions as one function, BN scale (C,)) of each layer of a candidate, written out anew."""
    found, current = [], []
    if isinstance(candidate, operations.FactorizedReduce):

        def both(x):
            shifted = nn.functional.pad(x[:, :, 1:, 1:], (0, x.shape[3] % 2, 0, x.shape[2] % 2))
            return torch.cat([candidate.conv_1(x), candidate.conv_2(shifted)], dim=1)

        return [(both, (candidate.bn.running_var + candidate.bn.eps) ** -0.5)]
    for module in candidate:
        if isinstance(module, nn.Conv2d):
            current.append(module)
        elif isinstance(module, nn.BatchNorm2d):
            found.append((nn.Sequential(*current), (module.running_var + module.eps) ** -0.5))
            current = []
    return found


@torch.no_grad()
def exact(candidate: nn.Module, shape: tuple[int, ...], norm_scale: str) -> float:
    """The constant of a candidate that has convolutions, by singular value decomposition."""
    result = 1.0
    for function, scale in layers(candidate):
        matrix = dense(function, shape)
        shape = tuple(function(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
        per_row = scale.repeat_interleave(shape[1] * shape[2])
        if norm_scale == "folded":
            matrix = per_row[:, None] * matrix
        largest = float(scale.max()) if norm_scale == "largest" else 1.0
        result *= largest * float(torch.linalg.matrix_norm(matrix, ord=2))
    return result


def candidates(net: Supernet, image_size: tuple[int, int]):
    """(place in (L, E, K), primitive, module, shape of its input) of every candidate with convolutions or a pool."""
    size = image_size
    for index, cell in enumerate(net.cells):
        after = tuple((n + cell.stride - 1) // cell.stride for n in size)
        for edge, ((source, _), mixed) in enumerate(zip(net.space.edges, cell.mixed)):
            for k, (name, module) in enumerate(zip(mixed.primitives, mixed.candidates)):
                channels = mixed.candidates[1][1].num_features
                yield (index, edge, k), name, module, (channels, *(size if source < 2 else after))
        size = after


@pytest.mark.parametrize(
    ("image_size", "norm_scale"), [(SPATIAL[0], "largest"), (SPATIAL[1], "folded"), (SPATIAL[1], "none")]
)
def test_constants_are_the_singular_values_of_the_real_operators(image_size, norm_scale):
    """Every convolution of a network: strides 1 and 2, dilation, FactorizedReduce, odd sizes."""
    net = supernet()
    found = LipschitzConstants(norm_scale=norm_scale)(net, image_size, 400)
    ratios, seen = [], set()
    for place, name, module, shape in candidates(net, image_size):
        if isinstance(module, operations.FactorizedReduce) or "conv" in name:
            ratios.append(float(found[place]) / exact(module, shape, norm_scale))
            seen.add((name, shape[1:]))
    assert len(ratios) > 60 and len({size for _, size in seen}) == 3
    assert 1 - TOLERANCE < min(ratios) and max(ratios) < 1 + 1e-9


def test_free_operations_and_channels_that_a_reduction_splits_unequally():
    net = supernet(channels=5)
    found = LipschitzConstants()(net, (7, 5), 200)
    assert found.shape == (3, 5, 8)
    assert not found[:, :, FREE[0]].any()
    for place, name, module, shape in candidates(net, (7, 5)):
        if name == "skip_connect":
            reduces = isinstance(module, operations.FactorizedReduce)
            expected = exact(module, shape, "largest") if reduces else 1.0
            assert float(found[place]) == pytest.approx(expected, rel=TOLERANCE)


def test_one_line_of_pixels_has_no_odd_half():
    net = supernet()
    found = LipschitzConstants()(net, (1, 6), 200)
    for place, _, module, _ in candidates(net, (1, 6)):
        if isinstance(module, operations.FactorizedReduce):
            weight = module.conv_1.weight.detach().flatten(1)
            norm = float(torch.linalg.matrix_norm(weight, ord=2))
            scale = float((module.bn.running_var[: len(weight)] + module.bn.eps).rsqrt().max())
            assert float(found[place]) == pytest.approx(norm * scale, rel=TOLERANCE)


def test_a_batch_of_operators_equals_one_by_one():
    net, image_size = supernet(), (7, 5)
    lipschitz = LipschitzConstants()
    lipschitz(net, image_size, 3)
    groups = [group for group in lipschitz._groups(net, image_size) if group.steps]
    assert max(len(group.places) for group in groups) > 5
    for group in groups:
        weights = group.weights()
        x = torch.randn(group.input_shape, dtype=torch.float64)
        with torch.no_grad():
            together = group.apply(x, weights)
            y = torch.randn_like(together)
            back = group.apply_transposed(y, weights)
        for index, steps in enumerate(group.steps):
            if len(steps[0]) == 1:
                alone = nn.Sequential(*(step[0] for step in steps))
                image = x[index : index + 1].requires_grad_()
                torch.testing.assert_close(alone(image)[0], together[index])
                (expected,) = torch.autograd.grad(alone(image), image, y[index : index + 1])
                torch.testing.assert_close(back[index], expected[0])


def test_the_vectors_persist_over_calls_and_checkpoints():
    net, image_size = supernet(), (8, 8)
    reference = LipschitzConstants()(net, image_size, 300)
    steps, resumed = LipschitzConstants(), None
    errors = []
    for step in range(60):
        found = steps(net, image_size)
        errors.append(float((1 - found / reference)[..., 4:].abs().mean()))
        if step == 29:
            resumed = LipschitzConstants()
            resumed.load_state_dict(steps.state_dict())
            assert torch.equal(resumed.values, found)
    assert errors[-1] < 0.02 < 0.1 < errors[0]
    torch.testing.assert_close(found, LipschitzConstants()(net, image_size, 60))
    for _ in range(30):
        again = resumed(net, image_size)
    assert torch.equal(again, found)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    moved = LipschitzConstants()(net, image_size, 300)
    fresh = float((LipschitzConstants()(net, image_size, 2) - moved).abs().max())
    assert float((steps(net, image_size, 2) - moved).abs().max()) < 0.3 * fresh


def test_it_leaves_no_trace_in_the_network():
    net = supernet().train()
    before = copy.deepcopy(net.state_dict())
    lipschitz = LipschitzConstants()
    first = lipschitz(net, (8, 8))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and net.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert not first.requires_grad and not list(lipschitz.parameters()) and not list(lipschitz.children())
    assert torch.equal(first, LipschitzConstants()(net, (8, 8)))
    assert not torch.equal(first, LipschitzConstants(seed=1)(net, (8, 8)))


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_norm_of_average_pooling_is_that_of_its_matrix(size, stride):
    pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    expected = torch.linalg.matrix_norm(dense(pool, (1, *size)), ord=2)
    assert pool_norm(pool, size) == pytest.approx(float(expected), rel=1e-12)
    if stride == 1 and min(size) > 1:
        assert 1.005 < pool_norm(pool, size) < 1.03
    with pytest.raises(ValueError, match="count_include_pad=False"):
        pool_norm(nn.AvgPool2d(3, padding=1), size)


@pytest.mark.parametrize(("stride", "size", "expected"), [(1, (8, 8), 3), (2, (8, 8), 2), (1, (1, 5), 3**0.5)])
def test_max_pooling_stretches_by_the_root_of_the_windows_that_share_a_pixel(stride, size, expected):
    pool = nn.MaxPool2d(3, stride, padding=1)
    assert pool_norm(pool, size) == pytest.approx(expected)
    peaks = torch.eye(size[0] * size[1]).view(-1, 1, *size)
    assert float(pool(peaks).flatten(1).norm(dim=1).max()) == pytest.approx(expected)
    x, y = (torch.randn(500, 1, *size) for _ in range(2))
    assert ((pool(x) - pool(y)).flatten(1).norm(dim=1) <= expected * (x - y).flatten(1).norm(dim=1)).all()


def test_the_constants_bound_what_the_candidates_do_in_eval_mode():
    """Plain ones for pools do not: a bright pixel and a batch norm of small variance break them."""
    net = supernet().eval()
    found = {pools: LipschitzConstants(pools=pools)(net, (8, 8), 200) for pools in ("exact", "one")}
    broken, tightest = 0, 0.0
    for place, name, module, shape in candidates(net, (8, 8)):
        x = torch.randn(64, *shape, dtype=torch.float64)
        difference = torch.zeros_like(x)
        difference[torch.arange(64), :, torch.randint(shape[1], (64,)), torch.randint(shape[2], (64,))] = 5.0
        difference[32:] = 1e-3 * torch.randn_like(x[32:])
        if "pool" in name:
            x[:32] = 0
        with torch.no_grad():
            stretch = (module(x + difference) - module(x)).flatten(1).norm(dim=1) / difference.flatten(1).norm(dim=1)
        assert float(stretch.max()) <= float(found["exact"][place]) * 1.01, name
        broken += int("pool" in name and float(stretch.max()) > float(found["one"][place]))
        if name == "max_pool_3x3":
            tightest = max(tightest, float(stretch.max() / found["exact"][place]))
    assert broken > 5 and tightest > 0.5
    assert (found["one"][:, :, [1, 2]] == 1).all()


def test_learned_scales_of_batch_norms_count():
    net = supernet()
    before = LipschitzConstants()(net, (8, 8), 2)
    for mixed in (edge for cell in net.cells for edge in cell.mixed):
        for norm in mixed.norms:
            norm.affine, norm.weight = True, nn.Parameter(torch.full((norm.num_features,), -2.0, dtype=torch.float64))
    after = LipschitzConstants()(net, (8, 8), 2)
    separable, dilated = DARTS.primitives.index("sep_conv_3x3"), DARTS.primitives.index("dil_conv_3x3")
    torch.testing.assert_close(after[..., separable], 4 * before[..., separable])
    torch.testing.assert_close(after[..., dilated], 2 * before[..., dilated])
    torch.testing.assert_close(after[..., [1, 2]], 2 * before[..., [1, 2]])


def test_partial_channels_are_those_of_the_candidates():
    net = supernet(partial=2)
    found = LipschitzConstants()(net, (8, 8), 200)
    for place, name, module, shape in candidates(net, (8, 8)):
        if name == "dil_conv_5x5":
            assert shape[0] in (2, 4, 8)
            assert float(found[place]) == pytest.approx(exact(module, shape, "largest"), rel=TOLERANCE)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="norm_scale must be 'largest' or 'folded' or 'none'; got 'max'"):
        LipschitzConstants(norm_scale="max")
    with pytest.raises(ValueError, match="pools must be 'exact' or 'one'; got 1"):
        LipschitzConstants(pools=1)
    with pytest.raises(ValueError, match="iterations must be at least 1; got 0"):
        LipschitzConstants()(supernet(), (8, 8), 0)
    net = supernet()
    net.cells[0].mixed[0].candidates[4] = nn.Tanh()
    with pytest.raises(ValueError, match="no Lipschitz constant for the operation 'sep_conv_3x3', a Tanh"):
        LipschitzConstants()(net, (8, 8))
