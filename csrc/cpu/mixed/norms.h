#pragma once

// Batch norms of a cell as tables of channels, and the gradients of what is linear around them.

#include <algorithm>
#include <cmath>

#include "mixed/stage.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// (norms, padded) each; zero in the channels beyond C. scale * y + shift = gamma * (y - mean) * inverse + beta.
struct Norms {
  float *mean, *inverse, *gamma, *beta, *scale, *shift;
  int64_t padded;
  float* row(float* table, int64_t norm) const { return table + norm * padded; }
};

inline Norms take_norms(Arena& arena, const Plan& plan) {
  const int64_t size = plan.norms * plan.padded;
  Norms n{};
  n.padded = plan.padded;
  for (float** table : {&n.mean, &n.inverse, &n.gamma, &n.beta, &n.scale, &n.shift}) *table = arena.take<float>(size);
  return n;
}

inline void clear(const Plan& plan, const Norms& n) {
  for (float* table : {n.mean, n.inverse, n.gamma, n.beta, n.scale, n.shift})
    std::memset(table, 0, plan.norms * plan.padded * sizeof(float));
}

// Fills the rows of one norm.
inline void set_norm(const Plan& plan, const MixedInputs& in, const Norms& n, int64_t norm, const double* mean,
                     const double* variance) {
  const int64_t c = plan.shape.channels, from = norm * c, to = norm * plan.padded;
  for (int64_t channel = 0; channel < c; ++channel) {
    const double inverse = 1.0 / std::sqrt(variance[channel] + in.eps);
    const double gamma = in.gamma ? in.gamma[from + channel] : 1.0, beta = in.beta ? in.beta[from + channel] : 0.0;
    n.mean[to + channel] = static_cast<float>(mean[channel]);
    n.inverse[to + channel] = static_cast<float>(inverse);
    n.gamma[to + channel] = static_cast<float>(gamma);
    n.beta[to + channel] = static_cast<float>(beta);
    n.scale[to + channel] = static_cast<float>(gamma * inverse);
    n.shift[to + channel] = static_cast<float>(beta - mean[channel] * gamma * inverse);
  }
}

// Fills all rows from in.mean and in.variance.
inline void set_norms(const Plan& plan, const MixedInputs& in, const Norms& n) {
  const int64_t c = plan.shape.channels;
  clear(plan, n);
  std::vector<double> mean(c), variance(c);
  for (int64_t norm = 0; norm < plan.norms; ++norm) {
    for (int64_t channel = 0; channel < c; ++channel) {
      mean[channel] = in.mean[norm * c + channel];
      variance[channel] = in.variance[norm * c + channel];
    }
    set_norm(plan, in, n, norm, mean.data(), variance.data());
  }
}

// The moments of all images together (Chan, Golub, LeVeque 1979), in the order of the images. each: (images, 2, padded).
inline void merge_moments(const Plan& plan, const double* each, int64_t pixels, double* mean, double* variance) {
  const int64_t images = plan.shape.batch, channels = plan.shape.channels;
  std::fill_n(mean, channels, 0.0);
  std::fill_n(variance, channels, 0.0);
  for (int64_t n = 0; n < images; ++n) {
    const double* other = each + 2 * n * plan.padded;
    const double *squares = other + plan.padded, total = static_cast<double>((n + 1) * pixels);
    const double share = static_cast<double>(pixels) / total, between = static_cast<double>(n * pixels) * share;
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = other[c] - mean[c];
      mean[c] += delta * share;
      variance[c] += squares[c] + delta * delta * between;
    }
  }
  const double count = static_cast<double>(images * pixels);
  for (int64_t c = 0; c < channels; ++c) variance[c] /= count;
}

// g_y = a * g + b * y + d: the gradient behind a norm that is followed by a factor (Ioffe, Szegedy 2015, section 3).
struct Affine {
  float *a, *b, *d;  // (padded) each
};

inline Affine take_affine(Arena& arena, const Plan& plan) {
  float* a = arena.take<float>(plan.padded);
  float* b = arena.take<float>(plan.padded);
  return {a, b, arena.take<float>(plan.padded)};
}

// On batch statistics over `count` values. dot: sum of g * (y - mean), sum: of g; factor: what multiplies the norm.
inline void batch_gradient(const Plan& plan, const Norms& n, int64_t norm, double factor, const double* dot,
                           const double* sum, double count, const Affine& to) {
  for (int64_t c = 0; c < plan.padded; ++c) {
    const int64_t at = norm * plan.padded + c;
    const double inverse = n.inverse[at], a = factor * n.gamma[at] * inverse;
    const double slope = a * inverse * inverse * dot[c] / count;
    to.a[c] = static_cast<float>(a);
    to.b[c] = static_cast<float>(-slope);
    to.d[c] = static_cast<float>(-a * sum[c] / count + slope * n.mean[at]);
  }
}

// a * scale * g + b * y + d on `rows` rows of a dense image, into a tile.
inline Rows apply(const Plan& plan, const Affine& f, float scale, const float* g, const float* y, int64_t rows,
                  const Tile& to) {
  const int64_t width = plan.width_out;
  for (int64_t group = 0; group < plan.groups; ++group) {
    const Vector a = load(f.a + group * kLanes) * set(scale), b = load(f.b + group * kLanes), d = load(f.d + group * kLanes);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = group * plan.plane_out() + row * width * kLanes;
      float* out = to.data + group * to.plane + row * to.row;
      for (int64_t x = 0; x < width * kLanes; x += kLanes)
        store(out + x, fma(load(g + at + x), a, fma(load(y + at + x), b, d)));
    }
  }
  return {to.data, to.row, to.plane};
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
