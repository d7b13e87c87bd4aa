"""White-box attacks, FGSM and PGD in the Linf and the L2 ball, that leave the attacked model as they found it.

Legend: N images, C channels, H W pixels, K classes. Images are in pixel units, [0, 1]; so are epsilon and step_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnas import kernels
from rnas.attack_inputs import Images, check_choice, check_images, check_labels, check_per_image, take_images

if TYPE_CHECKING:
    from rnas.config import AttackConfig

__all__ = ["fgsm", "frozen", "perturb", "pgd"]

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float | Tensor,
    norm: str = "linf",
    targeted: bool = False,
    loss: str | Loss = "cross_entropy",
    statistics: str = "running",
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """One gradient step of full length epsilon from the clean images, without a random start.

    Arguments, errors and the care for the model are those of `pgd`.
    Equivalent to: pgd(..., step_size=epsilon, steps=1, random_start=False).
    Source: Goodfellow et al., arXiv 1412.6572, section 4.
    """
    return pgd(
        model,
        x,
        y,
        epsilon=epsilon,
        step_size=epsilon,
        steps=1,
        norm=norm,
        targeted=targeted,
        random_start=False,
        loss=loss,
        statistics=statistics,
        lower=lower,
        upper=upper,
    )


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    norm: str = "linf",
    targeted: bool = False,
    random_start: bool = True,
    restarts: int = 1,
    early_drop: bool = False,
    loss: str | Loss = "cross_entropy",
    statistics: str = "running",
    generator: torch.Generator | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """Projected gradient ascent on the loss inside the epsilon-ball around x and the box [lower, upper].

    model       maps x to logits (N, K). A plain function is called as it is: put the modules it uses in `frozen`.
    x           (N, C, H, W) or any (N, ...), floating point, inside the box. Never written to.
    y           (N,) integers in [0, K): the true labels, or with `targeted` the labels to reach.
    epsilon, step_size   numbers, or tensors (N,) with one value per image. With epsilon 0 an image stays as it is.
    norm        "linf" (steps along the sign of the gradient) or "l2" (along the gradient divided by its norm).
    targeted    descend the loss towards y instead of ascending it.
    random_start, restarts   every restart draws its own start, uniform in the ball. Kept is, image by image, the
                example with the largest loss (targeted: the smallest) over all restarts.
    early_drop  for evaluation: images predicted wrong (targeted: predicted y) leave the batch and keep the example
                that achieved it, x itself where the clean image already does. The others go the way they would have
                gone without it. Costs one read of a flag from the device per step.
    loss        "cross_entropy", "margin" (the best other logit minus the logit of y), or a function
                (logits (n, K), y (n,)) -> (n,); n < N once early_drop has dropped images.
    statistics  "running" or "batch": see `frozen`.
    generator   source of the random starts, on any device. None: what the default generator would give next,
                without advancing it, so two calls in a row use the same noise.

    Returns x_adv: shape, dtype, device and memory format of x, part of no graph. Works under no_grad and
    inference_mode. Only the gradient to the images is computed, of the loss summed over the batch, so that it does not
    depend on N. Afterwards, after an exception too, the model's training flags, statistics, requires_grad flags and
    .grad fields and the global random states (CPU, CUDA) are what they were.

    Raises ValueError for steps or restarts below 1, epsilon or step_size negative, not finite or of a wrong shape,
    an Linf epsilon wider than the box, x outside the box or NaN, labels of a wrong shape or out of range, logits that
    are not (N, K) or do not depend on x, unknown names, and options that contradict each other; TypeError for x that
    is not floating point, labels that are not integers and a model that returns something else than a tensor.
    Source: Madry et al., arXiv 1706.06083, section 2.1; margin: Carlini and Wagner, arXiv 1608.04644, section V-A, f6.
    """
    _check_options(norm, loss, statistics, steps, restarts, random_start, early_drop)
    check_images(x, lower, upper)
    highest_label = check_labels(y, x.shape[0])
    epsilon = check_per_image("epsilon", epsilon, x, limit=upper - lower if norm == "linf" else math.inf)
    step_size = check_per_image("step_size", step_size, x)

    with torch.inference_mode(False), torch.enable_grad():
        images = Images.of(x, y, epsilon, step_size)
        if images.count == 0:
            return images.x.clone()
        ascent = _Ascent(
            model,
            _LOSSES[loss] if isinstance(loss, str) else loss,
            -1 if targeted else 1,
            steps,
            random_start,
            norm,
            lower,
            upper,
            generator,
            highest_label,
        )
        with _random_states_kept(model, x.device), frozen(model, statistics):
            if restarts == 1 and not early_drop:
                return ascent.climb(images)
            return ascent.search(images, restarts, early_drop)


def perturb(
    model: Model, x: Tensor, y: Tensor, attack: AttackConfig, *, generator: torch.Generator | None = None
) -> Tensor:
    """`pgd` with the settings of an AttackConfig, its epsilon and step_size set: how training makes its examples."""
    return pgd(
        model,
        x,
        y,
        epsilon=attack.epsilon,
        step_size=attack.step_size,
        steps=attack.steps,
        norm=attack.norm,
        random_start=attack.random_start,
        restarts=attack.restarts,
        statistics=attack.statistics,
        generator=generator,
    )


@contextmanager
def frozen(model: nn.Module | Model, statistics: str = "running") -> Iterator[nn.Module | Model]:
    """Put a model in the state in which it is attacked; give it back exactly as it was, after an exception too.

    Inside, no parameter requires a gradient and every submodule is in eval mode (no dropout, no noise).
    statistics "running": normalisation layers use their running statistics, as at test time. "batch": layers with
    running statistics (batch normalisation of any kind, and whatever else has a `track_running_stats` attribute)
    use those of the batch instead, and their buffers are neither read nor moved. They are detached from the layers for
    that time: take no state_dict inside. Layers without running statistics use those of the batch in both cases.

    Flags are set on the submodules one by one, as `train()` and `eval()` would lose mixed flags and may be overridden.
    A model that is not an nn.Module is passed through. May be nested.
    Raises ValueError for other values of statistics.
    """
    check_choice("statistics", statistics, ("running", "batch"))
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module.training for module in modules]
    # The flag of a non-leaf (a weight computed from another tensor) cannot be set; its gradient is not computed anyway.
    parameters = model.parameters() if isinstance(model, nn.Module) else []
    trainable = [parameter for parameter in parameters if parameter.requires_grad and parameter.is_leaf]
    tracking = [module for module in modules if getattr(module, "track_running_stats", False)]
    buffers = [
        (module, {name: module._buffers[name] for name in _STATISTICS if name in module._buffers})
        for module in (tracking if statistics == "batch" else [])
    ]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in modules:
            _set_training(module, False)
        for module, held in buffers:
            # The state of a layer built with track_running_stats=False. Training mode as well, because only then
            # SyncBatchNorm gathers the batch over all processes.
            _set_training(module, True)
            module.track_running_stats = False
            module._buffers.update(dict.fromkeys(held))
        yield model
    finally:
        for module, held in buffers:
            module._buffers.update(held)
            module.track_running_stats = True
        for module, was_training in zip(modules, training):
            _set_training(module, was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _set_training(module: nn.Module, training: bool) -> None:
    if module.training != training:  # a supernet has thousands of modules, and setting an attribute of one is slow
        module.training = training


def _random_states_kept(model: Model, device: torch.device) -> AbstractContextManager[None]:
    devices = {device}
    if isinstance(model, nn.Module):
        devices.update(parameter.device for parameter in model.parameters())
    return torch.random.fork_rng(devices=sorted(each.index for each in devices if each.type == "cuda"))


@dataclass(frozen=True)
class _Ascent:
    """The model and the settings of one attack. `direction` is 1 to ascend the loss, -1 to descend it (targeted)."""

    model: Model
    loss: Loss
    direction: int
    steps: int
    random_start: bool
    norm: str
    lower: float
    upper: float
    generator: torch.Generator | None
    highest_label: int

    def climb(self, images: Images) -> Tensor:
        x_adv = self.start(images)
        for _ in range(self.steps):
            _, grad_x = self.gradient(x_adv, images)
            self.step(x_adv, grad_x, images)
        return x_adv

    def search(self, images: Images, restarts: int, early_drop: bool) -> Tensor:
        whole, found = images, images.x.clone()
        highest = torch.full((images.count,), -math.inf, dtype=torch.float64, device=found.device)
        if early_drop and self.random_start:
            images = images.take(~self.fooled(self.measure(found, images), images))
        for _ in range(restarts):
            # Drawn for the whole batch, so that an image's noise does not depend on which others have left.
            x_adv = take_images(self.start(whole), images.index)
            for _ in range(self.steps):
                if images.count == 0:
                    return found
                logits, grad_x = self.gradient(x_adv, images)
                if early_drop and (fooled := self.fooled(logits, images)).any():
                    found[images.index[fooled]] = x_adv[fooled]
                    x_adv, grad_x = take_images(x_adv, ~fooled), take_images(grad_x, ~fooled)
                    images = images.take(~fooled)
                self.step(x_adv, grad_x, images)
            if restarts == 1 or images.count == 0:
                found[images.index] = x_adv
                return found
            logits = self.measure(x_adv, images)
            value = self.value(logits, images).double()
            better = value > highest[images.index]
            if early_drop:
                fooled = self.fooled(logits, images)
                better |= fooled
            found[images.index[better]] = x_adv[better]
            highest[images.index[better]] = value[better]
            if early_drop:
                images = images.take(~fooled)
        return found

    def start(self, images: Images) -> Tensor:
        if not self.random_start:
            return images.x.clone()
        return kernels.random_start(
            images.x,
            epsilon=images.epsilon,
            norm=self.norm,
            lower=self.lower,
            upper=self.upper,
            generator=self.generator,
        )

    def step(self, x_adv: Tensor, grad_x: Tensor, images: Images) -> None:
        kernels.pgd_step(
            x_adv,
            grad_x,
            images.x,
            epsilon=images.epsilon,
            step_size=images.step_size,
            norm=self.norm,
            lower=self.lower,
            upper=self.upper,
            out=x_adv,
        )

    def gradient(self, x_adv: Tensor, images: Images) -> tuple[Tensor, Tensor]:
        leaf = x_adv.detach().requires_grad_()
        logits = self.logits(leaf, images)
        total = self.value(logits, images).sum()
        grad_x = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
        if grad_x is None:
            raise ValueError(
                "the loss does not depend on the images: is there a no_grad or a detach inside the model "
                "or the loss? An attack needs the gradient through both"
            )
        return logits.detach(), grad_x

    @torch.no_grad()
    def measure(self, x_adv: Tensor, images: Images) -> Tensor:
        return self.logits(x_adv, images)

    def logits(self, x: Tensor, images: Images) -> Tensor:
        logits = self.model(x)
        expected = f"the model must return logits of shape (N, K) = ({images.count}, K)"
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{expected}, got a {type(logits).__name__}: wrap it in a function that returns the "
                "logits alone, and put the model in rnas.attacks.frozen meanwhile"
            )
        if logits.dim() != 2 or logits.shape[0] != images.count:
            raise ValueError(f"{expected}, got {tuple(logits.shape)}")
        if self.highest_label >= logits.shape[1]:
            raise ValueError(f"labels must be below the number of logits, {logits.shape[1]}, got {self.highest_label}")
        # Half precision loses the small differences between losses that the ascent lives on.
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def value(self, logits: Tensor, images: Images) -> Tensor:
        value = self.loss(logits, images.y)
        if not isinstance(value, Tensor) or value.shape != images.y.shape:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"loss must return one value per image, shape ({images.count},), got {came}: type reduction='none'"
            )
        return self.direction * value

    def fooled(self, logits: Tensor, images: Images) -> Tensor:
        predicted = logits.argmax(dim=1)
        return predicted == images.y if self.direction < 0 else predicted != images.y


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    own = y.unsqueeze(1)
    return logits.scatter(1, own, -math.inf).amax(dim=1) - logits.gather(1, own).squeeze(1)


_LOSSES: dict[str, Loss] = {"cross_entropy": _cross_entropy, "margin": _margin}


def _check_options(norm, loss, statistics, steps, restarts, random_start, early_drop) -> None:
    check_choice("norm", norm, ("linf", "l2"))
    check_choice("statistics", statistics, ("running", "batch"))
    if not callable(loss):
        check_choice("loss", loss, tuple(_LOSSES))
    for name, value in (("steps", steps), ("restarts", restarts)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if restarts > 1 and not random_start:
        raise ValueError(
            f"restarts={restarts} without a random start would repeat the same attack: type "
            "random_start=True or restarts=1"
        )
    if early_drop and statistics == "batch":
        raise ValueError(
            "early_drop changes the batch, and with it the statistics that statistics='batch' takes from "
            "it: type statistics='running' or early_drop=False"
        )
