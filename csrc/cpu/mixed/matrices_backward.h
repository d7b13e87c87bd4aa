#pragma once

// The backward pass of 1x1 convolutions without outputs: see matrices.h.

#include "mixed/pools_backward.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

class MatricesBackward : public PoolsBackward {
 protected:
  MatricesBackward(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : PoolsBackward(plan, in, workspace, threads) {
    if (!plan.matrix) return;
    size_t most = 0;
    for (int64_t state = 0; state + 1 < plan.states(); ++state) {
      most = std::max(most, leaving(state).with_matrix.size());
      of_states_.push_back({arena_.take<float>(plan.padded * plan.padded), arena_.take<float>(plan.padded)});
    }
    outer_.resize(threads);
    for (std::vector<OuterSums>& sums : outer_)
      for (size_t i = 0; i < most; ++i) sums.emplace_back(arena_, plan);
    pivot_ = arena_.take<float>(plan.padded);
  }

  // In front of the pass that calls `matrix_products` for each image of a state.
  void begin_products(int64_t source) {
    const double* mean = covariance(source).mean;
    for (int64_t c = 0; c < plan_.padded; ++c) pivot_[c] = static_cast<float>(mean[c]);
    for (std::vector<OuterSums>& sums : outer_)
      for (OuterSums& each : sums) each.clear();
  }

  // Adds up r - pivot times the gradient behind each edge.
  void matrix_products(const std::vector<int64_t>& edges, const State& state, int thread, int64_t n) {
    const Scratch& s = scratch_[thread];
    chunks(plan_, [&](int64_t first, int64_t rows) {
      const int64_t pixels = rows * plan_.width_out, plane = pixels * kLanes, channels = plan_.shape.channels;
      {
        const Section section(s.clock, Work::tiles);
        load_rows(plan_, state, n, first, rows, pivot_, s.d);
      }
      const Section section(s.clock, Work::pointwise_weight, edges.size() * pixels * channels * channels);
      for (size_t i = 0; i < edges.size(); ++i)
        outer_[thread][i].add(s.d, plane, gradient(plan_.edges[edges[i]].target, n) + first * plan_.width_out * kLanes,
                              plan_.plane_out(), pixels);
    });
  }

  // From these products to the gradients of mixing weights, norms and matrices, and to what goes back to the state.
  void settle_matrices(const std::vector<int64_t>& edges, int64_t source) {
    const int64_t padded = plan_.padded;
    std::vector<std::vector<double>> back(edges.size()), constant(edges.size());
    parallel(threads_, edges.size(), [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) settle_matrix(edges[i], i, source, back[i], constant[i]);
    });
    if (!wanted(source)) return;
    const OfState& to = of_states_[source];
    const double* mean = covariance(source).mean;
    for (int64_t c = 0; c < padded; ++c) {
      double all = 0;
      for (size_t i = 0; i < edges.size(); ++i) all += constant[i][c];
      for (int64_t input = 0; input < padded; ++input) {
        double sum = 0;
        for (size_t i = 0; i < edges.size(); ++i) sum += back[i][input * padded + c];
        to.matrix[input * padded + c] = static_cast<float>(sum);
        all -= sum * mean[input];
      }
      to.constant[c] = static_cast<float>(all);
    }
  }

  // What goes back to image n of a state: set, or added to what has `begun`.
  void matrix_gradients(const std::vector<int64_t>& edges, int64_t source, const State& state, const Scratch& s,
                        int64_t n, bool begun) const {
    const OfState& own = of_states_[source];
    const int64_t padded = plan_.padded, groups = plan_.groups, channels = plan_.shape.channels;
    chunks(plan_, [&](int64_t first, int64_t rows) {
      const int64_t pixels = rows * plan_.width_out, plane = pixels * kLanes, at = first * plan_.width_out * kLanes;
      {
        const Section section(s.clock, Work::tiles);
        load_rows(plan_, state, n, first, rows, nullptr, s.d);
      }
      {
        const Section section(s.clock, Work::pointwise_input, (edges.size() + 1) * pixels * channels * channels);
        pointwise<false>(s.d, plane, groups, own.matrix, padded, groups, s.chunk, plane, pixels, *s.ahead);
        for (int64_t e : edges)
          pointwise<true>(gradient(plan_.edges[e].target, n) + at, plan_.plane_out(), groups, matrices_[e], padded,
                          groups, s.chunk, plane, pixels, *s.ahead);
      }
      const Section section(s.clock, Work::nodes);
      float* to = gradient(source, n) + at;
      for (int64_t group = 0; group < groups; ++group, to += plan_.plane_out()) {
        const Vector constant = load(own.constant + group * kLanes);
        const float *r = s.d + group * plane, *behind = s.chunk + group * plane;
        for (int64_t p = 0; p < plane; p += kLanes) {
          const Vector v = keep(positive(load(r + p)), load(behind + p) + constant);
          store(to + p, begun ? load(to + p) + v : v);
        }
      }
    });
  }

