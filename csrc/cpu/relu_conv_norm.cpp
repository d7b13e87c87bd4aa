#include "rnas/relu_conv_norm.h"

#include <algorithm>
#include <cmath>

#include "mixed/stage.h"
#include "once/clock.h"
#include "simd/simd.h"

RNAS_DECLARE_LEVELS(relu_conv_norm_sizes)
RNAS_DECLARE_LEVELS(relu_conv_norm_forward)
RNAS_DECLARE_LEVELS(relu_conv_norm_backward)
RNAS_DECLARE_LEVELS(relu_conv_norm_double_backward)

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// Pixels that go through the loops together, and of which sums are taken in float32 before they are added in double.
// Sums of a block do not depend on the number of threads.
constexpr int64_t kPixels = 32;  // no more than kChunk
constexpr int64_t kBlockPixels = 1024;

class Layer {
 public:
  Layer(const ReluConvNorm& in, void* workspace, int threads)
      : in_(in), threads_(threads), arena_(workspace), groups_in_((in.channels_in + kLanes - 1) / kLanes),
        groups_out_((in.channels_out + kLanes - 1) / kLanes), padded_in_(groups_in_ * kLanes),
        padded_out_(groups_out_ * kLanes), blocks_((in.pixels + kBlockPixels - 1) / kBlockPixels) {
    weights_ = arena_.take<float>(padded_in_ * padded_out_);
    transposed_ = arena_.take<float>(padded_in_ * padded_out_);
    for (float** table : {&mean_, &inverse_, &gamma_, &beta_, &scale_, &shift_, &a_, &b_, &d_})
      *table = arena_.take<float>(padded_out_);
    sums_ = arena_.take<double>(2 * blocks_ * padded_out_);
    for (int thread = 0; thread < threads; ++thread) {
      Local local{};
      local.d = arena_.take<float>(padded_in_ * kPixels);
      local.y = arena_.take<float>(padded_out_ * kPixels);
      local.g = arena_.take<float>(padded_out_ * kPixels);
      local.gx = arena_.take<float>(padded_in_ * kPixels);
      local.weights.now = arena_.take<float>(padded_in_ * padded_out_);
      local.weights.total = arena_.take<double>(padded_in_ * padded_out_);
      local.ahead = arena_.take<Ahead>(1);
      if (local.ahead) new (local.ahead) Ahead();
      local.clock = clock_of(thread);
      locals_.push_back(local);
    }
  }

  int64_t workspace() const { return arena_.used(); }
  int64_t masks() const { return in_.relu ? in_.pixels * groups_in_ : 0; }

  void forward(Bits* signs, float* out, float* batch_mean, float* batch_variance) {
    if (in_.batch_statistics) {
      pack(nullptr);
      each_block([&](const Local& l, int64_t block, int64_t begin, int64_t end) {
        double* mean = sums_ + 2 * block * padded_out_;
        each_chunk(begin, end, [&](int64_t p, int64_t count) {
          load_relu(l, p, count, nullptr);
          announce(l, in_.x, in_.channels_in, p + count, end);
          multiply(l, count);
          {
            const Section section(l.clock, Work::norms);
            add_moments(groups_out_, l.y, kPixels * kLanes, count, p - begin, {mean, mean + padded_out_});
          }
          unload(l, l.y, groups_out_, in_.channels_out, p, count, out);
        });
      });
      merge_moments(batch_mean, batch_variance);
      each_block([&](const Local& l, int64_t, int64_t begin, int64_t end) {
        const Section section(l.clock, Work::norms);
        normalise(out, begin, end);
      });
      return;
    }
    set_norm(in_.mean, in_.variance);
    pack(scale_);
    each_block([&](const Local& l, int64_t, int64_t begin, int64_t end) {
      each_chunk(begin, end, [&](int64_t p, int64_t count) {
        load_relu(l, p, count, signs);
        announce(l, in_.x, in_.channels_in, p + count, end);
        {
          const Section section(l.clock, Work::pointwise, adds(count));
          for (int64_t group = 0; group < groups_out_; ++group)
            for (int64_t i = 0; i < count; ++i)
              store(l.y + (group * kPixels + i) * kLanes, load(shift_ + group * kLanes));
          pointwise<true>(l.d, kPixels * kLanes, groups_in_, weights_, padded_out_, groups_out_, l.y, kPixels * kLanes,
                          count, *l.ahead);
        }
        unload(l, l.y, groups_out_, in_.channels_out, p, count, out);
      });
    });
  }

