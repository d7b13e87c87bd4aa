"""The `rnas` command: one subcommand per job, its flags made from the job's configuration dataclass."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__, flags
from .config import CompareConfig, EvaluateConfig, SearchConfig, TrainConfig
from .loop import Interrupted
from .settings import load_toml

SUMMARY = f"""rnas {__version__}: search, train and evaluate robust neural architectures.

usage: rnas COMMAND [flags]        (rnas COMMAND --help explains every flag)

  search     search an architecture on a relaxed supernet, clean or under attack
  train      train the network of a genotype from scratch, adversarially or not
  evaluate   accuracy of trained networks: clean, FGSM, PGD
  compare    several methods and seeds on one budget, with mean, spread and controls
  plot       draw the cells of a genotype as SVG and PNG
  env        versions, what was compiled, and which backend serves each operation

a first run:
  rnas search --channels 8 --layers 3 --nodes 2 --stem-stride 2 --epochs 1 --run runs/first
  rnas train --genotype runs/first --channels 8 --layers 3 --stem-stride 2 --epochs 1 --run runs/first-net
  rnas evaluate runs/first-net
"""


@dataclass(frozen=True)
class PlotConfig:
    """Draw the cells of a genotype."""

    genotype: str = ""
    """A search run's folder, a genotype.json, a file with Genotype(...) text, or a published name."""
    output: str = ""
    """Path without ending; .svg and .png are added. Empty: cells in the run's folder, or the name in this folder."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input, 130 for a job that was asked to stop."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(SUMMARY)
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"rnas {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"rnas: unknown command {command!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    from .kernels.backend import BackendError

    try:
        COMMANDS[command](rest)
    except Interrupted:
        return 130
    except KeyboardInterrupt:  # outside the batches of a job, which end with Interrupted
        print(f"rnas {command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except (ValueError, OSError, FloatingPointError, ImportError, BackendError) as error:
        print(f"rnas {command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _search(arguments: list[str]) -> None:
    from . import genotype, search
    from .methods import options_for

    first = flags.early_flags(arguments, "--method")
    assigned = [text.partition("=")[2].strip() for text in first.set if text.partition("=")[0].strip() == "method"]
    from_file = [load_toml(first.config)["method"]] if first.config and "method" in load_toml(first.config) else []
    method = [SearchConfig.method, *from_file, *assigned, *([first.method] if first.method else [])][-1]
    base = SearchConfig(method=method, options=options_for(method))
    config, resume = flags.parse("search", SearchConfig, base, arguments, resumable=True)
    if resume:
        result = _resumable(lambda: search.resume(resume, quiet=config.quiet), "search")
    else:
        result = _resumable(lambda: search.search(config), "search")
    print(f"\ngenotype: {genotype.to_text(result.genotype)}")
    for remark in result.remarks:
        print(f"remark: {remark}")
    _list_files(result.files)


def _train(arguments: list[str]) -> None:
    from . import train
    from .network import count_parameters

    config, resume = flags.parse("train", TrainConfig, TrainConfig(), arguments, resumable=True)
    if resume:
        result = _resumable(lambda: train.resume(resume, quiet=config.quiet), "train")
    else:
        result = _resumable(lambda: train.train(config), "train")
    print(f"\nnetwork of {count_parameters(result.network):,} parameters (without auxiliary head)")
    _list_files(result.files)


def _evaluate(arguments: list[str]) -> None:
    from . import evaluate

    config, _ = flags.parse("evaluate", EvaluateConfig, EvaluateConfig(), arguments, positional="runs")
    result = evaluate.evaluate(config)
    _print_table(result)
    _list_files(result.files)


def _compare(arguments: list[str]) -> None:
    from . import compare, compare_plan, compare_table

    base = CompareConfig()
    config, resume = flags.parse("compare", CompareConfig, base, arguments, resumable=True, hidden=compare_plan.DECIDED)
    if resume:
        result = _resumable(lambda: compare.resume(resume, quiet=config.quiet), "compare")
    else:
        command = shlex.join(["rnas", "compare", *arguments])
        result = _resumable(lambda: compare.compare(config, command=command), "compare")
    print(compare_table.markdown(result.table, result.notes))
    _list_files(result.files)


def _plot(arguments: list[str]) -> None:
    from . import genotype, plot

    config, _ = flags.parse("plot", PlotConfig, PlotConfig(), arguments, positional="genotype")
    if not config.genotype:
        raise ValueError("no genotype given: rnas plot takes a run folder, a genotype file or a published name")
    folder = Path(config.genotype)
    stem = Path(config.output) if config.output else (folder / "cells" if folder.is_dir() else Path(folder.stem))
    _list_files(plot.draw_cells(genotype.load(config.genotype), stem))


def _env(arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"rnas env takes no arguments; got {' '.join(arguments)}")
    import platform

    import torch
    from rich.console import Console
    from rich.table import Table

    from .kernels import backend

    console = Console()
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible"
    console.print(
        f"rnas {__version__}, Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    )
    console.print(f"CPU threads {torch.get_num_threads()}, CUDA device: {cuda}")
    table = Table(*(column.name.replace("_", " ") for column in dataclasses.fields(backend.Row)))
    for row in backend.describe():
        table.add_row(*dataclasses.astuple(row))
    console.print(table)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "search": _search,
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "plot": _plot,
    "env": _env,
}


def _resumable(job: Callable[[], Any], command: str) -> Any:
    """Run a job; after an interruption say how to go on, if anything is left to do."""
    try:
        return job()
    except Interrupted as stop:
        if stop.finished:
            print(f"stopped after the last batch: {stop.run} is finished, all its files are written", file=sys.stderr)
        else:
            print(f"stopped, nothing is lost. Go on with: rnas {command} --resume {stop.run}", file=sys.stderr)
        raise


def _list_files(files: Sequence[Path]) -> None:
    print("files:")
    for path in files:
        print(f"  {path}")


def _print_table(result: Any) -> None:
    """The accuracies as a table, one network a line."""
    from rich.console import Console
    from rich.table import Table

    attack = result.attack
    iterate = "any iterate" if result.early_drop else "the last iterate"
    print(f"accuracy on {result.images:,} test images, {attack.norm} epsilon {attack.epsilon:.4g}")
    print(f"an image is fooled by PGD if {iterate} fools it")
    table = Table("network", "recipe", "parameters", *result.rows[0].accuracies)
    for row in result.rows:
        table.add_row(
            row.name, row.recipe, f"{row.parameters:,}", *(f"{value:.2%}" for value in row.accuracies.values())
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(main())
