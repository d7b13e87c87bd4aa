"""The search job: weights and architecture parameters in turn, on two halves of the training images."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import data, genotype, plot, seeding
from .config import SearchConfig, at_least_one, check_attack, merge, resolve_attack, to_dict
from .genotype import Genotype
from .loop import Interrupted, Loop, choose_device, learning_rate, set_learning_rate
from .methods import METHODS, Method, SearchStep, entropy, options_for
from .methods.method import accuracy
from .runs import Run, write_text
from .spaces import Space, get_space
from .supernet import Supernet


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves behind."""

    genotype: Genotype
    run: Path
    files: tuple[Path, ...]


def search(config: SearchConfig) -> SearchResult:
    """Search an architecture and write everything to the run folder.

    Raises ValueError for a configuration that cannot work, FileExistsError for a run folder that is there already,
    `loop.Interrupted` after Ctrl-C or SIGTERM, with a checkpoint to resume from.
    """
    config, dataset = _resolve(config)
    run = Run.create(config.run, "search", to_dict(config))
    return _search(config, dataset, run)


def resume(path: str | Path, *, quiet: bool = False) -> SearchResult:
    """Go on with an interrupted search, to the same bits as an uninterrupted one. Raises as `search` does."""
    run = Run.open(path, "search")
    values = run.read_config()
    config = merge(SearchConfig(options=options_for(values["method"])), values)
    config, dataset = _resolve(dataclasses.replace(config, run=str(path), quiet=quiet))
    return _search(config, dataset, run)


def build(config: SearchConfig, dataset: data.Dataset) -> tuple[Supernet, Method]:
    """The untrained supernet and the method of a resolved configuration, both decided by its seed."""
    space = _space(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive(config.seed, "supernet"))
        supernet = Supernet(
            space,
            channels=config.channels,
            layers=config.layers,
            num_classes=dataset.num_classes,
            mean=dataset.mean,
            std=dataset.std,
            stem_stride=config.stem_stride,
        )
    device = choose_device(config.device)
    method = METHODS[config.method](config.options, space, config.seed)
    return supernet.to(device, memory_format=torch.channels_last), method.to(device)


def _space(config: SearchConfig) -> Space:
    space = get_space(config.space)
    return dataclasses.replace(space, nodes=config.nodes) if config.nodes else space


def _resolve(config: SearchConfig) -> tuple[SearchConfig, data.Dataset]:
    """Check the configuration, load the data, and fill in what was left open."""
    at_least_one("", config, "channels", "stem_stride", "epochs", "batch_size")
    if config.nodes < 0 or config.warmup_epochs < 0:
        raise ValueError(f"nodes and warmup_epochs must be at least 0; got {config.nodes} and {config.warmup_epochs}")
    check_attack(config.attack)
    options = options_for(config.method) if config.options is None else config.options
    if not isinstance(options, METHODS[config.method].Options):
        raise ValueError(f"method {config.method!r} takes {METHODS[config.method].Options.__name__}; got {options!r}")
    _space(config).layout(config.layers, config.channels)
    choose_device(config.device)
    dataset = data.load(config.data)
    for half in data.halves(dataset.train, config.seed):
        data.number_of_batches(half, config.batch_size, drop_last=True)  # refuses a batch that no half can fill
    attack = resolve_attack(config.attack, dataset.image_shape[0])
    dataset_name = Path(config.data.dataset).stem
    run = config.run or f"runs/search-{config.method}-{config.space}-{dataset_name}-seed{config.seed}"
    return dataclasses.replace(config, options=options, attack=attack, run=run), dataset


