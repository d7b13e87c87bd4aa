#pragma once

// The backward pass of pools and identities on batch statistics.

#include "mixed/gradients.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

class PoolsBackward : public BatchGradients {
 protected:
  PoolsBackward(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : BatchGradients(plan, in, workspace, threads) {
    winners_ = arena_.take<Winner>(plan.max ? plan.shape.batch * winners_per_image() : 0);
    for (size_t each = 0; each < 2 * plan.edges.size(); ++each) pool_.push_back(take_affine(arena_, plan));
    skip_sums_ = arena_.take<double>(plan.edges.size() * plan.shape.batch * plan.padded);
  }

  // The edges that leave a state, and which of them have a pool, an identity or a matrix.
  struct Leaving {
    std::vector<int64_t> edges, with_pool[2], with_skip, with_matrix;  // max, average
    int64_t first = -1, last = -1;                                     // of those that have a branch
  };

  Leaving leaving(int64_t source) const {
    Leaving found;
    found.edges = plan_.leaving(source);
    for (int64_t e : found.edges) {
      const Edge& edge = plan_.edges[e];
      if (edge.max >= 0) found.with_pool[0].push_back(e);
      if (edge.avg >= 0) found.with_pool[1].push_back(e);
      if (edge.skip >= 0) found.with_skip.push_back(e);
      if (edge.matrix >= 0) found.with_matrix.push_back(e);
      if (edge.branches.empty()) continue;
      if (found.first < 0) found.first = e;
      found.last = e;
    }
    return found;
  }

  // Sums of an image, of what an edge's pools and identity give and of gradients.
  double* pool_sums(int64_t e, int kind, int64_t n) const {
    return pool_sums_ + ((2 * e + kind) * images() + n) * plan_.padded;
  }
  double* skip_sums(int64_t e, int64_t n) const { return skip_sums_ + (e * images() + n) * plan_.padded; }
  // A pooled state: norms look at it once more, else it is forgotten.
  float* pooled(const Scratch& s, int kind, int64_t n) const {
    return plan_.shape.pool_norm ? (kind == 0 ? max_ : avg_) + n * plan_.image_out() : s.mid_grad;
  }

  // Whether the products of pooled states and gradients are asked for.
  bool has_dots() const { return grad_.weights || plan_.shape.pool_norm; }

  // Whether the only average pool that leaves a state is gone through backward alone: what it sends back, times the state,
  // gives the product of what it gives and the gradient.
  bool transposes(const Leaving& from, int64_t source, const State& state) const {
    return from.with_pool[1].size() == 1 && !plan_.shape.pool_norm && grad_.weights && wanted(source) &&
           pool_shape(state).stride == 1 && plan_.shape.channels % kLanes == 0;
  }

  // The pools of an image once more, and the products of what they give, and of the state itself, and the gradients.
  void pool_dots(const Leaving& from, int64_t source, const State& state, const Scratch& s, int64_t n) const {
    const bool average = has_dots() && !from.with_pool[1].empty() && !transposes(from, source, state);
    const bool skip = grad_.weights && !from.with_skip.empty();
    if (from.with_pool[0].empty() && !average && !skip) return;  // a max pool has to find its winners again
    const PoolShape shape = pool_shape(state);
    const float* x = state.data + n * state.image;
    if (!state.dense()) {
      load_dense(plan_, state, n, s.state_grad);
      x = s.state_grad;
    }
    for (int kind = 0; kind < 2; ++kind) {
      if (kind == 0 ? from.with_pool[0].empty() : !average) continue;
      float* const to = pooled(s, kind, n);
      for (int64_t group = 0; group < plan_.groups; ++group) {
        const Section section(s.clock, Work::pools);
        const float* in = x + group * state.height * state.width * kLanes;
        float* out = to + group * plan_.plane_out();
        if (kind == 0)
          max_pool(in, state.width * kLanes, shape, s.pool_rows, out, across(n, group), down(n, group));
        else
          average_pool(in, state.width * kLanes, shape, s.pool_rows, out);
      }
      if (!has_dots()) continue;
      for (int64_t e : from.with_pool[kind]) {
        const Edge& edge = plan_.edges[e];
        const int64_t norm = kind == 0 ? edge.max_norm : edge.avg_norm;
        const float* mean = norm >= 0 ? norms_.row(norms_.mean, norm) : nullptr;
        edge_dot(s, e, n, to, mean, pool_sums(e, kind, n));
      }
    }
    if (!skip) return;
    for (int64_t e : from.with_skip) edge_dot(s, e, n, x, nullptr, skip_sums(e, n));
  }

  // What goes back through pools without norms.
  void set_pools(const Leaving& from) const {
    for (int64_t e : from.edges) {
      const Edge& edge = plan_.edges[e];
      for (int kind = 0; kind < 2; ++kind) {
        const int64_t mix = kind == 0 ? edge.max : edge.avg;
        const Affine& to = pool_[2 * e + kind];
        for (int64_t c = 0; c < plan_.padded && mix >= 0; ++c) {
          to.a[c] = mixing(e)[mix];
          to.b[c] = to.d[c] = 0;
        }
      }
    }
  }

  // From these products to gradients of mixing weights and norms, and to what goes back through these.
  void settle_pools(const Leaving& from) const {
    if (!has_dots()) return;
    std::vector<double> dots(plan_.padded);
    for (int64_t e : from.edges) {
      const Edge& edge = plan_.edges[e];
      const std::vector<double> grad_sum = edge_sum(e);
      const auto settle_pool = [&](int kind, int64_t mix, int64_t norm) {
        total(pool_sums(e, kind, 0), dots.data());
        const double w = mixing(e)[mix];
        double mixing_grad = 0;
        if (norm >= 0) {
          norm_gradients(norm, w, dots.data(), grad_sum.data(), &mixing_grad);
          batch_gradient(plan_, norms_, norm, w, dots.data(), grad_sum.data(), count(), pool_[2 * e + kind]);
        } else {
          mixing_grad = std::accumulate(dots.begin(), dots.end(), 0.0);
        }
        set_mixing_gradient(e, mix, mixing_grad);
      };
      if (edge.max >= 0) settle_pool(0, edge.max, edge.max_norm);
      if (edge.avg >= 0) settle_pool(1, edge.avg, edge.avg_norm);
      if (edge.skip >= 0 && grad_.weights) {
        total(skip_sums(e, 0), dots.data());
        set_mixing_gradient(e, edge.skip, std::accumulate(dots.begin(), dots.end(), 0.0));
      }
    }
  }

  // What goes back through each pool of an image: a weighted sum of the gradients, the pooled state and a constant; and
  // identities. begun: whether there is a gradient of the state that they add to.
  void pool_gradients(const Leaving& from, int64_t source, const State& state, const Scratch& s, int64_t n,
                      bool begun) const {
    const PoolShape shape = pool_shape(state);
    const int64_t pixels = state.height * state.width;
    const bool transposed = transposes(from, source, state);
    if (transposed) std::fill_n(pool_sums(from.with_pool[1][0], 1, n), plan_.padded, 0.0);
    for (int64_t group = 0; group < plan_.groups; ++group) {
      const Section section(s.clock, Work::pools);
      float* to = gradient(source, n) + group * pixels * kLanes;
      const bool pools = !from.with_pool[0].empty() || !from.with_pool[1].empty();
      const bool sets = transposed && from.with_pool[0].empty();
      if (!begun && !sets && (pools || from.with_skip.empty())) std::memset(to, 0, pixels * kLanes * sizeof(float));
      const int64_t plane = group * plan_.plane_out();
      for (int kind = 0; kind < 2; ++kind) {
        const std::vector<int64_t>& with = from.with_pool[kind];
        if (with.empty()) continue;
        if (kind == 1 && transposed) {
          transposed_average(with[0], state, s, n, group, to, begun || !sets);
          continue;
        }
        Vector slope = zero(), constant = zero();
        for (int64_t e : with) {
          slope += load(pool_[2 * e + kind].b + group * kLanes);
          constant += load(pool_[2 * e + kind].d + group * kLanes);
        }
        weighted(with, n, plane, plan_.pixels_out(), s.mid_grad,
                 plan_.shape.pool_norm ? pooled(s, kind, n) + plane : nullptr, slope, constant,
                 [&](int64_t e) { return load(pool_[2 * e + kind].a + group * kLanes) * set(scale(e, n)); });
        if (kind == 0)
          max_pool_backward(s.mid_grad, shape, s.pool_rows, across(n, group), down(n, group), to);
        else
          average_pool_backward(s.mid_grad, shape, s.pool_rows, to);
      }
      if (!from.with_skip.empty())
        weighted(from.with_skip, n, plane, pixels, to, begun || pools ? to : nullptr, set(1.0f), zero(),
                 [&](int64_t e) { return set(mixing(e)[plan_.edges[e].skip] * scale(e, n)); });
    }
  }

  // Of a group of image n: what goes back through the average pool of edge e, set or `added`, and its product.
  void transposed_average(int64_t e, const State& state, const Scratch& s, int64_t n, int64_t group, float* to,
                          bool added) const {
    const PoolShape shape = pool_shape(state);
    const Vector factor = set(mixing(e)[plan_.edges[e].avg] * scale(e, n));
    const float* x = state.data + n * state.image + group * state.group;
    float* const line = s.mid_grad;
    double* const sum = pool_sums(e, 1, n) + group * kLanes;
    average_pool_transposed(
        gradient(plan_.edges[e].target, n) + group * plan_.plane_out(), shape, s.pool_rows,
        [&](int64_t, int64_t pixel, Vector v) { store(line + pixel * kLanes, v); },
        [&](int64_t y) {
          for (int64_t begin = y * shape.width, end = begin + shape.width, p = begin; p < end; p += kSum) {
            Vector product[2] = {};
            for (int64_t q = p; q < std::min(end, p + kSum); ++q) {
              const Vector v = load(line + (q - begin) * kLanes);
              store(to + q * kLanes, fma(v, factor, added ? load(to + q * kLanes) : zero()));
              product[q & 1] = fma(v, load(x + q * state.pixel), product[q & 1]);
            }
            const Vector all = product[0] + product[1];
            for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] += static_cast<double>(scale(e, n)) * all[lane];
          }
        });
  }

