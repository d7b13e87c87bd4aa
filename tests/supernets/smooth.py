"""The style of robust searches: candidates that differ from edge to edge, perturbed weights handed in, drop path.

Candidates are called with a second argument, chains are written out with functional ReLUs, and the edges of a node are
added one by one. Randomness comes from PyTorch's default generator: seed it before each call to compare two.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SPACE = (
    ("skip", "sep3"), ("max", "sep5", "none"), ("skip", "dil3", "dil5"), ("avg", "skip"), ("sep3", "sep5", "dil3"),
    ("none", "max", "avg", "skip"), ("dil5", "sep3"), ("skip", "none", "sep3"), ("max", "avg"),
    ("skip", "sep3", "sep5", "dil3", "dil5", "max", "avg", "none"), ("sep5",), ("dil3", "skip"), ("none", "sep3"),
    ("avg", "dil5", "skip"),
)  # fmt: skip
"""The candidates of the 14 edges of a cell."""


class Conv(nn.Module):
    """Separable convolutions, `depth` of them, each relu, depthwise, pointwise, norm."""

    def __init__(self, C: int, size: int, stride: int, dilation: int, depth: int, affine: bool):
        super().__init__()
        self.depth = depth
        for i in range(depth):
            step, pad = stride if i == 0 else 1, dilation * (size // 2)
            setattr(self, f"norm{i}", nn.BatchNorm2d(C, affine=affine))
            setattr(self, f"spatial{i}", nn.Conv2d(C, C, size, step, pad, dilation, groups=C, bias=False))
            setattr(self, f"point{i}", nn.Conv2d(C, C, 1, bias=False))

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """x (N, C, H, W), keep None or (N, 1, 1, 1)."""
        for i in range(self.depth):
            spatial = getattr(self, f"spatial{i}")(F.relu(x))
            x = getattr(self, f"norm{i}")(getattr(self, f"point{i}")(spatial))
        return x if keep is None else x * keep


class Pool(nn.Module):
    """A 3x3 pool by function, and a norm."""

    def __init__(self, C: int, stride: int, kind: str, affine: bool):
        super().__init__()
        self.stride, self.kind = stride, kind
        self.norm = nn.BatchNorm2d(C, affine=affine)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """As `Conv.forward`."""
        if self.kind == "max":
            x = F.max_pool2d(x, 3, self.stride, 1)
        else:
            x = F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False)
        x = self.norm(x)
        return x if keep is None else x * keep


class Skip(nn.Module):
    """The input, or at stride 2 two shifted 1x1 convolutions; never dropped at stride 1."""

    def __init__(self, channels_in: int, C: int, stride: int, affine: bool):
        super().__init__()
        if stride == 2:
            self.even = nn.Conv2d(channels_in, C // 2, 1, 2, bias=False)
            self.odd = nn.Conv2d(channels_in, C // 2, 1, 2, bias=False)
            self.norm = nn.BatchNorm2d(C, affine=affine)
        self.stride = stride

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """As `Conv.forward`."""
        if self.stride == 1:
            return x
        x = F.relu(x)
        x = self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], 1))
        return x if keep is None else x * keep


class Zero(nn.Module):
    """New zeros, without a graph to the input."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """As `Conv.forward`."""
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


def candidate(name: str, C: int, stride: int, affine: bool) -> nn.Module:
    """The module called `name`."""
    if name in ("max", "avg"):
        return Pool(C, stride, name, affine)
    if name in ("skip", "none"):
        return Skip(C, C, stride, affine) if name == "skip" else Zero(stride)
    return Conv(C, int(name[-1]), stride, 2 if name.startswith("dil") else 1, 1 if name.startswith("dil") else 2, affine)


class Edge(nn.Module):
    """The candidates of one edge by name; `drop` is a rate, or 0."""

    def __init__(self, names: tuple[str, ...], C: int, stride: int, affine: bool):
        super().__init__()
        self.candidates = nn.ModuleDict({name: candidate(name, C, stride, affine) for name in names})
        self.drop = 0.0

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (N, C, H, W), weights (K,) -> (N, C, ceil(H / stride), ceil(W / stride))."""
        out = 0
        for weight, op in zip(weights, self.candidates.values()):
            if self.drop and self.training:
                kept = 1 - self.drop
                out = out + weight * op(x, torch.bernoulli(x.new_full((len(x), 1, 1, 1), kept)) / kept)
            else:
                out = out + weight * op(x, None)
        return out


