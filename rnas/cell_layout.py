"""Where the parts of a cell's picture go: a layered layout of its graph, in inches, with no drawing library.

Columns alternate between states and operations: states of depth d stand in column 2d, the operations that feed depth
d in column 2d - 1. An edge that passes a column takes a place of its own in it, as a label or as a bare waypoint, and
runs level across the column's whole width; it changes height only in the empty gaps between columns. So labels, states
and curves cannot overlap, whatever the genotype. The method is that of Sugiyama, Tagawa and Toda (1981): layers, then
the order within each layer, then heights.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

STATE_WIDTH = 0.42
STATE_HEIGHT = 0.36
LABEL_HEIGHT = 0.21
PORT_SPACING = 0.12  # between two curves that meet the same side of a state
GAP = {"state": 0.13, "label": 0.045, "way": 0.055}  # kept free above and below an item of each kind
KINK = 0.07  # a change of height that reads as a mistake rather than as a bend
CONCAT_WEIGHT = 0.5  # a concatenation edge may bend and cross more readily than an operation


@dataclass
class Item:
    """Something that holds a place in a column: a state, an operation's label, or the waypoint of a passing edge."""

    kind: str
    column: int
    width: float = 0.0
    height: float = 0.0
    x: float = 0.0
    y: float = 0.0

    @property
    def box(self) -> tuple[float, float, float, float]:
        """left, bottom, right, top, in inches; y grows upwards."""
        return (self.x - self.width / 2, self.y - self.height / 2, self.x + self.width / 2, self.y + self.height / 2)


@dataclass
class Edge:
    """From state `source` to state `target`; `op` is None for the edges that concatenate nodes into the output."""

    op: str | None
    source: int
    target: int
    path: list[int] = field(default_factory=list)  # items, one a column
    points: list[tuple[float, float]] = field(default_factory=list)  # rise, level, rise, level, ..., rise
    label: Item | None = None


@dataclass
class CellLayout:
    """states: the two inputs, the nodes, the output. All lengths in inches, the lower left corner at (0, 0)."""

    states: list[Item]
    edges: list[Edge]
    width: float
    height: float


def layout(nodes: Sequence, concat: Sequence[int], label_width: Callable[[str], float]) -> CellLayout:
    """Lays out one cell.

    nodes: per node the ((op, input), ...) pairs, inputs being state indices (0 and 1 are the cell's inputs, node j is
    2 + j). concat: states that form the output. label_width: the width of an operation's label in inches.
    Raises ValueError where an input or an entry of concat names a state that does not exist yet.
    """
    graph = _Graph(nodes, concat, label_width)
    graph.place(min(graph.orders(), key=graph.place))
    return graph.finish()


