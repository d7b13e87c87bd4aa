"""An attack from several starts and at several radii, and what is kept of them.

Legend: N images, E radii, R restarts of which r run at once, n rows still under attack, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ascent import Ascent
from .attack_inputs import Images, take_images


def best_of(ascent: Ascent, images: Images, *, restarts: int, at_once: int, early_drop: bool, radii: int = 1) -> Tensor:
    """The best example of every row of `images` over all restarts, `at_once` of which run as one batch.

    images: E * N rows, radius after radius from the smallest on; each holds the same N images. Of the rows still under
    attack the model sees r * n, copy after copy, so that row i of copy c is row c * n + i of the batch.
    early_drop: a row leaves with all its copies once one is fooled, and takes the larger radii of its image along.
    """
    whole, found = images, images.x.clone()
    rows = images.count
    highest = torch.full((rows,), -math.inf, dtype=torch.float64, device=found.device)
    if early_drop and ascent.random_start:
        clean = whole.take(slice(rows // radii))  # at every radius the same
        images = images.take(~ascent.fooled(ascent.measure(clean.x, clean), clean).repeat(radii))
    for begun in range(0, restarts, at_once):
        copies = min(at_once, restarts - begun)
        # Drawn for the whole batch, so that an image's noise does not depend on which others have left.
        x_adv = torch.cat([take_images(_start(ascent, whole, radii), images.index) for _ in range(copies)])
        batch = images.repeat(copies)
        for _ in range(ascent.steps):
            if images.count == 0:
                return found
            logits, grad_x = ascent.gradient(x_adv, batch)
            if early_drop and (fooled := ascent.fooled(logits, batch)).any():
                leaves, source = _leaving(fooled.view(copies, -1), images.index, rows, radii)
                found[images.index[leaves]] = x_adv[source[leaves]]
                images, stays = images.take(~leaves), (~leaves).repeat(copies)
                x_adv, grad_x, batch = take_images(x_adv, stays), take_images(grad_x, stays), batch.take(stays)
            ascent.step(x_adv, grad_x, batch)
        if images.count == 0:
            return found
        if restarts == 1 and not (early_drop and radii > 1):
            found[images.index] = x_adv
            return found
        logits = ascent.measure(x_adv, batch)
        value = ascent.value(logits, batch).double().view(copies, -1)
        value, copy = value.masked_fill(value.isnan(), -math.inf).max(dim=0)
        better = value > highest[images.index]
        source = copy * images.count + torch.arange(images.count, device=copy.device)
        if early_drop:
            leaves, fooling = _leaving(ascent.fooled(logits, batch).view(copies, -1), images.index, rows, radii)
            better, source = better | leaves, torch.where(leaves, fooling, source)
        found[images.index[better]] = x_adv[source[better]]
        highest[images.index[better]] = value[better]
        if early_drop:
            images = images.take(~leaves)
    return found


def _start(ascent: Ascent, whole: Images, radii: int) -> Tensor:
    """Drawn radius by radius, as separate attacks draw."""
    count = whole.count // radii
    return torch.cat([ascent.start(whole.take(slice(each * count, (each + 1) * count))) for each in range(radii)])


def _leaving(fooled: Tensor, index: Tensor, rows: int, radii: int) -> tuple[Tensor, Tensor]:
    """Which rows leave, (n,), and where in the batch the example of each of these lies, (n,).

    fooled (r, n); index (n,): places of the rows among all E * N. Of several copies the first counts; of several radii
    the row's own, else the largest below it, whose ball lies inside the row's.
    """
    here = torch.arange(len(index), device=index.device)
    caught = index.new_full((rows,), -1)
    caught[index] = torch.where(fooled.any(dim=0), here, -1)
    nearest = caught.view(radii, -1).cummax(dim=0).values.flatten()[index]
    return nearest >= 0, (fooled.int().argmax(dim=0) * len(index) + here)[nearest]
