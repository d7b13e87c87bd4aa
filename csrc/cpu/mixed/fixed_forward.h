#pragma once

// The forward pass of a cell on fixed statistics, and the same along a direction of the states.

#include "mixed/fixed.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

class FixedForward : public Fixed {
 public:
  FixedForward(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : Fixed(plan, in, workspace, threads) {}

  void forward(Keep keep, float* out, void* kept) {
    prepare();
    out_ = out;
    kept_ = keep >= Keep::activations ? static_cast<float*>(kept) : nullptr;
    masks_ = keep == Keep::masks ? static_cast<Bits*>(kept) : nullptr;
    parallel_shared(threads_, images(), [&](int thread, const auto& take) {
      begin_thread(locals_[thread]);
      for (int64_t n = take(); n >= 0; n = take()) forward_image(n, locals_[thread], false);
    });
  }

 protected:
  // All nodes of image n. linear: of the direction instead, through the ReLUs and winners of the forward pass.
  void forward_image(int64_t n, const Local& local, bool linear) const {
    const Scratch& s = local.scratch;
    Bits* mask = masks(n, local);
    const int64_t pixels = plan_.pixels_out(), inputs = plan_.shape.inputs;
    float* const nodes = linear ? direction_out_ : out_;
    for (int64_t node = 0; node < plan_.shape.nodes; ++node)
      for (int64_t group = 0; group < plan_.groups; ++group) {
        const Vector constant = linear ? zero() : load(constants_ + node * plan_.padded + group * kLanes);
        float* to = node_of(inputs + node, n, local, linear) + group * pixels * kLanes;
        for (int64_t p = 0; p < pixels; ++p) store(to + p * kLanes, constant);
      }
    for (int64_t source = 0; source + 1 < plan_.states(); ++source) {
      if (source >= inputs) finish_node(nodes, source, n, node_of(source, n, local, linear), s);
      const State x = state_of(source, local, false);
      const State v = linear ? state_of(source, local, true) : x;
      const Tile tile = tile_of(source, local);
      Bits* signs = mask + layout_.signs[source];
      {
        const Section section(s.clock, Work::tiles);
        if (linear && masks_)
          load_signed(v, n, signs, tile);
        else if (linear)
          load_relu_linear(plan_, x, v, n, tile);
        else
          load_relu(plan_, x, n, tile, masks_ ? signs : nullptr);
      }
      for (size_t e = 0; e < plan_.edges.size(); ++e) {
        const Edge& edge = plan_.edges[e];
        if (edge.source != source) continue;
        float* const to = node_of(edge.target, n, local, linear);
        for (const Branch& branch : edge.branches) forward_branch(branch, n, tile, to, s, mask, linear);
      }
      forward_pools(source, x, v, n, local, mask, linear);
    }
    finish_node(nodes, plan_.states() - 1, n, local.states[plan_.states() - 1], s);
  }

  // `v` where a kept sign lets it through, into a tile.
  void load_signed(const State& v, int64_t n, const Bits* signs, const Tile& tile) const {
    visit(v, n, plan_.shape.channels, [&](int64_t group, int64_t y, int64_t x, Vector value) {
      store(tile.data + group * tile.plane + y * tile.row + x * kLanes,
            keep(signs[(group * v.height + y) * v.width + x], value));
    });
  }

  void load_mid_signed(const float* v, const Bits* signs, const Tile& tile) const {
    for (int64_t group = 0; group < plan_.groups; ++group)
      for (int64_t y = 0; y < plan_.height_out; ++y)
        for (int64_t x = 0; x < plan_.width_out; ++x) {
          const int64_t at = (group * plan_.height_out + y) * plan_.width_out + x;
          store(tile.data + group * tile.plane + y * tile.row + x * kLanes, keep(signs[at], load(v + at * kLanes)));
        }
  }

  void finish_node(float* nodes, int64_t state, int64_t n, const float* node, const Scratch& s) const {
    const Section section(s.clock, Work::nodes);
    store_node(plan_, node, state, n, nodes);
  }

  void forward_branch(const Branch& branch, int64_t n, const Tile& tile, float* to, const Scratch& s, Bits* mask,
                      bool linear) const {
    const auto nothing = [](int64_t, int64_t, int64_t) {};
    const float* packed = packed_.forward;
    if (branch.stages.size() < 2) return convolve<true>(plan_, branch.stages[0], packed, tile, 1, s, to, nothing);
    const float* shift = norms_.row(norms_.shift, branch.stages[0].norm);
    float* const all = linear ? direction_kept_ : kept_;
    float* z = all ? kept_mid(all, branch, n) : s.mid_grad;
    convolve<false>(plan_, branch.stages[0], packed, tile, 1, s, z, nothing);
    {
      const Section section(s.clock, Work::tiles);
      if (linear && masks_)
        load_mid_signed(z, mask + layout_.mid[branch.kept], s.mid);
      else if (linear)
        load_mid_linear(plan_, kept_mid(kept_, branch, n), shift, z, s.mid);
      else
        load_mid(plan_, z, ones_, shift, s.mid, masks_ ? mask + layout_.mid[branch.kept] : nullptr);
    }
    convolve<true>(plan_, branch.last(), packed, s.mid, 1, s, to, nothing);
  }

  // Adds pools and identities of all edges that leave a state.
  void forward_pools(int64_t source, const State& x, const State& v, int64_t n, const Local& local, Bits* mask,
                     bool linear) const {
    const Scratch& s = local.scratch;
    const Section section(s.clock, Work::pools);
    const PoolShape shape = pool_shape(source);
    const int64_t pixels = x.height * x.width;
    if (!linear || !masks_) load_dense(plan_, x, n, s.state_grad);
    if (linear && !masks_ && plan_.leaves(source, &Edge::max))
      for (int64_t group = 0; group < plan_.groups; ++group) find_winners(x, source, local, mask, nullptr, group);
    if (linear) load_dense(plan_, v, n, s.state_grad);
    for (int64_t group = 0; group < plan_.groups; ++group) {
      const float* in = s.state_grad + group * pixels * kLanes;
      const auto add = [&](const float* from, int64_t Edge::*mix, int64_t Edge::*norm) {
        for (size_t e = 0; e < plan_.edges.size(); ++e) {
          const Edge& edge = plan_.edges[e];
          if (edge.source != source || edge.*mix < 0) continue;
          const Vector f = factors(e, edge.*mix, norm ? edge.*norm : -1, group);
          float* to = node_of(edge.target, n, local, linear) + group * plan_.plane_out();
          for (int64_t p = 0; p < plan_.plane_out(); p += kLanes) store(to + p, fma(load(from + p), f, load(to + p)));
        }
      };
      if (plan_.leaves(source, &Edge::max)) {
        if (linear)
          max_pool_linear(in, x.width * kLanes, shape, s.pool_rows, local.plane, across(mask, source, group),
                          down(mask, source, group));
        else
          find_winners(x, source, local, mask, local.plane, group);
        add(local.plane, &Edge::max, &Edge::max_norm);
      }
      if (plan_.leaves(source, &Edge::avg)) {
        average_pool(in, x.width * kLanes, shape, s.pool_rows, local.plane);
        add(local.plane, &Edge::avg, &Edge::avg_norm);
      }
      add(in, &Edge::skip, nullptr);
    }
  }
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
