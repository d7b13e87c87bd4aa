#pragma once

// The parameters of a cell in the order of the loops, and their gradients: how they are packed, added up and unpacked.

#include <algorithm>
#include <cstring>

#include "mixed/memory.h"
#include "mixed/plan.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

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
        store(to + conv.packed + p * plan.matrix_step() + row * padded + first, __builtin_convertvector(positions[p], Vector));
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
      positions[p] = __builtin_convertvector(load(now + p * plan.matrix_step()), Wide);
      store(now + p * plan.matrix_step(), zero());
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
