#pragma once

// The sums that the nodes are, in a forward pass. An edge that is computed is added to its node image by image inside a
// later pass over the images, whose arithmetic hides the reading: in the next one where it has memory of its own, which
// others will need, and else, being a number, an identity or a matrix on a state, not before the node is read or another
// edge is added to it. So a node is written as rarely as can be.

#include "mixed/matrices_forward.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

class NodeSums : public MatricesForward {
 protected:
  NodeSums(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : MatricesForward(plan, in, workspace, threads), left_(plan.shape.nodes), begun_(plan.shape.nodes) {}

  // An edge that is computed and not yet added. waits: its state's pass does, so that an average pool is in the scratch.
  void leave(const Edge& edge, int64_t e, const State& state, bool waits) {
    Sum& left = left_[edge.target - plan_.shape.inputs];
    const float* w = mixing(e);
    std::vector<float> constant(plan_.padded);
    const auto add_constant = [&](int64_t mix, int64_t norm) {
      for (int64_t c = 0; c < plan_.padded && norm >= 0; ++c) constant[c] += w[mix] * norms_.row(norms_.shift, norm)[c];
    };
    const auto add = [&](const float* data, int64_t mix, int64_t norm) {
      Term term{e, data, std::vector<float>(plan_.padded, w[mix])};
      for (int64_t c = 0; c < plan_.padded && norm >= 0; ++c)
        term.factor[c] = w[mix] * norms_.row(norms_.scale, norm)[c];
      left.terms.push_back(std::move(term));
      add_constant(mix, norm);
    };
    for (size_t b = 0; b < edge.branches.size(); ++b)
      add(y(edge, b, 0), edge.branches[b].mix, edge.branches[b].last().norm);
    if (edge.max >= 0) add(max_, edge.max, edge.max_norm);
    if (edge.avg >= 0) add(waits ? nullptr : avg_, edge.avg, edge.avg_norm);
    if (edge.matrix >= 0) add_constant(edge.matrix, edge.matrix_norm);
    for (int64_t c = 0; c < plan_.shape.channels && edge.ones >= 0; ++c) constant[c] += w[edge.ones];
    left.constant.resize(plan_.padded);
    for (int64_t c = 0; c < plan_.padded; ++c) left.constant[c] += constant[c];
    if (plan_.shape.scaled) left.constants.push_back({e, std::move(constant)});
    if (edge.skip >= 0 || edge.matrix >= 0)
      left.states.push_back({e, edge.source, state, edge.skip >= 0, edge.skip >= 0 ? w[edge.skip] : 0.0f, matrices_[e]});
    left.has_matrix |= edge.matrix >= 0;
    left.any |= !left.terms.empty() || !left.states.empty() || edge.ones >= 0;
  }

  // Where a state whose pass waits puts an average pool of an image.
  float* pooled(const Scratch& s) const { return s.mid_grad; }

  // In front of a pass over the images, which will read state `source`: what is to be added in it.
  void begin_pass(int64_t source) {
    const int64_t inputs = plan_.shape.inputs, nodes = plan_.shape.nodes;
    std::vector<char> due(nodes);
    for (int64_t node = nodes - 1; node >= 0; --node) {
      due[node] |= !left_[node].terms.empty() || node + inputs == source;
      for (size_t i = 0; due[node] && i < left_[node].states.size(); ++i)
        if (const int64_t read = left_[node].states[i].state - inputs; read >= 0) due[read] = true;
    }
    due_.clear();
    for (int64_t node = 0; node < nodes; ++node) {
      if (!due[node] || (begun_[node] && !left_[node].any)) continue;
      due_.push_back(std::move(left_[node]));
      due_.back().constant.resize(plan_.padded);
      due_.back().to = this->node(node + inputs);
      due_.back().adds = begun_[node];
      due_.back().passes_on = node + inputs == source && source + 1 == plan_.states() && !plan_.asked_dense();
      begun_[node] = true;
      left_[node] = {};
    }
  }
  // The pass waits: what is to be added in it is added in the next one, image by image in front of that one's own.
  void delay_pass() {
    delayed_.push_back(std::move(due_));
    due_.clear();
  }
  // Behind a pass.
  void end_pass() {
    due_.clear();
    delayed_.clear();
  }

  // The last node of image n, behind `add_due` of the last pass.
  const float* last_node(const Scratch& s, int64_t n) const {
    const bool added = !due_.empty() && due_.back().passes_on;
    return added ? to_of(due_.back(), s, n) : node(plan_.states() - 1) + n * plan_.image_out();
  }

  // Whether what begins at `data` is added in this pass.
  bool is_due(const float* data) const {
    bool found = false;
    each_due([&](const Sum& sum) {
      for (const Term& term : sum.terms) found |= term.data == data;
    });
    return found;
  }

  // Images [n, n + images) will be added soon.
  void announce_due(const Scratch& s, int64_t n, int64_t images) const {
    const int64_t pixels = images * plan_.pixels_out();
    each_due([&](const Sum& sum) {
      for (const Term& term : sum.terms)
        if (term.data) announce(s, plan_, term.data + n * plan_.image_out(), pixels);
      for (const OnState& each : sum.states) announce(s, plan_, each.x, n, images);
      if (sum.adds || !sum.passes_on) announce(s, plan_, sum.to + n * plan_.image_out(), pixels);
    });
  }
  void announce_next(const Scratch& s, int64_t n) const {
    s.ahead->clear();
    if (n + 1 < images()) announce_due(s, n + 1, 1);
  }

  void add_due(const Scratch& s, int64_t n) const { add_all(due_, s, n); }
  // What was to be added in the pass that waits at this place.
  void add_delayed(size_t which, const Scratch& s, int64_t n) const { add_all(delayed_[which], s, n); }

 private:
  struct Sum;

  template <typename Use> void each_due(const Use& use) const {
    for (const std::vector<Sum>& sums : delayed_)
      for (const Sum& sum : sums) use(sum);
    for (const Sum& sum : due_) use(sum);
  }

  void add_all(const std::vector<Sum>& sums, const Scratch& s, int64_t n) const {
    for (const Sum& sum : sums) {
      if (plan_.shape.scaled) {  // there are no matrices
        add(of_image(sum, n), s, n, 0, plan_.pixels_out());
        continue;
      }
      if (!sum.has_matrix) {
        add(sum, s, n, 0, plan_.pixels_out());
        continue;
      }
      chunks(plan_, [&](int64_t first, int64_t rows) {  // so that it stays in the first cache
        add(sum, s, n, first * plan_.width_out, rows * plan_.width_out);
        for (const OnState& each : sum.states)
          if (each.matrix) add_product(sum, each, s, n, first, rows);
      });
    }
  }

  struct Term {
    int64_t edge;
    const float* data;  // dense images; null: one in the scratch, `pooled`
    std::vector<float> factor;
  };
  // An identity, or a matrix behind a ReLU, or both.
  struct OnState {
    int64_t edge, state;
    State x;
    bool has_skip;
    float skip;
    const float* matrix;  // or null
  };
  struct Constant {
    int64_t edge;
    std::vector<float> values;
  };
  struct Sum {
    std::vector<Term> terms;
    std::vector<OnState> states;
    std::vector<float> constant;
    std::vector<Constant> constants;  // what that consists of, where edges have scales
    bool any = false, has_matrix = false, adds = false;  // whether there is anything; whether it adds to what is there
    bool passes_on = false;  // the last node, which goes on to the caller and is not read again: through the scratch
    float* to = nullptr;
  };

  // Where image n of a sum goes.
  float* to_of(const Sum& sum, const Scratch& s, int64_t n) const {
    return sum.passes_on ? s.state_grad : sum.to + n * plan_.image_out();
  }

  // What is added to image n, where edges have scales.
  Sum of_image(const Sum& sum, int64_t n) const {
    Sum made = sum;
    for (Term& term : made.terms)
      for (float& factor : term.factor) factor *= scale(term.edge, n);
    for (OnState& each : made.states) each.skip *= scale(each.edge, n);
    std::fill(made.constant.begin(), made.constant.end(), 0.0f);
    for (const Constant& each : sum.constants)
      for (int64_t c = 0; c < plan_.padded; ++c) made.constant[c] += scale(each.edge, n) * each.values[c];
    return made;
  }

  // Image n of what a term is a multiple of.
  const float* image_of(const Term& term, const Scratch& s, int64_t n) const {
    return term.data ? term.data + n * plan_.image_out() : pooled(s);
  }

  // Everything but matrices, of pixels [begin, begin + pixels).
  void add(const Sum& sum, const Scratch& s, int64_t n, int64_t begin, int64_t pixels) const {
    const Section section(s.clock, Work::nodes);
    const int64_t end = begin + pixels;
    float* const image = to_of(sum, s, n);
    for (int64_t group = 0; group < plan_.groups; ++group) {
      const int64_t base = n * plan_.image_out() + group * plan_.plane_out();
      const Vector constant = load(sum.constant.data() + group * kLanes);
      for (int64_t p = begin; p < end; p += kBlock) {
        const int64_t size = std::min<int64_t>(kBlock, end - p);
        const float* before = sum.to + base + p * kLanes;
        float* to = image + group * plan_.plane_out() + p * kLanes;
        Vector total[kBlock];
        if (size == kBlock) {
#pragma GCC unroll 8
          for (int i = 0; i < kBlock; ++i) total[i] = sum.adds ? load(before + i * kLanes) + constant : constant;
          for (const Term& term : sum.terms) {
            const Vector factor = load(term.factor.data() + group * kLanes);
            const float* at = image_of(term, s, n) + group * plan_.plane_out() + p * kLanes;
#pragma GCC unroll 8
            for (int i = 0; i < kBlock; ++i) total[i] = fma(load(at + i * kLanes), factor, total[i]);
          }
        } else {
          for (int64_t i = 0; i < size; ++i) total[i] = sum.adds ? load(before + i * kLanes) + constant : constant;
          for (const Term& term : sum.terms) {
            const Vector factor = load(term.factor.data() + group * kLanes);
            const float* at = image_of(term, s, n) + group * plan_.plane_out() + p * kLanes;
            for (int64_t i = 0; i < size; ++i) total[i] = fma(load(at + i * kLanes), factor, total[i]);
          }
        }
        for (const OnState& each : sum.states) {
          if (!each.has_skip) continue;
          const int64_t lanes =
              each.x.dense() ? kLanes : std::min(kLanes, plan_.shape.channels - group * kLanes);
          const float* x = each.x.data + n * each.x.image + p * each.x.pixel + group * each.x.group;
          const Vector skip = set(each.skip);
          for (int64_t i = 0; i < size; ++i, x += each.x.pixel)
            total[i] = fma(lanes == kLanes ? load(x) : load_part(x, lanes), skip, total[i]);
        }
        for (int64_t i = 0; i < size; ++i) store(to + i * kLanes, total[i]);
      }
    }
  }

  // The product with a matrix, of rows [first, first + rows).
  void add_product(const Sum& sum, const OnState& of, const Scratch& s, int64_t n, int64_t first, int64_t rows) const {
    const int64_t pixels = rows * plan_.width_out, plane = pixels * kLanes;
    const Section section(s.clock, Work::pointwise, pixels * plan_.shape.channels * plan_.shape.channels);
    load_rows(plan_, of.x, n, first, rows, nullptr, s.d);
    pointwise<true>(s.d, plane, plan_.groups, of.matrix, plan_.padded, plan_.groups,
                    to_of(sum, s, n) + first * plan_.width_out * kLanes, plan_.plane_out(), pixels,
                    *s.ahead);
  }

  std::vector<Sum> left_, due_;            // of each node; of this pass
  std::vector<std::vector<Sum>> delayed_;  // of those that wait
  std::vector<char> begun_;      // which nodes there is anything of
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
