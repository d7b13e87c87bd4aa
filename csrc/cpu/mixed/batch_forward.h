#pragma once

// The forward pass of a cell on batch statistics.

#include "mixed/node_sums.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

class BatchForward : public NodeSums {
 public:
  BatchForward(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : NodeSums(plan, in, workspace, threads) {
    for (int64_t node = 0; node < plan.shape.nodes; ++node) {
      const bool of_caller = node + 1 == plan.shape.nodes && plan.asked_dense();
      nodes_.push_back(of_caller ? nullptr : arena_.take<float>(plan.shape.batch * plan.image_out()));
    }
  }

  void forward(Keep keep, float* out, float* mean, float* variance, float* kept) {
    clear(plan_, norms_);
    keep_ = keep;
    pack_all(false);
    out_ = out;
    if (plan_.asked_dense()) nodes_.back() = out;
    kept_ = keep >= Keep::activations ? kept : nullptr;
    batch_mean_ = mean;
    batch_variance_ = variance;
    for (int64_t source = 0; source + 1 < plan_.states(); ++source) forward_source(source, state_of(source));
    begin_pass(plan_.states() - 1);
    parallel(threads_, images(), [&](int thread, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        announce_next(scratch_[thread], n);
        begin_image(scratch_[thread], n);
        if (!plan_.asked_dense()) finish_node(scratch_[thread], plan_.states() - 1, n, last_node(scratch_[thread], n));
      }
    });
    finish_pass();
    if (kept_ && plan_.matrix) std::memcpy(kept_covariances(), covariances_, covariance_bytes());
  }

 private:
  void finish_node(const Scratch& s, int64_t state, int64_t n, const float* image) const {
    const Section section(s.clock, Work::nodes);
    store_node(plan_, image, state, n, out_);
  }

  // Where the first convolution of a branch goes.
  float* first_output(const Edge& edge, size_t b, int64_t n) const {
    return edge.branches[b].stages.size() > 1 ? mid(edge, b, n) : y(edge, b, n);
  }

  // The moments of images, gathered as their rows are made. y, sums: of the first.
  auto moments(const Scratch& s, const float* y, double* sums) const {
    return [=, &s, this](int64_t i, int64_t row, int64_t rows) {
      const Section section(s.clock, Work::norms);
      double* to = sums + 2 * i * plan_.padded;
      add_moments(plan_.groups, y + i * plan_.image_out() + row * plan_.width_out * kLanes, plan_.plane_out(),
                  rows * plan_.width_out, row * plan_.width_out, {to, to + plan_.padded});
    };
  }

  // From the images' moments to the tables and to what the caller gets.
  void settle(int64_t norm, const double* sums) {
    const int64_t c = plan_.shape.channels;
    std::vector<double> mean(c), variance(c);
    merge_moments(plan_, sums, plan_.pixels_out(), mean.data(), variance.data());
    set_statistics(norm, mean.data(), variance.data());
  }

