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
// A kernel whose vectors hold channels wastes the lanes beyond them, so one with few channels is better off with short
// vectors: mixed_op.cpp is compiled once more for avx2 and avx512 with vectors of four floats, as avx2_narrow and
// avx512_narrow, and RNAS_SELECT_WIDTH(op, channels) takes the number of channels into account.
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
#define RNAS_DECLARE_NARROW(op)                          \
  namespace rnas::cpu {                                  \
  namespace avx2_narrow { decltype(rnas::cpu::op) op; }  \
  namespace avx512_narrow { decltype(rnas::cpu::op) op; } \
  }
#define RNAS_SELECT_WIDTH(op, channels)                                                    \
  (simd_level() == SimdLevel::baseline || (channels) > 8 ? RNAS_SELECT(op)                 \
   : (channels) > 4                                      ? rnas::cpu::avx2::op             \
   : simd_level() == SimdLevel::avx2                     ? rnas::cpu::avx2_narrow::op      \
                                                         : rnas::cpu::avx512_narrow::op)
#else
#define RNAS_DECLARE_NARROW(op)
#define RNAS_SELECT_WIDTH(op, channels) rnas::cpu::baseline::op
#define RNAS_DECLARE_LEVELS(op) \
  namespace rnas::cpu::baseline { decltype(rnas::cpu::op) op; }
#define RNAS_SELECT(op) rnas::cpu::baseline::op
#endif
