#pragma once

// The cell on batch statistics. A norm needs all images before any can go on, so the work runs in stages over the whole
// batch: edge by edge, and within an edge stage by stage, with what a stage hands to the next in the workspace.

#include "mixed/norms.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

class Batch {
 public:
  Batch(const Plan& plan, const MixedInputs& in, void* workspace, int threads, bool backward)
      : plan_(plan), in_(in), threads_(threads), arena_(workspace) {
    const int64_t n = plan.shape.batch, image = plan.image_out();
    norms_ = take_norms(arena_, plan);
    packed_ = take_packed(arena_, plan);
    for (int thread = 0; thread < threads; ++thread) scratch_.push_back(take_scratch(arena_, plan, thread));
    int64_t branches = 0;
    for (const Edge& edge : plan.edges) branches = std::max<int64_t>(branches, edge.branches.size());
    for (int64_t slot = 0; slot < branches; ++slot) {
      y_.push_back(arena_.take<float>(n * image));
      sums_.push_back(arena_.take<double>(2 * n * plan.padded));
    }
    for (int64_t node = 0; node < plan.shape.nodes && !backward; ++node) nodes_.push_back(arena_.take<float>(n * image));
    max_ = plan.max ? arena_.take<float>(n * image) : nullptr;
    avg_ = plan.avg ? arena_.take<float>(n * image) : nullptr;
    pool_sums_ = arena_.take<double>(2 * 2 * plan.shape.nodes * n * plan.padded);
    winners_ = arena_.take<Winner>((plan.max ? n : threads) * winners_per_image());
    if (backward) {
      for (int64_t state = 0; state < plan.states(); ++state)
        grads_.push_back(arena_.take<float>(n * plan.height(state) * plan.width(state) * plan.padded));
      for (int thread = 0; thread < threads; ++thread) {
        float* now = arena_.take<float>(plan.packed);
        weight_sums_.push_back({now, arena_.take<double>(plan.packed)});
      }
      for (int64_t slot = 0; slot < branches; ++slot) {
        first_.push_back(take_affine(arena_, plan));
        last_.push_back(take_affine(arena_, plan));
      }
      for (int64_t each = 0; each < 2 * plan.shape.nodes; ++each) pool_.push_back(take_affine(arena_, plan));
      grad_sums_ = arena_.take<double>(plan.states() * plan.padded);
    }
  }

  int64_t workspace() const { return arena_.used(); }

  // ---- forward ---------------------------------------------------------------------------------------------------------

