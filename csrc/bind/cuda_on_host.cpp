#include "bind/mixed_cuda.h"

namespace rnas::cuda {
void set_host_thread_order(int order);
int64_t count_host_launches();
}

namespace {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace

PYBIND11_MODULE(_cuda_on_host, m) {
  m.doc() = "The CUDA kernels of rnas as plain C++ on arrays of the host, for tests without a GPU.";
  rnas::bind::define_mixed_op<NoGuard>(m);
  m.def("launches", &rnas::cuda::count_host_launches, "how many kernels have been launched so far");
  m.def("set_host_thread_order", &rnas::cuda::set_host_thread_order,
        "0: the threads of a block run one after another in their order; 1: in the reverse of it", pybind11::arg("order"));
}
