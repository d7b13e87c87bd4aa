#pragma once

// The backward pass of a cell on batch statistics.

#include <numeric>

#include "mixed/matrices_backward.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

class BatchBackward : public MatricesBackward {
 public:
  BatchBackward(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : MatricesBackward(plan, in, workspace, threads) {
    for (int thread = 0; thread < threads; ++thread) {
      float* now = arena_.take<float>(plan.packed_of_edge());
      weight_sums_.push_back({now, arena_.take<double>(plan.summed)});
    }
    for (size_t slot = 0; slot < y_.size(); ++slot) {
      first_.push_back(take_affine(arena_, plan));
      last_.push_back(take_affine(arena_, plan));
    }
  }

  void backward(Keep keep, const float* kept, const float* grad_out, const MixedGradients& grad) {
    set_norms(plan_, in_, norms_);
    keep_ = keep;
    pack_all(true);
    kept_ = const_cast<float*>(kept);
    if (plan_.matrix) std::memcpy(covariances_, kept_covariances(), covariance_bytes());
    grad_ = grad;
    if (grad.theta)
      parallel(threads_, threads_, [&](int, int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) {
          std::memset(weight_sums_[thread].now, 0, plan_.packed_of_edge() * sizeof(float));
          std::memset(weight_sums_[thread].total, 0, plan_.summed * sizeof(double));
        }
      });
    begin_gradients(grad_out);
    waiting_.push_back({plan_.states() - 1, {}, {}, true});
    for (int64_t source = plan_.states() - 2; source >= 0; --source) backward_source(source, state_of(source));
    catch_up();
    for (size_t e = 0; e < plan_.edges.size(); ++e)
      if (plan_.edges[e].ones >= 0) {
        const std::vector<double> sum = edge_sum(e);
        set_mixing_gradient(e, plan_.edges[e].ones, std::accumulate(sum.begin(), sum.end(), 0.0));
      }
    if (grad.theta) finish_weights();
  }

 private:
  // A state, and what goes back to it through pools, identities and matrices.
  struct Source {
    int64_t index;
    State state;
    Leaving from;
    bool begun;  // whether there is a gradient that they add to
  };

  // Everything that leaves a state.
  void backward_source(int64_t index, const State& state) {
    Source source{index, state, leaving(index), true};
    const Leaving& from = source.from;
    if (!source.from.with_matrix.empty()) begin_products(index);
    // Norms behind pools need the products of all images before anything can go back through them.
    const bool at_once = !plan_.shape.pool_norm || (from.with_pool[0].empty() && from.with_pool[1].empty());
    if (!plan_.shape.pool_norm) set_pools(from);
    // The last pass over the images does what it can of what is left while an image is in the cache.
    const auto finish = [&](const Scratch& s, int64_t n) {
      at_once ? finish_image(source, s, n) : pool_dots(from, index, state, s, n);
    };
    bool finished = false;
    for (int64_t e : from.edges) finished |= backward_edge(source, e, finish);
    source.begun = begun_[index];
    if (from.last < 0 && !source.from.with_matrix.empty()) {
      parallel_shared(threads_, images(), [&](int thread, const auto& take) {
        const Scratch& s = scratch_[thread];
        for (int64_t n = take(); n >= 0; n = take()) {
          s.ahead->clear();
          if (n + 1 < images()) announce_next(s, source, n + 1);
          begin_image(source, thread, n);
        }
      }, true);
      settle(source);
    }
    if (!finished && at_once) {
      waiting_.push_back(std::move(source));
      return;
    }
    if (!finished)
      each_image([&](const Scratch& s, int64_t n) {
        catch_up(s, n);
        finish(s, n);
      });
    settle();
    settle_pools(from);
    if (!at_once && wanted(index))
      each_image([&](const Scratch& s, int64_t n) { add_gradients(source, s, n); });
    add_up_gradient(index);
  }

  void announce_next(const Scratch& s, const Source& source, int64_t n) const {
    for (const Source& before : waiting_) {
      for (int64_t e : before.from.with_matrix) announce(s, plan_, gradient(plan_.edges[e].target, n), plan_.pixels_out());
      if (!before.from.with_matrix.empty()) announce(s, plan_, before.state, n);
    }
    for (int64_t e : source.from.with_matrix) announce(s, plan_, gradient(plan_.edges[e].target, n), plan_.pixels_out());
    announce(s, plan_, source.state, n);
  }

  // In the first pass over the images of a state.
  void begin_image(const Source& source, int thread, int64_t n) {
    catch_up(scratch_[thread], n);
    if (!source.from.with_matrix.empty()) matrix_products(source.from.with_matrix, source.state, thread, n);
  }
  // Behind it.
  void settle(const Source& source) {
    settle();
    if (!source.from.with_matrix.empty()) settle_matrices(source.from.with_matrix, source.index);
  }

