"""A supernet as the code bases of this field write it, on the fused kernels by one line: `rnas.accelerate`.

    python examples/accelerate.py

Nothing here comes from rnas but that line. The same goes for any model that holds lists of candidates like these.
"""

import copy

import torch
from torch import nn

import rnas


def separable(c: int, kernel: int, stride: int, dilation: int = 1) -> nn.Sequential:
    """ReLU, depthwise and pointwise convolution, BN: (N, c, H, W) -> (N, c, ceil(H / stride), ceil(W / stride))."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False),
        nn.Conv2d(c, c, 1, bias=False),
        nn.BatchNorm2d(c, affine=False),
    )


class Edge(nn.Module):
    """Five candidates, mixed: (N, C, H, W), (K,) -> (N, C, H, W)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        pool = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), nn.BatchNorm2d(c, affine=False))
        twice = nn.Sequential(separable(c, 3, 1), separable(c, 3, 1))
        self.ops = nn.ModuleList([nn.Identity(), pool, twice, separable(c, 3, 1, 2), separable(c, 5, 1, 2)])

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return sum(w * op(x) for w, op in zip(weights, self.ops))


class Cell(nn.Module):
    """Three nodes, each the sum of edges from the input and from all nodes before: (N, C, H, W) -> (N, 3 C, H, W)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.edges = nn.ModuleList([Edge(c) for node in range(3) for _ in range(1 + node)])

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        states, rows = [x], iter(zip(self.edges, weights))
        for _ in range(3):
            states.append(sum(edge(state, row) for state, (edge, row) in zip(states, rows)))
        return torch.cat(states[1:], dim=1)


def main() -> float:
    """The largest relative difference, over the output and all gradients."""
    torch.manual_seed(0)
    plain, alpha = Cell(16), torch.zeros(6, 5, requires_grad=True)
    x, direction = torch.randn(8, 16, 16, 16, requires_grad=True), torch.randn(8, 48, 16, 16)

    fast = copy.deepcopy(plain)
    report = rnas.accelerate(fast)
    print(report)

    results = []
    for cell in (plain, fast):
        out = cell(x, alpha.softmax(1))
        results.append([out, *torch.autograd.grad(out, [x, alpha, *cell.parameters()], direction)])
    error = max(((fused - usual).norm() / usual.norm()).item() for usual, fused in zip(*results))
    print(f"rnas.accelerate agrees with the modules' own code to {error:.1e}, and {report.counts.cells} cell was fused")
    assert error < 1e-4
    return error


if __name__ == "__main__":
    main()
