#pragma once

// The inner loops: depthwise and pointwise convolutions, their transposes and their weight gradients, on one image.
//
// Layout, everywhere inside the mixed operation: channels in groups of kLanes, [group][row][column][lane]. A tile is one
// image in that layout with a halo of zeros around each group's plane, so that no loop knows borders. Pointers to a tile
// point at pixel (0, 0) of its first group; `row` and `plane` are the distances, in floats, of rows and groups.

#include "mixed/vector.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

constexpr int64_t half_width(int kernel, int dilation) { return (kernel - 1) * dilation / 2; }

// ---- depthwise -------------------------------------------------------------------------------------------------------

// P pixels of Rows rows: out[p] (+)= sum over taps of in[p * Stride + tap] * w[tap]. `in` points at the first tap.
template <int Kernel, int Dilation, int Stride, int P, int Rows, bool Add>
RNAS_INLINE void depthwise_block(const float* in, int64_t row, const float* w, float* out, int64_t out_row) {
  Vector sum[Rows][P];
#pragma GCC unroll 2
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[r][p] = Add ? load(out + r * out_row + p * kLanes) : zero();
  if constexpr (Rows > 1) {
    static_assert(Stride == 1 && Dilation == 1, "else the rows share nothing");
    constexpr int kColumns = P + Kernel - 1, kLast = Kernel + Rows - 2;
#pragma GCC unroll 16
    for (int y = 0; y <= kLast; ++y) {
      const float* from = opaque(in + y * row);
      Vector x[kColumns];
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) x[c] = load(from + c * kLanes);
#pragma GCC unroll 2
      for (int r = 0; r < Rows; ++r) {
        if (y < r || y - r >= Kernel) continue;
#pragma GCC unroll 5
        for (int kx = 0; kx < Kernel; ++kx) {
          const Vector tap = load(w + ((y - r) * Kernel + kx) * kLanes);
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) sum[r][p] = fma(x[p + kx], tap, sum[r][p]);
        }
      }
    }
  } else {
#pragma GCC unroll 5
    for (int ky = 0; ky < Kernel; ++ky) {
      const float* from = opaque(in + ky * Dilation * row);
      if constexpr (Stride == 1) {
        constexpr int kColumns = P + (Kernel - 1) * Dilation;
        Vector x[kColumns];
#pragma GCC unroll 16
        for (int c = 0; c < kColumns; ++c) x[c] = held(load(from + c * kLanes));
#pragma GCC unroll 5
        for (int kx = 0; kx < Kernel; ++kx) {
          const Vector tap = load(w + (ky * Kernel + kx) * kLanes);
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) sum[0][p] = fma(x[p + kx * Dilation], tap, sum[0][p]);
        }
      } else {
        // A tap meets columns of one parity: first the even ones, then the odd ones, each loaded once.
        static_assert(Stride == 2);
        constexpr int kColumns = P + (Kernel - 1) * Dilation / 2;
#pragma GCC unroll 2
        for (int parity = 0; parity < (Dilation == 1 ? 2 : 1); ++parity) {
          Vector x[kColumns];
#pragma GCC unroll 16
          for (int c = 0; c < kColumns - parity; ++c) x[c] = held(load(from + (2 * c + parity) * kLanes));
#pragma GCC unroll 5
          for (int kx = 0; kx < Kernel; ++kx) {
            if ((kx * Dilation - parity) % 2 != 0) continue;
            const Vector tap = load(w + (ky * Kernel + kx) * kLanes);
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) sum[0][p] = fma(x[p + kx * Dilation / 2], tap, sum[0][p]);
          }
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) store(out + r * out_row + p * kLanes, sum[r][p]);
}

template <int Kernel, int Dilation, int Stride, int Rows, bool Add>
RNAS_INLINE void depthwise_row(const float* in, int64_t row, const float* w, float* out, int64_t out_row,
                               int64_t width) {
  int64_t x = 0;
  for (; x + kBlock <= width; x += kBlock)
    depthwise_block<Kernel, Dilation, Stride, kBlock, Rows, Add>(in + x * Stride * kLanes, row, w, out + x * kLanes,
                                                                 out_row);
  if constexpr (kBlock == 8)
    if (x + 4 <= width) {
      depthwise_block<Kernel, Dilation, Stride, 4, Rows, Add>(in + x * Stride * kLanes, row, w, out + x * kLanes,
                                                              out_row);
      x += 4;
    }
  for (; x < width; ++x)
    depthwise_block<Kernel, Dilation, Stride, 1, Rows, Add>(in + x * Stride * kLanes, row, w, out + x * kLanes,
                                                            out_row);
}

