"""The sheet that pictures are drawn on: figure objects, one fixed style, files with the same bytes every time."""

from __future__ import annotations

import io
from contextlib import contextmanager
from pathlib import Path

INK, QUIET = "#222222", "#666666"
DPI = 150


@contextmanager
def style():
    """matplotlib's own defaults with this module's on top, whatever the caller has set; restored on leaving."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: type `pip install matplotlib`", name="matplotlib") from error
    ours = {
        "svg.hashsalt": "rnas",  # otherwise element ids, and so the bytes, differ from call to call
        "svg.fonttype": "none",
        "font.family": ["DejaVu Sans"],  # ships with matplotlib
        "mathtext.fontset": "dejavusans",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": QUIET,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": "#E4E4E4",
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.8,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.handlelength": 1.4,
        "savefig.dpi": DPI,
    }
    with matplotlib.style.context(["default", ours]):
        yield


def inches(width: float, height: float):
    """A figure of that size whose axes are measured in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def panels(count: int, width: float = 4.0):
    """A figure and its `count` axes, side by side and each `width` inches wide."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, 3.1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def save(figure, path: Path) -> Path:
    """Write the figure in the format of the path's ending; equal figures give equal bytes. Returns `path`."""
    picture = io.BytesIO()
    dated = {".svg": "Date", ".pdf": "CreationDate"}.get(path.suffix)
    figure.savefig(picture, format=path.suffix.lstrip(".") or None, metadata={dated: None} if dated else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture.getvalue())
    return path


def text_width(text: str, size: float) -> float:
    """Inches, from the outlines of the font that ships with matplotlib."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans")
    return TextPath((0, 0), text, size=size, prop=font).get_extents().width / 72
