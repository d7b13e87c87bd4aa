"""Configurations: TOML, --set and JSON into the dataclasses, and refusals that name the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rnas.config import AttackConfig, SearchConfig, TrainConfig, check_attack, resolve_attack
from rnas.methods import METHODS, options_for
from rnas.settings import load_toml, merge, parse_number, set_value, to_dict


def test_a_resolved_config_survives_json():
    config = SearchConfig(options=options_for("darts"), epochs=7, attack=resolve_attack(AttackConfig(), channels=3))
    again = merge(SearchConfig(options=options_for("darts")), json.loads(json.dumps(to_dict(config))))
    assert again == config


@pytest.mark.parametrize(
    ("channels", "norm", "epsilon"), [(3, "linf", 8 / 255), (1, "linf", 0.3), (3, "l2", 0.5), (1, "l2", 1.5)]
)
def test_open_sizes_take_the_usual_ones(channels, norm, epsilon):
    attack = resolve_attack(AttackConfig(norm=norm), channels)
    assert (attack.epsilon, attack.step_size) == (epsilon, epsilon / 4)
    assert resolve_attack(AttackConfig(norm=norm, epsilon=0.1, step_size=0.05), channels).step_size == 0.05


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.03", 0.03), ("2e-3", 0.002), ("1", 1.0)])
def test_numbers_may_be_fractions(text, value):
    assert parse_number(text) == value
    assert set_value(SearchConfig(), f"attack.epsilon={text}").attack.epsilon == value


def test_set_reaches_every_kind_of_field():
    config = TrainConfig()
    for assignment in (
        "epochs=3", "recipe=standard", "data.download=true", "attack.epsilon=None", "weights.milestones=0.4,0.8", "data.dataset=a=b.npz",
        "augment.crop-padding=4",
    ):  # fmt: skip
        config = set_value(config, assignment)
    assert (config.epochs, config.recipe, config.data.download) == (3, "standard", True)
    assert (config.weights.milestones, config.data.dataset, config.augment.crop_padding) == ((0.4, 0.8), "a=b.npz", 4)
    options = set_value(SearchConfig(options=options_for("darts")), "options.order=2").options
    assert options.order == 2


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epoch=3", "unknown configuration key 'epoch': did you mean epochs?"),
        ("attack.epsilonn=1", "unknown configuration key 'attack.epsilonn': did you mean attack.epsilon?"),
        ("qqqq=1", "known keys: "),
        ("epochs=many", "epochs must be int; got 'many'"),
        ("epochs=1.5", "epochs must be int"),
        ("attack.norm=l3", "attack.norm must be 'linf' or 'l2'; got 'l3'"),
        ("data.download=perhaps", "data.download must be bool"),
        ("attack=3", "attack is a table"),
        ("architecture.betas=0.5", "architecture.betas must be"),
        ("attack.epsilon=1/0", "attack.epsilon must be"),
        ("epochs", "--set takes key=value"),
        ("=3", "--set takes key=value"),
    ],
)
def test_a_bad_assignment_is_explained(assignment, message):
    with pytest.raises(ValueError) as error:
        set_value(SearchConfig(), assignment)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": 8.0},
        {"epsilon": -0.1},
        {"epsilon": float("nan")},
        {"step_size": -1.0},
        {"steps": 0},
        {"restarts": 0},
    ],
)
def test_attacks_that_mean_nothing_are_refused(changes):
    with pytest.raises(ValueError, match=rf"attack\.{next(iter(changes))} (must be|is in pixel units)"):
        check_attack(AttackConfig(**changes))


def test_toml_files_are_read_and_broken_ones_named(tmp_path):
    path = tmp_path / "search.toml"
    path.write_text('epochs = 3\n[attack]\nepsilon = "4/255"\n')
    config = merge(SearchConfig(), load_toml(path))
    assert (config.epochs, config.attack.epsilon) == (3, 4 / 255)
    path.write_text("epochs = \n")
    with pytest.raises(ValueError, match="search.toml is not valid TOML"):
        load_toml(path)
    with pytest.raises(FileNotFoundError, match="no configuration file at"):
        load_toml(tmp_path / "missing.toml")


@pytest.mark.parametrize("seed", [2**53 + 1, 2**62 + 3, 1763675000123456789])
def test_large_seeds_are_not_rounded(seed):
    assert set_value(SearchConfig(), f"seed={seed}").seed == seed
    config = SearchConfig(options=options_for("darts"), seed=seed)
    assert merge(SearchConfig(options=options_for("darts")), json.loads(json.dumps(to_dict(config)))).seed == seed


@pytest.mark.parametrize("value", ["1e400", "nan", "inf", "1.0"])
def test_an_integer_must_be_one(value):
    with pytest.raises(ValueError, match="seed must be int"):
        set_value(SearchConfig(), f"seed={value}")


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"random"}))
def test_every_method_has_a_configuration_whose_keys_exist(method):
    values = load_toml(Path(__file__).resolve().parents[1] / "configs" / f"{method}.toml")
    found = merge(SearchConfig(method=method, options=options_for(method)), values)
    assert found.method == method and found.data.dataset == "cifar10"
