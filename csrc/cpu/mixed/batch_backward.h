#pragma once

// The backward pass of a cell on batch statistics.

#include "mixed/batch.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

class BatchBackward : public Batch {
 public:
  BatchBackward(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : Batch(plan, in, workspace, threads) {
    const int64_t n = plan.shape.batch;
    winners_ = arena_.take<Winner>(plan.max ? n * winners_per_image() : 0);
    for (int64_t state = 0; state < plan.states(); ++state) {
      const bool last = state + 1 == plan.states();
      const bool of_caller = (state < plan.shape.inputs && plan.stored_dense()) || (last && plan.asked_dense());
      const int64_t floats = n * plan.height(state) * plan.width(state) * plan.padded;
      grads_.push_back(of_caller ? nullptr : arena_.take<float>(floats));
    }
    for (int thread = 0; thread < threads; ++thread) {
      float* now = arena_.take<float>(plan.packed_of_edge());
      weight_sums_.push_back({now, arena_.take<double>(plan.summed)});
    }
    for (size_t slot = 0; slot < y_.size(); ++slot) {
      first_.push_back(take_affine(arena_, plan));
      last_.push_back(take_affine(arena_, plan));
    }
    for (int64_t each = 0; each < 2 * plan.shape.nodes; ++each) pool_.push_back(take_affine(arena_, plan));
    grad_sums_ = arena_.take<double>(plan.states() * plan.padded);
  }

  void backward(Keep keep, const float* kept, const float* grad_out, const MixedGradients& grad) {
    set_norms(plan_, in_, norms_);
    keep_ = keep;
    pack_all(true);
    kept_ = const_cast<float*>(kept);
    grad_ = grad;
    if (grad.theta)
      parallel(threads_, threads_, [&](int, int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) {
          std::memset(weight_sums_[thread].now, 0, plan_.packed_of_edge() * sizeof(float));
          std::memset(weight_sums_[thread].total, 0, plan_.summed * sizeof(double));
        }
      });
    begin_gradients(grad_out);
    for (int64_t source = plan_.states() - 1; source >= 0; --source) {
      const State state = state_of(source);
      for (size_t e = 0; e < plan_.edges.size(); ++e)
        if (plan_.edges[e].source == source) backward_edge(plan_.edges[e], e, state);
      if (source + 1 < plan_.states()) pools_backward(source, state);
      if (!begun_[source] && wanted(source)) clear_gradient(source);
      sum_gradient(source);
    }
    if (grad.states && !plan_.stored_dense()) finish_states();
    if (grad.theta) finish_weights();
  }

 private:
  int64_t winners_per_image() const {
    return plan_.groups * (plan_.shape.height + plan_.height_out) * plan_.width_out;
  }
  Winner* across(int64_t n, int64_t group) const {
    return winners_ + n * winners_per_image() + group * (plan_.shape.height + plan_.height_out) * plan_.width_out;
  }
  Winner* down(int64_t n, int64_t group) const { return across(n, group) + plan_.shape.height * plan_.width_out; }

  float* gradient(int64_t state, int64_t n) const {
    return grads_[state] + n * plan_.height(state) * plan_.width(state) * plan_.padded;
  }

  // Those that the caller gives. The others begin with the first that is added to them.
  void begin_gradients(const float* grad_out) {
    for (int64_t state = 0; state < plan_.states(); ++state) begun_.push_back(plan_.asked(state) >= 0);
    if (plan_.stored_dense())
      for (int64_t state = 0; state < plan_.shape.inputs; ++state)
        if (wanted(state)) grads_[state] = static_cast<float*>(grad_.states[state]);
    if (plan_.asked_dense()) {
      grads_.back() = const_cast<float*>(grad_out);  // read only
      return;
    }
    parallel(threads_, images(), [&](int thread, int64_t begin, int64_t end) {
      const Section section(scratch_[thread].clock, Work::nodes);
      for (int64_t n = begin; n < end; ++n)
        for (int64_t state = 0; state < plan_.states(); ++state)
          if (begun_[state]) begin_gradient(plan_, grad_out, state, n, gradient(state, n));
    });
  }

