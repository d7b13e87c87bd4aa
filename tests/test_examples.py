"""The examples: what they claim holds, and none of them can be green on kernels that are wrong."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from rnas import attacks, kernels
from rnas.kernels import backend

EXAMPLES = REPOSITORY / "examples"
PYTHON = sorted(path.stem for path in EXAMPLES.glob("*.py"))
FUNCTIONS = [name for name in kernels.__all__ if not isinstance(getattr(kernels, name), type)]
WITHOUT_NUMBERS = {"arrange", "empty_cache"}  # they move memory: there is no result of theirs to be wrong
PLANTED = {  # an argument of the C++ program: the check that has to notice
    "out": "out, largest difference",
    "gradient": "gradient, states",
    "attack": "outside the ball",
    "descent": "loss that was not gained",
}


def source(name: str) -> str:
    return (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")


def uses(name: str, function: str) -> bool:
    return re.search(rf"(?<![\w.]){function}\(", source(name).partition("rnas.kernels import")[2]) is not None


def run(name: str) -> float:
    """What the example has measured; it asserts that this is small."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")["main"]()


# ---- Python ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PYTHON)
def test_an_example_agrees_with_plain_pytorch(name, compiled, capsys):
    error = run(name)
    assert 0 <= error < 1e-4
    printed = capsys.readouterr().out
    assert not compiled or f"to {error:.1e}" in printed
    # float32 of two different orders of summation: the very same bits would be one implementation compared with itself
    assert not compiled or error > 0 or name in ("attack", "pgd_step", "profile_kernels")


@pytest.mark.parametrize("name", PYTHON)
def test_an_example_holds_where_plain_pytorch_serves(name, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "reference")
    assert 0 <= run(name) < 1e-4


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_kernel_has_an_example(function):
    assert any(uses(name, function) for name in PYTHON), f"no file in examples/ calls {function}"


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name not in WITHOUT_NUMBERS])
def test_an_example_notices_a_kernel_that_is_wrong(function, compiled, monkeypatch):
    right = getattr(kernels, function)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        # a factor alone would be taken away by the norm behind it
        moved = result + 0.01 * result.roll(1, dims=-1)
        return moved if options.get("out") is None else result.copy_(moved)

    @contextlib.contextmanager
    def miscounted():
        with right() as found:
            yield found
        found.multiply_adds["pointwise"] += 1000

    if function == "profile" and not compiled:
        pytest.skip("there is nothing to count without rnas._cpu")
    monkeypatch.setattr(kernels, function, miscounted if function == "profile" else wrong)
    noticed = []
    for name in filter(lambda name: uses(name, function), PYTHON):
        try:
            run(name)
        except AssertionError:
            noticed.append(name)
    assert noticed, f"all examples of {function} are content with a wrong one"


@pytest.mark.parametrize("function", ["pgd", "pgd_sweep"])
@pytest.mark.parametrize("fault", ["weaker", "moves statistics"])
def test_the_example_of_attacks_notices_an_attack_that_is_wrong(function, fault, monkeypatch):
    right = getattr(attacks, function)

    def wrong(network, x, y, **options):
        found = right(network, x, y, **options)
        if fault == "weaker":
            return x + 0.99 * (found - x)
        network[1].running_mean += 1e-3
        return found

    monkeypatch.setattr(attacks, function, wrong)
    with pytest.raises(AssertionError):
        run("attack")


@pytest.mark.parametrize("name", PYTHON)
def test_an_example_says_what_it_shows_and_how_to_run_it(name):
    docstring = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")["__doc__"]
    assert re.match(r"[A-Z].*\.\n\n    python examples/" + name + r"\.py\n", docstring)


def test_an_example_runs_as_it_says():
    command = [sys.executable, "examples/pgd_step.py"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pgd_step agrees with plain PyTorch" in done.stdout


# ---- docs/embedding.md -----------------------------------------------------------------------------------------------

PAGE = (REPOSITORY / "docs" / "embedding.md").read_text(encoding="utf-8")


def test_every_file_that_the_page_links_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    assert len(links) > 30
    for target in links:
        assert (REPOSITORY / "docs" / target).exists(), target


def test_the_page_names_every_header():
    named = set(re.findall(r"^\| `(\w+\.h)` \|", PAGE, flags=re.MULTILINE))
    assert named == {path.name for path in (REPOSITORY / "csrc" / "include" / "rnas").glob("*.h")}


def test_the_call_on_the_page_compiles(tmp_path):
    (code,) = re.findall(r"```cpp\n(.*?)```", PAGE, flags=re.DOTALL)
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), None) or pytest.skip("needs a C++ compiler")
    (tmp_path / "call.cpp").write_text(code)
    include = f"-I{REPOSITORY / 'csrc' / 'include'}"
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", include, "call.cpp"]
    subprocess.run(command, cwd=tmp_path, check=True)


# ---- C++ -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedding(tmp_path_factory) -> Path:
    """examples/cpp, built for one instruction set without Python."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = [name for name in ("cmake", "ninja") if shutil.which(name, path=tools) is None]
    missing += [] if any(shutil.which(name) for name in ("c++", "g++", "clang++")) else ["a C++ compiler"]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("embedding")
    configure = ["cmake", "-S", EXAMPLES / "cpp", "-B", folder, "-G", "Ninja", "-DRNAS_LEVEL=baseline"]
    for command in (configure, ["cmake", "--build", folder, "--parallel", os.environ.get("MAX_JOBS", "2")]):
        done = subprocess.run(command, env=os.environ | {"PATH": tools}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def embed(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([folder / "embedding", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_the_program_agrees_with_plain_loops(embedding):
    done = embed(embedding)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "all agree" and "WRONG" not in done.stdout
    assert sum(line.endswith("  ok") for line in lines) == 2 * 6 + 4  # an edge, a cell, an attack
    before, after = map(float, re.search(r"loss (\S+) before, (\S+) after", done.stdout).groups())
    assert after > before


@pytest.mark.parametrize("planted", PLANTED)
def test_the_program_notices_an_error(embedding, planted):
    done = embed(embedding, planted)
    assert done.returncode == 1, done.stdout + done.stderr
    wrong = [line for line in done.stdout.splitlines() if line.endswith("WRONG")]
    assert any(PLANTED[planted] in line for line in wrong), done.stdout
    assert done.stdout.splitlines()[-1] == "they do not agree"


def test_the_program_refuses_an_error_it_does_not_know(embedding):
    done = embed(embedding, "nothing")
    assert done.returncode == 2 and "expected out, gradient, attack or descent, got nothing" in done.stderr


def test_the_program_needs_neither_python_nor_torch(embedding):
    cache = (embedding / "CMakeCache.txt").read_text()
    assert "RNAS_LEVEL:STRING=baseline" in cache
    assert not re.search(r"^(_?Python|pybind11|Torch)", cache, flags=re.MULTILINE | re.IGNORECASE)
    if shutil.which("ldd"):
        linked = subprocess.run(["ldd", embedding / "embedding"], capture_output=True, text=True, check=True).stdout
        assert not re.search("python|torch", linked)
