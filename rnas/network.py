"""The network derived from a genotype: the chosen operations only, learned BN, auxiliary head, drop path."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import operations
from .genotype import Genotype
from .spaces import NUM_INPUTS, SPACES, CellSpec, Space


class DropPath(nn.Module):
    """Zero whole paths of single images with probability p in training, and scale the rest by 1 / (1 - p)."""

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        mask = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * mask / keep


class Cell(nn.Module):
    """A derived cell: node j is the sum of its chosen operations."""

    def __init__(
        self, genotype: Genotype, spec: CellSpec, channels_in: tuple[int, int], previous_reduces: bool
    ) -> None:
        super().__init__()
        before = operations.FactorizedReduce if previous_reduces else operations.ReLUConvBN
        self.preprocess = nn.ModuleList(
            [
                before(channels_in[0], spec.channels, affine=True),
                operations.ReLUConvBN(channels_in[1], spec.channels, affine=True),
            ]
        )
        self.concat = genotype.concat
        self.sources = [[source for _, source in node] for node in genotype.cells[spec.cell_type]]
        self.nodes = nn.ModuleList()
        for node in genotype.cells[spec.cell_type]:
            paths = nn.ModuleList()
            for operation, source in node:
                stride = 2 if spec.reduces and source < NUM_INPUTS else 1
                path = operations.build(operation, spec.channels, stride, affine=True)
                paths.append(path if isinstance(path, nn.Identity) else nn.Sequential(path, DropPath()))
            self.nodes.append(paths)

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        """s0, s1: outputs of the two cells before, (N, C', H, W). -> (N, len(concat) * C, H, W)."""
        states = [self.preprocess[0](s0), self.preprocess[1](s1)]
        for paths, sources in zip(self.nodes, self.sources):
            states.append(sum(path(states[source]) for path, source in zip(paths, sources)))
        return torch.cat([states[state] for state in self.concat], dim=1)


class AuxiliaryHead(nn.Module):
    """The DARTS family's second classifier on the third section: pool to 2x2, 1x1 conv, 2x2 conv, linear.

    On 8x8 maps (CIFAR) the pool is the published 5x5 window with stride 3; on other sizes it adapts to 2x2.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        if x.shape[2:] == (8, 8):
            x = nn.functional.avg_pool2d(x, 5, stride=3, count_include_pad=False)
        else:
            x = nn.functional.adaptive_avg_pool2d(x, 2)
        return self.classifier(self.features(x).flatten(1))


def space_of(genotype: Genotype) -> Space:
    """The space whose cell types the genotype has. Raises ValueError where none fits."""
    for space in SPACES.values():
        if set(space.cell_types) == set(genotype.cells):
            return space
    known = "; ".join(f"{space.name}: {', '.join(space.cell_types)}" for space in SPACES.values())
    raise ValueError(f"no space has the cell types {sorted(genotype.cells)}; known are {known}")


class Network(nn.Module):
    """The derived network of `genotype`.

    Args:
        genotype: what to build; its cell types decide the layout (DARTS or DSARA).
        channels, layers: C of the first cells; number of cells.
        num_classes: K of the logits.
        mean, std: of the training images per channel; their length is the number of image channels.
        auxiliary: build the auxiliary head on the cell at 2*layers//3.
        stem_stride: stride of the first convolution.
    """

    def __init__(
        self,
        genotype: Genotype,
        *,
        channels: int,
        layers: int,
        num_classes: int,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        auxiliary: bool = False,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.genotype = genotype
        specs = space_of(genotype).layout(layers, channels)
        stem_channels = 3 * channels
        self.normalize = operations.Normalize(mean, std)
        self.stem = nn.Sequential(
            nn.Conv2d(len(mean), stem_channels, 3, stem_stride, padding=1, bias=False), nn.BatchNorm2d(stem_channels)
        )
        self.cells = nn.ModuleList()
        self.auxiliary_layer = 2 * layers // 3
        channels_in, previous_reduces, auxiliary_channels = (stem_channels, stem_channels), False, 0
        for layer, spec in enumerate(specs):
            self.cells.append(Cell(genotype, spec, channels_in, previous_reduces))
            channels_in, previous_reduces = (channels_in[1], len(genotype.concat) * spec.channels), spec.reduces
            if layer == self.auxiliary_layer:
                auxiliary_channels = channels_in[1]
        self.classifier = nn.Linear(channels_in[1], num_classes)
        self.auxiliary_head = AuxiliaryHead(auxiliary_channels, num_classes) if auxiliary else None

    def set_drop_path(self, probability: float) -> None:
        """Set the drop-path probability of every path. Raises ValueError outside [0, 1)."""
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"drop path probability must be in [0, 1); got {probability}")
        for module in self.modules():
            if isinstance(module, DropPath):
                module.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) in [0, 1] -> logits (N, num_classes)."""
        return self.forward_with_auxiliary(x)[0]

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits and, in training with a head, the auxiliary logits, both (N, num_classes)."""
        auxiliary = None
        s0 = s1 = self.stem(self.normalize(x))
        for layer, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1)
            if layer == self.auxiliary_layer and self.training and self.auxiliary_head is not None:
                auxiliary = self.auxiliary_head(s1)
        return self.classifier(s1.mean(dim=(2, 3))), auxiliary


def count_parameters(network: Network) -> int:
    """Learned numbers of the network without the auxiliary head, as the field's tables count them."""
    return sum(p.numel() for name, p in network.named_parameters() if not name.startswith("auxiliary_head."))
