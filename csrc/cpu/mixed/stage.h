#pragma once

// One convolution of a branch on one image: tiles in, tiles or dense images out. Dense images are [group][pixel][lane].

#include <new>

#include "mixed/plan.h"
#include "mixed/pool.h"
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
  scratch.state = take_tile(arena, plan.groups, s.height, s.width, kHalo, plan.bundle);
  scratch.mid = take_tile(arena, plan.groups, plan.height_out, plan.width_out, kMidHalo);
  scratch.grad = take_tile(arena, plan.groups, plan.height_out, plan.width_out, kHalo, plan.bundle);
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
  else
    load_dense(plan, State{grad_out + at, h * w * pixel, pixel, h, w}, n, to);
}

// Writes (or adds to) `state` from a dense image.
template <bool Add> void store_state(const Plan& plan, const float* from, float* to, int64_t pixel, int64_t pixels) {
  const int64_t whole = plan.shape.channels / kLanes, rest = plan.shape.channels % kLanes;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t group = 0; group < whole; ++group) {
      float* at = to + p * pixel + group * kLanes;
      const Vector v = load(from + (group * pixels + p) * kLanes);
      store(at, Add ? load(at) + v : v);
    }
    if (rest) {
      float* at = to + p * pixel + whole * kLanes;
      const Vector v = load(from + (whole * pixels + p) * kLanes);
      store_part(at, Add ? load_part(at, rest) + v : v, rest);
    }
  }
}

