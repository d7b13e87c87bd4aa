"""rnas.accelerate: what may be written to between forward and backward, as where nothing is accelerated."""

from __future__ import annotations

import copy

import pytest
import torch
from supernets import smooth
from supernets.darts_candidates import Halve, ReLUConvBN
from test_accelerate_changes import assert_same, images, values_and_gradients
from torch import Tensor, nn

import rnas
from rnas.fusion import invoke
from rnas.fusion import partial as around

CHANNELS = 8
EDGES = [[("sep3", "none"), ("dil5",)], [("sep5",), ("sep3", "dil3"), ("dil3",)]]
"""The candidates of each edge into each node. None of them holds what it is called on."""
POOLED = [[("sep3", "max"), ("dil5",)], [("sep5",), ("sep3", "avg"), ("dil3",)]]
"""Some hold a state."""
LAYOUTS = [torch.contiguous_format, torch.channels_last]
LAYERS = {
    "none": nn.Identity,
    "relu_conv_norm": lambda: ReLUConvBN(CHANNELS, CHANNELS),
    "factorized_reduce": lambda: Halve(CHANNELS, CHANNELS),
}
MODES = ["training", "eval", "eval, frozen"]


def edges_alone(states: list[Tensor], nodes) -> Tensor:
    return torch.cat([edge(x).tanh() for node in nodes for edge, x in zip(node, states)], 1)


def whole_cell(states: list[Tensor], nodes) -> Tensor:
    for node in nodes:
        states = [*states, sum(edge(x) for edge, x in zip(node, states))]
    return torch.cat(states[2:], 1)


def last_node(states: list[Tensor], nodes) -> Tensor:
    for node in nodes:
        states = [*states, sum(edge(x) for edge, x in zip(node, states))]
    return states[-1].contiguous()


def residual(states: list[Tensor], nodes) -> Tensor:
    """States that edges are added to in place."""
    first, second = states[0] * 1, states[1] * 1
    for node in nodes:
        first += node[0](first)
        second += node[1](first)
        first -= node[1](second) * 0.5
    return first + second


def partial(states: list[Tensor], nodes) -> Tensor:
    """Of twice the channels: half of them go around the edges, which have weights."""
    total = 0
    for weight, edge, x in zip(OF_EDGES, nodes[0], states):
        mixed = torch.cat([edge(x[:, :CHANNELS]), x[:, CHANNELS:]], 1)
        total = total + weight * torch.channel_shuffle(mixed, 2)
    return total.sin() * 2


OF_EDGES = torch.tensor([0.3, 0.7]).requires_grad_()


