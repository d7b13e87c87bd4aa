#pragma once

// A cell's passes: which kernels run on what, in which order. Host code.

#include "mixed/backward.h"
#include "mixed/plan.h"

namespace rnas::cuda::mixed {

// How many blocks add up the gradients of one task's weights, each in a slab of its own.
constexpr int64_t kSlabs = 32;

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

// The images, tables and tiles that all passes share.
class Cell {
 public:
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
  float* out = nullptr;  // (N, H', W', J * C)
  float* kept = nullptr;
  const float* const* directions = nullptr;  // of the states, and what follows for nodes and kept activations
  float *out_direction = nullptr, *kept_direction = nullptr;

  int64_t height(int64_t state) const { return state < s ? plan.shape.height : plan.height_out; }
  int64_t width(int64_t state) const { return state < s ? plan.shape.width : plan.width_out; }

  Image input(float* data) const {
    return {data, static_cast<int>(plan.shape.height), static_cast<int>(plan.shape.width), channels};
  }
  Image output(float* data) const { return {data, tiling.height, tiling.width, channels}; }
  // A node of an array (N, H', W', J * C).
  Image node_of(float* data, int64_t node) const {
    return {data + node * c, tiling.height, tiling.width, static_cast<int>(nodes * c)};
  }
  Image state(int64_t index) const {
    return index < s ? input(const_cast<float*>(in.states[index])) : node_of(out, index - s);
  }
  // The direction of a state, laid out as the state is.
  const float* direction(int64_t index) const {
    return index < s ? directions[index] : out_direction + (index - s) * c;
  }
  float* kept_activation(int64_t which) const { return kept + which * plan.activation(); }

  const float* row(const float* table, int64_t norm) const { return table ? table + norm * c : nullptr; }
  float* row(float* table, int64_t norm) const { return table ? table + norm * c : nullptr; }
  const float* weight(int64_t edge, int64_t mix) const { return in.weights + edge * plan.shape.candidates + mix; }

  // Stage `index` of a branch: the second one of two begins at the kept activation and the norm in front of it.
  template <typename AStage> AStage stage(const Edge& edge, const Branch& branch, size_t index) const {
    const Convolution& conv = branch.stages[index];
    AStage made{};
    static_cast<Stage&>(made) = {conv.kind, conv.kernel, conv.dilation, conv.stride, state(edge.source), nullptr,
                                 nullptr, in.theta + conv.depthwise, in.theta + conv.pointwise};
    if (index == 1) {
      made.source = output(kept_activation(branch.kept));
      made.scale = row(scale, branch.stages[0].norm);
      made.shift = row(shift, branch.stages[0].norm);
    }
    if constexpr (std::is_same_v<AStage, TangentStage>)
      made.direction = index == 1 ? kept_direction + branch.kept * plan.activation() : direction(edge.source);
    return made;
  }
  template <typename AStage> AStage simple(const Edge& edge, Kind kind) const {
    AStage made{};
    static_cast<Stage&>(made) = {kind, 3, 1, static_cast<int>(edge.stride), state(edge.source), nullptr, nullptr,
                                 nullptr, nullptr};
    if constexpr (std::is_same_v<AStage, TangentStage>) made.direction = direction(edge.source);
    return made;
  }

