"""Benchmarks of the supernet and of the kernels.

    python -m pytest benchmarks                 everything on this machine: about 12 minutes on two cores
    python -m pytest benchmarks -k "pgd_7"      a part of it; written only where --results says
    python -m pytest benchmarks --quick         tiny sizes, to see that everything runs; written only with --results

Providers of a job are compared with eager PyTorch first, and one that disagrees gets no time. The rest are timed in
turns in one process; on a CPU the fused supernet then runs once more, under the profile of its kernels. Rows go into
benchmarks/results/<device>.json after every job, and scripts/render_readme.py makes the tables of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from report import Session

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rnas benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes: C=4, 3 cells of 2 nodes, batch 2")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    group.addoption("--channels", type=int, help="C of the supernet's first cells; the file is then <device>.c<C>.json")
    group.addoption("--results", type=Path, help="where <device>.json goes; full runs: benchmarks/results")


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
    selected = bool(config.getoption("keyword")) or any("::" in argument for argument in config.args)
    folder = config.getoption("--results") or (None if quick or selected else RESULTS)
    session = Session(device, quick, folder, _command(config), config.getoption("--channels"))
    yield session
    session.head["selected"] = selected
    session.write(complete=session.number_of_rows == len(request.session.items) and not selected)
    print(f"\nwritten: {session.path}" if session.path else "\nnot written: a part of the benchmarks, and no --results")


def _command(config: pytest.Config) -> str:
    """What was typed, less the folders of this machine."""
    arguments = list(config.invocation_params.args)
    if "--results" in arguments:
        start = arguments.index("--results")
        del arguments[start : start + 2]
    return " ".join(["python -m pytest", *(each for each in arguments if not Path(each.split("=")[-1]).is_absolute())])
