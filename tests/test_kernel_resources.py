"""What the GPU kernels cost in registers and memory, and the record of it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "kernel_resources.py"
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(scope="module")
def resources():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("kernel_resources_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def run(*arguments, compiler="nvcc"):
    if compiler == "nvcc" and shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    if compiler == "triton" and not HAS_TRITON:
        pytest.skip("needs triton")
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=600
    )


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_90'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem
ptxas info    : Compiling entry function '_Z3badPf' for 'sm_80'
ptxas info    : Function properties for _Z3badPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def test_reads_the_report_of_the_assembler(resources):
    good, bad = resources.parse("a.cu", REPORT)
    assert (good.arch, good.registers, good.shared, good.spills) == ("sm_90", 40, 128, False)
    assert (bad.arch, bad.registers, bad.shared, bad.spill_stores, bad.spills) == ("sm_80", 255, 0, 12, True)
    assert "sm_80        255" in resources.table([good, bad])


def test_names_are_short_and_differ(resources):
    if shutil.which("c++filt") is None:
        pytest.skip("needs c++filt")
    mangled = {
        "_ZN4rnas4cuda12_GLOBAL__N_19l2_kernelIfEEvNS1_4CallIT_EE": "l2_kernel<float>",
        "_ZN4rnas1a1kILNS_5DtypeE1EEEvPf": "k<1>",
        "_Z1fPf": "f(float*)",
        "_Z1fPd": "f(double*)",
    }
    assert resources.short_names(list(mangled)) == mangled


def built(resources):
    """The arguments that read the kernels of the installed module, where it is newer than the sources; else none."""
    spec = importlib.util.find_spec("rnas._cuda")
    if spec is None or resources.find_cuobjdump() is None:
        return []
    sources = [*resources.CSRC.rglob("*.cu"), *resources.CSRC.rglob("*.h")]
    if max(path.stat().st_mtime for path in sources) > Path(spec.origin).stat().st_mtime:
        return []
    command = [resources.find_cuobjdump(), "-lelf", spec.origin]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return ["--built", spec.origin] if all(f"sm_{arch}." in listing for arch in resources.ARCHITECTURES) else []


LISTING = """Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z4goodPf:
  REG:40 STACK:0 SHARED:128 LOCAL:0 CONSTANT[0]:3072 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90

Resource usage:
 Function _Z3badPf:
  REG:255 STACK:16 SHARED:1088 LOCAL:8 CONSTANT[2]:64 CONSTANT[0]:936 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_reads_the_kernels_of_a_module(resources):
    good, bad = resources.parse_module(LISTING)
    assert (good.name, good.arch, good.registers, good.shared, good.spills) == ("_Z4goodPf", "sm_80", 40, 128, False)
    assert (bad.name, bad.arch, bad.registers, bad.shared, bad.spills) == ("_Z3badPf", "sm_90", 255, 64, True)


def test_a_module_needs_no_nvcc_and_tells_of_spills_then(resources, kernel):
    record = resources.recorded([kernel], {"nvcc": "13.0"})
    failures, notes = resources.compare([replace(kernel, registers=200, spill_stores=8)], {}, record)
    assert failures == ["a.cu: k on sm_90 spills registers to memory (8 bytes)"]
    assert notes[0] == "nvcc is not here, the record is of 13.0: only spills count"


def test_a_module_without_an_architecture_is_refused(resources, monkeypatch):
    monkeypatch.setattr(resources, "find_cuobjdump", lambda: "cat")
    monkeypatch.setattr(resources, "short_names", lambda names: {name: name for name in names})
    monkeypatch.setattr(resources.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, LISTING, ""))
    with pytest.raises(SystemExit, match="holds nothing for sm_100"):
        resources.read_module(Path("_cuda.so"), ["80", "90", "100"], {"kernels": {}})
    good, bad = resources.read_module(Path("_cuda.so"), ["80", "90"], {"kernels": {"a.cu": {"_Z4goodPf": {}}}})
    assert (good.file, bad.file) == ("a.cu", "_cuda.so")


@pytest.mark.slow
def test_no_kernel_spills_or_outgrows_the_record(resources):
    done = run("--check", *built(resources))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pgd_step.cu" in done.stdout and "sm_100" in done.stdout
    assert ("l2_kernel<fp32, per sample, unaligned>" in done.stdout) == HAS_TRITON


