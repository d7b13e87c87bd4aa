#pragma once

// Dense 3x3 convolutions of stride 1 with fewer multiplications: F(m x m, 3 x 3) of Winograd (Arithmetic Complexity of
// Computations, 1980), as Lavin and Gray (2016) use it, with 16 in place of 36 for 2x2 outputs and 36 in place of 144 for
// 4x4. Windows of m + 2 pixels a side, the kernels and the outputs go to (m + 2)^2 positions (i, j), where a convolution
// is one matrix product per position:
//   output = A' [sum over inputs (G kernel G') * (B' window B)] A
// Being bilinear, it is transposed for the gradient of the kernels: the position's sum of products of window and
// A gradient A', and at the end G' sum G. The gradient of the input is a convolution with the kernels turned round.
//
// The matrices evaluate polynomials at points: 0, 1, -1 and infinity for m = 2; for m = 4 at 0, 3/4, -3/4, 3/2, -3/2 and
// infinity, where the error is half that of the usual 0, 1, -1, 2, -2 (Barabasz et al. 2020, on the choice of points).
// All factors of Vectors are exact in float32.

#include "mixed/vector.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// Windows that go through together.
constexpr int64_t kRun = 16;

constexpr int64_t window_side(int64_t outputs) { return outputs + 2; }
constexpr int64_t position_count(int64_t outputs) { return window_side(outputs) * window_side(outputs); }
// Windows of `outputs` a side in as many pixels.
constexpr int64_t windows_of(int64_t pixels, int64_t outputs) { return (pixels + outputs - 1) / outputs; }

// As many kernels at a time, in double: their transforms are computed once, and rounded once.
typedef double Wide __attribute__((vector_size(kLanes * 8)));

// The matrices on one column or row, for m outputs. Each reads all it needs before it writes.
template <int64_t Outputs> struct Winograd;

template <> struct Winograd<2> {
  // G = (1 0 0; 1 1 1; 1 -1 1; 0 0 1) with its two inner rows halved.
  static void kernel(const Wide* k, Wide* to) {
    const Wide even = 0.5 * (k[0] + k[2]), odd = 0.5 * k[1];
    to[0] = k[0];
    to[1] = even + odd;
    to[2] = even - odd;
    to[3] = k[2];
  }
  // G'
  static void kernel_gradient(const Wide* s, Wide* to) {
    const Wide even = 0.5 * (s[1] + s[2]);
    to[0] = s[0] + even;
    to[1] = 0.5 * (s[1] - s[2]);
    to[2] = even + s[3];
  }
  // B'
  static RNAS_INLINE void window(const Vector* d, Vector* to) {
    to[0] = d[0] - d[2];
    to[1] = d[1] + d[2];
    to[2] = d[2] - d[1];
    to[3] = d[1] - d[3];
  }
  // A'
  static RNAS_INLINE void output(const Vector* m, Vector* to) {
    to[0] = m[0] + (m[1] + m[2]);
    to[1] = (m[1] - m[2]) - m[3];
  }
  // A
  static RNAS_INLINE void gradient(const Vector* g, Vector* to) {
    to[0] = g[0];
    to[1] = g[0] + g[1];
    to[2] = g[0] - g[1];
    to[3] = zero() - g[1];
  }
};

