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
    bool kept;     // the forward pass has kept the stage's output
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
      if (batch_statistics)
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
    block.each([&](int thread) {
      for (int item = thread; item < tiling.pixels() * vectors; item += kThreads) {
        const int channel = item % vectors * V, pixel = item / vectors;
        const int row = pixel / tiling.tile_width, column = pixel % tiling.tile_width;
        float* y = shared.outputs + pixel * shared.stride + channel;
        if (!tile.holds(row, column)) {
          store<V>(y, zeros<V>());
          continue;
        }
        const Vec<V> g = scaled(load<V>(task.g.at(tile.n, tile.y + row, tile.x + column) + channel), task.scales, tile.n);
        const SlopeAt<V> slope = slope_at<V>(task.slope, channels, channel);
        Vec<V> made = batch_statistics ? load<V>(y) : slope.mean;
        if (batch_statistics && task.kept) made = rounded<T>(made);
        const Vec<V> dy = slope(g, made);
        store<V>(y, dy);
        if (task.stage.kind != Kind::separable)
          store<V>(d.at(tile.n, tile.y + row, tile.x + column) + channel, dy);
      }
    });
  }

  // d = matrix^T dy to task.d.
  RNAS_DEVICE void hand_on(const Block& block, const Shared& shared, const Task& task, const Tile& tile) const {
    const int vectors = channels / V, width = tiling.tile_width;
    const Image<T> d{task.d, tiling.height, tiling.width, channels};
    const Part part = part_of(task.stage, 0, channels);
    block.each([&](int thread) {
      for (int item = thread; item < tiling.pixels() / kPixels * vectors; item += kThreads) {
        const int input = item % vectors * V, pixel = item / vectors * kPixels;
        Vec<V> sum[kPixels];
#pragma unroll
        for (int i = 0; i < kPixels; ++i) sum[i] = zeros<V>();
#pragma unroll 1
        for (int output = 0; output < channels; output += V) {
          Vec<V> dy[kPixels];
#pragma unroll
          for (int i = 0; i < kPixels; ++i) dy[i] = load<V>(shared.outputs + (pixel + i) * shared.stride + output);
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const Vec<V> weights = part.row<V, true>(output + k, input);  // of a 1x1 convolution
#pragma unroll
            for (int i = 0; i < kPixels; ++i)
#pragma unroll
              for (int m = 0; m < V; ++m) sum[i].v[m] += dy[i].v[k] * weights.v[m];
          }
        }
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          const int row = (pixel + i) / width, column = (pixel + i) % width;
          if (tile.holds(row, column)) store<V>(d.at(tile.n, tile.y + row, tile.x + column) + input, sum[i]);
        }
      }
    });
  }

  // slab (+)= sum over the tile's pixels of dy (x) inputs, in blocks of V x V entries. Where there are fewer blocks than
  // threads, several threads share a block's pixels and shared.extra holds their sums.
  RNAS_DEVICE void add_outer_products(const Block& block, const Shared& shared, const Task& task, const Part& part,
                                      bool first) const {
    const int vectors = channels / V, blocks = vectors * vectors;
    const int groups = blocks >= kThreads ? 1 : smaller(kThreads / blocks, tiling.pixels());
    const auto sum_of = [&](int pair, int group, float(&sums)[V][V]) {
      const int output = pair / vectors * V, input = pair % vectors * V;
#pragma unroll
      for (int k = 0; k < V; ++k)
#pragma unroll
        for (int m = 0; m < V; ++m) sums[k][m] = 0.0f;
#pragma unroll 2
      for (int pixel = group; pixel < tiling.pixels(); pixel += groups) {
        const Vec<V> dy = load<V>(shared.outputs + pixel * shared.stride + output);
        const Vec<V> from = load<V>(shared.inputs + pixel * shared.stride + input);
#pragma unroll
        for (int k = 0; k < V; ++k)
#pragma unroll
          for (int m = 0; m < V; ++m) sums[k][m] += dy.v[k] * from.v[m];
      }
    };
    const auto keep = [&](int output, int input, float value) {
      if (output < part.first || output >= part.last) return;
      float& to = task.slabs[block.x * task.entries + part.index(task.stage, output, input)];
      to = first ? value : to + value;
    };
    if (groups == 1) {
      block.each([&](int thread) {
        for (int pair = thread; pair < blocks; pair += kThreads) {
          float sums[V][V];
          sum_of(pair, 0, sums);
#pragma unroll
          for (int k = 0; k < V; ++k)
#pragma unroll
            for (int m = 0; m < V; ++m) keep(pair / vectors * V + k, pair % vectors * V + m, sums[k][m]);
        }
      });
      return;
    }
    const int entries = channels * channels;  // groups * entries <= kThreads * V * V
    block.each([&](int thread) {
      const int pair = thread % blocks, group = thread / blocks;
      if (group >= groups) return;
      float sums[V][V];
      sum_of(pair, group, sums);
#pragma unroll
      for (int k = 0; k < V; ++k)
#pragma unroll
        for (int m = 0; m < V; ++m)
          shared.extra[group * entries + (pair / vectors * V + k) * channels + pair % vectors * V + m] = sums[k][m];
    });
    block.each([&](int thread) {
      for (int entry = thread; entry < entries; entry += kThreads) {
        float sum = 0.0f;
        for (int group = 0; group < groups; ++group) sum += shared.extra[group * entries + entry];
        keep(entry / channels, entry % channels, sum);
      }
    });
  }
};

