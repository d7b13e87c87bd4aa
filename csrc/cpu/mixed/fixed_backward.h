#pragma once

// The backward pass of a cell on fixed statistics, and second derivatives, which are exact there: between its kinks the
// cell is linear in the states.

#include "mixed/fixed_forward.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

class FixedBackward : public FixedForward {
 public:
  FixedBackward(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : FixedForward(plan, in, workspace, threads) {}

  void backward(Keep keep, const void* kept, const float* grad_out, const MixedGradients& grad) {
    prepare();
    grad_out_ = grad_out;
    grad_ = grad;
    kept_ = keep >= Keep::activations ? static_cast<float*>(const_cast<void*>(kept)) : nullptr;
    masks_ = keep == Keep::masks ? static_cast<Bits*>(const_cast<void*>(kept)) : nullptr;
    run_backward(false);
  }

  void double_backward(Keep keep, const void* kept, const float* grad_out, const void* const* direction,
                       float* grad_grad_out, void* direction_kept, const MixedGradients& grad) {
    prepare();
    grad_out_ = grad_out;
    grad_ = grad;
    kept_ = keep >= Keep::activations ? static_cast<float*>(const_cast<void*>(kept)) : nullptr;
    masks_ = keep == Keep::masks ? static_cast<Bits*>(const_cast<void*>(kept)) : nullptr;
    direction_ = direction;
    direction_out_ = grad_grad_out;
    direction_kept_ = static_cast<float*>(direction_kept);
    parallel_shared(threads_, images(), [&](int thread, const auto& take) {
      begin_thread(locals_[thread]);
      for (int64_t n = take(); n >= 0; n = take()) forward_image(n, locals_[thread], true);
    });
    if (wants_parameters()) run_backward(true);
  }

 private:
  void run_backward(bool linear) {
    const int64_t per_edge = 3 * plan_.padded;
    const bool parameters = wants_parameters();
    if (!parameters) {
      parallel_shared(threads_, images(), [&](int thread, const auto& take) {
        begin_thread(locals_[thread]);
        for (int64_t n = take(); n >= 0; n = take()) backward_image(n, locals_[thread], false, linear);
      });
      return;
    }
    parallel(threads_, threads_, [&](int, int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        const Local& local = locals_[thread];
        std::memset(local.weights.now, 0, plan_.packed * sizeof(float));
        std::memset(local.weights.total, 0, plan_.summed * sizeof(double));
        std::memset(local.sum, 0, plan_.states() * plan_.padded * sizeof(double));
        std::memset(local.mid_sum, 0, plan_.kept * plan_.padded * sizeof(double));
        std::memset(local.dots, 0, plan_.edges.size() * per_edge * sizeof(double));
      }
    });
    parallel(threads_, images(), [&](int thread, int64_t begin, int64_t end) {
      const Local& local = locals_[thread];
      begin_thread(local);
      for (int64_t n = begin; n < end; ++n) {
        backward_image(n, local, true, linear);
        for (const Edge& edge : plan_.edges)
          for (const Branch& branch : edge.branches)
            for (const Convolution& conv : branch.stages)
              if (plan_.flushes(conv, n, n + 1, end)) add_up(plan_, conv, local.weights);
      }
    });
    finish_parameters(linear);
  }

  void backward_image(int64_t n, const Local& local, bool parameters, bool linear) const {
    const Scratch& s = local.scratch;
    Bits* mask = masks(n, local);
    const int64_t inputs = plan_.shape.inputs;
    for (int64_t state = 0; state < plan_.states(); ++state)
      begin_gradient(plan_, grad_out_, state, n, local.states[state]);
    if (parameters) add_sum(local.states[plan_.states() - 1], nullptr, s, local.sum + (plan_.states() - 1) * plan_.padded);
    for (int64_t source = plan_.states() - 2; source >= 0; --source) {
      backward_source(source, n, local, mask, parameters, linear);
      if (parameters && source >= inputs) add_sum(local.states[source], nullptr, s, local.sum + source * plan_.padded);
    }
    if (!grad_.states) return;
    for (int64_t state = 0; state < inputs; ++state)
      if (grad_.states[state]) store_gradient(plan_, local.states[state], state, n, grad_.states[state]);
  }

