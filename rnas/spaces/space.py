"""What a cell-based search space is: primitives, cell types, where each type stands, and how wide it is."""

from __future__ import annotations

from dataclasses import dataclass

NUM_INPUTS = 2  # a cell reads the outputs of the two cells before it


@dataclass(frozen=True)
class CellSpec:
    """One cell of a network: its type, its channels C, and whether it halves the resolution."""

    cell_type: str
    channels: int
    reduces: bool


@dataclass(frozen=True)
class Space:
    """A search space in the DARTS family, as data.

    A network of L cells has three sections, which begin at layers 0, L//3 and 2*L//3; the first cell of the second and
    of the third section is the reduction cell.
    """

    name: str
    primitives: tuple[str, ...]
    """Candidate operations of an edge, K of them, in the order of the mixing weights."""
    section_types: tuple[str, str, str]
    """Type of the ordinary cells in each section."""
    section_widths: tuple[int, int, int]
    """Channels of each section as multiples of C."""
    reduction_type: str = "reduction"
    nodes: int = 4
    """Intermediate nodes of a cell; node j reads both inputs and every earlier node."""

    @property
    def cell_types(self) -> tuple[str, ...]:
        """Every cell type once, in the order in which a network meets them."""
        first, second, third = self.section_types
        return tuple(dict.fromkeys((first, self.reduction_type, second, third)))

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(source state, target state) of every edge, E of them, in the order of the mixing weights."""
        targets = range(NUM_INPUTS, NUM_INPUTS + self.nodes)
        return tuple((source, target) for target in targets for source in range(target))

    @property
    def concat(self) -> tuple[int, ...]:
        """States that are concatenated into the cell's output: all intermediate nodes."""
        return tuple(range(NUM_INPUTS, NUM_INPUTS + self.nodes))

    def layout(self, layers: int, channels: int) -> list[CellSpec]:
        """The cells of a network with `layers` cells and C = `channels`.

        Raises ValueError for fewer than 3 cells, and where a cell type would get no cell.
        """
        if layers < 3:
            raise ValueError(f"a network of this space needs at least 3 cells, one per section; got layers={layers}")
        if channels < 1:
            raise ValueError(f"channels must be at least 1; got {channels}")
        starts = (layers // 3, 2 * layers // 3)
        cells = []
        for layer in range(layers):
            section = sum(layer >= start for start in starts)
            reduces = layer in starts
            cell_type = self.reduction_type if reduces else self.section_types[section]
            cells.append(CellSpec(cell_type, channels * self.section_widths[section], reduces))
        absent = set(self.cell_types) - {cell.cell_type for cell in cells}
        if absent:
            raise ValueError(
                f"layers={layers} leaves no cell of type {', '.join(sorted(absent))} in space {self.name!r}; use more"
            )
        return cells
