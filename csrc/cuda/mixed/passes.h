#pragma once

// The passes of a cell on images of one type of elements. They instantiate every kernel for that type, so one file
// compiles them for each, side by side: mixed_op.cu, mixed/bfloat16.cu and mixed/float16.cu.

#include <initializer_list>

#include "mixed/backward_pass.h"
#include "mixed/forward_pass.h"

namespace rnas::cuda::mixed {

template <typename T> struct Passes {
  static MixedSizes sizes(const Plan& plan);
  static void forward(const Plan& plan, const MixedInputs& in, Keep keep, void* out, float* mean, float* variance,
                      void* kept, void* workspace, CUstream_st* stream);
  static void backward(const Plan& plan, const MixedInputs& in, const void* out, const void* kept, const void* grad_out,
                       const MixedGradients& grad, void* workspace, CUstream_st* stream);
  static void double_backward(const Plan& plan, const MixedInputs& in, const void* out, const void* kept,
                              const void* grad_out, const void* const* direction, void* grad_grad_out,
                              void* direction_kept, const MixedGradients& grad, void* workspace, CUstream_st* stream);
};

// Whether four channels can be loaded at once. Parameters of C channels keep the alignment of the array they lie in.
template <typename T>
bool takes_vectors(const MixedShape& shape, const MixedInputs& in, const MixedGradients* grad,
                   std::initializer_list<const void*> images, const void* const* direction = nullptr) {
  const auto aligned = [](const void* address, size_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % bytes == 0;
  };
  const auto holds = [&](const void* image) { return aligned(image, 4 * sizeof(T)); };
  bool all = shape.channels % 4 == 0;
  for (const void* table : {in.theta, in.gamma, in.beta, in.mean, in.variance}) all = all && aligned(table, 16);
  for (const void* image : images) all = all && holds(image);
  for (int64_t state = 0; state < shape.inputs; ++state)
    all = all && holds(in.states[state]) && (!grad || !grad->states || holds(grad->states[state])) &&
          (!direction || holds(direction[state]));
  return all;
}

// run(V) with V as a compile-time constant. Kernels that take one channel at a time are compiled for float32 alone: for
// numbers of channels that hardly occur they would take two fifths of a file's time to compile.
template <typename T, typename Run> void with_width(bool vectors, const Run& run) {
  if (vectors) return run(std::integral_constant<int, 4>());
  if constexpr (std::is_same_v<T, float>)
    run(std::integral_constant<int, 1>());
  else
    throw std::invalid_argument(
        "mixed_op on CUDA takes images of 16-bit elements where C is a multiple of 4, images are aligned to 8 bytes "
        "and tables to 16");
}

template <typename T> MixedSizes Passes<T>::sizes(const Plan& plan) {
  const MixedInputs none{};
  Arena forward(nullptr), backward(nullptr);
  if (plan.shape.batch > 0) {
    Forward<4, Stage<T>>(plan, none, false, forward, nullptr);
    Backward<4, Stage<T>>(plan, none, backward, nullptr);
  }
  MixedSizes sizes{};
  sizes.edges = static_cast<int64_t>(plan.edges.size());
  sizes.norms = plan.norms;
  sizes.theta = plan.theta;
  sizes.height_out = plan.height_out;
  sizes.width_out = plan.width_out;
  sizes.kept_activations = sizes.kept_linear = plan.kept * plan.activation() * static_cast<int64_t>(sizeof(T));
  sizes.workspace = std::max(forward.used(), backward.used());
  return sizes;
}

template <typename T>
void Passes<T>::forward(const Plan& plan, const MixedInputs& in, Keep keep, void* out, float* mean, float* variance,
                        void* kept, void* workspace, CUstream_st* stream) {
  const bool keeps = keep == Keep::activations;
  with_width<T>(takes_vectors<T>(plan.shape, in, nullptr, {out, kept}), [&](auto width) {
    Arena arena(workspace);
    Forward<decltype(width)::value, Stage<T>>(plan, in, keeps, arena, stream)
        .run(static_cast<T*>(out), mean, variance, keeps ? static_cast<T*>(kept) : nullptr);
  });
}

template <typename T>
void Passes<T>::backward(const Plan& plan, const MixedInputs& in, const void* out, const void* kept,
                         const void* grad_out, const MixedGradients& grad, void* workspace, CUstream_st* stream) {
  with_width<T>(takes_vectors<T>(plan.shape, in, &grad, {out, grad_out, kept}), [&](auto width) {
    Arena arena(workspace);
    Backward<decltype(width)::value, Stage<T>>(plan, in, arena, stream)
        .run(static_cast<const T*>(out), static_cast<const T*>(kept), static_cast<const T*>(grad_out), grad);
  });
}

template <typename T>
void Passes<T>::double_backward(const Plan& plan, const MixedInputs& in, const void* out, const void* kept,
                                const void* grad_out, const void* const* direction, void* grad_grad_out,
                                void* direction_kept, const MixedGradients& grad, void* workspace,
                                CUstream_st* stream) {
  const T *nodes = static_cast<const T*>(out), *activations = static_cast<const T*>(kept);
  T *along_nodes = static_cast<T*>(grad_grad_out), *along_kept = static_cast<T*>(direction_kept);
  const bool vectors = takes_vectors<T>(plan.shape, in, nullptr,
                                        {out, grad_out, kept, grad_grad_out, direction_kept}, direction);
  with_width<T>(vectors, [&](auto width) {
    constexpr int V = decltype(width)::value;
    Arena forward(workspace), backward(workspace);
    Forward<V, TangentStage<T>>(plan, in, true, forward, stream)
        .run_tangent(nodes, activations, direction, along_nodes, along_kept);
    if (grad.weights || grad.theta || grad.gamma)
      Backward<V, TangentStage<T>>(plan, in, backward, stream)
          .run_tangent(nodes, activations, static_cast<const T*>(grad_out), direction, along_nodes, along_kept, grad);
  });
}

}  // namespace rnas::cuda::mixed