class Cell(nn.Module):
    """Nodes as lists of edges; weights as a list of rows, one per edge."""

    def __init__(self, before: tuple[int, int], C: int, reduction: bool, reduced: bool, affine: bool):
        super().__init__()
        self.first = Skip(before[0], C, 2, affine) if reduced else nn.Conv2d(before[0], C, 1)
        self.second = nn.Conv2d(before[1], C, 1)
        self.reduction, self.edge_drop = reduction, 0.0
        names = iter(SPACE)
        self.nodes = nn.ModuleList(
            nn.ModuleList(Edge(next(names), C, 2 if reduction and j < 2 else 1, affine) for j in range(2 + i))
            for i in range(4)
        )

    def forward(self, s0: Tensor, s1: Tensor, rows: list[Tensor]) -> Tensor:
        """Two states and 14 rows of weights -> (N, 4 * C, H', W')."""
        states, rows = [self.first(s0), self.second(s1)], iter(rows)
        for edges in self.nodes:
            total = None
            for edge, state in zip(edges, states):
                out = edge(state, next(rows))
                if self.edge_drop and self.training:  # in place, as drop path is mostly written
                    kept = 1 - self.edge_drop
                    out.div_(kept).mul_(torch.bernoulli(out.new_full((len(out), 1, 1, 1), kept)))
                total = out if total is None else total + out
            states.append(total)
        return torch.cat(states[2:], 1)


class Network(nn.Module):
    """Two lists of 14 architecture parameters of different lengths, shared by the cells of a kind."""

    def __init__(self, C: int, classes: int, layers: int, noise: float, affine: bool):
        super().__init__()
        self.noise = noise
        self.arch = nn.ModuleDict(
            {
                kind: nn.ParameterList(nn.Parameter(0.1 * torch.randn(len(names))) for names in SPACE)
                for kind in ("normal", "reduce")
            }
        )
        self.stem = nn.Sequential(nn.Conv2d(3, 2 * C, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * C))
        width, before, reduced, self.cells = C, (2 * C, 2 * C), False, nn.ModuleList()
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            width *= 2 if reduction else 1
            self.cells.append(Cell(before, width, reduction, reduced, affine))
            before, reduced = (before[1], 4 * width), reduction
        self.head = nn.Linear(before[1], classes)

    def weights(self, kind: str) -> list[Tensor]:
        """Softmax of each edge, plus uniform noise in [-noise, noise] that is not differentiated."""
        rows = [F.softmax(row, -1) for row in self.arch[kind]]
        return [row + torch.empty_like(row).uniform_(-self.noise, self.noise) for row in rows] if self.noise else rows

    def forward(self, x: Tensor, rows: dict[str, list[Tensor]] | None = None) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes); `rows` replaces the weights, as an attack on them does."""
        rows = rows or {kind: self.weights(kind) for kind in ("normal", "reduce")}
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, rows["reduce" if cell.reduction else "normal"])
        return self.head(s1.mean((2, 3)))

    def arch_parameters(self) -> list[Tensor]:
        """28 leaves (K_edge,)."""
        return [*self.arch["normal"], *self.arch["reduce"]]


def build(
    channels: int = 16,
    layers: int = 3,
    classes: int = 10,
    *,
    noise: float = 0.0,
    drop_path: float = 0.0,
    edge_drop: float = 0.0,
    affine: bool = True,
) -> Network:
    """A supernet (N, 3, H, W) -> (N, classes); H and W divisible by 4.

    Args:
        noise: half width of the uniform perturbation of the weights.
        drop_path: in training, the rate at which a candidate other than a skip is dropped for an image.
        edge_drop: in training, the rate at which an edge is dropped for an image, in place on the edge's result.
        affine: of BN inside the candidates.
    """
    network = Network(channels, classes, layers, noise, affine)
    for module in network.modules():
        if isinstance(module, Edge):
            module.drop = drop_path
        elif isinstance(module, Cell):
            module.edge_drop = edge_drop
    return network
