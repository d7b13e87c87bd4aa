#pragma once

// 1x1 convolutions on batch statistics without their outputs. The norm behind y = W r follows from the mean m and the
// covariance S of r = relu(state), which all edges from a state share: mean(y) = W m, var(y) = diag(W S W^T). With them
// convolution, norm and mixing weight are one matrix and a constant. Backward, G = sum g (r - m)^T gives all that the norm
// and the weights need, and the gradient of r is linear in g and r: no output is written, read or computed again.
//
// Here is what an edge or a state needs for that, on double sums of float32 products. Who calls it: batch_forward.h,
// matrices_backward.h.

#include <vector>

#include "mixed/norms.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// relu of rows [first, first + rows) of image n of a state, less a pivot (padded; null: none): (groups, pixels).
inline void load_rows(const Plan& plan, const State& state, int64_t n, int64_t first, int64_t rows, const float* pivot,
                      float* to) {
  State part = state;
  part.data += n * state.image + first * state.width * state.pixel;
  part.height = rows;
  const int64_t width = state.width, plane = rows * width * kLanes;
  visit(part, 0, plan.shape.channels, [&](int64_t group, int64_t y, int64_t x, Vector v) {
    const Vector r = relu(v);
    store(to + group * plane + (y * width + x) * kLanes, pivot ? r - load(pivot + group * kLanes) : r);
  });
}

// Of r: the mean (padded) and the covariance (padded, padded), zero beyond C.
struct Covariance {
  double *mean, *matrix;
  static int64_t size(const Plan& plan) { return plan.padded * (plan.padded + 1); }
  static Covariance at(const Plan& plan, double* memory) { return {memory, memory + plan.padded}; }
};

// Outer products are summed in float32 over so many pixels.
constexpr int64_t kOuterRun = 128;

// A thread's sum of outer products over pixels: (padded, padded), float32 over a few pixels and double in the end.
class OuterSums {
 public:
  OuterSums(Arena& arena, const Plan& plan)
      : padded_(plan.padded),
        now_(arena.take<float>(plan.padded * plan.padded)),
        total_(arena.take<double>(plan.padded * plan.padded)) {}
  void clear() {
    std::memset(now_, 0, padded_ * padded_ * sizeof(float));
    std::memset(total_, 0, padded_ * padded_ * sizeof(double));
    pixels_ = 0;
  }
  // sum[input][output] += d[input] * g[output] over a run of pixels that is dense in each plane.
  void add(const float* d, int64_t d_plane, const float* g, int64_t g_plane, int64_t pixels) {
    const int64_t groups = padded_ / kLanes;
    runs(pixels, [&](int64_t start, int64_t count) {
      pointwise_weight(d + start, d_plane, groups, g + start, g_plane, groups, count, now_, padded_);
    });
  }
  // The same of d with itself; groups of outputs in front of the input's are left out.
  void add_symmetric(const float* d, int64_t plane, int64_t pixels) {
    runs(pixels, [&](int64_t start, int64_t count) {
      for (int64_t group = 0; group * kLanes < padded_; ++group) {
        const float* from = d + start + group * plane;
        pointwise_weight(from, plane, 1, from, plane, padded_ / kLanes - group, count,
                         now_ + group * kLanes * (padded_ + 1), padded_);
      }
    });
  }
  // The sum so far, in double.
  const double* total() {
    for (int64_t at = 0; at < padded_ * padded_; ++at) {
      total_[at] += now_[at];
      now_[at] = 0;
    }
    pixels_ = 0;
    return total_;
  }

 private:
  template <typename Use> void runs(int64_t pixels, const Use& use) {
    for (int64_t start = 0, count; start < pixels; start += count) {
      count = std::min(pixels - start, kOuterRun);
      if (pixels_ + count > kOuterRun) total();
      use(start * kLanes, count);
      pixels_ += count;
    }
  }
  int64_t padded_, pixels_ = 0;  // pixels: how many are in `now`
  float* now_;
  double* total_;
};

// A thread's sums for the covariance of r: around a value of its own, so that none far from the others takes digits away.
class CovarianceSums {
 public:
  CovarianceSums(Arena& arena, const Plan& plan)
      : pivot_(arena.take<float>(plan.padded)), sum_(arena.take<double>(plan.padded)), outer_(arena, plan) {}
  void clear() { count_ = 0; }
  int64_t count() const { return count_; }

  // Image n of a state.
  void add(const Plan& plan, const State& state, int64_t n, const Scratch& s) {
    if (count_ == 0) begin(plan, state, n, s);
    count_ += state.height * state.width;
    chunks(plan, [&](int64_t first, int64_t rows) {
      const int64_t pixels = rows * state.width, plane = pixels * kLanes;
      {
        const Section section(s.clock, Work::tiles);
        load_rows(plan, state, n, first, rows, pivot_, s.d);
      }
      const Section section(s.clock, Work::norms);
      add_dot(plan, s.d, nullptr, plane, pixels, nullptr, s.sums, sum_);
      outer_.add_symmetric(s.d, plane, pixels);
    });
  }

