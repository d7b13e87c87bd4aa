"""What the README shows runs, and the files it names are there."""

from __future__ import annotations

import re
import subprocess
import sys

from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run_one_after_the_other():
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    assert "pgd(" in code and "pgd_step(" in code
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    largest = float(re.search(r"tensor\(([0-9.]+)\)", result.stdout).group(1))
    assert 0 < largest <= 8.001


def test_every_flag_of_the_shell_examples_exists():
    from rnas import config

    known = {"--run", "--help", "--config", "--set", "--resume"}
    for kind in (config.SearchConfig, config.TrainConfig, config.EvaluateConfig, config.CompareConfig):
        known |= {"--" + name.replace("_", "-") for name in kind.__dataclass_fields__}
    for line in re.findall(r"^rnas .*$", README, flags=re.MULTILINE):
        for flag in re.findall(r"--[a-z-]+", line):
            assert flag in known, f"{flag} in {line!r}"


def test_every_file_that_is_linked_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / target).exists(), target
