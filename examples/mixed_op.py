"""One mixed edge of a supernet of your own, fused: `rnas.kernels.mixed_op` beside the usual loop over modules.

    python examples/mixed_op.py

The weights stay in your modules: the kernel takes them, and their batch norms, in the order of `primitives`.
"""

import torch
from torch import nn

from rnas.kernels import arrange, mixed_op


def separable(channels: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """ReLU, depthwise and pointwise convolution, BN: (N, channels, H, W) -> the same."""
    shape = {"padding": dilation * (kernel // 2), "dilation": dilation, "groups": channels, "bias": False}
    depthwise, pointwise = nn.Conv2d(channels, channels, kernel, **shape), nn.Conv2d(channels, channels, 1, bias=False)
    return nn.Sequential(nn.ReLU(), depthwise, pointwise, nn.BatchNorm2d(channels))


class Edge(nn.Module):
    """Seven candidates, mixed: (N, C, H, W), (K,) -> (N, C, H, W)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        average = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
        self.candidates = nn.ModuleDict(
            {
                "max_pool_3x3": nn.Sequential(nn.MaxPool2d(3, 1, padding=1), nn.BatchNorm2d(c)),
                "avg_pool_3x3": nn.Sequential(average, nn.BatchNorm2d(c)),
                "skip_connect": nn.Identity(),
                "sep_conv_3x3": nn.Sequential(separable(c, 3), separable(c, 3)),
                "sep_conv_5x5": nn.Sequential(separable(c, 5), separable(c, 5)),
                "dil_conv_3x3": separable(c, 3, dilation=2),
                "dil_conv_5x5": separable(c, 5, dilation=2),
            }
        )

    def plain(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Module by module."""
        return sum(weight * candidate(x) for weight, candidate in zip(weights, self.candidates.values()))

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        convolutions = [module.weight for module in self.modules() if isinstance(module, nn.Conv2d)]
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        return mixed_op(x, weights, convolutions, norms, primitives=tuple(self.candidates))


def main() -> float:
    """The largest relative difference, over the output and all gradients."""
    torch.manual_seed(0)
    edge, alpha = Edge(16), torch.zeros(7, requires_grad=True)
    x = arrange(torch.randn(8, 16, 16, 16)).requires_grad_()  # channels_last, where a kernel serves: no copy later
    direction, wanted = torch.randn(8, 16, 16, 16), [x, alpha, *edge.parameters()]
    results = []
    for forward in (edge.plain, edge):
        out = forward(x, alpha.softmax(0))
        results.append([out, *torch.autograd.grad(out, wanted, direction)])
    error = max(((fused - plain).norm() / plain.norm()).item() for plain, fused in zip(*results))
    print(f"mixed_op and its {len(wanted)} gradients agree with plain PyTorch to {error:.1e}")
    assert error < 1e-4
    return error


if __name__ == "__main__":
    main()