  // On a plane of image n: to = slope * from + constant, of a null `from` the constant alone, + the sum over some of the
  // edges of factor(edge) * gradient of its target.
  template <typename Factor>
  RNAS_INLINE void weighted(const std::vector<int64_t>& some, int64_t n, int64_t plane, int64_t pixels, float* to,
                            const float* from, Vector slope, Vector constant, const Factor& factor) const {
    for (int64_t p = 0; p < pixels; p += kBlock) {
      const int64_t size = std::min<int64_t>(kBlock, pixels - p);
      Vector sum[kBlock];
#pragma GCC unroll 8
      for (int64_t q = 0; q < kBlock; ++q)
        sum[q] = from ? fma(load(from + (p + std::min(q, size - 1)) * kLanes), slope, constant) : constant;
      for (int64_t e : some) {
        const float* g = gradient(plan_.edges[e].target, n) + plane + p * kLanes;
        const Vector f = factor(e);
        if (size == kBlock) {
#pragma GCC unroll 8
          for (int q = 0; q < kBlock; ++q) {
            __builtin_prefetch(g + (q + 32) * kLanes);
            sum[q] = fma(load(g + q * kLanes), f, sum[q]);
          }
        } else {
          for (int64_t q = 0; q < size; ++q) sum[q] = fma(load(g + q * kLanes), f, sum[q]);
        }
      }
      for (int64_t q = 0; q < size; ++q) store(to + (p + q) * kLanes, sum[q]);
    }
  }

 private:
  int64_t winners_per_image() const {
    return plan_.groups * (plan_.shape.height + plan_.height_out) * plan_.width_out;
  }
  Winner* across(int64_t n, int64_t group) const {
    return winners_ + n * winners_per_image() + group * (plan_.shape.height + plan_.height_out) * plan_.width_out;
  }
  Winner* down(int64_t n, int64_t group) const { return across(n, group) + plan_.shape.height * plan_.width_out; }

  Winner* winners_ = nullptr;
  double* skip_sums_ = nullptr;  // (edges, images, padded)
  std::vector<Affine> pool_;     // what goes back through the pools of each edge
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
