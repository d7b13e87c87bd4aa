"""Where one run of a sample spends its time: in which kind of work of the CPU kernels, and how much outside them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from rnas import kernels


def take(sample: Callable[[], object]) -> dict | None:
    """Runs a sample once under the profile of the kernels. None where no kernel has run, as in plain PyTorch.

    seconds, multiply_adds: kind of work -> of all threads together, as in rnas.kernels.profile. total_seconds: of all
    threads within the kernels. wall_seconds: of the whole run, what is outside the kernels included.
    """
    gc.collect()  # as before a timed round
    with kernels.profile() as found:
        start = time.perf_counter()
        sample()
        wall = time.perf_counter() - start
    if found.total == 0.0:
        return None
    return {
        "seconds": found.seconds,
        "multiply_adds": found.multiply_adds,
        "total_seconds": found.total,
        "wall_seconds": wall,
    }


def lines(profile: dict, threads: int, peak: float) -> list[str]:
    """A table for the terminal. peak: floating-point operations per second of all threads together.

    Shares are of the time of all threads; beside them the rate of a thread at this kind of work as a share of its peak.
    """
    wall, inside = threads * profile["wall_seconds"], profile["total_seconds"]
    waiting = max(0, inside - sum(profile["seconds"].values()))
    text = [f"    of one sample, {profile['wall_seconds'] * 1e3:.3f} ms, threads: {threads}"]
    for kind, seconds in profile["seconds"].items():
        if seconds > 0:
            rate = 2 * profile["multiply_adds"][kind] / seconds / (peak / threads)
            text.append(f"    {kind:<20} {seconds / wall:6.1%}" + (f" {rate:5.0%} of the ceiling" if rate else ""))
    text.append(f"    {'waiting, tables':<20} {waiting / wall:6.1%}")
    text.append(f"    {'outside the kernels':<20} {1 - inside / wall:6.1%}")
    return text
