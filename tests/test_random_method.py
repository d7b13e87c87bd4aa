"""Random architectures: uniform, valid and decided by the seed; the job writes one without training anything."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import final_state
from method_checks import problem

from rnas import cli, data, genotype, search
from rnas.methods import Method
from rnas.methods.random import Random, RandomOptions
from rnas.spaces import DARTS, DSARA, CellSpec
from rnas.supernet import MixedCell

SEEDS = 3000


@pytest.fixture
def config(search_config):
    return replace(search_config, method="random", options=RandomOptions())


def draw(space, seed) -> genotype.Genotype:
    return Random(RandomOptions(), space, seed).genotype()


@pytest.fixture(scope="module")
def many() -> list:
    return [draw(DARTS, seed) for seed in range(SEEDS)]


@pytest.mark.parametrize("space", [DARTS, DSARA, replace(DARTS, nodes=2)], ids=lambda s: f"{s.name}-{s.nodes}")
def test_an_architecture_is_valid_and_decided_by_its_seed(space):
    for seed in range(20):
        found = draw(space, seed)
        assert found == draw(space, seed) != draw(space, seed + 1)
        assert genotype.from_dict(found.to_dict()) == found
        assert set(found.cells) == set(space.cell_types) and found.concat == space.concat
        for nodes in found.cells.values():
            assert len(nodes) == space.nodes
            assert all(len({source for _, source in node}) == len(node) == 2 for node in nodes)


def chi_square(counts: Counter, kinds: int) -> float:
    """Standardised: about N(0, 1) where all kinds are equally probable."""
    total = sum(counts.values())
    expected = total / kinds
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    statistic += expected * (kinds - len(counts))
    freedom = kinds - 1
    # Wilson and Hilferty: the cube root of chi-square over its degrees of freedom is close to normal
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def test_inputs_and_operations_are_uniform(many):
    for cell_type in DARTS.cell_types:
        for state in DARTS.concat:
            nodes = [found.cells[cell_type][state - 2] for found in many]
            if state > 2:  # the first node has but one pair of inputs
                pairs = Counter(tuple(source for _, source in node) for node in nodes)
                assert chi_square(pairs, math.comb(state, 2)) < 3.5, (cell_type, state)
            operations = Counter(tuple(op for op, _ in node) for node in nodes)
            assert chi_square(operations, 49) < 3.5, (cell_type, state)
            assert "none" not in {op for pair in operations for op in pair}


def test_nodes_and_cell_types_are_independent(many):
    def joint(*places) -> Counter:
        return Counter(tuple(found.cells[cell_type][j][0][0] for cell_type, j in places) for found in many)

    assert chi_square(joint(("normal", 0), ("normal", 1)), 49) < 3.5
    assert chi_square(joint(("normal", 0), ("reduction", 0)), 49) < 3.5


def test_the_test_of_uniformity_notices_a_bias(many):
    biased = Counter(found.cells["normal"][1][0][0] for found in many)
    assert chi_square(biased, 7) < 3.5
    biased["skip_connect"] += SEEDS // 20
    assert chi_square(biased, 7) > 3.5
    assert chi_square(Counter({"a": SEEDS, "b": SEEDS}), 3) > 3.5  # a kind that never comes


def test_the_supernet_under_its_weights_computes_the_architecture():
    method = Random(RandomOptions(), DARTS, 1).double()
    cell = MixedCell(DARTS, CellSpec("normal", 4, False), (4, 4), False).double().eval()
    s0, s1 = (torch.randn(2, 4, 6, 6, dtype=torch.float64) for _ in range(2))
    found = cell(s0, s1, method.mixing()["normal"])
    states = [cell.preprocess[0](s0), cell.preprocess[1](s1)]
    for state, node in zip(DARTS.concat, method.genotype().cells["normal"]):
        states.append(
            sum(
                cell.mixed[DARTS.edges.index((source, state))].candidates[DARTS.primitives.index(op)](states[source])
                for op, source in node
            )
        )
    torch.testing.assert_close(found, torch.cat(states[2:], dim=1), rtol=1e-10, atol=1e-10)


def test_the_architecture_stays_in_a_search_step(config):
    one = problem(config, dtype=torch.float32)
    before = one.method.genotype()
    optimizer = torch.optim.Adam(one.method.parameters(), lr=1.0, weight_decay=1.0)
    weights = one.supernet.classifier.weight.detach().clone()
    numbers = search.search_step(one.supernet, one.method, one.train, one.valid, one.step, optimizer, grad_clip=5.0)
    assert numbers["architecture_loss"] > 0 and 0 <= numbers["architecture_accuracy"] <= 1
    assert one.method.genotype() == before
    assert not torch.equal(one.supernet.classifier.weight, weights), "the weights learn"


def test_the_job_writes_an_architecture_and_trains_nothing(config, monkeypatch):
    monkeypatch.setattr(search, "search_step", lambda *_, **__: pytest.fail("a random architecture was trained"))
    result = search.search(config)
    assert result.genotype == draw(replace(DARTS, nodes=2), config.seed)
    assert genotype.load(result.run) == result.genotype
    assert all(path.is_file() for path in result.files)
    assert {"genotype.json", "cells.svg", "checkpoint.pt", "config.json"} <= {path.name for path in result.files}
    supernet, _ = search.build(config, data.load(config.data))
    assert torch.equal(final_state(result.run)["/supernet/stem.0.weight"], supernet.stem[0].weight)


def test_resuming_gives_the_same_bits(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no pictures: they take time
    whole = search.search(config)
    before = final_state(whole.run)
    again = search.resume(whole.run, quiet=True)
    after = final_state(whole.run)
    assert again.genotype == whole.genotype
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for name in ("checkpoint.pt", "genotype.json"):  # as after a kill before they were written
        (whole.run / name).unlink()
    assert search.resume(whole.run, quiet=True).genotype == genotype.load(whole.run) == whole.genotype
    other = search.search(replace(config, seed=1, run=str(tmp_path / "other")))
    assert other.genotype != whole.genotype


def test_the_command_line_takes_it(config, capsys):
    arguments = f"search --method random --nodes 2 --channels 2 --layers 3 --run {config.run} --seed 3 --batch-size 16"
    assert cli.main([*arguments.split(), "--set", f"data.dataset={config.data.dataset}", "--device", "cpu"]) == 0
    assert genotype.load(config.run) == draw(replace(DARTS, nodes=2), 3)
    assert "Genotype(normal=" in capsys.readouterr().out


def test_every_other_method_searches():
    assert Method.searches and not Random.searches


# Other probabilities -------------------------------------------------------------------------------------------------


def test_operations_follow_their_probabilities():
    chances = (0.5, 0.0, 0.1, 0.0, 0.25, 0.05, 0.1)
    options = RandomOptions(probabilities=chances)
    found = [Random(options, DARTS, seed).genotype() for seed in range(400)]
    counts = Counter(name for one in found for nodes in one.cells.values() for node in nodes for name, _ in node)
    total = sum(counts.values())
    for name, chance in zip((name for name in DARTS.primitives if name != "none"), chances):
        error = 4.5 * math.sqrt(chance * (1 - chance) / total)
        assert abs(counts[name] / total - chance) <= error, name


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ((0.5, 0.4), "sum to 1; got .*, sum 0.9"),
        ((0.5, 0.6), "sum to 1; got .*, sum 1.1"),
        ((1.5, -0.5), "numbers from 0 to 1"),
        ((math.nan, 1.0), "numbers from 0 to 1"),
        ((0.5, 0.5), "one number for each of the 7 operations max_pool_3x3, .*; got 2"),
    ],
)
def test_a_vector_that_is_no_distribution_is_refused_before_any_work(config, probabilities, message):
    with pytest.raises(ValueError, match=message):
        search.search(replace(config, options=RandomOptions(probabilities=probabilities)))
    assert not Path(config.run).exists()


def test_probabilities_as_a_flag(capsys, tmp_path):
    words = ["search", "--method", "random", "--run", str(tmp_path / "r"), "--options.probabilities", "0.5", "0.4"]
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert "got (0.5, 0.4), sum 0.9" in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "r").exists()
