"""What the tests of certified margins share: random tiny networks, and the smallest margins found inside a ball."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rnas import attacks
from rnas.certify import certified_margin
from rnas.seeding import generator
from rnas.spaces import DARTS, DSARA
from rnas.supernet import FixedMixture, Supernet

CLASSES = 3


@dataclass
class Problem:
    """A supernet in eval mode with architecture weights, images, labels and a ball, all in float64."""

    supernet: Supernet
    mixing: dict[str, Tensor]
    edge_weights: dict[str, Tensor] | None
    x: Tensor
    y: Tensor
    epsilon: Tensor
    norm: str
    relu_slope: str

    def margin(self, x: Tensor) -> Tensor:
        """f_y - f_t of every class, (N, K), +inf at y."""
        return margin(self.supernet(x, self.mixing, self.edge_weights), self.y)

    def bound(self, **options) -> Tensor:
        """Certified margins of the problem's ball."""
        chosen = {"norm": self.norm, "relu_slope": self.relu_slope, "edge_weights": self.edge_weights, **options}
        epsilon = chosen.pop("epsilon", self.epsilon)
        return certified_margin(self.supernet, self.mixing, self.x, self.y, epsilon, **chosen)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """f_y - f_t of every class, (N, K), +inf at y."""
    return (logits.gather(1, y[:, None]) - logits).scatter(1, y[:, None], math.inf)


def give_statistics(network: nn.Module, x: Tensor, call, rng: torch.Generator, contraction: float) -> None:
    """Running statistics near those of the images, with variances up to e**contraction times as large."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()
        call(x)
        for norm in norms:
            norm.running_var.mul_(torch.exp(contraction * torch.rand(norm.num_features, generator=rng)))
            norm.running_mean.add_(0.3 * torch.randn(norm.num_features, generator=rng) * norm.running_var.sqrt())
    network.eval()


def draw(seed: int, partial: int = 1, **fixed) -> Problem:
    """A tiny problem: a part of the primitives, one or two nodes, 4x4 to 8x8 images, a random ball."""
    rng = generator(seed, "certify")

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=rng))]

    space = pick(DARTS, DSARA)
    order = torch.randperm(len(space.primitives), generator=rng)[: pick(3, 4)].tolist()
    primitives = tuple(space.primitives[index] for index in sorted(order))
    space = replace(space, nodes=pick(1, 2), primitives=primitives)
    channels = partial * pick(1, 2) if partial > 1 else pick(2, 3, 4)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = 4 if "robust" in space.cell_types else 3
        supernet = Supernet(space, channels=channels, layers=layers, num_classes=CLASSES, partial=partial).double()
    x = torch.rand(2, 3, pick(4, 5, 8), pick(4, 6, 7), generator=rng, dtype=torch.float64)
    x = x.mul(1.2).sub(0.1).clamp(0, 1)  # some pixels at the edges of the box
    shape = len(space.edges), len(primitives)
    sharpness = pick(0.1, 1.0, 5.0)
    mixing = {
        name: (sharpness * torch.randn(shape, generator=rng)).softmax(dim=1).double() for name in space.cell_types
    }
    edge_weights = None
    if partial > 1 or pick(True, False):
        edge_weights = {name: torch.rand(shape[0], generator=rng).double() for name in space.cell_types}
    give_statistics(supernet, x, lambda images: supernet(images, mixing, edge_weights), rng, pick(0.0, 2.0, 5.0))
    epsilon = 10 ** (-6 + 5 * torch.rand(len(x), generator=rng, dtype=torch.float64))
    norm, slope = pick("linf", "l2"), pick("adaptive", "cnn-cert")
    y = torch.randint(CLASSES, (len(x),), generator=rng)
    return replace_fields(Problem(supernet, mixing, edge_weights, x, y, epsilon, norm, slope), fixed)


def replace_fields(problem: Problem, fixed: dict) -> Problem:
    return replace(problem, **fixed)


def corners(problem: Problem, rng: torch.Generator, count: int) -> list[Tensor]:
    """Images on the surface of the ball, clipped to the box."""
    epsilon, found = problem.epsilon.view(-1, 1, 1, 1), []
    for _ in range(count):
        step = torch.randn(problem.x.shape, generator=rng, dtype=torch.float64)
        if problem.norm == "linf":
            step = step.sign()
        else:
            step = step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        found.append((problem.x + epsilon * step).clamp(0, 1))
    return found


def smallest_margin(problem: Problem, seed: int, steps: int, restarts: int, samples: int = 10) -> Tensor:
    """The smallest margins, (N, K), that attacks on the loss margin and random corners find in the ball.

    The attack runs in float32 on the fused kernels, 8 times as fast; its images are put back into the ball in float64.
    """
    rng = generator(seed, "certify attack")
    mixing = {name: weights.float() for name, weights in problem.mixing.items()}
    edge_weights = problem.edge_weights and {name: weights.float() for name, weights in problem.edge_weights.items()}
    model = FixedMixture(copy.deepcopy(problem.supernet).float(), mixing, edge_weights)
    found = [problem.x, *corners(problem, rng, samples)]
    epsilon = problem.epsilon.float()
    options = {"steps": steps, "restarts": restarts, "norm": problem.norm, "loss": "margin", "generator": rng}
    x_adv = attacks.pgd(model, problem.x.float(), problem.y, epsilon=epsilon, step_size=epsilon / 4, **options)
    step = x_adv.double() - problem.x
    length = step.flatten(1).abs().amax(dim=1) if problem.norm == "linf" else step.flatten(1).norm(dim=1)
    scale = (problem.epsilon / length.clamp_min(1e-300)).clamp(max=1).view(-1, 1, 1, 1)
    found.append((problem.x + scale * step).clamp(0, 1))
    with torch.no_grad():
        return torch.stack([problem.margin(x) for x in found]).amin(dim=0)


def excess(bound: Tensor, reached: Tensor) -> float:
    """How far a bound lies above a margin that was reached, relative to the margins' size; sound: rounding alone."""
    others = torch.isfinite(reached)
    return float(((bound - reached)[others] / reached[others].abs().clamp_min(1e-3)).max())
