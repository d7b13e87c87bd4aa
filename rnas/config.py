"""The configuration of every job: frozen dataclasses, the only source of flags, TOML keys and the saved config.json."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

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
    """Longest time between two checkpoints (there is one at every end of an epoch as well)."""
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
    """Epochs at the start in which only the weights learn."""
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
    """Probability of dropping a path in the last epoch, rising linearly from 0."""
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
    """Numbers of PGD steps, one column each."""
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
    test_images: int = 0
    """Size of a class-balanced test subset; 0 takes the test set that the run was configured with."""
    batch_size: int = 250
    """Images per step; it does not change the result."""
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


T = TypeVar("T")


def resolve_attack(attack: AttackConfig, channels: int) -> AttackConfig:
    """Fill in the sizes left open: epsilon by norm and number of image channels, step size as epsilon / 4."""
    usual = {("linf", True): 0.3, ("linf", False): 8 / 255, ("l2", True): 1.5, ("l2", False): 0.5}
    epsilon = usual[attack.norm, channels == 1] if attack.epsilon is None else attack.epsilon
    step_size = epsilon / 4 if attack.step_size is None else attack.step_size
    return dataclasses.replace(attack, epsilon=epsilon, step_size=step_size)


def check_attack(attack: AttackConfig) -> None:
    """Refuse sizes that mean nothing before any work is done. Raises ValueError."""
    for name in ("epsilon", "step_size"):
        value = getattr(attack, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(
                f"attack.{name} must be a finite number of at least 0, in pixel units of [0, 1]; got {value}"
            )
    at_least_one("attack", attack, "steps", "restarts")


def at_least_one(prefix: str, config: Any, *names: str) -> None:
    """Raise ValueError unless each named field is at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{(prefix + '.').lstrip('.')}{name} must be at least 1; got {getattr(config, name)}")


def parse_number(text: str) -> float:
    """A float from '0.03', '2e-3' or a fraction such as '8/255', the notation of every paper of the field."""
    try:
        return float(text)
    except ValueError:
        return float(Fraction(text))


def to_dict(config: Any) -> dict:
    """The configuration as plain dicts, lists, numbers and strings, ready for JSON and checkpoints."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def merge(config: T, values: dict, where: str = "") -> T:
    """A copy of `config` with `values` (nested dicts, as TOML gives them) put in.

    Raises ValueError for a key that does not exist, naming the nearest that does, and for a value of the wrong type.
    """
    known = {f.name: f for f in dataclasses.fields(config)}
    hints = get_type_hints(type(config))
    changes = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        path = f"{where}{key}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {where}{near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise ValueError(f"unknown configuration key {path!r}: {hint}")
        current = getattr(config, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{path} is a table of {type(current).__name__} keys; got {value!r}")
            changes[name] = merge(current, value, f"{path}.")
        else:
            changes[name] = convert(value, hints[name], path)
    return dataclasses.replace(config, **changes)


def convert(value: Any, kind: Any, path: str) -> Any:
    """`value` (from TOML, JSON or --set) as the annotated type `kind`. Raises ValueError naming `path`."""
    choices = get_args(kind) if get_origin(kind) is not Literal else (kind,)
    origin = get_origin(kind)
    try:
        if origin is Literal:
            matches = [choice for choice in get_args(kind) if str(choice) == str(value)]
            if not matches:
                raise ValueError
            return matches[0]
        if origin is tuple:
            items = value.strip("()[] ").split(",") if isinstance(value, str) else list(value)
            items = [item for item in items if item != ""]
            kinds = [choices[0]] * len(items) if choices[-1] is Ellipsis else choices
            if len(kinds) != len(items):
                raise ValueError
            return tuple(convert(item, one, path) for item, one in zip(items, kinds))
        if type(None) in choices:
            if value is None or value == "None":
                return None
            return convert(value, next(one for one in choices if one is not type(None)), path)
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int:
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        if kind is float:
            if isinstance(value, bool):
                raise ValueError
            return parse_number(value) if isinstance(value, str) else float(value)
        if kind is str and isinstance(value, str):
            return value
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        pass
    wanted = " or ".join(map(repr, get_args(kind))) if origin is Literal else getattr(kind, "__name__", str(kind))
    raise ValueError(f"{path} must be {wanted}; got {value!r}")


def set_value(config: T, assignment: str) -> T:
    """Apply one `key=value` of --set, the key dotted (`attack.epsilon=8/255`). Raises ValueError as `merge` does."""
    key, equals, value = assignment.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set takes key=value, such as attack.epsilon=8/255; got {assignment!r}")
    nested: Any = value.strip()
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return merge(config, nested)


def load_toml(path: str | Path) -> dict:
    """The tables of a TOML file. Raises FileNotFoundError, or ValueError with the place where it is malformed."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
