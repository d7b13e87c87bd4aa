#pragma once

// Dense 3x3 convolutions by Winograd's algorithm: the windows of a few images, and their products.

#include "mixed/images.h"
#include "mixed/packing.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// The windows of a few images, one image behind the other.
template <int64_t Outputs> struct WindowGrid {
  int64_t height, width, images;
  int64_t across() const { return windows_of(width, Outputs); }
  int64_t down() const { return windows_of(height, Outputs); }

  // Calls run(first window, windows), and after(image, first row, rows) for the rows that are done.
  template <typename Run, typename After> RNAS_INLINE void runs(const Run& run, const After& after) const {
    const int64_t rows = down() * images, band = std::max<int64_t>(1, kRun / across());
    for (int64_t y = 0; y < rows; y += band) {
      const int64_t end = std::min(rows, y + band);
      for (int64_t first = y * across(); first < end * across(); first += kRun)
        run(first, std::min(kRun, end * across() - first));
      for (int64_t image = y / down(); image * down() < end; ++image) {
        const int64_t from = std::max<int64_t>(0, y - image * down()), to = std::min(down(), end - image * down());
        after(image, Outputs * from, std::min(Outputs * to, height) - Outputs * from);
      }
    }
  }

  // Calls use(image, row, first pixel of the row, count, place in the run) for windows [first, first + size), in pieces
  // of `count` side by side.
  template <typename Use> RNAS_INLINE void pieces(int64_t first, int64_t size, const Use& use) const {
    window_rows(first, size, across(), [&](int64_t y, int64_t x, int64_t count, int64_t at) {
      use(y / down(), Outputs * (y % down()), Outputs * x, count, at);
    });
  }
};

// Winograd's positions of the windows of a tile.
template <int64_t Outputs>
void load_windows(const Plan& plan, const Tile& in, const WindowGrid<Outputs>& grid, int64_t first, int64_t size,
                  float* to) {
  grid.pieces(first, size, [&](int64_t image, int64_t y, int64_t x, int64_t count, int64_t at) {
    for (int64_t group = 0; group < plan.groups; ++group)
      windows_forward<Outputs>(in.at(image).data + group * in.plane + (y - 1) * in.row + (x - 1) * kLanes, in.row, count,
                               to + (group * kRun + at) * kLanes, window_step(plan));
  });
}

// y (+)= what a run of windows gives, from its products at the positions.
template <int64_t Outputs, bool Add>
void store_windows(const Plan& plan, const float* products, const WindowGrid<Outputs>& grid, int64_t first, int64_t size,
                   float* out) {
  const int64_t height = grid.height, width = grid.width;
  grid.pieces(first, size, [&](int64_t image, int64_t y, int64_t x, int64_t count, int64_t at) {
    for (int64_t group = 0; group < plan.groups; ++group) {
      float* to = out + (((image * plan.groups + group) * height + y) * width + x) * kLanes;
      const float* from = products + (group * kRun + at) * kLanes;
      for (int64_t t = 0; t < count; ++t)
        window_output<Outputs, Add>(from + t * kLanes, window_step(plan), to + Outputs * t * kLanes, width * kLanes,
                                    height - y, width - x - Outputs * t);
    }
  });
}

// y (+)= the 3x3 convolution at a run of windows. matrices: (positions, padded, padded), plan.matrix_step() apart.
template <bool Add, int64_t Outputs>
void multiply_windows(const Plan& plan, const float* matrices, const Tile& in, const WindowGrid<Outputs>& grid,
                      int64_t first, int64_t size, const Scratch& scratch, Work work, float* y) {
  // With one group the products may overwrite the windows, which then stay in the first cache with the matrices.
  float* const products = plan.groups == 1 ? scratch.windows : scratch.products;
  const int64_t step = window_step(plan), plane = kRun * kLanes, c = plan.shape.channels;
  constexpr int64_t kPositions = position_count(Outputs);
  const Section section(scratch.clock, work, size * kPositions * c * c);
  load_windows(plan, in, grid, first, size, scratch.windows);
  // More than two groups: the next matrix is fetched rather than the next image (64 channels, 8x8: 6 % of a convolution and
  // its gradients; at 16 channels it cost 3 %).
  Ahead next;
  for (int64_t p = 0; p < kPositions; ++p) {
    next.clear();
    if (plan.groups > 2 && p + 1 < kPositions)
      next.add(matrices + (p + 1) * plan.matrix_step(), plan.padded * plan.padded / 16);
    pointwise<false>(scratch.windows + p * step, plane, plan.groups, matrices + p * plan.matrix_step(),
                     plan.padded, plan.groups, products + p * step, plane, size,
                     plan.groups > 2 ? next : *scratch.ahead);
  }
  store_windows<Outputs, Add>(plan, products, grid, first, size, y);
}