class Net(nn.Module):
    """Two layers and what `compute` makes of theirs; all that goes in and comes out is written to in the end."""

    def __init__(self, compute=whole_cell, layer: str = "none", edges=EDGES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.compute = compute
        self.layers = nn.ModuleList([LAYERS[layer](), LAYERS[layer]()])
        made = [[smooth.Edge(names, CHANNELS, 1, True) for names in node] for node in edges]
        self.nodes = nn.ModuleList(map(nn.ModuleList, made))
        self.weights = nn.Parameter(torch.tensor([0.5, 1.5]))

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        given = [first * 1, second * 1]
        states = [layer(x) for layer, x in zip(self.layers, given)]
        nodes = [[lambda x, edge=edge: edge(x, self.weights) for edge in node] for node in self.nodes]
        result = self.compute(states, nodes)
        used = result * 2
        written = list({id(each): each for each in (*given, *states, result)}.values())
        for each in written:
            each.mul_(0.5)
        return [used, *written]

    def in_mode(self, mode: str) -> Net:
        """Itself."""
        return self.train(mode == "training").requires_grad_(mode != "eval, frozen")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("compute", [edges_alone, whole_cell, last_node, residual])
def test_what_no_module_holds_may_be_written_to(compute, layer, layout, mode):
    plain = Net(compute, layer).in_mode(mode)
    net = copy.deepcopy(plain)
    report = rnas.accelerate(net)
    states = [images(CHANNELS, n=4, size=8, seed=seed).contiguous(memory_format=layout) for seed in (0, 1)]
    assert_same(net, plain, *states)
    assert report.counts.edges and not report.counts.alone
    assert len(report.in_front) == (0 if layer == "none" else 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", [False, True])
def test_what_goes_around_partial_channels_may_be_written_to(pool, layout, mode):
    """But for what a pool on another slice of it holds."""

    def compute(states, nodes):
        return partial([states[0], states[1] + 0] if pool else states, nodes)

    plain = Net(compute, edges=[[("sep3", "dil3"), ("dil5", "max" if pool else "sep5")]]).in_mode(mode)
    net = copy.deepcopy(plain)
    report = rnas.accelerate(net)
    states = [images(2 * CHANNELS, n=4, size=8, seed=seed).contiguous(memory_format=layout) for seed in (0, 1)]
    assert_same(net, plain, *states)
    assert (report.counts.edges, report.counts.alone) == (2, 0)


@pytest.mark.parametrize(("second", "copies"), [("max", 0), ("sep5", 1)])
def test_what_goes_around_beside_a_pool_is_not_copied(second, copies, monkeypatch):
    """A pool holds a slice of the same tensor: to write to that is an error in plain modules, too."""
    net = Net(partial, edges=[[("sep3", "avg"), ("dil5", second)]])
    rnas.accelerate(net)
    found, copy_of = [], around.copy_of
    monkeypatch.setattr(around, "copy_of", lambda x: found.append(x) or copy_of(x))
    net(*[images(2 * CHANNELS, n=4, size=8, seed=seed).requires_grad_() for seed in (0, 1)])
    assert len(found) == copies


class Freely(nn.Module):
    """`function` of two edges, their weights and an image."""

    def __init__(self, function, *names: tuple[str, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.edges = nn.ModuleList(smooth.Edge(each, CHANNELS, 1, True) for each in names)
        self.weights = nn.Parameter(torch.tensor([0.5, 1.5]))

    def forward(self, x: Tensor):
        return self.function(x * 1, self.weights, *self.edges)


def requires_no_gradient_any_more(x, w, first, second):
    a = first(x, w).tanh()
    x.detach_()
    return a, second(x, w).tanh()


def requires_a_gradient_now(x, w, first, second):
    given = x.detach()
    a = first(given, w).tanh()
    given.requires_grad_()
    b = second(given, w).tanh()
    return a.detach(), b.detach(), *torch.autograd.grad(b.sum(), given)


def written_unseen(x, w, first, second):
    a = first(x, w).tanh()
    x.data.mul_(2)
    return a.detach(), second(x, w).tanh()


def a_state_is_added(x, w, first, second):
    y = ((first(x, w) + x) * w[0]).tanh()
    x.mul_(2)
    return y, x


def pools_on_a_constant(x, w, first, second):
    given = x.detach()
    y = first(given, w).tanh() + second(given, w).tanh()
    given.mul_(2)
    return y, given


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "function",
    [requires_no_gradient_any_more, requires_a_gradient_now, written_unseen, a_state_is_added, pools_on_a_constant],
)
def test_a_state_that_changes_between_two_edges(function, layout):
    pool = "max" if function is pools_on_a_constant else "dil3"
    plain = Freely(function, ("sep3", "dil3"), ("dil5", pool))
    module = copy.deepcopy(plain)
    report = rnas.accelerate(module)
    assert_same(module, plain, images(CHANNELS, n=4, size=8).contiguous(memory_format=layout))
    assert report.counts.edges and not report.counts.alone


def test_a_state_of_dropped_edges_of_which_no_candidate_with_a_norm_is_called():
    def function(x, w, first, second):
        mask = torch.tensor([1.0, 0.0, 2.0, 1.0]).view(4, 1, 1, 1)
        y = (first(x, [0.5, 2.0]) * mask + second(x, [0.3, 2.0])).tanh()
        x.mul_(2)
        return y, x

    for training in (True, False):
        plain = Freely(function, ("skip", "none", "sep3"), ("skip", "none", "dil3")).train(training)
        module = copy.deepcopy(plain)
        report = rnas.accelerate(module)
        assert_same(module, plain, images(CHANNELS, n=4, size=8).to(memory_format=torch.channels_last))
        assert (report.counts.edges, report.counts.alone) == (2, 0)


@pytest.mark.parametrize(("layer", "size"), [(lambda: Halve(CHANNELS, CHANNELS), 2), (lambda: ReLUConvBN(CHANNELS, 1), 8)])
def test_what_layers_return_in_both_memory_formats(layer, size):
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers, self.edge = nn.ModuleList([layer(), layer()]), smooth.Edge(("sep3", "skip"), CHANNELS, 1, True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layers[0](x)
            z = y.tanh()
            y.mul_(2)
            return y, z, self.edge(self.layers[1](x).repeat(1, CHANNELS // y.shape[1], 1, 1), torch.ones(2))

    plain = Layers()
    module = copy.deepcopy(plain)
    report = rnas.accelerate(module)
    assert_same(module, plain, images(CHANNELS, n=8, size=size))
    assert report.in_front


def test_averages_of_a_candidate_whose_first_result_nobody_uses():
    def function(x, w, first, second):
        first(x, w)
        a = first(x, w).tanh()
        return a, first(x * 2, w).tanh(), second(a, w)

    plain = Freely(function, ("sep3", "dil3"), ("dil5", "skip"))
    module = copy.deepcopy(plain)
    rnas.accelerate(module)
    assert_same(module, plain, images(CHANNELS, n=4, size=8))


def test_images_of_one_pixel_may_be_written_to():
    """They lie in both memory formats."""
    plain = Net(edges=[[("sep3",), ("dil5",)]])
    net = copy.deepcopy(plain)
    rnas.accelerate(net)
    assert_same(net, plain, images(CHANNELS, n=8, size=1), images(CHANNELS, n=8, size=1, seed=1))


def test_what_kernels_of_a_gpu_hold_may_be_written_to(cuda_device):
    for layout in LAYOUTS:
        plain = Net().to(cuda_device)
        net = copy.deepcopy(plain)
        report = rnas.accelerate(net)
        states = [images(CHANNELS, n=4, seed=seed).contiguous(memory_format=layout) for seed in (0, 1)]
        assert_same(net, plain, *[each.to(cuda_device) for each in states])
        assert report.counts.cells == 1


@pytest.mark.parametrize(
    ("copies", "compute", "edges", "mode", "layout"),
    [
        (2, whole_cell, EDGES, "training", torch.channels_last),
        (4, edges_alone, EDGES, "training", torch.channels_last),
        (2, whole_cell, EDGES, "eval", torch.channels_last),
        (0, whole_cell, EDGES, "eval, frozen", torch.channels_last),  # only masks are kept
        (0, whole_cell, EDGES, "training", torch.contiguous_format),  # rearranged anyway
        (0, whole_cell, POOLED, "training", torch.channels_last),  # held by the modules, too
        (1, whole_cell, [[("max", "none"), ("sep3", "dil5")]], "training", torch.channels_last),
    ],
)
def test_only_what_has_to_be_is_copied(copies, compute, edges, mode, layout, monkeypatch):
    net = Net(compute, edges=edges).in_mode(mode)
    rnas.accelerate(net)
    found, copy_of = [], invoke.copy_of
    monkeypatch.setattr(invoke, "copy_of", lambda x: found.append(x) or copy_of(x))
    states = [images(CHANNELS, n=4, size=8, seed=seed).contiguous(memory_format=layout) for seed in (0, 1)]
    net(*[each.requires_grad_() for each in states])
    assert len(found) == copies
    with torch.no_grad():
        net(*states)
    assert len(found) == copies


def test_what_pools_hold_may_not_be_written_to():
    """As in plain modules: where nothing is copied, autograd notices."""
    net = Net(edges=POOLED)
    states = [images(CHANNELS, n=4, size=8, seed=seed).to(memory_format=torch.channels_last) for seed in (0, 1)]
    for accelerated in (False, True):
        if accelerated:
            rnas.accelerate(net)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            values_and_gradients(net, *states)
