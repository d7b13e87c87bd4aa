"""A whole cell in one call: `rnas.kernels.mixed_cell` beside the usual two loops, and the memory it gives back.

    python examples/mixed_cell.py

What the edges of a state share, such as its ReLU and its pools, is computed once. `edge_weights` are those of PC-DARTS.
"""

import time

import torch
from torch import nn

from rnas.kernels import empty_cache, mixed_cell

PRIMITIVES = ("none", "skip_connect", "avg_pool_3x3", "conv_1x1", "conv_3x3")  # those of NAS-Bench-201


def candidates(c: int) -> nn.ModuleDict:
    """All but `none`, which adds nothing."""
    convolutions = {f"conv_{k}x{k}": nn.Conv2d(c, c, k, padding=k // 2, bias=False) for k in (1, 3)}
    made = {name: nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(c)) for name, conv in convolutions.items()}
    average = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
    return nn.ModuleDict({"skip_connect": nn.Identity(), "avg_pool_3x3": average} | made)


def plain(edges: nn.ModuleList, states: list, weights: torch.Tensor, edge_weights: torch.Tensor) -> torch.Tensor:
    """The cell edge by edge: (N, C, H, W) each, (E, K), (E,) -> (N, 3 C, H, W)."""
    inputs, rows = len(states), iter(zip(edges, weights, edge_weights))
    for _ in range(3):
        into = [(state, *next(rows)) for state in states]
        mixed = [scale * sum(w * op(x) for w, op in zip(row[1:], edge.values())) for x, edge, row, scale in into]
        states = [*states, sum(mixed)]
    return torch.cat(states[inputs:], dim=1)


def fused(edges: nn.ModuleList, states: list, weights: torch.Tensor, edge_weights: torch.Tensor) -> torch.Tensor:
    """The same by one call."""
    convolutions = [[m.weight for m in edge.modules() if isinstance(m, nn.Conv2d)] for edge in edges]
    norms = [[m for m in edge.modules() if isinstance(m, nn.BatchNorm2d)] for edge in edges]
    options = {"primitives": PRIMITIVES, "nodes": 3, "pool_norm": False, "edge_weights": edge_weights}
    return mixed_cell(states, weights, convolutions, norms, **options)


def main() -> float:
    """The largest relative difference, over the output and all gradients."""
    torch.manual_seed(0)
    edges = nn.ModuleList(candidates(16) for _ in range(2 + 3 + 4))
    states = [torch.randn(8, 16, 16, 16).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2)]
    alpha, beta = torch.randn(9, 5, requires_grad=True), torch.randn(9, requires_grad=True)
    wanted, results = [*states, alpha, beta, *edges.parameters()], []
    for cell in (plain, fused):
        begin = time.perf_counter()
        out = cell(edges, states, alpha.softmax(1), beta.sigmoid())
        results.append([out, *torch.autograd.grad(out.square().mean(), wanted)])
        print(f"{cell.__name__}: {1e3 * (time.perf_counter() - begin):.0f} ms, the first call's memory included")
    error = max(((found - expected).norm() / expected.norm()).item() for expected, found in zip(*results))
    print(f"mixed_cell and its {len(wanted)} gradients agree with plain PyTorch to {error:.1e}")
    assert error < 1e-4
    empty_cache()  # between two parts of a program: what the kernels hold for their next calls
    return error


if __name__ == "__main__":
    main()
