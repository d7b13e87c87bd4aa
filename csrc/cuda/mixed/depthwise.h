#pragma once

// Depthwise convolutions of a tile from shared memory.
//
// What enters lies there once, normed and rectified, in one plane per channel: the window of the tile. A thread makes
// 4 x 4 outputs of one channel. It has the weights in registers and reads each row of its part of the window in two
// loads of 16 bytes: with 5 x 5 taps, 16 loads feed 400 multiplications. Eight channels side by side read from
// different banks.
//
// So it goes for stride and dilation 1. The others fall into pieces that are so:
//
//   dilation 2, stride 1   Outputs with an even distance share pixels and the others do not: the outputs and the window
//                          fall into 2 x 2 pieces, by the parity of row and column.
//   dilation 2, stride 2   One piece, and of the window every second pixel of every second row.
//   dilation 1, stride 2   Taps with an even distance share pixels: the taps fall into 2 x 2 pieces, each with a window
//                          of every second pixel of every second row; what they make adds up.

#include "mixed/stage.h"

namespace rnas::cuda::mixed {

// A thread's outputs along each axis.
constexpr int kStrip = 4;

// Where the window of a channel has its pixels.
struct Layout {
  int split;                // pieces along each axis, 1 or 2
  int pitch, piece, plane;  // floats of a row, a piece and a channel

  // Pixel (y, x) lies at row(y) + column(x).
  RNAS_DEVICE int row(int y) const { return (y & (split - 1)) * 2 * piece + (y >> (split - 1)) * pitch; }
  RNAS_DEVICE int column(int x) const { return (x & (split - 1)) * piece + (x >> (split - 1)); }
};

// Strips of a piece from top to bottom, the last one perhaps not whole.
RNAS_BOTH int strips_down(const Tiling& tiling, int split) {
  return ((tiling.tile_height + split - 1) / split + kStrip - 1) / kStrip;
}

// Whole strips of outputs in each piece, and what `rows` x `columns` taps reach beyond. Rows begin at a multiple of 16
// bytes, and planes so that those of eight channels take up all banks; pieces of a window are 8 banks apart.
RNAS_BOTH Layout layout_of(const Tiling& tiling, int split, int rows, int columns) {
  const int height = strips_down(tiling, split) * kStrip + rows - 1;
  const int pitch = tiling.tile_width / split + (columns > 1 ? kStrip : 0);
  const int piece = split == 1 || columns == 1 ? height * pitch : height * pitch + (40 - height * pitch % 32) % 32;
  const int plane = split * split * piece;
  return {split, pitch, piece, plane + (36 - plane % 32) % 32};
}

// One piece of the taps of a depthwise convolution, and its window.
struct Window {
  int kernel, split;                   // rows of all taps; pieces of the outputs along each axis
  int apart, first_row, first_column;  // which taps
  int rows, columns;                   // of them
  int height, width;                   // pixels of the window
  Layout layout;

  template <typename T>
  RNAS_DEVICE Window(const Stage<T>& stage, const Tiling& tiling, int apart, int row, int column)
      : kernel(stage.kernel), split(stage.stride == 1 ? stage.dilation : 1), apart(apart), first_row(row),
        first_column(column), rows((kernel - row + apart - 1) / apart), columns((kernel - column + apart - 1) / apart),
        height(tiling.tile_height + split * (rows - 1)), width(tiling.tile_width + split * (columns - 1)),
        layout(layout_of(tiling, split, rows, columns)) {}

  // Where a tap of the piece lies among all of a channel.
  RNAS_DEVICE int tap(int row, int column) const {
    return (first_row + row * apart) * kernel + first_column + column * apart;
  }
};

// run(window) for every piece of the taps.
template <typename T, typename Run>
RNAS_DEVICE void each_window(const Stage<T>& stage, const Tiling& tiling, const Run& run) {
  const int apart = stage.stride == 2 && stage.dilation == 1 ? 2 : 1;
  for (int row = 0; row < apart; ++row)
    for (int column = 0; column < apart; ++column) run(Window(stage, tiling, apart, row, column));
}

// The taps of a window: all of a kernel, known when compiled.
template <int kKernel> struct WholeKernel {
  static constexpr int kRows = kKernel, kColumns = kKernel;

  RNAS_DEVICE bool has(int, int) const { return true; }
  RNAS_DEVICE int index(const Window&, int row, int column) const { return row * kKernel + column; }
};
// A piece of them: at most 3 x 3.
struct PieceOfKernel {
  static constexpr int kRows = 3, kColumns = 3;
  int rows, columns;

