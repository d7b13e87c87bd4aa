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
        others = [".", ":!benchmarks/results", ":!README.md"]
        command = [*git, "status", "--porcelain", "--", *others]
        status = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def ceilings(device: str, quick: bool) -> dict[str, float]:
    """What this machine reaches at best in float32 arithmetic and in traffic with memory.

    flops_per_second: of a large matrix product, on a CPU also of a large convolution, whichever is faster; a
    multiply-add is two. On a Zen 4 core whose FMA units do 117.5 GFLOP/s the product reached 103 and the convolution
    117 to 120. On a GPU no convolution, as cuDNN may choose an algorithm with fewer operations than are counted.
    copy_bytes_per_second: bytes read plus bytes written by a copy into another buffer.
    in_place_bytes_per_second: likewise by an addition to a buffer, which on a CPU is half as fast again: there a store
    to a line that was not read first fetches it all the same, and this third transfer is in no count.
    """
    side = 256 if quick else 8192 if device == "cuda" else 2048
    elements = 2**20 if quick else 2**26
    if device == "cuda" and not quick:
        elements = min(2**30, torch.cuda.mem_get_info()[0] // 16)  # two tensors of 4 bytes in half of what is free
    a, b = torch.rand(2, side, side, device=device)
    product = torch.empty(side, side, device=device)
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    flops = 2 * side**3 / _best(lambda: torch.mm(a, b, out=product), device)
    if device == "cpu":
        flops = max(flops, _convolution_rate(channels=32 if quick else 256))
    return {
        "flops_per_second": flops,
        "copy_bytes_per_second": 2 * source.nbytes / _best(lambda: target.copy_(source), device),
        "in_place_bytes_per_second": 3 * source.nbytes / _best(lambda: target.add_(source), device),
    }


def _convolution_rate(channels: int) -> float:
    side, kernel = 28, 3
    x = torch.rand(8, channels, side, side).to(memory_format=torch.channels_last)
    weight = torch.rand(channels, channels, kernel, kernel).to(memory_format=torch.channels_last)
    flops = 2 * x.numel() * channels * kernel**2
    with torch.no_grad():
        return flops / _best(lambda: torch.nn.functional.conv2d(x, weight, padding=1), "cpu")


def _best(function, device: str) -> float:
    function()
    return min(seconds(function, device) for _ in range(10))
