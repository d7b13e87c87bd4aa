"""RACL (arXiv 2009.00902; TPAMI 2025): log-normal architecture parameters under a confident Lipschitz constraint."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import attacks
from ..genotype import Genotype
from ..lipschitz import LipschitzConstants
from ..seeding import generator
from ..spaces import NUM_INPUTS, Space
from ..supernet import Supernet
from .lognormal import LogNormal, LogNormalParameter, log_quantile, probability_within, product_over_cells
from .method import Batch, Level, LevelResult, Method, Mixing, SearchStep, Uncaptured, accuracy, discretise


@dataclass(frozen=True)
class RaclOptions:
    """Knobs of RACL. The paper gives the method; where a text says "ours", the value is our own choice."""

    eta: float = 0.9
    """Confidence of the constraint: Pr(lambda_F <= bound) >= eta."""
    zeta: float = 0.01
    """Weight of the input gradient's length, ||grad_x L||_2, in the architecture's objective; ours. 0 is off."""
    rho: float | None = None
    """Penalty and dual step of the augmented Lagrangian. None: 1e-3 over the number of nodes of a cell; ours. Measured
    on the MNIST subset (C=8, 4 cells of 3 nodes, stem of stride 2, batches of 64, architecture's learning rate 0.02):
    with the default the constraint was first met after about 150 architecture steps (g fell from 8.6 to -2.0) and not
    after 75 (g = 15.6); with 0.01 it was met after 50 and held at the end (g = -0.03 after 75, -0.02 after 150); 0.1
    and 1.0 were no better there (g = 1.1)."""
    bound_start: float = 0.9
    """ln of the bound in the first epoch of the architecture, as a fraction of ln lambda_F's quantile there; ours."""
    bound_end: float = 0.7
    """The same in the last epoch; linear in between; ours."""
    sigma: float = 0.1
    """Standard deviation of ln alpha and ln beta at the start; ours."""
    log_sigma_min: float = -4.0
    """Lower limit of ln sigma; ours."""
    log_sigma_max: float = 0.5
    """Upper limit of ln sigma; ours."""
    covariance: Literal["diagonal", "full"] = "diagonal"
    """Of ln alpha and of ln beta per cell type: independent entries, or a trained Cholesky factor."""
    cells: Literal["independent", "shared"] = "independent"
    """Cells of one type in lambda_F: as independent factors, the paper's form, or as the functions of one alpha that
    they are, which gives lambda_F its true and larger variance."""
    norm_scale: Literal["largest", "folded", "none"] = "largest"
    """How batch norms enter the constants of the operations: see rnas.lipschitz; ours."""
    pools: Literal["exact", "one"] = "exact"
    """Constants of the pools: their norm times their batch norm's scale, or plainly 1; ours."""
    power_iterations: int = 1
    """Steps of the power iterations in each architecture step; ours."""
    first_power_iterations: int = 100
    """Steps in the first one, from random vectors; ours: ln lambda_F of an untrained network of 8 cells is then 0.01
    too small; 0.6 after 10."""
    statistics: Literal["running", "batch"] = "running"
    """BN statistics of the architecture step. By those of the batch, an image's input gradient would depend on the
    other images, and its second derivative is several times slower; ours."""
    adversarial: Literal["both", "weights", "architecture", "none"] = "none"
    """Which level of the search sees PGD examples in place of clean images."""
    derive: Literal["score", "sampled"] = "score"
    """score: per node the edges with the largest E[beta] * max_o E[alpha_o]. sampled: of several sampled architectures
    that whose own lambda_F has the smallest eta-quantile; ours."""
    samples: int = 10
    """Architectures that `derive = "sampled"` compares; ours."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            choices, value = get_args(hint), getattr(self, name)
            if choices and isinstance(choices[0], str) and value not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}; got {value!r}")
        for name, good, wanted in (
            ("eta", 0 < self.eta < 1, "a probability between 0 and 1, both excluded"),
            ("zeta", 0 <= self.zeta < math.inf, "a finite number of at least 0"),
            ("rho", self.rho is None or 0 < self.rho < math.inf, "a positive number or None"),
            ("bound_start", 0 < self.bound_start < math.inf, "a positive number"),
            ("bound_end", 0 < self.bound_end <= self.bound_start, f"positive and at most {self.bound_start}"),
            ("log_sigma_min", self.log_sigma_min < self.log_sigma_max, f"below log_sigma_max={self.log_sigma_max}"),
            ("power_iterations", self.power_iterations >= 1, "at least 1"),
            ("first_power_iterations", self.first_power_iterations >= 1, "at least 1"),
            ("samples", self.samples >= 1, "at least 1"),
        ):
            if not good:
                raise ValueError(f"{name} must be {wanted}; got {getattr(self, name)}")
        least, most = math.exp(self.log_sigma_min), math.exp(self.log_sigma_max)
        if not least <= self.sigma <= most:
            raise ValueError(f"sigma must be from {least:.3g} to {most:.3g}, its limits; got {self.sigma}")


class Racl(Method):
    """Cross entropy plus zeta * ||grad_x L||_2, subject to a bound on the Lipschitz constant that holds with eta.

    lambda_F = prod_cells prod_nodes sum_i beta_ij sum_o alpha_ij,o lambda_o is log-normal to good approximation, so
    `Pr(lambda_F <= bound) >= eta` is `g = mu_F + Phi^{-1}(eta) s_F - ln bound <= 0`. The constant factor in front of
    the product (stem, classifier, input convolutions) is left out of both. Every step samples alpha and beta anew, the
    same for both levels; outside of a step `mixing()` and `edge_weights()` are the means.
    """

    name = "racl"
    Options = RaclOptions

    def __init__(self, options: RaclOptions, space: Space, seed: int) -> None:
        super().__init__(options, space, seed)
        self.seed = seed
        edges, choices = len(space.edges), len(space.primitives)
        self.targets = [target - NUM_INPUTS for _, target in space.edges]
        incoming = torch.tensor([float(self.targets.count(target)) for target in self.targets])
        alpha, beta = torch.full((edges, choices), -math.log(choices)), -incoming.log()
        build = functools.partial(
            LogNormalParameter,
            sigma=options.sigma,
            log_sigma_limits=(options.log_sigma_min, options.log_sigma_max),
            full=options.covariance == "full",
        )
        self.alpha = nn.ModuleDict({name: build(alpha) for name in space.cell_types})
        self.beta = nn.ModuleDict({name: build(beta) for name in space.cell_types})
        self.lipschitz = LipschitzConstants(norm_scale=options.norm_scale, pools=options.pools, seed=seed)
        self.register_buffer("theta", torch.zeros((), dtype=torch.float64))
        self.register_buffer("start_quantile", torch.zeros((), dtype=torch.float64))
        self.register_buffer("start_epoch", torch.tensor(-1))
        self.register_buffer("last_constraint", torch.zeros(3, dtype=torch.float64))  # g, ln bound, confidence
        self._draws: Mapping[str, Tensor] = {}

    @property
    def rho(self) -> float:
        """Penalty and dual step."""
        return 1e-3 / self.space.nodes if self.options.rho is None else self.options.rho

    def mixing(self) -> Mixing:
        """alpha, (E, K) per cell type: inside `sampled` the sample, else E[alpha]. Rows do not sum to 1."""
        return {name: alpha(self._draws.get(f"alpha_{name}")) for name, alpha in self.alpha.items()}

    def edge_weights(self) -> dict[str, Tensor]:
        """beta, (E,) per cell type: inside `sampled` the sample, else E[beta]."""
        return {name: beta(self._draws.get(f"beta_{name}")) for name, beta in self.beta.items()}

    def draw(self, source: torch.Generator) -> dict[str, Tensor]:
        """The standard normal numbers of one sample of alpha and beta."""
        return {
            f"{what}_{name}": torch.randn(parameters[name].start.shape, generator=source, device=source.device)
            for name in self.space.cell_types
            for what, parameters in (("alpha", self.alpha), ("beta", self.beta))
        }

    @contextmanager
    def sampled(self, draws: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, alpha and beta are one sample, the one of these numbers."""
        if not draws:
            raise ValueError("the sample of alpha and beta is missing: batches for racl come from its `prepare`")
        self._draws = draws
        try:
            yield
        finally:
            self._draws = {}

    def capture_key(self, level: Level, step: SearchStep) -> Hashable | Uncaptured:
        """Of the weights' step nothing else; the architecture's cannot be captured."""
        return () if level == "weights" else Uncaptured("reads its constants and its bound in it")

    def prepare(self, supernet: Supernet, x: Tensor, y: Tensor, step: SearchStep, level: Level) -> Batch:
        """The step's sample, the same for both levels, and PGD examples against it, where `adversarial` says so."""
        draws = self.draw(step.generator("sample"))
        if self.options.adversarial not in ("both", level):
            return Batch(x, y, draws=draws)
        with self.sampled(draws):
            classifier = self.classifier(supernet)
        generator = step.generator(f"attack-{level}")
        x_adv = attacks.perturb(classifier, x, y, step.attack, generator=generator, graphs=step.graphs)
        return Batch(x, y, x_adv, draws)

    def weight_loss(self, supernet: Supernet, train: Batch, step: SearchStep) -> tuple[Tensor, Tensor]:
        """Cross entropy of the step's sample of the supernet on its batch of D_T."""
        with self.sampled(train.draws):
            logits = self.logits(supernet, train.inputs, constant=True)
        return cross_entropy(logits, train.y), logits

    def architecture_step(self, supernet: Supernet, train: Batch, valid: Batch, step: SearchStep) -> LevelResult:
        """Gradient of the augmented Lagrangian, through the sample, then the dual step of theta.

        Numbers: constraint, g; confidence, Pr(lambda_F <= bound) under the log-normal, at least eta where g <= 0; ln of
        the quantile and of the bound; theta, mean sigma, and mean ||grad_x L||_2 of an image.
        """
        for parameter in (*self.alpha.values(), *self.beta.values()):
            parameter.project()
        iterations = self.options.power_iterations
        if self.lipschitz.values is None:
            iterations = self.options.first_power_iterations
        constants = self.lipschitz(supernet, valid.x.shape[2:], iterations)
        parameters, x = list(self.parameters()), valid.inputs.detach().requires_grad_(self.options.zeta > 0)
        with self.sampled(valid.draws), torch.enable_grad():
            lambda_f = self.lambda_f(constants)
            quantile = log_quantile(lambda_f, self.options.eta)
            g = quantile - self.log_bound(quantile.item(), step)
            with attacks.frozen(supernet, statistics=self.options.statistics):
                logits = self.logits(supernet, x)
                losses = cross_entropy(logits, valid.y, reduction="none")
                objective, steepness = losses.mean(), losses.new_zeros(())
                if self.options.zeta:
                    (grad_x,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
                    steepness = grad_x.flatten(1).norm(dim=1).mean()
                    objective = objective + self.options.zeta * steepness
                lagrangian = objective + self.theta * g + self.rho / 2 * g.clamp_min(0).square()
                gradients = torch.autograd.grad(lagrangian, parameters)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        log_bound = quantile.item() - g.item()
        confidence = probability_within(lambda_f, log_bound).item()
        numbers = {
            "constraint": g.item(),
            "confidence": confidence,
            "log_lipschitz_quantile": quantile.item(),
            "log_lipschitz_bound": log_bound,
            "theta": self.theta.item(),
            "sigma": self.mean_sigma(),
            "input_gradient": steepness.item(),
        }
        self.theta.copy_((self.theta + self.rho * g.detach()).clamp_min(0))
        self.last_constraint.copy_(torch.tensor([g.item(), log_bound, confidence], dtype=torch.float64))
        return LevelResult(losses.mean().item(), accuracy(logits, valid.y), numbers)

    def remarks(self) -> list[str]:
        """Whether the constraint failed to hold in the last architecture step, by how much, and what helps."""
        g, log_bound, confidence = self.last_constraint.tolist()
        if g <= 0:
            return []
        return [
            f"the constraint of racl does not hold: g = {g:.3g} above 0, Pr(ln lambda_F <= {log_bound:.4g}) = "
            f"{confidence:.3g} where options.eta asks for {self.options.eta:g}; raise options.rho (now {self.rho:.3g}) "
            "or the number of architecture steps"
        ]

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        state_dict.setdefault(f"{prefix}last_constraint", self.last_constraint)  # checkpoints that do not have it yet
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def lambda_f(self, constants: Tensor) -> LogNormal:
        """lambda_F as one log-normal number, differentiable. constants: lambda_o of every cell's edges, (L, E, K)."""
        types = [spec.cell_type for spec in self.space.layout(len(constants), 1)]
        targets = torch.tensor(self.targets, device=constants.device)
        independent = self.options.cells == "independent"
        mu, variance = 0.0, 0.0
        for name in self.space.cell_types:
            own = constants[[index for index, each in enumerate(types) if each == name]].double()
            alpha, beta = self.alpha[name].log_normal(), self.beta[name].log_normal()
            factor = product_over_cells(alpha, beta, own, targets, independent=independent)
            mu, variance = mu + factor.mu, variance + factor.variance
        return LogNormal(mu, variance)

    def quantile(self, constants: Tensor) -> Tensor:
        """ln of lambda_F's eta-quantile, `mu_F + Phi^{-1}(eta) s_F`."""
        return log_quantile(self.lambda_f(constants), self.options.eta)

    def log_bound(self, quantile: float, step: SearchStep) -> float:
        """ln of the bound at this step; the first call fixes where it starts from: at `quantile`, in this epoch.

        A fraction f of the start asks for (1 - f) of its size less. For a start Q > 0 that is f * Q; where Q < 0, f * Q
        would be looser than Q itself, and the bound is (2 - f) * Q.
        """
        if self.start_epoch < 0:
            self.start_epoch.fill_(step.epoch)
            self.start_quantile.fill_(quantile)
        first, start = int(self.start_epoch), float(self.start_quantile)
        progress = min(1.0, max(0.0, (step.epoch - first) / max(1, step.epochs - 1 - first)))
        if not step.epochs:
            progress = 0.0
        fraction = self.options.bound_start + progress * (self.options.bound_end - self.options.bound_start)
        return start - (1 - fraction) * abs(start)

    @torch.no_grad()
    def mean_sigma(self) -> float:
        """Mean standard deviation of ln alpha over all entries and cell types."""
        return float(torch.stack([alpha.factor().norm(dim=1).mean() for alpha in self.alpha.values()]).mean())

    @torch.no_grad()
    def genotype(self) -> Genotype:
        """The architecture by the rule `derive`; by the score while no architecture step has measured a lambda."""
        constants = self.lipschitz.values
        if self.options.derive == "score" or constants is None:
            return super().genotype()
        source, found = generator(self.seed, "derive"), []
        for _ in range(self.options.samples):
            with self.sampled(self.draw(source)):
                genotype = discretise(self.space, self.mixing(), self.edge_weights())
            found.append((float(self.quantile(self.kept_constants(genotype, constants))), genotype))
        return min(found, key=lambda pair: pair[0])[1]

    def kept_constants(self, genotype: Genotype, constants: Tensor) -> Tensor:
        """`constants` (L, E, K) with 0 for every operation that is not in the genotype."""
        kept = torch.zeros_like(constants)
        edges = {edge: index for index, edge in enumerate(self.space.edges)}
        for index, spec in enumerate(self.space.layout(len(constants), 1)):
            for node, pairs in enumerate(genotype.cells[spec.cell_type]):
                for operation, source in pairs:
                    kept[index, edges[source, NUM_INPUTS + node], self.space.primitives.index(operation)] = 1
        return constants * kept
