"""What the numbers were measured on: device, versions, commit, load, and the ceilings of this very machine."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from measure import seconds

ROOT = Path(__file__).resolve().parents[1]


def device_name(device: str) -> str:
    """The GPU as its driver calls it, or the name of the processor and its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name.strip()}, {os.cpu_count()} cores"


def slug(device: str) -> str:
    """The name of the results file: "cpu-amd-epyc-2-cores", "nvidia-h200"."""
    name = device_name(device) if device == "cuda" else f"cpu-{device_name(device)}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: str, command: str, quick: bool) -> dict:
    """The head of a results file. Call it before anything is timed: it reads the load of the machine."""
    load = list(os.getloadavg())
    return {
        "device": device_name(device),
        "kind": device,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": versions(device),
        "precision": "float32, TF32 off",
        "commit": commit(),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_before": [round(each, 2) for each in load],
        "ceilings": ceilings(device, quick),
    }


def versions(device: str) -> dict[str, str]:
    """Versions of what the numbers depend on; "missing" where something is not installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found["triton"] = "missing"
    if device == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def commit() -> str:
    """The short hash of the checkout, with "-dirty" where it was changed; $COMMIT or "unknown" outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        # Results of earlier runs, and the table made from them, are no change of what is measured.
        paths = [".", ":!benchmarks/results", ":!README.md"]
        status = subprocess.run([*git, "status", "--porcelain", "--", *paths], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def ceilings(device: str, quick: bool) -> dict[str, float]:
    """What this machine reaches at best: float32 arithmetic by a large matrix product, memory by a large copy.

    flops_per_second: a multiply-add is two. copy_bytes_per_second: bytes read plus bytes written.
    """
    side = 256 if quick else 8192 if device == "cuda" else 2048
    elements = 2**20 if quick else 2**30 if device == "cuda" else 2**26
    a, b = torch.rand(2, side, side, device=device)
    product = torch.empty(side, side, device=device)
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    return {
        "flops_per_second": 2 * side**3 / _best(lambda: torch.mm(a, b, out=product), device),
        "copy_bytes_per_second": 2 * source.nbytes / _best(lambda: target.copy_(source), device),
    }


def _best(function, device: str) -> float:
    function()
    return min(seconds(function, device) for _ in range(10))
