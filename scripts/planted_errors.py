"""Plants one error after another in the kernels, of CUDA as they run on the host, and expects a red test for each.

    python scripts/planted_errors.py [--list | --check] [name or part of a name ...]

Works on a copy of the repository in a temporary folder: builds rnas._cpu there for one instruction set, or the CUDA
kernels as plain C++, runs the tests that the tables in planted_table.py and planted_cuda.py name, first without an
error, then with each. Exits with 1 if one goes unnoticed.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pytest
from planted_cuda import PLANTED_CUDA
from planted_table import PLANTED as PLANTED_CPU
from planted_table import Planted

ROOT = Path(__file__).resolve().parents[1]
PLANTED = [*PLANTED_CPU, *PLANTED_CUDA]
HOST = "host"
"""In the place of an instruction set: the CUDA kernels as plain C++."""
LIMIT = 900  # seconds for one run of tests


class Broken(Exception):
    """Something else went wrong than a test."""


def plant(error: Planted, source: str) -> str:
    """The source with the error in it; raises `Broken` where the original text is not there exactly once."""
    spans = [(0, len(source))]
    if error.inside:  # from its head to the brace that stands no further right
        spans = []
        for head in re.finditer(rf"^( *).*{re.escape(error.inside)}", source, re.MULTILINE):
            end = re.compile(rf"^ {{0,{len(head[1])}}}\}}", re.MULTILINE).search(source, head.end())
            spans.append((head.start(), end.start() if end else len(source)))
    text = re.compile(re.escape(error.original))
    found = {match.span() for span in spans for match in text.finditer(source, *span)}
    if len(found) != 1:
        where = f"{error.file}, {error.inside}" if error.inside else error.file
        raise Broken(f"{error.name}: {error.original!r} occurs {len(found)} times in {where}")
    begin, end = found.pop()
    return source[:begin] + error.replacement + source[end:]


def check(errors: list[Planted]) -> list[str]:
    """What is wrong with the table, line by line."""
    problems = []
    names = [error.name for error in errors]
    problems += [f"two errors are called {name}" for name in sorted({name for name in names if names.count(name) > 1})]
    for error in errors:
        try:
            if plant(error, (ROOT / "csrc" / error.file).read_text()) == (ROOT / "csrc" / error.file).read_text():
                problems.append(f"{error.name}: the replacement changes nothing")
        except (Broken, OSError) as problem:
            problems.append(str(problem))
        if not (ROOT / error.tests[0]).is_file():
            problems.append(f"{error.name}: there is no {error.tests[0]}")
    return problems


class Workshop:
    """A copy of the repository, its builds and its tests."""

    def __init__(self, folder: Path):
        self.folder = folder
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        for name in ("csrc", "rnas", "tests", "scripts"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        shutil.copytree(ROOT / "kernels", folder / "rnas" / "kernels", ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", folder)

    def build(self, level: str) -> Path:
        """Builds rnas._cpu for one instruction set, or _cuda_on_host; of an earlier build only what an edit changed."""
        import pybind11

        build, on_host = self.folder / "build" / level, level == HOST
        if not build.is_dir():
            options = {"CMAKE_BUILD_TYPE": "None", "Python_EXECUTABLE": sys.executable}
            options |= {"RNAS_CUDA_ON_HOST": "ON"} if on_host else {"RNAS_LEVEL": level}
            options["pybind11_DIR"] = pybind11.get_cmake_dir()
            options = [f"-D{name}={value}" for name, value in options.items()]
            self.run("cmake", "-S", self.folder / "csrc", "-B", build, "-G", "Ninja", *options)
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        target = ["--target", "_cuda_on_host"] if on_host else []
        self.run("cmake", "--build", build, *target, *jobs)
        return next(build.glob("_cuda_on_host*" if on_host else "_cpu*"))

    def test(self, module: Path, file: str, expression: str) -> tuple[int, str]:
        """Runs a selection of tests on a module up to the first failure: exit status and output.

        In a fork of this process, which has imported already what takes seconds and what is not under test.
        """
        report = self.folder / "report.txt"
        options = ["-q", "-x", "--tb=no", "-rfE", "--disable-warnings"]
        options += ["-p", "no:cacheprovider", file, "-k", expression]
        on_host = module.name.startswith("_cuda_on_host")
        if not on_host:
            options += ["-p", "scripts.sanitized_module"]

        def child():
            with report.open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            os.chdir(self.folder)
            os.environ["RNAS_CUDA_ON_HOST_MODULE" if on_host else "RNAS_CPU_MODULE"] = str(module)
            sys.path.insert(0, str(self.folder))
            os._exit(pytest.main(options))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            raise Broken(f"the tests took longer than {LIMIT} s")
        return process.exitcode, report.read_text()

    def run(self, *command) -> None:
        """Runs a command; raises `Broken` with the end of its output where it fails."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # cmake, ninja
        options = {"env": os.environ | {"PATH": path}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, check=False, text=True, **options)
        if done.returncode:
            raise Broken(done.stdout[-3000:])

    def expect_green(self, errors: list[Planted], level: str) -> None:
        """All that the errors' selections hold must pass without an error."""
        module = self.build(level)
        selections = defaultdict(dict)
        for error in errors:
            selections[error.tests[0]][f"({error.tests[1]})"] = None
        for file, expressions in selections.items():
            status, output = self.test(module, file, " or ".join(expressions))
            if status:
                raise Broken(f"{file} fails without a planted error:\n{output[-3000:]}")

    def first_failure(self, error: Planted, level: str) -> str:
        """The first test that fails with the error planted, empty where none does."""
        path = self.folder / "csrc" / error.file
        sound = path.read_text()
        path.write_text(plant(error, sound))
        try:
            status, output = self.test(self.build(level), *error.tests)
        finally:
            path.write_text(sound)
        failed = re.findall(r"^FAILED (?:tests/)?(.+?)(?: - .*)?$", output, re.MULTILINE)
        if status == 0:
            return ""
        if status != 1 or not failed or re.search(r"^ERROR ", output, re.MULTILINE):
            raise Broken(f"the tests ended with {status}:\n{output[-1000:]}")
        return failed[0]