  void backward(const Bits* signs, const float* out, const float* grad_out, float* grad_x, float* grad_weight,
                float* grad_gamma, float* grad_beta) {
    set_norm(in_.mean, in_.variance);
    pack(in_.batch_statistics ? nullptr : scale_);
    const bool sums = in_.batch_statistics || grad_gamma || grad_beta;
    std::vector<double> dot(padded_out_), sum(padded_out_);
    if (sums) {
      gradient_sums(out, grad_out, dot.data(), sum.data());
      for (int64_t c = 0; c < in_.channels_out; ++c) {
        if (grad_gamma) grad_gamma[c] = static_cast<float>(dot[c]);
        if (grad_beta) grad_beta[c] = static_cast<float>(sum[c]);
      }
    }
    if (in_.batch_statistics)
      for (int64_t c = 0; c < padded_out_; ++c) {  // g_y = a * g + b * normalised + d
        const double a = static_cast<double>(gamma_[c]) * inverse_[c];
        a_[c] = static_cast<float>(a);
        b_[c] = static_cast<float>(-a * dot[c] / in_.pixels);
        d_[c] = static_cast<float>(-a * sum[c] / in_.pixels);
      }
    if (!grad_x && !grad_weight) return;
    begin_weights(grad_weight);
    each_block([&](const Local& l, int64_t, int64_t begin, int64_t end) {
      each_chunk(begin, end, [&](int64_t p, int64_t count) {
        const bool needs_x = grad_weight || (in_.relu && !signs) || (in_.batch_statistics && in_.gamma);
        if (needs_x) {
          load_relu(l, p, count, nullptr);
          announce(l, in_.x, in_.channels_in, p + count, end);
        } else {
          l.ahead->clear();
        }
        announce_more(l, grad_out, in_.channels_out, p + count, end);
        load_chunk(l, grad_out, groups_out_, in_.channels_out, p, count, l.g);
        if (in_.batch_statistics) {
          normalised(l, out, p, count);
          const Section section(l.clock, Work::norms);
          for (int64_t group = 0; group < groups_out_; ++group) {
            const Vector a = load(a_ + group * kLanes), b = load(b_ + group * kLanes), d = load(d_ + group * kLanes);
            for (int64_t i = 0; i < count; ++i) {
              float* g = l.g + (group * kPixels + i) * kLanes;
              store(g, fma(load(g), a, fma(load(l.y + (group * kPixels + i) * kLanes), b, d)));
            }
          }
        }
        if (grad_weight) add_weights(l, count);
        if (!grad_x) return;
        to_input(l, count);
        if (in_.relu) mask(signs, l.d, p, count, l.gx);
        unload(l, l.gx, groups_in_, in_.channels_in, p, count, grad_x);
      });
      if (grad_weight) l.weights.add_up(0, padded_in_ * padded_out_);
    });
    if (grad_weight) finish_weights(in_.batch_statistics ? nullptr : scale_, grad_weight);
  }

