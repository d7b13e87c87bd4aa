"""DSARA on the supernet: what a step sees and leaves alone, whole searches and their resumption, configurations."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, final_state
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from rnas import attacks, data, search, seeding
from rnas.config import SearchConfig, TrainConfig
from rnas.loop import Interrupted, Loop, learning_rate
from rnas.methods import SearchStep, options_for
from rnas.methods.dsara import Dsara, DsaraOptions
from rnas.methods.method import Batch
from rnas.settings import load_toml, merge
from rnas.spaces import DSARA
from rnas.supernet import Supernet

STAGE_2 = {"stages": "one-both"}


@pytest.fixture
def dsara_config(search_config) -> SearchConfig:
    """A whole search of 2 epochs x 3 batches, the second in stage 2; the fewest cells that hold all three types."""
    return replace(search_config, method="dsara", options=DsaraOptions(switch_epoch=1), space="dsara", layers=4)


@pytest.fixture
def level(dsara_config):
    """A supernet after a weight step, a step's settings, and two batches."""
    dataset = data.load(dsara_config.data)
    supernet, method = search.build(dsara_config, dataset)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9, weight_decay=3e-4)
    attack = replace(dsara_config.attack, epsilon=8 / 255, step_size=2 / 255)
    step = SearchStep(0, 0, attack, optimizer, lambda purpose: seeding.generator(0, purpose))
    batches = data.batches(dataset.train, 16, seed=0, epoch=0)
    train, valid = next(batches), next(batches)
    method.weight_loss(supernet.train(), Batch(*train), step)[0].backward()
    optimizer.step()
    return supernet, optimizer, step, train, valid


def build(supernet, **options) -> Dsara:
    return Dsara(DsaraOptions(**options), replace(DSARA, nodes=2), 0)


@pytest.mark.parametrize("stages", ["one-adversarial", "one-both"])
@pytest.mark.parametrize("order", [1, 2])
def test_the_architecture_step_moves_nothing_but_its_own_gradients(level, order, stages):
    supernet, optimizer, step, train, valid = level
    method = build(supernet, order=order, stages=stages)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in supernet.named_parameters()}
    buffers = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in supernet.named_parameters()}
    modes = [module.training for module in supernet.modules()]
    batches = [
        method.prepare(supernet, *train, step, "weights"),
        method.prepare(supernet, *valid, step, "architecture"),
    ]
    for batch, (x, _) in zip(batches, (train, valid)):
        assert torch.equal(batch.x, x) and 0 < (batch.x_adv - x).abs().max() <= 8 / 255 + 1e-7
    result = method.architecture_step(supernet, *batches, step)
    assert all(torch.equal(before[name], value) for name, value in supernet.state_dict().items())
    for name, p in supernet.named_parameters():
        assert p.requires_grad and torch.equal(p.grad, grads[name])
        assert torch.equal(optimizer.state[p]["momentum_buffer"], buffers[name])
    assert modes == [module.training for module in supernet.modules()]
    assert math.isfinite(result.loss) and 0 <= result.accuracy <= 1
    assert all(alpha.grad.norm() > 0 for alpha in method.parameters())
    assert ("gamma" in result.numbers) == (stages == "one-both")


def test_the_weights_descend_the_cross_entropy_on_pgd_examples(level):
    supernet, _, step, train, _ = level
    method = build(supernet)
    batch = method.prepare(supernet, *train, step, "weights")
    loss, logits = method.weight_loss(supernet, batch, step)
    expected = supernet(batch.x_adv, {name: w.detach() for name, w in method.mixing().items()})
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, cross_entropy(expected, train[1]))
    loss.backward()
    assert all(alpha.grad is None for alpha in method.parameters())


def test_both_gradients_of_the_supernet_equal_finite_differences(level):
    supernet, optimizer, step, train, valid = level
    # tiny steps on both sides: ReLU and max pooling make the gradient jump within larger ones
    method = build(supernet, radius=1e-8, **STAGE_2)
    batches = [
        Batch(batch.x.double(), batch.y, batch.x_adv.double())
        for batch in (method.prepare(supernet, *pair, step, "weights") for pair in (train, valid))
    ]
    state = [optimizer.state[p]["momentum_buffer"].double() for p in supernet.parameters()]
    supernet, method = supernet.double(), method.double()
    for p, buffer in zip(supernet.parameters(), state):
        optimizer.state[p]["momentum_buffer"] = buffer
    found = method.objectives(supernet, *batches, step)

    def objective(x) -> float:
        with attacks.frozen(supernet, statistics="batch"), torch.enable_grad():
            weights = {name: p.detach().requires_grad_() for name, p in supernet.named_parameters()}
            logits = functional_call(supernet, weights, (batches[0].x_adv, method.mixing()))
            gradients = torch.autograd.grad(cross_entropy(logits, batches[0].y), list(weights.values()))
            moved = {
                name: w - 0.05 * (0.9 * buffer + g + 3e-4 * w)
                for (name, w), g, buffer in zip(weights.items(), gradients, state)
            }
            return cross_entropy(functional_call(supernet, moved, (x, method.mixing())), batches[1].y).item()

    for index, cell_type, row, column in ((0, "accurate", 0, 3), (1, "reduction", 3, 5), (2, "robust", 1, 4)):
        alpha, h = method.alpha[cell_type], 1e-7
        for name, x in (("natural", batches[1].x), ("adversarial", batches[1].x_adv)):
            with torch.no_grad():
                alpha[row, column] += h
                above = objective(x)
                alpha[row, column] -= 2 * h
                below = objective(x)
                alpha[row, column] += h
            assert float(found[name].gradients[index][row, column]) == pytest.approx(
                (above - below) / (2 * h), rel=1e-3
            )


