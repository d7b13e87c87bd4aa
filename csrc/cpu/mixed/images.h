#pragma once

// Images on their way through a cell: states, tiles and dense images, what a thread needs while it works on them, and the
// loops that bring one into the form of another. Dense images are [group][pixel][lane].

#include <new>

#include "mixed/memory.h"
#include "mixed/plan.h"
#include "mixed/planes.h"
#include "mixed/section.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// A state: as the caller stores it, channels last and perhaps a slice of more channels, or dense.
struct State {
  const float* data;
  int64_t image, pixel;  // distances in floats
  int64_t height, width;
  int64_t group = kLanes;  // likewise, of the groups of channels
  bool dense() const { return pixel == kLanes && group == height * width * kLanes; }
};

inline State dense_state(const float* data, const Plan& plan, int64_t height, int64_t width) {
  return {data, height * width * plan.padded, kLanes, height, width, height * width * kLanes};
}

// Calls use(group, pixel's y, pixel's x, values) for every pixel and group of image n, row by row.
template <typename Use> RNAS_INLINE void visit(const State& state, int64_t n, int64_t channels, const Use& use) {
  const float* row = state.data + n * state.image;
  const int64_t whole = channels / kLanes, rest = channels % kLanes;
  for (int64_t y = 0; y < state.height; ++y, row += state.width * state.pixel) {
    for (int64_t group = 0; group < whole; ++group)
      for (int64_t x = 0; x < state.width; ++x) use(group, y, x, load(row + x * state.pixel + group * state.group));
    for (int64_t x = 0; x < state.width && rest; ++x)
      use(whole, y, x, load_part(row + x * state.pixel + whole * state.group, rest));
  }
}

// What a thread needs while it works on one convolution of one image.
struct Scratch {
  Tile state, mid;             // inputs of the first (of a bundle) and of the second stage
  Tile grad;                   // gradient of a depthwise output, or of those of a bundle
  float *d, *chunk, *shifted;  // (groups, pixels of a chunk) each
  float *windows, *products;   // (positions, window_step) each, before and after Winograd's matrices
  float* state_grad;           // (images of a bundle, groups, height * width) gradient behind the first ReLU
  float* mid_grad;             // (groups, height_out * width_out) likewise of the second
  float* pool_rows;            // (height + height_out, width_out)
  float* sums;                 // (4, padded) running sums
  Ahead* ahead;                // what the next image will read
  Clock* clock;                // of this thread; null where no profile is taken
};

// Rows of a chunk: more pixels where there are few channels, as each chunk has a price of its own.
inline int64_t chunk_rows(const Plan& plan) {
  return std::max<int64_t>(1, std::max(kChunk, 2 * kChunk / plan.groups) / plan.width_out);
}

// Distance of Winograd's positions in a run of windows, (groups, kRun, lanes). A further line keeps the positions of a
// window from falling on the same cache sets.
inline int64_t window_step(const Plan& plan) { return kRun * plan.padded + kLanes; }

inline Scratch take_scratch(Arena& arena, const Plan& plan, int thread) {
  const MixedShape& s = plan.shape;
  Scratch scratch{};
  const int64_t chunk = plan.padded * chunk_rows(plan) * plan.width_out;
  scratch.state = take_tile(arena, plan.groups, s.height, s.width, plan.halo, plan.bundle);
  scratch.mid = take_tile(arena, plan.groups, plan.height_out, plan.width_out, kMidHalo);
  scratch.grad = take_tile(arena, plan.groups, plan.height_out, plan.width_out, plan.halo, plan.bundle);
  scratch.d = arena.take<float>(chunk);
  scratch.chunk = arena.take<float>(chunk);
  scratch.shifted = arena.take<float>(chunk);
  const int64_t run = plan.winograd ? position_count(plan.winograd) * window_step(plan) : 0;
  scratch.windows = arena.take<float>(run);
  scratch.products = arena.take<float>(run);
  scratch.state_grad = arena.take<float>(plan.bundle * plan.padded * s.height * s.width);
  scratch.mid_grad = arena.take<float>(plan.image_out());
  scratch.pool_rows = arena.take<float>((s.height + plan.height_out) * plan.width_out * kLanes);
  scratch.sums = arena.take<float>(4 * plan.padded);
  scratch.ahead = arena.take<Ahead>(1);
  if (scratch.ahead) new (scratch.ahead) Ahead();
  scratch.clock = clock_of(thread);
  return scratch;
}

// Images [n, n + images) of a state will be read soon.
inline void announce(const Scratch& s, const Plan& plan, const State& state, int64_t n, int64_t images = 1) {
  const float* data = state.data + n * state.image;
  const int64_t pixels = images * state.height * state.width, c = plan.shape.channels;
  if (state.pixel == c || state.dense()) return s.ahead->add(data, pixels * (state.dense() ? plan.padded : c) / 16 + 1);
  for (int64_t at = 0; at < c; at += 16) s.ahead->add(data + at, pixels, state.pixel * sizeof(float));
}

// A dense image of `pixels` pixels will be read or written soon.
inline void announce(const Scratch& s, const Plan& plan, const float* image, int64_t pixels) {
  s.ahead->add(image, pixels * plan.padded / 16);
}

// A tile whose planes have the size of state `source`: inputs and nodes share one piece of memory.
inline Tile sized(const Tile& tile, int64_t height, int64_t width) {
  const float* memory = tile.data - tile.halo * (tile.row + kLanes);
  const int64_t row = (width + 2 * tile.halo) * kLanes;
  return {const_cast<float*>(memory) + tile.halo * (row + kLanes), row, (height + 2 * tile.halo) * row, tile.halo,
          tile.image};
}

