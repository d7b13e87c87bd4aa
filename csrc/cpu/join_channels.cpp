#include "rnas/join_channels.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "mixed/vector.h"
#include "simd/simd.h"

RNAS_DECLARE_LEVELS(join_channels)
RNAS_DECLARE_LEVELS(join_channels_backward)

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// Pixels whose channels lie in the first cache between a sum and its shuffle; pixels of a plane that are taken together.
constexpr int64_t kPixels = 16, kPlane = 512;

// Products with gradients are summed in float32 over so many pixels, then added up in double.
constexpr int64_t kSum = 64;

class Join {
 public:
  Join(const JoinShape& shape, const Around* arounds, const float* scales)
      : s_(shape), arounds_(arounds), scales_(scales), channels_(shape.mixed + shape.around), order_(channels_) {
    mixed_begin_ = shape.mixed_first ? 0 : shape.around;
    around_begin_ = shape.mixed_first ? shape.mixed : 0;
    const int64_t each = channels_ / shape.groups;
    for (int64_t group = 0; group < shape.groups; ++group)
      for (int64_t c = 0; c < each; ++c) order_[c * shape.groups + group] = static_cast<int32_t>(group * each + c);
  }

  void forward(const float* mixed, float* out, int threads) const {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < s_.batch; ++n) s_.channels_last ? rows(mixed, out, n) : planes(mixed, out, n);
  }

  void backward(const float* grad_out, float* grad_mixed, float* const* grad_arounds, float* grad_scales,
                int threads) const {
    std::vector<double> sums(grad_scales ? s_.batch * s_.edges : 0);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < s_.batch; ++n) {
      double* of_image = grad_scales ? &sums[n * s_.edges] : nullptr;
      s_.channels_last ? rows_backward(grad_out, grad_mixed, grad_arounds, of_image, n)
                       : planes_backward(grad_out, grad_mixed, grad_arounds, of_image, n);
    }
    for (int64_t e = 0; e < s_.edges && grad_scales; ++e) {
      double sum = 0;
      for (int64_t n = 0; n < s_.batch; ++n) sum += sums[n * s_.edges + e];
      grad_scales[e] = static_cast<float>(sum);
    }
  }

 private:
  float scale(int64_t e) const { return scales_ ? scales_[e] : 1.0f; }
  const float* around(int64_t e, int64_t n) const { return arounds_[e].data + n * arounds_[e].image; }

  // to[0, count) = the sum over the edges of scale * (what begins at from(e)).
  template <typename From> void sum(int64_t count, float* to, const From& from) const {
    for (int64_t at = 0; at < count; at += kLanes) {
      const int64_t lanes = std::min(kLanes, count - at);
      Vector total{};
      for (int64_t e = 0; e < s_.edges; ++e) {
        const float* data = from(e) + at;
        total = fma(lanes == kLanes ? load(data) : load_part(data, lanes), set(scale(e)), total);
      }
      lanes == kLanes ? store(to + at, total) : store_part(to + at, total, lanes);
    }
  }

  // Channels last.
  void rows(const float* mixed, float* out, int64_t n) const {
    std::vector<float> buffer(kPixels * channels_);
    for (int64_t begin = 0; begin < s_.pixels; begin += kPixels) {
      const int64_t count = std::min(kPixels, s_.pixels - begin);
      for (int64_t p = 0; p < count; ++p) {
        float* row = &buffer[p * channels_];
        const float* through = mixed + (n * s_.pixels + begin + p) * s_.mixed;
        for (int64_t c = 0; c < s_.mixed; ++c) row[mixed_begin_ + c] = through[c];
        sum(s_.around, row + around_begin_,
            [&](int64_t e) { return around(e, n) + (begin + p) * arounds_[e].step; });
      }
      for (int64_t p = 0; p < count; ++p) {
        const float* row = &buffer[p * channels_];
        float* to = out + (n * s_.pixels + begin + p) * channels_;
        for (int64_t c = 0; c < channels_; ++c) to[c] = row[order_[c]];
      }
    }
  }

  // Channels first.
  void planes(const float* mixed, float* out, int64_t n) const {
    for (int64_t c = 0; c < channels_; ++c) {
      float* to = out + (n * channels_ + c) * s_.pixels;
      const int64_t from = order_[c] - around_begin_;
      if (from >= 0 && from < s_.around)
        for (int64_t begin = 0; begin < s_.pixels; begin += kPlane)
          sum(std::min(kPlane, s_.pixels - begin), to + begin,
              [&](int64_t e) { return around(e, n) + from * arounds_[e].step + begin; });
      else
        for (int64_t p = 0; p < s_.pixels; ++p)
          to[p] = mixed[(n * s_.pixels + p) * s_.mixed + order_[c] - mixed_begin_];
    }
  }

  // What `count` gradients mean for the edges: to(e), null where not wanted, and products with from(e), added up.
  template <typename From, typename To>
  void spread(const float* gradient, int64_t count, std::vector<Vector>& products, const From& from,
              const To& to) const {
    for (int64_t at = 0; at < count; at += kLanes) {
      const int64_t lanes = std::min(kLanes, count - at);
      const Vector g = lanes == kLanes ? load(gradient + at) : load_part(gradient + at, lanes);
      for (int64_t e = 0; e < s_.edges; ++e) {
        if (float* data = to(e)) {
          const Vector value = g * set(scale(e));
          lanes == kLanes ? store(data + at, value) : store_part(data + at, value, lanes);
        }
        if (products.empty()) continue;
        const float* data = from(e) + at;
        products[e] = fma(lanes == kLanes ? load(data) : load_part(data, lanes), g, products[e]);
      }
    }
  }

  // Into double, before float32 has added up too many.
  static void add_up(std::vector<Vector>& products, double* sums) {
    for (size_t e = 0; e < products.size(); ++e) {
      float lanes[kLanes];
      store(lanes, products[e]);
      for (float each : lanes) sums[e] += each;
      products[e] = zero();
    }
  }

  void rows_backward(const float* grad_out, float* grad_mixed, float* const* grad_arounds, double* sums,
                     int64_t n) const {
    std::vector<float> buffer(channels_);
    std::vector<Vector> products(sums ? s_.edges : 0);
    for (int64_t p = 0; p < s_.pixels; ++p) {
      const int64_t pixel = n * s_.pixels + p;
      const float* gradient = grad_out + pixel * channels_;
      for (int64_t c = 0; c < channels_; ++c) buffer[order_[c]] = gradient[c];
      for (int64_t c = 0; c < s_.mixed && grad_mixed; ++c) grad_mixed[pixel * s_.mixed + c] = buffer[mixed_begin_ + c];
      spread(buffer.data() + around_begin_, s_.around, products,
             [&](int64_t e) { return around(e, n) + p * arounds_[e].step; },
             [&](int64_t e) { return grad_arounds[e] ? grad_arounds[e] + pixel * s_.around : nullptr; });
      if (p % kSum == kSum - 1 || p + 1 == s_.pixels) add_up(products, sums);
    }
  }

  void planes_backward(const float* grad_out, float* grad_mixed, float* const* grad_arounds, double* sums,
                       int64_t n) const {
    std::vector<Vector> products(sums ? s_.edges : 0);
    for (int64_t c = 0; c < channels_; ++c) {
      const float* gradient = grad_out + (n * channels_ + c) * s_.pixels;
      const int64_t from = order_[c] - around_begin_;
      if (from >= 0 && from < s_.around) {
        for (int64_t begin = 0; begin < s_.pixels; begin += kPlane) {
          spread(gradient + begin, std::min(kPlane, s_.pixels - begin), products,
                 [&](int64_t e) { return around(e, n) + from * arounds_[e].step + begin; },
                 [&](int64_t e) {
                   return grad_arounds[e] ? grad_arounds[e] + (n * s_.around + from) * s_.pixels + begin : nullptr;
                 });
          add_up(products, sums);
        }
      } else if (grad_mixed) {
        for (int64_t p = 0; p < s_.pixels; ++p)
          grad_mixed[(n * s_.pixels + p) * s_.mixed + order_[c] - mixed_begin_] = gradient[p];
      }
    }
  }

  const JoinShape& s_;
  const Around* arounds_;
  const float* scales_;
  int64_t channels_, mixed_begin_ = 0, around_begin_ = 0;
  std::vector<int32_t> order_;  // which of the joined channels becomes each channel
};

}  // namespace

