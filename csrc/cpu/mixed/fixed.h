#pragma once

// The cell on fixed statistics. Norms and mixing weights fold into the pointwise convolutions, images do not depend on
// each other, and one image goes through the whole cell while its states stay in the second cache.

#include "mixed/norms.h"

namespace rnas::cpu::RNAS_LEVEL {
namespace {

// Where the masks of one image lie, in Bits.
struct MaskLayout {
  std::vector<int64_t> signs, across, down;  // by state that edges leave
  std::vector<int64_t> mid;                  // by kept activation
  int64_t size = 0;

  explicit MaskLayout(const Plan& plan) {
    for (int64_t state = 0; state + 1 < plan.states(); ++state) {
      signs.push_back(take(plan.groups * plan.height(state) * plan.width(state)));
      across.push_back(take(plan.max ? 2 * plan.groups * plan.height(state) * plan.width_out : 0));
      down.push_back(take(plan.max ? 2 * plan.groups * plan.pixels_out() : 0));
    }
    for (int64_t kept = 0; kept < plan.kept; ++kept) mid.push_back(take(plan.groups * plan.pixels_out()));
  }

 private:
  int64_t take(int64_t count) {
    const int64_t at = size;
    size += count;
    return at;
  }
};

class Fixed {
 public:
  Fixed(const Plan& plan, const MixedInputs& in, void* workspace, int threads)
      : plan_(plan), in_(in), threads_(threads), layout_(plan), arena_(workspace) {
    norms_ = take_norms(arena_, plan);
    packed_ = take_packed(arena_, plan);
    constants_ = arena_.take<float>(plan.shape.nodes * plan.padded);
    ones_ = arena_.take<float>(plan.padded);
    for (int thread = 0; thread < threads; ++thread) {
      Local local{};
      local.scratch = take_scratch(arena_, plan, thread);
      for (int64_t state = 0; state < plan.states(); ++state)
        local.states.push_back(arena_.take<float>(plan.height(state) * plan.width(state) * plan.padded));
      local.plane = arena_.take<float>(plan.plane_out());
      local.masks = arena_.take<Bits>(layout_.size);
      local.weights.now = arena_.take<float>(plan.packed);
      local.weights.total = arena_.take<double>(plan.summed);
      local.sum = arena_.take<double>(plan.states() * plan.padded);
      local.mid_sum = arena_.take<double>(plan.kept * plan.padded);
      local.dots = arena_.take<double>(3 * plan.edges.size() * plan.padded);
      locals_.push_back(local);
    }
  }

  int64_t workspace() const { return arena_.used(); }
  const MaskLayout& layout() const { return layout_; }

  // ---- forward ---------------------------------------------------------------------------------------------------------

  void forward(Keep keep, float* out, void* kept) {
    prepare();
    out_ = out;
    kept_ = keep >= Keep::activations ? static_cast<float*>(kept) : nullptr;
    masks_ = keep == Keep::masks ? static_cast<Bits*>(kept) : nullptr;
    parallel_shared(threads_, images(), [&](int thread, const auto& take) {
      begin_thread(locals_[thread]);
      for (int64_t n = take(); n >= 0; n = take()) forward_image(n, locals_[thread], false);
    });
  }

  // ---- backward --------------------------------------------------------------------------------------------------------

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
  struct Local {
    Scratch scratch;
    std::vector<float*> states;  // nodes of one image, or gradients of all its states, dense
    float* plane;
    Bits* masks;                 // of one image, where they were not kept
    WeightSums weights;
    double *sum, *mid_sum, *dots;  // (states), (kept), (edges, skip max avg): each (padded)
  };

  const float* mixing(int64_t e) const { return in_.weights + e * plan_.shape.candidates; }
  int64_t images() const { return plan_.shape.batch; }
  bool wants_parameters() const { return grad_.weights || grad_.theta || grad_.gamma || grad_.beta; }
  float* kept(float* all, int64_t index, int64_t n) const { return all + (index * images() + n) * plan_.image_out(); }
  Bits* masks(int64_t n, const Local& local) const { return masks_ ? masks_ + n * layout_.size : local.masks; }

