#pragma once

// V channels of one pixel in the registers of a thread: 4, or 1 where 4 do not fit; 2 of a product of matrices.
//
// V is 4 for 16-bit elements too. Eight, a load of 16 bytes, would leave half of a block's threads without work at 16
// channels, exclude 36 channels, and need twice the registers for sums.

#include "block.h"
#include "element.h"

namespace rnas::cuda::mixed {

template <int V> struct Vec {
  static constexpr int kCount = V;
  float v[V];
};

// The larger of two, NaN where one is: one instruction from sm_80 on, where a comparison and a choice are two.
RNAS_DEVICE float largest(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float made;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(made) : "f"(a), "f"(b));
  return made;
#else
  return a > b || a != a ? a : b;
#endif
}
RNAS_DEVICE float rectified(float value) { return largest(value, 0.0f); }

template <int V> RNAS_DEVICE Vec<V> filled(float value) {
  Vec<V> made;
#pragma unroll
  for (int k = 0; k < V; ++k) made.v[k] = value;
  return made;
}
template <int V> RNAS_DEVICE Vec<V> zeros() { return filled<V>(0.0f); }

// V elements of an image or a table as floats, in one load; and floats as elements, rounded to the nearest.
#if defined(RNAS_ON_HOST)
template <int V, typename T> RNAS_DEVICE Vec<V> load(const T* from) {
  Vec<V> made;
  for (int k = 0; k < V; ++k) made.v[k] = to_float(from[k]);
  return made;
}
template <int V, typename T> RNAS_DEVICE void store(T* to, const Vec<V>& value) {
  for (int k = 0; k < V; ++k) to[k] = from_float<T>(value.v[k]);
}
#else
template <int V, typename T> RNAS_DEVICE Vec<V> load(const T* from) {
  static_assert(V == 1 || V == 2 || V == 4, "one element, two or four");
  if constexpr (V == 1) {
    return {{to_float(*from)}};
  } else if constexpr (V == 2 && std::is_same_v<T, float>) {
    const float2 both = *reinterpret_cast<const float2*>(from);
    return {{both.x, both.y}};
  } else if constexpr (V == 2) {
    const float2 both = unpack<T>(*reinterpret_cast<const unsigned int*>(from));
    return {{both.x, both.y}};
  } else if constexpr (std::is_same_v<T, float>) {
    const float4 all = *reinterpret_cast<const float4*>(from);
    return {{all.x, all.y, all.z, all.w}};
  } else {
    const uint2 all = *reinterpret_cast<const uint2*>(from);
    const float2 low = unpack<T>(all.x), high = unpack<T>(all.y);
    return {{low.x, low.y, high.x, high.y}};
  }
}
template <int V, typename T> RNAS_DEVICE void store(T* to, const Vec<V>& value) {
  if constexpr (V == 1)
    *to = from_float<T>(value.v[0]);
  else if constexpr (V == 2 && std::is_same_v<T, float>)
    *reinterpret_cast<float2*>(to) = make_float2(value.v[0], value.v[1]);
  else if constexpr (V == 2)
    *reinterpret_cast<unsigned int*>(to) = pack<T>(value.v[0], value.v[1]);
  else if constexpr (std::is_same_v<T, float>)
    *reinterpret_cast<float4*>(to) = make_float4(value.v[0], value.v[1], value.v[2], value.v[3]);
  else
    *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(value.v[0], value.v[1]), pack<T>(value.v[2], value.v[3]));
}
#endif

// V bytes, aligned to so many.
template <int V> struct Bytes {
  unsigned char v[V];
};
template <int V> RNAS_DEVICE Bytes<V> load_bytes(const unsigned char* from) {
#if !defined(RNAS_ON_HOST)
  if constexpr (V == 4) {
    const uchar4 all = *reinterpret_cast<const uchar4*>(from);
    return {{all.x, all.y, all.z, all.w}};
  }
#endif
  Bytes<V> made;
  for (int k = 0; k < V; ++k) made.v[k] = from[k];
  return made;
}
template <int V> RNAS_DEVICE void store_bytes(unsigned char* to, const int (&value)[V]) {
#if !defined(RNAS_ON_HOST)
  if constexpr (V == 4) {
    *reinterpret_cast<uchar4*>(to) = make_uchar4(value[0], value[1], value[2], value[3]);
    return;
  }
#endif
  for (int k = 0; k < V; ++k) to[k] = static_cast<unsigned char>(value[k]);
}

// V numbers of a table that no kernel at work writes to.
template <int V> RNAS_DEVICE Vec<V> load_table(const float* from) {
#if defined(RNAS_ON_HOST)
  return load<V>(from);
#else
  if constexpr (V == 1) {
    return {{__ldg(from)}};
  } else {
    const float4 all = __ldg(reinterpret_cast<const float4*>(from));
    return {{all.x, all.y, all.z, all.w}};
  }
#endif
}

// What is left of the values once they are stored. Statistics are taken of that, so that what a norm's backward pass
// takes away is what its forward pass has normed: with few values in a channel the rest can be small.
template <typename T, int V> RNAS_DEVICE Vec<V> rounded(Vec<V> value) {
#pragma unroll
  for (int k = 0; k < V; ++k) value.v[k] = to_float(from_float<T>(value.v[k]));
  return value;
}

template <int V> RNAS_DEVICE void add_to(float* to, const Vec<V>& value) {
  Vec<V> sum = load<V>(to);
#pragma unroll
  for (int k = 0; k < V; ++k) sum.v[k] += value.v[k];
  store<V>(to, sum);
}

}  // namespace rnas::cuda::mixed
