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
PASSES_OF_CHANNELS = "mixed_op_cuda more_channels_than"


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

MATRIX = on_host(
    "matrix.h",
    ("matrix: the left one's first half alone", VALUES, "void add(",
     "multiply_add(warp, rest[m][n], a.low, b[n].high);", ""),
    ("matrix: the right one's first half alone", VALUES, "void add(",
     "multiply_add(warp, rest[m][n], a.high, b[n].low);", ""),
    ("matrix: an infinity less itself", "mixed_op_cuda infinities", "struct Split", " + 0x1000u", ""),
    ("matrix: NaN rounds to a number", NANS, "struct Split", "bits_of(value) & ~0x1fffu",
     "(bits_of(value) + 0x1000u) & ~0x1fffu"),
    ("matrix: a step ahead", VALUES, "void add(", "right(k + right_row(lane, i)", "right(k + 1 + right_row(lane, i)"),
)  # fmt: skip

STAGE = on_host(
    "mixed/stage.h",
    ("stage: odd pixels of the wrong column", ALONE, "Part part_of(", "channels, 1, 1, 1}", "channels, 1, 1, 0}"),
    ("stage: the padding gets the norm's shift", VALUES, "", "(raw.inside ? shift_.v[k] : 0.0f)", "shift_.v[k]"),
    ("stage: a part for the whole", ALONE, "bool whole(", "first == 0 && last == channels && ", ""),
    ("stage: a matrix of taps in one piece", ALONE, "bool whole(", " && input_stride == 1", ""),
    ("stage: a direction through a closed ReLU", TWICE, "Vec<V> made(const Raw& raw)",
     "value.v[k] > 0.0f ? (normed_", "true ? (normed_"),
)  # fmt: skip

DEPTHWISE = on_host(
    "mixed/depthwise.h",
    ("depthwise: both parities share a piece", ALONE, "struct Layout", "(y & (split - 1)) * 2 * piece + ", ""),
    ("depthwise: every piece has the first taps", ALONE, "int tap(", "first_column + column * apart", "column * apart"),
    ("depthwise: pieces of the taps overwrite", ALONE, "void convolve(", "window.first_row + window.first_column > 0",
     "false"),
    ("depthwise: taps of the next piece", ALONE, "struct PieceOfKernel", "row < rows && ", ""),
    ("depthwise: kernels never turned", VALUES, "void convolve(", "count * all - 1 - at : at", "at : at"),
    ("depthwise: always the first channels", PASSES_OF_CHANNELS, "void fill(", "from(begin + vector * V)",
     "from(vector * V)"),
    ("depthwise: always the first channels' weights", PASSES_OF_CHANNELS, "void convolve(",
     "stage.depthwise[begin * all + at]", "stage.depthwise[at]"),
    ("depthwise: always into the first channels", PASSES_OF_CHANNELS, "void convolve_strips(",
     "shared.inputs + begin + channel", "shared.inputs + channel"),
    ("depthwise: rows beyond the tile", VALUES, "void convolve_strips(", "if (i * window.split >= outputs) break;",
     ""),
    ("depthwise: stride 1 for all", ALONE, "void fill(", "reader.column(x + column * step)",
     "reader.column(x + column)"),
)  # fmt: skip

