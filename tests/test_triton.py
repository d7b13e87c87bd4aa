"""The Triton kernels in Triton's interpreter, on the CPU, and that they cost nothing where nobody asks for them.

Triton decides at its import whether to interpret, so the interpreted tests run in processes of their own: those of
test_pgd_step.py, the same that run on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "triton"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture
def interpreter():
    """Skips where the interpreter of an older Triton turns a number of a loop's bounds into what NumPy refuses."""
    here = {name: version(name) for name in ("triton", "numpy")}
    numbers = {name: tuple(map(int, re.findall(r"\d+", text)[:2])) for name, text in here.items()}
    if numbers["triton"] < (3, 8) and numbers["numpy"] >= (2, 4):
        pytest.skip("the interpreter of Triton {triton} does not run loops with NumPy {numpy}".format(**here))


def python(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
def test_interpreted_pgd_step_passes_every_test_of_the_op(interpreter):
    # Left out: thousands of samples, which the interpreter takes one after the other, and its own determinism.
    chosen = "triton and not (overlap or same_bits or 70)"
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_pgd_step.py", "-k", chosen)
    code, output = python(*arguments, TRITON_INTERPRET="1")
    assert code == 0, output
    assert int(re.search(r"(\d+) passed", output)[1]) >= 45 and "skipped" not in output, output


# What is changed in the kernels, and a test of the op that sees it.
MATCH = "equals_the_float64_reference(cpu, (2, 3, 31, 33), 'linf')"
PLANTED = {
    "sign of zero": ("(g > 0)", "(g >= 0)", "zero_gradient_makes_no_step(cpu, 'linf')"),
    "sign of NaN": ("tl.where(g != g, g, (g > 0)", "tl.where(g != g, 0.0, (g > 0)", "nan_stays_nan(cpu, 'linf')"),
    "clamp drops NaN": ("tl.PropagateNan.ALL", "tl.PropagateNan.NONE", "nan_stays_nan(cpu, 'l2')"),
    "negative zero": (" + 0.0", "", "zeros_come_out_positive(cpu)"),
    "no ball": ("clean - epsilon, clean + epsilon", "-9.0, 9.0", MATCH),
    "no box": ("(moved, lower, upper)", "(moved, -9.0, 9.0)", MATCH),
    "norms in float32": ("tl.float64", "tl.float32", "a_small_gradient_makes_a_whole_step_in_l2(cpu, 'l2')"),
    "division by zero": ("norm == 0", "norm < 0", "zero_gradient_makes_no_step(cpu, 'l2')"),
    "no projection": ("norm <= epsilon", "norm >= 0", "equals_the_float64_reference(cpu, (3, 17), 'l2')"),
    "one number for all": (
        "tl.load(per_sample + sample)",
        "tl.load(per_sample)",
        "each_sample_has_its_own_epsilon_and_step(cpu, 'l2', 'both')",
    ),
    "later blocks forgotten": ("range(blocks)", "range(1)", "equals_the_float64_reference(cpu, (2, 3, 31, 33), 'l2')"),
    "samples confused": ("program // blocks", "program % blocks", "any_sample(cpu)"),
}
PLANT = """
import importlib.util, os, sys
sys.path.insert(0, "tests")
import torch
import test_pgd_step as tests
import test_triton
import rnas.kernels.triton
from rnas.kernels import backend

backend._DEVICES["triton"] = ("cpu",)
torch.use_deterministic_algorithms(True)  # poisons what is allocated
tests.test_any_sample = lambda cpu: tests.test_each_sample_has_its_own_epsilon_and_step(cpu, "linf", "both")
source = (test_triton.KERNELS / "pgd_step.py").read_text()

def load(text):
    with open(sys.argv[1], "w") as file:
        file.write(text)
    spec = importlib.util.spec_from_file_location("rnas.kernels.triton.pgd_step", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = rnas.kernels.triton.pgd_step = module
    import linecache
    linecache.clearcache()
    spec.loader.exec_module(module)

def green(call):
    try:
        eval(f"tests.test_{call}", {"tests": tests, "cpu": torch.device("cpu")})
    except AssertionError:
        return False
    return True

sys.dont_write_bytecode = True
for name, (old, new, call) in test_triton.PLANTED.items():
    assert old in source, name
    load(source)
    before = green(call)
    load(source.replace(old, new))
    print(name, "|", before, green(call))
"""


def test_a_planted_error_turns_a_test_red(interpreter, tmp_path):
    code, output = python(
        "-c", PLANT, str(tmp_path / "planted.py"), TRITON_INTERPRET="1", RNAS_BACKEND="triton", PYTHONWARNINGS="ignore"
    )
    assert code == 0, output
    assert output.splitlines() == [f"{name} | True False" for name in PLANTED]


def test_triton_is_imported_by_the_first_launch_and_is_the_real_one():
    code, output = python(
        "-c",
        "import os, sys, rnas.kernels, rnas.kernels.triton\n"
        "assert 'triton' not in sys.modules\n"
        "here = os.path.realpath(rnas.kernels.triton.__path__[0])\n"
        "assert not {here, os.path.dirname(here)} & set(map(os.path.realpath, sys.path)), sys.path\n"
        "import rnas.kernels.triton.pgd_step as kernels, triton\n"
        "assert kernels.triton is triton and not os.path.realpath(triton.__file__).startswith(here)",
    )
    assert code == 0, output
