"""The `rnas` command: one subcommand per job, its flags made from the job's configuration dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from . import __version__
from .config import CompareConfig, EvaluateConfig, SearchConfig, TrainConfig
from .loop import Interrupted
from .settings import load_toml, merge, parse_number, set_value

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
    """Run one command and return its exit code: 0, 2 for bad input, 130 for an interrupted job."""
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

    early = _early(arguments, "--method")
    assigned = [text.partition("=")[2].strip() for text in early.set if text.partition("=")[0].strip() == "method"]
    from_file = [load_toml(early.config)["method"]] if early.config and "method" in load_toml(early.config) else []
    method = [SearchConfig.method, *from_file, *assigned, *([early.method] if early.method else [])][-1]
    base = SearchConfig(method=method, options=options_for(method))
    config, resume = _parse("search", SearchConfig, base, arguments, resumable=True)
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

    config, resume = _parse("train", TrainConfig, TrainConfig(), arguments, resumable=True)
    if resume:
        result = _resumable(lambda: train.resume(resume, quiet=config.quiet), "train")
    else:
        result = _resumable(lambda: train.train(config), "train")
    print(f"\nnetwork of {count_parameters(result.network):,} parameters (without auxiliary head)")
    _list_files(result.files)


def _evaluate(arguments: list[str]) -> None:
    from . import evaluate

    config, _ = _parse("evaluate", EvaluateConfig, EvaluateConfig(), arguments, positional="runs")
    result = evaluate.evaluate(config)
    _print_table(result)
    _list_files(result.files)


def _compare(arguments: list[str]) -> None:
    from . import compare, compare_plan, compare_table

    base = CompareConfig()
    config, resume = _parse("compare", CompareConfig, base, arguments, resumable=True, hidden=compare_plan.DECIDED)
    if resume:
        result = _resumable(lambda: compare.resume(resume, quiet=config.quiet), "compare")
    else:
        command = shlex.join(["rnas", "compare", *arguments])
        result = _resumable(lambda: compare.compare(config, command=command), "compare")
    print(compare_table.markdown(result.table, result.notes))
    _list_files(result.files)


def _plot(arguments: list[str]) -> None:
    from . import genotype, plot

    config, _ = _parse("plot", PlotConfig, PlotConfig(), arguments, positional="genotype")
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


def _early(arguments: list[str], *names: str) -> argparse.Namespace:
    """Read the flags that decide the defaults of all others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--resume", default="")
    for name in names:
        parser.add_argument(name, default="")
    return parser.parse_known_args(arguments)[0]


def _parse(
    command: str,
    kind: type,
    base: Any,
    arguments: list[str],
    *,
    resumable: bool = False,
    positional: str = "",
    hidden: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Any, str]:
    """The configuration from, in rising precedence, defaults, --config, --set and flags; and the run to resume.

    hidden: fields of nested configurations that get no flags.
    """
    import tyro

    early = _early(arguments)
    default = merge(base, _assignments(load_toml(early.config))) if early.config else base
    for assignment in early.set:
        default = set_value(default, assignment)
    extra: list[tuple[str, Any, Any]] = []
    hints = {f.name: f.type for f in dataclasses.fields(kind)}
    for name, without in (hidden or {}).items():
        narrow = _narrowed(getattr(default, name), without)
        default = dataclasses.replace(default, **{name: narrow})
        extra.append((name, type(narrow), field(default=narrow)))
    if "options" in hints:
        extra.append(("options", type(default.options), field(default=default.options)))
    if positional:
        inner = tuple[str, ...] if "tuple" in str(hints[positional]) else str
        extra.append((positional, tyro.conf.Positional[inner], field(default=getattr(default, positional))))
    arg = tyro.conf.arg
    extra.append(
        (
            "config",
            Annotated[str, arg(help="TOML file with any of these settings; flags win over it.")],
            field(default=""),
        )
    )
    repeated = Annotated[
        tuple[str, ...],
        arg(help="key=value, such as attack.epsilon=8/255; may be repeated."),
        tyro.conf.UseAppendAction,
    ]
    extra.append(("set", repeated, field(default=())))
    if resumable:
        text = "Folder of an interrupted run to go on with, configured as it was; only --quiet may stand beside it."
        extra.append(("resume", Annotated[str, arg(help=text)], field(default="")))
    full = make_dataclass(kind.__name__, extra, bases=(kind,), frozen=True)
    full.__doc__ = kind.__doc__
    names = [f.name for f in dataclasses.fields(kind)]
    start = full(**{name: getattr(default, name) for name in names})
    parsed = tyro.cli(full, default=start, args=arguments, prog=f"rnas {command}", registry=_registry())
    resume = getattr(parsed, "resume", "")
    if resume:
        others = [
            word for word in arguments if word.startswith("--") and word.split("=")[0] not in ("--resume", "--quiet")
        ]
        if others:
            raise ValueError(
                f"--resume goes on with the configuration in {resume}/config.json; drop {', '.join(others)}"
            )
    values = {name: getattr(parsed, name) for name in names}
    for name in hidden or ():
        plain = type(getattr(base, name))
        values[name] = plain(**{f.name: getattr(values[name], f.name) for f in dataclasses.fields(plain)})
    return kind(**values), resume


def _narrowed(config: Any, names: Sequence[str]) -> Any:
    """`config` in a class for which tyro makes no flags for `names`."""
    import tyro

    kind = type(config)
    hints = get_type_hints(kind)  # not Any, for which tyro takes False and 0 for the same default
    extra = [
        (name, Annotated[hints[name], tyro.conf.Fixed, tyro.conf.Suppress], field(default=getattr(config, name)))
        for name in names
    ]
    narrow = make_dataclass(kind.__name__, extra, bases=(kind,), frozen=True)
    narrow.__doc__ = kind.__doc__
    return narrow(**{f.name: getattr(config, f.name) for f in dataclasses.fields(kind)})


def _assignments(values: dict) -> dict:
    """The TOML tables [overrides.METHOD] as METHOD.KEY=VALUE, the form that they have everywhere else."""

    def flat(table: dict, prefix: str) -> list[str]:
        found = []
        for key, value in table.items():
            found += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}={value}"]
        return found

    tables = values.get("overrides")
    return {**values, "overrides": flat(tables, "")} if isinstance(tables, dict) else values


def _registry() -> Any:
    """tyro's rules, with floats that may be written as fractions (8/255)."""
    from tyro import constructors

    registry = constructors.ConstructorRegistry()

    @registry.primitive_rule
    def fraction(info: constructors.PrimitiveTypeInfo) -> constructors.PrimitiveConstructorSpec | None:
        if info.type is not float:
            return None
        return constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="FLOAT",
            instance_from_str=lambda words: parse_number(words[0]),
            is_instance=lambda value: isinstance(value, (int, float)),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _resumable(job: Callable[[], Any], command: str) -> Any:
    """Run a job; after an interruption say how to go on."""
    try:
        return job()
    except Interrupted as stop:
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
