"""scripts/certified_epsilon.py: radii between proof and attack, runs that go on, and what the report says."""

from __future__ import annotations

import importlib
import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from certify_problems import give_statistics
from torch import nn

from rnas.certify import certified_epsilon
from rnas.genotype import Genotype
from rnas.network import Network
from rnas.seeding import generator

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
OPTIONS = Namespace(bisection=7, attack_steps=10)


@pytest.fixture
def script(monkeypatch):
    """scripts/certified_epsilon.py as a module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("certified_epsilon")


@pytest.fixture
def report(monkeypatch):
    """scripts/certified_report.py as a module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("certified_report")


def linear_problem(seed: int, norm: str):
    """A linear network, images in the middle of the box, predicted labels, and the exact radius of each image."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
        x = 0.45 + 0.1 * torch.rand(6, 1, 3, 4, dtype=torch.float64)
        network[1].bias.data -= network(x).mean(dim=0)
    with torch.no_grad():
        logits, weight = network(x), network[1].weight
        y = logits.argmax(dim=1)
        radius = torch.tensor(
            [
                min(
                    float((logits[n, k] - logits[n, t]) / (weight[k] - weight[t]).norm(p=1 if norm == "linf" else 2))
                    for t in range(4)
                    if t != k
                )
                for n, k in enumerate(y.tolist())
            ],
            dtype=torch.float64,
        )
    return network.eval(), x, y, radius


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radii_of_linear_networks(script, norm):
    network, x, y, radius = linear_problem(0, norm)
    assert radius.max() < 0.4  # inside the box, so that the formula holds
    scale = {"norm": norm, "smallest": 1e-6, "largest": 0.5}
    found = certified_epsilon(network, None, x, y, **scale, steps=12)
    assert (found <= radius * (1 + 1e-9)).all()
    assert (found * (0.5 / 1e-6) ** 2.0**-12 >= radius * (1 - 1e-9)).all()
    reached = script.attacked_epsilon(network, x, y, **scale, steps=12, pgd_steps=20, generator=generator(0, "test"))
    assert (reached >= radius * (1 - 1e-9)).all()
    # PGD follows the nearest class of the moment, which need not be the one that decides.
    assert (reached / radius).median() <= 1.02 and (reached <= radius * 1.5).all()


def test_logarithmic_bisection_at_its_ends():
    network, x, y, radius = linear_problem(1, "linf")
    least, most = float(radius.min()), float(radius.max())

    def search(labels=y, **more):
        return certified_epsilon(network, None, x, labels, **more)

    assert torch.equal(search(smallest=least / 4, largest=least / 2), torch.full_like(radius, least / 2))
    assert (search(smallest=2 * most, largest=4 * most) == 0).all()
    assert (search((y + 1) % 4, smallest=1e-9, largest=1.0) == 0).all()
    middle = float(radius.median()) * 1.0001
    assert torch.equal(search(smallest=middle, largest=1.0) > 0, radius > middle)
    for smallest in (0.0, -1.0, 1.0, 2.0):
        with pytest.raises(ValueError, match="smallest"):
            search(smallest=smallest, largest=1.0)


def tiny_network(seed: int):
    """A tiny network with statistics of its images, and these."""
    normal, reduction = (("skip_connect", 0), ("sep_conv_3x3", 1)), (("max_pool_3x3", 0), ("dil_conv_3x3", 1))
    genotype = Genotype({"normal": (normal,), "reduction": (reduction,)}, (2,))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Network(genotype, channels=2, layers=3, num_classes=3)
        x = torch.rand(4, 3, 6, 6)
        give_statistics(network, x, network, generator(seed, "statistics"), 0.0)
    with torch.no_grad():
        y = network(x).argmax(dim=1)
    y[0] = (y[0] + 1) % 3  # classified wrong: has no radius
    return network, x, y


def test_certified_radii_lie_below_attacked_ones(script):
    network, x, y = tiny_network(0)
    found = script.measure(network, x, y, OPTIONS)
    assert found["correct"] == 3 and found["broken"] == 0
    for kinds in found["radii"].values():
        assert [len(kinds[kind]) for kind in ("certified", "interval", "attack")] == [3, 3, 3]
        for certified, interval, attack in zip(kinds["certified"], kinds["interval"], kinds["attack"]):
            assert 0 < interval <= certified
            assert attack is None or certified <= attack
        assert any(attack is not None for attack in kinds["attack"])
    assert next(network.parameters()).dtype == torch.float32  # measured on a copy


def test_a_wrong_certificate_is_broken(script, monkeypatch):
    network, x, y, _ = linear_problem(0, "linf")
    exact = {norm: linear_problem(0, norm)[3] for norm in ("linf", "l2")}
    for factor, broken in ((0.999, 0), (1.6, 2 * len(x))):
        wrong = {norm: factor * radius for norm, radius in exact.items()}
        monkeypatch.setattr(script, "certified_epsilon", lambda *_, norm, wrong=wrong, **__: wrong[norm])
        assert script.measure(network, x, y, OPTIONS)["broken"] == broken


def test_a_run_goes_on_and_takes_more_seeds(script, small_images, tmp_path, monkeypatch):
    sizes = {"channels": 2, "search-images": 64, "search-epochs": 2, "search-batch": 32, "certified-images": 2}
    sizes |= {"train-images": 64, "train-epochs": 1, "test-images": 8, "bisection": 2, "attack-steps": 2}
    arguments = ["--dataset", str(small_images), "--run", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    arguments += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    rows = ["--rows", "dsrna-1", "random"]
    script.main([*arguments, *rows, "--seeds", "0"])
    first = json.loads((tmp_path / "out" / "certified.json").read_text())
    assert [(each["row"], each["seed"]) for each in first["networks"]] == [("dsrna-1", 0), ("random", 0)]
    assert "unknown, as one seed has no spread" in (tmp_path / "out" / "table.md").read_text()
    config = json.loads((tmp_path / "run" / "dsrna-1-s0" / "search" / "config.json").read_text())["config"]
    assert config["options"]["variant"] == "certified" and config["options"]["gamma"] == 1.0
    assert config["options"]["certified_images"] == 2

    # What is measured is read; a search that had not come to its result goes on.
    (tmp_path / "run" / "random-s0" / "result.json").unlink()
    monkeypatch.setattr(script.search, "search", lambda config: pytest.fail("searched again"))
    assert script.main([*arguments, *rows, "--seeds", "0", "--report"]) == 0
    assert len(json.loads((tmp_path / "out" / "certified.json").read_text())["networks"]) == 1
    script.main([*arguments, *rows, "--seeds", "0"])
    again = json.loads((tmp_path / "out" / "certified.json").read_text())
    for one, two in zip(first["networks"], again["networks"]):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
        assert all(one["seconds"][stage] == two["seconds"][stage] for stage in ("search", "train"))
    monkeypatch.undo()
    monkeypatch.syspath_prepend(SCRIPTS)
    script.main([*arguments, "--rows", "random", "--seeds", "0", "1"])
    assert len(json.loads((tmp_path / "out" / "certified.json").read_text())["networks"]) == 2
    with pytest.raises(ValueError, match="other settings"):
        script.main([*arguments, "--rows", "random", "--seeds", "0", "--bisection", "3"])


def made_up(row: str, seed: int, factor: float) -> dict:
    radii = {"certified": [1e-3 * factor, 3e-3 * factor], "interval": [1e-4, 3e-4], "attack": [2e-2, None]}
    return {
        "row": row,
        "seed": seed,
        "settings": {},
        "genotype": {"cells": {"normal": [[["skip_connect", 0], ["max_pool_3x3", 1]]]}},
        "parameters": 10,
        "accuracy": 0.9,
        "images": 3,
        "correct": 2,
        "broken": 0,
        "radii": {"linf": radii, "l2": radii},
        "seconds": dict.fromkeys(("search", "train", "certified", "interval", "attack"), 1.0),
    }


def test_summary_and_verdicts(report, tmp_path):
    found = report.summary(made_up("darts", 0, 1.0), "linf")
    assert found["mean"] == pytest.approx(2e-3) and found["median"] == pytest.approx(2e-3)
    assert found["attack"] == math.inf  # the median of one radius and one that the attack did not find
    networks = [made_up("darts", seed, 1 + seed / 10) for seed in range(3)]
    networks += [made_up("above", seed, 2 + seed / 10) for seed in range(3)]
    networks += [made_up("overlaps", seed, 0.9 + seed / 10) for seed in range(3)]
    lines = report.verdicts(report.by_row(networks))
    assert "above above it in every seed (mean 1.91 times); overlaps within the spread" in lines[0]
    assert lines[2].startswith("accuracy against darts") and lines[2].count("within the spread") == 2  # all equal
    assert "1 of 10 comparisons" in lines[-1]
    assert report.radius_text([2e-4, 4e-4]) == "3.00 ± 1.41 (2.00 to 4.00) · 10^-4"
    assert report.radius_text([2e-4, math.inf]) == report.NOT_FOUND
    pytest.importorskip("matplotlib")
    assert report.draw(networks, tmp_path / "radii.png").stat().st_size > 10_000
