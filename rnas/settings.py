"""From TOML, JSON and text to the configuration dataclasses and back, with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def parse_number(text: str) -> float:
    """A float from '0.03', '2e-3' or a fraction such as '8/255', the notation of every paper of the field."""
    try:
        return float(text)
    except ValueError:
        try:
            return float(Fraction(text))
        except ZeroDivisionError:
            raise ValueError(f"{text} divides by zero") from None


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
            if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                raise ValueError
            return int(value)  # never by way of a float, which would round large seeds
        if kind is float:
            if isinstance(value, bool):
                raise ValueError
            return parse_number(value) if isinstance(value, str) else float(value)
        if kind is str and isinstance(value, str):
            return value
    except (ValueError, KeyError, TypeError, OverflowError):
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
