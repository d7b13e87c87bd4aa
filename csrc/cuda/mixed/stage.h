#pragma once

// What the kernels of the mixed operation work on: stages of primitives, images, and their tiles.
//
// A stage is what lies between two norms: ReLU, depthwise and pointwise convolution; ReLU and a dense convolution; a
// pool; or nothing. Its output before the norm is computed anew wherever it is needed and lives in shared memory.
//
// Legend: N images, H W pixels of the output, C channels, V channels of one load (4, or 1 where 4 do not fit), P pixels
// of a tile, T taps; in code, T is the type of an image's elements. Images lie channels last. Everything else, and every
// sum, is float32.

#include "mixed/vector.h"

namespace rnas::cuda::mixed {

// Images (N, height, width, channels), of which a pixel begins every `pixel` elements.
template <typename T> struct Image {
  T* data;
  int height, width, pixel;

  RNAS_DEVICE T* at(int n, int y, int x) const {
    return data + ((static_cast<int64_t>(n) * height + y) * width + x) * pixel;
  }
  RNAS_DEVICE bool holds(int y, int x) const { return y >= 0 && x >= 0 && y < height && x < width; }
};

enum class Kind : int { identity, max_pool, avg_pool, ones, separable, dense, reduce };

template <typename T> struct Stage {
  using Element = T;  // of its images
  Kind kind;
  int kernel, dilation, stride;
  Image<T> source;
  const float *scale, *shift;          // (C) of the norm before its ReLU; null: none
  const float *depthwise, *pointwise;  // (C, kernel, kernel); the matrix or matrices behind it

  // Matrices that add up: one per tap of a dense convolution, two of a factorized reduction.
  RNAS_DEVICE int parts() const { return kind == Kind::dense ? kernel * kernel : kind == Kind::reduce ? 2 : 1; }
};

// A stage of the derivative of a cell along a direction, for norms with statistics of their own: linear, and of the source
// only the signs and winners count. direction: that of the source, laid out as the source is.
template <typename T> struct TangentStage : Stage<T> {
  const T* direction;
};

template <typename AStage>
constexpr bool kIsTangent = std::is_same_v<AStage, TangentStage<typename AStage::Element>>;

// Kernels of tangents that need more registers than two blocks of a multiprocessor share.
template <typename AStage> constexpr int kBlocksOf = kIsTangent<AStage> ? 1 : 2;

// A matrix (outputs, inputs) that makes outputs [first, last) from the pixels shifted by (dy, dx).
struct Part {
  const float* weights;
  int first, last, output_stride, input_stride, dy, dx;

  // Row `output`, columns input .. input + V - 1; zeros in a row of another part.
  template <int V> RNAS_DEVICE Vec<V> row(int output, int input) const {
    if (output < first || output >= last) return zeros<V>();
    const float* from = weights + static_cast<int64_t>(output - first) * output_stride + input * input_stride;
    if (input_stride == 1) return load_table<V>(from);
    Vec<V> made;
#pragma unroll
    for (int k = 0; k < V; ++k) made.v[k] = from[k * input_stride];
    return made;
  }
  // One entry. kWhole: see whole().
  template <bool kWhole> RNAS_DEVICE float entry(int output, int input) const {
    if constexpr (kWhole) return load_table<1>(weights + static_cast<unsigned>(output * output_stride + input)).v[0];
    if (output < first || output >= last) return 0.0f;
    return load_table<1>(weights + static_cast<unsigned>((output - first) * output_stride + input * input_stride)).v[0];
  }
  // Whether it makes every output, from rows that lie in one piece: a 1x1 convolution. Then a product asks no further.
  RNAS_DEVICE bool whole(int channels) const { return first == 0 && last == channels && input_stride == 1; }
  // Where the entry lies in the array of all parts.
  template <typename T> RNAS_DEVICE int64_t index(const Stage<T>& stage, int output, int input) const {
    return weights - stage.pointwise + static_cast<int64_t>(output - first) * output_stride + input * input_stride;
  }
};

template <typename T> RNAS_DEVICE Part part_of(const Stage<T>& stage, int part, int channels) {
  const int taps = stage.kernel * stage.kernel;
  if (stage.kind == Kind::dense)
    return {stage.pointwise + part, 0, channels, channels * taps, taps, part / stage.kernel - stage.kernel / 2,
            part % stage.kernel - stage.kernel / 2};
  if (stage.kind == Kind::reduce) {
    const int even = channels - channels / 2;
    if (part == 0) return {stage.pointwise, 0, even, channels, 1, 0, 0};
    return {stage.pointwise + static_cast<int64_t>(even) * channels, even, channels, channels, 1, 1, 1};
  }
  return {stage.pointwise, 0, channels, channels, 1, 0, 0};
}

// a / b for 0 <= a < 2^19 and b > 0, in a third of the instructions: the half keeps it further away from where it is
// cut off than it errs.
RNAS_DEVICE int quotient(int a, int b) {
  float inverse;
#if defined(RNAS_ON_HOST)
  inverse = 1.0f / static_cast<float>(b);
#else
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(static_cast<float>(b)));
#endif
  return static_cast<int>((static_cast<float>(a) + 0.5f) * inverse);
}