def test_the_supernet_has_the_published_widths():
    supernet = Supernet(DSARA, channels=24, layers=8, num_classes=10)
    assert supernet.cell_types == ["accurate"] * 2 + ["reduction"] + ["accurate"] * 2 + ["reduction"] + ["robust"] * 2
    mixing = Dsara(DsaraOptions(), DSARA, 0).mixing()
    assert {name: tuple(w.shape) for name, w in mixing.items()} == dict.fromkeys(DSARA.cell_types, (14, 7))
    seen = []
    for cell in supernet.cells:
        cell.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    with torch.no_grad():
        assert supernet.eval()(torch.rand(2, 3, 16, 16), mixing).shape == (2, 10)
    assert seen == [(2, 96, 16, 16)] * 2 + [(2, 192, 8, 8)] * 3 + [(2, 192, 4, 4)] * 3


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_search_goes_through_both_stages(dsara_config):
    result = search.search(dsara_config)
    first, second = records(result.run)
    assert (first["stage"], second["stage"]) == (1, 2)
    assert "gamma" not in first and "natural_loss" not in first and 0 <= second["gamma"] <= 1
    for record in (first, second):
        assert record["adversarial_loss"] > 0 and 0 <= record["adversarial_accuracy"] <= 1
    assert second["natural_loss"] > 0 and set(second["entropy"]) == {"accurate", "reduction", "robust"}
    assert set(result.genotype.cells) == {"accurate", "reduction", "robust"}
    config = json.loads((result.run / "config.json").read_text())["config"]
    assert config["options"]["switch_epoch"] == 1 and config["options"]["adversarial_weight"] == 0.1


def test_a_search_stopped_in_either_stage_resumes_to_the_same_bits(dsara_config, tmp_path, monkeypatch):
    def stop_after(batches):
        left, done = [batches], Loop.done

        def counted(loop, images, **numbers):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return done(loop, images, **numbers)

        return counted

    whole = search.search(dsara_config)
    timing = ("seconds", "images_per_second")
    plain = [{k: v for k, v in record.items() if k not in timing} for record in records(whole.run)]
    for batches in (2, 3, 4):
        stopped = replace(dsara_config, run=str(tmp_path / f"stopped-{batches}"))
        with monkeypatch.context() as patch:
            patch.setattr(Loop, "done", stop_after(batches))
            with pytest.raises(Interrupted):
                search.search(stopped)
        result = search.resume(stopped.run, quiet=True)
        expected, found = final_state(whole.run), final_state(result.run)
        assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
        assert [{k: v for k, v in record.items() if k not in timing} for record in records(result.run)] == plain


def test_another_space_is_refused_before_any_work(dsara_config, monkeypatch):
    monkeypatch.setattr(data, "load", lambda config: pytest.fail("the data were loaded first"))
    with pytest.raises(ValueError, match="method 'dsara' searches the space dsara; got 'darts'"):
        search.search(replace(dsara_config, space="darts"))
    assert not Path(dsara_config.run).exists()


def test_the_shipped_configurations_say_the_published_settings():
    config = merge(
        SearchConfig(method="dsara", options=options_for("dsara")), load_toml(REPOSITORY / "configs" / "dsara.toml")
    )
    assert (config.method, config.space, config.options) == ("dsara", "dsara", DsaraOptions())
    assert (config.channels, config.layers, config.epochs, config.batch_size) == (24, 8, 50, 32)
    assert (config.attack.epsilon, config.attack.step_size, config.attack.steps) == (8 / 255, 2 / 255, 7)
    assert learning_rate(config.weights, 0, 50) == 0.025 and config.weights.learning_rate_min == 0.001
    assert (config.architecture.learning_rate, config.architecture.weight_decay) == (3e-4, 1e-3)
    train = merge(TrainConfig(), load_toml(REPOSITORY / "configs" / "dsara_train.toml"))
    rates = [learning_rate(train.weights, epoch, train.epochs) for epoch in (0, 99, 100, 149, 150, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001]) and train.epochs == 200
    assert (train.channels, train.layers, train.augment.cutout, train.weights.weight_decay) == (64, 20, 16, 1e-4)
    assert (train.attack.epsilon, train.attack.step_size, train.attack.steps) == (8 / 255, 0.01, 7)
    assert train.auxiliary_weight > 0 and train.validation_images > 0