void join_channels(const JoinShape& shape, const float* mixed, const Around* arounds, const float* scales, float* out,
                   int threads) {
  Join(shape, arounds, scales).forward(mixed, out, threads);
}

void join_channels_backward(const JoinShape& shape, const Around* arounds, const float* scales, const float* grad_out,
                            float* grad_mixed, float* const* grad_arounds, float* grad_scales, int threads) {
  Join(shape, arounds, scales).backward(grad_out, grad_mixed, grad_arounds, grad_scales, threads);
}

}  // namespace rnas::cpu::RNAS_LEVEL

#if defined(RNAS_LEVEL_baseline)
namespace rnas::cpu {

static void check(const JoinShape& shape) {
  if (shape.mixed < 0 || shape.around < 0 || shape.groups < 1 || (shape.mixed + shape.around) % shape.groups != 0)
    throw std::invalid_argument("join_channels: the groups must divide the channels");
}

void join_channels(const JoinShape& shape, const float* mixed, const Around* arounds, const float* scales, float* out,
                   int threads) {
  check(shape);
  RNAS_SELECT(join_channels)(shape, mixed, arounds, scales, out, threads);
}

void join_channels_backward(const JoinShape& shape, const Around* arounds, const float* scales, const float* grad_out,
                            float* grad_mixed, float* const* grad_arounds, float* grad_scales, int threads) {
  check(shape);
  RNAS_SELECT(join_channels_backward)
  (shape, arounds, scales, grad_out, grad_mixed, grad_arounds, grad_scales, threads);
}

}  // namespace rnas::cpu
#endif
