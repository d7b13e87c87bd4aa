#pragma once

// What a cell of mixed edges computes, as plain loops in double: slow, short, and independent of the kernels. For
// stride 1, the eight DARTS candidates and batch norms behind pools.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "rnas/mixed_op.h"

using Numbers = std::vector<double>;

// What a cell can be differentiated by; gradients and directions come in the same form. states (S, N, H, W, C), the
// other shapes as in rnas/mixed_op.h.
struct Inputs {
  Numbers states, weights, theta, gamma, beta;
};

class Definition {
 public:
  // mean, variance (B, C): of the norms where statistics are fixed; empty: those of the batch are taken.
  Definition(const rnas::MixedShape& shape, const Inputs& in, const Numbers& mean, const Numbers& variance, double eps)
      : s_(shape), in_(in), mean_(mean), variance_(variance), eps_(eps) {}

  // The nodes side by side, (N, H, W, J * C).
  Numbers cell() {
    std::vector<Numbers> states;
    for (int64_t source = 0; source < s_.inputs; ++source)
      states.emplace_back(in_.states.begin() + source * size(), in_.states.begin() + (source + 1) * size());
    const double* weights = in_.weights.data();
    for (int64_t node = 0; node < s_.nodes; ++node) {
      Numbers sum(size());
      for (const Numbers& state : states)
        for (int64_t k = 0; k < s_.candidates; ++k) add(sum, *weights++, candidate(s_.primitives[k], state));
      states.push_back(sum);
    }
    Numbers out;
    for (int64_t pixel = 0; pixel < pixels(); ++pixel)
      for (int64_t node = 0; node < s_.nodes; ++node) {
        const auto begin = states[s_.inputs + node].begin() + pixel * s_.channels;
        out.insert(out.end(), begin, begin + s_.channels);
      }
    return out;
  }

 private:
  int64_t pixels() const { return s_.batch * s_.height * s_.width; }
  int64_t size() const { return pixels() * s_.channels; }

  static void add(Numbers& sum, double weight, const Numbers& x) {
    for (size_t i = 0; i < x.size(); ++i) sum[i] += weight * x[i];
  }

  Numbers candidate(rnas::Primitive primitive, const Numbers& x) {
    using rnas::Primitive;
    switch (primitive) {
      case Primitive::skip_connect: return x;
      case Primitive::max_pool_3x3: return norm(pool(x, true));
      case Primitive::avg_pool_3x3: return norm(pool(x, false));
      case Primitive::sep_conv_3x3: return separable(separable(x, 3, 1), 3, 1);
      case Primitive::sep_conv_5x5: return separable(separable(x, 5, 1), 5, 1);
      case Primitive::dil_conv_3x3: return separable(x, 3, 2);
      case Primitive::dil_conv_5x5: return separable(x, 5, 2);
      default: return Numbers(size());  // none
    }
  }

  // visit(at, from, tap) for every pixel `at` and every pixel `from` that a kernel sees around it.
  template <typename Visit> void each_tap(int64_t kernel, int64_t dilation, const Visit& visit) const {
    for (int64_t at = 0; at < pixels(); ++at)
      for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
        const int64_t y = at / s_.width % s_.height + dilation * (tap / kernel - kernel / 2);
        const int64_t x = at % s_.width + dilation * (tap % kernel - kernel / 2);
        if (y < 0 || x < 0 || y >= s_.height || x >= s_.width) continue;
        visit(at * s_.channels, ((at / (s_.height * s_.width) * s_.height + y) * s_.width + x) * s_.channels, tap);
      }
  }

  Numbers pool(const Numbers& x, bool max) const {
    Numbers out(size(), max ? -std::numeric_limits<double>::infinity() : 0.0), count(size());
    each_tap(3, 1, [&](int64_t at, int64_t from, int64_t) {
      for (int64_t c = 0; c < s_.channels; ++c) {
        out[at + c] = max ? std::max(out[at + c], x[from + c]) : out[at + c] + x[from + c];
        count[at + c] += 1;
      }
    });
    for (int64_t i = 0; i < size() && !max; ++i) out[i] /= count[i];  // of the pixels that there are
    return out;
  }

  // ReLU, depthwise and pointwise convolution, norm.
  Numbers separable(const Numbers& x, int64_t kernel, int64_t dilation) {
    const int64_t channels = s_.channels, taps = kernel * kernel;
    const double *depthwise = in_.theta.data() + theta_, *pointwise = depthwise + channels * taps;
    theta_ += channels * (taps + channels);
    Numbers d(size()), y(size());
    each_tap(kernel, dilation, [&](int64_t at, int64_t from, int64_t tap) {
      for (int64_t c = 0; c < channels; ++c) d[at + c] += depthwise[c * taps + tap] * std::max(x[from + c], 0.0);
    });
    for (int64_t at = 0; at < size(); at += channels)
      for (int64_t k = 0; k < channels; ++k)
        for (int64_t c = 0; c < channels; ++c) y[at + k] += pointwise[k * channels + c] * d[at + c];
    return norm(y);
  }

  Numbers norm(Numbers y) {
    for (int64_t c = 0; c < s_.channels; ++c, ++norm_) {
      double mean = 0, variance = 0;
      for (int64_t at = c; at < size(); at += s_.channels) mean += y[at] / pixels();
      for (int64_t at = c; at < size(); at += s_.channels) variance += (y[at] - mean) * (y[at] - mean) / pixels();
      if (!mean_.empty()) mean = mean_[norm_], variance = variance_[norm_];
      const double scale = in_.gamma[norm_] / std::sqrt(variance + eps_);
      for (int64_t at = c; at < size(); at += s_.channels) y[at] = scale * (y[at] - mean) + in_.beta[norm_];
    }
    return y;
  }

  const rnas::MixedShape& s_;
  const Inputs& in_;
  const Numbers &mean_, &variance_;
  double eps_;
  int64_t theta_ = 0, norm_ = 0;  // how many of the parameters, and of the norms' channels, have been used
};
