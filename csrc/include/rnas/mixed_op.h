#pragma once

#include "rnas/types.h"

// A cell of mixed edges, fused. A mixed edge computes sum_k weights[e, k] * primitive_k(x); node j is the sum of the
// edges from all input states and all nodes before it. One input and one node make a single mixed edge. An edge whose
// primitives are all `none` is as good as no edge. With `scaled`, image n of edge e is multiplied by scales[e, n], as drop
// path does.
//
// Legend: N images, C channels, H W pixels of the input states, H' W' = ceil(H / stride), ceil(W / stride), S input
// states, J nodes, of which all J' = J or the last alone are asked for, E edges in the order (node 0: sources 0 ..
// S-1), (node 1: sources 0 .. S), ..., K primitives, B batch norms of all edges. Edges from an input state have
// `stride`, edges from a node have stride 1.
//
// Images are float32, on a GPU also bfloat16 or float16, channels last unless `planes` says otherwise; all else is
// float32. Parameters come as one
// array `theta`, edge by edge and primitive by primitive, each as PyTorch stores it:
//
//   sep_conv_k    depthwise (C, 1, k, k), pointwise (C, C), depthwise, pointwise; two norms
//   dil_conv_k    depthwise (C, 1, k, k), pointwise (C, C); one norm
//   conv_1x1      (C, C); one norm
//   conv_3x3      (C, C, 3, 3); one norm
//   skip_connect  at stride 2: (C - C/2, C) on the even pixels, (C/2, C) on those one further; one norm. Else nothing.
//   pools         one norm where pool_norm
//
// `ones` is 1 everywhere: its weight is a number that is added.
//
// Functions throw std::invalid_argument for sizes that cannot be. They allocate nothing but small tables; `workspace` is
// memory of mixed_sizes(...).workspace bytes, aligned to 64, whose contents do not matter. `threads` is the most to use.

