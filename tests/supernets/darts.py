"""The style of DARTS: an edge is a `MixedOp` with a ModuleList, its row of weights comes as the second argument.

The architecture tensors are plain attributes of the network, not parameters; one softmax per cell.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .darts_candidates import CANDIDATES, PRIMITIVES, Halve, ReLUConvBN


class MixedOp(nn.Module):
    """All candidates of an edge; a pool is followed by a BN without parameters."""

    def __init__(self, C: int, stride: int, affine: bool = False, track: bool = True, primitives=PRIMITIVES):
        super().__init__()
        self._ops = nn.ModuleList()
        for name in primitives:
            op = CANDIDATES[name](C, stride, affine, track)
            if "pool" in name:
                op = nn.Sequential(op, nn.BatchNorm2d(C, affine=False, track_running_stats=track))
            self._ops.append(op)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (N, C, H, W), weights (K,) -> (N, C, ceil(H / stride), ceil(W / stride))."""
        return sum(w * op(x) for w, op in zip(weights, self._ops))


class Cell(nn.Module):
    """Four nodes, each the sum of its edges from everything before it; the nodes are concatenated."""

    def __init__(self, steps: int, before: tuple[int, int], C: int, reduction: bool, reduced: bool, **edge):
        super().__init__()
        self.reduction = reduction
        norm = {"affine": edge["affine"], "track": edge["track"]}
        self.preprocess0 = (Halve if reduced else ReLUConvBN)(before[0], C, **norm)
        self.preprocess1 = ReLUConvBN(before[1], C, **norm)
        self._steps = steps
        self._ops = nn.ModuleList()
        self._bns = nn.ModuleList()  # empty, and in every descendant of this style
        for node in range(steps):
            for source in range(2 + node):
                self._ops.append(MixedOp(C, 2 if reduction and source < 2 else 1, **edge))

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """The outputs of the last two cells and weights (E, K) -> (N, steps * C, H', W')."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self._steps):
            node = sum(self._ops[offset + j](state, weights[offset + j]) for j, state in enumerate(states))
            offset += len(states)
            states.append(node)
        return torch.cat(states[-self._steps :], dim=1)


class Network(nn.Module):
    """Stem, cells, linear classifier; cells of stride 2 at a third and two thirds of the depth."""

    def __init__(self, C: int, classes: int, layers: int, steps: int = 4, stem: int = 3, **edge):
        super().__init__()
        width, before = C, (stem * C, stem * C)
        self.stem = nn.Sequential(nn.Conv2d(3, stem * C, 3, padding=1, bias=False), nn.BatchNorm2d(stem * C))
        self.cells = nn.ModuleList()
        reduced = False
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            width *= 2 if reduction else 1
            self.cells.append(Cell(steps, before, width, reduction, reduced, **edge))
            before, reduced = (before[1], steps * width), reduction
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(before[1], classes)
        shape = (steps * (steps + 3) // 2, len(edge["primitives"]))
        self.alphas_normal = torch.randn(shape).mul(1e-3).requires_grad_()
        self.alphas_reduce = torch.randn(shape).mul(1e-3).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes)."""
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            weights = F.softmax(self.alphas_reduce if cell.reduction else self.alphas_normal, dim=-1)
            s0, s1 = s1, cell(s0, s1, weights)
        pooled = self.global_pooling(s1)
        return self.classifier(pooled.view(pooled.size(0), -1))

    def arch_parameters(self) -> list[Tensor]:
        """Two leaves (E, K)."""
        return [self.alphas_normal, self.alphas_reduce]


def build(
    channels: int = 16, layers: int = 3, classes: int = 10, *, affine: bool = False, track: bool = True, **options
) -> Network:
    """A supernet (N, 3, H, W) -> (N, classes); H and W divisible by 4.

    Args:
        affine: whether BN inside the candidates has a scale and a shift.
        track: whether BN keeps running statistics.
        options: `primitives`, the list of candidates of every edge, `steps`, the nodes of a cell (4), and `stem`.
    """
    options.setdefault("primitives", PRIMITIVES)
    return Network(channels, classes, layers, affine=affine, track=track, **options)
