#include "rnas/pgd_step.h"

#include "launch.h"
#include "rnas/pgd_step_math.h"

namespace rnas::cuda {
namespace {

constexpr int kLinfThreads = 256;
constexpr int kL2Threads = 512;
constexpr int kL2Blocks = 2;  // per multiprocessor: allows 64 registers, as the 40 of the default spill on sm_100
constexpr int kWarp = 32;

// Limits of a CUDA grid; whatever lies beyond is reached by the loops in the kernels.
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridY = 65535;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The arrays of one call, and each sample's numbers.
template <typename T> struct Call {
  T* out;
  const T *x_adv, *grad, *x;
  int64_t samples, size;
  const float *epsilons, *step_sizes;
  float epsilon, step_size, lower, upper;

  __device__ float epsilon_of(int64_t n) const { return epsilons ? epsilons[n] : epsilon; }
  __device__ float step_size_of(int64_t n) const { return step_sizes ? step_sizes[n] : step_size; }
};

// grid (pixels of a sample / kVectorised width / kLinfThreads, samples). Vectors never straddle two samples: the
// launcher vectorises only where every sample starts on 16 bytes, or where all samples share their numbers and count as
// one.
template <typename T, bool kVectorised> __global__ void __launch_bounds__(kLinfThreads) linf_kernel(Call<T> c) {
  constexpr int kWidth = kVectorised ? Vector<T>::kWidth : 1;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t vectors = c.size / kWidth;
  for (int64_t n = blockIdx.y; n < c.samples; n += gridDim.y) {
    const float epsilon = c.epsilon_of(n), step_size = c.step_size_of(n);
    const int64_t begin = n * c.size;
    const auto pixel = [&](T x_adv, T grad, T x) {
      return from_float<T>(
          pgd::linf(to_float(x_adv), to_float(grad), to_float(x), epsilon, step_size, c.lower, c.upper));
    };
    if constexpr (kVectorised) {
      using V = Vector<T>;
      for (int64_t i = first; i < vectors; i += stride) {
        const V x_adv = reinterpret_cast<const V*>(c.x_adv + begin)[i];
        const V grad = reinterpret_cast<const V*>(c.grad + begin)[i];
        const V x = reinterpret_cast<const V*>(c.x + begin)[i];
        V out;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) out.values[k] = pixel(x_adv.values[k], grad.values[k], x.values[k]);
        reinterpret_cast<V*>(c.out + begin)[i] = out;
      }
    }
    // All pixels, or the few behind the last whole vector.
    for (int64_t i = (kVectorised ? vectors * kWidth : 0) + first; i < c.size; i += stride)
      c.out[begin + i] = pixel(c.x_adv[begin + i], c.grad[begin + i], c.x[begin + i]);
  }
}

// The block's sum on every thread. Shuffles and the last loop add in a fixed order, so the sum is the same in every
// run.
static __device__ double block_sum(double value) {
  __shared__ double warps[kL2Threads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  __syncthreads();  // the last sum has been read by everyone
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kL2Threads / kWarp; ++warp) sum += warps[warp];
  return sum;
}

// The block's L2 norm of value(0), ..., value(size - 1). In double: the square of any float neither overflows nor
// vanishes there, and the gradients of a confident network are small enough to vanish.
template <typename Value> static __device__ float block_norm(int64_t size, const Value& value) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < size; i += kL2Threads) {
    const double v = value(i);
    sum += v * v;
  }
  return static_cast<float>(sqrt(block_sum(sum)));
}

// One block per sample, three sweeps: norm of the gradient, norm of the perturbation, output. The second and third find
// the sample in the caches. Perturbations are computed twice rather than stored: out may be any of the inputs.
template <typename T> __global__ void __launch_bounds__(kL2Threads, kL2Blocks) l2_kernel(Call<T> c) {
  for (int64_t n = blockIdx.x; n < c.samples; n += gridDim.x) {
    const int64_t begin = n * c.size;
    T* out = c.out + begin;
    const T *x_adv = c.x_adv + begin, *grad = c.grad + begin, *x = c.x + begin;
    const float step_size = c.step_size_of(n);
    const float divisor = pgd::divisor(block_norm(c.size, [&](int64_t i) { return to_float(grad[i]); }));
    const auto delta = [&](int64_t i) {
      return pgd::l2_delta(to_float(x_adv[i]), to_float(grad[i]), to_float(x[i]), divisor, step_size);
    };
    const float scale = pgd::shrink(block_norm(c.size, delta), c.epsilon_of(n));
    for (int64_t i = threadIdx.x; i < c.size; i += kL2Threads)
      out[i] = from_float<T>(pgd::l2(delta(i), to_float(x[i]), scale, c.lower, c.upper));
  }
}

template <typename T> void launch_linf(Call<T> c, CUstream_st* stream) {
  if (!c.epsilons && !c.step_sizes) {
    c.size *= c.samples;
    c.samples = 1;
  }
  constexpr int kWidth = Vector<T>::kWidth;
  const bool vectorised = aligned16(c.out, c.x_adv, c.grad, c.x) && (c.samples == 1 || c.size % kWidth == 0);
  const int64_t steps = vectorised ? (c.size + kWidth - 1) / kWidth : c.size;
  const dim3 grid(static_cast<unsigned>(smaller((steps + kLinfThreads - 1) / kLinfThreads, kMaxGridX)),
                  static_cast<unsigned>(smaller(c.samples, kMaxGridY)));
  if (vectorised)
    linf_kernel<T, true><<<grid, kLinfThreads, 0, stream>>>(c);
  else
    linf_kernel<T, false><<<grid, kLinfThreads, 0, stream>>>(c);
  check_launch("pgd_step (linf)");
}

template <typename T> void launch_l2(const Call<T>& c, CUstream_st* stream) {
  l2_kernel<T><<<static_cast<unsigned>(smaller(c.samples, kMaxGridX)), kL2Threads, 0, stream>>>(c);
  check_launch("pgd_step (l2)");
}

template <typename T>
void run(void* out, const void* x_adv, const void* grad, const void* x, int64_t samples, int64_t size,
         const PgdStep& step, CUstream_st* stream) {
  const Call<T> call{static_cast<T*>(out),
                     static_cast<const T*>(x_adv),
                     static_cast<const T*>(grad),
                     static_cast<const T*>(x),
                     samples,
                     size,
                     static_cast<const float*>(step.epsilons),
                     static_cast<const float*>(step.step_sizes),
                     static_cast<float>(step.epsilon),
                     static_cast<float>(step.step_size),
                     static_cast<float>(step.lower),
                     static_cast<float>(step.upper)};
  step.norm == Norm::linf ? launch_linf(call, stream) : launch_l2(call, stream);
}

}  // namespace

void pgd_step(void* out, const void* x_adv, const void* grad, const void* x, int64_t samples, int64_t sample_size,
              Dtype dtype, const PgdStep& step, CUstream_st* stream) {
  if (samples == 0 || sample_size == 0) return;
  switch (dtype) {
    case Dtype::float32: return run<float>(out, x_adv, grad, x, samples, sample_size, step, stream);
    case Dtype::float16: return run<__half>(out, x_adv, grad, x, samples, sample_size, step, stream);
    case Dtype::bfloat16: return run<__nv_bfloat16>(out, x_adv, grad, x, samples, sample_size, step, stream);
    default: throw std::invalid_argument("pgd_step on CUDA takes float32, float16 and bfloat16");
  }
}

}  // namespace rnas::cuda
