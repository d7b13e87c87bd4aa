"""Search, train and evaluate robust neural architectures on fast kernels.

`rnas.kernels` holds the operations; `rnas.search`, `rnas.train` and `rnas.evaluate` are the three jobs. Importing this
package builds nothing, opens no device and reads no file; every submodule is loaded when it is first used.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_SUBMODULES = (
    "attacks",
    "certify",
    "compare",
    "config",
    "data",
    "evaluate",
    "fusion",
    "genotype",
    "kernels",
    "loop",
    "methods",
    "network",
    "operations",
    "plot",
    "progress",
    "runs",
    "search",
    "seeding",
    "settings",
    "spaces",
    "supernet",
    "train",
)

_FUNCTIONS = {"accelerate": "fusion", "restore": "fusion"}


def __getattr__(name: str):
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"rnas.{_FUNCTIONS[name]}"), name)
    if name not in _SUBMODULES:
        raise AttributeError(f"module 'rnas' has no attribute {name!r}")
    try:
        return importlib.import_module(f"rnas.{name}")
    except ModuleNotFoundError as error:
        if error.name == "rnas.kernels":
            raise ImportError(
                "rnas.kernels is missing: this is the source folder, not the installed package. "
                "Run from another folder, or install it editable with `pip install -e .`"
            ) from None
        raise


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES, *_FUNCTIONS])