// relu(state) into a tile. signs (groups, height * width), where wanted, receive where it lets gradients through.
inline void load_relu(const Plan& plan, const State& state, int64_t n, const Tile& tile, Bits* signs) {
  const int64_t pixels = state.height * state.width;
  visit(state, n, plan.shape.channels, [&](int64_t group, int64_t y, int64_t x, Vector v) {
    store(tile.data + group * tile.plane + y * tile.row + x * kLanes, relu(v));
    if (signs) signs[group * pixels + y * state.width + x] = positive(v);
  });
}

// `direction` where relu(state) lets it through: the derivative of relu along it.
inline void load_relu_linear(const Plan& plan, const State& state, const State& direction, int64_t n, const Tile& tile) {
  const int64_t rest = plan.shape.channels % kLanes;
  visit(state, n, plan.shape.channels, [&](int64_t group, int64_t y, int64_t x, Vector v) {
    const float* at = direction.data + n * direction.image + (y * state.width + x) * direction.pixel +
                      group * direction.group;
    const Vector along = rest && group == plan.groups - 1 ? load_part(at, rest) : load(at);
    store(tile.data + group * tile.plane + y * tile.row + x * kLanes, keep(positive(v), along));
  });
}

// A state as it is, dense.
inline void load_dense(const Plan& plan, const State& state, int64_t n, float* to) {
  const int64_t pixels = state.height * state.width;
  visit(state, n, plan.shape.channels, [&](int64_t group, int64_t y, int64_t x, Vector v) {
    store(to + (group * pixels + y * state.width + x) * kLanes, v);
  });
}

// The gradient of a state as the caller gives it, image n, dense: zero for an input, and for a node that is not asked
// for.
inline void begin_gradient(const Plan& plan, const float* grad_out, int64_t state, int64_t n, float* to) {
  const int64_t h = plan.height_out, w = plan.width_out, pixel = plan.pixel_asked(), at = plan.asked(state);
  if (at < 0)
    std::memset(to, 0, plan.height(state) * plan.width(state) * plan.padded * sizeof(float));
  else if (plan.shape.planes_out)
    load_planes(plan, grad_out + (n * pixel + at) * h * w, h * w, to);
  else
    load_dense(plan, State{grad_out + at, h * w * pixel, pixel, h, w}, n, to);
}

// Writes `to` from a dense image.
inline void store_state(const Plan& plan, const float* from, float* to, int64_t pixel, int64_t pixels) {
  const int64_t whole = plan.shape.channels / kLanes, rest = plan.shape.channels % kLanes;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t group = 0; group < whole; ++group) {
      store(to + p * pixel + group * kLanes, load(from + (group * pixels + p) * kLanes));
    }
    if (rest) store_part(to + p * pixel + whole * kLanes, load(from + (whole * pixels + p) * kLanes), rest);
  }
}

// A node, dense, of image n, to where the caller wants it, if so.
inline void store_node(const Plan& plan, const float* node, int64_t state, int64_t n, float* out) {
  const int64_t pixel = plan.pixel_asked(), at = plan.asked(state), pixels = plan.pixels_out();
  if (at < 0) return;
  if (plan.shape.planes_out)
    store_planes(plan, node, pixels, out + (n * pixel + at) * pixels);
  else
    store_state(plan, node, out + n * pixels * pixel + at, pixel, pixels);
}

// The gradient of an input, dense, of image n, to where the caller wants it.
inline void store_gradient(const Plan& plan, const float* gradient, int64_t state, int64_t n, void* out) {
  const int64_t c = plan.shape.channels, pixels = plan.height(state) * plan.width(state);
  float* to = static_cast<float*>(out) + n * pixels * c;
  if (plan.shape.planes_grad)
    store_planes(plan, gradient, pixels, to);
  else
    store_state(plan, gradient, to, c, pixels);
}

// relu(y * scale + shift) into the tile of the second stage. y dense, scale and shift (padded).
inline void load_mid(const Plan& plan, const float* y, const float* scale, const float* shift, const Tile& tile,
                     Bits* signs) {
  const int64_t height = plan.height_out, width = plan.width_out;
  for (int64_t group = 0; group < plan.groups; ++group) {
    const Vector a = load(scale + group * kLanes), b = load(shift + group * kLanes);
    for (int64_t row = 0; row < height; ++row) {
      const float* from = y + (group * height + row) * width * kLanes;
      float* to = tile.data + group * tile.plane + row * tile.row;
      for (int64_t x = 0; x < width; ++x) {
        const Vector v = fma(load(from + x * kLanes), a, b);
        store(to + x * kLanes, relu(v));
        if (signs) signs[(group * height + row) * width + x] = positive(v);
      }
    }
  }
}

// The derivative of load_mid (scale 1) along `direction`, dense.
inline void load_mid_linear(const Plan& plan, const float* y, const float* shift, const float* direction,
                            const Tile& tile) {
  const int64_t height = plan.height_out, width = plan.width_out;
  for (int64_t group = 0; group < plan.groups; ++group) {
    const Vector b = load(shift + group * kLanes);
    for (int64_t row = 0; row < height; ++row) {
      const int64_t from = (group * height + row) * width * kLanes;
      float* to = tile.data + group * tile.plane + row * tile.row;
      for (int64_t x = 0; x < width; ++x)
        store(to + x * kLanes, keep(positive(load(y + from + x * kLanes) + b), load(direction + from + x * kLanes)));
    }
  }
}

// Calls use(first row, rows) for the chunks of an output image.
template <typename Use> RNAS_INLINE void chunks(const Plan& plan, const Use& use) {
  const int64_t step = chunk_rows(plan);
  for (int64_t first = 0; first < plan.height_out; first += step)
    use(first, step < plan.height_out - first ? step : plan.height_out - first);
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
