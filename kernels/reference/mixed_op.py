"""The mixed edge and the cell of mixed edges in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rnas.kernels.reference.relu_conv_norm import conv2d, factorized_reduce

SEPARABLE = {  # name: kernel size, dilation, how many times (ReLU, depthwise, pointwise, BN)
    "sep_conv_3x3": (3, 1, 2),
    "sep_conv_5x5": (5, 1, 2),
    "dil_conv_3x3": (3, 2, 1),
    "dil_conv_5x5": (5, 2, 1),
}
DENSE = {"conv_1x1": 1, "conv_3x3": 3}  # name: kernel size of (ReLU, convolution, BN)
POOLS = ("max_pool_3x3", "avg_pool_3x3")
PRIMITIVES = ("none", "skip_connect", *POOLS, *SEPARABLE, *DENSE, "ones")

Primitives = tuple[str, ...] | tuple[tuple[str, ...], ...]
"""Names of candidates: common to all edges of a cell, or a row for each."""


def mixed_cell(
    states: Sequence[Tensor],
    weights: Tensor,
    parameters: Sequence[Sequence[Tensor]],
    norms: Sequence[Sequence[nn.BatchNorm2d]],
    *,
    primitives: Primitives,
    nodes: int,
    stride: int = 1,
    pool_norm: bool = True,
    partial: int = 1,
    edge_weights: Tensor | None = None,
    last: bool = False,
    image_scales: Tensor | None = None,
) -> Tensor:
    """All nodes of a cell, (N, nodes * C, H', W'), or the last; what `rnas.kernels.mixed_cell` computes. No checks.

    Node j is the sum of the edges from the S input states (of the given stride) and the nodes before it (of stride 1).
    The rows of `weights` (E, K), `parameters`, `norms` and the numbers of `edge_weights` (E,), by which the edges are
    multiplied, are the edges, node by node and source by source. primitives: common to all, or a row for each.
    image_scales: (E, N), by which the images of each edge are multiplied.
    """
    inputs = len(states)
    states, edges = list(states), iter(zip(weights.unbind(), parameters, norms))
    names = iter(primitives_of_edges(primitives, len(weights)))
    scales = iter([None] * len(weights) if edge_weights is None else edge_weights.unbind())
    of_images = iter([None] * len(weights) if image_scales is None else image_scales[..., None, None, None].unbind())
    for _ in range(nodes):
        total = 0
        for source, state in enumerate(states):
            options = {"stride": stride if source < inputs else 1, "pool_norm": pool_norm, "partial": partial}
            edge = mixed_op(state, *next(edges), primitives=next(names), **options)
            for scale in (next(scales), next(of_images)):
                edge = edge if scale is None else scale * edge
            total = total + edge
        states.append(total)
    return states[-1] if last else torch.cat(states[inputs:], dim=1)


def primitives_of_edges(primitives: Primitives, edges: int) -> list[tuple[str, ...]]:
    """The names of each edge. An edge without any has `none`."""
    if isinstance(primitives[0], str):
        return [tuple(primitives)] * edges
    return [tuple(row) or ("none",) for row in primitives]


def mixed_op(
    x: Tensor,
    weights: Tensor,
    parameters: Sequence[Tensor],
    norms: Sequence[nn.BatchNorm2d],
    *,
    primitives: tuple[str, ...],
    stride: int = 1,
    pool_norm: bool = True,
    partial: int = 1,
) -> Tensor:
    """One mixed edge, `sum_k weights[k] * primitive_k(x)`: x (N, C, H, W), weights (K,) -> (N, C, H', W').

    H' is ceil(H / stride). Parameters and BN modules are taken in the order in which the primitives meet them; weights
    behind those of the last primitive are not read.
    Only the first C / partial channels of x are mixed; the others go around the candidates.
    """
    if partial > 1:
        x, around = split_channels(x, partial, stride)
    parameters, norms, total = iter(parameters), iter(norms), 0
    for weight, name in zip(weights.unbind(), primitives):
        total = total + weight * _primitive(name, x, parameters, norms, stride, pool_norm)
    return total if partial == 1 else join_channels(total, around)


def split_channels(x: Tensor, partial: int, stride: int) -> tuple[Tensor, Tensor]:
    """What goes through the candidates of a partial edge, and what goes around them, at the resolution of the output.

    x (N, C, H, W) -> its first C / partial channels, and the others, at stride 2 max-pooled (2x2).
    """
    channels = x.shape[1] // partial
    through, around = x.split([channels, x.shape[1] - channels], dim=1)
    return through, around if stride == 1 else F.max_pool2d(around, 2, 2, ceil_mode=True)


def join_channels(mixed: Tensor, around: Tensor) -> Tensor:
    """Both parts of a partial edge, shuffled: channel 0 of each C / partial channels, then channel 1 of each, ..."""
    return F.channel_shuffle(torch.cat([mixed, around], dim=1), 1 + around.shape[1] // mixed.shape[1])


def parameter_shapes(primitives: tuple[str, ...], channels: int, stride: int) -> list[tuple[int, ...]]:
    """The shapes of one edge's convolution weights, in the order in which `mixed_op` takes them."""
    shapes: list[tuple[int, ...]] = []
    for name in primitives:
        if name == "skip_connect" and stride == 2:
            shapes.append((channels - channels // 2, channels, 1, 1))
            if channels > 1:
                shapes.append((channels // 2, channels, 1, 1))
        elif name in SEPARABLE:
            size, _, depth = SEPARABLE[name]
            shapes += [(channels, 1, size, size), (channels, channels, 1, 1)] * depth
        elif name in DENSE:
            shapes.append((channels, channels, DENSE[name], DENSE[name]))
    return shapes


def norm_count(primitives: tuple[str, ...], stride: int, pool_norm: bool) -> int:
    """How many BN modules one edge has."""
    return sum(_norms_of(name, stride, pool_norm) for name in primitives)


def _norms_of(name: str, stride: int, pool_norm: bool) -> int:
    if name in SEPARABLE:
        return SEPARABLE[name][2]
    return int(name in DENSE or (name == "skip_connect" and stride == 2) or (name in POOLS and pool_norm))


def _primitive(
    name: str, x: Tensor, parameters: Iterator[Tensor], norms: Iterator[nn.BatchNorm2d], stride: int, pool_norm: bool
) -> Tensor:
    """One candidate; it takes what it needs from `parameters` and `norms`."""
    if name == "none":
        return torch.zeros_like(x[:, :, ::stride, ::stride])
    if name == "ones":
        return torch.ones_like(x[:, :, ::stride, ::stride])
    if name == "skip_connect":
        if stride == 1:
            return x
        return factorized_reduce(x, next(parameters), next(parameters) if x.shape[1] > 1 else None, next(norms))
    if name in POOLS:
        if name == "max_pool_3x3":
            x = F.max_pool2d(x, 3, stride, padding=1)
        else:
            x = F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)
        return next(norms)(x) if pool_norm else x
    if name in DENSE:
        return next(norms)(conv2d(F.relu(x), next(parameters), stride=stride, padding=DENSE[name] // 2))
    size, dilation, depth = SEPARABLE[name]
    for step in range(depth):
        depthwise = {
            "stride": stride if step == 0 else 1,
            "padding": dilation * (size // 2),
            "dilation": dilation,
            "groups": x.shape[1],
        }
        x = F.conv2d(F.relu(x), next(parameters), **depthwise)
        x = next(norms)(F.conv2d(x, next(parameters)))
    return x
