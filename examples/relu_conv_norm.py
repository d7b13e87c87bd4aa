"""What stands in front of the cells: `conv_norm`, `relu_conv_norm` and `factorized_reduce` beside plain modules.

    python examples/relu_conv_norm.py

A stem, the 1x1 convolution of a cell's input, and the one that halves the resolution. Weights and norms stay yours.
"""

import torch
from torch import nn
from torch.nn import functional as F

from rnas.kernels import conv_norm, factorized_reduce, relu_conv_norm


class Front(nn.Module):
    """(N, 3, H, W) -> (N, 32, ceil(H / 2), ceil(W / 2))."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.one = nn.Conv2d(16, 16, 1, bias=False)
        self.even, self.odd = (nn.Conv2d(16, 16, 1, stride=2, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (16, 16, 32))

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """Module by module."""
        x = self.norms[0](self.stem(x))
        x = F.relu(self.norms[1](self.one(F.relu(x))))
        return self.norms[2](torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = conv_norm(x, self.stem.weight, self.norms[0], padding=1)
        x = relu_conv_norm(x, self.one.weight, self.norms[1])
        return factorized_reduce(x, self.even.weight, self.odd.weight, self.norms[2])


def main() -> float:
    """The largest relative difference, over the output and all gradients."""
    torch.manual_seed(0)
    front = Front()
    x = torch.rand(8, 3, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
    direction, wanted, results = torch.randn(8, 32, 16, 16), [x, *front.parameters()], []
    for forward in (front.plain, front):
        out = forward(x)
        results.append([out, *torch.autograd.grad(out, wanted, direction)])
    error = max(((found - expected).norm() / expected.norm()).item() for expected, found in zip(*results))
    print(f"the three of them and their {len(wanted)} gradients agree with plain PyTorch to {error:.1e}")
    assert error < 1e-4
    return error


if __name__ == "__main__":
    main()
