"""rnas.accelerate: what is recognised and what is left alone, and what happens when a module changes afterwards."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from op_checks import distance
from supernets import darts, hooked, lookalikes, nasbench201, nested, others, pcdarts, smooth
from supernets.darts_candidates import Halve
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import rnas
from rnas.fusion import verify
from rnas.fusion.deferred import Deferred
from rnas.fusion.recognise import recognise
from rnas.fusion.scope import Scope


def images(channels: int = 8, n: int = 3, size: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def values_and_gradients(module: nn.Module, *arguments) -> list[Tensor | None]:
    """All that a call yields, of every tensor that it returns, and the buffers."""
    arguments = [
        each.clone().requires_grad_() if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in arguments
    ]
    torch.manual_seed(0)
    out = module(*arguments)
    outputs = [each for each in torch.utils._pytree.tree_leaves(out) if isinstance(each, Tensor)]
    assert not any(isinstance(each, Deferred) for each in outputs)
    leaves = [*(each for each in arguments if isinstance(each, Tensor)), *module.parameters()]
    leaves = [each for each in leaves if each.requires_grad]
    found = [each for each in outputs if each.requires_grad]
    grads: list[Tensor | None] = [None] * len(leaves)
    if found:
        noise = [torch.randn(each.shape, generator=torch.Generator().manual_seed(1)) for each in found]
        grads = list(torch.autograd.grad(found, leaves, noise, allow_unused=True))
    return [each.detach() for each in outputs] + grads + [buffer.clone() for buffer in module.buffers()]


def assert_same(module: nn.Module, plain: nn.Module, *arguments) -> None:
    found, expected = values_and_gradients(module, *arguments), values_and_gradients(plain, *arguments)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert (a is None) == (b is None)
        if a is not None:
            scale = float(b.abs().max()) if b.numel() else 0.0
            assert torch.allclose(a, b, rtol=1e-3, atol=2e-5 * max(scale, 1e-3)), float((a - b).abs().max())


class Mixed(nn.Module):
    """A mixed operation over any candidates."""

    def __init__(self, *ops: nn.Module) -> None:
        super().__init__()
        self.ops = nn.ModuleList(ops)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x) for w, op in zip(weights, self.ops))


def separable(channels: int = 8, size: int = 3, dilation: int = 2) -> nn.Sequential:
    padding = dilation * (size - 1) // 2
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, channels, size, 1, padding, dilation, channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
    )


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed(nn.Identity(), separable(size=3), separable(size=5), nn.MaxPool2d(3, 1, 1))


def both(make=mixed):
    """An accelerated module, a plain one with the same parameters, and the report."""
    plain = make()
    module = copy.deepcopy(plain)
    return module, plain, rnas.accelerate(module)


WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1])


# What is left alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", lookalikes.LOOKALIKES)
def test_what_only_looks_like_a_mixed_operation_keeps_its_meaning(name):
    case = lookalikes.LOOKALIKES[name]
    torch.manual_seed(0)
    plain = case(8)
    module = copy.deepcopy(plain)
    report = rnas.accelerate(module)
    for training in (True, False):
        assert_same(module.train(training), plain.train(training), images(size=8))
    fused = {name for each in report.replaced for name in each.candidates}
    for index in case.foreign or ():
        assert f"ops.{index}" not in fused, report
        assert any(f"ops.{index}" in each.reason for each in report.left) or not fused, report


@pytest.mark.parametrize("kind", others.KINDS)
def test_networks_without_mixed_operations_pass_through(kind):
    model = others.build(8, 3, 5, kind=kind)
    classes = [type(module) for module in model.modules()]
    report = rnas.accelerate(model, strict=True)
    assert [type(module) for module in model.modules()] == classes
    assert not report.replaced and not report.in_front and not report.left
    assert "found no mixed operations" in str(report)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)), "bias"),
        (nn.Sequential(nn.LeakyReLU(), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)), "LeakyReLU"),
        (nn.Sequential(nn.ReLU(True), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)), "in place"),
        (nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.ReLU(), nn.BatchNorm2d(8)), "values"),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, bias=False, padding_mode="reflect"), nn.BatchNorm2d(8)), "reflect"),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, (3, 1), bias=False), nn.BatchNorm2d(8)), "square"),
        (nn.AvgPool2d(3, 1, 1), "border"),
        (nn.MaxPool2d(5, 1, 2), "pool of size"),
        (nn.Dropout(0.1), "Dropout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_reason_is_told(module, why):
    assert why in recognise(module, {})


def test_a_report_tells_what_was_done():
    _, _, report = both()
    text = str(report)
    assert "fused 4 candidates of 1 mixed operations" in text
    assert "skip_connect, dil_conv_3x3, dil_conv_5x5, max_pool_3x3" in text
    module, _, report = both(lambda: Mixed(separable(), nn.Sequential(nn.GELU(), separable())))
    assert "ops.1: a GELU" in str(report)
    module(images(), WEIGHTS[:2])
    assert "Since then: 1 edges fused" in str(report)


def test_why_candidates_are_left_beside_some_that_do_nothing():
    reflecting = [separable(size=size) for size in (3, 5)]
    for each in reflecting:
        next(layer for layer in each.modules() if isinstance(layer, nn.Conv2d)).padding_mode = "reflect"
    report = rnas.accelerate(Mixed(nn.Identity(), *reflecting))
    (left,) = report.left
    assert not report.replaced and left.reason.count("a convolution pads by 'reflect'") == 2


def test_strict_changes_nothing_where_something_is_not_recognised():
    module = Mixed(separable(), nn.Sequential(nn.GELU(), separable()))
    classes = [type(each) for each in module.modules()]
    with pytest.raises(ValueError, match="GELU"):
        rnas.accelerate(module, strict=True)
    assert [type(each) for each in module.modules()] == classes
    assert rnas.accelerate(mixed(), strict=True).replaced


@pytest.mark.parametrize("function", [rnas.accelerate, rnas.restore])
def test_only_modules_are_taken(function):
    with pytest.raises(TypeError, match=r"nn.Module, got str"):
        function("model")


# What the code around candidates may do --------------------------------------------------------------------------------


class Around(nn.Module):
    """Candidates, and a function of (candidates, x, weights)."""

    def __init__(self, function) -> None:
        super().__init__()
        self.ops = mixed().ops
        self.function = function

    def forward(self, x: Tensor, weights: Tensor):
        return self.function(self.ops, x, weights)


def in_place(ops, x, w):
    out = torch.zeros_like(x)
    for weight, op in zip(w, ops):
        out += weight * op(x)
    return out


def in_place_on_the_first(ops, x, w):
    out = w[0] * ops[1](x)
    out += w[1] * ops[2](x)
    out *= 2
    return out


def aliases(ops, x, w):
    a = w[0] * ops[1](x)
    b = a
    a += w[1] * ops[2](x)
    return b, a - 0.5 * b


def a_result_twice(ops, x, w):
    y = ops[1](x)
    return w[0] * y + w[1] * ops[2](x) + y.square(), w[2] * y


def a_sum_twice(ops, x, w):
    y = w[0] * ops[1](x) + w[1] * ops[2](x)
    return y * 2.0, y + 1, y.mean()


def nodes(ops, x, w):
    a = w[0] * ops[1](x) + w[1] * ops[0](x)
    b = w[2] * ops[2](a) + w[3] * ops[3](x) + a
    return torch.cat([a, b], 1)


def drop_path(ops, x, w):
    out = []
    for weight, op in zip(w, ops):
        y = op(x)
        if op is not ops[0]:
            y = y.div(0.7)
            y.mul_(torch.bernoulli(y.new_full((len(y), 1, 1, 1), 0.7)))
        out.append(weight * y)
    return sum(out)


def written_before_use(ops, x, w):
    y = ops[0](x.clone())
    z = w[0] * ops[1](y)
    y.mul_(2)
    return z + y


def modes_around_a_call(ops, x, w):
    ops[1].eval()
    y = ops[1](x)
    ops[1].train(ops[2].training)
    return w[0] * y + w[1] * ops[2](x)


def a_result_written(ops, x, w):
    a = ops[1](x)
    total = a + ops[2](x)
    F.relu(a, inplace=True)
    return total, a


def identity_written(ops, x, w):
    state = x + 0
    total = sum([ops[0](state)])
    total.mul_(2)
    return total, state


def transposed_between_calls(ops, x, w):
    x = x[..., 1:] * 1
    first = ops[1](x).relu()
    x.transpose_(2, 3)
    second = ops[2](x)
    return first + w[0] * second.reshape(second.shape).transpose(2, 3)


def a_part_of_a_stack_written(ops, x, w):
    stack = torch.stack([op(x) for op in ops])
    part, before = stack[1:3], (stack * 2.0).sum(0)
    part.mul_(3.0)
    return stack.sum(0) * w[0], before, part


def a_stack_written_behind_its_part(ops, x, w):
    stack = torch.stack([op(x) for op in ops])
    part = stack[1:3]
    stack.mul_(3.0)
    return part.sum(0) * w[0]


def zeros_behind_a_stack(ops, x, w):
    stack = torch.stack([op(x) for op in ops[1:]])
    stack = torch.cat([stack, torch.zeros_like(stack[:1])], 0)
    return torch.sum(w.view(-1, 1, 1, 1, 1) * stack, 0)


def zeros_beside_a_stack(ops, x, w):
    zeros = torch.zeros_like(torch.stack([op(x) for op in ops[1:3]])[:1])
    return (zeros * w[0]).sum(0) + w[1] * ops[1](x), zeros


@torch.no_grad()
def stacked_without_gradients(ops, x, w):
    with torch.enable_grad():
        a, b = w[0] * ops[1](x), w[1] * ops[2](x)
        stack = torch.stack([a, b])
    parts = [torch.stack([a, b]), stack[:1], torch.cat([stack, stack], 0), a[:, : a.shape[1]]]
    parts += [torch.cat([a, b], 1), torch.cat([a, x], 1).view(len(x), 2, 8, *x.shape[2:]).transpose(1, 2), a.data]
    with torch.enable_grad():
        return a + b + sum(part.sum() * 0.01 for part in parts), stack[:1].sum(0)


def all_channels(ops, x, w):
    a = w[0] * ops[1](x)
    part, rest = a[:, : a.shape[1], :, :], a[:, a.shape[1] :, :, :]
    part += 1
    return a + w[1] * ops[2](part), rest, torch.cat([part, rest], 1)


def two_skip_connections(ops, x, w):
    out = sum(weight * op(x) for weight, op in zip(w, ops))
    out += ops[0](x) * 0.5
    return out + w[1] * ops[0](x)


def the_same_skip_connection(ops, x, w):
    a = ops[0](x)
    return w[0] * a + w[1] * a + w[2] * ops[1](x)


def a_state_beside_nodes(ops, x, w):
    a = w[0] * ops[1](x) + w[1] * ops[0](x)
    b = w[2] * ops[2](a) + w[3] * ops[3](x)
    return torch.cat([x, a, b], 1), torch.cat([x.tanh(), a], 1), torch.cat([a, x, b], 1), b


def a_stack_as_a_state(ops, x, w):
    return w[0] * ops[0](torch.stack([ops[1](x), ops[2](x)])).sum(0) + w[1] * ops[1](x)


def refilled(ops, x, w):
    buffer, out = torch.zeros(()), 0
    for weight, op in zip(w, ops):
        buffer.copy_(weight)
        out = out + buffer * op(x)
    return out


def partial_refilled(ops, x, w):
    """Weights of edges with partial channels, one after the other in one tensor."""
    buffer, out = torch.zeros(()), 0
    for weight in w:
        buffer.copy_(weight)
        edge = torch.cat([weight * ops[1](x) + ops[2](x), x], 1)
        out = out + buffer * F.channel_shuffle(edge, 2)
    return out


def autocast_inside(ops, x, w):
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = w[0] * ops[1](x) + w[1] * ops[2](x)
        return y * 1.0 + torch.zeros(1)


def output_written(ops, x, w):
    a = w[0] * ops[1](x)
    b = w[1] * ops[2](a)
    c = w[2] * ops[2](x) + w[3] * ops[1](a)
    out = torch.cat([a + 0, b, c], 1)
    before = a * 1.0
    out.mul_(2)
    return out, before


class Gate(torch.autograd.Function):
    """As ProxylessNAS: runs a candidate in a graph of its own, and hands the gates products with its result."""

    @staticmethod
    def forward(ctx, x, gates, candidate):
        leaf = x.detach().requires_grad_(x.requires_grad)
        with torch.enable_grad():
            out = candidate(leaf)
        ctx.save_for_backward(leaf, out)
        ctx.gates = gates.shape
        return out.data

    @staticmethod
    def backward(ctx, gradient):
        leaf, out = ctx.saved_tensors
        of_gates = (out.data * gradient).sum().expand(ctx.gates)
        return torch.autograd.grad(out, leaf, gradient)[0], of_gates, None


AROUND = {
    "in place": in_place,
    "in place on the first": in_place_on_the_first,
    "aliases": aliases,
    "a result twice": a_result_twice,
    "a sum twice": a_sum_twice,
    "nodes": nodes,
    "drop path": drop_path,
    "written before use": written_before_use,
    "twice in a sum": lambda ops, x, w: (lambda y: y + y)(w[0] * ops[1](x)),
    "twice in a sum, other weights": lambda ops, x, w: (lambda y: w[0] * y + w[1] * y + w[2] * ops[2](x))(ops[1](x)),
    "an edge and a half": lambda ops, x, w: (lambda h: h + 0.5 * h)(w[0] * ops[1](x) + w[1] * ops[2](x)),
    "two states in the other order": lambda ops, x, w: (lambda a, b: b + a)(w[0] * ops[1](x), w[1] * ops[1](x + 1)),
    "modes around a call": modes_around_a_call,
    "a state transposed between calls": transposed_between_calls,
    "a stack as a state": a_stack_as_a_state,
    "a part of a stack, written": a_part_of_a_stack_written,
    "a stack written behind its part": a_stack_written_behind_its_part,
    "a stack and zeros": zeros_behind_a_stack,
    "zeros of the shape of a stack": zeros_beside_a_stack,
    "a part of a stack": lambda ops, x, w: (torch.stack([op(x) for op in ops])[1:3] * w[:2].view(-1, 1, 1, 1, 1)).sum(0),
    "a result out of a stack": lambda ops, x, w: w[0] * torch.stack([op(x) for op in ops])[2],
    "every other channel": lambda ops, x, w: (w[0] * ops[1](x) + w[1] * ops[2](x))[:, 0 : x.shape[1] : 2],
    "all channels and none": all_channels,
    "stacked without gradients": stacked_without_gradients,
    "two skip connections": two_skip_connections,
    "one skip connection twice": the_same_skip_connection,
    "a state beside nodes": a_state_beside_nodes,
    "small integers": lambda ops, x, w: sum(torch.tensor(k * 60, dtype=torch.uint8) * op(x) for k, op in enumerate(ops))
    * torch.tensor(90, dtype=torch.uint8)
    * torch.tensor(7, dtype=torch.int8),
    "skip connections of weight one": lambda ops, x, w: sum((w[0] > 0) * op(x) for op in (ops[0], ops[2], ops[0])),
    "halves as weights": lambda ops, x, w: w[0].half() * (w[1].half() * ops[1](x)) + w[2].half() * ops[2](x),
    "twice on one, then on another": lambda ops, x, w: (
        lambda a, b, c: (w[1] * c + 0, w[0] * a + b)
    )(ops[1](x), ops[1](x), ops[1](x.tanh())),
    "stack, by other names": lambda ops, x, w: (
        torch.stack([op(x) for op in ops]).sum(axis=0) * w[0]
        + torch.sum(input=torch.stack(tensors=[op(x) for op in ops]), dim=0)
    ),
    "reshaped, by name": lambda ops, x, w: torch.reshape(w[0] * ops[1](x), shape=(len(x), -1)),
    "integer weights": lambda ops, x, w: sum(torch.tensor(k) * op(x) for k, op in enumerate(ops)),
    "boolean weights": lambda ops, x, w: sum((weight > 0.15) * op(x) for weight, op in zip(w, ops)),
    "an integer of one dimension": lambda ops, x, w: torch.tensor([2]) * ops[1](x) + w[0] * ops[2](x),
    "a result written, then summed": a_result_written,
    "a sum of the identity written": identity_written,
    "autocast off inside": autocast_inside,
    "an integer tensor besides": lambda ops, x, w: ops[1](x) - torch.ones(1, dtype=torch.uint8),
    "the output written, then a node": output_written,
    "a view of a result written, then summed": lambda ops, x, w: (
        lambda a: (a + ops[2](x), a.view(-1).mul_(3))
    )(ops[1](x)),
    "a checkpoint inside": lambda ops, x, w: checkpoint(
        lambda h: h.tanh() * 2, w[0] * ops[1](x) + w[1] * ops[2](x), use_reentrant=False
    ),
    "unused": lambda ops, x, w: (w[0] * ops[1](x), ops[2](x))[0],
    "stack": lambda ops, x, w: (torch.stack([op(x) for op in ops]) * w.view(-1, 1, 1, 1, 1)).sum(0),
    "stack, looked at": lambda ops, x, w: torch.stack([op(x) for op in ops])[1:].sum(0) * w[0],
    "einsum": lambda ops, x, w: torch.einsum("k,knchw->nchw", w, torch.stack([op(x) for op in ops])),
    "weights of images": lambda ops, x, w: sum(w[k] * x.mean((1, 2, 3), True) * op(x) for k, op in enumerate(ops)),
    "weights of one number": lambda ops, x, w: sum(w[k : k + 1] * op(x) for k, op in enumerate(ops)),
    "numbers": lambda ops, x, w: 0.5 * ops[1](x) - ops[2](x) / 3 + 1 * ops[3](x) - (-ops[0](x)),
    "weights in float64": lambda ops, x, w: sum(weight * op(x) for weight, op in zip(w.double(), ops)),
    "weights in float64, of one number": lambda ops, x, w: sum(
        w.double()[k : k + 1] * op(x) for k, op in enumerate(ops)
    ),
    "a number besides": lambda ops, x, w: sum(w[k] * op(x) if k == 1 else w[k] for k, op in enumerate(ops)) + 2,
    "a tensor besides": lambda ops, x, w: x + sum(w[k] * op(x) for k, op in enumerate(ops)) - 0.1 * x[:1],
    "a larger tensor besides": lambda ops, x, w: w[1] * ops[1](x[:1]) + x,
    "the same twice": lambda ops, x, w: w[0] * ops[1](x) + w[1] * ops[1](x),
    "chained": lambda ops, x, w: w[0] * ops[2](w[1] * ops[1](x)),
    "concatenated": lambda ops, x, w: torch.cat([op(x) for op in ops], 1),
    "partial": lambda ops, x, w: F.channel_shuffle(torch.cat([sum(w[k] * op(x) for k, op in enumerate(ops)), x], 1), 2),
    "partial, around first": lambda ops, x, w: torch.cat([x, w[0] * ops[1](x)], 1),
    "partial, other view": lambda ops, x, w: torch.cat([w[0] * ops[1](x), x], 1).view(len(x), 4, -1).sum(2),
    "partial, 5-dimensional": lambda ops, x, w: 2 * torch.cat([w[0] * ops[1](x), x], 1).view(len(x), 2, 8, 7, 7),
    "partial, transposed": lambda ops, x, w: torch.cat([w[0] * ops[1](x), x], 1).view(len(x), 2, 8, 7, 7).transpose(1, 2),
    "inside a function": lambda ops, x, w: Gate.apply(Gate.apply(x, w, ops[1]) + x, w, ops[2]),
    "data": lambda ops, x, w: w[0] * ops[1](x) * ops[2](x).data.abs().mean(),
    "no gradient inside": lambda ops, x, w: w[0] * ops[1](x) * torch.no_grad()(lambda: ops[2](x).norm())(),
    "shapes": lambda ops, x, w: ops[1](x).size(1) * ops[2](x).shape[2] * w[0] * ops[3](x),
    "a dictionary": lambda ops, x, w: {"out": w[0] * ops[1](x), "raw": [ops[2](x), 3]},
    "relu behind": lambda ops, x, w: F.relu(sum(w[k] * op(x) for k, op in enumerate(ops)), inplace=True),
    "indexed": lambda ops, x, w: (w[0] * ops[1](x))[:, ::2],
    "padded": lambda ops, x, w: F.pad(w[0] * ops[1](x), (0, 1)),
    "compared": lambda ops, x, w: torch.where(ops[1](x) > ops[2](x), w[0], w[1]) * x,
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", AROUND)
def test_code_around_candidates_means_what_it_did(name, training):
    module, plain, report = both(lambda: Around(AROUND[name]))
    assert report.replaced and report.counts.given_back == 0
    assert_same(module.train(training), plain.train(training), images(), WEIGHTS)


@pytest.mark.parametrize("name", ["stack", "a stack and zeros", "two skip connections", "integer weights"])
def test_what_is_one_edge(name):
    module, _, report = both(lambda: Around(AROUND[name]))
    module(images(), WEIGHTS)
    assert (report.counts.edges, report.counts.alone) == (1, 0)


@pytest.mark.parametrize("name", ["stack", "stack, by other names", "a part of a stack", "data", "reshaped, by name"])
def test_what_does_not_stand_back(name):
    module, _, report = both(lambda: Around(AROUND[name]))
    module(images(), WEIGHTS)
    assert report.counts.given_back == 0 and report.counts.edges + report.counts.alone > 0


@pytest.mark.parametrize("function", [refilled, partial_refilled])
def test_one_tensor_for_one_weight_after_the_other(function):
    module, plain, report = both(lambda: Around(function))
    with torch.no_grad():
        assert torch.allclose(module(images(), WEIGHTS), plain(images(), WEIGHTS), rtol=1e-4, atol=1e-5)
    assert report.counts.edges > 0


def cell(ops, x, w):
    """Two nodes; the second sums its edges in the order of no source."""
    a = w[0] * ops[1](x) + w[1] * ops[2](x)
    b = (w[0] * ops[4](a) + w[1] * ops[5](a)) + (w[1] * ops[6](x) + w[0] * ops[7](x))
    return torch.cat([a, b], 1), a, b


def cell_of(function):
    def make():
        made = Around(function)
        made.ops.extend(separable(size=size) for size in (3, 5, 3, 5))
        return made

    return both(make)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_edges_in_the_order_of_no_source_make_a_cell(training):
    module, plain, report = cell_of(cell)
    assert_same(module.train(training), plain.train(training), images(), WEIGHTS)
    assert report.counts.cells == 1


def test_nodes_and_the_output_of_a_cell_are_tensors_of_their_own():
    def write(ops, x, w):
        out, a, b = cell(ops, x, w)
        return out, a.mul_(2), b.add(1).mul_(3)

    module, plain, report = cell_of(write)
    assert_same(module.eval(), plain.eval(), images(), WEIGHTS)
    assert report.counts.cells == 1


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_an_autograd_function_on_a_result_raises_and_does_not_lose_the_gradient():
    module, plain, _ = both(lambda: Around(lambda ops, x, w: Scaled.apply(w[0] * ops[1](x)) + 0 * x))
    x = images().requires_grad_()
    plain(x, WEIGHTS).sum().backward()
    with pytest.raises(RuntimeError, match=r"autograd.Function"):
        module(x, WEIGHTS).sum().backward()


def test_a_gradient_of_a_result_can_be_asked_for_before_it_is_used():
    def keep(ops, x, w):
        keep.y = w[0] * ops[1](x)
        keep.y.retain_grad()
        return 2 * keep.y + w[1] * ops[2](x)

    grads = []
    for module in both(lambda: Around(keep))[:2]:
        module(images(), WEIGHTS).sum().backward()
        grads.append(keep.y.grad)
    assert torch.allclose(*grads)


def test_a_gradient_of_a_result_that_has_been_fused_raises():
    def keep(ops, x, w):
        keep.y = w[0] * ops[1](x)
        return keep.y + w[1] * ops[2](x)

    module, _, _ = both(lambda: Around(keep))
    loss = module(images().requires_grad_(), WEIGHTS).sum()
    with pytest.raises(RuntimeError, match="fused into a sum before its gradient was asked for"):
        torch.autograd.grad(loss, keep.y)


def test_a_stack_has_no_gradient_where_its_parts_were_fused():
    def keep(ops, x, w):
        stack = torch.stack([op(x) for op in ops])
        total = (stack * w.view(-1, 1, 1, 1, 1)).sum(0)
        y = total * 1.0
        y.relu()
        stack.retain_grad()
        return y

    module, _, _ = both(lambda: Around(keep))
    with pytest.raises(RuntimeError, match="fused into a sum before its gradient was asked for"):
        module(images().requires_grad_(), WEIGHTS)


@pytest.mark.parametrize("index", [0, 1])
def test_one_of_two_skip_connections_has_no_gradient_where_both_were_fused(index):
    def keep(ops, x, w):
        both = [ops[0](x), ops[0](x)]
        total = w[0] * both[0] + w[1] * both[1] + w[2] * ops[1](x)
        total.relu()
        both[index].retain_grad()
        return total

    module, _, _ = both(lambda: Around(keep))
    with pytest.raises(RuntimeError, match="fused into a sum before its gradient was asked for"):
        module(images().requires_grad_(), WEIGHTS)


SETTINGS = {"eps": 0.5, "momentum": 0.9, "track_running_stats": False, "running_mean": torch.ones(8)}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", SETTINGS)
def test_norms_that_change_before_a_result_is_used_raise(name, training):
    def change(ops, x, w):
        norm = ops[1][-1]
        before = getattr(norm, name)
        setattr(norm, name, SETTINGS[name])
        y = ops[1](x)
        setattr(norm, name, before)
        return w[0] * y

    module, _, _ = both(lambda: Around(change))
    with pytest.raises(RuntimeError, match="settings or averages of a candidate operation's batch norm"):
        module.train(training)(images(), WEIGHTS)


class Behind(nn.Module):
    """A layer in front of a mixed operation."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.edges = layer, nn.ModuleList([mixed(), mixed()])

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        x = self.layer(x)
        return sum(edge(x, weights) for edge in self.edges)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("stride", [1, 2])
