"""A comparison end to end: its numbers are those of the single jobs, and no interruption changes any but the times."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rnas import cli, compare, compare_plan, compare_table, evaluate, flags, genotype, plot, search, train
from rnas.compare_plan import Cell
from rnas.compare_table import Spread, chance_of_separation, make_table, sentences, verdict
from rnas.config import AttackConfig, CompareConfig, DataConfig, EvaluateConfig, SearchConfig, TrainConfig
from rnas.loop import Interrupted, Loop
from rnas.methods import METHODS
from rnas.network import count_parameters
from rnas.runs import Run

TIMES = ("seconds", "search_seconds", "train_seconds", "evaluate_seconds", "wall_seconds")
FILES = ("compare.json", "table.md", "clean_vs_robust.svg", "clean_vs_robust.png")


@pytest.fixture(autouse=True)
def no_pictures_of_single_runs(monkeypatch):
    """They take longer than the jobs themselves here, and other tests draw them."""
    monkeypatch.setattr(plot, "draw_cells", lambda *arguments: [])
    monkeypatch.setattr(plot, "draw_curves", lambda records, path: path)
    monkeypatch.setattr(plot, "draw_comparison", lambda rows, path: path)


@pytest.fixture
def config(small_images, tmp_path) -> CompareConfig:
    return tiny(small_images, tmp_path / "compare")


def tiny(small_images: Path, run: Path) -> CompareConfig:
    """rnas, and the references that are added, with 2 seeds; searches and trainings of 2 epochs."""
    images, attack = DataConfig(dataset=str(small_images)), AttackConfig(steps=1)
    return CompareConfig(
        methods=("rnas",),
        seeds=(0, 1),
        run=str(run),
        device="cpu",
        threads=1,
        quiet=True,
        search=SearchConfig(nodes=2, channels=2, layers=3, epochs=2, batch_size=16, data=images, attack=attack),
        train=TrainConfig(channels=2, layers=3, epochs=2, batch_size=32, data=images, attack=attack),
        evaluate=EvaluateConfig(steps=(2,)),
    )


@pytest.fixture(scope="module")
def whole(small_images, tmp_path_factory) -> compare.CompareResult:
    with pytest.MonkeyPatch.context() as patch:
        no_pictures_of_single_runs.__wrapped__(patch)
        return compare.compare(tiny(small_images, tmp_path_factory.mktemp("whole") / "compare"))


def content(run: Path) -> dict:
    return json.loads((run / "compare.json").read_text())


def without_times(value):
    """The results without what a clock measured, and without the name of the folder."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in (*TIMES, "sessions", "run")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def table_without_times(run: Path) -> list[list[str]]:
    lines = [line for line in (run / "table.md").read_text().splitlines() if line.startswith("|")]
    return [[cell for i, cell in enumerate(line.strip("|").split("|")) if i != 4] for line in lines]


def assert_same_results(run: Path, whole: compare.CompareResult) -> None:
    assert without_times(content(run)) == without_times(content(whole.run))
    assert table_without_times(run) == table_without_times(whole.run)
    for ending in (".svg", ".png"):
        assert (run / f"clean_vs_robust{ending}").read_bytes() == (whole.run / f"clean_vs_robust{ending}").read_bytes()


def test_everything_promised_is_written_and_names_all_methods(whole):
    assert {path.name for path in whole.files} >= set(FILES)
    for path in whole.files:
        assert path.is_file() and path.stat().st_size > 0, path
    assert (whole.run / "clean_vs_robust.png").read_bytes().startswith(b"\x89PNG")
    table = (whole.run / "table.md").read_text()
    for text in (table, (whole.run / "clean_vs_robust.svg").read_text(), (whole.run / "compare.json").read_text()):
        assert all(method in text for method in ("rnas", "darts", "random"))
    assert "1 thread, device cpu; rnas 0.1.0, Python" in table and "darts and random were added" in table
    assert [row.method for row in whole.table.rows] == ["rnas", "darts", "random"]
    points = re.findall(r'id="(\w+)-mean"', (whole.run / "clean_vs_robust.svg").read_text())
    assert points == ["rnas", "darts", "random"]


