#pragma once

// Four rows of four float32 turned into four columns, in registers that every processor has. Internal linkage: the file
// is compiled once per instruction set.

#include <cstdint>

namespace rnas::cpu {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t FourOf __attribute__((vector_size(16)));

inline Four shuffle(Four a, Four b, FourOf order) {
#if defined(__clang__)
  const float all[8] = {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]};
  return Four{all[order[0]], all[order[1]], all[order[2]], all[order[3]]};
#else
  return __builtin_shuffle(a, b, order);
#endif
}

// The rows begin from_row apart, what becomes of them to_row.
inline void four_by_four(const float* from, int64_t from_row, float* to, int64_t to_row) {
  Four row[4];
  for (int each = 0; each < 4; ++each) row[each] = *reinterpret_cast<const UnalignedFour*>(from + each * from_row);
  const FourOf low{0, 4, 1, 5}, high{2, 6, 3, 7}, left{0, 1, 4, 5}, right{2, 3, 6, 7};
  const Four a = shuffle(row[0], row[1], low), b = shuffle(row[2], row[3], low);
  const Four c = shuffle(row[0], row[1], high), d = shuffle(row[2], row[3], high);
  const Four made[4] = {shuffle(a, b, left), shuffle(a, b, right), shuffle(c, d, left), shuffle(c, d, right)};
  for (int each = 0; each < 4; ++each) *reinterpret_cast<UnalignedFour*>(to + each * to_row) = made[each];
}

}  // namespace
}  // namespace rnas::cpu
