#pragma once

// Vectors of float32 as wide as the instruction set of this copy has them, for the kernels of the mixed operation.
//
// Everything here has internal linkage: the file is compiled once per instruction set.

#include <cstdint>
#include <cstring>

#if defined(RNAS_X86)
#include <immintrin.h>
#endif

namespace rnas::cpu::RNAS_LEVEL {
namespace {

#if defined(RNAS_LEVEL_avx512)
constexpr int64_t kLanes = 16;
#elif defined(RNAS_LEVEL_avx2)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

// Pixels that one block of a convolution keeps in registers.
#if defined(RNAS_LEVEL_avx512) || defined(RNAS_LEVEL_avx512_narrow)
constexpr int kBlock = 8;
#else
constexpr int kBlock = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Mask __attribute__((vector_size(kLanes * 4)));  // lanes of all ones or all zeros
typedef float Unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// One bit per lane.
using Bits = uint16_t;
constexpr Bits kAllBits = static_cast<Bits>((1u << kLanes) - 1);

// AVX-512's intrinsics with masks, on vectors of this length.
#if defined(RNAS_LEVEL_avx512)
#define RNAS_MASKED(intrinsic) _mm512_##intrinsic
using NativeMask = __mmask16;
using NativeIntegers = __m512i;
#elif defined(RNAS_LEVEL_avx512_narrow)
#define RNAS_MASKED(intrinsic) _mm_##intrinsic
using NativeMask = __mmask8;
using NativeIntegers = __m128i;
#endif

#define RNAS_INLINE inline __attribute__((always_inline))

// The same pointer, of which the compiler knows nothing more. Without it GCC takes the addresses of an unrolled block for
// induction variables of its own, runs out of registers and fetches them from the stack, one by one.
RNAS_INLINE const float* opaque(const float* p) {
#if defined(__GNUC__)
  asm("" : "+r"(p));
#endif
  return p;
}

// The same value, in a register: GCC would rather load it again wherever it is used.
RNAS_INLINE Vector held(Vector v) {
#if defined(RNAS_MASKED) && defined(__GNUC__)
  asm("" : "+v"(v));
#endif
  return v;
}

RNAS_INLINE Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
RNAS_INLINE void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
RNAS_INLINE Vector zero() { return Vector{}; }

RNAS_INLINE Vector set(float a) {
#if defined(RNAS_LEVEL_avx512)
  return _mm512_set1_ps(a);
#elif defined(RNAS_LEVEL_avx2)
  return _mm256_set1_ps(a);
#else
  return Vector{a, a, a, a};
#endif
}

// a * b + c; rounded once where the instruction set can.
RNAS_INLINE Vector fma(Vector a, Vector b, Vector c) {
#if defined(RNAS_LEVEL_avx512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(RNAS_LEVEL_avx2)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(RNAS_NARROW)
  return _mm_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// The first `count` floats, zeros in the other lanes.
RNAS_INLINE Vector load_part(const float* p, int64_t count) {
#if defined(RNAS_MASKED)
  return RNAS_MASKED(maskz_loadu_ps)(static_cast<NativeMask>((1u << count) - 1), p);
#else
  Vector v{};
  std::memcpy(&v, p, count * 4);
  return v;
#endif
}

RNAS_INLINE void store_part(float* p, Vector v, int64_t count) {
#if defined(RNAS_MASKED)
  RNAS_MASKED(mask_storeu_ps)(p, static_cast<NativeMask>((1u << count) - 1), v);
#else
  std::memcpy(p, &v, count * 4);
#endif
}

RNAS_INLINE Bits bits(Mask mask) {
#if defined(RNAS_MASKED)
  return RNAS_MASKED(movepi32_mask)(reinterpret_cast<NativeIntegers>(mask));
#elif defined(RNAS_LEVEL_avx2)
  return static_cast<Bits>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(RNAS_X86)
  return static_cast<Bits>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
  Bits all = 0;
  for (int lane = 0; lane < kLanes; ++lane) all |= static_cast<Bits>((mask[lane] & 1) << lane);
  return all;
#endif
}

// v where the lane's bit is set, 0 elsewhere.
RNAS_INLINE Vector keep(Bits set_lanes, Vector v) {
#if defined(RNAS_MASKED)
  return RNAS_MASKED(maskz_mov_ps)(set_lanes, v);
#else
  Mask lane_bits{}, all{};
  for (int lane = 0; lane < kLanes; ++lane) lane_bits[lane] = 1 << lane;
  all += static_cast<int32_t>(set_lanes);
  return (all & lane_bits) != 0 ? v : Vector{};
#endif
}

// max(x, 0) with NaN kept, as torch.relu.
RNAS_INLINE Vector relu(Vector x) {
#if defined(RNAS_LEVEL_avx512)
  return _mm512_maskz_max_ps(kAllBits, _mm512_setzero_ps(), x);  // the plain form warns in GCC 12
#elif defined(RNAS_LEVEL_avx2)
  return _mm256_max_ps(_mm256_setzero_ps(), x);
#elif defined(RNAS_NARROW)
  return _mm_max_ps(_mm_setzero_ps(), x);
#else
  return Vector{} > x ? Vector{} : x;
#endif
}

// Where relu lets a gradient through: not (x <= 0), so NaN too.
RNAS_INLINE Bits positive(Vector x) {
#if defined(RNAS_MASKED)
  return RNAS_MASKED(cmp_ps_mask)(x, zero(), _CMP_NLE_UQ);
#else
  return bits(~(x <= Vector{}));
#endif
}

// Whether `candidate` takes over from the maximum so far, as in torch.max_pool2d: greater, or NaN.
RNAS_INLINE Bits beats(Vector candidate, Vector best) {
#if defined(RNAS_MASKED)
  return RNAS_MASKED(cmp_ps_mask)(candidate, best, _CMP_GT_OQ) |
         RNAS_MASKED(cmp_ps_mask)(candidate, candidate, _CMP_UNORD_Q);
#else
  return bits((candidate > best) | (candidate != candidate));
#endif
}

// sum + v where the lane's bit is set.
RNAS_INLINE Vector add_where(Bits set_lanes, Vector sum, Vector v) {
#if defined(RNAS_MASKED)
  return RNAS_MASKED(mask_add_ps)(sum, set_lanes, sum, v);
#else
  return sum + keep(set_lanes, v);
#endif
}

RNAS_INLINE Vector blend(Bits chosen, Vector a, Vector b) {
#if defined(RNAS_MASKED)
  return RNAS_MASKED(mask_mov_ps)(b, chosen, a);
#else
  Mask lane_bits{}, all{};
  for (int lane = 0; lane < kLanes; ++lane) lane_bits[lane] = 1 << lane;
  all += static_cast<int32_t>(chosen);
  return (all & lane_bits) != 0 ? a : b;
#endif
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
