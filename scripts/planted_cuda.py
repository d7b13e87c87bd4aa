"""The errors that planted_errors.py plants in the CUDA kernels of the mixed operation, as they run on the host."""

from __future__ import annotations

from planted_table import Planted, rows

VALUES = "mixed_op_cuda test_values_and_all_gradients"
ALONE = "mixed_op_cuda test_every_primitive_alone"
NANS = "mixed_op_cuda nan_propagates"
WINNERS = "mixed_op_cuda a_nan_wins"
SPOILT = "mixed_op_cuda a_nan_spoils"
TIES = "mixed_op_cuda ties_go"
TWICE = "mixed_op_cuda test_second_derivatives"
SCALES = "mixed_op_cuda test_image_scales and not some"
ORDER = "mixed_op_cuda_contract in_every_order"
NUMBERS = "mixed_op_cuda_halves every_number_is_read_and_rounded"
ONCE = "mixed_op_cuda_halves rounded_once"


def on_host(file: str, *table: tuple[str, ...]) -> list[Planted]:
    """The rows of one file of csrc/cuda/."""
    return rows(f"cuda/{file}", *((f"cuda {name}", *rest, "host") for name, *rest in table))


ELEMENT = on_host(
    "element.h",
    ("element: bfloat16 cut off", NUMBERS, "", "host::rounded_shift(bits, 16)", "bits >> 16"),
    ("element: a tie goes up", NUMBERS, "uint32_t rounded_shift(", "rest == half && whole % 2 == 1", "rest == half"),
    ("element: no half below the normal ones", NUMBERS, "Half from_float(", "exponent >= 102", "exponent >= 113"),
    ("element: small halves read at half their size", NUMBERS, "float to_float(Half value)", "-24", "-25"),
    ("element: a large half is no infinity", NUMBERS, "Half from_float(", "exponent >= 143", "exponent >= 160"),
)  # fmt: skip

PASSES = on_host(
    "mixed/passes.h",
    ("passes: any alignment of halves", "mixed_op_cuda_halves refuse_what", "bool takes_vectors(",
     "reinterpret_cast<uintptr_t>(address) % bytes == 0;", "bytes > 0;"),
)  # fmt: skip

VECTOR = on_host(
    "mixed/vector.h",
    ("vector: relu loses NaN", NANS, "float rectified(", "largest(value, 0.0f)", "value > 0.0f ? value : 0.0f"),
    ("vector: NaN is no maximum", NANS, "float largest(", "a > b || a != a", "a > b"),
)  # fmt: skip

STAGE = on_host(
    "mixed/stage.h",
    ("stage: odd pixels of the wrong column", ALONE, "Part part_of(", "channels, 1, 1, 1}", "channels, 1, 1, 0}"),
    ("stage: the padding gets the norm's shift", VALUES, "", "(inside ? shift_.v[k] : 0.0f)", "shift_.v[k]"),
    ("stage: a part for the whole", ALONE, "bool whole(", "first == 0 && last == channels && ", ""),
    ("stage: a matrix of taps in one piece", ALONE, "bool whole(", " && input_stride == 1", ""),
    ("stage: a tie goes to the last", TIES, "Vec<V> max_pool(",
     "value.v[k] > best.v[k] ||", "value.v[k] >= best.v[k] ||"),
    ("stage: NaN is no winner", WINNERS, "Vec<V> max_pool(", " || value.v[k] != value.v[k]", ""),
    ("stage: the average counts the padding", ALONE, "struct PoolWindow", "(bottom - top) * (right - left)", "9"),
    ("stage: outputs of stride 2 at stride 1", ALONE, "void convolve(",
     "window[kStep * i + column]", "window[i + column]"),
    ("stage: dilated outputs in the wrong columns", ALONE, "int column_of(",
     "group / 2 * (2 * kPixels) + group % 2 + 2 * pixel", "group * kPixels + pixel"),
    ("stage: sums of what lies outside", VALUES, "void column_sums(",
     "if (pixel % tiling.tile_width < tile.width) sum", "sum"),
    ("stage: one part for another", ALONE, "void make_outputs(", "first ? store<V>(to, value) : add_to<V>(to, value)",
     "store<V>(to, value)"),
    ("stage: ones are halves", ALONE, "", "return filled<V>(1.0f)", "return filled<V>(0.5f)"),
    ("stage: a direction through a closed ReLU", TWICE, "Vec<V> at(const T* row, int x)",
     "value.v[k] > 0.0f ? (normed_", "true ? (normed_"),
    ("stage: the direction of another winner", TWICE, "", "+ winner[k] / 3", "+ 1"),
)  # fmt: skip

