#pragma once

// Run-time choice of the instruction set.
//
// Every file in csrc/cpu/ is compiled once per level with RNAS_LEVEL set to baseline, avx2 or avx512. It defines its
// kernel in `namespace rnas::cpu::RNAS_LEVEL` and, in the baseline copy alone (RNAS_LEVEL_baseline), the public
// function:
//
//   RNAS_DECLARE_LEVELS(op)                       after the op's header
//   void op(args) { RNAS_SELECT(op)(args); }
//
// Kernels keep their helpers static: an inline function shared between the copies could reach a machine that lacks the
// instructions of the copy the linker kept.

namespace rnas::cpu {

enum class SimdLevel { baseline = 0, avx2 = 1, avx512 = 2 };

SimdLevel highest_simd_level();        // what this processor and this build have
SimdLevel simd_level();                // in use: the highest unless set
void set_simd_level(SimdLevel level);  // for tests; throws std::invalid_argument above the highest

}  // namespace rnas::cpu

#if defined(RNAS_X86)
#define RNAS_DECLARE_LEVELS(op)                       \
  namespace rnas::cpu {                               \
  namespace baseline { decltype(rnas::cpu::op) op; }  \
  namespace avx2 { decltype(rnas::cpu::op) op; }      \
  namespace avx512 { decltype(rnas::cpu::op) op; }    \
  }
#define RNAS_SELECT(op)                                          \
  (simd_level() == SimdLevel::avx512 ? rnas::cpu::avx512::op     \
   : simd_level() == SimdLevel::avx2 ? rnas::cpu::avx2::op       \
                                     : rnas::cpu::baseline::op)
#else
#define RNAS_DECLARE_LEVELS(op) \
  namespace rnas::cpu::baseline { decltype(rnas::cpu::op) op; }
#define RNAS_SELECT(op) rnas::cpu::baseline::op
#endif
