"""What is timed: one supernet, one batch and one set of random numbers, the same for every provider.

Legend: N images, C channels, H W pixels, E edges, K candidate operations.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rnas.seeding import generator
from rnas.spaces import DARTS
from rnas.supernet import FixedMixture, Supernet

EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 7
CLASSES = 10


@dataclass(frozen=True)
class Size:
    """C of the first cells, number of cells, nodes of a cell, pixels per side, and the batches that are timed."""

    channels: int
    layers: int
    nodes: int
    image: int
    batches: tuple[int, ...]


# The larger batch first: torch.compile makes graphs for every batch up to the one it has seen, and would begin anew.
FULL = Size(channels=16, layers=8, nodes=4, image=32, batches=(64, 16))
FULL_CUDA = replace(FULL, batches=(256, 64))
QUICK = Size(channels=4, layers=3, nodes=2, image=16, batches=(2,))


def size_of(device: str, quick: bool, channels: int | None = None) -> Size:
    """What is timed on a device type. channels: others than usual."""
    size = QUICK if quick else FULL_CUDA if device == "cuda" else FULL
    return replace(size, channels=channels) if channels else size


@dataclass(frozen=True)
class Problem:
    """A supernet with its inputs, all on one device and in one memory format.

    x (N, 3, H, W) in [0, 1], y (N,), alpha: cell type -> (E, K), projection (N, classes) with rows of length 1.
    """

    supernet: Supernet
    x: Tensor
    y: Tensor
    alpha: dict[str, Tensor]
    projection: Tensor

    def mixing(self, alpha: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """softmax(alpha) per cell type, (E, K)."""
        return {cell_type: each.softmax(dim=1) for cell_type, each in (alpha or self.alpha).items()}

    def fixed(self) -> FixedMixture:
        """The supernet as a plain classifier, which is what an attack takes."""
        return FixedMixture(self.supernet, self.mixing())

    def arranged(self, layout: torch.memory_format) -> Problem:
        """A copy of the supernet and the images in another memory format."""
        supernet = copy.deepcopy(self.supernet).to(memory_format=layout)
        return replace(self, supernet=supernet, x=self.x.clone(memory_format=layout))

    def first_image(self) -> Problem:
        """The same for a batch of one: what is linear in the batch can be counted on it."""
        return replace(self, x=self.x[:1].clone(), y=self.y[:1], projection=self.projection[:1])


def build(size: Size, batch: int, device: str, seed: int = 0) -> Problem:
    """The problem of this size, from `seed` alone. BN's running statistics are those of the batch."""
    draw = generator(seed, "benchmark", batch)
    space = replace(DARTS, nodes=size.nodes)
    shape = (len(space.edges), len(space.primitives))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        supernet = Supernet(space, channels=size.channels, layers=size.layers, num_classes=CLASSES)
    problem = Problem(
        supernet=supernet.to(device),
        x=torch.rand(batch, 3, size.image, size.image, generator=draw).to(device),
        y=torch.randint(CLASSES, (batch,), generator=draw).to(device),
        alpha={name: (1e-3 * torch.randn(shape, generator=draw)).to(device) for name in space.cell_types},
        projection=nn.functional.normalize(torch.randn(batch, CLASSES, generator=draw), dim=1).to(device),
    )
    _calibrate(problem)
    return problem


def _calibrate(problem: Problem) -> None:
    """In eval mode the activations of a fresh network would fade or explode, and with them the compared gradients."""
    norms = [module for module in problem.supernet.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        problem.supernet.train()(problem.x, problem.mixing())
    for norm in norms:
        norm.momentum = 0.1
