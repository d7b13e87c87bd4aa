#pragma once

// What a cell consists of: edges, their branches, and where each finds its parameters, norms and kept activations.

#include <algorithm>
#include <exception>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "mixed/depthwise.h"
#include "rnas/mixed_op.h"

namespace rnas::cuda::mixed {

// What lies between two norms, and the norm behind it.
struct Convolution {
  Kind kind;
  int kernel, dilation, stride;
  int64_t depthwise, pointwise, entries;  // where its weights begin in theta, and how many its matrices have
  int64_t norm;
};

// One convolutional primitive of an edge; `mix` is its place among the K.
struct Branch {
  int64_t mix;
  std::vector<Convolution> stages;
  int64_t kept;  // which kept activation lies between two stages; -1: there is one stage

  bool twice() const { return stages.size() == 2; }
};

struct Edge {
  int64_t source, target, stride;  // states: inputs first, then nodes
  std::vector<Branch> branches;
  int64_t skip = -1, max = -1, avg = -1, ones = -1;  // place among the K of what is no convolution; -1: none
  int64_t max_norm = -1, avg_norm = -1;              // -1: none
};

struct Plan {
  MixedShape shape;
  std::vector<Edge> edges;
  int64_t height_out, width_out;
  int64_t norms = 0, theta = 0, kept = 0;

  int64_t activation() const { return shape.batch * height_out * width_out * shape.channels; }  // elements of a node
  std::vector<int64_t> into(int64_t state) const {
    std::vector<int64_t> found;
    for (size_t edge = 0; edge < edges.size(); ++edge)
      if (edges[edge].target == state) found.push_back(static_cast<int64_t>(edge));
    return found;
  }
  // Edges from states [first, last).
  std::vector<int64_t> from(int64_t first, int64_t last) const {
    std::vector<int64_t> found;
    for (size_t edge = 0; edge < edges.size(); ++edge)
      if (edges[edge].source >= first && edges[edge].source < last) found.push_back(static_cast<int64_t>(edge));
    return found;
  }
};

class Builder {
 public:
  explicit Builder(Plan& plan) : plan_(plan), c_(plan.shape.channels) {}

  void add(Edge& edge, int64_t mix, Primitive primitive) {
    const int stride = static_cast<int>(edge.stride);
    switch (primitive) {
      case Primitive::none:
        return;
      case Primitive::ones:
        edge.ones = mix;
        return;
      case Primitive::max_pool_3x3:
        edge.max = mix;
        if (plan_.shape.pool_norm) edge.max_norm = plan_.norms++;
        return;
      case Primitive::avg_pool_3x3:
        edge.avg = mix;
        if (plan_.shape.pool_norm) edge.avg_norm = plan_.norms++;
        return;
      case Primitive::skip_connect:
        if (stride == 1)
          edge.skip = mix;
        else
          edge.branches.push_back({mix, {dense(Kind::reduce, 1, stride, c_ * c_)}, -1});
        return;
      case Primitive::sep_conv_3x3: return add_twice(edge, mix, 3, stride);
      case Primitive::sep_conv_5x5: return add_twice(edge, mix, 5, stride);
      case Primitive::dil_conv_3x3: return add_once(edge, mix, separable(3, 2, stride));
      case Primitive::dil_conv_5x5: return add_once(edge, mix, separable(5, 2, stride));
      case Primitive::conv_1x1: return add_once(edge, mix, dense(Kind::dense, 1, stride, c_ * c_));
      case Primitive::conv_3x3: return add_once(edge, mix, dense(Kind::dense, 3, stride, c_ * c_ * 9));
    }
  }

 private:
  void add_once(Edge& edge, int64_t mix, const Convolution& stage) { edge.branches.push_back({mix, {stage}, -1}); }

  void add_twice(Edge& edge, int64_t mix, int kernel, int stride) {
    const Convolution first = separable(kernel, 1, stride);
    edge.branches.push_back({mix, {first, separable(kernel, 1, 1)}, plan_.kept++});
  }

  Convolution separable(int kernel, int dilation, int stride) {
    const int64_t depthwise = plan_.theta, pointwise = depthwise + c_ * kernel * kernel;
    plan_.theta = pointwise + c_ * c_;
    return {Kind::separable, kernel, dilation, stride, depthwise, pointwise, c_ * c_, plan_.norms++};
  }

  Convolution dense(Kind kind, int kernel, int stride, int64_t entries) {
    const int64_t begin = plan_.theta;
    plan_.theta += entries;
    return {kind, kernel, 1, stride, begin, begin, entries, plan_.norms++};
  }

