#pragma once

// The backward pass of a cell, node by node from the last: which kernels run on what, in which order. Host code.

#include "mixed/cell.h"
#include "mixed/gather.h"

namespace rnas::cuda::mixed {

// How many blocks add up the gradients of one task's weights, each in a slab of its own.
constexpr int64_t kSlabs = 32;

// AStage: TangentStage for the gradients to parameters of sum(grad_out * out_direction), instead of those of
// sum(grad_out * out).
template <int V, typename AStage> class Backward {
 public:
  using T = typename AStage::Element;

  Backward(const Plan& plan, const MixedInputs& in, Arena& arena, CUstream_st* stream)
      : cell_(plan, in, arena, stream), plan_(plan), in_(in), arena_(arena),
        slabs_(static_cast<int>(std::min(kSlabs, cell_.tiles))) {
    slopes_ = arena.take<float>(plan.norms * 4 * cell_.c);
    gradients_ = arena.take<T>((plan.shape.nodes - 1) * plan.activation());
    for (int64_t state = 0; state < plan.shape.inputs + plan.shape.nodes - 1; ++state) {
      const bool many = !std::is_same_v<T, float> && contributions(state) > 1;
      sums_.push_back(many ? arena.take<float>(plan.shape.batch * cell_.height(state) * cell_.width(state) * cell_.c)
                           : nullptr);
    }
    common_ = arena;
    for (int64_t node = 0; node < plan.shape.nodes; ++node) {
      arena_ = common_;
      take_memory(node);
      if (arena_.used() > most_.used()) most_ = arena_;
    }
    arena = most_;
  }

  void run(const T* out, const T* kept, const T* grad_out, const MixedGradients& grad) {
    cell_.out = const_cast<T*>(out);
    cell_.kept = const_cast<T*>(kept);
    grad_out_ = const_cast<T*>(grad_out);
    grad_ = grad;
    cell_.fixed_norms(in_.mean, in_.variance);  // in a backward pass those of the batch are given too
    go();
  }

  void run_tangent(const T* out, const T* kept, const T* grad_out, const void* const* directions, T* out_direction,
                   T* kept_direction, const MixedGradients& grad) {
    cell_.directions = directions;
    cell_.out_direction = out_direction;
    cell_.kept_direction = kept_direction;
    run(out, kept, grad_out, grad);
  }

 private:
  static constexpr bool kTangent = kIsTangent<AStage>;

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
    T* d;
    float *slabs, *depthwise_slabs, *partials;
  };
  struct EdgeMemory {
    std::vector<std::vector<StageMemory>> branches;
    std::vector<T*> middles;  // per branch, null with one stage
    T *max_d, *avg_d;
    unsigned char* winners;
    float* partials[4];  // of the max pool, the average pool, the identity, the ones
  };

  std::vector<EdgeMemory> take_memory(int64_t node) {
    const int64_t size = plan_.activation(), partial = cell_.tiles * 2 * cell_.c;
    std::vector<EdgeMemory> made;
    for (int64_t each : plan_.into(plan_.shape.inputs + node)) {
      const Edge& edge = plan_.edges[each];
      EdgeMemory memory{};
      for (const Branch& branch : edge.branches) {
        std::vector<StageMemory> stages;
        T* d = arena_.take<T>(size);  // that of the second stage has been used when the first one writes
        for (const Convolution& conv : branch.stages)
          stages.push_back({d, arena_.take<float>(slabs_ * conv.entries),
                            arena_.take<float>(slabs_ * cell_.c * conv.kernel * conv.kernel),
                            arena_.take<float>(partial)});
        memory.branches.push_back(stages);
        memory.middles.push_back(branch.twice() ? arena_.take<T>(size) : nullptr);
      }
      memory.max_d = edge.max >= 0 ? arena_.take<T>(size) : nullptr;
      memory.winners = edge.max >= 0 ? arena_.take<unsigned char>(size) : nullptr;
      memory.avg_d = edge.avg >= 0 ? arena_.take<T>(size) : nullptr;
      for (float*& partials : memory.partials) partials = arena_.take<float>(partial);
      made.push_back(memory);
    }
    return made;
  }

