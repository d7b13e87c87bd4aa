#pragma once

// Images as the caller may have them, channels first, brought into dense ones and back.

#include <algorithm>

#include "four.h"
#include "mixed/plan.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// Pixels of a plane that are taken together: a line of the cache, as planes may lie on the same cache sets.
constexpr int64_t kLine = 16;

// Calls four(dense, plane) for every four channels of four pixels that there are, and one(dense, plane) for every other
// value: where they are, or begin, in a dense image of `pixels` pixels and in (C, pixels). plane is -1 beyond C.
template <typename Four, typename One>
RNAS_INLINE void visit_planes(const Plan& plan, int64_t pixels, const Four& four, const One& one) {
  const int64_t c = plan.shape.channels;
  for (int64_t begin = 0; begin < pixels; begin += kLine) {
    const int64_t end = std::min(pixels, begin + kLine);
    for (int64_t channel = 0; channel < plan.padded; channel += 4) {
      const int64_t dense = channel / kLanes * pixels * kLanes + channel % kLanes, plane = channel * pixels;
      const int64_t whole = channel + 4 <= c ? (end - begin) / 4 * 4 : 0;
      for (int64_t p = begin; p < begin + whole; p += 4) four(dense + p * kLanes, plane + p);
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
      [&](int64_t dense, int64_t plane) { four_by_four(from + plane, pixels, to + dense, kLanes); },
      [&](int64_t dense, int64_t plane) { to[dense] = plane < 0 ? 0.0f : from[plane]; });
}

// A dense image to (C, pixels).
inline void store_planes(const Plan& plan, const float* from, int64_t pixels, float* to) {
  visit_planes(
      plan, pixels,
      [&](int64_t dense, int64_t plane) { four_by_four(from + dense, kLanes, to + plane, pixels); },
      [&](int64_t dense, int64_t plane) {
        if (plane >= 0) to[plane] = from[dense];
      });
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