// How images of so many pixels fall into tiles, each within one image. tile_width is 8 or 16.
struct Tiling {
  int batch, height, width, tile_height, tile_width, rows, columns;
  int window;  // floats of shared memory for what a depthwise convolution reads

  RNAS_BOTH int64_t count() const { return static_cast<int64_t>(batch) * rows * columns; }
  RNAS_BOTH int pixels() const { return tile_height * tile_width; }
  // Of a pixel of a tile.
  RNAS_DEVICE int row_of(int pixel) const { return pixel >> (2 + tile_width / 8); }
  RNAS_DEVICE int column_of(int pixel) const { return pixel & (tile_width - 1); }
};

// The channels and the pixel of an item of a phase that goes through the pixels of a tile, V channels at once.
struct Spot {
  int channel, pixel, row, column;
};
template <int V> RNAS_DEVICE Spot spot_of(const Tiling& tiling, int vectors, int item) {
  const int pixel = quotient(item, vectors);
  return {(item - pixel * vectors) * V, pixel, tiling.row_of(pixel), tiling.column_of(pixel)};
}

struct Tile {
  int n, y, x, height, width;  // its image, first pixel, and how many of its pixels lie in the image

  RNAS_DEVICE bool holds(int row, int column) const { return row < height && column < width; }
  RNAS_DEVICE int pixels() const { return height * width; }
};

// The number by which image n of an edge is multiplied. scales: (N) or null.
RNAS_DEVICE float scale_of(const float* scales, int n) { return scales ? scales[n] : 1.0f; }

RNAS_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
RNAS_DEVICE int larger(int a, int b) { return a > b ? a : b; }

// Tile `index`, which a grid can count: below 2^31.
RNAS_DEVICE Tile tile_of(const Tiling& tiling, int64_t index) {
  const int at = static_cast<int>(index), above = at / tiling.columns, n = above / tiling.rows;
  const int y = (above - n * tiling.rows) * tiling.tile_height, x = (at - above * tiling.columns) * tiling.tile_width;
  return {n, y, x, smaller(tiling.tile_height, tiling.height - y),
          smaller(tiling.tile_width, tiling.width - x)};
}

// How a convolution meets its images: as they are, with the norm applied and rectified, or the direction where that would
// be positive.
enum class Way { plain, rectified, tangent };

