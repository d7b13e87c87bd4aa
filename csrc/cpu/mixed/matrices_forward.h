#pragma once

// What 1x1 convolutions without outputs need in a forward pass: see matrices.h.

#include "mixed/batch.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

class MatricesForward : public Batch {
 protected:
  MatricesForward(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : Batch(plan, in, workspace, threads) {
    for (int thread = 0; thread < threads && plan.matrix; ++thread) covariance_sums_.emplace_back(arena_, plan);
    if (plan.matrix) counted_ = arena_.take<double>(2 * plan.shape.batch * plan.padded);
  }

  // In front of the pass in which the images of a state are finished, and for each of them in it.
  void begin_covariance() {
    for (CovarianceSums& sums : covariance_sums_) sums.clear();
  }
  void add_to_covariance(int thread, const Scratch& s, const State& state, int64_t n) {
    covariance_sums_[thread].add(plan_, state, n, s);
  }

  // Behind that pass: the norms behind the matrices that leave the state, and these with all that is behind them.
  void settle_matrices(int64_t source, const State& state) {
    const std::vector<int64_t> edges = plan_.leaving(source);
    const Covariance of = covariance(source);
    merge(plan_, covariance_sums_, of);
    const int64_t c = plan_.shape.channels, count = edges.size();
    std::vector<double> mean(count * c), variance(count * c);
    std::vector<char> exact(count, true);
    parallel(threads_, count, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (const Edge& edge = plan_.edges[edges[i]]; edge.matrix >= 0)
          exact[i] = output_moments(plan_, matrix_of(edge), of, &mean[i * c], &variance[i * c]);
    });
    for (int64_t i = 0; i < count; ++i)
      if (!exact[i]) count_outputs(edges[i], state, of.mean, &mean[i * c], &variance[i * c]);
    parallel(threads_, count, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Edge& edge = plan_.edges[edges[i]];
        if (edge.matrix < 0) continue;
        set_statistics(edge.matrix_norm, &mean[i * c], &variance[i * c]);
        std::vector<double> scale(c);
        const float* of_norm = norms_.row(norms_.scale, edge.matrix_norm);
        for (int64_t channel = 0; channel < c; ++channel)
          scale[channel] = static_cast<double>(mixing(edges[i])[edge.matrix]) * of_norm[channel];
        pack_matrix(plan_, matrix_of(edge), scale.data(), matrices_[edges[i]]);
      }
    });
  }

  // From mean and variance (C) to the tables and to what the caller gets.
  void set_statistics(int64_t norm, const double* mean, const double* variance) {
    const int64_t c = plan_.shape.channels;
    set_norm(plan_, in_, norms_, norm, mean, variance);
    for (int64_t channel = 0; channel < c; ++channel) {
      batch_mean_[norm * c + channel] = static_cast<float>(mean[channel]);
      batch_variance_[norm * c + channel] = static_cast<float>(variance[channel]);
    }
  }

  float *batch_mean_ = nullptr, *batch_variance_ = nullptr;

 private:
  // The moments of an edge's outputs themselves, as W (r - mean) and one product in double.
  void count_outputs(int64_t e, const State& state, const double* mean_in, double* mean, double* variance) {
    const float* w = matrix_of(plan_.edges[e]);
    float* const matrix = matrices_[e];
    pack_matrix(plan_, w, nullptr, matrix);
    const std::vector<float> pivot(mean_in, mean_in + plan_.padded);
    parallel_shared(threads_, images(), [&](int thread, const auto& take) {
      const Scratch& s = scratch_[thread];
      s.ahead->clear();
      for (int64_t n = take(); n >= 0; n = take()) {
        double* to = counted_ + 2 * n * plan_.padded;
        chunks(plan_, [&](int64_t first, int64_t rows) {
          const int64_t pixels = rows * plan_.width_out, plane = pixels * kLanes;
          load_rows(plan_, state, n, first, rows, pivot.data(), s.d);
          pointwise<false>(s.d, plane, plan_.groups, matrix, plan_.padded, plan_.groups, s.chunk, plane, pixels,
                           *s.ahead);
          add_moments(plan_.groups, s.chunk, plane, pixels, first * plan_.width_out, {to, to + plan_.padded});
        });
      }
    });
    merge_moments(plan_, counted_, plan_.pixels_out(), mean, variance);
    const int64_t c = plan_.shape.channels;
    for (int64_t output = 0; output < c; ++output)
      for (int64_t input = 0; input < c; ++input)
        mean[output] += static_cast<double>(w[output * c + input]) * pivot[input];
  }

  std::vector<CovarianceSums> covariance_sums_;  // of each thread
  double* counted_ = nullptr;                    // (images, 2, padded)
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