template <> struct Winograd<4> {
  static constexpr double p = 0.75, q = 1.5, pp = p * p, qq = q * q;
  // What the products of differences between the points leave to G.
  static constexpr double of_zero = 1 / (pp * qq), of_p = 1 / (2 * pp * (pp - qq)), of_q = 1 / (2 * qq * (qq - pp));

  static void kernel(const Wide* k, Wide* to) {
    const Wide even_p = of_p * (k[0] + pp * k[2]), odd_p = of_p * p * k[1];
    const Wide even_q = of_q * (k[0] + qq * k[2]), odd_q = of_q * q * k[1];
    to[0] = of_zero * k[0];
    to[1] = even_p + odd_p;
    to[2] = even_p - odd_p;
    to[3] = even_q + odd_q;
    to[4] = even_q - odd_q;
    to[5] = k[2];
  }
  static void kernel_gradient(const Wide* s, Wide* to) {
    const Wide even_p = of_p * (s[1] + s[2]), odd_p = of_p * (s[1] - s[2]);
    const Wide even_q = of_q * (s[3] + s[4]), odd_q = of_q * (s[3] - s[4]);
    to[0] = of_zero * s[0] + even_p + even_q;
    to[1] = p * odd_p + q * odd_q;
    to[2] = pp * even_p + qq * even_q + s[5];
  }
  static RNAS_INLINE void window(const Vector* d, Vector* to) {
    const Vector at_p = set(p), at_q = set(q), minus_pp = set(-pp), minus_qq = set(-qq);
    const Vector product = set(pp * qq), minus_sum = set(-pp - qq);
    const Vector even_p = fma(minus_qq, d[2], d[4]), odd_p = fma(minus_qq, d[1], d[3]);
    const Vector even_q = fma(minus_pp, d[2], d[4]), odd_q = fma(minus_pp, d[1], d[3]);
    to[0] = fma(product, d[0], fma(minus_sum, d[2], d[4]));
    to[5] = fma(product, d[1], fma(minus_sum, d[3], d[5]));
    to[1] = fma(at_p, odd_p, even_p);
    to[2] = fma(set(-p), odd_p, even_p);
    to[3] = fma(at_q, odd_q, even_q);
    to[4] = fma(set(-q), odd_q, even_q);
  }
  static RNAS_INLINE void output(const Vector* m, Vector* to) {
    const Vector even_p = m[1] + m[2], odd_p = m[1] - m[2], even_q = m[3] + m[4], odd_q = m[3] - m[4];
    to[0] = m[0] + (even_p + even_q);
    to[1] = fma(set(p), odd_p, set(q) * odd_q);
    to[2] = fma(set(pp), even_p, set(qq) * even_q);
    to[3] = fma(set(pp * p), odd_p, fma(set(qq * q), odd_q, m[5]));
  }
  static RNAS_INLINE void gradient(const Vector* g, Vector* to) {
    const Vector even_p = fma(set(pp), g[2], g[0]), odd_p = fma(set(pp), g[3], g[1]);
    const Vector even_q = fma(set(qq), g[2], g[0]), odd_q = fma(set(qq), g[3], g[1]);
    to[0] = g[0];
    to[1] = fma(set(p), odd_p, even_p);
    to[2] = fma(set(-p), odd_p, even_p);
    to[3] = fma(set(q), odd_q, even_q);
    to[4] = fma(set(-q), odd_q, even_q);
    to[5] = g[3];
  }
};

// G kernel G'. taps (3, 3).
template <int64_t Outputs> void kernel_positions(const Wide* taps, Wide* to) {
  constexpr int64_t kSide = window_side(Outputs);
  Wide half[3][kSide];  // of each row
  for (int64_t y = 0; y < 3; ++y) Winograd<Outputs>::kernel(taps + 3 * y, half[y]);
  for (int64_t j = 0; j < kSide; ++j) {
    const Wide column[3] = {half[0][j], half[1][j], half[2][j]};
    Wide made[kSide];
    Winograd<Outputs>::kernel(column, made);
    for (int64_t i = 0; i < kSide; ++i) to[kSide * i + j] = made[i];
  }
}

// G' sums G: its transpose. taps (3, 3).
template <int64_t Outputs> void kernel_gradient(const Wide* sums, Wide* taps) {
  constexpr int64_t kSide = window_side(Outputs);
  Wide half[kSide][3];  // of each row
  for (int64_t i = 0; i < kSide; ++i) Winograd<Outputs>::kernel_gradient(sums + kSide * i, half[i]);
  for (int64_t x = 0; x < 3; ++x) {
    Wide column[kSide], made[3];
    for (int64_t i = 0; i < kSide; ++i) column[i] = half[i][x];
    Winograd<Outputs>::kernel_gradient(column, made);
    for (int64_t y = 0; y < 3; ++y) taps[3 * y + x] = made[y];
  }
}

