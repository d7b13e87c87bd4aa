"""The style of frameworks in which a network is a graph: a node adds up what arrives, an edge holds an operation.

The graph calls an operation's `forward` itself and hands it the data of the edge, among which are its weights. Graphs lie
at nodes of graphs; two of them are equal where their names are. The first cell takes one tensor for both of its inputs.
"""

from __future__ import annotations

import itertools
from abc import ABCMeta, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .darts_candidates import CANDIDATES, PRIMITIVES, Halve, ReLUConvBN

_numbers = itertools.count()


class EdgeData:
    """What an edge holds: an operation, and where that is a mixture its weights before the softmax, (K,)."""

    def __init__(self, op: Operation, alpha: Tensor | None = None):
        self.op, self.alpha = op, alpha


class Operation(nn.Module, metaclass=ABCMeta):
    """Of an edge, on images (N, C, H, W)."""

    @abstractmethod
    def forward(self, x: Tensor, data: EdgeData | None) -> Tensor:
        """data: of the edge; None inside of a mixture."""


class Primitive(Operation):
    """Any module."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, data: EdgeData | None) -> Tensor:
        """As `Operation.forward`."""
        return self.body(x)


class Mixture(Operation):
    """The primitives by their weights."""

    def __init__(self, primitives: list[Operation]):
        super().__init__()
        self.primitives = primitives
        for index, primitive in enumerate(primitives):
            self.add_module(f"primitive-{index}", primitive)

    def forward(self, x: Tensor, data: EdgeData) -> Tensor:
        """As `Operation.forward`."""
        weights = torch.softmax(data.alpha, dim=-1)
        return sum(weight * op(x, None) for weight, op in zip(weights, self.primitives))


class Graph(nn.Module):
    """Nodes by number; edges lead to higher ones, and the last node is the result."""

    def __init__(self, name: str, inputs: list[int]):
        super().__init__()
        self.name, self.inputs, self.number = name, inputs, next(_numbers)
        self.edges: dict[tuple[int, int], EdgeData] = {}
        self.combine: dict[int, Callable] = {}

    def __eq__(self, other) -> bool:
        return isinstance(other, Graph) and self.name == other.name

    def __hash__(self) -> int:
        return hash((self.name, self.number))

    def add(self, source: int, target: int, op: Operation, alpha: Tensor | None = None) -> None:
        """An edge."""
        self.edges[source, target] = EdgeData(op, alpha)
        self.add_module(f"{self.name}-edge({source},{target})", op)

    def add_graph(self, node: int, graph: Graph) -> None:
        """A graph that makes a node of what arrives there."""
        self.combine[node] = graph
        self.add_module(f"{self.name}-graph({node})", graph)

    def forward(self, x: Tensor | dict[int, Tensor]) -> Tensor:
        """x: (N, C, H, W), or what arrived at the node of this graph, by the edges' sources."""
        given = [x] if isinstance(x, Tensor) else [x[source] for source in self.inputs]
        arriving: dict[int, dict[int, Tensor]] = {node + 1: {0: each} for node, each in enumerate(given)}
        for node in sorted({*arriving, *(target for _, target in self.edges)}):
            values = arriving.pop(node)
            combine = self.combine.get(node, sum)
            if isinstance(combine, Graph):
                made = combine.forward(values)
            else:
                made = next(iter(values.values())) if len(values) == 1 else combine([values[k] for k in sorted(values)])
            for (source, target), data in self.edges.items():
                if source == node:
                    arriving.setdefault(target, {})[node] = data.op.forward(made, data)
        return made


def concatenated(tensors: list[Tensor]) -> Tensor:
    """(N, C, H, W) each -> (N, len(tensors) * C, H, W)."""
    return torch.cat(tensors, dim=1)


def _cell(name: str, inputs: list[int], C: int, stride: int, alphas: nn.ParameterList, steps: int) -> Graph:
    cell, weights = Graph(name, inputs), iter(alphas)
    for node in range(3, 3 + steps):
        for source in range(1, node):
            step, primitives = stride if source < 3 else 1, []
            for each in PRIMITIVES:
                body = CANDIDATES[each](C, step, False, True)
                primitives.append(Primitive(nn.Sequential(body, nn.BatchNorm2d(C)) if "pool" in each else body))
            cell.add(source, node, Mixture(primitives), next(weights))
        cell.add(node, 3 + steps, Primitive(nn.Identity()))
    cell.combine[3 + steps] = concatenated
    return cell


class Network(Graph):
    """Node 1 is the images, node 2 the stem's, then come the cells and the logits."""

    def __init__(self, C: int, layers: int, classes: int, steps: int = 4):
        super().__init__("network", [0])
        count, width, before, reduced = steps * (steps + 3) // 2, C, {2: 3 * C}, False
        for kind in ("normal", "reduction"):
            alphas = [nn.Parameter(1e-3 * torch.randn(len(PRIMITIVES))) for _ in range(count)]
            setattr(self, kind, nn.ParameterList(alphas))
        self.add(1, 2, Primitive(nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))))
        for node in range(3, 3 + layers):
            reduction = node - 3 in (layers // 3, 2 * layers // 3)
            width *= 2 if reduction else 1
            sources = [2, 2] if node == 3 else [max(2, node - 2), node - 1]
            for source in set(sources):
                halves = reduced and source < node - 1
                self.add(source, node, Primitive((Halve if halves else ReLUConvBN)(before[source], width)))
            kind, stride = ("reduction", 2) if reduction else ("normal", 1)
            self.add_graph(node, _cell(kind, sources, width, stride, getattr(self, kind), steps))
            before[node], reduced = steps * width, reduction
        last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before[2 + layers], classes))
        self.add(2 + layers, 3 + layers, Primitive(last))

    def arch_parameters(self) -> list[Tensor]:
        """One (K,) for each edge of both kinds of cells."""
        return [*self.normal, *self.reduction]


def build(C: int = 16, layers: int = 3, classes: int = 10, **options) -> Network:
    """A supernet (N, 3, H, W) -> (N, classes); H and W divisible by 4. options: `steps`, the nodes of a cell."""
    return Network(C, layers, classes, **options)