// A node, dense, of image n, to where the caller wants it, if so.
inline void store_node(const Plan& plan, const float* node, int64_t state, int64_t n, float* out) {
  const int64_t pixel = plan.pixel_asked(), at = plan.asked(state), pixels = plan.pixels_out();
  if (at >= 0) store_state<false>(plan, node, out + n * pixels * pixel + at, pixel, pixels);
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

// What a part multiplies, for output rows [first, first + rows): d (groups, rows * width_out).
inline void gather(const Plan& plan, const Convolution& conv, const Part& part, const float* packed, const Tile& in,
                   int64_t first, int64_t rows, float* d) {
  const int64_t width = plan.width_out, half = half_width(static_cast<int>(conv.kernel), static_cast<int>(conv.dilation));
  for (int64_t group = 0; group < plan.groups; ++group) {
    float* to = d + group * rows * width * kLanes;
    const float* plane = in.data + group * in.plane;
    if (conv.kernel > 0) {
      const float* at = plane + (first * conv.stride - half) * in.row - half * kLanes;
      conv.loops.forward(at, in.row, packed + conv.packed + group * conv.kernel * conv.kernel * kLanes, to,
                         width * kLanes, width, rows);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float* at = plane + ((first + r) * conv.stride + part.dy) * in.row + part.dx * kLanes;
      for (int64_t x = 0; x < width; ++x)
        store(to + (r * width + x) * kLanes, load(at + x * conv.stride * kLanes));
    }
  }
}

// Multiply-adds of the depthwise part of a convolution.
inline int64_t depthwise_adds(const Plan& plan, const Convolution& conv, int64_t pixels) {
  return pixels * conv.kernel * conv.kernel * plan.shape.channels;
}

// Calls use(first row, rows) for the chunks of an output image.
template <typename Use> RNAS_INLINE void chunks(const Plan& plan, const Use& use) {
  const int64_t step = chunk_rows(plan);
  for (int64_t first = 0; first < plan.height_out; first += step)
    use(first, step < plan.height_out - first ? step : plan.height_out - first);
}

// The windows of a few images, one image behind the other.
template <int64_t Outputs> struct WindowGrid {
  int64_t height, width, images;
  int64_t across() const { return windows_of(width, Outputs); }
  int64_t down() const { return windows_of(height, Outputs); }

  // Calls run(first window, windows), and after(image, first row, rows) for the rows that are done.
  template <typename Run, typename After> RNAS_INLINE void runs(const Run& run, const After& after) const {
    const int64_t rows = down() * images, band = std::max<int64_t>(1, kRun / across());
    for (int64_t y = 0; y < rows; y += band) {
      const int64_t end = std::min(rows, y + band);
      for (int64_t first = y * across(); first < end * across(); first += kRun)
        run(first, std::min(kRun, end * across() - first));
      for (int64_t image = y / down(); image * down() < end; ++image) {
        const int64_t from = std::max<int64_t>(0, y - image * down()), to = std::min(down(), end - image * down());
        after(image, Outputs * from, std::min(Outputs * to, height) - Outputs * from);
      }
    }
  }

  // Calls use(image, row, first pixel of the row, count, place in the run) for windows [first, first + size), in pieces
  // of `count` side by side.
  template <typename Use> RNAS_INLINE void pieces(int64_t first, int64_t size, const Use& use) const {
    window_rows(first, size, across(), [&](int64_t y, int64_t x, int64_t count, int64_t at) {
      use(y / down(), Outputs * (y % down()), Outputs * x, count, at);
    });
  }
};

// Winograd's positions of the windows of a tile.
template <int64_t Outputs>
void load_windows(const Plan& plan, const Tile& in, const WindowGrid<Outputs>& grid, int64_t first, int64_t size,
                  float* to) {
  grid.pieces(first, size, [&](int64_t image, int64_t y, int64_t x, int64_t count, int64_t at) {
    for (int64_t group = 0; group < plan.groups; ++group)
      windows_forward<Outputs>(in.at(image).data + group * in.plane + (y - 1) * in.row + (x - 1) * kLanes, in.row, count,
                               to + (group * kRun + at) * kLanes, window_step(plan));
  });
}

// y (+)= what a run of windows gives, from its products at the positions.
template <int64_t Outputs, bool Add>
void store_windows(const Plan& plan, const float* products, const WindowGrid<Outputs>& grid, int64_t first, int64_t size,
                   float* out) {
  const int64_t height = grid.height, width = grid.width;
  grid.pieces(first, size, [&](int64_t image, int64_t y, int64_t x, int64_t count, int64_t at) {
    for (int64_t group = 0; group < plan.groups; ++group) {
      float* to = out + (((image * plan.groups + group) * height + y) * width + x) * kLanes;
      const float* from = products + (group * kRun + at) * kLanes;
      for (int64_t t = 0; t < count; ++t)
        window_output<Outputs, Add>(from + t * kLanes, window_step(plan), to + Outputs * t * kLanes, width * kLanes,
                                    height - y, width - x - Outputs * t);
    }
  });
}

// y (+)= the 3x3 convolution at a run of windows. matrices: (positions, padded, padded).
template <bool Add, int64_t Outputs>
void multiply_windows(const Plan& plan, const float* matrices, const Tile& in, const WindowGrid<Outputs>& grid,
                      int64_t first, int64_t size, const Scratch& scratch, Work work, float* y) {
  // With one group the products may overwrite the windows, which then stay in the first cache with the matrices.
  float* const products = plan.groups == 1 ? scratch.windows : scratch.products;
  const int64_t step = window_step(plan), plane = kRun * kLanes, c = plan.shape.channels;
  constexpr int64_t kPositions = position_count(Outputs);
  const Section section(scratch.clock, work, size * kPositions * c * c);
  load_windows(plan, in, grid, first, size, scratch.windows);
  for (int64_t p = 0; p < kPositions; ++p)
    pointwise<false>(scratch.windows + p * step, plane, plan.groups, matrices + p * plan.padded * plan.padded,
                     plan.padded, plan.groups, products + p * step, plane, size, *scratch.ahead);
  store_windows<Outputs, Add>(plan, products, grid, first, size, y);
}

// y (+)= the 3x3 convolution of the images of a tile, dense.
template <bool Add, int64_t Outputs, typename After>
RNAS_INLINE void convolve_windows(const Plan& plan, const float* matrices, const Tile& in,
                                  const WindowGrid<Outputs>& grid, const Scratch& scratch, Work work, float* y,
                                  const After& after) {
  grid.runs(
      [&](int64_t first, int64_t size) {
        multiply_windows<Add>(plan, matrices, in, grid, first, size, scratch, work, y);
      },
      after);
}

// The weight gradients of a 3x3 convolution at the positions, from its inputs and the gradients of its outputs.
template <int64_t Outputs>
void weigh_windows(const Plan& plan, const Convolution& conv, const Tile& in, const Tile& grad,
                   const WindowGrid<Outputs>& grid, const Scratch& scratch, const WeightSums& sums) {
  const int64_t step = window_step(plan), plane = kRun * kLanes, c = plan.shape.channels;
  constexpr int64_t kPositions = position_count(Outputs);
  int64_t since = 0;  // windows that are not in double yet
  grid.runs(
      [&](int64_t first, int64_t size) {
        const Section section(scratch.clock, Work::pointwise_weight, size * kPositions * c * c);
        if (since + size > kFlush) {
          add_up(plan, conv, sums);
          since = 0;
        }
        since += size;
        load_windows(plan, in, grid, first, size, scratch.windows);
        grid.pieces(first, size, [&](int64_t image, int64_t y, int64_t x, int64_t count, int64_t at) {
          for (int64_t group = 0; group < plan.groups; ++group)
            windows_gradient<Outputs>(grad.at(image).data + group * grad.plane + y * grad.row + x * kLanes, grad.row,
                                      count, scratch.products + (group * kRun + at) * kLanes, step);
        });
        for (int64_t p = 0; p < kPositions; ++p)
          pointwise_weight(scratch.windows + p * step, plane, plan.groups, scratch.products + p * step, plane,
                           plan.groups, size, sums.of(conv.packed + p * plan.padded * plan.padded), plan.padded);
      },
      [](int64_t, int64_t, int64_t) {});
}

// Where rows of a gradient are, [group at `plane`][row][pixel][lane].
struct Rows {
  const float* data;
  int64_t row, plane;
};

// As convolve_backward, of a 3x3 convolution by Winograd's algorithm.
template <bool Add, typename Gradient>
RNAS_INLINE void convolve_windows_backward(const Plan& plan, const Convolution& conv, const Packed& packed,
                                           const Tile& in, int64_t images, const Scratch& scratch,
                                           const Gradient& gradient, float* in_grad, const WeightSums* sums) {
  const int64_t height = plan.height_out, width = plan.width_out;
  const Tile& grad = scratch.grad;
  for (int64_t i = 0; i < images; ++i)
    chunks(plan, [&](int64_t first, int64_t rows) {
      const Tile at = grad.at(i);
      float* const to = at.data + first * at.row;
      const Rows g = gradient(i, first, rows, Tile{to, at.row, at.plane, 0, 0});
      for (int64_t group = 0; group < plan.groups && g.data != to; ++group)
        for (int64_t r = 0; r < rows; ++r)
          std::memcpy(to + group * at.plane + r * at.row, g.data + group * g.plane + r * g.row,
                      width * kLanes * sizeof(float));
    });
  with_outputs(conv, [&](auto outputs) {
    const WindowGrid<decltype(outputs)::value> grid{height, width, images};
    if (sums) weigh_windows(plan, conv, in, grad, grid, scratch, *sums);
    if (in_grad)
      convolve_windows<Add>(plan, packed.backward + conv.packed, grad, grid, scratch, Work::pointwise_input, in_grad,
                            [](int64_t, int64_t, int64_t) {});
  });
}

// y (+)= conv(tile), dense, of the first `images` of a bundle. after(image, first, rows) is called when these rows of y
// are there.
template <bool Add, typename After>
RNAS_INLINE void convolve(const Plan& plan, const Convolution& conv, const float* packed, const Tile& in, int64_t images,
                          const Scratch& scratch, float* y, const After& after) {
  if (conv.winograd)
    return with_outputs(conv, [&](auto outputs) {
      const WindowGrid<decltype(outputs)::value> grid{plan.height_out, plan.width_out, images};
      convolve_windows<Add>(plan, packed + conv.packed, in, grid, scratch, Work::pointwise, y, after);
    });
  for (int64_t i = 0; i < images; ++i)
    chunks(plan, [&](int64_t first, int64_t rows) {
      const int64_t pixels = rows * plan.width_out, plane = pixels * kLanes;
      for (const Part& part : conv.parts) {
        {
          const Section section(scratch.clock, Work::depthwise, depthwise_adds(plan, conv, pixels));
          gather(plan, conv, part, packed, in.at(i), first, rows, scratch.d);
        }
        float* to = y + i * plan.image_out() + part.group * plan.plane_out() + first * plan.width_out * kLanes;
        const Section section(scratch.clock, Work::pointwise, pixels * plan.shape.channels * part.count);
        const auto multiply = Add || part.adds ? pointwise<true> : pointwise<false>;
        multiply(scratch.d, plane, plan.groups, packed + part.packed + part.group * kLanes, plan.padded, part.groups, to,
                 plan.plane_out(), pixels, *scratch.ahead);
      }
      after(i, first, rows);
    });
}

// convolve_backward of one image, by products over channels and a depthwise part.
template <bool Add, typename Gradient>
RNAS_INLINE void convolve_image_backward(const Plan& plan, const Convolution& conv, const Packed& packed,
                                         const Tile& in, int64_t height, int64_t width, const Scratch& scratch,
                                         const Gradient& gradient, float* in_grad, const WeightSums* sums) {
  const int64_t band = std::max<int64_t>(1, kFlush / plan.width_out);  // rows of the output
  int64_t flushed = 0;
  const int64_t groups = plan.groups, out_width = plan.width_out, taps = conv.kernel * conv.kernel;
  const bool depthwise = conv.kernel > 0, pointwise_alone = conv.is_pointwise();
  if (!depthwise && !pointwise_alone && in_grad && !Add)
    std::memset(in_grad, 0, groups * height * width * kLanes * sizeof(float));
  chunks(plan, [&](int64_t first, int64_t rows) {
    const int64_t pixels = rows * out_width, plane = pixels * kLanes;
    const Rows at = gradient(first, rows, Tile{scratch.chunk, out_width * kLanes, plane, 0, 0});
    const float* const g = at.data;
    const int64_t g_plane = at.plane;
    if (sums && first - flushed >= band) {
      add_up(plan, conv, *sums);
      flushed = first;
    }
    for (const Part& part : conv.parts) {
      if (sums) {
        {
          const Section section(scratch.clock, Work::depthwise, depthwise_adds(plan, conv, pixels));
          gather(plan, conv, part, packed.forward, in, first, rows, scratch.d);
        }
        const Section section(scratch.clock, Work::pointwise_weight, pixels * plan.shape.channels * part.count);
        pointwise_weight(scratch.d, plane, groups, g + part.group * g_plane, g_plane, part.groups, pixels,
                         sums->of(part.packed + part.group * kLanes), plan.padded);
      }
      const float* transposed = packed.backward + part.packed + part.group * kLanes * plan.padded;
      if (!depthwise && !in_grad) continue;
      const Section section(scratch.clock, Work::pointwise_input, pixels * plan.shape.channels * part.count);
      if (depthwise) {
        for (int64_t r = 0; r < rows; ++r)
          pointwise<false>(g + r * out_width * kLanes, g_plane, groups, transposed, plan.padded, groups,
                           scratch.grad.data + (first + r) * scratch.grad.row, scratch.grad.plane, out_width,
                           *scratch.ahead);
      } else if (pointwise_alone) {
        pointwise<Add>(g, g_plane, groups, transposed, plan.padded, groups, in_grad + first * width * kLanes,
                       height * width * kLanes, pixels, *scratch.ahead);
      } else {
        pointwise<false>(g + part.group * g_plane, g_plane, part.groups, transposed, plan.padded, groups,
                         scratch.shifted, plane, pixels, *scratch.ahead);
        for (int64_t group = 0; group < groups; ++group)
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t y = (first + r) * conv.stride + part.dy;
            if (y < 0 || y >= height) continue;
            float* to = in_grad + (group * height + y) * width * kLanes;
            const float* from = scratch.shifted + group * plane + r * out_width * kLanes;
            for (int64_t i = 0, x = part.dx; i < out_width; ++i, x += conv.stride)
              if (x >= 0 && x < width) add_to(to + x * kLanes, load(from + i * kLanes));
          }
      }
    }
  });
  if (!depthwise) return;
  const int64_t half = half_width(static_cast<int>(conv.kernel), static_cast<int>(conv.dilation));
  const Tile& grad = scratch.grad;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t weights = conv.packed + group * taps * kLanes;
    const float* plane = grad.data + group * grad.plane;
    const int64_t adds = plan.pixels_out() * taps * std::min(kLanes, plan.shape.channels - group * kLanes);
    for (int64_t y = 0; sums && y < plan.height_out; y += band) {
      const Section section(scratch.clock, Work::depthwise_weight, y == 0 ? adds : 0);
      if (y > 0) add_up(conv, *sums, weights, taps * kLanes);
      conv.loops.weight(in.data + group * in.plane + (y * conv.stride - half) * in.row - half * kLanes, in.row,
                        plane + y * grad.row, grad.row, std::min(band, plan.height_out - y), out_width, sums->of(weights));
    }
    if (!in_grad) continue;
    const Section section(scratch.clock, Work::depthwise_input, adds);
    float* to = in_grad + group * height * width * kLanes;
    if (conv.stride == 1) {
      const auto rows = Add ? conv.loops.backward_add : conv.loops.backward_set;
      rows(plane - half * (grad.row + kLanes), grad.row, packed.backward + weights, to, width * kLanes, width, height);
    } else {
      if (!Add) std::memset(to, 0, height * width * kLanes * sizeof(float));
      for (int64_t y = 0; y < height; ++y)
        conv.loops.transposed(plane, grad.row, packed.forward + weights, to + y * width * kLanes, y, width);
    }
  }
}