  // The norms behind the first or the second stages of an edge.
  void settle_stage(const Edge& edge, bool second) {
    parallel(threads_, edge.branches.size(), [&](int, int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const Branch& branch = edge.branches[b];
        if (branch.stages.size() > 1 || !second) settle(branch.stages[second].norm, sums_[b]);
      }
    });
  }

  // Everything that leaves a state. What an image needs once is done in the first pass over the images: convolutions', or
  // one of its own, or, where no norm waits for it, the next one of a later state.
  void forward_source(int64_t source, const State& state) {
    const Arrival now{source, state, plan_.leaves(source, &Edge::max), plan_.leaves(source, &Edge::avg),
                      plan_.asked(source) >= 0, plan_.leaves(source, &Edge::matrix)};
    bool arrived = !now.max && !now.avg && !now.asked && !now.matrix;
    std::vector<int64_t> edges = plan_.leaving(source);
    std::stable_partition(edges.begin(), edges.end(), [&](int64_t e) { return !plan_.edges[e].branches.empty(); });
    const bool by_itself = !arrived && plan_.edges[edges[0]].branches.empty();
    const auto behind_pass = [&] {
      finish_pass();
      if (!arrived) settle_pools(source);
      if (!arrived && now.matrix) settle_matrices(source, state);
      arrived = true;
    };
    if (by_itself && !now.matrix && (!plan_.shape.pool_norm || (!now.max && !now.avg))) {
      begin_pass(source);
      delay_pass();
      waiting_.push_back(now);
      for (int64_t e : edges) leave(plan_.edges[e], e, state, true);
      return;
    }
    if (now.matrix) begin_covariance();
    if (by_itself) {
      begin_pass(source);
      parallel_shared(threads_, images(), [&](int thread, const auto& take) {
        for (int64_t n = take(); n >= 0; n = take()) {
          announce_next(scratch_[thread], n);
          arrive(now, thread, n);
        }
      }, now.matrix);
      behind_pass();
    }
    for (int64_t e : edges) {
      const Edge& edge = plan_.edges[e];
      if (!edge.branches.empty()) {
        begin_pass(source);
        first_stage(edge, now, arrived);
        behind_pass();
        settle_convolutions(edge);
      }
      leave(edge, e, state, false);
    }
  }

  // A state from which edges leave: whether there are pools, and whether it is a node that the caller asks for.
  struct Arrival {
    int64_t source;
    State state;
    bool max, avg, asked, matrix;
  };

  // In each pass, in front of all else: what was to be done in those that wait, and what is to be added in this one.
  void begin_image(const Scratch& s, int64_t n) {
    for (size_t each = 0; each < waiting_.size(); ++each) {
      add_delayed(each, s, n);
      finish_state(waiting_[each], s, n, pooled(s));
    }
    add_due(s, n);  // before the pools it refers to change
  }
  void finish_pass() {
    end_pass();
    waiting_.clear();
  }

  // What an image of a state needs once: what remains to be added, its part in the covariance, its pools.
  void arrive(const Arrival& now, int thread, int64_t n) {
    const Scratch& s = scratch_[thread];
    begin_image(s, n);
    finish_state(now, s, n, now.avg ? avg_ + n * plan_.image_out() : nullptr);
    if (now.matrix) add_to_covariance(thread, s, now.state, n);
  }

  // An image of a state to where the caller wants it, and its pools with their moments, for all edges.
  void finish_state(const Arrival& now, const Scratch& s, int64_t n, float* average) {
    if (now.asked) finish_node(s, now.source, n, node(now.source) + n * plan_.image_out());
    if (!now.max && !now.avg) return;
    const State& state = now.state;
    float* const largest = now.max ? max_ + n * plan_.image_out() : nullptr;
    const PoolShape shape = pool_shape(state);
    const float* image_in = state.data + n * state.image;
    if (!state.dense()) {
      load_dense(plan_, state, n, s.state_grad);
      image_in = s.state_grad;
    }
    for (int64_t group = 0; group < plan_.groups; ++group) {
      const Section section(s.clock, Work::pools);
      const float* in = image_in + group * state.height * state.width * kLanes;
      const int64_t plane = group * plan_.plane_out();
      if (now.max) max_pool(in, state.width * kLanes, shape, s.pool_rows, largest + plane, nullptr, nullptr);
      if (now.avg) average_pool(in, state.width * kLanes, shape, s.pool_rows, average + plane);
    }
    if (!plan_.shape.pool_norm) return;
    const int64_t row = 2 * n * plan_.padded;
    if (now.max) moments(s, largest, max_sums() + row)(0, 0, plan_.height_out);
    if (now.avg) moments(s, average, avg_sums() + row)(0, 0, plan_.height_out);
  }
  double* max_sums() const { return pool_sums_; }
  double* avg_sums() const { return pool_sums_ + 2 * images() * plan_.padded; }

  // The norms behind the pools of a state.
  void settle_pools(int64_t source) {
    if (!plan_.shape.pool_norm) return;
    for (int64_t e : plan_.leaving(source)) {
      const Edge& edge = plan_.edges[e];
      if (edge.max >= 0) settle(edge.max_norm, max_sums());
      if (edge.avg >= 0) settle(edge.avg_norm, avg_sums());
    }
  }

  // The first stages of an edge's convolutions. arrived: whether its state is finished.
  void first_stage(const Edge& edge, const Arrival& now, bool arrived) {
    const State& state = now.state;
    parallel_shared(threads_, bundles(), [&](int thread, const auto& take) {
      const Scratch& s = scratch_[thread];
      const Tile tile = sized(s.state, state.height, state.width);
      clear(tile, plan_.groups, plan_.bundle);
      for (int64_t bundle = take(); bundle >= 0; bundle = take()) {
        const int64_t begin = bundle * plan_.bundle, end = std::min(begin + plan_.bundle, images());
        for (int64_t n = begin; n < end; ++n) {
          arrived ? begin_image(s, n) : arrive(now, thread, n);
          load_state(s, state, n, tile.at(n - begin));
        }
        s.ahead->clear();
        if (const int64_t next = std::min(end + plan_.bundle, images()) - end) {
          announce_due(s, end, next);
          announce(s, plan_, state, end, next);
          for (size_t b = 0; b < edge.branches.size(); ++b)
            if (!is_due(first_output(edge, b, 0)))
              announce(s, plan_, first_output(edge, b, end), next * plan_.pixels_out());
        }
        for (size_t b = 0; b < edge.branches.size(); ++b) {
          const Branch& branch = edge.branches[b];
          float* to = first_output(edge, b, begin);
          convolve<false>(plan_, branch.stages[0], packed_.forward, tile, end - begin, s, to,
                          moments(s, to, sums_[b] + 2 * begin * plan_.padded));
        }
      }
    }, !arrived && now.matrix);
  }

  // What is left of an edge's convolutions behind their first stages.
  void settle_convolutions(const Edge& edge) {
    bool second = false;
    for (const Branch& branch : edge.branches) second |= branch.stages.size() > 1;
    settle_stage(edge, false);
    if (!second) return;
    second_stage(edge);
    settle_stage(edge, true);
  }

  // The second stages of the separable convolutions, into y.
  void second_stage(const Edge& edge) {
    parallel_shared(threads_, images(), [&](int thread, const auto& take) {
      const Scratch& s = scratch_[thread];
      clear(s.mid, plan_.groups);
      for (int64_t n = take(); n >= 0; n = take())
        for (size_t b = 0; b < edge.branches.size(); ++b) {
          const Branch& branch = edge.branches[b];
          if (branch.stages.size() < 2) continue;
          load_mid_of(edge, b, n, s);
          s.ahead->clear();
          if (n + 1 < images()) {
            announce(s, plan_, mid(edge, b, n + 1), plan_.pixels_out());
            if (y(edge, b, n + 1) != mid(edge, b, n + 1)) announce(s, plan_, y(edge, b, n + 1), plan_.pixels_out());
          }
          convolve<false>(plan_, branch.last(), packed_.forward, s.mid, 1, s, y(edge, b, n),
                          moments(s, y(edge, b, n), sums_[b] + 2 * n * plan_.padded));
        }
    });
  }

  std::vector<Arrival> waiting_;  // in the order of what is delayed
  float* out_ = nullptr;
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
