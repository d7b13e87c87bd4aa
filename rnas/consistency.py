"""How far a network's answer moves when its input does: what a loss adds to make the two answers agree.

Legend: N images, K classes. Every function takes the logits of the clean images, those of the perturbed ones, both
(N, K), and the labels y (N,); it returns the mean over the images, differentiable in both logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Consistency = Callable[[Tensor, Tensor, Tensor], Tensor]


def kl(clean: Tensor, perturbed: Tensor, y: Tensor) -> Tensor:
    """`KL(softmax(clean) || softmax(perturbed))`, the clean answer being the reference; y is not read.

    The gradient flows through both answers: the network may also give way on the clean images.

    Equivalent to: `(p * (p / q).log()).sum(1).mean()` with p and q the two softmaxes, without its division by zero.
    Source: Zhang et al., arXiv 1901.08573 (TRADES), with the perturbed images as the second argument.
    """
    log_p, log_q = clean.log_softmax(dim=1), perturbed.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


def squared(clean: Tensor, perturbed: Tensor, y: Tensor) -> Tensor:
    """`||clean - perturbed||_2^2`, summed over the K logits; y is not read."""
    return (clean - perturbed).square().sum(dim=1).mean()


def cross_entropy(clean: Tensor, perturbed: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of the perturbed images; the clean logits are not read."""
    return F.cross_entropy(perturbed, y)


CONSISTENCIES: dict[str, Consistency] = {"kl": kl, "squared": squared, "cross_entropy": cross_entropy}


def both_logits(logits_of: Callable[[Tensor], Tensor], x: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the clean and of the perturbed images from one forward pass, so that they share batch statistics."""
    clean, moved = logits_of(torch.cat([x, perturbed])).chunk(2)
    return clean, moved