// The transpose of convolve, and its weight gradients. gradient(image, first, rows, tile) gives the gradient of these rows
// of the output, which it may write to the tile, without gaps between the rows where there are none in the tile. in_grad
// (images, groups, height * width of the input) is set or added to; null: not wanted. sums: a thread's weight sums in the
// packed order, which are left with what is less than kFlush products old in their float32 part; null: not wanted.
template <bool Add, typename Gradient>
RNAS_INLINE void convolve_backward(const Plan& plan, const Convolution& conv, const Packed& packed, const Tile& in,
                                   int64_t images, int64_t height, int64_t width, const Scratch& scratch,
                                   const Gradient& gradient, float* in_grad, const WeightSums* sums) {
  if (!sums && !in_grad) return;
  if (conv.winograd)
    return convolve_windows_backward<Add>(plan, conv, packed, in, images, scratch, gradient, in_grad, sums);
  for (int64_t i = 0; i < images; ++i)
    convolve_image_backward<Add>(
        plan, conv, packed, in.at(i), height, width, scratch,
        [&](int64_t first, int64_t rows, const Tile& to) { return gradient(i, first, rows, to); },
        in_grad ? in_grad + i * plan.padded * height * width : nullptr, sums);
}

// ---- sums over pixels ------------------------------------------------------------------------------------------------

