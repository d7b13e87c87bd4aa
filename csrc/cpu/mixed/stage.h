#pragma once

// One convolution of a branch on an image or a few: tiles in, dense images out; and sums over their pixels.

#include "mixed/pool.h"
#include "mixed/windows.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// What a part multiplies, for output rows [first, first + rows): d (groups, rows * width_out).
inline void gather(const Plan& plan, const Convolution& conv, const Part& part, const float* packed, const Tile& in,
                   int64_t first, int64_t rows, float* d) {
  const int64_t width = plan.width_out, half = half_width(static_cast<int>(conv.kernel), static_cast<int>(conv.dilation));
  for (int64_t group = 0; group < plan.groups; ++group) {
    float* to = d + group * rows * width * kLanes;
    const float* plane = in.data + group * in.plane;
    if (conv.kernel > 0) {
      const float* at = plane + (first * conv.stride - half) * in.row - half * kLanes;
      conv.loops.forward(at, in.row, packed + conv.packed + group * conv.kernel * conv.kernel * kLanes, to,
                         width * kLanes, width, rows);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float* at = plane + ((first + r) * conv.stride + part.dy) * in.row + part.dx * kLanes;
      for (int64_t x = 0; x < width; ++x)
        store(to + (r * width + x) * kLanes, load(at + x * conv.stride * kLanes));
    }
  }
}

// Multiply-adds of the depthwise part of a convolution.
inline int64_t depthwise_adds(const Plan& plan, const Convolution& conv, int64_t pixels) {
  return pixels * conv.kernel * conv.kernel * plan.shape.channels;
}

// y (+)= conv(tile), dense, of the first `images` of a bundle. after(image, first, rows) is called when these rows of y
// are there.
template <bool Add, typename After>
RNAS_INLINE void convolve(const Plan& plan, const Convolution& conv, const float* packed, const Tile& in, int64_t images,
                          const Scratch& scratch, float* y, const After& after) {
  if (conv.winograd)
    return with_outputs(conv, [&](auto outputs) {
      const WindowGrid<decltype(outputs)::value> grid{plan.height_out, plan.width_out, images};
      convolve_windows<Add>(plan, packed + conv.packed, in, grid, scratch, Work::pointwise, y, after);
    });
  for (int64_t i = 0; i < images; ++i)
    chunks(plan, [&](int64_t first, int64_t rows) {
      const int64_t pixels = rows * plan.width_out, plane = pixels * kLanes;
      for (const Part& part : conv.parts) {
        {
          const Section section(scratch.clock, Work::depthwise, depthwise_adds(plan, conv, pixels));
          gather(plan, conv, part, packed, in.at(i), first, rows, scratch.d);
        }
        float* to = y + i * plan.image_out() + part.group * plan.plane_out() + first * plan.width_out * kLanes;
        const Section section(scratch.clock, Work::pointwise, pixels * plan.shape.channels * part.count);
        const auto multiply = Add || part.adds ? pointwise<true> : pointwise<false>;
        multiply(scratch.d, plane, plan.groups, packed + part.packed + part.group * kLanes, plan.padded, part.groups, to,
                 plan.plane_out(), pixels, *scratch.ahead);
      }
      after(i, first, rows);
    });
}