// V channels of one image; zero outside of it. What does not change from pixel to pixel lies in registers.
template <int V, Way kHow, typename T> class Reader {
 public:
  RNAS_DEVICE Reader(const Image<T>& image, int n, int channel, const float* scale = nullptr,
                     const float* shift = nullptr, const T* direction = nullptr)
      : first_(image.at(n, 0, 0) + channel), height_(image.height), width_(image.width), pixel_(image.pixel),
        line_(image.width * image.pixel),
        normed_(kHow != Way::plain && scale != nullptr), scale_(normed_ ? load<V>(scale + channel) : zeros<V>()),
        shift_(normed_ ? load<V>(shift + channel) : zeros<V>()),
        direction_(kHow == Way::tangent ? direction + (first_ - image.data) : nullptr) {}

  // What is loaded of a pixel, and what it becomes: apart, so that many loads can come before the first use.
  struct Raw {
    Vec<V> value, along;  // along: of a tangent
    bool inside;
  };
  // A column of the image. Where there is none, all its pixels lie outside.
  struct Column {
    int first, height;
  };
  RNAS_DEVICE Column column(int x) const {
    return {x * pixel_, static_cast<unsigned>(x) < static_cast<unsigned>(width_) ? height_ : 0};
  }
  RNAS_DEVICE Raw read(const Column& column, int y) const {
    Raw raw;
    raw.inside = static_cast<unsigned>(y) < static_cast<unsigned>(column.height);
    const int at = y * line_ + column.first;
    raw.value = raw.inside ? load<V>(first_ + at) : zeros<V>();
    if constexpr (kHow == Way::tangent) raw.along = raw.inside ? load<V>(direction_ + at) : zeros<V>();
    return raw;
  }
  RNAS_DEVICE Vec<V> made(const Raw& raw) const {
    Vec<V> value = raw.value;
    if constexpr (kHow == Way::plain) return value;
    if (normed_)
#pragma unroll
      for (int k = 0; k < V; ++k) value.v[k] = value.v[k] * scale_.v[k] + (raw.inside ? shift_.v[k] : 0.0f);
#pragma unroll
    for (int k = 0; k < V; ++k)
      if constexpr (kHow == Way::rectified)
        value.v[k] = rectified(value.v[k]);
      else if constexpr (kHow == Way::tangent)
        value.v[k] = value.v[k] > 0.0f ? (normed_ ? scale_.v[k] * raw.along.v[k] : raw.along.v[k]) : 0.0f;
    return value;
  }
  RNAS_DEVICE Vec<V> at(int y, int x) const { return made(read(column(x), y)); }

 private:
  const T* first_;
  int height_, width_, pixel_, line_;
  bool normed_;
  Vec<V> scale_, shift_;
  const T* direction_;
};

// What enters the convolution of a stage.
template <int V, typename T>
RNAS_DEVICE Reader<V, Way::rectified, T> entering(const Stage<T>& stage, int n, int channel) {
  return {stage.source, n, channel, stage.scale, stage.shift};
}
template <int V, typename T>
RNAS_DEVICE Reader<V, Way::tangent, T> entering(const TangentStage<T>& stage, int n, int channel) {
  return {stage.source, n, channel, stage.scale, stage.shift, stage.direction};
}

// The memory of a block: a place to reduce in, and for depthwise weights; two tiles [P][stride]; and the window of a
// depthwise convolution, which takes the place of the outputs unless that is to lie apart: the outputs come later.
struct Shared {
  float *extra, *inputs, *outputs, *window;
  int stride;
};

constexpr int kExtra = kThreads * 8;

// Floats of a pixel in shared memory: the further 4 put neighbouring groups of pixels into different banks.
RNAS_BOTH int row_stride(int channels) { return channels + 4; }

// Floats of one tile.
RNAS_BOTH int tile_floats(const Tiling& tiling, int channels) { return tiling.pixels() * row_stride(channels); }

RNAS_DEVICE Shared shared_of(const Block& block, const Tiling& tiling, int channels, bool apart = false) {
  const int tile = tile_floats(tiling, channels);
  float* memory = block.shared<float>(0);
  float *inputs = memory + kExtra, *outputs = inputs + tile;
  return {memory, inputs, outputs, apart ? outputs + tile : outputs, row_stride(channels)};
}

}  // namespace rnas::cuda::mixed