  // to.mean += the sum of r over all pixels.
  void add_sum(const Plan& plan, double* to) const {
    for (int64_t c = 0; c < plan.padded; ++c) to[c] += sum_[c] + static_cast<double>(count_) * pivot_[c];
  }
  // to += the sum of (r - mean) (r - mean)^T, its upper half.
  void add_squares(const Plan& plan, const double* mean, double* to) {
    const double* outer = outer_.total();
    const double count = static_cast<double>(count_);
    std::vector<double> own(plan.padded), away(plan.padded);  // mean of this thread around its pivot, and from the mean
    for (int64_t c = 0; c < plan.padded; ++c) {
      own[c] = sum_[c] / count;
      away[c] = own[c] + (pivot_[c] - mean[c]);
    }
    for (int64_t a = 0; a < plan.padded; ++a)
      for (int64_t b = a; b < plan.padded; ++b)
        to[a * plan.padded + b] += outer[a * plan.padded + b] + count * (away[a] * away[b] - own[a] * own[b]);
  }

 private:
  // The pivot: the mean of a few rows of the first image.
  void begin(const Plan& plan, const State& state, int64_t n, const Scratch& s) {
    outer_.clear();
    std::memset(sum_, 0, plan.padded * sizeof(double));
    const int64_t step = std::max<int64_t>(1, state.height / 4), pixels = state.width;
    int64_t rows = 0;
    for (int64_t y = step / 2; y < state.height; y += step, ++rows) {
      load_rows(plan, state, n, y, 1, nullptr, s.d);
      add_dot(plan, s.d, nullptr, pixels * kLanes, pixels, nullptr, s.sums, sum_);
    }
    for (int64_t c = 0; c < plan.padded; ++c) {
      pivot_[c] = static_cast<float>(sum_[c] / static_cast<double>(rows * pixels));
      sum_[c] = 0;
    }
  }

  float* pivot_;
  double* sum_;
  OuterSums outer_;
  int64_t count_ = 0;  // pixels
};

// The covariance of a state from the sums of all threads.
inline void merge(const Plan& plan, std::vector<CovarianceSums>& threads, const Covariance& to) {
  const int64_t padded = plan.padded;
  std::memset(to.mean, 0, padded * sizeof(double));
  std::memset(to.matrix, 0, padded * padded * sizeof(double));
  int64_t pixels = 0;
  for (const CovarianceSums& each : threads) {
    pixels += each.count();
    if (each.count()) each.add_sum(plan, to.mean);
  }
  const double share = 1.0 / static_cast<double>(pixels);
  for (int64_t c = 0; c < padded; ++c) to.mean[c] *= share;
  for (CovarianceSums& each : threads)
    if (each.count()) each.add_squares(plan, to.mean, to.matrix);
  for (int64_t a = 0; a < padded; ++a)
    for (int64_t b = a; b < padded; ++b) to.matrix[b * padded + a] = to.matrix[a * padded + b] *= share;
}

// to (C, padded) = W S, with W (C, C) as PyTorch has it: outputs first.
inline void times_covariance(const Plan& plan, const float* w, const Covariance& of, double* to) {
  const int64_t c = plan.shape.channels, padded = plan.padded;
  std::memset(to, 0, c * padded * sizeof(double));
  for (int64_t output = 0; output < c; ++output)
    for (int64_t input = 0; input < c; ++input) {
      const double factor = w[output * c + input];
      const double* row = of.matrix + input * padded;
      double* sum = to + output * padded;
#pragma GCC ivdep
      for (int64_t other = 0; other < padded; ++other) sum[other] += factor * row[other];
    }
}

// Mean and variance (C) of y = W r. False where what the terms of a variance leave of each other is so small that their
// roundings count: about 1e-7 for a run of pixels that is summed in float32, less for many. (At the bounds below, a
// variance was 1e-6 off.)
inline bool output_moments(const Plan& plan, const float* w, const Covariance& of, double* mean, double* variance) {
  const int64_t c = plan.shape.channels, padded = plan.padded;
  const double runs = static_cast<double>(plan.shape.batch * plan.pixels_out()) / kOuterRun;
  const double least = 0.125 / std::sqrt(std::max(1.0, runs));
  std::vector<double> products(c * padded);
  times_covariance(plan, w, of, products.data());
  bool exact = true;
  for (int64_t output = 0; output < c; ++output) {
    double terms = 0;
    mean[output] = variance[output] = 0;
    for (int64_t input = 0; input < c; ++input) {
      const double factor = w[output * c + input];
      mean[output] += factor * of.mean[input];
      variance[output] += factor * products[output * padded + input];
      terms += factor * factor * of.matrix[input * (padded + 1)];
    }
    exact = exact && !(variance[output] < least * terms);
    variance[output] = std::max(variance[output], 0.0);
  }
  return exact;
}

// W, its outputs times `scale` (C; null: ones), as `pointwise` takes it: (padded, padded), inputs first.
inline void pack_matrix(const Plan& plan, const float* w, const double* scale, float* to) {
  const int64_t c = plan.shape.channels;
  std::memset(to, 0, plan.padded * plan.padded * sizeof(float));
  for (int64_t output = 0; output < c; ++output)
    for (int64_t input = 0; input < c; ++input)
      to[input * plan.padded + output] = static_cast<float>((scale ? scale[output] : 1.0) * w[output * c + input]);
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