// `rows` output rows of one group, two at a time where a row alone would have too little arithmetic for its loads.
template <int Kernel, int Dilation, int Stride, bool Add>
void depthwise_rows(const float* in, int64_t row, const float* w, float* out, int64_t out_row, int64_t width,
                    int64_t rows) {
  constexpr bool kPairs = Kernel == 3 && Dilation == 1 && Stride == 1;
  int64_t r = 0;
  if constexpr (kPairs)
    for (; r + 2 <= rows; r += 2)
      depthwise_row<Kernel, Dilation, Stride, 2, Add>(in + r * row, row, w, out + r * out_row, out_row, width);
  for (; r < rows; ++r)
    depthwise_row<Kernel, Dilation, Stride, 1, Add>(in + r * Stride * row, row, w, out + r * out_row, out_row, width);
}

template <int N> struct Size {
  static constexpr int value = N;
};

// Row i of the input's gradient for stride 2: out[j] += sum over the taps that reach (i, j). `g` points at pixel (0, 0)
// of the gradient's tile. Only taps of one parity reach a pixel, so the columns go in two interleaved runs.
template <int Kernel, int Dilation>
void depthwise_transposed_row(const float* g, int64_t row, const float* w, float* out, int64_t i, int64_t width) {
  constexpr int64_t half = half_width(Kernel, Dilation);
  for (int64_t parity = 0; parity < 2; ++parity) {
    const int64_t count = (width - parity + 1) / 2;
    const auto block = [&](int64_t b, auto size) {
      constexpr int P = decltype(size)::value;
      Vector sum[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sum[p] = load(out + (2 * (b + p) + parity) * kLanes);
      for (int ky = 0; ky < Kernel; ++ky) {
        const int64_t t = i + half - ky * Dilation;
        if (t & 1) continue;
        const float* r = g + (t >> 1) * row + b * kLanes;
        for (int kx = 0; kx < Kernel; ++kx) {
          const int64_t u = parity + half - kx * Dilation;
          if (u & 1) continue;
          const Vector tap = load(w + (ky * Kernel + kx) * kLanes);
          const float* c = r + (u >> 1) * kLanes;
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) sum[p] = fma(load(c + p * kLanes), tap, sum[p]);
        }
      }
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) store(out + (2 * (b + p) + parity) * kLanes, sum[p]);
    };
    int64_t b = 0;
    for (; b + kBlock <= count; b += kBlock) block(b, Size<kBlock>());
    for (; b < count; ++b) block(b, Size<1>());
  }
}

// Weight gradient of the taps in rows [First, First + Rows) of the kernel, of one group over a whole image:
// acc[tap] += sum over pixels of in[pixel * Stride + tap] * g[pixel].
template <int Kernel, int Dilation, int Stride, int First, int Rows>
void depthwise_weight_rows(const float* in, int64_t in_row, const float* g, int64_t g_row, int64_t height,
                           int64_t width, float* acc) {
  Vector sum[Rows][Kernel];
#pragma GCC unroll 5
  for (int ky = 0; ky < Rows; ++ky)
#pragma GCC unroll 5
    for (int kx = 0; kx < Kernel; ++kx) sum[ky][kx] = load(acc + ((First + ky) * Kernel + kx) * kLanes);
  for (int64_t y = 0; y < height; ++y) {
    const float* gy = g + y * g_row;
    const float* iy = in + (y * Stride + First * Dilation) * in_row;
    int64_t x = 0;
    for (; x + 4 <= width; x += 4) {
      Vector gx[4];
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) gx[p] = load(gy + (x + p) * kLanes);
#pragma GCC unroll 5
      for (int ky = 0; ky < Rows; ++ky) {
        const float* r = iy + ky * Dilation * in_row + x * Stride * kLanes;
        if constexpr (Stride == 1) {
          constexpr int kColumns = 4 + (Kernel - 1) * Dilation;
          Vector v[kColumns];
#pragma GCC unroll 12
          for (int c = 0; c < kColumns; ++c) v[c] = load(r + c * kLanes);
#pragma GCC unroll 4
          for (int p = 0; p < 4; ++p)
#pragma GCC unroll 5
            for (int kx = 0; kx < Kernel; ++kx) sum[ky][kx] = fma(v[p + kx * Dilation], gx[p], sum[ky][kx]);
        } else {
#pragma GCC unroll 4
          for (int p = 0; p < 4; ++p)
#pragma GCC unroll 5
            for (int kx = 0; kx < Kernel; ++kx)
              sum[ky][kx] = fma(load(r + (p * Stride + kx * Dilation) * kLanes), gx[p], sum[ky][kx]);
        }
      }
    }
    for (; x < width; ++x) {
      const Vector one = load(gy + x * kLanes);
#pragma GCC unroll 5
      for (int ky = 0; ky < Rows; ++ky)
#pragma GCC unroll 5
        for (int kx = 0; kx < Kernel; ++kx) {
          const float* at = iy + ky * Dilation * in_row + (x * Stride + kx * Dilation) * kLanes;
          sum[ky][kx] = fma(load(at), one, sum[ky][kx]);
        }
    }
  }
