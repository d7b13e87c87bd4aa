"""What a comparison runs: the configuration of every search, training and evaluation, and the check of them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from . import evaluate, search, train
from .config import CompareConfig, EvaluateConfig, SearchConfig, TrainConfig, at_least
from .loop import choose_device, cpu_threads
from .methods import METHODS, options_for
from .settings import set_value

REFERENCES = ("darts", "random")

_OF_THE_RUN = ("run", "seed", "device", "threads", "checkpoint_seconds", "quiet")
DECIDED = {  # fields of the shared configurations that the comparison itself decides
    "search": ("method", "options", *_OF_THE_RUN),
    "train": ("genotype", *_OF_THE_RUN),
    "evaluate": ("runs", "output", "device", "threads", "quiet"),
}
BUDGET = ("epochs", "batch_size", "data")


@dataclass(frozen=True)
class Cell:
    """One network of the comparison."""

    method: str
    seed: int

    def folder(self, stage: str) -> str:
        """Name of the folder of its search or training."""
        return f"{stage}-{self.method}-s{self.seed}"


def added_methods(config: CompareConfig) -> tuple[str, ...]:
    """References that the configuration does not name."""
    return tuple(name for name in REFERENCES if config.methods and name not in config.methods)


def all_methods(config: CompareConfig) -> tuple[str, ...]:
    """Every method of the comparison, in the order of the table."""
    return (*(config.methods or tuple(METHODS)), *added_methods(config))


def used_overrides(config: CompareConfig) -> tuple[str, ...]:
    """The overrides of methods in the comparison; one file may hold those of methods that a flag has left out."""
    return tuple(each for each in config.overrides if each.partition(".")[0].strip() in all_methods(config))


def all_cells(config: CompareConfig) -> list[Cell]:
    """Every network, in the order of work: seed by seed, so that a slower hour of the machine meets all methods."""
    return [Cell(method, seed) for seed in config.seeds for method in all_methods(config)]


def search_config(config: CompareConfig, cell: Cell) -> SearchConfig:
    """The search of one network. Raises ValueError for an override that does not fit the method."""
    spaces, shared = METHODS[cell.method].spaces, config.search
    own = dataclasses.replace(
        shared,
        method=cell.method,
        options=options_for(cell.method),
        space=shared.space if not spaces or shared.space in spaces else spaces[0],
        seed=cell.seed,
        **_of_the_run(config, cell.folder("search")),
    )
    for override in config.overrides:
        method, _, assignment = override.partition(".")
        if method.strip() == cell.method:
            try:
                own = set_value(own, assignment)
            except ValueError as error:
                raise ValueError(f"override {override!r}: {error}") from None
    return own


def train_config(config: CompareConfig, cell: Cell) -> TrainConfig:
    """The training of the architecture that a network's search has found."""
    found = str(Path(config.run) / cell.folder("search"))
    return dataclasses.replace(
        config.train, genotype=found, seed=cell.seed, **_of_the_run(config, cell.folder("train"))
    )


def evaluate_config(config: CompareConfig, cell: Cell) -> EvaluateConfig:
    """The evaluation of one trained network; the random starts are the same for all."""
    trained = str(Path(config.run) / cell.folder("train"))
    return dataclasses.replace(
        config.evaluate, runs=(trained,), device=config.device, threads=config.threads, quiet=True
    )


def _of_the_run(config: CompareConfig, folder: str) -> dict:
    return {
        "run": str(Path(config.run) / folder),
        "device": config.device,
        "threads": config.threads,
        "checkpoint_seconds": config.checkpoint_seconds,
        "quiet": True,
    }


def resolve(config: CompareConfig) -> CompareConfig:
    """Check every search, training and evaluation, and fill in what was left open. Writes nothing.

    Raises ValueError, FileNotFoundError or ImportError as the jobs themselves would.
    """
    _check_lists(config)
    at_least(0, "", config, "threads", "checkpoint_seconds")
    for part, names in DECIDED.items():
        shared = getattr(config, part)
        for name in names:
            if getattr(shared, name) != getattr(type(shared)(), name):
                raise ValueError(_misplaced(part, name))
    config = dataclasses.replace(
        config,
        methods=config.methods or tuple(METHODS),
        run=config.run or f"runs/compare-{Path(config.train.data.dataset).stem}",
        device=str(choose_device(config.device)),
        threads=config.threads or torch.get_num_threads(),
    )
    with cpu_threads(config.threads):
        for method in all_methods(config):
            searched, trained = _check_cell(config, Cell(method, config.seeds[0]))
    return dataclasses.replace(
        config,
        search=dataclasses.replace(config.search, data=searched.data),
        train=dataclasses.replace(config.train, data=trained.data),
    )


def _check_lists(config: CompareConfig) -> None:
    for name in config.methods:
        options_for(name)
    for name in ("methods", "seeds"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise ValueError(f"{name} must differ from each other; got {', '.join(map(str, values))}")
    if not config.seeds:
        raise ValueError("no seeds given: --seeds takes at least one, and a spread needs two")
    for override in config.overrides:
        key, equals, _ = override.partition("=")
        method, dot, name = key.strip().partition(".")
        if not (equals and dot and name):
            raise ValueError(f"overrides take METHOD.KEY=VALUE, such as dsara.options.order=1; got {override!r}")
        try:
            options_for(method)
        except ValueError as error:
            raise ValueError(f"override {override!r}: {error}") from None
        field = name.partition(".")[0].replace("-", "_")
        if field in BUDGET:
            raise ValueError(f"override {override!r}: the budget is the same for all methods; set search.{field}")
        if field in ("method", *_OF_THE_RUN):
            raise ValueError(f"override {override!r}: the comparison itself decides {field!r}")


def _misplaced(part: str, name: str) -> str:
    instead = {
        "seed": "list the seeds in `seeds`",
        "method": "list the methods in `methods`",
        "options": 'they belong to one method: overrides = ["METHOD.options.KEY=VALUE"]',
        "genotype": "each network has the architecture that its own search finds",
        "runs": "every network of the comparison is evaluated",
        "output": "compare.json and table.md hold the results",
    }.get(name, f"set `{name}` of the comparison")
    return f"{part}.{name} has no place in a comparison: {instead}"


def _check_cell(config: CompareConfig, cell: Cell) -> tuple[SearchConfig, TrainConfig]:
    """Go through the checks of one network's three jobs; returns its resolved search and training."""
    with _named("search", cell):
        searched = search.check(search_config(config, cell))
        untrained = search.make_method(searched).genotype()  # of the shape that the search will find
    with _named("train", cell):
        trained = train.check(train_config(config, cell), untrained)
    with _named("evaluate", cell):
        evaluate.check(evaluate_config(config, cell), [trained])
    return searched, trained


@contextmanager
def _named(stage: str, cell: Cell) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{stage} of {cell.method}: {error}") from None
