"""The search job: weights and architecture parameters in turn, on two halves of the training images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import data, genotype, graphs, plot, seeding
from .config import SearchConfig, at_least, check_attack, check_run, resolve_run
from .genotype import Genotype
from .loop import Interrupted, Loop, choose_device, cpu_threads, learning_rate, seeded, set_learning_rate
from .methods import METHODS, Method, SearchPlan, SearchStep, entropy, options_for
from .runs import Run, write_text
from .settings import merge, to_dict
from .spaces import Space, get_space
from .supernet import Supernet
from .updates import architecture_update, make_capturable, read, weight_update


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves behind."""

    genotype: Genotype
    run: Path
    files: tuple[Path, ...]
    remarks: tuple[str, ...] = ()
    """What the method says about the result, such as a constraint that does not hold; in remarks.txt too."""


def search(config: SearchConfig) -> SearchResult:
    """Search an architecture and write everything to the run folder.

    Raises ValueError for a configuration that cannot work, FileExistsError for a run folder that is there already,
    both before anything is written; `rnas.loop.Interrupted` after Ctrl-C or SIGTERM, with a checkpoint to resume from,
    or with all results where it came after the last batch.
    """
    config, dataset, parts = _prepare(config)
    Run.refuse_existing(config.run, "search")
    with cpu_threads(config.threads):
        return _search(config, dataset, parts, Run.create(config.run, "search", to_dict(config)))


def resume(path: str | Path, *, quiet: bool = False) -> SearchResult:
    """Go on with an interrupted search, on a CPU to the same bits as an uninterrupted one. Raises as `search` does."""
    run = Run.open(path, "search")
    values = run.read_config()
    config = merge(SearchConfig(options=options_for(values.get("method", "darts"))), values)
    config, dataset, parts = _prepare(dataclasses.replace(config, run=str(path), quiet=quiet))
    with cpu_threads(config.threads):
        return _search(config, dataset, parts, run)


def check(config: SearchConfig) -> SearchConfig:
    """The resolved configuration: what was left open filled in, as it would stand in config.json. Writes nothing.

    Raises what `search` would before any work, but for a run folder that is there already: a resumed run has one.
    """
    return _prepare(config)[0]


def make_method(config: SearchConfig) -> Method:
    """The method of a resolved configuration with the architecture parameters that it starts with, on the CPU."""
    return METHODS[config.method](config.options, _space(config), config.seed)


def build(config: SearchConfig, dataset: data.Dataset) -> tuple[Supernet, Method]:
    """The untrained supernet and the method of a configuration, both decided by its seed."""
    method, device = make_method(config), choose_device(config.device)
    with seeded(seeding.derive(config.seed, "supernet"), device):
        supernet = Supernet(
            method.space,
            channels=config.channels,
            layers=config.layers,
            num_classes=dataset.num_classes,
            mean=dataset.mean,
            std=dataset.std,
            stem_stride=config.stem_stride,
            partial=method.partial,
        )
    return supernet.to(device, memory_format=torch.channels_last), method.to(device)


def _prepare(config: SearchConfig) -> tuple[SearchConfig, data.Dataset, _Parts]:
    """Everything that comes before the work: the checks, the data, and what will learn."""
    config, dataset = _resolve(config)
    with cpu_threads(config.threads):
        return config, dataset, _parts(config, dataset)


def _space(config: SearchConfig) -> Space:
    space = get_space(config.space)
    return dataclasses.replace(space, nodes=config.nodes) if config.nodes else space


def _resolve(config: SearchConfig) -> tuple[SearchConfig, data.Dataset]:
    """Check the configuration, load the data, and fill in what was left open."""
    options = options_for(config.method) if config.options is None else config.options
    if not isinstance(options, METHODS[config.method].Options):
        raise ValueError(f"method {config.method!r} takes {METHODS[config.method].Options.__name__}; got {options!r}")
    usable = METHODS[config.method].spaces
    if usable and config.space not in usable:
        raise ValueError(f"method {config.method!r} searches the space {' or '.join(usable)}; got {config.space!r}")
    check_run(config)
    at_least(0, "", config, "nodes", "warmup_epochs")
    check_attack(config.attack)
    _space(config).layout(config.layers, config.channels)
    device = choose_device(config.device)
    dataset = data.load(config.data)
    _check_plan(METHODS[config.method], options, SearchPlan(config.epochs, config.warmup_epochs, dataset.num_classes))
    for half in data.halves(dataset.train, config.seed):
        data.number_of_batches(half, config.batch_size, drop_last=True)  # refuses a batch that no half can fill
    config = dataclasses.replace(config, options=options, graphs=graphs.choose(config.graphs, device))
    name = f"search-{config.method}-{config.space}"
    return resolve_run(config, dataset.image_shape[0], str(device), torch.get_num_threads(), name), dataset


def _check_plan(method: type[Method], options: Any, plan: SearchPlan) -> None:
    if method.searches and plan.warmup_epochs >= plan.epochs:
        raise ValueError(
            f"warmup_epochs={plan.warmup_epochs} of epochs={plan.epochs}: the architecture would never learn; set it "
            "below epochs"
        )
    method.check(options, plan)


@dataclass(frozen=True)
class _Parts:
    """Everything of a search that has state."""

    supernet: Supernet
    method: Method
    weight_optimizer: torch.optim.SGD
    architecture_optimizer: torch.optim.Adam


