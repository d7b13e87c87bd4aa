"""Certified margins against a strong attack: no margin that PGD reaches may lie below its bound.

    python scripts/certified_soundness.py [--networks 200] [--steps 100] [--restarts 2]

Random tiny supernets, balls and images, drawn as in tests/test_certify.py, which attacks fewer of them more lightly.
Exits with 1 where a bound is broken.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from certify_problems import draw, excess, smallest_margin  # noqa: E402

ROUNDING = 1e-9  # relative, in float64


def main() -> int:
    """Prints one line; returns 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("networks", 200), ("steps", 100), ("restarts", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    began, worst, nearest, below_intervals = time.perf_counter(), 0.0, 0.0, 0
    for seed in range(options.networks):
        problem = draw(seed)
        bound = problem.bound().detach()
        reached = smallest_margin(problem, seed, steps=options.steps, restarts=options.restarts)
        worst = max(worst, float(excess(bound, reached)))
        others, clean = torch.isfinite(reached), problem.margin(problem.x).detach()
        nearest = max(nearest, float(((clean - reached) / (clean - bound))[others].max()))
        below_intervals += int((bound < problem.bound(method="interval")).any())
    print(
        f"{options.networks} networks, PGD-{options.steps} with {options.restarts} restarts: largest excess over a "
        f"bound {worst:.1e} (relative), largest share of a certified decrease that the attack reached {nearest:.2f}, "
        f"{below_intervals} networks below interval bounds, {time.perf_counter() - began:.0f} s"
    )
    return int(worst > ROUNDING or below_intervals > 0)


if __name__ == "__main__":
    sys.exit(main())
