#pragma once

// Backward, for the edges into one node, whose gradient g is known. With y the output of a stage before its norm,
//
//   dy = a * (g - b0 - (y - mean) * b1),   a = weight * gamma / s,  s = sqrt(variance + eps),
//   b0 = sum(g) / M,  b1 = sum(g * (y - mean)) / (M s^2)   on batch statistics of M values, else 0.
//
// Where the images of an edge have scales, its g is that of the node times them.
//
// A separable stage hands `d`, the gradient of the output of its depthwise convolution, to the kernel that goes on, a
// dense one dy itself.

#include "mixed/forward.h"

namespace rnas::cuda::mixed {

// a, b0, b1 and the mean, each (C), of one norm; or of no norm, which is a = weight alone.
struct Slope {
  const float* rows;    // (4, C) or null
  const float* weight;  // where rows is null
};

template <int V> struct SlopeAt {
  Vec<V> a, b0, b1, mean;

  RNAS_DEVICE Vec<V> operator()(const Vec<V>& g, const Vec<V>& y) const {
    Vec<V> made;
#pragma unroll
    for (int k = 0; k < V; ++k) made.v[k] = a.v[k] * (g.v[k] - b0.v[k] - (y.v[k] - mean.v[k]) * b1.v[k]);
    return made;
  }
};

template <int V> RNAS_DEVICE SlopeAt<V> slope_at(const Slope& slope, int channels, int channel) {
  if (slope.rows) {
    const float* rows = slope.rows + channel;
    return {load<V>(rows), load<V>(rows + channels), load<V>(rows + 2 * channels), load<V>(rows + 3 * channels)};
  }
  SlopeAt<V> made{zeros<V>(), zeros<V>(), zeros<V>(), zeros<V>()};
#pragma unroll
  for (int k = 0; k < V; ++k) made.a.v[k] = *slope.weight;
  return made;
}

// The gradient of an edge from that of its node, in image n. scales: (N), null: 1.
template <int V> RNAS_DEVICE Vec<V> scaled(Vec<V> g, const float* scales, int n) {
  if (!scales) return g;
#pragma unroll
  for (int k = 0; k < V; ++k) g.v[k] *= scales[n];
  return g;
}

// ---- sums that the norms need ----------------------------------------------------------------------------------------

// Of each tile, for each channel: sum(g) and sum(g * (y - mean)). Grid (tiles, tasks).
template <int V, typename AStage> struct Products {
  struct Task {
    AStage stage;
    const float* mean;    // (C), null: 0
    float* partials;      // (tiles, 2, C)
    const float* scales;  // (N) of the edge's images; null: 1
  };
  Tiling tiling;
  int channels;
  Image<typename AStage::Element> g;
  Task tasks[kTasks];

  RNAS_DEVICE void operator()(const Block& block) const {
    const Task& task = tasks[block.y];
    const Tile tile = tile_of(tiling, block.x);
    const Shared shared = shared_of(block, tiling, channels);
    make_outputs<V>(block, shared, task.stage, tiling, tile, channels);
    each_pixel<V>(block, tiling, tile, channels, [&](int row, int column, int channel) {
      const int at = (row * tiling.tile_width + column) * shared.stride + channel;
      const Vec<V> gradient = scaled(load<V>(g.at(tile.n, tile.y + row, tile.x + column) + channel), task.scales, tile.n);
      const Vec<V> mean = task.mean ? load<V>(task.mean + channel) : zeros<V>();
      Vec<V> product = load<V>(shared.outputs + at);
#pragma unroll
      for (int k = 0; k < V; ++k) product.v[k] = (product.v[k] - mean.v[k]) * gradient.v[k];
      store<V>(shared.inputs + at, gradient);
      store<V>(shared.outputs + at, product);
    });
    float* to = task.partials + block.x * 2 * channels;
    column_sums(block, shared.extra, tiling, tile, channels, to,
                [&](int pixel, int channel) { return shared.inputs[pixel * shared.stride + channel]; });
    column_sums(block, shared.extra, tiling, tile, channels, to + channels,
                [&](int pixel, int channel) { return shared.outputs[pixel * shared.stride + channel]; });
  }
};

// The sums of all tiles, and what follows: the slope on batch statistics, gradients of gamma, beta and the weight.
// Grid (1, tasks).
struct FinishProducts {
  struct Task {
    const float* partials;
    const float *gamma, *beta, *variance;  // (C) of the norm; variance null: there is none
    const float* mean;
    const float* weight;                            // null: 1
    float* slope;                                   // (4, C) to write, or null
    float *grad_weight, *grad_gamma, *grad_beta;    // null: not wanted
  };
  Tiling tiling;
  int channels;
  double eps;
  Task tasks[kTasks];

