"""Registers, shared memory and spills of every GPU kernel, for each architecture, as the assembler reports them.

    python scripts/kernel_resources.py [--check] [--arch 80 90 100] [FILE.cu or FILE.py ...]
    python scripts/kernel_resources.py --check --built MODULE
    python scripts/kernel_resources.py --write

Compiles the CUDA kernels of csrc/cuda with nvcc and those of kernels/triton with triton, which brings its assembler;
without a GPU. What is not installed is left out, and said.

--built reads the CUDA kernels' numbers out of a compiled module, rnas/_cuda*.so, in no time; it has to be of these
sources, and is taken to be of the nvcc that is here. A module does not tell of spills, but of a kernel's memory of its
own: any counts as one. It needs cuobjdump, which the CUDA toolkit or triton brings.

--write keeps the numbers in csrc/cuda/resources.json, with the versions of the compilers. --check compares with them;
its exit status is 1 where a kernel

    spills registers to memory,
    is not in the record, or
    takes over 8 registers more than recorded: the hardware hands them out to a thread by eights, so that less costs one
    step of occupancy at most, and a change of a few is the compiler's mood.

Other changes are reported. Where the compiler is not the recorded one, only spills count, and the rest is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
TRITON = ROOT / "kernels" / "triton"
RECORD = CSRC / "cuda" / "resources.json"
ARCHITECTURES = ("80", "90", "100")
REGISTERS = 8  # a growth beyond this many fails
RESERVED = 1024  # bytes of shared memory that the system has of each block from sm_90 on; a module counts them


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel: per thread, shared memory per block in bytes."""

    file: str
    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def spills(self) -> bool:
        return self.spill_stores > 0 or self.spill_loads > 0

    @property
    def compiler(self) -> str:
        return "triton" if self.file.endswith(".py") else "nvcc"


