"""White-box attacks, FGSM and PGD in the Linf and the L2 ball, that leave the attacked model as they found it.

Legend: N images, C channels, H W pixels, K classes. Images are in pixel units, [0, 1]; so are epsilon and step_size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from .ascent import LOSSES, Ascent, Loss, Model
from .attack_graphs import from_a_graph
from .attack_inputs import (
    Images,
    check_ascending,
    check_choice,
    check_images,
    check_labels,
    check_per_image,
    check_radii,
)
from .config import AttackConfig
from .freezing import frozen, random_states_kept
from .graphs import Graphs
from .restarts import best_of

__all__ = ["fgsm", "frozen", "perturb", "pgd", "pgd_sweep"]


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
    restarts_at_once: int = 1,
    early_drop: bool = False,
    loss: str | Loss = "cross_entropy",
    statistics: str = "running",
    generator: torch.Generator | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
    graphs: Graphs | None = None,
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
    restarts_at_once   so many restarts run as one batch of restarts_at_once * N images, which model and loss then see;
                1: one after another. Random starts and result are the same, up to the rounding of a larger batch; with
                early_drop an image leaves with all its copies once one of them is fooled, and keeps that example.
    early_drop  for evaluation: images predicted wrong (targeted: predicted y) leave the batch and keep the example
                that achieved it, x itself where the clean image already does. The others go the way they would have
                gone without it. Costs one read of a flag from the device per step.
    loss        "cross_entropy", "margin" (the best other logit minus the logit of y), or a function
                (logits (n, K), y (n,)) -> (n,); n < N once early_drop has dropped images, n > N with restarts_at_once.
    statistics  "running" or "batch": see `frozen`.
    generator   source of the random starts, on any device. None: what the default generator would give next,
                without advancing it, so two calls in a row use the same noise.
    graphs      where to keep all steps of the attack as one CUDA graph, which the next calls with this model and these
                settings start in place of the steps. For an nn.Module of which nothing but parameters, buffers and
                training flags changes between calls; not for restarts or early_drop, which look at what they found.

    Returns x_adv: shape, dtype, device and memory format of x, part of no graph. Works under no_grad and
    inference_mode. Only the gradient to the images is computed, of the loss summed over the batch, so that it does not
    depend on N. Afterwards, after an exception too, the model's training flags, statistics, requires_grad flags and
    .grad fields and the global random states (CPU, CUDA) are what they were.

    Equivalent to, for the defaults, but for the care for the model::

        x_adv = (x + epsilon * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(lower, upper)
        for _ in range(steps):
            x_adv.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
            x_adv = x_adv.detach() + step_size * grad.sign()
            x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(lower, upper)

    Raises ValueError for steps, restarts or restarts_at_once below 1, epsilon or step_size negative, not finite or of a
    wrong shape, an Linf epsilon wider than the box, x outside the box or NaN, labels of a wrong shape or out of range,
    logits that are not (N, K) or do not depend on x, unknown names, and options that contradict each other; TypeError
    for x that is not floating point, labels that are no integers and a model that returns something else than a tensor.
    Source: Madry et al., arXiv 1706.06083, section 2.1; margin: Carlini and Wagner, arXiv 1608.04644, section V-A, f6.
    """
    _check_options(norm, loss, statistics, steps, restarts, restarts_at_once, random_start, early_drop)
    check_images(x, lower, upper)
    highest_label = check_labels(y, x.shape[0])
    epsilon = check_per_image("epsilon", epsilon, x, limit=upper - lower if norm == "linf" else math.inf)
    step_size = check_per_image("step_size", step_size, x)

    with torch.inference_mode(False), torch.enable_grad():
        images = Images.of(x, y, epsilon, step_size)
        if images.count == 0:
            return images.x.clone()
        loss, direction = LOSSES[loss] if isinstance(loss, str) else loss, -1 if targeted else 1
        ascent = Ascent(model, loss, direction, steps, random_start, norm, lower, upper, generator, highest_label)
        if graphs is not None and restarts == 1 and not early_drop and isinstance(model, nn.Module):
            return from_a_graph(graphs, ascent, images, statistics)
        with random_states_kept(model, x.device), frozen(model, statistics):
            if restarts == 1 and not early_drop:
                return ascent.climb(images)
            return best_of(ascent, images, restarts=restarts, at_once=restarts_at_once, early_drop=early_drop)