#pragma GCC unroll 5
  for (int ky = 0; ky < Rows; ++ky)
#pragma GCC unroll 5
    for (int kx = 0; kx < Kernel; ++kx) store(acc + ((First + ky) * Kernel + kx) * kLanes, sum[ky][kx]);
}

// As above for all taps. The rows of a 5x5 kernel are split so that sums, pixels and gradients fit the registers.
template <int Kernel, int Dilation, int Stride>
void depthwise_weight(const float* in, int64_t in_row, const float* g, int64_t g_row, int64_t height, int64_t width,
                      float* acc) {
  if constexpr (Kernel == 3) {
    depthwise_weight_rows<3, Dilation, Stride, 0, 3>(in, in_row, g, g_row, height, width, acc);
  } else if constexpr (Dilation == 1) {
    depthwise_weight_rows<5, 1, Stride, 0, 3>(in, in_row, g, g_row, height, width, acc);
    depthwise_weight_rows<5, 1, Stride, 3, 2>(in, in_row, g, g_row, height, width, acc);
  } else {
    depthwise_weight_rows<5, Dilation, Stride, 0, 2>(in, in_row, g, g_row, height, width, acc);
    depthwise_weight_rows<5, Dilation, Stride, 2, 2>(in, in_row, g, g_row, height, width, acc);
    depthwise_weight_rows<5, Dilation, Stride, 4, 1>(in, in_row, g, g_row, height, width, acc);
  }
}

// The loops of one kernel size, dilation and stride.
struct Depthwise {
  using Rows = void (*)(const float* in, int64_t row, const float* w, float* out, int64_t out_row, int64_t width,
                        int64_t rows);
  Rows forward;
  // Stride 1: the forward loop on the flipped kernel, writing or adding. Null for stride 2.
  Rows backward_set, backward_add;
  // Stride 2, adding.
  void (*transposed)(const float* g, int64_t row, const float* w, float* out, int64_t i, int64_t width);
  void (*weight)(const float* in, int64_t in_row, const float* g, int64_t g_row, int64_t height, int64_t width,
                 float* acc);
};

template <int Kernel, int Dilation> Depthwise depthwise_loops(int stride) {
  if (stride == 1)
    return {depthwise_rows<Kernel, Dilation, 1, false>, depthwise_rows<Kernel, Dilation, 1, false>,
            depthwise_rows<Kernel, Dilation, 1, true>, nullptr, depthwise_weight<Kernel, Dilation, 1>};
  return {depthwise_rows<Kernel, Dilation, 2, false>, nullptr, nullptr, depthwise_transposed_row<Kernel, Dilation>,
          depthwise_weight<Kernel, Dilation, 2>};
}

inline Depthwise depthwise_loops(int kernel, int dilation, int stride) {
  if (kernel == 3) return dilation == 1 ? depthwise_loops<3, 1>(stride) : depthwise_loops<3, 2>(stride);
  return dilation == 1 ? depthwise_loops<5, 1>(stride) : depthwise_loops<5, 2>(stride);
}

