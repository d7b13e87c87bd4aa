"""Triton kernels: @triton.jit functions and their launchers, without autograd and without policy.

Each module has `resource_cases()`, what scripts/kernel_resources.py compiles of it. Nothing here is imported before its
first call, so that the package works where triton is not installed.
"""
