#pragma once

// What every kernel of the mixed operation is made of: a tile of the output of one stage of a primitive.
//
// A stage is what lies between two norms: ReLU, depthwise and pointwise convolution; ReLU and a dense convolution; a
// pool; or nothing. Its output before the norm is computed anew wherever it is needed and lives in shared memory.
//
// Legend: N images, H W pixels of the output, C channels, V channels of one load (4, or 1 where 4 do not fit), P pixels
// of a tile, T taps; in code, T is the type of an image's elements. Images lie channels last. Everything else, and every
// sum, is float32.

#include "mixed/vector.h"

namespace rnas::cuda::mixed {

// Pixels that one thread computes together.
constexpr int kPixels = 4;

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

  // Row `output`, columns input .. input + V - 1; zeros in a row of another part. kWhole: see whole().
  template <int V, bool kWhole = false> RNAS_DEVICE Vec<V> row(int output, int input) const {
    if constexpr (kWhole) return load_table<V>(weights + output * output_stride + input);
    if (output < first || output >= last) return zeros<V>();
    const float* from = weights + static_cast<int64_t>(output - first) * output_stride + input * input_stride;
    if (input_stride == 1) return load_table<V>(from);
    Vec<V> made;
#pragma unroll
    for (int k = 0; k < V; ++k) made.v[k] = from[k * input_stride];
    return made;
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

// How images of so many pixels fall into tiles, each within one image. tile_width is a multiple of 8.
struct Tiling {
  int batch, height, width, tile_height, tile_width, rows, columns;

  RNAS_BOTH int64_t count() const { return static_cast<int64_t>(batch) * rows * columns; }
  RNAS_BOTH int pixels() const { return tile_height * tile_width; }
};

struct Tile {
  int n, y, x, height, width;  // its image, first pixel, and how many of its pixels lie in the image

  RNAS_DEVICE bool holds(int row, int column) const { return row < height && column < width; }
  RNAS_DEVICE int pixels() const { return height * width; }
};

// The number by which image n of an edge is multiplied. scales: (N) or null.
RNAS_DEVICE float scale_of(const float* scales, int n) { return scales ? scales[n] : 1.0f; }

RNAS_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
RNAS_DEVICE int larger(int a, int b) { return a > b ? a : b; }

RNAS_DEVICE Tile tile_of(const Tiling& tiling, int64_t index) {
  const int column = static_cast<int>(index % tiling.columns);
  const int64_t above = index / tiling.columns;
  const int row = static_cast<int>(above % tiling.rows);
  const int y = row * tiling.tile_height, x = column * tiling.tile_width;
  return {static_cast<int>(above / tiling.rows), y, x, smaller(tiling.tile_height, tiling.height - y),
          smaller(tiling.tile_width, tiling.width - x)};
}

// How a convolution meets its images: as they are, with the norm applied and rectified, or the direction where that would
// be positive.
enum class Way { plain, rectified, tangent };

// V channels of one image, row by row; zero outside of the image. What does not change from pixel to pixel lies in
// registers.
template <int V, Way kHow, typename T> class Rows {
 public:
  static constexpr Way kWay = kHow;

  RNAS_DEVICE Rows(const Image<T>& image, int n, int channel, const float* scale = nullptr,
                   const float* shift = nullptr, const T* direction = nullptr)
      : first_(image.at(n, 0, 0) + channel), height_(image.height), width_(image.width), pixel_(image.pixel),
        normed_(kWay != Way::plain && scale != nullptr), scale_(normed_ ? load<V>(scale + channel) : zeros<V>()),
        shift_(normed_ ? load<V>(shift + channel) : zeros<V>()),
        direction_(kWay == Way::tangent ? direction + (first_ - image.data) : nullptr) {}

  // Row y, null outside of the image.
  RNAS_DEVICE const T* row(int y) const {
    return static_cast<unsigned>(y) < static_cast<unsigned>(height_) ? first_ + static_cast<int64_t>(y) * width_ * pixel_
                                                                    : nullptr;
  }
  RNAS_DEVICE Vec<V> at(const T* row, int x) const {
    if (!holds(row, x)) return zeros<V>();
    Vec<V> value = load<V>(row + x * pixel_);
    if (kWay != Way::plain && normed_)
#pragma unroll
      for (int k = 0; k < V; ++k) value.v[k] = value.v[k] * scale_.v[k] + shift_.v[k];
    if constexpr (kWay == Way::rectified) {
#pragma unroll
      for (int k = 0; k < V; ++k) value.v[k] = rectified(value.v[k]);
    } else if constexpr (kWay == Way::tangent) {
      const Vec<V> along = load<V>(direction_ + (row - first_) + x * pixel_);
#pragma unroll
      for (int k = 0; k < V; ++k)
        value.v[k] = value.v[k] > 0.0f ? (normed_ ? scale_.v[k] * along.v[k] : along.v[k]) : 0.0f;
    }
    return value;
  }
  RNAS_DEVICE Vec<V> at(int y, int x) const { return at(row(y), x); }

  // found[j] = at(row, x + j * step). All loads come before the first use: no thread waits for one after the other.
  template <int kCount> RNAS_DEVICE void load_all(const T* row, int x, int step, Vec<V> (&found)[kCount]) const {
    if constexpr (kWay == Way::tangent) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) found[j] = at(row, x + j * step);
      return;
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      found[j] = holds(row, x + j * step) ? load<V>(row + (x + j * step) * pixel_) : zeros<V>();
    if constexpr (kWay == Way::rectified) {
      if (normed_) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const bool inside = holds(row, x + j * step);  // outside it stays zero
#pragma unroll
          for (int k = 0; k < V; ++k) found[j].v[k] = found[j].v[k] * scale_.v[k] + (inside ? shift_.v[k] : 0.0f);
        }
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j)
#pragma unroll
        for (int k = 0; k < V; ++k) found[j].v[k] = rectified(found[j].v[k]);
    }
  }

 private:
  RNAS_DEVICE bool holds(const T* row, int x) const {
    return row && static_cast<unsigned>(x) < static_cast<unsigned>(width_);
  }

  const T* first_;
  int height_, width_, pixel_;
  bool normed_;
  Vec<V> scale_, shift_;
  const T* direction_;
};

