#include "rnas/transpose.h"

#include <algorithm>

#include "four.h"

namespace rnas::cpu {
namespace {

// Pixels of a task, and those that are taken together: a line of the cache, of planes that may lie on the same cache sets.
constexpr int64_t kTask = 256, kLine = 16;

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
