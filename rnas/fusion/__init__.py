"""The fused kernels inside other people's supernets: `rnas.accelerate` and `rnas.restore`.

    find.py       which modules hold candidate operations, and tree.py what is above them
    recognise.py  what a candidate computes: a primitive. layers.py: what it holds; verify.py: checked in numbers;
                  reads.py, branches.py: what its code depends on
    plan.py       what was found, compared at every call; modules.py: the classes of accelerated modules
    scope.py      one run of a forward: candidates hand back deferred results
    deferred.py   weighted sums of them, made of what is in calls.py; partial.py: with partial channels around;
                  stacked.py: of a stack; parts.py: parts of what has been computed
    lower.py      from those sums to calls of the fused operation; edges.py: candidates as its edges; invoke.py: calls
    report.py     what was done
"""

from .find import accelerate, restore
from .report import Counts, Left, Replaced, Report

__all__ = ["Counts", "Left", "Replaced", "Report", "accelerate", "restore"]