// What enters the convolution of a stage.
template <int V, typename T>
RNAS_DEVICE Rows<V, Way::rectified, T> entering(const Stage<T>& stage, int n, int channel) {
  return {stage.source, n, channel, stage.scale, stage.shift};
}
template <int V, typename T>
RNAS_DEVICE Rows<V, Way::tangent, T> entering(const TangentStage<T>& stage, int n, int channel) {
  return {stage.source, n, channel, stage.scale, stage.shift, stage.direction};
}

// Four outputs of a depthwise convolution in a row, from taps `dilation` apart; neighbouring outputs are kStep taps apart.
// weights: [T][C] in shared memory. (y, x): the first tap of the first output. Two outputs at a time where they share few
// taps, and of a direction: four would need more registers than there are.
template <int V, int kKernel, int kStep, typename From>
RNAS_DEVICE void convolve(const From& from, const float* weights, int channels, bool flipped, int y, int x,
                          int dilation, Vec<V> (&out)[kPixels]) {
  constexpr int kCount = kPixels / (kStep == 2 || From::kWay == Way::tangent ? 2 : 1);
  constexpr int kWindow = kStep * (kCount - 1) + kKernel;
#pragma unroll
  for (int i = 0; i < kPixels; ++i) out[i] = zeros<V>();
#pragma unroll
  for (int begin = 0; begin < kPixels; begin += kCount) {
#pragma unroll 1
    for (int row = 0; row < kKernel; ++row) {
      const auto* line = from.row(y + row * dilation);
      Vec<V> window[kWindow];
      from.load_all(line, x + kStep * begin * dilation, dilation, window);
#pragma unroll
      for (int column = 0; column < kKernel; ++column) {
        const int tap = row * kKernel + column;
        const Vec<V> weight = load<V>(weights + (flipped ? kKernel * kKernel - 1 - tap : tap) * channels);
#pragma unroll
        for (int i = 0; i < kCount; ++i)
#pragma unroll
          for (int k = 0; k < V; ++k) out[begin + i].v[k] += weight.v[k] * window[kStep * i + column].v[k];
      }
    }
  }
}

// Which four pixels of a row of the tile a thread takes: neighbours, or with stride 1 those that share taps.
RNAS_DEVICE int column_of(int group, int pixel, int spacing) {
  return spacing == 1 ? group * kPixels + pixel : group / 2 * (2 * kPixels) + group % 2 + 2 * pixel;
}

// The memory of a block: two tiles [P][stride], and the depthwise weights [T][C] or a place to reduce in.
struct Shared {
  float *inputs, *outputs, *extra;
  int stride;
};

// Floats of a pixel in shared memory: the further 4 put neighbouring groups of pixels into different banks.
RNAS_BOTH int row_stride(int channels) { return channels + 4; }