def _parts(config: SearchConfig, dataset: data.Dataset) -> _Parts:
    supernet, method = build(config, dataset)
    weights, architecture = config.weights, config.architecture
    return _Parts(
        supernet,
        method,
        torch.optim.SGD(
            supernet.parameters(),
            lr=weights.learning_rate,
            momentum=weights.momentum,
            weight_decay=weights.weight_decay,
        ),
        torch.optim.Adam(
            method.parameters(),
            lr=architecture.learning_rate,
            betas=architecture.betas,
            weight_decay=architecture.weight_decay,
        ),
    )


def _graphs(config: SearchConfig, device: torch.device, report: Callable[[str], None]) -> graphs.Graphs | None:
    return graphs.Graphs(graphs.CudaGraphs(device), report=report) if config.graphs == "on" else None


def _search(config: SearchConfig, dataset: data.Dataset, parts: _Parts, run: Run) -> SearchResult:
    device = choose_device(config.device)
    train, valid = data.halves(dataset.train, config.seed)
    batches = min(data.number_of_batches(half, config.batch_size, drop_last=True) for half in (train, valid))
    epochs = config.epochs if parts.method.searches else 0
    loop = Loop(
        run,
        vars(parts),
        epochs=epochs,
        batches=batches,
        batch_size=config.batch_size,
        images=batches * config.batch_size,
        checkpoint_seconds=config.checkpoint_seconds,
        quiet=config.quiet,
    )
    captured = _graphs(config, device, loop.progress.note)
    if captured is not None:
        make_capturable(parts.weight_optimizer, parts.architecture_optimizer, device)
    stream = functools.partial(
        data.batches, batch_size=config.batch_size, augment=config.augment, drop_last=True, device=device, stop=batches
    )
    with loop:
        for epoch in loop.epochs():
            set_learning_rate(parts.weight_optimizer, learning_rate(config.weights, epoch, config.epochs))
            pairs = zip(
                stream(train, seed=seeding.derive(config.seed, "D_T"), epoch=epoch, start=loop.batch),
                stream(valid, seed=seeding.derive(config.seed, "D_V"), epoch=epoch, start=loop.batch),
            )
            for train_batch, valid_batch in pairs:
                step = SearchStep(
                    epoch=epoch,
                    index=loop.batch,
                    attack=config.attack,
                    weight_optimizer=parts.weight_optimizer,
                    generator=seeding.purposes(config.seed, epoch, loop.batch, device=device),
                    epochs=config.epochs,
                    graphs=captured,
                )
                searching = epoch >= config.warmup_epochs
                numbers = search_step(
                    parts.supernet,
                    parts.method,
                    train_batch,
                    valid_batch if searching else None,
                    step,
                    parts.architecture_optimizer,
                    grad_clip=config.weights.grad_clip,
                )
                loop.done(len(train_batch[1]), **numbers)
            found = parts.method.genotype().to_dict()["cells"]
            record = loop.end_epoch(entropy=entropy(parts.method.mixing()), genotype=found)
            loop.progress.note(describe(record))
        if not epochs:
            loop.save()
        return _finish(run, parts.method)


def search_step(
    supernet: Supernet,
    method: Method,
    train: tuple[torch.Tensor, torch.Tensor],
    valid: tuple[torch.Tensor, torch.Tensor] | None,
    step: SearchStep,
    architecture_optimizer: torch.optim.Optimizer,
    *,
    grad_clip: float,
) -> dict[str, float]:
    """One iteration: attacks or noise for both levels, then the architecture step, then the weight step.

    train, valid: (x (N, C, H, W) in [0, 1], y (N,)); valid None leaves the architecture as it is (warm-up).
    grad_clip: largest L2 norm of the weights' gradient; 0 is off.
    """
    supernet.train()
    train_batch = method.prepare(supernet, *train, step, "weights")
    numbers = {}
    if valid is not None:
        valid_batch = method.prepare(supernet, *valid, step, "architecture")
        numbers |= architecture_update(supernet, method, train_batch, valid_batch, step, architecture_optimizer)
    return read(numbers | weight_update(supernet, method, train_batch, step, grad_clip=grad_clip))


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
    """Write the genotype, remarks, pictures and curves; leave the pictures out where matplotlib is missing."""
    found, remarks = method.genotype(), tuple(method.remarks())
    files = [found.save(run.path / "genotype.json")]
    try:
        text = run.path / "genotype.txt"
        write_text(text, genotype.to_text(found) + "\n")
        files.append(text)
    except ValueError:  # the classic text cannot say it
        pass
    if remarks:
        files.append(write_text(run.path / "remarks.txt", "\n".join(remarks) + "\n"))
    try:
        files += plot.draw_cells(found, run.path / "cells")
        if method.searches:
            files.append(plot.draw_curves(run.read_metrics(), run.path / "curves.png"))
    except ImportError as error:  # matplotlib is missing: the search itself is complete
        print(f"no pictures: {error}")
    return SearchResult(found, run.path, (*files, run.checkpoint_path, run.metrics_path, run.config_path), remarks)


__all__ = [
    "Interrupted",
    "SearchResult",
    "build",
    "check",
    "describe",
    "make_method",
    "resume",
    "search",
    "search_step",
]