// Mean and sum of squared distances from it, per channel, of what has been added so far.
struct Moments {
  double *mean, *squares;  // (padded)
};

// Adds a run of pixels to the moments of `before` values. Short runs are summed in float32 around a value among their
// own, the mean of their first pixels, so that no value far from the others takes digits away, and merged in double
// (Chan, Golub, LeVeque 1979).
inline void add_moments(int64_t groups, const float* y, int64_t y_plane, int64_t pixels, int64_t before,
                        const Moments& to) {
  constexpr int kFirst = 8;
  if (before == 0) {
    std::memset(to.mean, 0, groups * kLanes * sizeof(double));
    std::memset(to.squares, 0, groups * kLanes * sizeof(double));
  }
  for (int64_t start = 0; start < pixels; start += 2 * kChunk) {
    const int64_t count = std::min(2 * kChunk, pixels - start), total = before + start + count;
    const double weight = static_cast<double>(count) / static_cast<double>(total);
    const double between = static_cast<double>(before + start) * weight, exact = 1.0 / static_cast<double>(count);
    for (int64_t group = 0; group < groups; ++group) {
      const float* at = y + group * y_plane + start * kLanes;
      Vector pivot = load(at);
      if (count >= kFirst) {
#pragma GCC unroll 8
        for (int i = 1; i < kFirst; ++i) pivot += load(at + i * kLanes);
        pivot *= set(1.0f / kFirst);
      }
      Vector sum[4] = {}, square[4] = {};
      int64_t p = 0;
      for (; p + 4 <= count; p += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vector v = load(at + (p + i) * kLanes) - pivot;
          sum[i] += v;
          square[i] = fma(v, v, square[i]);
        }
      for (; p < count; ++p) {
        const Vector v = load(at + p * kLanes) - pivot;
        sum[0] += v;
        square[0] = fma(v, v, square[0]);
      }
      float pivots[kLanes], rests[kLanes], squares[kLanes];
      store(pivots, pivot);
      store(rests, (sum[0] + sum[1]) + (sum[2] + sum[3]));
      store(squares, (square[0] + square[1]) + (square[2] + square[3]));
      double *mean = to.mean + group * kLanes, *all = to.squares + group * kLanes;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const double rest = rests[lane], own = pivots[lane] + rest * exact, delta = own - mean[lane];
        mean[lane] += delta * weight;
        all[lane] += squares[lane] - rest * rest * exact + delta * delta * between;
      }
    }
  }
}

