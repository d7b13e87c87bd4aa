"""Lipschitz constants of every candidate operation of a supernet, by power iteration on the real operators.

All operators of one shape in the whole network are iterated at once, as one grouped convolution and its transpose.

Legend: L cells, E edges, K candidate operations, G operators of one shape, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from . import operations
from .linear_operators import Group, Layout, Size, Spec, Step, pool_norm
from .seeding import generator
from .spaces import NUM_INPUTS
from .supernet import Supernet

NormScale = Literal["largest", "folded", "none"]
Pools = Literal["exact", "one"]


class LipschitzConstants(nn.Module):
    """lambda_o of every candidate o of every edge: how much it can stretch an L2 distance, in eval mode.

    A convolution counts with the largest singular value of its real operator: stride, padding, dilation, groups and
    the size of its image included, depthwise and pointwise of one layer composed. Layers multiply; ReLU counts 1,
    `skip_connect` 1, `none` 0. FactorizedReduce is one operator: its two convolutions read disjoint pixels and write
    disjoint channels, so its norm is the larger of theirs. With partial channels the constants are those of the
    candidates, without the channels that go around them.

    Args:
        norm_scale: how batch norms count, by their running statistics. "largest": each layer is multiplied by its
            largest scale |gamma| / sqrt(var + eps). "folded": the scales go into the operator, channel by channel,
            which is never larger and costs the same. "none": not at all.
        pools: "exact": the pool's own norm on its image, times its batch norm, a true bound. Average pooling without
            counting the padding stretches slightly at borders, by 1.015 at 8x8; max pooling can repeat one pixel in
            nine outputs, so its norm is 3 at stride 1 and 2 at stride 2. "one": pools count 1 and their batch norm not
            at all, the plain value of the literature, which bounds neither.
        seed: of the start vectors.

    The vectors of the power iteration and the last result are buffers. They appear with the first call, or with the
    state_dict that is loaded: each call goes on where the last one, in this process or before a resume, stopped.
    A power iteration approaches its singular value from below. Raises ValueError for unknown choices.
    """

    def __init__(self, *, norm_scale: NormScale = "largest", pools: Pools = "exact", seed: int = 0) -> None:
        super().__init__()
        for name, value, choices in (("norm_scale", norm_scale, NormScale), ("pools", pools, Pools)):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be {' or '.join(map(repr, get_args(choices)))}; got {value!r}")
        self.norm_scale, self.pools, self.seed = norm_scale, pools, seed
        self._plan: tuple | None = None

    @property
    def values(self) -> Tensor | None:
        """The last result, (L, E, K), which the next call writes over; None before the first call."""
        return self._buffers.get("last")

    @torch.no_grad()
    def forward(self, supernet: Supernet, image_size: Size, iterations: int = 1) -> Tensor:
        """The constants (L, E, K), one row of edges per cell, after `iterations` more steps of every power iteration.

        image_size: H, W of the network's input. Raises ValueError for fewer than one iteration and for a candidate
        that is none of the primitives of `rnas.operations`.
        """
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1; got {iterations}")
        groups = self._groups(supernet, tuple(image_size))
        shape = (len(supernet.cells), len(supernet.space.edges), len(supernet.space.primitives))
        weight = supernet.classifier.weight
        result = weight.new_zeros(shape).flatten()
        plain = [n for n, name in enumerate(supernet.space.primitives) if name != "none"]
        result.view(shape)[:, :, plain] = 1.0
        for index, group in enumerate(groups):
            scale = group.norm_scale()
            norms = weight.new_full((len(group.places),), group.layout.own_norm)
            if group.steps:
                folded = scale if self.norm_scale == "folded" else None
                norms = self._iterate(f"vectors_{index}", group, group.weights(folded), iterations)
            if self.norm_scale == "largest" or (self.norm_scale == "folded" and not group.steps):
                norms = norms * scale.amax(dim=1)
            places = torch.tensor(group.places, device=result.device)
            result = result.scatter_reduce(0, places, norms.to(result), "prod")
        self._keep("last", result.view(shape))
        return result.view(shape)

    def _iterate(self, name: str, group: Group, weights: list[Tensor], iterations: int) -> Tensor:
        """Largest singular values (G,) of a group of operators; their vectors go on from where they are."""
        shape = group.input_shape
        v = self._buffers.get(name)
        if v is None or v.shape != shape:
            v = torch.randn(shape, generator=generator(self.seed, "power iteration", name))
            v = v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        v = v.to(weights[0])
        for _ in range(iterations):
            u = group.apply(v, weights)
            w = group.apply_transposed(u, weights)
            length = w.flatten(1).norm(dim=1)
            # ||A'Av|| / ||Av|| lies between ||Av|| and the singular value, so it is the better of the two estimates
            found = length / u.flatten(1).norm(dim=1).clamp_min(torch.finfo(u.dtype).tiny)
            turned = w / length.clamp_min(torch.finfo(u.dtype).tiny).view(-1, 1, 1, 1)
            v = torch.where(length.view(-1, 1, 1, 1) > 0, turned, v)
        self._keep(name, v)
        return found

    def _keep(self, name: str, value: Tensor) -> None:
        kept = self._buffers.get(name)
        if kept is not None and (kept.shape, kept.dtype, kept.device) == (value.shape, value.dtype, value.device):
            kept.copy_(value)  # where it is: a CUDA graph of another step takes a buffer that moves for another state
            return
        self._buffers.pop(name, None)
        self.register_buffer(name, value.clone())

    def _groups(self, supernet: Supernet, image_size: Size) -> list[Group]:
        if self._plan is None or self._plan[0] is not supernet or self._plan[1] != image_size:
            # in a tuple: nn.Module would take a bare supernet for a part of this module
            self._plan = (supernet, image_size, _plan(supernet, image_size, self.pools))
        return self._plan[2]

    def __deepcopy__(self, memo: dict) -> LipschitzConstants:
        copied = LipschitzConstants(norm_scale=self.norm_scale, pools=self.pools, seed=self.seed)
        for name, value in self._buffers.items():
            copied.register_buffer(name, value.clone())
        return copied

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        # Their shapes come from the supernet, which a resumed search has not met yet: take what the checkpoint holds.
        self._buffers.clear()
        for key, value in state_dict.items():
            if key.startswith(prefix):
                self.register_buffer(key[len(prefix) :], torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Part(NamedTuple):
    """One operator of a candidate: its convolutions, the norm behind them and its channels, the size of its input."""

    specs: tuple[Spec, ...]
    steps: tuple[Step, ...]
    norm: nn.BatchNorm2d
    size: Size
    rows: slice = slice(None)
    own_norm: float = 1.0


def _plan(supernet: Supernet, image_size: Size, pools: Pools) -> list[Group]:
    """All operators of the network by layout, in a fixed order."""
    groups: dict[Layout, Group] = {}
    size = _halved(image_size, supernet.stem[0].stride[0])
    place = 0
    for cell in supernet.cells:
        output = _halved(size, cell.stride)
        for (source, _), edge in zip(supernet.space.edges, cell.mixed):
            for name, candidate in zip(edge.primitives, edge.candidates):
                for part in _parts(name, candidate, size if source < NUM_INPUTS else output, pools):
                    channels = len(range(part.norm.num_features)[part.rows])
                    layout = Layout(part.specs, part.size, channels, part.own_norm)
                    group = groups.setdefault(layout, Group(layout))
                    group.norms.append((part.norm, part.rows))
                    group.places.append(place)
                    if part.steps:
                        group.steps.append(part.steps)
                place += 1
        size = output
    return list(groups.values())


def _halved(size: Size, stride: int) -> Size:
    return tuple(-(-n // stride) for n in size)


def _parts(name: str, candidate: nn.Module, size: Size, pools: Pools) -> Iterator[_Part]:
    """The operators of one candidate whose norms multiply to its constant; none where that is plainly 0 or 1."""
    if isinstance(candidate, (nn.Identity, operations.Zero)):
        return
    if isinstance(candidate, operations.FactorizedReduce):
        yield _reduce(candidate, size)
        return
    if not isinstance(candidate, nn.Sequential):
        raise ValueError(f"no Lipschitz constant for the operation {name!r}, a {type(candidate).__name__}")
    if isinstance(candidate[0], (nn.MaxPool2d, nn.AvgPool2d)):
        if pools == "exact":
            yield _Part((), (), candidate[1], size, own_norm=pool_norm(candidate[0], size))
        return
    layer: list[nn.Conv2d] = []
    for module in candidate:
        if isinstance(module, nn.Conv2d):
            layer.append(module)
        elif isinstance(module, nn.BatchNorm2d) and layer:
            specs = tuple(Spec.of(convolution) for convolution in layer)
            yield _Part(specs, tuple((convolution,) for convolution in layer), module, size)
            for spec in specs:
                size = spec.output(size)
            layer = []
        elif not isinstance(module, nn.ReLU):
            raise ValueError(f"no Lipschitz constant for {type(module).__name__} in the operation {name!r}")


def _reduce(candidate: operations.FactorizedReduce, size: Size) -> _Part:
    """A pixel goes through one of two matrices, by where it stands: the operator is both of them, side by side.

    So its norm is that of one even and one odd pixel alone, whose channels are stacked.
    """
    halves = [candidate.conv_1]
    if candidate.conv_2 is not None and min(size) > 1:  # an image of one line has no odd pixels
        halves.append(candidate.conv_2)
    channels_out = sum(half.out_channels for half in halves)
    spec = Spec(len(halves) * candidate.conv_1.in_channels, channels_out)
    return _Part((spec,), (tuple(halves),), candidate.bn, (1, 1), slice(0, channels_out))