def test_layers_in_front_of_a_cell_that_have_a_bias(stride, training):
    def make():
        halve = Halve(8, 8)
        for each in (halve.conv_1, halve.conv_2):
            each.bias = nn.Parameter(torch.randn(4))
        return Behind(halve if stride == 2 else biased(1))

    module, plain, _ = both(make)
    for each in (*module.layer.modules(), *plain.layer.modules()):
        if isinstance(each, nn.Conv2d):  # on batch statistics its gradient is what rounding leaves
            each.bias.requires_grad_(not training)
    assert_same(module.train(training), plain.train(training), images(size=8), WEIGHTS)


class WithIdentity(Mixed):
    """A mixed operation with a module that does nothing, before or behind its candidates or beside them."""

    def __init__(self, where: str) -> None:
        super().__init__(*mixed().ops)
        self.nothing, self.where = nn.Identity(), where

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        if self.where == "before":
            y, x = self.nothing(x), x * 1
            y = y * 1
            y.mul_(2)
            return super().forward(x, weights) + y
        out = super().forward(x, weights)
        return self.nothing(out) if self.where == "behind" else out + self.nothing(x)


@pytest.mark.parametrize("where", ["before", "behind", "beside"])
def test_a_module_that_does_nothing_beside_candidates(where):
    module, plain, report = both(lambda: WithIdentity(where))
    assert_same(module, plain, images(), WEIGHTS)
    assert (report.counts.edges, report.counts.alone) == (1, 0)