  // The rows of a dense image from `row` on.
  Rows rows_of(const float* image, int64_t row) const {
    return {image + row * plan_.width_out * kLanes, plan_.width_out * kLanes, plan_.plane_out()};
  }

  // to[c] += sum over the pixels of an output image of g * y (y null: of g).
  void add_sum(const float* g, const float* y, const Scratch& s, double* to) const {
    const Section section(s.clock, Work::norms);
    add_dot(plan_, g, y, plan_.plane_out(), plan_.pixels_out(), nullptr, s.sums, to);
  }

  void backward_source(int64_t source, int64_t n, const Local& local, Bits* mask, bool parameters, bool linear) const {
    const Scratch& s = local.scratch;
    const State x = state_of(source, local, false);
    const State v = linear ? state_of(source, local, true) : x;
    const int64_t pixels = x.height * x.width;
    Bits* signs = mask + layout_.signs[source];
    const Tile tile = tile_of(source, local);
    if (!masks_) {
      const Section section(s.clock, Work::tiles);
      load_relu(plan_, x, n, tile, signs);
      if (linear) load_relu_linear(plan_, x, v, n, tile);
    }
    const WeightSums* const now = parameters ? &local.weights : nullptr;
    const bool of_state = source >= plan_.shape.inputs || (grad_.states && grad_.states[source]);
    float* const in_grad = of_state ? s.state_grad : nullptr;
    bool any = false;
    for (size_t e = 0; e < plan_.edges.size(); ++e) {
      const Edge& edge = plan_.edges[e];
      if (edge.source != source) continue;
      const float* g = local.states[edge.target];
      for (const Branch& branch : edge.branches) {
        const float* inner = g;
        if (branch.stages.size() > 1) {
          backward_mid(branch, g, n, local, mask, now, linear);
          inner = s.mid_grad;
        }
        const auto gradient = [&](int64_t, int64_t row, int64_t, const Tile&) { return rows_of(inner, row); };
        const Convolution& conv = branch.stages[0];
        if (any)
          convolve_backward<true>(plan_, conv, packed_, tile, 1, x.height, x.width, s, gradient, in_grad, now);
        else
          convolve_backward<false>(plan_, conv, packed_, tile, 1, x.height, x.width, s, gradient, in_grad, now);
        any = true;
      }
    }
    float* to = local.states[source];
    if (any && of_state) {
      const Section section(s.clock, Work::nodes);
      for (int64_t at = 0; at < plan_.groups * pixels; ++at)
        add_to(to + at * kLanes, keep(signs[at], load(s.state_grad + at * kLanes)));
    }
    backward_pools(source, x, v, n, local, mask, parameters, linear);
  }

  // From the gradient of a branch's output to that in front of the ReLU of its second stage, in mid_grad.
  void backward_mid(const Branch& branch, const float* g, int64_t n, const Local& local, Bits* mask,
                    const WeightSums* now, bool linear) const {
    const Scratch& s = local.scratch;
    Bits* signs = mask + layout_.mid[branch.kept];
    if (!masks_) {
      const Section section(s.clock, Work::tiles);
      const float* shift = norms_.row(norms_.shift, branch.stages[0].norm);
      const float* z = kept_mid(kept_, branch, n);
      load_mid(plan_, z, ones_, shift, s.mid, signs);
      if (linear) load_mid_linear(plan_, z, shift, kept_mid(direction_kept_, branch, n), s.mid);
    }
    convolve_backward<false>(
        plan_, branch.last(), packed_, s.mid, 1, plan_.height_out, plan_.width_out, s,
        [&](int64_t, int64_t row, int64_t, const Tile&) { return rows_of(g, row); }, s.mid_grad, now);
    {
      const Section section(s.clock, Work::nodes);
      for (int64_t at = 0; at < plan_.groups * plan_.pixels_out(); ++at)
        store(s.mid_grad + at * kLanes, keep(signs[at], load(s.mid_grad + at * kLanes)));
    }
    if (now) add_sum(s.mid_grad, nullptr, s, local.mid_sum + branch.kept * plan_.padded);
  }

