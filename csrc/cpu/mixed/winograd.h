#pragma once

// Dense 3x3 convolutions of stride 1 with 16 multiplications for 4 outputs instead of 36: F(2x2, 3x3) of Winograd
// (Arithmetic Complexity of Computations, 1980), as Lavin and Gray (2016) use it. Windows of 4x4 pixels, the kernels and
// the 2x2 outputs go to 16 positions (i, j), where a convolution is one matrix product per position:
//   output = A' [sum over inputs (G kernel G') * (B' window B)] A
// Being bilinear, it is transposed for the gradient of the kernels: the position's sum of products of window and
// A gradient A', and at the end G' sum G. The gradient of the input is a convolution with the kernels turned round.

#include "mixed/vector.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

constexpr int64_t kPositions = 16;
// Windows that go through together: their positions, and one matrix, fit the first cache at 16 channels.
constexpr int64_t kRun = 16;

// A position of the kernels turned round by 180 degrees: G swaps its first and last row.
constexpr int64_t turned(int64_t position) {
  constexpr int64_t swapped[4] = {3, 1, 2, 0};
  return 4 * swapped[position / 4] + swapped[position % 4];
}

// As many kernels at a time, in double: their transforms are computed once, and rounded once.
typedef double Wide __attribute__((vector_size(kLanes * 8)));

// G kernel G' for G = (1 0 0; 1 1 1; 1 -1 1; 0 0 1) with its two inner rows halved. taps (3, 3).
inline void kernel_positions(const Wide* taps, Wide* to) {
  Wide half[4][3];
  for (int x = 0; x < 3; ++x) {
    const Wide a = taps[x], b = taps[3 + x], c = taps[6 + x];
    half[0][x] = a;
    half[1][x] = 0.5 * (a + b + c);
    half[2][x] = 0.5 * (a - b + c);
    half[3][x] = c;
  }
  for (int i = 0; i < 4; ++i) {
    const Wide a = half[i][0], b = half[i][1], c = half[i][2];
    to[4 * i] = a;
    to[4 * i + 1] = 0.5 * (a + b + c);
    to[4 * i + 2] = 0.5 * (a - b + c);
    to[4 * i + 3] = c;
  }
}

// G' sums G: its transpose. taps (3, 3).
inline void kernel_gradient(const Wide* sums, Wide* taps) {
  Wide half[3][4];
  for (int j = 0; j < 4; ++j) {
    const Wide a = sums[j], plus = 0.5 * (sums[4 + j] + sums[8 + j]), minus = 0.5 * (sums[4 + j] - sums[8 + j]);
    half[0][j] = a + plus;
    half[1][j] = minus;
    half[2][j] = plus + sums[12 + j];
  }
  for (int y = 0; y < 3; ++y) {
    const Wide plus = 0.5 * (half[y][1] + half[y][2]);
    taps[3 * y] = half[y][0] + plus;
    taps[3 * y + 1] = 0.5 * (half[y][1] - half[y][2]);
    taps[3 * y + 2] = plus + half[y][3];
  }
}

// B' on a column of a window.
RNAS_INLINE void window_column(const float* at, int64_t row, Vector* to) {
  const Vector a = load(at), b = load(at + row), c = load(at + 2 * row), d = load(at + 3 * row);
  to[0] = a - c;
  to[1] = b + c;
  to[2] = c - b;
  to[3] = b - d;
}

// B' window B of `count` windows side by side, 2 pixels apart. in: the first pixel of the first; position p of window t
// goes to to[p * step + t * kLanes].
inline void windows_forward(const float* in, int64_t row, int64_t count, float* to, int64_t step) {
  Vector a[4], b[4], c[4], d[4];  // columns of the window
  window_column(in, row, a);
  window_column(in + kLanes, row, b);
  for (int64_t t = 0; t < count; ++t, to += kLanes) {
    in += 2 * kLanes;
    window_column(in, row, c);
    window_column(in + kLanes, row, d);
    float* at = to;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, at += 4 * step) {
      store(at, a[i] - c[i]);
      store(at + step, b[i] + c[i]);
      store(at + 2 * step, c[i] - b[i]);
      store(at + 3 * step, b[i] - d[i]);
      a[i] = c[i];
      b[i] = d[i];
    }
  }
}

// A' positions A of one window: its 2x2 outputs, of which `rows` by `columns` lie within the image.
template <bool Add>
RNAS_INLINE void window_output(const float* from, int64_t step, float* to, int64_t row, int64_t rows, int64_t columns) {
  Vector upper[4], lower[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector m0 = load(from + j * step), m1 = load(from + (4 + j) * step), m2 = load(from + (8 + j) * step),
                 m3 = load(from + (12 + j) * step);
    upper[j] = m0 + (m1 + m2);
    lower[j] = (m1 - m2) - m3;
  }
  const auto put = [](float* at, Vector v) __attribute__((always_inline)) { store(at, Add ? load(at) + v : v); };
  put(to, upper[0] + (upper[1] + upper[2]));
  if (columns > 1) put(to + kLanes, (upper[1] - upper[2]) - upper[3]);
  if (rows < 2) return;
  put(to + row, lower[0] + (lower[1] + lower[2]));
  if (columns > 1) put(to + row + kLanes, (lower[1] - lower[2]) - lower[3]);
}

// A gradient A' of `count` windows side by side. g: the first output of the first.
inline void windows_gradient(const float* g, int64_t row, int64_t count, float* to, int64_t step) {
  for (int64_t t = 0; t < count; ++t, g += 2 * kLanes, to += kLanes) {
    Vector left[4], right[4];
    const Vector a = load(g), b = load(g + kLanes), c = load(g + row), d = load(g + row + kLanes);
    left[0] = a, left[1] = a + c, left[2] = a - c, left[3] = zero() - c;
    right[0] = b, right[1] = b + d, right[2] = b - d, right[3] = zero() - d;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* at = to + 4 * i * step;
      store(at, left[i]);
      store(at + step, left[i] + right[i]);
      store(at + 2 * step, left[i] - right[i]);
      store(at + 3 * step, zero() - right[i]);
    }
  }
}

// Calls use(row of the windows, first of them, count, where they go in the run) for windows [first, first + size) of an
// image that has `across` of them side by side.
template <typename Use> RNAS_INLINE void window_rows(int64_t first, int64_t size, int64_t across, const Use& use) {
  int64_t y = first / across, x = first % across;
  for (int64_t at = 0; at < size; ++y, x = 0) {
    const int64_t count = size - at < across - x ? size - at : across - x;
    use(y, x, count, at);
    at += count;
  }
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