def _search(config: SearchConfig, dataset: data.Dataset, run: Run) -> SearchResult:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    supernet, method = build(config, dataset)
    weight_optimizer = torch.optim.SGD(
        supernet.parameters(),
        lr=config.weights.learning_rate,
        momentum=config.weights.momentum,
        weight_decay=config.weights.weight_decay,
    )
    architecture_optimizer = torch.optim.Adam(
        method.parameters(),
        lr=config.architecture.learning_rate,
        betas=config.architecture.betas,
        weight_decay=config.architecture.weight_decay,
    )
    train, valid = data.halves(dataset.train, config.seed)
    batches = min(data.number_of_batches(half, config.batch_size, drop_last=True) for half in (train, valid))
    parts = {
        "supernet": supernet,
        "method": method,
        "weight_optimizer": weight_optimizer,
        "architecture_optimizer": architecture_optimizer,
    }
    loop = Loop(
        run,
        parts,
        epochs=config.epochs,
        batches=batches,
        batch_size=config.batch_size,
        checkpoint_seconds=config.checkpoint_seconds,
        quiet=config.quiet,
    )
    stream = functools.partial(
        data.batches, batch_size=config.batch_size, augment=config.augment, drop_last=True, device=device, stop=batches
    )
    with loop:
        for epoch in loop.epochs():
            set_learning_rate(weight_optimizer, learning_rate(config.weights, epoch, config.epochs))
            pairs = zip(
                stream(train, seed=seeding.derive(config.seed, "D_T"), epoch=epoch, start=loop.batch),
                stream(valid, seed=seeding.derive(config.seed, "D_V"), epoch=epoch, start=loop.batch),
            )
            for train_batch, valid_batch in pairs:
                step = SearchStep(
                    epoch=epoch,
                    index=loop.batch,
                    attack=config.attack,
                    weight_optimizer=weight_optimizer,
                    generator=seeding.purposes(config.seed, epoch, loop.batch, device=device),
                )
                searching = epoch >= config.warmup_epochs
                numbers = search_step(
                    supernet,
                    method,
                    train_batch,
                    valid_batch if searching else None,
                    step,
                    architecture_optimizer,
                    config,
                )
                loop.done(len(train_batch[1]), **numbers)
            found = method.genotype()
            found.save(run.path / "genotype.json")
            record = loop.end_epoch(entropy=entropy(method.mixing()), genotype=found.to_dict()["cells"])
            loop.progress.note(describe(record))
    return _finish(run, method)


def search_step(
    supernet: Supernet,
    method: Method,
    train: tuple[torch.Tensor, torch.Tensor],
    valid: tuple[torch.Tensor, torch.Tensor] | None,
    step: SearchStep,
    architecture_optimizer: torch.optim.Optimizer,
    config: SearchConfig,
) -> dict[str, float]:
    """One iteration: attacks or noise for both levels, then the architecture step, then the weight step.

    train, valid: (x (N, C, H, W) in [0, 1], y (N,)); valid None leaves the architecture as it is (warm-up).
    """
    supernet.train()
    train_batch = method.prepare(supernet, *train, step, "weights")
    numbers: dict[str, float] = {}
    if valid is not None:
        valid_batch = method.prepare(supernet, *valid, step, "architecture")
        result = method.architecture_step(supernet, train_batch, valid_batch, step)
        architecture_optimizer.step()
        architecture_optimizer.zero_grad()
        numbers |= {"architecture_loss": result.loss, "architecture_accuracy": result.accuracy}
    step.weight_optimizer.zero_grad()
    loss, logits = method.weight_loss(supernet, train_batch, step)
    loss.backward()
    if config.weights.grad_clip:
        nn.utils.clip_grad_norm_(supernet.parameters(), config.weights.grad_clip)
    step.weight_optimizer.step()
    return numbers | {"weight_loss": loss.item(), "weight_accuracy": accuracy(logits, train_batch.y)}


def describe(record: dict) -> str:
    """One line about a finished epoch."""
    text = (
        f"epoch {record['epoch']}: weights loss {record['weight_loss']:.3f}, accuracy {record['weight_accuracy']:.1%}"
    )
    if "architecture_loss" in record:
        text += f"; architecture loss {record['architecture_loss']:.3f}, accuracy {record['architecture_accuracy']:.1%}"
    entropies = ", ".join(f"{cell_type} {value:.3f}" for cell_type, value in record["entropy"].items())
    return f"{text}; entropy {entropies}"


def _finish(run: Run, method: Method) -> SearchResult:
    """Write the genotype, its pictures and the curves; leave the pictures out where matplotlib is missing."""
    found = method.genotype()
    files = [found.save(run.path / "genotype.json")]
    try:
        text = run.path / "genotype.txt"
        write_text(text, genotype.to_text(found) + "\n")
        files.append(text)
    except ValueError:  # the classic text cannot say it
        pass
    try:
        files += plot.draw_cells(found, run.path / "cells")
        files.append(plot.draw_curves(run.read_metrics(), run.path / "curves.png"))
    except ImportError as error:  # matplotlib is missing: the search itself is complete
        print(f"no pictures: {error}")
    return SearchResult(found, run.path, (*files, run.checkpoint_path, run.metrics_path, run.config_path))


__all__ = ["Interrupted", "SearchResult", "build", "describe", "resume", "search", "search_step"]
