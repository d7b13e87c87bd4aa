#pragma once

// A block of threads, so written that one source is a GPU kernel and, with RNAS_ON_HOST, plain C++.
//
// A kernel is a struct that holds its arguments and whose operator()(Block&) is a sequence of phases. In a phase every
// thread of the block runs the same function of its number, and all meet at a barrier behind it:
//
//   block.each([&](int thread) { ... });
//
// What is kept from one phase to the next lies in shared or global memory, or is a PerThread: a variable of which every
// thread has its own. So a phase can as well be a loop over the threads, and the host runs it as one. There the order of
// the threads can be reversed: a kernel whose result depends on it has a race. Code between phases runs in every thread
// and must not depend on which.

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "rnas/types.h"

#if defined(RNAS_ON_HOST)
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>
#define RNAS_DEVICE inline
#define RNAS_BOTH inline
#else
#include "launch.h"
#define RNAS_DEVICE __device__ __forceinline__
#define RNAS_BOTH __host__ __device__ __forceinline__
#endif

namespace rnas::cuda {

constexpr int kThreads = 256;
constexpr int kLanes = 32, kWarps = kThreads / kLanes;
// Arguments of a kernel travel with its launch; so many bytes are allowed everywhere.
constexpr size_t kMostArguments = 4000;
// Shared memory of one block on every architecture from sm_80 on.
constexpr int64_t kMostShared = 99 * 1024;

// Blocks along x (up to 2^31 - 1) and y (up to 65535).
struct Grid {
  int64_t x, y;
};

#if defined(RNAS_ON_HOST)

// 0: threads of a phase run first to last; 1: last to first.
inline int& host_thread_order() {
  static int order = 0;
  return order;
}

// How many kernels have been launched.
inline int64_t& host_launches() {
  static int64_t count = 0;
  return count;
}

// 32 threads that can compute together. What a lane says to the others goes through a PerLane, from one `each` to the
// next.
class Warp {
 public:
  explicit Warp(int number) : number(number) {}
  const int number;

  template <typename Work> void each(const Work& work) const {
    for (int lane = 0; lane < kLanes; ++lane) work(lane);
  }
};

// A variable of which each lane of a warp has its own.
template <typename T> class PerLane {
 public:
  T& operator[](int lane) { return all_[lane]; }
  const T& operator[](int lane) const { return all_[lane]; }

 private:
  T all_[kLanes];
};

class Block {
 public:
  Block(int64_t x, int64_t y, void* shared) : x(x), y(y), shared_(static_cast<char*>(shared)) {}
  const int64_t x, y;

  template <typename Phase> void each(const Phase& phase) const {
    if (host_thread_order() == 0)
      for (int thread = 0; thread < kThreads; ++thread) phase(thread);
    else
      for (int thread = kThreads - 1; thread >= 0; --thread) phase(thread);
  }
  // A phase of work(warp) instead of work of a thread.
  template <typename Work> void each_warp(const Work& work) const {
    for (int at = 0; at < kWarps; ++at) work(Warp(host_thread_order() == 0 ? at : kWarps - 1 - at));
  }
  // The shared memory of the block from `offset` bytes on.
  template <typename T> T* shared(int64_t offset) const { return reinterpret_cast<T*>(shared_ + offset); }

 private:
  char* shared_;
};

// A variable of which each thread of a block has its own; `all[thread]` in a phase. On a GPU it is in registers.
template <typename T> class PerThread {
 public:
  PerThread() : all_(kThreads) {}
  T& operator[](int thread) { return all_[thread]; }

 private:
  std::vector<T> all_;
};

template <typename Kernel>
void launch(const char*, const Kernel& kernel, Grid grid, int64_t shared, CUstream_st*) {
  static_assert(sizeof(Kernel) <= kMostArguments, "too many arguments");
  if (shared > kMostShared) throw std::invalid_argument("too much shared memory");
  ++host_launches();
  std::vector<double> memory((shared + 7) / 8);
  for (int64_t y = 0; y < grid.y; ++y)
    for (int64_t x = 0; x < grid.x; ++x) {
      for (double& each : memory) each = std::numeric_limits<double>::quiet_NaN();  // what nobody has written
      kernel(Block(x, y, memory.data()));
    }
}

#else

class Warp {
 public:
  RNAS_DEVICE explicit Warp(int number) : number(number) {}
  const int number;

  template <typename Work> RNAS_DEVICE void each(const Work& work) const {
    work(static_cast<int>(threadIdx.x) % kLanes);
  }
};

template <typename T> class PerLane {
 public:
  RNAS_DEVICE T& operator[](int) { return own_; }
  RNAS_DEVICE const T& operator[](int) const { return own_; }

 private:
  T own_;
};

class Block {
 public:
  RNAS_DEVICE Block() : x(blockIdx.x), y(blockIdx.y) {}
  const int64_t x, y;

  template <typename Phase> RNAS_DEVICE void each(const Phase& phase) const {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <typename Work> RNAS_DEVICE void each_warp(const Work& work) const {
    work(Warp(static_cast<int>(threadIdx.x) / kLanes));
    __syncthreads();
  }
  template <typename T> RNAS_DEVICE T* shared(int64_t offset) const {
    extern __shared__ __align__(16) char memory[];
    return reinterpret_cast<T*>(memory + offset);
  }
};

template <typename T> class PerThread {
 public:
  RNAS_DEVICE T& operator[](int) { return own_; }

 private:
  T own_;
};

// How many blocks a multiprocessor has to have registers for: a kernel may say less in kBlocks.
template <typename Kernel, typename = void> struct Resident {
  static constexpr int kBlocks = 2;
};
template <typename Kernel> struct Resident<Kernel, std::void_t<decltype(Kernel::kBlocks)>> {
  static constexpr int kBlocks = Kernel::kBlocks;
};

template <typename Kernel>
__global__ void __launch_bounds__(kThreads, Resident<Kernel>::kBlocks) run_kernel(const __grid_constant__ Kernel kernel) {
  kernel(Block());
}

template <typename Kernel>
void launch(const char* name, const Kernel& kernel, Grid grid, int64_t shared, CUstream_st* stream) {
  static_assert(sizeof(Kernel) <= kMostArguments, "too many arguments");
  if (grid.x == 0 || grid.y == 0) return;
  if (grid.x > 2147483647 || grid.y > 65535) throw std::invalid_argument(std::string(name) + ": too many blocks");
  if (shared > kMostShared) throw std::invalid_argument(std::string(name) + ": too much shared memory");
  if (shared > 48 * 1024) {  // the same for all launches: other host threads may be at it
    const cudaError_t status = cudaFuncSetAttribute(
        run_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMostShared));
    if (status != cudaSuccess)
      throw std::runtime_error(std::string("rnas: ") + name + ": " + cudaGetErrorString(status));
  }
  run_kernel<Kernel><<<dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y)), kThreads, shared, stream>>>(
      kernel);
  check_launch(name);
}

#endif

}  // namespace rnas::cuda