  void backward_pools(int64_t source, const State& x, const State& v, int64_t n, const Local& local, Bits* mask,
                      bool parameters, bool linear) const {
    const Scratch& s = local.scratch;
    const Section section(s.clock, Work::pools);
    const PoolShape shape = pool_shape(source);
    const int64_t pixels = x.height * x.width, plane = plan_.plane_out();
    if (!masks_) {
      load_dense(plan_, x, n, s.state_grad);
      if (plan_.leaves(source, &Edge::max))
        for (int64_t group = 0; group < plan_.groups; ++group) find_winners(x, source, local, mask, nullptr, group);
      if (linear) load_dense(plan_, v, n, s.state_grad);
    }
    for (int64_t group = 0; group < plan_.groups; ++group) {
      const float* in = s.state_grad + group * pixels * kLanes;
      float* to = local.states[source] + group * pixels * kLanes;
      // Dots of a pooled state with the gradients of the nodes it goes to.
      const auto dots = [&](const float* pooled, int64_t kind, int64_t Edge::*mix) {
        for (size_t e = 0; e < plan_.edges.size(); ++e) {
          const Edge& edge = plan_.edges[e];
          if (edge.source != source || edge.*mix < 0) continue;
          const float* g = local.states[edge.target] + group * plane;
          double* at = local.dots + (3 * e + kind) * plan_.padded + group * kLanes;
          for (int64_t start = 0; start < plane; start += kSum * kLanes) {
            Vector sum[4] = {};
            for (int64_t p = start; p < std::min(plane, start + kSum * kLanes); p += kLanes) {
              Vector& part = sum[p / kLanes % 4];
              part = fma(load(g + p), load(pooled + p), part);
            }
            float lanes[kLanes];
            store(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
            for (int64_t lane = 0; lane < kLanes; ++lane) at[lane] += lanes[lane];
          }
        }
      };
      // The sum over edges of gradient times factor, into mid_grad.
      const auto weighted = [&](int64_t Edge::*mix, int64_t Edge::*norm) {
        bool first = true;
        for (size_t e = 0; e < plan_.edges.size(); ++e) {
          const Edge& edge = plan_.edges[e];
          if (edge.source != source || edge.*mix < 0) continue;
          const Vector f = factors(e, edge.*mix, norm ? edge.*norm : -1, group);
          const float* g = local.states[edge.target] + group * plane;
          for (int64_t p = 0; p < plane; p += kLanes)
            store(s.mid_grad + p, first ? load(g + p) * f : fma(load(g + p), f, load(s.mid_grad + p)));
          first = false;
        }
      };
      if (plan_.leaves(source, &Edge::max)) {
        if (parameters) {
          max_pool_linear(in, x.width * kLanes, shape, s.pool_rows, local.plane, across(mask, source, group),
                          down(mask, source, group));
          dots(local.plane, 1, &Edge::max);
        }
        weighted(&Edge::max, &Edge::max_norm);
        max_pool_backward(s.mid_grad, shape, s.pool_rows, across(mask, source, group), down(mask, source, group), to);
      }
      if (plan_.leaves(source, &Edge::avg)) {
        if (parameters) {
          average_pool(in, x.width * kLanes, shape, s.pool_rows, local.plane);
          dots(local.plane, 2, &Edge::avg);
        }
        weighted(&Edge::avg, &Edge::avg_norm);
        average_pool_backward(s.mid_grad, shape, s.pool_rows, to);
      }
      if (!plan_.leaves(source, &Edge::skip)) continue;
      if (parameters) dots(in, 0, &Edge::skip);
      weighted(&Edge::skip, nullptr);
      for (int64_t p = 0; p < plane; p += kLanes) add_to(to + p, load(s.mid_grad + p));
    }
  }

  // From the sums over all images to the gradients of the parameters.
  void finish_parameters(bool linear) const {
    const int64_t padded = plan_.padded, c = plan_.shape.channels;
    std::vector<const double*> totals;
    for (const Local& local : locals_) totals.push_back(local.weights.total);
    const auto add_up = [&](double* Local::*table, int64_t row) {
      std::vector<double> sum(padded);
      for (const Local& local : locals_)
        for (int64_t channel = 0; channel < padded; ++channel) sum[channel] += (local.*table)[row * padded + channel];
      return sum;
    };
    parallel(threads_, plan_.edges.size(), [&](int, int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) {
        const Edge& edge = plan_.edges[e];
        const std::vector<double> grad_sum = add_up(&Local::sum, edge.target);
        // The gradients of norm and mixing weight from dot = sum of g * y and sum = sum of g.
        const auto settle = [&](int64_t norm, int64_t mix, double factor, const std::vector<double>& dot,
                                const std::vector<double>& sum) {
          double all = 0;
          for (int64_t channel = 0; channel < c; ++channel) {
            const int64_t at = norm * padded + channel;
            if (norm < 0) {
              all += dot[channel];
              continue;
            }
            // Along a direction the norm has no constant, so neither mean nor beta count.
            const double centred = dot[channel] - (linear ? 0.0 : norms_.mean[at] * sum[channel]);
            const double normalised = norms_.inverse[at] * centred;
            all += norms_.gamma[at] * normalised + (linear ? 0.0 : norms_.beta[at] * sum[channel]);
            if (grad_.gamma) grad_.gamma[norm * c + channel] = static_cast<float>(factor * normalised);
            if (grad_.beta) grad_.beta[norm * c + channel] = static_cast<float>(factor * sum[channel]);
          }
          if (mix >= 0 && grad_.weights) grad_.weights[e * plan_.shape.candidates + mix] = static_cast<float>(all);
        };
        for (const Branch& branch : edge.branches)
          for (const Convolution& conv : branch.stages) {
            const bool last = &conv == &branch.last();
            const double factor = last ? mixing(e)[branch.mix] : 1.0;
            settle(conv.norm, last ? branch.mix : -1, factor, output_dots(conv, totals),
                   last ? grad_sum : add_up(&Local::mid_sum, branch.kept));
            if (!grad_.theta) continue;
            std::vector<float> scale(padded);
            for (int64_t channel = 0; channel < padded; ++channel)
              scale[channel] = static_cast<float>(factor * norms_.row(norms_.scale, conv.norm)[channel]);
            unpack(plan_, conv, totals.data(), static_cast<int>(totals.size()), scale.data(), grad_.theta);
          }
        // Along a direction a constant does not move.
        if (edge.ones >= 0) settle(-1, edge.ones, 1.0, linear ? std::vector<double>(padded) : grad_sum, grad_sum);
        if (edge.skip >= 0) settle(-1, edge.skip, 1.0, add_up(&Local::dots, 3 * e), grad_sum);
        if (edge.max >= 0) settle(edge.max_norm, edge.max, mixing(e)[edge.max], add_up(&Local::dots, 3 * e + 1), grad_sum);
        if (edge.avg >= 0) settle(edge.avg_norm, edge.avg, mixing(e)[edge.avg], add_up(&Local::dots, 3 * e + 2), grad_sum);
      }
    });
  }

  // Sum over pixels of gradient times output, by channel, from the weight gradient: y is linear in the weights.
  std::vector<double> output_dots(const Convolution& conv, const std::vector<const double*>& totals) const {
    std::vector<double> dot(plan_.padded);
    if (conv.winograd)
      kernel_gradients(plan_, conv, totals.data(), static_cast<int>(totals.size()),
                       [&](int64_t output, int64_t input, const double* taps) {
                         const float* at = in_.theta + conv.theta + (output * plan_.shape.channels + input) * 9;
                         for (int64_t tap = 0; tap < 9; ++tap) dot[output] += taps[tap] * at[tap];
                       });
    for (const Part& part : conv.parts)
      for (int64_t row = 0; row < part.count; ++row)
        for (int64_t input = 0; input < plan_.shape.channels; ++input) {
          double sum = 0;
          for (const double* total : totals)
            sum += total[conv.summed + part.packed - conv.packed_begin + input * plan_.padded + part.first + row];
          dot[part.first + row] += sum * in_.theta[part.theta + row * part.output_stride + input * part.input_stride];
        }
    return dot;
  }
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
