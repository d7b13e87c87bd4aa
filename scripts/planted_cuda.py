"""The errors that planted_errors.py plants in the CUDA kernels of the mixed operation, as they run on the host."""

from __future__ import annotations

from planted_table import Planted, rows

VALUES = "mixed_op_cuda test_values_and_all_gradients"
ALONE = "mixed_op_cuda test_every_primitive_alone"
NANS = "mixed_op_cuda nan_propagates"
TIES = "mixed_op_cuda ties_go"
TWICE = "mixed_op_cuda test_second_derivatives"
ORDER = "mixed_op_cuda_contract in_every_order"


def on_host(file: str, *table: tuple[str, ...]) -> list[Planted]:
    """The rows of one file of csrc/cuda/mixed/."""
    return rows(f"cuda/mixed/{file}", *((f"cuda {name}", *rest, "host") for name, *rest in table))


STAGE = on_host(
    "stage.h",
    ("stage: odd pixels of the wrong column", ALONE, "Part part_of(", "channels, 1, 1, 1}", "channels, 1, 1, 0}"),
    ("stage: the padding gets the norm's shift", VALUES, "", "(inside ? shift_.v[k] : 0.0f)", "shift_.v[k]"),
    ("stage: relu loses NaN", NANS, "void load_all(", "found[j].v[k] < 0.0f ? 0.0f : found[j].v[k]",
     "found[j].v[k] > 0.0f ? found[j].v[k] : 0.0f"),
    ("stage: a tie goes to the last", TIES, "Vec<V> max_pool(",
     "value.v[k] > best.v[k] ||", "value.v[k] >= best.v[k] ||"),
    ("stage: NaN is no maximum", NANS, "Vec<V> max_pool(", " || value.v[k] != value.v[k]", ""),
    ("stage: the average counts the padding", ALONE, "struct PoolWindow", "(bottom - top) * (right - left)", "9"),
    ("stage: outputs of stride 2 at stride 1", ALONE, "void convolve(",
     "window[kStep * i + column]", "window[i + column]"),
    ("stage: dilated outputs in the wrong columns", ALONE, "int column_of(",
     "group / 2 * (2 * kPixels) + group % 2 + 2 * pixel", "group * kPixels + pixel"),
    ("stage: sums of what lies outside", VALUES, "void column_sums(",
     "if (pixel % tiling.tile_width < tile.width) sum", "sum"),
    ("stage: one part for another", ALONE, "void make_outputs(", "first ? store<V>(to, value) : add_to<V>(to, value)",
     "store<V>(to, value)"),
    ("stage: a direction through a closed ReLU", TWICE, "Vec<V> at(const float* row, int x)",
     "value.v[k] > 0.0f ? (normed_", "true ? (normed_"),
    ("stage: the direction of another winner", TWICE, "", "+ winner[k] / 3", "+ 1"),
)  # fmt: skip

FORWARD = on_host(
    "forward.h",
    ("moments: of the values", VALUES, "struct Moments",
     "value(pixel, channel) - mean[channel]", "value(pixel, channel)"),
    ("moments: between tiles", VALUES, "struct FinishMoments",
     " + distance * distance * count * other_count / all", ""),
    ("node: a shift for every part", ALONE, "struct Node", "task.shift && first_part ?", "task.shift ?"),
    ("moments: a thread ahead of the others", ORDER, "struct Moments", "means[channel] = mean[channel];",
     "means[channel] = mean[channel] + 0 * (mean[(channel + 1) % channels] *= 1.25f);"),
)  # fmt: skip

BACKWARD = on_host(
    "backward.h",
    ("slope: the mean of g", VALUES, "struct SlopeAt", "g.v[k] - b0.v[k] - (y", "g.v[k] - (y"),
    ("slope: one scale too few", VALUES, "struct FinishProducts", "product * inverse * inverse / count",
     "product * inverse / count"),
    ("sums: no shift in the gradient of a weight", VALUES, "struct FinishProducts",
     "gamma * product * inverse + beta * sum", "gamma * product * inverse"),
    ("pointwise: the last tile alone", VALUES, "void add_outer_products(", "to = first ? value : to + value",
     "to = value"),
    ("middle: no ReLU", VALUES, "struct Middle", "g.v[k] = entered.v[k] > 0.0f ? g.v[k] : 0.0f;", ""),
    ("middle: kernels not turned", VALUES, "struct Middle", "tiling, tile, channels, true,",
     "tiling, tile, channels, false,"),
    ("weights: a row of taps too low", VALUES, "void add_rows(",
     "- reach + tap * stage.dilation", "+ tap * stage.dilation"),
)  # fmt: skip

GATHER = on_host(
    "gather.h",
    ("gather: kernels not turned", VALUES, "struct Gather", "tiling, tile, channels, true,",
     "tiling, tile, channels, false,"),
    ("gather: all are winners", ALONE, "void add_pool(", "item.winners[from + k - item.d] == row * 3 + column", "true"),
    ("gather: what was there", VALUES, "struct Gather", "edge.base.data ? load", "false ? load"),
    ("gather: an identity's weight", VALUES, "struct Gather", "*edge.weight * g.v[k]", "g.v[k]"),
)  # fmt: skip

FORWARD_PASS = on_host(
    "forward_pass.h",
    ("cell: pools of another state", VALUES, "void measure(",
     "if (source == edge.source) slot = known;", "slot = known;"),
)  # fmt: skip

BACKWARD_PASS = on_host(
    "backward_pass.h",
    ("cell: the gradients of later nodes", VALUES, "gathered(", "node == plan_.shape.nodes - 1;", "true;"),
)  # fmt: skip

PLANTED_CUDA = [*STAGE, *FORWARD, *BACKWARD, *GATHER, *FORWARD_PASS, *BACKWARD_PASS]