 private:
  // One edge, its products the i-th of each thread's. back (padded, padded), constant (padded): of the gradient behind the
  // state's ReLU what is linear in r - mean, inputs first, and what is neither that nor linear in g.
  void settle_matrix(int64_t e, int64_t i, int64_t source, std::vector<double>& back, std::vector<double>& constant) {
    const Edge& edge = plan_.edges[e];
    const int64_t c = plan_.shape.channels, padded = plan_.padded, norm = edge.matrix_norm;
    const float* w = matrix_of(edge);
    const Covariance of = covariance(source);
    const double* grad_sum = grad_sums_ + edge.target * padded;
    std::vector<double> products(padded * padded), dots(padded), behind(c * padded);
    for (std::vector<OuterSums>& sums : outer_) {
      const double* each = sums[i].total();
      for (int64_t at = 0; at < padded * padded; ++at) products[at] += each[at];
    }
    for (int64_t input = 0; input < c; ++input)
      for (int64_t output = 0; output < c; ++output) {
        double& product = products[input * padded + output];
        product -= grad_sum[output] * (of.mean[input] - pivot_[input]);
        dots[output] += w[output * c + input] * product;
      }
    double mixing_grad = 0;
    const double factor = mixing(e)[edge.matrix];
    norm_gradients(norm, factor, dots.data(), grad_sum, &mixing_grad);
    set_mixing_gradient(e, edge.matrix, mixing_grad);
    if (!grad_.theta && !wanted(source)) return;

    // The gradient of an output: scale * (g - its mean) - slope * (y - its mean).
    std::vector<double> scale(c), slope(c);
    for (int64_t output = 0; output < c; ++output) {
      const int64_t at = norm * padded + output;
      const double inverse = norms_.inverse[at];
      scale[output] = factor * norms_.gamma[at] * inverse;
      slope[output] = scale[output] * inverse * inverse * dots[output] / count();
    }
    if (grad_.theta) {
      times_covariance(plan_, w, of, behind.data());
      float* to = grad_.theta + edge.matrix_theta;
      for (int64_t output = 0; output < c; ++output)
        for (int64_t input = 0; input < c; ++input)
          to[output * c + input] = static_cast<float>(scale[output] * products[input * padded + output] -
                                                      slope[output] * count() * behind[output * padded + input]);
    }
    if (!wanted(source)) return;
    back.assign(padded * padded, 0.0);
    constant.assign(padded, 0.0);
    std::memset(matrices_[e], 0, padded * padded * sizeof(float));
    for (int64_t output = 0; output < c; ++output) {
      const double mean = scale[output] * grad_sum[output] / count();
      for (int64_t input = 0; input < c; ++input) {
        const double weight = w[output * c + input], steep = -weight * slope[output];
        matrices_[e][output * padded + input] = static_cast<float>(weight * scale[output]);
        constant[input] -= weight * mean;
        double* row = back.data() + input * padded;
#pragma GCC ivdep
        for (int64_t other = 0; other < c; ++other) row[other] += steep * w[output * c + other];
      }
    }
  }

  struct OfState {
    float *matrix, *constant;  // what is added behind the ReLU: matrix (padded, padded) times r, and (padded)
  };
  std::vector<std::vector<OuterSums>> outer_;  // of each thread, for each edge that leaves a state
  std::vector<OfState> of_states_;
  float* pivot_ = nullptr;  // of the state whose products are added up
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
