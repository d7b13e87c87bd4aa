#pragma once

// What a cell consists of: edges, their branches, and where each finds its parameters, norms and kept activations.

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "mixed/convolution.h"
#include "mixed/winograd.h"
#include "rnas/mixed_op.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// Pixels of a chunk, or twice as many: what flows from one loop to the next stays in the first cache.
constexpr int64_t kChunk = 64;
// Weight gradients are summed in float32 over at most about this many pixels or windows, then added up in double.
constexpr int64_t kFlush = 2048;
// Sums over the pixels of what may be the same everywhere, such as a gradient behind a global mean, in float32 over so few:
// the roundings of a longer one all have one sign.
constexpr int64_t kSum = 64;
// From so many channels on, reading the output of a 5x5 convolution is cheaper than computing it again. (That of a dense
// 3x3 convolution always is.)
constexpr int64_t kCostly = 32;
// 1x1 convolutions of so many channels at most go without outputs: it saves memory's time, not products (a cell of
// NAS-Bench-201, two AVX-512 cores: 1.07x at 16 channels, 1.06x at 32, as fast as before at 64).
constexpr int64_t kMostMatrix = 64;
// Halo of the tiles around the mid of a separable convolution.
constexpr int64_t kMidHalo = 2;

// A matrix (outputs, inputs) inside theta that makes outputs [first, first + count) from the pixels shifted by (dy, dx).
struct Part {
  int64_t theta, first, count, output_stride, input_stride;
  int64_t dy, dx;
  int64_t packed;
  int64_t group, groups;  // those of the outputs
  bool adds;              // to what another part has made of them
};

// ReLU, then a depthwise convolution (kernel 0: none), then the parts, then a norm. Or, by Winograd's algorithm, a dense
// 3x3 convolution in place of both.
struct Convolution {
  int64_t kernel = 0, dilation = 1, stride = 1;
  int64_t winograd = 0;  // outputs of a window on a side; 0: not by this algorithm
  Depthwise loops{};
  int64_t theta = 0, packed = 0;  // of the depthwise kernel, or of the matrices at Winograd's positions
  std::vector<Part> parts;
  int64_t norm = 0;
  int64_t packed_begin = 0, packed_end = 0;
  int64_t summed = 0;  // where the doubles begin that its weight gradients are added up in
  // A 1x1 convolution of every pixel.
  bool is_pointwise() const {
    return !winograd && kernel == 0 && stride == 1 && parts.size() == 1 && parts[0].dy == 0 && parts[0].dx == 0;
  }
};

// One convolutional primitive of an edge; `mix` is its place among the K.
struct Branch {
  int64_t mix;
  std::vector<Convolution> stages;
  int64_t kept = -1;         // which kept activation lies between two stages
  int64_t costly = -1;       // which kept output this is under Keep::activations, -1 where it is computed again
  int64_t output = -1;       // likewise under Keep::outputs
  const Convolution& last() const { return stages.back(); }
};

// Calls use(a constant) with how many outputs a side the convolution's windows have.
template <typename Use> RNAS_INLINE void with_outputs(const Convolution& conv, const Use& use) {
  if (conv.winograd == 4)
    use(std::integral_constant<int64_t, 4>());
  else
    use(std::integral_constant<int64_t, 2>());
}

struct Edge {
  int64_t source, target, stride;  // states: inputs first, then nodes
  std::vector<Branch> branches;
  int64_t skip = -1, max = -1, avg = -1, ones = -1;  // place among the K of what is no branch; -1: none
  int64_t max_norm = -1, avg_norm = -1;
  int64_t matrix = -1, matrix_norm = -1, matrix_theta = -1;  // likewise, of a 1x1 convolution: see matrices.h
  // Its part of the packed order.
  int64_t packed_begin() const { return branches.empty() ? 0 : branches.front().stages.front().packed_begin; }
  int64_t packed_end() const { return branches.empty() ? 0 : branches.back().last().packed_end; }
};

