"""rnas.accelerate: numbers for each image, by which code multiplies what comes out of edges, as drop path does."""

from __future__ import annotations

import pytest
import torch
from test_accelerate_changes import WEIGHTS, Mixed, assert_same, both, images, mixed, separable
from torch import Tensor, nn

import rnas
from rnas.kernels.reference import mixed_op as reference


def mask(x: Tensor, kept: float = 0.6) -> Tensor:
    """(N, 1, 1, 1) of zeros and ones, without a look at the values of x."""
    return x.new_empty(x.size(0), 1, 1, 1).bernoulli_(kept)


def in_place(out):
    out.div_(0.6)
    out.mul_(mask(out))
    return out


def in_place_by_operators(out):
    out /= 0.6
    out *= mask(out)
    return out


def of_the_module(out):  # as timm and AutoDL-Projects write it
    out = torch.div(out, 0.6)
    out.mul_(torch.bernoulli(out.new_full((out.shape[0], 1, 1, 1), 0.6)))
    return out


def out_of_place(out):
    return out / 0.6 * mask(out)


def from_the_left(out):
    return mask(out) * out.div(0.6)


def floored(out):
    return out.div(0.6) * (0.6 + torch.rand((out.shape[0],) + (1,) * (out.ndim - 1), dtype=out.dtype)).floor_()


def twice(out):
    return out * mask(out) * 2.0 * mask(out)


def by_a_size_and_a_mask(out):  # one number for all, of four dimensions
    return out * torch.full((1, 1, 1, 1), 0.5) * mask(out)


WAYS = [
    in_place,
    in_place_by_operators,
    of_the_module,
    out_of_place,
    from_the_left,
    floored,
    twice,
    by_a_size_and_a_mask,
]


class Cell(nn.Module):
    """Two nodes of mixed edges, each of which goes through `way`."""

    def __init__(self, way, edge=mixed) -> None:
        super().__init__()
        self.way, self.edges = way, nn.ModuleList([edge(), edge(), edge()])

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        first = self.way(self.edges[0](x, weights))
        second = self.way(self.edges[1](x, weights)) + self.way(self.edges[2](first, weights))
        return torch.cat([first, second], dim=1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_cell_whose_edges_are_dropped(way, training):
    module, plain, report = both(lambda: Cell(way))
    assert_same(module.train(training), plain.train(training), images(), WEIGHTS)
    # On fixed statistics the kernels take no numbers for each image: edges.
    assert (report.counts.cells, report.counts.edges) == (int(training), 3)
    assert report.counts.alone == report.counts.given_back == 0


def test_on_fixed_statistics_edges_are_fused_by_themselves(monkeypatch):
    module, plain, report = both(lambda: Cell(out_of_place))
    monkeypatch.setattr(reference, "mixed_cell", lambda *_, **__: pytest.fail("plain PyTorch was called"))
    assert_same(module.eval(), plain.eval(), images(), WEIGHTS)
    assert (report.counts.cells, report.counts.edges, report.counts.alone) == (0, 3, 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", [in_place, out_of_place])
def test_on_the_kernels_of_a_gpu(way, training, cuda_device):
    module, plain, report = both(lambda: Cell(way).to(cuda_device))
    given = images().to(cuda_device), WEIGHTS.to(cuda_device)
    assert_same(module.train(training), plain.train(training), *given)
    assert (report.counts.cells, report.counts.edges) == (1, 3)


def test_one_edge_is_dropped_and_another_is_not():
    class Some(Cell):
        def forward(self, x, weights):
            first = self.edges[0](x, weights)
            second = self.way(self.edges[1](x, weights)) + self.edges[2](first, weights) * 0.5
            return torch.cat([first, second], dim=1)

    module, plain, report = both(lambda: Some(out_of_place))
    assert_same(module, plain, images(), WEIGHTS)
    assert report.counts.cells == 1


@pytest.mark.parametrize("before", [0.0, 1.0])
def test_a_number_beside_a_dropped_edge(before):
    class Added(Cell):
        def forward(self, x, weights):
            first = self.edges[0](x, weights)
            first = self.way(first + weights[0] if before else first)
            second = self.way(self.edges[1](x, weights)) + self.edges[2](first, weights) + weights[1]
            return torch.cat([first, second], dim=1)

    module, plain, report = both(lambda: Added(out_of_place))
    assert_same(module, plain, images(), WEIGHTS)
    assert (report.counts.cells, report.counts.edges) == (0, 3)


class Candidates(nn.Module):
    """An edge whose candidates go through `way` one by one."""

    def __init__(self, way, *ops: nn.Module) -> None:
        super().__init__()
        self.way, self.ops = way, nn.ModuleList(ops)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * self.way(op(x)) for w, op in zip(weights, self.ops))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", [in_place, out_of_place])
def test_candidates_that_are_dropped_one_by_one(way, training):
    ops = [separable(), separable(size=5), nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(8, affine=False))]
    module, plain, report = both(lambda: Candidates(way, *ops))
    assert_same(module.train(training), plain.train(training), images(), WEIGHTS)
    assert report.counts.given_back == 0


