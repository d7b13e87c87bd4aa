"""The picture of a comparison: clean accuracy against accuracy under attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .canvas import INK, QUIET, save, style
from .plot import CYCLE

REFERENCE_COLOURS = {"darts": INK, "random": QUIET}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")  # beside the colour, for more methods than colours, and for all eyes


def draw_clean_vs_robust(networks: Sequence[Mapping], clean: str, robust: str, stem: str | Path) -> list[Path]:
    """Draws a point for every network and a large marker for the mean of every method; returns [stem.svg, stem.png].

    networks: {"method": str, "accuracies": {column: accuracy in [0, 1]}}; clean, robust: the columns of the two axes.
    Raises ImportError without matplotlib.
    """
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        colours = iter(CYCLE * len(networks))
        for m, method in enumerate(dict.fromkeys(network["method"] for network in networks)):
            own = [network["accuracies"] for network in networks if network["method"] == method]
            points = [(100 * each[clean], 100 * each[robust]) for each in own]
            mean = [sum(values) / len(points) for values in zip(*points)]
            colour = REFERENCE_COLOURS.get(method) or next(colours)
            marker = MARKERS[m % len(MARKERS)]
            for point in points:
                axes.plot(*zip(mean, point), color=colour, alpha=0.3, linewidth=0.7, zorder=1)
            axes.scatter(*zip(*points), s=20, color=colour, marker=marker, alpha=0.55, linewidths=0, gid=f"{method}")
            frame = {"facecolors": colour, "edgecolors": "white", "linewidths": 0.9, "zorder": 3}
            axes.scatter(*mean, s=105, marker=marker, label=method, gid=f"{method}-mean", **frame)
        axes.grid(True, axis="both")
        axes.margins(0.08)
        axes.set_xlabel(f"{clean} accuracy (%)")
        axes.set_ylabel(f"{robust.upper() if robust != 'autoattack' else 'AutoAttack'} accuracy (%)")
        axes.set_title("small: one network each; large: mean over the seeds", loc="left")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0.0, labelspacing=0.7)
        stem = Path(stem)
        return [save(figure, stem.with_name(stem.name + suffix)) for suffix in (".svg", ".png")]
