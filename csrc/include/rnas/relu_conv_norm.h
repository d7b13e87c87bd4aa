#pragma once

#include "rnas/types.h"

// ReLU, 1x1 convolution, batch norm, fused: what stands in front of every cell of a supernet. Without the ReLU and on
// patches of the images: its stem.
//
// P pixels (batch, height and width together), C channels in, K channels out; float32, channels last. weight (K, C);
// gamma, beta, mean, variance (K), gamma and beta or either may be null.
//
// Keep::masks keeps the signs of x, if there is a ReLU: enough for the gradient to x on fixed statistics.
// Keep::activations keeps nothing, as x and out serve. Functions allocate nothing but small tables; `workspace` is
// memory of relu_conv_norm_sizes bytes, aligned to 64; `threads` is the most to use.

#include "rnas/mixed_op.h"

namespace rnas {

struct ReluConvNorm {
  int64_t pixels, channels_in, channels_out;  // P, C, K
  const float *x, *weight, *gamma, *beta, *mean, *variance;
  double eps;
  bool batch_statistics, relu;
};

struct ReluConvNormSizes {
  int64_t kept_masks, workspace;  // bytes
};

namespace cpu {

ReluConvNormSizes relu_conv_norm_sizes(int64_t pixels, int64_t channels_in, int64_t channels_out, bool relu,
                                         int threads);

// out (P, K). On batch statistics mean and variance (K) receive the batch's mean and biased variance.
void relu_conv_norm_forward(const ReluConvNorm& in, Keep keep, float* out, float* mean, float* variance, void* kept,
                            void* workspace, int threads);

// Gradients of sum(grad_out * out), each null where not wanted: grad_x (P, C), grad_weight (K, C), grad_gamma and
// grad_beta (K). With Keep::masks statistics must be fixed, only grad_x may be wanted, and x and out are not read. On
// batch statistics in.mean and in.variance are the batch's.
void relu_conv_norm_backward(const ReluConvNorm& in, Keep keep, const float* out, const void* kept,
                             const float* grad_out, float* grad_x, float* grad_weight, float* grad_gamma,
                             float* grad_beta, void* workspace, int threads);

// Fixed statistics. For s = sum(direction * grad_x), direction (P, C): grad_grad_out (P, K) receives its derivative with
// respect to grad_out, grad_weight and grad_gamma, null where not wanted, those with respect to weight and gamma. With
// Keep::masks x is not read.
void relu_conv_norm_double_backward(const ReluConvNorm& in, Keep keep, const void* kept, const float* grad_out,
                                    const float* direction, float* grad_grad_out, float* grad_weight,
                                    float* grad_gamma, void* workspace, int threads);

// An image batch (N, H, W, C).
struct PixelShape {
  int64_t batch, height, width, channels;
};

// What FactorizedReduce takes from an image, (N, ceil(H / 2), ceil(W / 2), 2, C): the pixels (2i, 2j), and those one
// further in both directions, zeros beyond the border. scatter_pixels is the transpose; it writes all of the image.
void gather_pixels(const PixelShape& shape, const float* image, float* pixels, int threads);
void scatter_pixels(const PixelShape& shape, const float* pixels, float* image, int threads);

// Images (N, C, H, W) with strides of any kind, and what a kernel (kernel_height, kernel_width) sees of them at each of
// its height_out x width_out positions.
struct PatchShape {
  int64_t batch, channels, height, width;
  int64_t strides[4];
  int64_t kernel_height, kernel_width, stride, padding, height_out, width_out;
};

// patches (N, H', W', C * kernel_height * kernel_width), in the order of a convolution's weight; zeros beyond the
// border. scatter_patches is the transpose; it writes all of the image.
void gather_patches(const PatchShape& shape, const float* image, float* patches, int threads);
void scatter_patches(const PatchShape& shape, const float* patches, float* image, int threads);

}  // namespace cpu
}  // namespace rnas
