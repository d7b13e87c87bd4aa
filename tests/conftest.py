"""What several test files share: small images, small configurations, and where the full data sets are."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Threads that wait let others work: two processes with two threads each are ten times as slow on two cores else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Without AVX-512, oneDNN (of torch 2.14) takes kernels for AVX2 that get the gradient of a strided 1x1 convolution's
# weight wrong and write where they may not: plain PyTorch, which the tests compare with.
PROCESSOR = Path("/proc/cpuinfo")
if PROCESSOR.exists() and "avx512f" not in PROCESSOR.read_text():
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")

import cuda_on_host  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from rnas.config import AttackConfig, DataConfig, SearchConfig, TrainConfig  # noqa: E402
from rnas.kernels import backend  # noqa: E402
from rnas.methods import options_for  # noqa: E402
from rnas.runs import load_tensors  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


torch.set_num_threads(1)  # the networks of the tests are so small that a second thread only waits
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items) -> None:
    """Skip what needs a GPU or the full data sets, with the reason, where they are missing.

    Files with tests that take minutes come first: at the end no process waits for them.
    """
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "shared_data" in item.keywords and not SHARED_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs the full data sets in ../shared/data"))


def final_state(run) -> dict[str, torch.Tensor]:
    """Every tensor of a run's last checkpoint, optimizers included, by its path."""
    found = {}

    def walk(value, path):
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}/{key}")

    walk(load_tensors(run / "checkpoint.pt")["parts"], "")
    return found


@pytest.fixture
def compiled(monkeypatch) -> bool:
    """Forces the compiled CPU kernels where they are built, and says whether they are."""
    built = not isinstance(backend.load("cpu"), str)
    monkeypatch.setenv("RNAS_BACKEND", "cpu" if built else "reference")
    return built


@pytest.fixture
def poisoned_allocations():
    """Memory that PyTorch allocates without a value holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def kernels_on_host(tmp_path_factory):
    """The module of tests/cuda_on_host.py, built once for all processes of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return cuda_on_host.build((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cuda_on_host")


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda_device(request, monkeypatch) -> str:
    """Where the CUDA kernels run, and are forced to: the device of the tensors. Memory without a value holds NaN there."""
    if request.param == "host":
        cuda_on_host.serve(request.getfixturevalue("kernels_on_host"), monkeypatch)
    else:
        monkeypatch.setenv(backend.VARIABLE, "cuda")
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # in the reference and in second derivatives
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield "cpu" if request.param == "host" else "cuda"
    torch.use_deterministic_algorithms(False)
    if request.param == "host":
        request.getfixturevalue("kernels_on_host").set_host_thread_order(0)


def _simd_levels() -> list:
    """The SIMD levels of the compiled kernels that this processor runs; a skipped one where they are not built."""
    loaded = backend.load("cpu")
    if isinstance(loaded, str):
        return [pytest.param("", id="cpu", marks=pytest.mark.skip(reason=loaded))]
    return loaded.simd_levels()


@pytest.fixture(params=_simd_levels())
def level(request) -> str:
    """One SIMD level, forced."""
    before = backend.module("cpu").simd_level()
    backend.module("cpu").set_simd_level(request.param)
    yield request.param
    backend.module("cpu").set_simd_level(before)


@pytest.fixture(scope="session")
def small_images(tmp_path_factory) -> Path:
    """An .npz with 96 training and 40 test images of 8 x 8 pixels, three channels, four classes that differ in mean."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 96), ("test", 40)):
        labels = np.arange(count) % 4
        noise = rng.integers(0, 120, (count, 8, 8, 3))
        arrays |= {
            f"x_{part}": (noise + 40 * labels[:, None, None, None]).astype(np.uint8),
            f"y_{part}": labels.astype(np.int64),
        }
    path = tmp_path_factory.mktemp("images") / "small.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def search_config(small_images, tmp_path) -> SearchConfig:
    """A whole adversarial search of 2 epochs x 3 batches that takes about a second."""
    return SearchConfig(
        method="darts",
        options=options_for("darts"),
        nodes=2,
        channels=2,
        layers=3,
        epochs=2,
        batch_size=16,
        data=DataConfig(dataset=str(small_images)),
        attack=AttackConfig(steps=2),
        run=str(tmp_path / "search"),
        device="cpu",
        quiet=True,
    )


@pytest.fixture
def train_config(small_images, tmp_path) -> TrainConfig:
    """A whole adversarial training of 2 epochs x 6 batches that takes a few seconds."""
    return TrainConfig(
        genotype="RACL",
        channels=2,
        layers=3,
        epochs=2,
        batch_size=16,
        drop_path=0.2,
        data=DataConfig(dataset=str(small_images)),
        attack=AttackConfig(steps=2),
        run=str(tmp_path / "train"),
        device="cpu",
        quiet=True,
    )