@pytest.mark.parametrize("module", [nn.Identity(), separable(size=3)], ids=["identity", "convolutions"])
def test_a_model_of_one_edge_waits_no_longer_than_the_edge_is_in(module):
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edge = Mixed(module, separable(size=5))

        def forward(self, x):
            return self.edge(x, WEIGHTS)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            out = self.inner(x)
            return out, [each.running_mean.clone() for each in self.modules() if isinstance(each, nn.BatchNorm2d)]

    accelerated, plain, _ = both(Outer)
    assert_same(accelerated, plain, images())


def test_nodes_under_a_checkpoint():
    def run(model: nn.Module) -> list[Tensor]:
        cell = model.cells[0]
        for node in cell.nodes:
            forward = node.forward
            node.forward = lambda *a, forward=forward: checkpoint(forward, *a, use_reentrant=False)
        logits = model(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
        found = torch.autograd.grad(logits.square().sum(), [*model.parameters(), *model.arch_parameters()])
        return [each.detach() for each in (logits, *found)]

    module, plain, _ = both(lambda: nested.build(4, 3, 5, kind="nodes", steps=2))
    for found, expected in zip(run(module), run(plain)):
        assert torch.allclose(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_that_change_before_a_result_is_used_raise(name):
    def perturb(ops, x, w):
        y = ops[1](x)
        with torch.no_grad():
            getattr(ops[1][1], name).add_(1)
        return w[0] * y

    def make():
        made = Around(perturb)
        made.ops[1] = biased(3)
        return made

    module, _, _ = both(make)
    with pytest.raises(RuntimeError, match="weights of a candidate"):
        module(images(), WEIGHTS)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_alone_and_then_fused_in_one_graph(training):
    """The sandwich rule: one path by itself, then all of them, then backward."""

    def sandwich(ops, x, w):
        return ops[1](x).square().mean() + (w[0] * ops[1](x) + w[1] * ops[2](x)).square().mean() + ops[1](x).mean()

    module, plain, _ = both(lambda: Around(sandwich))
    assert_same(module.train(training), plain.train(training), images(), WEIGHTS)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_a_mixed_operation(reentrant):
    module, plain, _ = both()
    grads = []
    for each in (module, plain):
        x = images().requires_grad_()
        checkpoint(each, x, WEIGHTS, use_reentrant=reentrant).square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in each.parameters())])
    for a, b in zip(*grads):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_hooks_of_the_user_do_not_run_and_random_numbers_stay():
    module, calls = mixed(), []
    module.ops[1].register_forward_hook(lambda *_: calls.append(1))
    module.ops.append(Drops())
    torch.manual_seed(0)
    rnas.accelerate(module)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert not calls and torch.equal(drawn, torch.rand(3))