  RNAS_DEVICE void operator()(const Block& block) const {
    const Task& task = tasks[block.y];
    double* sums = block.shared<double>(0);           // (2, kThreads)
    double* terms = sums + 2 * kThreads;              // (kThreads) of the weight's gradient
    const double count = static_cast<double>(tiling.batch) * tiling.height * tiling.width;
    const double weight = task.weight ? *task.weight : 1.0;
    block.each([&](int thread) { terms[thread] = 0; });
    for (int begin = 0; begin < channels; begin += kThreads) {
      const int lanes = smaller(channels - begin, kThreads), groups = kThreads / lanes;
      block.each([&](int thread) {
        const int channel = begin + thread % lanes, group = thread / lanes;
        double sum = 0, product = 0;
        if (group < groups)
          for (int64_t tile = group; tile < tiling.count(); tile += groups) {
            sum += task.partials[tile * 2 * channels + channel];
            product += task.partials[(tile * 2 + 1) * channels + channel];
          }
        sums[thread] = sum;
        sums[kThreads + thread] = product;
      });
      block.each([&](int thread) {
        if (thread >= lanes) return;
        double sum = 0, product = 0;
        for (int group = 0; group < groups; ++group) {
          sum += sums[group * lanes + thread];
          product += sums[kThreads + group * lanes + thread];
        }
        const int channel = begin + thread;
        if (!task.variance) {
          terms[thread] += product;
          return;
        }
        const double inverse = 1 / sqrt(task.variance[channel] + eps);
        const double gamma = task.gamma ? task.gamma[channel] : 1.0, beta = task.beta ? task.beta[channel] : 0.0;
        terms[thread] += gamma * product * inverse + beta * sum;
        if (task.grad_gamma) task.grad_gamma[channel] = static_cast<float>(weight * product * inverse);
        if (task.grad_beta) task.grad_beta[channel] = static_cast<float>(weight * sum);
        if (task.slope) {
          task.slope[channel] = static_cast<float>(weight * gamma * inverse);
          task.slope[channels + channel] = static_cast<float>(sum / count);
          task.slope[2 * channels + channel] = static_cast<float>(product * inverse * inverse / count);
          task.slope[3 * channels + channel] = task.mean[channel];
        }
      });
    }
    block.each([&](int thread) {
      if (thread > 0 || !task.grad_weight) return;
      double sum = 0;
      for (int each = 0; each < smaller(channels, kThreads); ++each) sum += terms[each];
      *task.grad_weight = static_cast<float>(sum);
    });
  }
};

// The slopes of norms with statistics of their own. Grid (1, tasks).
struct FixedSlopes {
  struct Task {
    const float *gamma, *variance, *weight;  // gamma null: 1, weight null: 1
    float* slope;
  };
  int channels;
  double eps;
  Task tasks[kTasks];