// convolve_backward of one image, by products over channels and a depthwise part.
template <bool Add, typename Gradient>
RNAS_INLINE void convolve_image_backward(const Plan& plan, const Convolution& conv, const Packed& packed,
                                         const Tile& in, int64_t height, int64_t width, const Scratch& scratch,
                                         const Gradient& gradient, float* in_grad, const WeightSums* sums) {
  const int64_t band = std::max<int64_t>(1, kFlush / plan.width_out);  // rows of the output
  int64_t flushed = 0;
  const int64_t groups = plan.groups, out_width = plan.width_out, taps = conv.kernel * conv.kernel;
  const bool depthwise = conv.kernel > 0, pointwise_alone = conv.is_pointwise();
  if (!depthwise && !pointwise_alone && in_grad && !Add)
    std::memset(in_grad, 0, groups * height * width * kLanes * sizeof(float));
  chunks(plan, [&](int64_t first, int64_t rows) {
    const int64_t pixels = rows * out_width, plane = pixels * kLanes;
    const Rows at = gradient(first, rows, Tile{scratch.chunk, out_width * kLanes, plane, 0, 0});
    const float* const g = at.data;
    const int64_t g_plane = at.plane;
    if (sums && first - flushed >= band) {
      add_up(plan, conv, *sums);
      flushed = first;
    }
    for (const Part& part : conv.parts) {
      if (sums) {
        {
          const Section section(scratch.clock, Work::depthwise, depthwise_adds(plan, conv, pixels));
          gather(plan, conv, part, packed.forward, in, first, rows, scratch.d);
        }
        const Section section(scratch.clock, Work::pointwise_weight, pixels * plan.shape.channels * part.count);
        pointwise_weight(scratch.d, plane, groups, g + part.group * g_plane, g_plane, part.groups, pixels,
                         sums->of(part.packed + part.group * kLanes), plan.padded);
      }
      const float* transposed = packed.backward + part.packed + part.group * kLanes * plan.padded;
      if (!depthwise && !in_grad) continue;
      const Section section(scratch.clock, Work::pointwise_input, pixels * plan.shape.channels * part.count);
      if (depthwise) {
        for (int64_t r = 0; r < rows; ++r)
          pointwise<false>(g + r * out_width * kLanes, g_plane, groups, transposed, plan.padded, groups,
                           scratch.grad.data + (first + r) * scratch.grad.row, scratch.grad.plane, out_width,
                           *scratch.ahead);
      } else if (pointwise_alone) {
        pointwise<Add>(g, g_plane, groups, transposed, plan.padded, groups, in_grad + first * width * kLanes,
                       height * width * kLanes, pixels, *scratch.ahead);
      } else {
        pointwise<false>(g + part.group * g_plane, g_plane, part.groups, transposed, plan.padded, groups,
                         scratch.shifted, plane, pixels, *scratch.ahead);
        for (int64_t group = 0; group < groups; ++group)
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t y = (first + r) * conv.stride + part.dy;
            if (y < 0 || y >= height) continue;
            float* to = in_grad + (group * height + y) * width * kLanes;
            const float* from = scratch.shifted + group * plane + r * out_width * kLanes;
            for (int64_t i = 0, x = part.dx; i < out_width; ++i, x += conv.stride)
              if (x >= 0 && x < width) add_to(to + x * kLanes, load(from + i * kLanes));
          }
      }
    }
  });
  if (!depthwise) return;
  const int64_t half = half_width(static_cast<int>(conv.kernel), static_cast<int>(conv.dilation));
  const Tile& grad = scratch.grad;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t weights = conv.packed + group * taps * kLanes;
    const float* plane = grad.data + group * grad.plane;
    const int64_t adds = plan.pixels_out() * taps * std::min(kLanes, plan.shape.channels - group * kLanes);
    for (int64_t y = 0; sums && y < plan.height_out; y += band) {
      const Section section(scratch.clock, Work::depthwise_weight, y == 0 ? adds : 0);
      if (y > 0) add_up(conv, *sums, weights, taps * kLanes);
      conv.loops.weight(in.data + group * in.plane + (y * conv.stride - half) * in.row - half * kLanes, in.row,
                        plane + y * grad.row, grad.row, std::min(band, plan.height_out - y), out_width, sums->of(weights));
    }
    if (!in_grad) continue;
    const Section section(scratch.clock, Work::depthwise_input, adds);
    float* to = in_grad + group * height * width * kLanes;
    if (conv.stride == 1) {
      const auto rows = Add ? conv.loops.backward_add : conv.loops.backward_set;
      rows(plane - half * (grad.row + kLanes), grad.row, packed.backward + weights, to, width * kLanes, width, height);
    } else {
      if (!Add) std::memset(to, 0, height * width * kLanes * sizeof(float));
      for (int64_t y = 0; y < height; ++y)
        conv.loops.transposed(plane, grad.row, packed.forward + weights, to + y * width * kLanes, y, width);
    }
  }
}

// The transpose of convolve, and its weight gradients. gradient(image, first, rows, tile) gives the gradient of these rows
// of the output, which it may write to the tile, without gaps between the rows where there are none in the tile. in_grad
// (images, groups, height * width of the input) is set or added to; null: not wanted. sums: a thread's weight sums in the
// packed order, which are left with what is less than kFlush products old in their float32 part; null: not wanted.
template <bool Add, typename Gradient>
RNAS_INLINE void convolve_backward(const Plan& plan, const Convolution& conv, const Packed& packed, const Tile& in,
                                   int64_t images, int64_t height, int64_t width, const Scratch& scratch,
                                   const Gradient& gradient, float* in_grad, const WeightSums* sums) {
  if (!sums && !in_grad) return;
  if (conv.winograd)
    return convolve_windows_backward<Add>(plan, conv, packed, in, images, scratch, gradient, in_grad, sums);
  for (int64_t i = 0; i < images; ++i)
    convolve_image_backward<Add>(
        plan, conv, packed, in.at(i), height, width, scratch,
        [&](int64_t first, int64_t rows, const Tile& to) { return gradient(i, first, rows, to); },
        in_grad ? in_grad + i * plan.padded * height * width : nullptr, sums);
}

