#pragma once

#include "rnas/types.h"

// One step of projected gradient ascent on images, fused: step, projection on the epsilon-ball around the clean image,
// clamp to the box of valid pixels.
//
//   Norm::linf   clamp(clamp(x_adv + a * sign(grad), x - e, x + e), lower, upper)
//   Norm::l2     delta = x_adv + a * grad / |grad| - x;  clamp(x + delta * min(1, e / |delta|), lower, upper)
//
// with a the step size and e the epsilon of the sample. sign(0) = 0; a zero gradient makes no step; a NaN in any
// operand gives NaN (in Norm::l2 one NaN in a gradient reaches the whole sample, as the norm is NaN). Zeros come out as
// +0.
//
// N = samples, D = sample_size, the number of pixels of a sample. Arrays are dense with the sample as their slowest
// index; the order of the D pixels is free but common to all four arrays.

namespace rnas {

// The numbers of a step. The pointers may be null: then the scalar beside them holds for every sample.
// Their element type is double for Dtype::float64 and float for all others.
struct PgdStep {
  Norm norm;
  double epsilon;            // radius of the ball, in units of the pixels
  double step_size;          // negative to descend
  const void* epsilons;      // (N) or null
  const void* step_sizes;    // (N) or null
  double lower, upper;       // the box
};

namespace cpu {

// out (N, D) may be x_adv, grad or x itself but must not overlap them otherwise. Dtype::float32 and Dtype::float64;
// throws std::invalid_argument for the others. Runs on the threads of the calling thread's OpenMP; the result does not
// depend on their number nor on the instruction set.
void pgd_step(void* out,          // (N, D)
              const void* x_adv,  // (N, D)
              const void* grad,   // (N, D)
              const void* x,      // (N, D)
              int64_t samples, int64_t sample_size, Dtype dtype, const PgdStep& step);

}  // namespace cpu

namespace cuda {

// As above on device pointers, asynchronously on `stream` of the current device. Dtype::float32, Dtype::float16 and
// Dtype::bfloat16, computed in float32; throws std::invalid_argument for float64 and std::runtime_error with CUDA's
// words when a launch fails.
void pgd_step(void* out,          // (N, D)
              const void* x_adv,  // (N, D)
              const void* grad,   // (N, D)
              const void* x,      // (N, D)
              int64_t samples, int64_t sample_size, Dtype dtype, const PgdStep& step, CUstream_st* stream);

}  // namespace cuda
}  // namespace rnas
