"""Search and training end to end on small images: what they write, and that a seed decides every bit."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import final_state

from rnas import evaluate, genotype, search, train
from rnas.config import (
    ArchitectureOptimizerConfig,
    AttackConfig,
    DataConfig,
    EvaluateConfig,
    WeightOptimizerConfig,
)
from rnas.loop import Interrupted, Loop
from rnas.methods import METHODS, SearchPlan
from rnas.methods.advrush import AdvRushOptions
from rnas.methods.dsara import DsaraOptions
from rnas.methods.dsrna import DsrnaOptions
from rnas.runs import Run, load_tensors
from rnas.settings import to_dict


def assert_same_bits(first: dict, second: dict) -> None:
    assert first.keys() == second.keys() and first
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_search_writes_what_it_promises(search_config):
    result = search.search(search_config)
    for path in result.files:
        assert path.is_file() and path.stat().st_size > 0, path
    names = {path.name for path in result.files}
    assert {
        "genotype.json",
        "cells.svg",
        "cells.png",
        "curves.png",
        "checkpoint.pt",
        "metrics.jsonl",
        "config.json",
    } <= names
    assert genotype.load(result.run) == result.genotype
    config = json.loads((result.run / "config.json").read_text())["config"]
    assert config["attack"]["epsilon"] == 8 / 255 and config["options"]["order"] == 1
    records = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    assert set(records[0]["entropy"]) == {"normal", "reduction"} and records[0]["architecture_loss"] > 0


def test_the_search_learns(search_config):
    config = replace(search_config, epochs=12, attack=replace(search_config.attack, epsilon=2 / 255))
    result = search.search(config)
    records = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["weight_accuracy"] > 0.5 > records[0]["weight_accuracy"]
    start = search.build(replace(config, attack=AttackConfig(epsilon=0.1)), search.data.load(config.data))[1]
    moved = final_state(result.run)["/method/alpha.normal"] - start.alpha["normal"]
    assert moved.abs().max() > 1e-3


def test_the_same_seed_gives_the_same_bits_and_another_does_not(search_config, tmp_path):
    torch.manual_seed(1)
    first = search.search(search_config)
    torch.manual_seed(2)  # the caller's generator must not matter
    again = search.search(replace(search_config, run=str(tmp_path / "again")))
    other = search.search(replace(search_config, run=str(tmp_path / "other"), seed=1))
    assert_same_bits(final_state(first.run), final_state(again.run))
    assert not torch.equal(
        final_state(first.run)["/supernet/stem.0.weight"], final_state(other.run)["/supernet/stem.0.weight"]
    )


def test_warm_up_leaves_the_architecture_alone(search_config, monkeypatch):
    """Stopped with its last batch, a search has the architecture parameters that it began with; then they move."""
    config = replace(search_config, epochs=3, warmup_epochs=2)
    with monkeypatch.context() as patch:
        StopAt(patch, 6, signal.SIGTERM)
        with pytest.raises(Interrupted):
            search.search(config)
    fresh = search.build(replace(config, attack=AttackConfig(epsilon=0.1)), search.data.load(config.data))[1]
    for name, alpha in fresh.alpha.items():
        assert torch.equal(final_state(Path(config.run))[f"/method/alpha.{name}"], alpha)
    result = search.resume(config.run, quiet=True)
    for name, alpha in fresh.alpha.items():
        assert not torch.equal(final_state(result.run)[f"/method/alpha.{name}"], alpha)


class StopAt:
    """Makes the loop receive a signal after a given number of batches."""

    def __init__(self, monkeypatch, batches: int, number: int) -> None:
        self.left = batches
        done = Loop.done

        def counted(loop, images, **numbers):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), number)
            return done(loop, images, **numbers)

        monkeypatch.setattr(Loop, "done", counted)


@pytest.mark.parametrize("batches", [1, 3, 4])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_search_resumes_to_the_same_bits(search_config, tmp_path, monkeypatch, batches, number):
    whole = search.search(search_config)
    stopped = replace(search_config, run=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        StopAt(patch, batches, number)
        with pytest.raises(Interrupted):
            search.search(stopped)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    result = search.resume(stopped.run, quiet=True)
    assert_same_bits(final_state(whole.run), final_state(result.run))
    assert result.genotype == whole.genotype
    plain = [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_second")}
             for run in (whole.run, result.run) for line in (run / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert plain[:2] == plain[2:]


def test_resuming_a_finished_search_changes_nothing(search_config):
    result = search.search(search_config)
    before = final_state(result.run)
    again = search.resume(result.run, quiet=True)
    assert again.genotype == result.genotype
    assert_same_bits(before, final_state(result.run))


@pytest.mark.parametrize("validation_images", [0, 16])
def test_a_stopped_training_resumes_to_the_same_bits(train_config, tmp_path, monkeypatch, validation_images):
    config = replace(train_config, validation_images=validation_images, epsilon_warmup_epochs=1)
    whole = train.train(config)
    stopped = replace(config, run=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        StopAt(patch, 7, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train.train(stopped)
    train.resume(stopped.run, quiet=True)
    assert_same_bits(final_state(whole.run), final_state(tmp_path / "stopped"))
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(train.load_network(whole.run)(x), train.load_network(stopped.run)(x))


def test_a_trained_network_is_evaluated(train_config, tmp_path):
    result = train.train(train_config)
    standard = train.train(
        replace(train_config, recipe="standard", genotype="ARNAS", layers=4, run=str(tmp_path / "standard"))
    )
    config = EvaluateConfig(runs=(str(result.run), str(standard.run)), steps=(1, 3), device="cpu", quiet=True)
    table = evaluate.evaluate(config)
    for row in table.rows:
        assert set(row.accuracies) == {"clean", "fgsm", "pgd-1", "pgd-3"}
        assert all(0 <= value <= 1 for value in row.accuracies.values())
        assert row.accuracies["pgd-3"] <= row.accuracies["clean"]
    content = json.loads((result.run / "evaluation.json").read_text())
    assert content["threat"]["epsilon"] == pytest.approx(8 / 255) and content["images"] == 40
    assert content["protocol"]["batch_size"] == 250  # the random starts depend on it
    assert [network["recipe"] for network in content["networks"]] == ["pgd-at", "standard"]
    assert all(path.is_file() for path in table.files)


def test_autoattack_is_a_column_when_asked_for(train_config, monkeypatch):
    result = train.train(train_config)
    config = EvaluateConfig(
        runs=(str(result.run),), steps=(1,), epsilon=0.5, autoattack=True, test_images=8, quiet=True
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchattacks", None)
        with pytest.raises(ImportError, match=r"pip install 'rnas\[evaluation\]'"):
            evaluate.evaluate(config)
    pytest.importorskip("torchattacks", reason="AutoAttack is that of torchattacks")
    before = torch.get_rng_state()
    (row,) = evaluate.evaluate(config).rows
    assert torch.equal(torch.get_rng_state(), before)
    assert row.accuracies["autoattack"] == 0.0  # no network of this size withstands half the pixel range


def test_the_best_weights_on_held_out_images_are_kept(train_config):
    config = replace(train_config, validation_images=16, epochs=3)
    result = train.train(config)
    records = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    best = load_tensors(result.run / "checkpoint.pt")["parts"]["best"]
    scores = [record["robust_accuracy"] for record in records]
    assert best["score"] == max(scores) and best["epoch"] == scores.index(max(scores))
    for name, value in train.load_network(result.run).state_dict().items():
        assert torch.equal(value, best["weights"][name])


@pytest.mark.parametrize(("rate", "epochs"), [(1e30, 2), (1e38, 1)])
def test_what_is_not_finite_never_reaches_a_checkpoint(search_config, rate, epochs):
    """A step that explodes is refused even where its loss was still finite, and at the very last batch too."""
    weights = replace(search_config.weights, learning_rate=rate, grad_clip=0.0)
    config = replace(search_config, weights=weights, epochs=epochs, checkpoint_seconds=0.0)
    with pytest.raises(FloatingPointError, match="Start anew with a smaller learning rate"):
        search.search(config)
    checkpoint = os.path.join(config.run, "checkpoint.pt")
    if os.path.exists(checkpoint):
        assert all(
            value.isfinite().all() for value in final_state(Path(config.run)).values() if value.is_floating_point()
        )


BAD_SEARCHES = {
    "nearest method": ({"method": "dart", "options": None}, "did you mean 'darts'"),
    "foreign options": ({"options": AttackConfig()}, "takes DartsOptions"),
    "space": ({"space": "dats"}, "unknown search space"),
    "layers": ({"layers": 2}, "at least 3 cells"),
    "cell type without a cell": ({"space": "dsara"}, "leaves no cell of type robust"),
    "epochs": ({"epochs": 0}, "epochs must be a finite number of at least 1"),
    "threads": ({"threads": -1}, "threads must be a finite number of at least 0"),
    "learning rate": ({"weights": WeightOptimizerConfig(learning_rate=-1.0)}, "weights.learning_rate must be"),
    "clip": ({"weights": WeightOptimizerConfig(grad_clip=-5.0)}, "weights.grad_clip must be"),
    "betas": ({"architecture": ArchitectureOptimizerConfig(betas=(0.5, 1.0))}, r"architecture.betas must be in"),
    "checkpoint": ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds must be"),
    "forgotten /255": ({"attack": AttackConfig(epsilon=8.0)}, "Did you mean 8/255"),
    "restarts": ({"attack": AttackConfig(restarts=2, random_start=False)}, "needs attack.random_start"),
    "batch": ({"batch_size": 64}, "batch"),
    "epsilon": ({"attack": AttackConfig(epsilon=-1.0)}, "attack.epsilon must be a finite number of at least 0"),
    "steps": ({"attack": AttackConfig(steps=0)}, "attack.steps must be a finite number of at least 1"),
    "device": ({"device": "quantum"}, "unknown device"),
    "missing data": ({"data": DataConfig(dataset="missing.npz")}, "missing.npz"),
    "warm-up": ({"warmup_epochs": 2}, "warmup_epochs=2 of epochs=2: the architecture would never learn; set it below"),
}


@pytest.mark.parametrize("case", BAD_SEARCHES)
def test_a_bad_search_is_refused_before_any_file_is_made(search_config, case):
    changes, message = BAD_SEARCHES[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        search.search(replace(search_config, **changes))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        search.check(replace(search_config, **changes))
    assert not os.path.exists(search_config.run)


NEVER = "of epochs=4: .* would never"
PLANS = {  # options, and the message for a search of 4 epochs, 1 of them warm-up, on 4 classes; "" where it is good
    "curvature too late": (AdvRushOptions(start_epoch=4), f"options.start_epoch=4 {NEVER} count; .*options.gamma=0"),
    "curvature in the last epoch": (AdvRushOptions(start_epoch=3), ""),
    "no curvature": (AdvRushOptions(start_epoch=4, gamma=0.0), ""),
    "no second stage": (DsaraOptions(switch_epoch=4), f"options.switch_epoch=4 {NEVER} begin; .*one-adversarial"),
    "second stage of an epoch": (DsaraOptions(switch_epoch=3), ""),
    "no first stage": (DsaraOptions(switch_epoch=1), "options.switch_epoch=1 after warmup_epochs=1: .*one-both"),
    "first stage of an epoch": (DsaraOptions(switch_epoch=2), ""),
    "one stage": (DsaraOptions(switch_epoch=9, stages="one-both"), ""),
    "R on the weights": (DsrnaOptions(on_weights=True, weight_epoch=4), f"options.weight_epoch=4 {NEVER} count"),
    "R on the weights at last": (DsrnaOptions(on_weights=True, weight_epoch=3), ""),
    "no R on the weights": (DsrnaOptions(on_weights=True, weight_epoch=4, weight_gamma=0.0), ""),
    "rows": (DsrnaOptions(samples=5), "options.samples=5 of 4 classes: .*options.estimator=exact"),
    "rows for the weights": (DsrnaOptions(samples=5, gamma=0, on_weights=True, weight_epoch=0), "options.samples=5"),
    "all rows": (DsrnaOptions(samples=4), ""),
    "directions": (DsrnaOptions(samples=5, estimator="projection"), ""),
    "rows that nothing takes": (DsrnaOptions(samples=5, gamma=0.0), ""),
    "rows beside a certificate": (DsrnaOptions(samples=5, variant="certified"), ""),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_part_of_a_method_that_never_acts_is_refused_before_any_work(search_config, case, monkeypatch):
    options, message = PLANS[case]
    (method,) = (name for name, each in METHODS.items() if isinstance(options, each.Options))
    config = replace(search_config, method=method, options=options, epochs=4, warmup_epochs=1, layers=4)
    config = replace(config, space="dsara" if method == "dsara" else "darts")
    monkeypatch.setattr(search, "_search", lambda config, *parts: "the search begins")
    if not message:
        assert search.search(config) == "the search begins"
        return
    with pytest.raises(ValueError, match=message):
        search.search(config)
    assert not os.path.exists(config.run)


def test_a_certificate_whose_radius_stays_zero_is_refused(search_config):
    config = replace(search_config, method="dsrna", epochs=1, options=DsrnaOptions(variant="combined"))
    with pytest.raises(ValueError, match=r"options\.epsilon_ramp=0\.4 of epochs=1: the radius .* would stay 0"):
        search.search(config)
    for options in (DsrnaOptions(variant="combined", epsilon_ramp=0.0), DsrnaOptions(), DsrnaOptions(epsilon=0.0)):
        METHODS["dsrna"].check(options, SearchPlan(1, 0, 4))


def test_check_resolves_as_the_jobs_do_and_writes_nothing(search_config, train_config, monkeypatch):
    assert search.check(replace(search_config, threads=1)).attack.step_size == 2 / 255
    trained = train.check(train_config)
    assert trained.attack.epsilon == 8 / 255 and trained.threads == torch.get_num_threads()
    config = EvaluateConfig(runs=(train_config.run,), norm="l2", quiet=True)
    found = evaluate.check(config, [trained])
    assert (found.norm, found.epsilon, found.step_size) == ("l2", 0.5, 0.125)
    assert (found.device, found.threads) == ("cuda" if torch.cuda.is_available() else "cpu", torch.get_num_threads())
    assert not os.path.exists(search_config.run) and not os.path.exists(train_config.run)
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        evaluate.check(config)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = search.search(replace(search_config, threads=1, epochs=1))
    saved = json.loads((result.run / "config.json").read_text())["config"]
    assert saved == to_dict(search.check(replace(search_config, threads=1, epochs=1)))  # its folder is there by now
    assert train.check(replace(train_config, genotype=str(result.run))).genotype == str(result.run)
    with pytest.raises(ValueError, match="at least 3 cells"):
        train.check(replace(train_config, genotype="", layers=2), result.genotype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_refused(search_config):
    with pytest.raises(ValueError, match="--device cuda: PyTorch sees 0 CUDA devices here; use --device cpu"):
        search.search(replace(search_config, device="cuda"))


def test_training_is_decided_by_its_seed_and_leaves_the_callers_random_state(train_config, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train.train(train_config)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = train.train(replace(train_config, run=str(tmp_path / "again")))
    assert_same_bits(final_state(first.run), final_state(again.run))


def test_a_last_batch_of_one_image_is_left_out(train_config):
    result = train.train(replace(train_config, validation_images=15, batch_size=20))  # 81 = 4 * 20 + 1 images
    assert (result.run / "model.pt").is_file()


def test_two_processes_cannot_work_on_one_run(search_config):
    result = search.search(search_config)
    run = Run.open(result.run, "search")
    run.log({"written by": "the process that holds the run, after its last checkpoint"})
    before = run.metrics_path.read_bytes()
    with run.locked(), pytest.raises(FileExistsError, match="another process is working on"):
        search.resume(result.run, quiet=True)
    assert run.metrics_path.read_bytes() == before


def test_runs_of_different_data_or_balls_do_not_share_a_table(train_config, tmp_path):
    first = train.train(train_config)
    weaker = train.train(replace(train_config, attack=AttackConfig(epsilon=0.01), run=str(tmp_path / "weaker")))
    config = EvaluateConfig(runs=(str(first.run), str(weaker.run)), steps=(1,), device="cpu", quiet=True)
    with pytest.raises(ValueError, match="say which one with --norm and --epsilon"):
        evaluate.evaluate(config)
    assert len(evaluate.evaluate(replace(config, epsilon=0.01)).rows) == 2
    smaller = replace(train_config.data, test_images=20)
    other = train.train(replace(train_config, data=smaller, run=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="one table needs one test set"):
        evaluate.evaluate(replace(config, runs=(str(first.run), str(other.run))))


@pytest.mark.parametrize("job", ["search", "train"])
def test_a_missing_matplotlib_costs_the_pictures_alone(search_config, train_config, monkeypatch, capsys, job):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = search.search(search_config) if job == "search" else train.train(train_config)
    assert "no pictures: " in capsys.readouterr().out
    assert (result.run / "genotype.json").is_file() and not list(result.run.glob("*.png"))


def test_bad_training_is_refused(train_config):
    for changes, message in (
        ({"genotype": ""}, "no genotype given"),
        ({"genotype": "RACLE"}, "did you mean RACL"),
        ({"drop_path": 1.0}, "drop_path must be"),
        ({"layers": 2}, "at least 3 cells"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight must be"),
        ({"weights": WeightOptimizerConfig(momentum=-1.0)}, "weights.momentum must be"),
        ({"attack": AttackConfig(epsilon=8.0)}, "Did you mean 8/255"),
        ({"validation_images": 96}, "leaves nothing"),
        ({"validation_images": -1}, "at least 0"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train.train(replace(train_config, **changes))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train.check(replace(train_config, **changes))
    assert not os.path.exists(train_config.run)


def test_an_unfinished_or_damaged_network_is_named(train_config):
    result = train.train(train_config)
    (result.run / "model.pt").rename(result.run / "kept.pt")
    with pytest.raises(FileNotFoundError, match="the training has not finished"):
        evaluate.evaluate(EvaluateConfig(runs=(str(result.run),), quiet=True))
    (result.run / "model.pt").write_bytes((result.run / "kept.pt").read_bytes()[:-50])
    with pytest.raises(ValueError, match="cannot be read: truncated"):
        train.load_network(result.run)
    with pytest.raises(ValueError, match="no runs given"):
        evaluate.evaluate(EvaluateConfig(quiet=True))
