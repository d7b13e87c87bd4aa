"""The style of NAS-Bench-201: a cell keeps bare lists of candidates in a dict of edges "i<-j" and mixes them itself.

Five candidates, three of them convolutions or pools of one kernel size; the pool has no BN; all edges have stride 1, and
residual blocks between the stages halve the resolution. The hard mode computes one candidate per edge, and adds the
other weights as numbers, so that all of them get a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")


class ReLUConvBN(nn.Module):
    """ReLU, convolution, BN; sizes are given as pairs."""

    def __init__(
        self, C_in: int, C_out: int, kernel: int, stride: int, affine: bool, track: bool, bias: bool = False
    ):
        super().__init__()
        size, padding = (kernel, kernel), (kernel // 2, kernel // 2)
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(C_in, C_out, size, stride=(stride, stride), padding=padding, dilation=(1, 1), bias=bias),
            nn.BatchNorm2d(C_out, affine=affine, track_running_stats=track),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride))."""
        return self.op(x)


class Pooling(nn.Module):
    """An average pool, behind an optional change of width."""

    def __init__(self, C_in: int, C_out: int, affine: bool, track: bool):
        super().__init__()
        self.preprocess = None if C_in == C_out else ReLUConvBN(C_in, C_out, 1, 1, affine, track)
        self.op = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H, W)."""
        return self.op(x if self.preprocess is None else self.preprocess(x))


class Identity(nn.Module):
    """x -> x."""

    def forward(self, x: Tensor) -> Tensor:
        """The argument itself."""
        return x


class Zero(nn.Module):
    """Zeros; says so, for those who sample."""

    is_zero = True

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> zeros of that shape, with a graph."""
        return x * 0.0


def make(name: str, C: int, affine: bool, track: bool, bias: bool) -> nn.Module:
    """The candidate called `name`, C channels in and out."""
    if name.startswith("nor_conv"):
        return ReLUConvBN(C, C, int(name[-1]), 1, affine, track, bias)
    if name == "avg_pool_3x3":
        return Pooling(C, C, affine, track)
    return Identity() if name == "skip_connect" else Zero()


class SearchCell(nn.Module):
    """A complete graph of `nodes` nodes, the first one being the input and the last one the output."""

    def __init__(self, C: int, nodes: int, affine: bool, track: bool, bias: bool):
        super().__init__()
        self.nodes, self.out_dim = nodes, C
        self.edges = nn.ModuleDict()
        for i in range(1, nodes):
            for j in range(i):
                self.edges[f"{i}<-{j}"] = nn.ModuleList([make(name, C, affine, track, bias) for name in NAMES])
        self.edge2index = {key: index for index, key in enumerate(sorted(self.edges))}

    def forward(self, x: Tensor, alphas: Tensor) -> Tensor:
        """x (N, C, H, W), alphas (E, K) -> (N, C, H, W): every candidate runs."""
        nodes = [x]
        for i in range(1, self.nodes):
            arriving = []
            for j in range(i):
                row = alphas[self.edge2index[f"{i}<-{j}"]]
                arriving.append(sum(layer(nodes[j]) * w for layer, w in zip(self.edges[f"{i}<-{j}"], row)))
            nodes.append(sum(arriving))
        return nodes[-1]

    def forward_hard(self, x: Tensor, hard: Tensor, chosen: Tensor, others: bool) -> Tensor:
        """x (N, C, H, W), hard (E, K) of one-hot rows, chosen (E,): one candidate per edge runs.

        others: whether the others' weights, which are zero, are added for their gradient.
        """
        nodes = [x]
        for i in range(1, self.nodes):
            arriving = []
            for j in range(i):
                edge = self.edge2index[f"{i}<-{j}"]
                row, winner = hard[edge], chosen[edge].item()
                candidates = enumerate(self.edges[f"{i}<-{j}"])
                if others:
                    terms = [row[k] * layer(nodes[j]) if k == winner else row[k] for k, layer in candidates]
                else:
                    terms = [row[k] * layer(nodes[j]) for k, layer in candidates if k == winner]
                arriving.append(sum(terms))
            nodes.append(sum(arriving))
        return nodes[-1]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions of which the first has stride 2, and a 1x1 convolution of an average beside them."""

    def __init__(self, C_in: int, C_out: int):
        super().__init__()
        self.conv_a = ReLUConvBN(C_in, C_out, 3, 2, True, True)
        self.conv_b = ReLUConvBN(C_out, C_out, 3, 1, True, True)
        self.downsample = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(C_in, C_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H / 2, W / 2)."""
        return self.downsample(x) + self.conv_b(self.conv_a(x))