// ---- memory ahead -----------------------------------------------------------------------------------------------------

// What will be needed soon, fetched line by line from within the pointwise loops: they leave the load units idle, and a
// burst of fetches would not (it gained nothing where this took a tenth to a quarter off).
class Ahead {
 public:
  void clear() {
    count_ = next_ = 0;
    at_ = end_ = idle_;
    step_ = 0;
  }
  // `lines` lines that are `step` bytes apart.
  void add(const void* data, int64_t lines, int64_t step = 64) {
    if (count_ == kMost || lines <= 0) return;
    segments_[count_++] = {static_cast<const char*>(data), lines * step, step};
    if (step_ == 0) turn();
  }
  // The address of the next line, its step and, once they were fetched, the way on.
  const char* at() const { return at_; }
  int64_t step() const { return step_; }
  void fetched(const char* at) {
    at_ = at;
    if (at_ >= end_ && step_ > 0) turn();
  }

 private:
  static constexpr int kMost = 32;
  void turn() {
    if (next_ == count_) {
      at_ = end_ = idle_;
      step_ = 0;
      return;
    }
    at_ = segments_[next_].data;
    end_ = at_ + segments_[next_].bytes;
    step_ = segments_[next_].step;
    ++next_;
  }
  struct Segment {
    const char* data;
    int64_t bytes, step;
  };
  Segment segments_[kMost];
  char idle_[64];
  int count_ = 0, next_ = 0;
  const char *at_ = idle_, *end_ = idle_;
  int64_t step_ = 0;
};

// ---- pointwise -------------------------------------------------------------------------------------------------------

// P pixels by Groups groups of outputs: y (+)= sum over input channels of d[channel] * w[channel][output].
template <int Groups, int P, bool Add>
RNAS_INLINE void pointwise_block(const float* d, int64_t d_plane, int64_t groups_in, const float* w, int64_t w_row,
                                 float* y, int64_t y_plane, Ahead& ahead) {
  const char* next = ahead.at();
  const int64_t step = ahead.step();
  Vector sum[Groups][P];
#pragma GCC unroll 4
  for (int v = 0; v < Groups; ++v)
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) sum[v][p] = Add ? load(y + v * y_plane + p * kLanes) : zero();
  for (int64_t group = 0; group < groups_in; ++group) {
    const float* at = d + group * d_plane;
#pragma GCC unroll 4
    for (int lane = 0; lane < kLanes; ++lane, w += w_row) {
      if constexpr (P >= 8) {
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + step, 0, 2);
        next += 2 * step;
      }
      Vector column[Groups];
#pragma GCC unroll 4
      for (int v = 0; v < Groups; ++v) column[v] = load(w + v * kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const Vector x = set(at[p * kLanes + lane]);
#pragma GCC unroll 4
        for (int v = 0; v < Groups; ++v) sum[v][p] = fma(x, column[v], sum[v][p]);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < Groups; ++v)
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) store(y + v * y_plane + p * kLanes, sum[v][p]);
  if constexpr (P >= 8) ahead.fetched(next);
}

template <int Groups, bool Add>
void pointwise_groups(const float* d, int64_t d_plane, int64_t groups_in, const float* w, int64_t w_row, float* y,
                      int64_t y_plane, int64_t pixels, Ahead& ahead) {
  constexpr int kWide = Groups == 1 ? 2 * kBlock : kBlock;
  int64_t p = 0;
  for (; p + kWide <= pixels; p += kWide)
    pointwise_block<Groups, kWide, Add>(d + p * kLanes, d_plane, groups_in, w, w_row, y + p * kLanes, y_plane,
                                  ahead);
  if constexpr (kWide == 16)
    if (p + 8 <= pixels) {
      pointwise_block<Groups, 8, Add>(d + p * kLanes, d_plane, groups_in, w, w_row, y + p * kLanes, y_plane,
                                  ahead);
      p += 8;
    }
  if constexpr (kWide >= 8)
    if (p + 4 <= pixels) {
      pointwise_block<Groups, 4, Add>(d + p * kLanes, d_plane, groups_in, w, w_row, y + p * kLanes, y_plane,
                                  ahead);
      p += 4;
    }
  for (; p < pixels; ++p)
    pointwise_block<Groups, 1, Add>(d + p * kLanes, d_plane, groups_in, w, w_row, y + p * kLanes, y_plane,
                                  ahead);
}

