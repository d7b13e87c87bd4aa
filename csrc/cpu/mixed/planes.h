#pragma once

// Images as the caller may have them, channels first, brought into dense ones and back.

#include <algorithm>
#include <type_traits>

#include "four.h"
#include "mixed/plan.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// Pixels of a plane that are taken together: a line of the cache, as planes may lie on the same cache sets.
constexpr int64_t kLine = 16;

// How many rows and columns the largest squares have that are turned in registers; the others have 4.
constexpr int kTurned = kLanes == 16 ? 16 : 4;

static_assert(kTurned == 4 || kTurned == kLine, "whole lines are turned");

template <int Size> using Square = std::integral_constant<int, Size>;

// Rows turned into columns. The rows begin from_row apart, what becomes of them to_row.
RNAS_INLINE void turn(Square<4>, const float* from, int64_t from_row, float* to, int64_t to_row) {
  four_by_four(from, from_row, to, to_row);
}
#if defined(RNAS_LEVEL_avx512)
// Four times the rows of the lower half go between those of the upper, value by value.
RNAS_INLINE void turn(Square<16>, const float* from, int64_t from_row, float* to, int64_t to_row) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  Vector rows[16];
#pragma GCC unroll 16
  for (int each = 0; each < 16; ++each) rows[each] = load(from + each * from_row);
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
    Vector made[16];
#pragma GCC unroll 8
    for (int each = 0; each < 8; ++each) {
      made[2 * each] = _mm512_permutex2var_ps(rows[each], low, rows[each + 8]);
      made[2 * each + 1] = _mm512_permutex2var_ps(rows[each], high, rows[each + 8]);
    }
#pragma GCC unroll 16
    for (int each = 0; each < 16; ++each) rows[each] = made[each];
  }
#pragma GCC unroll 16
  for (int each = 0; each < 16; ++each) store(to + each * to_row, rows[each]);
}
#endif

// Calls square(Square, dense, plane) for every square of pixels and channels that there is, as large as can be, and
// one(dense, plane) for every other value: where they are, or begin, in a dense image of `pixels` pixels and in
// (C, pixels). plane is -1 beyond C.
template <typename Turn, typename One>
RNAS_INLINE void visit_planes(const Plan& plan, int64_t pixels, const Turn& square, const One& one) {
  const int64_t c = plan.shape.channels;
  for (int64_t begin = 0; begin < pixels; begin += kLine) {
    const int64_t end = std::min(pixels, begin + kLine);
    for (int64_t channel = 0, step; channel < plan.padded; channel += step) {
      const int64_t dense = channel / kLanes * pixels * kLanes + channel % kLanes, plane = channel * pixels;
      step = 4;
      if constexpr (kTurned == 16)
        if (end - begin == kLine && channel + kTurned <= c) {
          square(Square<kTurned>(), dense + begin * kLanes, plane + begin);
          step = kTurned;
          continue;
        }
      const int64_t whole = channel + 4 <= c ? (end - begin) / 4 * 4 : 0;
      for (int64_t p = begin; p < begin + whole; p += 4) square(Square<4>(), dense + p * kLanes, plane + p);
      for (int64_t p = begin + whole; p < end; ++p)
        for (int64_t each = 0; each < 4; ++each)
          one(dense + p * kLanes + each, channel + each < c ? plane + each * pixels + p : -1);
    }
  }
}

// (C, pixels) to a dense image, zero beyond C.
inline void load_planes(const Plan& plan, const float* from, int64_t pixels, float* to) {
  visit_planes(
      plan, pixels,
      [&](auto size, int64_t dense, int64_t plane) { turn(size, from + plane, pixels, to + dense, kLanes); },
      [&](int64_t dense, int64_t plane) { to[dense] = plane < 0 ? 0.0f : from[plane]; });
}

// A dense image to (C, pixels).
inline void store_planes(const Plan& plan, const float* from, int64_t pixels, float* to) {
  visit_planes(
      plan, pixels,
      [&](auto size, int64_t dense, int64_t plane) { turn(size, from + dense, kLanes, to + plane, pixels); },
      [&](int64_t dense, int64_t plane) {
        if (plane >= 0) to[plane] = from[dense];
      });
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