def parse(file: str, report: str) -> list[Kernel]:
    """The kernels in the output of `nvcc -Xptxas -v`."""
    kernels = []
    for part in report.split("Compiling entry function ")[1:]:
        name, arch = re.match(r"'([^']+)' for '(\w+)'", part).groups()
        stack, stores, loads = map(
            int,
            re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups(),
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        kernels.append(Kernel(file, name, arch, registers, int(shared[1]) if shared else 0, stack, stores, loads))
    return kernels


def find_nvcc() -> str | None:
    """nvcc, found as setup.py finds it, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = (os.environ.get("CUDACXX"), f"{home}/bin/nvcc" if home else None, "nvcc")
    return next((path for path in map(shutil.which, filter(None, candidates)) if path), None)


def versions() -> dict[str, str]:
    """The compilers that are here, and their versions."""
    found = {}
    if nvcc := find_nvcc():
        listing = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        found["nvcc"] = re.search(r"V([\d.]+)", listing)[1]
    if importlib.util.find_spec("triton"):
        found["triton"] = importlib.metadata.version("triton")
    return found


def compile_cuda(source: Path, arch: str) -> list[Kernel]:
    """Compiles one CUDA file for one architecture, for the report alone. Exits where it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        includes = [f"-I{path}" for path in (CSRC / "include", CSRC, CSRC / "cuda")]
        flags = ["-std=c++17", "-O3", "--extended-lambda", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
        command = [find_nvcc(), *flags, *includes, "-o", f"{folder}/kernel.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"kernel_resources: {source.name} does not compile for sm_{arch}\n{done.stderr}")
    kernels = parse(title(source), done.stderr)
    names = short_names([kernel.name for kernel in kernels])
    return [replace(kernel, name=names[kernel.name]) for kernel in kernels]


def find_cuobjdump() -> str | None:
    """The program that takes modules apart: that of the toolkit, or the one that triton brings."""
    nvcc, found = find_nvcc(), [shutil.which("cuobjdump")]
    if nvcc:
        found.append(str(Path(nvcc).resolve().parent / "cuobjdump"))
    if spec := importlib.util.find_spec("triton"):
        found.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next((path for path in found if path and os.access(path, os.X_OK)), None)


def read_module(module: Path, architectures: list[str], record: dict) -> list[Kernel]:
    """The CUDA kernels of a compiled module. Their files are those of the record."""
    if (cuobjdump := find_cuobjdump()) is None:
        sys.exit("kernel_resources: --built needs cuobjdump, which the CUDA toolkit or triton brings")
    command = [cuobjdump, "-res-usage", str(module)]
    kernels = parse_module(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    missing = {f"sm_{arch}" for arch in architectures} - {kernel.arch for kernel in kernels}
    if missing:
        sys.exit(f"kernel_resources: {module.name} holds nothing for {', '.join(sorted(missing))}")
    names = short_names(sorted({kernel.name for kernel in kernels}))
    files: dict[str, list[str]] = {}
    for file, found in record["kernels"].items():
        for name in found:
            files.setdefault(name, []).append(file)
    made = [
        replace(kernel, name=names[kernel.name], file=file)
        for kernel in kernels
        if kernel.arch.removeprefix("sm_") in architectures
        for file in files.get(names[kernel.name], [module.name])
    ]
    return list(dict.fromkeys(made))


def parse_module(listing: str) -> list[Kernel]:
    """The kernels in the output of `cuobjdump -res-usage`."""
    kernels = []
    for part in listing.split("arch = ")[1:]:
        arch = part.split()[0]
        for name, numbers in re.findall(r"Function (\S+):\s+(REG:.*)", part):
            register, stack, shared, local = (
                int(re.search(rf"{word}:(\d+)", numbers)[1]) for word in ("REG", "STACK", "SHARED", "LOCAL")
            )
            reserved = RESERVED if int(re.sub(r"\D", "", arch)) >= 90 else 0
            kernels.append(Kernel("", name, arch, register, max(0, shared - reserved), stack, stack + local, 0))
    return kernels


def compile_triton(source: Path, architectures: list[str]) -> list[Kernel]:
    """Compiles the `resource_cases()` of a Triton file for each architecture; a file without them has no kernels."""
    os.environ.pop("TRITON_INTERPRET", None)
    spec = importlib.util.spec_from_file_location(f"triton_{source.stem}", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = list(module.resource_cases()) if hasattr(module, "resource_cases") else []
    return [compile_case(title(source), case, arch) for case in cases for arch in architectures]


def compile_case(file: str, case: dict, arch: str) -> Kernel:
    """Compiles one Triton kernel as its launcher would have it compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    argument = case["kernel"].arg_names.index
    aligned = {(argument(name),): [["tt.divisibility", 16]] for name in case["aligned"]}
    source = ASTSource(case["kernel"], case["signature"], case["constants"], aligned)
    report = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir = cache  # what lies in the cache is not assembled, and so not reported
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(report):
            compiled = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=dict(case["options"]))
    kernels = parse(file, report.getvalue())
    if len(kernels) != 1:
        sys.exit(f"kernel_resources: no report for {case['name']} from triton {triton.__version__}")
    # Shared memory is asked for at the launch, so that the assembler does not see it.
    return replace(kernels[0], name=case["name"], arch=f"sm_{arch}", shared=compiled.metadata.shared)


def title(source: Path) -> str:
    """A file's name in the table and in the record."""
    source = source.resolve()
    if source.is_relative_to(CSRC / "cuda"):
        return source.relative_to(CSRC / "cuda").as_posix()
    return f"triton/{source.name}" if source.suffix == ".py" else source.name


def compile_all(files: list[Path], architectures: list[str], compilers: dict[str, str]) -> list[Kernel]:
    """Every kernel of the files whose compiler is here; says which files are left out."""
    cuda = [file for file in files if file.suffix == ".cu"]
    triton = [file for file in files if file.suffix == ".py"]
    for compiler, group in (("nvcc", cuda), ("triton", triton)):
        if group and compiler not in compilers:
            print(f"no {compiler} here: {', '.join(map(title, group))} left out")
            group.clear()
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        jobs = [pool.submit(compile_cuda, file, arch) for file in cuda for arch in architectures]
        kernels = [kernel for file in triton for kernel in compile_triton(file, architectures)]
        return [kernel for job in jobs for kernel in job.result()] + kernels


def short_names(names: list[str]) -> dict[str, str]:
    """Mangled name -> readable name without namespaces and arguments; with them where two would be called the same."""
    if not shutil.which("c++filt") or not names:
        return {name: name for name in names}
    full = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = full
    # Namespaces, the types of template constants, the result and the arguments: the order matters.
    clutter = (r"\(anonymous namespace\)::|rnas::(\w+::)*", r"\([\w:]+\)(?=-?\d)", r"^void |\(.*")
    for pattern in clutter:
        short = [re.sub(pattern, "", line) for line in short]
    return {name: s if short.count(s) == 1 else f for name, s, f in zip(names, short, full, strict=True)}


def table(kernels: list[Kernel]) -> str:
    """The kernels as aligned columns."""
    rows = [("file", "kernel", "arch", "registers", "shared B", "stack B", "spill stores B", "spill loads B")]
    for k in sorted(kernels, key=lambda k: (k.file, k.name, int(re.sub(r"\D", "", k.arch)))):
        numbers = (k.registers, k.shared, k.stack, k.spill_stores, k.spill_loads)
        rows.append((k.file, k.name, k.arch, *map(str, numbers)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    words, numbers = slice(0, 3), slice(3, None)
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[words], widths[words], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[numbers], widths[numbers], strict=True)]
        lines.append("  ".join(left + right))
    return "\n".join(lines)


def recorded(kernels: list[Kernel], compilers: dict[str, str]) -> dict:
    """The record of some kernels: compilers, and file -> kernel -> architecture -> numbers."""
    files: dict = {}
    for k in kernels:
        numbers = {"registers": k.registers, "shared": k.shared, "spills": k.spill_stores + k.spill_loads}
        files.setdefault(k.file, {}).setdefault(k.name, {})[k.arch] = numbers
    return {"compilers": compilers, "kernels": files}


def write(record: dict, path: Path) -> None:
    """One line for each kernel and architecture, so that a change reads well."""
    text = json.dumps(record, indent=2, sort_keys=True)
    text = re.sub(r"\{\s+(\"registers\": \d+),\s+(\"shared\": \d+),\s+(\"spills\": \d+)\s+\}", r"{\1, \2, \3}", text)
    path.write_text(text + "\n")


def compare(kernels: list[Kernel], compilers: dict[str, str], record: dict) -> tuple[list[str], list[str]]:
    """What fails, and what is only worth knowing."""
    failures, notes = [], []
    for compiler in sorted({kernel.compiler for kernel in kernels}):
        here, there = compilers.get(compiler), record["compilers"].get(compiler)
        if here != there:
            notes.append(f"{compiler} is {here or 'not here'}, the record is of {there}: only spills count")
    for k in kernels:
        name = f"{k.file}: {k.name} on {k.arch}"
        if k.spills:
            failures.append(f"{name} spills registers to memory ({k.spill_stores + k.spill_loads} bytes)")
        same = compilers.get(k.compiler) == record["compilers"].get(k.compiler)
        findings = failures if same else notes
        before = record["kernels"].get(k.file, {}).get(k.name, {}).get(k.arch)
        if before is None:
            findings.append(f"{name} is not in the record")
            continue
        if k.registers > before["registers"] + REGISTERS:
            findings.append(f"{name} takes {k.registers} registers, recorded are {before['registers']}")
        elif (k.registers, k.shared) != (before["registers"], before["shared"]):
            was = f"{before['registers']} registers and {before['shared']} bytes"
            notes.append(f"{name} takes {k.registers} registers and {k.shared} bytes of shared memory, it was {was}")
    present = {(k.file, k.name, k.arch) for k in kernels}
    files, architectures = {k.file for k in kernels}, {k.arch for k in kernels}
    for file, names in record["kernels"].items():
        for name, rows in names.items():
            gone = [arch for arch in rows if arch in architectures and (file, name, arch) not in present]
            if gone and file in files:
                notes.append(f"{file}: {name} on {', '.join(gone)} is in the record and was not compiled")
    return failures, notes


def main() -> int:
    """Compile, print the table, write or compare the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="kernels (default: all of csrc/cuda and kernels/triton)")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help="architectures (default: 80 90 100)")
    parser.add_argument("--check", action="store_true", help="fail where a kernel spills or outgrows the record")
    parser.add_argument("--write", action="store_true", help="renew the record")
    parser.add_argument("--built", type=Path, metavar="MODULE", help="a compiled rnas._cuda, read instead of compiling")
    parser.add_argument("--record", type=Path, default=RECORD, help="the record (default: csrc/cuda/resources.json)")
    options = parser.parse_args()
    if options.write and (options.files or options.check or options.built or options.arch != list(ARCHITECTURES)):
        parser.error("--write takes every kernel and architecture; give it neither FILE nor --arch, --check, --built")
    compilers = versions()
    if options.write and len(compilers) < 2:
        sys.exit("kernel_resources: the record needs nvcc (on PATH or under CUDA_HOME) and triton")
    record = json.loads(options.record.read_text()) if options.record.exists() else {"compilers": {}, "kernels": {}}
    sources = [] if options.built else sorted((CSRC / "cuda").rglob("*.cu"))
    files = options.files or [*sources, *sorted(TRITON.glob("*.py"))]
    kernels = compile_all(files, options.arch, compilers)
    if options.built:
        kernels += read_module(options.built, options.arch, record)
    if not kernels:
        print("no kernel was found")
        return 1
    print(table(kernels))
    if options.write:
        write(recorded(kernels, compilers), options.record)
    if not options.check:
        return 0
    failures, notes = compare(kernels, compilers, record)
    for heading, lines in (("to know", notes), ("FAILED", failures)):
        if lines:
            print(f"\n{heading}:\n  " + "\n  ".join(lines))
    if failures:
        print("\nwhere the growth is meant: python scripts/kernel_resources.py --write")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
