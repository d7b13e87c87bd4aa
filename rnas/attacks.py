"""White-box attacks, FGSM and PGD in the Linf and the L2 ball, that leave the attacked model as they found it.

Legend: N images, C channels, H W pixels, K classes. Images are in pixel units, [0, 1]; so are epsilon and step_size.
"""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor, nn

from .ascent import LOSSES, Ascent, Loss, Model
from .attack_graphs import from_a_graph
from .attack_inputs import Images, check_choice, check_images, check_labels, check_per_image
from .config import AttackConfig
from .freezing import frozen, random_states_kept
from .graphs import Graphs

__all__ = ["fgsm", "frozen", "perturb", "pgd"]


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
    early_drop  for evaluation: images predicted wrong (targeted: predicted y) leave the batch and keep the example
                that achieved it, x itself where the clean image already does. The others go the way they would have
                gone without it. Costs one read of a flag from the device per step.
    loss        "cross_entropy", "margin" (the best other logit minus the logit of y), or a function
                (logits (n, K), y (n,)) -> (n,); n < N once early_drop has dropped images.
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
        ascent = Ascent(
            model,
            LOSSES[loss] if isinstance(loss, str) else loss,
            -1 if targeted else 1,
            steps,
            random_start,
            norm,
            lower,
            upper,
            generator,
            highest_label,
        )
        if graphs is not None and restarts == 1 and not early_drop and isinstance(model, nn.Module):
            return from_a_graph(graphs, ascent, images, statistics)
        with random_states_kept(model, x.device), frozen(model, statistics):
            if restarts == 1 and not early_drop:
                return ascent.climb(images)
            return ascent.search(images, restarts, early_drop)


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


def _check_options(norm, loss, statistics, steps, restarts, random_start, early_drop) -> None:
    check_choice("norm", norm, ("linf", "l2"))
    check_choice("statistics", statistics, ("running", "batch"))
    if not callable(loss):
        check_choice("loss", loss, tuple(LOSSES))
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