  void double_backward(const Bits* signs, const float* grad_out, const float* direction, float* grad_grad_out,
                       float* grad_weight, float* grad_gamma) {
    set_norm(in_.mean, in_.variance);
    pack(scale_);
    const bool weights = grad_weight || grad_gamma;
    begin_weights(weights);
    each_block([&](const Local& l, int64_t, int64_t begin, int64_t end) {
      each_chunk(begin, end, [&](int64_t p, int64_t count) {
        load_chunk(l, direction, groups_in_, in_.channels_in, p, count, l.d);
        if (in_.relu) {
          if (!signs) load_chunk(l, in_.x, groups_in_, in_.channels_in, p, count, l.gx);
          mask(signs, l.gx, p, count, l.d);
        }
        l.ahead->clear();
        multiply(l, count);
        unload(l, l.y, groups_out_, in_.channels_out, p, count, grad_grad_out);
        if (!weights) return;
        load_chunk(l, grad_out, groups_out_, in_.channels_out, p, count, l.g);
        add_weights(l, count);
      });
      if (weights) l.weights.add_up(0, padded_in_ * padded_out_);
    });
    if (grad_weight) finish_weights(scale_, grad_weight);
    if (!grad_gamma) return;
    for (int64_t k = 0; k < in_.channels_out; ++k) {  // y is linear in the weights, and has no constant here
      double sum = 0;
      for (int64_t c = 0; c < in_.channels_in; ++c)
        for (const Local& l : locals_) sum += l.weights.total[c * padded_out_ + k] * in_.weight[k * in_.channels_in + c];
      grad_gamma[k] = static_cast<float>(sum * inverse_[k]);
    }
  }

 private:
  struct Local {
    float *d, *y, *g, *gx;  // chunks [group][kPixels][lane]: relu(x), output, gradient of the output, gradient of x
    WeightSums weights;     // [input][output]
    Ahead* ahead;
    Clock* clock;
  };

  // work(local, block, begin, end) for every block of pixels.
  template <typename Work> void each_block(const Work& work) const {
    parallel(threads_, blocks_, [&](int thread, int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        work(locals_[thread], block, block * kBlockPixels, std::min(in_.pixels, (block + 1) * kBlockPixels));
    });
  }

  template <typename Work> static void each_chunk(int64_t begin, int64_t end, const Work& work) {
    for (int64_t p = begin; p < end; p += kPixels) work(p, std::min(kPixels, end - p));
  }

  // The next chunk of an array (P, channels) will be read soon.
  static void announce(const Local& l, const float* data, int64_t channels, int64_t p, int64_t end) {
    l.ahead->clear();
    announce_more(l, data, channels, p, end);
  }
  static void announce_more(const Local& l, const float* data, int64_t channels, int64_t p, int64_t end) {
    if (p < end) l.ahead->add(data + p * channels, std::min(kPixels, end - p) * channels / 16 + 1);
  }

