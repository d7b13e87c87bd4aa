#pragma once

// A tile of the output of one stage, from its source: what most kernels of the mixed operation begin with.

#include "matrix.h"
#include "mixed/depthwise.h"

namespace rnas::cuda::mixed {

// Channels side by side that a lane has of a product.
template <int V> constexpr int kPair = V == 1 ? 1 : 2;
// Whether tensor cores make it. With a single channel, the gradient of a matrix in front of a norm is what rounding
// leaves, and should not be larger than in float32.
template <int V> constexpr bool kByTensor = V > 1;

// emit(pixel, column, kPair<V> values) for (pixels, channels) times (channels, channels), of left(pixel, k) and
// right(k, column). One phase.
template <int V, typename Left, typename Right, typename Emit>
RNAS_DEVICE void multiply_matrices(const Block& block, int pixels, int channels, const Left& left, const Right& right,
                                   const Emit& emit) {
  constexpr int kTiles = 2, kRows = 16 * kTiles, kColumns = 16;
  const int across = (channels + kColumns - 1) / kColumns, items = (pixels + kRows - 1) / kRows * across;
  block.each_warp([&](const Warp& warp) {
    for (int item = warp.number; item < items; item += kWarps) {
      const int line = quotient(item, across), pixel = line * kRows, column = (item - line * across) * kColumns;
      Product<kTiles, kByTensor<V>> product(warp);
      // What comes of rows and columns that are none is not emitted; of a k that is none, zeros are to come.
      product.add(
          warp, 0, channels,
          [&](int i, int k) { return k < channels ? left(smaller(pixel + i, pixels - 1), k) : 0.0f; },
          [&](int k, int j) { return k < channels ? right(k, smaller(column + j, channels - 1)) : 0.0f; });
      product.each(warp, [&](int i, int j, float value, float next) {
        if (pixel + i >= pixels || column + j >= channels) return;
        if constexpr (kPair<V> == 2) {
          emit(pixel + i, column + j, Vec<2>{{value, next}});
        } else {
          emit(pixel + i, column + j, Vec<1>{{value}});
          if (column + j + 1 < channels) emit(pixel + i, column + j + 1, Vec<1>{{next}});
        }
      });
    }
  });
}

// What the matrix of `part` is applied to, into shared.inputs.
template <int V, typename AStage>
RNAS_DEVICE void make_inputs(const Block& block, const Shared& shared, const AStage& stage, const Part& part,
                             const Tiling& tiling, const Tile& tile, int channels) {
  if (stage.kind == Kind::separable) {
    convolve<V>(block, shared, stage, tiling, tile, channels, Turn::none, Sum::overwrite,
                [&](int channel) { return entering<V>(stage, tile.n, channel); });
    return;
  }
  const int vectors = channels / V;
  block.each([&](int thread) {
    for (int item = thread; item < tiling.pixels() * vectors; item += kThreads) {
      const Spot spot = spot_of<V>(tiling, vectors, item);
      const int y = (tile.y + spot.row) * stage.stride + part.dy, x = (tile.x + spot.column) * stage.stride + part.dx;
      store<V>(shared.inputs + spot.pixel * shared.stride + spot.channel,
               entering<V>(stage, tile.n, spot.channel).at(y, x));
    }
  });
}

// emit(pixel, channel, value) for every pixel of the tile of `inputs` times the matrix, where kPair<V> channels lie in
// the value. One phase.
template <int V, bool kWhole, typename Emit>
RNAS_DEVICE void multiply(const Block& block, const Shared& shared, const Part& part, const Tiling& tiling,
                          int channels, const Emit& emit) {
  multiply_matrices<V>(
      block, tiling.pixels(), channels,
      [&](int pixel, int input) { return shared.inputs[pixel * shared.stride + input]; },
      [&](int input, int output) { return part.entry<kWhole>(output, input); }, emit);
}

// The pixels of an axis of `size` that a pool of 3 sees around `middle`.
RNAS_DEVICE int seen(int middle, int size) { return 1 + (middle > 0) + (middle + 1 < size); }

// How many pixels of the source pixel (y, x) of a 3x3 pool sees.
template <typename T> RNAS_DEVICE int pool_count(const Stage<T>& stage, int y, int x) {
  return seen(y * stage.stride, stage.source.height) * seen(x * stage.stride, stage.source.width);
}

// visit(place, V channels) for the nine places of a 3x3 pool at pixel (y, x), row by row. Outside of the image all
// channels are `outside`.
template <int V, typename T, typename Visit>
RNAS_DEVICE void each_place(const Stage<T>& stage, int n, int y, int x, int channel, float outside,
                            const Visit& visit) {
  const Image<T>& source = stage.source;
  const int middle_y = y * stage.stride, middle_x = x * stage.stride;
  const bool rows[3] = {middle_y > 0, true, middle_y + 1 < source.height};
  const bool columns[3] = {middle_x > 0, true, middle_x + 1 < source.width};
  const T* middle = source.at(n, middle_y, middle_x) + channel;
#pragma unroll
  for (int row = 0; row < 3; ++row)
#pragma unroll
    for (int column = 0; column < 3; ++column) {
      const T* from = middle + ((row - 1) * source.width + column - 1) * source.pixel;
      visit(row * 3 + column, rows[row] && columns[column] ? load<V>(from) : filled<V>(outside));
    }
}

// Max pool of one pixel: the values.
template <int V, typename T> RNAS_DEVICE Vec<V> max_pool(const Stage<T>& stage, int n, int y, int x, int channel) {
  Vec<V> best = filled<V>(-INFINITY);
  each_place<V>(stage, n, y, x, channel, -INFINITY, [&](int, const Vec<V>& value) {
#pragma unroll
    for (int k = 0; k < V; ++k) best.v[k] = largest(best.v[k], value.v[k]);
  });
  return best;
}

// Likewise, and which of the nine places holds each (the first of equals, or a NaN).
template <int V, typename T>
RNAS_DEVICE Vec<V> max_pool(const Stage<T>& stage, int n, int y, int x, int channel, int (&winner)[V]) {
  const int first = (y * stage.stride > 0 ? 0 : 3) + (x * stage.stride > 0 ? 0 : 1);
  Vec<V> best = filled<V>(-INFINITY);
#pragma unroll
  for (int k = 0; k < V; ++k) winner[k] = first;
  each_place<V>(stage, n, y, x, channel, -INFINITY, [&](int place, const Vec<V>& value) {
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
  Vec<V> sum = zeros<V>();
  each_place<V>(stage, n, y, x, channel, 0.0f, [&](int, const Vec<V>& value) {
#pragma unroll
    for (int k = 0; k < V; ++k) sum.v[k] += value.v[k];
  });
  const float share = 1.0f / static_cast<float>(pool_count(stage, y, x));
#pragma unroll
  for (int k = 0; k < V; ++k) sum.v[k] *= share;
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

// emit(pixel, channel, value, first) for every pixel of the tile of the stage's output, V or kPair<V> channels at once:
// pixels outside of the image included, with some finite value. Where a stage has several parts their values add up;
// `first` marks the first.
template <int V, typename AStage, typename Emit>
RNAS_DEVICE void emit_stage(const Block& block, const Shared& shared, const AStage& stage, const Tiling& tiling,
                            const Tile& tile, int channels, const Emit& emit) {
  if (stage.kind >= Kind::separable) {
    for (int each = 0; each < stage.parts(); ++each) {
      const Part part = part_of(stage, each, channels);
      make_inputs<V>(block, shared, stage, part, tiling, tile, channels);
      if (part.whole(channels))  // there is no other
        multiply<V, true>(block, shared, part, tiling, channels,
                          [&](int pixel, int channel, const auto& value) { emit(pixel, channel, value, true); });
      else
        multiply<V, false>(block, shared, part, tiling, channels, [&](int pixel, int channel, const auto& value) {
          emit(pixel, channel, value, each == 0);
        });
    }
    return;
  }
  const int vectors = channels / V;
  block.each([&](int thread) {
    for (int item = thread; item < tiling.pixels() * vectors; item += kThreads) {
      const Spot spot = spot_of<V>(tiling, vectors, item);
      Vec<V> value = zeros<V>();
      if (tile.holds(spot.row, spot.column))
        value = simple_value<V>(stage, tile.n, tile.y + spot.row, tile.x + spot.column, spot.channel);
      emit(spot.pixel, spot.channel, value, true);
    }
  });
}

// The stage's output into shared.outputs.
template <int V, typename AStage>
RNAS_DEVICE void make_outputs(const Block& block, const Shared& shared, const AStage& stage, const Tiling& tiling,
                              const Tile& tile, int channels) {
  emit_stage<V>(block, shared, stage, tiling, tile, channels,
                [&](int pixel, int channel, const auto& value, bool first) {
                  float* to = shared.outputs + pixel * shared.stride + channel;
                  first ? store(to, value) : add_to(to, value);
                });
}

// work(row, column, channel) for all pixels of the tile that lie in the image. One phase.
template <int V, typename Work>
RNAS_DEVICE void each_pixel(const Block& block, const Tiling& tiling, const Tile& tile, int channels,
                            const Work& work) {
  const int vectors = channels / V;
  block.each([&](int thread) {
    for (int item = thread; item < tiling.pixels() * vectors; item += kThreads) {
      const Spot spot = spot_of<V>(tiling, vectors, item);
      if (tile.holds(spot.row, spot.column)) work(spot.row, spot.column, spot.channel);
    }
  });
}

// to[channel] = the sum of value(pixel, channel) over the pixels of the tile that lie in the image. Two phases.
// scratch: kThreads floats of shared memory.
template <typename Value>
RNAS_DEVICE void column_sums(const Block& block, float* scratch, const Tiling& tiling, const Tile& tile, int channels,
                             float* to, const Value& value) {
  for (int begin = 0; begin < channels; begin += kThreads) {
    const int lanes = smaller(channels - begin, kThreads), groups = quotient(kThreads, lanes);
    block.each([&](int thread) {
      const int group = quotient(thread, lanes), channel = begin + thread - group * lanes;
      if (group >= groups) return;
      float sum = 0.0f;
      for (int pixel = group; pixel < tile.height * tiling.tile_width; pixel += groups)
        if (tiling.column_of(pixel) < tile.width) sum += value(pixel, channel);
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