RNAS_DEVICE Shared shared_of(const Block& block, const Tiling& tiling, int channels) {
  const int stride = row_stride(channels);
  float* memory = block.shared<float>(0);
  return {memory, memory + tiling.pixels() * stride, memory + 2 * tiling.pixels() * stride, stride};
}

// Depthwise weights (C, T) as [T][C] into shared.extra.
template <typename T>
RNAS_DEVICE void load_depthwise(const Block& block, const Shared& shared, const Stage<T>& stage, int channels) {
  const int taps = stage.kernel * stage.kernel;
  block.each([&](int thread) {
    for (int at = thread; at < channels * taps; at += kThreads)
      shared.extra[at % taps * channels + at / taps] = stage.depthwise[at];
  });
}

// put(row, column, channel, value) for all pixels of the tile of a depthwise convolution of from(channel), which gives the
// Rows of channels [channel, channel + V). Needs load_depthwise. One phase.
template <int V, typename T, typename From, typename Put>
RNAS_DEVICE void depthwise_phase(const Block& block, const Shared& shared, const Stage<T>& stage, const Tiling& tiling,
                                 const Tile& tile, int channels, bool flipped, const From& from, const Put& put) {
  const int vectors = channels / V, groups = tiling.tile_width / kPixels;
  const int reach = stage.dilation * (stage.kernel / 2), spacing = stage.stride == 1 ? stage.dilation : 1;
  const bool wide = stage.stride == 2 && stage.dilation == 1;
  block.each([&](int thread) {
    for (int item = thread; item < tiling.tile_height * groups * vectors; item += kThreads) {
      const int channel = item % vectors * V, group = item / vectors % groups, row = item / vectors / groups;
      const int y = (tile.y + row) * stage.stride - reach;
      const int x = (tile.x + column_of(group, 0, spacing)) * stage.stride - reach;
      const auto rows = from(channel);
      const float* weights = shared.extra + channel;
      Vec<V> out[kPixels];
      if (stage.kernel == 3)
        wide ? convolve<V, 3, 2>(rows, weights, channels, flipped, y, x, stage.dilation, out)
             : convolve<V, 3, 1>(rows, weights, channels, flipped, y, x, stage.dilation, out);
      else
        wide ? convolve<V, 5, 2>(rows, weights, channels, flipped, y, x, stage.dilation, out)
             : convolve<V, 5, 1>(rows, weights, channels, flipped, y, x, stage.dilation, out);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) put(row, column_of(group, i, spacing), channel, out[i]);
    }
  });
}

// What the matrix of `part` is applied to, into shared.inputs.
template <int V, typename AStage>
RNAS_DEVICE void make_inputs(const Block& block, const Shared& shared, const AStage& stage, const Part& part,
                             const Tiling& tiling, const Tile& tile, int channels) {
  if (stage.kind == Kind::separable) {
    load_depthwise(block, shared, stage, channels);
    const auto from = [&](int channel) { return entering<V>(stage, tile.n, channel); };
    depthwise_phase<V>(block, shared, stage, tiling, tile, channels, false, from,
                       [&](int row, int column, int channel, const Vec<V>& value) {
                         store<V>(shared.inputs + (row * tiling.tile_width + column) * shared.stride + channel, value);
                       });
    return;
  }
  const int vectors = channels / V;
  block.each([&](int thread) {
    for (int item = thread; item < tiling.pixels() * vectors; item += kThreads) {
      const int channel = item % vectors * V, pixel = item / vectors;
      const int y = (tile.y + pixel / tiling.tile_width) * stage.stride + part.dy;
      const int x = (tile.x + pixel % tiling.tile_width) * stage.stride + part.dx;
      store<V>(shared.inputs + pixel * shared.stride + channel, entering<V>(stage, tile.n, channel).at(y, x));
    }
  });
}