// ---- sums over pixels ------------------------------------------------------------------------------------------------

// Mean and sum of squared distances from it, per channel, of what has been added so far.
struct Moments {
  double *mean, *squares;  // (padded)
};

// Adds a run of pixels to the moments of `before` values. Short runs are summed in float32 around a value among their
// own, the mean of their first pixels, so that no value far from the others takes digits away, and merged in double
// (Chan, Golub, LeVeque 1979).
inline void add_moments(int64_t groups, const float* y, int64_t y_plane, int64_t pixels, int64_t before,
                        const Moments& to) {
  constexpr int kFirst = 8;
  if (before == 0) {
    std::memset(to.mean, 0, groups * kLanes * sizeof(double));
    std::memset(to.squares, 0, groups * kLanes * sizeof(double));
  }
  for (int64_t start = 0; start < pixels; start += 2 * kChunk) {
    const int64_t count = std::min(2 * kChunk, pixels - start), total = before + start + count;
    const double weight = static_cast<double>(count) / static_cast<double>(total);
    const double between = static_cast<double>(before + start) * weight, exact = 1.0 / static_cast<double>(count);
    for (int64_t group = 0; group < groups; ++group) {
      const float* at = y + group * y_plane + start * kLanes;
      Vector pivot = load(at);
      if (count >= kFirst) {
#pragma GCC unroll 8
        for (int i = 1; i < kFirst; ++i) pivot += load(at + i * kLanes);
        pivot *= set(1.0f / kFirst);
      }
      Vector sum[4] = {}, square[4] = {};
      int64_t p = 0;
      for (; p + 4 <= count; p += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vector v = load(at + (p + i) * kLanes) - pivot;
          sum[i] += v;
          square[i] = fma(v, v, square[i]);
        }
      for (; p < count; ++p) {
        const Vector v = load(at + p * kLanes) - pivot;
        sum[0] += v;
        square[0] = fma(v, v, square[0]);
      }
      float pivots[kLanes], rests[kLanes], squares[kLanes];
      store(pivots, pivot);
      store(rests, (sum[0] + sum[1]) + (sum[2] + sum[3]));
      store(squares, (square[0] + square[1]) + (square[2] + square[3]));
      double *mean = to.mean + group * kLanes, *all = to.squares + group * kLanes;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const double rest = rests[lane], own = pivots[lane] + rest * exact, delta = own - mean[lane];
        mean[lane] += delta * weight;
        all[lane] += squares[lane] - rest * rest * exact + delta * delta * between;
      }
    }
  }
}

// sum[c] += sum of g * (y - pivot) over a run of pixels. A null y stands for ones: the sum of g.
inline void add_dot(const Plan& plan, const float* g, int64_t g_plane, const float* y, int64_t y_plane, int64_t pixels,
                    const float* pivot, float* sum) {
  for (int64_t group = 0; group < plan.groups; ++group) {
    const Vector k = pivot ? load(pivot + group * kLanes) : zero();
    const float *gs = g + group * g_plane, *ys = y ? y + group * y_plane : nullptr;
    Vector a[4] = {load(sum + group * kLanes)};
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __builtin_prefetch(gs + (p + i + 32) * kLanes);
        if (ys) __builtin_prefetch(ys + (p + i + 32) * kLanes);
        const Vector v = load(gs + (p + i) * kLanes);
        a[i] = ys ? fma(v, load(ys + (p + i) * kLanes) - k, a[i]) : a[i] + v;
      }
    for (; p < pixels; ++p) {
      const Vector v = load(gs + p * kLanes);
      a[0] = ys ? fma(v, load(ys + p * kLanes) - k, a[0]) : a[0] + v;
    }
    store(sum + group * kLanes, (a[0] + a[1]) + (a[2] + a[3]));
  }
}

// to[c] += sum of g * (y - pivot) (y null: of g) over a run of pixels that is dense in each plane, in float32 over at most
// kSum of them. scratch: (padded) floats.
inline void add_dot(const Plan& plan, const float* g, const float* y, int64_t plane, int64_t pixels, const float* pivot,
                    float* scratch, double* to) {
  for (int64_t start = 0; start < pixels; start += kSum) {
    const int64_t at = start * kLanes;
    std::memset(scratch, 0, plan.padded * sizeof(float));
    add_dot(plan, g + at, plane, y ? y + at : nullptr, plane, std::min(kSum, pixels - start), pivot, scratch);
    for (int64_t c = 0; c < plan.padded; ++c) to[c] += scratch[c];
  }
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