struct Plan {
  MixedShape shape;
  std::vector<Edge> edges;
  int64_t groups, padded;              // of channels: groups * kLanes = padded >= C
  int64_t height_out, width_out;
  int64_t norms = 0, theta = 0, packed = 0, summed = 0;
  int64_t kept = 0, costly = 0, outputs = 0;  // how many activations and outputs there are to keep, beside the nodes
  bool max = false, avg = false, matrix = false;  // whether there are any
  int64_t winograd = 0;           // likewise, outputs of a window on a side
  int64_t halo = 0;               // of the tiles around a state and around a gradient
  int64_t bundle = 1;             // images that go through a convolution together
  int64_t states() const { return shape.inputs + shape.nodes; }
  int64_t kept_nodes() const { return shape.nodes - 1; }  // all but the last: dense, in front of everything else
  // The edges that leave a state.
  std::vector<int64_t> leaving(int64_t source) const {
    std::vector<int64_t> found;
    for (size_t e = 0; e < edges.size(); ++e)
      if (edges[e].source == source) found.push_back(e);
    return found;
  }
  // Whether an edge from a state has this candidate.
  bool leaves(int64_t source, int64_t Edge::*candidate) const {
    return std::any_of(edges.begin(), edges.end(),
                       [&](const Edge& edge) { return edge.source == source && edge.*candidate >= 0; });
  }
  int64_t height(int64_t state) const { return state < shape.inputs ? shape.height : height_out; }
  int64_t width(int64_t state) const { return state < shape.inputs ? shape.width : width_out; }
  // Where a state lies in a pixel of the nodes that are asked for, and how long such a pixel is; -1: it is none of them.
  int64_t asked(int64_t state) const {
    const int64_t node = state - shape.inputs - (shape.nodes - shape.results());
    return state < shape.inputs || node < 0 ? -1 : node * shape.channels;
  }
  int64_t pixel_asked() const { return shape.results() * shape.channels; }
  // Whether images of C channels are dense as the caller stores them, and whether what is asked for, and the gradient of
  // a state, is one such image.
  bool stored_dense() const { return shape.channels == kLanes; }
  bool asked_dense() const { return stored_dense() && shape.results() == 1 && !shape.planes_out; }
  bool gradient_dense() const { return stored_dense() && !shape.planes_grad; }
  int64_t pixels_out() const { return height_out * width_out; }
  // Distance of the matrices at Winograd's positions. A further line keeps them from falling on the same cache sets.
  int64_t matrix_step() const { return padded * padded + kLanes; }
  int64_t plane_out() const { return pixels_out() * kLanes; }
  int64_t image_out() const { return pixels_out() * padded; }  // floats of one image of one state
  // The most that one edge has.
  int64_t packed_of_edge() const {
    int64_t most = 0;
    for (const Edge& edge : edges) most = std::max(most, edge.packed_end() - edge.packed_begin());
    return most;
  }
  // How many products of an image a weight gradient is the sum of: pixels, or windows.
  int64_t products(const Convolution& conv) const {
    return conv.winograd ? windows_of(height_out, conv.winograd) * windows_of(width_out, conv.winograd) : pixels_out();
  }
  // Whether a thread's weight sums go to double behind images [first, last) of those before `end`.
  bool flushes(const Convolution& conv, int64_t first, int64_t last, int64_t end) const {
    const int64_t every = std::max<int64_t>(1, kFlush / products(conv));
    return last == end || last / every != first / every;
  }
};

// How many outputs a side the windows of Winograd's algorithm have, and how many images go through it together.
struct Windows {
  int64_t outputs, bundle;
};

// The larger ones have fewer products, and more matrices to read: they need a run of windows to share them. On fixed
// statistics an image goes through the whole cell alone, on those of the batch a few may go together, as many as leave
// work for all threads.
inline Windows choose_windows(int64_t height, int64_t width, int64_t images, int threads) {
  const int64_t small = windows_of(height, 2) * windows_of(width, 2), large = windows_of(height, 4) * windows_of(width, 4);
  if (large * images < kRun / 2 || large * position_count(4) >= small * position_count(2)) return {2, 1};
  return {4, std::max<int64_t>(1, std::min(images / threads, kRun / large))};
}

