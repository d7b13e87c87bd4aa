"""Other ways to put the cells of the DARTS style together, around the same candidates.

Edges in wrappers that pick their state, nodes that are modules, stacks with a row for no operation at all, a skip
connection beside the candidates, slices that are all channels, and outputs that hold an input of the cell.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import darts
from .darts_candidates import PRIMITIVES, Halve, Pass


class Wrapped(nn.Module):
    """An edge that knows from which state it comes."""

    def __init__(self, edge: nn.Module, source: int):
        super().__init__()
        self.op, self.source = edge, source

    def forward(self, states: list[Tensor], weights: Tensor) -> Tensor:
        """All states (N, C, H, W) and the edge's weights (K,) -> (N, C, H', W')."""
        return self.op(states[self.source], weights)


class Node(nn.Module):
    """The edges into one node."""

    def __init__(self, edges: list[nn.Module]):
        super().__init__()
        self.edges = nn.ModuleList(edges)

    def forward(self, states: list[Tensor], weights: Tensor) -> Tensor:
        """All states (N, C, H, W) and the edges' weights (E, K) -> (N, C, H', W')."""
        return sum(edge(state, row) for edge, state, row in zip(self.edges, states, weights))


class FlatNode(nn.Module):
    """The candidates of all edges into one node, in one list; those of little weight are left out."""

    def __init__(self, edges: list[nn.Module]):
        super().__init__()
        self.ops = nn.ModuleList([op for edge in edges for op in edge._ops])
        self.sources = [source for source, edge in enumerate(edges) for _ in edge._ops]

    def forward(self, states: list[Tensor], weights: Tensor) -> Tensor:
        """As `Node.forward`."""
        state = 0.0
        for source, op, weight in zip(self.sources, self.ops, weights.reshape(-1)):
            if not weight < 0.01:
                state = state + weight * op(states[source])
        return state


class Stacked(nn.Module):
    """All candidates but `none`, in a stack; zeros are put behind it for the last weight."""

    def __init__(self, edge: nn.Module):
        super().__init__()
        self._ops = edge._ops[1:]

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (N, C, H, W), weights (K,) -> (N, C, H', W')."""
        results = torch.stack([op(x) for op in self._ops])
        if len(weights) == len(results) + 1:
            results = torch.cat((results, torch.zeros_like(results[:1])), 0)
        return torch.sum(results * weights.view(-1, *[1] * (results.dim() - 1)), 0)


class Beside(nn.Module):
    """The candidates of an edge, and half a skip connection beside them, whatever its weight among them."""

    def __init__(self, edge: nn.Module, C: int, stride: int):
        super().__init__()
        self._ops = edge._ops
        self.auxiliary = Pass() if stride == 1 else Halve(C, C, affine=False)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (N, C, H, W), weights (K,) -> (N, C, H', W')."""
        out = sum(weight * op(x) for weight, op in zip(weights, self._ops))
        out += self.auxiliary(x) * 0.5
        return out


class Part(nn.Module):
    """The candidates on the first channels, one of `parts`: here all of them."""

    def __init__(self, edge: nn.Module):
        super().__init__()
        self._ops, self.parts = edge._ops, 1

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (N, C, H, W), weights (K,) -> (N, C, H', W')."""
        count = x.shape[1] // self.parts
        through, around = x[:, :count, :, :], x[:, count:, :, :]
        out = sum(weight * op(through) for weight, op in zip(weights, self._ops) if not weight == 0)
        return out if self.parts == 1 else torch.cat([out, around], dim=1)


class Cell(nn.Module):
    """A cell of the DARTS style, put together in one of the ways of `KINDS`."""

    def __init__(self, cell: darts.Cell, C: int, kind: str):
        super().__init__()
        self.reduction, self.kind, self.steps = cell.reduction, kind, cell._steps
        self.preprocess0, self.preprocess1 = cell.preprocess0, cell.preprocess1
        edges, strides = list(cell._ops), []
        for node in range(self.steps):
            strides += [2 if cell.reduction and source < 2 else 1 for source in range(2 + node)]
        if kind in EDGES:
            edges = [EDGES[kind](edge, C, stride) for edge, stride in zip(edges, strides)]
        rows = [edges[node * (node + 3) // 2 :][: 2 + node] for node in range(self.steps)]
        if kind == "wrapped edges":
            rows = [nn.ModuleList(map(Wrapped, row, range(len(row)))) for row in rows]
        elif kind in NODES:
            rows = map(NODES[kind], rows)
        else:
            rows = map(nn.ModuleList, rows)
        self.nodes = nn.ModuleList(rows)
        if kind == "an input in the output":
            self.out = nn.Conv2d((self.steps + (not self.reduction)) * C, self.steps * C, 1, bias=False)

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """The outputs of the last two cells and weights (E, K) -> (N, steps * C, H', W')."""
        states, offset = [self.preprocess0(s0), self.preprocess1(s1)], 0
        for node in self.nodes:
            rows = weights[offset : offset + len(states)]
            offset += len(states)
            if self.kind in NODES:
                states.append(node(states, rows))
            elif self.kind == "wrapped edges":
                states.append(sum(edge(states, row) for edge, row in zip(node, rows)))
            else:
                states.append(sum(edge(state, row) for edge, state, row in zip(node, states, rows)))
        if self.kind == "an input in the output":
            return self.out(torch.cat(states[1 if not self.reduction else 2 :], dim=1))
        return torch.cat(states[2:], dim=1)


NODES = {"nodes": Node, "nodes of candidates": FlatNode}
EDGES = {
    "stacks": lambda edge, C, stride: Stacked(edge),
    "a skip beside": Beside,
    "all channels": lambda edge, C, stride: Part(edge),
}
KINDS = ("wrapped edges", *NODES, *EDGES, "an input in the output")


def build(
    channels: int = 16, layers: int = 3, classes: int = 10, *, kind: str = "nodes", bias: bool = False, steps: int = 4
) -> nn.Module:
    """A supernet (N, 3, H, W) -> (N, classes); H and W divisible by 4.

    Args:
        kind: one of `KINDS`, or "" for the DARTS style itself.
        bias: whether the pointwise convolutions in front of a norm have a bias.
        steps: the nodes of a cell.
    """
    model = darts.build(channels, layers, classes, steps=steps, primitives=PRIMITIVES)
    if kind:
        width = channels
        for index, cell in enumerate(model.cells):
            width *= 2 if cell.reduction else 1
            model.cells[index] = Cell(cell, width, kind)
    for edge in model.modules():
        if bias and isinstance(edge, darts.MixedOp):
            for each in edge.modules():
                if isinstance(each, nn.Conv2d) and each.groups == 1:
                    each.bias = nn.Parameter(0.1 * torch.randn(each.out_channels))
    return model