def test_a_network_has_the_numbers_of_the_single_jobs(whole, small_images, tmp_path):
    """The same three jobs by hand, for one network that is neither the first nor the last."""
    images, attack = DataConfig(dataset=str(small_images)), AttackConfig(steps=1)
    found = search.search(
        SearchConfig(method="darts", nodes=2, channels=2, layers=3, epochs=2, batch_size=16, data=images, attack=attack,
                     seed=1, run=str(tmp_path / "s"), device="cpu", threads=1, quiet=True)
    )  # fmt: skip
    trained = train.train(
        TrainConfig(genotype=str(tmp_path / "s"), channels=2, layers=3, epochs=2, batch_size=32, data=images,
                    attack=attack, seed=1, run=str(tmp_path / "t"), device="cpu", threads=1, quiet=True)
    )  # fmt: skip
    (row,) = evaluate.evaluate(EvaluateConfig(runs=(str(tmp_path / "t"),), steps=(2,), device="cpu", quiet=True)).rows
    (network,) = [each for each in content(whole.run)["networks"] if (each["method"], each["seed"]) == ("darts", 1)]
    assert genotype.from_dict(network["genotype"]) == found.genotype
    assert network["accuracies"] == row.accuracies
    assert network["parameters"] == count_parameters(trained.network)


def test_the_table_is_the_mean_and_spread_of_its_networks(whole):
    networks = content(whole.run)["networks"]
    assert len(networks) == 6
    for row in content(whole.run)["rows"]:
        own = [network for network in networks if network["method"] == row["method"]]
        assert [network["seed"] for network in own] == [0, 1]
        for column in ("clean", "fgsm", "pgd-2"):
            first, second = (network["accuracies"][column] for network in own)
            spread = row["accuracies"][column]
            assert spread["mean"] == pytest.approx((first + second) / 2, abs=1e-12)
            assert spread["std"] == pytest.approx(abs(first - second) / math.sqrt(2), abs=1e-12)
            assert (spread["least"], spread["most"]) == (min(first, second), max(first, second))
        for name in ("search_seconds", "parameters"):
            assert row[name]["mean"] == pytest.approx(statistics.fmean(network[name] for network in own))
    searched = {network["method"]: network["search_seconds"] for network in networks}
    assert searched["random"] == 0 and searched["darts"] > 0
    records = Run.open(whole.run / "search-darts-s1", "search").read_metrics()
    assert searched["darts"] == pytest.approx(sum(record["seconds"] for record in records), abs=2e-3)


def network(method: str, robust: float, clean: float = 0.9) -> dict:
    accuracies = {"clean": clean, "pgd-20": robust}
    return {"method": method, "space": "darts", "accuracies": accuracies, "search_seconds": 2.0, "parameters": 1000}


def test_statistics_and_sentences_against_numbers_worked_out_by_hand():
    spread = Spread.of([0.5, 0.7, 0.9])
    assert (spread.mean, spread.least, spread.most) == (pytest.approx(0.7), 0.5, 0.9)
    assert spread.std == pytest.approx(0.2)  # sqrt((0.04 + 0 + 0.04) / 2); with n in the denominator 0.163
    values = {
        "rnas": (0.50, 0.56),
        "racl": (0.60, 0.70),
        "darts": (0.52, 0.58),
        "random": (0.40, 0.50),
        "low": (0.1, 0.2),
    }
    table = make_table([network(name, value) for name, pair in values.items() for value in pair], ("darts", "random"))
    assert table.against["pgd-20"]["darts"] == {
        "rnas": "within the spread", "racl": "above", "random": "below", "low": "below"
    }  # fmt: skip
    assert table.against["pgd-20"]["random"]["rnas"] == "within the spread"  # the ranges touch at 0.50
    assert table.against["pgd-20"]["random"]["darts"] == "above"
    assert set(table.against["clean"]["darts"].values()) == {"within the spread"}
    text = " ".join(sentences(table))
    assert "pgd-20 against darts: rnas within the spread, so no difference is shown; racl above it in every seed; random, low below it in every seed." in text  # fmt: skip
    head, lines = compare_table.cells(table)
    assert head == ["method", "clean, %", "pgd-20, %", "search, s", "parameters"]
    assert lines[1] == ["racl", "90.0", "65.0 ± 7.1 (60.0 to 70.0)", "2.0", "1,000"]


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_the_chance_of_separated_ranges_counts_all_orders(seeds):
    splits = list(itertools.combinations(range(2 * seeds), seeds))
    separated = 0
    for first in splits:
        second = [rank for rank in range(2 * seeds) if rank not in first]
        separated += verdict(Spread.of(first), Spread.of(second)) != "within the spread"
    assert len(splits) / separated == chance_of_separation(seeds)


