"""Search methods, one file each. A new method is a `Method` subclass in its own file, named in METHODS."""

from __future__ import annotations

import difflib
from typing import Any

from .advrush import AdvRush
from .darts import Darts
from .dsara import Dsara
from .dsrna import Dsrna
from .method import Batch, LevelResult, Method, Mixing, SearchPlan, SearchStep, discretise, entropy
from .pcdarts import PcDarts
from .racl import Racl
from .random import Random
from .rnas import Rnas

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Dsrna, Racl, Rnas, Dsara, Darts, PcDarts, AdvRush, Random)
}

__all__ = [
    "METHODS",
    "AdvRush",
    "Batch",
    "Darts",
    "Dsara",
    "Dsrna",
    "LevelResult",
    "Method",
    "Mixing",
    "PcDarts",
    "Racl",
    "Random",
    "Rnas",
    "SearchPlan",
    "SearchStep",
    "discretise",
    "entropy",
    "options_for",
]


def options_for(name: str) -> Any:
    """The default options of the method called `name`. Raises ValueError naming the nearest known one."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METHODS)}"
        raise ValueError(f"unknown search method {name!r}; {hint}")
    return METHODS[name].Options()
