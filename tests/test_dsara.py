"""DSARA on a smooth problem: its stages, and both objectives' unrolled gradients against finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from rnas import seeding
from rnas.methods import METHODS, SearchStep, options_for
from rnas.methods.dsara import Dsara, DsaraOptions
from rnas.methods.method import Batch
from rnas.methods.min_norm import min_norm
from rnas.methods.unrolled import unrolled_gradients, unrolled_gradients_of_each
from rnas.spaces import DSARA

GRID = torch.linspace(0, 1, 20001, dtype=torch.float64)
SPACING = 1 / 20000
STAGE_2 = {"stages": "one-both"}


class ToySupernet(torch.nn.Module):
    """A smooth network of the weights and the mixing, so that finite differences of any step size are exact."""

    def __init__(self, space) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        shapes = {"inward": (12, 5), "outward": (5, 4)}
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=rng).double()))
        count = len(space.edges) * len(space.primitives)
        self.gates = {cell_type: torch.randn((count, 5), generator=rng).double() for cell_type in space.cell_types}

    def forward(self, x, mixing, edge_weights=None):
        gate = sum(weights.flatten() @ self.gates[cell_type] for cell_type, weights in mixing.items())
        return ((x.flatten(1) - 0.5) @ self.inward * (1 + gate)).tanh() @ self.outward


class ToyLevel:
    """A toy supernet a few steps into its training (so with momentum), a DSARA method, and both levels' batches."""

    def __init__(self, **options) -> None:
        space, rng = replace(DSARA, nodes=1), torch.Generator().manual_seed(1)
        self.supernet = ToySupernet(space)
        self.method = Dsara(DsaraOptions(**{"radius": 1e-4, **options}), space, 0).double()
        with torch.no_grad():
            for alpha in self.method.parameters():
                alpha.copy_(torch.randn(alpha.shape, generator=rng))
        self.optimizer = torch.optim.SGD(self.supernet.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        self.train, self.valid = (self.draw(rng) for _ in range(2))
        for _ in range(2):
            self.optimizer.zero_grad()
            self.method.weight_loss(self.supernet, self.draw(rng), self.step())[0].backward()
            self.optimizer.step()
        self.optimizer.zero_grad()

    @staticmethod
    def draw(rng) -> Batch:
        # far apart, so that the gradients on both point in ways that differ
        x, x_adv = (torch.rand((6, 3, 2, 2), generator=rng).double() for _ in range(2))
        return Batch(x, torch.randint(4, (6,), generator=rng), x_adv)

    def step(self, epoch: int = 0) -> SearchStep:
        return SearchStep(epoch, 0, None, self.optimizer, lambda purpose: seeding.generator(0, purpose))

    def loss_at_the_next_weights(self, x) -> float:
        """Cross entropy on (x, y of D_V) after the step that the optimizer would take on the PGD examples of D_T."""
        weights = {name: p.detach().requires_grad_() for name, p in self.supernet.named_parameters()}

        def loss_on(w, x, y):
            return cross_entropy(functional_call(self.supernet, w, (x, self.method.mixing())), y)

        gradients = torch.autograd.grad(loss_on(weights, self.train.x_adv, self.train.y), list(weights.values()))
        buffers = [self.optimizer.state[p]["momentum_buffer"] for p in self.supernet.parameters()]
        moved = {
            name: w - 0.05 * (0.9 * buffer + gradient + 0.01 * w)
            for (name, w), gradient, buffer in zip(weights.items(), gradients, buffers)
        }
        return loss_on(moved, x, self.valid.y).item()

    def finite_differences(self, x) -> list[torch.Tensor]:
        """The gradient to all of alpha of `loss_at_the_next_weights(x)`, entry by entry."""
        found = []
        for alpha in self.method.parameters():
            gradient = torch.zeros_like(alpha)
            for index in range(alpha.numel()):
                values = []
                for move in (1e-5, -2e-5):
                    with torch.no_grad():
                        alpha.view(-1)[index] += move
                    values.append(self.loss_at_the_next_weights(x))
                with torch.no_grad():
                    alpha.view(-1)[index] += 1e-5
                gradient.view(-1)[index] = (values[0] - values[1]) / 2e-5
            found.append(gradient)
        return found

    def gradients(self, epoch: int = 0) -> list[torch.Tensor]:
        """What the architecture step of that epoch leaves in `.grad`."""
        self.result = self.method.architecture_step(self.supernet, self.train, self.valid, self.step(epoch))
        return [alpha.grad for alpha in self.method.parameters()]


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def relative(found, expected) -> float:
    return float((flat(found) - flat(expected)).norm() / flat(expected).norm())


def test_first_stage_gradient_is_that_of_the_adversarial_loss_after_a_momentum_step():
    toy = ToyLevel()
    expected = toy.finite_differences(toy.valid.x_adv)
    found = toy.gradients()
    assert relative(found, expected) < 1e-6
    assert toy.result.numbers.keys() == {"stage", "adversarial_loss", "adversarial_accuracy"}
    assert toy.result.loss == pytest.approx(toy.loss_at_the_next_weights(toy.valid.x_adv), rel=1e-12)
    # what must not pass for it: the clean loss, a step on clean images, and no step at all
    assert relative(found, toy.finite_differences(toy.valid.x)) > 1e-2
    assert relative(ToyLevel(order=1).gradients(), expected) > 1e-2
    toy.train = replace(toy.train, x_adv=toy.train.x)
    assert relative(found, toy.finite_differences(toy.valid.x_adv)) > 1e-3


@pytest.mark.parametrize("c", [0.1, 1.0])
def test_second_stage_gradients_are_those_of_both_losses_after_one_and_the_same_step(c):
    toy = ToyLevel(adversarial_weight=c, **STAGE_2)
    u1, u2 = toy.finite_differences(toy.valid.x), [c * g for g in toy.finite_differences(toy.valid.x_adv)]
    objectives = toy.method.objectives(toy.supernet, toy.train, toy.valid, toy.step())
    assert relative(objectives["natural"].gradients, u1) < 1e-6
    assert relative([c * g for g in objectives["adversarial"].gradients], u2) < 1e-6

    found, numbers = toy.gradients(), toy.result.numbers
    combined = torch.stack([gamma * flat(u1) + (1 - gamma) * flat(u2) for gamma in GRID])
    shortest = combined[combined.norm(dim=1).argmin()]
    assert relative(found, [shortest]) < 1e-3
    assert flat(found).norm() <= min(flat(u1).norm(), flat(u2).norm()) * (1 + 1e-6)
    assert numbers["stage"] == 2 and numbers["gamma"] == pytest.approx(
        float(GRID[combined.norm(dim=1).argmin()]), abs=2 * SPACING
    )
    natural, adversarial = (toy.loss_at_the_next_weights(x) for x in (toy.valid.x, toy.valid.x_adv))
    assert (numbers["natural_loss"], numbers["adversarial_loss"]) == pytest.approx((natural, adversarial), rel=1e-12)
    gamma = numbers["gamma"]
    assert 0.01 < gamma < 0.99, "the toy problem must not lie at an end, where one gradient alone decides"
    assert toy.result.loss == pytest.approx(gamma * natural + (1 - gamma) * c * adversarial, rel=1e-12)

    summed = ToyLevel(adversarial_weight=c, combination="sum", **STAGE_2)
    assert relative(summed.gradients(), [flat(u1) + flat(u2)]) < 1e-6
    assert "gamma" not in summed.result.numbers
    assert summed.result.loss == pytest.approx(natural + c * adversarial, rel=1e-12)


def test_gamma_is_one_for_all_cell_types():
    toy = ToyLevel(adversarial_weight=1.0, **STAGE_2)
    found = toy.method.objectives(toy.supernet, toy.train, toy.valid, toy.step())
    u1, u2 = (found[name].gradients for name in ("natural", "adversarial"))
    toy.gradients()
    per_type = [min_norm([a], [b]).gamma for a, b in zip(u1, u2)]
    assert toy.result.numbers["gamma"] == min_norm(u1, u2).gamma and len(set(per_type)) == 3


def test_first_order_takes_both_gradients_at_the_current_weights():
    toy = ToyLevel(order=1, combination="sum", **STAGE_2)
    losses = [cross_entropy(toy.supernet(x, toy.method.mixing()), toy.valid.y) for x in (toy.valid.x, toy.valid.x_adv)]
    expected = torch.autograd.grad(losses[0] + 0.1 * losses[1], list(toy.method.parameters()))
    assert relative(toy.gradients(), expected) < 1e-12


def test_several_losses_behind_one_step_are_each_as_alone():
    toy, calls = ToyLevel(), []

    def loss_on(x, y, name):
        def loss(weights):
            calls.append(name)
            logits = functional_call(toy.supernet, weights, (x, toy.method.mixing()))
            return cross_entropy(logits, y), logits

        return loss

    train = loss_on(toy.train.x_adv, toy.train.y, "train")
    losses = [loss_on(x, toy.valid.y, "valid") for x in (toy.valid.x, toy.valid.x_adv)]
    rest = (
        {"inward": toy.supernet.inward, "outward": toy.supernet.outward},
        list(toy.method.parameters()),
        toy.optimizer,
    )
    together = unrolled_gradients_of_each(train, losses, *rest, radius=0.01)
    assert (calls.count("train"), calls.count("valid")) == (5, 2)
    for found, loss in zip(together, losses):
        alone = unrolled_gradients(train, loss, *rest, radius=0.01)
        assert all(torch.equal(a, b) for a, b in zip(found.gradients, alone.gradients))
        assert torch.equal(found.loss, alone.loss) and torch.equal(found.logits, alone.logits)


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({}, {0: 1, 19: 1, 20: 2, 49: 2}),
        ({"switch_epoch": 3}, {0: 1, 2: 1, 3: 2}),
        ({"switch_epoch": 0}, {0: 2}),
        ({"stages": "one-adversarial"}, {0: 1, 20: 1, 49: 1}),
        ({"stages": "one-both"}, {0: 2, 20: 2}),
    ],
)
def test_the_stage_switches_where_configured(options, stages):
    toy = ToyLevel(**options)
    gradients = {stage: ToyLevel(stages=name).gradients() for stage, name in ((1, "one-adversarial"), (2, "one-both"))}
    assert relative(gradients[1], gradients[2]) > 0.1
    for epoch, stage in stages.items():
        assert relative(toy.gradients(epoch), gradients[stage]) == 0
        assert toy.result.numbers["stage"] == stage


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"order": 3}, "options.order must be one of 1, 2; got 3"),
        ({"stages": "three"}, "options.stages must be one of 'two', 'one-adversarial', 'one-both'; got 'three'"),
        ({"combination": "mean"}, "options.combination must be one of 'min-norm', 'sum'; got 'mean'"),
        ({"radius": 0.0}, "options.radius must be a finite number above 0; got 0.0"),
        ({"adversarial_weight": math.nan}, "options.adversarial_weight must be a finite number above 0; got nan"),
        ({"switch_epoch": -1}, "options.switch_epoch must be at least 0; got -1"),
    ],
)
def test_bad_options_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DsaraOptions(**wrong)


def test_dsara_is_registered():
    assert METHODS["dsara"] is Dsara and options_for("dsara") == DsaraOptions()
