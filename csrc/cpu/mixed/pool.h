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

RNAS_INLINE void add_to(float* at, Vector v) { store(at, load(at) + v); }

RNAS_INLINE Vector of_first(Winner w, Vector v) { return keep(static_cast<Bits>(~(w.second | w.third) & kAllBits), v); }
RNAS_INLINE Vector of_second(Winner w, Vector v) { return keep(static_cast<Bits>(w.second & ~w.third), v); }
RNAS_INLINE Vector of_third(Winner w, Vector v) { return keep(w.third, v); }

RNAS_INLINE Vector route(Winner w, Vector a, Vector b, Vector c) { return of_first(w, a) + of_second(w, b) + of_third(w, c); }

// The sizes of a pool, (height, width) -> (height_out, width_out).
struct PoolShape {
  int64_t height, width, stride, height_out, width_out;
};

// The maximum of three values of which the first and the last may lie outside the image.
template <bool First, bool Last> RNAS_INLINE Vector largest(const float* at, int64_t step, Winner* w) {
  Vector best = load(at);
  Winner found{kAllBits, 0};
  if (First) {
    const Vector first = load(at - step);
    found.second = beats(best, first);
    best = blend(found.second, best, first);
  }
  if (Last) {
    const Vector last = load(at + step);
    found.third = beats(last, best);
    best = blend(found.third, last, best);
  }
  if (w) *w = found;
  return best;
}

// Calls use(pixel out, first, last): whether the neighbour before and the one after the pixel are inside, as constants.
struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};
template <typename Use> RNAS_INLINE void along(int64_t size, int64_t size_out, int64_t stride, const Use& use) {
  size > 1 ? use(int64_t{0}, No(), Yes()) : use(int64_t{0}, No(), No());
  const int64_t whole = (size_out - 1) * stride + 1 < size ? size_out : size_out - 1;
  int64_t x = 1;
  for (; x < whole; ++x) use(x, Yes(), Yes());
  for (; x < size_out; ++x) use(x, Yes(), No());
}

// in: pixel (0, 0), rows `row` apart. out (height_out, width_out) dense, or null when only the winners are wanted.
// rows: scratch of height * width_out vectors. across (height, width_out), down (height_out, width_out), or both null.
template <bool Winners>
RNAS_INLINE void max_pool_loops(const float* in, int64_t row, const PoolShape& s, float* rows, float* out,
                                Winner* across, Winner* down) {
  for (int64_t y = 0; y < s.height; ++y)
    along(s.width, s.width_out, s.stride, [&](int64_t x, auto first, auto last) {
      const int64_t to = y * s.width_out + x;
      store(rows + to * kLanes, largest<first.value, last.value>(in + y * row + x * s.stride * kLanes, kLanes,
                                                                 Winners ? across + to : nullptr));
    });
  const int64_t step = s.width_out * kLanes;
  along(s.height, s.height_out, s.stride, [&](int64_t y, auto first, auto last) {
    for (int64_t x = 0; x < s.width_out; ++x) {
      const int64_t to = y * s.width_out + x;
      const Vector best = largest<first.value, last.value>(rows + y * s.stride * step + x * kLanes, step,
                                                           Winners ? down + to : nullptr);
      if (out) store(out + to * kLanes, best);
    }
  });
}

