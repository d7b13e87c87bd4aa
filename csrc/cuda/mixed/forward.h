#pragma once

// Forward: statistics of a stage's output, and the sum of all that enters a node.

#include "mixed/tile.h"

namespace rnas::cuda::mixed {

constexpr int kTasks = 24;  // of one launch; as many as its arguments hold

// ---- statistics ------------------------------------------------------------------------------------------------------

// Of each tile, for each channel of a stage's output y: the mean and the sum of squared deviations from it. y itself goes
// to `kept` where that is not null. Grid (tiles, tasks).
template <int V, typename AStage> struct Moments {
  using T = typename AStage::Element;
  struct Task {
    AStage stage;
    T* kept;          // (N, H, W, C) or null
    float* partials;  // (tiles, 2, C) or null
  };
  Tiling tiling;
  int channels;
  Task tasks[kTasks];

  RNAS_DEVICE void operator()(const Block& block) const {
    const Task& task = tasks[block.y];
    const Tile tile = tile_of(tiling, block.x);
    const Shared shared = shared_of(block, tiling, channels);
    make_outputs<V>(block, shared, task.stage, tiling, tile, channels);
    if (task.kept) {
      const Image<T> kept{task.kept, tiling.height, tiling.width, channels};
      each_pixel<V>(block, tiling, tile, channels, [&](int row, int column, int channel) {
        float* from = shared.outputs + (row * tiling.tile_width + column) * shared.stride + channel;
        const Vec<V> value = rounded<T>(load<V>(from));
        store<V>(kept.at(tile.n, tile.y + row, tile.x + column) + channel, value);
        store<V>(from, value);
      });
    }
    if (!task.partials) return;
    float* means = task.partials + block.x * 2 * channels;
    float *mean = shared.inputs, *scratch = shared.extra;  // the inputs have been used
    const auto value = [&](int pixel, int channel) { return shared.outputs[pixel * shared.stride + channel]; };
    column_sums(block, scratch, tiling, tile, channels, mean, value);
    block.each([&](int thread) {
      for (int channel = thread; channel < channels; channel += kThreads) {
        mean[channel] /= static_cast<float>(tile.pixels());
        means[channel] = mean[channel];
      }
    });
    column_sums(block, scratch, tiling, tile, channels, means + channels, [&](int pixel, int channel) {
      const float deviation = value(pixel, channel) - mean[channel];
      return deviation * deviation;
    });
  }
};

struct Norm {
  const float *gamma, *beta;  // (C) or null
  float *mean, *variance;     // (C)
  float *scale, *shift;       // (C), what the norm does: scale * y + shift
};

RNAS_DEVICE void write_scale(const Norm& norm, int channel, double mean, double variance, double eps) {
  const double gamma = norm.gamma ? norm.gamma[channel] : 1.0, beta = norm.beta ? norm.beta[channel] : 0.0;
  const double scale = gamma / sqrt(variance + eps);
  norm.scale[channel] = static_cast<float>(scale);
  norm.shift[channel] = static_cast<float>(beta - mean * scale);
}

// The moments of all tiles together, and what follows for the norm. Grid (1, tasks). In double, in a fixed order.
struct FinishMoments {
  struct Task {
    const float* partials;
    Norm norm;
  };
  Tiling tiling;
  int channels;
  double eps;
  Task tasks[kTasks];

  struct Sums {
    double count, mean, deviations;

    // Chan, Golub and LeVeque: the moments of two sets together.
    RNAS_DEVICE void add(double other_count, double other_mean, double other_deviations) {
      if (other_count == 0) return;
      const double all = count + other_count, distance = other_mean - mean;
      mean += distance * other_count / all;
      deviations += other_deviations + distance * distance * count * other_count / all;
      count = all;
    }
  };

