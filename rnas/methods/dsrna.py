"""DSRNA (Hosseini, Yang, Xie, CVPR 2021, arXiv 2012.06122): a differentiable measure of robustness, maximised by alpha.

Legend: N images, K classes, E edges of a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from .. import attacks, kernels
from ..attack_inputs import check_choice
from ..config import at_least
from ..spaces import Space
from ..supernet import Supernet
from .levels import pgd_batch
from .method import (
    Batch,
    Level,
    LevelResult,
    Method,
    Mixing,
    SearchPlan,
    SearchStep,
    Uncaptured,
    accuracy,
    edge_softmax,
    initial_alpha,
    initial_beta,
)
from .unrolled import unrolled_gradients

EPSILON = {("linf", True): 0.1, ("linf", False): 2 / 255, ("l2", True): 0.5, ("l2", False): 0.125}
"""(norm, one-channel images) -> full radius of the certificate. Ours; for L2 the same share of the usual attack's."""


@dataclass(frozen=True)
class DsrnaOptions:
    """Knobs of DSRNA. R is the measure of robustness, higher is better."""

    variant: Literal["certified", "jacobian", "combined"] = "jacobian"
    """R: a certified lower bound of the margins, minus a norm of the logits' input gradients, or the sum of both. The
    default is the one that costs least."""
    gamma: float = 0.01
    """Weight of R in the architecture's objective, L_V - gamma * R; 0 is DARTS."""
    norm: Literal["linf", "l2"] | None = None
    """Threat that R measures; the gradients' norm is its dual, L1 for linf. None: attack.norm."""
    estimator: Literal["exact", "sampled", "projection", "top"] = "sampled"
    """Of the Jacobian norm, as in rnas.kernels.jacobian_norm. sampled: the mean over random rows, without bias for the
    exact mean and its gradient, at the cost of `samples` rows where exact takes all K (ours; the paper's is exact)."""
    samples: int = 1
    """Rows (sampled, at most the number of classes) or random vectors (projection) per image."""
    jacobian_images: int = 0
    """Images of a batch that the Jacobian norm sees; 0 takes all (our default, the paper does not say)."""
    statistics: Literal["running", "batch"] = "running"
    """BN statistics under which R is measured. batch: for the Jacobian alone, much slower, and an image's gradients are
    those of the whole batch's logits."""
    epsilon: float | None = None
    """Radius of the certificate, pixel units. None: linf 2/255 (0.1 for one-channel images), l2 0.125 (0.5): our
    defaults, the paper does not say."""
    epsilon_ramp: float = 0.4
    """Share of the epochs over which that radius rises linearly from 0 (our default, the paper does not say)."""
    certified_images: int = 16
    """Images of a batch that the certificate sees; 0 takes all (our default, the paper does not say)."""
    scale: Literal["log", "clip", "none"] = "log"
    """What an image's certified R counts as. log: sign(R) ln(1 + |R|), so that alpha feels by which factor a bound gets
    tighter, however loose it is: those of a whole supernet lie tens of decades below zero. clip: R within
    [-clip, clip], its gradient zero outside. none: R. All ours."""
    clip: float = 10.0
    """Largest |R| with scale "clip" (our default, the paper does not say)."""
    order: Literal[1, 2] = 1
    """1: the architecture's gradient at the current weights (xi = 0). 2: through one unrolled step of the weights."""
    radius: float = 0.01
    """Length of the weight perturbation in the second order's finite difference."""
    on_weights: bool = False
    """Subtract weight_gamma * R from the loss of the weights as well, from epoch weight_epoch on."""
    weight_gamma: float = 1e-4
    """Weight of R in the loss of the weights."""
    weight_epoch: int = 10
    """First epoch, counted from 0, in which the weights' loss holds R; with `on_weights` it must be below the epochs of
    the search."""
    adversarial: Literal["both", "weights", "architecture", "none"] = "none"
    """Which level's cross entropy sees PGD examples; DSRNA needs none. R is measured on clean images always."""
    partial: int = 1
    """K of PC-DARTS, 4 there: one in K channels is mixed, and edges are weighed by a softmax per node. 1: DARTS."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("variant", ("certified", "jacobian", "combined")),
            ("norm", (None, "linf", "l2")),
            ("estimator", ("exact", "sampled", "projection", "top")),
            ("statistics", ("running", "batch")),
            ("scale", ("log", "clip", "none")),
            ("order", (1, 2)),
            ("adversarial", ("both", "weights", "architecture", "none")),
        ):
            check_choice(f"options.{name}", getattr(self, name), choices)
        at_least(0, "options", self, "gamma", "epsilon_ramp", "clip", "weight_gamma", "weight_epoch")
        at_least(0, "options", self, "jacobian_images", "certified_images")
        at_least(1, "options", self, "samples", "partial")
        if self.epsilon is not None:
            at_least(0, "options", self, "epsilon")
        if not self.radius > 0:
            raise ValueError(f"options.radius must be above 0; got {self.radius}")
        if self.epsilon_ramp > 1:
            raise ValueError(f"options.epsilon_ramp is a share of the epochs, at most 1; got {self.epsilon_ramp}")
        if self.statistics == "batch" and self.variant != "jacobian":
            raise ValueError(
                f"options.variant {self.variant!r} bounds each image by itself, which needs options.statistics "
                "'running'; got 'batch'"
            )


class Dsrna(Method):
    """`min_alpha L_V(w*(alpha), alpha) - gamma * R(w*(alpha), alpha)`, w* by gradient descent on the cross entropy L_T.

    R_jac = `-(1/K) sum_k ||grad_x f_k(x)||_q`, R_cb = `-logsumexp_t(-m_t)` over the certified margins m_t, t != y; both
    averaged over images.
    """

    name = "dsrna"
    Options = DsrnaOptions

    def __init__(self, options: DsrnaOptions, space: Space, seed: int) -> None:
        super().__init__(options, space, seed)
        self.alpha = initial_alpha(space, seed)
        if options.partial > 1:
            self.beta = initial_beta(space, seed)

    @classmethod
    def check(cls, options: DsrnaOptions, plan: SearchPlan) -> None:
        """Refuse an R that would never count or could not be measured."""
        on_weights = options.on_weights and options.weight_gamma > 0
        if on_weights and options.weight_epoch >= plan.epochs:
            raise ValueError(
                f"options.weight_epoch={options.weight_epoch} of epochs={plan.epochs}: R would never count in the loss "
                "of the weights; set it below epochs, or options.on_weights=False to do without"
            )
        if not (options.gamma or on_weights):
            return
        if options.variant != "jacobian" and options.epsilon_ramp and options.epsilon != 0 and plan.epochs == 1:
            raise ValueError(
                f"options.epsilon_ramp={options.epsilon_ramp} of epochs=1: the radius of the certificate would stay 0; "
                "set more epochs, or options.epsilon_ramp=0 to start with the full radius"
            )
        if options.variant != "certified" and options.estimator == "sampled" and options.samples > plan.num_classes:
            raise ValueError(
                f"options.samples={options.samples} of {plan.num_classes} classes: options.estimator=sampled has a row "
                "per class; set at most as many, or options.estimator=exact for all of them"
            )

    @property
    def partial(self) -> int:
        """The option of that name."""
        return self.options.partial

    def mixing(self) -> Mixing:
        """softmax(alpha) over the operations of each edge, (E, K) per cell type."""
        return {cell_type: alpha.softmax(dim=1) for cell_type, alpha in self.alpha.items()}

    def edge_weights(self) -> dict[str, Tensor] | None:
        """With partial channels softmax(beta) over the edges into a node, (E,) per cell type; else None."""
        if self.options.partial == 1:
            return None
        return edge_softmax(self.space, self.beta)

    def capture_key(self, level: Level, step: SearchStep) -> Hashable | Uncaptured:
        """The step of the weights can be captured where their loss does not hold R."""
        if level == "weights" and not self.options.on_weights:
            return ()
        return Uncaptured("measures R in it, with random rows and numbers that it reads")

    def prepare(self, supernet: Supernet, x: Tensor, y: Tensor, step: SearchStep, level: Level) -> Batch:
        """Clean images; with them PGD examples against the supernet as it is now, where `adversarial` says so."""
        return pgd_batch(self, supernet, x, y, step, level, self.options.adversarial)

    def weight_loss(self, supernet: Supernet, train: Batch, step: SearchStep) -> tuple[Tensor, Tensor]:
        """Cross entropy on D_T; with `on_weights` minus weight_gamma * R. The virtual step of order 2 leaves R out."""
        logits = self.logits(supernet, train.inputs, constant=True)
        loss = cross_entropy(logits, train.y)
        if self.options.on_weights and self.options.weight_gamma and step.epoch >= self.options.weight_epoch:
            # After the forward pass above, which moves the running statistics that R's graph holds on to.
            # Views, as `frozen` would stop the gradients of the parameters themselves.
            weights = {name: weight.view_as(weight) for name, weight in supernet.named_parameters()}
            robustness, _ = self.robustness(supernet, train, step, "weights", weights)
            loss = loss - self.options.weight_gamma * robustness
        return loss, logits

    def architecture_step(self, supernet: Supernet, train: Batch, valid: Batch, step: SearchStep) -> LevelResult:
        """First- or second-order gradient of L_V - gamma * R; L_V by batch statistics. The loss reported is the sum."""
        options, parameters = self.options, list(self.parameters())
        numbers: dict[str, float] = {}

        def loss_on(batch: Batch, weights: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
            with attacks.frozen(supernet, statistics="batch"):
                logits = _with_weights(supernet, weights, self.logits, batch.inputs)
            return cross_entropy(logits, batch.y), logits

        def objective(weights: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
            loss, logits = loss_on(valid, weights)
            if options.gamma:
                robustness, found = self.robustness(supernet, valid, step, "architecture", weights)
                numbers.update(cross_entropy=loss.item(), robustness=robustness.item(), **found)
                loss = loss - options.gamma * robustness
            return loss, logits

        with attacks.frozen(supernet), torch.enable_grad():
            if options.order == 1:
                loss, logits = objective(None)
                gradients = torch.autograd.grad(loss, parameters)
            else:
                weights = dict(supernet.named_parameters())
                gradients, loss, logits = unrolled_gradients(
                    lambda moved: loss_on(train, moved),
                    objective,
                    weights,
                    parameters,
                    step.weight_optimizer,
                    radius=options.radius,
                )
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        return LevelResult(loss.item(), accuracy(logits, valid.y), numbers)

    def robustness(
        self,
        supernet: Supernet,
        batch: Batch,
        step: SearchStep,
        level: Level = "architecture",
        weights: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """R of the clean images as a scalar tensor, and its parts by name.

        level: "architecture" differentiates it in the architecture parameters, "weights" holds those constant.
        weights: what takes the place of the supernet's parameters, by name; R is differentiable in them.
        """
        total, numbers = 0, {}
        for part in (self.jacobian, self.certified):
            if self.options.variant in (part.__name__, "combined"):
                with attacks.frozen(supernet, statistics=self.options.statistics):
                    value, found = _with_weights(supernet, weights, part, batch, step, level)
                total = total + value
                numbers.update(found)
        return total, numbers

    def jacobian(self, supernet: Supernet, batch: Batch, step: SearchStep, level: Level) -> tuple[Tensor, dict]:
        """R_jac under the statistics that the supernet has been put in."""
        options = self.options
        norms = kernels.jacobian_norm(
            lambda x: self.logits(supernet, x, constant=level == "weights"),
            batch.x[: options.jacobian_images or None],
            q={"linf": 1, "l2": 2}[self.threat(step)],
            estimator=options.estimator,
            samples=options.samples,
            generator=step.generator(f"jacobian-{level}"),
        )
        value = -norms.mean()
        return value, {"jacobian": value.item()}

    def certified(self, supernet: Supernet, batch: Batch, step: SearchStep, level: Level) -> tuple[Tensor, dict]:
        """R_cb at this epoch's radius: the soft minimum of the certified margins of an image, on its scale.

        In float64, as the intervals of a whole supernet grow beyond the range of float32.
        """
        from ..certify import certified_margin

        mixing, edge_weights = self.mixing(), self.edge_weights()
        if level == "weights":
            mixing = {name: each.detach() for name, each in mixing.items()}
            edge_weights = edge_weights and {name: each.detach() for name, each in edge_weights.items()}
        chosen = slice(self.options.certified_images or None)
        epsilon = self.epsilon(step, channels=batch.x.shape[1])
        margins = certified_margin(
            supernet,
            mixing,
            batch.x[chosen].double(),
            batch.y[chosen],
            epsilon,
            norm=self.threat(step),
            edge_weights=edge_weights,
        )
        bounds = -torch.logsumexp(-margins, dim=1)  # the margin of the true label is +inf and drops out
        numbers = {"epsilon": epsilon}
        if self.options.scale == "log":
            bounds = bounds.sign() * bounds.abs().log1p()
        elif self.options.scale == "clip":
            numbers["clipped"] = float((bounds.abs() > self.options.clip).float().mean())
            bounds = bounds.clamp(-self.options.clip, self.options.clip)
        value = bounds.mean()
        return value, {"certified": value.item(), **numbers}

    def threat(self, step: SearchStep) -> str:
        """The norm of the perturbation against which R measures, "linf" or "l2"."""
        return self.options.norm or step.attack.norm

    def epsilon(self, step: SearchStep, *, channels: int) -> float:
        """The certificate's radius in this epoch, pixel units. channels: of the images."""
        full, ramp = self.options.epsilon, self.options.epsilon_ramp
        if full is None:
            full = EPSILON[self.threat(step), channels == 1]
        if not ramp:
            return full
        if step.epochs < 1:
            raise ValueError(f"options.epsilon_ramp needs the number of epochs of the search; got {step.epochs}")
        return full * min(1.0, step.epoch / (ramp * step.epochs))


def _with_weights(supernet: Supernet, weights: dict[str, Tensor] | None, function: Callable, *arguments: Any) -> Any:
    """function(supernet, *arguments) with `weights` in the place of the supernet's own; None: its own."""
    if weights is None:
        return function(supernet, *arguments)
    named = {f"supernet.{name}": weight for name, weight in weights.items()}
    return functional_call(_Bound(supernet, function), named, arguments)


class _Bound(nn.Module):
    """A function of a supernet as a module, the form that `functional_call` takes."""

    def __init__(self, supernet: Supernet, function: Callable) -> None:
        super().__init__()
        self.supernet = supernet
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(self.supernet, *arguments)
