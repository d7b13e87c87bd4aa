"""The errors that planted_errors.py plants, by file in the order of the data flow.

A row: what the error is; the tests that must notice (the file without "test_", then what -k selects); the function in
which the original text occurs once ("" where that is the whole file); the original; its replacement; and, where the
text counts for one instruction set only, its name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Planted:
    """One error: the file under csrc, the tests that are to notice it, and what to write in the place of what."""

    name: str
    file: str
    tests: tuple[str, str]
    inside: str
    original: str
    replacement: str
    level: str = ""


def rows(file: str, *table: tuple[str, ...]) -> list[Planted]:
    """The rows of one file of csrc/."""
    found = []
    for name, tests, *rest in table:
        stem, expression = tests.split(" ", 1)
        found.append(Planted(name, file, (f"tests/test_{stem}.py", expression), *rest))
    return found


ALONE = "mixed_op every_primitive_alone"
WAITING = "mixed_op edges_that_wait"
SAMPLED = "mixed_op test_sampled_cells"
SOME_SAMPLED = "mixed_op some_gradients_of_sampled"
MATRIX = "mixed_op 1x1_convolutions_on_batch"
MATRIX_THREADS = "mixed_op 1x1_convolutions_that"
POOLS = "mixed_op gradients_of_a_pool"
SCALES = "mixed_op test_image_scales and not level and not some"
EDGE = "mixed_op test_edge and (affine or other) and not skip"
WIDE = "mixed_op every_simd_level_and_number_of_channels"
TIES = "mixed_op ties_go"
DENSE = f"{ALONE} and conv_3x3"
CELL = "mixed_op test_cell and (darts-train or darts-eval)"
MASKS = "mixed_op second_derivatives_on_masks or (only_the_gradients and inputs)"
TWICE = "mixed_op second_derivatives_of_an_edge"
LAYER = "relu_conv_norm modes_and_layouts and contiguous or test_second_derivatives"
WIDE_DENSE = "mixed_op every_simd_level_with_candidates"
OWN = "mixed_op every_edge_with_candidates_of_its_own"
LAST = "mixed_op last_node"
ONES = f"{OWN} and another"
JOIN = "partial values_and_gradients or any_number_of_edges"
ARRANGED = "partial arranged_as_pytorch"
PLANES = "mixed_op memory_formats"
UNUSUAL = "fused compiled_code_leaves"
STEM = "conv_norm modes_and_layouts and contiguous or kernels"
PATCHES = "conv_norm patches_are_those_of_unfold"

VECTOR = rows(
    "cpu/mixed/vector.h",
    ("vector: a tie goes to the last", TIES, "Bits beats(", "_CMP_GT_OQ", "_CMP_GE_OQ", "avx512"),
    ("vector: a tie goes to the last, baseline", TIES, "Bits beats(", "candidate > best", "candidate >= best",
     "baseline"),
    ("vector: NaN is no maximum", "mixed_op nan_propagates", "Bits beats(",
     " |\n         RNAS_MASKED(cmp_ps_mask)(candidate, candidate, _CMP_UNORD_Q)", "", "avx512"),
    ("vector: relu loses NaN", "mixed_op nan_propagates", "Vector relu(", "_mm512_setzero_ps(), x",
     "x, _mm512_setzero_ps()", "avx512"),
    ("vector: a gradient at zero", TIES, "Bits positive(", "_CMP_NLE_UQ", "_CMP_NLT_UQ", "avx512"),
    ("vector: a gradient at zero, baseline", "relu_conv_norm relu_of_zero", "Bits positive(", "x <= Vector{}",
     "x < Vector{}", "baseline"),
    ("vector: no gradient at NaN", "relu_conv_norm nan_propagates", "Bits positive(", "_CMP_NLE_UQ", "_CMP_GT_OQ",
     "avx512"),
)  # fmt: skip

CONVOLUTION = rows(
    "cpu/mixed/convolution.h",
    ("depthwise: pairs of rows lose the last row of the kernel", f"{ALONE} and sep_conv", "void depthwise_block(",
     "y - r >= Kernel)", "y - r >= Kernel - 1)"),
    ("depthwise: pairs of rows, second row on the taps of the first", f"{ALONE} and sep_conv", "void depthwise_block(",
     "((y - r) * Kernel + kx)", "((y < Kernel ? y : y - r) * Kernel + kx)"),
    ("depthwise: stride 1 without dilation", f"{ALONE} and dil_conv", "void depthwise_block(",
     "fma(x[p + kx * Dilation]", "fma(x[p + kx]"),
    ("depthwise: stride 2 without dilation", f"{ALONE} and dil_conv", "void depthwise_block(",
     "fma(x[p + kx * Dilation / 2]", "fma(x[p + kx / 2]"),
    ("depthwise: stride 2 on even columns alone", f"{ALONE} and sep_conv", "void depthwise_block(",
     "(2 * c + parity) * kLanes", "2 * c * kLanes"),
    ("depthwise: never adds", EDGE, "void depthwise_block(", "Add ? load(out + r * out_row + p * kLanes) : zero()",
     "zero()"),
    ("depthwise: pairs of rows add the first row twice", CELL, "void depthwise_block(", "Add ? load(out + r * out_row",
     "Add ? load(out + 0 * out_row"),
    ("depthwise: four last pixels without stride", "mixed_op large_images or threads_and_same", "void depthwise_row(",
     "4, Rows, Add>(in + x * Stride * kLanes", "4, Rows, Add>(in + x * kLanes", "avx512"),
    ("depthwise: single last pixels without stride", EDGE, "void depthwise_row(",
     "1, Rows, Add>(in + x * Stride * kLanes", "1, Rows, Add>(in + x * kLanes"),
    ("depthwise: an odd last row is written beside the others", f"{ALONE} and sep_conv", "void depthwise_rows(",
     "1, Add>(in + r * Stride * row", "1, Add>(in + r * row"),
    ("depthwise transposed: no dilation", f"{ALONE} and dil_conv", "void depthwise_transposed_row(",
     "i + half - ky * Dilation", "i + half - ky"),
    ("depthwise transposed: an odd last column is lost", f"{ALONE} and sep_conv", "void depthwise_transposed_row(",
     "(width - parity + 1) / 2", "(width - parity) / 2"),
    ("depthwise weights: a tap is dropped", f"{ALONE} and sep_conv", "void depthwise_weight_rows(",
     "kx < Kernel; ++kx) sum[ky][kx] = fma(v[", "kx < Kernel - 1; ++kx) sum[ky][kx] = fma(v["),
    ("depthwise weights: stride 2 without dilation", f"{ALONE} and dil_conv", "void depthwise_weight_rows(",
     "fma(load(r + (p * Stride + kx * Dilation) * kLanes), gx", "fma(load(r + (p * Stride + kx) * kLanes), gx"),
    ("depthwise weights: last pixels without stride", f"{ALONE} and sep_conv or test_edge",
     "void depthwise_weight_rows(", "(x * Stride + kx * Dilation) * kLanes;", "(x + kx * Dilation) * kLanes;"),
    ("depthwise weights: the rows of a kernel are split wrongly", f"{ALONE} and sep_conv_5x5", "",
     "<5, 1, Stride, 3, 2>", "<5, 1, Stride, 3, 1>"),
    ("depthwise weights: the last row of a dilated kernel", f"{ALONE} and dil_conv_5x5", "",
     "<5, Dilation, Stride, 4, 1>", "<5, Dilation, Stride, 3, 1>"),
    ("pointwise: two groups add the first twice", WIDE, "void pointwise_block(", "load(y + v * y_plane",
     "load(y + 0 * y_plane"),
    ("pointwise: eight last pixels", WIDE, "void pointwise_groups(", "8, Add>(d + p * kLanes", "8, Add>(d", "avx512"),
    ("pointwise: four last pixels", ALONE, "void pointwise_groups(", "4, Add>(d + p * kLanes", "4, Add>(d", "avx512"),
    ("pointwise: single last pixels", ALONE, "void pointwise_groups(", "1, Add>(d + p * kLanes",
     "1, Add>(d + p / 4 * 4 * kLanes"),
    ("pointwise: an odd last group has the weights of the first", WIDE, "void pointwise(",
     "pointwise_groups<1, Add>(d, d_plane, groups_in, w + v * kLanes",
     "pointwise_groups<1, Add>(d, d_plane, groups_in, w"),
    ("pointwise weights: the last pixel is lost", ALONE, "void pointwise_weight_block(", "p < pixels;",
     "p + 1 < pixels;"),
    ("pointwise weights: both halves into one", WIDE, "void pointwise_weight_groups(",
     "acc + (group * kLanes + lane) * row", "acc + (group * kLanes + 0 * lane) * row"),
    ("pointwise weights: an odd last group of outputs", WIDE, "void pointwise_weight_groups(",
     "Fetches>(d + group * d_plane, g + v * g_plane", "Fetches>(d + group * d_plane, g"),
)  # fmt: skip

WINOGRAD = rows(
    "cpu/mixed/winograd.h",
    ("winograd: odd taps of a kernel, 2x2", f"{DENSE} and eval", "", "even = 0.5 * (k[0] + k[2]), odd = 0.5 * k[1]",
     "even = 0.5 * (k[0] + k[2]), odd = -0.5 * k[1]"),
    ("winograd: odd taps of a kernel, 4x4", f"{DENSE} and train", "", "odd_q = of_q * q * k[1]", "odd_q = of_q * k[1]"),
    ("winograd: the middle tap's gradient, 2x2", f"{DENSE} and eval", "", "to[1] = 0.5 * (s[1] - s[2])",
     "to[1] = 0.5 * (s[1] + s[2])"),
    ("winograd: the last tap's gradient, 4x4", f"{DENSE} and train", "", "+ qq * even_q + s[5]", "+ qq * even_q"),
    ("winograd: a position of a window, 2x2", f"{DENSE} and eval", "", "to[3] = d[1] - d[3]", "to[3] = d[1] + d[3]"),
    ("winograd: a position of a window, 4x4", f"{DENSE} and train", "", "fma(minus_sum, d[3], d[5])",
     "fma(minus_sum, d[2], d[5])"),
    ("winograd: an output, 2x2", f"{DENSE} and eval", "", "(m[1] - m[2]) - m[3]", "(m[1] - m[2]) + m[3]"),
    ("winograd: an output, 4x4", f"{DENSE} and train", "", "fma(set(qq * q), odd_q, m[5])",
     "fma(set(qq), odd_q, m[5])"),
    ("winograd: a position of a gradient, 2x2", f"{DENSE} and eval", "", "to[3] = zero() - g[1]", "to[3] = g[1]"),
    ("winograd: a position of a gradient, 4x4", f"{DENSE} and train", "", "odd_p = fma(set(pp), g[3], g[1])",
     "odd_p = fma(set(pp), g[2], g[1])"),
    ("winograd: rows and columns of a kernel swapped", DENSE, "void kernel_positions(", "to[kSide * i + j]",
     "to[kSide * j + i]"),
    ("winograd: rows and columns of a kernel's gradient swapped", DENSE, "void kernel_gradient(const Wide* sums",
     "taps[3 * y + x]", "taps[3 * x + y]"),
    ("winograd: windows without their first columns", DENSE, "void windows_forward(", "columns[1][i] = d[Outputs + 1]",
     "columns[1][i] = d[Outputs]"),
    ("winograd: columns beyond the image are written", "mixed_op test_small_images or go_together",
     "void window_output(", "if (x < columns) store", "if (x <= columns) store"),
    ("winograd: gradients of the first window", DENSE, "void windows_gradient(", "g += Outputs * kLanes, to", "to"),
    ("winograd: a run that begins within a row", "mixed_op large_images", "void window_rows(", "x = first % across",
     "x = 0"),
)  # fmt: skip

POOL = rows(
    "cpu/mixed/pool.h",
    ("max pool: the middle wins against the last", f"{ALONE} and max_pool", "Vector of_second(", "w.second & ~w.third",
     "w.second"),
    ("max pool: the first wins whenever the middle does not", f"{ALONE} and max_pool", "Vector of_first(",
     "~(w.second | w.third)", "~w.second"),
    ("max pool: the same at stride 1", f"{ALONE} and max_pool", "Vector collect(", "~(after.second | after.third)",
     "~after.second"),
    ("pools: the border belongs to the image", f"{ALONE} and pool", "void along(",
     "(size_out - 1) * stride + 1 < size", "(size_out - 1) * stride < size"),
    ("max pool: winners above and below swapped along a direction", MASKS, "void max_pool_linear(",
     "route(down[y * s.width_out + x], above, load(at), below)",
     "route(down[y * s.width_out + x], below, load(at), above)"),
    ("max pool: no stride along a direction", MASKS, "void max_pool_linear(",
     "at = in + y * row + x * s.stride * kLanes", "at = in + y * row + x * kLanes"),
    ("max pool backward: nothing above the second row", f"{ALONE} and max_pool", "void max_pool_backward(",
     "if (y > 0) add_to(at - step, of_first", "if (y > 1) add_to(at - step, of_first"),
    ("average pool: divides by nine", f"{ALONE} and avg_pool", "void average_pool(",
     "set(1.0f / static_cast<float>(inside_rows * (1 + left.value + right.value)))",
     "set(1.0f / static_cast<float>(3 * inside_rows))"),
    ("average pool backward: divisors of stride 1", f"{ALONE} and avg_pool", "void average_pool_backward(",
     "inside(y * s.stride, s.height)", "inside(y, s.height)"),
    ("average pool backward: nothing from the next row", f"{ALONE} and avg_pool", "void average_pool_transposed(",
     "if (last.value) sum = fma(below", "if (false) sum = fma(below"),
    ("average pool backward: all columns of three", f"{ALONE} and avg_pool", "void average_pool_transposed(",
     "x > 1 && x + 2 < s.width", "x > 0 && x + 2 < s.width"),
    ("average pool backward: nothing to the last column", CELL, "void average_pool_backward(",
     "if (x * s.stride + 1 < s.width) add_to", "if (x + 1 < s.width_out) add_to"),
)  # fmt: skip

PLAN = rows(
    "cpu/mixed/plan.h",
    ("halo: windows read beyond it", "mixed_op go_together", "int64_t halo_of(", "return 1 + std::max(",
     "return std::max("),
    ("halo: windows that end beyond the image", DENSE, "int64_t halo_of(", "conv.winograd - pixels",
     "conv.winograd - pixels > 9"),
    ("halo: not dilated", f"{ALONE} and dil_conv", "int64_t halo_of(", "static_cast<int>(conv.dilation)", "1"),
    ("halo: shifted parts", f"{ALONE} and skip", "int64_t halo_of(",
     "std::max({most, std::abs(part.dy), std::abs(part.dx)})", "0"),
    ("factorized reduce: no offset to the right", f"{ALONE} and skip", "Convolution factorized_reduce(",
     "part(even, odd, c, 1, plan.theta, 1, 1)", "part(even, odd, c, 1, plan.theta, 1, 0)"),
    ("sums: in float32 over whole images", "mixed_op global_mean", "", "kSum = 64", "kSum = 65536"),
    ("dense: a result channels first", PLANES, "bool asked_dense(", " && !shape.planes_out", ""),
    ("dense: gradients channels first", PLANES, "bool gradient_dense(", " && !shape.planes_grad", ""),
    ("dense convolution: rows and columns swapped", f"{ALONE} and conv_3x3", "Convolution dense(",
     "tap / kernel - kernel / 2, tap % kernel - kernel / 2", "tap % kernel - kernel / 2, tap / kernel - kernel / 2"),
)  # fmt: skip

PACKING = rows(
    "cpu/mixed/packing.h",
    ("parameters: the kernel is not flipped", f"{ALONE} and sep_conv", "inline void pack(", "(taps - 1 - tap)", "tap"),
    ("parameters: no scale in the transposed matrix", EDGE, "inline void pack(",
     "to.backward[part.packed + output * padded + input] = factor * from",
     "to.backward[part.packed + output * padded + input] = from"),
    ("parameters: no scale at Winograd's positions", f"{DENSE} and eval", "void pack_positions(",
     "factor * __builtin_convertvector", "__builtin_convertvector"),
    ("parameters: the kernels are not turned round", DENSE, "void pack_positions(", "Backward ? 8 - tap : tap", "tap"),
    ("parameters: blocks of Winograd's matrices at one place", WIDE_DENSE, "void pack_positions(",
     "row * padded + first", "row * padded"),
    ("parameters: gradients of kernels of the first thread", "mixed_op go_together", "void kernel_gradients(",
     "each < count", "each < 1"),
    ("parameters: gradients of kernels without the scale", DENSE, "inline void unpack_kernels(",
     "(scale ? scale[output] : 1.0f)", "1.0f"),
    ("parameters: gradients without the scale of the norm", EDGE, "inline void unpack(",
     "(scale ? scale[output] : 1.0f)", "(scale && !output ? scale[output] : 1.0f)"),
    ("parameters: gradients of the first thread alone", "mixed_op threads_and_same", "inline void unpack(",
     "each < count", "each < 1"),
    ("sums of weights: what is beyond the channels stays", "mixed_op gradient_that_is_not_finite",
     "void add_up_windows(", "at < matrix", "at < plan.shape.channels * padded"),
    ("sums of weights: windows are counted again", "mixed_op go_together or huge_image", "void add_up_windows(",
     "store(now + p * plan.matrix_step(), zero());", ""),
    ("sums of weights: counted again at the next flush", "mixed_op threads_and_same or sums_over", "struct WeightSums",
     "now[at] = 0;", ""),
)  # fmt: skip

PLANES_OF_IMAGES = rows(
    "cpu/mixed/planes.h",
    ("planes: whole blocks alone", PLANES, "void visit_planes(", "p = begin + whole; p < end", "p = end; p < end"),
    ("planes: the first group alone", PLANES, "void visit_planes(", "channel / kLanes * pixels * kLanes + ", ""),
    ("planes: one channel of a rest", PLANES, "void visit_planes(", "plane + each * pixels + p", "plane + p"),
    ("planes: large squares of another order", PLANES, "void turn(Square<16>", "_mm512_set1_epi32(8)",
     "_mm512_set1_epi32(7)", "avx512"),
    ("planes: rows next to each other", PLANES, "void load_planes(", "pixels, to + dense, kLanes",
     "4, to + dense, kLanes"),
    ("planes: a result next to each other", PLANES, "void store_planes(", "kLanes, to + plane, pixels",
     "kLanes, to + plane, 4"),
)  # fmt: skip

IMAGES = rows(
    "cpu/mixed/images.h",
    ("gradient: zero for no node", LAST, "void begin_gradient(", "if (at < 0)", "if (state < plan.shape.inputs)"),
    ("gradient: planes of the first node for all", PLANES, "void begin_gradient(", "(n * pixel + at)", "n * pixel"),
    ("node: the first that is asked for not stored", LAST, "void store_node(", "at < 0", "at <= 0"),
    ("node: planes of all at one place", PLANES, "void store_node(", "(n * pixel + at)", "n * pixel"),
    ("state: gradients of all images at one place", PLANES, "void store_gradient(", " + n * pixels * c", ""),
    ("state: gradients channels last", PLANES, "void store_gradient(", "plan.shape.planes_grad", "false"),
    ("node: all at one place", CELL, "void store_node(", "* pixel + at, pixel", "* pixel + at / 2, pixel"),
    ("state: masks of the first group alone", "mixed_op every_simd_level_in_a_cell or second_derivatives_on_masks",
     "void load_relu(", "signs[group * pixels + y", "signs[y"),
    ("state: a direction past the relu", TWICE, "void load_relu_linear(", "keep(positive(v), along)", "along"),
    ("mid: masks in front of the shift", MASKS, "void load_mid(", "= positive(v)",
     "= positive(load(from + x * kLanes))"),
    ("mid: no scale", ALONE, "void load_mid(", "fma(load(from + x * kLanes), a, b)", "load(from + x * kLanes) + b"),
    ("mid: a direction without the shift", TWICE, "void load_mid_linear(", "+ x * kLanes) + b)", "+ x * kLanes))"),
)  # fmt: skip

WINDOWS = rows(
    "cpu/mixed/windows.h",
    ("windows: an image's first row in every band", "mixed_op large_images", "void store_windows(",
     "* height + y) * width", "* height) * width"),
    ("windows: rows of a bundle's first image alone", "mixed_op go_together", "RNAS_INLINE void runs(",
     "image * down() < end", "image == y / down()"),
    ("windows: the last row is not written", f"{DENSE} and train", "void store_windows(", "height - y, width",
     "height - y - 1, width"),
    ("windows: all images at the place of the first", "mixed_op go_together", "void store_windows(",
     "(image * plan.groups + group)", "group"),
    ("windows backward: gradients of the first image", "mixed_op go_together", "void weigh_windows(",
     "grad.at(image).data", "grad.at(0).data"),
    ("windows backward: sums in float32 alone", "mixed_op huge_image", "void weigh_windows(", "since + size > kFlush",
     "since < 0"),
)  # fmt: skip

STAGE = rows(
    "cpu/mixed/stage.h",
    ("gather: no stride between chunks", "mixed_op large_images", "void gather(",
     "(first * conv.stride - half) * in.row", "(first - half) * in.row"),
    ("gather: no shift to the side", f"{ALONE} and conv_3x3", "void gather(", "+ part.dx * kLanes", ""),
    ("convolve: every part overwrites", ALONE, "void convolve(", "Add || part.adds ?", "Add ?"),
    ("convolve backward: shifted to the wrong side", f"{ALONE} and conv_3x3", "void convolve_image_backward(",
     "conv.stride + part.dy", "conv.stride - part.dy"),
    ("convolve backward: a chunk's first row", "mixed_op large_images",
     "void convolve_image_backward(", "const int64_t y = (first + r)", "const int64_t y = r"),
    ("convolve backward: sums in float32 alone, pointwise", "mixed_op huge_image",
     "void convolve_image_backward(", "first - flushed >= band", "first - flushed >= band * 1000"),
    ("convolve backward: sums in float32 alone, depthwise", "mixed_op huge_image",
     "void convolve_image_backward(", "if (y > 0) add_up(conv, *sums, weights, taps * kLanes);", ""),
    ("convolve backward: a band of rows without stride", "mixed_op huge_image",
     "void convolve_image_backward(", "(y * conv.stride - half) * in.row", "(y - half) * in.row"),
    ("moments: runs at the same mean", "mixed_op large_images", "void add_moments(", " + delta * delta * between", ""),
    ("moments: the own mean is not taken off", EDGE, "void add_moments(", " - rest * rest * exact", ""),
    ("moments: short runs lose a pixel", EDGE, "void add_moments(", "for (; p < count; ++p)",
     "for (; p + 1 < count; ++p)"),
    ("moments: later runs count too much", "mixed_op sums_over_a_large or large_images", "void add_moments(",
     "total = before + start + count", "total = before + count"),
    ("moments: around zero", "relu_conv_norm far_from_zero", "void add_moments(", "pivot *= set(1.0f / kFirst)",
     "pivot *= set(0.0f)"),
    ("dots: no mean taken off the last pixels", EDGE,
     "inline void add_dot(const Plan& plan, const float* g, int64_t g_plane",
     "fma(v, load(ys + p * kLanes) - k, a[0])", "fma(v, load(ys + p * kLanes), a[0])"),
    ("dots: only the first pixels of a large image", "mixed_op sums_over_a_large",
     "inline void add_dot(const Plan& plan, const float* g, const float* y", "const int64_t at = start * kLanes;",
     "const int64_t at = 0 * kLanes;"),
)  # fmt: skip

NORMS = rows(
    "cpu/mixed/norms.h",
    ("norm: no eps", EDGE, "void set_norm(", "variance[channel] + in.eps", "variance[channel]"),
    ("norm: no gamma", EDGE, "void set_norm(", "static_cast<float>(gamma * inverse)", "static_cast<float>(inverse)"),
    ("moments: images at the same mean", EDGE, "void merge_moments(", " + delta * delta * between", ""),
    ("batch gradient: no mean term", EDGE, "void batch_gradient(", "-a * sum[c] / count + ", ""),
    ("batch gradient: slope around zero", EDGE, "void batch_gradient(", " + slope * n.mean[at]", ""),
    ("batch gradient: slope once normalised", EDGE, "void batch_gradient(", "a * inverse * inverse * dot",
     "a * inverse * dot"),
    ("batch gradient: outputs of the first group", WIDE, "inline Rows apply(",
     "at = group * plan.plane_out() + row", "at = row"),
)  # fmt: skip

BATCH = rows(
    "cpu/mixed/batch.h",
    ("batch: another node kept", CELL, "float* node(", "kept(node, 0)", "kept(0, 0)"),
    ("batch: kernels in the forward order alone", DENSE, "void pack_all(", "!backward ? Order::forward",
     "true ? Order::forward"),
    ("batch: mids over the nodes", CELL, "float* mid(", "plan_.kept_nodes() + edge", "edge"),
)  # fmt: skip

MATRICES = rows(
    "cpu/mixed/matrices.h",
    ("matrices: rows of the first alone", MATRIX, "void load_rows(", "+ first * state.width * state.pixel", ""),
    ("matrices: no pivot", MATRIX, "void load_rows(", "pivot ? r -", "false ? r -"),
    ("matrices: past the relu", MATRIX, "void load_rows(", "r = relu(v)", "r = v"),
    ("matrices: what is in float32 is counted again", MATRIX_THREADS, "double* total()", "now_[at] = 0;", ""),
    ("matrices: the first group with itself alone", MATRIX, "void add_symmetric(", "padded_ / kLanes - group", "1"),
    ("matrices: pixels of the first run again", MATRIX, "void runs(", "use(start * kLanes, count)",
     "use(0, count)"),
    ("matrices: sums of rows around no pivot", MATRIX, "void add_sum(", " + static_cast<double>(count_) * pivot_[c]",
     ""),
    ("matrices: squares around the pivot", MATRIX, "void add_squares(", " - own[a] * own[b]", ""),
    ("matrices: threads at one mean", MATRIX_THREADS, "void add_squares(", "count * (away[a] * away[b]",
     "count * (own[a] * own[b]"),
    ("matrices: the sum of the rows that give the pivot stays", MATRIX, "void begin(", "sum_[c] = 0;", ""),
    ("matrices: half a covariance", MATRIX, "inline void merge(", "to.matrix[b * padded + a] = ", ""),
    ("matrices: terms that cancel are trusted", "mixed_op terms_cancel", "bool output_moments(",
     "exact = exact && !(variance[output] < least * terms);", ""),
    ("matrices: without their scale", MATRIX, "void pack_matrix(", "(scale ? scale[output] : 1.0)", "1.0"),
)  # fmt: skip

MATRICES_FORWARD = rows(
    "cpu/mixed/matrices_forward.h",
    ("matrices: covariances of the states before", MATRIX, "void begin_covariance(", "sums.clear();", "(void)sums;"),
    ("matrices: without the mixing weight", MATRIX, "void settle_matrices(",
     "static_cast<double>(mixing(edges[i])[edge.matrix]) *", ""),
    ("matrices: counted around the pivot", "mixed_op terms_cancel", "void count_outputs(", "mean[output] +=",
     "mean[output] +=  0 *"),
    ("matrices: a chunk's moments alone", "mixed_op terms_cancel", "void count_outputs(",
     "first * plan_.width_out, {to", "0, {to"),
)  # fmt: skip

NODE_SUMS = rows(
    "cpu/mixed/node_sums.h",
    ("batch: constants are not added", EDGE, "void add(const Sum& sum",
     "constant = load(sum.constant.data() + group * kLanes)", "constant = zero()"),
    ("batch: last pixels of a term", EDGE, "void add(const Sum& sum",
     "for (int64_t i = 0; i < size; ++i) total[i] = fma(load(at",
     "for (int64_t i = 1; i < size; ++i) total[i] = fma(load(at"),
    ("batch: every pass sets its nodes", CELL, "void begin_pass(", "adds = begun_[node]", "adds = false"),
    ("batch: the last node of one pass alone", SAMPLED, "void add(const Sum& sum", "before = sum.to + base",
     "before = image + group * plan_.plane_out()"),
    ("batch: an average pool that waits elsewhere", SAMPLED, "void leave(", "waits ? nullptr : avg_", "avg_"),
    ("batch: every node goes through the scratch", SAMPLED, "void begin_pass(", "source + 1 == plan_.states() && ", ""),
    ("batch: the last node from where it is not", SAMPLED, "float* last_node(",
     "!due_.empty() && due_.back().passes_on", "false"),
    ("batch: ones added nowhere", WAITING, "void leave(", " || edge.ones >= 0;", ";"),
    ("batch: ones without their weight", ONES, "void leave(", "+= w[edge.ones]", "+= 1.0f"),
    ("batch: a node without candidates is not set", WAITING, "void begin_pass(",
     "!due[node] || (begun_[node] && !left_[node].any)", "!due[node] || !left_[node].any"),
    ("batch: what has memory of its own waits", CELL, "void begin_pass(",
     "!left_[node].terms.empty() || node", "node"),
    ("batch: a node that an identity reads is not there", WAITING, "void begin_pass(", "due[read] = true",
     "(void)read"),
    ("batch: identity without its weight", EDGE, "void leave(", "? w[edge.skip] : 0.0f", "? 1.0f : 0.0f"),
    ("matrices: no constant", MATRIX, "void leave(", "if (edge.matrix >= 0) add_constant", "if (false) add_constant"),
    ("matrices: the first row's product", MATRIX, "void add_product(", " + first * plan_.width_out * kLanes", ""),
    ("scales: not of what is added", SCALES, "Sum of_image(", "factor *= scale(term.edge, n)", "factor *= 1.0f"),
    ("scales: not of identities", SCALES, "Sum of_image(", "each.skip *= scale(each.edge, n)", "each.skip *= 1.0f"),
    ("scales: not of constants", SCALES, "Sum of_image(", "scale(each.edge, n) * each", "each"),
    ("scales: those of the first edge", SCALES, "void leave(", "Term term{e, data", "Term term{0, data"),
)  # fmt: skip

BATCH_FORWARD = rows(
    "cpu/mixed/batch_forward.h",
    ("batch: pools without their norms", EDGE, "void forward_source(", "if (!arrived) settle", "if (false) settle"),
    ("batch: pools in front of what is added", CELL, "void begin_image(", "add_due(s, n);  //", "//"),
    ("batch: a node that is asked for not stored", CELL, "void finish_state(", "if (now.asked)",
     "if (false)"),
    ("batch: states arrive nowhere", EDGE, "void first_stage(", "arrived ? begin_image(s, n) : arrive(now, thread, n)",
     "begin_image(s, n)"),
    ("batch: what waits is not finished", SAMPLED, "void begin_image(",
     "finish_state(waiting_[each], s, n, pooled(s));", ""),
    ("batch: what waits is added to nothing", SAMPLED, "void begin_image(", "add_delayed(each, s, n);", ""),
    ("batch: norms behind pools wait for nobody", SAMPLED, "void forward_source(",
     "(!plan_.shape.pool_norm || (!now.max && !now.avg))", "true"),
)  # fmt: skip

MATRICES_BACKWARD = rows(
    "cpu/mixed/matrices_backward.h",
    ("matrices: products of the state before", MATRIX, "void begin_products(", "each.clear();", "(void)each;"),
    ("matrices: products with the first rows", MATRIX, "void matrix_products(", " + first * plan_.width_out * kLanes",
     ""),
    ("matrices: the first edge alone goes back", MATRIX, "void settle_matrices(",
     "sum += back[i][input * padded + c]", "sum += i ? 0.0 : back[i][input * padded + c]"),
    ("matrices: around no mean", MATRIX, "void settle_matrices(", "all -= sum * mean[input];", ""),
    ("matrices: a gradient that has begun is lost", MATRIX, "void matrix_gradients(", "begun ? load", "false ? load"),
    ("matrices: back past the relu", MATRIX, "void matrix_gradients(",
     "keep(positive(load(r + p)), load(behind + p) + constant)", "load(behind + p) + constant"),
    ("matrices: around the rounded mean", "mixed_op 1x1 and far_from_zero", "void settle_matrix(",
     "product -= grad_sum[output] * (of.mean[input] - pivot_[input]);", "(void)product;"),
    ("matrices: mean gradients go back", MATRIX, "void settle_matrix(", "constant[input] -= weight * mean;", ""),
    ("matrices: no slope in the gradient of weights", MATRIX, "void settle_matrix(",
     "slope[output] * count() * behind", "0.0 * behind"),
    ("matrices: gradients of the first thread", MATRIX_THREADS, "void settle_matrix(", "products[at] += each[at]",
     "products[at] = each[at]"),
)  # fmt: skip

GRADIENTS = rows(
    "cpu/mixed/gradients.h",
    ("batch: gradient of gamma without the mixing weight", EDGE, "void norm_gradients(", "(factor * normalised)",
     "(normalised)"),
    ("batch: mixing gradient without beta", EDGE, "void norm_gradients(", " + norms_.beta[at] * sum[channel]", ""),
    ("batch: no sum of a gradient", CELL, "void finish_gradient(",
     "dot(s, gradient(state, n), nullptr, nullptr, image_sums(state, n));", ""),
    ("batch: the last gradient does not begin", LAST, "void begin_last(",
     "begin_gradient(plan_, grad_out_, last, n, gradient(last, n));", ""),
    ("scales: not in sums of gradients", SCALES, "std::vector<double> edge_sum(", "scale(e, n) * image_sums",
     "image_sums"),
    ("batch: gradients of states go nowhere", PLANES, "void finish_gradient(",
     "store_gradient(plan_, gradient(state, n), state, n, grad_.states[state]);", ""),
)  # fmt: skip

POOLS_BACKWARD = rows(
    "cpu/mixed/pools_backward.h",
    ("batch: an identity on every edge", OWN, "Leaving leaving(", "if (edge.skip >= 0) found", "found"),
    ("batch: an average pool on every edge", OWN, "Leaving leaving(", "if (edge.avg >= 0) found", "found"),
    ("batch: pools backward without the mean term", EDGE, "void pool_gradients(", "constant += load(",
     "constant -= load("),
    ("batch: gradient past the last pixels", EDGE, "void weighted(",
     "for (int64_t q = 0; q < size; ++q) sum[q] = fma(", "for (int64_t q = 1; q < size; ++q) sum[q] = fma("),
    ("batch: pools begin a gradient once more", EDGE, "void pool_gradients(", "!begun && !sets", "!sets"),
    ("batch: pools do not begin a gradient", f"{ALONE} and pool", "void pool_gradients(",
     "if (!begun && !sets", "if (false && !sets"),
    ("batch: an average pool sets what a max pool has begun", SAMPLED, "void pool_gradients(",
     "transposed && from.with_pool[0].empty()", "transposed"),
    ("batch: a transposed pool sets what there is", SAMPLED, "void pool_gradients(", "begun || !sets", "false"),
    ("batch: the first of several transposed pools alone", SAMPLED, "bool transposes(", "with_pool[1].size() == 1",
     "with_pool[1].size() > 0"),
    ("batch: pools are transposed for nobody", SOME_SAMPLED, "bool transposes(", " && wanted(source)", ""),
    ("batch: transposed pools of stride 2", SAMPLED, "bool transposes(", "pool_shape(state).stride == 1", "true"),
    ("batch: a transposed pool without its weight", SAMPLED, "void transposed_average(",
     "set(mixing(e)[plan_.edges[e].avg] * scale(e, n))", "set(scale(e, n))"),
    ("batch: one pixel of two in a transposed pool's product", SAMPLED, "void transposed_average(",
     "product[0] + product[1]", "product[0]"),
    ("batch: the first pixels of a transposed pool's rows", SAMPLED, "void transposed_average(", "(q - begin) * kLanes",
     "(q - p) * kLanes"),
    ("scales: not in a transposed pool's product", SAMPLED, "void transposed_average(",
     "static_cast<double>(scale(e, n)) * all[lane]", "all[lane]"),
    ("batch: an identity adds to nothing", OWN, "void pool_gradients(", "begun || pools ? to", "true ? to"),
    ("batch: what norms look at is forgotten", EDGE, "float* pooled(", "plan_.shape.pool_norm ?", "false ?"),
    ("batch: mixing gradient of a pool without norm", EDGE, "void settle_pools(",
     "mixing_grad = std::accumulate(dots.begin(), dots.end(), 0.0)", "mixing_grad = dots[0]"),
    ("batch: a pool without norm by another weight", EDGE, "void set_pools(", "[mix];", "[0];"),
    ("batch: a pool without norm and a slope", EDGE, "void set_pools(", "to.b[c] = to.d[c] = 0",
     "to.b[c] = to.d[c] = 1"),
    ("batch: products of pools only where weights are learnt", POOLS, "bool has_dots(",
     " || plan_.shape.pool_norm", ""),
    ("scales: not behind pools", SCALES, "void pool_gradients(", " * set(scale(e, n))", ""),
    ("scales: not behind identities", SCALES, "void pool_gradients(", " * scale(e, n)); });", "); });"),
    ("scales: not in products of pools", SCALES, "void pool_dots(", "edge_dot(s, e, n, to,",
     "dot(s, gradient(edge.target, n), to,"),
    ("scales: not in products of identities", SCALES, "void pool_dots(", "edge_dot(s, e, n, x,",
     "dot(s, gradient(plan_.edges[e].target, n), x,"),
    ("batch: winners only where products are asked for", POOLS, "void pool_dots(",
     "from.with_pool[0].empty() && !average", "!average"),
)  # fmt: skip

BATCH_BACKWARD = rows(
    "cpu/mixed/batch_backward.h",
    ("batch: ones without a gradient", ONES, "void backward(", "if (plan_.edges[e].ones >= 0)", "if (false)"),
    ("batch: weights of second stages are not flushed", EDGE, "void backward_second(",
     "flush(thread, branch.last(), n, n + 1, end);", ""),
    ("batch: through the mid without relu", EDGE, "void through_mid(",
     "keep(positive(load(mid + x * kLanes)), load(s.mid_grad + at + x * kLanes))",
     "load(s.mid_grad + at + x * kLanes)"),
    ("batch: to the state without relu", EDGE, "void through_relu(",
     "keep(positive(load(x + column * kLanes)), load(behind + at + column * kLanes))",
     "load(behind + at + column * kLanes)"),
    ("batch: the first branch's gradient is lost", EDGE, "void backward_state(", "convolve_backward<true>",
     "convolve_backward<false>"),
    ("batch: added to a gradient that has not begun", EDGE, "void backward_state(", "if (begun_[edge.source])",
     "if (true)"),
    ("batch: every edge begins the gradient of its state", CELL, "void backward_state(", "if (begun_[edge.source])",
     "if (false)"),
    ("batch: a gradient that nothing is added to", "mixed_op passes_a_gradient_on", "void add_gradients(",
     "pool_gradients(source.from, source.index, source.state, s, n, source.begun || matrices);", ""),
    ("matrices: pools begin the gradient", MATRIX, "void add_gradients(", "source.begun || matrices)",
     "source.begun)"),
    ("batch: pools behind every edge", LAST, "bool backward_edge(", "e == source.from.last", "true"),
    ("matrices: products in every edge's pass", MATRIX, "bool backward_edge(", "e == source.from.first", "true"),
    ("batch: pools behind an edge and once more", OWN, "void backward_source(", "finished |=", "finished ="),
    ("batch: pools in front of their norms' sums", EDGE, "void backward_source(", "at_once = !",
     "at_once = true || !"),
    ("batch: pools behind their norms and once more", LAST, "void backward_source(", "if (!at_once && wanted",
     "if (wanted"),
    ("batch: what waits has begun", OWN, "void backward_source(", "source.begun = begun_[index]",
     "source.begun = true"),
    ("batch: nobody catches up", LAST, "void begin_image(", "catch_up(scratch_[thread], n);", ""),
    ("batch: caught up and not settled", LAST, "void settle(const Source& source)", "settle();", ""),
    ("batch: nobody catches up in front of norms behind pools", "mixed_op test_cell and parameters",
     "void backward_source(", "catch_up(s, n);", ""),
    ("scales: not in products of outputs that were kept", SCALES, "bool backward_edge(", "edge_dot(s, e, n, out",
     "dot(s, g, out"),
    ("scales: not in products of outputs", SCALES, "bool backward_edge(", "rescale(e, n, to);", ""),
    ("scales: not behind second stages", SCALES, "void backward_second(", "scale(e, n)", "1.0f"),
    ("scales: not behind first stages", SCALES, "void backward_state(", "scale(e, n + i)", "1.0f"),
    ("scales: behind both stages", SCALES, "void backward_state(", "two ? 1.0f : scale", "scale"),
    ("scales: those of a bundle's first image", "mixed_op image_scales_of_images", "void backward_state(",
     "scale(e, n + i)", "scale(e, n)"),
    ("batch: what waits at the end is lost", OWN, "void catch_up()", "if (!waiting_.empty()) each", "if (false) each"),
)  # fmt: skip

FIXED = rows(
    "cpu/mixed/fixed.h",
    ("fixed: ones without their weight", ONES, "void prepare(", "+= mixing(e)[edge.ones]", "+= 1.0f"),
    ("fixed: another node kept", CELL, "float* node_of(", "kept(all, node, n)", "kept(all, 0, n)"),
    ("fixed: mids over the nodes", CELL, "float* kept_mid(", "plan_.kept_nodes() + ", ""),
    ("fixed: every image in the workspace", MASKS, "State state_of(", "node.image = 0", "(void)node"),
    ("fixed: constants without their weight", EDGE, "void prepare(", "+= mixing(e)[mix] * norms_.row", "+= norms_.row"),
    ("fixed: no constant of the average pool", EDGE, "void prepare(", "add(edge.avg, edge.avg_norm);", ""),
    ("fixed: the mixing weight on both stages", EDGE, "void prepare(", "(last ? mixing(e)[branch.mix] : 1.0f)",
     "mixing(e)[branch.mix]"),
    ("fixed: masks of a state overlap", MASKS, "explicit MaskLayout(",
     "plan.groups * plan.height(state) * plan.width(state)));", "plan.groups * plan.pixels_out()));"),
    ("fixed: masks of the winners overlap", MASKS, "explicit MaskLayout(",
     "plan.max ? 2 * plan.groups * plan.pixels_out() : 0", "plan.max ? plan.groups * plan.pixels_out() : 0"),
    ("fixed: masks of the first image", MASKS, "", "masks_ + n * layout_.size", "masks_ + 0 * n * layout_.size"),
)  # fmt: skip

FIXED_FORWARD = rows(
    "cpu/mixed/fixed_forward.h",
    ("double backward: constants along a direction", TWICE, "void forward_image(", "linear ? zero() : load(", "load("),
    ("double backward: winners of the direction", TWICE, "void forward_pools(",
     "if (linear && !masks_ && plan_.leaves(",
     "if (linear) load_dense(plan_, v, n, s.state_grad);\n    if (linear && !masks_ && plan_.leaves("),
    ("double backward: a mid past the relu, on masks", MASKS, "void load_mid_signed(",
     "keep(signs[at], load(v + at * kLanes))", "load(v + at * kLanes)"),
    ("double backward: a state past the relu, on masks", MASKS, "void load_signed(",
     "keep(signs[(group * v.height + y) * v.width + x], value)", "value"),
)  # fmt: skip

FIXED_BACKWARD = rows(
    "cpu/mixed/fixed_backward.h",
    ("fixed: ones without a gradient", ONES, "void finish_parameters(", "if (edge.ones >= 0) settle",
     "if (false) settle"),
    ("fixed: ones move along a direction", "mixed_op second_derivatives_with_candidates and another",
     "void finish_parameters(", "linear ? std::vector<double>(padded) : grad_sum", "grad_sum"),
    ("fixed: to the state without relu", EDGE, "void backward_source(",
     "keep(signs[at], load(s.state_grad + at * kLanes))", "load(s.state_grad + at * kLanes)"),
    ("fixed: through the mid without relu", EDGE, "void backward_mid(",
     "keep(signs[at], load(s.mid_grad + at * kLanes))", "load(s.mid_grad + at * kLanes)"),
    ("fixed: sums of a mid set by the last image", EDGE, "void backward_mid(",
     "local.mid_sum + branch.kept * plan_.padded", "local.mid_sum"),
    ("fixed: the last image's weights are not flushed", EDGE, "void run_backward(",
     "plan_.flushes(conv, n, n + 1, end)", "plan_.flushes(conv, n, n + 1, end + 1)"),
    ("fixed: dots of one image", EDGE, "void backward_pools(", "at[lane] += lanes[lane]", "at[lane] = lanes[lane]"),
    ("fixed: mixing gradient of all outputs from the first half", EDGE, "std::vector<double> output_dots(",
     "input * plan_.padded + part.first + row]", "input * plan_.padded + row]"),
    ("fixed: gradient of gamma without the mixing weight", EDGE, "void finish_parameters(", "(factor * normalised)",
     "(normalised)"),
    ("fixed: mixing gradient without beta", EDGE, "void finish_parameters(",
     "(linear ? 0.0 : norms_.beta[at] * sum[channel])", "0.0 * norms_.beta[at]"),
    ("double backward: the mean counts", TWICE, "void finish_parameters(", "(linear ? 0.0 : norms_.mean[at]",
     "(norms_.mean[at]"),
    ("fixed: an average pool from every state", OWN, "void backward_pools(", "if (plan_.leaves(source, &Edge::avg))",
     "if (plan_.avg)"),
    ("double backward: pools of the state", TWICE, "void backward_pools(",
     "if (linear) load_dense(plan_, v, n, s.state_grad);", ""),
    ("double backward: weights on the state", TWICE, "void backward_source(",
     "if (linear) load_relu_linear(plan_, x, v, n, tile);", ""),
    ("double backward: weights on the mid", TWICE, "void backward_mid(", "if (linear) load_mid_linear(",
     "if (false) load_mid_linear("),
)  # fmt: skip

RELU_CONV_NORM = rows(
    "cpu/relu_conv_norm.cpp",
    ("layer: no eps", LAYER, "void set_norm(", " + in_.eps", ""),
    ("layer: blocks at the same mean", "relu_conv_norm large_images or one_pixel_far", "void merge_moments(",
     " + delta * delta * count * size / total", ""),
    ("layer: not shifted", LAYER, "void normalise(", "fma(load_part(at, lanes), scale, shift)",
     "load_part(at, lanes) * scale"),
    ("layer: mean not taken off", LAYER, "void normalised(", "(load(y) - mean) * inverse", "load(y) * inverse"),
    ("layer: gradient sums of the first block", "relu_conv_norm large_images", "void gradient_sums(",
     "block < blocks_; ++block", "block < 1; ++block"),
    ("layer: gradient sums of one pixel", LAYER, "void gradient_sums(", "b[i % 2] += g;", "b[i % 2] = g;"),
    ("layer: no mean term", LAYER, "void backward(", "(-a * sum[c] / in_.pixels)", "(-0.0 * sum[c] / in_.pixels)"),
    ("layer: masks of the first group", "relu_conv_norm narrow_graph or second_derivatives_on_masks",
     "void load_relu(", "signs[(p + i) * groups_in_ + group]", "signs[(p + i) * groups_in_]"),
    ("layer: masks of the first chunk", "relu_conv_norm narrow_graph or second_derivatives_on_masks", "void mask(",
     "signs[(p + i) * groups_in_ + group]", "signs[i * groups_in_ + group]"),
    ("layer: a relu where there is none", STEM, "void load_relu(", "in_.relu ? relu(v) : v", "relu(v)"),
    ("layer: a gradient past a relu that is not there", STEM, "void backward(", "if (in_.relu) mask(", "mask("),
    ("layer: no x for the weights of a stem", STEM, "void backward(", "grad_weight || (in_.relu && !signs)",
     "(in_.relu && !signs)"),
    ("layer: signs where there is no relu", "conv_norm gradient_to_the_images", "int64_t masks(",
     "in_.relu ? in_.pixels * groups_in_ : 0", "in_.pixels * groups_in_"),
    ("layer: weights without the scale of the norm", LAYER, "void finish_weights(", "(scale ? scale[k] : 1.0f)",
     "(scale ? 1.0f : 1.0f)"),
    ("layer: weights are not flushed", LAYER, "void backward(", "if (grad_weight) l.weights.add_up(",
     "if (false) l.weights.add_up("),
    ("layer: weights of the first thread alone", "relu_conv_norm threads_and_same", "void finish_weights(",
     "for (const Local& l : locals_) sum += l.weights", "for (const Local& l : {locals_[0]}) sum += l.weights"),
    ("layer double backward: a direction past the relu", LAYER, "void double_backward(",
     "mask(signs, l.gx, p, count, l.d)", "(void)signs"),
    ("layer double backward: a relu where there is none", "conv_norm second_derivatives", "void double_backward(",
     "        if (in_.relu) {", "        if (true) {"),
    ("layer double backward: gradient of gamma unnormalised", LAYER, "void double_backward(", "(sum * inverse_[k])",
     "(sum)"),
)  # fmt: skip

PGD_MATH = rows(
    "include/rnas/pgd_step_math.h",
    ("pgd: the box before the ball", "pgd_step inside_the_ball or (equals_the_float64 and linf)",
     "static RNAS_HOST_DEVICE T linf(", "box(clamp(moved, add(x, -epsilon), add(x, epsilon)), lower, upper)",
     "clamp(box(moved, lower, upper), add(x, -epsilon), add(x, epsilon))"),
    ("pgd: a step at a zero gradient", "pgd_step zero_gradient", "static RNAS_HOST_DEVICE T sign(", "g > T(0)",
     "g >= T(0)"),
    ("pgd: sign of NaN", "pgd_step nan_stays", "static RNAS_HOST_DEVICE T sign(", "g != g ? g : ", ""),
    ("pgd: zeros keep their sign", "pgd_step zeros_come_out", "T box(", "add(clamp(v, lower, upper), T(0))",
     "clamp(v, lower, upper)"),
    ("pgd: NaN is clamped", "pgd_step nan_stays", "T clamp(", "return low != low ? low : both;", "return both;"),
    ("pgd: divided by a zero norm", "pgd_step zero_gradient", "T divisor(", "norm == T(0) ? T(1) : norm", "norm"),
    ("pgd: grown to the ball", "pgd_step equals_the_float64 and l2", "T shrink(", "norm <= epsilon ? T(1) : ", ""),
    ("pgd: l2 without the perturbation so far", "pgd_step equals_the_float64 and l2", "T l2_delta(",
     "add(add(x_adv, mul(", "add(add(x, mul("),
)  # fmt: skip

PGD = rows(
    "cpu/pgd_step.cpp",
    ("pgd: epsilon of the first sample", "pgd_step own_epsilon", "T epsilon(", "(step.epsilons)[n]",
     "(step.epsilons)[0 * n]"),
    ("pgd: the last values of a norm", "pgd_step equals_the_float64 and l2", "double sum_of_squares(",
     "for (int64_t lane = 0; i < end; ++i, ++lane)", "for (int64_t lane = 0; i + 1 < end; ++i, ++lane)"),
    ("pgd: the last part of a norm", "pgd_step equals_the_float64 and l2", "double norm(", "p < kParts; ++p) sum",
     "p + 1 < kParts; ++p) sum"),
    ("pgd: squares in float32", "pgd_step small_gradient", "void l2_sample(", "double(grad[i])",
     "double(grad[i] * grad[i])"),
)  # fmt: skip

TABLES = rows(
    "cpu/once/tables.cpp",
    ("averages: biased variance", "fused averages_move", "", "share * unbias * norm", "share * norm"),
    ("averages: cumulative with the old count", "fused averages_move", "", "static_cast<double>(*norm.batches)",
     "static_cast<double>(*norm.batches - 1)"),
    ("averages: batches are not counted", "fused averages_move", "", "++*norm.batches", "(void)*norm.batches"),
    ("averages: momentum the wrong way round", "fused averages_move", "", "(1.0 - share) * norm.mean[c] + share",
     "share * norm.mean[c] + (1.0 - share)"),
    ("concatenate: all at the beginning", "mixed_op test_cell and nas", "", "out = std::copy_n", "std::copy_n"),
)  # fmt: skip

GATHERED = rows(
    "cpu/once/patches.cpp",
    ("patches: the border of the first row", PATCHES, "void gather_patches(", "- s.padding + ky", "+ ky"),
    ("patches: zeros at the right border", PATCHES, "Inside(int64_t tap", "(size - 1 + padding - tap) / stride + 1",
     "(size - 1 + padding - tap) / stride"),
    ("patches: zeros at the left border", PATCHES, "Inside(int64_t tap", "(padding - tap + stride - 1) / stride",
     "(padding - tap + stride) / stride"),
    ("patches: rows beyond the border", PATCHES, "void gather_patches(", "y < 0 || y >= s.height", "y < 0"),
    ("patches: of the first channel", PATCHES, "void gather_patches(", "c * s.strides[1]", "0 * c"),
    ("patches transposed: rows between the strides", PATCHES, "void scatter_patches(", "above % s.stride || ", ""),
    ("patches transposed: rows below", PATCHES, "void scatter_patches(", " || above / s.stride >= s.height_out", ""),
    ("patches transposed: no sum", PATCHES, "void scatter_patches(", "+= from[x * size]", "= from[x * size]"),
    ("patches transposed: onto what was there", PATCHES + " or modes_and_layouts", "void scatter_patches(",
     "to[c * s.strides[1] + x * s.strides[3]] = 0", "(void)to"),
)  # fmt: skip

JOINED = rows(
    "cpu/join_channels.cpp",
    ("join: no shuffle", JOIN, "Join(const JoinShape&", "order_[c * shape.groups + group]", "order_[group * each + c]"),
    ("join: one channel of what was mixed", JOIN, "void rows(", "= through[c]", "= through[0]"),
    ("join: no scales", JOIN, "float scale(", "scales_ ? scales_[e] : 1.0f", "1.0f"),
    ("join: of the first image", JOIN, "const float* around(", "+ n * arounds_[e].image", ""),
    ("join: rows as the first edge's lie", JOIN, "void rows(", "(begin + p) * arounds_[e].step",
     "(begin + p) * arounds_[0].step"),
    ("join: a plane in parts of the first", JOIN, "void planes(", "arounds_[e].step + begin", "arounds_[e].step"),
    ("join: gradients without scales", JOIN, "void spread(", "g * set(scale(e))", "g"),
    ("join: of the last edge's products", JOIN, "void spread(", "products[e] = fma(", "products[0] = fma("),
    ("join: sums of the last part alone", JOIN, "void add_up(", "sums[e] += each", "sums[e] = each"),
    ("join: sums of the last image alone", JOIN, "void backward(", "sum += sums[", "sum = sums["),
    ("join: gradients of mixed in the order of the result", JOIN, "void rows_backward(",
     "buffer[order_[c]] = gradient[c]", "buffer[c] = gradient[c]"),
    ("join: planes of mixed gradients", JOIN, "void planes_backward(", "order_[c] - mixed_begin_] =", "0] ="),
)  # fmt: skip

FOUR = rows(
    "cpu/four.h",
    ("transpose: within a block", ARRANGED, "void four_by_four(", "shuffle(a, b, right), shuffle(c, d, left)",
     "shuffle(c, d, left), shuffle(a, b, right)"),
)  # fmt: skip

TRANSPOSED = rows(
    "cpu/once/transpose.cpp",
    ("transpose: rows next to each other", ARRANGED, "void transpose(", "channel * row + pixel",
     "channel * columns + pixel"),
    ("transpose: pixels next to each other", ARRANGED, "void transpose(", "pixel * row + channel",
     "pixel * columns + channel"),
    ("transpose: images next to each other", ARRANGED, "void transpose(", "n * image", "n * rows * columns"),
    ("transpose: whole blocks alone", ARRANGED, "void transpose(", "p < last_pixel; ++p", "p < pixel; ++p"),
)  # fmt: skip

OBJECTS = rows(
    "bind/objects.cpp",
    ("objects: a hook unseen", UNUSUAL, "bool Reader::read(", " || !is_empty_dict(item(own, n.hooks))", ""),
    ("objects: a forward unseen", UNUSUAL, "bool Reader::read(", "item(own, n.forward) || ", ""),
    ("objects: another class", UNUSUAL, "bool Reader::read(", "!= batch_norm_.ptr()) return false;",
     "!= batch_norm_.ptr() && !PyObject_HasAttrString(module, \"eps\")) return false;"),
    ("objects: eps of the first norm", UNUSUAL, "bool Reader::read(", " || out.eps != PyFloat_AS_DOUBLE(eps)", ""),
    ("objects: modes differ", UNUSUAL, "bool Reader::read(", "out.on_batch != on_batch || ", ""),
    ("objects: rows of the norms that move", "fused averages_move", "bool Reader::read(",
     "out.rows_.push_back(row_index)", "out.rows_.push_back(static_cast<int64_t>(out.rows_.size()))"),
    ("objects: strides", UNUSUAL, "bool Reader::view(", "out.strides[each] != dense", "false"),
    ("objects: any dtype", UNUSUAL, "bool Reader::view(", "out.dtype.bits != dtype.bits || ", ""),
    ("objects: any shape", UNUSUAL, "bool has_shape(", "!= view.shape[each]", "< 0"),
)  # fmt: skip

SHAPE = rows(
    "include/rnas/mixed_op.h",
    ("shape: the first edge's candidates for all", OWN, "", "edge * candidates : 0", "0 * edge * candidates : 0"),
)  # fmt: skip

PLANTED = [*SHAPE, *VECTOR, *CONVOLUTION, *WINOGRAD, *POOL, *PLAN, *PACKING, *PLANES_OF_IMAGES, *IMAGES, *WINDOWS]
PLANTED += [*STAGE, *NORMS, *BATCH, *MATRICES, *MATRICES_FORWARD, *NODE_SUMS, *BATCH_FORWARD, *MATRICES_BACKWARD]
PLANTED += [*GRADIENTS, *POOLS_BACKWARD, *BATCH_BACKWARD, *FIXED, *FIXED_FORWARD, *FIXED_BACKWARD, *RELU_CONV_NORM]
PLANTED += [*PGD_MATH, *PGD, *TABLES, *GATHERED, *JOINED, *FOUR, *TRANSPOSED, *OBJECTS]