def test_one_seed_shows_no_difference():
    table = make_table([network("rnas", 0.9), network("darts", 0.1), network("random", 0.2)], ("darts", "random"))
    assert table.against["pgd-20"]["darts"] == {"rnas": "unknown", "random": "unknown"}
    assert table.rows[0].accuracies["clean"].std is None
    assert sentences(table) == ["One seed has no spread: no difference in this table is shown to be more than chance."]


def stop_at_batch(monkeypatch, job: str, folder: str, batch: int, number: int) -> None:
    """Send the signal during that batch of that run."""
    done, left = Loop.done, [batch]

    def counted(loop, images, **numbers):
        if (loop.run.job, loop.run.path.name) == (job, folder):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
        return done(loop, images, **numbers)

    monkeypatch.setattr(Loop, "done", counted)


def stop_after_the_last_batch(monkeypatch, folder: str, number: int) -> None:
    end_epoch = Loop.end_epoch

    def interrupted(loop, **extra):
        if loop.run.path.name == folder and loop.epoch == loop.total_epochs - 1:
            os.kill(os.getpid(), number)
        return end_epoch(loop, **extra)

    monkeypatch.setattr(Loop, "end_epoch", interrupted)


def stop_at_evaluation(monkeypatch, folder: str, number: int) -> None:
    table = evaluate.accuracy_table

    def interrupted(*arguments, title, **named):
        if title == folder:
            os.kill(os.getpid(), number)
        return table(*arguments, title=title, **named)

    monkeypatch.setattr(evaluate, "accuracy_table", interrupted)


def test_interrupted_in_every_stage_it_resumes_to_the_same_table(config, whole, monkeypatch):
    """Five interruptions of one comparison; no finished stage is done again."""
    kept = {}

    def interrupted(work) -> None:
        with pytest.raises(Interrupted) as stop:
            work()
        assert stop.value.run == config.run and not (Path(config.run) / "compare.json").exists()
        for path in Path(config.run).glob("*/model.pt"):
            assert kept.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_after_the_last_batch(patch, "search-rnas-s0", signal.SIGTERM)
        interrupted(lambda: compare.compare(config))
    assert (Path(config.run) / "search-rnas-s0" / "genotype.json").is_file()
    assert not (Path(config.run) / "train-rnas-s0").exists()  # the stop was not forgotten
    with monkeypatch.context() as patch:
        stop_at_batch(patch, "search", "search-darts-s0", 5, signal.SIGINT)
        interrupted(lambda: compare.resume(config.run, quiet=True))
    with monkeypatch.context() as patch:
        stop_at_batch(patch, "train", "train-random-s0", 2, signal.SIGTERM)
        interrupted(lambda: compare.resume(config.run, quiet=True))
    for number in (signal.SIGTERM, signal.SIGINT):
        with monkeypatch.context() as patch:
            stop_at_evaluation(patch, "train-rnas-s1", number)
            interrupted(lambda: compare.resume(config.run, quiet=True))
    assert signal.getsignal(signal.SIGTERM) is before
    result = compare.resume(config.run, quiet=True)
    assert len(kept) == 4
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert_same_results(result.run, whole)
    assert len(content(result.run)["sessions"]) == 6