inline void max_pool(const float* in, int64_t row, const PoolShape& s, float* rows, float* out, Winner* across,
                     Winner* down) {
  if (across)
    max_pool_loops<true>(in, row, s, rows, out, across, down);
  else
    max_pool_loops<false>(in, row, s, rows, out, nullptr, nullptr);
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

// The value behind a pixel of a pool of stride 1: what the pixel itself and its two neighbours send to it.
template <bool First, bool Last> RNAS_INLINE Vector collect(const float* g, const Winner* w, int64_t step) {
  const Winner own = w[0];
  Vector sum = of_second(own, load(g));
  if (First) sum = add_where(w[-step].third, sum, load(g - step * kLanes));
  if (Last) {
    const Winner after = w[step];
    sum = add_where(static_cast<Bits>(~(after.second | after.third) & kAllBits), sum, load(g + step * kLanes));
  }
  return sum;
}

// gx (height, width) dense += the gradient g (height_out, width_out) sent to the winners.
inline void max_pool_backward(const float* g, const PoolShape& s, float* rows, const Winner* across, const Winner* down,
                              float* gx) {
  const int64_t width = s.width_out, step = width * kLanes;
  if (s.stride == 1) {
    along(s.height, s.height, 1, [&](int64_t y, auto first, auto last) {
      for (int64_t x = 0; x < width; ++x) {
        const int64_t at = y * width + x;
        store(rows + at * kLanes, collect<first.value, last.value>(g + at * kLanes, down + at, width));
      }
    });
    for (int64_t y = 0; y < s.height; ++y)
      along(s.width, s.width, 1, [&](int64_t x, auto first, auto last) {
        const int64_t at = y * width + x;
        add_to(gx + at * kLanes, collect<first.value, last.value>(rows + at * kLanes, across + at, 1));
      });
    return;
  }
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

// The sum of a pixel and its neighbours inside the image.
template <bool First, bool Last> RNAS_INLINE Vector sum_of(const float* at, int64_t step) {
  Vector sum = load(at);
  if (First) sum += load(at - step);
  if (Last) sum += load(at + step);
  return sum;
}

// The mean over the pixels inside the image.
inline void average_pool(const float* in, int64_t row, const PoolShape& s, float* rows, float* out) {
  for (int64_t y = 0; y < s.height; ++y)
    along(s.width, s.width_out, s.stride, [&](int64_t x, auto first, auto last) {
      store(rows + (y * s.width_out + x) * kLanes,
            sum_of<first.value, last.value>(in + y * row + x * s.stride * kLanes, kLanes));
    });
  const int64_t step = s.width_out * kLanes;
  along(s.height, s.height_out, s.stride, [&](int64_t y, auto first, auto last) {
    const int64_t inside_rows = 1 + first.value + last.value;
    along(s.width, s.width_out, s.stride, [&](int64_t x, auto left, auto right) {
      const Vector share = set(1.0f / static_cast<float>(inside_rows * (1 + left.value + right.value)));
      store(out + (y * s.width_out + x) * kLanes,
            share * sum_of<first.value, last.value>(rows + y * s.stride * step + x * kLanes, step));
    });
  });
}

// What an average over a row or column of `size` pixels gives to each of those around position `at` of stride 1.
RNAS_INLINE float share(int64_t at, int64_t size) { return 1.0f / static_cast<float>(inside(at, size)); }

// The transpose of average_pool of stride 1 on g: the shares of rows and of columns one after the other. use(y, x, value)
// gets it pixel by pixel, and end(y) is called behind each row.
template <typename Use, typename End>
RNAS_INLINE void average_pool_transposed(const float* g, const PoolShape& s, float* rows, const Use& use, const End& end) {
  const int64_t step = s.width * kLanes;
  along(s.height, s.height, 1, [&](int64_t y, auto first, auto last) {
    const Vector own = set(share(y, s.height)), above = set(y > 0 ? share(y - 1, s.height) : 0.0f);
    const Vector below = set(y + 1 < s.height ? share(y + 1, s.height) : 0.0f);
    for (int64_t at = y * step; at < (y + 1) * step; at += kLanes) {
      Vector sum = own * load(g + at);
      if (first.value) sum = fma(above, load(g + at - step), sum);
      if (last.value) sum = fma(below, load(g + at + step), sum);
      store(rows + at, sum);
    }
  });
  const Vector third = set(share(1, 3));
  for (int64_t y = 0; y < s.height; ++y) {
    along(s.width, s.width, 1, [&](int64_t x, auto first, auto last) {
      const int64_t at = (y * s.width + x) * kLanes;
      const bool whole = x > 1 && x + 2 < s.width;  // all three are of three
      Vector sum = load(rows + at) * (whole ? third : set(share(x, s.width)));
      if (first.value) sum = fma(whole ? third : set(share(x - 1, s.width)), load(rows + at - kLanes), sum);
      if (last.value) sum = fma(whole ? third : set(share(x + 1, s.width)), load(rows + at + kLanes), sum);
      use(y, x, sum);
    });
    end(y);
  }
}

// gx (height, width) dense += the transpose of average_pool on g. rows: scratch of (height + height_out) * width_out.
inline void average_pool_backward(const float* g, const PoolShape& s, float* rows, float* gx) {
  if (s.stride == 1)
    return average_pool_transposed(
        g, s, rows, [&](int64_t y, int64_t x, Vector v) { add_to(gx + (y * s.width + x) * kLanes, v); }, [](int64_t) {});
  const int64_t step = s.width_out * kLanes;
  float* shares = rows + s.height * step;
  for (int64_t y = 0; y < s.height_out; ++y)
    for (int64_t x = 0; x < s.width_out; ++x) {
      const float count = static_cast<float>(inside(y * s.stride, s.height) * inside(x * s.stride, s.width));
      store(shares + y * step + x * kLanes, load(g + y * step + x * kLanes) * set(1.0f / count));
    }
  std::memset(rows, 0, s.height * step * sizeof(float));
  for (int64_t y = 0; y < s.height_out; ++y)
    for (int64_t x = 0; x < s.width_out; ++x) {
      const Vector v = load(shares + y * step + x * kLanes);
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