  void fixed_norms(const float* mean, const float* variance) const {
    if (plan.norms == 0) return;
    launch("mixed_op: norms",
           FixedNorms{in.gamma, in.beta, mean, variance, scale, shift, channels, in.eps}, {1, plan.norms}, 0, stream);
  }
};

// ---- forward ---------------------------------------------------------------------------------------------------------

// AStage: Stage, or TangentStage for the derivative along a direction.
template <int V, typename AStage = Stage> class Forward {
 public:
  Forward(const Plan& plan, const MixedInputs& in, bool keeps, Arena& arena, CUstream_st* stream)
      : cell_(plan, in, arena, stream), plan_(plan), in_(in) {
    if (!keeps) cell_.kept = arena.take<float>(plan.kept * plan.activation());
    size_t most = 0;
    for (int64_t wave = 0; wave < plan.shape.nodes; ++wave) most = std::max(most, wave_edges(wave).size());
    partials_ = arena.take<float>(static_cast<int64_t>(most) * kMostNorms * partial());
  }

  void run(float* out, float* mean, float* variance, float* kept) {
    cell_.out = out_ = out;
    cell_.kept = kept_ = kept ? kept : cell_.kept;
    mean_ = mean, variance_ = variance;
    if (!in_.batch_statistics) cell_.fixed_norms(in_.mean, in_.variance);
    nodes();
  }

  // The derivative of the nodes along `directions` of the states, and of the kept activations.
  void run_tangent(const float* out, const float* kept, const float* const* directions, float* out_direction,
                   float* kept_direction) {
    cell_.out = const_cast<float*>(out);
    cell_.kept = const_cast<float*>(kept);
    cell_.directions = directions;
    cell_.out_direction = out_ = out_direction;
    cell_.kept_direction = kept_ = kept_direction;
    cell_.fixed_norms(in_.mean, in_.variance);
    nodes();
  }

 private:
  static constexpr int64_t kMostNorms = 9;  // of one edge whose statistics are taken together

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
          float* kept = index == 0 && branch.twice() ? kept_ + branch.kept * plan_.activation() : nullptr;
          float* partials = batch ? partials_ + slots * partial() : nullptr;
          moments.add(typename Moments<V, AStage>::Task{cell_.stage<AStage>(edge, branch, index), kept, partials});
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
            moments.add(typename Moments<V, AStage>::Task{cell_.simple<AStage>(edge, pool), nullptr,
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
    constexpr bool kTangent = std::is_same_v<AStage, TangentStage>;  // shifts are constants
    Node<V, AStage> kernel{cell_.tiling, cell_.channels, 0, true, cell_.node_of(out_, node), {}};
    const auto run = [&] {
      launch("mixed_op: node", kernel, {cell_.tiles, 1}, cell_.shared, cell_.stream);
      kernel.first = false;
      kernel.count = 0;
    };
    const auto add = [&](const AStage& stage, const float* weight, int64_t norm_index) {
      if (kernel.count == kTasks) run();
      const bool normed = norm_index >= 0;
      kernel.tasks[kernel.count++] = {stage, weight, normed ? cell_.row(cell_.scale, norm_index) : nullptr,
                                      normed && !kTangent ? cell_.row(cell_.shift, norm_index) : nullptr};
    };
    for (int64_t each : plan_.into(plan_.shape.inputs + node)) {
      const Edge& edge = plan_.edges[each];
      if (edge.skip >= 0) add(cell_.simple<AStage>(edge, Kind::identity), cell_.weight(each, edge.skip), -1);
      if (edge.max >= 0) add(cell_.simple<AStage>(edge, Kind::max_pool), cell_.weight(each, edge.max), edge.max_norm);
      if (edge.avg >= 0) add(cell_.simple<AStage>(edge, Kind::avg_pool), cell_.weight(each, edge.avg), edge.avg_norm);
      for (const Branch& branch : edge.branches)
        add(cell_.stage<AStage>(edge, branch, branch.stages.size() - 1), cell_.weight(each, branch.mix),
            branch.stages.back().norm);
    }
    if (kernel.count > 0 || kernel.first) run();
  }

  Cell cell_;
  const Plan& plan_;
  const MixedInputs& in_;
  float *mean_ = nullptr, *variance_ = nullptr, *partials_, *out_ = nullptr, *kept_ = nullptr;
};

// ---- backward --------------------------------------------------------------------------------------------------------

// AStage: TangentStage for the gradients to parameters of sum(grad_out * out_direction), instead of those of
// sum(grad_out * out).
template <int V, typename AStage = Stage> class Backward {
 public:
  Backward(const Plan& plan, const MixedInputs& in, Arena& arena, CUstream_st* stream)
      : cell_(plan, in, arena, stream), plan_(plan), in_(in), arena_(arena),
        slabs_(static_cast<int>(std::min(kSlabs, cell_.tiles))),
        row_slabs_(static_cast<int>(std::min(kSlabs, plan.shape.batch * plan.height_out))) {
    slopes_ = arena.take<float>(plan.norms * 4 * cell_.c);
    gradients_ = arena.take<float>((plan.shape.nodes - 1) * plan.activation());
    common_ = arena;
    for (int64_t node = 0; node < plan.shape.nodes; ++node) {
      arena_ = common_;
      take_memory(node);
      if (arena_.used() > most_.used()) most_ = arena_;
    }
    arena = most_;
  }

  void run(const float* out, const float* kept, const float* grad_out, const MixedGradients& grad) {
    cell_.out = const_cast<float*>(out);
    cell_.kept = const_cast<float*>(kept);
    grad_out_ = const_cast<float*>(grad_out);
    grad_ = grad;
    cell_.fixed_norms(in_.mean, in_.variance);  // in a backward pass those of the batch are given too
    go();
  }

  void run_tangent(const float* out, const float* kept, const float* grad_out, const float* const* directions,
                   float* out_direction, float* kept_direction, const MixedGradients& grad) {
    cell_.directions = directions;
    cell_.out_direction = out_direction;
    cell_.kept_direction = kept_direction;
    run(out, kept, grad_out, grad);
  }

 private:
  static constexpr bool kTangent = std::is_same_v<AStage, TangentStage>;

  void go() {
    if (!in_.batch_statistics) fixed_slopes();
    for (int64_t node = plan_.shape.nodes - 1; node >= 0; --node) {
      arena_ = common_;
      memory_ = take_memory(node);
      g_ = gradient(node);
      backward(node);
    }
  }

  // One stage of a branch of an edge into the node at hand.
  struct StageMemory {
    float *d, *slabs, *depthwise_slabs, *partials;
  };
  struct EdgeMemory {
    std::vector<std::vector<StageMemory>> branches;
    std::vector<float*> middles;  // per branch, null with one stage
    float *max_d, *avg_d;
    unsigned char* winners;
    float* partials[3];  // of the max pool, the average pool, the identity
  };

  std::vector<EdgeMemory> take_memory(int64_t node) {
    const int64_t size = plan_.activation(), partial = cell_.tiles * 2 * cell_.c;
    std::vector<EdgeMemory> made;
    for (int64_t each : plan_.into(plan_.shape.inputs + node)) {
      const Edge& edge = plan_.edges[each];
      EdgeMemory memory{};
      for (const Branch& branch : edge.branches) {
        std::vector<StageMemory> stages;
        float* d = arena_.take<float>(size);  // that of the second stage has been used when the first one writes
        for (const Convolution& conv : branch.stages)
          stages.push_back({d, arena_.take<float>(slabs_ * conv.entries),
                            arena_.take<float>(row_slabs_ * cell_.c * conv.kernel * conv.kernel),
                            arena_.take<float>(partial)});
        memory.branches.push_back(stages);
        memory.middles.push_back(branch.twice() ? arena_.take<float>(size) : nullptr);
      }
      memory.max_d = edge.max >= 0 ? arena_.take<float>(size) : nullptr;
      memory.winners = edge.max >= 0 ? arena_.take<unsigned char>(size) : nullptr;
      memory.avg_d = edge.avg >= 0 ? arena_.take<float>(size) : nullptr;
      for (float*& partials : memory.partials) partials = arena_.take<float>(partial);
      made.push_back(memory);
    }
    return made;
  }

  // The gradient of a node once all later nodes have been gone through.
  Image gradient(int64_t node) const {
    return node == plan_.shape.nodes - 1 ? cell_.node_of(grad_out_, node)
                                         : cell_.output(gradients_ + node * plan_.activation());
  }
  float* slope(int64_t norm) const { return slopes_ + norm * 4 * cell_.c; }
  bool of_parameters() const { return grad_.theta || grad_.gamma || grad_.beta; }
  bool to_source(const Edge& edge) const {
    return edge.source >= plan_.shape.inputs || (grad_.states && grad_.states[edge.source]);
  }
  // Whether anything in front of the last norms of an edge is wanted.
  bool is_deep(const Edge& edge) const { return to_source(edge) || of_parameters(); }

  void fixed_slopes() {
    Tasks<FixedSlopes> slopes("mixed_op: slopes", {cell_.channels, in_.eps, {}}, 1, 0, cell_.stream);
    const auto add = [&](int64_t norm, const float* weight) {
      if (norm >= 0)
        slopes.add(FixedSlopes::Task{cell_.row(in_.gamma, norm), cell_.row(in_.variance, norm), weight, slope(norm)});
    };
    for (size_t each = 0; each < plan_.edges.size(); ++each) {
      const Edge& edge = plan_.edges[each];
      if (edge.max >= 0) add(edge.max_norm, cell_.weight(each, edge.max));
      if (edge.avg >= 0) add(edge.avg_norm, cell_.weight(each, edge.avg));
      for (const Branch& branch : edge.branches) {
        if (branch.twice()) add(branch.stages[0].norm, nullptr);
        add(branch.stages.back().norm, cell_.weight(each, branch.mix));
      }
    }
  }

  void backward(int64_t node) {
    const std::vector<int64_t> edges = plan_.into(plan_.shape.inputs + node);
    last_norms(edges);
    for (size_t index = 2; index-- > 0;) {
      pointwise(edges, index);
      depthwise_weights(edges, index);
      if (index == 1) middles(edges);
    }
    sum_slabs(edges);
    pools(edges);
    gather(edges, node);
  }

  FinishProducts::Task finish(const float* partials, int64_t norm, const float* weight, float* grad_weight) const {
    if (norm < 0) return {partials, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, grad_weight, nullptr, nullptr};
    return {partials, cell_.row(in_.gamma, norm), kTangent ? nullptr : cell_.row(in_.beta, norm), cell_.row(in_.variance, norm),
            cell_.row(in_.mean, norm), weight, in_.batch_statistics ? slope(norm) : nullptr, grad_weight,
            cell_.row(grad_.gamma, norm), cell_.row(grad_.beta, norm)};
  }

  Tasks<FinishProducts> finishing() const {
    return {"mixed_op: sums", {cell_.tiling, cell_.channels, in_.eps, {}}, 1, 3 * kThreads * sizeof(double),
            cell_.stream};
  }

  // Gradients of the mixing weights and of the last norms, and on batch statistics the slopes of those.
  void last_norms(const std::vector<int64_t>& edges) {
    std::vector<FinishProducts::Task> tasks;
    {
      Tasks<Products<V, AStage>> products("mixed_op: products", {cell_.tiling, cell_.channels, g_, {}}, cell_.tiles,
                                  cell_.shared, cell_.stream);
      for (size_t at = 0; at < edges.size(); ++at) {
        const int64_t each = edges[at];
        const Edge& edge = plan_.edges[each];
        const EdgeMemory& memory = memory_[at];
        const auto add = [&](const AStage& stage, int64_t mix, int64_t norm, float* partials) {
          const bool wanted = grad_.weights || (norm >= 0 && (grad_.gamma || grad_.beta ||
                                                              (in_.batch_statistics && is_deep(edge))));
          if (mix < 0 || !wanted) return;
          products.add(typename Products<V, AStage>::Task{stage, norm >= 0 && !kTangent ? cell_.row(in_.mean, norm) : nullptr, partials});
          float* grad_weight = grad_.weights ? grad_.weights + each * plan_.shape.candidates + mix : nullptr;
          tasks.push_back(finish(partials, norm, cell_.weight(each, mix), grad_weight));
        };
        add(cell_.simple<AStage>(edge, Kind::max_pool), edge.max, edge.max_norm, memory.partials[0]);
        add(cell_.simple<AStage>(edge, Kind::avg_pool), edge.avg, edge.avg_norm, memory.partials[1]);
        add(cell_.simple<AStage>(edge, Kind::identity), edge.skip, -1, memory.partials[2]);
        for (size_t b = 0; b < edge.branches.size(); ++b) {
          const Branch& branch = edge.branches[b];
          add(cell_.stage<AStage>(edge, branch, branch.stages.size() - 1), branch.mix, branch.stages.back().norm,
              memory.branches[b].back().partials);
        }
      }
    }
    auto sums = finishing();
    for (const FinishProducts::Task& task : tasks) sums.add(task);
  }

  // Stage `index` of all branches that have it.
  template <typename Work> void each_stage(const std::vector<int64_t>& edges, size_t index, const Work& work) {
    for (size_t at = 0; at < edges.size(); ++at) {
      const Edge& edge = plan_.edges[edges[at]];
      if (!is_deep(edge)) continue;
      for (size_t b = 0; b < edge.branches.size(); ++b)
        if (edge.branches[b].stages.size() > index)
          work(edge, edge.branches[b], memory_[at].branches[b][index], memory_[at].middles[b]);
    }
  }

  void pointwise(const std::vector<int64_t>& edges, size_t index) {
    Tasks<Pointwise<V, AStage>> tasks("mixed_op: pointwise",
                              {cell_.tiling, cell_.channels, slabs_, in_.batch_statistics, {}}, slabs_, cell_.shared,
                              cell_.stream);
    each_stage(edges, index, [&](const Edge& edge, const Branch& branch, const StageMemory& memory, float* middle) {
      const Convolution& conv = branch.stages[index];
      const Image g = index == 0 && branch.twice() ? cell_.output(middle) : g_;
      tasks.add(typename Pointwise<V, AStage>::Task{cell_.stage<AStage>(edge, branch, index), g, {slope(conv.norm), nullptr}, memory.d,
                                            grad_.theta ? memory.slabs : nullptr, static_cast<int>(conv.entries)});
    });
  }

  void depthwise_weights(const std::vector<int64_t>& edges, size_t index) {
    if (!grad_.theta) return;
    const int64_t bytes = kThreads * 5 * V * sizeof(float);
    Tasks<DepthwiseWeights<V, AStage>> tasks(
        "mixed_op: depthwise weights",
        {tiling().batch, tiling().height, tiling().width, cell_.channels, row_slabs_, {}}, row_slabs_, bytes,
        cell_.stream);
    each_stage(edges, index, [&](const Edge& edge, const Branch& branch, const StageMemory& memory, float*) {
      if (branch.stages[index].kind == Kind::separable)
        tasks.add(typename DepthwiseWeights<V, AStage>::Task{cell_.stage<AStage>(edge, branch, index), memory.d,
                                                     memory.depthwise_slabs});
    });
  }

  void middles(const std::vector<int64_t>& edges) {
    const bool sums = in_.batch_statistics || grad_.gamma || grad_.beta;
    std::vector<FinishProducts::Task> finished;
    {
      Tasks<Middle<V, AStage>> tasks("mixed_op: middle", {cell_.tiling, cell_.channels, {}}, cell_.tiles, cell_.shared,
                             cell_.stream);
      each_stage(edges, 1, [&](const Edge& edge, const Branch& branch, const StageMemory& memory, float* middle) {
        const int64_t norm = branch.stages[0].norm;
        tasks.add(typename Middle<V, AStage>::Task{cell_.stage<AStage>(edge, branch, 1), memory.d, kTangent ? nullptr : cell_.row(in_.mean, norm), middle,
                                           sums ? memory.partials : nullptr});
        if (sums) finished.push_back(finish(memory.partials, norm, nullptr, nullptr));
      });
    }
    auto tasks = finishing();
    for (const FinishProducts::Task& task : finished) tasks.add(task);
  }

  void sum_slabs(const std::vector<int64_t>& edges) {
    if (!grad_.theta) return;
    int64_t most = 0;
    std::vector<SumSlabs::Task> matrices, kernels;
    for (size_t index = 0; index < 2; ++index)
      each_stage(edges, index, [&](const Edge&, const Branch& branch, const StageMemory& memory, float*) {
        const Convolution& conv = branch.stages[index];
        const int taps = conv.kernel * conv.kernel;
        matrices.push_back({memory.slabs, grad_.theta + conv.pointwise, static_cast<int>(conv.entries)});
        most = std::max(most, conv.entries);
        if (conv.kind != Kind::separable) return;
        kernels.push_back({memory.depthwise_slabs, grad_.theta + conv.depthwise, static_cast<int>(cell_.c * taps)});
        most = std::max(most, cell_.c * taps);
      });
    const int64_t blocks = (most + kThreads - 1) / kThreads;
    Tasks<SumSlabs> of_matrices("mixed_op: weight sums", {slabs_, {}}, blocks, 0, cell_.stream);
    for (const SumSlabs::Task& task : matrices) of_matrices.add(task);
    Tasks<SumSlabs> of_kernels("mixed_op: weight sums", {row_slabs_, {}}, blocks, 0, cell_.stream);
    for (const SumSlabs::Task& task : kernels) of_kernels.add(task);
  }

  void pools(const std::vector<int64_t>& edges) {
    Tasks<Pools<V>> tasks("mixed_op: pools", {cell_.tiling, cell_.channels, {}}, cell_.tiles, 0, cell_.stream);
    for (size_t at = 0; at < edges.size(); ++at) {
      const int64_t each = edges[at];
      const Edge& edge = plan_.edges[each];
      if (!to_source(edge)) continue;
      const auto add = [&](Kind kind, int64_t mix, int64_t norm, float* d, unsigned char* winners) {
        const Slope slope_of{norm >= 0 ? slope(norm) : nullptr, mix >= 0 ? cell_.weight(each, mix) : nullptr};
        if (mix >= 0) tasks.add(typename Pools<V>::Task{cell_.simple<Stage>(edge, kind), g_, slope_of, d, winners});
      };
      add(Kind::max_pool, edge.max, edge.max_norm, memory_[at].max_d, memory_[at].winners);
      add(Kind::avg_pool, edge.avg, edge.avg_norm, memory_[at].avg_d, nullptr);
    }
  }

  // Adds up what the edges hand on to their sources: first those from input states, then those from nodes.
  void gather(const std::vector<int64_t>& edges, int64_t node) {
    for (const bool from_inputs : {true, false}) {
      const int64_t state = from_inputs ? 0 : plan_.shape.inputs;
      Tiling sources = make_tiling(plan_.shape.batch, cell_.height(state), cell_.width(state), cell_.c);
      Gather<V> kernel{sources, cell_.channels, {}};
      int64_t count = 0;
      const auto run = [&] {
        if (count > 0) launch("mixed_op: gather", kernel, {sources.count(), count}, shared_bytes(sources, cell_.c), cell_.stream);
        count = 0;
      };
      for (size_t at = 0; at < edges.size(); ++at) {
        const Edge& edge = plan_.edges[edges[at]];
        if ((edge.source < plan_.shape.inputs) != from_inputs || !to_source(edge)) continue;
        kernel.edges[count++] = gathered(edges[at], memory_[at], node);
        if (count == Gather<V>::kEdges) run();
      }
      run();
    }
  }

  typename Gather<V>::Edge gathered(int64_t each, const EdgeMemory& memory, int64_t node) const {
    const Edge& edge = plan_.edges[each];
    const bool first = node == plan_.shape.nodes - 1;  // every state has an edge into the last node
    const bool is_input = edge.source < plan_.shape.inputs;
    const int64_t source_node = edge.source - plan_.shape.inputs;
    const Image to = is_input ? cell_.input(grad_.states[edge.source]) : gradient(source_node);
    Image base = to;
    if (first) base = is_input ? Image{nullptr, 0, 0, 0} : cell_.node_of(grad_out_, source_node);
    typename Gather<V>::Edge made{cell_.state(edge.source), base, to, g_,
                                  edge.skip >= 0 ? cell_.weight(each, edge.skip) : nullptr, 0, tiling().height,
                                  tiling().width, {}};
    for (size_t b = 0; b < edge.branches.size(); ++b)
      made.items[made.count++] = {cell_.stage<Stage>(edge, edge.branches[b], 0), memory.branches[b][0].d, nullptr};
    if (edge.max >= 0) made.items[made.count++] = {cell_.simple<Stage>(edge, Kind::max_pool), memory.max_d, memory.winners};
    if (edge.avg >= 0) made.items[made.count++] = {cell_.simple<Stage>(edge, Kind::avg_pool), memory.avg_d, nullptr};
    return made;
  }

  const Tiling& tiling() const { return cell_.tiling; }

  Cell cell_;
  const Plan& plan_;
  const MixedInputs& in_;
  Arena arena_, common_{nullptr}, most_{nullptr};
  const int slabs_, row_slabs_;
  float *slopes_, *gradients_, *grad_out_ = nullptr;
  MixedGradients grad_{};
  std::vector<EdgeMemory> memory_;
  Image g_{};
};

}  // namespace rnas::cuda::mixed
