#pragma once

// Memory for one call, and the threads that share its work.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "mixed/vector.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// Hands out a workspace piece by piece. On a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T> T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    // A further line keeps pieces of a power of two from falling on the same cache sets.
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64 + 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Images with a halo of zeros, one behind the other.
struct Tile {
  float* data;  // pixel (0, 0) of the first group of the first
  int64_t row, plane, halo, image;
  Tile at(int64_t i) const { return {data + i * image, row, plane, halo, image}; }
};

inline Tile take_tile(Arena& arena, int64_t groups, int64_t height, int64_t width, int64_t halo, int64_t images = 1) {
  const int64_t row = (width + 2 * halo) * kLanes, plane = (height + 2 * halo) * row;
  float* memory = arena.take<float>(images * groups * plane);
  return {memory ? memory + halo * row + halo * kLanes : nullptr, row, plane, halo, groups * plane};
}

inline void clear(const Tile& tile, int64_t groups, int64_t images = 1) {
  for (int64_t i = 0; i < images; ++i)
    std::memset(tile.at(i).data - tile.halo * (tile.row + kLanes), 0, groups * tile.plane * sizeof(float));
}

// ---- threads ---------------------------------------------------------------------------------------------------------

// work(thread, begin, end) on shares of [0, count) that depend on `count` and the number of threads alone.
template <typename Work> void parallel(int threads, int64_t count, const Work& work) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    if (count > 0) work(0, int64_t{0}, count);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t begin = count * thread / team, end = count * (thread + 1) / team;
    if (begin < end) work(static_cast<int>(thread), begin, end);
  }
#else
  work(0, int64_t{0}, count);
#endif
}

// work(thread, take), where take() gives the next of [0, count) or -1. Each thread has a share of its own, front to back;
// one that is done takes from the back of the others'. For work whose results do not depend on who does it; where they
// do, with `fixed` shares.
template <typename Work> void parallel_shared(int threads, int64_t count, const Work& work, bool fixed = false) {
  if (fixed)
    return parallel(threads, count, [&](int thread, int64_t begin, int64_t end) {
      work(thread, [&]() -> int64_t { return begin < end ? begin++ : -1; });
    });
  struct alignas(64) Share {
    std::atomic<uint64_t> range;  // begin in the upper half, end in the lower
  };
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
  std::vector<Share> shares(threads);
  for (int64_t each = 0; each < threads; ++each)
    shares[each].range = static_cast<uint64_t>(count * each / threads) << 32 | (count * (each + 1) / threads);
  parallel(threads, threads, [&](int own, int64_t, int64_t) {
    const auto take = [&]() -> int64_t {
      for (int each = 0; each < threads; ++each) {
        std::atomic<uint64_t>& range = shares[(own + each) % threads].range;
        for (uint64_t now = range; now >> 32 < (now & 0xffffffff);)
          if (range.compare_exchange_weak(now, each == 0 ? now + (uint64_t{1} << 32) : now - 1))
            return static_cast<int64_t>(each == 0 ? now >> 32 : (now & 0xffffffff) - 1);
      }
      return -1;
    };
    work(own, take);
  });
}

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