  RNAS_DEVICE void operator()(const Block& block) const {
    const Task& task = tasks[block.y];
    block.each([&](int thread) {
      for (int channel = thread; channel < channels; channel += kThreads) {
        const double weight = task.weight ? *task.weight : 1.0, gamma = task.gamma ? task.gamma[channel] : 1.0;
        task.slope[channel] = static_cast<float>(weight * gamma / sqrt(task.variance[channel] + eps));
        for (int row = 1; row < 4; ++row) task.slope[row * channels + channel] = 0.0f;
      }
    });
  }
};

// ---- convolutions ----------------------------------------------------------------------------------------------------

// Behind the pointwise convolution of a stage: dy, and from it `d` (a dense stage: dy itself) and the gradients of the
// matrices. Each block goes through every slabs-th tile and adds the latter up in a slab of its own.
// Grid (slabs, tasks).
template <int V, typename AStage> struct Pointwise {
  static constexpr int kBlocks = kBlocksOf<AStage>;
  using T = typename AStage::Element;
  struct Task {
    AStage stage;
    Image<T> g;
    Slope slope;
    T* d;          // (N, H, W, C)
    float* slabs;  // (slabs, entries) as the matrices lie in theta, or null
    const float* scales;  // (N) of the edge's images where g is that of the node; null: 1
    int entries;
    const T* kept;  // (N, H, W, C), the stage's output where the forward pass has kept it, or null
  };
  Tiling tiling;
  int channels, slabs;
  bool batch_statistics;
  Task tasks[kTasks];

  RNAS_DEVICE void operator()(const Block& block) const {
    const Task& task = tasks[block.y];
    const Shared shared = shared_of(block, tiling, channels);
    const bool separable = task.stage.kind == Kind::separable;
    for (int64_t index = block.x; index < tiling.count(); index += slabs) {
      const Tile tile = tile_of(tiling, index);
      if (batch_statistics && !task.kept)
        make_outputs<V>(block, shared, task.stage, tiling, tile, channels);
      else if (separable && task.slabs)
        make_inputs<V>(block, shared, task.stage, part_of(task.stage, 0, channels), tiling, tile, channels);
      make_gradients(block, shared, task, tile);
      if (separable) hand_on(block, shared, task, tile);
      for (int each = 0; task.slabs && each < task.stage.parts(); ++each) {
        const Part part = part_of(task.stage, each, channels);
        if (!separable) make_inputs<V>(block, shared, task.stage, part, tiling, tile, channels);
        add_outer_products(block, shared, task, part, index == block.x);
      }
    }
  }

  // dy into shared.outputs, zero outside of the image; for a dense stage also to task.d.
  RNAS_DEVICE void make_gradients(const Block& block, const Shared& shared, const Task& task, const Tile& tile) const {
    const int vectors = channels / V;
    const Image<T> d{task.d, tiling.height, tiling.width, channels};
    const Image<const T> kept{task.kept, tiling.height, tiling.width, channels};
    block.each([&](int thread) {
      for (int item = thread; item < tiling.pixels() * vectors; item += kThreads) {
        const auto [channel, pixel, row, column] = spot_of<V>(tiling, vectors, item);
        float* y = shared.outputs + pixel * shared.stride + channel;
        if (!tile.holds(row, column)) {
          store<V>(y, zeros<V>());
          continue;
        }
        const Vec<V> g = scaled(load<V>(task.g.at(tile.n, tile.y + row, tile.x + column) + channel), task.scales, tile.n);
        const SlopeAt<V> slope = slope_at<V>(task.slope, channels, channel);
        Vec<V> made = slope.mean;
        if (batch_statistics)
          made = task.kept ? load<V>(kept.at(tile.n, tile.y + row, tile.x + column) + channel) : load<V>(y);
        const Vec<V> dy = slope(g, made);
        store<V>(y, dy);
        if (task.stage.kind != Kind::separable)
          store<V>(d.at(tile.n, tile.y + row, tile.x + column) + channel, dy);
      }
    });
  }

  // d = matrix^T dy to task.d.
  RNAS_DEVICE void hand_on(const Block& block, const Shared& shared, const Task& task, const Tile& tile) const {
    const Image<T> d{task.d, tiling.height, tiling.width, channels};
    const Part part = part_of(task.stage, 0, channels);
    multiply_matrices<V>(
        block, tiling.pixels(), channels,
        [&](int pixel, int output) { return shared.outputs[pixel * shared.stride + output]; },
        [&](int output, int input) { return part.entry<true>(output, input); },  // of a 1x1 convolution
        [&](int pixel, int input, const auto& value) {
          const int row = tiling.row_of(pixel), column = tiling.column_of(pixel);
          if (tile.holds(row, column)) store(d.at(tile.n, tile.y + row, tile.x + column) + input, value);
        });
  }

  // slab (+)= sum over the tile's pixels of dy (x) inputs, in blocks of 16 x 16 entries, one for each warp. Where there
  // are fewer blocks than warps, several warps share a block's pixels and shared.extra holds their sums.
  RNAS_DEVICE void add_outer_products(const Block& block, const Shared& shared, const Task& task, const Part& part,
                                      bool first) const {
    constexpr int kSide = 16;
    const int across = (channels + kSide - 1) / kSide, blocks = across * across, pixels = tiling.pixels();
    const int splits = larger(1, smaller(quotient(kWarps, blocks), pixels / 8)), length = pixels / splits;
    const auto keep = [&](int output, int input, float value) {
      if (output < part.first || output >= part.last || input >= channels) return;
      float& to = task.slabs[block.x * task.entries + part.index(task.stage, output, input)];
      to = first ? value : to + value;
    };
    block.each_warp([&](const Warp& warp) {
      for (int item = warp.number; item < blocks * splits; item += kWarps) {
        const int split = quotient(item, blocks), at = item - split * blocks, line = quotient(at, across);
        const int output = line * kSide, input = (at - line * across) * kSide;
        Product<1, kByTensor<V>> product(warp);
        product.add(
            warp, split * length, (split + 1) * length,
            [&](int i, int pixel) { return shared.outputs[pixel * shared.stride + smaller(output + i, channels - 1)]; },
            [&](int pixel, int j) { return shared.inputs[pixel * shared.stride + smaller(input + j, channels - 1)]; });
        product.each(warp, [&](int i, int j, float value, float next) {
          if (splits > 1) {
            float* to = shared.extra + (item * kSide + i) * kSide + j;
            to[0] = value, to[1] = next;
          } else {
            keep(output + i, input + j, value);
            keep(output + i, input + j + 1, next);
          }
        });
      }
    });
    if (splits == 1) return;
    block.each([&](int thread) {
      for (int entry = thread; entry < blocks * kSide * kSide; entry += kThreads) {
        const int at = entry / (kSide * kSide), i = entry / kSide % kSide, j = entry % kSide;
        const int line = quotient(at, across);
        float sum = 0.0f;
        for (int split = 0; split < splits; ++split) sum += shared.extra[split * blocks * kSide * kSide + entry];
        keep(line * kSide + i, (at - line * across) * kSide + j, sum);
      }
    });
  }
};

// to[i] = the sum over slabs of slab[i]. Grid (blocks of kThreads entries, tasks).
struct SumSlabs {
  struct Task {
    const float* slabs;
    float* to;
    int entries;
  };
  int slabs;
  Task tasks[kTasks];

  RNAS_DEVICE void operator()(const Block& block) const {
    const Task& task = tasks[block.y];
    block.each([&](int thread) {
      const int64_t at = block.x * kThreads + thread;
      if (at >= task.entries) return;
      double sum = 0;
      for (int slab = 0; slab < slabs; ++slab) sum += task.slabs[static_cast<int64_t>(slab) * task.entries + at];
      task.to[at] = static_cast<float>(sum);
    });
  }
};

}  // namespace rnas::cuda::mixed