// sum[c] += sum of g * (y - pivot) over a run of pixels. A null y stands for ones: the sum of g.
inline void add_dot(const Plan& plan, const float* g, int64_t g_plane, const float* y, int64_t y_plane, int64_t pixels,
                    const float* pivot, float* sum) {
  for (int64_t group = 0; group < plan.groups; ++group) {
    const Vector k = pivot ? load(pivot + group * kLanes) : zero();
    const float *gs = g + group * g_plane, *ys = y ? y + group * y_plane : nullptr;
    Vector a[4] = {load(sum + group * kLanes)};
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __builtin_prefetch(gs + (p + i + 32) * kLanes);
        if (ys) __builtin_prefetch(ys + (p + i + 32) * kLanes);
        const Vector v = load(gs + (p + i) * kLanes);
        a[i] = ys ? fma(v, load(ys + (p + i) * kLanes) - k, a[i]) : a[i] + v;
      }
    for (; p < pixels; ++p) {
      const Vector v = load(gs + p * kLanes);
      a[0] = ys ? fma(v, load(ys + p * kLanes) - k, a[0]) : a[0] + v;
    }
    store(sum + group * kLanes, (a[0] + a[1]) + (a[2] + a[3]));
  }
}

// to[c] += sum over an output image of g * (y - pivot) (y null: of g), in float32 over at most kFlush pixels. scratch:
// (padded) floats.
inline void add_dot(const Plan& plan, const float* g, const float* y, const float* pivot, float* scratch, double* to) {
  for (int64_t start = 0; start < plan.pixels_out(); start += kFlush) {
    const int64_t at = start * kLanes;
    std::memset(scratch, 0, plan.padded * sizeof(float));
    add_dot(plan, g + at, plan.plane_out(), y ? y + at : nullptr, plan.plane_out(),
            std::min(kFlush, plan.pixels_out() - start), pivot, scratch);
    for (int64_t c = 0; c < plan.padded; ++c) to[c] += scratch[c];
  }
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
