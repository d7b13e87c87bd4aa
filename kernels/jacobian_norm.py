"""Norms of the Jacobian of a classifier, one per image: how far its logits move with the pixels, to first order.

Legend: N images, D pixels of an image, K classes, J (K, D) the Jacobian of one image's logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Integral

import torch
from torch import Tensor, nn

ESTIMATORS = ("exact", "sampled", "projection", "top")


def jacobian_norm(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    q: int = 2,
    estimator: str = "exact",
    samples: int = 1,
    generator: torch.Generator | None = None,
    create_graph: bool = True,
) -> Tensor:
    """How large the input gradients of a classifier's logits are: one number (N,) per image.

    Args:
        model: maps x to logits (N, K). The logits of an image must depend on that image alone. An nn.Module that
            normalises by batch statistics is refused; of a plain function that cannot be known, and there the rows of J
            become those of the batch's summed logits.
        x: (N, ...) images, floating point. Never written to.
        q: 1 or 2, the norm over the pixels. q = 1 is dual to a threat in Linf, q = 2 to one in L2.
        estimator: what is computed, and from how many vector-Jacobian products (backward passes):

            "exact", K products: `1/K sum_k ||J_k||_q`, the mean over the rows J_k = grad_x f_k(x).
            "sampled", `samples` products: the mean over that many different rows, drawn anew for each image. Unbiased
                for "exact", in value and in gradient.
            "top", one product: `||J_t||_q` of the row of the largest logit, t = argmax_k f_k(x).
            "projection", `samples` products: from vectors v uniform on the unit sphere of R^K, drawn for each
                image, an estimate of `||r||_q`, where r_d = sqrt(1/K sum_k J_kd^2) is the root mean square of column d.
                q = 2: `sqrt(mean ||J^T v||_2^2)`. K times its square is an unbiased estimate of ||J||_F^2, so that it
                estimates ||J||_F / sqrt(K); itself it is too small on average (Jensen), less so with more samples.
                q = 1: `mean ||J^T v||_1 / (c sqrt(K))`, unbiased, with c = E|v_1| = G(K/2) / (sqrt(pi) G((K+1)/2)).
                ||r||_q is at least the exact value and at most sqrt(K) times it; they are equal where all rows have the
                same absolute values (for q = 2: the same norm).
        samples: number of rows ("sampled", at most K) or of vectors v ("projection") per image; no other reads it.
        generator: source of the rows or vectors, on any device; None for PyTorch's default generator of x's device.
        create_graph: whether the result can be differentiated, in everything that the model's logits depend on and in x
            where it requires a gradient. Under no_grad it cannot be.

    Returns:
        (N,) in x's dtype, float32 for half precision; never negative. In units of logits per pixel unit for q = 2, and
        of logits per joint move of all pixels for q = 1.

    The gradient is that of the value returned, for every estimator: t, v and the drawn rows are constants, and a norm
    has gradient zero where it is zero. The model runs once; each product is one backward pass, and one through it when
    the result is differentiated, so "exact" costs about K times as much as one sample. No `.grad` changes; the modules
    keep their flags, and whatever else a forward pass in their present mode moves, moves.

    Equivalent to, for "exact"::

        J = torch.func.vmap(torch.func.jacrev(lambda image: model(image[None])[0]))(x)  # (N, K, ...)
        J.flatten(2).norm(q, dim=2).mean(dim=1)

    As a regulariser, of a loss in which every sample has a `weight` of its own, (N,); in evaluation mode, for the sake
    of networks with batch norm::

        loss = F.cross_entropy(model(x), y, reduction="none")
        model.eval()
        loss = (loss + weight * jacobian_norm(model, x)).mean()
        model.train()

    Raises:
        TypeError, ValueError: an argument of the wrong kind, logits that are not (N, K) or do not depend on x,
            more rows asked for than there are, or a model on batch statistics; the message says what was expected.

    Source: Hosseini, Yang, Xie, DSRNA (arXiv 2012.06122), Jacobian regulariser; projections: Hoffman, Roberts, Yaida,
    Robust Learning with Jacobian Regularization (arXiv 1908.02729), section 2.3. q = 1 with projections is ours.
    """
    _check(model, x, q, estimator, samples, generator)
    differentiable = create_graph and torch.is_grad_enabled()
    if x.shape[0] == 0:
        return x.new_zeros(0, dtype=_accumulator(x))
    with torch.inference_mode(False), torch.enable_grad():
        if differentiable and x.requires_grad:
            images = x.view_as(x)  # so that hooks on the caller's tensor do not see these gradients
        else:
            images = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        logits = _logits(model, images)
        classes = logits.shape[1]
        vectors = list(_vectors(estimator, logits.detach(), samples, generator))
        norms = []
        for index, vector in enumerate(vectors):
            retain = differentiable or index + 1 < len(vectors)
            norms.append(_row_norm(logits, images, vector, q, differentiable, retain))
        norms = torch.stack(norms)  # (products, N)
        if estimator != "projection":
            result = norms.mean(dim=0)
        elif q == 2:
            result = torch.linalg.vector_norm(norms, 2, dim=0) / math.sqrt(len(vectors))
        else:
            result = norms.mean(dim=0) / (_mean_coordinate(classes) * math.sqrt(classes))
    return result if differentiable else result.detach()


def _row_norm(logits: Tensor, images: Tensor, vector: Tensor, q: int, differentiable: bool, retain: bool) -> Tensor:
    """||J^T v||_q per image, (N,); vector (N, K). One backward pass serves the batch, as no image sees another."""
    (product,) = torch.autograd.grad(
        logits, images, vector, create_graph=differentiable, retain_graph=retain, allow_unused=True
    )
    if product is None:
        raise ValueError("the logits do not depend on x: is there a no_grad or a detach inside the model?")
    # No kernel of our own: with its gradient this is 3 to 5 of the 341 operations, and under 0.1% of the bytes, of one
    # fused row of a DARTS supernet (C=16, 8 cells) with the gradients of its norm; of 70,000 in plain PyTorch. On the
    # host a registered op that does nothing takes as long as they do for q = 1, and 0.6 times as long for q = 2.
    return torch.linalg.vector_norm(product, q, dim=tuple(range(1, product.dim())), dtype=_accumulator(images))


def _vectors(estimator: str, logits: Tensor, samples: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """What J is multiplied with from the left, (N, K) each."""
    count, classes = logits.shape
    if estimator == "exact":
        for row in torch.eye(classes, dtype=logits.dtype, device=logits.device):
            yield row.expand(count, classes)
        return
    if estimator == "top":
        yield _one_hot(logits, logits.argmax(dim=1))
        return
    device = logits.device if generator is None else generator.device
    if estimator == "sampled":
        if samples > classes:
            raise ValueError(f"samples must be at most the number of logits, {classes}, got {samples}")
        order = torch.rand(count, classes, generator=generator, device=device).argsort(dim=1).to(logits.device)
        for row in order[:, :samples].unbind(dim=1):
            yield _one_hot(logits, row)
    else:
        for _ in range(samples):
            drawn = torch.randn(count, classes, generator=generator, device=device, dtype=_accumulator(logits))
            yield torch.nn.functional.normalize(drawn, dim=1).to(logits.device, logits.dtype)


def _one_hot(logits: Tensor, row: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter_(1, row.unsqueeze(1), 1.0)


def _mean_coordinate(classes: int) -> float:
    """E|v_1| of v uniform on the unit sphere of R^classes."""
    return math.exp(math.lgamma(classes / 2) - math.lgamma((classes + 1) / 2)) / math.sqrt(math.pi)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _logits(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    logits = model(images)
    expected = f"the model must return logits of shape (N, K) = ({images.shape[0]}, K)"
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{expected}, got a {type(logits).__name__}: wrap it in a function that returns the logits alone"
        )
    if logits.dim() != 2 or logits.shape[0] != images.shape[0] or logits.shape[1] == 0:
        raise ValueError(f"{expected}, got {tuple(logits.shape)}")
    if not logits.requires_grad:
        raise ValueError("the logits do not depend on x: is there a no_grad or a detach inside the model?")
    return logits


def _check(model, x, q, estimator, samples, generator) -> None:
    if not callable(model):
        raise TypeError(f"model must be a function of x that returns logits, got {type(model).__name__}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        came = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating point tensor of images, got {came}: for bytes type x.float() / 255")
    if x.dim() < 2:
        raise ValueError(f"x must have shape (N, ...), one image per row, got {tuple(x.shape)}")
    if isinstance(q, bool) or q not in (1, 2):
        raise ValueError(f"q must be 1 (against Linf) or 2 (against L2), got {q!r}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(map(repr, ESTIMATORS))}, got {estimator!r}")
    if isinstance(samples, bool) or not isinstance(samples, Integral) or samples < 1:
        raise ValueError(f"samples must be an integer of at least 1, got {samples!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norm and (module.training or module.running_mean is None):
            raise ValueError(
                f"model.{name} normalises by batch statistics, so that the logits of an image depend on the other "
                "images: type model.eval(), or call it inside rnas.attacks.frozen(model)"
            )
