"""Fused operations for robust architecture search: one public function per op.

Each op has a plain-PyTorch definition in `rnas.kernels.reference`, compiled kernels where the installation has them,
some a Triton kernel in `rnas.kernels.triton`, and `rnas.kernels.backend` to say which of them serves a call and why.
"""

from rnas.kernels.fused import empty_cache
from rnas.kernels.jacobian_norm import jacobian_norm
from rnas.kernels.mixed_op import arrange, mixed_cell, mixed_op
from rnas.kernels.pgd_step import pgd_step, random_start
from rnas.kernels.profile import Profile, profile
from rnas.kernels.relu_conv_norm import conv_norm, factorized_reduce, relu_conv_norm

__all__ = [
    "Profile",
    "arrange",
    "conv_norm",
    "empty_cache",
    "factorized_reduce",
    "jacobian_norm",
    "mixed_cell",
    "mixed_op",
    "pgd_step",
    "profile",
    "random_start",
    "relu_conv_norm",
]
