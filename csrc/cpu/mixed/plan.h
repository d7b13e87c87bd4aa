#pragma once

// What a cell consists of: edges, their branches, and where each finds its parameters, norms and kept activations.

#include <algorithm>
#include <atomic>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "mixed/convolution.h"
#include "mixed/winograd.h"
#include "rnas/mixed_op.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// Pixels of a chunk, or twice as many: what flows from one loop to the next stays in the first cache.
constexpr int64_t kChunk = 64;
// Weight gradients are summed in float32 over at most about this many pixels or windows, then added up in double.
constexpr int64_t kFlush = 2048;
// From so many channels on, reading the output of a 5x5 convolution is cheaper than computing it again. (That of a dense
// 3x3 convolution always is.)
constexpr int64_t kCostly = 32;
// Halo of the tiles around a state and around the mid of a separable convolution.
constexpr int64_t kHalo = 4;
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
  int64_t skip = -1, max = -1, avg = -1, ones = -1;  // place among the K of what is no convolution; -1: none
  int64_t max_norm = -1, avg_norm = -1;
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
  bool max = false, avg = false;  // whether there are any
  int64_t winograd = 0;           // likewise, outputs of a window on a side
  int64_t bundle = 1;             // images that go through a convolution together
  int64_t states() const { return shape.inputs + shape.nodes; }
  int64_t kept_nodes() const { return shape.nodes - 1; }  // all but the last: dense, in front of everything else
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
  // Whether images of C channels are dense as the caller stores them, and whether what is asked for is one such image.
  bool stored_dense() const { return shape.channels == kLanes; }
  bool asked_dense() const { return stored_dense() && shape.results() == 1; }
  int64_t pixels_out() const { return height_out * width_out; }
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
    conv.summed = plan.summed;
    plan.summed += conv.winograd ? 9 * plan.padded * plan.padded : conv.packed_end - conv.packed_begin;
    conv.norm = plan.norms++;
    return conv;
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
      plan.packed += position_count(conv.winograd) * plan.padded * plan.padded;
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
  Builder builder{plan, shape.channels, choice};
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

// ---- memory ----------------------------------------------------------------------------------------------------------

// Hands out a workspace piece by piece. On a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T> T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    // A further line keeps pieces of a power of two from falling on the same cache sets.
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64 + 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Images with a halo of zeros, one behind the other.
struct Tile {
  float* data;  // pixel (0, 0) of the first group of the first
  int64_t row, plane, halo, image;
  Tile at(int64_t i) const { return {data + i * image, row, plane, halo, image}; }
};

inline Tile take_tile(Arena& arena, int64_t groups, int64_t height, int64_t width, int64_t halo, int64_t images = 1) {
  const int64_t row = (width + 2 * halo) * kLanes, plane = (height + 2 * halo) * row;
  float* memory = arena.take<float>(images * groups * plane);
  return {memory ? memory + halo * row + halo * kLanes : nullptr, row, plane, halo, groups * plane};
}

inline void clear(const Tile& tile, int64_t groups, int64_t images = 1) {
  for (int64_t i = 0; i < images; ++i)
    std::memset(tile.at(i).data - tile.halo * (tile.row + kLanes), 0, groups * tile.plane * sizeof(float));
}

// ---- threads ---------------------------------------------------------------------------------------------------------

// work(thread, begin, end) on shares of [0, count) that depend on `count` and the number of threads alone.
template <typename Work> void parallel(int threads, int64_t count, const Work& work) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    if (count > 0) work(0, int64_t{0}, count);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t begin = count * thread / team, end = count * (thread + 1) / team;
    if (begin < end) work(static_cast<int>(thread), begin, end);
  }
#else
  work(0, int64_t{0}, count);
#endif
}

// work(thread, take), where take() gives the next of [0, count) or -1. Each thread has a share of its own, front to back;
// one that is done takes from the back of the others'. For work whose results do not depend on who does it.
template <typename Work> void parallel_shared(int threads, int64_t count, const Work& work) {
  struct alignas(64) Share {
    std::atomic<uint64_t> range;  // begin in the upper half, end in the lower
  };
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
  std::vector<Share> shares(threads);
  for (int64_t each = 0; each < threads; ++each)
    shares[each].range = static_cast<uint64_t>(count * each / threads) << 32 | (count * (each + 1) / threads);
  parallel(threads, threads, [&](int own, int64_t, int64_t) {
    const auto take = [&]() -> int64_t {
      for (int each = 0; each < threads; ++each) {
        std::atomic<uint64_t>& range = shares[(own + each) % threads].range;
        for (uint64_t now = range; now >> 32 < (now & 0xffffffff);)
          if (range.compare_exchange_weak(now, each == 0 ? now + (uint64_t{1} << 32) : now - 1))
            return static_cast<int64_t>(each == 0 ? now >> 32 : (now & 0xffffffff) - 1);
      }
      return -1;
    };
    work(own, take);
  });
}