struct Builder {
  Plan& plan;
  int64_t c;
  Windows choice;
  bool on_batch;

  Part part(int64_t first, int64_t count, int64_t output_stride, int64_t input_stride, int64_t theta, int64_t dy,
            int64_t dx) {
    Part made{theta, first, count, output_stride, input_stride, dy, dx, plan.packed, 0, plan.groups, false};
    const bool aligned = first % kLanes == 0 && ((first + count) % kLanes == 0 || first + count == c);
    if (aligned) {  // else it shares a group with another part, and writes zeros elsewhere
      made.group = first / kLanes;
      made.groups = (count + kLanes - 1) / kLanes;
    }
    plan.packed += plan.padded * plan.padded;
    return made;
  }

  Convolution begin(int64_t kernel, int64_t dilation, int64_t stride) {
    Convolution conv;
    conv.kernel = kernel;
    conv.dilation = dilation;
    conv.stride = stride;
    conv.packed = conv.packed_begin = plan.packed;
    conv.theta = plan.theta;
    if (kernel > 0) {
      conv.loops = depthwise_loops(static_cast<int>(kernel), static_cast<int>(dilation), static_cast<int>(stride));
      plan.theta += c * kernel * kernel;
      plan.packed += plan.padded * kernel * kernel;
    }
    return conv;
  }

  Convolution end(Convolution conv) {
    for (size_t each = 1; each < conv.parts.size(); ++each)
      conv.parts[each].adds = conv.parts[each].group < conv.parts[each - 1].group + conv.parts[each - 1].groups;
    conv.packed_end = plan.packed;
    plan.halo = std::max(plan.halo, halo_of(conv));
    conv.summed = plan.summed;
    plan.summed += conv.winograd ? 9 * plan.padded * plan.padded : conv.packed_end - conv.packed_begin;
    conv.norm = plan.norms++;
    return conv;
  }

  // How far it reads beyond an image, or its transpose beyond a gradient.
  int64_t halo_of(const Convolution& conv) const {
    if (conv.kernel > 0) return half_width(static_cast<int>(conv.kernel), static_cast<int>(conv.dilation));
    const auto beyond = [&](int64_t pixels) { return windows_of(pixels, conv.winograd) * conv.winograd - pixels; };
    if (conv.winograd) return 1 + std::max(beyond(plan.height_out), beyond(plan.width_out));
    int64_t most = 0;
    for (const Part& part : conv.parts) most = std::max({most, std::abs(part.dy), std::abs(part.dx)});
    return most;
  }

  Convolution separable(int64_t kernel, int64_t dilation, int64_t stride) {
    Convolution conv = begin(kernel, dilation, stride);
    conv.parts.push_back(part(0, c, c, 1, plan.theta, 0, 0));
    plan.theta += c * c;
    return end(conv);
  }

  Convolution dense(int64_t kernel, int64_t stride) {
    Convolution conv = begin(0, 1, stride);
    if (kernel == 3 && stride == 1) {
      conv.winograd = plan.winograd = choice.outputs;
      plan.theta += 9 * c * c;
      plan.packed += position_count(conv.winograd) * plan.matrix_step();
      return end(conv);
    }
    const int64_t taps = kernel * kernel;
    for (int64_t tap = 0; tap < taps; ++tap)
      conv.parts.push_back(
          part(0, c, c * taps, taps, plan.theta + tap, tap / kernel - kernel / 2, tap % kernel - kernel / 2));
    plan.theta += c * c * taps;
    return end(conv);
  }

  Convolution factorized_reduce() {
    Convolution conv = begin(0, 1, 2);
    const int64_t even = c - c / 2, odd = c / 2;
    conv.parts.push_back(part(0, even, c, 1, plan.theta, 0, 0));
    plan.theta += even * c;
    if (odd > 0) conv.parts.push_back(part(even, odd, c, 1, plan.theta, 1, 1));
    plan.theta += odd * c;
    return end(conv);
  }