def simd_levels() -> list[str]:
    """The instruction sets of this processor, asked in another process: nothing of rnas is imported in this one."""
    command = "import torch; from rnas import _cpu; print(*_cpu.simd_levels())"
    return subprocess.run([sys.executable, "-c", command], check=True, text=True, stdout=subprocess.PIPE).stdout.split()


def run(errors: list[Planted]) -> int:
    """Prints a line for each error; how many went unnoticed."""
    levels, start, missed = simd_levels(), time.monotonic(), 0
    runnable = defaultdict(list)
    for error in errors:
        if error.level and error.level not in (*levels, HOST):
            print(f"{error.name}: left out, this processor has no {error.level}")
        else:
            runnable[error.level or levels[-1]].append(error)
    for name in ("torch._dynamo.testing", "hypothesis", "rich"):
        importlib.import_module(name)
    width = max(len(error.name) for error in errors)
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for level, of_level in runnable.items():
            workshop.expect_green(of_level, level)
            print(f"all green without an error ({level}, {time.monotonic() - start:.0f} s)", flush=True)
            for error in of_level:
                begin = time.monotonic()
                try:
                    found = workshop.first_failure(error, level)
                except Broken as problem:
                    found, missed = f"BROKEN: {problem}", missed + 1
                if not found:
                    found, missed = "SURVIVED", missed + 1
                print(f"{error.name:{width}}  {time.monotonic() - begin:5.1f} s  {found}", flush=True)
    count = sum(len(of_level) for of_level in runnable.values())
    print(f"{count} planted, {count - missed} caught, {missed} not; {time.monotonic() - start:.0f} s")
    return missed


def main() -> int:
    """The command line; 1 where an error went unnoticed or can no longer be planted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of errors, or parts of them; all where none is given")
    parser.add_argument("--list", action="store_true", help="prints the errors")
    parser.add_argument("--check", action="store_true", help="only looks whether every original text is there once")
    options = parser.parse_args()
    errors = [e for e in PLANTED if not options.names or any(name in e.name for name in options.names)]
    if not errors:
        parser.error(f"no error is called {' or '.join(options.names)}; see --list")
    if options.list:
        for error in errors:
            print(f"{error.name}\n    {error.file}; {' -k '.join(error.tests)}")
        return 0
    problems = check(errors)
    print("\n".join(problems) or f"{len(errors)} errors can be planted")
    if problems or options.check:
        return bool(problems)
    return bool(run(errors))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Broken as problem:
        sys.exit(str(problem))