  RNAS_DEVICE bool has(int row, int column) const { return row < rows && column < columns; }
  RNAS_DEVICE int index(const Window& window, int row, int column) const { return window.tap(row, column); }
};

// run(taps) with one of these.
template <typename Run> RNAS_DEVICE void with_taps(const Window& window, const Run& run) {
  if (window.apart == 2)
    run(PieceOfKernel{window.rows, window.columns});
  else
    window.kernel == 5 ? run(WholeKernel<5>()) : run(WholeKernel<3>());
}

// How many channels of so many floats each a block takes at once: of `channels` an even share, a multiple of V. So many
// have room in `memory`, a thread for each, and in Shared::extra for their weights.
template <int V> RNAS_DEVICE int channels_at_once(int channels, int floats, int memory) {
  const int most = smaller(memory / floats, kExtra / 25) / V * V;
  const int passes = (channels + most - 1) / most;
  return ((channels + passes - 1) / passes + V - 1) / V * V;
}

// Of `count` channels from `begin` on, the pixels (y + i * step, x + j * step) that from(channel) reads, i < height and
// j < width, into the layout. Part of a phase. Two threads side by side take 2 V channels, the next ones the pixels that
// follow in a row: what they write goes to different banks, and two times V floats are a sector of memory. kAtOnce: loads
// before the first is waited for.
template <int V, int kAtOnce, typename From>
RNAS_DEVICE void fill(int thread, float* window, const Layout& layout, int height, int width, int begin, int count,
                      int y, int x, int step, const From& from) {
  const int vectors = count / V, sides = vectors > 2 ? 2 : 1, lanes = kThreads / 2 / sides;  // more than a row has
  const int side = thread / 2 >= lanes, lane = thread / 2 - side * lanes, down = quotient(lanes, width);
  const int first = quotient(lane, width), column = lane - first * width;
  if (first >= down) return;
  for (int vector = side * 2 + thread % 2; vector < vectors; vector += 2 * sides) {
    const auto reader = from(begin + vector * V);
    const auto source = reader.column(x + column * step);
    float* to = window + vector * V * layout.plane + layout.column(column);
    for (int row = first; row < height; row += kAtOnce * down) {
      decltype(reader.read(source, 0)) raw[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) raw[i] = reader.read(source, y + (row + i * down) * step);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (row + i * down >= height) break;
        const Vec<V> value = reader.made(raw[i]);
#pragma unroll
        for (int k = 0; k < V; ++k) to[layout.row(row + i * down) + k * layout.plane] = value.v[k];
      }
    }
  }
}

// 4 x 4 outputs of one channel, as many as there are in `count` channels of a tile; channels side by side.
struct Strips {
  int across, down, split;

  RNAS_DEVICE Strips(const Tiling& tiling, int split)
      : across(tiling.tile_width / split / kStrip), down(strips_down(tiling, split)), split(split) {}
  RNAS_DEVICE int count() const { return across * down * split * split; }
};

// The first output of a strip: in its piece, and in the tile.
struct Strip {
  int piece, row, column, split;

  RNAS_DEVICE Strip(const Strips& strips, int index) : split(strips.split) {
    const int line = quotient(index, strips.across);
    piece = quotient(line, strips.down);
    row = (line - piece * strips.down) * kStrip;
    column = (index - line * strips.across) * kStrip;
  }
  // Row and column of the tile of output (i, j).
  RNAS_DEVICE int y(int i) const { return (row + i) * split + piece / 2; }
  RNAS_DEVICE int x(int j) const { return (column + j) * split + piece % 2; }
  RNAS_DEVICE int in(const Layout& layout) const { return piece * layout.piece + row * layout.pitch + column; }
};

// Eight floats of a row of a window.
struct Line {
  float v[2 * kStrip];