class TinyNetwork(nn.Module):
    """Three stages of `depth` cells; one (E, K) parameter for all of them."""

    def __init__(self, C: int, depth: int, classes: int, nodes: int, mode: str, tau: float, seed: int, **norm):
        super().__init__()
        self.mode, self.tau, self.seed = mode, tau, seed
        self.stem = nn.Sequential(nn.Conv2d(3, C, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(C))
        self.cells = nn.ModuleList()
        for stage in range(3):
            if stage:
                self.cells.append(ResidualBlock(C * 2 ** (stage - 1), C * 2**stage))
            self.cells.extend(SearchCell(C * 2**stage, nodes, **norm) for _ in range(depth))
        self.lastact = nn.Sequential(nn.BatchNorm2d(4 * C), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(4 * C, classes)
        self.arch = nn.Parameter(1e-3 * torch.randn(nodes * (nodes - 1) // 2, len(NAMES)))

    def sample(self) -> tuple[Tensor, Tensor]:
        """One-hot rows (E, K) whose gradient is that of a Gumbel softmax, and the chosen candidates (E,)."""
        uniform = torch.rand(self.arch.shape, generator=torch.Generator().manual_seed(self.seed))
        gumbel = -(-uniform.clamp(1e-6, 1 - 1e-6).log()).log()
        soft = F.softmax((F.log_softmax(self.arch, -1) + gumbel.to(self.arch)) / self.tau, -1)
        chosen = soft.argmax(-1)
        return F.one_hot(chosen, len(NAMES)).to(soft) - soft.detach() + soft, chosen

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes)."""
        hard = self.sample() if self.mode != "soft" else None
        soft = F.softmax(self.arch, dim=-1)
        feature = self.stem(x)
        for cell in self.cells:
            if not isinstance(cell, SearchCell):
                feature = cell(feature)
            elif hard:
                feature = cell.forward_hard(feature, *hard, others=self.mode == "hard")
            else:
                feature = cell(feature, soft)
        return self.classifier(F.adaptive_avg_pool2d(self.lastact(feature), 1).flatten(1))

    def arch_parameters(self) -> list[Tensor]:
        """One leaf (E, K)."""
        return [self.arch]


def build(
    channels: int = 16,
    layers: int = 3,
    classes: int = 10,
    *,
    mode: str = "soft",
    affine: bool = False,
    track: bool = True,
    bias: bool = False,
    nodes: int = 4,
    tau: float = 10.0,
    seed: int = 0,
) -> TinyNetwork:
    """A supernet (N, 3, H, W) -> (N, classes), H and W divisible by 4, of three stages of `layers` // 3 cells, at least 1.

    Args:
        mode: "soft" runs all candidates, "hard" one of each edge and adds the others' weights, "chosen" does not.
        affine, track: of BN inside the candidates, as PyTorch's `affine` and `track_running_stats`.
        bias: whether the convolutions of the candidates have one, as later code of that family where BN has none.
        nodes: of a cell, its input included.
        tau: the temperature of the sample of the other modes.
        seed: of that sample, the same in each call; set the attribute `seed` for another one.
    """
    depth = max(layers // 3, 1)
    return TinyNetwork(channels, depth, classes, nodes, mode, tau, seed, affine=affine, track=track, bias=bias)
