#pragma once

#include <cstdint>

// Work on many small arrays in one call: one by one they would cost more in calls than in work.

namespace rnas::cpu {

// out: the arrays behind one another.
void concatenate(const float* const* arrays, const int64_t* sizes, int64_t count, float* out);

// What one batch norm moves in training. mean, variance (C): running ones. batches: how many there have been, counted
// up by one; null: not counted. momentum: the share of the new batch; negative: 1 / batches, so that the averages are
// those of all batches.
struct RunningAverages {
  float *mean, *variance;
  int64_t* batches;
  double momentum;
  const float *batch_mean, *batch_variance;  // (C), the biased variance
};

// As torch.nn.BatchNorm2d does. unbias: values per channel, over one less.
void update_averages(const RunningAverages* norms, int64_t count, int64_t channels, double unbias);

}  // namespace rnas::cpu
