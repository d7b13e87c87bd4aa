"""Pictures: the cells of a genotype, the curves of a run, and accuracies under attack side by side.

matplotlib is imported only when a picture is drawn, through its figure objects: no pyplot, no window, no setting of
the caller's is read or changed. The same input gives the same bytes. Colours are those of Okabe and Ito (2008), the
purple of Paul Tol's muted scheme: both were made for eyes with any common colour blindness.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rnas.canvas import INK, inches, panels, save, style, text_width
from rnas.cell_layout import CellLayout, layout

RULE = "#B8B8B8"
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#AA4499", "#56B4E9"

FAMILIES = {  # prefix of an operation's name: (name in the legend, colour)
    "sep_conv": ("separable convolution", BLUE),
    "dil_conv": ("dilated convolution", VERMILLION),
    "max_pool": ("pooling", GREEN),
    "avg_pool": ("pooling", GREEN),
    "skip_connect": ("skip connection", PURPLE),
}
OTHER_FAMILY = ("other operation", INK)
CONCATENATION = ("concatenation", RULE)

SERIES = {  # key in metrics.jsonl: (name in the legend, colour)
    "weight_loss": ("weights", BLUE),
    "architecture_loss": ("architecture", VERMILLION),
    "train_loss": ("train", BLUE),
    "weight_accuracy": ("weights", BLUE),
    "architecture_accuracy": ("architecture", VERMILLION),
    "train_accuracy": ("train", BLUE),
    "clean_accuracy": ("validation, clean", GREEN),
    "robust_accuracy": ("validation, under attack", VERMILLION),
}
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
ATTACK_COLOURS = {"clean": BLUE, "fgsm": ORANGE}
STRONGER = (VERMILLION, PURPLE, GREEN, SKY)  # for all other attacks, in the order in which they appear

LABEL_SIZE = 7.5  # points
PAGE_WIDTH = 11.0  # inches; cell types stand side by side up to this width


# -- cells -----------------------------------------------------------------------------------------------------------


def draw_cells(genotype, stem: str | Path) -> list[Path]:
    """Draws every cell type of a genotype and returns the paths [stem.svg, stem.png].

    genotype: has `cells`, a mapping from cell type to nodes, each node a sequence of (op, input) pairs, and `concat`,
    the states that form the output. Inputs count c_{k-2}, c_{k-1}, then the nodes. Cell types stand side by side as
    far as the page is wide, then below each other. Text stays text in the SVG, so it can be searched and edited.
    Raises ValueError for a genotype without cells or with an edge from the future, ImportError without matplotlib.
    """
    if not genotype.cells:
        raise ValueError("cannot draw a genotype without cells: expected at least one cell type in genotype.cells")
    with style():
        layouts = {name: layout(nodes, genotype.concat, _label_width) for name, nodes in genotype.cells.items()}
        figure = _cells_figure(layouts)
        stem = Path(stem)
        return [save(figure, stem.with_name(stem.name + suffix)) for suffix in (".svg", ".png")]


def _cells_figure(layouts: Mapping[str, CellLayout]):
    margin, title, between, legend = 0.15, 0.34, 0.55, 0.42
    rows = [[]]
    for name, cell in layouts.items():
        if rows[-1] and sum(c.width + between for _, c in rows[-1]) + cell.width > PAGE_WIDTH - 2 * margin:
            rows.append([])
        rows[-1].append((name, cell))
    row_heights = [max(cell.height for _, cell in row) + title for row in rows]
    width = 2 * margin + max(sum(c.width for _, c in row) + between * (len(row) - 1) for row in rows)
    families = _legend_entries(layouts.values())
    width = max(width, 2 * margin + _legend_width(families))
    height = 2 * margin + sum(row_heights) + 0.3 * (len(rows) - 1) + legend

    figure, axes = inches(width, height)
    top = height - margin
    for row, row_height in zip(rows, row_heights):
        left = margin
        for name, cell in row:
            axes.text(left, top, f"{name.replace('_', ' ')} cell", fontsize=10.5, weight="bold", va="top", color=INK)
            # Centred in its row, so that a flat cell beside a tall one does not hang from the title.
            _draw_cell(axes, name, cell, left, top - title - (row_height - title + cell.height) / 2)
            left += cell.width + between
        top -= row_height + 0.3
    _draw_legend(axes, families, margin, margin + 0.06)
    return figure


def _draw_cell(axes, cell_type: str, cell: CellLayout, left: float, bottom: float):
    # Each curve carries a white casing, so that of two crossing curves one visibly passes over the other.
    for e, edge in enumerate(sorted(cell.edges, key=lambda edge: edge.op is not None)):
        colour, width = (CONCATENATION[1], 1.1) if edge.op is None else (_family(edge.op)[1], 1.5)
        points = [(left + x, bottom + y) for x, y in edge.points]
        gid = f"{cell_type}-edge-{e}-from-{edge.source}-to-{edge.target}"
        _draw_edge(axes, points, colour, width, gid, arrow=edge.op is not None, zorder=1 + 0.01 * e)
    for e, edge in enumerate(cell.edges):
        if edge.label:
            _draw_label(axes, f"{cell_type}-label-{e}", edge, left, bottom)
    names = ["$c_{k-2}$", "$c_{k-1}$", *map(str, range(len(cell.states) - 3)), "$c_k$"]
    for s, (state, name) in enumerate(zip(cell.states, names)):
        fill = "#FFFFFF" if name.isdigit() else "#E9E9E9"
        frame = {"facecolor": fill, "edgecolor": INK, "linewidth": 1.0}
        _rounded(axes, state, left, bottom, 0.07, gid=f"{cell_type}-state-{s}", **frame)
        text = {"ha": "center", "va": "center_baseline", "fontsize": 9.5, "color": INK, "zorder": 5}
        axes.text(left + state.x, bottom + state.y, name, **text)


def _draw_edge(axes, points, colour, width, gid, arrow, zorder):
    from matplotlib.patches import PathPatch, Polygon
    from matplotlib.path import Path as Curve

    length, half = (0.09, 0.042) if arrow else (0.0, 0.0)
    points = [*points[:-1], (points[-1][0] - length, points[-1][1])]
    vertices, codes = [points[0]], [Curve.MOVETO]
    for s, ((x0, y0), (x1, y1)) in enumerate(itertools.pairwise(points)):
        if s % 2:
            vertices, codes = [*vertices, (x1, y1)], [*codes, Curve.LINETO]
        else:
            middle = (x0 + x1) / 2
            vertices += [(middle, y0), (middle, y1), (x1, y1)]
            codes += [Curve.CURVE4] * 3
    curve = Curve(vertices, codes)
    axes.add_patch(PathPatch(curve, linewidth=width + 2.0, edgecolor="white", facecolor="none", zorder=zorder))
    axes.add_patch(PathPatch(curve, linewidth=width, edgecolor=colour, facecolor="none", zorder=zorder, gid=gid))
    if arrow:
        x, y = points[-1]
        axes.add_patch(Polygon([(x, y + half), (x + length, y), (x, y - half)], color=colour, linewidth=0, zorder=3))


def _draw_label(axes, gid, edge, left, bottom):
    colour = _family(edge.op)[1]
    _rounded(axes, edge.label, left, bottom, 0.1, gid=gid, facecolor=_tint(colour), edgecolor=colour, linewidth=0.9)
    text = {"ha": "center", "va": "center_baseline", "fontsize": LABEL_SIZE, "color": INK, "zorder": 5}
    axes.text(left + edge.label.x, bottom + edge.label.y, edge.op, **text)


def _rounded(axes, item, left, bottom, radius, **style):
    from matplotlib.patches import FancyBboxPatch

    x, y, _, _ = item.box
    shape = f"round,pad=0,rounding_size={min(radius, item.height / 2)}"
    axes.add_patch(FancyBboxPatch((left + x, bottom + y), item.width, item.height, boxstyle=shape, zorder=4, **style))


def _legend_entries(layouts: Iterable[CellLayout]) -> list[tuple[str, str]]:
    ops = {edge.op for cell in layouts for edge in cell.edges}
    used = {CONCATENATION if op is None else _family(op) for op in ops}
    return [entry for entry in dict.fromkeys([*FAMILIES.values(), OTHER_FAMILY, CONCATENATION]) if entry in used]


def _legend_width(entries) -> float:
    return sum(0.34 + text_width(name, 8.5) + 0.28 for name, _ in entries) - 0.28


def _draw_legend(axes, entries, left, y):
    for name, colour in entries:
        axes.plot([left, left + 0.26], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.text(left + 0.34, y, name, fontsize=8.5, va="center_baseline", color=INK)
        left += 0.34 + text_width(name, 8.5) + 0.28


def _family(op: str) -> tuple[str, str]:
    return next((family for prefix, family in FAMILIES.items() if op.startswith(prefix)), OTHER_FAMILY)


def _label_width(op: str) -> float:
    return text_width(op, LABEL_SIZE) + 0.18


def _tint(colour: str) -> tuple[float, float, float]:
    """The colour mixed with white, light enough for dark text."""
    from matplotlib.colors import to_rgb

    return tuple(1 - 0.13 * (1 - channel) for channel in to_rgb(colour))


# -- curves and bars -------------------------------------------------------------------------------------------------


def draw_curves(records: Sequence[Mapping], path: str | Path) -> Path:
    """Draws the losses, accuracies and architecture entropies of a run over its epochs; returns the path written.

    records: the parsed lines of metrics.jsonl, of a search or of a training. Every `*_loss` and `*_accuracy` (in
    [0, 1]) found is drawn, and `entropy` (per cell type, in nats); a panel without numbers is left out, an epoch
    without a number leaves no mark, and of an epoch recorded twice the later record counts. The suffix of path chooses
    PNG, SVG or PDF.
    Raises ValueError where no record holds anything to draw, ImportError without matplotlib.
    """
    losses, accuracies, entropies = _collect(records)
    found = [("loss", losses), ("accuracy (%)", accuracies), ("architecture entropy (nats)", entropies)]
    found = [(title, series) for title, series in found if series]
    if not found:
        raise ValueError(
            f"nothing to draw in {len(records)} records: expected records of kind 'epoch' with a *_loss, a *_accuracy "
            "or an entropy, as in the metrics.jsonl of a run that has finished an epoch"
        )
    with style():
        figure, all_axes = panels(len(found))
        for axes, (title, series) in zip(all_axes, found):
            _draw_panel(axes, title, series)
        return save(figure, Path(path))


def _collect(records) -> tuple[dict, dict, dict]:
    losses, accuracies, entropies = {}, {}, {}
    for record in records:
        if record.get("kind", "epoch") != "epoch" or "epoch" not in record:
            continue
        for key, value in record.items():
            if key.endswith("_loss"):
                _add_point(losses, key, record["epoch"], value)
            elif key.endswith("_accuracy"):
                _add_point(accuracies, key, record["epoch"], value, scale=100.0)
        for cell, value in (record.get("entropy") or {}).items():
            _add_point(entropies, cell, record["epoch"], value)
    return losses, accuracies, entropies


def _add_point(series, key, epoch, value, scale=1.0):
    if isinstance(value, (int, float)) and math.isfinite(value):
        series.setdefault(key, {})[epoch] = scale * value


def _draw_panel(axes, title, series):
    from matplotlib.ticker import MaxNLocator

    spare = iter(CYCLE * (1 + len(series)))
    for key in sorted(series, key=lambda key: (list(SERIES).index(key) if key in SERIES else len(SERIES), key)):
        fallback = key.removesuffix("_loss").removesuffix("_accuracy").replace("_", " ")
        name, colour = SERIES[key] if key in SERIES else (fallback, next(spare))
        epochs = sorted(series[key])
        marker = "o" if len(epochs) <= 30 else None
        axes.plot(epochs, [series[key][e] for e in epochs], label=name, color=colour, marker=marker, markersize=3.5)
    axes.set_title(title, loc="left")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    epochs = [epoch for points in series.values() for epoch in points]
    if min(epochs) == max(epochs):
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.set_xticks(epochs[:1])
    if "accuracy" in title:
        axes.set_ylim(0, 102)
    else:
        # From zero, so that a small dip does not look like a collapse.
        axes.set_ylim(0, 1.08 * max(max(points.values()) for points in series.values()) or 1.0)
    axes.legend(loc="best")


def draw_comparison(rows: Sequence[Mapping], path: str | Path) -> Path:
    """Draws each network's accuracies under each attack as a group of bars; returns the path written.

    rows: {"name": str, "accuracies": {"clean": 0.97, "fgsm": 0.61, "pgd-20": 0.43}} per network, accuracies in [0, 1];
    a network may lack an attack, which then shows as "n/a". Attacks keep the order in which they first appear.
    Raises ValueError for no rows, no accuracies, or an accuracy outside [0, 1], ImportError without matplotlib.
    """
    attacks = list(dict.fromkeys(attack for row in rows for attack in row["accuracies"]))
    if not attacks:
        raise ValueError('nothing to compare: expected rows like {"name": "robust", "accuracies": {"clean": 0.97}}')
    for row in rows:
        for attack, accuracy in row["accuracies"].items():
            if not 0.0 <= accuracy <= 1.0:
                raise ValueError(f"{row['name']}: {attack} accuracy must be in [0, 1], got {accuracy} (not per cent)")
    with style():
        figure, (axes,) = panels(1, width=max(4.2, 1.6 + len(rows) * (0.42 * len(attacks) + 0.35)))
        bar = 0.8 / len(attacks)
        spare = iter(STRONGER * len(attacks))
        for a, attack in enumerate(attacks):
            colour = ATTACK_COLOURS.get(attack) or next(spare)
            offset = bar * (a - (len(attacks) - 1) / 2)
            values = [row["accuracies"].get(attack) for row in rows]
            places = [r + offset for r in range(len(rows))]
            heights = [100 * (value or 0.0) for value in values]
            axes.bar(places, heights, width=0.92 * bar, color=colour, label=_attack_name(attack))
            for x, height, value in zip(places, heights, values):
                text = "n/a" if value is None else f"{height:.1f}"
                axes.text(x, height + 1, text, ha="center", va="bottom", fontsize=7.5, color=INK)
        axes.set_xticks(range(len(rows)), [textwrap.fill(str(row["name"]), 16) for row in rows])
        axes.tick_params(axis="x", length=0)
        spread = max(0.6, 1.2 - 0.3 * len(rows))  # one network alone does not fill the page
        axes.set_xlim(-spread, len(rows) - 1 + spread)
        axes.set_ylim(0, 108)
        axes.set_yticks(range(0, 101, 20))
        axes.set_title("accuracy (%)", loc="left")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(attacks), borderaxespad=0.3)
        return save(figure, Path(path))


def _attack_name(attack: str) -> str:
    return {"clean": "clean", "autoattack": "AutoAttack"}.get(attack, attack.upper())
