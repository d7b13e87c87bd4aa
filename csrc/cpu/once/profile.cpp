#include <atomic>
#include <chrono>
#include <cstring>

#include "once/clock.h"

namespace rnas::cpu {
namespace {

constexpr int kMostThreads = 1024;
Clock clocks[kMostThreads];
std::atomic<bool> running{false};
double total, begin_seconds;
uint64_t begin_ticks;

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Clock* clock_of(int thread) {
  return running.load(std::memory_order_relaxed) && thread < kMostThreads ? clocks + thread : nullptr;
}

Whole::Whole(int threads) : threads_(threads), begin_(running.load(std::memory_order_relaxed) ? seconds_now() : 0) {}

Whole::~Whole() {
  if (begin_ > 0) total += threads_ * (seconds_now() - begin_);
}

void start_profile() {
  std::memset(clocks, 0, sizeof(clocks));
  total = 0;
  begin_seconds = seconds_now();
  begin_ticks = ticks_now();
  running = true;
}

Profile stop_profile() {
  running = false;
  const double second_per_tick = (seconds_now() - begin_seconds) / static_cast<double>(ticks_now() - begin_ticks);
  Profile profile{};
  profile.total = total;
  for (const Clock& clock : clocks)
    for (int work = 0; work < kWorks; ++work) {
      profile.seconds[work] += static_cast<double>(clock.ticks[work]) * second_per_tick;
      profile.multiply_adds[work] += static_cast<double>(clock.multiply_adds[work]);
    }
  return profile;
}

}  // namespace rnas::cpu
