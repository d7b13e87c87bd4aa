#include <algorithm>

#include "rnas/relu_conv_norm.h"

namespace rnas::cpu {
namespace {

// The positions along one axis at which entry `tap` of the kernel lies inside the image: [begin, end).
struct Inside {
  Inside(int64_t tap, int64_t size, int64_t positions, int64_t stride, int64_t padding) {
    begin = std::min(positions, std::max<int64_t>(0, (padding - tap + stride - 1) / stride));
    end = std::max(begin, std::min(positions, (size - 1 + padding - tap) / stride + 1));
    if (size - 1 + padding - tap < 0) end = begin;
  }
  int64_t begin, end;
};

}  // namespace

void gather_patches(const PatchShape& s, const float* image, float* patches, int threads) {
  const int64_t taps = s.kernel_height * s.kernel_width, size = s.channels * taps;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < s.batch * s.height_out; ++row) {
    float* const to = patches + row * s.width_out * size;
    const float* const from = image + row / s.height_out * s.strides[0];
    for (int64_t each = 0; each < size; ++each) {
      const int64_t c = each / taps, ky = each % taps / s.kernel_width, kx = each % s.kernel_width;
      const int64_t y = row % s.height_out * s.stride - s.padding + ky;
      Inside inside(kx, s.width, s.width_out, s.stride, s.padding);
      if (y < 0 || y >= s.height) inside.begin = inside.end = s.width_out;
      const float* const at = from + c * s.strides[1] + y * s.strides[2] + (kx - s.padding) * s.strides[3];
      const int64_t step = s.stride * s.strides[3];
      for (int64_t x = 0; x < inside.begin; ++x) to[x * size + each] = 0;
      for (int64_t x = inside.begin; x < inside.end; ++x) to[x * size + each] = at[x * step];
      for (int64_t x = inside.end; x < s.width_out; ++x) to[x * size + each] = 0;
    }
  }
}

void scatter_patches(const PatchShape& s, const float* patches, float* image, int threads) {
  const int64_t taps = s.kernel_height * s.kernel_width, size = s.channels * taps;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < s.batch * s.height; ++row) {
    const int64_t y = row % s.height, batch = row / s.height;
    float* const to = image + batch * s.strides[0] + y * s.strides[2];
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t x = 0; x < s.width; ++x) to[c * s.strides[1] + x * s.strides[3]] = 0;
    for (int64_t each = 0; each < size; ++each) {
      const int64_t c = each / taps, ky = each % taps / s.kernel_width, kx = each % s.kernel_width;
      const int64_t above = y + s.padding - ky;  // of the position's first row times the stride
      if (above < 0 || above % s.stride || above / s.stride >= s.height_out) continue;
      const float* const from = patches + (batch * s.height_out + above / s.stride) * s.width_out * size + each;
      const Inside inside(kx, s.width, s.width_out, s.stride, s.padding);
      float* const at = to + c * s.strides[1] + (kx - s.padding) * s.strides[3];
      for (int64_t x = inside.begin; x < inside.end; ++x) at[x * s.stride * s.strides[3]] += from[x * size];
    }
  }
}

}  // namespace rnas::cpu