@pytest.mark.parametrize("moment", ["search", "train", "evaluate", "between", "end"])
def test_killed_at_any_moment_it_resumes_to_the_same_table(whole, tmp_path, moment):
    """What SIGKILL leaves: a journal that ends with half a line, and the runs of that moment."""
    run = tmp_path / "killed"
    shutil.copytree(whole.run, run)
    for name in FILES:
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    cell = {"method": "random", "seed": 1}  # the last network
    starts = [i for i, each in enumerate(records) if each["kind"] == "start" and cell.items() <= each.items()]
    search_start, train_start, evaluate_start = starts
    kept = {"search": search_start, "train": train_start, "evaluate": evaluate_start, "between": search_start - 1}
    keep = kept.get(moment, len(lines) - 1)
    half = lines[keep + 1][:25] if keep + 1 < len(lines) else ""
    (run / "metrics.jsonl").write_text("\n".join(lines[: keep + 1]) + "\n" + half)
    if moment in ("search", "between"):
        shutil.rmtree(run / "train-random-s1")
        shutil.rmtree(run / "search-random-s1")
    if moment == "train":  # before its first checkpoint
        for name in ("checkpoint.pt", "model.pt"):
            (run / "train-random-s1" / name).unlink()
    result = compare.resume(run, quiet=True)
    assert_same_results(run, whole)
    assert len(result.files) == len(whole.files)
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())


def test_the_time_of_an_interrupted_epoch_counts(config, monkeypatch):
    """Every batch takes 0.1 s at least; 3 batches in each of 2 epochs, interrupted in both."""
    done = Loop.done

    def slow(loop, images, **numbers):
        time.sleep(0.1 * (loop.run.job == "search"))
        return done(loop, images, **numbers)

    monkeypatch.setattr(Loop, "done", slow)
    config = replace(config, methods=("darts", "random"), seeds=(0,))
    began = time.monotonic()
    for work in (lambda: compare.compare(config), lambda: compare.resume(config.run, quiet=True)):
        with monkeypatch.context() as patch:
            stop_at_batch(patch, "search", "search-darts-s0", 2, signal.SIGINT)
            with pytest.raises(Interrupted):
                work()
    result = compare.resume(config.run, quiet=True)
    elapsed = time.monotonic() - began
    recorded = sum(record["seconds"] for record in Run.open(result.run / "search-darts-s0", "search").read_metrics())
    (found,) = [each for each in content(result.run)["networks"] if each["method"] == "darts"]
    # two batches of the first epoch and one of the second were done by processes that finished neither
    assert 0.6 <= found["search_seconds"] <= elapsed
    assert found["search_seconds"] == pytest.approx(recorded, abs=2e-3)


def test_a_remark_of_a_search_stands_below_the_table(config, monkeypatch):
    monkeypatch.setattr(METHODS["rnas"], "remarks", lambda method: ["something does not hold"])
    short = {part: replace(getattr(config, part), epochs=1) for part in ("search", "train")}
    result = compare.compare(replace(config, seeds=(1,), **short))
    assert "rnas, seed 1: something does not hold." in result.notes
    assert sum("does not hold" in note for note in result.notes) == 1
    assert [each["remarks"] for each in content(result.run)["networks"]] == [["something does not hold"], [], []]


def test_references_are_added_once_and_an_empty_list_means_all(config):
    assert compare_plan.all_methods(config) == ("rnas", "darts", "random")
    assert compare_plan.all_methods(replace(config, methods=("random", "rnas"))) == ("random", "rnas", "darts")
    everything = replace(config, methods=())
    assert compare_plan.all_methods(everything) == tuple(METHODS) and not compare_plan.added_methods(everything)


def test_every_method_gets_the_budget_its_own_space_and_its_overrides(config):
    config = replace(
        config, methods=("dsara", "rnas"), overrides=("dsara.options.order=1", "rnas.architecture.betas=[0.1, 0.2]")
    )
    dsara, rnas = (compare_plan.search_config(config, Cell(method, 1)) for method in config.methods)
    assert (dsara.space, rnas.space) == ("dsara", "darts")
    assert dsara.options.order == 1 and dsara.options.switch_epoch == 20
    assert rnas.architecture.betas == (0.1, 0.2) and dsara.architecture.betas == (0.5, 0.999)
    for name in (*compare_plan.BUDGET, "channels", "layers", "attack", "weights"):
        assert getattr(dsara, name) == getattr(rnas, name) == getattr(config.search, name)
    assert compare_plan.used_overrides(replace(config, methods=("rnas",))) == config.overrides[1:]
    assert dsara.seed == 1 and dsara.run == str(Path(config.run) / "search-dsara-s1")


