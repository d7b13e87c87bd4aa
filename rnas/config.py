"""The configuration of every job: frozen dataclasses, from which flags, TOML keys and the saved config.json come."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .augment import Augment


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how many of them."""

    dataset: str = "mnist-subset"
    """mnist-subset (in the package), mnist, fashion-mnist, cifar10, cifar100, svhn, imagefolder, or an .npz file."""
    root: str = "data"
    """Folder of the torchvision data sets; for imagefolder the folder that holds train/ and test/ (or val/)."""
    download: bool = False
    """Let torchvision download what is missing."""
    image_size: int = 0
    """Pixels per side for imagefolder, which needs it; 0 elsewhere."""
    train_images: int = 0
    """Size of a class-balanced training subset; 0 takes all."""
    test_images: int = 0
    """Size of a class-balanced test subset; 0 takes all."""


@dataclass(frozen=True)
class AttackConfig:
    """The threat model, and the PGD attack used against it. Sizes are in pixel units of images in [0, 1]."""

    norm: Literal["linf", "l2"] = "linf"
    """Norm of the perturbation."""
    epsilon: float | None = None
    """Largest perturbation. None: linf 8/255 (0.3 for one-channel images), l2 0.5 (1.5 for one-channel images)."""
    step_size: float | None = None
    """Length of one step. None: epsilon / 4."""
    steps: int = 7
    """Steps of one attack."""
    random_start: bool = True
    """Start from a random point of the ball."""
    restarts: int = 1
    """Independent random starts; the strongest result counts."""
    statistics: Literal["running", "batch"] = "running"
    """BN statistics during the attack: running averages, or those of the attacked batch. Neither moves the averages."""


@dataclass(frozen=True)
class WeightOptimizerConfig:
    """SGD on the network's weights, learning rate annealed per epoch."""

    learning_rate: float = 0.025
    """At the start."""
    learning_rate_min: float = 0.001
    """Where the cosine schedule ends."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 3e-4
    """L2 penalty on all weights."""
    grad_clip: float = 5.0
    """Largest L2 norm of the whole gradient; 0 is off."""
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine: from learning_rate to learning_rate_min. step: times 0.1 at each of `milestones`."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Fractions of the epochs at which the step schedule drops."""


@dataclass(frozen=True)
class ArchitectureOptimizerConfig:
    """Adam on the architecture parameters."""

    learning_rate: float = 3e-4
    """Constant over the search."""
    betas: tuple[float, float] = (0.5, 0.999)
    """Decay of Adam's averages."""
    weight_decay: float = 1e-3
    """L2 penalty on the architecture parameters."""


@dataclass(frozen=True)
class RunConfig:
    """Fields that every long job shares."""

    run: str = ""
    """Folder for everything this job writes. Empty: runs/ and a name made from the configuration."""
    seed: int = 0
    """Decides every random number of the job."""
    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    checkpoint_seconds: float = 60.0
    """A checkpoint is written after the first batch that ends this long after the last one, and after every epoch."""
    quiet: bool = False
    """Print results only."""


@dataclass(frozen=True)
class SearchConfig(RunConfig):
    """Search a cell architecture by gradient descent on a relaxed supernet."""

    method: str = "darts"
    """Search method; its own knobs are under --options."""
    options: Any = None
    """Knobs of the method."""
    space: str = "darts"
    """Search space: darts (normal and reduction cells) or dsara (accurate, reduction and robust cells)."""
    nodes: int = 0
    """Intermediate nodes of a cell; 0 takes the space's own number (4)."""
    channels: int = 16
    """Channels C of the first cells."""
    layers: int = 8
    """Cells of the supernet; those at layers//3 and 2*layers//3 reduce."""
    stem_stride: int = 1
    """Stride of the first convolution; 2 quarters the cost of everything behind it."""
    epochs: int = 50
    """Passes over the training images; each half of them is one level's."""
    batch_size: int = 64
    """Images per step and level."""
    warmup_epochs: int = 0
    """Epochs at the start in which only the weights learn; fewer than all."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """Attacks and both levels' steps as CUDA graphs, eagerly where that cannot be. auto: on a CUDA device, else off."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: Augment = field(default_factory=Augment)
    attack: AttackConfig = field(default_factory=AttackConfig)
    weights: WeightOptimizerConfig = field(default_factory=WeightOptimizerConfig)
    architecture: ArchitectureOptimizerConfig = field(default_factory=ArchitectureOptimizerConfig)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Train the network of a genotype from scratch."""

    genotype: str = ""
    """A search run's folder, a genotype.json, a file with Genotype(...) text, or a published name such as RACL."""
    recipe: Literal["pgd-at", "standard"] = "pgd-at"
    """pgd-at: cross entropy on PGD examples (Madry et al. 2018). standard: cross entropy on clean images."""
    channels: int = 36
    """Channels C of the first cells."""
    layers: int = 20
    """Cells of the network; those at layers//3 and 2*layers//3 reduce."""
    stem_stride: int = 1
    """Stride of the first convolution."""
    auxiliary_weight: float = 0.4
    """Weight of the auxiliary head's loss; 0 leaves the head out."""
    drop_path: float = 0.0
    """Probability of dropping a path, rising linearly over the epochs from 0 to this."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 96
    """Images per step."""
    epsilon_warmup_epochs: float = 0.0
    """Epochs over which the attack's epsilon and step size rise linearly to their full value."""
    validation_images: int = 0
    """Training images held out to choose the checkpoint by its accuracy under attack on them; 0 keeps the last."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: Augment = field(default_factory=Augment)
    attack: AttackConfig = field(default_factory=AttackConfig)
    weights: WeightOptimizerConfig = field(default_factory=WeightOptimizerConfig)


@dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy of trained networks on the whole test set: clean, FGSM and PGD."""

    runs: tuple[str, ...] = ()
    """Folders of `rnas train` runs; one row of the table each."""
    steps: tuple[int, ...] = (20,)
    """Numbers of PGD steps, one column each; see early_drop for what counts."""
    restarts: int = 1
    """Random starts of each PGD attack; an image counts as robust if it withstands all."""
    norm: Literal["linf", "l2"] | None = None
    """Norm of the perturbation. None: as the first run was trained."""
    epsilon: float | None = None
    """Largest perturbation. None: as the first run was trained."""
    step_size: float | None = None
    """Length of a PGD step. None: epsilon / 4."""
    early_drop: bool = True
    """Count an image as fooled as soon as one PGD iterate fools it. Off: only the last iterate counts."""
    autoattack: bool = False
    """Add a column for the standard AutoAttack (Croce and Hein 2020) of torchattacks; slow on a CPU."""
    test_images: int = 0
    """Size of a class-balanced test subset; 0 takes the test set that the run was configured with."""
    batch_size: int = 250
    """Images per step. The random starts are drawn per batch, so a changed size changes them."""
    output: str = ""
    """Where the JSON goes. Empty: evaluation.json in the first run's folder."""
    seed: int = 0
    """Of the random starts."""
    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    quiet: bool = False
    """Print results only."""