FORWARD = on_host(
    "mixed/forward.h",
    ("moments: of the values", VALUES, "struct Moments",
     "value(pixel, channel) - mean[channel]", "value(pixel, channel)"),
    ("moments: between tiles", VALUES, "struct FinishMoments",
     " + distance * distance * count * other_count / all", ""),
    ("node: no scale of the image", SCALES, "struct Node", " * scale_of(task.scales, tile.n)", ""),
    ("node: a shift for every part", ALONE, "struct Node", "task.shift && first_part ?", "task.shift ?"),
    ("node: rounded between two launches", ONCE, "struct Node", ": store<V>(known, value)",
     ": store<V>(known, rounded<T>(value))"),
    ("moments: a thread ahead of the others", ORDER, "struct Moments", "means[channel] = mean[channel];",
     "means[channel] = mean[channel] + 0 * (mean[(channel + 1) % channels] *= 1.25f);"),
)  # fmt: skip

BACKWARD = on_host(
    "mixed/backward.h",
    ("slope: the mean of g", VALUES, "struct SlopeAt", "g.v[k] - b0.v[k] - (y", "g.v[k] - (y"),
    ("slope: one scale too few", VALUES, "struct FinishProducts", "product * inverse * inverse / count",
     "product * inverse / count"),
    ("sums: no shift in the gradient of a weight", VALUES, "struct FinishProducts",
     "gamma * product * inverse + beta * sum", "gamma * product * inverse"),
    ("sums: no scale of the image", SCALES, "struct Products", ", task.scales, tile.n)", ", nullptr, tile.n)"),
    ("pointwise: no scale of the image", SCALES, "void make_gradients(", ", task.scales, tile.n)",
     ", nullptr, tile.n)"),
    ("pointwise: the last tile alone", VALUES, "void add_outer_products(", "to = first ? value : to + value",
     "to = value"),
    ("middle: no ReLU", VALUES, "struct Middle", "g.v[k] = entered.v[k] > 0.0f ? g.v[k] : 0.0f;", ""),
    ("middle: kernels not turned", VALUES, "struct Middle", "tiling, tile, channels, true,",
     "tiling, tile, channels, false,"),
    ("weights: a row of taps too low", VALUES, "void add_rows(",
     "- reach + tap * stage.dilation", "+ tap * stage.dilation"),
    ("weights: what lies behind the border", SPOILT, "void add_rows(",
     "if (x + (begin + i) * spacing >= width) continue;", ""),
    ("weights: dilated pixels next to each other", ALONE, "void add_rows(",
     "stage.stride == 1 ? stage.dilation : 1", "1"),
)  # fmt: skip

GATHER = on_host(
    "mixed/gather.h",
    ("gather: kernels not turned", VALUES, "struct Gather", "tiling, tile, channels, true,",
     "tiling, tile, channels, false,"),
    ("gather: rounded between two nodes", ONCE, "struct Gather", ": store<V>(known, sum)",
     ": store<V>(known, rounded<T>(sum))"),
    ("pools: read on fixed statistics", WINNERS, "struct Pools", "batch_statistics && task.slope.rows",
     "task.slope.rows"),
    ("pools: read without a norm", WINNERS, "struct Pools", "batch_statistics && task.slope.rows", "true"),
    ("pools: no scale of the image", SCALES, "struct Pools", ", task.scales, tile.n)", ", nullptr, tile.n)"),
    ("gather: no scale of the image", SCALES, "struct Gather", ", edge.scales, n)", ", nullptr, n)"),
    ("gather: all are winners", ALONE, "void add_pool(", "item.winners[from + k - item.d] == row * 3 + column", "true"),
    ("gather: what was there", VALUES, "struct Gather", "edge.base.data ? load", "false ? load"),
    ("gather: an identity's weight", VALUES, "struct Gather", "*edge.weight * g.v[k]", "g.v[k]"),
)  # fmt: skip

FORWARD_PASS = on_host(
    "mixed/forward_pass.h",
    ("cell: pools of another state", VALUES, "void measure(",
     "if (source == edge.source) slot = known;", "slot = known;"),
)  # fmt: skip

BACKWARD_PASS = on_host(
    "mixed/backward_pass.h",
    ("cell: the scales of the images twice", SCALES, "void pointwise(", "is_middle ? nullptr : scales", "scales"),
    ("cell: ones have the sums of an identity", VALUES, "void last_norms(", "-1, memory.partials[3]",
     "-1, memory.partials[2]"),
    ("cell: the gradients of later nodes", VALUES, "gathered(", "node == plan_.shape.nodes - 1;", "true;"),
)  # fmt: skip

PLANTED_CUDA = [*ELEMENT, *PASSES, *VECTOR, *STAGE, *FORWARD, *BACKWARD, *GATHER, *FORWARD_PASS, *BACKWARD_PASS]