// Gradients of depthwise weights, sum over pixels of d * what entered. Each block takes every slabs-th row of pixels.
// Grid (slabs, tasks).
template <int V, typename AStage> struct DepthwiseWeights {
  static constexpr int kBlocks = kBlocksOf<AStage>;
  struct Task {
    AStage stage;
    const typename AStage::Element* d;  // (N, H, W, C)
    float* slabs;                       // (slabs, C, taps)
  };
  int batch, height, width, channels, slabs;
  Task tasks[kTasks];

  RNAS_DEVICE void operator()(const Block& block) const {
    const Task& task = tasks[block.y];
    task.stage.kernel == 3 ? sum<3>(block, task) : sum<5>(block, task);
  }

  // Items are (row of taps, V channels); several threads share the pixels of one.
  template <int kKernel> RNAS_DEVICE void sum(const Block& block, const Task& task) const {
    const int vectors = channels / V, items = vectors * kKernel;
    const int groups = items >= kThreads ? 1 : smaller(kThreads / items, width);
    float* slab = task.slabs + block.x * channels * kKernel * kKernel;
    float* sums = block.shared<float>(0);  // (groups, items, kKernel, V)
    const auto put = [&](int item, int column, int k, float value) {
      slab[((item % vectors * V + k) * kKernel + item / vectors) * kKernel + column] = value;
    };
    block.each([&](int thread) {
      const int group = groups == 1 ? 0 : thread / items;
      if (group >= groups) return;
      for (int item = groups == 1 ? thread : thread % items; item < items; item += kThreads) {
        Vec<V> found[kKernel];
#pragma unroll
        for (int column = 0; column < kKernel; ++column) found[column] = zeros<V>();
        if (task.stage.stride == 2 && task.stage.dilation == 1)
          add_rows<kKernel, 2>(task, static_cast<int>(block.x), item, group, groups, found);
        else
          add_rows<kKernel, 1>(task, static_cast<int>(block.x), item, group, groups, found);
#pragma unroll
        for (int column = 0; column < kKernel; ++column)
#pragma unroll
          for (int k = 0; k < V; ++k) {
            if (groups == 1)
              put(item, column, k, found[column].v[k]);
            else
              sums[((group * items + item) * kKernel + column) * V + k] = found[column].v[k];
          }
        if (groups > 1) break;
      }
    });
    if (groups == 1) return;
    block.each([&](int thread) {
      for (int at = thread; at < items * kKernel * V; at += kThreads) {
        float all = 0.0f;
        for (int group = 0; group < groups; ++group) all += sums[group * items * kKernel * V + at];
        put(at / V / kKernel, at / V % kKernel, at % V, all);
      }
    });
  }

  // Four pixels of a row are taken at once, or twice two, as in `convolve`: neighbours share what entered.
  template <int kKernel, int kStep>
  RNAS_DEVICE void add_rows(const Task& task, int slab, int item, int group, int groups, Vec<V> (&found)[kKernel]) const {
    constexpr int kCount = kPixels / (kStep == 2 || kIsTangent<AStage> ? 2 : 1);
    constexpr int kWindow = kStep * (kCount - 1) + kKernel;
    const AStage& stage = task.stage;
    const int vectors = channels / V, channel = item % vectors * V, tap = item / vectors;
    const int reach = stage.dilation * (kKernel / 2), spacing = stage.stride == 1 ? stage.dilation : 1;
    const int fours = (width + 2 * kPixels - 1) / (2 * kPixels) * 2;  // of a row; two and two, where they interlock
    const int rows_here = (batch * height - 1 - slab) / slabs + 1;
    for (int at = group; at < rows_here * fours; at += groups) {
      const int row = slab + at / fours * slabs, four = at % fours, n = row / height;
      const int from_y = row % height * stage.stride - reach + tap * stage.dilation;
      if (from_y < 0 || from_y >= stage.source.height) continue;
      const auto rows = entering<V>(stage, n, channel);
      const auto* line = rows.row(from_y);
      const int x = column_of(four, 0, spacing);
      const auto* d = task.d + (static_cast<int64_t>(row) * width + x) * channels + channel;
#pragma unroll
      for (int begin = 0; begin < kPixels; begin += kCount) {
        Vec<V> gradient[kCount], from[kWindow];
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          gradient[i] =
              x + (begin + i) * spacing < width ? load<V>(d + (begin + i) * spacing * channels) : zeros<V>();
        rows.load_all(line, x * stage.stride - reach + kStep * begin * stage.dilation, stage.dilation, from);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (x + (begin + i) * spacing >= width) continue;  // a NaN may have entered there
#pragma unroll
          for (int column = 0; column < kKernel; ++column)
#pragma unroll
            for (int k = 0; k < V; ++k) found[column].v[k] += gradient[i].v[k] * from[kStep * i + column].v[k];
        }
      }
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
    load_depthwise(block, shared, task.stage, channels);
    depthwise_phase<V>(
        block, shared, task.stage, tiling, tile, channels, true,
        [&](int channel) { return Rows<V, Way::plain, T>(d, tile.n, channel); },
        [&](int row, int column, int channel, Vec<V> g) {
          if (!tile.holds(row, column)) return;
          const int y = tile.y + row, x = tile.x + column;
          const Stage<T>& stage = task.stage;
          const Vec<V> entered = entering<V>(stage, tile.n, channel).at(y, x);
          const Vec<V> before = in_front<V>(task.stage, tile.n, y, x, channel);
          const Vec<V> mean = task.mean ? load<V>(task.mean + channel) : zeros<V>();
          Vec<V> product;
#pragma unroll
          for (int k = 0; k < V; ++k) g.v[k] = entered.v[k] > 0.0f ? g.v[k] : 0.0f;
          g = rounded<T>(g);
#pragma unroll
          for (int k = 0; k < V; ++k) product.v[k] = g.v[k] * (before.v[k] - mean.v[k]);
          store<V>(to.at(tile.n, y, x) + channel, g);
          const int at = (row * tiling.tile_width + column) * shared.stride + channel;
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