TILE = on_host(
    "mixed/tile.h",
    ("tile: a tie goes to the last", TIES, "Vec<V> max_pool(",
     "value.v[k] > best.v[k] ||", "value.v[k] >= best.v[k] ||"),
    ("tile: NaN is no winner", WINNERS, "Vec<V> max_pool(", " || value.v[k] != value.v[k]", ""),
    ("tile: the average counts the padding", ALONE, "int seen(", "1 + (middle > 0) + (middle + 1 < size)", "3"),
    ("tile: sums of what lies outside", VALUES, "void column_sums(",
     "if (tiling.column_of(pixel) < tile.width) sum", "sum"),
    ("tile: one part for another", ALONE, "void make_outputs(", "first ? store(to, value) : add_to(to, value)",
     "store(to, value)"),
    ("tile: ones are halves", ALONE, "", "return filled<V>(1.0f)", "return filled<V>(0.5f)"),
    ("tile: what lies behind the last channel", VALUES, "void multiply_matrices(", "k < channels ? left(",
     "true ? left("),
    ("tile: a warp's first product alone", PASSES_OF_CHANNELS, "void multiply_matrices(",
     "item < items; item += kWarps", "item < smaller(items, kWarps); item += kWarps"),
    ("tile: the direction of another winner", TWICE, "", "+ winner[k] / 3", "+ 1"),
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
    ("pointwise: one warp of a block alone", VALUES, "void add_outer_products(", "split < splits; ++split) sum",
     "split < 1; ++split) sum"),
    ("pointwise: what was kept is not read", "mixed_op_cuda_halves test_values_and_all_gradients",
     "void make_gradients(",
     "task.kept ? load<V>(kept.at(tile.n, tile.y + row, tile.x + column) + channel) : load<V>(y)", "load<V>(y)"),
)  # fmt: skip

DEPTHWISE_BACKWARD = on_host(
    "mixed/depthwise_backward.h",
    ("middle: no ReLU", VALUES, "struct Middle", "g.v[k] = entered.v[k] > 0.0f ? g.v[k] : 0.0f;", ""),
    ("middle: kernels not turned", VALUES, "struct Middle", "Turn::half", "Turn::none"),
    ("weights: a row of taps too low", VALUES, "void sum_taps(",
     "tile.y * stage.stride - reach + window.first_row", "tile.y * stage.stride + window.first_row"),
    ("weights: what lies behind the border", SPOILT, "void add_strip(",
     "if (!tile.holds(strip.y(i), strip.x(j))) continue;", ""),
    ("weights: strips across the border as others", SPOILT, "void add_strip(",
     "if (tile.holds(strip.y(kStrip - 1), strip.x(kStrip - 1))) {", "if (true) {"),
    ("weights: pieces of the taps in one place", ALONE, "void sum_taps(", "window.tap(row, column)] = all;",
     "row * window.kernel + column] = all;"),
    ("weights: the last tile alone", VALUES, "void sum_taps(", "index < tiling.count(); index += slabs",
     "index < smaller(slabs, static_cast<int>(tiling.count())); index += slabs"),
    ("weights: always the first channels", PASSES_OF_CHANNELS, "void sum_taps(", "(block.x * channels + begin)",
     "(block.x * channels)"),
    ("weights: one thread of a channel alone", VALUES, "void sum_taps(", "group < groups; ++group) all",
     "group < 1; ++group) all"),
)  # fmt: skip

GATHER = on_host(
    "mixed/gather.h",
    ("gather: kernels not turned", VALUES, "struct Gather", "Turn::half", "Turn::none"),
    ("gather: rounded between two nodes", ONCE, "struct Gather", ": store<V>(known, sum)",
     ": store<V>(known, rounded<T>(sum))"),
    ("pools: read on fixed statistics", WINNERS, "struct Pools", "batch_statistics && task.slope.rows",
     "task.slope.rows"),
    ("pools: read without a norm", WINNERS, "struct Pools", "batch_statistics && task.slope.rows", "true"),
    ("pools: no scale of the image", SCALES, "struct Pools", ", task.scales, tile.n)", ", nullptr, tile.n)"),
    ("gather: no scale of the image", SCALES, "struct Gather", ", edge.scales, n)", ", nullptr, n)"),
    ("gather: all are winners", ALONE, "void add_pool(", "winners.v[k] == row * 3 + column", "true"),
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

PLANTED_CUDA = [
    *(*ELEMENT, *PASSES, *VECTOR, *MATRIX, *STAGE, *DEPTHWISE, *TILE),
    *(*FORWARD, *BACKWARD, *DEPTHWISE_BACKWARD, *GATHER, *FORWARD_PASS, *BACKWARD_PASS),
]