  RNAS_DEVICE void operator()(const Block& block) const {
    const Task& task = tasks[block.y];
    Sums* sums = block.shared<Sums>(0);
    for (int begin = 0; begin < channels; begin += kThreads) {
      const int lanes = smaller(channels - begin, kThreads), groups = kThreads / lanes;
      block.each([&](int thread) {
        const int channel = begin + thread % lanes, group = thread / lanes;
        Sums sum{0, 0, 0};
        if (group < groups)
          for (int64_t tile = group; tile < tiling.count(); tile += groups) {
            const float* partial = task.partials + tile * 2 * channels + channel;
            sum.add(tile_of(tiling, tile).pixels(), partial[0], partial[channels]);
          }
        sums[thread] = sum;
      });
      block.each([&](int thread) {
        if (thread >= lanes) return;
        Sums all{0, 0, 0};
        for (int group = 0; group < groups; ++group) {
          const Sums& sum = sums[group * lanes + thread];
          all.add(sum.count, sum.mean, sum.deviations);
        }
        const double variance = all.deviations / all.count;
        task.norm.mean[begin + thread] = static_cast<float>(all.mean);
        task.norm.variance[begin + thread] = static_cast<float>(variance);
        write_scale(task.norm, begin + thread, all.mean, variance, eps);
      });
    }
  }
};

// What norms with statistics of their own do. Grid (1, norms); rows of C floats lie behind one another.
struct FixedNorms {
  const float *gamma, *beta, *mean, *variance;
  float *scale, *shift;
  int channels;
  double eps;

  RNAS_DEVICE void operator()(const Block& block) const {
    const int64_t row = block.y * channels;
    const Norm norm{gamma ? gamma + row : nullptr, beta ? beta + row : nullptr, nullptr, nullptr, scale + row,
                    shift + row};
    block.each([&](int thread) {
      for (int channel = thread; channel < channels; channel += kThreads)
        write_scale(norm, channel, mean[row + channel], variance[row + channel], eps);
    });
  }
};

// ---- a node ----------------------------------------------------------------------------------------------------------

// The sum over tasks of weight * scales[n] * (scale * stage + shift), on top of what an earlier launch has left in `sums`;
// to `out`, or to `sums` where a later launch goes on. Grid (tiles, 1).
template <int V, typename AStage> struct Node {
  static constexpr int kBlocks = kBlocksOf<AStage>;
  using T = typename AStage::Element;
  struct Task {
    AStage stage;
    const float* weight;         // one number
    const float *scale, *shift;  // (C) of the last norm; null: 1 and 0
    const float* scales;         // (N) of the edge's images; null: 1
  };
  Tiling tiling;
  int channels, count;
  bool first, last;
  Image<T> out;
  float* sums;  // (N, H, W, C)
  Task tasks[kTasks];

  RNAS_DEVICE void operator()(const Block& block) const {
    const Tile tile = tile_of(tiling, block.x);
    const Shared shared = shared_of(block, tiling, channels, true);  // the outputs grow all along
    const int width = tiling.tile_width;
    block.each([&](int thread) {
      for (int at = thread; at < tiling.pixels() * shared.stride; at += kThreads) shared.outputs[at] = 0.0f;
    });
    for (int each = 0; each < count; ++each) {
      const Task& task = tasks[each];
      emit_stage<V>(block, shared, task.stage, tiling, tile, channels,
                    [&](int pixel, int channel, auto value, bool first_part) {
                      constexpr int W = decltype(value)::kCount;
                      if (task.scale) {
                        const Vec<W> scale = load<W>(task.scale + channel);
                        const Vec<W> shift = task.shift && first_part ? load<W>(task.shift + channel) : zeros<W>();
#pragma unroll
                        for (int k = 0; k < W; ++k) value.v[k] = value.v[k] * scale.v[k] + shift.v[k];
                      }
                      // Here: held in a register all along, it costs a spill.
                      const float weight = *task.weight * scale_of(task.scales, tile.n);
#pragma unroll
                      for (int k = 0; k < W; ++k) value.v[k] *= weight;
                      add_to(shared.outputs + pixel * shared.stride + channel, value);
                    });
    }
    each_pixel<V>(block, tiling, tile, channels, [&](int row, int column, int channel) {
      const Image<float> partial{sums, tiling.height, tiling.width, channels};
      float* known = partial.at(tile.n, tile.y + row, tile.x + column) + channel;
      Vec<V> value = load<V>(shared.outputs + (row * width + column) * shared.stride + channel);
      if (!first) {
        const Vec<V> before = load<V>(known);
#pragma unroll
        for (int k = 0; k < V; ++k) value.v[k] += before.v[k];
      }
      last ? store<V>(out.at(tile.n, tile.y + row, tile.x + column) + channel, value) : store<V>(known, value);
    });
  }
};

}  // namespace rnas::cuda::mixed
