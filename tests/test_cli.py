"""The command line: the same settings from flags, --set and TOML, help that explains, and errors that exit with 2."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from rnas import __version__, cli, flags, genotype
from rnas.config import CompareConfig, EvaluateConfig, SearchConfig, TrainConfig
from rnas.methods import options_for

pytest.importorskip("tyro", reason="the command line needs tyro")

SMALL = ["--nodes", "2", "--channels", "2", "--layers", "3", "--epochs", "1", "--batch-size", "16", "--attack.steps", "1",
         "--device", "cpu"]  # fmt: skip


def config_of(run) -> dict:
    return json.loads((run / "config.json").read_text())["config"]


def test_search_train_evaluate_plot_in_a_row(small_images, tmp_path, capsys):
    data = ["--data.dataset", str(small_images)]
    assert cli.main(["search", *SMALL, *data, "--run", str(tmp_path / "s"), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "genotype: Genotype(normal=[" in out and str(tmp_path / "s" / "cells.svg") in out
    train = [
        "train",
        "--genotype",
        str(tmp_path / "s"),
        "--channels",
        "2",
        "--layers",
        "3",
        "--epochs",
        "1",
        "--attack.steps",
        "1",
    ]
    assert cli.main([*train, *data, "--run", str(tmp_path / "t"), "--device", "cpu"]) == 0
    assert "parameters (without auxiliary head)" in capsys.readouterr().out
    assert cli.main(["evaluate", str(tmp_path / "t"), "--steps", "2", "--device", "cpu"]) == 0
    assert re.search(r"t\s.*pgd-at.*%.*%.*%", capsys.readouterr().out)
    assert cli.main(["plot", "RACL", "--output", str(tmp_path / "racl")]) == 0
    assert (tmp_path / "racl.svg").is_file() and (tmp_path / "racl.png").is_file()


def test_flags_win_over_set_and_set_over_toml(small_images, tmp_path):
    toml = tmp_path / "c.toml"
    toml.write_text('epochs = 1\nseed = 5\nchannels = 2\n[attack]\nepsilon = "1/255"\n[options]\norder = 2\n')
    arguments = ["search", *SMALL, "--data.dataset", str(small_images), "--config", str(toml), "--set", "seed=6", "--set",
                 "attack.step-size=1/510", "--attack.epsilon", "2/255", "--run", str(tmp_path / "r"),
                 "--quiet"]  # fmt: skip
    assert cli.main(arguments) == 0
    config = config_of(tmp_path / "r")
    assert (config["seed"], config["channels"], config["options"]["order"]) == (6, 2, 2)
    assert (config["attack"]["epsilon"], config["attack"]["step_size"]) == (2 / 255, 1 / 510)


@pytest.mark.parametrize("command", ["search", "train", "evaluate", "plot"])
def test_help_explains_every_flag(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "--config" in out and "--set" in out
    for text in {
        "search": ["--options.order", "--attack.epsilon", "--resume", "pixel units"],
        "train": ["--recipe", "Madry"],
    }.get(command, []):
        assert text in out, text


def parsed(words: str, kind=TrainConfig, base=None, **how):
    return flags.parse("job", kind, kind() if base is None else base, words.split(), **how)


def test_flags_become_the_configuration_of_the_dataclass():
    config, resume = parsed("--attack.epsilon 8/255 --epochs 3 --augment.flip --weights.milestones 0.25 1/2")
    assert (config.attack.epsilon, config.epochs, config.weights.milestones) == (8 / 255, 3, (0.25, 0.5))
    assert type(config) is TrainConfig and config.augment.flip and resume == ""
    changed = {name: getattr(config, name) for name in ("attack", "epochs", "augment", "weights")}
    assert config == replace(TrainConfig(), **changed)
    base = SearchConfig(method="dsara", options=options_for("dsara"))
    config, _ = parsed("--options.switch-epoch 7 --set options.order=1", SearchConfig, base)
    assert config == replace(base, options=replace(base.options, switch_epoch=7, order=1))
    config, _ = parsed("runs/a runs/b --steps 1 5", EvaluateConfig, positional="runs")
    assert (config.runs, config.steps) == (("runs/a", "runs/b"), (1, 5))
    assert parsed("--resume runs/a --quiet", resumable=True) == (replace(TrainConfig(), quiet=True), "runs/a")


def test_hidden_fields_have_no_flags_and_keep_their_values(capsys):
    base = CompareConfig(train=TrainConfig(seed=4))
    config, _ = parsed("--train.epochs 2", CompareConfig, base, hidden={"train": ("seed",)})
    assert config == replace(base, train=TrainConfig(seed=4, epochs=2)) and type(config.train) is TrainConfig
    with pytest.raises(SystemExit) as stop:
        parsed("--train.seed 5", CompareConfig, base, hidden={"train": ("seed",)})
    assert stop.value.code == 2 and "--train.seed" in capsys.readouterr().err
    assert parsed("--train.seed 5", CompareConfig, base)[0].train.seed == 5


def test_the_command_line_loads_tyro_only_to_read_flags():
    code = "import sys, rnas.cli; rnas.cli.main(['--version']); print('tyro' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_summary_and_version(capsys):
    assert cli.main([]) == 0 and "a first run:" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.strip() == f"rnas {__version__}"


def test_env_names_versions_and_backends(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "pgd_step" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serach"], "unknown command 'serach'"),
        (["search", "--set", "epoch=3"], "did you mean epochs?"),
        (["search", "--method", "dart"], "did you mean 'darts'"),
        (["search", "--config", "missing.toml"], "no configuration file at missing.toml"),
        (["search", "--resume", "missing"], "missing is no run folder"),
        (["search", "--resume", "missing", "--epochs", "3"], "drop --epochs"),
        (["search", "--device", "cuda:77"], "--device cuda:77: PyTorch sees"),
        (["search", "--set", "attack.epsilon=8/0"], "attack.epsilon must be"),
        (["search", "--set", "method=dart"], "did you mean 'darts'"),
        (["search", "--attack.epsilon", "-1"], "attack.epsilon must be a finite number of at least 0"),
        (["search", "--data.dataset", "mnits"], "mnist"),
        (["train"], "no genotype given"),
        (["train", "--genotype", "RCAL"], "did you mean RACL"),
        (["evaluate"], "no runs given"),
        (["evaluate", "missing"], "missing is no run folder"),
        (["plot"], "no genotype given"),
        (["env", "--all"], "takes no arguments"),
    ],
)
def test_bad_input_exits_with_2_and_one_clear_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert os.listdir(tmp_path) == []


def test_an_unknown_flag_is_refused_with_a_suggestion(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["search", "--epoch", "3"])
    assert stop.value.code == 2 and "--epochs" in capsys.readouterr().err


def test_an_existing_run_folder_is_refused(small_images, tmp_path, capsys):
    (tmp_path / "r").mkdir()
    assert cli.main(["search", *SMALL, "--data.dataset", str(small_images), "--run", str(tmp_path / "r")]) == 2
    assert "exists: resume it with" in capsys.readouterr().err


def test_ctrl_c_leaves_a_resumable_run(small_images, tmp_path):
    run = tmp_path / "r"
    arguments = ["search", *SMALL, "--epochs", "1000", "--data.dataset", str(small_images), "--run", str(run)]
    child = subprocess.Popen(
        [sys.executable, "-m", "rnas.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (run / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130, error
    assert f"Go on with: rnas search --resume {run}" in error and "Traceback" not in error
    epochs = torch.load(run / "checkpoint.pt")["place"]["epoch"]
    config = json.loads((run / "config.json").read_text())
    config["config"]["epochs"] = epochs + 1  # the resumed run need not do all thousand
    (run / "config.json").write_text(json.dumps(config))
    assert cli.main(["search", "--resume", str(run), "--quiet"]) == 0
    assert genotype.load(run).concat == (2, 3)


def test_a_remark_of_the_method_is_printed_after_the_genotype(small_images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures take longer than this search
    arguments = ["--data.dataset", str(small_images), "--run", str(tmp_path / "s"), "--quiet"]
    options = ["--method", "racl", "--options.bound-start", "0.5", "--options.bound-end", "0.5"]
    assert cli.main(["search", *SMALL, *arguments, *options, "--options.first-power-iterations", "20"]) == 0
    out = capsys.readouterr().out
    (remark,) = re.findall(r"^remark: (the constraint of racl does not hold: .*)$", out, flags=re.MULTILINE)
    assert out.index("genotype: ") < out.index("remark: ") < out.index("files:")
    assert (tmp_path / "s" / "remarks.txt").read_text() == remark + "\n"


def test_a_genotype_printed_by_search_can_be_read_back(small_images, tmp_path, capsys):
    assert (
        cli.main(["search", *SMALL, "--data.dataset", str(small_images), "--run", str(tmp_path / "s"), "--quiet"]) == 0
    )
    text = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("genotype: "))
    assert genotype.from_text(text.removeprefix("genotype: ")) == genotype.load(tmp_path / "s")
