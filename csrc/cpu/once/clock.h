#pragma once

// The clocks behind rnas/profile.h.

#include "rnas/profile.h"

#if defined(RNAS_X86)
#include <x86intrin.h>
#else
#include <chrono>
#endif

namespace rnas::cpu {

// What one thread has spent; a line of the cache of its own.
struct alignas(64) Clock {
  uint64_t ticks[kWorks];
  int64_t multiply_adds[kWorks];
};

// Of a thread of the running kernel; null where no profile is taken.
Clock* clock_of(int thread);

// The whole of one kernel, by all its threads. One at the top of every public function that has sections.
class Whole {
 public:
  explicit Whole(int threads);
  ~Whole();
  Whole(const Whole&) = delete;

 private:
  int threads_;
  double begin_;
};

static inline uint64_t ticks_now() {
#if defined(RNAS_X86)
  return __rdtsc();
#else
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

}  // namespace rnas::cpu