namespace rnas {

enum class Primitive {
  none,
  skip_connect,
  max_pool_3x3,
  avg_pool_3x3,
  sep_conv_3x3,
  sep_conv_5x5,
  dil_conv_3x3,
  dil_conv_5x5,
  conv_1x1,
  conv_3x3,
  ones
};

struct MixedShape {
  int64_t batch, channels, height, width;  // N, C, H, W
  int64_t inputs, nodes, stride;           // S, J, 1 or 2
  const Primitive* primitives;             // (K), or (E, K) where each edge has its own
  int64_t candidates;                      // K
  bool pool_norm;
  bool each_edge = false;                  // whether each edge has its own; rows are filled up with Primitive::none
  bool last = false;                       // the last node alone is asked for. On the CPU only
  // What is channels first, on the CPU only: `out` and `grad_out`, (N, J' * C, H', W'); the gradients to the states,
  // (N, C, H, W).
  bool planes_out = false, planes_grad = false;
  bool scaled = false;                     // whether there are scales. On the CPU on batch statistics only
  int64_t results() const { return last ? 1 : nodes; }  // J', how many nodes are asked for
  const Primitive* of_edge(int64_t edge) const { return primitives + (each_edge ? edge * candidates : 0); }
};

// What a forward pass keeps for its backward pass.
//   masks        signs of what enters each ReLU and winners of the max pools: enough for gradients to the states where
//                the statistics are fixed
//   activations  the nodes but for the last (on a GPU they are read from `out`), what enters the second ReLU of each
//                separable convolution, and on batch statistics the outputs of the dense 3x3 convolutions and, from 32
//                channels on, of the 5x5 ones; everything else is computed again
//   outputs      on batch statistics the outputs of all convolutions too: three times the memory, less time. On the CPU
//                those of 1x1 ones of stride 1 and up to 64 channels are never made: with both, the covariances of the
//                channels that enter them are kept
enum class Keep { nothing, masks, activations, outputs };

struct MixedSizes {
  int64_t edges, norms, theta, height_out, width_out;  // E, B, elements of theta, H', W'
  int64_t kept_masks, kept_activations, kept_outputs;  // bytes; they depend on the instruction set in use
  int64_t kept_linear;  // bytes of Keep::activations where statistics are fixed
  int64_t workspace;    // bytes
};

// The arguments common to all passes. mean and variance (B, C): of the batch in a backward pass on batch statistics, of
// the norms where statistics are fixed. gamma and beta (B, C) or null.
struct MixedInputs {
  const void* const* states;   // (S) images (N, H, W, C)
  const float* weights;        // (E, K)
  const float* theta;
  const float *gamma, *beta, *mean, *variance;
  double eps;
  bool batch_statistics;
  const float* scales = nullptr;  // (E, N) where `scaled`; there are no gradients to them
};

// Where gradients go; null for those not wanted, single states included.
struct MixedGradients {
  void* const* states;   // (S) images (N, H, W, C), or (N, C, H, W) with planes_grad
  float* weights;        // (E, K)
  float* theta;
  float *gamma, *beta;   // (B, C)
};

namespace cpu {

MixedSizes mixed_sizes(const MixedShape& shape, int threads);

// out (N, H', W', J' * C), or (N, J' * C, H', W') with planes_out: the nodes side by side. On batch statistics, mean and variance (B, C) receive the batch's mean
// and biased variance and in.mean and in.variance are not read. kept: mixed_sizes bytes for `keep`.
void mixed_forward(const MixedShape& shape, const MixedInputs& in, Keep keep, float* out, float* mean, float* variance,
                   void* kept, void* workspace, int threads);

// Gradients of sum(grad_out * out), grad_out (N, H', W', J' * C). `kept` is the forward pass's; so is `out`, which is not
// read here and may be null. With Keep::masks statistics must be fixed and only grad.states may be
// wanted.
void mixed_backward(const MixedShape& shape, const MixedInputs& in, Keep keep, const float* out, const void* kept,
                    const float* grad_out, const MixedGradients& grad, void* workspace, int threads);

// Fixed statistics, and images with the channels last, only. For s = sum(direction * gradient to the states of the backward pass): grad_grad_out
// (N, H', W', J' * C) receives the derivative of s with respect to grad_out, and `grad` that with respect to weights,
// theta and gamma (those with respect to states and beta are zero: grad.states and grad.beta must be null; with
// Keep::masks all must be). direction (S) images (N, H, W, C). direction_kept: memory of kept_linear bytes, or null
// with Keep::masks. With Keep::masks in.states are not read, here and in mixed_backward.
void mixed_double_backward(const MixedShape& shape, const MixedInputs& in, Keep keep, const float* out,
                           const void* kept, const float* grad_out, const void* const* direction,
                           float* grad_grad_out, void* direction_kept, const MixedGradients& grad, void* workspace,
                           int threads);

}  // namespace cpu

// As above, with arrays in the memory of the current CUDA device, work queued on `stream`, `out` read by the backward
// passes, and nothing kept but Keep::activations (or nothing): kept_masks and kept_outputs are 0.
//
// dtype: float32, bfloat16 or float16, the type of all images: states, out, grad_out, direction, grad_grad_out, the
// gradients to states, and what is kept. They are read as float32, everything is computed and summed in float32, and
// each result is rounded once, to the nearest. Weights, theta, the norms' tables and the gradients to them are float32
// always. With 16 bits C must be a multiple of 4, images aligned to 8 bytes and tables to 16; float32 takes any.
namespace cuda {

MixedSizes mixed_sizes(const MixedShape& shape, Dtype dtype);

void mixed_forward(const MixedShape& shape, Dtype dtype, const MixedInputs& in, Keep keep, void* out, float* mean,
                   float* variance, void* kept, void* workspace, CUstream_st* stream);

void mixed_backward(const MixedShape& shape, Dtype dtype, const MixedInputs& in, Keep keep, const void* out,
                    const void* kept, const void* grad_out, const MixedGradients& grad, void* workspace,
                    CUstream_st* stream);

void mixed_double_backward(const MixedShape& shape, Dtype dtype, const MixedInputs& in, Keep keep, const void* out,
                           const void* kept, const void* grad_out, const void* const* direction, void* grad_grad_out,
                           void* direction_kept, const MixedGradients& grad, void* workspace, CUstream_st* stream);

}  // namespace cuda
}  // namespace rnas