  static void load_chunk(const Local& l, const float* from, int64_t groups, int64_t channels, int64_t p, int64_t count,
                         float* to) {
    const Section section(l.clock, Work::tiles);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t lanes = std::min(kLanes, channels - group * kLanes);
      const float* at = from + p * channels + group * kLanes;
      for (int64_t i = 0; i < count; ++i, at += channels)
        store(to + (group * kPixels + i) * kLanes, lanes == kLanes ? load(at) : load_part(at, lanes));
    }
  }

  static void unload(const Local& l, const float* from, int64_t groups, int64_t channels, int64_t p, int64_t count,
                     float* to) {
    const Section section(l.clock, Work::nodes);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t lanes = std::min(kLanes, channels - group * kLanes);
      float* at = to + p * channels + group * kLanes;
      for (int64_t i = 0; i < count; ++i, at += channels) {
        const Vector v = load(from + (group * kPixels + i) * kLanes);
        lanes == kLanes ? store(at, v) : store_part(at, v, lanes);
      }
    }
  }

  void load_relu(const Local& l, int64_t p, int64_t count, Bits* signs) const {
    const Section section(l.clock, Work::tiles);
    for (int64_t group = 0; group < groups_in_; ++group) {
      const int64_t lanes = std::min(kLanes, in_.channels_in - group * kLanes);
      const float* at = in_.x + p * in_.channels_in + group * kLanes;
      for (int64_t i = 0; i < count; ++i, at += in_.channels_in) {
        const Vector v = lanes == kLanes ? load(at) : load_part(at, lanes);
        store(l.d + (group * kPixels + i) * kLanes, in_.relu ? relu(v) : v);
        if (signs) signs[(p + i) * groups_in_ + group] = positive(v);
      }
    }
  }

  // Zeros in a chunk of `values` where x is not positive. signs: null where the chunk x of images says so.
  void mask(const Bits* signs, const float* x, int64_t p, int64_t count, float* values) const {
    for (int64_t group = 0; group < groups_in_; ++group)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (group * kPixels + i) * kLanes;
        const Bits mask = signs ? signs[(p + i) * groups_in_ + group] : positive(load(x + at));
        store(values + at, keep(mask, load(values + at)));
      }
  }

  int64_t adds(int64_t count) const { return count * in_.channels_in * in_.channels_out; }

  void multiply(const Local& l, int64_t count) const {
    const Section section(l.clock, Work::pointwise, adds(count));
    pointwise<false>(l.d, kPixels * kLanes, groups_in_, weights_, padded_out_, groups_out_, l.y, kPixels * kLanes, count,
                     *l.ahead);
  }

  void to_input(const Local& l, int64_t count) const {
    const Section section(l.clock, Work::pointwise_input, adds(count));
    pointwise<false>(l.g, kPixels * kLanes, groups_out_, transposed_, padded_in_, groups_in_, l.gx, kPixels * kLanes,
                     count, *l.ahead);
  }

  void add_weights(const Local& l, int64_t count) const {
    const Section section(l.clock, Work::pointwise_weight, adds(count));
    pointwise_weight(l.d, kPixels * kLanes, groups_in_, l.g, kPixels * kLanes, groups_out_, count, l.weights.now,
                     padded_out_);
  }

  void merge_moments(float* batch_mean, float* batch_variance) {
    for (int64_t c = 0; c < in_.channels_out; ++c) {
      double count = 0, mean = 0, squares = 0;
      for (int64_t block = 0; block < blocks_; ++block) {
        const double size = static_cast<double>(std::min(kBlockPixels, in_.pixels - block * kBlockPixels));
        const double delta = sums_[2 * block * padded_out_ + c] - mean, total = count + size;
        mean += delta * size / total;
        squares += sums_[(2 * block + 1) * padded_out_ + c] + delta * delta * count * size / total;
        count = total;
      }
      means_.push_back(mean);
      variances_.push_back(squares / count);
      batch_mean[c] = static_cast<float>(mean);
      batch_variance[c] = static_cast<float>(squares / count);
    }
    set_norm(means_.data(), variances_.data());
  }

  template <typename Number> void set_norm(const Number* mean, const Number* variance) {
    for (float* table : {mean_, inverse_, gamma_, beta_, scale_, shift_})
      std::memset(table, 0, padded_out_ * sizeof(float));
    for (int64_t c = 0; c < in_.channels_out; ++c) {
      const double inverse = 1.0 / std::sqrt(static_cast<double>(variance[c]) + in_.eps);
      const double gamma = in_.gamma ? in_.gamma[c] : 1.0, beta = in_.beta ? in_.beta[c] : 0.0;
      mean_[c] = static_cast<float>(mean[c]);
      inverse_[c] = static_cast<float>(inverse);
      gamma_[c] = static_cast<float>(gamma);
      beta_[c] = static_cast<float>(beta);
      scale_[c] = static_cast<float>(gamma * inverse);
      shift_[c] = static_cast<float>(beta - mean[c] * gamma * inverse);
    }
  }

  void normalise(float* out, int64_t begin, int64_t end) const {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t group = 0; group < groups_out_; ++group) {
        const int64_t lanes = std::min(kLanes, in_.channels_out - group * kLanes);
        float* at = out + p * in_.channels_out + group * kLanes;
        const Vector scale = load(scale_ + group * kLanes), shift = load(shift_ + group * kLanes);
        if (lanes == kLanes)
          store(at, fma(load(at), scale, shift));
        else
          store_part(at, fma(load_part(at, lanes), scale, shift), lanes);
      }
  }

  // (y - mean) / sigma of a chunk, into l.y: the output itself where the norm has no affine parameters.
  void normalised(const Local& l, const float* out, int64_t p, int64_t count) const {
    if (!in_.gamma && !in_.beta) {
      load_chunk(l, out, groups_out_, in_.channels_out, p, count, l.y);
      return;
    }
    load_relu(l, p, count, nullptr);
    multiply(l, count);
    const Section section(l.clock, Work::norms);
    for (int64_t group = 0; group < groups_out_; ++group) {
      const Vector mean = load(mean_ + group * kLanes), inverse = load(inverse_ + group * kLanes);
      for (int64_t i = 0; i < count; ++i) {
        float* y = l.y + (group * kPixels + i) * kLanes;
        store(y, (load(y) - mean) * inverse);
      }
    }
  }

  // Sums over all pixels of g * normalised and of g, by channel.
  void gradient_sums(const float* out, const float* grad_out, double* dot, double* sum) {
    // On fixed statistics the packed weights carry the scale; here the plain ones are needed.
    if (!in_.batch_statistics) pack(nullptr);
    each_block([&](const Local& l, int64_t block, int64_t begin, int64_t end) {
      double *dots = sums_ + 2 * block * padded_out_, *totals = dots + padded_out_;
      std::fill_n(dots, 2 * padded_out_, 0.0);
      each_chunk(begin, end, [&](int64_t p, int64_t count) {
        l.ahead->clear();
        load_chunk(l, grad_out, groups_out_, in_.channels_out, p, count, l.g);
        normalised(l, out, p, count);
        const Section section(l.clock, Work::norms);
        for (int64_t group = 0; group < groups_out_; ++group) {
          Vector a[2] = {}, b[2] = {};  // in float32 over few pixels: of equal gradients all roundings have one sign
          for (int64_t i = 0; i < count; ++i) {
            const int64_t at = (group * kPixels + i) * kLanes;
            const Vector g = load(l.g + at);
            a[i % 2] = fma(g, load(l.y + at), a[i % 2]);
            b[i % 2] += g;
          }
          float dot_of[kLanes], sum_of[kLanes];
          store(dot_of, a[0] + a[1]);
          store(sum_of, b[0] + b[1]);
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            dots[group * kLanes + lane] += dot_of[lane];
            totals[group * kLanes + lane] += sum_of[lane];
          }
        }
      });
    });
    for (int64_t block = 0; block < blocks_; ++block)
      for (int64_t c = 0; c < padded_out_; ++c) {
        dot[c] += sums_[2 * block * padded_out_ + c];
        sum[c] += sums_[(2 * block + 1) * padded_out_ + c];
      }
    if (!in_.batch_statistics) pack(scale_);
  }

  void pack(const float* scale) {
    std::memset(weights_, 0, padded_in_ * padded_out_ * sizeof(float));
    std::memset(transposed_, 0, padded_in_ * padded_out_ * sizeof(float));
    for (int64_t k = 0; k < in_.channels_out; ++k)
      for (int64_t c = 0; c < in_.channels_in; ++c) {
        const float value = in_.weight[k * in_.channels_in + c] * (scale ? scale[k] : 1.0f);
        weights_[c * padded_out_ + k] = transposed_[k * padded_in_ + c] = value;
      }
  }

  void begin_weights(bool wanted) const {
    if (!wanted) return;
    for (const Local& l : locals_) {
      std::memset(l.weights.now, 0, padded_in_ * padded_out_ * sizeof(float));
      std::memset(l.weights.total, 0, padded_in_ * padded_out_ * sizeof(double));
    }
  }

  void finish_weights(const float* scale, float* grad_weight) const {
    for (int64_t k = 0; k < in_.channels_out; ++k)
      for (int64_t c = 0; c < in_.channels_in; ++c) {
        double sum = 0;
        for (const Local& l : locals_) sum += l.weights.total[c * padded_out_ + k];
        grad_weight[k * in_.channels_in + c] = static_cast<float>(sum * (scale ? scale[k] : 1.0f));
      }
  }

  const ReluConvNorm& in_;
  int threads_;
  Arena arena_;
  int64_t groups_in_, groups_out_, padded_in_, padded_out_, blocks_;
  float *weights_, *transposed_;  // (padded_in, padded_out) and the reverse
  float *mean_, *inverse_, *gamma_, *beta_, *scale_, *shift_, *a_, *b_, *d_;  // (padded_out)
  double* sums_;                  // (blocks, 2, padded_out)
  std::vector<Local> locals_;
  std::vector<double> means_, variances_;
};