  // Whether a 1x1 convolution goes without its output.
  bool is_matrix(const Edge& edge) const {
    return on_batch && !plan.shape.scaled && edge.stride == 1 && c <= kMostMatrix && plan.padded <= plan.pixels_out();
  }

  void add(Edge& edge, int64_t mix, Primitive primitive) {
    const int64_t stride = edge.stride;
    Branch branch{mix, {}};
    switch (primitive) {
      case Primitive::none:
        return;
      case Primitive::ones:
        edge.ones = mix;
        return;
      case Primitive::max_pool_3x3:
        edge.max = mix;
        plan.max = true;
        if (plan.shape.pool_norm) edge.max_norm = plan.norms++;
        return;
      case Primitive::avg_pool_3x3:
        edge.avg = mix;
        plan.avg = true;
        if (plan.shape.pool_norm) edge.avg_norm = plan.norms++;
        return;
      case Primitive::skip_connect:
        if (stride == 1) {
          edge.skip = mix;
          return;
        }
        branch.stages.push_back(factorized_reduce());
        break;
      case Primitive::sep_conv_3x3:
      case Primitive::sep_conv_5x5: {
        const int64_t kernel = primitive == Primitive::sep_conv_3x3 ? 3 : 5;
        branch.stages.push_back(separable(kernel, 1, stride));
        branch.stages.push_back(separable(kernel, 1, 1));
        branch.kept = plan.kept++;
        break;
      }
      case Primitive::dil_conv_3x3:
        branch.stages.push_back(separable(3, 2, stride));
        break;
      case Primitive::dil_conv_5x5:
        branch.stages.push_back(separable(5, 2, stride));
        break;
      case Primitive::conv_1x1:
        if (is_matrix(edge)) {
          edge.matrix = mix;
          edge.matrix_theta = plan.theta;
          plan.theta += c * c;
          edge.matrix_norm = plan.norms++;
          plan.matrix = true;
          return;
        }
        branch.stages.push_back(dense(1, stride));
        break;
      case Primitive::conv_3x3:
        branch.stages.push_back(dense(3, stride));
        break;
    }
    branch.output = plan.outputs++;
    if (primitive == Primitive::conv_3x3 || (branch.last().kernel == 5 && c >= kCostly)) branch.costly = plan.costly++;
    edge.branches.push_back(branch);
  }
};

// on_batch: for statistics of the batch.
inline Plan make_plan(const MixedShape& shape, bool on_batch, int threads) {
  if (shape.batch < 0 || shape.channels < 1 || shape.height < 1 || shape.width < 1 || shape.inputs < 1 ||
      shape.nodes < 1 || shape.stride < 1 || shape.stride > 2 || shape.candidates < 1)
    throw std::invalid_argument("mixed_op: sizes must be positive and the stride 1 or 2");
  Plan plan{};
  plan.shape = shape;
  plan.groups = (shape.channels + kLanes - 1) / kLanes;
  plan.padded = plan.groups * kLanes;
  plan.height_out = (shape.height + shape.stride - 1) / shape.stride;
  plan.width_out = (shape.width + shape.stride - 1) / shape.stride;
  const Windows choice = choose_windows(plan.height_out, plan.width_out, on_batch ? shape.batch : 1, threads);
  Builder builder{plan, shape.channels, choice, on_batch};
  for (int64_t node = 0; node < shape.nodes; ++node)
    for (int64_t source = 0; source < shape.inputs + node; ++source) {
      Edge edge{source, shape.inputs + node, source < shape.inputs ? shape.stride : 1, {}};
      const Primitive* primitives = shape.of_edge(plan.edges.size());
      for (int64_t mix = 0; mix < shape.candidates; ++mix) builder.add(edge, mix, primitives[mix]);
      plan.edges.push_back(edge);
    }
  if (plan.winograd) plan.bundle = choice.bundle;
  return plan;
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