def test_a_cuda_kernel_that_spills_is_found(tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text(
        'extern "C" __global__ void __maxnreg__(24) spill(float* p) {\n'
        "  float v[48];\n  for (int i = 0; i < 48; ++i) v[i] = p[i * 7];\n  __syncthreads();\n"
        "  for (int i = 0; i < 48; ++i) p[i] = v[i] * v[47 - i];\n}\n"
    )
    done = run("--check", source, "--arch", "90")
    assert done.returncode == 1 and "spill.cu: spill on sm_90 spills registers to memory" in done.stdout, done.stdout


def test_a_triton_kernel_that_spills_is_found(tmp_path):
    source = tmp_path / "spill.py"
    source.write_text(
        "import triton\nimport triton.language as tl\n\n\n"
        "@triton.jit\ndef spill(p, BLOCK: tl.constexpr):\n"
        "    i = tl.arange(0, BLOCK)\n    v = tl.load(p + i)\n    tl.debug_barrier()\n"
        "    tl.store(p + BLOCK - i, v * tl.sum(v))\n\n\n"
        "def resource_cases():\n"
        "    yield {'name': 'spill', 'kernel': spill, 'signature': {'p': '*fp32', 'BLOCK': 'constexpr'},\n"
        "           'constants': {'BLOCK': 8192}, 'aligned': ('p',), 'options': {'num_warps': 1, 'maxnreg': 64}}\n"
    )
    done = run("--check", source, "--arch", "90", compiler="triton")
    assert done.returncode == 1 and "triton/spill.py: spill on sm_90 spills registers" in done.stdout, done.stdout


@pytest.fixture
def kernel(resources):
    return resources.Kernel("a.cu", "k", "sm_90", registers=100, shared=64, stack=0, spill_stores=0, spill_loads=0)


@pytest.mark.parametrize(
    ("change", "failure", "note"),
    [
        ({}, None, None),
        ({"registers": 108}, None, "a.cu: k on sm_90 takes 108 registers and 64 bytes of shared memory"),
        ({"registers": 109}, "a.cu: k on sm_90 takes 109 registers, recorded are 100", None),
        ({"registers": 20}, None, "takes 20 registers"),
        ({"shared": 65}, None, "100 registers and 65 bytes of shared memory, it was 100 registers and 64"),
        ({"spill_loads": 4}, "a.cu: k on sm_90 spills registers to memory (4 bytes)", None),
        (
            {"name": "other"},
            "a.cu: other on sm_90 is not in the record",
            "a.cu: k on sm_90 is in the record and was not",
        ),
        ({"arch": "sm_80"}, "a.cu: k on sm_80 is not in the record", None),
        ({"file": "b.cu"}, "b.cu: k on sm_90 is not in the record", None),
    ],
    ids=str,
)
def test_what_fails_and_what_is_said(resources, kernel, change, failure, note):
    record = resources.recorded([kernel], {"nvcc": "13.0"})
    changed = replace(kernel, **change)
    failures, notes = resources.compare([changed], {"nvcc": "13.0"}, record)
    assert len(failures) == (failure is not None) and all(failure in line for line in failures)
    assert len(notes) == (note is not None) and all(note in line for line in notes)
    # Another compiler: only spills fail, and nothing is kept quiet.
    elsewhere, told = resources.compare([changed], {"nvcc": "14.0"}, record)
    assert elsewhere == [line for line in failures if "spills" in line]
    assert told[0] == "nvcc is 14.0, the record is of 13.0: only spills count"
    assert set(told[1:]) == {*notes, *(line for line in failures if "spills" not in line)}


def test_triton_and_nvcc_have_a_version_each(resources, kernel):
    kernels = [kernel, replace(kernel, file="triton/a.py")]
    record = resources.recorded(kernels, {"nvcc": "13.0", "triton": "3.8.0"})
    grown = [replace(each, registers=200) for each in kernels]
    failures, _ = resources.compare(grown, {"nvcc": "13.0", "triton": "3.9.0"}, record)
    assert failures == ["a.cu: k on sm_90 takes 200 registers, recorded are 100"]


def test_the_record_is_written_and_read_back(resources, kernel, tmp_path):
    kernels = [kernel, replace(kernel, arch="sm_100", registers=90)]
    record = resources.recorded(kernels, {"nvcc": "13.0"})
    resources.write(record, tmp_path / "record.json")
    text = (tmp_path / "record.json").read_text()
    assert json.loads(text) == record
    assert '"sm_90": {"registers": 100, "shared": 64, "spills": 0}' in text


def test_writing_a_part_of_the_record_is_refused():
    for part in (["--arch", "90"], ["csrc/cuda/pgd_step.cu"], ["--check"]):
        done = run("--write", *part, compiler=None)
        assert done.returncode == 2 and "--write takes every kernel and architecture" in done.stderr


def test_without_a_compiler_its_kernels_are_left_out(resources, capsys):
    files = [resources.CSRC / "cuda" / "pgd_step.cu", resources.TRITON / "pgd_step.py"]
    assert resources.compile_all(files, ["90"], {}) == []
    assert capsys.readouterr().out.splitlines() == [
        "no nvcc here: pgd_step.cu left out",
        "no triton here: triton/pgd_step.py left out",
    ]
