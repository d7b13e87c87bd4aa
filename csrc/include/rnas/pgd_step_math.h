#pragma once

// What one pixel goes through in a PGD step, for host and device alike.
//
// Products and sums are written with mul and add so that no compiler fuses them into an FMA: every backend then rounds
// as the plain PyTorch reference does. All functions have internal linkage, because the CPU compiles this file once per
// instruction set and the linker must not merge the copies.

#if defined(__CUDACC__)
#define RNAS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RNAS_HOST_DEVICE inline
#endif

namespace rnas::pgd {

#if defined(__CUDA_ARCH__)
static RNAS_HOST_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
static RNAS_HOST_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
static RNAS_HOST_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
#else
template <typename T> static RNAS_HOST_DEVICE T add(T a, T b) { return a + b; }
template <typename T> static RNAS_HOST_DEVICE T mul(T a, T b) { return a * b; }
template <typename T> static RNAS_HOST_DEVICE T divide(T a, T b) { return a / b; }
#endif

// -1, 0 or 1; NaN stays NaN, where a sign from two comparisons would say 0 and hide a broken gradient.
template <typename T> static RNAS_HOST_DEVICE T sign(T g) {
  return g != g ? g : static_cast<T>(g > T(0)) - static_cast<T>(g < T(0));
}

// min(max(v, lo), hi) with NaN in any operand giving NaN, as torch.maximum and torch.minimum do.
template <typename T> static RNAS_HOST_DEVICE T clamp(T v, T lo, T hi) {
  T low = v > lo ? v : lo;       // lo where v is NaN
  low = v != v ? v : low;
  T both = low < hi ? low : hi;  // hi where low is NaN
  return low != low ? low : both;
}

// Into the box. Adding 0 turns -0 into +0, so the sign of a zero does not depend on which operand min and max return.
template <typename T> static RNAS_HOST_DEVICE T box(T v, T lower, T upper) { return add(clamp(v, lower, upper), T(0)); }

template <typename T>
static RNAS_HOST_DEVICE T linf(T x_adv, T grad, T x, T epsilon, T step_size, T lower, T upper) {
  T moved = add(x_adv, mul(step_size, sign(grad)));
  return box(clamp(moved, add(x, -epsilon), add(x, epsilon)), lower, upper);
}

// The perturbation after an L2 step, before its projection. grad_norm is 1 where the gradient is zero.
template <typename T> static RNAS_HOST_DEVICE T l2_delta(T x_adv, T grad, T x, T grad_norm, T step_size) {
  return add(add(x_adv, mul(step_size, divide(grad, grad_norm))), -x);
}

template <typename T> static RNAS_HOST_DEVICE T l2(T delta, T x, T scale, T lower, T upper) {
  return box(add(x, mul(delta, scale)), lower, upper);
}

// What a zero norm becomes as a divisor: a zero gradient divided by 1 makes no step.
template <typename T> static RNAS_HOST_DEVICE T divisor(T norm) { return norm == T(0) ? T(1) : norm; }

// min(1, epsilon / norm), without dividing by a norm inside the ball; NaN stays NaN.
template <typename T> static RNAS_HOST_DEVICE T shrink(T norm, T epsilon) {
  return norm <= epsilon ? T(1) : divide(epsilon, norm);
}

}  // namespace rnas::pgd