// y (+)= the 3x3 convolution of the images of a tile, dense.
template <bool Add, int64_t Outputs, typename After>
RNAS_INLINE void convolve_windows(const Plan& plan, const float* matrices, const Tile& in,
                                  const WindowGrid<Outputs>& grid, const Scratch& scratch, Work work, float* y,
                                  const After& after) {
  grid.runs(
      [&](int64_t first, int64_t size) {
        multiply_windows<Add>(plan, matrices, in, grid, first, size, scratch, work, y);
      },
      after);
}

// The weight gradients of a 3x3 convolution at the positions, from its inputs and the gradients of its outputs.
template <int64_t Outputs>
void weigh_windows(const Plan& plan, const Convolution& conv, const Tile& in, const Tile& grad,
                   const WindowGrid<Outputs>& grid, const Scratch& scratch, const WeightSums& sums) {
  const int64_t step = window_step(plan), plane = kRun * kLanes, c = plan.shape.channels;
  constexpr int64_t kPositions = position_count(Outputs);
  int64_t since = 0;  // windows that are not in double yet
  grid.runs(
      [&](int64_t first, int64_t size) {
        const Section section(scratch.clock, Work::pointwise_weight, size * kPositions * c * c);
        if (since + size > kFlush) {
          add_up(plan, conv, sums);
          since = 0;
        }
        since += size;
        load_windows(plan, in, grid, first, size, scratch.windows);
        grid.pieces(first, size, [&](int64_t image, int64_t y, int64_t x, int64_t count, int64_t at) {
          for (int64_t group = 0; group < plan.groups; ++group)
            windows_gradient<Outputs>(grad.at(image).data + group * grad.plane + y * grad.row + x * kLanes, grad.row,
                                      count, scratch.products + (group * kRun + at) * kLanes, step);
        });
        for (int64_t p = 0; p < kPositions; ++p)
          pointwise_weight(scratch.windows + p * step, plane, plan.groups, scratch.products + p * step, plane,
                           plan.groups, size, sums.of(conv.packed + p * plan.matrix_step()), plan.padded);
      },
      [](int64_t, int64_t, int64_t) {});
}

// Where rows of a gradient are, [group at `plane`][row][pixel][lane].
struct Rows {
  const float* data;
  int64_t row, plane;
};

// As convolve_backward, of a 3x3 convolution by Winograd's algorithm.
template <bool Add, typename Gradient>
RNAS_INLINE void convolve_windows_backward(const Plan& plan, const Convolution& conv, const Packed& packed,
                                           const Tile& in, int64_t images, const Scratch& scratch,
                                           const Gradient& gradient, float* in_grad, const WeightSums* sums) {
  const int64_t height = plan.height_out, width = plan.width_out;
  const Tile& grad = scratch.grad;
  for (int64_t i = 0; i < images; ++i)
    chunks(plan, [&](int64_t first, int64_t rows) {
      const Tile at = grad.at(i);
      float* const to = at.data + first * at.row;
      const Rows g = gradient(i, first, rows, Tile{to, at.row, at.plane, 0, 0});
      for (int64_t group = 0; group < plan.groups && g.data != to; ++group)
        for (int64_t r = 0; r < rows; ++r)
          std::memcpy(to + group * at.plane + r * at.row, g.data + group * g.plane + r * g.row,
                      width * kLanes * sizeof(float));
    });
  with_outputs(conv, [&](auto outputs) {
    const WindowGrid<decltype(outputs)::value> grid{height, width, images};
    if (sums) weigh_windows(plan, conv, in, grad, grid, scratch, *sums);
    if (in_grad)
      convolve_windows<Add>(plan, packed.backward + conv.packed, grad, grid, scratch, Work::pointwise_input, in_grad,
                            [](int64_t, int64_t, int64_t) {});
  });
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
