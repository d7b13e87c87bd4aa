#include "simd/simd.h"

#include <atomic>
#include <stdexcept>

namespace rnas::cpu {

SimdLevel highest_simd_level() {
#if defined(RNAS_X86)
  // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? SimdLevel::avx512 : avx2 ? SimdLevel::avx2 : SimdLevel::baseline;
#else
  return SimdLevel::baseline;
#endif
}

static std::atomic<SimdLevel>& chosen() {
  static std::atomic<SimdLevel> level{highest_simd_level()};
  return level;
}

SimdLevel simd_level() { return chosen().load(std::memory_order_relaxed); }

void set_simd_level(SimdLevel level) {
  if (level > highest_simd_level()) throw std::invalid_argument("this processor lacks the instructions of that SIMD level");
  chosen().store(level, std::memory_order_relaxed);
}

}  // namespace rnas::cpu