def pgd_sweep(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilons: Sequence[float | Tensor] | Tensor,
    step_size: float | Sequence[float | Tensor] | Tensor,
    steps: int,
    norm: str = "linf",
    targeted: bool = False,
    random_start: bool = True,
    restarts: int = 1,
    restarts_at_once: int = 1,
    early_drop: bool = False,
    loss: str | Loss = "cross_entropy",
    generator: torch.Generator | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """PGD at E radii in one batch of E * N images: what a curve of accuracy over epsilon is drawn from.

    epsilons    E numbers or a tensor (E,), in pixel units, ascending; or (E, N), with a column for each image.
    step_size   a number for all radii, or one value for each in a form that epsilons may have: epsilons / 4.
    early_drop  an image predicted wrong (targeted: predicted y) at one radius leaves the batch there and at all larger
                radii, whose balls hold the example that achieved it and which keep it where they have none of their
                own. So nobody is fooled at one radius and right at a larger one, but for rounding.

    The other arguments, the errors and the care for the model are those of `pgd` with statistics="running"; those of a
    batch would mix the radii. Model and loss see restarts_at_once * E * N images at once, fewer with early_drop: where
    that is too much memory, take fewer images. Random starts are drawn restart by restart, in each radius by radius.

    Returns (E, N, ...): the examples of radius e are x_adv[e]; dtype and device of x, part of no graph. The curve::

        right = torch.stack([model(each).argmax(1) == y for each in x_adv]).float().mean(1)  # (E,)

    Equivalent to, for one restart without early_drop and a generator, but for the rounding of a larger batch::

        torch.stack([pgd(model, x, y, epsilon=epsilons[e], step_size=step_size[e], steps=steps, generator=generator)
                     for e in range(len(epsilons))])

    Raises ValueError also for no radius, radii that do not ascend and another number of step sizes than of radii.
    Source: as `pgd`; curves over epsilon: Carlini et al., On Evaluating Adversarial Robustness, arXiv 1902.06705.
    """
    _check_options(norm, loss, "running", steps, restarts, restarts_at_once, random_start, early_drop)
    check_images(x, lower, upper)
    highest_label = check_labels(y, x.shape[0])
    epsilons = check_radii("epsilons", epsilons, x, upper - lower if norm == "linf" else math.inf)
    check_ascending("epsilons", epsilons)
    radii = len(epsilons)
    step_size = check_radii("step_size", step_size, x, count=radii)

    with torch.inference_mode(False), torch.enable_grad():
        once = Images.of(x, y, epsilon=0.0, step_size=0.0)
        if once.count == 0:
            return x.new_empty(radii, *x.shape)
        rows = dataclasses.replace(
            once.repeat(radii),
            epsilon=epsilons.flatten(),
            step_size=step_size.flatten(),
            index=torch.arange(radii * once.count, device=x.device),
        )
        loss, direction = LOSSES[loss] if isinstance(loss, str) else loss, -1 if targeted else 1
        ascent = Ascent(model, loss, direction, steps, random_start, norm, lower, upper, generator, highest_label)
        with random_states_kept(model, x.device), frozen(model):
            found = best_of(
                ascent, rows, restarts=restarts, at_once=restarts_at_once, early_drop=early_drop, radii=radii
            )
        return found.unflatten(0, (radii, once.count))


def perturb(
    model: Model,
    x: Tensor,
    y: Tensor,
    attack: AttackConfig,
    *,
    generator: torch.Generator | None = None,
    graphs: Graphs | None = None,
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
        graphs=graphs,
    )


def _check_options(norm, loss, statistics, steps, restarts, restarts_at_once, random_start, early_drop) -> None:
    check_choice("norm", norm, ("linf", "l2"))
    check_choice("statistics", statistics, ("running", "batch"))
    if not callable(loss):
        check_choice("loss", loss, tuple(LOSSES))
    for name, value in (("steps", steps), ("restarts", restarts), ("restarts_at_once", restarts_at_once)):
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
    if restarts_at_once > 1 and statistics == "batch":
        raise ValueError(
            f"restarts_at_once={restarts_at_once} makes a larger batch, and with it other statistics than "
            "statistics='batch' takes from the images alone: type statistics='running' or restarts_at_once=1"
        )
