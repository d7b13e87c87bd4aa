"""What the ops compute, in plain PyTorch: the definitions that the kernels are tested against."""