@dataclass(frozen=True)
class CompareConfig:
    """Compare search methods over several seeds: one budget, one training recipe, one evaluation protocol."""

    methods: tuple[str, ...] = ()
    """Search methods; darts and random are always among them. Empty: all there are."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One search, training and evaluation of every method for each."""
    overrides: tuple[str, ...] = ()
    """Settings of one method's search, METHOD.KEY=VALUE such as dsara.options.order=1. In TOML also as tables,
    [overrides.dsara.options], which flags replace. The budget (epochs, batch_size, data) is the same for all."""
    run: str = ""
    """Folder for everything the comparison writes. Empty: runs/compare- and the name of the data set."""
    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    checkpoint_seconds: float = 60.0
    """Searches and trainings write checkpoints as in `rnas search`."""
    quiet: bool = False
    """Print results only."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """Of every method. A method that cannot search search.space searches the first of its own spaces."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Of every architecture that was found."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Of every trained network."""


def resolve_attack(attack: AttackConfig, channels: int) -> AttackConfig:
    """Fill in the sizes left open: epsilon by norm and number of image channels, step size as epsilon / 4."""
    usual = {("linf", True): 0.3, ("linf", False): 8 / 255, ("l2", True): 1.5, ("l2", False): 0.5}
    epsilon = usual[attack.norm, channels == 1] if attack.epsilon is None else attack.epsilon
    step_size = epsilon / 4 if attack.step_size is None else attack.step_size
    return dataclasses.replace(attack, epsilon=epsilon, step_size=step_size)


def check_attack(attack: AttackConfig) -> None:
    """Refuse a threat model that means nothing before any work is done. Raises ValueError."""
    for name in ("epsilon", "step_size"):
        if getattr(attack, name) is not None:
            at_least(0, "attack", attack, name)
    if attack.norm == "linf" and attack.epsilon is not None and attack.epsilon > 1:
        raise ValueError(
            f"attack.epsilon is in pixel units of [0, 1], so at most 1 for linf; got {attack.epsilon}. "
            f"Did you mean {attack.epsilon:g}/255?"
        )
    at_least(1, "attack", attack, "steps", "restarts")
    if attack.restarts > 1 and not attack.random_start:
        raise ValueError("attack.restarts above 1 needs attack.random_start: every restart would take the same way")


def check_run(config: Any) -> None:
    """Refuse what no job can work with, in the fields that jobs share. Raises ValueError."""
    at_least(0, "", config, "threads")
    at_least(1, "", config, "batch_size")
    for name in ("channels", "stem_stride", "epochs"):
        if hasattr(config, name):
            at_least(1, "", config, name)
    if hasattr(config, "checkpoint_seconds"):
        at_least(0, "", config, "checkpoint_seconds")
    if hasattr(config, "weights"):
        at_least(
            0, "weights", config.weights, "learning_rate", "learning_rate_min", "momentum", "weight_decay", "grad_clip"
        )
    if hasattr(config, "architecture"):
        at_least(0, "architecture", config.architecture, "learning_rate", "weight_decay")
        if not all(0 <= beta < 1 for beta in config.architecture.betas):
            raise ValueError(f"architecture.betas must be in [0, 1); got {config.architecture.betas}")


def resolve_run(config: Any, data_channels: int, device: str, threads: int, name: str) -> Any:
    """A job's configuration with everything filled in that was left open, so that config.json says what was run.

    device, threads: what was found on this machine; name: of the run folder if none was given.
    """
    dataset = config.data.dataset
    paths = {"root": os.path.abspath(config.data.root)}
    if dataset.endswith(".npz"):
        paths["dataset"] = os.path.abspath(dataset)
    return dataclasses.replace(
        config,
        attack=resolve_attack(config.attack, data_channels),
        data=dataclasses.replace(config.data, **paths),
        device=device,
        threads=config.threads or threads,
        run=config.run or f"runs/{name}-{Path(dataset).stem}-seed{config.seed}",
    )


def at_least(least: float, prefix: str, config: Any, *names: str) -> None:
    """Raise ValueError unless each named field is a finite number of at least `least`."""
    for name in names:
        value = getattr(config, name)
        if not (value >= least and math.isfinite(value)):
            where = f"{prefix}.{name}" if prefix else name
            raise ValueError(f"{where} must be a finite number of at least {least}; got {value}")
