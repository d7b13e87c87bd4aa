"""What the tests of the fused ops share: random norms and images, the gate on float64, a record of registered ops.

A test file describes the arguments of its op in a subclass of `Call`, draws them at random, and gives both to `compare`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.optests.generate_tests import OpCheckError
from torch.utils._python_dispatch import TorchDispatchMode

MODES = {  # how the BN modules are set up: training, affine, track_running_stats, momentum, eps
    "train": (True, False, True, 0.1, 1e-5),
    "train affine": (True, True, True, 0.1, 1e-5),
    "train, other numbers": (True, True, True, 0.3, 1e-2),
    "train, cumulative": (True, False, True, None, 1e-5),
    "train, no buffers": (True, True, False, 0.1, 1e-5),
    "eval": (False, False, True, 0.1, 1e-5),
    "eval affine": (False, True, True, 0.1, 1e-3),
    "eval, no buffers": (False, False, False, 0.1, 1e-5),
}
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "slice": lambda t: nn.functional.pad(t, (1, 2, 2, 1, 1, 1), value=math.nan)[:, 1:-1, 2:-1, 1:-2],
    "every other pixel": lambda t: torch.stack([t, torch.full_like(t, math.nan)], dim=-1)[..., 0],
}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
DRAWS = 20


class Call:
    """The arguments of one call of an op."""

    KINDS: ClassVar[tuple[str, ...]]
    """What a gradient can be asked for."""

    def copy(self, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Call:
        """Fresh leaves of that dtype and layout, and copies of the BN modules."""
        raise NotImplementedError

    def run(self, implementation) -> Tensor:
        """The result of a module's function of the name of the op."""
        raise NotImplementedError

    def modules(self) -> list[nn.BatchNorm2d]:
        """All BN modules."""
        raise NotImplementedError

    def leaves(self, kind: str) -> list[Tensor]:
        """The tensors of one of `KINDS`."""
        raise NotImplementedError

    def require(self, kinds) -> Call:
        """Asks for the gradients of these kinds and of no other."""
        for kind in self.KINDS:
            for leaf in self.leaves(kind):
                leaf.requires_grad_(kind in kinds)
        return self