class _Graph:
    def __init__(self, nodes, concat, label_width):
        self.items: list[Item] = []
        self.edges: list[Edge] = []
        depth = self._depths(nodes, concat)
        self.states = [self._add("state", 2 * d, STATE_WIDTH, STATE_HEIGHT) for d in depth]
        self.states.append(self._add("state", 2 * max(depth) + 1, STATE_WIDTH, STATE_HEIGHT))
        self._add_operations(nodes, depth, label_width)
        for source in concat:
            self._add_path(Edge(None, source, len(depth)), label_column=None)
        columns = max(item.column for item in self.items) + 1
        self.columns = [[i for i, item in enumerate(self.items) if item.column == c] for c in range(columns)]
        self._connect()

    @staticmethod
    def _depths(nodes, concat) -> list[int]:
        depth = [0, 0]
        for j, pairs in enumerate(nodes):
            for op, source in pairs:
                if not 0 <= source < len(depth):
                    raise ValueError(
                        f"node {j}: {op} reads state {source}, but only states 0 to {len(depth) - 1} come before it"
                    )
            depth.append(1 + max((depth[source] for _, source in pairs), default=0))
        for source in concat:
            if not 0 <= source < len(depth):
                raise ValueError(f"concat names state {source}, but the cell has states 0 to {len(depth) - 1}")
        return depth

    def _add(self, kind, column, width=0.0, height=0.0) -> int:
        self.items.append(Item(kind, column, width, height))
        return len(self.items) - 1

    def _add_operations(self, nodes, depth, label_width):
        # A long edge can carry its label in any column of operations that it passes. Short edges have no choice, so
        # they go first; long ones then take the emptiest column, the one nearest their target among equals.
        edges = [Edge(op, source, 2 + j) for j, pairs in enumerate(nodes) for op, source in pairs]
        labels = [0] * (2 * max(depth) + 2)
        for edge in sorted(edges, key=lambda edge: depth[edge.target] - depth[edge.source]):
            choices = range(2 * depth[edge.target] - 1, 2 * depth[edge.source], -2)
            column = min(choices, key=labels.__getitem__)
            labels[column] += 1
            self._add_path(edge, column, label_width(edge.op))

    def _add_path(self, edge, label_column, width=0.0):
        source, target = self.states[edge.source], self.states[edge.target]
        edge.path = [source]
        for column in range(self.items[source].column + 1, self.items[target].column):
            if column == label_column:
                edge.path.append(self._add("label", column, width, LABEL_HEIGHT))
                edge.label = self.items[edge.path[-1]]
            else:
                edge.path.append(self._add("way", column))
        edge.path.append(target)
        self.edges.append(edge)

    def _connect(self):
        self.left = [[] for _ in self.items]  # per item: (neighbour, weight)
        self.right = [[] for _ in self.items]
        for edge in self.edges:
            weight = CONCAT_WEIGHT if edge.op is None else 1.0
            for u, v in zip(edge.path, edge.path[1:]):
                self.right[u].append((v, weight))
                self.left[v].append((u, weight))

    # -- order within the columns ------------------------------------------------------------------------------------

    def orders(self, restarts: int = 40, keep: int = 6) -> list[list[list[int]]]:
        """The orders with the fewest crossings, out of `restarts` local searches from fixed random starts."""
        found = {}
        for restart in range(restarts):
            order = [list(column) for column in self.columns]
            if restart:
                for column in order:
                    random.Random(restart * 1000 + len(column)).shuffle(column)
            self._uncross(order)
            found.setdefault(repr(order), (self._crossings(order), order))
        ranked = sorted(found.values(), key=lambda pair: pair[0])
        return [order for crossings, order in ranked[:keep] if crossings == ranked[0][0]]

    def _uncross(self, order):
        position = {i: p for column in order for p, i in enumerate(column)}
        for sweep in range(12):
            before = [list(column) for column in order]
            for column in order if sweep % 2 == 0 else reversed(order):
                self._sort_by_neighbours(column, position, self.left if sweep % 2 == 0 else self.right)
                self._swap_neighbours(column, position)
            if order == before:
                break

    def _sort_by_neighbours(self, column, position, side):
        def centre(i):
            weight = sum(w for _, w in side[i])
            return sum(w * position[n] for n, w in side[i]) / weight if weight else position[i]

        column.sort(key=centre)
        position.update((i, p) for p, i in enumerate(column))

    def _swap_neighbours(self, column, position):
        for _ in column:
            swapped = False
            for p in range(len(column) - 1):
                a, b = column[p], column[p + 1]
                if self._cross(b, a, position) < self._cross(a, b, position):
                    column[p], column[p + 1] = b, a
                    position[a], position[b] = p + 1, p
                    swapped = True
            if not swapped:
                break

    def _cross(self, a, b, position, sides=None) -> float:
        """Weight of the crossings between the edges of a and of b when a stands before b."""
        return sum(
            wa * wb
            for side in (sides or (self.left, self.right))
            for na, wa in side[a]
            for nb, wb in side[b]
            if position[na] > position[nb]
        )

    def _crossings(self, order) -> float:
        position = {i: p for column in order for p, i in enumerate(column)}
        pairs = ((a, b) for column in order for p, a in enumerate(column) for b in column[p + 1 :])
        return sum(self._cross(a, b, position, (self.right,)) for a, b in pairs)

    # -- heights and widths ------------------------------------------------------------------------------------------

    def place(self, order) -> float:
        """Gives every item its height for this order; returns the total height that the edges climb."""
        position = {i: p for column in order for p, i in enumerate(column)}
        self._set_ports(position)
        for column in order:
            for i, offset in zip(column, self._stack(column)):
                self.items[i].y = offset - self._stack(column)[-1] / 2
        # Iterated weighted least squares moves from squares to absolute values, which bend few edges but those fully
        # rather than all edges a little.
        for sweep in range(90):
            softness = max(0.002, 0.92**sweep)
            for column in order if sweep % 2 == 0 else reversed(order):
                self._settle(column, softness)
        self._straighten(order)
        return sum(self._climb(e) * (CONCAT_WEIGHT if edge.op is None else 1.0) for e, edge in enumerate(self.edges))

    def _set_ports(self, position):
        """Spreads the curves over the sides of the states, in the order in which they leave or arrive."""
        self.port = {}
        for end, beside in ((0, 1), (-1, -2)):
            for state in self.states:
                meeting = sorted(
                    (e for e, edge in enumerate(self.edges) if edge.path[end] == state),
                    key=lambda e: position[self.edges[e].path[beside]],
                )
                for p, e in enumerate(meeting):
                    self.port[e, end] = PORT_SPACING * (p - (len(meeting) - 1) / 2)
                item = self.items[state]
                item.height = max(STATE_HEIGHT, item.height, PORT_SPACING * (len(meeting) + 0.5))
        self.links = [[] for _ in self.items]  # per item: (neighbour, height difference of the ports, weight)
        for e, edge in enumerate(self.edges):
            last = len(edge.path) - 2
            for s, (u, v) in enumerate(zip(edge.path, edge.path[1:])):
                shift = (self.port[e, -1] if s == last else 0.0) - (self.port[e, 0] if s == 0 else 0.0)
                weight = (CONCAT_WEIGHT if edge.op is None else 1.0) * (8.0 if 0 < s < last else 2.0)
                self.links[u].append((v, shift, weight))
                self.links[v].append((u, -shift, weight))

    def _stack(self, column) -> list[float]:
        """Heights of a column's items above its first when packed as tightly as the gaps allow."""
        heights = [0.0]
        for a, b in itertools.pairwise(column):
            a, b = self.items[a], self.items[b]
            heights.append(heights[-1] + (a.height + b.height) / 2 + GAP[a.kind] + GAP[b.kind])
        return heights

    def _settle(self, column, softness):
        """Moves a column's items as near to their neighbours as their order and gaps allow (pooled violators)."""
        blocks = []  # [weighted mean of the wish less the packed height, weight, items]
        packed = self._stack(column)
        for i, offset in zip(column, packed):
            wishes = [(self.items[n].y + shift, weight) for n, shift, weight in self.links[i]]
            weights = [weight / (abs(y - self.items[i].y) + softness) for y, weight in wishes]
            total = sum(weights) or 1e-6
            wish = sum(w * y for w, (y, _) in zip(weights, wishes)) / total if wishes else self.items[i].y
            blocks.append([wish - offset, total, 1])
            while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
                (y1, w1, n1), (y2, w2, n2) = blocks[-2:]
                blocks[-2:] = [[(w1 * y1 + w2 * y2) / (w1 + w2), w1 + w2, n1 + n2]]
        levels = [y for y, _, count in blocks for _ in range(count)]
        for i, offset, level in zip(column, packed, levels):
            self.items[i].y = offset + level

    def _straighten(self, order):
        """Removes the kinks too small to see as a bend: an item follows the curve from its left where it has room."""
        for e, edge in enumerate(self.edges):
            for s, i in enumerate(edge.path[1:-1], start=1):
                item, before = self.items[i], self.items[i].y
                item.y = self._heights(e)[s - 1]
                if abs(item.y - before) > KINK or not self._has_room(order[item.column]):
                    item.y = before

    def _has_room(self, column) -> bool:
        packed = self._stack(column)
        heights = [self.items[i].y for i in column]
        return all(heights[p + 1] - heights[p] > packed[p + 1] - packed[p] - 0.02 for p in range(len(column) - 1))

    def _heights(self, e) -> list[float]:
        heights = [self.items[i].y for i in self.edges[e].path]
        heights[0] += self.port[e, 0]
        heights[-1] += self.port[e, -1]
        return heights

    def _climb(self, e) -> float:
        heights = self._heights(e)
        return sum(abs(a - b) for a, b in itertools.pairwise(heights))

    def finish(self) -> CellLayout:
        """Sets the columns apart, puts c_{k-2} above c_{k-1} and the lower left corner at (0, 0)."""
        up = 1.0 if self.items[self.states[0]].y >= self.items[self.states[1]].y else -1.0
        low = min(up * item.y - item.height / 2 for item in self.items)
        heights = [[up * y - low for y in self._heights(e)] for e in range(len(self.edges))]
        for item in self.items:
            item.y = up * item.y - low
        spans = self._column_spans(heights)
        for item in self.items:
            item.x = sum(spans[item.column]) / 2
        for edge, levels in zip(self.edges, heights):
            corners = [(x, y) for i, y in zip(edge.path, levels) for x in spans[self.items[i].column]]
            edge.points = corners[1:-1]  # from the right side of the source to the left side of the target
        height = max(item.y + item.height / 2 for item in self.items)
        return CellLayout([self.items[i] for i in self.states], self.edges, spans[-1][1], height)

    def _column_spans(self, heights) -> list[tuple[float, float]]:
        """left and right of every column; a gap is the wider the higher an edge climbs in it."""
        widths = [max(self.items[i].width for i in column) for column in self.columns]
        climbs = [0.0] * len(widths)
        for edge, levels in zip(self.edges, heights):
            for i, a, b in zip(edge.path, levels, levels[1:]):
                climbs[self.items[i].column] = max(climbs[self.items[i].column], abs(a - b))
        spans, right = [], 0.0
        for width, climb in zip(widths, climbs):
            spans.append((right, right + width))
            right += width + min(0.65, 0.28 + 0.17 * climb)
        return spans
