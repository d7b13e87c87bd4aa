"""Benchmarks of the supernet and of the kernels.

    python -m pytest benchmarks                 everything on this machine: about 12 minutes on two cores
    python -m pytest benchmarks -k "pgd_7"      a part of it; written only where --results says
    python -m pytest benchmarks --quick         tiny sizes, to see that everything runs; written only with --results

Providers of a job are compared with eager PyTorch first, and one that disagrees gets no time. The rest are timed in turns
in one process. Rows go into benchmarks/results/<device>.json after every job; scripts/render_readme.py makes the table.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from report import Session

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rnas benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes: C=4, 3 cells, batch 2")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    group.addoption("--results", type=Path, help="folder for <device>.json (default: benchmarks/results for a full run)")


def device_of(config: pytest.Config) -> str:
    """The device that was asked for, or the best there is."""
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest):
    """Measures on first demand and writes the results."""
    config = request.config
    device, quick = device_of(config), config.getoption("--quick")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda was asked for and no CUDA device is visible", returncode=1)
    # TF32 rounds to 10 bits, which the comparison with float32 kernels would count as a speed-up for nothing.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # as the public search scripts of this field set it
    part = quick or bool(config.getoption("keyword")) or any("::" in argument for argument in config.args)
    folder = config.getoption("--results") or (None if part else RESULTS)
    session = Session(device, quick, folder, _command(config))
    yield session
    session.write(complete=not part and request.session.testsfailed == 0)
    print(f"\nwritten: {session.path}" if session.path else "\nnot written: a part of the benchmarks, and no --results")


def _command(config: pytest.Config) -> str:
    """What was typed, less the folder of the results, which is nobody's concern."""
    arguments = list(config.invocation_params.args)
    if "--results" in arguments:
        del arguments[arguments.index("--results") :][:2]
    return " ".join(["python -m pytest", *(each for each in arguments if not each.startswith("--results="))])
