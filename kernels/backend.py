"""Which implementation serves a call, and why.

An op has up to four implementations: `reference` (plain PyTorch, always there), `cpu` and `cuda` (compiled, in the
modules `rnas._cpu` and `rnas._cuda`) and `triton`. By default the fastest that can take the call serves it. The
environment variable `RNAS_BACKEND` (auto, reference, cpu, cuda, triton; read at every call) forces one; a forced one
that cannot take the call raises and says why. What torch.compile has traced keeps the choice of when it was traced.

The compiled modules are imported at their first use, after torch, whose OpenMP runtime they run on; Triton kernels are
compiled by triton at their first launch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

VARIABLE = "RNAS_BACKEND"
CHOICES = ("auto", "reference", "cpu", "cuda", "triton")


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve a call, or is not built."""


_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}  # backend -> device types it runs on
_ORDER = ("cuda", "triton", "cpu")  # the first that can take a call serves it


def constant_when_traced(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result` without its import of the compiler, which takes seconds."""
    function._dynamo_marked_constant = True
    return function


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op: the function, and the dtypes it takes (None: all)."""

    run: Callable
    dtypes: tuple[torch.dtype, ...] | None = None


@dataclass(frozen=True)
class Op:
    """An op and its implementations by backend name. Creating one makes it known to `describe`."""

    name: str
    implementations: dict[str, Implementation] = field(compare=False)

    def __post_init__(self):
        unknown = set(self.implementations) - set(CHOICES[1:])
        if unknown or "reference" not in self.implementations:
            names = ", ".join(self.implementations)
            raise ValueError(f"{self.name} needs a reference and backends among {CHOICES[1:]}, got {names}")
        OPS[self.name] = self

    def choose(self, device: torch.device, dtype: torch.dtype, uncovered: str | None = None) -> Callable:
        """The function that serves such a call. Raises BackendError where `RNAS_BACKEND` forces one that cannot.

        uncovered: why no kernel covers this very call, whatever its device and dtype; None where they do.
        """
        return self.implementations[self._chosen(device, dtype, uncovered)].run

    @constant_when_traced
    def _chosen(self, device: torch.device, dtype: torch.dtype, uncovered: str | None) -> str:
        name, reason = self.decide(device, dtype)
        if uncovered is not None and name != "reference":
            name, reason = ("reference" if forced() == "auto" else None), uncovered
        if name is None:
            raise BackendError(
                f"{VARIABLE}={forced()} cannot serve {self.name} on {device.type} {_short(dtype)}: {reason}; "
                f"unset {VARIABLE} or set it to auto"
            )
        return name

    @constant_when_traced
    def decide(self, device: torch.device, dtype: torch.dtype) -> tuple[str | None, str]:
        """The backend (None: the forced one cannot) and the reason."""
        choice = forced()
        if choice == "reference":
            return "reference", f"{VARIABLE}=reference"
        if choice != "auto":
            obstacle = self.obstacle(choice, device, dtype)
            return (None, obstacle) if obstacle else (choice, f"{VARIABLE}={choice}")
        obstacles = []
        for name in _ORDER:
            if device.type in _DEVICES[name]:
                obstacle = self.obstacle(name, device, dtype)
                if obstacle is None:
                    return name, "; ".join([*obstacles, "compiled kernel" if name != "triton" else "Triton kernel"])
                obstacles.append(obstacle)
        return "reference", "; ".join(obstacles) or f"no kernels for {device.type} tensors"

    def obstacle(self, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why backend `name` cannot take the call, or None."""
        implementation = self.implementations.get(name)
        if implementation is None:
            return f"{self.name} has no {name} kernel"
        if name in _DEVICES and device.type not in _DEVICES[name]:
            return f"the {name} kernels take {' or '.join(_DEVICES[name])} tensors"
        if implementation.dtypes is not None and dtype not in implementation.dtypes:
            return f"the {name} kernel takes {', '.join(map(_short, implementation.dtypes))}, not {_short(dtype)}"
        return _unavailable(name, device)


OPS: dict[str, Op] = {}


def forced() -> str:
    """The backend that `RNAS_BACKEND` asks for; auto where it is unset."""
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}; got {choice!r}")
    return choice


@functools.cache
def load(name: str) -> ModuleType | str:
    """The compiled module `rnas._cpu` or `rnas._cuda`, or why it is not there."""
    try:
        return importlib.import_module(f"rnas._{name}")
    except ModuleNotFoundError as error:
        if error.name != f"rnas._{name}":
            raise
        needs = "a C++ compiler" if name == "cpu" else "nvcc and a C++ compiler"
        return f"rnas._{name} is not built (reinstall rnas where {needs} can be found)"
    except ImportError as error:
        return f"rnas._{name} cannot be loaded ({error})"


def forget() -> None:
    """Looks for the compiled modules anew at the next call."""
    load.cache_clear()
    _unavailable.cache_clear()


def module(name: str) -> ModuleType:
    """The compiled module `rnas._cpu` or `rnas._cuda`. Raises BackendError where it is not built."""
    loaded = load(name)
    if isinstance(loaded, str):
        raise BackendError(loaded)
    return loaded


def architectures() -> list[str]:
    """What `rnas._cuda` was compiled for, as sm_XX (machine code) and compute_XX (PTX, for newer GPUs)."""
    names = re.findall(r"(\w+)-(real|virtual)", module("cuda").architectures)
    return [f"{'sm' if kind == 'real' else 'compute'}_{number}" for number, kind in names]


@functools.cache
def _unavailable(name: str, device: torch.device) -> str | None:
    """Why the compiled part of a backend cannot run on this device, or None."""
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        return None if compiler else "triton finds no C compiler for its launchers (install gcc or set CC)"
    if name == "reference":
        return None
    loaded = load(name)
    if isinstance(loaded, str):
        return loaded
    return _unsupported_gpu(torch.cuda.get_device_capability(device)) if name == "cuda" else None


def _unsupported_gpu(capability: tuple[int, int]) -> str | None:
    """Why a GPU cannot run what was built, or None: machine code serves one major version, PTX all newer ones."""
    major, minor = capability
    for built in architectures():
        kind, number, exact = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", built).groups()
        version = (int(number[:-1]), int(number[-1]))
        runs = version == capability if exact else version <= capability and (kind == "compute" or version[0] == major)
        if runs:
            return None
    return (
        f"rnas._cuda is built for {' '.join(architectures())}, this GPU is sm_{major}{minor} "
        f"(reinstall with TORCH_CUDA_ARCH_LIST={major}.{minor})"
    )


@dataclass(frozen=True)
class Row:
    """One line of `describe`: an op, a backend, which calls it serves ("" for none), why, and what it was built for."""

    op: str
    backend: str
    serves: str
    reason: str
    built_for: str


def describe() -> list[Row]:
    """For every op and backend: what it serves on this machine, and the reason where it is off."""
    return [_row(op, name) for op in OPS.values() for name in CHOICES[1:]]


def _row(op: Op, name: str) -> Row:
    built_for = _built_for(name) if name in op.implementations else ""
    choice = forced()
    if name == "reference":
        serves = "every call" if choice == "reference" else "what no kernel takes" if choice == "auto" else ""
        return Row(op.name, name, serves, "plain PyTorch" if serves else f"{VARIABLE}={choice}", built_for)
    kind = _DEVICES[name][0]
    if name in op.implementations and kind == "cuda" and not torch.cuda.is_available():
        return Row(op.name, name, "", "no CUDA device is visible", built_for)
    dtypes = (op.implementations[name].dtypes if name in op.implementations else None) or (torch.float32,)
    device = torch.device(kind, 0) if kind == "cuda" and torch.cuda.is_available() else torch.device(kind)
    obstacle = op.obstacle(name, device, dtypes[0])
    if obstacle is not None:
        return Row(op.name, name, "", obstacle, built_for)
    serving, reason = op.decide(device, dtypes[0])
    if serving != name:
        return Row(op.name, name, "", f"{serving or 'nothing'} serves instead ({reason})", built_for)
    return Row(op.name, name, f"{kind} {', '.join(map(_short, dtypes))}", reason, built_for)


def _built_for(name: str) -> str:
    if name not in ("cpu", "cuda") or isinstance(load(name), str):
        return ""
    if name == "cuda":
        return " ".join(architectures())
    return f"{module('cpu').simd_level()} (this processor runs {', '.join(module('cpu').simd_levels())})"


def include_dir() -> Path:
    """The folder to pass to a C++ compiler as -I: holds `rnas/<op>.h`, the C++ and CUDA interface of each op."""
    import rnas

    installed = Path(rnas.__file__).parent / "include"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[1] / "csrc" / "include"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
