#pragma once

// The cell on fixed statistics. Norms and mixing weights fold into the pointwise convolutions, images do not depend on
// each other, and one image goes through the whole cell while its states stay in the second cache. Here is what both
// passes have; fixed_forward.h: the forward pass, and that along a direction. fixed_backward.h, on it: the backward
// passes, and second derivatives.

#include "mixed/norms.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// Where the masks of one image lie, in Bits.
struct MaskLayout {
  std::vector<int64_t> signs, across, down;  // by state that edges leave
  std::vector<int64_t> mid;                  // by kept activation
  int64_t size = 0;

  explicit MaskLayout(const Plan& plan) {
    for (int64_t state = 0; state + 1 < plan.states(); ++state) {
      signs.push_back(take(plan.groups * plan.height(state) * plan.width(state)));
      across.push_back(take(plan.max ? 2 * plan.groups * plan.height(state) * plan.width_out : 0));
      down.push_back(take(plan.max ? 2 * plan.groups * plan.pixels_out() : 0));
    }
    for (int64_t kept = 0; kept < plan.kept; ++kept) mid.push_back(take(plan.groups * plan.pixels_out()));
  }

 private:
  int64_t take(int64_t count) {
    const int64_t at = size;
    size += count;
    return at;
  }
};

class Fixed {
 public:
  int64_t workspace() const { return arena_.used(); }

