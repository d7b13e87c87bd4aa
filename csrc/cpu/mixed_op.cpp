#include "rnas/mixed_op.h"

#include <algorithm>

#include "mixed/batch_backward.h"
#include "mixed/batch_forward.h"
#include "mixed/fixed_backward.h"
#include "once/clock.h"
#include "simd/simd.h"

RNAS_DECLARE_LEVELS(mixed_sizes)
RNAS_DECLARE_LEVELS(mixed_forward)
RNAS_DECLARE_LEVELS(mixed_backward)
RNAS_DECLARE_LEVELS(mixed_double_backward)
RNAS_DECLARE_NARROW(mixed_sizes)
RNAS_DECLARE_NARROW(mixed_forward)
RNAS_DECLARE_NARROW(mixed_backward)
RNAS_DECLARE_NARROW(mixed_double_backward)

namespace rnas::cpu::RNAS_LEVEL {

MixedSizes mixed_sizes(const MixedShape& shape, int threads) {
  const Plan plan = make_plan(shape, true, threads), fixed = make_plan(shape, false, threads);
  const MixedInputs none{};
  const BatchForward forward(plan, none, nullptr, threads);
  MixedSizes sizes{};
  sizes.edges = plan.edges.size();
  sizes.norms = plan.norms;
  sizes.theta = plan.theta;
  sizes.height_out = plan.height_out;
  sizes.width_out = plan.width_out;
  sizes.kept_masks = shape.batch * MaskLayout(fixed).size * sizeof(Bits);
  const int64_t activation = shape.batch * plan.image_out() * sizeof(float);
  sizes.kept_linear = (plan.kept_nodes() + plan.kept) * activation;
  sizes.kept_activations = sizes.kept_linear + plan.costly * activation + forward.covariance_bytes();
  sizes.kept_outputs = sizes.kept_linear + plan.outputs * activation + forward.covariance_bytes();
  sizes.workspace = std::max({forward.workspace(),
                              BatchBackward(plan, none, nullptr, threads).workspace(),
                              FixedBackward(fixed, none, nullptr, threads).workspace()});
  return sizes;
}

void mixed_forward(const MixedShape& shape, const MixedInputs& in, Keep keep, float* out, float* mean, float* variance,
                   void* kept, void* workspace, int threads) {
  const Plan plan = make_plan(shape, in.batch_statistics, threads);
  if (in.batch_statistics)
    BatchForward(plan, in, workspace, threads).forward(keep, out, mean, variance, static_cast<float*>(kept));
  else
    FixedForward(plan, in, workspace, threads).forward(keep, out, kept);
}

void mixed_backward(const MixedShape& shape, const MixedInputs& in, Keep keep, const float*, const void* kept,
                    const float* grad_out, const MixedGradients& grad, void* workspace, int threads) {
  const Plan plan = make_plan(shape, in.batch_statistics, threads);
  if (grad.weights) std::fill_n(grad.weights, plan.edges.size() * shape.candidates, 0.0f);
  if (in.batch_statistics)
    BatchBackward(plan, in, workspace, threads).backward(keep, static_cast<const float*>(kept), grad_out, grad);
  else
    FixedBackward(plan, in, workspace, threads).backward(keep, kept, grad_out, grad);
}

void mixed_double_backward(const MixedShape& shape, const MixedInputs& in, Keep keep, const float*, const void* kept,
                           const float* grad_out, const void* const* direction, float* grad_grad_out,
                           void* direction_kept, const MixedGradients& grad, void* workspace, int threads) {
  const Plan plan = make_plan(shape, false, threads);
  if (grad.weights) std::fill_n(grad.weights, plan.edges.size() * shape.candidates, 0.0f);
  FixedBackward(plan, in, workspace, threads)
      .double_backward(keep, kept, grad_out, direction, grad_grad_out, direction_kept, grad);
}

}  // namespace rnas::cpu::RNAS_LEVEL

#if defined(RNAS_LEVEL_baseline)
namespace rnas::cpu {

MixedSizes mixed_sizes(const MixedShape& shape, int threads) { return RNAS_SELECT_WIDTH(mixed_sizes, shape.channels)(shape, threads); }

static void check_scales(const MixedShape& shape, const MixedInputs& in) {
  if (shape.scaled != (in.scales != nullptr) || (shape.scaled && !in.batch_statistics))
    throw std::invalid_argument("a scaled shape comes with scales, and on batch statistics");
}

void mixed_forward(const MixedShape& shape, const MixedInputs& in, Keep keep, float* out, float* mean, float* variance,
                   void* kept, void* workspace, int threads) {
  check_scales(shape, in);
  const Whole whole(threads);
  RNAS_SELECT_WIDTH(mixed_forward, shape.channels)(shape, in, keep, out, mean, variance, kept, workspace, threads);
}

void mixed_backward(const MixedShape& shape, const MixedInputs& in, Keep keep, const float* out, const void* kept,
                    const float* grad_out, const MixedGradients& grad, void* workspace, int threads) {
  check_scales(shape, in);
  if (in.batch_statistics && keep < Keep::activations)
    throw std::invalid_argument("mixed_backward on batch statistics needs the kept activations");
  if (keep == Keep::nothing || (keep == Keep::masks && (grad.weights || grad.theta || grad.gamma || grad.beta)))
    throw std::invalid_argument("mixed_backward: the forward pass has not kept what these gradients need");
  const Whole whole(threads);
  RNAS_SELECT_WIDTH(mixed_backward, shape.channels)(shape, in, keep, out, kept, grad_out, grad, workspace, threads);
}

void mixed_double_backward(const MixedShape& shape, const MixedInputs& in, Keep keep, const float* out,
                           const void* kept, const float* grad_out, const void* const* direction,
                           float* grad_grad_out, void* direction_kept, const MixedGradients& grad, void* workspace,
                           int threads) {
  if (keep == Keep::nothing || (keep == Keep::masks && (grad.weights || grad.theta || grad.gamma)))
    throw std::invalid_argument("mixed_double_backward: the forward pass has not kept what these gradients need");
  if (in.batch_statistics || shape.scaled || grad.states || grad.beta || !grad_grad_out)
    throw std::invalid_argument("mixed_double_backward takes fixed statistics and gives no gradient to states or beta");
  const Whole whole(threads);
  RNAS_SELECT_WIDTH(mixed_double_backward, shape.channels)(shape, in, keep, out, kept, grad_out, direction, grad_grad_out, direction_kept,
                                     grad, workspace, threads);
}

}  // namespace rnas::cpu
#endif
