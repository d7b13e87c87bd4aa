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
from .config import AttackConfig, TrainConfig, at_least_one, check_attack, merge, resolve_attack, to_dict
from .genotype import Genotype
from .loop import Loop, choose_device, learning_rate, set_learning_rate
from .methods.method import accuracy
from .network import Network, count_parameters
from .runs import Run, load_tensors, save_tensors, write_text

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
    FileExistsError for a run folder that is there already, `loop.Interrupted` after Ctrl-C or SIGTERM.
    """
    config, dataset, found = _resolve(config, genotype.load(config.genotype) if config.genotype else None)
    run = Run.create(config.run, "train", to_dict(config))
    found.save(run.path / "genotype.json")
    return _train(config, dataset, found, run)


def resume(path: str | Path, *, quiet: bool = False) -> TrainResult:
    """Go on with an interrupted training, to the same bits as an uninterrupted one. Raises as `train` does."""
    run = Run.open(path, "train")
    config = dataclasses.replace(merge(TrainConfig(), run.read_config()), run=str(path), quiet=quiet)
    config, dataset, found = _resolve(config, genotype.load(run.path))
    return _train(config, dataset, found, run)


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
        network = Network(genotype.from_dict(state["genotype"]), **state["arguments"])
        network.load_state_dict(state["network"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{model_path} does not hold a network of this version: {error}") from None
    return network.to(device, memory_format=torch.channels_last).eval()


def _resolve(config: TrainConfig, found: Genotype | None) -> tuple[TrainConfig, data.Dataset, Genotype]:
    """Check the configuration, load the data, and fill in what was left open."""
    if found is None:
        raise ValueError(
            "no genotype given: --genotype takes a search run, a genotype.json, or a published name such as RACL"
        )
    at_least_one("", config, "channels", "stem_stride", "epochs", "batch_size")
    if config.validation_images < 0 or config.epsilon_warmup_epochs < 0:
        raise ValueError("validation_images and epsilon_warmup_epochs must be at least 0")
    if not 0 <= config.drop_path < 1:
        raise ValueError(f"drop_path must be in [0, 1); got {config.drop_path}")
    check_attack(config.attack)
    choose_device(config.device)
    dataset = data.load(config.data)
    if config.validation_images >= len(dataset.train.labels):
        raise ValueError(
            f"validation_images {config.validation_images} leaves nothing of "
            f"{len(dataset.train.labels)} training images"
        )
    attack = resolve_attack(config.attack, dataset.image_shape[0])
    source = Path(config.genotype)
    name = (source.parent.name if source.suffix == ".json" else source.stem).lower()
    run = config.run or f"runs/train-{config.recipe}-{name}-{Path(config.data.dataset).stem}-seed{config.seed}"
    return dataclasses.replace(config, attack=attack, run=run), dataset, found


def _train(config: TrainConfig, dataset: data.Dataset, found: Genotype, run: Run) -> TrainResult:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    arguments = {
        "channels": config.channels,
        "layers": config.layers,
        "num_classes": dataset.num_classes,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "auxiliary": config.auxiliary_weight > 0,
        "stem_stride": config.stem_stride,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive(config.seed, "network"))
        network = Network(found, **arguments)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=config.weights.learning_rate,
        momentum=config.weights.momentum,
        weight_decay=config.weights.weight_decay,
    )
    images, held_out = _hold_out(dataset.train, config)
    batches = data.number_of_batches(images, config.batch_size)
    loop = Loop(
        run,
        {"network": network, "optimizer": optimizer, "best": (best := Best())},
        epochs=config.epochs,
        batches=batches,
        batch_size=config.batch_size,
        checkpoint_seconds=config.checkpoint_seconds,
        quiet=config.quiet,
    )
    recipe = RECIPES[config.recipe]
    stream = functools.partial(
        data.batches, images, batch_size=config.batch_size, seed=config.seed, augment=config.augment, device=device
    )
    with loop:
        for epoch in loop.epochs():
            set_learning_rate(optimizer, learning_rate(config.weights, epoch, config.epochs))
            network.set_drop_path(config.drop_path * epoch / config.epochs)
            for x, y in stream(epoch=epoch, start=loop.batch):
                attack = _warmed_up(config, epoch + loop.batch / batches)
                purpose = seeding.purposes(config.seed, epoch, loop.batch, device=device)
                loss, hits = train_step(
                    network, optimizer, recipe, x, y, TrainStep(attack, config.auxiliary_weight, purpose), config
                )
                loop.done(len(y), train_loss=loss, train_accuracy=hits)
            extra = {}
            if held_out is not None:
                extra = _validate(network, held_out, config, device)
                best.offer(extra["robust_accuracy"], epoch, network)
            loop.progress.note(describe(loop.end_epoch(**extra)))
    if best.weights:
        network.load_state_dict(best.weights)
    network.set_drop_path(0.0)
    return _finish(run, network.eval(), arguments)


def train_step(
    network: Network,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    step: TrainStep,
    config: TrainConfig,
) -> tuple[float, float]:
    """One step of the weights; x (N, C, H, W) in [0, 1], y (N,). Returns loss and accuracy on the inputs trained on."""
    network.train()
    # drop path draws from PyTorch's default generator; seeding it per batch makes resumed runs equal uninterrupted ones
    torch.manual_seed(step.generator("drop-path").initial_seed())
    optimizer.zero_grad()
    loss, logits = recipe(network, x, y, step)
    loss.backward()
    if config.weights.grad_clip:
        nn.utils.clip_grad_norm_(network.parameters(), config.weights.grad_clip)
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
