"""Derived networks and the supernet: published sizes, shapes, and the formulas they stand for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rnas import genotype, operations
from rnas.genotype import Genotype
from rnas.network import DropPath, Network, count_parameters
from rnas.spaces import DARTS, DSARA, get_space
from rnas.supernet import FixedMixture, MixedOperation, Supernet

# million parameters without the auxiliary head, 20 cells, 10 classes, as the papers print them
PUBLISHED_SIZES = {"DARTS_V2": (36, 3.349), "RACL": (36, 3.571), "ADVRUSH": (36, 4.158), "ARNAS": (64, 4.52)}


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_published_genotypes_have_their_published_size(name):
    channels, millions = PUBLISHED_SIZES[name]
    with torch.device("meta"):
        network = Network(genotype.published()[name], channels=channels, layers=20, num_classes=10, auxiliary=True)
    digits = len(str(millions).split(".")[1])
    assert round(count_parameters(network) / 1e6, digits) == millions


@pytest.mark.parametrize("name", sorted(genotype.published()))
@pytest.mark.parametrize(("channels_in", "size"), [(3, 32), (1, 28), (3, 33), (1, 8)])
def test_every_published_network_runs_on_odd_and_even_images(name, channels_in, size):
    network = Network(
        genotype.published()[name], channels=4, layers=4, num_classes=7, mean=(0.5,) * channels_in, std=(0.2,) * channels_in,
        auxiliary=True,
    )  # fmt: skip
    logits, auxiliary = network.forward_with_auxiliary(torch.rand(2, channels_in, size, size))
    assert logits.shape == auxiliary.shape == (2, 7)
    assert network.eval().forward_with_auxiliary(torch.rand(1, channels_in, size, size))[1] is None


def test_layout_places_types_and_widths_as_published():
    darts = get_space("darts").layout(20, 36)
    assert [index for index, cell in enumerate(darts) if cell.reduces] == [6, 13]
    assert [cell.channels for cell in darts] == [36] * 6 + [72] * 7 + [144] * 7
    dsara = get_space("dsara").layout(20, 64)
    assert [cell.channels for cell in dsara] == [64] * 6 + [128] * 14
    assert [cell.cell_type for cell in dsara] == ["accurate"] * 6 + ["reduction"] + ["accurate"] * 6 + ["reduction"] + [
        "robust"
    ] * 6


def test_too_small_a_layout_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="at least 3 cells"):
        DARTS.layout(2, 16)
    with pytest.raises(ValueError, match="unknown search space 'dart'"):
        get_space("dart")
    with pytest.raises(ValueError, match="unknown primitive"):
        operations.build("conv_7x7", 4, 1, affine=False)
    with pytest.raises(ValueError, match="no space has the cell types"):
        Network(Genotype({"normal": ((("skip_connect", 0),),)}, (2,)), channels=4, layers=3, num_classes=10)


def test_edges_are_ordered_by_target_then_source():
    assert DARTS.edges[:5] == ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
    assert len(DARTS.edges) == 14 and len(dataclasses.replace(DARTS, nodes=2).edges) == 5


@pytest.mark.parametrize("primitive", DARTS.primitives)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (1, 1), (33, 17)])
def test_every_primitive_halves_rounding_up(primitive, stride, height, width):
    module = operations.build(primitive, 3, stride, affine=True).eval()
    out = module(torch.rand(2, 3, height, width))
    assert out.shape == (2, 3, -(-height // stride), -(-width // stride))


def test_pools_and_factorized_reduce_are_what_their_names_say():
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    windows = torch.nn.functional.pad(x, (1, 1, 1, 1), value=float("nan")).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    torch.testing.assert_close(operations.build("avg_pool_3x3", 3, 1, False)(x), windows.nanmean(dim=4))
    torch.testing.assert_close(operations.build("max_pool_3x3", 3, 1, False)(x), windows.nan_to_num(-1).amax(dim=4))
    reduce = operations.FactorizedReduce(3, 4, affine=False).double().eval()
    rows = torch.einsum("oc,nchw->nohw", reduce.conv_1.weight[:, :, 0, 0], x[:, :, ::2, ::2])
    shifted = torch.einsum("oc,nchw->nohw", reduce.conv_2.weight[:, :, 0, 0], x[:, :, 1::2, 1::2])
    expected = torch.cat([rows, shifted], dim=1) / (1 + reduce.bn.eps) ** 0.5
    torch.testing.assert_close(reduce(x), expected)


def test_a_mixed_edge_is_the_weighted_sum_of_its_candidates():
    torch.manual_seed(0)
    edge = MixedOperation(DARTS.primitives, 4, 1).double().eval()
    x, weights = torch.rand(2, 4, 6, 6, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    expected = torch.stack([candidate(x) for candidate in edge.candidates]).mul(weights.view(8, 1, 1, 1, 1)).sum(dim=0)
    torch.testing.assert_close(edge(x, weights), expected)


@pytest.mark.parametrize("space", [DARTS, DSARA, dataclasses.replace(DARTS, nodes=1)])
def test_one_hot_supernet_reads_every_mixing_weight(space):
    torch.manual_seed(0)
    supernet = Supernet(space, channels=2, layers=4, num_classes=5)
    shape = (len(space.edges), len(space.primitives))
    mixing = {cell_type: torch.rand(shape, requires_grad=True) for cell_type in space.cell_types}
    logits = supernet(torch.rand(3, 3, 16, 16), mixing)
    assert logits.shape == (3, 5)
    for cell_type, gradient in zip(mixing, torch.autograd.grad(logits.square().sum(), list(mixing.values()))):
        reads = gradient.abs() > 0
        none = [index for index, primitive in enumerate(space.primitives) if primitive == "none"]
        assert not reads[:, none].any() and reads.sum() == shape[0] * (shape[1] - len(none)), cell_type


def test_a_fixed_mixture_gives_the_architecture_no_gradient():
    supernet = Supernet(DARTS, channels=2, layers=3, num_classes=5)
    mixing = {cell_type: torch.rand(14, 8, requires_grad=True) for cell_type in DARTS.cell_types}
    model = FixedMixture(supernet, mixing)
    x = torch.rand(2, 3, 8, 8)
    model(x).sum().backward()
    assert all(weights.grad is None for weights in mixing.values())
    supernet.eval()
    torch.testing.assert_close(model(x), supernet(x, mixing))


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    path = DropPath(0.25)
    out = path(torch.ones(4000, 2, 3, 3))
    per_image = out.flatten(1)
    assert ((per_image == 0).all(dim=1) | (per_image == 1 / 0.75).all(dim=1)).all()
    assert abs(float(out.mean()) - 1) < 0.05
    assert torch.equal(path.eval()(torch.ones(3, 2, 1, 1)), torch.ones(3, 2, 1, 1))


def test_drop_path_leaves_skip_connections_alone():
    network = Network(genotype.published()["DARTS_V2"], channels=4, layers=3, num_classes=10)
    network.set_drop_path(0.3)
    for cell in network.cells:
        for paths in cell.nodes:
            for path in paths:
                assert isinstance(path, torch.nn.Identity) or path[1].probability == 0.3
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        network.set_drop_path(1.0)
