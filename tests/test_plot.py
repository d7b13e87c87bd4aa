"""Pictures: every edge is there, nothing hides anything else, the same input gives the same bytes."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnas import genotype, plot
from rnas.cell_layout import layout

PUBLISHED = genotype.published()
OPS = ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "max_pool_3x3", "skip_connect", "nor_conv_3x3")


def cells(**cell_types):
    """A genotype-like object whose every node is concatenated into the output."""
    return SimpleNamespace(cells=cell_types, concat=tuple(range(2, 2 + len(next(iter(cell_types.values()))))))


ONE_NODE = cells(normal=[[("sep_conv_3x3", 0), ("sep_conv_3x3", 0)]])
TWO_NODES = cells(
    normal=[[("sep_conv_3x3", 0), ("dil_conv_3x3", 1)], [("skip_connect", 0), ("max_pool_3x3", 2)]],
    reduction=[[("sep_conv_3x3", 0), ("nor_conv_3x3", 1)], [("skip_connect", 2), ("max_pool_3x3", 2)]],
)
PICTURES = {**PUBLISHED, "one node": ONE_NODE, "two nodes": TWO_NODES}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, instead of files."""
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure) or path)
    return drawn


def overlap(a, b) -> bool:
    """Whether two boxes (left, bottom, right, top) share area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def edges_of(found) -> Counter:
    """(cell type, source, target) of every edge that a picture must show, those to the output included."""
    output = {cell_type: 2 + len(nodes) for cell_type, nodes in found.cells.items()}
    return Counter(
        [(c, source, 2 + j) for c, nodes in found.cells.items() for j, node in enumerate(nodes) for _, source in node]
        + [(c, source, output[c]) for c in found.cells for source in found.concat]
    )


def curve_points(cell_edge):
    """Points along an edge, in the same coordinates as the layout's boxes."""
    points = cell_edge.points
    for s, ((x0, y0), (x1, y1)) in enumerate(itertools.pairwise(points)):
        for t in (i / 20 for i in range(21)):
            rise = t if s % 2 else 3 * t**2 - 2 * t**3  # any monotone rise stays within the same corridor
            yield x0 + t * (x1 - x0), y0 + rise * (y1 - y0)


def check_layout(nodes, concat):
    """What makes a cell readable: no two boxes overlap, no curve runs through a box that is not its own."""
    cell = layout(nodes, concat, lambda op: 0.06 * len(op) + 0.2)
    labels = [edge.label for edge in cell.edges if edge.op is not None]
    boxes = [item.box for item in [*cell.states, *labels]]
    assert len(labels) == sum(len(node) for node in nodes)
    assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    assert all(
        b[0] >= -1e-9 and b[1] >= -1e-9 and b[2] <= cell.width + 1e-9 and b[3] <= cell.height + 1e-9 for b in boxes
    )
    for edge in cell.edges:
        own = [cell.states[edge.source].box, cell.states[edge.target].box, *([edge.label.box] if edge.label else [])]
        for box in boxes:
            if box not in own:
                assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in curve_points(edge)), edge
        source, target = own[:2]
        (x0, y0), (x1, y1) = edge.points[0], edge.points[-1]
        assert x0 == pytest.approx(source[2]) and source[1] < y0 < source[3], "leaves from the right side of its source"
        assert x1 == pytest.approx(target[0]) and target[1] < y1 < target[3], "arrives at the left side of its target"
    return cell


@pytest.mark.parametrize("name", PICTURES)
def test_no_label_state_or_curve_hides_another(name):
    for nodes in PICTURES[name].cells.values():
        check_layout(nodes, PICTURES[name].concat)


@st.composite
def random_cells(draw):
    count = draw(st.integers(1, 5))

    def pair(j):
        return st.tuples(st.sampled_from(OPS), st.integers(0, 1 + j))

    nodes = [draw(st.lists(pair(j), min_size=1, max_size=3)) for j in range(count)]
    return nodes, draw(st.lists(st.integers(0, 1 + count), min_size=1, unique=True))


@given(random_cells())
@settings(max_examples=25, deadline=None)
def test_no_cell_at_all_is_drawn_with_overlaps(cell):
    check_layout(*cell)


def test_parallel_edges_are_two_curves_with_two_labels():
    cell = layout(ONE_NODE.cells["normal"], (2,), lambda op: 0.9)
    first, second = [edge for edge in cell.edges if edge.op]
    assert first.points[0][1] != second.points[0][1] and first.points[-1][1] != second.points[-1][1]
    assert abs(first.label.y - second.label.y) > first.label.height


@pytest.mark.parametrize("name", PUBLISHED)
def test_states_run_left_to_right_by_depth_with_the_inputs_first(name):
    for nodes in PUBLISHED[name].cells.values():
        cell = layout(nodes, PUBLISHED[name].concat, lambda op: 0.9)
        assert cell.states[0].x == cell.states[1].x == min(state.x for state in cell.states)
        assert cell.states[0].y > cell.states[1].y, "c_{k-2} stands above c_{k-1}"
        assert cell.states[-1].x > max(state.x for state in cell.states[:-1])
        assert all(cell.states[edge.source].x < cell.states[edge.target].x for edge in cell.edges)


