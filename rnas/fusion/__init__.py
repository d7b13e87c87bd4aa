"""The fused kernels inside other people's supernets: `rnas.accelerate` and `rnas.restore`.

    find.py       which modules hold candidate operations
    recognise.py  what a candidate computes: a primitive, checked in numbers; reads.py: what its code depends on
    modules.py    the classes of accelerated modules
    scope.py      one run of a forward: candidates hand back deferred results
    deferred.py   weighted sums of them; partial.py: with partial channels around; stacked.py: of a stack
    lower.py      from those sums to calls of the fused operation
"""

from .find import accelerate, restore
from .report import Counts, Left, Replaced, Report

__all__ = ["Counts", "Left", "Replaced", "Report", "accelerate", "restore"]
