"""Fused operations for robust architecture search: one public function per op.

Each op has a plain-PyTorch definition in `rnas.kernels.reference`, compiled kernels where the installation has them,
and `rnas.kernels.backend` to say which of them serves a call and why.
"""

from rnas.kernels.pgd_step import pgd_step, random_start

__all__ = ["pgd_step", "random_start"]
