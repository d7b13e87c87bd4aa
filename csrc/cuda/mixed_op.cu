#include "rnas/mixed_op.h"

#include <initializer_list>

#include "mixed/backward_pass.h"
#include "mixed/forward_pass.h"

namespace rnas::cuda {
namespace {

using namespace mixed;

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Whether four channels can be loaded at once. Parameters of C channels keep the alignment of the array they lie in.
bool takes_vectors(const MixedShape& shape, const MixedInputs& in, const MixedGradients* grad,
                   std::initializer_list<const void*> others) {
  bool all = shape.channels % 4 == 0 && aligned(in.theta) && aligned(in.gamma) && aligned(in.beta) &&
             aligned(in.mean) && aligned(in.variance);
  for (const void* address : others) all = all && aligned(address);
  for (int64_t state = 0; state < shape.inputs; ++state)
    all = all && aligned(in.states[state]) && (!grad || !grad->states || aligned(grad->states[state]));
  return all;
}

void clear(void* memory, int64_t bytes, CUstream_st* stream) {
#if defined(RNAS_ON_HOST)
  (void)stream;
  std::memset(memory, 0, bytes);
#else
  const cudaError_t status = cudaMemsetAsync(memory, 0, bytes, stream);
  if (status != cudaSuccess) throw std::runtime_error(std::string("rnas: mixed_op: ") + cudaGetErrorString(status));
#endif
}

template <int V>
void forward(const Plan& plan, const MixedInputs& in, Keep keep, float* out, float* mean, float* variance, void* kept,
             void* workspace, CUstream_st* stream) {
  Arena arena(workspace);
  const bool keeps = keep == Keep::activations;
  Forward<V>(plan, in, keeps, arena, stream)
      .run(out, mean, variance, keeps ? static_cast<float*>(kept) : nullptr);
}

template <int V>
void backward(const Plan& plan, const MixedInputs& in, const float* out, const void* kept, const float* grad_out,
              const MixedGradients& grad, void* workspace, CUstream_st* stream) {
  Arena arena(workspace);
  Backward<V>(plan, in, arena, stream).run(out, static_cast<const float*>(kept), grad_out, grad);
}

template <int V>
void double_backward(const Plan& plan, const MixedInputs& in, const float* out, const void* kept,
                     const float* grad_out, const float* const* direction, float* grad_grad_out, void* direction_kept,
                     const MixedGradients& grad, void* workspace, CUstream_st* stream) {
  const float* activations = static_cast<const float*>(kept);
  float* along = static_cast<float*>(direction_kept);
  Arena forward(workspace), backward(workspace);
  Forward<V, TangentStage>(plan, in, true, forward, stream)
      .run_tangent(out, activations, direction, grad_grad_out, along);
  if (grad.weights || grad.theta || grad.gamma)
    Backward<V, TangentStage>(plan, in, backward, stream)
        .run_tangent(out, activations, grad_out, direction, grad_grad_out, along, grad);
}

}  // namespace

MixedSizes mixed_sizes(const MixedShape& shape) {
  const Plan plan = make_plan(shape);
  const MixedInputs none{};
  Arena forward(nullptr), backward(nullptr);
  if (shape.batch > 0) {
    Forward<1>(plan, none, false, forward, nullptr);
    Backward<1>(plan, none, backward, nullptr);
  }
  MixedSizes sizes{};
  sizes.edges = static_cast<int64_t>(plan.edges.size());
  sizes.norms = plan.norms;
  sizes.theta = plan.theta;
  sizes.height_out = plan.height_out;
  sizes.width_out = plan.width_out;
  sizes.kept_activations = sizes.kept_linear = plan.kept * plan.activation() * static_cast<int64_t>(sizeof(float));
  sizes.workspace = std::max(forward.used(), backward.used());
  return sizes;
}

void mixed_forward(const MixedShape& shape, const MixedInputs& in, Keep keep, float* out, float* mean, float* variance,
                   void* kept, void* workspace, CUstream_st* stream) {
  if (keep != Keep::nothing && keep != Keep::activations)
    throw std::invalid_argument("mixed_forward on CUDA keeps activations or nothing");
  if (shape.batch == 0) return;
  const Plan plan = make_plan(shape);
  const auto run = takes_vectors(shape, in, nullptr, {out, kept}) ? forward<4> : forward<1>;
  run(plan, in, keep, out, mean, variance, kept, workspace, stream);
}

void mixed_backward(const MixedShape& shape, const MixedInputs& in, Keep keep, const float* out, const void* kept,
                    const float* grad_out, const MixedGradients& grad, void* workspace, CUstream_st* stream) {
  if (keep != Keep::activations) throw std::invalid_argument("mixed_backward on CUDA needs the kept activations");
  const Plan plan = make_plan(shape);
  if (grad.weights)
    clear(grad.weights, static_cast<int64_t>(plan.edges.size()) * shape.candidates * sizeof(float), stream);
  if (shape.batch == 0) return;
  const auto run = takes_vectors(shape, in, &grad, {out, grad_out, kept}) ? backward<4> : backward<1>;
  run(plan, in, out, kept, grad_out, grad, workspace, stream);
}

void mixed_double_backward(const MixedShape& shape, const MixedInputs& in, Keep keep, const float* out,
                           const void* kept, const float* grad_out, const float* const* direction,
                           float* grad_grad_out, void* direction_kept, const MixedGradients& grad, void* workspace,
                           CUstream_st* stream) {
  if (keep != Keep::activations)
    throw std::invalid_argument("mixed_double_backward on CUDA needs the kept activations");
  if (in.batch_statistics || grad.states || grad.beta || !grad_grad_out)
    throw std::invalid_argument("mixed_double_backward takes fixed statistics and gives no gradient to states or beta");
  const Plan plan = make_plan(shape);
  if (grad.weights)
    clear(grad.weights, static_cast<int64_t>(plan.edges.size()) * shape.candidates * sizeof(float), stream);
  if (shape.batch == 0) return;
  bool vectors = takes_vectors(shape, in, nullptr, {out, grad_out, kept, grad_grad_out, direction_kept});
  for (int64_t state = 0; state < shape.inputs; ++state) vectors = vectors && aligned(direction[state]);
  const auto run = vectors ? double_backward<4> : double_backward<1>;
  run(plan, in, out, kept, grad_out, direction, grad_grad_out, direction_kept, grad, workspace, stream);
}

#if defined(RNAS_ON_HOST)  // for tests
void set_host_thread_order(int order);
void set_host_thread_order(int order) { host_thread_order() = order; }
int64_t count_host_launches();
int64_t count_host_launches() { return host_launches(); }
#endif

}  // namespace rnas::cuda