@pytest.mark.parametrize("name", ["DARTS_V2", "ARNAS", "two nodes"])
def test_the_svg_shows_every_operation_and_every_edge(name, tmp_path):
    found = PICTURES[name]
    svg, png = plot.draw_cells(found, tmp_path / "cells")
    text = svg.read_text()
    expected = Counter(op for nodes in found.cells.values() for node in nodes for op, _ in node)
    assert {op: text.count(f">{op}</text>") for op in expected} == expected
    drawn = re.findall(r'<g id="(\w+)-edge-\d+-from-(\d+)-to-(\d+)">', text)
    assert Counter((c, int(source), int(target)) for c, source, target in drawn) == edges_of(found)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "ids must be unique in an SVG"
    for cell_type in found.cells:
        assert f">{cell_type} cell</text>" in text
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", PICTURES)
def test_no_two_texts_overlap_and_labels_fit_their_frames(name, figures):
    plot.draw_cells(PICTURES[name], "unused")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = figures[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    (axes,) = figure.axes
    texts = [(text.get_text(), text.get_window_extent(renderer).extents) for text in axes.texts]
    for (_, a), (_, b) in itertools.combinations(texts, 2):
        assert not overlap(a, b)
    frames = [p.get_window_extent(renderer).extents for p in axes.patches if p.get_gid() and "-label-" in p.get_gid()]
    operations = [extent for text, extent in texts if text in PRIMITIVES_DRAWN]
    assert len(operations) == len(frames)
    for extent in operations:
        assert any(f[0] < extent[0] and extent[2] < f[2] and f[1] < extent[1] and extent[3] < f[3] for f in frames)
    page = figure.bbox.extents
    for _, extent in texts:
        assert page[0] <= extent[0] and extent[2] <= page[2] and page[1] <= extent[1] and extent[3] <= page[3]


PRIMITIVES_DRAWN = {
    op for found in PICTURES.values() for nodes in found.cells.values() for node in nodes for op, _ in node
}


def test_families_have_their_own_colours_and_only_those_used_are_in_the_legend(tmp_path):
    text = plot.draw_cells(TWO_NODES, tmp_path / "cells")[0].read_text()
    for family in ("separable convolution", "dilated convolution", "pooling", "skip connection", "other operation"):
        assert text.count(f">{family}</text>") == 1
    used = plot.draw_cells(ONE_NODE, tmp_path / "one")[0].read_text()
    assert ">separable convolution</text>" in used and ">pooling</text>" not in used
    colours = {colour for _, colour in [*plot.FAMILIES.values(), plot.OTHER_FAMILY, plot.CONCATENATION]}
    assert len(colours) == 6


def test_the_same_genotype_gives_the_same_bytes_whatever_the_caller_has_set(tmp_path):
    import matplotlib

    first = [path.read_bytes() for path in plot.draw_cells(PUBLISHED["RACL"], tmp_path / "a")]
    with matplotlib.rc_context({"font.size": 30, "figure.facecolor": "red", "svg.fonttype": "path", "savefig.dpi": 20}):
        before = dict(matplotlib.rcParams)
        second = [path.read_bytes() for path in plot.draw_cells(PUBLISHED["RACL"], tmp_path / "b")]
        assert dict(matplotlib.rcParams) == before
    assert first == second
    assert b"dc:date" not in first[0]


def test_drawing_needs_no_pyplot_and_importing_no_matplotlib(tmp_path):
    code = (
        "import sys, rnas.plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from types import SimpleNamespace\n"
        "nodes = [[('skip_connect', 0), ('skip_connect', 1)]]\n"
        f"rnas.plot.draw_cells(SimpleNamespace(cells={{'normal': nodes}}, concat=(2,)), {str(tmp_path / 'cells')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_stem_with_a_dot_keeps_its_name_and_folders_are_made(tmp_path):
    paths = plot.draw_cells(ONE_NODE, tmp_path / "new" / "cells.v1")
    assert [path.name for path in paths] == ["cells.v1.svg", "cells.v1.png"]
    assert all(path.is_file() for path in paths)


def test_missing_matplotlib_is_said_clearly(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draws = (
        lambda: plot.draw_cells(ONE_NODE, tmp_path / "cells"),
        lambda: plot.draw_curves([{"kind": "epoch", "epoch": 0, "train_loss": 1.0}], tmp_path / "curves.png"),
        lambda: plot.draw_comparison([{"name": "a", "accuracies": {"clean": 0.5}}], tmp_path / "bars.png"),
    )
    for draw in draws:
        with pytest.raises(ImportError, match="pip install matplotlib"):
            draw()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "found, message",
    [
        (SimpleNamespace(cells={}, concat=(2,)), "at least one cell type"),
        (cells(normal=[[("skip_connect", 0), ("skip_connect", 2)]]), "reads state 2, but only states 0 to 1"),
        (SimpleNamespace(cells={"normal": [[("skip_connect", 0)]]}, concat=(3,)), "concat names state 3"),
    ],
)
def test_a_genotype_that_is_none_is_refused(found, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot.draw_cells(found, tmp_path / "cells")


# -- curves ----------------------------------------------------------------------------------------------------------


def search_record(epoch, **changes):
    return {
        "kind": "epoch",
        "epoch": epoch,
        "weight_loss": 2.0 - 0.1 * epoch,
        "weight_accuracy": 0.1 * epoch,
        "architecture_loss": 2.1,
        "architecture_accuracy": 0.05,
        "entropy": {"normal": 2.0, "reduction": 1.9},
        "seconds": 3.0,
        "images_per_second": 900.0,
    } | changes


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata()] for line in axes.get_lines()}


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_a_search_shows_losses_accuracies_and_entropies(figures):
    plot.draw_curves([search_record(epoch) for epoch in range(3)], "unused.png")
    assert titles(figures[0]) == ["loss", "accuracy (%)", "architecture entropy (nats)"]
    loss, accuracy, entropy = map(lines, figures[0].axes)
    assert [x for x, _ in loss["weights"]] == [0, 1, 2]
    assert [y for _, y in loss["weights"]] == pytest.approx([2.0, 1.9, 1.8])
    assert [y for _, y in accuracy["weights"]] == pytest.approx([0.0, 10.0, 20.0])
    assert set(loss) == set(accuracy) == {"weights", "architecture"} and set(entropy) == {"normal", "reduction"}


def test_a_training_leaves_no_mark_where_nothing_was_measured(figures):
    records = [{"kind": "epoch", "epoch": e, "train_loss": 1.0, "train_accuracy": 0.5} for e in range(4)]
    records[1] |= {"robust_accuracy": 0.25, "clean_accuracy": None}
    records[3] |= {"robust_accuracy": 0.5, "train_loss": float("nan")}
    plot.draw_curves([{"kind": "start"}, *records], "unused.png")
    loss, accuracy = map(lines, figures[0].axes)
    assert [x for x, _ in loss["train"]] == [0, 1, 2]
    assert accuracy["validation, under attack"] == [(1, 25.0), (3, 50.0)]
    assert "validation, clean" not in accuracy


def test_of_an_epoch_recorded_twice_the_later_counts_and_epochs_are_in_order(figures):
    plot.draw_curves([search_record(1), search_record(0), search_record(1, weight_loss=9.0)], "unused.png")
    assert lines(figures[0].axes[0])["weights"] == [(0, 2.0), (1, 9.0)]


def test_losses_of_other_methods_are_drawn_under_their_own_names(figures):
    plot.draw_curves([search_record(0, jacobian_loss=0.3, curvature_loss=0.2)], "unused.png")
    drawn = {line.get_label(): line.get_color() for line in figures[0].axes[0].get_lines()}
    assert {"jacobian", "curvature"} < set(drawn)


def test_one_epoch_is_visible_and_files_are_written(tmp_path, figures, monkeypatch):
    plot.draw_curves([search_record(0)], "unused.png")
    for axes in figures[0].axes:
        assert all(line.get_marker() == "o" for line in axes.get_lines())
        left, right = axes.get_xlim()
        assert left < 0 < right and list(axes.get_xticks()) == [0]
    monkeypatch.undo()
    path = plot.draw_curves([search_record(0)], tmp_path / "curves.png")
    assert path == tmp_path / "curves.png"
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG") and plot.draw_curves([search_record(0)], path).read_bytes() == first


@pytest.mark.parametrize("records", [[], [{"kind": "start"}], [{"kind": "epoch", "epoch": 0, "seconds": 1.0}]])
def test_nothing_to_draw_is_refused(records, tmp_path):
    with pytest.raises(ValueError, match=f"nothing to draw in {len(records)} records"):
        plot.draw_curves(records, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


# -- bars ------------------------------------------------------------------------------------------------------------


def test_bars_show_each_accuracy_of_each_network(figures):
    rows = [
        {"name": "undefended", "accuracies": {"clean": 0.985, "fgsm": 0.21, "pgd-20": 0.0}},
        {"name": "robust", "accuracies": {"clean": 0.962, "pgd-20": 0.81}},
    ]
    plot.draw_comparison(rows, "unused.png")
    (axes,) = figures[0].axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert list(heights) == ["clean", "FGSM", "PGD-20"]
    assert heights["clean"] == pytest.approx([98.5, 96.2]) and heights["PGD-20"] == pytest.approx([0.0, 81.0])
    assert [text.get_text() for text in axes.texts] == ["98.5", "96.2", "21.0", "n/a", "0.0", "81.0"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["undefended", "robust"]
    bars = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(right < left for (_, right), (left, _) in itertools.pairwise(bars)), "bars stand side by side"
    assert len({bar.get_facecolor() for bar in axes.patches}) == 3


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "nothing to compare"),
        ([{"name": "a", "accuracies": {}}], "nothing to compare"),
        ([{"name": "a", "accuracies": {"clean": 97.0}}], "a: clean accuracy must be in .0, 1., got 97.0"),
        ([{"name": "a", "accuracies": {"clean": float("nan")}}], "must be in .0, 1."),
    ],
)
def test_accuracies_that_are_none_are_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot.draw_comparison(rows, tmp_path / "bars.png")
