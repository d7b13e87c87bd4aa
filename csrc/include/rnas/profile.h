#pragma once

#include <cstdint>

// Where the CPU kernels of the mixed operation and its layers spend their time, and how much arithmetic they do there.
// Off unless asked for, when a kernel pays one test of a pointer for each chunk of pixels; on, it pays two readings of
// the processor's clock. One profile at a time, and one kernel at a time while it runs: threads of a second kernel would
// count into those of the first.

namespace rnas::cpu {

// The kinds of work. `_input` and `_weight`: the gradients of a convolution to its input and to its weights.
enum class Work {
  tiles,             // states and activations read through their ReLU into tiles with a halo
  depthwise,
  depthwise_input,
  depthwise_weight,
  pointwise,
  pointwise_input,
  pointwise_weight,
  norms,             // moments, sums of products with gradients, gradients through a norm
  pools,
  nodes,             // what branches and pools add to a node, or to the gradient of a state
  count
};
constexpr int kWorks = static_cast<int>(Work::count);

// seconds: of all threads together, `total` with what is in no kind: waiting, tables, packing of parameters.
// multiply_adds: of the channels that there are, without what vectors are padded with.
struct Profile {
  double seconds[kWorks], multiply_adds[kWorks], total;
};

void start_profile();
Profile stop_profile();

}  // namespace rnas::cpu
