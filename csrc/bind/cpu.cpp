#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind/common.h"
#include "bind/mixed.h"
#include "bind/objects.h"
#include "bind/pool.h"
#include "rnas/join_channels.h"
#include "rnas/pgd_step.h"
#include "rnas/profile.h"
#include "rnas/relu_conv_norm.h"
#include "rnas/transpose.h"
#include "simd/simd.h"

namespace py = pybind11;
using namespace rnas;
using bind::keep;
using bind::OwnedGradients;
using bind::OwnedInputs;
using bind::OwnedShape;
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

// The layer and its pointers: x, weight, gamma, beta, mean, variance.
static ReluConvNorm relu_conv_norm(int64_t pixels, int64_t channels_in, int64_t channels_out,
                                   const std::vector<uintptr_t>& a, double eps, bool batch_statistics, bool relu) {
  if (a.size() != 6) throw std::invalid_argument("6 addresses");
  const auto at = [&](int each) { return pointer<const float>(a[each]); };
  return {pixels, channels_in, channels_out, at(0), at(1), at(2), at(3), at(4), at(5), eps, batch_statistics, relu};
}

// sizes: batch, pixels, mixed, around, groups, edges.
static JoinShape join_shape(const bind::Sizes& sizes, bool mixed_first, bool channels_last) {
  if (sizes.size() != 6) throw std::invalid_argument("6 sizes");
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], mixed_first, channels_last};
}