// y[output] (+)= sum over inputs of d[input] * w[input][output] for a run of pixels that is dense in each plane.
// w (groups_in * kLanes, groups_out * kLanes), its rows w_row apart.
template <bool Add>
void pointwise(const float* d, int64_t d_plane, int64_t groups_in, const float* w, int64_t w_row, int64_t groups_out,
               float* y, int64_t y_plane, int64_t pixels, Ahead& ahead) {
  int64_t v = 0;
  for (; v + 2 <= groups_out; v += 2)
    pointwise_groups<2, Add>(d, d_plane, groups_in, w + v * kLanes, w_row, y + v * y_plane, y_plane, pixels, ahead);
  if (v < groups_out)
    pointwise_groups<1, Add>(d, d_plane, groups_in, w + v * kLanes, w_row, y + v * y_plane, y_plane, pixels, ahead);
}

// Channels inputs by Groups groups of outputs: acc[input][output] += sum over pixels of d[input] * g[output]. Fetches: the
// sums at `next`, unless that is null, will follow.
template <int Groups, int Channels, bool Fetches>
RNAS_INLINE void pointwise_weight_block(const float* d, const float* g, int64_t g_plane, int64_t pixels, float* acc,
                                        int64_t acc_row, const float* next) {
  if (Fetches && next)
#pragma GCC unroll 16
    for (int c = 0; c < Channels; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < Groups; ++v) __builtin_prefetch(next + c * acc_row + v * kLanes, 1, 3);
  Vector sum[Channels][Groups];
#pragma GCC unroll 16
  for (int c = 0; c < Channels; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < Groups; ++v) sum[c][v] = load(acc + c * acc_row + v * kLanes);
  for (int64_t p = 0; p < pixels; ++p, d += kLanes, g += kLanes) {
    Vector column[Groups];
#pragma GCC unroll 4
    for (int v = 0; v < Groups; ++v) column[v] = load(g + v * g_plane);
#pragma GCC unroll 16
    for (int c = 0; c < Channels; ++c) {
      const Vector x = set(d[c]);
#pragma GCC unroll 4
      for (int v = 0; v < Groups; ++v) sum[c][v] = fma(x, column[v], sum[c][v]);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < Channels; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < Groups; ++v) store(acc + c * acc_row + v * kLanes, sum[c][v]);
}

// acc (groups_in * kLanes, groups_out * kLanes) += sum over pixels of the outer product of d and g. Its rows are `row`
// apart.
template <bool Fetches>
void pointwise_weight_groups(const float* d, int64_t d_plane, int64_t groups_in, const float* g, int64_t g_plane,
                             int64_t groups_out, int64_t pixels, float* acc, int64_t row) {
  for (int64_t group = 0; group < groups_in; ++group) {
    int64_t v = 0;
    for (; v + 2 <= groups_out; v += 2)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t lane = half * (kLanes / 2);
        float* const sums = acc + (group * kLanes + lane) * row + v * kLanes;
        const float* const next = half == 0 ? sums + kLanes / 2 * row : sums + 2 * kLanes - kLanes / 2 * row;
        pointwise_weight_block<2, kLanes / 2, Fetches>(d + group * d_plane + lane, g + v * g_plane, g_plane, pixels, sums,
                                                       row, next);
      }
    if (v < groups_out)
      pointwise_weight_block<1, kLanes, Fetches>(d + group * d_plane, g + v * g_plane, g_plane, pixels,
                                                 acc + group * kLanes * row + v * kLanes, row, nullptr);
  }
}

// The same. Of many groups, sums for which there are but few pixels are fetched a block ahead (at the positions of
// Winograd's windows, 64 channels: 1.1x to 1.2x; nothing at 32).
inline void pointwise_weight(const float* d, int64_t d_plane, int64_t groups_in, const float* g, int64_t g_plane,
                             int64_t groups_out, int64_t pixels, float* acc, int64_t row) {
  const auto add = groups_out > 2 ? pointwise_weight_groups<true> : pointwise_weight_groups<false>;
  add(d, d_plane, groups_in, g, g_plane, groups_out, pixels, acc, row);
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
