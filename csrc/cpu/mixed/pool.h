#pragma once

// 3x3 pools with padding 1 on one group of one image: rows first, then columns, three steps each instead of nine.
//
// The winner of a maximum is kept as bits, two words for each direction: `second` where the middle of the three beat
// the first, `third` where the last beat both. The first of equal values wins, as in torch.max_pool2d.

#include "mixed/vector.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

struct Winner {
  Bits second, third;
};

RNAS_INLINE Vector of_first(Winner w, Vector v) { return keep(static_cast<Bits>(~(w.second | w.third) & kAllBits), v); }
RNAS_INLINE Vector of_second(Winner w, Vector v) { return keep(static_cast<Bits>(w.second & ~w.third), v); }
RNAS_INLINE Vector of_third(Winner w, Vector v) { return keep(w.third, v); }

RNAS_INLINE Vector route(Winner w, Vector a, Vector b, Vector c) { return of_first(w, a) + of_second(w, b) + of_third(w, c); }

// The sizes of a pool, (height, width) -> (height_out, width_out).
struct PoolShape {
  int64_t height, width, stride, height_out, width_out;
};

// The maximum of up to three values; a null pointer is outside the image.
RNAS_INLINE Vector largest(const float* a, const float* b, const float* c, Winner& w) {
  const Vector middle = load(b);
  Vector best = middle;
  w.second = kAllBits;
  if (a) {
    const Vector first = load(a);
    w.second = beats(middle, first);
    best = blend(w.second, middle, first);
  }
  w.third = 0;
  if (c) {
    const Vector last = load(c);
    w.third = beats(last, best);
    best = blend(w.third, last, best);
  }
  return best;
}

// in: pixel (0, 0), rows `row` apart. out (height_out, width_out) dense, or null when only the winners are wanted.
// rows: scratch of height * width_out vectors. across (height, width_out), down (height_out, width_out).
inline void max_pool(const float* in, int64_t row, const PoolShape& s, float* rows, float* out, Winner* across,
                     Winner* down) {
  for (int64_t y = 0; y < s.height; ++y)
    for (int64_t x = 0; x < s.width_out; ++x) {
      const float* at = in + y * row + x * s.stride * kLanes;
      const float* before = x > 0 ? at - kLanes : nullptr;
      const float* after = x * s.stride + 1 < s.width ? at + kLanes : nullptr;
      store(rows + (y * s.width_out + x) * kLanes, largest(before, at, after, across[y * s.width_out + x]));
    }
  const int64_t step = s.width_out * kLanes;
  for (int64_t y = 0; y < s.height_out; ++y)
    for (int64_t x = 0; x < s.width_out; ++x) {
      const float* at = rows + y * s.stride * step + x * kLanes;
      const float* above = y > 0 ? at - step : nullptr;
      const float* below = y * s.stride + 1 < s.height ? at + step : nullptr;
      const Vector best = largest(above, at, below, down[y * s.width_out + x]);
      if (out) store(out + (y * s.width_out + x) * kLanes, best);
    }
}

// The pool with given winners: out[pixel] = in[its winner]. The derivative of the maximum along `in`.
inline void max_pool_linear(const float* in, int64_t row, const PoolShape& s, float* rows, float* out,
                            const Winner* across, const Winner* down) {
  for (int64_t y = 0; y < s.height; ++y)
    for (int64_t x = 0; x < s.width_out; ++x) {
      const float* at = in + y * row + x * s.stride * kLanes;
      const Vector before = x > 0 ? load(at - kLanes) : zero();
      const Vector after = x * s.stride + 1 < s.width ? load(at + kLanes) : zero();
      store(rows + (y * s.width_out + x) * kLanes, route(across[y * s.width_out + x], before, load(at), after));
    }
  const int64_t step = s.width_out * kLanes;
  for (int64_t y = 0; y < s.height_out; ++y)
    for (int64_t x = 0; x < s.width_out; ++x) {
      const float* at = rows + y * s.stride * step + x * kLanes;
      const Vector above = y > 0 ? load(at - step) : zero();
      const Vector below = y * s.stride + 1 < s.height ? load(at + step) : zero();
      store(out + (y * s.width_out + x) * kLanes, route(down[y * s.width_out + x], above, load(at), below));
    }
}