def test_a_state_that_is_dropped_in_place_is_dropped_for_all():
    def on_the_identity(x, ops, weights):
        x = x * 1.0
        a = ops[1](x)
        b = in_place(ops[0](x))  # the identity: x itself
        return weights[0] * a + weights[1] * b + weights[2] * x

    class Around(Mixed):
        def forward(self, x, weights):
            return on_the_identity(x, self.ops, weights)

    outcomes = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        module = Around(nn.Identity(), separable())
        if accelerated:
            rnas.accelerate(module)
        leaf = images().requires_grad_()
        torch.manual_seed(1)
        try:
            out = module(leaf, WEIGHTS)
            outcomes.append([out.detach(), *torch.autograd.grad(out.sum(), leaf)])
        except RuntimeError:
            outcomes.append(None)
    plain, found = outcomes
    assert (plain is None) == (found is None)
    assert plain is None or all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, found))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1), (3, 8, 1, 1), (3, 1, 7, 7), (1, 1, 7, 7), (2, 3, 1, 1, 1)])
def test_other_shapes_are_what_they_were(shape):
    class Shaped(Mixed):
        def forward(self, x, weights):
            return super().forward(x, weights) * torch.rand(shape)

    module, plain, _ = both(lambda: Shaped(*mixed().ops))
    assert_same(module, plain, images(), WEIGHTS)


def test_a_number_for_each_image_that_has_a_gradient():
    class Learned(Cell):
        def __init__(self):
            super().__init__(lambda out: out * self.scale)
            self.scale = nn.Parameter(torch.rand(3, 1, 1, 1))

        def __deepcopy__(self, memo):
            made = Learned()
            made.load_state_dict(self.state_dict())
            return made

    module, plain, report = both(Learned)
    assert_same(module, plain, images(), WEIGHTS)
    assert (report.counts.cells, report.counts.edges) == (0, 3)


def test_a_mask_that_changes_before_a_result_is_used_raises():
    class Refilled(Cell):
        def forward(self, x, weights):
            kept = mask(x)
            first = self.edges[0](x, weights) * kept
            kept.fill_(1.0)
            return first + self.edges[1](x, weights)

    module = Refilled(out_of_place)
    rnas.accelerate(module)
    with pytest.raises(RuntimeError, match="changed in place"):
        module(images().requires_grad_(), WEIGHTS)


def test_a_mask_may_be_filled_again_where_there_are_no_gradients():
    class Refilled(Cell):
        def forward(self, x, weights):
            kept = mask(x)
            first = self.edges[0](x, weights) * kept
            kept.fill_(0.5)
            return first + self.edges[1](x, weights) * kept

    module, plain, _ = both(lambda: Refilled(out_of_place))
    with torch.no_grad():
        torch.manual_seed(0)
        found = module(images(), WEIGHTS)
        torch.manual_seed(0)
        assert torch.allclose(found, plain(images(), WEIGHTS), atol=1e-5)


def test_a_single_image_has_one_number():
    module, plain, report = both(lambda: Cell(out_of_place))
    assert_same(module, plain, images(n=1), WEIGHTS)
    assert report.counts.cells == 1