  RNAS_DEVICE explicit Line(const float* from) {
    const Vec<kStrip> left = load<kStrip>(from), right = load<kStrip>(from + kStrip);
#pragma unroll
    for (int k = 0; k < kStrip; ++k) v[k] = left.v[k], v[kStrip + k] = right.v[k];
  }
};

// half: the taps the other way round, as the gradient of what entered has them.
enum class Turn { none, half };
// What becomes of the tile before.
enum class Sum { overwrite, add };

// The thread's share of the outputs of `count` channels from `begin` on, into shared.inputs or on top of what is there.
template <typename Taps>
RNAS_DEVICE void convolve_strips(int thread, const Shared& shared, const Window& window, const Tiling& tiling,
                                 int begin, int count, Turn turn, bool add, Taps taps) {
  constexpr int kRows = Taps::kRows, kColumns = Taps::kColumns;
  const Strips strips(tiling, window.split);
  const int all = window.kernel * window.kernel;
  const int across = window.split * shared.stride, down = across * tiling.tile_width;  // from an output to the next
  for (int item = thread; item < strips.count() * count; item += kThreads) {
    const int index = quotient(item, count), channel = item - index * count;
    const Strip strip(strips, index);
    const float* known = shared.extra + (turn == Turn::half ? count - 1 - channel : channel) * all;
    const float* entered = shared.window + channel * window.layout.plane + strip.in(window.layout);
    float* to = shared.inputs + begin + channel + (strip.y(0) * tiling.tile_width + strip.x(0)) * shared.stride;
    const int outputs = tiling.tile_height - strip.y(0);  // rows of the tile from the first on
    float weights[kRows][kColumns], made[kStrip][kStrip];
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
        weights[row][column] = taps.has(row, column) ? known[taps.index(window, row, column)] : 0.0f;
#pragma unroll
    for (int i = 0; i < kStrip; ++i)
#pragma unroll
      for (int j = 0; j < kStrip; ++j)
        made[i][j] = add && i * window.split < outputs ? to[i * down + j * across] : 0.0f;
#pragma unroll
    for (int y = 0; y < kStrip + kRows - 1; ++y) {
      const Line line(entered + y * window.layout.pitch);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (y < row || y - row >= kStrip) continue;
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          if (!taps.has(row, column)) continue;
#pragma unroll
          for (int j = 0; j < kStrip; ++j) made[y - row][j] += weights[row][column] * line.v[j + column];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      if (i * window.split >= outputs) break;
#pragma unroll
      for (int j = 0; j < kStrip; ++j) to[i * down + j * across] = made[i][j];
    }
  }
}

// The depthwise convolution of a tile into shared.inputs: from(channel) is the Reader of V channels that enter. Pixels
// of the tile that lie outside of the image get what the window gives.
template <int V, typename T, typename From>
RNAS_DEVICE void convolve(const Block& block, const Shared& shared, const Stage<T>& stage, const Tiling& tiling,
                          const Tile& tile, int channels, Turn turn, Sum sum, const From& from) {
  const int reach = stage.dilation * (stage.kernel / 2), all = stage.kernel * stage.kernel;
  each_window(stage, tiling, [&](const Window& window) {
    const bool add = sum == Sum::add || window.first_row + window.first_column > 0;
    const int some = channels_at_once<V>(channels, window.layout.plane, tiling.window);
    for (int begin = 0; begin < channels; begin += some) {
      const int count = smaller(some, channels - begin);
      block.each([&](int thread) {
        for (int at = thread; at < count * all; at += kThreads)  // turned, channels go backwards too
          shared.extra[turn == Turn::half ? count * all - 1 - at : at] = stage.depthwise[begin * all + at];
        fill<V, 4>(thread, shared.window, window.layout, window.height, window.width, begin, count,
                   tile.y * stage.stride - reach + window.first_row,
                   tile.x * stage.stride - reach + window.first_column, stage.stride, from);
      });
      block.each([&](int thread) {
        with_taps(window, [&](auto taps) {
          convolve_strips(thread, shared, window, tiling, begin, count, turn, add, taps);
        });
      });
    }
  });
}

}  // namespace rnas::cuda::mixed
