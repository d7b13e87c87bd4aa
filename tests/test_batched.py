"""Batches of gradients through the fused ops: the same bits as one after the other, however they are made."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_checks import noise
from test_mixed_op import draw
from torch import Tensor, nn
from torch._vmap_internals import _vmap
from torch.utils.checkpoint import checkpoint

from rnas.kernels import conv_norm, factorized_reduce, formats, relu_conv_norm
from rnas.kernels.batched import one_at_a_time

pytestmark = pytest.mark.usefixtures("compiled")

Leaves = tuple[Tensor, ...]


def cell(mode: str, partial: int = 1) -> tuple[Leaves, Tensor]:
    problem = draw(space="nas-bench-201", cell="two nodes", shape=(2, 8, 5, 5), mode=mode, partial=partial)
    problem.require(("inputs", "weights"))
    return (*problem.states, problem.weights), problem.run()


def layer(make: Callable[[Tensor, Tensor, nn.BatchNorm2d], Tensor], weight: tuple[int, ...], mode: str):
    norm = nn.BatchNorm2d(6).train(mode == "train")
    leaves = (noise(torch.empty(2, 4, 5, 5), 1).requires_grad_(), noise(torch.empty(weight), 2).requires_grad_())
    return leaves, make(*leaves, norm)


CASES: dict[str, Callable[[str], tuple[Leaves, Tensor]]] = {
    "cell": cell,
    "partial channels": lambda mode: cell(mode, partial=2),
    "relu_conv_norm": lambda mode: layer(relu_conv_norm, (6, 4, 1, 1), mode),
    "factorized_reduce": lambda mode: layer(lambda x, w, norm: factorized_reduce(x, w[:3], w[3:], norm), (6, 4, 1, 1), mode),
    "conv_norm": lambda mode: layer(lambda x, w, norm: conv_norm(x, w, norm, padding=1), (6, 4, 3, 3), mode),
}


@pytest.mark.parametrize("smallest", [1, formats._SMALLEST], ids=["transposed", "small"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_every_way_to_make_a_batch(case, mode, smallest, monkeypatch):
    monkeypatch.setattr(formats, "_SMALLEST", smallest)  # of images that compiled code brings into another memory format
    leaves, output = CASES[case](mode)
    directions = noise(output.new_empty(2, 3, *output.shape), 1)

    def along(direction: Tensor, **options) -> Leaves:
        return torch.autograd.grad(output, leaves, direction, retain_graph=True, **options)

    expected = [torch.stack(each) for each in zip(*map(along, directions.flatten(0, 1)))]
    first = [each[:3] for each in expected]
    assert all(map(torch.equal, along(directions[0], is_grads_batched=True), first))
    assert all(map(torch.equal, torch.func.vmap(along)(directions[0]), first))
    moved = torch.func.vmap(along, in_dims=2)(directions[0].movedim(0, 2))
    assert all(map(torch.equal, moved, first))
    nested = torch.func.vmap(torch.func.vmap(along))(directions)
    assert all(torch.equal(each.flatten(0, 1), other) for each, other in zip(nested, expected))
    inside = torch.func.vmap(lambda direction: along(direction, is_grads_batched=True))(directions)
    assert all(torch.equal(each.flatten(0, 1), other) for each, other in zip(inside, expected))
    inside = _vmap(lambda direction: along(direction, is_grads_batched=True))(directions)
    assert all(torch.equal(each.flatten(0, 1), other) for each, other in zip(inside, expected))
    for way in (torch.func.vmap, _vmap):  # one of two batches holds the gradients
        several = way(lambda direction, way=way: way(lambda _: along(direction))(torch.ones(2)))(directions[0])
        assert all(map(torch.equal, several, (each[:, None].expand(-1, 2, *each.shape[1:]) for each in first)))


@pytest.mark.parametrize("smallest", [1, formats._SMALLEST], ids=["transposed", "small"])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_can_be_differentiated(case, smallest, monkeypatch):
    monkeypatch.setattr(formats, "_SMALLEST", smallest)
    leaves, output = CASES[case]("eval")
    directions = noise(output.new_empty(2, *output.shape), 1).requires_grad_()

    def along(direction: Tensor, **options) -> Tensor:
        return torch.autograd.grad(output, leaves[0], direction, create_graph=True, **options)[0]

    found = [along(directions, is_grads_batched=True), torch.stack([along(each) for each in directions])]
    assert torch.equal(*found)
    twice = [torch.autograd.grad(each.square().sum(), (directions, leaves[1]), retain_graph=True) for each in found]
    for first, second in zip(*twice):
        torch.testing.assert_close(first, second)


def test_through_a_checkpoint():
    problem = draw(space="nas-bench-201", cell="two nodes", shape=(2, 8, 5, 5), mode="train")

    def run(first: Tensor, second: Tensor) -> Tensor:
        problem.states = [first, second]
        return problem.run()

    leaves = problem.require(("inputs",)).states
    outputs = [run(*leaves), checkpoint(run, *leaves, use_reentrant=False)]
    directions = noise(outputs[0].new_empty(3, *outputs[0].shape), 1)
    found = [torch.autograd.grad(output, leaves, directions, is_grads_batched=True) for output in outputs]
    assert all(map(torch.equal, *found))


def test_a_backward_pass_in_another_thread_than_the_batch():
    # As on a GPU, whose backward passes run in a thread of autograd's own.
    double = one_at_a_time(lambda ctx, gradient: (2 * gradient.contiguous(),))

    def elsewhere(gradient: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(double, None, gradient).result()[0]

    gradients = noise(torch.empty(3, 4), 1)
    assert torch.equal(_vmap(elsewhere)(gradients), 2 * gradients)


def test_jacobians_and_hessians_of_a_cell():
    problem = draw(space="nas-bench-201", cell="two nodes", shape=(1, 4, 3, 3), mode="eval")

    def total(weights: Tensor) -> Tensor:
        problem.weights = weights
        return problem.run().square().mean(dim=(0, 2, 3))

    first = problem.weights
    jacobians = [torch.autograd.functional.jacobian(total, first, vectorize=each) for each in (True, False)]
    torch.testing.assert_close(*jacobians)
    hessians = [
        torch.autograd.functional.hessian(lambda w: total(w).sum(), first, vectorize=each) for each in (True, False)
    ]
    torch.testing.assert_close(*hessians)
