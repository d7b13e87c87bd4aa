#pragma once

#include "once/clock.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// Counts its own lifetime, and some multiply-adds, as one kind of work. Sections do not nest.
class Section {
 public:
  Section(Clock* clock, Work work, int64_t multiply_adds = 0) : clock_(clock), work_(static_cast<int>(work)) {
    if (!clock_) return;
    clock_->multiply_adds[work_] += multiply_adds;
    begin_ = ticks_now();
  }
  ~Section() {
    if (clock_) clock_->ticks[work_] += ticks_now() - begin_;
  }
  Section(const Section&) = delete;

 private:
  Clock* clock_;
  int work_;
  uint64_t begin_ = 0;
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