BAD = {
    "method": ({"methods": ("rnas", "dart")}, "did you mean 'darts'"),
    "method twice": ({"methods": ("rnas", "rnas")}, "methods must differ"),
    "seed twice": ({"seeds": (1, 1)}, "seeds must differ"),
    "no seed": ({"seeds": ()}, "no seeds given"),
    "threads": ({"threads": -1}, "threads must be"),
    "space of the method": ({"overrides": ("rnas.space=dsara",)}, "search of rnas: .*no cell of type robust"),
    "space it cannot search": ({"methods": ("dsara",), "overrides": ("dsara.space=darts",)}, "searches the space dsara"),
    "override form": ({"overrides": ("rnas.options.weight",)}, "METHOD.KEY=VALUE"),
    "override method": ({"overrides": ("racle.options.weight=1",)}, "unknown search method 'racle'"),
    "override key": ({"overrides": ("rnas.options.wieght=1",)}, "did you mean options.weight"),
    "override value": ({"overrides": ("rnas.options.weight=x",)}, "options.weight must be float"),
    "override range": ({"overrides": ("rnas.options.weight=-1",)}, "options.weight must be a finite number"),
    "override of the budget": ({"overrides": ("rnas.epochs=9",)}, "the budget is the same for all"),
    "override of the data": ({"overrides": ("rnas.data.train_images=9",)}, "the budget is the same for all"),
    "override of the seed": ({"overrides": ("rnas.seed=9",)}, "the comparison itself decides 'seed'"),
    "channels": ({"methods": ("pcdarts",)}, "search of pcdarts: "),
    "a curvature that never counts": ({"overrides": ("advrush.options.start_epoch=2",), "methods": ("advrush",)},
                                      "search of advrush: options.start_epoch=2 of epochs=2"),
    "a stage that never begins": ({"methods": ("dsara",), "search": SearchConfig(epochs=2, batch_size=16, layers=4)},
                                  "search of dsara: options.switch_epoch=20 of epochs=2"),
    "warm-up": ({"overrides": ("rnas.warmup_epochs=2",)}, "search of rnas: warmup_epochs=2 of epochs=2"),
    "search seed": ({"search": SearchConfig(seed=1)}, "search.seed has no place in a comparison: list the seeds"),
    "genotype": ({"train": TrainConfig(genotype="RACL")}, "train.genotype has no place"),
    "search": ({"search": SearchConfig(epochs=0)}, "epochs must be"),
    "train": ({"train": TrainConfig(drop_path=2.0)}, "train of .*: drop_path must be"),
    "layers": ({"train": TrainConfig(layers=2)}, "at least 3 cells"),
    "steps": ({"evaluate": EvaluateConfig(steps=())}, "evaluate of .*: steps must name"),
    "restarts": ({"evaluate": EvaluateConfig(restarts=0)}, "evaluate of .*: restarts must be"),
    "epsilon": ({"evaluate": EvaluateConfig(epsilon=8.0)}, "Did you mean 8/255"),
    "test images": ({"evaluate": EvaluateConfig(test_images=10_000)}, "10000|10,000"),
    "device": ({"device": "quantum"}, "unknown device"),
    "data": ({"train": TrainConfig(data=DataConfig(dataset="missing.npz"))}, "missing.npz"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_comparison_is_refused_before_any_work(config, monkeypatch, case):
    changes, message = BAD[case]
    small = {"data": config.search.data} if case != "data" else {}
    changes = {
        name: replace(value, **small) if name in ("search", "train") else value for name, value in changes.items()
    }
    for job in (search, train):
        monkeypatch.setattr(job, job.__name__.rpartition(".")[2], lambda config: pytest.fail("work was done"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare.compare(replace(config, **changes))
    assert not os.path.exists(config.run)


def test_the_plan_uses_nothing_private_of_the_jobs():
    source = Path(compare_plan.__file__).read_text()
    assert not re.findall(r"\b(?:search|train|evaluate)\._\w+", source)


def test_an_existing_folder_is_refused_and_a_foreign_one_is_not_resumed(config, tmp_path):
    Path(config.run).mkdir()
    with pytest.raises(FileExistsError, match="resume it with `rnas compare --resume"):
        compare.compare(config)
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        compare.resume(config.run)


def test_two_processes_cannot_work_on_one_comparison(whole):
    with Run.open(whole.run, "compare").locked(), pytest.raises(FileExistsError, match="another process"):
        compare.resume(whole.run, quiet=True)


def test_resuming_a_finished_comparison_changes_no_number(whole, tmp_path):
    run = tmp_path / "moved"
    shutil.copytree(whole.run, run)
    compare.resume(run, quiet=True)
    assert content(run)["networks"] == content(whole.run)["networks"]


def test_the_command_from_toml_to_the_resumed_table(config, whole, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tyro", reason="the command line needs tyro")
    monkeypatch.setattr("random.random", lambda: 0.0)  # tyro now checks its cache in every call, not in one of ten
    monkeypatch.chdir(tmp_path)
    toml = tmp_path / "c.toml"
    data = f'[{{part}}.data]\ndataset = "{config.search.data.dataset}"\n[{{part}}.attack]\nsteps = 1\n'
    toml.write_text(
        'methods = ["rnas"]\nseeds = [0, 1, 2]\n[search]\nnodes = 2\nchannels = 2\nlayers = 3\nepochs = 2\n'
        "batch_size = 16\n[overrides.rnas.options]\nweight = 1.0\n[train]\nchannels = 2\nlayers = 3\nepochs = 2\n"
        "batch_size = 32\n" + data.format(part="search") + data.format(part="train")
    )
    arguments = ["compare", "--config", str(toml), "--seeds", "0", "1", "--set", "evaluate.steps=2", "--threads", "1",
                 "--device", "cpu", "--run", config.run]  # fmt: skip
    with monkeypatch.context() as patch:
        stop_at_evaluation(patch, "train-rnas-s0", signal.SIGTERM)
        assert cli.main(arguments) == 130
    error = capsys.readouterr().err
    assert f"Go on with: rnas compare --resume {config.run}" in error and "Traceback" not in error
    assert "6 networks: rnas, darts, random; seeds 0, 1" in error and "darts and random were added" in error
    stages = re.findall(r"^compare: (\d+)/18  (.*?)  0:00:\d\d so far", error, flags=re.MULTILINE)
    assert stages == [("1", "search rnas, seed 0"), ("2", "train rnas, seed 0"), ("3", "evaluate rnas, seed 0")]
    assert json.loads((Path(config.run) / "config.json").read_text())["config"]["overrides"] == [
        "rnas.options.weight=1.0"
    ]
    assert cli.main(["compare", "--resume", config.run, "--search.epochs", "3"]) == 2
    assert "drop --search.epochs" in capsys.readouterr().err
    assert cli.main(["compare", "--resume", config.run]) == 0
    out, error = capsys.readouterr()
    assert re.search(r"compare: 18/18  evaluate random, seed 1  0:0\d:\d\d so far, about 0:00:\d\d left", error)
    assert "| rnas |" in out and f"Command: `rnas compare --config {toml} --seeds 0 1" in out
    assert str(Path(config.run) / "table.md") in out
    assert table_without_times(Path(config.run)) == table_without_times(whole.run)
    assert cli.main(arguments) == 2 and "exists: resume it with" in capsys.readouterr().err


def test_help_explains_the_shared_settings_and_hides_what_the_comparison_decides(capsys):
    pytest.importorskip("tyro", reason="the command line needs tyro")
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--help"])
    assert stop.value.code == 0
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for flag in (
        "--methods",
        "--seeds",
        "--overrides",
        "--search.epochs",
        "--train.recipe",
        "--evaluate.steps",
        "--resume",
    ):
        assert flag in out, flag
    for flag in ("--search.seed", "--search.options", "--train.genotype", "--evaluate.runs", "--train.run"):
        assert flag not in out, flag


def test_the_configuration_for_mnist_names_methods_that_exist(tmp_path):
    """Every method that is registered is compared, and the whole plan passes its checks."""
    from conftest import REPOSITORY

    from rnas.settings import load_toml, merge

    values = flags.flat_overrides(load_toml(REPOSITORY / "configs" / "compare_mnist.toml"))
    assert set(METHODS) <= set(values["methods"])
    values["methods"] = [name for name in values["methods"] if name in METHODS]
    config = compare_plan.resolve(merge(CompareConfig(run=str(tmp_path / "r")), values))
    assert len(config.seeds) == 3 and not (tmp_path / "r").exists()
