#include <algorithm>

#include "rnas/relu_conv_norm.h"

namespace rnas::cpu {

// use(at in the image, or -1 beyond its border; at in the gathered pixels) for each of the 2 * N * H' * W' pixels.
template <typename Use> static void each_pixel(const PixelShape& s, int threads, const Use& use) {
  const int64_t height = (s.height + 1) / 2, width = (s.width + 1) / 2, rows = s.batch * height;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < width; ++column)
      for (int64_t further = 0; further < 2; ++further) {
        const int64_t y = 2 * (row % height) + further, x = 2 * column + further;
        const bool inside = y < s.height && x < s.width;
        use(inside ? ((row / height * s.height + y) * s.width + x) * s.channels : -1,
            ((row * width + column) * 2 + further) * s.channels);
      }
}

void gather_pixels(const PixelShape& s, const float* image, float* pixels, int threads) {
  each_pixel(s, threads, [&](int64_t from, int64_t to) {
    if (from < 0)
      std::fill_n(pixels + to, s.channels, 0.0f);
    else
      std::copy_n(image + from, s.channels, pixels + to);
  });
}

void scatter_pixels(const PixelShape& s, const float* pixels, float* image, int threads) {
  // A pixel is even in both directions, odd in both, or not gathered at all.
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < s.batch * s.height; ++row) {
    const int64_t y = row % s.height, width = (s.width + 1) / 2, height = (s.height + 1) / 2;
    const float* from = pixels + ((row / s.height * height + y / 2) * width * 2 + y % 2) * s.channels;
    float* to = image + row * s.width * s.channels;
    for (int64_t x = 0; x < s.width; ++x, to += s.channels)
      if (x % 2 == y % 2)
        std::copy_n(from + x / 2 * 2 * s.channels, s.channels, to);
      else
        std::fill_n(to, s.channels, 0.0f);
  }
}

}  // namespace rnas::cpu
