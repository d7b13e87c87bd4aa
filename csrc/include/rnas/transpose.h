#pragma once

#include "rnas/types.h"

namespace rnas::cpu {

// to (N, columns, rows), dense, from N matrices (rows, columns) of float32 that begin `image` apart and whose rows begin
// `row` apart: images from channels first (rows: channels, columns: pixels) to channels last, or back.
void transpose(int64_t batch, int64_t rows, int64_t columns, const float* from, int64_t image, int64_t row, float* to,
               int threads);

}  // namespace rnas::cpu