// steps: of each edge, from image to image and within one.
static std::vector<Around> what_goes_around(const bind::Addresses& arounds, const bind::Sizes& steps,
                                            const JoinShape& shape) {
  if (static_cast<int64_t>(arounds.size()) != shape.edges || steps.size() != 2 * arounds.size())
    throw std::invalid_argument("an address and two steps for each edge");
  std::vector<Around> made;
  for (size_t e = 0; e < arounds.size(); ++e)
    made.push_back({pointer<const float>(arounds[e]), steps[2 * e], steps[2 * e + 1]});
  return made;
}

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of rnas. Import torch first: the kernels run on its threads.";
  m.def("simd_levels", &simd_levels, "the instruction sets this processor can run, lowest first");
  m.def("simd_level", [] { return kLevels[static_cast<int>(cpu::simd_level())]; }, "the instruction set in use");
  m.def("set_simd_level", &set_simd_level, "for tests: use another of simd_levels()", py::arg("name"));
  m.def("start_profile", &cpu::start_profile, "rnas/profile.h");
  m.def(
      "stop_profile",
      [] {
        const cpu::Profile p = cpu::stop_profile();
        return py::make_tuple(std::vector<double>(p.seconds, p.seconds + cpu::kWorks),
                              std::vector<double>(p.multiply_adds, p.multiply_adds + cpu::kWorks), p.total);
      },
      "(seconds, multiply-adds) of each kind of work in the order of the header, and seconds of all together");
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

  using bind::FreeMemory;
  using bind::Piece;
  py::class_<Piece>(m, "Piece", "bind/pool.h", py::buffer_protocol()).def_buffer([](const Piece& piece) {
    return py::buffer_info(static_cast<uint8_t*>(piece.data()), piece.size());
  });
  py::class_<FreeMemory, std::shared_ptr<FreeMemory>>(m, "FreeMemory", "bind/pool.h")
      .def(py::init<size_t>())
      .def("take", [](std::shared_ptr<FreeMemory> home, int64_t size) { return std::make_unique<Piece>(home, size); })
      .def("empty", &FreeMemory::empty)
      .def_property_readonly("sizes", &FreeMemory::sizes);

  using bind::Arrays;
  using bind::Norms;
  using bind::Reader;
  py::class_<Arrays>(m, "Arrays", "bind/objects.h").def_property_readonly("size", &Arrays::size).def("copy", &Arrays::copy);
  py::class_<Norms>(m, "Norms", "bind/objects.h")
      .def_readonly("on_batch", &Norms::on_batch)
      .def_readonly("eps", &Norms::eps)
      .def_readonly("moved", &Norms::moved)
      .def("averages", &Norms::averages)
      .def("update", &Norms::update);
  py::class_<Reader>(m, "Reader", "bind/objects.h")
      .def(py::init<const py::capsule&, py::object, py::object, py::object>())
      .def("arrays", &Reader::arrays)
      .def("norms", &Reader::norms);

  using bind::Addresses;
  using bind::Names;
  using bind::Sizes;
  m.def(
      "mixed_sizes",
      [](const Sizes& shape, const Names& primitives, int threads) {
        return bind::to_tuple(cpu::mixed_sizes(OwnedShape(shape, primitives).shape, threads));
      },
      "rnas/mixed_op.h");
  m.def(
      "mixed_forward",
      [](const Sizes& shape, const Names& primitives, const Addresses& inputs, double eps, bool batch_statistics,
         int keeping, uintptr_t out, uintptr_t mean, uintptr_t variance, uintptr_t kept, uintptr_t workspace,
         int threads) {
        const OwnedShape owned(shape, primitives);
        const OwnedInputs in(inputs, owned.shape.inputs, eps, batch_statistics);
        py::gil_scoped_release release;
        cpu::mixed_forward(owned.shape, in.inputs, keep(keeping), pointer<float>(out), pointer<float>(mean),
                           pointer<float>(variance), pointer(kept), pointer(workspace), threads);
      },
      "rnas/mixed_op.h");
  m.def(
      "mixed_backward",
      [](const Sizes& shape, const Names& primitives, const Addresses& inputs, double eps, bool batch_statistics,
         int keeping, uintptr_t out, uintptr_t kept, uintptr_t grad_out, const Addresses& gradients,
         const Addresses& to_states, uintptr_t workspace, int threads) {
        const OwnedShape owned(shape, primitives);
        const OwnedInputs in(inputs, owned.shape.inputs, eps, batch_statistics);
        const OwnedGradients grad(gradients, to_states);
        py::gil_scoped_release release;
        cpu::mixed_backward(owned.shape, in.inputs, keep(keeping), pointer<float>(out), pointer(kept),
                            pointer<float>(grad_out), grad.gradients, pointer(workspace), threads);
      },
      "rnas/mixed_op.h");
  m.def(
      "mixed_double_backward",
      [](const Sizes& shape, const Names& primitives, const Addresses& inputs, double eps, int keeping, uintptr_t out,
         uintptr_t kept, uintptr_t grad_out, const Addresses& direction, uintptr_t grad_grad_out,
         uintptr_t direction_kept, const Addresses& gradients, uintptr_t workspace, int threads) {
        const OwnedShape owned(shape, primitives);
        const OwnedInputs in(inputs, owned.shape.inputs, eps, false);
        const OwnedGradients grad(gradients, {});
        std::vector<const void*> along;
        for (uintptr_t each : direction) along.push_back(pointer(each));
        py::gil_scoped_release release;
        cpu::mixed_double_backward(owned.shape, in.inputs, keep(keeping), pointer<float>(out), pointer(kept),
                                   pointer<float>(grad_out), along.data(), pointer<float>(grad_grad_out),
                                   pointer(direction_kept), grad.gradients, pointer(workspace), threads);
      },
      "rnas/mixed_op.h");

  m.def(
      "transpose",
      [](int64_t batch, int64_t rows, int64_t columns, uintptr_t from, int64_t image, int64_t row, uintptr_t to,
         int threads) {
        py::gil_scoped_release release;
        cpu::transpose(batch, rows, columns, pointer<const float>(from), image, row, pointer<float>(to), threads);
      },
      "rnas/transpose.h");
  m.def(
      "join_channels",
      [](const Sizes& sizes, bool mixed_first, bool channels_last, uintptr_t mixed, const Addresses& arounds,
         const Sizes& steps, uintptr_t scales, uintptr_t out, int threads) {
        const JoinShape shape = join_shape(sizes, mixed_first, channels_last);
        const std::vector<Around> around = what_goes_around(arounds, steps, shape);
        py::gil_scoped_release release;
        cpu::join_channels(shape, pointer<const float>(mixed), around.data(), pointer<const float>(scales),
                           pointer<float>(out), threads);
      },
      "rnas/join_channels.h");
  m.def(
      "join_channels_backward",
      [](const Sizes& sizes, bool mixed_first, bool channels_last, const Addresses& arounds, const Sizes& steps,
         uintptr_t scales, uintptr_t grad_out, uintptr_t grad_mixed, const Addresses& grad_arounds,
         uintptr_t grad_scales, int threads) {
        const JoinShape shape = join_shape(sizes, mixed_first, channels_last);
        const std::vector<Around> around = what_goes_around(arounds, steps, shape);
        std::vector<float*> gradients;
        for (uintptr_t each : grad_arounds) gradients.push_back(pointer<float>(each));
        if (gradients.size() != around.size()) throw std::invalid_argument("a gradient, or 0, for each edge");
        py::gil_scoped_release release;
        cpu::join_channels_backward(shape, around.data(), pointer<const float>(scales), pointer<const float>(grad_out),
                                    pointer<float>(grad_mixed), gradients.data(), pointer<float>(grad_scales), threads);
      },
      "rnas/join_channels.h");

  for (bool gather : {true, false})
    m.def(
        gather ? "gather_pixels" : "scatter_pixels",
        [gather](int64_t batch, int64_t height, int64_t width, int64_t channels, uintptr_t from, uintptr_t to,
                 int threads) {
          py::gil_scoped_release release;
          const auto run = gather ? cpu::gather_pixels : cpu::scatter_pixels;
          run({batch, height, width, channels}, pointer<const float>(from), pointer<float>(to), threads);
        },
        "rnas/relu_conv_norm.h");
  for (bool gather : {true, false})
    m.def(
        gather ? "gather_patches" : "scatter_patches",
        [gather](const Sizes& image, const Sizes& strides, const Sizes& kernel, uintptr_t from, uintptr_t to,
                 int threads) {
          if (image.size() != 4 || strides.size() != 4 || kernel.size() != 6)
            throw std::invalid_argument("4 sizes, 4 strides and 6 numbers of the kernel");
          const cpu::PatchShape shape{image[0],  image[1],  image[2],  image[3],  {strides[0], strides[1], strides[2], strides[3]},
                                 kernel[0], kernel[1], kernel[2], kernel[3], kernel[4], kernel[5]};
          py::gil_scoped_release release;
          const auto run = gather ? cpu::gather_patches : cpu::scatter_patches;
          run(shape, pointer<const float>(from), pointer<float>(to), threads);
        },
        "rnas/relu_conv_norm.h");
  m.def(
      "relu_conv_norm_sizes",
      [](int64_t pixels, int64_t channels_in, int64_t channels_out, bool relu, int threads) {
        const ReluConvNormSizes s = cpu::relu_conv_norm_sizes(pixels, channels_in, channels_out, relu, threads);
        return py::make_tuple(s.kept_masks, s.workspace);
      },
      "rnas/relu_conv_norm.h");
  m.def(
      "relu_conv_norm_forward",
      [](int64_t pixels, int64_t channels_in, int64_t channels_out, const Addresses& inputs, double eps,
         bool batch_statistics, bool relu, int keeping, uintptr_t out, uintptr_t mean, uintptr_t variance,
         uintptr_t kept, uintptr_t workspace, int threads) {
        const ReluConvNorm in = relu_conv_norm(pixels, channels_in, channels_out, inputs, eps, batch_statistics, relu);
        py::gil_scoped_release release;
        cpu::relu_conv_norm_forward(in, keep(keeping), pointer<float>(out), pointer<float>(mean),
                                    pointer<float>(variance), pointer(kept), pointer(workspace), threads);
      },
      "rnas/relu_conv_norm.h");
  m.def(
      "relu_conv_norm_backward",
      [](int64_t pixels, int64_t channels_in, int64_t channels_out, const Addresses& inputs, double eps,
         bool batch_statistics, bool relu, int keeping, uintptr_t out, uintptr_t kept, uintptr_t grad_out,
         uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_gamma, uintptr_t grad_beta, uintptr_t workspace,
         int threads) {
        const ReluConvNorm in = relu_conv_norm(pixels, channels_in, channels_out, inputs, eps, batch_statistics, relu);
        py::gil_scoped_release release;
        cpu::relu_conv_norm_backward(in, keep(keeping), pointer<float>(out), pointer(kept), pointer<float>(grad_out),
                                     pointer<float>(grad_x), pointer<float>(grad_weight), pointer<float>(grad_gamma),
                                     pointer<float>(grad_beta), pointer(workspace), threads);
      },
      "rnas/relu_conv_norm.h");
  m.def(
      "relu_conv_norm_double_backward",
      [](int64_t pixels, int64_t channels_in, int64_t channels_out, const Addresses& inputs, double eps, bool relu,
         int keeping, uintptr_t kept, uintptr_t grad_out, uintptr_t direction, uintptr_t grad_grad_out,
         uintptr_t grad_weight, uintptr_t grad_gamma, uintptr_t workspace, int threads) {
        const ReluConvNorm in = relu_conv_norm(pixels, channels_in, channels_out, inputs, eps, false, relu);
        py::gil_scoped_release release;
        cpu::relu_conv_norm_double_backward(in, keep(keeping), pointer(kept), pointer<float>(grad_out),
                                            pointer<float>(direction), pointer<float>(grad_grad_out),
                                            pointer<float>(grad_weight), pointer<float>(grad_gamma),
                                            pointer(workspace), threads);
      },
      "rnas/relu_conv_norm.h");
}
