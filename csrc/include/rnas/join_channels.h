#pragma once

#include "rnas/types.h"

// What went around the candidates of the edges into a node with partial channels, added up, joined to the sum of what went
// through them, and shuffled: the rest of a node of PC-DARTS.
//
// Legend: N images, P pixels, M channels that went through, A channels that went around, C = M + A, G groups of the
// shuffle, E edges. All float32. mixed (N, P, M) is dense.

namespace rnas {

// What goes around an edge: images (N, P, A), a pixel's channels next to each other and pixels `step` elements apart; or,
// channels first, (N, A, P), a channel's pixels next to each other and channels `step` apart. Images are `image` apart.
struct Around {
  const float* data;
  int64_t image, step;
};

struct JoinShape {
  int64_t batch, pixels, mixed, around, groups, edges;  // N, P, M, A, G, E
  bool mixed_first;    // whether `mixed` comes before what goes around, else behind
  bool channels_last;  // how `out` and what goes around lie
};

namespace cpu {

// out: dense (N, P, C), or (N, C, P). Channel g * (C / G) + c of both parts, one behind the other, becomes c * G + g.
// scales (E): by what each edge is multiplied; null: by 1. Throws std::invalid_argument where G does not divide C.
void join_channels(const JoinShape& shape, const float* mixed, const Around* arounds, const float* scales, float* out,
                   int threads);

// Gradients of sum(grad_out * out), null where not wanted: grad_mixed (N, P, M), grad_arounds (E) dense as `out` lies,
// grad_scales (E). arounds are read for grad_scales alone. The same bits for any number of threads.
void join_channels_backward(const JoinShape& shape, const Around* arounds, const float* scales, const float* grad_out,
                            float* grad_mixed, float* const* grad_arounds, float* grad_scales, int threads);

}  // namespace cpu
}  // namespace rnas
