// The kernels in a program without Python and without torch: a mixed edge and a cell, forward and backward, and an
// attack on the cell. Everything is compared with the loops in definition.h; the exit status says whether it agrees.
//
//   embedding            runs all checks
//   embedding PLANTED    with an error: in one number of each out, gradient or attack, or in the sign of the attack's
//                        steps (descent). A check has to notice.

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <random>
#include <string>

#include "definition.h"
#include "rnas/pgd_step.h"

using namespace rnas;
using Floats = std::vector<float>;

static const Primitive kDarts[] = {Primitive::none,         Primitive::max_pool_3x3, Primitive::avg_pool_3x3,
                                   Primitive::skip_connect, Primitive::sep_conv_3x3, Primitive::sep_conv_5x5,
                                   Primitive::dil_conv_3x3, Primitive::dil_conv_5x5};
static const double kEps = 1e-5;
static const int kThreads = 2;
static std::string planted;
static std::mt19937 engine(0);  // its numbers are the same everywhere, unlike those of the standard distributions

static double uniform(double lower, double upper) { return lower + (upper - lower) * engine() / 4294967296.0; }

static Numbers draw(int64_t count, double lower, double upper) {
  Numbers made(count);
  for (double& number : made) number = static_cast<float>(uniform(lower, upper));  // float and double: the same
  return made;
}

static Floats floats(const Numbers& numbers) { return Floats(numbers.begin(), numbers.end()); }
static Numbers doubles(const Floats& numbers) { return Numbers(numbers.begin(), numbers.end()); }

