"""Random numbers that depend on what they are for, not on what ran before."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import torch


def derive(seed: int, *names: str | int) -> int:
    """A seed for the purpose `names`: equal for equal arguments on every machine, unrelated otherwise."""
    text = "/".join(str(name) for name in (int(seed), *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose stream depends on (seed, names) alone.

    A job asks for one per purpose, epoch and batch, so a resumed run draws the same numbers as an uninterrupted one
    without any generator state in its checkpoints.
    """
    return torch.Generator(device=device).manual_seed(derive(seed, *names))


def purposes(seed: int, *names: str | int, device: str | torch.device = "cpu") -> Callable[[str], torch.Generator]:
    """A function that gives, for the name of a purpose, its generator at the place `names` (epoch, batch)."""
    return functools.partial(generator, seed, *names, device=device)