def test_subclass_registries_do_not_see_accelerated_classes():
    class Registered(nn.Module):
        known: list[type] = []

        def __init_subclass__(cls, *, name):
            Registered.known.append(cls)

    class Body(Registered, name="body"):
        def __init__(self):
            super().__init__()
            self.body = separable()

        def forward(self, x):
            return self.body(x)

    _, _, report = both(lambda: Mixed(Body(), separable()))
    assert list(report.replaced[0].candidates) == ["ops.0", "ops.1"] and Registered.known == [Body]


def test_the_signature_of_a_forward_stays():
    import inspect

    module, plain, _ = both()
    assert inspect.signature(module.forward) == inspect.signature(plain.forward)


@pytest.mark.parametrize("code", ["size", "batch", "counter", "stash", "child", "grad", "class"])
def test_candidates_that_depend_on_more_than_can_be_known_are_left_alone_or_watched(code):
    class Body(nn.Module):
        gain = 1.0

        def __init__(self):
            super().__init__()
            self.body, self.count = separable(), 0
            self.body.gain = 1.0

    def size(self, x):
        return self.body(x) if x.shape[2] < 64 else x

    def batch(self, x):
        n = len(x)
        return torch.cat([self.body(each) for each in x.chunk(max(1, n // 8))])

    def counter(self, x):
        self.count += 1
        return self.body(x)

    def stash(self, x):
        self.seen = self.body(x)
        return self.seen

    def child(self, x):
        return self.body(x) * self.body.gain

    def grad(self, x):
        return self.body(x) if torch.is_grad_enabled() or not torch.is_grad_enabled() else x

    def klass(self, x):
        return self.body(x) * self.gain

    Body.forward = {"class": klass}.get(code) or locals()[code]
    module, plain, report = both(lambda: Mixed(Body(), separable()))
    if code not in ("child", "class"):
        assert list(report.replaced[0].candidates) == ["ops.1"], report
    for each in (module, plain):
        each.ops[0].body.gain = 2.0
    Body.gain = 3.0
    assert_same(module, plain, images(), WEIGHTS[:2])


def test_a_state_that_is_overwritten_raises():
    def overwrite(ops, x, w):
        state = x + 0
        out = w[0] * ops[1](state)
        state.mul_(2)
        return out + w[1] * ops[2](state)

    module, _, _ = both(lambda: Around(overwrite))
    with pytest.raises(RuntimeError, match="changed in place"):
        module(images(), WEIGHTS)


def test_code_that_looks_at_classes_runs_as_before_and_says_so():
    def look(ops, x, w):
        results = [op(x) for op in ops]
        if any(type(each) is not Tensor for each in results):
            raise TypeError("not a tensor")
        return sum(a * b for a, b in zip(w, results))

    module, plain, report = both(lambda: Around(look))
    with pytest.warns(UserWarning, match="does not take results that are not computed yet"):
        module(images(), WEIGHTS)
    plain(images(), WEIGHTS)
    assert report.counts.given_back == 1
    assert_same(module, plain, images(), WEIGHTS)


def test_an_error_of_the_module_is_the_same_error():
    module, plain, _ = both()
    for each in (module, plain):
        with pytest.raises(RuntimeError, match="channels"):
            each(images(channels=4), WEIGHTS)
        with pytest.raises(TypeError):
            each(images())


# What changes afterwards -----------------------------------------------------------------------------------------------


CHANGES = {
    "a hook on a candidate": lambda m: m.ops[1].register_forward_hook(lambda module, x, out: out * 2),
    "a hook on a layer": lambda m: m.ops[1][1].register_forward_hook(lambda module, x, out: out * 2),
    "a hook before a layer": lambda m: m.ops[1][1].register_forward_pre_hook(lambda module, x: (x[0] * 2,)),
    "a hook on the mixed operation": lambda m: m.register_forward_hook(lambda module, x, out: out * 2),
    "a backward hook": lambda m: m.ops[1].register_full_backward_hook(lambda module, a, b: (a[0] * 2,)),
    "a pruned convolution": lambda m: prune.l1_unstructured(m.ops[1][1], "weight", 0.5),
    "a parametrized convolution": lambda m: parametrizations.orthogonal(m.ops[1][2]),
    "a spectral norm": lambda m: parametrizations.spectral_norm(m.ops[1][2]).eval(),
    "another padding and dilation": lambda m: vars(m.ops[1][1]).update(padding=(1, 1), dilation=(1, 1)),
    "another layer": lambda m: m.ops[1].__setitem__(0, nn.LeakyReLU()),
    "one layer more": lambda m: m.ops[1].append(nn.ReLU()),
    "another candidate": lambda m: m.ops.__setitem__(1, nn.Conv2d(8, 8, 1)),
    "a forward of its own": lambda m: setattr(m.ops[1], "forward", lambda x: x * 2),
    "a convolution of its own": lambda m: setattr(m.ops[1][1], "_conv_forward", lambda x, w, b: x * w.sum()),
    "a weight in the place of its parameter": lambda m: vars(m.ops[1][1]).update(weight=torch.ones(8, 1, 3, 3)),
    "an average in the place of its buffer": lambda m: vars(m.ops[1][3]).update(running_mean=torch.ones(8)),
    "a forward of a layer": lambda m: setattr(m.ops[1][0], "forward", F.leaky_relu),
    "a bias": lambda m: setattr(m.ops[1][1], "bias", nn.Parameter(torch.ones(8))),
    "another weight": lambda m: setattr(m.ops[1][1], "weight", nn.Parameter(torch.ones(8, 1, 3, 3))),
    "a weight set to zero": lambda m: m.ops[1][1].weight.data.zero_(),
    "a frozen weight": lambda m: m.ops[1][1].weight.requires_grad_(False),
    "one norm in eval mode": lambda m: m.ops[1][3].eval(),
    "another eps": lambda m: setattr(m.ops[1][3], "eps", 0.1),
    "another momentum": lambda m: setattr(m.ops[1][3], "momentum", None),
    "a norm without averages": lambda m: setattr(m.ops[1][3], "track_running_stats", False),
    "another forward of the whole": lambda m: setattr(m, "forward", lambda x, w: 2 * m.ops[1](x)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_afterwards_counts(name):
    module, plain, _ = both()
    module(images(), WEIGHTS), plain(images(), WEIGHTS)
    for each in (module, plain):
        torch.manual_seed(0)
        CHANGES[name](each)
    assert_same(module, plain, images(seed=1), WEIGHTS)


def test_candidates_are_tried_by_one_thread(monkeypatch):
    found, images_of = [], verify.images
    monkeypatch.setattr(verify, "images", lambda *a, **k: found.append(torch.get_num_threads()) or images_of(*a, **k))
    torch.set_num_threads(2)
    try:
        rnas.accelerate(Mixed(separable(), separable()))
        with pytest.raises(ValueError):
            rnas.accelerate(Mixed(separable(), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1))), strict=True)
        assert set(found) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def biased(size: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, size, padding=size // 2), nn.BatchNorm2d(8))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", ["none", "another", "written to", "frozen", "without"])
def test_biases_of_dense_convolutions(change, training):
    module, plain, report = both(lambda: Mixed(biased(1), biased(3), separable()))
    assert list(report.replaced[0].candidates.values()) == ["conv_1x1", "conv_3x3", "dil_conv_3x3"]
    for each in (module.train(training), plain.train(training)):
        each(images(), WEIGHTS[:3])
        layer = each.ops[1][1]
        if change == "another":
            layer.bias = nn.Parameter(torch.full((8,), 3.0))
        if change == "written to":
            layer.bias.data.mul_(5)
        if change == "frozen":
            layer.bias.requires_grad_(False)
        if change == "without":
            layer.bias = None
    found = [each.ops[index][1].bias for each in (module, plain) for index in (0, 1)]
    if training:  # their gradients are zero, which plain PyTorch gives but for rounding
        learnt = [bias for bias in found[:2] if bias is not None and bias.requires_grad]
        assert not any(map(torch.any, torch.autograd.grad(module(images(), WEIGHTS[:3]).square().sum(), learnt)))
        plain(images(), WEIGHTS[:3])  # as many batches
        for bias in found:
            bias is None or bias.requires_grad_(False)
    assert_same(module, plain, images(seed=1), WEIGHTS[:3])


class Gated(nn.Module):
    """A candidate with a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.rate = separable(), 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return F.dropout(y, self.rate) if self.rate > 0 else y


def test_a_switch_of_a_candidate_is_watched():
    module, plain, report = both(lambda: Mixed(Gated(), separable()))
    module(images(), WEIGHTS[:2]), plain(images(), WEIGHTS[:2])
    assert report.counts.alone == 0 and len(report.replaced[0].candidates) == 2
    for each in (module, plain):
        each.ops[0].rate = 0.5
    assert_same(module, plain, images(seed=1), WEIGHTS[:2])
    for each in (module, plain):
        each.ops[0].rate = 0.0
    assert_same(module, plain, images(seed=1), WEIGHTS[:2])


class Held(nn.Module):
    """A candidate with a factor that its class holds."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.body = separable()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.factor


@pytest.mark.parametrize("value", [2.0, torch.arange(8.0)[:, None, None]], ids=["number", "tensor"])
@pytest.mark.parametrize("of", ["class", "module"])
def test_a_number_of_a_class_is_watched(of, value, monkeypatch):
    module, plain, report = both(lambda: Mixed(Held(), separable()))
    module(images(), WEIGHTS[:2]), plain(images(), WEIGHTS[:2])
    assert report.counts.alone == 0 and len(report.replaced[0].candidates) == 2
    for each in [Held] if of == "class" else [module.ops[0], plain.ops[0]]:
        monkeypatch.setattr(each, "factor", value, raising=False)
    assert_same(module, plain, images(seed=1), WEIGHTS[:2])


class Drops(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.body(x), 0.5, self.training)


class Twice(Gated):
    """Its values and gradients are those of a primitive, its averages move twice."""

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.body(x)


@pytest.mark.parametrize(("candidate", "why"), [(Drops, "random"), (Twice, "averages")])
def test_a_candidate_that_does_more_than_a_primitive_is_left_alone(candidate, why):
    module, plain, report = both(lambda: Mixed(candidate(), separable()))
    assert why in report.left[0].reason and list(report.replaced[0].candidates) == ["ops.1"]
    assert_same(module, plain, images(), WEIGHTS[:2])


def test_another_forward_of_a_class_counts(monkeypatch):
    module, plain, report = both(lambda: Mixed(Gated(), separable()))
    assert list(report.replaced[0].candidates) == ["ops.0", "ops.1"]
    monkeypatch.setattr(Gated, "forward", lambda self, x: 2 * self.body(x))
    assert_same(module, plain, images(), WEIGHTS[:2])


RATE = 0.0


class Global(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.body(x), RATE)


class Owned(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.settings = {"rate": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.body(x), self.settings["rate"])


@pytest.mark.parametrize("candidate", [Global, Owned])
def test_a_candidate_that_reads_what_cannot_be_watched_is_left_alone(candidate):
    _, _, report = both(lambda: Mixed(candidate(), separable()))
    assert "reads" in report.left[0].reason and list(report.replaced[0].candidates) == ["ops.1"]


@pytest.mark.parametrize("extra", [None, "none by name", 0.5], ids=str)
def test_further_arguments_of_a_candidate(extra):
    class Keep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = separable()

        def forward(self, x, keep):
            return self.body(x) if keep is None else self.body(x) * keep

    def call(ops, x, w):
        if extra == "none by name":
            return w[0] * ops[4](x, keep=None) + w[1] * ops[1](x)
        return w[0] * ops[4](x, extra) + w[1] * ops[1](x)

    def make():
        made = Around(call)
        made.ops.append(Keep())
        return made

    module, plain, report = both(make)
    assert "ops.4" in report.replaced[0].candidates
    assert_same(module, plain, images(), WEIGHTS)
    assert report.counts.alone == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_the_kernels_of_a_gpu(dtype, cuda_device):
    x = images(size=6).to(cuda_device, dtype)
    found = {}
    for name, kind in (("float64", torch.float64), ("plain", dtype), ("accelerated", dtype)):
        module = mixed().to(cuda_device, kind)
        report = rnas.accelerate(module) if name == "accelerated" else None
        leaf, weights = x.to(kind).requires_grad_(), WEIGHTS.to(cuda_device).requires_grad_()
        out = module(leaf, weights)
        assert out.dtype == kind
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(cuda_device, kind)
        found[name] = [out, *torch.autograd.grad(out, [leaf, weights, *module.parameters()], noise)]
    assert report.counts.edges == 1
    for ours, plain, exact in zip(found["accelerated"], found["plain"], found["float64"]):
        error, own = (((each.double() - exact).norm() / exact.norm()).item() for each in (ours, plain))
        assert error <= 3 * own + torch.finfo(dtype).eps


def test_a_candidate_that_stands_twice_moves_its_averages_twice():
    def make():
        made = mixed()
        made.ops[2] = made.ops[1]
        return made

    module, plain, _ = both(make)
    assert_same(module, plain, images(), WEIGHTS)
    assert int(module.ops[1][3].num_batches_tracked) == 2


def test_code_whose_source_has_changed_may_not_jump(monkeypatch):
    """A file that was edited after its import would tell of other code."""
    import inspect

    def forward(self, x):
        return self.body(x) if x.shape[2] < 64 else x

    def edited(self, x):
        return self.body(x)

    from rnas.fusion.branches import decides_by_input

    decides_by_input.cache_clear()
    text = inspect.getsource(edited)
    monkeypatch.setattr(inspect, "getsource", lambda function: text)
    assert decides_by_input(forward)
    decides_by_input.cache_clear()


def test_importing_rnas_does_not_import_the_fusion():
    import subprocess
    import sys

    code = "import rnas, sys; assert 'rnas.fusion' not in sys.modules and 'torch' not in sys.modules; rnas.accelerate"
    subprocess.run([sys.executable, "-c", code], check=True)


class Cell(nn.Module):
    """Two states, nodes of edges with the candidates that `edges` names, and what `give` makes of the nodes.

    add: what becomes of each node, from the sum of its edges and its index.
    """

    def __init__(self, edges: list[list[tuple[str, ...]]], give, stride: int = 1, add=lambda x, node: x) -> None:
        super().__init__()
        self.give, self.add = give, add
        self.nodes = nn.ModuleList(
            nn.ModuleList(smooth.Edge(names, 8, stride if j < 2 else 1, True) for j, names in enumerate(node))
            for node in edges
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        states = [first, second]
        for index, node in enumerate(self.nodes):
            edges = [edge(x, torch.linspace(1, 2, len(edge.candidates))) for edge, x in zip(node, states)]
            states.append(self.add(sum(edges), index))
        return self.give(states[2:])


PRUNED = [[("sep3", "skip"), ("max", "none")], [("sep5",), ("skip",), ("dil3", "avg", "skip")]]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_edges_with_candidates_of_their_own_make_a_whole_cell(training, stride):
    plain = Cell(PRUNED, lambda nodes: torch.cat(nodes, 1), stride).train(training)
    cell = copy.deepcopy(plain)
    report = rnas.accelerate(cell)
    assert ["sep_conv_5x5"] in [list(each.candidates.values()) for each in report.replaced]
    assert_same(cell, plain, images(8, size=8), images(8, size=8, seed=1))
    assert (report.counts.cells, report.counts.edges, report.counts.alone) == (1, 5, 0)


TWICE = [[("sep3", "skip"), ("sep3", "max")], [("sep5", "none"), ("none",), ("dil3", "avg", "skip")]]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("edges", [PRUNED, TWICE])
def test_a_cell_that_one_tensor_enters_twice(edges, training, stride):
    class Twice(Cell):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, x)

    plain = Twice(edges, lambda nodes: torch.cat(nodes, 1), stride).train(training)
    cell = copy.deepcopy(plain)
    report = rnas.accelerate(cell)
    assert_same(cell, plain, images(8, size=8))
    assert (report.counts.cells, report.counts.alone) == (1, 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("give", ["the last", "the last, then the first", "the first, then the last", "all"])
def test_a_cell_that_gives_its_last_node_may_give_others_too(give, layout):
    def made(nodes: list[Tensor]) -> Tensor:
        if give == "the first, then the last":
            return nodes[0].tanh() + nodes[1].exp()
        last = nodes[1].exp()
        if give == "all":
            return torch.cat([last, *nodes], 1)
        return last if give == "the last" else last * nodes[0]

    plain = Cell(PRUNED, made)
    cell = copy.deepcopy(plain)
    report = rnas.accelerate(cell)
    states = [images(8, seed=seed).contiguous(memory_format=layout) for seed in (0, 1)]
    assert_same(cell, plain, *states)
    assert cell(*states).is_contiguous(memory_format=layout) == plain(*states).is_contiguous(memory_format=layout)
    assert (report.counts.cells > 0) == (give != "the first, then the last")


def test_a_state_that_only_zeros_leave_has_no_gradient():
    for edges in (
        [[("none",), ("sep3", "skip")], [("none",), ("skip",), ("dil3", "skip")]],
        [[("skip",), ("sep3", "skip")], [("dil3", "none"), ("skip",), ("none",)]],
    ):
        plain = Cell(edges, lambda nodes: nodes[-1].exp())
        cell = copy.deepcopy(plain)
        rnas.accelerate(cell)
        assert_same(cell, plain, images(8), images(8, seed=1))


class Zeros(nn.Module):
    """The candidate none with a graph: a gradient of zeros."""

    def forward(self, x: Tensor, keep: None = None) -> Tensor:
        return x * 0.0


def test_a_state_that_only_zeros_with_a_graph_leave_has_a_gradient_of_zeros():
    plain = Cell([[("sep3", "skip"), ("skip",)], [("dil3",), ("skip",), ("none",)]], lambda nodes: nodes[-1].exp())
    plain.nodes[1][2].candidates["none"] = Zeros()
    cell = copy.deepcopy(plain)
    report = rnas.accelerate(cell)
    assert_same(cell, plain, images(8), images(8, seed=1))
    assert report.counts.cells == 1 and report.counts.alone == 0


ADDED = {
    "numbers": lambda x, node, p: x + p[node],
    "of the first node": lambda x, node, p: x + p[0] if node == 0 else x,
    "of the last node, several": lambda x, node, p: p[0] + p[1] * (p[0] - x) - p[1] if node == 1 else x,
    "with dimensions": lambda x, node, p: x + p[node].view(1, 1, 1, 1),
    "of each channel": lambda x, node, p: x + torch.stack([p[node]] * 8).view(8, 1, 1),
    "of images": lambda x, node, p: x + p[node].expand(x.shape),
}


@pytest.mark.parametrize("give", ["all", "the last"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("added", ADDED)
def test_numbers_added_to_nodes_are_part_of_a_whole_cell(added, training, give):
    numbers = nn.Parameter(torch.tensor([0.5, -1.5]))
    plain = Cell(
        PRUNED,
        lambda nodes: torch.cat(nodes, 1) if give == "all" else nodes[-1].exp(),
        add=lambda x, node: ADDED[added](x, node, numbers),
    ).train(training)
    plain.numbers = numbers
    cell = copy.deepcopy(plain)
    cell.add = lambda x, node: ADDED[added](x, node, cell.numbers)
    report = rnas.accelerate(cell)
    assert_same(cell, plain, images(8, size=8), images(8, size=8, seed=1))
    assert report.counts.cells == (0 if "channel" in added or "images" in added else 1)
    before = cell(images(8), images(8)).sum()
    cell.numbers.grad = None
    before.backward()
    assert cell.numbers.grad.abs().sum() > 1


def test_a_number_that_changes_before_a_cell_is_computed_raises():
    number = torch.tensor(1.0)

    def give(nodes):
        number.add_(1)
        return nodes[-1].exp()

    cell = Cell(PRUNED, give, add=lambda x, node: x + number)
    rnas.accelerate(cell)
    with pytest.raises(RuntimeError, match="changed in place"):
        cell(images(8), images(8))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_what_a_cell_returns_may_be_changed_in_place(layout, training):
    states = [images(8, n=4, size=32, seed=seed).contiguous(memory_format=layout) for seed in (0, 1)]
    for give in (lambda nodes: torch.cat(nodes, 1).mul_(2).relu_(), lambda nodes: nodes[-1].contiguous().mul_(2)):
        plain = Cell(PRUNED, give).train(training)
        cell = copy.deepcopy(plain)
        report = rnas.accelerate(cell)
        assert_same(cell, plain, *states)
        assert report.counts.cells == 1


def test_a_single_candidate_of_a_class_that_holds_none_elsewhere_is_left_alone():
    model = nn.Sequential(smooth.Edge(("sep5",), 8, 1, True), smooth.Edge(("dil3",), 8, 1, True))
    report = rnas.accelerate(model)
    assert not report.replaced and not report.left


def test_the_supernet_of_the_style_keeps_its_speed_where_alphas_are_parameters():
    model = darts.build(8, 3, 5, steps=2)
    report = rnas.accelerate(model)
    model(torch.rand(2, 3, 8, 8))
    assert report.counts.cells == 3 and report.counts.alone == 0


@pytest.mark.parametrize("style", [darts, hooked, nasbench201, pcdarts, smooth])
def test_a_step_keeps_nothing_alive(style):
    # Not even until Python looks for circles: it does so seldom, and states and graphs are large.
    model = style.build(8, 3, 5)
    rnas.accelerate(model)
    gc.collect()
    gc.disable()
    try:
        model(torch.rand(2, 3, 8, 8)).sum().backward()
        alive = [type(each) for each in gc.get_objects() if type(each) in (Deferred, Scope)]
    finally:
        gc.enable()
    assert not alive


def test_a_forward_that_raises_keeps_nothing_alive():
    def give(nodes):
        raise RuntimeError("as it is")

    cell = Cell(PRUNED, give)
    rnas.accelerate(cell)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="as it is"):
            cell(images(8), images(8))
        alive = [type(each) for each in gc.get_objects() if type(each) in (Deferred, Scope)]
    finally:
        gc.enable()
    assert not alive


THREE = [*PRUNED, [("skip",), ("dil3", "skip"), ("max", "skip"), ("sep3", "skip")]]


def written_in_place(node: Tensor) -> None:
    with torch.no_grad():
        node.add_(1)


WRITES = {
    "add_": written_in_place,
    "relu_": lambda node: node.relu_(),
    "an argument": lambda node: F.relu(node, inplace=True),
    "out": lambda node: torch.mul(node, 2, out=node),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_a_node_that_was_not_asked_for_may_be_written_to(write, grad):
    """Behind the last one. Those that were made of it are what they would have been."""
    if grad and write == "out":
        pytest.skip("plain PyTorch does not take it where there is a graph")

    def give(nodes: list[Tensor]) -> list[Tensor]:
        last = nodes[-1].abs()
        WRITES[write](nodes[0])
        return [last, nodes[1] * 1.0, nodes[0] * 1.0]

    plain = Cell(THREE, give).eval()
    cell, states = copy.deepcopy(plain), [images(8), images(8, seed=1)]
    report = rnas.accelerate(cell)
    with torch.set_grad_enabled(grad):
        assert distance(cell(*states), plain(*states)) <= 1e-6
    assert report.counts.cells == 1


def step(cell: nn.Module, states: list[Tensor], out: Tensor) -> None:
    out.sum().backward()
    torch.optim.SGD(cell.parameters(), lr=0.1).step()


LATER = {
    "nothing": lambda cell, states, out: None,
    "a step": step,
    "other images": lambda cell, states, out: [state.zero_() for state in states],
    "another forward": lambda cell, states, out: cell.train()(*[3 * state for state in states]),
}


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("later", LATER)
def test_nodes_that_outlive_the_forward_are_what_they_were(later, mode):
    if later == "a step" and mode == "inference":
        pytest.skip("there are no gradients")
    plain = Cell(THREE, lambda nodes: None).train(mode == "train")
    cell, found = copy.deepcopy(plain), []
    report = rnas.accelerate(cell)
    for each in (plain, cell):
        kept, states = [], [images(8), images(8, seed=1)]
        each.give = lambda nodes, kept=kept: kept.append(nodes) or nodes[-1].abs()
        with torch.inference_mode(mode == "inference"):
            out = each(*states)
            LATER[later](each, states, out)
            found.append([out, *(node * 1.0 for node in kept[0])])
        found[-1] += each.buffers()
    assert distance(*found) <= 1e-6
    assert report.counts.cells >= 1


def test_nobody_computes_nodes_that_nobody_has():
    cell = Cell(THREE, lambda nodes: nodes[-1].abs())
    report = rnas.accelerate(cell)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            cell(images(8), images(8, seed=1))
    assert (report.counts.cells, report.counts.alone) == (2, 0)


def test_nobody_computes_nodes_where_the_last_is_kept():
    kept = []
    cell = Cell(THREE, lambda nodes: kept.append(nodes[-1]) or nodes[-1].abs())
    report = rnas.accelerate(cell)
    cell(images(8), images(8, seed=1))
    assert (report.counts.cells, report.counts.alone) == (1, 0)


def test_in_inference_mode_a_state_may_change_before_another_node_is_read():
    # Nobody could notice: tensors have no versions there.
    plain = Cell(THREE, lambda nodes: None).eval()
    cell, found = copy.deepcopy(plain), []
    report = rnas.accelerate(cell)
    for each in (plain, cell):
        with torch.inference_mode():
            first = images(8)
            each.give = lambda nodes, first=first: [nodes[-1].abs(), first.zero_(), nodes[0].abs()]
            found.append(each(first, images(8, seed=1)))
    assert distance(*found) <= 1e-6 and report.counts.cells == 1


def test_what_was_made_of_a_node_that_has_been_written_to_raises():
    # Candidates of the second node are used twice: in the cell, which is computed, and in a sum that is not.
    def give(nodes: list[Tensor]) -> Tensor:
        last = nodes[-1].abs()
        nodes[0].add_(1)
        return last + doubled[1].abs()

    doubled = []
    cell = Cell(THREE, give, add=lambda x, node: doubled.append(x * 2.0) or x)
    report = rnas.accelerate(cell)
    with torch.no_grad(), pytest.raises(RuntimeError, match="changed in place"):
        cell(images(8), images(8, seed=1))
    assert report.counts.cells == 1


def test_a_state_that_changes_before_another_node_is_read_raises():
    def give(nodes: list[Tensor]) -> Tensor:
        last = nodes[-1].abs()
        first.add_(1)
        kept.extend(nodes)
        return last

    cell, first, kept = Cell(THREE, give), images(8), []
    rnas.accelerate(cell)
    with torch.no_grad():
        cell(first, images(8, seed=1))  # nobody has read one yet
        assert kept[-1].isfinite().all()
        with pytest.raises(RuntimeError, match="changed in place"):
            kept[0].abs()


def test_what_was_called_on_a_node_sees_it_as_it_was():
    # Also where the node is written to after the forward.
    plain = Cell(PRUNED, lambda nodes: None).eval()
    cell = copy.deepcopy(plain)
    rnas.accelerate(cell)
    found = []
    for each in (plain, cell):
        kept = []

        def give(nodes, kept=kept, each=each):
            kept.extend((nodes[0], each.nodes[1][2].candidates["dil3"](nodes[0], None)))
            return nodes[-1].exp()

        each.give = give
        with torch.no_grad():
            each(images(8), images(8, seed=1))
            kept[0].add_(1)
        found.append(kept)
    assert distance(*found) <= 1e-6