  // What a branch keeps in front of its second ReLU.
  float* kept_mid(float* all, const Branch& branch, int64_t n) const {
    return kept(all, plan_.kept_nodes() + branch.kept, n);
  }
  // A node of image n, dense, in a forward pass: kept, or in the workspace. linear: its direction.
  float* node_of(int64_t state, int64_t n, const Local& local, bool linear) const {
    float* const all = linear ? direction_kept_ : kept_;
    const int64_t node = state - plan_.shape.inputs;
    return all && node < plan_.kept_nodes() ? kept(all, node, n) : local.states[state];
  }
  // A state that edges leave, or its direction. What is not kept of a node is there in a forward pass alone.
  State state_of(int64_t state, const Local& local, bool linear) const {
    const int64_t h = plan_.height(state), w = plan_.width(state), c = plan_.shape.channels;
    if (state < plan_.shape.inputs)
      return {static_cast<const float*>((linear ? direction_ : in_.states)[state]), h * w * c, c, h, w};
    State node = dense_state(node_of(state, 0, local, linear), plan_, h, w);
    if (!(linear ? direction_kept_ : kept_)) node.image = 0;
    return node;
  }

  PoolShape pool_shape(int64_t state) const {
    const int64_t stride = state < plan_.shape.inputs ? plan_.shape.stride : 1;
    return {plan_.height(state), plan_.width(state), stride, plan_.height_out, plan_.width_out};
  }

  // Factors of a norm with its mixing weight; without a norm the weight alone.
  float factor(int64_t e, int64_t mix, int64_t norm, int64_t channel) const {
    return mixing(e)[mix] * (norm >= 0 ? norms_.row(norms_.scale, norm)[channel] : 1.0f);
  }

  void prepare() {
    set_norms(plan_, in_, norms_);
    std::memset(constants_, 0, plan_.shape.nodes * plan_.padded * sizeof(float));
    for (int64_t c = 0; c < plan_.padded; ++c) ones_[c] = 1.0f;
    for (size_t e = 0; e < plan_.edges.size(); ++e) {
      const Edge& edge = plan_.edges[e];
      float* constant = constants_ + (edge.target - plan_.shape.inputs) * plan_.padded;
      const auto add = [&](int64_t mix, int64_t norm) {
        if (mix < 0 || norm < 0) return;
        for (int64_t c = 0; c < plan_.padded; ++c) constant[c] += mixing(e)[mix] * norms_.row(norms_.shift, norm)[c];
      };
      for (const Branch& branch : edge.branches) add(branch.mix, branch.last().norm);
      add(edge.max, edge.max_norm);
      add(edge.avg, edge.avg_norm);
      for (int64_t c = 0; c < plan_.shape.channels && edge.ones >= 0; ++c) constant[c] += mixing(e)[edge.ones];
    }
    parallel(threads_, plan_.edges.size(), [&](int, int64_t begin, int64_t end) {
      std::vector<float> scale(plan_.padded);
      for (int64_t e = begin; e < end; ++e)
        for (const Branch& branch : plan_.edges[e].branches)
          for (const Convolution& conv : branch.stages) {
            const bool last = &conv == &branch.last();
            for (int64_t c = 0; c < plan_.padded; ++c)
              scale[c] = norms_.row(norms_.scale, conv.norm)[c] * (last ? mixing(e)[branch.mix] : 1.0f);
            pack(plan_, conv, in_.theta, scale.data(), packed_, Order::both);
          }
    });
  }

  void begin_thread(const Local& local) const {
    clear(local.scratch.state, plan_.groups);
    clear(local.scratch.mid, plan_.groups);
    clear(local.scratch.grad, plan_.groups);
  }

  Tile tile_of(int64_t state, const Local& local) const {
    const Tile tile = sized(local.scratch.state, plan_.height(state), plan_.width(state));
    if (plan_.shape.stride > 1) clear(tile, plan_.groups);  // inputs and nodes differ in size
    return tile;
  }

  // Of the dense state that the caller has loaded into state_grad.
  void find_winners(const State& x, int64_t state, const Local& local, Bits* mask, float* pooled, int64_t group) const {
    const int64_t pixels = x.height * x.width;
    max_pool(local.scratch.state_grad + group * pixels * kLanes, x.width * kLanes, pool_shape(state),
             local.scratch.pool_rows, pooled, across(mask, state, group), down(mask, state, group));
  }

