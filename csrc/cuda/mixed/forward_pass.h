#pragma once

// The forward pass of a cell: which kernels run on what, in which order. Host code.

#include "mixed/cell.h"

namespace rnas::cuda::mixed {

// AStage: Stage, or TangentStage for the derivative along a direction.
template <int V, typename AStage> class Forward {
 public:
  using T = typename AStage::Element;

  Forward(const Plan& plan, const MixedInputs& in, bool keeps, Arena& arena, CUstream_st* stream)
      : cell_(plan, in, arena, stream), plan_(plan), in_(in) {
    if (!keeps) cell_.kept = arena.take<T>(plan.kept * plan.activation());
    size_t most = 0;
    for (int64_t wave = 0; wave < plan.shape.nodes; ++wave) most = std::max(most, wave_edges(wave).size());
    partials_ = arena.take<float>(static_cast<int64_t>(most) * kMostOfEdge * partial());
    sums_ = arena.take<float>(plan.activation());
  }

  void run(T* out, float* mean, float* variance, T* kept) {
    cell_.out = out_ = out;
    cell_.kept = kept_ = kept ? kept : cell_.kept;
    mean_ = mean, variance_ = variance;
    if (!in_.batch_statistics) cell_.fixed_norms(in_.mean, in_.variance);
    nodes();
  }

  // The derivative of the nodes along `directions` of the states, and of the kept activations.
  void run_tangent(const T* out, const T* kept, const void* const* directions, T* out_direction, T* kept_direction) {
    cell_.out = const_cast<T*>(out);
    cell_.kept = const_cast<T*>(kept);
    cell_.directions = directions;
    cell_.out_direction = out_ = out_direction;
    cell_.kept_direction = kept_ = kept_direction;
    cell_.fixed_norms(in_.mean, in_.variance);
    nodes();
  }

 private:
  void nodes() {
    for (int64_t node = 0; node < plan_.shape.nodes; ++node) {
      measure(wave_edges(node));
      sum(node);
    }
  }

  int64_t partial() const { return cell_.tiles * 2 * cell_.c; }

  // Edges whose source is known before `node` and not before the node in front of it.
  std::vector<int64_t> wave_edges(int64_t node) const {
    return node == 0 ? plan_.from(0, plan_.shape.inputs)
                     : plan_.from(plan_.shape.inputs + node - 1, plan_.shape.inputs + node);
  }

  Norm norm(int64_t index) const {
    return {cell_.row(in_.gamma, index), cell_.row(in_.beta, index), cell_.row(mean_, index),
            cell_.row(variance_, index), cell_.row(cell_.scale, index), cell_.row(cell_.shift, index)};
  }

  // Statistics of all stages of the edges, and what lies between two stages.
  void measure(const std::vector<int64_t>& edges) {
    const bool batch = in_.batch_statistics;
    for (size_t index = 0; index < 2; ++index) {
      if (index == 1 && !batch) return;
      int64_t slots = 0;
      std::vector<std::pair<int64_t, int64_t>> pools[2];  // (source, slot): edges from one source share its pools
      Tasks<Moments<V, AStage>> moments("mixed_op: moments", {cell_.tiling, cell_.channels, {}}, cell_.tiles, cell_.shared,
                                cell_.stream);
      std::vector<FinishMoments::Task> finish;
      const auto measured = [&](int64_t slot, int64_t norm_index) {
        finish.push_back({partials_ + slot * partial(), norm(norm_index)});
      };
      for (int64_t each : edges) {
        const Edge& edge = plan_.edges[each];
        for (const Branch& branch : edge.branches) {
          if (branch.stages.size() <= index || (!batch && !branch.twice())) continue;
          T* kept = index == 0 && branch.twice() ? kept_ + branch.kept * plan_.activation() : nullptr;
          float* partials = batch ? partials_ + slots * partial() : nullptr;
          moments.add(typename Moments<V, AStage>::Task{cell_.stage(edge, branch, index), kept, partials});
          if (batch) measured(slots++, branch.stages[index].norm);
        }
        if (index == 1 || !batch) continue;
        for (int kind = 0; kind < 2; ++kind) {
          const int64_t norm_index = kind == 0 ? edge.max_norm : edge.avg_norm;
          if (norm_index < 0) continue;
          int64_t slot = -1;
          for (const auto& [source, known] : pools[kind])
            if (source == edge.source) slot = known;
          if (slot < 0) {
            slot = slots++;
            pools[kind].push_back({edge.source, slot});
            const Kind pool = kind == 0 ? Kind::max_pool : Kind::avg_pool;
            moments.add(typename Moments<V, AStage>::Task{cell_.simple(edge, pool), nullptr,
                                                          partials_ + slot * partial()});
          }
          measured(slot, norm_index);
        }
      }
      moments.flush();
      Tasks<FinishMoments> norms("mixed_op: norms", {cell_.tiling, cell_.channels, in_.eps, {}}, 1,
                                 kThreads * sizeof(FinishMoments::Sums), cell_.stream);
      for (const FinishMoments::Task& task : finish) norms.add(task);
    }
  }

  void sum(int64_t node) {
    constexpr bool kTangent = kIsTangent<AStage>;  // shifts are constants
    Node<V, AStage> kernel{cell_.tiling, cell_.channels, 0, true, false, cell_.node_of(out_, node), sums_, {}};
    const auto run = [&](bool last) {
      kernel.last = last;
      launch("mixed_op: node", kernel, {cell_.tiles, 1}, shared_bytes(cell_.tiling, cell_.c, true), cell_.stream);
      kernel.first = false;
      kernel.count = 0;
    };
    const float* scales = nullptr;
    const auto add = [&](const AStage& stage, const float* weight, int64_t norm_index) {
      if (kernel.count == kTasks) run(false);
      const bool normed = norm_index >= 0;
      kernel.tasks[kernel.count++] = {stage, weight, normed ? cell_.row(cell_.scale, norm_index) : nullptr,
                                      normed && !kTangent ? cell_.row(cell_.shift, norm_index) : nullptr, scales};
    };
    for (int64_t each : plan_.into(plan_.shape.inputs + node)) {
      const Edge& edge = plan_.edges[each];
      scales = cell_.scales(each);
      if (edge.ones >= 0) add(cell_.simple(edge, Kind::ones), cell_.weight(each, edge.ones), -1);
      if (edge.skip >= 0) add(cell_.simple(edge, Kind::identity), cell_.weight(each, edge.skip), -1);
      if (edge.max >= 0) add(cell_.simple(edge, Kind::max_pool), cell_.weight(each, edge.max), edge.max_norm);
      if (edge.avg >= 0) add(cell_.simple(edge, Kind::avg_pool), cell_.weight(each, edge.avg), edge.avg_norm);
      for (const Branch& branch : edge.branches)
        add(cell_.stage(edge, branch, branch.stages.size() - 1), cell_.weight(each, branch.mix),
            branch.stages.back().norm);
    }
    run(true);
  }

  Cell<AStage> cell_;
  const Plan& plan_;
  const MixedInputs& in_;
  float *mean_ = nullptr, *variance_ = nullptr, *partials_, *sums_;
  T *out_ = nullptr, *kept_ = nullptr;
};

}  // namespace rnas::cuda::mixed
