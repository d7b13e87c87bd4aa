"""The build: what setup.py decides, and every way to install."""

from __future__ import annotations

import importlib.util
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem + "_under_test", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, on a machine without settings."""
    for name in ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return load(ROOT / "setup.py")


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Makes a PATH that holds only the tools named; nvcc knows the architectures given."""

    def make(*names, architectures="compute_80 compute_90 compute_100 compute_120"):
        for name in names:
            tool = tmp_path / name
            tool.write_text("#!/bin/sh\n" + "".join(f"echo {name}\n" for name in architectures.split()))
            tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("names", "force", "modules", "line"),
    [
        ((), "", [], "no C++ compiler found: building without compiled kernels"),
        (("nvcc",), "", [], "no C++ compiler found"),
        (("c++",), "", ["rnas._cpu"], "building rnas._cpu only (no nvcc found)"),
        (("c++", "nvcc"), "", ["rnas._cpu", "rnas._cuda"], "rnas._cuda for 80-real 90-real 100-real 100-virtual"),
        (("clang++", "nvcc"), "0", ["rnas._cpu"], "building rnas._cpu only (FORCE_CUDA=0)"),
        (("g++", "nvcc"), "1", ["rnas._cpu", "rnas._cuda"], "building rnas._cpu and rnas._cuda"),
    ],
)
def test_builds_what_the_machine_has(build, tools, monkeypatch, names, force, modules, line):
    tools(*names)
    monkeypatch.setenv("FORCE_CUDA", force)
    assert line in build.plan()
    assert [extension.name for extension in build.modules()] == ([] if not modules else modules)


@pytest.mark.parametrize(
    ("names", "force", "message"),
    [
        (("c++",), "1", "FORCE_CUDA=1 and no nvcc was found"),
        (("nvcc",), "1", "FORCE_CUDA=1 and no C[+][+] compiler was found"),
        (("c++", "nvcc"), "yes", "FORCE_CUDA must be 0 or 1, got 'yes'"),
    ],
)
def test_a_forced_build_that_cannot_be_ends(build, tools, monkeypatch, names, force, message):
    tools(*names)
    monkeypatch.setenv("FORCE_CUDA", force)
    with pytest.raises(SystemExit, match=message):
        build.plan()


def test_nvcc_is_found_by_cuda_home_and_cudacxx(build, tools, tmp_path, monkeypatch):
    tools("c++")
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    assert build.find_nvcc() is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert build.find_nvcc() == str(nvcc)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    assert build.find_nvcc() == str(nvcc)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0;9.0;10.0+PTX", ["80-real", "90-real", "100-real", "100-virtual"]),
        ("8.0 9.0", ["80-real", "90-real"]),
        (" 8.6, 12.0+PTX ", ["86-real", "120-real", "120-virtual"]),
        ("9.0a", ["90a-real"]),
        ("", ["80-real", "90-real", "100-real", "100-virtual"]),
    ],
)
def test_reads_the_architecture_list(build, tools, monkeypatch, text, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert build.cuda_architectures(str(tools("nvcc") / "nvcc")) == expected


def test_refuses_an_unknown_architecture(build, tools, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST has 'Hopper'; expected entries such as 8.0"):
        build.cuda_architectures(str(tools("nvcc") / "nvcc"))


def test_the_default_leaves_out_what_an_older_nvcc_does_not_know(build, tools):
    nvcc = str(tools("nvcc", architectures="compute_70 compute_80 compute_90") / "nvcc")
    assert build.cuda_architectures(nvcc) == ["80-real", "90-real", "90-virtual"]


def test_the_triton_kernels_are_packaged_and_do_not_shadow_triton(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    site = tmp_path / "site"
    assert [path.name for path in site.iterdir()] == ["rnas"]  # no `kernels`, no `triton`
    assert (site / "rnas" / "kernels" / "triton" / "pgd_step.py").is_file()
    if importlib.util.find_spec("triton") is None:
        return
    code = (
        "import sys, rnas.kernels.triton.pgd_step as kernels\n"
        "assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__\n"
        "assert not kernels.triton.__file__.startswith(sys.argv[1]), kernels.triton.__file__"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", code, str(site)], cwd=tmp_path, env=environment, check=True)


@pytest.mark.slow
def test_every_way_to_install():
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "check_packaging.sh")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith("all installations work")
