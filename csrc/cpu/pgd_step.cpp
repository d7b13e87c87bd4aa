#include "rnas/pgd_step.h"

#include <stdexcept>

#include "rnas/pgd_step_math.h"
#include "simd/simd.h"

RNAS_DECLARE_LEVELS(pgd_step)

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// Pixels per task: 64 KiB of float32 per array, enough to hide the hand-out of tasks, small enough for the L2 cache.
constexpr int64_t kTask = 16384;

// Partial sums of a norm. Both numbers are fixed so that neither the width of the vectors nor the number of threads
// changes the order of the additions: kLanes running sums within a part, one total per part, kParts parts per sample.
constexpr int64_t kLanes = 32;
constexpr int64_t kParts = 64;

// Below this many pixels one thread is faster than waking the others (a parallel region costs some microseconds).
constexpr int64_t kSerial = 32768;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The arrays of one call, and each sample's numbers in the element type.
template <typename T> struct Call {
  T* out;
  const T *x_adv, *grad, *x;
  int64_t samples, size;
  const PgdStep& step;

  T epsilon(int64_t n) const {
    return step.epsilons ? static_cast<const T*>(step.epsilons)[n] : T(step.epsilon);
  }
  T step_size(int64_t n) const {
    return step.step_sizes ? static_cast<const T*>(step.step_sizes)[n] : T(step.step_size);
  }
};

template <typename T> void linf(const Call<T>& c) {
  const int64_t per_sample = divide_up(c.size, kTask);
  const int64_t tasks = c.samples * per_sample;
  const T lower = T(c.step.lower), upper = T(c.step.upper);
#pragma omp parallel for schedule(static) if (c.samples * c.size > kSerial)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t n = task / per_sample, first = (task % per_sample) * kTask;
    const int64_t begin = n * c.size + first, count = smaller(kTask, c.size - first);
    const T epsilon = c.epsilon(n), step_size = c.step_size(n);
    T* out = c.out + begin;
    const T *x_adv = c.x_adv + begin, *grad = c.grad + begin, *x = c.x + begin;
    // out may equal an input but never overlaps it by a shift, so iterations are independent.
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i)
      out[i] = pgd::linf(x_adv[i], grad[i], x[i], epsilon, step_size, lower, upper);
  }
}

// Sum of value(i)^2 over [begin, end) in double: the square of any float neither overflows nor vanishes there.
template <typename Value> double sum_of_squares(int64_t begin, int64_t end, const Value& value) {
  double lanes[kLanes] = {};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double v = value(i + lane);
      lanes[lane] += v * v;
    }
  for (int64_t lane = 0; i < end; ++i, ++lane) {
    const double v = value(i);
    lanes[lane] += v * v;
  }
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// The L2 norm of value(0), ..., value(size - 1), from kParts partial sums added in order. `threaded` changes no bit.
template <typename Value> double norm(int64_t size, bool threaded, const Value& value) {
  double parts[kParts];
  const int64_t part = divide_up(divide_up(size, kParts), kLanes) * kLanes;
#pragma omp parallel for schedule(static) if (threaded)
  for (int64_t p = 0; p < kParts; ++p)
    parts[p] = sum_of_squares(smaller(p * part, size), smaller((p + 1) * part, size), value);
  double sum = 0;
  for (int64_t p = 0; p < kParts; ++p) sum += parts[p];
  return __builtin_sqrt(sum);
}

// One sample. Deltas are computed twice rather than stored: out may be any of the inputs.
template <typename T> void l2_sample(const Call<T>& c, int64_t n, bool threaded) {
  const int64_t begin = n * c.size, size = c.size;
  T* out = c.out + begin;
  const T *x_adv = c.x_adv + begin, *grad = c.grad + begin, *x = c.x + begin;
  const T step_size = c.step_size(n), lower = T(c.step.lower), upper = T(c.step.upper);
  const T divisor = pgd::divisor(T(norm(size, threaded, [=](int64_t i) { return double(grad[i]); })));
  const auto delta = [=](int64_t i) { return pgd::l2_delta(x_adv[i], grad[i], x[i], divisor, step_size); };
  const T scale = pgd::shrink(T(norm(size, threaded, [=](int64_t i) { return double(delta(i)); })), c.epsilon(n));
#pragma omp parallel for schedule(static) if (threaded)
  for (int64_t first = 0; first < size; first += kTask) {
    const int64_t last = smaller(first + kTask, size);
#pragma GCC ivdep
    for (int64_t i = first; i < last; ++i) out[i] = pgd::l2(delta(i), x[i], scale, lower, upper);
  }
}

template <typename T> void l2(const Call<T>& c) {
  // Few large samples share the threads within a sample; many share them between samples.
  const bool within = c.samples < kParts && c.size > kSerial;
  if (within) {
    for (int64_t n = 0; n < c.samples; ++n) l2_sample(c, n, true);
    return;
  }
#pragma omp parallel for schedule(static) if (c.samples * c.size > kSerial)
  for (int64_t n = 0; n < c.samples; ++n) l2_sample(c, n, false);
}

template <typename T>
void run(void* out, const void* x_adv, const void* grad, const void* x, int64_t samples, int64_t size,
         const PgdStep& step) {
  const Call<T> call{static_cast<T*>(out),      static_cast<const T*>(x_adv), static_cast<const T*>(grad),
                     static_cast<const T*>(x), samples,                      size,
                     step};
  step.norm == Norm::linf ? linf(call) : l2(call);
}

}  // namespace

void pgd_step(void* out, const void* x_adv, const void* grad, const void* x, int64_t samples, int64_t sample_size,
              Dtype dtype, const PgdStep& step) {
  if (samples == 0 || sample_size == 0) return;
  dtype == Dtype::float32 ? run<float>(out, x_adv, grad, x, samples, sample_size, step)
                          : run<double>(out, x_adv, grad, x, samples, sample_size, step);
}

}  // namespace rnas::cpu::RNAS_LEVEL

#if defined(RNAS_LEVEL_baseline)
namespace rnas::cpu {

void pgd_step(void* out, const void* x_adv, const void* grad, const void* x, int64_t samples, int64_t sample_size,
              Dtype dtype, const PgdStep& step) {
  if (dtype != Dtype::float32 && dtype != Dtype::float64)
    throw std::invalid_argument("pgd_step on the CPU takes float32 and float64");
  RNAS_SELECT(pgd_step)(out, x_adv, grad, x, samples, sample_size, dtype, step);
}

}  // namespace rnas::cpu
#endif
