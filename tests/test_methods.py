"""DARTS: the relaxation, the discretisation, and both orders of the architecture gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from rnas import attacks, data, search, seeding
from rnas.methods import METHODS, SearchStep, discretise, entropy, options_for
from rnas.methods.darts import Darts, DartsOptions
from rnas.methods.unrolled import unrolled_gradients
from rnas.spaces import DARTS, DSARA

TWO_NODES = replace(DARTS, nodes=2)


def test_alpha_starts_small_random_and_reproducible():
    first, again, other = (Darts(DartsOptions(), DARTS, seed) for seed in (3, 3, 4))
    assert {name: alpha.shape for name, alpha in first.alpha.items()} == {"normal": (14, 8), "reduction": (14, 8)}
    spread = torch.cat([alpha.flatten() for alpha in first.alpha.values()]).std()
    assert 0.8e-3 < spread < 1.2e-3
    for name in first.alpha:
        assert torch.equal(first.alpha[name], again.alpha[name])
        assert not torch.equal(first.alpha[name], other.alpha[name])
    for weights in first.mixing().values():
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(14))


def test_discretise_keeps_the_two_strongest_edges_and_never_none():
    weights = torch.full((5, 8), 0.01)
    weights[:, 0] = 0.9  # `none` dominates everywhere and must not matter
    weights[0, 4], weights[1, 3] = 0.3, 0.2  # into node 0
    weights[2, 7], weights[3, 1], weights[4, 5] = 0.05, 0.4, 0.06  # into node 1
    found = discretise(TWO_NODES, {"normal": weights, "reduction": weights})
    assert found.cells["normal"] == (
        (("sep_conv_3x3", 0), ("skip_connect", 1)),
        (("max_pool_3x3", 1), ("sep_conv_5x5", 2)),
    )
    assert found.concat == (2, 3)


def test_discretise_works_in_a_space_without_none():
    mixing = {cell_type: torch.rand(14, 7) for cell_type in DSARA.cell_types}
    found = discretise(DSARA, mixing)
    for cell_type, weights in mixing.items():
        assert all(len({source for _, source in node}) == 2 for node in found.cells[cell_type])
        best = DSARA.primitives[int(weights[0].argmax())]
        assert found.cells[cell_type][0][0] == (best, 0)


def test_entropy_is_that_of_the_normalised_weights():
    uniform, decided = torch.full((5, 8), 3.0), torch.eye(8)[:5]
    values = entropy({"normal": uniform, "reduction": decided})
    assert values["normal"] == pytest.approx(math.log(8)) and values["reduction"] == 0


class Toy(torch.nn.Module):
    """Two losses that are smooth in weights and architecture, so that exact unrolled gradients exist."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64))
        self.alpha = torch.nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def train_loss(self, w: torch.Tensor) -> torch.Tensor:
        a = self.alpha
        return (w[0] * a[0].exp() - 1) ** 2 + (w[1] * a[1] + w[2]).sin() + 0.3 * (w * w).sum() * a[0]

    def valid_loss(self, w: torch.Tensor) -> torch.Tensor:
        return (w[0] * w[1] - 0.5) ** 2 + self.alpha[1] * w[2] + self.alpha[0].cos() * w[0]


@pytest.mark.parametrize("momentum_steps", [0, 2])
def test_unrolled_gradient_equals_exact_differentiation(momentum_steps):
    toy = Toy()
    optimizer = torch.optim.SGD([toy.w], lr=0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(momentum_steps):
        optimizer.zero_grad()
        toy.train_loss(toy.w).backward()
        optimizer.step()
    before = toy.w.detach().clone()
    result = unrolled_gradients(
        lambda weights: (toy.train_loss(weights["w"]), torch.zeros(1)),
        lambda weights: (toy.valid_loss(weights["w"]), torch.zeros(1)),
        {"w": toy.w},
        [toy.alpha],
        optimizer,
        radius=1e-4,
    )
    (gradient,) = torch.autograd.grad(toy.train_loss(toy.w), toy.w, create_graph=True)
    buffer = optimizer.state[toy.w].get("momentum_buffer", torch.zeros(3, dtype=torch.float64))
    moved = toy.w - 0.05 * (gradient + 0.01 * toy.w + 0.9 * buffer)
    (exact,) = torch.autograd.grad(toy.valid_loss(moved), toy.alpha)
    (first_order,) = torch.autograd.grad(toy.valid_loss(toy.w), toy.alpha)
    torch.testing.assert_close(result.gradients[0], exact, rtol=1e-6, atol=1e-8)
    assert (exact - first_order).norm() > 1e-3, "the toy problem must tell first from second order"
    assert torch.equal(toy.w, before)


def make_step(config, optimizer) -> SearchStep:
    attack = replace(config.attack, epsilon=8 / 255, step_size=2 / 255)
    return SearchStep(0, 0, attack, optimizer, lambda purpose: seeding.generator(0, purpose))


@pytest.fixture
def level(search_config):
    """A supernet, its method and two batches, as a search step sees them."""
    dataset = data.load(search_config.data)
    supernet, _ = search.build(search_config, dataset)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9, weight_decay=3e-4)
    batches = data.batches(dataset.train, 16, seed=0, epoch=0)
    return supernet.train(), optimizer, next(batches), next(batches)