  Winner* across(Bits* mask, int64_t state, int64_t group) const {
    return reinterpret_cast<Winner*>(mask + layout_.across[state]) + group * plan_.height(state) * plan_.width_out;
  }
  Winner* down(Bits* mask, int64_t state, int64_t group) const {
    return reinterpret_cast<Winner*>(mask + layout_.down[state]) + group * plan_.pixels_out();
  }

  // All nodes of image n. linear: of the direction instead, through the ReLUs and winners of the forward pass.
  void forward_image(int64_t n, const Local& local, bool linear) const {
    const Scratch& s = local.scratch;
    Bits* mask = masks(n, local);
    const int64_t pixels = plan_.pixels_out(), inputs = plan_.shape.inputs;
    float* const nodes = linear ? direction_out_ : out_;
    for (int64_t node = 0; node < plan_.shape.nodes; ++node)
      for (int64_t group = 0; group < plan_.groups; ++group) {
        const Vector constant = linear ? zero() : load(constants_ + node * plan_.padded + group * kLanes);
        float* to = node_of(inputs + node, n, local, linear) + group * pixels * kLanes;
        for (int64_t p = 0; p < pixels; ++p) store(to + p * kLanes, constant);
      }
    for (int64_t source = 0; source + 1 < plan_.states(); ++source) {
      if (source >= inputs) finish_node(nodes, source, n, node_of(source, n, local, linear), s);
      const State x = state_of(source, local, false);
      const State v = linear ? state_of(source, local, true) : x;
      const Tile tile = tile_of(source, local);
      Bits* signs = mask + layout_.signs[source];
      {
        const Section section(s.clock, Work::tiles);
        if (linear && masks_)
          load_signed(v, n, signs, tile);
        else if (linear)
          load_relu_linear(plan_, x, v, n, tile);
        else
          load_relu(plan_, x, n, tile, masks_ ? signs : nullptr);
      }
      for (size_t e = 0; e < plan_.edges.size(); ++e) {
        const Edge& edge = plan_.edges[e];
        if (edge.source != source) continue;
        float* const to = node_of(edge.target, n, local, linear);
        for (const Branch& branch : edge.branches) forward_branch(branch, n, tile, to, s, mask, linear);
      }
      forward_pools(source, x, v, n, local, mask, linear);
    }
    finish_node(nodes, plan_.states() - 1, n, local.states[plan_.states() - 1], s);
  }

  // `v` where a kept sign lets it through, into a tile.
  void load_signed(const State& v, int64_t n, const Bits* signs, const Tile& tile) const {
    visit(v, n, plan_.shape.channels, [&](int64_t group, int64_t y, int64_t x, Vector value) {
      store(tile.data + group * tile.plane + y * tile.row + x * kLanes,
            keep(signs[(group * v.height + y) * v.width + x], value));
    });
  }

  void load_mid_signed(const float* v, const Bits* signs, const Tile& tile) const {
    for (int64_t group = 0; group < plan_.groups; ++group)
      for (int64_t y = 0; y < plan_.height_out; ++y)
        for (int64_t x = 0; x < plan_.width_out; ++x) {
          const int64_t at = (group * plan_.height_out + y) * plan_.width_out + x;
          store(tile.data + group * tile.plane + y * tile.row + x * kLanes, keep(signs[at], load(v + at * kLanes)));
        }
  }

  void finish_node(float* nodes, int64_t state, int64_t n, const float* node, const Scratch& s) const {
    const Section section(s.clock, Work::nodes);
    store_node(plan_, node, state, n, nodes);
  }

