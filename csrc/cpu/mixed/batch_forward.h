#pragma once

// The forward pass of a cell on batch statistics.

#include "mixed/batch.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

class BatchForward : public Batch {
 public:
  BatchForward(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : Batch(plan, in, workspace, threads) {
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
    parallel(threads_, images(), [&](int thread, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        add_pending(scratch_[thread], n);
        if (!plan_.asked_dense()) finish_node(scratch_[thread], plan_.states() - 1, n);
      }
    });
    pending_.clear();
  }

 private:
  void finish_node(const Scratch& s, int64_t state, int64_t n) const {
    const Section section(s.clock, Work::nodes);
    store_node(plan_, node(state) + n * plan_.image_out(), state, n, out_);
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
    set_norm(plan_, in_, norms_, norm, mean.data(), variance.data());
    for (int64_t channel = 0; channel < c; ++channel) {
      batch_mean_[norm * c + channel] = static_cast<float>(mean[channel]);
      batch_variance_[norm * c + channel] = static_cast<float>(variance[channel]);
    }
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

  // Everything that leaves a state. What an image needs once is done in the first pass over the images, convolutions' or
  // one of its own.
  void forward_source(int64_t source, const State& state) {
    const Arrival now{source, state, plan_.leaves(source, &Edge::max), plan_.leaves(source, &Edge::avg),
                      plan_.asked(source) >= 0};
    bool arrived = !now.max && !now.avg && !now.asked;
    std::vector<int64_t> edges = plan_.leaving(source);
    std::stable_partition(edges.begin(), edges.end(), [&](int64_t e) { return !plan_.edges[e].branches.empty(); });
    const auto behind_pass = [&] {
      pending_.clear();
      if (!arrived) settle_pools(source);
      arrived = true;
    };
    if (!arrived && plan_.edges[edges[0]].branches.empty()) {
      parallel_shared(threads_, images(), [&](int thread, const auto& take) {
        for (int64_t n = take(); n >= 0; n = take()) arrive(now, scratch_[thread], n);
      });
      behind_pass();
    }
    for (int64_t e : edges) {
      const Edge& edge = plan_.edges[e];
      if (!edge.branches.empty()) {
        first_stage(edge, now, arrived);
        behind_pass();
        settle_convolutions(edge);
      }
      leave(edge, e, state);
    }
  }

  // A state from which edges leave: whether there are pools, and whether it is a node that the caller asks for.
  struct Arrival {
    int64_t source;
    const State& state;
    bool max, avg, asked;
  };

  // Finishes an image of a state: what remains to be added, to where the caller wants it, and its pools with their
  // moments, for all edges.
  void arrive(const Arrival& now, const Scratch& s, int64_t n) const {
    add_pending(s, n);  // before the pools it refers to change
    if (now.asked) finish_node(s, now.source, n);
    if (!now.max && !now.avg) return;
    const State& state = now.state;
    const PoolShape shape = pool_shape(state);
    const float* image_in = state.data + n * state.image;
    if (!state.dense()) {
      load_dense(plan_, state, n, s.state_grad);
      image_in = s.state_grad;
    }
    for (int64_t group = 0; group < plan_.groups; ++group) {
      const Section section(s.clock, Work::pools);
      const float* in = image_in + group * state.height * state.width * kLanes;
      const int64_t at = n * plan_.image_out() + group * plan_.plane_out();
      if (now.max) max_pool(in, state.width * kLanes, shape, s.pool_rows, max_ + at, nullptr, nullptr);
      if (now.avg) average_pool(in, state.width * kLanes, shape, s.pool_rows, avg_ + at);
    }
    if (!plan_.shape.pool_norm) return;
    const int64_t image = n * plan_.image_out(), row = 2 * n * plan_.padded;
    if (now.max) moments(s, max_ + image, max_sums() + row)(0, 0, plan_.height_out);
    if (now.avg) moments(s, avg_ + image, avg_sums() + row)(0, 0, plan_.height_out);
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
          arrived ? add_pending(s, n) : arrive(now, s, n);
          load_state(s, state, n, tile.at(n - begin));
        }
        s.ahead->clear();
        if (const int64_t next = std::min(end + plan_.bundle, images()) - end) {
          announce_pending(s, end, next);
          announce(s, plan_, state, end, next);
          for (size_t b = 0; b < edge.branches.size(); ++b)
            if (!is_pending(first_output(edge, b, 0)))
              announce(s, plan_, first_output(edge, b, end), next * plan_.pixels_out());
        }
        for (size_t b = 0; b < edge.branches.size(); ++b) {
          const Branch& branch = edge.branches[b];
          float* to = first_output(edge, b, begin);
          convolve<false>(plan_, branch.stages[0], packed_.forward, tile, end - begin, s, to,
                          moments(s, to, sums_[b] + 2 * begin * plan_.padded));
        }
      }
    });
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

  // An edge that is computed and not yet added to its node. That is done image by image inside the next stage, whose
  // arithmetic hides the reading.
  struct Term {
    const float* data;
    std::vector<float> factor;
  };
  struct Pending {
    std::vector<Term> terms;
    std::vector<float> constant;
    State state;
    float skip;
    bool has_skip, set_node;
    float* target;
  };

  void leave(const Edge& edge, int64_t e, const State& state) {
    Pending left{};
    const float* w = mixing(e);
    left.constant.assign(plan_.padded, 0.0f);
    const auto add = [&](const float* data, int64_t mix, int64_t norm) {
      Term term{data, std::vector<float>(plan_.padded, w[mix])};
      for (int64_t c = 0; c < plan_.padded && norm >= 0; ++c) {
        term.factor[c] = w[mix] * norms_.row(norms_.scale, norm)[c];
        left.constant[c] += w[mix] * norms_.row(norms_.shift, norm)[c];
      }
      left.terms.push_back(term);
    };
    for (size_t b = 0; b < edge.branches.size(); ++b)
      add(y(edge, b, 0), edge.branches[b].mix, edge.branches[b].last().norm);
    if (edge.max >= 0) add(max_, edge.max, edge.max_norm);
    if (edge.avg >= 0) add(avg_, edge.avg, edge.avg_norm);
    for (int64_t c = 0; c < plan_.shape.channels && edge.ones >= 0; ++c) left.constant[c] += w[edge.ones];
    left.state = state;
    left.has_skip = edge.skip >= 0;
    left.skip = left.has_skip ? w[edge.skip] : 0.0f;
    left.set_node = edge.source == 0;  // the first edge of every node
    left.target = node(edge.target);
    if (left.set_node || left.has_skip || edge.ones >= 0 || !left.terms.empty()) pending_.push_back(std::move(left));
  }

  bool is_pending(const float* data) const {
    for (const Pending& left : pending_)
      for (const Term& term : left.terms)
        if (term.data == data) return true;
    return false;
  }

  void announce_pending(const Scratch& s, int64_t n, int64_t images) const {
    const int64_t pixels = images * plan_.pixels_out();
    for (const Pending& left : pending_) {
      for (const Term& term : left.terms) announce(s, plan_, term.data + n * plan_.image_out(), pixels);
      if (left.has_skip) announce(s, plan_, left.state, n, images);
      announce(s, plan_, left.target + n * plan_.image_out(), pixels);
    }
  }

  void add_pending(const Scratch& s, int64_t n) const {
    if (pending_.empty()) return;
    const Section section(s.clock, Work::nodes);
    for (const Pending& left : pending_) add_to_node(left, n);
  }

  void add_to_node(const Pending& left, int64_t n) const {
    const int64_t pixels = plan_.pixels_out(), c = plan_.shape.channels;
    const Vector skip = set(left.skip);
    for (int64_t group = 0; group < plan_.groups; ++group) {
      const int64_t lanes = left.state.dense() ? kLanes : std::min(kLanes, c - group * kLanes);
      const int64_t base = n * plan_.image_out() + group * plan_.plane_out();
      const Vector constant = load(left.constant.data() + group * kLanes);
      for (int64_t p = 0; p < pixels; p += kBlock) {
        const int64_t size = std::min<int64_t>(kBlock, pixels - p);
        Vector sum[kBlock];
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; ++i) sum[i] = constant;
        for (const Term& term : left.terms) {
          const Vector factor = load(term.factor.data() + group * kLanes);
          const float* at = term.data + base + p * kLanes;
          if (size == kBlock) {
#pragma GCC unroll 8
            for (int i = 0; i < kBlock; ++i) sum[i] = fma(load(at + i * kLanes), factor, sum[i]);
          } else {
            for (int64_t i = 0; i < size; ++i) sum[i] = fma(load(at + i * kLanes), factor, sum[i]);
          }
        }
        for (int64_t i = 0; i < size; ++i) {
          float* to = left.target + base + (p + i) * kLanes;
          Vector v = sum[i];
          if (left.has_skip) {
            const State& state = left.state;
            const float* x = state.data + n * state.image + (p + i) * state.pixel + group * state.group;
            v = fma(lanes == kLanes ? load(x) : load_part(x, lanes), skip, v);
          }
          store(to, left.set_node ? v : v + load(to));
        }
      }
    }
  }

  float *out_ = nullptr, *batch_mean_ = nullptr, *batch_variance_ = nullptr;
  std::vector<Pending> pending_;
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
