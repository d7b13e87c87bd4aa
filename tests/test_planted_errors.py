"""Errors planted in the kernels: that each still can be planted, and that one of them turns a test red."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rnas.kernels import backend

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "planted_errors.py"


def planted_errors(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture
def script(monkeypatch):
    """scripts/planted_errors.py as a module."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    specification = importlib.util.spec_from_file_location("planted_errors_under_test", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_error_can_be_planted():
    done = planted_errors("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_text_that_is_gone_or_there_twice_is_reported(script):
    source = "int f() {\n  one;\n}\nint g() {\n  one;\n  two;\n}\n"
    error = script.Planted("name", "file", ("tests/test_file.py", "all"), "", "two;", "three;")
    assert script.plant(error, source) == source.replace("two", "three")
    assert script.plant(replace(error, inside="g()", original="one;"), source).index("three") > source.index("g()")
    for change in ({"original": "one;"}, {"original": "four;"}, {"inside": "f()"}, {"inside": "h()"}):
        with pytest.raises(script.Broken, match="times in file"):
            script.plant(replace(error, **change), source)


@pytest.mark.parametrize(("outcome", "missed"), [("test_it", 0), ("", 1), ("crash", 1)])
def test_an_error_that_no_test_notices_is_counted(script, monkeypatch, capsys, outcome, missed):
    class Workshop:
        def __init__(self, folder):
            pass

        def expect_green(self, errors, level):
            pass

        def first_failure(self, error, level):
            if outcome == "crash":
                raise script.Broken("a crash is no failed test")
            return outcome

    monkeypatch.setattr(script, "Workshop", Workshop)
    monkeypatch.setattr(script, "simd_levels", lambda: ["baseline"])
    assert script.run([e for e in script.PLANTED if not e.level][:1]) == missed
    assert f"1 planted, {1 - missed} caught, {missed} not" in capsys.readouterr().out


@pytest.mark.slow
def test_a_planted_error_turns_a_test_red():
    if isinstance(backend.load("cpu"), str) or not shutil.which("cmake") or not shutil.which("ninja"):
        pytest.skip("needs rnas._cpu and what builds it")
    done = planted_errors("averages: biased variance")
    assert done.returncode == 0 and "1 planted, 1 caught" in done.stdout, done.stdout + done.stderr
    assert "test_averages_move_as_those_of_pytorch" in done.stdout
