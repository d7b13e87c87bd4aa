"""Which implementation serves a call, what the compiled modules link, and what happens where they are missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rnas
from rnas.kernels import backend, pgd_step
from rnas.kernels.pgd_step import OP

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def built(name):
    loaded = backend.load(name)
    return pytest.skip(loaded) if isinstance(loaded, str) else loaded


def call(dtype=torch.float32):
    x = torch.rand(2, 3, 4, 4).to(dtype)
    return pgd_step(x, x, x, epsilon=0.1, step_size=0.1)


@pytest.fixture
def missing_modules(monkeypatch):
    """An installation without compiled modules."""
    for name in ("_cpu", "_cuda"):
        monkeypatch.setitem(sys.modules, f"rnas.{name}", None)
        monkeypatch.delattr(rnas, name, raising=False)
    backend.forget()
    yield
    backend.forget()


@pytest.fixture
def served(monkeypatch):
    """The names of the backends that served calls."""
    names = []
    for name, implementation in list(OP.implementations.items()):
        def run(*arguments, name=name, run=implementation.run):
            names.append(name)
            run(*arguments)

        monkeypatch.setitem(OP.implementations, name, backend.Implementation(run, implementation.dtypes))
    return names


def test_auto_takes_the_compiled_kernel_where_it_can(served, monkeypatch):
    built("cpu")
    monkeypatch.delenv("RNAS_BACKEND", raising=False)
    call(torch.float32), call(torch.float64), call(torch.float16), call(torch.bfloat16)
    assert served == ["cpu", "cpu", "reference", "reference"]
    assert OP.decide(CPU, torch.float16) == ("reference", "the cpu kernel takes float32, float64, not float16")


def test_the_environment_forces_a_backend_at_every_call(served, monkeypatch):
    built("cpu")
    for choice, expected in (("reference", "reference"), ("cpu", "cpu"), ("auto", "cpu"), ("", "cpu")):
        monkeypatch.setenv("RNAS_BACKEND", choice)
        call()
        assert served.pop() == expected


@pytest.mark.parametrize(
    ("choice", "dtype", "message"),
    [
        ("cuda", torch.float32, "the cuda kernels take cuda tensors"),
        ("triton", torch.float32, "the triton kernels take cuda tensors"),
        ("cpu", torch.float16, "the cpu kernel takes float32, float64, not float16"),
    ],
)
def test_a_forced_backend_that_cannot_serve_says_why(choice, dtype, message, monkeypatch):
    monkeypatch.setenv("RNAS_BACKEND", choice)
    expected = f"RNAS_BACKEND={choice} cannot serve pgd_step on cpu.*{message}.*set it to auto"
    with pytest.raises(RuntimeError, match=expected):
        call(dtype)


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("RNAS_BACKEND", "gpu")
    with pytest.raises(ValueError, match="RNAS_BACKEND must be one of auto, reference, cpu, cuda, triton; got 'gpu'"):
        call()


def test_without_compiled_modules_the_reference_serves(missing_modules, served, monkeypatch):
    monkeypatch.delenv("RNAS_BACKEND", raising=False)
    call()
    assert served == ["reference"]
    monkeypatch.setenv("RNAS_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="rnas._cpu is not built .reinstall rnas where a C[+][+] compiler can"):
        call()
    with pytest.raises(RuntimeError, match="rnas._cuda is not built .reinstall rnas where nvcc"):
        backend.module("cuda")


def test_describe_has_a_row_for_every_op_and_backend(monkeypatch):
    monkeypatch.delenv("RNAS_BACKEND", raising=False)
    rows = {(row.op, row.backend): row for row in backend.describe()}
    assert {op for op, _ in rows} == set(backend.OPS) and len(rows) == 4 * len(backend.OPS)
    assert all(row.reason for row in rows.values())
    triton = rows["pgd_step", "triton"]
    if torch.cuda.is_available():
        assert triton.reason.startswith(("cuda serves instead", "triton", "Triton kernel", "rnas._cuda"))
    else:
        assert triton.serves == "" and triton.reason == "no CUDA device is visible"
    none = backend.Op("test_op", {"reference": backend.Implementation(call)})
    try:
        assert backend._row(none, "triton").reason == "test_op has no triton kernel"
    finally:
        del backend.OPS["test_op"]
    if not isinstance(backend.load("cpu"), str):
        assert rows["pgd_step", "cpu"].serves == "cpu float32, float64"
        assert backend.module("cpu").simd_level() in rows["pgd_step", "cpu"].built_for
    if not torch.cuda.is_available() and not isinstance(backend.load("cuda"), str):
        assert rows["pgd_step", "cuda"].serves == "" and "no CUDA device" in rows["pgd_step", "cuda"].reason
        assert "sm_" in rows["pgd_step", "cuda"].built_for
    monkeypatch.setenv("RNAS_BACKEND", "reference")
    assert [row.serves for row in backend.describe() if row.serves] == ["every call"] * len(backend.OPS)


def test_describe_without_compiled_modules(missing_modules, monkeypatch):
    monkeypatch.delenv("RNAS_BACKEND", raising=False)
    rows = {row.backend: row for row in backend.describe() if row.op == "pgd_step"}
    assert rows["cpu"].serves == "" and "rnas._cpu is not built" in rows["cpu"].reason


def test_a_gpu_that_the_build_left_out_is_named(monkeypatch):
    monkeypatch.setattr(backend, "architectures", lambda: ["sm_80", "sm_90", "sm_100a", "compute_90"])
    for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
        assert backend._unsupported_gpu(capability) is None
    assert "this GPU is sm_75 (reinstall with TORCH_CUDA_ARCH_LIST=7.5)" in backend._unsupported_gpu((7, 5))
    monkeypatch.setattr(backend, "architectures", lambda: ["sm_80", "sm_100a"])
    assert backend._unsupported_gpu((9, 0)) and backend._unsupported_gpu((10, 3))


def test_without_triton_or_its_compiler_the_next_backend_serves(missing_modules, monkeypatch):
    monkeypatch.setenv("RNAS_BACKEND", "auto")
    monkeypatch.delenv("CC", raising=False)
    if importlib.util.find_spec("triton"):
        monkeypatch.setattr(backend.shutil, "which", lambda name: None)
        name, reason = OP.decide(CUDA, torch.float32)
        assert name == "reference" and reason.endswith("no C compiler for its launchers (install gcc or set CC)")
        backend.forget()
        monkeypatch.setattr(backend.shutil, "which", lambda name: f"/usr/bin/{name}")
        name, reason = OP.decide(CUDA, torch.float32)
        assert name == "triton" and "rnas._cuda is not built" in reason and reason.endswith("Triton kernel")
        assert OP.decide(CUDA, torch.float64)[0] == "reference"
        backend.forget()
    monkeypatch.setitem(sys.modules, "triton", None)
    name, reason = OP.decide(CUDA, torch.float32)
    assert name == "reference" and reason.endswith("triton is not installed")


def test_the_cpu_module_runs_on_the_threads_of_torch():
    module, before = built("cpu"), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert module.threads() == count
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_modules_link_neither_torch_nor_python_nor_openmp(name):
    path = built(name).__file__
    try:
        needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("needs readelf")
    libraries = [line for line in needed.splitlines() if "NEEDED" in line]
    assert any("libc.so" in line for line in libraries)
    assert not [line for line in libraries for word in ("omp", "torch", "python", "c10", "cudart") if word in line]


def test_importing_the_kernels_loads_no_compiled_module_and_opens_no_device():
    code = (
        "import sys, torch, rnas.kernels\n"
        "loaded = [name for name in ('rnas._cpu', 'rnas._cuda', 'triton', 'matplotlib') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_headers_are_where_include_dir_says_and_compile_alone(tmp_path):
    folder = backend.include_dir()
    headers = sorted(path.name for path in (folder / "rnas").glob("*.h"))
    assert "pgd_step.h" in headers
    compiler = next((c for c in ("c++", "g++", "clang++") if _which(c)), None) or pytest.skip("needs a C++ compiler")
    for header in headers:
        source = tmp_path / "use.cpp"
        source.write_text(f'#include "rnas/{header}"\nint main() {{ return 0; }}\n')
        subprocess.run([compiler, "-std=c++17", "-Wall", "-fsyntax-only", f"-I{folder}", str(source)], check=True)


def _which(name):
    return any(Path(folder, name).exists() for folder in os.environ["PATH"].split(os.pathsep))


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request, monkeypatch):
    """A backend for CUDA tensors that is forced."""
    pytest.importorskip("triton") if request.param == "triton" else built("cuda")
    monkeypatch.setenv("RNAS_BACKEND", request.param)


@pytest.mark.gpu
def test_a_gpu_kernel_serves_on_the_current_stream(gpu_backend):
    x = torch.rand(64, 3, 224, 224, device=CUDA)
    expected = pgd_step(x, x, x, epsilon=0.1, step_size=0.1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(100_000_000)
        late.copy_(x)  # a kernel on another stream would read the zeros
        result = pgd_step(late, x, x, epsilon=0.1, step_size=0.1)
    stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.gpu
def test_a_step_is_captured_in_a_graph(gpu_backend):
    x, grad = torch.rand(8, 3, 32, 32, device=CUDA), torch.randn(8, 3, 32, 32, device=CUDA)
    buffer = x.clone()
    pgd_step(buffer, grad, x, epsilon=0.1, step_size=0.01, norm="l2", out=buffer)
    expected = [buffer.clone()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pgd_step(buffer, grad, x, epsilon=0.1, step_size=0.01, norm="l2", out=buffer)
    buffer.copy_(x)
    graph.replay()
    assert torch.equal(buffer, expected[0])