// emit(pixel, channel, value) for every pixel of the tile of `inputs` times the matrix. One phase.
template <int V, bool kWhole, typename Emit>
RNAS_DEVICE void multiply_phase(const Block& block, const Shared& shared, const Part& part, const Tiling& tiling,
                                int channels, const Emit& emit) {
  const int vectors = channels / V;
  block.each([&](int thread) {
    for (int item = thread; item < tiling.pixels() / kPixels * vectors; item += kThreads) {
      const int output = item % vectors * V, pixel = item / vectors * kPixels;
      Vec<V> sum[kPixels];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) sum[i] = zeros<V>();
#pragma unroll 1
      for (int input = 0; input < channels; input += V) {
        Vec<V> from[kPixels];
#pragma unroll
        for (int i = 0; i < kPixels; ++i) from[i] = load<V>(shared.inputs + (pixel + i) * shared.stride + input);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const Vec<V> weights = part.row<V, kWhole>(output + k, input);
#pragma unroll
          for (int i = 0; i < kPixels; ++i)
#pragma unroll
            for (int m = 0; m < V; ++m) sum[i].v[k] += weights.v[m] * from[i].v[m];
        }
      }
#pragma unroll
      for (int i = 0; i < kPixels; ++i) emit(pixel + i, output, sum[i]);
    }
  });
}
template <int V, typename Emit>
RNAS_DEVICE void multiply(const Block& block, const Shared& shared, const Part& part, const Tiling& tiling,
                          int channels, const Emit& emit) {
  part.whole(channels) ? multiply_phase<V, true>(block, shared, part, tiling, channels, emit)
                       : multiply_phase<V, false>(block, shared, part, tiling, channels, emit);
}

struct PoolWindow {
  int top, left, bottom, right;  // the last ones behind the window

  RNAS_DEVICE int pixels() const { return (bottom - top) * (right - left); }
};

// The pixels of the source that pixel (y, x) of a 3x3 pool sees.
template <typename T> RNAS_DEVICE PoolWindow pool_window(const Image<T>& source, int stride, int y, int x) {
  return {larger(0, y * stride - 1), larger(0, x * stride - 1), smaller(source.height, y * stride + 2),
          smaller(source.width, x * stride + 2)};
}

// visit(y, x, V channels) for the pixels of a window, row by row.
template <int V, typename T, typename Visit>
RNAS_DEVICE void each_seen(const Image<T>& source, const PoolWindow& window, int n, int channel, const Visit& visit) {
  for (int y = window.top; y < window.bottom; ++y)
    for (int x = window.left; x < window.right; ++x) visit(y, x, load<V>(source.at(n, y, x) + channel));
}

// Max pool of one pixel: the values.
template <int V, typename T> RNAS_DEVICE Vec<V> max_pool(const Stage<T>& stage, int n, int y, int x, int channel) {
  const PoolWindow window = pool_window(stage.source, stage.stride, y, x);
  Vec<V> best = load<V>(stage.source.at(n, window.top, window.left) + channel);
  each_seen<V>(stage.source, window, n, channel, [&](int, int, const Vec<V>& value) {
#pragma unroll
    for (int k = 0; k < V; ++k) best.v[k] = largest(best.v[k], value.v[k]);
  });
  return best;
}

// Likewise, and which of the nine places holds each (the first of equals, or a NaN).
template <int V, typename T>
RNAS_DEVICE Vec<V> max_pool(const Stage<T>& stage, int n, int y, int x, int channel, int (&winner)[V]) {
  const PoolWindow window = pool_window(stage.source, stage.stride, y, x);
  const int first = (window.top - (y * stage.stride - 1)) * 3 + window.left - (x * stage.stride - 1);
  Vec<V> best = load<V>(stage.source.at(n, window.top, window.left) + channel);
#pragma unroll
  for (int k = 0; k < V; ++k) winner[k] = first;
  each_seen<V>(stage.source, window, n, channel, [&](int at_y, int at_x, const Vec<V>& value) {
    const int place = (at_y - (y * stage.stride - 1)) * 3 + at_x - (x * stage.stride - 1);
#pragma unroll
    for (int k = 0; k < V; ++k)
      if (value.v[k] > best.v[k] || value.v[k] != value.v[k]) {
        best.v[k] = value.v[k];
        winner[k] = place;
      }
  });
  return best;
}

template <int V, typename T> RNAS_DEVICE Vec<V> avg_pool(const Stage<T>& stage, int n, int y, int x, int channel) {
  const PoolWindow window = pool_window(stage.source, stage.stride, y, x);
  Vec<V> sum = zeros<V>();
  each_seen<V>(stage.source, window, n, channel, [&](int, int, const Vec<V>& value) {
#pragma unroll
    for (int k = 0; k < V; ++k) sum.v[k] += value.v[k];
  });
#pragma unroll
  for (int k = 0; k < V; ++k) sum.v[k] /= static_cast<float>(window.pixels());
  return sum;
}

