#pragma once

// What the passes of a cell share: its images and tables, and how tasks become launches. Host code.

#include "mixed/forward.h"
#include "mixed/plan.h"

namespace rnas::cuda::mixed {

// Collects tasks for a kernel, which it launches as often as its arguments fill up.
template <typename Kernel> class Tasks {
 public:
  Tasks(const char* name, const Kernel& kernel, int64_t blocks, int64_t shared, CUstream_st* stream)
      : name_(name), kernel_(kernel), blocks_(blocks), shared_(shared), stream_(stream) {}
  ~Tasks() noexcept(false) {
    if (std::uncaught_exceptions() == 0) flush();
  }
  Tasks(const Tasks&) = delete;

  template <typename Task> void add(const Task& task) {
    kernel_.tasks[count_++] = task;
    if (count_ == kTasks) flush();
  }
  void flush() {
    if (count_ > 0 && blocks_ > 0) launch(name_, kernel_, {blocks_, count_}, shared_, stream_);
    count_ = 0;
  }

 private:
  const char* name_;
  Kernel kernel_;
  int64_t blocks_, shared_, count_ = 0;
  CUstream_st* stream_;
};

// The images, tables and tiles that all passes share. AStage: Stage, or TangentStage for a derivative along a direction.
template <typename AStage> class Cell {
 public:
  using T = typename AStage::Element;

  Cell(const Plan& plan, const MixedInputs& in, Arena& arena, CUstream_st* stream)
      : plan(plan), in(in), stream(stream), c(plan.shape.channels), s(plan.shape.inputs), nodes(plan.shape.nodes),
        channels(static_cast<int>(c)), tiling(make_tiling(plan.shape.batch, plan.height_out, plan.width_out, c)),
        tiles(tiling.count()), shared(shared_bytes(tiling, c)) {
    scale = arena.take<float>(plan.norms * c);
    shift = arena.take<float>(plan.norms * c);
  }

  const Plan& plan;
  const MixedInputs& in;
  CUstream_st* const stream;
  const int64_t c, s, nodes;
  const int channels;
  const Tiling tiling;
  const int64_t tiles, shared;
  float *scale, *shift;  // (B, C)
  T* out = nullptr;      // (N, H', W', J * C)
  T* kept = nullptr;
  const void* const* directions = nullptr;  // of the states, and what follows for nodes and kept activations
  T *out_direction = nullptr, *kept_direction = nullptr;

  int64_t height(int64_t state) const { return state < s ? plan.shape.height : plan.height_out; }
  int64_t width(int64_t state) const { return state < s ? plan.shape.width : plan.width_out; }

  Image<T> input(void* data) const {
    return {static_cast<T*>(data), static_cast<int>(plan.shape.height), static_cast<int>(plan.shape.width), channels};
  }
  Image<T> output(T* data) const { return {data, tiling.height, tiling.width, channels}; }
  // A node of an array (N, H', W', J * C).
  Image<T> node_of(T* data, int64_t node) const {
    return {data + node * c, tiling.height, tiling.width, static_cast<int>(nodes * c)};
  }
  Image<T> state(int64_t index) const {
    return index < s ? input(const_cast<void*>(in.states[index])) : node_of(out, index - s);
  }
  // The direction of a state, laid out as the state is.
  const T* direction(int64_t index) const {
    return index < s ? static_cast<const T*>(directions[index]) : out_direction + (index - s) * c;
  }
  T* kept_activation(int64_t which) const { return kept + which * plan.activation(); }

  const float* row(const float* table, int64_t norm) const { return table ? table + norm * c : nullptr; }
  float* row(float* table, int64_t norm) const { return table ? table + norm * c : nullptr; }
  const float* scales(int64_t edge) const { return plan.shape.scaled ? in.scales + edge * plan.shape.batch : nullptr; }
  const float* weight(int64_t edge, int64_t mix) const { return in.weights + edge * plan.shape.candidates + mix; }

  // Stage `index` of a branch: the second one of two begins at the kept activation and the norm in front of it.
  AStage stage(const Edge& edge, const Branch& branch, size_t index) const {
    const Convolution& conv = branch.stages[index];
    AStage made{};
    static_cast<Stage<T>&>(made) = {conv.kind, conv.kernel, conv.dilation, conv.stride, state(edge.source), nullptr,
                                 nullptr, in.theta + conv.depthwise, in.theta + conv.pointwise};
    if (index == 1) {
      made.source = output(kept_activation(branch.kept));
      made.scale = row(scale, branch.stages[0].norm);
      made.shift = row(shift, branch.stages[0].norm);
    }
    if constexpr (kIsTangent<AStage>)
      made.direction = index == 1 ? kept_direction + branch.kept * plan.activation() : direction(edge.source);
    return made;
  }
  AStage simple(const Edge& edge, Kind kind) const {
    AStage made{};
    static_cast<Stage<T>&>(made) = {kind, 3, 1, static_cast<int>(edge.stride), state(edge.source), nullptr, nullptr,
                                 nullptr, nullptr};
    if constexpr (kIsTangent<AStage>) made.direction = direction(edge.source);
    return made;
  }

  void fixed_norms(const float* mean, const float* variance) const {
    if (plan.norms == 0) return;
    launch("mixed_op: norms",
           FixedNorms{in.gamma, in.beta, mean, variance, scale, shift, channels, in.eps}, {1, plan.norms}, 0, stream);
  }
};

}  // namespace rnas::cuda::mixed
