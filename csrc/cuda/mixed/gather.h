#pragma once

// Backward, from the edges into a node to their sources: the pools, and the sum of all that the stages have handed on.

#include "mixed/backward.h"
#include "mixed/depthwise_backward.h"

namespace rnas::cuda::mixed {

// ---- pools -----------------------------------------------------------------------------------------------------------

// The gradients of the outputs of an edge's pools before their norms, and the winners of the max pool. That of the
// average pool is divided by its count. Grid (tiles, tasks).
template <int V, typename T> struct Pools {
  struct Task {
    Stage<T> stage;  // of a pool; kind tells which
    Image<T> g;
    Slope slope;
    T* d;                    // (N, H, W, C)
    unsigned char* winners;  // (N, H, W, C), of a max pool
    const float* scales;     // (N) of the edge's images; null: 1
  };
  Tiling tiling;
  int channels;
  bool batch_statistics;
  Task tasks[kTasks];

  RNAS_DEVICE void operator()(const Block& block) const {
    const Task& task = tasks[block.y];
    const Tile tile = tile_of(tiling, block.x);
    const bool reads = batch_statistics && task.slope.rows;  // else the pool's output does not matter, not even a NaN
    const Image<T> d{task.d, tiling.height, tiling.width, channels};
    each_pixel<V>(block, tiling, tile, channels, [&](int row, int column, int channel) {
      const int y = tile.y + row, x = tile.x + column;
      T* to = d.at(tile.n, y, x) + channel;
      const Vec<V> g = scaled(load<V>(task.g.at(tile.n, y, x) + channel), task.scales, tile.n);
      const SlopeAt<V> slope = slope_at<V>(task.slope, channels, channel);
      if (task.stage.kind == Kind::max_pool) {
        int winner[V];
        Vec<V> read = max_pool<V>(task.stage, tile.n, y, x, channel, winner);
#pragma unroll
        for (int k = 0; k < V; ++k) read.v[k] = reads ? read.v[k] : slope.mean.v[k];
        store<V>(to, slope(g, read));
        store_bytes<V>(task.winners + (to - task.d), winner);
        return;
      }
      Vec<V> read = slope.mean;
      if (reads) read = avg_pool<V>(task.stage, tile.n, y, x, channel);
      Vec<V> made = slope(g, read);
      const float share = 1.0f / static_cast<float>(pool_count(task.stage, y, x));
#pragma unroll
      for (int k = 0; k < V; ++k) made.v[k] *= share;
      store<V>(to, made);
    });
  }
};

// ---- a state ---------------------------------------------------------------------------------------------------------

// The gradient of an edge's source from all that its stages have handed on, added to `base` or to what earlier launches
// have left in `sums`, where there is either. It goes to `to`, or to `sums` where later launches go on.
// Grid (tiles of the source, edges).
template <int V, typename T> struct Gather {
  static constexpr int kEdges = 3;  // as many as the arguments hold
  struct Item {
    Stage<T> stage;
    const T* d;  // (N, H, W, C) at the output
    const unsigned char* winners;
  };
  struct Edge {
    Image<T> source, base, to;  // base, to: data may be null
    float* sums;                // (N, H, W, C) of the source
    bool first;                 // nothing is in `sums` yet
    Image<T> g;                 // of the node, for an identity
    const float* weight;        // of the identity, null: none
    const float* scales;        // (N) of the images, null: 1
    int count, height, width;   // stages; size of the output
    Item items[kMostOfEdge];
  };
  Tiling tiling;
  int channels;
  Edge edges[kEdges];

  RNAS_DEVICE void operator()(const Block& block) const {
    const Edge& edge = edges[block.y];
    const Tile tile = tile_of(tiling, block.x);
    const Shared shared = shared_of(block, tiling, channels);
    const Image<float> sums{edge.sums, tiling.height, tiling.width, channels};
    const auto sum_at = [&](int row, int column, int channel) {
      return shared.inputs + (row * tiling.tile_width + column) * shared.stride + channel;
    };
    block.each([&](int thread) {
      for (int at = thread; at < tiling.pixels() * shared.stride; at += kThreads) shared.inputs[at] = 0.0f;
    });
    for (int each = 0; each < edge.count; ++each) {
      const Item& item = edge.items[each];
      if (item.stage.kind < Kind::separable) continue;
      const Image<T> d{const_cast<T*>(item.d), edge.height, edge.width, channels};
      if (item.stage.kind == Kind::separable && item.stage.stride == 1) {
        convolve<V>(block, shared, item.stage, tiling, tile, channels, Turn::half, Sum::add,
                    [&](int channel) { return Reader<V, Way::plain, T>(d, tile.n, channel); });
      } else {
        each_pixel<V>(block, tiling, tile, channels, [&](int row, int column, int channel) {
          Vec<V> sum = load<V>(sum_at(row, column, channel));
          add_convolution(item.stage, d, tile.n, tile.y + row, tile.x + column, channel, sum);
          store<V>(sum_at(row, column, channel), sum);
        });
      }
    }
    each_pixel<V>(block, tiling, tile, channels, [&](int row, int column, int channel) {
      const int n = tile.n, y = tile.y + row, x = tile.x + column;
      const Vec<V> convolved = load<V>(sum_at(row, column, channel));
      const Vec<V> state = load<V>(edge.source.at(n, y, x) + channel);
      float* known = sums.at(n, y, x) + channel;
      Vec<V> sum = !edge.first      ? load<V>(known)
                   : edge.base.data ? load<V>(edge.base.at(n, y, x) + channel)
                                    : zeros<V>();
#pragma unroll
      for (int k = 0; k < V; ++k) sum.v[k] += state.v[k] > 0.0f ? convolved.v[k] : 0.0f;
      for (int each = 0; each < edge.count; ++each) {
        const Item& item = edge.items[each];
        if (item.stage.kind == Kind::max_pool) add_pool<true>(edge, item, n, y, x, channel, sum);
        if (item.stage.kind == Kind::avg_pool) add_pool<false>(edge, item, n, y, x, channel, sum);
      }
      if (edge.weight) {
        const Vec<V> g = scaled(load<V>(edge.g.at(n, y, x) + channel), edge.scales, n);
#pragma unroll
        for (int k = 0; k < V; ++k) sum.v[k] += *edge.weight * g.v[k];
      }
      edge.to.data ? store<V>(edge.to.at(n, y, x) + channel, sum) : store<V>(known, sum);
    });
  }

  // The convolutions that the phase above does not take: at stride 2, and dense ones.
  RNAS_DEVICE void add_convolution(const Stage<T>& stage, const Image<T>& d, int n, int y, int x, int channel,
                                   Vec<V>& sum) const {
    // Which output pixel sees (y, x) through a tap that reads (dy, dx) further; false: none.
    const auto seen_by = [&](int dy, int dx, int& at_y, int& at_x) {
      at_y = y - dy, at_x = x - dx;
      if (stage.stride == 2) {
        if (at_y % 2 != 0 || at_x % 2 != 0) return false;
        at_y /= 2, at_x /= 2;
      }
      return d.holds(at_y, at_x);
    };
    int at_y, at_x;
    if (stage.kind == Kind::separable) {
      const int half = stage.kernel / 2, taps = stage.kernel * stage.kernel;
      for (int row = 0; row < stage.kernel; ++row)
        for (int column = 0; column < stage.kernel; ++column) {
          if (!seen_by((row - half) * stage.dilation, (column - half) * stage.dilation, at_y, at_x)) continue;
          const Vec<V> value = load<V>(d.at(n, at_y, at_x) + channel);
#pragma unroll
          for (int k = 0; k < V; ++k)
            sum.v[k] += stage.depthwise[(channel + k) * taps + row * stage.kernel + column] * value.v[k];
        }
      return;
    }
    for (int each = 0; each < stage.parts(); ++each) {
      const Part part = part_of(stage, each, channels);
      if (!seen_by(part.dy, part.dx, at_y, at_x)) continue;
      for (int output = part.first; output < part.last; ++output) {
        const float value = to_float(d.at(n, at_y, at_x)[output]);
        const Vec<V> weights = part.row<V>(output, channel);
#pragma unroll
        for (int k = 0; k < V; ++k) sum.v[k] += value * weights.v[k];
      }
    }
  }

  // kMax: a window hands its gradient to its winner, else to all that it sees.
  template <bool kMax>
  RNAS_DEVICE void add_pool(const Edge& edge, const Item& item, int n, int y, int x, int channel, Vec<V>& sum) const {
    const int stride = item.stage.stride;
    const Image<T> d{const_cast<T*>(item.d), edge.height, edge.width, channels};
    const int64_t first = d.at(n, 0, 0) - d.data + channel;
#pragma unroll
    for (int row = 0; row < 3; ++row)
#pragma unroll
      for (int column = 0; column < 3; ++column) {  // the place in a window at which (y, x) may lie
        int at_y = y - (row - 1), at_x = x - (column - 1);
        if (stride == 2) {
          if (((at_y | at_x) & 1) != 0) continue;
          at_y >>= 1, at_x >>= 1;
        }
        if (!d.holds(at_y, at_x)) continue;
        const int at = (at_y * d.width + at_x) * channels;
        const Vec<V> value = load<V>(d.data + first + at);
        if constexpr (kMax) {
          const Bytes<V> winners = load_bytes<V>(item.winners + first + at);
#pragma unroll
          for (int k = 0; k < V; ++k)
            if (winners.v[k] == row * 3 + column) sum.v[k] += value.v[k];
        } else {
#pragma unroll
          for (int k = 0; k < V; ++k) sum.v[k] += value.v[k];
        }
      }
  }
};

}  // namespace rnas::cuda::mixed
