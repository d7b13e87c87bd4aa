"""The training job: the network of a genotype, from scratch, on clean images or against an adversary."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import attacks, data, genotype, plot, seeding
from .config import AttackConfig, TrainConfig, at_least, check_attack, check_run, resolve_run
from .genotype import Genotype
from .loop import Loop, choose_device, cpu_threads, learning_rate, seeded, set_learning_rate
from .methods.method import accuracy
from .network import Network, count_parameters
from .runs import Run, load_tensors, save_tensors, write_text
from .settings import merge, to_dict

EVALUATION_BATCH = 250


@dataclass(frozen=True)
class TrainResult:
    """What a training leaves behind."""

    network: Network
    run: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class TrainStep:
    """Where the training stands, for recipes whose rules depend on it."""

    attack: AttackConfig
    """The attack of this step, its sizes scaled while epsilon warms up."""
    auxiliary_weight: float
    generator: Callable[[str], torch.Generator]


Recipe = Callable[[Network, Tensor, Tensor, TrainStep], tuple[Tensor, Tensor]]
"""(network, x (N, C, H, W), y (N,), step) -> (loss, logits (N, classes)) of one batch."""


def standard(network: Network, x: Tensor, y: Tensor, step: TrainStep) -> tuple[Tensor, Tensor]:
    """Cross entropy on clean images, plus that of the auxiliary head."""
    logits, auxiliary = network.forward_with_auxiliary(x)
    loss = cross_entropy(logits, y)
    if auxiliary is not None:
        loss = loss + step.auxiliary_weight * cross_entropy(auxiliary, y)
    return loss, logits


def pgd_at(network: Network, x: Tensor, y: Tensor, step: TrainStep) -> tuple[Tensor, Tensor]:
    """Adversarial training (Madry et al., ICLR 2018): the standard loss on PGD examples against the current network."""
    x_adv = attacks.perturb(network, x, y, step.attack, generator=step.generator("attack"))
    return standard(network, x_adv, y, step)


RECIPES: dict[str, Recipe] = {"standard": standard, "pgd-at": pgd_at}


def train(config: TrainConfig) -> TrainResult:
    """Train the network of `config.genotype` and write everything to the run folder.

    Raises ValueError for a configuration that cannot work, FileNotFoundError for a missing genotype or data set,
    FileExistsError for a run folder that is there already, all before anything is written; `rnas.loop.Interrupted`
    after Ctrl-C or SIGTERM, with a checkpoint to resume from, or with all results where it came after the last batch.
    """
    config, dataset, parts = _prepare(config, _chosen(config))
    Run.refuse_existing(config.run, "train")
    with cpu_threads(config.threads):
        files = {"genotype.json": genotype.to_json(parts.network.genotype)}
        return _train(config, dataset, parts, Run.create(config.run, "train", to_dict(config), files))


def resume(path: str | Path, *, quiet: bool = False) -> TrainResult:
    """Go on with an interrupted training, on a CPU to the same bits as an uninterrupted one. Raises as `train` does."""
    run = Run.open(path, "train")
    config = dataclasses.replace(merge(TrainConfig(), run.read_config()), run=str(path), quiet=quiet)
    config, dataset, parts = _prepare(config, genotype.load(run.path))
    with cpu_threads(config.threads):
        return _train(config, dataset, parts, run)


def check(config: TrainConfig, found: Genotype | None = None) -> TrainConfig:
    """The resolved configuration: what was left open filled in, as it would stand in config.json. Writes nothing.

    found: stands for the genotype that `config.genotype` names, where that is not there yet; None: it is loaded.
    Raises what `train` would before any work, but for a run folder that is there already: a resumed run has one.
    """
    return _prepare(config, found or _chosen(config))[0]


def _chosen(config: TrainConfig) -> Genotype:
    if not config.genotype:
        raise ValueError(
            "no genotype given: --genotype takes a search run, a genotype file, or a published name such as RACL"
        )
    return genotype.load(config.genotype)


def _prepare(config: TrainConfig, found: Genotype) -> tuple[TrainConfig, data.Dataset, _Parts]:
    """Everything that comes before the work: the checks, the data, and what will learn."""
    config, dataset = _resolve(config)
    with cpu_threads(config.threads):
        return config, dataset, _parts(config, dataset, found)


def load_network(path: str | Path, device: str | torch.device = "cpu") -> Network:
    """The trained network of a run folder, in eval mode. Raises FileNotFoundError or ValueError where there is none."""
    run = Run.open(path, "train")
    model_path = run.path / "model.pt"
    if not model_path.is_file():
        raise FileNotFoundError(
            f"{run.path} has no model.pt: the training has not finished (`rnas train --resume {run.path}`)"
        )
    state = load_tensors(model_path)
    try:
        with seeded(0, torch.device("cpu")):  # the random weights that are overwritten cost the caller no numbers
            network = Network(genotype.from_dict(state["genotype"]), **state["arguments"])
        network.load_state_dict(state["network"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{model_path} does not hold a network of this version: {error}") from None
    return network.to(device, memory_format=torch.channels_last).eval()


def _resolve(config: TrainConfig) -> tuple[TrainConfig, data.Dataset]:
    """Check the configuration, load the data, and fill in what was left open."""
    check_run(config)
    at_least(0, "", config, "validation_images", "epsilon_warmup_epochs", "auxiliary_weight")
    if not 0 <= config.drop_path < 1:
        raise ValueError(f"drop_path must be in [0, 1); got {config.drop_path}")
    check_attack(config.attack)
    device = choose_device(config.device)
    dataset = data.load(config.data)
    if config.validation_images >= len(dataset.train.labels):
        raise ValueError(
            f"validation_images {config.validation_images} leaves nothing of "
            f"{len(dataset.train.labels)} training images"
        )
    source = Path(config.genotype)
    name = (source.parent.name if source.suffix == ".json" else source.stem).lower()
    name = f"train-{config.recipe}-{name}"
    return resolve_run(config, dataset.image_shape[0], str(device), torch.get_num_threads(), name), dataset


@dataclass(frozen=True)
class _Parts:
    """Everything of a training that has state."""

    network: Network
    optimizer: torch.optim.SGD
    best: Best


def _arguments(config: TrainConfig, dataset: data.Dataset) -> dict:
    """What `Network` is built with beside the genotype; goes into model.pt."""
    return {
        "channels": config.channels,
        "layers": config.layers,
        "num_classes": dataset.num_classes,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "auxiliary": config.auxiliary_weight > 0,
        "stem_stride": config.stem_stride,
    }


def _parts(config: TrainConfig, dataset: data.Dataset, found: Genotype) -> _Parts:
    device, weights = choose_device(config.device), config.weights
    with seeded(seeding.derive(config.seed, "network"), device):
        network = Network(found, **_arguments(config, dataset))
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=weights.learning_rate, momentum=weights.momentum, weight_decay=weights.weight_decay
    )
    return _Parts(network, optimizer, Best())


def _train(config: TrainConfig, dataset: data.Dataset, parts: _Parts, run: Run) -> TrainResult:
    network, optimizer, best = parts.network, parts.optimizer, parts.best
    device = choose_device(config.device)
    images, held_out = _hold_out(dataset.train, config)
    batches = data.number_of_batches(images, config.batch_size)
    left_over = len(images.labels) % config.batch_size
    if left_over == 1 and batches > 1:  # BN on 1x1 maps, as in the auxiliary head, has no variance over one image
        batches, left_over = batches - 1, 0
    loop = Loop(
        run,
        vars(parts),
        epochs=config.epochs,
        batches=batches,
        batch_size=config.batch_size,
        images=(batches - 1) * config.batch_size + (left_over or config.batch_size),
        checkpoint_seconds=config.checkpoint_seconds,
        quiet=config.quiet,
    )
    recipe = RECIPES[config.recipe]
    stream = functools.partial(
        data.batches,
        images,
        batch_size=config.batch_size,
        seed=config.seed,
        augment=config.augment,
        device=device,
        stop=batches,
    )
    with loop:
        for epoch in loop.epochs():
            set_learning_rate(optimizer, learning_rate(config.weights, epoch, config.epochs))
            network.set_drop_path(config.drop_path * epoch / config.epochs)
            for x, y in stream(epoch=epoch, start=loop.batch):
                attack = _warmed_up(config, epoch + loop.batch / batches)
                purpose = seeding.purposes(config.seed, epoch, loop.batch, device=device)
                step = TrainStep(attack, config.auxiliary_weight, purpose)
                loss, hits = train_step(network, optimizer, recipe, x, y, step, grad_clip=config.weights.grad_clip)
                loop.done(len(y), train_loss=loss, train_accuracy=hits)
            extra = {}
            if held_out is not None:
                extra = _validate(network, held_out, config, device)
                best.offer(extra["robust_accuracy"], epoch, network)
            loop.progress.note(describe(loop.end_epoch(**extra)))
        if best.weights:
            network.load_state_dict(best.weights)
        network.set_drop_path(0.0)
        return _finish(run, network.eval(), _arguments(config, dataset))


def train_step(
    network: Network,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    step: TrainStep,
    *,
    grad_clip: float,
) -> tuple[float, float]:
    """One step of the weights; x (N, C, H, W) in [0, 1], y (N,). Returns loss and accuracy on the inputs trained on."""
    network.train()
    optimizer.zero_grad()
    # drop path draws from the default generator; seeded per batch, resumed runs equal uninterrupted ones
    with seeded(step.generator("drop-path").initial_seed(), x.device):
        loss, logits = recipe(network, x, y, step)
    loss.backward()
    if grad_clip:
        nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
    optimizer.step()
    return loss.item(), accuracy(logits, y)


class Best:
    """The weights with the highest validation accuracy under attack so far; empty without validation."""

    def __init__(self) -> None:
        self.score, self.epoch, self.weights = -1.0, -1, {}

    def offer(self, score: float, epoch: int, network: Network) -> None:
        """Keep a copy of the network's weights if `score` is a new maximum."""
        if score > self.score:
            self.score, self.epoch = score, epoch
            self.weights = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}

    def state_dict(self) -> dict:
        return {"score": self.score, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.score, self.epoch, self.weights = state["score"], state["epoch"], state["weights"]


def _hold_out(split: data.Split, config: TrainConfig) -> tuple[data.Split, data.Split | None]:
    """Training images and, if asked for, the random part of them that validates."""
    count = config.validation_images
    if count == 0:
        return split, None
    order = torch.randperm(len(split.labels), generator=seeding.generator(config.seed, "validation"))
    kept, held_out = order[count:], order[:count]
    return data.Split(split.images[kept], split.labels[kept]), data.Split(
        split.images[held_out], split.labels[held_out]
    )


def _warmed_up(config: TrainConfig, progress: float) -> AttackConfig:
    """The attack after `progress` epochs: epsilon and step size rise linearly during the warm-up."""
    share = min(1.0, progress / config.epsilon_warmup_epochs) if config.epsilon_warmup_epochs else 1.0
    return dataclasses.replace(
        config.attack, epsilon=config.attack.epsilon * share, step_size=config.attack.step_size * share
    )


def _validate(network: Network, held_out: data.Split, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """Clean accuracy and accuracy under the training attack on the held-out images, in [0, 1]."""
    network.eval()
    clean = robust = 0
    stream = data.batches(held_out, EVALUATION_BATCH, seed=config.seed, epoch=0, shuffle=False, device=device)
    for index, (x, y) in enumerate(stream):
        start = seeding.generator(config.seed, "validation-attack", index, device=device)
        x_adv = attacks.perturb(network, x, y, config.attack, generator=start)
        with torch.no_grad():
            clean += int((network(x).argmax(dim=1) == y).sum())
            robust += int((network(x_adv).argmax(dim=1) == y).sum())
    count = len(held_out.labels)
    return {"clean_accuracy": clean / count, "robust_accuracy": robust / count}


def describe(record: dict) -> str:
    """One line about a finished epoch."""
    text = f"epoch {record['epoch']}: loss {record['train_loss']:.3f}, accuracy {record['train_accuracy']:.1%}"
    if "robust_accuracy" in record:
        text += f"; validation clean {record['clean_accuracy']:.1%}, under attack {record['robust_accuracy']:.1%}"
    return text


def _finish(run: Run, network: Network, arguments: dict) -> TrainResult:
    """Write model.pt, the summary and the curves."""
    model_path = run.path / "model.pt"
    state = {"genotype": network.genotype.to_dict(), "arguments": arguments, "network": network.state_dict()}
    save_tensors(model_path, state)
    write_text(run.path / "parameters.txt", f"{count_parameters(network)}\n")
    files = [model_path, run.path / "genotype.json", run.checkpoint_path, run.metrics_path, run.config_path]
    try:
        files.append(plot.draw_curves(run.read_metrics(), run.path / "curves.png"))
    except ImportError as error:  # matplotlib is missing: the training itself is complete
        print(f"no pictures: {error}")
    return TrainResult(network, run.path, tuple(files))
