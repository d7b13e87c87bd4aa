#pragma once

// The gradients of the states of a cell on batch statistics, of its norms and of its mixing weights.

#include <numeric>

#include "mixed/batch.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

class BatchGradients : public Batch {
 protected:
  BatchGradients(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : Batch(plan, in, workspace, threads) {
    const int64_t n = plan.shape.batch;
    for (int64_t state = 0; state < plan.states(); ++state) {
      const bool last = state + 1 == plan.states();
      const bool of_caller = (state < plan.shape.inputs && plan.gradient_dense()) || (last && plan.asked_dense());
      const int64_t floats = n * plan.height(state) * plan.width(state) * plan.padded;
      grads_.push_back(of_caller ? nullptr : arena_.take<float>(floats));
    }
    grad_sums_ = arena_.take<double>(plan.states() * plan.padded);
    image_sums_ = arena_.take<double>(plan.states() * n * plan.padded);
  }

  float* gradient(int64_t state, int64_t n) const {
    return grads_[state] + n * plan_.height(state) * plan_.width(state) * plan_.padded;
  }

  // Those that the caller gives, but for the last node's (`begin_last`). The others begin with the first that is added to
  // them.
  void begin_gradients(const float* grad_out) {
    grad_out_ = grad_out;
    if (plan_.asked_dense()) grads_.back() = const_cast<float*>(grad_out);  // read only
    for (int64_t state = 0; state < plan_.states(); ++state) begun_.push_back(plan_.asked(state) >= 0);
    if (plan_.gradient_dense())
      for (int64_t state = 0; state < plan_.shape.inputs; ++state)
        if (wanted(state)) grads_[state] = static_cast<float*>(grad_.states[state]);
    if (plan_.shape.results() == 1) return;
    parallel(threads_, images(), [&](int thread, int64_t begin, int64_t end) {
      const Section section(scratch_[thread].clock, Work::nodes);
      for (int64_t n = begin; n < end; ++n)
        for (int64_t state = 0; state + 1 < plan_.states(); ++state)
          if (begun_[state]) begin_gradient(plan_, grad_out, state, n, gradient(state, n));
    });
  }

  // That of the last node, which no edge leaves, of image n.
  void begin_last(const Scratch& s, int64_t n) const {
    const int64_t last = plan_.states() - 1;
    if (plan_.asked_dense()) return;
    const Section section(s.clock, Work::nodes);
    begin_gradient(plan_, grad_out_, last, n, gradient(last, n));
  }

  // A finished gradient of image n: its sums over the pixels, or to where the caller wants it.
  void finish_gradient(const Scratch& s, int64_t state, int64_t n) const {
    if (state >= plan_.shape.inputs) {
      dot(s, gradient(state, n), nullptr, nullptr, image_sums(state, n));
    } else if (!plan_.gradient_dense()) {
      const Section section(s.clock, Work::nodes);
      store_gradient(plan_, gradient(state, n), state, n, grad_.states[state]);
    }
  }
  // Behind that of all images.
  void add_up_gradient(int64_t state) const {
    if (state >= plan_.shape.inputs) total(image_sums(state, 0), grad_sums_ + state * plan_.padded);
  }

  // Whether the gradient of a state goes anywhere.
  bool wanted(int64_t state) const {
    return state >= plan_.shape.inputs || (grad_.states && grad_.states[state]);
  }

  // work(scratch, n) for each image, by whoever is free.
  template <typename Work> void each_image(const Work& work) const {
    parallel_shared(threads_, images(), [&](int thread, const auto& take) {
      for (int64_t n = take(); n >= 0; n = take()) work(scratch_[thread], n);
    });
  }

  double* image_sums(int64_t state, int64_t n) const {
    return image_sums_ + (state * images() + n) * plan_.padded;
  }

  // to[c] = sum over the pixels of an image of g * (y - pivot).
  void dot(const Scratch& s, const float* g, const float* y, const float* pivot, double* to) const {
    const Section section(s.clock, Work::norms);
    std::fill_n(to, plan_.padded, 0.0);
    add_dot(plan_, g, y, plan_.plane_out(), plan_.pixels_out(), pivot, s.sums, to);
  }

  // That of an edge's gradient, which is its node's times the scale of the image.
  void edge_dot(const Scratch& s, int64_t e, int64_t n, const float* y, const float* pivot, double* to) const {
    dot(s, gradient(plan_.edges[e].target, n), y, pivot, to);
    rescale(e, n, to);
  }
  void rescale(int64_t e, int64_t n, double* sums) const {
    for (int64_t c = 0; c < plan_.padded && plan_.shape.scaled; ++c) sums[c] *= scale(e, n);
  }
  // The sum of its gradient over all images and pixels.
  std::vector<double> edge_sum(int64_t e) const {
    const int64_t target = plan_.edges[e].target;
    const double* sum = grad_sums_ + target * plan_.padded;
    if (!plan_.shape.scaled) return std::vector<double>(sum, sum + plan_.padded);
    std::vector<double> found(plan_.padded);
    for (int64_t n = 0; n < images(); ++n)
      for (int64_t c = 0; c < plan_.padded; ++c) found[c] += scale(e, n) * image_sums(target, n)[c];
    return found;
  }

  // Adds up (images, padded).
  void total(const double* each, double* to) const {
    for (int64_t c = 0; c < plan_.padded; ++c) to[c] = 0;
    for (int64_t n = 0; n < images(); ++n)
      for (int64_t c = 0; c < plan_.padded; ++c) to[c] += each[n * plan_.padded + c];
  }

  // Gradients of a norm's affine parameters and of the factor behind it, from dot = sum g (y - mean) and sum = sum g.
  void norm_gradients(int64_t norm, double factor, const double* dot, const double* sum, double* factor_grad) const {
    const int64_t c = plan_.shape.channels;
    double all = 0;
    for (int64_t channel = 0; channel < c; ++channel) {
      const int64_t at = norm * plan_.padded + channel;
      const double normalised = norms_.inverse[at] * dot[channel];
      all += norms_.gamma[at] * normalised + norms_.beta[at] * sum[channel];
      if (grad_.gamma) grad_.gamma[norm * c + channel] = static_cast<float>(factor * normalised);
      if (grad_.beta) grad_.beta[norm * c + channel] = static_cast<float>(factor * sum[channel]);
    }
    if (factor_grad) *factor_grad = all;
  }

  void set_mixing_gradient(int64_t e, int64_t mix, double value) const {
    if (grad_.weights) grad_.weights[e * plan_.shape.candidates + mix] = static_cast<float>(value);
  }


  MixedGradients grad_{};
  std::vector<float*> grads_;    // of each state, dense
  std::vector<bool> begun_;      // of which of them there is anything yet
  const float* grad_out_ = nullptr;
  double* grad_sums_ = nullptr;   // (states, padded)
  double* image_sums_ = nullptr;  // (states, images, padded)
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