// Where the signs of x are kept, or null.
const Bits* signs(const ReluConvNorm& in, Keep keep, const void* kept) {
  return keep == Keep::masks && in.relu ? static_cast<const Bits*>(kept) : nullptr;
}

}  // namespace

ReluConvNormSizes relu_conv_norm_sizes(int64_t pixels, int64_t channels_in, int64_t channels_out, bool relu,
                                       int threads) {
  ReluConvNorm in{};
  in.pixels = pixels;
  in.channels_in = channels_in;
  in.channels_out = channels_out;
  in.relu = relu;
  const Layer layer(in, nullptr, threads);
  return {layer.masks() * static_cast<int64_t>(sizeof(Bits)), layer.workspace()};
}

void relu_conv_norm_forward(const ReluConvNorm& in, Keep keep, float* out, float* mean, float* variance, void* kept,
                            void* workspace, int threads) {
  Layer(in, workspace, threads)
      .forward(const_cast<Bits*>(signs(in, keep, kept)), out, mean, variance);
}

void relu_conv_norm_backward(const ReluConvNorm& in, Keep keep, const float* out, const void* kept,
                             const float* grad_out, float* grad_x, float* grad_weight, float* grad_gamma,
                             float* grad_beta, void* workspace, int threads) {
  Layer(in, workspace, threads)
      .backward(signs(in, keep, kept), out, grad_out, grad_x, grad_weight,
                grad_gamma, grad_beta);
}