  void forward_branch(const Branch& branch, int64_t n, const Tile& tile, float* to, const Scratch& s, Bits* mask,
                      bool linear) const {
    const auto nothing = [](int64_t, int64_t, int64_t) {};
    const float* packed = packed_.forward;
    if (branch.stages.size() < 2) return convolve<true>(plan_, branch.stages[0], packed, tile, 1, s, to, nothing);
    const float* shift = norms_.row(norms_.shift, branch.stages[0].norm);
    float* const all = linear ? direction_kept_ : kept_;
    float* z = all ? kept_mid(all, branch, n) : s.mid_grad;
    convolve<false>(plan_, branch.stages[0], packed, tile, 1, s, z, nothing);
    {
      const Section section(s.clock, Work::tiles);
      if (linear && masks_)
        load_mid_signed(z, mask + layout_.mid[branch.kept], s.mid);
      else if (linear)
        load_mid_linear(plan_, kept_mid(kept_, branch, n), shift, z, s.mid);
      else
        load_mid(plan_, z, ones_, shift, s.mid, masks_ ? mask + layout_.mid[branch.kept] : nullptr);
    }
    convolve<true>(plan_, branch.last(), packed, s.mid, 1, s, to, nothing);
  }

  // Adds pools and identities of all edges that leave a state.
  void forward_pools(int64_t source, const State& x, const State& v, int64_t n, const Local& local, Bits* mask,
                     bool linear) const {
    const Scratch& s = local.scratch;
    const Section section(s.clock, Work::pools);
    const PoolShape shape = pool_shape(source);
    const int64_t pixels = x.height * x.width;
    if (!linear || !masks_) load_dense(plan_, x, n, s.state_grad);
    if (linear && !masks_ && plan_.leaves(source, &Edge::max))
      for (int64_t group = 0; group < plan_.groups; ++group) find_winners(x, source, local, mask, nullptr, group);
    if (linear) load_dense(plan_, v, n, s.state_grad);
    for (int64_t group = 0; group < plan_.groups; ++group) {
      const float* in = s.state_grad + group * pixels * kLanes;
      const auto add = [&](const float* from, int64_t Edge::*mix, int64_t Edge::*norm) {
        for (size_t e = 0; e < plan_.edges.size(); ++e) {
          const Edge& edge = plan_.edges[e];
          if (edge.source != source || edge.*mix < 0) continue;
          const Vector f = factors(e, edge.*mix, norm ? edge.*norm : -1, group);
          float* to = node_of(edge.target, n, local, linear) + group * plan_.plane_out();
          for (int64_t p = 0; p < plan_.plane_out(); p += kLanes) store(to + p, fma(load(from + p), f, load(to + p)));
        }
      };
      if (plan_.leaves(source, &Edge::max)) {
        if (linear)
          max_pool_linear(in, x.width * kLanes, shape, s.pool_rows, local.plane, across(mask, source, group),
                          down(mask, source, group));
        else
          find_winners(x, source, local, mask, local.plane, group);
        add(local.plane, &Edge::max, &Edge::max_norm);
      }
      if (plan_.leaves(source, &Edge::avg)) {
        average_pool(in, x.width * kLanes, shape, s.pool_rows, local.plane);
        add(local.plane, &Edge::avg, &Edge::avg_norm);
      }
      add(in, &Edge::skip, nullptr);
    }
  }

  Vector factors(int64_t e, int64_t mix, int64_t norm, int64_t group) const {
    const Vector w = set(mixing(e)[mix]);
    return norm >= 0 ? w * load(norms_.row(norms_.scale, norm) + group * kLanes) : w;
  }

  // ---- backward ----

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
    add_dot(plan_, g, y, nullptr, s.sums, to);
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
          for (int64_t start = 0; start < plane; start += kFlush * kLanes) {
            Vector sum[4] = {};
            for (int64_t p = start; p < std::min(plane, start + kFlush * kLanes); p += kLanes) {
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

  const Plan& plan_;
  const MixedInputs& in_;
  int threads_;
  MaskLayout layout_;
  Arena arena_;
  Norms norms_{};
  Packed packed_{};
  float *constants_ = nullptr, *ones_ = nullptr;  // of each node (nodes, padded); (padded) ones
  std::vector<Local> locals_;
  float *out_ = nullptr, *kept_ = nullptr;
  Bits* masks_ = nullptr;
  const float* grad_out_ = nullptr;
  const void* const* direction_ = nullptr;
  float *direction_out_ = nullptr, *direction_kept_ = nullptr;
  MixedGradients grad_{};
};

}  // namespace
}  // namespace rnas::cpu::RNAS_LEVEL
