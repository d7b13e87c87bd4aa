"""Registers, shared memory and spills of every CUDA kernel, for each architecture, as the assembler reports them.

    python scripts/kernel_resources.py [--check] [--arch 80 90 100] [FILE.cu ...]

Needs nvcc, no GPU. With --check the exit status is 1 where a kernel spills registers to memory.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"


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


def find_nvcc() -> str:
    """nvcc, found as setup.py finds it. Exits where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in (os.environ.get("CUDACXX"), f"{home}/bin/nvcc" if home else None, "nvcc"):
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    sys.exit("kernel_resources: no nvcc found; put it on PATH or set CUDA_HOME")


def compile_one(nvcc: str, source: Path, arch: str) -> list[Kernel]:
    """Compiles one file for one architecture, for the report alone. Exits where it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        includes = [f"-I{path}" for path in (CSRC / "include", CSRC, CSRC / "cuda")]
        flags = ["-std=c++17", "-O3", "--extended-lambda", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
        command = [nvcc, *flags, *includes, "-o", f"{folder}/kernel.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"kernel_resources: {source.name} does not compile for sm_{arch}\n{done.stderr}")
    return parse(source.name, done.stderr)


def short_names(names: list[str]) -> dict[str, str]:
    """Mangled name -> readable name without namespaces and arguments."""
    if not shutil.which("c++filt") or not names:
        return {name: name for name in names}
    listing = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    clutter = (r"\(anonymous namespace\)::|rnas::(\w+::)*", r"\((bool|int)\)", r"^void |\(.*")  # the order matters
    for pattern in clutter:
        listing = [re.sub(pattern, "", line) for line in listing]
    return dict(zip(names, listing, strict=True))


def table(kernels: list[Kernel]) -> str:
    """The kernels as aligned columns."""
    names = short_names(sorted({kernel.name for kernel in kernels}))
    rows = [("file", "kernel", "arch", "registers", "shared B", "stack B", "spill stores B", "spill loads B")]
    for k in sorted(kernels, key=lambda k: (k.file, names[k.name], int(re.sub(r"\D", "", k.arch)))):
        numbers = (k.registers, k.shared, k.stack, k.spill_stores, k.spill_loads)
        rows.append((k.file, names[k.name], k.arch, *map(str, numbers)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    words, numbers = slice(0, 3), slice(3, None)
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[words], widths[words], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[numbers], widths[numbers], strict=True)]
        lines.append("  ".join(left + right))
    return "\n".join(lines)


def main() -> int:
    """Compile, print the table, and with --check return 1 where a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="CUDA files (default: all of csrc/cuda)")
    parser.add_argument("--arch", nargs="+", default=["80", "90", "100"], help="architectures (default: 80 90 100)")
    parser.add_argument("--check", action="store_true", help="fail where a kernel spills")
    options = parser.parse_args()
    nvcc, files = find_nvcc(), options.files or sorted((CSRC / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        jobs = [pool.submit(compile_one, nvcc, file, arch) for file in files for arch in options.arch]
        kernels = [kernel for job in jobs for kernel in job.result()]
    print(table(kernels))
    spilling = [kernel for kernel in kernels if kernel.spills]
    if options.check and (spilling or not kernels):
        print(f"\n{len(spilling)} kernels spill registers to memory" if kernels else "\nno kernel was found")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