  // The gradient of a node once all later nodes have been gone through.
  Image<T> gradient(int64_t node) const {
    return node == plan_.shape.nodes - 1 ? cell_.node_of(grad_out_, node)
                                         : cell_.output(gradients_ + node * plan_.activation());
  }
  // How many nodes a state's gradient gets a part from.
  int64_t contributions(int64_t state) const {
    const int64_t inputs = plan_.shape.inputs, nodes = plan_.shape.nodes;
    return state < inputs ? nodes : nodes - 1 - (state - inputs);
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
          products.add(typename Products<V, AStage>::Task{stage, norm >= 0 && !kTangent ? cell_.row(in_.mean, norm) : nullptr, partials, cell_.scales(each)});
          float* grad_weight = grad_.weights ? grad_.weights + each * plan_.shape.candidates + mix : nullptr;
          tasks.push_back(finish(partials, norm, cell_.weight(each, mix), grad_weight));
        };
        add(cell_.simple(edge, Kind::max_pool), edge.max, edge.max_norm, memory.partials[0]);
        add(cell_.simple(edge, Kind::avg_pool), edge.avg, edge.avg_norm, memory.partials[1]);
        add(cell_.simple(edge, Kind::identity), edge.skip, -1, memory.partials[2]);
        add(cell_.simple(edge, Kind::ones), edge.ones, -1, memory.partials[3]);
        for (size_t b = 0; b < edge.branches.size(); ++b) {
          const Branch& branch = edge.branches[b];
          add(cell_.stage(edge, branch, branch.stages.size() - 1), branch.mix, branch.stages.back().norm,
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
          work(edge, edge.branches[b], memory_[at].branches[b][index], memory_[at].middles[b], cell_.scales(edges[at]));
    }
  }

  void pointwise(const std::vector<int64_t>& edges, size_t index) {
    Tasks<Pointwise<V, AStage>> tasks("mixed_op: pointwise",
                              {cell_.tiling, cell_.channels, slabs_, in_.batch_statistics, {}}, slabs_, cell_.shared,
                              cell_.stream);
    each_stage(edges, index, [&](const Edge& edge, const Branch& branch, const StageMemory& memory, T* middle,
                                 const float* scales) {
      const Convolution& conv = branch.stages[index];
      const bool is_middle = index == 0 && branch.twice();
      tasks.add(typename Pointwise<V, AStage>::Task{
          cell_.stage(edge, branch, index), is_middle ? cell_.output(middle) : g_, {slope(conv.norm), nullptr}, memory.d,
          grad_.theta ? memory.slabs : nullptr, is_middle ? nullptr : scales, static_cast<int>(conv.entries),
          is_middle ? cell_.kept_activation(branch.kept) : nullptr});
    });
  }

  void depthwise_weights(const std::vector<int64_t>& edges, size_t index) {
    if (!grad_.theta) return;
    Tasks<DepthwiseWeights<V, AStage>> tasks("mixed_op: depthwise weights",
                                             {cell_.tiling, cell_.channels, slabs_, {}}, slabs_, cell_.shared,
                                             cell_.stream);
    each_stage(edges, index, [&](const Edge& edge, const Branch& branch, const StageMemory& memory, T*, const float*) {
      if (branch.stages[index].kind == Kind::separable)
        tasks.add(typename DepthwiseWeights<V, AStage>::Task{cell_.stage(edge, branch, index), memory.d,
                                                     memory.depthwise_slabs});
    });
  }

