"""The style of PC-DARTS: an edge mixes the first C / k channels, lets the others pass, and shuffles; edges have weights.

An edge finds out its stride by comparing heights, after mixing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .darts_candidates import CANDIDATES, PRIMITIVES, Halve, ReLUConvBN


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """(N, groups * c, H, W): channel g * c + i moves to i * groups + g."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2).contiguous()
    return x.view(batch, -1, height, width)


class PartialMixedOp(nn.Module):
    """A mixed operation on a part of the channels. `mp` is registered in every edge and used at stride 2."""

    def __init__(self, C: int, stride: int, k: int, affine: bool, track: bool):
        super().__init__()
        self.k = k
        self._ops = nn.ModuleList()
        self.mp = nn.MaxPool2d(2, 2)
        part = C // k
        for name in PRIMITIVES:
            op = CANDIDATES[name](part, stride, affine, track)
            if name.endswith("pool_3x3"):
                op = nn.Sequential(op, nn.BatchNorm2d(part, affine=False, track_running_stats=track))
            self._ops.append(op)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (N, C, H, W), weights (K,) -> (N, C, H / stride, W / stride)."""
        part = x.shape[1] // self.k
        through, around = x[:, :part, :, :], x[:, part:, :, :]
        mixed = sum(w * op(through) for w, op in zip(weights, self._ops))
        if mixed.shape[2] == x.shape[2]:
            out = torch.cat([mixed, around], dim=1)
        else:
            out = torch.cat([mixed, self.mp(around)], dim=1)
        return channel_shuffle(out, self.k)


class Cell(nn.Module):
    """As in DARTS, but that each edge is multiplied by a number."""

    def __init__(self, steps: int, before: tuple[int, int], C: int, reduction: bool, reduced: bool, **edge):
        super().__init__()
        norm = {"affine": edge["affine"], "track": edge["track"]}
        self._ops = nn.ModuleList(
            PartialMixedOp(C, 2 if reduction and j < 2 else 1, **edge) for i in range(steps) for j in range(2 + i)
        )
        self.preprocess0 = (Halve if reduced else ReLUConvBN)(before[0], C, **norm)
        self.preprocess1 = ReLUConvBN(before[1], C, **norm)
        self.reduction, self.steps = reduction, steps

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor, edge_weights: Tensor) -> Tensor:
        """Weights (E, K) and edge_weights (E,) -> (N, steps * C, H', W')."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self.steps):
            edges = zip(states, self._ops[offset:], weights[offset:], edge_weights[offset:])
            offset += len(states)
            states.append(sum(beta * op(state, row) for state, op, row, beta in list(edges)))
        return torch.cat(states[2:], dim=1)


class Network(nn.Module):
    """Stem, cells, classifier; alphas and betas are parameters."""

    def __init__(self, C: int, classes: int, layers: int, steps: int = 4, **edge):
        super().__init__()
        self.steps = steps
        edges = steps * (steps + 3) // 2
        for kind in ("normal", "reduce"):
            self.register_parameter(f"alphas_{kind}", nn.Parameter(1e-3 * torch.randn(edges, len(PRIMITIVES))))
            self.register_parameter(f"betas_{kind}", nn.Parameter(1e-3 * torch.randn(edges)))
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))
        width, before, reduced = C, (3 * C, 3 * C), False
        self.cells = nn.ModuleList()
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            width *= 2 if reduction else 1
            self.cells += [Cell(steps, before, width, reduction, reduced, **edge)]
            before, reduced = (before[1], steps * width), reduction
        self.classifier = nn.Linear(before[1], classes)

    def edge_weights(self, betas: Tensor) -> Tensor:
        """(E,) -> (E,): a softmax over the edges into each node, node by node."""
        weights = F.softmax(betas[0:2], dim=-1)
        start = 2
        for count in range(3, 2 + self.steps):
            weights = torch.cat([weights, F.softmax(betas[start : start + count], dim=-1)], dim=0)
            start += count
        return weights

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes)."""
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            kind = "reduce" if cell.reduction else "normal"
            weights = F.softmax(getattr(self, f"alphas_{kind}"), dim=-1)
            s0, s1 = s1, cell(s0, s1, weights, self.edge_weights(getattr(self, f"betas_{kind}")))
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1))

    def arch_parameters(self) -> list[Tensor]:
        """Alphas (E, K) and betas (E,), normal and reduction."""
        return [self.alphas_normal, self.alphas_reduce, self.betas_normal, self.betas_reduce]


def build(
    channels: int = 16, layers: int = 3, classes: int = 10, *, k: int = 4, affine: bool = False, track: bool = True
) -> Network:
    """A supernet (N, 3, H, W) -> (N, classes); H and W divisible by 4, channels by 2 * k.

    Args:
        k: one channel in k goes through the candidates.
        affine, track: of BN inside the candidates, as PyTorch's `affine` and `track_running_stats`.
    """
    return Network(channels, classes, layers, k=k, affine=affine, track=track)
