"""Builds the compiled modules of rnas from what the machine has.

No C++ compiler: plain PyTorch only. A C++ compiler: `rnas._cpu`. nvcc too: `rnas._cuda`, whether or not a GPU is
visible.

Environment:
  CXX                     the C++ compiler (default: c++, g++ or clang++ on PATH)
  CUDACXX, CUDA_HOME      where nvcc is (default: nvcc on PATH)
  FORCE_CUDA              1: a missing nvcc is an error; 0: leave CUDA out
  TORCH_CUDA_ARCH_LIST    "8.0;9.0;10.0+PTX", with semicolons or spaces (default: 8.0, 9.0, 10.0 and PTX of the last)
  MAX_JOBS                compile jobs at a time
  CMAKE_ARGS              further options of cmake, such as -DRNAS_LEVEL=baseline for a quick build
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0+PTX")


def find_cxx() -> str | None:
    """The C++ compiler, or None."""
    named = os.environ.get("CXX", "").split()
    for candidate in [named[0]] if named else ["c++", "g++", "clang++"]:
        found = shutil.which(candidate)
        if found:
            return found
    if named:
        sys.exit(f"rnas: CXX={os.environ['CXX']!r} was asked for and is not there; unset CXX or name a C++ compiler")
    return None


def find_nvcc() -> str | None:
    """nvcc, or None: where CUDACXX or CUDA_HOME say, else on PATH; None too where FORCE_CUDA=0."""
    if os.environ.get("FORCE_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), str(Path(home, "bin", "nvcc")) if home else None, "nvcc"]
    return next((path for path in map(shutil.which, filter(None, candidates)) if path), None)


def plan() -> str:
    """What this machine builds, in one line; ends the build where FORCE_CUDA asks for what is not there."""
    cxx, nvcc, force = find_cxx(), find_nvcc(), os.environ.get("FORCE_CUDA", "")
    if force not in ("", "0", "1"):
        sys.exit(f"rnas: FORCE_CUDA must be 0 or 1, got {force!r}")
    if force == "1" and not (cxx and nvcc):
        lacking = "nvcc" if cxx else "C++ compiler"
        sys.exit(f"rnas: FORCE_CUDA=1 and no {lacking} was found; put it on PATH, set CUDA_HOME, or unset FORCE_CUDA")
    if cxx is None:
        return "rnas: no C++ compiler found: building without compiled kernels, plain PyTorch will serve every call"
    if nvcc is None:
        return f"rnas: building rnas._cpu only ({'FORCE_CUDA=0' if force == '0' else 'no nvcc found'})"
    return f"rnas: building rnas._cpu and rnas._cuda for {' '.join(cuda_architectures(nvcc))}"


def cuda_architectures(nvcc: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST in CMake's words: "9.0" -> 90-real, "10.0+PTX" -> 100-real and 100-virtual."""
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    names = [name for name in asked if name] or default_architectures(nvcc)
    result = []
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            sys.exit(f"rnas: TORCH_CUDA_ARCH_LIST has {name!r}; expected entries such as 8.0, 9.0a or 10.0+PTX")
        number = match[1] + match[2] + match[3]
        result += [f"{number}-real"] + ([f"{number}-virtual"] if match[4] else [])
    return result


def default_architectures(nvcc: str) -> list[str]:
    """The default list, less what this nvcc is too old (or too new) for; PTX goes with the last one left."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"compute_(\d+)", listing.stdout))
    names = [name.removesuffix("+PTX") for name in DEFAULT_ARCHITECTURES]
    names = [name for name in names if not known or name.replace(".", "") in known]
    if not names:
        sys.exit("rnas: this nvcc knows none of the default architectures; set TORCH_CUDA_ARCH_LIST")
    return names[:-1] + [names[-1] + "+PTX"]


class BuildPython(build_py):
    """Says in one line what will be compiled, then copies the Python files."""

    def run(self):
        print(plan(), flush=True)
        super().run()


class BuildKernels(build_ext):
    """One CMake and Ninja run over csrc/ builds both modules."""

    def run(self):
        in_place, self.inplace = self.inplace, False
        if self.extensions:
            self.build_with_cmake()
        self.inplace = in_place
        if in_place:  # an editable install keeps the modules beside the sources
            self.copy_extensions_to_source()

    def build_with_cmake(self):
        import pybind11

        output = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        work = Path(self.build_temp).resolve() / "cmake"
        shutil.rmtree(work, ignore_errors=True)  # a cache of another environment's cmake would be refused
        nvcc = find_nvcc()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": find_cxx(),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "RNAS_CUDA": "ON" if nvcc else "OFF",
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
            options["CMAKE_CUDA_HOST_COMPILER"] = find_cxx()
            options["CMAKE_CUDA_ARCHITECTURES"] = ";".join(cuda_architectures(nvcc))
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        configure = [f"-D{name}={value}" for name, value in options.items()]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        output.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cmake", "-S", ROOT / "csrc", "-B", work, "-G", "Ninja", *configure], check=True)
        subprocess.run(["cmake", "--build", work, *jobs], check=True)


def modules() -> list[Extension]:
    """The compiled modules this machine can build."""
    if find_cxx() is None:
        return []
    return [Extension(name, sources=[]) for name in ["rnas._cpu"] + (["rnas._cuda"] if find_nvcc() else [])]


if __name__ == "__main__":  # also true under a build front end
    setup(
        packages=[
            *find_packages(include=["rnas", "rnas.*"]),
            *(f"rnas.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
            "rnas.include",
        ],
        package_dir={"rnas": "rnas", "rnas.kernels": "kernels", "rnas.include": "csrc/include"},
        package_data={"rnas": ["assets/*", "py.typed"], "rnas.include": ["rnas/*.h"]},
        include_package_data=False,
        ext_modules=modules(),
        cmdclass={"build_py": BuildPython, "build_ext": BuildKernels},
    )