// ---- parameters ------------------------------------------------------------------------------------------------------

// All parameters of a cell in the order of the loops. forward: depthwise [group][tap][lane], parts and Winograd's
// positions [input][output]; backward: kernels flipped, matrices [output][input].
struct Packed {
  float *forward, *backward;
};

inline Packed take_packed(Arena& arena, const Plan& plan) {
  float* forward = arena.take<float>(plan.packed);
  return {forward, arena.take<float>(plan.packed)};
}

// Which of the two orders are wanted. Where that costs little there is always the forward one.
enum class Order { forward, backward, both };

// Kernels of kLanes outputs and one input, or (Backward) one output and kLanes inputs, turned round, to the positions.
template <int64_t Outputs, bool Backward>
void pack_positions(const Plan& plan, const Convolution& conv, const float* theta, const float* scale, float* to) {
  constexpr int64_t kPositions = position_count(Outputs);
  const int64_t c = plan.shape.channels, padded = plan.padded;
  const int64_t lane_step = Backward ? 9 : 9 * c, row_step = Backward ? 9 * c : 9;
  for (int64_t row = 0; row < padded; ++row)
    for (int64_t first = 0; first < padded; first += kLanes) {
      const int64_t lanes = row < c ? std::min(kLanes, c - first) : 0;
      float taps[9][kLanes] = {}, factors[kLanes] = {};
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const float* from = theta + conv.theta + row * row_step + (first + lane) * lane_step;
        factors[lane] = scale ? scale[Backward ? row : first + lane] : 1.0f;
        for (int64_t tap = 0; tap < 9; ++tap) taps[Backward ? 8 - tap : tap][lane] = from[tap];
      }
      Wide kernels[9], positions[kPositions];
      const Wide factor = __builtin_convertvector(load(factors), Wide);
      for (int64_t tap = 0; tap < 9; ++tap) kernels[tap] = factor * __builtin_convertvector(load(taps[tap]), Wide);
      kernel_positions<Outputs>(kernels, positions);
      for (int64_t p = 0; p < kPositions; ++p)
        store(to + conv.packed + (p * padded + row) * padded + first, __builtin_convertvector(positions[p], Vector));
    }
}

// Packs one convolution. scale (C): what each output is multiplied with, or null.
inline void pack(const Plan& plan, const Convolution& conv, const float* theta, const float* scale, const Packed& to,
                 Order order) {
  const bool backward = order != Order::forward;
  if (conv.winograd)
    return with_outputs(conv, [&](auto outputs) {
      constexpr int64_t kOutputs = decltype(outputs)::value;
      if (order != Order::backward) pack_positions<kOutputs, false>(plan, conv, theta, scale, to.forward);
      if (backward) pack_positions<kOutputs, true>(plan, conv, theta, scale, to.backward);
    });
  const int64_t c = plan.shape.channels, padded = plan.padded, taps = conv.kernel * conv.kernel;
  std::memset(to.forward + conv.packed_begin, 0, (conv.packed_end - conv.packed_begin) * sizeof(float));
  if (backward)
    std::memset(to.backward + conv.packed_begin, 0, (conv.packed_end - conv.packed_begin) * sizeof(float));
  for (int64_t channel = 0; channel < c; ++channel)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t base = conv.packed + channel / kLanes * taps * kLanes + channel % kLanes;
      const float value = theta[conv.theta + channel * taps + tap];
      to.forward[base + tap * kLanes] = value;
      if (backward) to.backward[base + (taps - 1 - tap) * kLanes] = value;
    }
  for (const Part& part : conv.parts)
    for (int64_t group = 0; group < c; group += kLanes)  // inputs in groups: the writes then stay within few lines
      for (int64_t row = 0; row < part.count; ++row) {
        const int64_t output = part.first + row, end = std::min(c, group + kLanes);
        const float factor = scale ? scale[output] : 1.0f;
        const float* from = theta + part.theta + row * part.output_stride;
        for (int64_t input = group; input < end; ++input)
          to.forward[part.packed + input * padded + output] = factor * from[input * part.input_stride];
        if (!backward) continue;
        for (int64_t input = group; input < end; ++input)
          to.backward[part.packed + output * padded + input] = factor * from[input * part.input_stride];
      }
}

