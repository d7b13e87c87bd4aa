#pragma once

// The elements of images: float, and two types of 16 bits that are stored and never computed with. On the host they are
// plain integers; what rounds them there rounds as a GPU does, to the nearest, ties to even.

#include "block.h"

namespace rnas::cuda {

#if defined(RNAS_ON_HOST)

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace host {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
// bits / 2^shift, rounded; shift is 1 to 31.
inline uint32_t rounded_shift(uint32_t bits, int shift) {
  const uint32_t whole = bits >> shift, rest = bits & ((1u << shift) - 1), half = 1u << (shift - 1);
  return whole + (rest > half || (rest == half && whole % 2 == 1));
}

}  // namespace host

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return host::as_float(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  if (exponent == 31) return host::as_float(sign | 0x7f800000u | mantissa << 13);
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                   : host::as_float((exponent + 112) << 23 | mantissa << 13);
  return host::as_float(sign | host::as_bits(size));
}

template <typename T> T from_float(float value);
template <> inline float from_float(float value) { return value; }
template <> inline BFloat16 from_float(float value) {
  const uint32_t bits = host::as_bits(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};  // the quiet bit: never an infinity
  return {static_cast<uint16_t>(host::rounded_shift(bits, 16))};          // a carry goes on into the exponent
}
template <> inline Half from_float(float value) {
  const uint32_t bits = host::as_bits(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  const int exponent = static_cast<int>(size >> 23);  // 112 more than a half's
  uint32_t made;
  if (size > 0x7f800000u)
    made = 0x7e00;  // NaN
  else if (exponent >= 143)
    made = 0x7c00;  // infinity: 2^16 and more
  else if (exponent >= 113)
    made = host::rounded_shift(size - (112u << 23), 13);  // from 65520 on that is infinity
  else if (exponent >= 102)
    made = host::rounded_shift((size & 0x7fffffu) | 0x800000u, 126 - exponent);  // multiples of 2^-24
  else
    made = 0;
  return {static_cast<uint16_t>(sign | made)};
}

#else

using BFloat16 = __nv_bfloat16;
using Half = __half;

// Two elements of 16 bits in one register, the first in its lower half.
template <typename T> RNAS_DEVICE float2 unpack(unsigned int bits) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  else
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}
template <typename T> RNAS_DEVICE unsigned int pack(float low, float high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned int*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned int*>(&both);
  }
}

#endif

}  // namespace rnas::cuda
