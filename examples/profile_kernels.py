"""Where the CPU kernels spend their time: `rnas.kernels.profile` around a forward and a backward pass.

    python examples/profile_kernels.py

The multiply-adds that the profile counts are compared with those that PyTorch counts of the same convolutions. One of
3x3 with stride 1 needs 36 instead of 144 for each 4x4 outputs: the kernels use Winograd's algorithm.
"""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rnas.kernels import Profile, mixed_op, profile

CHANNELS, PRIMITIVES = 16, ("skip_connect", "conv_1x1", "conv_3x3")


def main() -> float:
    """The relative difference of the two counts."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(CHANNELS, CHANNELS, k, padding=k // 2, bias=False) for k in (1, 3)]
    norms = [nn.BatchNorm2d(CHANNELS) for _ in convolutions]
    x = torch.randn(16, CHANNELS, 32, 32).to(memory_format=torch.channels_last)
    weights, parameters = torch.full((3,), 1 / 3), [convolution.weight for convolution in convolutions]

    expected = 0.0
    for convolution, norm in zip(convolutions, norms):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            norm(convolution(x.relu()))
        expected += counter.get_total_flops() / 2 * (36 / 144 if convolution.kernel_size == (3, 3) else 1)
    with torch.no_grad(), profile() as forward:
        mixed_op(x, weights, parameters, norms, primitives=PRIMITIVES)
    with profile() as step:
        mixed_op(x, weights, parameters, norms, primitives=PRIMITIVES).sum().backward()
    print(step)
    if forward.total == 0.0:  # plain PyTorch has served the calls: there is nothing to compare
        return 0.0
    error = abs(sum(forward.multiply_adds.values()) / expected - 1)
    print(f"multiply-adds of a forward pass: {expected:.3g}, the profile's agree to {error:.1e}")
    assert error < 1e-9 and busiest(step) in step.seconds and 0 < step.total
    return error


def busiest(found: Profile) -> str:
    """The kind of work that takes longest."""
    return max(found.seconds, key=found.seconds.get)


if __name__ == "__main__":
    main()
