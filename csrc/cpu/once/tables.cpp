#include "rnas/tables.h"

#include <algorithm>

namespace rnas::cpu {

void concatenate(const float* const* arrays, const int64_t* sizes, int64_t count, float* out) {
  for (int64_t each = 0; each < count; ++each) out = std::copy_n(arrays[each], sizes[each], out);
}

void update_averages(const RunningAverages* norms, int64_t count, int64_t channels, double unbias) {
  for (int64_t each = 0; each < count; ++each) {
    const RunningAverages& norm = norms[each];
    if (norm.batches) ++*norm.batches;
    const double share = norm.momentum < 0 ? 1.0 / static_cast<double>(*norm.batches) : norm.momentum;
    for (int64_t c = 0; c < channels; ++c) {
      norm.mean[c] = static_cast<float>((1.0 - share) * norm.mean[c] + share * norm.batch_mean[c]);
      norm.variance[c] = static_cast<float>((1.0 - share) * norm.variance[c] + share * unbias * norm.batch_variance[c]);
    }
  }
}

}  // namespace rnas::cpu
