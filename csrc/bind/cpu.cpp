#include <pybind11/stl.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind/common.h"
#include "rnas/pgd_step.h"
#include "simd/simd.h"

namespace py = pybind11;
using namespace rnas;
using bind::pointer;

static const char* const kLevels[] = {"baseline", "avx2", "avx512"};

static std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (int level = 0; level <= static_cast<int>(cpu::highest_simd_level()); ++level) names.push_back(kLevels[level]);
  return names;
}

static void set_simd_level(const std::string& name) {
  for (int level = 0; level < 3; ++level)
    if (name == kLevels[level]) return cpu::set_simd_level(static_cast<cpu::SimdLevel>(level));
  throw std::invalid_argument("expected baseline, avx2 or avx512, got " + name);
}

static int threads() {
  int count = 1;
#if defined(_OPENMP)
#pragma omp parallel
#pragma omp single
  count = omp_get_num_threads();
#endif
  return count;
}

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of rnas. Import torch first: the kernels run on its threads.";
  m.def("simd_levels", &simd_levels, "the instruction sets this processor can run, lowest first");
  m.def("simd_level", [] { return kLevels[static_cast<int>(cpu::simd_level())]; }, "the instruction set in use");
  m.def("set_simd_level", &set_simd_level, "for tests: use another of simd_levels()", py::arg("name"));
  m.def("threads", &threads, "threads that a kernel called from this thread gets");

  m.def(
      "pgd_step",
      [](uintptr_t out, uintptr_t x_adv, uintptr_t grad, uintptr_t x, int64_t samples, int64_t sample_size,
         const std::string& dtype, const std::string& norm, double epsilon, double step_size, uintptr_t epsilons,
         uintptr_t step_sizes, double lower, double upper) {
        const Dtype type = bind::dtype(dtype);
        const PgdStep step{bind::norm(norm), epsilon, step_size, pointer(epsilons), pointer(step_sizes), lower, upper};
        py::gil_scoped_release release;
        cpu::pgd_step(pointer(out), pointer(x_adv), pointer(grad), pointer(x), samples, sample_size, type, step);
      },
      "rnas/pgd_step.h");
}
