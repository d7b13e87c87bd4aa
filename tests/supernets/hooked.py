"""The style of code with side channels: weights are left on the module before the call, and hooks look on.

An edge is called as `edge(x, "normal/3")`; it reads its weights from its attribute `mixture`, finds its candidates among
its own children by name, and adds up in place. The first ReLU of a chain keeps its input, later ones work in place. After a
call a graph hangs on `mixture`, so copy a network before its first call.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def chain(C: int, size: int, dilation: int, stride: int, **norm) -> list[nn.Module]:
    """Depthwise, pointwise, norm."""
    padding = dilation * (size - 1) // 2
    return [
        nn.Conv2d(C, C, size, stride, padding, dilation=dilation, groups=C, bias=False),
        nn.Conv2d(C, C, (1, 1), bias=False),
        nn.BatchNorm2d(C, **norm),
    ]


class Downsample(nn.Sequential):
    """A skip connection of stride 2: concatenated 1x1 convolutions of even and odd pixels; odd sizes are padded."""

    def __init__(self, channels_in: int, C: int, **norm):
        super().__init__()
        self.even = nn.Conv2d(channels_in, C // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(channels_in, C - C // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(C, **norm)
        self.pad = nn.ConstantPad2d((0, 1, 0, 1), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, C, ceil(H / 2), ceil(W / 2))."""
        x = x.relu()
        return self.norm(torch.cat((self.even(x), self.odd(self.pad(x)[:, :, 1:, 1:])), 1))


class Drop(nn.Module):
    """No connection."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> zeros (N, C, ceil(H / stride), ceil(W / stride))."""
        return 0.0 * x[..., :: self.stride, :: self.stride]


class Edge(nn.Module):
    """Seven candidates as children called c0 to c6, `mixture` (K,) set from outside, `calls` counted per label."""

    def __init__(self, C: int, stride: int, **norm):
        super().__init__()
        self.mixture: Tensor | None = None
        self.calls: dict[str, int] = {}
        average = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        separable = [
            nn.Sequential(nn.ReLU(), *chain(C, k, 1, stride, **norm), nn.ReLU(inplace=True), *chain(C, k, 1, 1, **norm))
            for k in (3, 5)
        ]
        candidates = [
            nn.Identity() if stride == 1 else Downsample(C, C, **norm),
            *separable,
            nn.Sequential(nn.ReLU(), *chain(C, 3, 2, stride, **norm)),
            nn.Sequential(average, nn.BatchNorm2d(C, **norm)),
            nn.Sequential(nn.MaxPool2d(3, stride, 1), nn.BatchNorm2d(C, **norm)),
            Drop(stride),
        ]
        for index, candidate in enumerate(candidates):
            self.add_module(f"c{index}", candidate)

    def forward(self, x: Tensor, label: str) -> Tensor:
        """x (N, C, H, W) and the edge's label -> (N, C, ceil(H / stride), ceil(W / stride))."""
        self.calls[label] = self.calls.get(label, 0) + 1
        total = self.mixture[0] * self.c0(x)
        for index in range(1, len(self.mixture)):
            total += self.mixture[index] * getattr(self, f"c{index}")(x)
        return total


class Cell(nn.Module):
    """Three nodes; the output is their concatenation. Both inputs come from one tuple."""

    NODES = 3

    def __init__(self, before: tuple[int, int], C: int, reduction: bool, reduced: bool, **norm):
        super().__init__()
        self.kind = "reduce" if reduction else "normal"
        self.edges = nn.ModuleDict()
        for node in range(self.NODES):
            for source in range(2 + node):
                self.edges[f"{source}_{node + 2}"] = Edge(C, 2 if reduction and source < 2 else 1, **norm)
        self.adapt = nn.ModuleList(
            [Downsample(before[0], C) if reduced else nn.Sequential(nn.ReLU(), nn.Conv2d(before[0], C, 1)),
             nn.Sequential(nn.ReLU(), nn.Conv2d(before[1], C, 1))]
        )  # fmt: skip

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The outputs of the last two cells -> those of the last one and of this one (N, 3 * C, H', W')."""
        states = [adapt(x) for adapt, x in zip(self.adapt, pair)]
        for node in range(2, 2 + self.NODES):
            keys = [(source, f"{source}_{node}") for source in range(node)]
            outs = [self.edges[key](states[source], f"{self.kind}/{key}") for source, key in keys]
            states.append(torch.stack(outs).sum(0))
        return pair[1], torch.cat(states[2:], 1)


class Network(nn.Module):
    """Cells in a Sequential on pairs; `seen` gathers what the hooks saw: edge name -> mean of the output."""

    def __init__(self, C: int, classes: int, layers: int, hooks: tuple[str, ...], **norm):
        super().__init__()
        self.seen: dict[str, Tensor] = {}
        self.stem = nn.Conv2d(3, 2 * C, 3, padding=1)
        width, before, reduced, cells = C, (2 * C, 2 * C), False, []
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            width *= 2 if reduction else 1
            cells.append(Cell(before, width, reduction, reduced, **norm))
            before, reduced = (before[1], Cell.NODES * width), reduction
        self.cells = nn.Sequential(*cells)
        self.head = nn.Linear(before[1], classes)
        self.alpha = nn.ParameterDict(
            {
                f"{kind}_{source}_{node}": nn.Parameter(0.1 * torch.randn(7))
                for kind in ("normal", "reduce")
                for node in range(2, 2 + Cell.NODES)
                for source in range(node)
            }
        )
        for name, module in self.named_modules():
            if isinstance(module, Edge):
                self.watch(name, module, hooks)

    def watch(self, name: str, edge: Edge, hooks: tuple[str, ...]) -> None:
        """Put hooks on an edge and on what is in it."""
        if "output" in hooks:
            edge.register_forward_hook(partial(self.record, name))
        if "replace" in hooks:
            edge.register_forward_hook(lambda module, args, out: 0.5 * out)
        if "input" in hooks:
            edge.register_forward_pre_hook(lambda module, args: (args[0].tanh(), args[1]))
        if "candidate" in hooks:
            edge.c1.register_forward_hook(partial(self.record, f"{name}.c1"))
        if "inner" in hooks:
            edge.c3[1].register_forward_hook(partial(self.record, f"{name}.c3.1"))

    def record(self, name: str, module: nn.Module, args: tuple, out: Tensor) -> None:
        """A forward hook; gives nothing back, so that the output stays."""
        self.seen[name] = out.detach().mean()

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes)."""
        for cell in self.cells:
            for key, edge in cell.edges.items():
                edge.mixture = F.softmax(self.alpha[f"{cell.kind}_{key}"], 0)
        stem = self.stem(x)
        return self.head(self.cells((stem, stem))[1].mean((2, 3)))

    def arch_parameters(self) -> list[Tensor]:
        """18 leaves (K,)."""
        return list(self.alpha.values())


HOOKS = ("output", "replace", "input", "candidate", "inner")


def build(
    channels: int = 16, layers: int = 3, classes: int = 10, *, hooks: tuple[str, ...] = ("output",), **norm
) -> Network:
    """A supernet (N, 3, H, W) -> (N, classes); any H and W.

    Args:
        hooks: any of `HOOKS`: "output" records the mean of each edge's output in `seen`, "replace" halves the output,
            "input" puts a tanh before the edge, "candidate" records a candidate's output, "inner" a convolution's.
        norm: `affine`, `track_running_stats`, `momentum`, `eps` of BN inside the candidates.
    """
    return Network(channels, classes, layers, hooks, **norm)
