#include "rnas/mixed_op.h"

#include "mixed/passes.h"

namespace rnas::cuda {

using namespace mixed;

namespace mixed {
template struct Passes<float>;
extern template struct Passes<BFloat16>;
extern template struct Passes<Half>;
}  // namespace mixed

namespace {

// run(passes), a Passes of the elements' type.
template <typename Run> auto with_elements(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::float32: return run(Passes<float>());
    case Dtype::bfloat16: return run(Passes<BFloat16>());
    case Dtype::float16: return run(Passes<Half>());
    default: throw std::invalid_argument("mixed_op on CUDA takes images of float32, bfloat16 or float16");
  }
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

void clear_weights(const Plan& plan, const MixedGradients& grad, CUstream_st* stream) {
  const int64_t bytes = static_cast<int64_t>(plan.edges.size()) * plan.shape.candidates * sizeof(float);
  if (grad.weights) clear(grad.weights, bytes, stream);
}

}  // namespace

MixedSizes mixed_sizes(const MixedShape& shape, Dtype dtype) {
  return with_elements(dtype, [&](auto passes) { return passes.sizes(make_plan(shape)); });
}

void mixed_forward(const MixedShape& shape, Dtype dtype, const MixedInputs& in, Keep keep, void* out, float* mean,
                   float* variance, void* kept, void* workspace, CUstream_st* stream) {
  if (keep != Keep::nothing && keep != Keep::activations)
    throw std::invalid_argument("mixed_forward on CUDA keeps activations or nothing");
  if (shape.batch == 0) return;
  const Plan plan = make_plan(shape);
  with_elements(dtype, [&](auto passes) {
    passes.forward(plan, in, keep, out, mean, variance, kept, workspace, stream);
  });
}

void mixed_backward(const MixedShape& shape, Dtype dtype, const MixedInputs& in, Keep keep, const void* out,
                    const void* kept, const void* grad_out, const MixedGradients& grad, void* workspace,
                    CUstream_st* stream) {
  if (keep != Keep::activations) throw std::invalid_argument("mixed_backward on CUDA needs the kept activations");
  const Plan plan = make_plan(shape);
  clear_weights(plan, grad, stream);
  if (shape.batch == 0) return;
  with_elements(dtype, [&](auto passes) { passes.backward(plan, in, out, kept, grad_out, grad, workspace, stream); });
}

void mixed_double_backward(const MixedShape& shape, Dtype dtype, const MixedInputs& in, Keep keep, const void* out,
                           const void* kept, const void* grad_out, const void* const* direction, void* grad_grad_out,
                           void* direction_kept, const MixedGradients& grad, void* workspace, CUstream_st* stream) {
  if (keep != Keep::activations)
    throw std::invalid_argument("mixed_double_backward on CUDA needs the kept activations");
  if (in.batch_statistics || grad.states || grad.beta || !grad_grad_out)
    throw std::invalid_argument("mixed_double_backward takes fixed statistics and gives no gradient to states or beta");
  const Plan plan = make_plan(shape);
  clear_weights(plan, grad, stream);
  if (shape.batch == 0) return;
  with_elements(dtype, [&](auto passes) {
    passes.double_backward(plan, in, out, kept, grad_out, direction, grad_grad_out, direction_kept, grad, workspace,
                           stream);
  });
}

#if defined(RNAS_ON_HOST)  // for tests
void set_host_thread_order(int order);
void set_host_thread_order(int order) { host_thread_order() = order; }
int64_t count_host_launches();
int64_t count_host_launches() { return host_launches(); }
#endif

}  // namespace rnas::cuda
