"""The evaluation job: clean accuracy and accuracy under FGSM and PGD, on the whole test set, by one protocol."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from . import attacks, data, plot, seeding
from .config import (
    AttackConfig,
    DataConfig,
    EvaluateConfig,
    TrainConfig,
    at_least,
    check_attack,
    check_run,
    resolve_attack,
)
from .loop import choose_device, cpu_threads, seeded
from .network import Network, count_parameters
from .progress import Progress
from .runs import Run, write_text
from .settings import merge
from .train import load_network

CLEAN = "clean"


@dataclass(frozen=True)
class Row:
    """One network's line of the table; accuracies in [0, 1] by column name."""

    name: str
    run: str
    recipe: str
    parameters: int
    accuracies: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """The table, the threat model it stands on, and where the JSON went."""

    rows: tuple[Row, ...]
    attack: AttackConfig
    images: int
    early_drop: bool
    """Whether an image counts as fooled by any PGD iterate, or by the last alone."""
    files: tuple[Path, ...]


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate finished `rnas train` runs under one threat model and write the table as JSON.

    Raises ValueError for a configuration that cannot work, FileNotFoundError for a run without a trained network.
    """
    config, dataset, trained, networks = _prepare(config)
    with cpu_threads(config.threads):
        return _evaluate(config, dataset, trained, networks)


def check(config: EvaluateConfig, trained: Sequence[TrainConfig] = ()) -> EvaluateConfig:
    """The resolved configuration: ball, device and threads filled in. Writes nothing.

    trained: the resolved configuration of every run in `config.runs`, where those are not trained yet; the networks
    are not looked for then. Raises what `evaluate` would before any work.
    """
    return _prepare(config, trained)[0]


_Prepared = tuple[EvaluateConfig, data.Dataset, Sequence[TrainConfig], list[Network]]


def _prepare(config: EvaluateConfig, trained: Sequence[TrainConfig] = ()) -> _Prepared:
    """Everything that comes before the work: the checks, the test set, and the networks unless `trained` is given."""
    if not config.runs:
        raise ValueError("no runs given: rnas evaluate takes the folders of finished `rnas train` runs")
    if not config.steps or any(steps < 1 for steps in config.steps):
        raise ValueError(f"steps must name numbers of PGD steps, each at least 1; got {config.steps}")
    check_run(config)
    at_least(1, "", config, "restarts")
    if config.autoattack:
        _torchattacks()  # before hours of other attacks
    device, networks = choose_device(config.device), []
    if not trained:
        trained = [merge(TrainConfig(), Run.open(path, "train").read_config()) for path in config.runs]
        networks = [load_network(path, device) for path in config.runs]
    if len({(each.data.dataset, each.data.test_images) for each in trained}) > 1:
        names = ", ".join(f"{path}: {each.data.dataset}" for path, each in zip(config.runs, trained))
        raise ValueError(
            f"one table needs one test set, and these runs have different ones ({names}); evaluate them apart"
        )
    dataset = _test_set(trained[0].data, config)
    attack = _threat_model(config, trained, dataset.image_shape[0])
    ball = {name: getattr(attack, name) for name in ("norm", "epsilon", "step_size")}
    threads = config.threads or torch.get_num_threads()
    return dataclasses.replace(config, **ball, device=str(device), threads=threads), dataset, trained, networks


def _evaluate(
    config: EvaluateConfig, dataset: data.Dataset, trained: Sequence[TrainConfig], networks: Sequence[Network]
) -> Evaluation:
    attack, device = AttackConfig(config.norm, config.epsilon, config.step_size), choose_device(config.device)
    rows = []
    for path, run_config, network in zip(config.runs, trained, networks):
        name = Path(path).name
        accuracies = accuracy_table(network, dataset.test, attack, config, device, title=name)
        rows.append(Row(name, str(path), run_config.recipe, count_parameters(network), accuracies))
    output = Path(config.output) if config.output else Path(config.runs[0]) / "evaluation.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    protocol = {
        "early_drop": config.early_drop,
        "restarts": config.restarts,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "statistics": "running",
    }
    threat = {"norm": attack.norm, "epsilon": attack.epsilon, "step_size": attack.step_size}
    images = len(dataset.test.labels)
    content = {
        "dataset": trained[0].data.dataset,
        "images": images,
        "threat": threat,
        "protocol": protocol,
        "networks": [dataclasses.asdict(row) for row in rows],
    }
    write_text(output, json.dumps(content, indent=2) + "\n")
    files = [output]
    try:
        files.append(plot.draw_comparison([dataclasses.asdict(row) for row in rows], output.with_suffix(".png")))
    except ImportError as error:  # matplotlib is missing: the numbers themselves are complete
        print(f"no picture: {error}")
    return Evaluation(tuple(rows), attack, images, config.early_drop, tuple(files))


def accuracy_table(
    network: nn.Module,
    split: data.Split,
    attack: AttackConfig,
    config: EvaluateConfig,
    device: torch.device,
    title: str = "evaluate",
) -> dict[str, float]:
    """Accuracies of `network` in [0, 1]: clean, fgsm (one step, no random start), each pgd-STEPS, autoattack."""
    columns = [CLEAN, "fgsm", *(f"pgd-{steps}" for steps in config.steps)]
    if config.autoattack:
        columns.append("autoattack")
    correct = dict.fromkeys(columns, 0)
    count = len(split.labels)
    with Progress(f"evaluate {title}", count, quiet=config.quiet) as progress:
        stream = data.batches(split, config.batch_size, seed=config.seed, epoch=0, shuffle=False, device=device)
        for index, (x, y) in enumerate(stream):
            correct[CLEAN] += _correct(network, x, y)
            fooled = attacks.fgsm(network, x, y, epsilon=attack.epsilon, norm=attack.norm)
            correct["fgsm"] += _correct(network, fooled, y)
            for steps in config.steps:
                fooled = attacks.pgd(
                    network,
                    x,
                    y,
                    epsilon=attack.epsilon,
                    step_size=attack.step_size,
                    steps=steps,
                    norm=attack.norm,
                    restarts=config.restarts,
                    early_drop=config.early_drop,
                    generator=seeding.generator(config.seed, "evaluate", steps, index, device=device),
                )
                correct[f"pgd-{steps}"] += _correct(network, fooled, y)
            if config.autoattack:
                correct["autoattack"] += _correct(network, autoattack(network, x, y, attack, seed=config.seed), y)
            progress.advance(len(y))
    return {column: hits / count for column, hits in correct.items()}


def autoattack(network: nn.Module, x: Tensor, y: Tensor, attack: AttackConfig, *, seed: int) -> Tensor:
    """The standard AutoAttack of torchattacks on x (N, C, H, W), y (N,); network and random state stay as they were.

    Raises ImportError, with what to type, where torchattacks is not installed.
    """
    torchattacks = _torchattacks()
    with torch.no_grad():
        classes = network(x[:1]).shape[1]
    norm = {"linf": "Linf", "l2": "L2"}[attack.norm]
    with seeded(seed, x.device), attacks.frozen(network):
        attacker = torchattacks.AutoAttack(network, norm=norm, eps=attack.epsilon, n_classes=classes, seed=seed)
        return attacker(x, y)


def _torchattacks() -> ModuleType:
    try:
        import torchattacks
    except ImportError as error:
        raise ImportError(f"AutoAttack needs torchattacks ({error}): pip install 'rnas[evaluation]'") from None
    return torchattacks


def _correct(network: nn.Module, x: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((network(x).argmax(dim=1) == y).sum())


def _test_set(data_config: DataConfig, config: EvaluateConfig) -> data.Dataset:
    changes = {"test_images": config.test_images} if config.test_images else {}
    return data.load(dataclasses.replace(data_config, **changes))


def _threat_model(config: EvaluateConfig, trained: Sequence[TrainConfig], channels: int) -> AttackConfig:
    """The configured ball; what is left open comes from the runs' training, a step size from epsilon / 4."""
    norm, epsilon = config.norm or trained[0].attack.norm, config.epsilon
    if epsilon is None:
        balls = {(each.attack.norm, each.attack.epsilon) for each in trained}
        if len(balls) > 1:
            raise ValueError(
                f"these runs were trained in different balls ({balls}); say which one with --norm and --epsilon"
            )
        epsilon = trained[0].attack.epsilon if norm == trained[0].attack.norm else None
    attack = AttackConfig(norm=norm, epsilon=epsilon, step_size=config.step_size)
    check_attack(attack)
    return resolve_attack(attack, channels)