static double dot(const Numbers& a, const Numbers& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// Puts an error of a hundredth of its norm into one number of an array.
static void plant(const char* name, Floats& array) {
  const Numbers numbers = doubles(array);
  if (planted == name) array[array.size() / 2] += static_cast<float>(0.01 * std::sqrt(dot(numbers, numbers)));
}

static bool report(const std::string& what, double error, double most) {
  const bool good = error <= most;  // false for NaN
  std::printf("%-34s %9.2e, at most %.0e  %s\n", what.c_str(), error, most, good ? "ok" : "WRONG");
  return good;
}

// Memory as the kernels want it.
struct Deleter {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<void, Deleter>;
static Memory memory(int64_t bytes) { return Memory(::operator new(bytes, std::align_val_t(64))); }

// A cell and what its kernels read and write.
struct Cell {
  MixedShape shape;
  MixedSizes sizes;
  Inputs in;
  Floats states, weights, theta, gamma, beta, mean, variance;
  std::vector<const void*> each_state;
  Memory workspace;

  Cell(int64_t inputs, int64_t nodes)
      : shape{2, 12, 9, 7, inputs, nodes, 1, kDarts, 8, true},  // N, C, H, W
        sizes(cpu::mixed_sizes(shape, kThreads)),
        workspace(memory(sizes.workspace)) {
    const int64_t norms = sizes.norms * shape.channels;
    in = {draw(inputs * image(), 0, 1), draw(sizes.edges * 8, 0, 0.3), draw(sizes.theta, -0.4, 0.4),
          draw(norms, 0.5, 1.5), draw(norms, -0.5, 0.5)};
    states = floats(in.states), weights = floats(in.weights), theta = floats(in.theta);
    gamma = floats(in.gamma), beta = floats(in.beta);
    mean.resize(norms), variance.resize(norms);
    for (int64_t state = 0; state < inputs; ++state) each_state.push_back(states.data() + state * image());
  }

  int64_t image() const { return shape.batch * shape.height * shape.width * shape.channels; }  // floats of a state
  MixedInputs arguments(bool batch_statistics) const {
    return {each_state.data(), weights.data(), theta.data(),     gamma.data(), beta.data(),
            mean.data(),       variance.data(), kEps, batch_statistics};
  }
  double loss(const Inputs& at, const Numbers& grad_out, bool batch_statistics) const {
    const Numbers none, m = batch_statistics ? none : doubles(mean), v = batch_statistics ? none : doubles(variance);
    return dot(grad_out, Definition(shape, at, m, v, kEps).cell());
  }
};

// The derivative of the loss in a direction of signs, by which every element counts, against the gradient.
static bool check_gradient(const Cell& cell, const char* name, Numbers Inputs::*kind, Floats gradient,
                           const Numbers& grad_out) {
  const double step = 1e-7;  // small, so that hardly a ReLU or a maximum changes on the way; rounding is 1e-9 then
  plant("gradient", gradient);
  Numbers direction = draw(gradient.size(), -1, 1);
  for (double& sign : direction) sign = sign < 0 ? -1 : 1;
  Inputs ahead = cell.in, behind = cell.in;
  for (size_t i = 0; i < direction.size(); ++i) {
    (ahead.*kind)[i] += step * direction[i];
    (behind.*kind)[i] -= step * direction[i];
  }
  const double expected = (cell.loss(ahead, grad_out, true) - cell.loss(behind, grad_out, true)) / (2 * step);
  const Numbers found = doubles(gradient);
  const double error = std::fabs(dot(found, direction) - expected) / std::sqrt(dot(found, found));
  return report(std::string("  gradient, ") + name, error, 1e-4);
}

// One training pass, on batch statistics: what they are stays in cell.mean and cell.variance.
static bool train(Cell& cell) {
  const MixedShape& shape = cell.shape;
  const MixedInputs in = cell.arguments(true);
  const Numbers grad_out = draw(shape.nodes * cell.image(), -1, 1);  // of the loss sum(grad_out * out)
  const Floats grad_out_floats = floats(grad_out);
  Floats out(grad_out.size());
  const Memory kept = memory(cell.sizes.kept_activations);
  cpu::mixed_forward(shape, in, Keep::activations, out.data(), cell.mean.data(), cell.variance.data(), kept.get(),
                     cell.workspace.get(), kThreads);

  Floats states(cell.states.size()), weights(cell.weights.size()), theta(cell.theta.size()), gamma(cell.gamma.size()),
      beta(cell.beta.size());
  std::vector<void*> each_state;
  for (int64_t state = 0; state < shape.inputs; ++state) each_state.push_back(states.data() + state * cell.image());
  const MixedGradients grad{each_state.data(), weights.data(), theta.data(), gamma.data(), beta.data()};
  cpu::mixed_backward(shape, in, Keep::activations, out.data(), kept.get(), grad_out_floats.data(), grad,
                      cell.workspace.get(), kThreads);

  plant("out", out);
  const Numbers none, expected = Definition(shape, cell.in, none, none, kEps).cell(), found = doubles(out);
  double error = 0;
  for (size_t i = 0; i < found.size(); ++i) error = std::max(error, std::fabs(found[i] - expected[i]));
  bool good = report("  out, largest difference", error, 1e-4);
  good &= check_gradient(cell, "states", &Inputs::states, states, grad_out);
  good &= check_gradient(cell, "mixing weights", &Inputs::weights, weights, grad_out);
  good &= check_gradient(cell, "convolutions", &Inputs::theta, theta, grad_out);
  good &= check_gradient(cell, "gamma", &Inputs::gamma, gamma, grad_out);
  good &= check_gradient(cell, "beta", &Inputs::beta, beta, grad_out);
  return good;
}

// PGD on the states of a cell whose statistics are fixed: nothing but the states wants a gradient, so a few bits are
// all that is kept. The loss is sum(grad_out * out) again.
static bool attack(Cell& cell) {
  const MixedShape& shape = cell.shape;
  const double epsilon = 8.0 / 255, step_size = planted == "descent" ? -epsilon / 4 : epsilon / 4;
  const PgdStep step{Norm::linf, epsilon, step_size, nullptr, nullptr, 0.0, 1.0};
  const MixedInputs in = cell.arguments(false);
  const Numbers direction = draw(shape.nodes * cell.image(), -1, 1);
  const Floats grad_out = floats(direction), clean = cell.states;
  Floats out(direction.size()), gradient(cell.states.size());
  std::vector<void*> each_state;
  for (int64_t state = 0; state < shape.inputs; ++state) each_state.push_back(gradient.data() + state * cell.image());
  const MixedGradients grad{each_state.data(), nullptr, nullptr, nullptr, nullptr};
  const Memory kept = memory(cell.sizes.kept_masks);
  const auto forward = [&](Keep keep) {
    cpu::mixed_forward(shape, in, keep, out.data(), nullptr, nullptr, kept.get(), cell.workspace.get(), kThreads);
    return dot(direction, doubles(out));
  };
  const double before = forward(Keep::nothing);
  for (int iteration = 0; iteration < 7; ++iteration) {
    forward(Keep::masks);
    cpu::mixed_backward(shape, in, Keep::masks, nullptr, kept.get(), grad_out.data(), grad, cell.workspace.get(),
                        kThreads);
    cpu::pgd_step(cell.states.data(), cell.states.data(), gradient.data(), clean.data(), shape.inputs * shape.batch,
                  cell.image() / shape.batch, Dtype::float32, step);
  }
  plant("attack", cell.states);
  const double after = forward(Keep::nothing);

  Inputs attacked = cell.in;
  attacked.states = doubles(cell.states);
  double outside = 0;  // of the ball and of the box
  for (size_t i = 0; i < clean.size(); ++i) {
    const double x = attacked.states[i];
    outside = std::max({outside, std::fabs(x - clean[i]) - epsilon, -x, x - 1});
  }
  std::printf("  loss %.2f before, %.2f after\n", before, after);
  bool good = report("  loss that was not gained", std::max(0.0, before - after), 0);
  good &= report("  outside the ball or the box", outside, 1e-6);
  good &= report("  loss before", std::fabs(before / cell.loss(cell.in, direction, false) - 1), 1e-4);
  good &= report("  loss after", std::fabs(after / cell.loss(attacked, direction, false) - 1), 1e-4);
  return good;
}

int main(int count, char** arguments) {
  planted = count > 1 ? arguments[1] : "";
  if (!planted.empty() && planted != "out" && planted != "gradient" && planted != "attack" && planted != "descent") {
    std::fprintf(stderr, "expected out, gradient, attack or descent, got %s\n", planted.c_str());
    return 2;
  }
  Cell edge(1, 1), cell(2, 2);
  std::printf("a mixed edge of %lld parameters\n", static_cast<long long>(edge.sizes.theta));
  bool good = train(edge);
  std::printf("a cell of %lld edges\n", static_cast<long long>(cell.sizes.edges));
  good &= train(cell);
  std::printf("an attack on the cell\n");
  good &= attack(cell);
  std::printf("%s\n", good ? "all agree" : "they do not agree");
  return good ? EXIT_SUCCESS : EXIT_FAILURE;
}