  void clear_gradient(int64_t state) {
    const int64_t floats = plan_.height(state) * plan_.width(state) * plan_.padded;
    parallel(threads_, images(), [&](int, int64_t begin, int64_t end) {
      std::memset(gradient(state, begin), 0, (end - begin) * floats * sizeof(float));
    });
  }

  // The sum over pixels of a finished gradient.
  void sum_gradient(int64_t state) {
    if (state < plan_.shape.inputs) return;
    std::vector<double> each(images() * plan_.padded);
    parallel(threads_, images(), [&](int thread, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) dot(scratch_[thread], gradient(state, n), nullptr, nullptr, &each[n * plan_.padded]);
    });
    total(each.data(), grad_sums_ + state * plan_.padded);
  }

  // to[c] = sum over the pixels of an image of g * (y - pivot).
  void dot(const Scratch& s, const float* g, const float* y, const float* pivot, double* to) const {
    const Section section(s.clock, Work::norms);
    std::fill_n(to, plan_.padded, 0.0);
    add_dot(plan_, g, y, pivot, s.sums, to);
  }

  // Adds up (images, padded).
  void total(const double* each, double* to) const {
    for (int64_t c = 0; c < plan_.padded; ++c) to[c] = 0;
    for (int64_t n = 0; n < images(); ++n)
      for (int64_t c = 0; c < plan_.padded; ++c) to[c] += each[n * plan_.padded + c];
  }

  // Gradients of a norm's affine parameters and of the factor behind it, from dot = sum g (y - mean) and sum = sum g.
  void norm_gradients(int64_t norm, double factor, const double* dot, const double* sum, double* factor_grad) const {
    const int64_t c = plan_.shape.channels;
    double all = 0;
    for (int64_t channel = 0; channel < c; ++channel) {
      const int64_t at = norm * plan_.padded + channel;
      const double normalised = norms_.inverse[at] * dot[channel];
      all += norms_.gamma[at] * normalised + norms_.beta[at] * sum[channel];
      if (grad_.gamma) grad_.gamma[norm * c + channel] = static_cast<float>(factor * normalised);
      if (grad_.beta) grad_.beta[norm * c + channel] = static_cast<float>(factor * sum[channel]);
    }
    if (factor_grad) *factor_grad = all;
  }

  void set_mixing_gradient(int64_t e, int64_t mix, double value) const {
    if (grad_.weights) grad_.weights[e * plan_.shape.candidates + mix] = static_cast<float>(value);
  }

  // Behind images [first, last) of a thread's, of which the last is in front of `end`.
  void flush(int thread, const Convolution& conv, int64_t first, int64_t last, int64_t end) const {
    if (grad_.theta && plan_.flushes(conv, first, last, end))
      add_up(plan_, conv, weight_sums_[thread]);
  }
  const WeightSums* sums_of(int thread) const { return grad_.theta ? &weight_sums_[thread] : nullptr; }

  // Whether the gradient of a state goes anywhere.
  bool wanted(int64_t state) const {
    return state >= plan_.shape.inputs || (grad_.states && grad_.states[state]);
  }

  void backward_edge(const Edge& edge, int64_t e, const State& state) {
    const double* grad_sum = grad_sums_ + edge.target * plan_.padded;
    if (edge.ones >= 0) set_mixing_gradient(e, edge.ones, std::accumulate(grad_sum, grad_sum + plan_.padded, 0.0));
    if (edge.branches.empty()) return;
    for (WeightSums& sums : weight_sums_) sums.begin = edge.packed_begin();  // the edge before has left zeros
    const float* w = mixing(e);
    const size_t branches = edge.branches.size();

    // The products of outputs and gradient; the outputs that were not kept are computed again.
    parallel_shared(threads_, images(), [&](int thread, const auto& take) {
      const Scratch& s = scratch_[thread];
      const Tile tile = sized(s.state, state.height, state.width);
      clear(tile, plan_.groups);
      clear(s.mid, plan_.groups);
      for (int64_t n = take(); n >= 0; n = take()) {
        const float* g = gradient(edge.target, n);
        bool loaded = false;
        for (size_t b = 0; b < branches; ++b) {
          const Branch& branch = edge.branches[b];
          const float* mean = norms_.row(norms_.mean, branch.last().norm);
          float *out = y(edge, b, n), *sum = s.sums;
          double* to = sums_[b] + n * plan_.padded;
          if (output_of(branch) >= 0) {
            dot(s, g, out, mean, to);
            continue;
          }
          const bool two = branch.stages.size() > 1;
          if (two)
            load_mid_of(edge, b, n, s);
          else if (!loaded)
            load_state(s, state, n, tile), loaded = true;
          s.ahead->clear();
          if (n + 1 < images()) {
            if (two)
              announce(s, plan_, mid(edge, b, n + 1), plan_.pixels_out());
            else if (b + 1 == branches)
              announce(s, plan_, state, n + 1);
            if (b == 0) announce(s, plan_, gradient(edge.target, n + 1), plan_.pixels_out());
            announce(s, plan_, y(edge, b, n + 1), plan_.pixels_out());
          }
          std::fill_n(to, plan_.padded, 0.0);
          convolve<false>(plan_, branch.last(), packed_.forward, two ? s.mid : tile, 1, s, out,
                          [&](int64_t, int64_t row, int64_t rows) {
                            const Section section(s.clock, Work::norms);
                            const int64_t at = row * plan_.width_out * kLanes;
                            std::memset(sum, 0, plan_.padded * sizeof(float));
                            add_dot(plan_, g + at, plan_.plane_out(), out + at, plan_.plane_out(),
                                    rows * plan_.width_out, mean, sum);
                            for (int64_t c = 0; c < plan_.padded; ++c) to[c] += sum[c];
                          });
        }
      }
    });
    std::vector<double> dots(plan_.padded), gradient_sums(plan_.padded);
    bool second = false;
    for (size_t b = 0; b < branches; ++b) {
      const Branch& branch = edge.branches[b];
      total(sums_[b], dots.data());
      double mixing_grad = 0;
      norm_gradients(branch.last().norm, w[branch.mix], dots.data(), grad_sum, &mixing_grad);
      set_mixing_gradient(e, branch.mix, mixing_grad);
      batch_gradient(plan_, norms_, branch.last().norm, w[branch.mix], dots.data(), grad_sum, count(), last_[b]);
      second |= branch.stages.size() > 1;
    }

    const bool of_state = wanted(edge.source);
    if (!of_state && !grad_.theta && !grad_.gamma && !grad_.beta) return;

    // The second stages; the workspace takes the gradients in front of their ReLU.
    if (second) {
      parallel(threads_, images(), [&](int thread, int64_t begin, int64_t end) {
        const Scratch& s = scratch_[thread];
        clear(s.mid, plan_.groups);
        clear(s.grad, plan_.groups);
        for (int64_t n = begin; n < end; ++n)
          for (size_t b = 0; b < branches; ++b) {
            if (edge.branches[b].stages.size() < 2) continue;
            s.ahead->clear();
            if (n + 1 < end) {
              announce(s, plan_, mid(edge, b, n + 1), plan_.pixels_out());
              announce(s, plan_, y(edge, b, n + 1), plan_.pixels_out());
              announce(s, plan_, gradient(edge.target, n + 1), plan_.pixels_out());
            }
            backward_second(edge, b, n, thread, s, end);
          }
      });
      for (size_t b = 0; b < branches; ++b) {
        const Branch& branch = edge.branches[b];
        if (branch.stages.size() < 2) continue;
        total(sums_[b], dots.data());
        total(sums_[b] + images() * plan_.padded, gradient_sums.data());
        norm_gradients(branch.stages[0].norm, 1.0, dots.data(), gradient_sums.data(), nullptr);
        batch_gradient(plan_, norms_, branch.stages[0].norm, 1.0, dots.data(), gradient_sums.data(), count(), first_[b]);
      }
    }

    // Everything on the side of the state.
    if (!of_state && !grad_.theta) return;
    parallel(threads_, images(), [&](int thread, int64_t begin, int64_t end) {
      const Scratch& s = scratch_[thread];
      const Tile tile = sized(s.state, state.height, state.width);
      clear(tile, plan_.groups, plan_.bundle);
      clear(s.grad, plan_.groups, plan_.bundle);
      for (int64_t n = begin; n < end; n += plan_.bundle) {
        const int64_t last = std::min(n + plan_.bundle, end), next = std::min(last + plan_.bundle, end) - last;
        s.ahead->clear();
        if (next > 0) {
          const int64_t pixels = next * plan_.pixels_out();
          for (size_t b = 0; b < branches; ++b) {
            const bool two = edge.branches[b].stages.size() > 1;
            announce(s, plan_, two ? spare(b, last) : y(edge, b, last), pixels);
            if (two) announce(s, plan_, mid(edge, b, last), pixels);
          }
          announce(s, plan_, gradient(edge.target, last), pixels);
          announce(s, plan_, state, last, next);
          if (of_state) announce(s, plan_, gradient(edge.source, last), next * state.height * state.width);
        }
        backward_state(edge, state, n, last, thread, s, tile, end);
      }
    });
    if (of_state) begun_[edge.source] = true;
  }

  void backward_second(const Edge& edge, size_t b, int64_t n, int thread, const Scratch& s, int64_t end) {
    const Branch& branch = edge.branches[b];
    const float* g = gradient(edge.target, n);
    const float* out = y(edge, b, n);
    float* behind = spare(b, n);
    load_mid_of(edge, b, n, s);
    convolve_backward<false>(
        plan_, branch.last(), packed_, s.mid, 1, plan_.height_out, plan_.width_out, s,
        [&](int64_t, int64_t row, int64_t rows, const Tile& to) {
          const Section section(s.clock, Work::norms);
          const int64_t at = row * plan_.width_out * kLanes;
          return apply(plan_, last_[b], g + at, out + at, rows, to);
        },
        s.mid_grad, sums_of(thread));
    flush(thread, branch.last(), n, n + 1, end);
    through_mid(s, behind);
    const int64_t to = n * plan_.padded;
    dot(s, behind, mid(edge, b, n), norms_.row(norms_.mean, branch.stages[0].norm), sums_[b] + to);
    dot(s, behind, nullptr, nullptr, sums_[b] + images() * plan_.padded + to);
  }

  // The gradient behind the second ReLU, in mid_grad, to that in front of it.
  void through_mid(const Scratch& s, float* behind) const {
    const Section section(s.clock, Work::nodes);
    for (int64_t group = 0; group < plan_.groups; ++group)
      for (int64_t row = 0; row < plan_.height_out; ++row) {
        const float* mid = s.mid.data + group * s.mid.plane + row * s.mid.row;
        const int64_t at = (group * plan_.height_out + row) * plan_.width_out * kLanes;
        for (int64_t x = 0; x < plan_.width_out; ++x)
          store(behind + at + x * kLanes, keep(positive(load(mid + x * kLanes)), load(s.mid_grad + at + x * kLanes)));
      }
  }

  // Of images [n, last).
  void backward_state(const Edge& edge, const State& state, int64_t n, int64_t last, int thread, const Scratch& s,
                      const Tile& tile, int64_t end) {
    const bool of_state = wanted(edge.source);
    for (int64_t i = n; i < last; ++i) load_state(s, state, i, tile.at(i - n));
    for (size_t b = 0; b < edge.branches.size(); ++b) {
      const Branch& branch = edge.branches[b];
      const bool two = branch.stages.size() > 1;
      const float* g = two ? spare(b, n) : gradient(edge.target, n);
      const float* of = two ? mid(edge, b, n) : y(edge, b, n);
      const Affine& affine = two ? first_[b] : last_[b];
      const auto gradient_of = [&](int64_t i, int64_t row, int64_t rows, const Tile& to) {
        const Section section(s.clock, Work::norms);
        const int64_t at = i * plan_.image_out() + row * plan_.width_out * kLanes;
        return apply(plan_, affine, g + at, of + at, rows, to);
      };
      const WeightSums* now = sums_of(thread);
      float* in_grad = of_state ? s.state_grad : nullptr;
      if (b == 0)
        convolve_backward<false>(plan_, branch.stages[0], packed_, tile, last - n, state.height, state.width, s,
                                 gradient_of, in_grad, now);
      else
        convolve_backward<true>(plan_, branch.stages[0], packed_, tile, last - n, state.height, state.width, s,
                                gradient_of, in_grad, now);
      flush(thread, branch.stages[0], n, last, end);
    }
    if (!of_state) return;
    const Section section(s.clock, Work::nodes);
    for (int64_t i = n; i < last; ++i) {
      const float* behind = s.state_grad + (i - n) * plan_.padded * state.height * state.width;
      if (begun_[edge.source])
        through_relu<true>(behind, state, tile.at(i - n), gradient(edge.source, i));
      else
        through_relu<false>(behind, state, tile.at(i - n), gradient(edge.source, i));
    }
  }

  // The gradient behind the first ReLU to (or added to) that of the state.
  template <bool Add> void through_relu(const float* behind, const State& state, const Tile& tile, float* to) const {
    for (int64_t group = 0; group < plan_.groups; ++group)
      for (int64_t row = 0; row < state.height; ++row) {
        const float* x = tile.data + group * tile.plane + row * tile.row;
        const int64_t at = (group * state.height + row) * state.width * kLanes;
        for (int64_t column = 0; column < state.width; ++column) {
          const Vector v = keep(positive(load(x + column * kLanes)), load(behind + at + column * kLanes));
          if (Add)
            add_to(to + at + column * kLanes, v);
          else
            store(to + at + column * kLanes, v);
        }
      }
  }

  // The edges that leave a state, and which of them have a pool or an identity.
  struct Leaving {
    std::vector<int64_t> edges;
    std::vector<size_t> with_pool[2], with_skip;  // max, average
    bool any() const { return !with_pool[0].empty() || !with_pool[1].empty() || !with_skip.empty(); }
  };

  Leaving leaving(int64_t source) const {
    Leaving found;
    for (size_t e = 0; e < plan_.edges.size(); ++e) {
      const Edge& edge = plan_.edges[e];
      if (edge.source != source) continue;
      if (edge.max >= 0) found.with_pool[0].push_back(found.edges.size());
      if (edge.avg >= 0) found.with_pool[1].push_back(found.edges.size());
      if (edge.skip >= 0) found.with_skip.push_back(found.edges.size());
      found.edges.push_back(e);
    }
    return found;
  }

  // Pools and identities of all edges that leave a state.
  void pools_backward(int64_t source, const State& state) {
    const Leaving from = leaving(source);
    if (!from.any()) return;
    std::vector<double> skip_dots(from.with_skip.empty() ? 0 : from.edges.size() * images() * plan_.padded);
    pool_dots(from, state, skip_dots.data());
    settle_pools(from, skip_dots.data());
    if (wanted(source)) pool_gradients(from, source, state);
  }

  // Sums of the image of edge i that leaves a state.
  double* pool_sums(size_t i, int kind, int64_t n) const {
    return pool_sums_ + ((2 * i + kind) * images() + n) * plan_.padded;
  }
  // A pooled state: norms look at it once more, else it is forgotten.
  float* pooled(const Scratch& s, int kind, int64_t n) const {
    return plan_.shape.pool_norm ? (kind == 0 ? max_ : avg_) + n * plan_.image_out() : s.mid_grad;
  }

  // The pools once more, and the products of what they give, and of the state itself, and the gradients.
  void pool_dots(const Leaving& from, const State& state, double* skip_dots) const {
    const PoolShape shape = pool_shape(state);
    parallel_shared(threads_, images(), [&](int thread, const auto& take) {
      const Scratch& s = scratch_[thread];
      for (int64_t n = take(); n >= 0; n = take()) {
        const float* x = state.data + n * state.image;
        if (!state.dense()) {
          load_dense(plan_, state, n, s.state_grad);
          x = s.state_grad;
        }
        for (int kind = 0; kind < 2; ++kind) {
          if (from.with_pool[kind].empty()) continue;
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
          for (size_t i : from.with_pool[kind]) {
            const Edge& edge = plan_.edges[from.edges[i]];
            const int64_t norm = kind == 0 ? edge.max_norm : edge.avg_norm;
            const float* mean = norm >= 0 ? norms_.row(norms_.mean, norm) : nullptr;
            dot(s, gradient(edge.target, n), to, mean, pool_sums(i, kind, n));
          }
        }
        if (!grad_.weights) continue;
        for (size_t i : from.with_skip) {
          const int64_t target = plan_.edges[from.edges[i]].target;
          dot(s, gradient(target, n), x, nullptr, skip_dots + (i * images() + n) * plan_.padded);
        }
      }
    });
  }

  // From these products to gradients of mixing weights and norms, and to what goes back through them.
  void settle_pools(const Leaving& from, const double* skip_dots) const {
    std::vector<double> dots(plan_.padded);
    for (size_t i = 0; i < from.edges.size(); ++i) {
      const int64_t e = from.edges[i];
      const Edge& edge = plan_.edges[e];
      const double* grad_sum = grad_sums_ + edge.target * plan_.padded;
      const auto settle_pool = [&](int kind, int64_t mix, int64_t norm) {
        total(pool_sums(i, kind, 0), dots.data());
        const double w = mixing(e)[mix];
        const Affine& to = pool_[2 * i + kind];
        double mixing_grad = 0;
        if (norm >= 0) {
          norm_gradients(norm, w, dots.data(), grad_sum, &mixing_grad);
          batch_gradient(plan_, norms_, norm, w, dots.data(), grad_sum, count(), to);
        } else {
          for (int64_t c = 0; c < plan_.padded; ++c) {
            mixing_grad += dots[c];
            to.a[c] = static_cast<float>(w);
            to.b[c] = to.d[c] = 0;
          }
        }
        set_mixing_gradient(e, mix, mixing_grad);
      };
      if (edge.max >= 0) settle_pool(0, edge.max, edge.max_norm);
      if (edge.avg >= 0) settle_pool(1, edge.avg, edge.avg_norm);
      if (edge.skip >= 0 && grad_.weights) {
        total(skip_dots + i * images() * plan_.padded, dots.data());
        set_mixing_gradient(e, edge.skip, std::accumulate(dots.begin(), dots.end(), 0.0));
      }
    }
  }

  // What goes back through each pool: a weighted sum of the gradients, the pooled state and a constant; and identities.
  void pool_gradients(const Leaving& from, int64_t source, const State& state) {
    const PoolShape shape = pool_shape(state);
    const int64_t pixels = state.height * state.width;
    const bool begun = begun_[source];
    parallel_shared(threads_, images(), [&](int thread, const auto& take) {
      const Scratch& s = scratch_[thread];
      for (int64_t n = take(); n >= 0; n = take())
        for (int64_t group = 0; group < plan_.groups; ++group) {
          const Section section(s.clock, Work::pools);
          float* to = gradient(source, n) + group * pixels * kLanes;
          if (!begun) std::memset(to, 0, pixels * kLanes * sizeof(float));
          const int64_t plane = group * plan_.plane_out();
          for (int kind = 0; kind < 2; ++kind) {
            const std::vector<size_t>& with = from.with_pool[kind];
            if (with.empty()) continue;
            Vector slope = zero(), constant = zero();
            for (size_t i : with) {
              slope += load(pool_[2 * i + kind].b + group * kLanes);
              constant += load(pool_[2 * i + kind].d + group * kLanes);
            }
            weighted(from, with, n, plane, plan_.pixels_out(), s.mid_grad,
                     plan_.shape.pool_norm ? pooled(s, kind, n) + plane : nullptr, slope, constant,
                     [&](size_t i) { return load(pool_[2 * i + kind].a + group * kLanes); });
            if (kind == 0)
              max_pool_backward(s.mid_grad, shape, s.pool_rows, across(n, group), down(n, group), to);
            else
              average_pool_backward(s.mid_grad, shape, s.pool_rows, to);
          }
          if (!from.with_skip.empty())
            weighted(from, from.with_skip, n, plane, pixels, to, to, set(1.0f), zero(),
                     [&](size_t i) { return set(mixing(from.edges[i])[plan_.edges[from.edges[i]].skip]); });
        }
    });
    begun_[source] = true;
  }

  // On a plane of image n: to = slope * from + constant, of a null `from` the constant alone, + the sum over some of the
  // edges of factor(edge) * gradient of its target.
  template <typename Factor>
  RNAS_INLINE void weighted(const Leaving& all, const std::vector<size_t>& some, int64_t n, int64_t plane,
                            int64_t pixels, float* to, const float* from, Vector slope, Vector constant,
                            const Factor& factor) const {
    for (int64_t p = 0; p < pixels; p += kBlock) {
      const int64_t size = std::min<int64_t>(kBlock, pixels - p);
      Vector sum[kBlock];
#pragma GCC unroll 8
      for (int64_t q = 0; q < kBlock; ++q)
        sum[q] = from ? fma(load(from + (p + std::min(q, size - 1)) * kLanes), slope, constant) : constant;
      for (size_t i : some) {
        const float* g = gradient(plan_.edges[all.edges[i]].target, n) + plane + p * kLanes;
        const Vector f = factor(i);
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

  void finish_states() {
    for (int64_t state = 0; state < plan_.shape.inputs; ++state) {
      if (!grad_.states[state]) continue;
      const int64_t c = plan_.shape.channels, pixels = plan_.height(state) * plan_.width(state);
      parallel(threads_, images(), [&](int thread, int64_t begin, int64_t end) {
        const Section section(scratch_[thread].clock, Work::nodes);
        for (int64_t n = begin; n < end; ++n)
          store_state<false>(plan_, gradient(state, n), static_cast<float*>(grad_.states[state]) + n * pixels * c, c, pixels);
      });
    }
  }

  void finish_weights() {
    std::vector<const double*> totals;
    for (const WeightSums& sums : weight_sums_) totals.push_back(sums.total);
    parallel(threads_, plan_.edges.size(), [&](int, int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e)
        for (const Branch& branch : plan_.edges[e].branches)
          for (const Convolution& conv : branch.stages)
            unpack(plan_, conv, totals.data(), static_cast<int>(totals.size()), nullptr, grad_.theta);
    });
  }

  Winner* winners_ = nullptr;
  MixedGradients grad_{};
  std::vector<float*> grads_;    // of each state, dense
  std::vector<bool> begun_;      // of which of them there is anything yet
  std::vector<WeightSums> weight_sums_;
  std::vector<Affine> first_, last_, pool_;
  double* grad_sums_ = nullptr;  // (states, padded)
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