// B' window B of `count` windows side by side, `Outputs` pixels apart. in: the first pixel of the first; position p of
// window t goes to to[p * step + t * kLanes].
template <int64_t Outputs>
void windows_forward(const float* in, int64_t row, int64_t count, float* to, int64_t step) {
  constexpr int64_t kSide = window_side(Outputs);
  const auto column = [row](const float* at, Vector* made) __attribute__((always_inline)) {
    Vector d[kSide];
#pragma GCC unroll 6
    for (int64_t y = 0; y < kSide; ++y) d[y] = load(at + y * row);
    Winograd<Outputs>::window(d, made);
  };
  Vector columns[kSide][kSide];  // of a window, B' on each
  column(in, columns[0]);
  column(in + kLanes, columns[1]);
  for (int64_t t = 0; t < count; ++t, to += kLanes, in += Outputs * kLanes) {
#pragma GCC unroll 6
    for (int64_t x = 2; x < kSide; ++x) column(in + x * kLanes, columns[x]);
    float* at = to;
#pragma GCC unroll 6
    for (int64_t i = 0; i < kSide; ++i, at += kSide * step) {
      Vector d[kSide], made[kSide];
#pragma GCC unroll 6
      for (int64_t x = 0; x < kSide; ++x) d[x] = columns[x][i];
      Winograd<Outputs>::window(d, made);
#pragma GCC unroll 6
      for (int64_t j = 0; j < kSide; ++j) store(at + j * step, made[j]);
      columns[0][i] = d[Outputs];
      columns[1][i] = d[Outputs + 1];
    }
  }
}

// A' positions A of one window: its outputs, of which `rows` by `columns` lie within the image.
template <int64_t Outputs, bool Add>
RNAS_INLINE void window_output(const float* from, int64_t step, float* to, int64_t row, int64_t rows, int64_t columns) {
  constexpr int64_t kSide = window_side(Outputs);
  Vector half[Outputs][kSide];  // A' on the columns
#pragma GCC unroll 6
  for (int64_t j = 0; j < kSide; ++j) {
    Vector m[kSide], made[Outputs];
#pragma GCC unroll 6
    for (int64_t i = 0; i < kSide; ++i) m[i] = load(from + (kSide * i + j) * step);
    Winograd<Outputs>::output(m, made);
#pragma GCC unroll 6
    for (int64_t y = 0; y < Outputs; ++y) half[y][j] = made[y];
  }
#pragma GCC unroll 6
  for (int64_t y = 0; y < Outputs; ++y) {
    if (y >= rows) return;
    Vector made[Outputs];
    Winograd<Outputs>::output(half[y], made);
#pragma GCC unroll 6
    for (int64_t x = 0; x < Outputs; ++x) {
      float* const at = to + y * row + x * kLanes;
      if (x < columns) store(at, Add ? load(at) + made[x] : made[x]);
    }
  }
}

// A gradient A' of `count` windows side by side. g: the first output of the first.
template <int64_t Outputs>
void windows_gradient(const float* g, int64_t row, int64_t count, float* to, int64_t step) {
  constexpr int64_t kSide = window_side(Outputs);
  for (int64_t t = 0; t < count; ++t, g += Outputs * kLanes, to += kLanes) {
    Vector columns[Outputs][kSide];
#pragma GCC unroll 6
    for (int64_t x = 0; x < Outputs; ++x) {
      Vector d[Outputs];
#pragma GCC unroll 6
      for (int64_t y = 0; y < Outputs; ++y) d[y] = load(g + y * row + x * kLanes);
      Winograd<Outputs>::gradient(d, columns[x]);
    }
    float* at = to;
#pragma GCC unroll 6
    for (int64_t i = 0; i < kSide; ++i, at += kSide * step) {
      Vector d[Outputs], made[kSide];
#pragma GCC unroll 6
      for (int64_t x = 0; x < Outputs; ++x) d[x] = columns[x][i];
      Winograd<Outputs>::gradient(d, made);
#pragma GCC unroll 6
      for (int64_t j = 0; j < kSide; ++j) store(at + j * step, made[j]);
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
