#pragma once

// Products of float32 matrices on tensor cores, by the warps of a block.
//
// A tensor core multiplies numbers of 11 significant bits (tf32) and ignores further ones. A float is split into two of
// them, high + low, to some 2^-22 of itself; the four products of two floats add up in float32.
//
// What a lane holds of a matrix is laid down by mma.m16n8k8 of the PTX manual. On the host the same tables serve, lane
// by lane, so that what is tested there is what runs.

#include "element.h"

namespace rnas::cuda {

// Entry i of a lane: of a left (16, 8), a right (8, 8) and a sum (16, 8).
RNAS_BOTH int left_row(int lane, int i) { return lane / 4 + i % 2 * 8; }
RNAS_BOTH int left_column(int lane, int i) { return lane % 4 + i / 2 * 4; }
RNAS_BOTH int right_row(int lane, int i) { return lane % 4 + i * 4; }
RNAS_BOTH int right_column(int lane) { return lane / 4; }
RNAS_BOTH int sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
RNAS_BOTH int sum_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

RNAS_DEVICE uint32_t bits_of(float value) {
#if defined(RNAS_ON_HOST)
  return value != value ? 0x7fffffffu : host::as_bits(value);  // the NaN that a GPU makes
#else
  return __float_as_uint(value);
#endif
}
RNAS_DEVICE float float_of(uint32_t bits) {
#if defined(RNAS_ON_HOST)
  return host::as_float(bits);
#else
  return __uint_as_float(bits);
#endif
}

template <int kCount> struct Bits {
  uint32_t v[kCount];
};
struct Sums {
  float v[4];
};

// Each lane's floats of a matrix, as two numbers for a tensor core.
template <int kCount> struct Split {
  PerLane<Bits<kCount>> high, low;

  // The first 11 bits, and what is left: rounded, for its further bits will be cut off. What is left of an infinity, a
  // NaN, becomes nothing by that, and a NaN stays one in `high`. So inf * b is infinite, unless nothing is left of b:
  // then it is NaN.
  RNAS_DEVICE void set(int lane, int i, float value) {
    const uint32_t first = bits_of(value) & ~0x1fffu;
    high[lane].v[i] = first;
    low[lane].v[i] = bits_of(value - float_of(first)) + 0x1000u;
  }
};

// sums += left * right.
RNAS_DEVICE void multiply_add(const Warp& warp, PerLane<Sums>& sums, const PerLane<Bits<4>>& left,
                              const PerLane<Bits<2>>& right) {
#if defined(RNAS_ON_HOST)
  float a[16][8], b[8][8];
  warp.each([&](int lane) {
    for (int i = 0; i < 4; ++i) a[left_row(lane, i)][left_column(lane, i)] = float_of(left[lane].v[i] & ~0x1fffu);
    for (int i = 0; i < 2; ++i) b[right_row(lane, i)][right_column(lane)] = float_of(right[lane].v[i] & ~0x1fffu);
  });
  warp.each([&](int lane) {
    for (int i = 0; i < 4; ++i) {
      double sum = sums[lane].v[i];
      for (int k = 0; k < 8; ++k) sum += static_cast<double>(a[sum_row(lane, i)][k]) * b[k][sum_column(lane, i)];
      sums[lane].v[i] = static_cast<float>(sum);
    }
  });
#else
  float(&to)[4] = sums[0].v;
  const uint32_t *a = left[0].v, *b = right[0].v;
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// A block of a product, (16 kTiles, 16), of which each lane has some entries. kTensor: by tensor cores; else in
// float32, one multiplication after the other.
template <int kTiles, bool kTensor> struct Product {
  PerLane<Sums> sums[kTiles][2], rest[kTiles][2];  // rest: of products with a low half, whose sum is small

  RNAS_DEVICE explicit Product(const Warp& warp) {
    warp.each([&](int lane) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[m][n][lane].v[i] = rest[m][n][lane].v[i] = 0.0f;
    });
  }

  // += left(row, k) * right(k, column) for k from `begin` to `end`, by eights: both are asked for the k behind, too.
  template <typename Left, typename Right>
  RNAS_DEVICE void add(const Warp& warp, int begin, int end, const Left& left, const Right& right) {
    if constexpr (!kTensor) return add_exactly(warp, begin, end, left, right);
#pragma unroll 1
    for (int k = begin; k < end; k += 8) {
      Split<2> b[2];
      warp.each([&](int lane) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            b[n].set(lane, i, right(k + right_row(lane, i), n * 8 + right_column(lane)));
      });
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        Split<4> a;
        warp.each([&](int lane) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a.set(lane, i, left(m * 16 + left_row(lane, i), k + left_column(lane, i)));
        });
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          multiply_add(warp, rest[m][n], a.low, b[n].low);
          multiply_add(warp, rest[m][n], a.low, b[n].high);
          multiply_add(warp, rest[m][n], a.high, b[n].low);
          multiply_add(warp, sums[m][n], a.high, b[n].high);
        }
      }
    }
  }

  template <typename Left, typename Right>
  RNAS_DEVICE void add_exactly(const Warp& warp, int begin, int end, const Left& left, const Right& right) {
    warp.each([&](int lane) {
#pragma unroll 1
      for (int k = begin; k < end; ++k)
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              sums[m][n][lane].v[i] += left(m * 16 + sum_row(lane, i), k) * right(k, n * 8 + sum_column(lane, i));
    });
  }

  // take(row, column, its value, that of the next column) for all entries; the columns are even.
  template <typename Take> RNAS_DEVICE void each(const Warp& warp, const Take& take) const {
    warp.each([&](int lane) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; i += 2)
#pragma unroll
          for (int n = 0; n < 2; ++n)
            take(m * 16 + sum_row(lane, i), n * 8 + sum_column(lane, i),
                 sums[m][n][lane].v[i] + rest[m][n][lane].v[i], sums[m][n][lane].v[i + 1] + rest[m][n][lane].v[i + 1]);
    });
  }
};

}  // namespace rnas::cuda