  Plan& plan_;
  const int64_t c_;
};

// Branches and pools of one edge: what arrays in the arguments of kernels, and in the workspace, have room for.
constexpr int kMostOfEdge = 9;
// The smallest tile of so many channels still fits the shared memory of a block.
constexpr int64_t kMostChannels = 960;

inline Plan make_plan(const MixedShape& shape) {
  if (shape.last) throw std::invalid_argument("mixed_op on CUDA makes all nodes");
  if (shape.channels > kMostChannels)
    throw std::invalid_argument("mixed_op on CUDA takes at most 960 channels");
  if (shape.batch < 0 || shape.channels < 1 || shape.height < 1 || shape.width < 1 || shape.inputs < 1 ||
      shape.nodes < 1 || shape.stride < 1 || shape.stride > 2 || shape.candidates < 1)
    throw std::invalid_argument("mixed_op: sizes must be positive and the stride 1 or 2");
  if (shape.batch * shape.height > std::numeric_limits<int>::max())
    throw std::invalid_argument("mixed_op on CUDA takes at most 2147483647 rows of all images together");
  Plan plan{};
  plan.shape = shape;
  plan.height_out = (shape.height + shape.stride - 1) / shape.stride;
  plan.width_out = (shape.width + shape.stride - 1) / shape.stride;
  const int64_t most = std::max(shape.height * shape.width, plan.height_out * plan.width_out * shape.nodes);
  if (most > std::numeric_limits<int>::max() / shape.channels)
    throw std::invalid_argument("mixed_op on CUDA takes images of at most 2147483647 elements");
  Builder builder(plan);
  for (int64_t node = 0; node < shape.nodes; ++node)
    for (int64_t source = 0; source < shape.inputs + node; ++source) {
      Edge edge{source, shape.inputs + node, source < shape.inputs ? shape.stride : 1, {}};
      const Primitive* primitives = shape.of_edge(plan.edges.size());
      for (int64_t mix = 0; mix < shape.candidates; ++mix) builder.add(edge, mix, primitives[mix]);
      if (edge.branches.size() + (edge.max >= 0) + (edge.avg >= 0) > kMostOfEdge)
        throw std::invalid_argument("mixed_op on CUDA takes at most 9 convolutions and pools on an edge");
      plan.edges.push_back(edge);
    }
  return plan;
}

// Hands out a workspace piece by piece, each on a line of its own. On a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T> T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// ---- tiles -----------------------------------------------------------------------------------------------------------

// Floats of a tile, channels times pixels, up to which a block has about one strip of a depthwise convolution for each
// thread.
constexpr int64_t kWantedTile = 18 * kThreads;
// apart: as in shared_of.
inline int64_t shared_bytes(const Tiling& tiling, int64_t channels, bool apart = false) {
  const int64_t tile = tile_floats(tiling, static_cast<int>(channels)), window = tiling.window;
  return (kExtra + tile + (apart ? tile + window : std::max(tile, window))) * static_cast<int64_t>(sizeof(float));
}

inline Tiling make_tiling(int64_t batch, int64_t height, int64_t width, int64_t channels) {
  int tile_height = 16, tile_width = width > 8 ? 16 : 8;
  while (tile_height > 1 && tile_height / 2 >= height) tile_height /= 2;
  Tiling tiling{static_cast<int>(batch), static_cast<int>(height), static_cast<int>(width), tile_height, tile_width, 0,
                0, 0};
  while (tiling.pixels() * channels > kWantedTile && tiling.pixels() > 8)
    tiling.tile_height > 1 ? tiling.tile_height /= 2 : tiling.tile_width /= 2;
  tiling.rows = static_cast<int>((height + tiling.tile_height - 1) / tiling.tile_height);
  tiling.columns = static_cast<int>((width + tiling.tile_width - 1) / tiling.tile_width);
  // The window of all channels where there is room for it beside two tiles; and of a vector of channels at least, also
  // where their gradients lie beside it.
  const int64_t largest = layout_of(tiling, 2, 5, 5).plane, outputs = layout_of(tiling, 2, 1, 1).plane;
  const int64_t room = kMostShared / static_cast<int64_t>(sizeof(float)) - kExtra -
                       2 * tile_floats(tiling, static_cast<int>(channels));
  tiling.window = static_cast<int>(std::max(std::min(channels * largest, room / 4 * 4), 4 * (largest + outputs)));
  return tiling;
}

}  // namespace rnas::cuda::mixed
