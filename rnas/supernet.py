"""The relaxed network: every edge computes all candidate operations and sums them with its mixing weights.

The mixing weights come in as an argument, so that a search method owns its relaxation (softmax, log-normal samples,
one-hot) and the supernet knows nothing of it. Modules hold the parameters and BN averages. What they compute together
is one fused op per cell, `rnas.kernels.mixed_cell`; RNAS_BACKEND=reference makes it plain PyTorch, one module's work
after the other's.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from . import kernels, operations
from .spaces import NUM_INPUTS, CellSpec, Space


class MixedOperation(nn.Module):
    """One mixed edge: `sum_o weights[o] * o(x)` over the K candidate operations (Liu et al., equation 2).

    With `partial` K of PC-DARTS the candidates see the first C / K channels, and the others go around them.

    The candidates are those of the constructor for good: the fused op takes their weights and norms, not their forward.
    """

    def __init__(self, primitives: tuple[str, ...], channels: int, stride: int, partial: int = 1) -> None:
        super().__init__()
        self.primitives = primitives
        self.stride = stride
        self.partial = partial
        channels //= partial
        self.candidates = nn.ModuleList()
        for primitive in primitives:
            candidate = operations.build(primitive, channels, stride, affine=False)
            if "pool" in primitive:
                candidate = nn.Sequential(candidate, nn.BatchNorm2d(channels, affine=False))
            self.candidates.append(candidate)
        self._convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        self.norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    @property
    def convolution_weights(self) -> list[Tensor]:
        """The weights of all candidates' convolutions, in the order of the candidates."""
        try:  # where nn.Module keeps them: `convolution.weight` takes four times as long, and there are hundreds
            return [convolution._parameters["weight"] for convolution in self._convolutions]
        except KeyError:  # parametrized, or replaced by a plain attribute
            return [convolution.weight for convolution in self._convolutions]

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (N, C, H, W), weights (K,) -> (N, C, H/stride, W/stride)."""
        return kernels.mixed_op(
            x,
            weights,
            self.convolution_weights,
            self.norms,
            primitives=self.primitives,
            stride=self.stride,
            partial=self.partial,
        )


class MixedCell(nn.Module):
    """A cell of mixed edges: node j sums its edges from both inputs and all earlier nodes."""

    def __init__(
        self, space: Space, spec: CellSpec, channels_in: tuple[int, int], previous_reduces: bool, partial: int = 1
    ) -> None:
        super().__init__()
        self.partial = partial
        self.primitives = space.primitives
        self.nodes = space.nodes
        self.stride = 2 if spec.reduces else 1
        before = operations.FactorizedReduce if previous_reduces else operations.ReLUConvBN
        self.preprocess = nn.ModuleList(
            [
                before(channels_in[0], spec.channels, affine=False),
                operations.ReLUConvBN(channels_in[1], spec.channels, affine=False),
            ]
        )
        self.mixed = nn.ModuleList(
            MixedOperation(space.primitives, spec.channels, self.stride if source < NUM_INPUTS else 1, partial)
            for source, _ in space.edges
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor, edge_weights: Tensor | None = None) -> Tensor:
        """s0, s1: outputs of the two cells before, (N, C', H, W). weights (E, K), edge_weights (E,) or None for ones.

        Returns (N, nodes * C, H, W).
        """
        return kernels.mixed_cell(
            (self.preprocess[0](s0), self.preprocess[1](s1)),
            weights,
            [edge.convolution_weights for edge in self.mixed],
            [edge.norms for edge in self.mixed],
            primitives=self.primitives,
            nodes=self.nodes,
            stride=self.stride,
            partial=self.partial,
            edge_weights=edge_weights,
        )


class Supernet(nn.Module):
    """The network that contains every architecture of `space`.

    Args:
        space: the search space.
        channels, layers: C of the first cells; number of cells.
        num_classes: K of the logits.
        mean, std: of the training images per channel; their length is the number of image channels.
        stem_stride: stride of the first convolution.
        partial: K of PC-DARTS: one in K channels goes through the mixed edges.

    Raises ValueError where `partial` does not divide the channels of every cell.
    """

    def __init__(
        self,
        space: Space,
        *,
        channels: int,
        layers: int,
        num_classes: int,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        stem_stride: int = 1,
        partial: int = 1,
    ) -> None:
        super().__init__()
        if partial < 1 or channels % partial:
            raise ValueError(f"partial channels need a number that divides the {channels} channels; got {partial}")
        self.space = space
        specs = space.layout(layers, channels)
        self.cell_types = [spec.cell_type for spec in specs]
        stem_channels = 3 * channels
        self.normalize = operations.Normalize(mean, std)
        self.stem = operations.ConvBN(len(mean), stem_channels, 3, stem_stride)
        self.cells = nn.ModuleList()
        channels_in, previous_reduces = (stem_channels, stem_channels), False
        for spec in specs:
            self.cells.append(MixedCell(space, spec, channels_in, previous_reduces, partial))
            channels_in, previous_reduces = (channels_in[1], space.nodes * spec.channels), spec.reduces
        self.classifier = nn.Linear(channels_in[1], num_classes)

    def forward(
        self, x: Tensor, mixing: Mapping[str, Tensor], edge_weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Logits (N, num_classes) of images x (N, C, H, W) in [0, 1].

        mixing: cell type -> weights (E, K) of the operations. edge_weights: cell type -> (E,) of the edges, None: ones.
        """
        s0 = s1 = self.stem(kernels.arrange(self.normalize(x)))
        for cell, cell_type in zip(self.cells, self.cell_types):
            edges = None if edge_weights is None else edge_weights[cell_type]
            s0, s1 = s1, cell(s0, s1, mixing[cell_type], edges)
        return self.classifier(s1.mean(dim=(2, 3)))


class FixedMixture(nn.Module):
    """A supernet with its mixing weights held: a classifier (N, C, H, W) -> (N, num_classes), as attacks want it."""

    def __init__(
        self, supernet: Supernet, mixing: Mapping[str, Tensor], edge_weights: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.supernet = supernet
        self.mixing = {cell_type: weights.detach() for cell_type, weights in mixing.items()}
        self.edge_weights = None
        if edge_weights is not None:
            self.edge_weights = {cell_type: weights.detach() for cell_type, weights in edge_weights.items()}

    def forward(self, x: Tensor) -> Tensor:
        return self.supernet(x, self.mixing, self.edge_weights)