  // What goes back to image n of a state through pools, identities and matrices, behind all else.
  void finish_image(const Source& source, const Scratch& s, int64_t n) const {
    const bool is_last = source.index + 1 == plan_.states(), of_state = wanted(source.index);
    if (is_last) begin_last(s, n);
    if (!is_last && (of_state || has_dots())) pool_dots(source.from, source.index, source.state, s, n);
    if (of_state) add_gradients(source, s, n);
  }
  void add_gradients(const Source& source, const Scratch& s, int64_t n) const {
    const bool matrices = !source.from.with_matrix.empty();
    if (matrices) matrix_gradients(source.from.with_matrix, source.index, source.state, s, n, source.begun);
    pool_gradients(source.from, source.index, source.state, s, n, source.begun || matrices);
    finish_gradient(s, source.index, n);
  }

  // States that no convolution leaves wait: an image of theirs is finished in the next pass over the images, in front of
  // what needs their gradients, so that it is read once. Behind that pass: settle.
  void catch_up(const Scratch& s, int64_t n) const {
    for (const Source& source : waiting_) finish_image(source, s, n);
  }
  void settle() {
    for (const Source& source : waiting_) {
      settle_pools(source.from);
      add_up_gradient(source.index);
    }
    waiting_.clear();
  }
  // Those that wait when no pass is left.
  void catch_up() {
    if (!waiting_.empty()) each_image([&](const Scratch& s, int64_t n) { catch_up(s, n); });
    settle();
  }

  // Behind images [first, last) of a thread's, of which the last is in front of `end`.
  void flush(int thread, const Convolution& conv, int64_t first, int64_t last, int64_t end) const {
    if (grad_.theta && plan_.flushes(conv, first, last, end))
      add_up(plan_, conv, weight_sums_[thread]);
  }
  const WeightSums* sums_of(int thread) const { return grad_.theta ? &weight_sums_[thread] : nullptr; }

  // The convolutions of an edge. The state's first such edge calls begin_image. Its last one, where the gradient of the
  // state or of weights is wanted, calls finish(scratch, image) for each image behind all else that reads it. Returns
  // whether it did.
  template <typename Finish> bool backward_edge(const Source& source, int64_t e, const Finish& finish) {
    const Edge& edge = plan_.edges[e];
    if (edge.branches.empty()) return false;
    const State& state = source.state;
    const bool is_first = e == source.from.first, is_last = e == source.from.last;
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
        if (is_first) begin_image(source, thread, n);
        const float* g = gradient(edge.target, n);
        bool loaded = false;
        for (size_t b = 0; b < branches; ++b) {
          const Branch& branch = edge.branches[b];
          const float* mean = norms_.row(norms_.mean, branch.last().norm);
          float *out = y(edge, b, n), *sum = s.sums;
          double* to = sums_[b] + n * plan_.padded;
          if (output_of(branch) >= 0) {
            edge_dot(s, e, n, out, mean, to);
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
          rescale(e, n, to);
        }
      }
    }, is_first && !source.from.with_matrix.empty());
    if (is_first) settle(source);
    const std::vector<double> grad_sum = edge_sum(e);
    std::vector<double> dots(plan_.padded), gradient_sums(plan_.padded);
    bool second = false;
    for (size_t b = 0; b < branches; ++b) {
      const Branch& branch = edge.branches[b];
      total(sums_[b], dots.data());
      double mixing_grad = 0;
      norm_gradients(branch.last().norm, w[branch.mix], dots.data(), grad_sum.data(), &mixing_grad);
      set_mixing_gradient(e, branch.mix, mixing_grad);
      batch_gradient(plan_, norms_, branch.last().norm, w[branch.mix], dots.data(), grad_sum.data(), count(), last_[b]);
      second |= branch.stages.size() > 1;
    }

    const bool of_state = wanted(edge.source);
    if (!of_state && !grad_.theta && !grad_.gamma && !grad_.beta) return false;

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
            backward_second(e, b, n, thread, s, end);
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
    if (!of_state && !grad_.theta) return false;
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
        backward_state(e, state, n, last, thread, s, tile, end);
        for (int64_t i = n; i < last && is_last; ++i) finish(s, i);
      }
    });
    if (of_state) begun_[edge.source] = true;
    return is_last;
  }

  void backward_second(int64_t e, size_t b, int64_t n, int thread, const Scratch& s, int64_t end) {
    const Edge& edge = plan_.edges[e];
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
          return apply(plan_, last_[b], scale(e, n), g + at, out + at, rows, to);
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
  void backward_state(int64_t e, const State& state, int64_t n, int64_t last, int thread, const Scratch& s,
                      const Tile& tile, int64_t end) {
    const Edge& edge = plan_.edges[e];
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
        return apply(plan_, affine, two ? 1.0f : scale(e, n + i), g + at, of + at, rows, to);
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

  std::vector<WeightSums> weight_sums_;
  std::vector<Affine> first_, last_;
  std::vector<Source> waiting_;
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