// Calls use(output, input, gradients) for every kernel (3, 3) of a convolution by Winograd's algorithm.
template <typename Use>
void kernel_gradients(const Plan& plan, const Convolution& conv, const double* const* sums, int count, const Use& use) {
  const int64_t c = plan.shape.channels, padded = plan.padded;
  for (int64_t first = 0; first < c; first += kLanes)
    for (int64_t input = 0; input < c; ++input) {
      double taps[9][kLanes] = {}, kernel[9];
      for (int64_t tap = 0; tap < 9; ++tap)
        for (int each = 0; each < count; ++each) {
          const double* from = sums[each] + conv.summed + (tap * padded + input) * padded + first;
          for (int64_t lane = 0; lane < kLanes; ++lane) taps[tap][lane] += from[lane];
        }
      for (int64_t lane = 0; lane < std::min(kLanes, c - first); ++lane) {
        for (int64_t tap = 0; tap < 9; ++tap) kernel[tap] = taps[tap][lane];
        use(first + lane, input, kernel);
      }
    }
}

inline void unpack_kernels(const Plan& plan, const Convolution& conv, const double* const* sums, int count,
                           const float* scale, float* grad_theta) {
  kernel_gradients(plan, conv, sums, count, [&](int64_t output, int64_t input, const double* taps) {
    float* to = grad_theta + conv.theta + (output * plan.shape.channels + input) * 9;
    for (int64_t tap = 0; tap < 9; ++tap) to[tap] = static_cast<float>((scale ? scale[output] : 1.0f) * taps[tap]);
  });
}

// The reverse for gradients that have been added up: theta_grad = scale * sum of `count` arrays.
inline void unpack(const Plan& plan, const Convolution& conv, const double* const* sums, int count, const float* scale,
                   float* grad_theta) {
  if (conv.winograd) return unpack_kernels(plan, conv, sums, count, scale, grad_theta);
  const int64_t c = plan.shape.channels, padded = plan.padded, taps = conv.kernel * conv.kernel;
  const auto total = [&](int64_t at) {
    double sum = 0;
    for (int each = 0; each < count; ++each) sum += sums[each][conv.summed + at - conv.packed_begin];
    return sum;
  };
  for (int64_t channel = 0; channel < c; ++channel)
    for (int64_t tap = 0; tap < taps; ++tap)
      grad_theta[conv.theta + channel * taps + tap] = static_cast<float>(
          total(conv.packed + channel / kLanes * taps * kLanes + tap * kLanes + channel % kLanes));
  for (const Part& part : conv.parts)
    for (int64_t row = 0; row < part.count; ++row) {
      const int64_t output = part.first + row;
      for (int64_t input = 0; input < c; ++input)
        grad_theta[part.theta + row * part.output_stride + input * part.input_stride] = static_cast<float>(
            (scale ? scale[output] : 1.0f) * total(part.packed + input * padded + output));
    }
}

// A thread's sums of weight gradients, float32 in the packed order for a while and double in the end.
struct WeightSums {
  float* now;
  double* total;
  int64_t begin = 0;  // where in the packed order `now` begins
  float* of(int64_t packed) const { return now + (packed - begin); }
  void add_up(int64_t first, int64_t end) const {
    for (int64_t at = first; at < end; ++at) {
      total[at] += now[at];
      now[at] = 0;
    }
  }
};

// Kernels, from the sums at the positions of their windows.
template <int64_t Outputs> void add_up_windows(const Plan& plan, const Convolution& conv, const WeightSums& sums) {
  constexpr int64_t kPositions = position_count(Outputs);
  const int64_t padded = plan.padded, matrix = padded * padded;
  for (int64_t at = 0; at < matrix; at += kLanes) {  // inputs beyond the channels too: NaN would stay there
    float* now = sums.of(conv.packed) + at;
    double* total = sums.total + conv.summed + at;
    Wide positions[kPositions], taps[9];
    for (int64_t p = 0; p < kPositions; ++p) {
      positions[p] = __builtin_convertvector(load(now + p * matrix), Wide);
      store(now + p * matrix, zero());
    }
    kernel_gradient<Outputs>(positions, taps);
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t lane = 0; lane < kLanes; ++lane) total[tap * matrix + lane] += taps[tap][lane];
  }
}

// Of a convolution that is none, `count` values from `packed` on.
inline void add_up(const Convolution& conv, const WeightSums& sums, int64_t packed, int64_t count) {
  WeightSums{sums.of(packed), sums.total + conv.summed + (packed - conv.packed_begin)}.add_up(0, count);
}

inline void add_up(const Plan& plan, const Convolution& conv, const WeightSums& sums) {
  if (conv.winograd)
    return with_outputs(
        conv, [&](auto outputs) { add_up_windows<decltype(outputs)::value>(plan, conv, sums); });
  add_up(conv, sums, conv.packed_begin, conv.packed_end - conv.packed_begin);
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