 protected:
  Fixed(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : plan_(plan), in_(in), threads_(threads), layout_(plan), arena_(workspace) {
    norms_ = take_norms(arena_, plan);
    packed_ = take_packed(arena_, plan);
    constants_ = arena_.take<float>(plan.shape.nodes * plan.padded);
    ones_ = arena_.take<float>(plan.padded);
    for (int thread = 0; thread < threads; ++thread) {
      Local local{};
      local.scratch = take_scratch(arena_, plan, thread);
      for (int64_t state = 0; state < plan.states(); ++state)
        local.states.push_back(arena_.take<float>(plan.height(state) * plan.width(state) * plan.padded));
      local.plane = arena_.take<float>(plan.plane_out());
      local.masks = arena_.take<Bits>(layout_.size);
      local.weights.now = arena_.take<float>(plan.packed);
      local.weights.total = arena_.take<double>(plan.summed);
      local.sum = arena_.take<double>(plan.states() * plan.padded);
      local.mid_sum = arena_.take<double>(plan.kept * plan.padded);
      local.dots = arena_.take<double>(3 * plan.edges.size() * plan.padded);
      locals_.push_back(local);
    }
  }
  Fixed(const Fixed&) = delete;

  struct Local {
    Scratch scratch;
    std::vector<float*> states;  // nodes of one image, or gradients of all its states, dense
    float* plane;
    Bits* masks;                 // of one image, where they were not kept
    WeightSums weights;
    double *sum, *mid_sum, *dots;  // (states), (kept), (edges, skip max avg): each (padded)
  };

  const float* mixing(int64_t e) const { return in_.weights + e * plan_.shape.candidates; }
  int64_t images() const { return plan_.shape.batch; }
  bool wants_parameters() const { return grad_.weights || grad_.theta || grad_.gamma || grad_.beta; }
  float* kept(float* all, int64_t index, int64_t n) const { return all + (index * images() + n) * plan_.image_out(); }
  Bits* masks(int64_t n, const Local& local) const { return masks_ ? masks_ + n * layout_.size : local.masks; }

  // What a branch keeps in front of its second ReLU.
  float* kept_mid(float* all, const Branch& branch, int64_t n) const {
    return kept(all, plan_.kept_nodes() + branch.kept, n);
  }
  // A node of image n, dense, in a forward pass: kept, or in the workspace. linear: its direction.
  float* node_of(int64_t state, int64_t n, const Local& local, bool linear) const {
    float* const all = linear ? direction_kept_ : kept_;
    const int64_t node = state - plan_.shape.inputs;
    return all && node < plan_.kept_nodes() ? kept(all, node, n) : local.states[state];
  }
  // A state that edges leave, or its direction. What is not kept of a node is there in a forward pass alone.
  State state_of(int64_t state, const Local& local, bool linear) const {
    const int64_t h = plan_.height(state), w = plan_.width(state), c = plan_.shape.channels;
    if (state < plan_.shape.inputs)
      return {static_cast<const float*>((linear ? direction_ : in_.states)[state]), h * w * c, c, h, w};
    State node = dense_state(node_of(state, 0, local, linear), plan_, h, w);
    if (!(linear ? direction_kept_ : kept_)) node.image = 0;
    return node;
  }

  PoolShape pool_shape(int64_t state) const {
    const int64_t stride = state < plan_.shape.inputs ? plan_.shape.stride : 1;
    return {plan_.height(state), plan_.width(state), stride, plan_.height_out, plan_.width_out};
  }

  // Factors of a norm with its mixing weight; without a norm the weight alone.
  float factor(int64_t e, int64_t mix, int64_t norm, int64_t channel) const {
    return mixing(e)[mix] * (norm >= 0 ? norms_.row(norms_.scale, norm)[channel] : 1.0f);
  }

  void prepare() {
    set_norms(plan_, in_, norms_);
    std::memset(constants_, 0, plan_.shape.nodes * plan_.padded * sizeof(float));
    for (int64_t c = 0; c < plan_.padded; ++c) ones_[c] = 1.0f;
    for (size_t e = 0; e < plan_.edges.size(); ++e) {
      const Edge& edge = plan_.edges[e];
      float* constant = constants_ + (edge.target - plan_.shape.inputs) * plan_.padded;
      const auto add = [&](int64_t mix, int64_t norm) {
        if (mix < 0 || norm < 0) return;
        for (int64_t c = 0; c < plan_.padded; ++c) constant[c] += mixing(e)[mix] * norms_.row(norms_.shift, norm)[c];
      };
      for (const Branch& branch : edge.branches) add(branch.mix, branch.last().norm);
      add(edge.max, edge.max_norm);
      add(edge.avg, edge.avg_norm);
      for (int64_t c = 0; c < plan_.shape.channels && edge.ones >= 0; ++c) constant[c] += mixing(e)[edge.ones];
    }
    parallel(threads_, plan_.edges.size(), [&](int, int64_t begin, int64_t end) {
      std::vector<float> scale(plan_.padded);
      for (int64_t e = begin; e < end; ++e)
        for (const Branch& branch : plan_.edges[e].branches)
          for (const Convolution& conv : branch.stages) {
            const bool last = &conv == &branch.last();
            for (int64_t c = 0; c < plan_.padded; ++c)
              scale[c] = norms_.row(norms_.scale, conv.norm)[c] * (last ? mixing(e)[branch.mix] : 1.0f);
            pack(plan_, conv, in_.theta, scale.data(), packed_, Order::both);
          }
    });
  }

  void begin_thread(const Local& local) const {
    clear(local.scratch.state, plan_.groups);
    clear(local.scratch.mid, plan_.groups);
    clear(local.scratch.grad, plan_.groups);
  }

  Tile tile_of(int64_t state, const Local& local) const {
    const Tile tile = sized(local.scratch.state, plan_.height(state), plan_.width(state));
    if (plan_.shape.stride > 1) clear(tile, plan_.groups);  // inputs and nodes differ in size
    return tile;
  }

  // Of the dense state that the caller has loaded into state_grad.
  void find_winners(const State& x, int64_t state, const Local& local, Bits* mask, float* pooled, int64_t group) const {
    const int64_t pixels = x.height * x.width;
    max_pool(local.scratch.state_grad + group * pixels * kLanes, x.width * kLanes, pool_shape(state),
             local.scratch.pool_rows, pooled, across(mask, state, group), down(mask, state, group));
  }

  Winner* across(Bits* mask, int64_t state, int64_t group) const {
    return reinterpret_cast<Winner*>(mask + layout_.across[state]) + group * plan_.height(state) * plan_.width_out;
  }
  Winner* down(Bits* mask, int64_t state, int64_t group) const {
    return reinterpret_cast<Winner*>(mask + layout_.down[state]) + group * plan_.pixels_out();
  }

  Vector factors(int64_t e, int64_t mix, int64_t norm, int64_t group) const {
    const Vector w = set(mixing(e)[mix]);
    return norm >= 0 ? w * load(norms_.row(norms_.scale, norm) + group * kLanes) : w;
  }

  const Plan& plan_;
  const MixedInputs& in_;
  int threads_;
  MaskLayout layout_;
  Arena arena_;
  Norms norms_{};
  Packed packed_{};
  float *constants_ = nullptr, *ones_ = nullptr;  // of each node (nodes, padded); (padded) ones
  std::vector<Local> locals_;
  float *out_ = nullptr, *kept_ = nullptr;
  Bits* masks_ = nullptr;
  const float* grad_out_ = nullptr;
  const void* const* direction_ = nullptr;
  float *direction_out_ = nullptr, *direction_kept_ = nullptr;
  MixedGradients grad_{};
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
