#pragma once

// Memory of results and of what forward passes keep, handed on from one step of a search to the next.
//
// Such memory is taken by the hundred megabytes and given back all at once, so that the C library would return it to the
// system after every step: touching the fresh pages then costs a tenth of the next step. It lies on huge pages where
// Linux grants them.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rnas::bind {

// Free memory, oldest first. Any thread may take and give back. Together with what is in use it stays within what was in
// use at once at the most, and a quarter of that: where sizes vary from step to step, blocks that nothing fits go.
class FreeMemory {
 public:
  struct Block {
    void* data;
    int64_t size;
  };

  explicit FreeMemory(size_t most) : most_(most) {}
  ~FreeMemory() { empty(); }
  FreeMemory(const FreeMemory&) = delete;

  Block take(int64_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = free_.rbegin(); block != free_.rend(); ++block)  // the newest: most of it is in a cache
        if (size <= block->size && block->size <= size + size / 10) {
          const Block found = *block;
          free_.erase(std::next(block).base());
          count(found.size);
          return found;
        }
      count(size);
    }
    try {
      return {allocate(size), size};
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      in_use_ -= size;
      throw;
    }
  }

  void give_back(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= block.size;
    free_.push_back(block);
    shrink();
  }

  void empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block& block : free_) std::free(block.data);
    free_.clear();
    peak_ = in_use_;
  }

  std::vector<int64_t> sizes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t> found;
    for (const Block& block : free_) found.push_back(block.size);
    return found;
  }

 private:
  static void* allocate(int64_t size) {
    constexpr int64_t kHugePage = 2 << 20;
    const bool huge = size >= kHugePage;
    void* data = nullptr;
    if (posix_memalign(&data, huge ? kHugePage : 64, static_cast<size_t>(size))) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (huge) madvise(data, static_cast<size_t>(size / kHugePage * kHugePage), MADV_HUGEPAGE);  // a wish: may fail
#endif
    return data;
  }

  // So many bytes more are in use.
  void count(int64_t size) {
    in_use_ += size;
    peak_ = std::max(peak_, in_use_);
    shrink();
  }

  void shrink() {
    int64_t all = in_use_;
    for (const Block& block : free_) all += block.size;
    while (!free_.empty() && (free_.size() > most_ || all > peak_ + peak_ / 4)) {
      all -= free_.front().size;
      std::free(free_.front().data);
      free_.erase(free_.begin());
    }
  }

  const size_t most_;
  mutable std::mutex mutex_;
  std::vector<Block> free_;
  int64_t in_use_ = 0, peak_ = 0;  // bytes; the most since the last empty()
};

// Memory in use. It goes back where it came from, which lives as long as this.
class Piece {
 public:
  Piece(std::shared_ptr<FreeMemory> home, int64_t size) : home_(std::move(home)), size_(size), block_(home_->take(size)) {}
  ~Piece() { home_->give_back(block_); }
  Piece(const Piece&) = delete;

  void* data() const { return block_.data; }
  int64_t size() const { return size_; }

 private:
  std::shared_ptr<FreeMemory> home_;
  int64_t size_;
  FreeMemory::Block block_;
};

}  // namespace rnas::bind