def draw_input(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values of both signs, away from zero, no two of one size: no ReLU and no maximum hangs on a rounding."""
    count = math.prod(shape)
    values = torch.linspace(0.1, 1, count)[torch.randperm(count, generator=generator)]
    signs = 2.0 * torch.randint(2, (count,), generator=generator) - 1
    return (values * signs).reshape(shape)


def draw_norm(channels: int, mode: str, generator: torch.Generator) -> nn.BatchNorm2d:
    """A BN module of one of `MODES` with random buffers and, where it has them, random weights of both signs."""
    training, affine, tracked, momentum, eps = MODES[mode]
    norm = nn.BatchNorm2d(channels, eps, momentum, affine, tracked).train(training)
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.bias):
            if tensor is not None:
                tensor.copy_(0.3 * torch.randn(channels, generator=generator))
        for tensor in (norm.running_var, norm.weight):
            if tensor is not None:
                tensor.copy_(0.5 + torch.rand(channels, generator=generator))
        if affine:
            norm.weight[::3] *= -1
        if tracked:
            norm.num_batches_tracked.fill_(3)
    return norm


def noise(like: Tensor, seed: int) -> Tensor:
    """Random numbers that depend on the shape and the seed alone, with the dtype and on the device of `like`."""
    values = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return values.to(like.device, like.dtype)


def of_a_mean(output: Tensor, seed: int) -> Tensor:
    """The gradient behind a mean over the pixels: the same at all pixels of an image, so that roundings add up."""
    single = noise(output[:, :, :1, :1].detach().float(), seed) / output[0, 0].numel()
    return single.to(output.dtype).expand(output.shape)


def evaluate(implementation, problem: Call, wanted=(), first=(), noise=noise) -> dict[str, list[Tensor]]:
    """Everything that a call yields: output, BN buffers, and the gradients of the kinds in `wanted`.

    With `first`, those are the gradients of (gradients of the kinds in `first`) . noise instead, with the gradient of
    the incoming gradient ("cotangent") among them: second derivatives. noise: gives the incoming gradients.
    """
    problem.require({*wanted, *first})
    output = problem.run(implementation)
    results = {"output": [output.detach()]}
    for name in BUFFERS:
        found = [getattr(norm, name) for norm in problem.modules()]
        results[name] = [buffer.clone() for buffer in found if buffer is not None]
    if not wanted:
        return results
    kinds = {kind: problem.leaves(kind) for kind in wanted}
    cotangent = noise(output, 1).requires_grad_(bool(first))
    if first:
        of = [leaf for kind in first for leaf in problem.leaves(kind)]
        gradients = torch.autograd.grad(output, of, cotangent, create_graph=True, allow_unused=True)
        terms = [(g * noise(g, 2 + i)).sum() for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        output, incoming, kinds = sum(terms), None, kinds | {"cotangent": [cotangent]}
    else:
        incoming = cotangent
    flat = [leaf for leaves in kinds.values() for leaf in leaves]
    if flat and output.requires_grad:
        found = iter(torch.autograd.grad(output, flat, incoming, materialize_grads=True))
    else:  # "none" alone has no gradient
        found = iter([torch.zeros_like(leaf) for leaf in flat])
    return results | {f"gradient of {kind}": [next(found) for _ in leaves] for kind, leaves in kinds.items()}


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """|a - b| / |b| over all tensors of a kind."""
    size = math.sqrt(sum(t.double().square().sum().item() for t in b))
    error = math.sqrt(sum((s.double() - t.double()).square().sum().item() for s, t in zip(a, b)))
    return error / size if size else error


def assert_close(result: dict, exact: dict, plain: list[dict]) -> None:
    """The gate: no tensor further from the float64 reference than 3 times plain float32 PyTorch, plus 1e-6.

    The 1e-6 is relative to the size of the tensor, or to that of a typical one of its kind where that is larger (the
    gradient of a convolution before BN can vanish but for rounding), or absolute where all of the kind are zero.
    """
    assert result.keys() == exact.keys()
    for kind, expected in exact.items():
        if kind == "num_batches_tracked":
            assert result[kind] == expected
            continue
        assert len(result[kind]) == len(expected)
        total = math.sqrt(sum(t.square().sum().item() for t in expected))
        count = sum(t.numel() for t in expected)
        for index, tensor in enumerate(expected):
            found = result[kind][index]
            assert found.shape == tensor.shape and found.dtype == torch.float32
            if not tensor.numel():
                continue
            size = max(tensor.norm().item(), total * math.sqrt(tensor.numel() / count)) or 1.0
            usual = max((p[kind][index].double() - tensor).norm().item() for p in plain)
            error = (found.double() - tensor).norm().item()
            assert error <= 3 * usual + 1e-6 * size, f"{kind} {index}: {error / size:.2e}, usual {usual / size:.2e}"


def compare(
    draw: Callable[..., Call],
    reference,
    implementation,
    *,
    layout: str = "contiguous",
    wanted=(),
    first=(),
    change: Callable[[Call], None] | None = None,
    kink: float = 1e-5,
    device: str = "cpu",
    cotangent: Callable[[Tensor, int], Tensor] = noise,
    **how,
) -> None:
    """Compares an implementation with the float64 reference on `draw(seed, **how)`; see `evaluate` for wanted and first.

    A draw where plain float32 PyTorch is further than `kink` from float64 lies on a kink (a ReLU or a maximum inside
    that rounding turns around) and is replaced by the next. `change` edits the problem in place. All float32 runs on
    `device`, whose problems' `copy` then takes one; float64 on the CPU. cotangent: gives the incoming gradient.
    """

    def run(of, layout):
        copied = problem.copy(layout=layout) if device == "cpu" else problem.copy(layout=layout, device=device)
        results = evaluate(of, copied, wanted, first, cotangent)
        return {kind: [tensor.cpu() for tensor in tensors] for kind, tensors in results.items()}

    for seed in range(DRAWS):
        problem = draw(seed, **how)
        if change:
            change(problem)
        exact = evaluate(reference, problem.copy(torch.float64), wanted, first, cotangent)
        plain = [run(reference, name) for name in ("contiguous", "channels_last")]
        if all(distance(p[kind], exact[kind]) <= kink for p in plain for kind in exact):
            break
    else:
        pytest.fail(f"none of {DRAWS} draws is away from the kinks")
    assert_close(run(implementation, layout), exact, plain)


class Recorder(TorchDispatchMode):
    """Collects the calls of registered ops whose names begin so, with copies of their arguments."""

    def __init__(self, name: str):
        super().__init__()
        self.name = f"rnas::{name}"
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.name().startswith(self.name):
            arguments = torch.utils._pytree.tree_map_only(Tensor, _leaf, arguments)
            options = torch.utils._pytree.tree_map_only(Tensor, _leaf, options or {})
            self.calls.append((function, arguments, options))
        return function(*arguments, **(options or {}))

    def one_each(self) -> list:
        """The first call of every op. One without derivatives was called where none were asked for."""
        seen = {}
        for function, arguments, options in self.calls:
            if "double_backward" in function.name():
                arguments = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, arguments)
            seen.setdefault(function, (function, arguments, options))
        return list(seen.values())


def _leaf(tensor: Tensor) -> Tensor:
    """A copy, in the same layout, that is a leaf and asks for a gradient where the original does."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def opcheck(function, arguments, options) -> None:
    """torch.library.opcheck; without symbolic sizes where PyTorch cannot differentiate a convolution twice on them."""
    try:
        torch.library.opcheck(function, arguments, options)
    except OpCheckError as error:
        if "at::native::_convolution_double_backward" not in str(error):  # of PyTorch 2.11, say
            raise
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(function, arguments, options, test_utils=utilities)