def snapshot(supernet: torch.nn.Module) -> dict:
    state = {name: value.clone() for name, value in supernet.state_dict().items()}
    return state | {f"{name}.grad": p.grad for name, p in supernet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", [1, 2])
def test_the_architecture_step_moves_nothing_but_its_own_gradients(search_config, level, order):
    supernet, optimizer, train, valid = level
    method = Darts(DartsOptions(order=order), TWO_NODES, 0)
    step = make_step(search_config, optimizer)
    before, modes = snapshot(supernet), [module.training for module in supernet.modules()]
    batches = [
        method.prepare(supernet, *train, step, "weights"),
        method.prepare(supernet, *valid, step, "architecture"),
    ]
    result = method.architecture_step(supernet, *batches, step)
    after = snapshot(supernet)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert modes == [module.training for module in supernet.modules()]
    assert all(p.requires_grad for p in supernet.parameters())
    assert math.isfinite(result.loss) and 0 <= result.accuracy <= 1
    assert all(alpha.grad is not None and alpha.grad.norm() > 0 for alpha in method.parameters())


def test_first_order_gradient_is_that_of_the_validation_loss(search_config, level):
    supernet, optimizer, train, valid = level
    method = Darts(DartsOptions(order=1, adversarial="none"), TWO_NODES, 0)
    step = make_step(search_config, optimizer)
    batches = [method.prepare(supernet, *batch, step, "weights") for batch in (train, valid)]
    assert batches[0].x_adv is None
    method.architecture_step(supernet, *batches, step)
    found = [alpha.grad for alpha in method.parameters()]
    loss = cross_entropy(supernet(valid[0], method.mixing()), valid[1])  # in training mode: batch statistics
    for ours, expected in zip(found, torch.autograd.grad(loss, list(method.parameters()))):
        torch.testing.assert_close(ours, expected)


def test_second_order_gradient_of_the_supernet_equals_finite_differences(search_config, level):
    supernet, optimizer, train, valid = level
    # steps of 1e-6 on both sides: ReLU and max pooling make the gradient jump within any larger one
    options = DartsOptions(order=2, adversarial="none", radius=1e-6)
    supernet, method = supernet.double(), Darts(options, TWO_NODES, 0).double()
    train, valid = ((x.double(), y) for x, y in (train, valid))
    step = make_step(search_config, optimizer)
    batches = [method.prepare(supernet, *batch, step, "weights") for batch in (train, valid)]
    method.architecture_step(supernet, *batches, step)
    names = [name for name, _ in supernet.named_parameters()]

    def unrolled_loss() -> float:
        with attacks.frozen(supernet, statistics="batch"), torch.enable_grad():
            weights = {name: p.detach().requires_grad_() for name, p in supernet.named_parameters()}
            call = torch.func.functional_call
            loss = cross_entropy(call(supernet, weights, (train[0], method.mixing())), train[1])
            gradients = torch.autograd.grad(loss, [weights[name] for name in names])
            moved = {name: weights[name] - 0.05 * (g + 3e-4 * weights[name]) for name, g in zip(names, gradients)}
            return cross_entropy(call(supernet, moved, (valid[0], method.mixing())), valid[1]).item()

    for cell_type, row, column in (("normal", 0, 4), ("reduction", 3, 5)):
        alpha, h = method.alpha[cell_type], 1e-6
        with torch.no_grad():
            alpha[row, column] += h
            above = unrolled_loss()
            alpha[row, column] -= 2 * h
            below = unrolled_loss()
            alpha[row, column] += h
        expected = (above - below) / (2 * h)
        assert float(alpha.grad[row, column]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("adversarial", "levels"),
    [("both", (True, True)), ("weights", (True, False)), ("architecture", (False, True)), ("none", (False, False))],
)
def test_the_named_levels_see_pgd_examples_inside_the_ball(search_config, level, adversarial, levels):
    supernet, optimizer, train, _ = level
    method = Darts(DartsOptions(adversarial=adversarial), TWO_NODES, 0)
    step = make_step(search_config, optimizer)
    for name, attacked in zip(("weights", "architecture"), levels):
        batch = method.prepare(supernet, *train, step, name)
        assert (batch.x_adv is not None) == attacked
        if attacked:
            distance = (batch.x_adv - batch.x).abs().max()
            assert 0 < distance <= 8 / 255 + 1e-7
        assert batch.inputs is (batch.x_adv if attacked else batch.x)


def test_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'darts'"):
        options_for("dart")
    assert set(METHODS) >= {"darts"}