// A stage that is no convolution.
template <int V, typename T> RNAS_DEVICE Vec<V> simple_value(const Stage<T>& stage, int n, int y, int x, int channel) {
  if (stage.kind == Kind::ones) return filled<V>(1.0f);
  if (stage.kind == Kind::identity) return load<V>(stage.source.at(n, y, x) + channel);
  return stage.kind == Kind::max_pool ? max_pool<V>(stage, n, y, x, channel) : avg_pool<V>(stage, n, y, x, channel);
}
template <int V, typename T>
RNAS_DEVICE Vec<V> simple_value(const TangentStage<T>& stage, int n, int y, int x, int channel) {
  if (stage.kind == Kind::ones) return zeros<V>();
  Stage<T> along = stage;
  along.source.data = const_cast<T*>(stage.direction);
  if (stage.kind != Kind::max_pool) return simple_value<V>(along, n, y, x, channel);
  int winner[V];
  max_pool<V>(stage, n, y, x, channel, winner);
  Vec<V> value;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int at_y = y * stage.stride - 1 + winner[k] / 3, at_x = x * stage.stride - 1 + winner[k] % 3;
    value.v[k] = to_float(along.source.at(n, at_y, at_x)[channel + k]);
  }
  return value;
}

// emit(pixel, channel, value, first) for every pixel of the tile of the stage's output: pixels outside of the image
// included, with some finite value. Where a stage has several parts their values add up; `first` marks the first.
template <int V, typename AStage, typename Emit>
RNAS_DEVICE void emit_stage(const Block& block, const Shared& shared, const AStage& stage, const Tiling& tiling,
                            const Tile& tile, int channels, const Emit& emit) {
  if (stage.kind >= Kind::separable) {
    for (int each = 0; each < stage.parts(); ++each) {
      const Part part = part_of(stage, each, channels);
      make_inputs<V>(block, shared, stage, part, tiling, tile, channels);
      multiply<V>(block, shared, part, tiling, channels,
                  [&](int pixel, int channel, const Vec<V>& value) { emit(pixel, channel, value, each == 0); });
    }
    return;
  }
  const int vectors = channels / V;
  block.each([&](int thread) {
    for (int item = thread; item < tiling.pixels() * vectors; item += kThreads) {
      const int channel = item % vectors * V, pixel = item / vectors;
      const int row = pixel / tiling.tile_width, column = pixel % tiling.tile_width;
      Vec<V> value = zeros<V>();
      if (tile.holds(row, column)) value = simple_value<V>(stage, tile.n, tile.y + row, tile.x + column, channel);
      emit(pixel, channel, value, true);
    }
  });
}

// The stage's output into shared.outputs.
template <int V, typename AStage>
RNAS_DEVICE void make_outputs(const Block& block, const Shared& shared, const AStage& stage, const Tiling& tiling,
                              const Tile& tile, int channels) {
  emit_stage<V>(block, shared, stage, tiling, tile, channels,
                [&](int pixel, int channel, const Vec<V>& value, bool first) {
                  float* to = shared.outputs + pixel * shared.stride + channel;
                  first ? store<V>(to, value) : add_to<V>(to, value);
                });
}

// work(row, column, channel) for all pixels of the tile that lie in the image. One phase.
template <int V, typename Work>
RNAS_DEVICE void each_pixel(const Block& block, const Tiling& tiling, const Tile& tile, int channels,
                            const Work& work) {
  const int vectors = channels / V;
  block.each([&](int thread) {
    for (int item = thread; item < tiling.pixels() * vectors; item += kThreads) {
      const int pixel = item / vectors, row = pixel / tiling.tile_width, column = pixel % tiling.tile_width;
      if (tile.holds(row, column)) work(row, column, item % vectors * V);
    }
  });
}

// to[channel] = the sum of value(pixel, channel) over the pixels of the tile that lie in the image. Two phases.
// scratch: kThreads floats of shared memory.
template <typename Value>
RNAS_DEVICE void column_sums(const Block& block, float* scratch, const Tiling& tiling, const Tile& tile, int channels,
                             float* to, const Value& value) {
  for (int begin = 0; begin < channels; begin += kThreads) {
    const int lanes = smaller(channels - begin, kThreads), groups = kThreads / lanes;
    block.each([&](int thread) {
      const int channel = begin + thread % lanes, group = thread / lanes;
      if (group >= groups) return;
      float sum = 0.0f;
      for (int pixel = group; pixel < tile.height * tiling.tile_width; pixel += groups)
        if (pixel % tiling.tile_width < tile.width) sum += value(pixel, channel);
      scratch[thread] = sum;
    });
    block.each([&](int thread) {
      if (thread >= lanes) return;
      float sum = 0.0f;
      for (int group = 0; group < groups; ++group) sum += scratch[group * lanes + thread];
      to[begin + thread] = sum;
    });
  }
}

}  // namespace rnas::cuda::mixed
