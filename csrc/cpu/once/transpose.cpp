#include "rnas/transpose.h"

#include <algorithm>

namespace rnas::cpu {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t Order __attribute__((vector_size(16)));

// Pixels of a task, and those that are taken together: a line of the cache, of planes that may lie on the same cache sets.
constexpr int64_t kTask = 256, kLine = 16;

inline Four shuffle(Four a, Four b, Order order) {
#if defined(__clang__)
  const float all[8] = {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]};
  return Four{all[order[0]], all[order[1]], all[order[2]], all[order[3]]};
#else
  return __builtin_shuffle(a, b, order);
#endif
}

// Four rows of four.
inline void four_by_four(const float* from, int64_t from_row, float* to, int64_t to_row) {
  Four row[4];
  for (int each = 0; each < 4; ++each) row[each] = *reinterpret_cast<const Unaligned*>(from + each * from_row);
  const Order low{0, 4, 1, 5}, high{2, 6, 3, 7}, left{0, 1, 4, 5}, right{2, 3, 6, 7};
  const Four a = shuffle(row[0], row[1], low), b = shuffle(row[2], row[3], low);
  const Four c = shuffle(row[0], row[1], high), d = shuffle(row[2], row[3], high);
  const Four made[4] = {shuffle(a, b, left), shuffle(a, b, right), shuffle(c, d, left), shuffle(c, d, right)};
  for (int each = 0; each < 4; ++each) *reinterpret_cast<Unaligned*>(to + each * to_row) = made[each];
}

}  // namespace

void transpose(int64_t batch, int64_t rows, int64_t columns, const float* from, int64_t image, int64_t row, float* to,
               int threads) {
  // The longer side are the pixels.
  const bool wide = rows <= columns;
  const int64_t pixels = wide ? columns : rows, channels = wide ? rows : columns;
  const int64_t tasks = (pixels + kTask - 1) / kTask;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < batch * tasks; ++task) {
    const int64_t n = task / tasks, begin = task % tasks * kTask, end = std::min(pixels, begin + kTask);
    const float* source = from + n * image;
    float* target = to + n * rows * columns;
    const auto at = [&](int64_t pixel, int64_t channel) {
      return source + (wide ? channel * row + pixel : pixel * row + channel);
    };
    const auto place = [&](int64_t pixel, int64_t channel) {
      return target + (wide ? pixel * rows + channel : channel * rows + pixel);
    };
    for (int64_t pixel = begin; pixel < end; pixel += kLine)
      for (int64_t channel = 0; channel < channels; channel += 4) {
        const int64_t last_pixel = std::min(end, pixel + kLine), last_channel = std::min(channels, channel + 4);
        if (last_pixel - pixel == kLine && last_channel - channel == 4) {
          for (int64_t p = pixel; p < last_pixel; p += 4) four_by_four(at(p, channel), row, place(p, channel), rows);
          continue;
        }
        for (int64_t p = pixel; p < last_pixel; ++p)
          for (int64_t c = channel; c < last_channel; ++c) *place(p, c) = *at(p, c);
      }
  }
}

}  // namespace rnas::cpu
