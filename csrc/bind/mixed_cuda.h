#pragma once

// The CUDA kernels of the mixed operation for Python: one definition for rnas._cuda and for the kernels on the host.

#include "bind/mixed.h"

namespace rnas::bind {

// Guard: made from a device's index, it makes that device the current one while it lives.
template <typename Guard> void define_mixed_op(py::module_& m) {
  m.def(
      "mixed_sizes",
      [](const Sizes& shape, const Names& primitives, const std::string& dtype) {
        return to_tuple(cuda::mixed_sizes(OwnedShape(shape, primitives).shape, bind::dtype(dtype)));
      },
      "rnas/mixed_op.h");
  m.def(
      "mixed_forward",
      [](const Sizes& shape, const Names& primitives, const Addresses& inputs, double eps, bool batch_statistics,
         int keeping, uintptr_t out, uintptr_t mean, uintptr_t variance, uintptr_t kept, uintptr_t workspace,
         const std::string& dtype, int device, uintptr_t stream) {
        const OwnedShape owned(shape, primitives);
        const OwnedInputs in(inputs, owned.shape.inputs, eps, batch_statistics);
        const Dtype type = bind::dtype(dtype);
        py::gil_scoped_release release;
        Guard guard(device);
        cuda::mixed_forward(owned.shape, type, in.inputs, keep(keeping), pointer(out), pointer<float>(mean),
                            pointer<float>(variance), pointer(kept), pointer(workspace), pointer<CUstream_st>(stream));
      },
      "rnas/mixed_op.h");
  m.def(
      "mixed_backward",
      [](const Sizes& shape, const Names& primitives, const Addresses& inputs, double eps, bool batch_statistics,
         int keeping, uintptr_t out, uintptr_t kept, uintptr_t grad_out, const Addresses& gradients,
         const Addresses& to_states, uintptr_t workspace, const std::string& dtype, int device,
         uintptr_t stream) {
        const OwnedShape owned(shape, primitives);
        const OwnedInputs in(inputs, owned.shape.inputs, eps, batch_statistics);
        const OwnedGradients grad(gradients, to_states);
        const Dtype type = bind::dtype(dtype);
        py::gil_scoped_release release;
        Guard guard(device);
        cuda::mixed_backward(owned.shape, type, in.inputs, keep(keeping), pointer(out), pointer(kept),
                             pointer(grad_out), grad.gradients, pointer(workspace), pointer<CUstream_st>(stream));
      },
      "rnas/mixed_op.h");
  m.def(
      "mixed_double_backward",
      [](const Sizes& shape, const Names& primitives, const Addresses& inputs, double eps, int keeping, uintptr_t out,
         uintptr_t kept, uintptr_t grad_out, const Addresses& direction, uintptr_t grad_grad_out,
         uintptr_t direction_kept, const Addresses& gradients, uintptr_t workspace, const std::string& dtype, int device,
         uintptr_t stream) {
        const OwnedShape owned(shape, primitives);
        const OwnedInputs in(inputs, owned.shape.inputs, eps, false);
        const OwnedGradients grad(gradients, {});
        std::vector<const void*> along;
        for (uintptr_t each : direction) along.push_back(pointer(each));
        const Dtype type = bind::dtype(dtype);
        py::gil_scoped_release release;
        Guard guard(device);
        cuda::mixed_double_backward(owned.shape, type, in.inputs, keep(keeping), pointer(out), pointer(kept),
                                    pointer(grad_out), along.data(), pointer(grad_grad_out), pointer(direction_kept),
                                    grad.gradients, pointer(workspace), pointer<CUstream_st>(stream));
      },
      "rnas/mixed_op.h");
}

}  // namespace rnas::bind
