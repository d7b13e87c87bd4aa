#pragma once

// The cell on batch statistics. A norm needs all images before any can go on, so the work runs in stages over the whole
// batch: edge by edge, and within an edge stage by stage, with what a stage hands to the next in the workspace. Here is
// what both passes have: memory, and where things are in it. matrices_forward.h, on it node_sums.h, and on that
// batch_forward.h: the forward pass. gradients.h, on it pools_backward.h, matrices_backward.h and batch_backward.h: the
// backward pass.

#include "mixed/matrices.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

class Batch {
 public:
  int64_t workspace() const { return arena_.used(); }
  // Those of all states, which are kept behind everything else.
  int64_t covariance_bytes() const {
    return plan_.matrix ? (plan_.states() - 1) * Covariance::size(plan_) * sizeof(double) : 0;
  }

 protected:
  Batch(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : plan_(plan), in_(in), threads_(threads), arena_(workspace) {
    const int64_t n = plan.shape.batch, image = plan.image_out();
    norms_ = take_norms(arena_, plan);
    packed_ = take_packed(arena_, plan);
    for (int thread = 0; thread < threads; ++thread) scratch_.push_back(take_scratch(arena_, plan, thread));
    size_t branches = 0;
    for (const Edge& edge : plan.edges) branches = std::max(branches, edge.branches.size());
    for (size_t slot = 0; slot < branches; ++slot) {
      y_.push_back(arena_.take<float>(n * image));
      sums_.push_back(arena_.take<double>(2 * n * plan.padded));
    }
    max_ = plan.max ? arena_.take<float>(n * image) : nullptr;
    avg_ = plan.avg ? arena_.take<float>(n * image) : nullptr;
    pool_sums_ = arena_.take<double>(2 * std::max<int64_t>(2, plan.edges.size()) * n * plan.padded);
    for (const Edge& edge : plan.edges)
      matrices_.push_back(edge.matrix >= 0 ? arena_.take<float>(plan.padded * plan.padded) : nullptr);
    if (plan.matrix) covariances_ = arena_.take<double>((plan.states() - 1) * Covariance::size(plan));
  }
  Batch(const Batch&) = delete;

  const float* mixing(int64_t e) const { return in_.weights + e * plan_.shape.candidates; }
  // By which image n of an edge is multiplied.
  float scale(int64_t e, int64_t n) const { return plan_.shape.scaled ? in_.scales[e * images() + n] : 1.0f; }
  int64_t images() const { return plan_.shape.batch; }
  int64_t bundles() const { return (images() + plan_.bundle - 1) / plan_.bundle; }
  double count() const { return static_cast<double>(images()) * plan_.pixels_out(); }

  State state_of(int64_t state) const {
    const int64_t h = plan_.height(state), w = plan_.width(state), c = plan_.shape.channels;
    const bool input = state < plan_.shape.inputs;
    const float* data = input ? static_cast<const float*>(in_.states[state]) : node(state);
    return input && !plan_.stored_dense() ? State{data, h * w * c, c, h, w} : dense_state(data, plan_, h, w);
  }

  // A node, dense: kept, or in the workspace. The last one is never kept; a backward pass has none of it.
  float* node(int64_t state) const {
    const int64_t node = state - plan_.shape.inputs;
    if (kept_ && node < plan_.kept_nodes()) return kept(node, 0);
    return nodes_.empty() ? nullptr : nodes_[node];
  }
  float* kept(int64_t which, int64_t n) const { return kept_ + (which * images() + n) * plan_.image_out(); }
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
  // Of a state behind its ReLU.
  Covariance covariance(int64_t state) const {
    return Covariance::at(plan_, covariances_ + state * Covariance::size(plan_));
  }
  float* kept_covariances() const {
    const int64_t outputs = keep_ == Keep::outputs ? plan_.outputs : plan_.costly;
    return kept(plan_.kept_nodes() + plan_.kept + outputs, 0);
  }
  // The 1x1 convolution of an edge.
  const float* matrix_of(const Edge& edge) const { return in_.theta + edge.matrix_theta; }
  // The branch's part of the workspace.
  float* spare(size_t b, int64_t n) const { return y_[b] + n * plan_.image_out(); }
  PoolShape pool_shape(const State& s) const {
    const int64_t stride = s.height == plan_.height_out && s.width == plan_.width_out ? 1 : plan_.shape.stride;
    return {s.height, s.width, stride, plan_.height_out, plan_.width_out};
  }

  // A backward pass computes again what was not kept.
  void pack_all(bool backward) {
    parallel(threads_, plan_.edges.size(), [&](int, int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e)
        for (const Branch& branch : plan_.edges[e].branches) {
          const Order order = !backward ? Order::forward : output_of(branch) >= 0 ? Order::backward : Order::both;
          for (const Convolution& conv : branch.stages) pack(plan_, conv, in_.theta, nullptr, packed_, order);
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
  std::vector<float*> matrices_;  // (padded, padded) of each edge with a matrix
  double* covariances_ = nullptr;
  float *max_ = nullptr, *avg_ = nullptr;
  double* pool_sums_ = nullptr;  // (edges, 2 pools, images, padded), or the moments of a state's pools
  float* kept_ = nullptr;
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
