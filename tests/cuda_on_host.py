"""The CUDA kernels of the mixed operation on a machine without a GPU: built as plain C++, serving CPU tensors.

A block's threads run one after another there, so that a test sees everything but what a GPU does at once.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rnas.kernels import backend, engine, fused
from rnas.kernels.mixed_op import OP

VARIABLE = "RNAS_CUDA_ON_HOST_MODULE"
"""An environment variable: the path of the module, where it is built already."""

SOURCES = Path(__file__).resolve().parents[1] / "csrc"


def build(folder: Path) -> ModuleType:
    """The module, compiled into `folder` where it is not there yet; skips the test where a tool is missing."""
    path = os.environ.get(VARIABLE) or _compiled(folder)
    specification = importlib.util.spec_from_file_location("_cuda_on_host", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _compiled(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes the first builds, and the others wait
        return next(folder.glob("_cuda_on_host*.so"), None) or _compile(folder)


def _compile(folder: Path) -> Path:
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = [name for name in ("cmake", "ninja") if shutil.which(name, path=tools) is None]
    missing += [] if any(shutil.which(name) for name in ("c++", "g++", "clang++")) else ["a C++ compiler"]
    missing += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    missing += [] if SOURCES.is_dir() else ["csrc/"]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    import pybind11

    options = {
        "CMAKE_BUILD_TYPE": "None",
        "RNAS_CUDA_ON_HOST": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    configure = ["cmake", "-S", SOURCES, "-B", folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
    for command in (configure, ["cmake", "--build", folder, "--target", "_cuda_on_host"]):
        done = subprocess.run(command, env=os.environ | {"PATH": tools}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("_cuda_on_host*.so"))


class OnHost(engine.Cuda):
    """The engine of the module: as that of a GPU, with nothing to queue on."""

    def __init__(self, module: ModuleType, device) -> None:
        super().__init__(device)
        self._module = module

    @property
    def module(self) -> ModuleType:
        return self._module

    def stream(self) -> tuple[int, int]:
        return 0, 0


def serve(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Forces the module on every tensor of this process, and all that Python does otherwise for GPUs only."""
    patch.setattr(engine, "of", lambda x: OnHost(module, x.device))
    patch.setattr(backend, "_unavailable", lambda name, device: None)
    patch.setitem(OP.implementations, "cpu", OP.implementations["cuda"])  # and its dtypes
    patch.setattr(fused, "_reader", lambda: None)  # compiled code reads parameters and norms of the CPU alone
    patch.setenv(backend.VARIABLE, "cpu")
