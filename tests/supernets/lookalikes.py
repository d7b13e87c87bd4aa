"""Modules that hold the candidates of a mixed operation, or a list like it, and do something else with them.

`LOOKALIKES` maps a name to a `Case`: a constructor and a sentence why it is none. With `foreign` None the mixing is
another one; else only the candidates at those places are foreign (see `foreign`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .foreign import FOREIGN, Case, Mixture, separable


def candidates(C: int) -> list[nn.Module]:
    """Four true primitives: skip, max pool, separable 3x3, dilated 5x5."""
    pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(C, affine=False))
    return [nn.Identity(), pool, separable(C), separable(C, 5, depth=1, dilation=2)]


LOOKALIKES: dict[str, Case] = dict(FOREIGN)


def lookalike(name: str, why: str) -> Callable[[type], type]:
    """Enter a class under `name`; it is built on `candidates`."""

    def enter(cls: type) -> type:
        LOOKALIKES[name] = Case(lambda C: cls(candidates(C)), why)
        return cls

    return enter


class Held(Mixture):
    """Four true candidates and `alpha`; what a subclass does with `w`, the softmax (K,), is its business."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W) unless the subclass says otherwise."""
        return self.combine(x, self.alpha.softmax(0))

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        """What the subclass does."""
        raise NotImplementedError


@lookalike("squared", "the weights are squared")
class Squared(Held):
    """Sum of w^2 op(x)."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return sum(weight**2 * op(x) for weight, op in zip(w, self.ops))


@lookalike("twice", "each weight is multiplied before and behind its candidate")
class Twice(Held):
    """Sum of w op(w x)."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return sum(weight * op(weight * x) for weight, op in zip(w, self.ops))


@lookalike("product", "the candidates are multiplied")
class Product(Held):
    """Product of w op(x)."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.stack([weight * op(x) for weight, op in zip(w, self.ops)]).prod(0)


@lookalike("residual", "the input is added to the sum")
class Residual(Held):
    """x plus the sum of w op(x)."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return x + sum(weight * op(x) for weight, op in zip(w, self.ops))


@lookalike("maximum", "the largest of the weighted candidates wins at each pixel")
class Maximum(Held):
    """Maximum of w op(x)."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.stack([weight * op(x) for weight, op in zip(w, self.ops)]).amax(0)


@lookalike("mean", "the sum is divided by the number of candidates")
class Mean(Held):
    """Mean of w op(x)."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.stack([weight * op(x) for weight, op in zip(w, self.ops)]).mean(0)


@lookalike("activated", "a ReLU follows the sum")
class Activated(Held):
    """ReLU of the sum of w op(x)."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return sum(weight * op(x) for weight, op in zip(w, self.ops)).relu()


@lookalike("detached", "the right values, but the weights get no gradient")
class Detached(Held):
    """Sum of w op(x), w constant."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return sum(weight * op(x) for weight, op in zip(w.detach(), self.ops))


@lookalike("reversed", "a mixed operation, but the first weight belongs to the last candidate")
class Reversed(Held):
    """Sum of w_(K-1-k) op_k(x)."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return sum(weight * op(x) for weight, op in zip(w, reversed(self.ops)))


@lookalike("run twice", "each candidate runs twice, which moves its running statistics twice")
class RunTwice(Held):
    """Sum of w (op(x) + op(x)) / 2."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return sum(weight * (op(x) + op(x)) / 2 for weight, op in zip(w, self.ops))


@lookalike("top two", "only the two candidates of largest weight run")
class TopTwo(Held):
    """Sum of w op(x) over two candidates."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return sum(w[k] * self.ops[k](x) for k in w.topk(2).indices.tolist())


@lookalike("chained", "each candidate works on the result of the one before")
class Chained(Held):
    """w op(... w op(x))."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        for weight, op in zip(w, self.ops):
            x = weight * op(x)
        return x


@lookalike("rolled", "each candidate works on another shift of the input")
class Rolled(Held):
    """Sum of w op(x shifted by k pixels)."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return sum(weight * op(x.roll(k, -1)) for k, (weight, op) in enumerate(zip(w, self.ops)))


@lookalike("inception", "the candidates are concatenated along the channels")
class Inception(Held):
    """(N, C, H, W) -> (N, 4 C, H, W)."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([weight * op(x) for weight, op in zip(w, self.ops)], dim=1)


@lookalike("branches", "a list of branches, added without weights")
class Branches(Held):
    """Sum of op(x), as in ResNeXt; `alpha` is not used."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return sum(op(x) for op in self.ops)


@lookalike("experts", "the weights depend on the image")
class Experts(Held):
    """Sum of g(x) op(x) with a gate (N, K)."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        gate = (x.mean((1, 2, 3))[:, None] * self.alpha).softmax(1)
        return sum(g[:, None, None, None] * op(x) for g, op in zip(gate.unbind(1), self.ops))


@lookalike("thresholded", "a candidate is left out where its weight times the mean of the input is negative")
class Thresholded(Held):
    """Which candidates run depends on the input."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        out = w[0] * self.ops[0](x)
        return out + sum(weight * op(x) for weight, op in zip(w[1:], self.ops[1:]) if weight * x.mean() >= 0)


@lookalike("shuffled", "the channels are turned round after the sum")
class Shuffled(Held):
    """Sum of w op(x), last channel first."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        return sum(weight * op(x) for weight, op in zip(w, self.ops)).flip(1)


@lookalike("per channel", "a weight for each channel of each candidate")
class PerChannel(Held):
    """Sum of w_k,c op_k(x), with weights (K, C, 1, 1)."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        ramp = torch.linspace(0.5, 1.5, x.shape[1], device=x.device, dtype=x.dtype)[:, None, None]
        return sum(weight * ramp * op(x) for weight, op in zip(w, self.ops))


@lookalike("in place", "a candidate's ReLU overwrites the input that later candidates read")
class InPlace(Held):
    """The third candidate runs first, in place on a copy of the input, and the others see what it left."""

    def combine(self, x: Tensor, w: Tensor) -> Tensor:
        x = x.clone()
        self.ops[2][0].inplace = True
        order = (2, 0, 1, 3)
        return sum(w[k] * self.ops[k](x) for k in order)


@lookalike("pair", "the sum comes with the list of what was summed")
class Pair(Held):
    """Gives (sum, list of w op(x))."""

    def combine(self, x: Tensor, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        parts = [weight * op(x) for weight, op in zip(w, self.ops)]
        return sum(parts), parts
