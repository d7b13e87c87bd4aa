#pragma once

// What both modules share: tensors cross as addresses and integers, names as strings.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "rnas/types.h"

namespace rnas::bind {

namespace py = pybind11;

template <typename T = void> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

inline Dtype dtype(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float64") return Dtype::float64;
  if (name == "float16") return Dtype::float16;
  if (name == "bfloat16") return Dtype::bfloat16;
  throw std::invalid_argument("unknown dtype " + name);
}

inline Norm norm(const std::string& name) {
  if (name == "linf") return Norm::linf;
  if (name == "l2") return Norm::l2;
  throw std::invalid_argument("unknown norm " + name);
}

}  // namespace rnas::bind