RNAS_INLINE void add_to(float* at, Vector v) { store(at, load(at) + v); }

// gx (height, width) dense += the gradient g (height_out, width_out) sent to the winners.
inline void max_pool_backward(const float* g, const PoolShape& s, float* rows, const Winner* across, const Winner* down,
                              float* gx) {
  const int64_t step = s.width_out * kLanes;
  std::memset(rows, 0, s.height * step * sizeof(float));
  for (int64_t y = 0; y < s.height_out; ++y)
    for (int64_t x = 0; x < s.width_out; ++x) {
      const Vector v = load(g + y * step + x * kLanes);
      const Winner w = down[y * s.width_out + x];
      float* at = rows + y * s.stride * step + x * kLanes;
      if (y > 0) add_to(at - step, of_first(w, v));
      add_to(at, of_second(w, v));
      if (y * s.stride + 1 < s.height) add_to(at + step, of_third(w, v));
    }
  for (int64_t y = 0; y < s.height; ++y)
    for (int64_t x = 0; x < s.width_out; ++x) {
      const Vector v = load(rows + y * step + x * kLanes);
      const Winner w = across[y * s.width_out + x];
      float* at = gx + (y * s.width + x * s.stride) * kLanes;
      if (x > 0) add_to(at - kLanes, of_first(w, v));
      add_to(at, of_second(w, v));
      if (x * s.stride + 1 < s.width) add_to(at + kLanes, of_third(w, v));
    }
}

// How many of the three rows or columns around position `at` lie inside.
RNAS_INLINE int64_t inside(int64_t at, int64_t size) { return 1 + (at > 0) + (at + 1 < size); }

// The mean over the pixels inside the image.
inline void average_pool(const float* in, int64_t row, const PoolShape& s, float* rows, float* out) {
  for (int64_t y = 0; y < s.height; ++y)
    for (int64_t x = 0; x < s.width_out; ++x) {
      const float* at = in + y * row + x * s.stride * kLanes;
      Vector sum = load(at);
      if (x > 0) sum += load(at - kLanes);
      if (x * s.stride + 1 < s.width) sum += load(at + kLanes);
      store(rows + (y * s.width_out + x) * kLanes, sum);
    }
  const int64_t step = s.width_out * kLanes;
  for (int64_t y = 0; y < s.height_out; ++y)
    for (int64_t x = 0; x < s.width_out; ++x) {
      const float* at = rows + y * s.stride * step + x * kLanes;
      Vector sum = load(at);
      if (y > 0) sum += load(at - step);
      if (y * s.stride + 1 < s.height) sum += load(at + step);
      const float count = static_cast<float>(inside(y * s.stride, s.height) * inside(x * s.stride, s.width));
      store(out + (y * s.width_out + x) * kLanes, sum * set(1.0f / count));
    }
}

// gx (height, width) dense += the transpose of average_pool on g.
inline void average_pool_backward(const float* g, const PoolShape& s, float* rows, float* gx) {
  const int64_t step = s.width_out * kLanes;
  std::memset(rows, 0, s.height * step * sizeof(float));
  for (int64_t y = 0; y < s.height_out; ++y)
    for (int64_t x = 0; x < s.width_out; ++x) {
      const float count = static_cast<float>(inside(y * s.stride, s.height) * inside(x * s.stride, s.width));
      const Vector v = load(g + y * step + x * kLanes) * set(1.0f / count);
      float* at = rows + y * s.stride * step + x * kLanes;
      if (y > 0) add_to(at - step, v);
      add_to(at, v);
      if (y * s.stride + 1 < s.height) add_to(at + step, v);
    }
  for (int64_t y = 0; y < s.height; ++y)
    for (int64_t x = 0; x < s.width_out; ++x) {
      const Vector v = load(rows + y * step + x * kLanes);
      float* at = gx + (y * s.width + x * s.stride) * kLanes;
      if (x > 0) add_to(at - kLanes, v);
      add_to(at, v);
      if (x * s.stride + 1 < s.width) add_to(at + kLanes, v);
    }
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
