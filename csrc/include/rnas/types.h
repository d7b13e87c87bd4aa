#pragma once

#include <cstdint>

// A CUDA stream, named without the CUDA headers: `cudaStream_t` is a pointer to this struct.
struct CUstream_st;

namespace rnas {

// Element types that cross the API behind a void pointer.
enum class Dtype { float32, float64, float16, bfloat16 };

// The norm that bounds a perturbation.
enum class Norm { linf, l2 };

}  // namespace rnas
