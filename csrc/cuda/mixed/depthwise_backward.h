#pragma once

// Backward through depthwise convolutions: the gradients of their weights, and what lies between the two halves of a
// separable convolution.

#include "mixed/forward.h"

namespace rnas::cuda::mixed {

// Gradients of depthwise weights, sum over pixels of d * what entered. A thread has one channel and the sums of all its
// taps; for a strip of d it reads the same window as a convolution does. Each block goes through every slabs-th tile.
// Grid (slabs, tasks).
template <int V, typename AStage> struct DepthwiseWeights {
  struct Task {
    AStage stage;
    const typename AStage::Element* d;  // (N, H, W, C)
    float* slabs;                       // (slabs, C, taps)
  };
  Tiling tiling;
  int channels, slabs;
  Task tasks[kTasks];

  template <int kTaps> struct Sums {
    float v[kTaps] = {};
  };

  RNAS_DEVICE void operator()(const Block& block) const {
    const Task& task = tasks[block.y];
    each_window(task.stage, tiling, [&](const Window& window) {
      const int floats = window.layout.plane + layout_of(tiling, window.split, 1, 1).plane;
      const int some = channels_at_once<V>(channels, floats, memory());
      for (int begin = 0; begin < channels; begin += some)
        with_taps(window,
                  [&](auto taps) { sum_taps(block, task, window, begin, smaller(some, channels - begin), taps); });
    });
  }

  // Floats for windows: those of the two tiles of other kernels.
  RNAS_DEVICE int memory() const {
    const int tile = tile_floats(tiling, channels);
    return tile + larger(tile, tiling.window);
  }

  template <typename Taps>
  RNAS_DEVICE void sum_taps(const Block& block, const Task& task, const Window& window, int begin, int count,
                            Taps taps) const {
    constexpr int kColumns = Taps::kColumns, kTaps = Taps::kRows * kColumns, kTogether = kExtra / kThreads;
    using T = typename AStage::Element;
    const AStage& stage = task.stage;
    const int reach = stage.dilation * (stage.kernel / 2), groups = quotient(kThreads, count);
    const Image<T> d{const_cast<T*>(task.d), tiling.height, tiling.width, channels};
    const Layout of_d = layout_of(tiling, window.split, 1, 1);
    const Strips strips(tiling, window.split);
    float* scratch = block.shared<float>(0);
    float *entered = scratch + kExtra, *gradients = entered + count * window.layout.plane;
    PerThread<Sums<kTaps>> sums;
    for (int64_t index = block.x; index < tiling.count(); index += slabs) {
      const Tile tile = tile_of(tiling, index);
      block.each([&](int thread) {
        constexpr int kAtOnce = 2;  // a thread has the sums of all taps in registers
        fill<V, kAtOnce>(thread, entered, window.layout, window.height, window.width, begin, count,
                         tile.y * stage.stride - reach + window.first_row,
                         tile.x * stage.stride - reach + window.first_column, stage.stride,
                         [&](int channel) { return entering<V>(stage, tile.n, channel); });
        fill<V, kAtOnce>(thread, gradients, of_d, tiling.tile_height, tiling.tile_width, begin, count, tile.y, tile.x,
                         1, [&](int channel) { return Reader<V, Way::plain, T>(d, tile.n, channel); });
      });
      block.each([&](int thread) {
        const int group = quotient(thread, count), channel = thread - group * count;
        if (group >= groups) return;
        for (int each = group; each < strips.count(); each += groups) {
          const Strip strip(strips, each);
          add_strip(taps, tile, strip, entered + channel * window.layout.plane + strip.in(window.layout),
                    window.layout.pitch, gradients + channel * of_d.plane + strip.in(of_d), of_d.pitch, sums[thread].v);
        }
      });
    }
    float* slab = task.slabs + (block.x * channels + begin) * window.kernel * window.kernel;
#pragma unroll
    for (int first = 0; first < kTaps; first += kTogether) {
      block.each([&](int thread) {
#pragma unroll
        for (int tap = first; tap < first + kTogether && tap < kTaps; ++tap)
          scratch[(tap - first) * kThreads + thread] = sums[thread].v[tap];
      });
      block.each([&](int thread) {
        for (int at = thread; at < smaller(kTogether, kTaps - first) * count; at += kThreads) {
          const int behind = quotient(at, count), channel = at - behind * count, tap = first + behind;
          float all = 0.0f;
          for (int group = 0; group < groups; ++group) all += scratch[behind * kThreads + group * count + channel];
          const int row = tap / kColumns, column = tap % kColumns;
          if (taps.has(row, column)) slab[channel * window.kernel * window.kernel + window.tap(row, column)] = all;
        }
      });
    }
  }

  // found[tap] += d * what entered there, of the outputs of a strip that lie in the image. Of the others neither
  // counts: a NaN may have entered.
  template <typename Taps>
  RNAS_DEVICE void add_strip(Taps taps, const Tile& tile, const Strip& strip, const float* entered, int pitch,
                             const float* d, int pitch_of_d, float (&found)[Taps::kRows * Taps::kColumns]) const {
    constexpr int kRows = Taps::kRows, kColumns = Taps::kColumns;
    if (tile.holds(strip.y(kStrip - 1), strip.x(kStrip - 1))) {
      Vec<kStrip> gradient[kStrip];
#pragma unroll
      for (int i = 0; i < kStrip; ++i) gradient[i] = load<kStrip>(d + i * pitch_of_d);
#pragma unroll
      for (int y = 0; y < kStrip + kRows - 1; ++y) {
        const Line line(entered + y * pitch);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          if (y < row || y - row >= kStrip) continue;
#pragma unroll
          for (int column = 0; column < kColumns; ++column) {
            if (!taps.has(row, column)) continue;
#pragma unroll
            for (int j = 0; j < kStrip; ++j)
              found[row * kColumns + column] += gradient[y - row].v[j] * line.v[j + column];
          }
        }
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kStrip; ++i)
#pragma unroll 1
      for (int j = 0; j < kStrip; ++j) {
        if (!tile.holds(strip.y(i), strip.x(j))) continue;
        const float gradient = d[i * pitch_of_d + j];
#pragma unroll
        for (int row = 0; row < kRows; ++row)
#pragma unroll
          for (int column = 0; column < kColumns; ++column)
            if (taps.has(row, column))
              found[row * kColumns + column] += gradient * entered[(i + row) * pitch + j + column];
      }
  }
};

// A value of y in front of the norm and the ReLU of a stage; or its direction.
template <int V, typename T>
RNAS_DEVICE Vec<V> in_front(const Stage<T>& stage, int n, int y, int x, int channel) {
  return load<V>(stage.source.at(n, y, x) + channel);
}
template <int V, typename T>
RNAS_DEVICE Vec<V> in_front(const TangentStage<T>& stage, int n, int y, int x, int channel) {
  return load<V>(stage.direction + (stage.source.at(n, y, x) - stage.source.data) + channel);
}

// Between the two halves of a separable convolution, at stride 1: from `d` of the second to the gradient behind the
// first half's norm, and its sum(g) and sum(g * (y - mean)) of each tile. Grid (tiles, tasks).
template <int V, typename AStage> struct Middle {
  using T = typename AStage::Element;
  struct Task {
    AStage stage;       // the second half; its source is y of the first
    const T* d;         // (N, H, W, C)
    const float* mean;  // (C), null: 0
    T* g;               // (N, H, W, C)
    float* partials;    // (tiles, 2, C) or null
  };
  Tiling tiling;
  int channels;
  Task tasks[kTasks];

  RNAS_DEVICE void operator()(const Block& block) const {
    const Task& task = tasks[block.y];
    const Tile tile = tile_of(tiling, block.x);
    const Shared shared = shared_of(block, tiling, channels);
    const Image<T> d{const_cast<T*>(task.d), tiling.height, tiling.width, channels};
    const Image<T> to{task.g, tiling.height, tiling.width, channels};
    convolve<V>(block, shared, task.stage, tiling, tile, channels, Turn::half, Sum::overwrite,
                [&](int channel) { return Reader<V, Way::plain, T>(d, tile.n, channel); });
    each_pixel<V>(block, tiling, tile, channels, [&](int row, int column, int channel) {
      const int y = tile.y + row, x = tile.x + column;
      const int at = (row * tiling.tile_width + column) * shared.stride + channel;
      const Stage<T>& stage = task.stage;
      const Vec<V> entered = entering<V>(stage, tile.n, channel).at(y, x);
      const Vec<V> before = in_front<V>(task.stage, tile.n, y, x, channel);
      const Vec<V> mean = task.mean ? load<V>(task.mean + channel) : zeros<V>();
      Vec<V> g = load<V>(shared.inputs + at), product;
#pragma unroll
      for (int k = 0; k < V; ++k) g.v[k] = entered.v[k] > 0.0f ? g.v[k] : 0.0f;
      g = rounded<T>(g);
#pragma unroll
      for (int k = 0; k < V; ++k) product.v[k] = g.v[k] * (before.v[k] - mean.v[k]);
      store<V>(to.at(tile.n, y, x) + channel, g);
      store<V>(shared.inputs + at, g);
      store<V>(shared.outputs + at, product);
    });
    if (!task.partials) return;
    float* sums = task.partials + block.x * 2 * channels;
    column_sums(block, shared.extra, tiling, tile, channels, sums,
                [&](int pixel, int channel) { return shared.inputs[pixel * shared.stride + channel]; });
    column_sums(block, shared.extra, tiling, tile, channels, sums + channels,
                [&](int pixel, int channel) { return shared.outputs[pixel * shared.stride + channel]; });
  }
};

}  // namespace rnas::cuda::mixed