void relu_conv_norm_double_backward(const ReluConvNorm& in, Keep keep, const void* kept, const float* grad_out,
                                    const float* direction, float* grad_grad_out, float* grad_weight,
                                    float* grad_gamma, void* workspace, int threads) {
  Layer(in, workspace, threads)
      .double_backward(signs(in, keep, kept), grad_out, direction,
                       grad_grad_out, grad_weight, grad_gamma);
}

}  // namespace rnas::cpu::RNAS_LEVEL

#if defined(RNAS_LEVEL_baseline)
namespace rnas::cpu {

ReluConvNormSizes relu_conv_norm_sizes(int64_t pixels, int64_t channels_in, int64_t channels_out, bool relu,
                                       int threads) {
  if (pixels < 1 || channels_in < 1 || channels_out < 1)
    throw std::invalid_argument("relu_conv_norm: sizes must be positive");
  return RNAS_SELECT(relu_conv_norm_sizes)(pixels, channels_in, channels_out, relu, threads);
}

void relu_conv_norm_forward(const ReluConvNorm& in, Keep keep, float* out, float* mean, float* variance, void* kept,
                            void* workspace, int threads) {
  const Whole whole(threads);
  RNAS_SELECT(relu_conv_norm_forward)(in, keep, out, mean, variance, kept, workspace, threads);
}

void relu_conv_norm_backward(const ReluConvNorm& in, Keep keep, const float* out, const void* kept,
                             const float* grad_out, float* grad_x, float* grad_weight, float* grad_gamma,
                             float* grad_beta, void* workspace, int threads) {
  if (keep == Keep::masks && (in.batch_statistics || grad_weight || grad_gamma || grad_beta))
    throw std::invalid_argument("relu_conv_norm_backward: masks give only the gradient to x, on fixed statistics");
  const Whole whole(threads);
  RNAS_SELECT(relu_conv_norm_backward)
  (in, keep, out, kept, grad_out, grad_x, grad_weight, grad_gamma, grad_beta, workspace, threads);
}

void relu_conv_norm_double_backward(const ReluConvNorm& in, Keep keep, const void* kept, const float* grad_out,
                                    const float* direction, float* grad_grad_out, float* grad_weight,
                                    float* grad_gamma, void* workspace, int threads) {
  if (in.batch_statistics) throw std::invalid_argument("relu_conv_norm_double_backward takes fixed statistics");
  const Whole whole(threads);
  RNAS_SELECT(relu_conv_norm_double_backward)
  (in, keep, kept, grad_out, direction, grad_grad_out, grad_weight, grad_gamma, workspace, threads);
}

}  // namespace rnas::cpu
#endif