  void forward(Keep keep, float* out, float* mean, float* variance, float* kept) {
    clear(plan_, norms_);
    pack_all(false);
    keep_ = keep;
    out_ = out;
    kept_ = keep >= Keep::activations ? kept : nullptr;
    batch_mean_ = mean;
    batch_variance_ = variance;
    for (int64_t source = 0; source + 1 < plan_.states(); ++source) {
      const State state = state_of(source);
      begin_source(source, state, true);
      for (size_t e = 0; e < plan_.edges.size(); ++e)
        if (plan_.edges[e].source == source) forward_edge(plan_.edges[e], e, state);
    }
    parallel(threads_, images(), [&](int thread, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        add_pending(scratch_[thread], n);
        finish_node(scratch_[thread], plan_.states() - 1, n);
      }
    });
    pending_.clear();
  }

  // ---- backward --------------------------------------------------------------------------------------------------------

  void backward(Keep keep, const float* kept, const float* grad_out, const MixedGradients& grad) {
    set_norms(plan_, in_, norms_);
    pack_all(true);
    keep_ = keep;
    kept_ = const_cast<float*>(kept);
    grad_ = grad;
    if (grad.theta)
      parallel(threads_, threads_, [&](int, int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) {
          std::memset(weight_sums_[thread].now, 0, plan_.packed * sizeof(float));
          std::memset(weight_sums_[thread].total, 0, plan_.packed * sizeof(double));
        }
      });
    begin_gradients(grad_out);
    for (int64_t source = plan_.states() - 1; source >= 0; --source) {
      const State state = state_of(source);
      for (size_t e = 0; e < plan_.edges.size(); ++e)
        if (plan_.edges[e].source == source) backward_edge(plan_.edges[e], e, state);
      if (source + 1 < plan_.states()) pools_backward(source, state);
      sum_gradient(source);
    }
    if (grad.states) finish_states();
    if (grad.theta) finish_weights();
  }

 private:
  int64_t winners_per_image() const {
    return plan_.groups * (plan_.shape.height + plan_.height_out) * plan_.width_out;
  }
  const float* mixing(int64_t e) const { return in_.weights + e * plan_.shape.candidates; }
  int64_t images() const { return plan_.shape.batch; }
  double count() const { return static_cast<double>(images()) * plan_.pixels_out(); }

  State state_of(int64_t state) const {
    const int64_t h = plan_.height(state), w = plan_.width(state), c = plan_.shape.channels;
    if (state < plan_.shape.inputs) return {static_cast<const float*>(in_.states[state]), h * w * c, c, h, w};
    return dense_state(node(state), plan_, h, w);
  }

  // A node, dense: kept, or in the workspace. The last one is never kept; a backward pass has none of it.
  float* node(int64_t state) const {
    const int64_t node = state - plan_.shape.inputs;
    if (kept_ && node < plan_.kept_nodes()) return kept(node, 0);
    return nodes_.empty() ? nullptr : nodes_[node];
  }
  float* kept(int64_t which, int64_t n) const { return kept_ + (which * images() + n) * plan_.image_out(); }
  void finish_node(const Scratch& s, int64_t state, int64_t n) const {
    const Section section(s.clock, Work::nodes);
    store_node(plan_, node(state) + n * plan_.image_out(), state, n, out_);
  }
  // What enters the second stage of a branch. Where it is not kept, the output will take its place.
  float* mid(const Edge& edge, size_t b, int64_t n) const {
    return kept_ ? kept(plan_.kept_nodes() + edge.branches[b].kept, n) : spare(b, n);
  }
  // Which of the kept outputs a branch's is, -1 where it is not kept.
  int64_t output_of(const Branch& branch) const {
    return keep_ == Keep::outputs ? branch.output : keep_ == Keep::activations ? branch.costly : -1;
  }
  // The output of a branch, kept or in the workspace.
  float* y(const Edge& edge, size_t b, int64_t n) const {
    const int64_t output = output_of(edge.branches[b]);
    return output >= 0 ? kept(plan_.kept_nodes() + plan_.kept + output, n) : spare(b, n);
  }
  // Where the first convolution of a branch goes.
  float* first_output(const Edge& edge, size_t b, int64_t n) const {
    return edge.branches[b].stages.size() > 1 ? mid(edge, b, n) : y(edge, b, n);
  }
  // The branch's part of the workspace.
  float* spare(size_t b, int64_t n) const { return y_[b] + n * plan_.image_out(); }
  PoolShape pool_shape(const State& s) const {
    const int64_t stride = s.height == plan_.height_out && s.width == plan_.width_out ? 1 : plan_.shape.stride;
    return {s.height, s.width, stride, plan_.height_out, plan_.width_out};
  }
  Winner* across(int64_t n, int64_t group) const {
    return winners_ + n * winners_per_image() + group * (plan_.shape.height + plan_.height_out) * plan_.width_out;
  }
  Winner* down(int64_t n, int64_t group) const { return across(n, group) + plan_.shape.height * plan_.width_out; }

  void pack_all(bool backward) {
    parallel(threads_, plan_.edges.size(), [&](int, int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e)
        for (const Branch& branch : plan_.edges[e].branches)
          for (const Convolution& conv : branch.stages) pack(plan_, conv, in_.theta, nullptr, packed_, backward);
    });
  }

  // The moments of one image, gathered as its rows are made.
  auto moments(const Scratch& s, const float* y, double* sums) const {
    return [=, &s, this](int64_t row, int64_t rows) {
      const Section section(s.clock, Work::norms);
      add_moments(plan_.groups, y + row * plan_.width_out * kLanes, plan_.plane_out(), rows * plan_.width_out,
                  row * plan_.width_out, {sums, sums + plan_.padded});
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

  // Pools of a state, for all its edges. On a forward pass also their moments, and what remains to be done for a node.
  void begin_source(int64_t source, const State& state, bool forward) {
    const bool node_done = forward && plan_.asked(source) >= 0;
    const bool max = plan_.leaves(source, &Edge::max), avg = plan_.leaves(source, &Edge::avg);
    if (!max && !avg && !node_done) return;
    const PoolShape shape = pool_shape(state);
    const int64_t pixels = state.height * state.width;
    double *max_sums = pool_sums_, *avg_sums = pool_sums_ + 2 * images() * plan_.padded;
    parallel_shared(threads_, images(), [&](int thread, const auto& take) {
      const Scratch& s = scratch_[thread];
      for (int64_t n = take(); n >= 0; n = take()) {
        if (forward) add_pending(s, n);  // before the pools it refers to change
        if (node_done) finish_node(s, source, n);
        const float* image_in = state.data + n * state.image;
        if (!state.dense() && (max || avg)) {
          load_dense(plan_, state, n, s.state_grad);
          image_in = s.state_grad;
        }
        for (int64_t group = 0; group < plan_.groups; ++group) {
          const Section section(s.clock, Work::pools);
          const float* in = image_in + group * pixels * kLanes;
          const int64_t at = n * plan_.image_out() + group * plan_.plane_out();
          if (max)
            max_pool(in, state.width * kLanes, shape, s.pool_rows, max_ + at, forward ? nullptr : across(n, group),
                     forward ? nullptr : down(n, group));
          if (avg) average_pool(in, state.width * kLanes, shape, s.pool_rows, avg_ + at);
        }
        if (!forward || !plan_.shape.pool_norm) continue;
        const int64_t image = n * plan_.image_out(), row = 2 * n * plan_.padded;
        if (max) moments(s, max_ + image, max_sums + row)(0, plan_.height_out);
        if (avg) moments(s, avg_ + image, avg_sums + row)(0, plan_.height_out);
      }
    });
    if (forward) pending_.clear();
    if (!forward || !plan_.shape.pool_norm) return;
    for (const Edge& edge : plan_.edges)
      if (edge.source == source) {
        if (edge.max >= 0) settle(edge.max_norm, max_sums);
        if (edge.avg >= 0) settle(edge.avg_norm, avg_sums);
      }
  }

  void forward_edge(const Edge& edge, int64_t e, const State& state) {
    if (!edge.branches.empty()) {
      parallel_shared(threads_, images(), [&](int thread, const auto& take) {
        const Scratch& s = scratch_[thread];
        const Tile tile = sized(s.state, state.height, state.width);
        clear(tile, plan_.groups);
        for (int64_t n = take(); n >= 0; n = take()) {
          add_pending(s, n);
          load_state(s, state, n, tile);
          s.ahead->clear();
          if (n + 1 < images()) {
            announce_pending(s, n + 1);
            announce(s, plan_, state, n + 1);
            for (size_t b = 0; b < edge.branches.size(); ++b) {
              if (!is_pending(first_output(edge, b, 0))) announce(s, plan_, first_output(edge, b, n + 1), plan_.pixels_out());
            }
          }
          for (size_t b = 0; b < edge.branches.size(); ++b) {
            const Branch& branch = edge.branches[b];
            float* to = first_output(edge, b, n);
            convolve<false>(plan_, branch.stages[0], packed_.forward, tile, s, to,
                            moments(s, to, sums_[b] + 2 * n * plan_.padded));
          }
        }
      });
      pending_.clear();
      bool second = false;
      for (const Branch& branch : edge.branches) second |= branch.stages.size() > 1;
      settle_stage(edge, false);
      if (second) {
        second_stage(edge);
        settle_stage(edge, true);
      }
    }
    leave(edge, e, state);
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
          convolve<false>(plan_, branch.last(), packed_.forward, s.mid, s, y(edge, b, n),
                          moments(s, y(edge, b, n), sums_[b] + 2 * n * plan_.padded));
        }
    });
  }

  void load_state(const Scratch& s, const State& state, int64_t n, const Tile& tile) const {
    const Section section(s.clock, Work::tiles);
    load_relu(plan_, state, n, tile, nullptr);
  }

  void load_mid_of(const Edge& edge, size_t b, int64_t n, const Scratch& s) const {
    const Section section(s.clock, Work::tiles);
    const int64_t norm = edge.branches[b].stages[0].norm;
    load_mid(plan_, mid(edge, b, n), norms_.row(norms_.scale, norm), norms_.row(norms_.shift, norm), s.mid,
             nullptr);
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

  void announce_pending(const Scratch& s, int64_t n) const {
    const int64_t pixels = plan_.pixels_out();
    for (const Pending& left : pending_) {
      for (const Term& term : left.terms) announce(s, plan_, term.data + n * plan_.image_out(), pixels);
      if (left.has_skip) announce(s, plan_, left.state, n);
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

  // ---- backward ----

  float* gradient(int64_t state, int64_t n) const {
    return grads_[state] + n * plan_.height(state) * plan_.width(state) * plan_.padded;
  }

  void begin_gradients(const float* grad_out) {
    parallel(threads_, images(), [&](int thread, int64_t begin, int64_t end) {
      const Section section(scratch_[thread].clock, Work::nodes);
      for (int64_t n = begin; n < end; ++n)
        for (int64_t state = 0; state < plan_.states(); ++state)
          begin_gradient(plan_, grad_out, state, n, gradient(state, n));
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

  void flush(int thread, const Convolution& conv) const {
    weight_sums_[thread].add_up(conv.packed_begin, conv.packed_end);
  }
  bool flush_now(int64_t n, int64_t end) const {
    const int64_t every = std::max<int64_t>(1, kFlush / plan_.pixels_out());
    return n + 1 == end || (n + 1) % every == 0;
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
          convolve<false>(plan_, branch.last(), packed_.forward, two ? s.mid : tile, s, out,
                          [&](int64_t row, int64_t rows) {
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
            backward_second(edge, b, n, thread, s, flush_now(n, end));
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
      clear(tile, plan_.groups);
      clear(s.grad, plan_.groups);
      for (int64_t n = begin; n < end; ++n) {
        s.ahead->clear();
        if (n + 1 < end) {
          for (size_t b = 0; b < branches; ++b) {
            const bool two = edge.branches[b].stages.size() > 1;
            announce(s, plan_, two ? spare(b, n + 1) : y(edge, b, n + 1), plan_.pixels_out());
            if (two) announce(s, plan_, mid(edge, b, n + 1), plan_.pixels_out());
          }
          announce(s, plan_, gradient(edge.target, n + 1), plan_.pixels_out());
          announce(s, plan_, state, n + 1);
          announce(s, plan_, gradient(edge.source, n + 1), state.height * state.width);
        }
        backward_state(edge, state, n, thread, s, tile, flush_now(n, end));
      }
    });
  }

  void backward_second(const Edge& edge, size_t b, int64_t n, int thread, const Scratch& s, bool flush_weights) {
    const Branch& branch = edge.branches[b];
    const float* g = gradient(edge.target, n);
    const float* out = y(edge, b, n);
    float* behind = spare(b, n);
    load_mid_of(edge, b, n, s);
    convolve_backward<false>(
        plan_, branch.last(), packed_, s.mid, plan_.height_out, plan_.width_out, s,
        [&](int64_t row, int64_t rows, int64_t& plane) {
          const Section section(s.clock, Work::norms);
          const int64_t at = row * plan_.width_out * kLanes, pixels = rows * plan_.width_out;
          apply(plan_, last_[b], g + at, out + at, plan_.plane_out(), pixels, s.chunk);
          plane = pixels * kLanes;
          return s.chunk;
        },
        s.mid_grad, sums_of(thread));
    if (grad_.theta && flush_weights) flush(thread, branch.last());
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

  void backward_state(const Edge& edge, const State& state, int64_t n, int thread, const Scratch& s, const Tile& tile,
                      bool flush_weights) {
    const bool of_state = wanted(edge.source);
    load_state(s, state, n, tile);
    for (size_t b = 0; b < edge.branches.size(); ++b) {
      const Branch& branch = edge.branches[b];
      const bool two = branch.stages.size() > 1;
      const float* g = two ? spare(b, n) : gradient(edge.target, n);
      const float* of = two ? mid(edge, b, n) : y(edge, b, n);
      const Affine& affine = two ? first_[b] : last_[b];
      const auto gradient_of = [&](int64_t row, int64_t rows, int64_t& plane) {
        const Section section(s.clock, Work::norms);
        const int64_t at = row * plan_.width_out * kLanes, pixels = rows * plan_.width_out;
        apply(plan_, affine, g + at, of + at, plan_.plane_out(), pixels, s.chunk);
        plane = pixels * kLanes;
        return s.chunk;
      };
      const WeightSums* now = sums_of(thread);
      float* in_grad = of_state ? s.state_grad : nullptr;
      if (b == 0)
        convolve_backward<false>(plan_, branch.stages[0], packed_, tile, state.height, state.width, s, gradient_of,
                                 in_grad, now);
      else
        convolve_backward<true>(plan_, branch.stages[0], packed_, tile, state.height, state.width, s, gradient_of,
                                in_grad, now);
      if (grad_.theta && flush_weights) flush(thread, branch.stages[0]);
    }
    if (!of_state) return;
    const Section section(s.clock, Work::nodes);
    float* to = gradient(edge.source, n);
    for (int64_t group = 0; group < plan_.groups; ++group)
      for (int64_t row = 0; row < state.height; ++row) {
        const float* x = tile.data + group * tile.plane + row * tile.row;
        const int64_t at = (group * state.height + row) * state.width * kLanes;
        for (int64_t column = 0; column < state.width; ++column)
          add_to(to + at + column * kLanes,
                 keep(positive(load(x + column * kLanes)), load(s.state_grad + at + column * kLanes)));
      }
  }

  // Pools and identities of all edges that leave a state.
  void pools_backward(int64_t source, const State& state) {
    std::vector<int64_t> leaving;
    std::vector<size_t> with_max, with_avg, with_skip;  // which of them have these candidates
    for (size_t e = 0; e < plan_.edges.size(); ++e) {
      const Edge& edge = plan_.edges[e];
      if (edge.source != source) continue;
      if (edge.max >= 0) with_max.push_back(leaving.size());
      if (edge.avg >= 0) with_avg.push_back(leaving.size());
      if (edge.skip >= 0) with_skip.push_back(leaving.size());
      leaving.push_back(e);
    }
    const bool any_skip = !with_skip.empty();
    if (with_max.empty() && with_avg.empty() && !any_skip) return;
    begin_source(source, state, false);
    const int64_t stride = images() * plan_.padded;
    const auto sums = [&](size_t i, int kind) { return pool_sums_ + (2 * i + kind) * stride; };
    std::vector<double> skip_dots(leaving.size() * (any_skip ? stride : 0));
    parallel_shared(threads_, images(), [&](int thread, const auto& take) {
      const Scratch& s = scratch_[thread];
      for (int64_t n = take(); n >= 0; n = take()) {
        const float* x = state.data + n * state.image;
        if (any_skip && !state.dense()) {
          load_dense(plan_, state, n, s.state_grad);
          x = s.state_grad;
        }
        for (size_t i = 0; i < leaving.size(); ++i) {
          const Edge& edge = plan_.edges[leaving[i]];
          const float* g = gradient(edge.target, n);
          const int64_t image = n * plan_.image_out(), to = n * plan_.padded;
          const auto mean = [&](int64_t norm) { return norm >= 0 ? norms_.row(norms_.mean, norm) : nullptr; };
          if (edge.max >= 0) dot(s, g, max_ + image, mean(edge.max_norm), sums(i, 0) + to);
          if (edge.avg >= 0) dot(s, g, avg_ + image, mean(edge.avg_norm), sums(i, 1) + to);
          if (edge.skip >= 0 && grad_.weights) dot(s, g, x, nullptr, &skip_dots[i * stride + to]);
        }
      }
    });
    std::vector<double> dots(plan_.padded);
    for (size_t i = 0; i < leaving.size(); ++i) {
      const int64_t e = leaving[i];
      const Edge& edge = plan_.edges[e];
      const double* grad_sum = grad_sums_ + edge.target * plan_.padded;
      const auto settle_pool = [&](int kind, int64_t mix, int64_t norm) {
        total(sums(i, kind), dots.data());
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
        total(&skip_dots[i * stride], dots.data());
        double all = 0;
        for (double each : dots) all += each;
        set_mixing_gradient(e, edge.skip, all);
      }
    }
    if (!wanted(source)) return;
    const PoolShape shape = pool_shape(state);
    const int64_t pixels = state.height * state.width;
    parallel_shared(threads_, images(), [&](int thread, const auto& take) {
      const Scratch& s = scratch_[thread];
      for (int64_t n = take(); n >= 0; n = take())
        for (int64_t group = 0; group < plan_.groups; ++group) {
          const Section section(s.clock, Work::pools);
          float* to = gradient(source, n) + group * pixels * kLanes;
          const int64_t plane = group * plan_.plane_out();
          // What goes back through each pool: a weighted sum of the gradients, the pooled state and a constant.
          for (int kind = 0; kind < 2; ++kind) {
            const std::vector<size_t>& with = kind == 0 ? with_max : with_avg;
            if (with.empty()) continue;
            const float* pooled = (kind == 0 ? max_ : avg_) + n * plan_.image_out() + plane;
            Vector slope = zero(), constant = zero();
            for (size_t i : with) {
              slope += load(pool_[2 * i + kind].b + group * kLanes);
              constant += load(pool_[2 * i + kind].d + group * kLanes);
            }
            weighted(leaving, with, n, plane, plan_.pixels_out(), s.mid_grad, pooled, slope, constant,
                     [&](size_t i) { return load(pool_[2 * i + kind].a + group * kLanes); });
            if (kind == 0)
              max_pool_backward(s.mid_grad, shape, s.pool_rows, across(n, group), down(n, group), to);
            else
              average_pool_backward(s.mid_grad, shape, s.pool_rows, to);
          }
          if (any_skip)
            weighted(leaving, with_skip, n, plane, pixels, to, to, set(1.0f), zero(),
                     [&](size_t i) { return set(mixing(leaving[i])[plan_.edges[leaving[i]].skip]); });
        }
    });
  }

  // to = slope * from + constant + sum over `which` edges of factor(edge) * gradient of its target, on a plane of an image.
  template <typename Factor>
  RNAS_INLINE void weighted(const std::vector<int64_t>& leaving, const std::vector<size_t>& which, int64_t n,
                            int64_t plane, int64_t pixels, float* to, const float* from, Vector slope, Vector constant,
                            const Factor& factor) const {
    for (int64_t p = 0; p < pixels; p += kBlock) {
      const int64_t size = std::min<int64_t>(kBlock, pixels - p);
      Vector sum[kBlock];
#pragma GCC unroll 8
      for (int64_t q = 0; q < kBlock; ++q) sum[q] = fma(load(from + (p + std::min(q, size - 1)) * kLanes), slope, constant);
      for (size_t i : which) {
        const float* g = gradient(plan_.edges[leaving[i]].target, n) + plane + p * kLanes;
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

  const Plan& plan_;
  const MixedInputs& in_;
  int threads_;
  Keep keep_ = Keep::nothing;
  Arena arena_;
  Norms norms_{};
  Packed packed_{};
  std::vector<Scratch> scratch_;
  std::vector<float*> y_;        // per branch of an edge: its output, later the gradient in front of its second ReLU
  std::vector<double*> sums_;    // likewise: (2, images, padded) sums of each image
  std::vector<float*> nodes_;    // in a forward pass the nodes, dense: the caller's lie side by side, too far apart
  float *max_ = nullptr, *avg_ = nullptr;
  double* pool_sums_ = nullptr;  // (edges that leave a state, 2 pools, images, padded), or the pools' moments
  Winner* winners_ = nullptr;
  float *out_ = nullptr, *kept_ = nullptr, *batch_mean_ = nullptr, *batch_variance_ = nullptr;
  std::vector<Pending> pending_;
  MixedGradients grad_{};
  std::vector<float*> grads_;    // of each state, dense
  std::vector<WeightSums> weight_sums_;
  std::vector<Affine> first_, last_, pool_;
  double* grad_sums_ = nullptr;  // (states, padded)
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