def test_what_is_made_in_the_likeness_of_a_result_computes_nothing():
    class Alike(Mixed):
        def forward(self, x, weights):
            out = super().forward(x, weights)
            made = [out.new_zeros(2), out.new_ones((1, 2)), out.new_full((2,), 3.0), out.new_tensor([1.0, 2.0])]
            assert all(type(each) is Tensor and each.dtype == out.dtype for each in made)
            assert type(out) is Tensor or out._rnas_value is None
            return out + made[0].sum() + made[2].sum() + made[3].sum()

    module, plain, _ = both(lambda: Alike(*mixed().ops))
    assert_same(module, plain, images(), WEIGHTS)


@pytest.mark.parametrize("write", [in_place, lambda b: b.mul_(mask(b).double()), lambda b: b.__setitem__(0, 0.0)])
@pytest.mark.parametrize("training", [True, False])
def test_a_result_on_a_node_is_written_to(write, training):
    class Written(Mixed):
        def forward(self, x, weights):
            node = weights[1] * self.ops[1](x) + weights[2] * self.ops[2](x)
            pooled = self.ops[3](node)
            write(pooled)
            return pooled * 0.5 + node

    module, plain, _ = both(lambda: Written(*mixed().ops))
    assert_same(module.train(training), plain.train(training), images(), WEIGHTS)


@pytest.mark.parametrize("made", [lambda a, m: a * m, lambda a, m: a.mul_(m), lambda a, m: a * 2.0])
@pytest.mark.parametrize("ask", [lambda a: a.register_hook(lambda g: g * 2), Tensor.retain_grad])
@pytest.mark.parametrize("op", [1, 3])
def test_a_gradient_of_a_dropped_result_that_has_been_used_raises(made, ask, op):
    class Asked(Mixed):
        def forward(self, x, weights):
            a = made(self.ops[op](x), mask(x))
            total = (a * 0.5).square()
            ask(a)
            return total

    module = Asked(*mixed().ops)
    rnas.accelerate(module)
    with pytest.raises(RuntimeError, match="before it is used"):
        module(images().requires_grad_(), WEIGHTS)


def test_a_gradient_of_a_dropped_result_that_has_not_been_used():
    class Asked(Mixed):
        def forward(self, x, weights):
            y = self.ops[3](x)
            a = y * mask(x)
            total = (y * 0.5).square()
            a.mul_(3.0)
            a.register_hook(lambda g: g * 2)
            return total + a

    module, plain, _ = both(lambda: Asked(*mixed().ops))
    assert_same(module, plain, images(), WEIGHTS)


class Marked(Tensor):
    """A tensor that notes what is done to it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        made = super().__torch_function__(function, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return made * 3.0 if function in (Tensor.mul, Tensor.__mul__, Tensor.__rmul__) else made


@pytest.mark.parametrize("kind", ["a class of its own", "sparse"])
def test_masks_of_other_kinds_are_what_they_were(kind):
    class Other(Mixed):
        def forward(self, x, weights):
            kept = (torch.rand(len(x), 1, 1, 1) > 0.4).float()
            if kind == "sparse":
                return (super().forward(x, weights) * kept.to_sparse()).to_dense()
            with torch._C.DisableTorchFunctionSubclass():
                kept = kept.as_subclass(Marked)
            return super().forward(x, weights) * kept

    module, plain = Other(*mixed().ops), Other(*mixed().ops)
    rnas.accelerate(module)
    found, expected = [], []
    for network, results in ((module, found), (plain, expected)):
        torch.manual_seed(0)
        results.append(network(images(), WEIGHTS))
    assert type(found[0]) is type(expected[0])
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.allclose(found[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_a_view_of_a_result_or_what_it_is_of_cannot_be_written_to(which):
    class Shuffled(Mixed):
        def forward(self, x, weights):
            whole = torch.cat([super().forward(x, weights), x], dim=1)
            view = whole.view(len(x), 2, 8, *x.shape[2:])
            (whole, view)[which].mul_(0.5)
            return whole, view.transpose(1, 2).reshape(whole.shape)

    module = Shuffled(*mixed().ops)
    rnas.accelerate(module)
    with pytest.raises(RuntimeError, match="a view of it"):
        module(images(), WEIGHTS)