  void middles(const std::vector<int64_t>& edges) {
    const bool sums = in_.batch_statistics || grad_.gamma || grad_.beta;
    std::vector<FinishProducts::Task> finished;
    {
      Tasks<Middle<V, AStage>> tasks("mixed_op: middle", {cell_.tiling, cell_.channels, {}}, cell_.tiles, cell_.shared,
                             cell_.stream);
      each_stage(edges, 1, [&](const Edge& edge, const Branch& branch, const StageMemory& memory, T* middle,
                               const float*) {
        const int64_t norm = branch.stages[0].norm;
        tasks.add(typename Middle<V, AStage>::Task{cell_.stage(edge, branch, 1), memory.d, kTangent ? nullptr : cell_.row(in_.mean, norm), middle,
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
    std::vector<SumSlabs::Task> tasks;
    for (size_t index = 0; index < 2; ++index)
      each_stage(edges, index, [&](const Edge&, const Branch& branch, const StageMemory& memory, T*, const float*) {
        const Convolution& conv = branch.stages[index];
        const int taps = conv.kernel * conv.kernel;
        tasks.push_back({memory.slabs, grad_.theta + conv.pointwise, static_cast<int>(conv.entries)});
        most = std::max(most, conv.entries);
        if (conv.kind != Kind::separable) return;
        tasks.push_back({memory.depthwise_slabs, grad_.theta + conv.depthwise, static_cast<int>(cell_.c * taps)});
        most = std::max(most, cell_.c * taps);
      });
    const int64_t blocks = (most + kThreads - 1) / kThreads;
    Tasks<SumSlabs> sums("mixed_op: weight sums", {slabs_, {}}, blocks, 0, cell_.stream);
    for (const SumSlabs::Task& task : tasks) sums.add(task);
  }

  void pools(const std::vector<int64_t>& edges) {
    Tasks<Pools<V, T>> tasks("mixed_op: pools", {cell_.tiling, cell_.channels, in_.batch_statistics, {}}, cell_.tiles, 0,
                             cell_.stream);
    for (size_t at = 0; at < edges.size(); ++at) {
      const int64_t each = edges[at];
      const Edge& edge = plan_.edges[each];
      if (!to_source(edge)) continue;
      const auto add = [&](Kind kind, int64_t mix, int64_t norm, T* d, unsigned char* winners) {
        const Slope slope_of{norm >= 0 ? slope(norm) : nullptr, mix >= 0 ? cell_.weight(each, mix) : nullptr};
        if (mix >= 0) tasks.add(typename Pools<V, T>::Task{cell_.simple(edge, kind), g_, slope_of, d, winners, cell_.scales(each)});
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
      Gather<V, T> kernel{sources, cell_.channels, {}};
      int64_t count = 0;
      const auto run = [&] {
        if (count > 0) launch("mixed_op: gather", kernel, {sources.count(), count}, shared_bytes(sources, cell_.c), cell_.stream);
        count = 0;
      };
      for (size_t at = 0; at < edges.size(); ++at) {
        const Edge& edge = plan_.edges[edges[at]];
        if ((edge.source < plan_.shape.inputs) != from_inputs || !to_source(edge)) continue;
        kernel.edges[count++] = gathered(edges[at], memory_[at], node);
        if (count == Gather<V, T>::kEdges) run();
      }
      run();
    }
  }

  typename Gather<V, T>::Edge gathered(int64_t each, const EdgeMemory& memory, int64_t node) const {
    const Edge& edge = plan_.edges[each];
    const bool first = node == plan_.shape.nodes - 1;  // every state has an edge into the last node
    const bool is_input = edge.source < plan_.shape.inputs;
    const int64_t source_node = edge.source - plan_.shape.inputs;
    const bool last = node == (is_input ? 0 : source_node + 1);
    const Image<T> none{nullptr, 0, 0, 0};
    const Image<T> to = is_input ? cell_.input(grad_.states[edge.source]) : gradient(source_node);
    const Image<T> base = is_input ? none : cell_.node_of(grad_out_, source_node);
    // Parts are added up in float32: in the gradient itself where it is.
    float* sums = sums_[edge.source];
    if constexpr (std::is_same_v<T, float>) sums = to.data;
    typename Gather<V, T>::Edge made{cell_.state(edge.source), base, last ? to : none, sums, first, g_,
                                     edge.skip >= 0 ? cell_.weight(each, edge.skip) : nullptr, cell_.scales(each), 0, tiling().height,
                                     tiling().width, {}};
    for (size_t b = 0; b < edge.branches.size(); ++b)
      made.items[made.count++] = {cell_.stage(edge, edge.branches[b], 0), memory.branches[b][0].d, nullptr};
    if (edge.max >= 0) made.items[made.count++] = {cell_.simple(edge, Kind::max_pool), memory.max_d, memory.winners};
    if (edge.avg >= 0) made.items[made.count++] = {cell_.simple(edge, Kind::avg_pool), memory.avg_d, nullptr};
    return made;
  }

  const Tiling& tiling() const { return cell_.tiling; }

  Cell<AStage> cell_;
  const Plan& plan_;
  const MixedInputs& in_;
  Arena arena_, common_{nullptr}, most_{nullptr};
  const int slabs_;
  float* slopes_;
  T *gradients_, *grad_out_ = nullptr;
  std::vector<float*> sums_;  // of each state's gradient; null where it takes none
  MixedGradients grad_{};
  std::vector<EdgeMemory> memory_;
  Image<T> g_{};
};

}  // namespace rnas::cuda::mixed
