#pragma once

// Arguments of the mixed operation as they come from Python, for the CPU's and the GPU's kernels alike.

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/common.h"
#include "rnas/mixed_op.h"

namespace rnas::bind {

using Sizes = std::vector<int64_t>;
using Names = std::vector<std::vector<std::string>>;  // of the primitives: one row for all edges, or one for each
using Addresses = std::vector<uintptr_t>;

inline Primitive primitive(const std::string& name) {
  static const char* const kNames[] = {"none",         "skip_connect", "max_pool_3x3", "avg_pool_3x3", "sep_conv_3x3",
                                       "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5", "conv_1x1",     "conv_3x3",     "ones"};
  for (int each = 0; each < 11; ++each)
    if (name == kNames[each]) return static_cast<Primitive>(each);
  throw std::invalid_argument("unknown primitive " + name);
}

// A MixedShape and the primitives it points at. From (batch, channels, height, width, inputs, nodes, stride, pool_norm,
// last, planes_out, planes_grad, scaled) and the primitives' names.
struct OwnedShape {
  OwnedShape(const Sizes& s, const Names& names) {
    if (s.size() != 12) throw std::invalid_argument("a shape has 12 numbers");
    size_t candidates = 0;
    for (const std::vector<std::string>& row : names) candidates = std::max(candidates, row.size());
    for (const std::vector<std::string>& row : names)
      for (size_t each = 0; each < candidates; ++each)
        primitives.push_back(each < row.size() ? primitive(row[each]) : Primitive::none);
    shape = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], primitives.data(), static_cast<int64_t>(candidates), s[7] != 0,
             names.size() > 1, s[8] != 0, s[9] != 0, s[10] != 0, s[11] != 0};
    const int64_t edges = s[5] * s[4] + s[5] * (s[5] - 1) / 2;
    if (shape.each_edge && static_cast<int64_t>(names.size()) != edges)
      throw std::invalid_argument("primitives come in one row, or in one for each edge");
  }
  OwnedShape(const OwnedShape&) = delete;
  std::vector<Primitive> primitives;
  MixedShape shape;
};

inline Keep keep(int value) {
  if (value < 0 || value > 3) throw std::invalid_argument("keep is 0 (nothing), 1 (masks), 2 (activations), 3 (outputs)");
  return static_cast<Keep>(value);
}

// Addresses of (weights, theta, gamma, beta, mean, variance, scales), 0 for null, behind those of the states.
struct OwnedInputs {
  OwnedInputs(const Addresses& a, int64_t states_count, double eps, bool batch_statistics) {
    if (static_cast<int64_t>(a.size()) != states_count + 7) throw std::invalid_argument("7 addresses behind the states");
    for (int64_t state = 0; state < states_count; ++state) states.push_back(pointer(a[state]));
    const auto at = [&](int each) { return pointer<const float>(a[states_count + each]); };
    inputs = {states.data(), at(0), at(1), at(2), at(3), at(4), at(5), eps, batch_statistics, at(6)};
  }
  OwnedInputs(const OwnedInputs&) = delete;
  std::vector<const void*> states;
  MixedInputs inputs;
};

// Addresses of the gradients of (weights, theta, gamma, beta), and of the states or none at all.
struct OwnedGradients {
  OwnedGradients(const Addresses& a, const Addresses& to_states) {
    if (a.size() != 4) throw std::invalid_argument("4 addresses of gradients");
    for (uintptr_t each : to_states) states.push_back(pointer(each));
    gradients = {states.empty() ? nullptr : states.data(), pointer<float>(a[0]), pointer<float>(a[1]),
                 pointer<float>(a[2]), pointer<float>(a[3])};
  }
  OwnedGradients(const OwnedGradients&) = delete;
  std::vector<void*> states;
  MixedGradients gradients;
};

// In the order of the struct.
inline py::tuple to_tuple(const MixedSizes& s) {
  return py::make_tuple(s.edges, s.norms, s.theta, s.height_out, s.width_out, s.kept_masks, s.kept_activations,
                        s.kept_outputs, s.kept_linear, s.workspace);
}

}  // namespace rnas::bind
