"""From the words of a command line to a configuration: flags made from its dataclass, a TOML file, --set."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass
from typing import Annotated, Any, get_type_hints

from .settings import load_toml, merge, parse_number, set_value


def parse(
    command: str,
    kind: type,
    base: Any,
    arguments: list[str],
    *,
    resumable: bool = False,
    positional: str = "",
    hidden: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Any, str]:
    """The configuration from, in rising precedence, defaults, --config, --set and flags; and the run to resume or "".

    Args:
        command: the subcommand, for --help.
        kind: the configuration's dataclass; every field is a flag, those of nested dataclasses with a dotted name.
        base: the defaults, an instance of `kind`. Its `options`, where it has any, decide the flags under --options.
        arguments: the words behind the subcommand.
        resumable: there is a --resume, beside which only --quiet may stand.
        positional: the field that takes the words without a flag.
        hidden: by nested configuration, its fields that get no flags.

    Raises ValueError or FileNotFoundError naming the key, value or file; SystemExit for --help (0) and for an unknown
    flag (2).
    """
    import tyro

    first = early_flags(arguments)
    default = merge(base, flat_overrides(load_toml(first.config))) if first.config else base
    for assignment in first.set:
        default = set_value(default, assignment)
    extra: list[tuple[str, Any, Any]] = []
    hints = {f.name: f.type for f in dataclasses.fields(kind)}
    for name, without in (hidden or {}).items():
        narrow = narrowed(getattr(default, name), without)
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
    parsed = tyro.cli(full, default=start, args=arguments, prog=f"rnas {command}", registry=registry())
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


def early_flags(arguments: list[str], *names: str) -> argparse.Namespace:
    """The flags that decide the defaults of all others: --config, --set, --resume and `names`; "" or [] if absent."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--resume", default="")
    for name in names:
        parser.add_argument(name, default="")
    return parser.parse_known_args(arguments)[0]


def narrowed(config: Any, names: Sequence[str]) -> Any:
    """`config` in a class of the same name and fields for which tyro makes no flags for `names`."""
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


def flat_overrides(values: dict) -> dict:
    """The tables of a TOML file with [overrides.METHOD] as METHOD.KEY=VALUE, its form everywhere else."""

    def flat(table: dict, prefix: str) -> list[str]:
        found = []
        for key, value in table.items():
            found += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}={value}"]
        return found

    tables = values.get("overrides")
    return {**values, "overrides": flat(tables, "")} if isinstance(tables, dict) else values


def registry() -> Any:
    """tyro's rules of how words become values, with floats that may be written as fractions (8/255)."""
    from tyro import constructors

    rules = constructors.ConstructorRegistry()

    @rules.primitive_rule
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

    return rules
