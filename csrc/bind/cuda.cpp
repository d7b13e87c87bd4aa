#include <cuda_runtime_api.h>

#include "bind/common.h"
#include "bind/mixed_cuda.h"
#include "rnas/pgd_step.h"

namespace py = pybind11;
using namespace rnas;
using bind::pointer;

// This module has a CUDA runtime of its own, whose current device need not be torch's. Makes the tensors' device
// current for one call.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_));
    if (previous_ != device) check(cudaSetDevice(device));
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("rnas._cuda: ") + cudaGetErrorString(status));
  }
  int previous_ = 0;
  bool changed_ = false;
};

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of rnas. Streams cross as integer handles.";
  m.attr("architectures") = RNAS_ARCHITECTURES;  // in CMake's words: "80-real 90-real 100-virtual"
  m.attr("runtime_version") = CUDART_VERSION;    // 13000 for 13.0

  m.def(
      "pgd_step",
      [](uintptr_t out, uintptr_t x_adv, uintptr_t grad, uintptr_t x, int64_t samples, int64_t sample_size,
         const std::string& dtype, const std::string& norm, double epsilon, double step_size, uintptr_t epsilons,
         uintptr_t step_sizes, double lower, double upper, int device, uintptr_t stream) {
        const Dtype type = bind::dtype(dtype);
        const PgdStep step{bind::norm(norm), epsilon, step_size, pointer(epsilons), pointer(step_sizes), lower, upper};
        py::gil_scoped_release release;
        DeviceGuard guard(device);
        cuda::pgd_step(pointer(out), pointer(x_adv), pointer(grad), pointer(x), samples, sample_size, type, step,
                       pointer<CUstream_st>(stream));
      },
      "rnas/pgd_step.h");
  bind::define_mixed_op<DeviceGuard>(m);
}
