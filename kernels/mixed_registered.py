"""The registered ops of the mixed operation: a cell forward, its gradients, and second derivatives.

They take the parameters of all edges in one tensor, `theta`, and what belongs to norms in tables (B, C) of all B norms;
`scales` (E, N) multiply the images of each edge, on a CPU on batch statistics only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rnas.kernels import batched, engine, formats, fused
from rnas.kernels.mixed_composed import BETA, GAMMA, GRAD_OUT, STATES, THETA, WEIGHTS, second_derivatives
from rnas.kernels.registration import define_constant_op, define_differentiable_op


class Settings(NamedTuple):
    """The arguments of the registered ops that are not tensors. keep: as in rnas.kernels.fused."""

    primitives: str  # see engine.rows
    nodes: int
    stride: int
    pool_norm: bool
    eps: float
    keep: int
    last: bool
    planes_out: bool  # whether the result is channels first, else channels last
    planes_grad: bool  # likewise the gradients to the states


def _call(
    states: Sequence[Tensor],
    settings: Settings,
    planes_out: bool = False,
    planes_grad: bool = False,
    scaled: bool = False,
) -> tuple[tuple[int, ...], engine.Sizes]:
    """The shape as the compiled functions take it, and the sizes that follow from it."""
    on = engine.of(states[0])
    n, c, h, w = (int(size) for size in states[0].shape)
    last = settings.last and on.MAKES_LAST
    flags = map(int, (settings.pool_norm, last, planes_out, planes_grad, scaled))
    shape = (n, c, h, w, len(states), settings.nodes, settings.stride, *flags)
    return shape, on.sizes(shape, settings.primitives, on.image_dtype(states[0]))


def _outputs(states, batch_statistics, settings, sizes, take) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for what the forward op returns.

    The nodes that are asked for, the batch's mean and variance, what is kept; and all nodes, where they had to be made
    and lie in neither the first nor in what is kept. take: gives memory of so many bytes.
    """
    x, on = states[0], engine.of(states[0])
    size = (sizes.height_out, sizes.width_out)
    channels = settings.nodes * x.shape[1]
    layout = torch.contiguous_format if settings.planes_out else torch.channels_last
    out = formats.empty_in(layout, x, x.shape[1] if settings.last else channels, *size)
    table = (sizes.norms, x.shape[1]) if batch_statistics else (0,)
    activations = sizes.kept_activations if batch_statistics else sizes.kept_linear
    kept = (0, sizes.kept_masks, activations, sizes.kept_outputs)[settings.keep]
    all_nodes = x.new_empty(0)
    if on.image_dtype(x) != x.dtype:
        kept += 4 * x.shape[0] * channels * math.prod(size) if settings.keep else 0  # see _nodes
    elif settings.last and not on.MAKES_LAST:
        all_nodes = formats.empty_in(layout, x, channels, *size)
    return out, *(x.new_empty(table, dtype=torch.float32) for _ in range(2)), take(kept), all_nodes


def _forward(states, weights, theta, gamma, beta, mean, variance, scales, *settings):
    settings, on = Settings(*settings), engine.of(states[0])
    shape, sizes = _call(states, settings, settings.planes_out, scaled=scales is not None)
    rows = engine.rows(settings.primitives)
    if theta.numel() != sizes.theta or weights.numel() != sizes.edges * max(map(len, rows)):
        raise ValueError(f"expected {sizes.theta} parameters and weights of {sizes.edges} edges")
    if any(table is not None and table.shape != (sizes.norms, shape[1]) for table in (gamma, beta, mean, variance)):
        raise ValueError(f"expected tables of {sizes.norms} norms with {shape[1]} channels")
    if scales is not None and scales.shape != (sizes.edges, shape[0]):
        raise ValueError(f"expected scales of {sizes.edges} edges for {shape[0]} images")
    out, batch_mean, batch_variance, kept, all_nodes = _outputs(states, mean is None, settings, sizes, on.memory)
    dtype = on.image_dtype(states[0])
    raw = _nodes(_made(out, all_nodes), kept, dtype, settings, shape[1])
    images = on.images(states, dtype)
    tables = on.tables(weights, theta, gamma, beta, mean, variance, scales)
    workspace = on.workspace(sizes.workspace)  # held by its name until the call returns
    on.module.mixed_forward(
        shape,
        rows,
        fused.addresses([*images, *tables]),
        settings.eps,
        mean is None,
        settings.keep,
        *fused.addresses([raw, batch_mean, batch_variance, kept, workspace]),
        *on.place(dtype),
    )
    _put_back(raw, out)
    return out, batch_mean, batch_variance, kept, all_nodes


def _made(out: Tensor, all_nodes: Tensor) -> Tensor:
    """What the forward op has made: `all_nodes` where that is not empty."""
    return all_nodes if all_nodes.dim() == 4 else out


def _of_all_nodes(gradient: Tensor, channels: int) -> Tensor:
    """A gradient to all nodes, so many channels, from one that may be to the last alone."""
    missing = channels - gradient.shape[1]
    return F.pad(gradient, (0, 0, 0, 0, missing, 0)) if missing else gradient


def _nodes(out: Tensor, kept: Tensor, dtype: torch.dtype, settings: Settings, channels: int) -> Tensor:
    """The nodes in the dtype of the compiled functions: `out`, or float32 numbers behind everything else in `kept`.

    A backward pass on batch statistics has to see what they are the statistics of, not what that is rounded to.
    """
    if out.dtype == dtype:
        return out
    n, _, h, w = out.shape
    shape = (n, h, w, settings.nodes * channels)
    if settings.keep:
        nodes = kept[kept.numel() - 4 * math.prod(shape) :].view(dtype).view(shape)
    else:
        nodes = out.new_empty(shape, dtype=dtype)
    return nodes.permute(0, 3, 1, 2)


def _put_back(raw: Tensor, images: Tensor) -> None:
    """What a compiled function has written, or its last channels, where it could not write the images themselves."""
    if raw is not images:
        images.copy_(raw[:, raw.shape[1] - images.shape[1] :])


def _forward_fake(states, weights, theta, gamma, beta, mean, variance, scales, *settings):
    take, settings = functools.partial(fused.empty_bytes, device=states[0].device), Settings(*settings)
    _, sizes = _call(states, settings, scaled=scales is not None)
    return _outputs(states, mean is None, settings, sizes, take)


def _gradients(states, weights, theta, gamma, beta, wanted, planes: bool = False) -> list[Tensor | None]:
    """Tensors for the gradients that are wanted: of the states together, weights, theta, gamma and beta.

    wanted: one flag for each state, then four. Where one state's gradient is wanted and another's is not, that is zero.
    planes: whether those of the states are channels first.
    """
    n, c, h, w = states[0].shape
    of_states, images = wanted[: len(states)], None
    if any(of_states):
        images = fused.empty(states[0], (len(states), n, *((c, h, w) if planes else (h, w, c))))
        if not all(of_states):
            images.zero_()
        images = images if planes else images.permute(0, 1, 4, 2, 3)
    tables = (weights, theta, gamma, beta)
    return [images, *(t.new_empty(t.shape) if want else None for t, want in zip(tables, wanted[len(states) :]))]


def _backward(grad_out, states, out, kept, weights, theta, gamma, beta, mean, variance, scales, *rest):
    batch_statistics, wanted, *settings = rest
    settings, on = Settings(*settings), engine.of(states[0])
    if not on.MAKES_LAST:
        grad_out = _of_all_nodes(grad_out, settings.nodes * states[0].shape[1])
    planes = on.TAKES_PLANES and grad_out.is_contiguous()
    shape, sizes = _call(states, settings, planes, settings.planes_grad, scales is not None)
    of_states, *gradients = _gradients(states, weights, theta, gamma, beta, wanted, settings.planes_grad)
    dtype = on.image_dtype(states[0])
    raw = None if of_states is None else of_states.to(dtype)
    images, out = _read_images(on, states, out, kept, dtype, settings)
    tables = on.tables(weights, theta, gamma, beta, mean, variance, scales)
    if not planes:
        (grad_out,) = on.images([grad_out], dtype)
    workspace = on.workspace(sizes.workspace)
    on.module.mixed_backward(
        shape,
        engine.rows(settings.primitives),
        fused.addresses([*images, *tables]),
        settings.eps,
        batch_statistics,
        settings.keep,
        *fused.addresses([out, kept, grad_out]),
        fused.addresses(gradients),
        _addresses_of_states(raw, wanted),
        workspace.data_ptr(),
        *on.place(dtype),
    )
    if of_states is not None:
        _put_back(raw, of_states)
    return [gradient for gradient in (of_states, *gradients) if gradient is not None]


def _read_images(on, states, out, kept, dtype: torch.dtype, settings: Settings):
    """The states and the nodes as a backward pass reads them; None where it does not."""
    if settings.keep == fused.MASKS:
        return [None] * len(states), None
    if not on.READS_NODES:
        return on.images(states, dtype), None
    *images, nodes = on.images([*states, _nodes(out, kept, dtype, settings, states[0].shape[1])], dtype)
    return images, nodes


def _addresses_of_states(images: Tensor | None, wanted: Sequence[bool]) -> list[int]:
    if images is None:
        return []
    return [image.data_ptr() if want else 0 for image, want in zip(images.unbind(), wanted)]


def _backward_fake(grad_out, states, out, kept, weights, theta, gamma, beta, mean, variance, scales, *rest):
    _, wanted, *settings = rest
    gradients = _gradients(states, weights, theta, gamma, beta, wanted, Settings(*settings).planes_grad)
    return [gradient for gradient in gradients if gradient is not None]


def _double_backward(
    direction, grad_out, states, out, kept, weights, theta, gamma, beta, mean, variance, scales, wanted, *settings
):
    settings, on = Settings(*settings), engine.of(states[0])
    shape, sizes = _call(states, settings, scaled=scales is not None)
    dtype = on.image_dtype(states[0])
    _, *gradients = _gradients(states, weights, theta, gamma, beta, [*[False] * len(states), *wanted, False])
    images, out = _read_images(on, states, out, kept, dtype, settings)
    tables = on.tables(weights, theta, gamma, beta, mean, variance, scales)
    grad_grad_out = formats.empty_image(grad_out, *grad_out.shape[1:])
    if not on.MAKES_LAST:
        grad_out = _of_all_nodes(grad_out, settings.nodes * shape[1])
    fits = grad_out.shape == grad_grad_out.shape and grad_out.dtype == dtype
    raw = grad_grad_out if fits else formats.empty_image(grad_out, *grad_out.shape[1:]).to(dtype)
    grad_out, *along = on.images([grad_out, *direction.unbind()], dtype)
    along_kept = None if settings.keep == fused.MASKS else on.memory(sizes.kept_linear)
    workspace = on.workspace(sizes.workspace)
    on.module.mixed_double_backward(
        shape,
        engine.rows(settings.primitives),
        fused.addresses([*images, *tables]),
        settings.eps,
        settings.keep,
        *fused.addresses([out, kept, grad_out]),
        fused.addresses(along),
        *fused.addresses([raw, along_kept]),
        fused.addresses(gradients),
        workspace.data_ptr(),
        *on.place(dtype),
    )
    _put_back(raw, grad_grad_out)
    return [grad_grad_out, *(gradient for gradient in gradients if gradient is not None)]


def _double_backward_fake(
    direction, grad_out, states, out, kept, weights, theta, gamma, beta, mean, variance, scales, wanted, *settings
):
    _, *gradients = _gradients(states, weights, theta, gamma, beta, [*[False] * len(states), *wanted, False])
    grad_grad_out = formats.empty_image(grad_out, *grad_out.shape[1:])
    return [grad_grad_out, *(gradient for gradient in gradients if gradient is not None)]


@formats.with_any_format
class _Forward(torch.autograd.Function):
    """`images` are the states and, where only masks are kept, a link to each of them."""

    @staticmethod
    def forward(ctx, count, settings, weights, theta, gamma, beta, mean, variance, scales, *images):
        states, links = images[:count], images[count:]
        with torch._C._AutoDispatchBelowAutograd():
            out, batch_mean, batch_variance, kept, all_nodes = forward_op(
                list(states), weights, theta, gamma, beta, mean, variance, scales, *settings
            )
        ctx.count, ctx.settings, ctx.batch_statistics = count, settings, mean is None
        statistics = (batch_mean, batch_variance) if mean is None else (mean, variance)
        # Where nobody reads the nodes others may change them in place; then something small stands for them.
        read = _made(out, all_nodes) if engine.of(out).READS_NODES else batch_mean
        saved = [read, kept, weights, theta, gamma, beta, *statistics, scales, *states]
        if settings.keep == fused.MASKS:  # they say all that counts of the states and nodes
            tables = [None if table is None else table.detach() for table in saved[2:9]]  # constants from here on
            saved = [fused.shape_of(out), kept, *tables, *map(fused.shape_of, states)]
        ctx.save_for_backward(*saved, *links)
        ctx.mark_non_differentiable(batch_mean, batch_variance, kept, all_nodes)
        ctx.set_materialize_grads(False)  # else zeros as large as `kept` would be made for it
        return out, batch_mean, batch_variance, kept, all_nodes

    @staticmethod
    @batched.one_at_a_time
    def backward(ctx, grad_out, *_):
        needs = ctx.needs_input_grad
        if grad_out is None:
            return (None,) * len(needs)
        of_states = needs[9 : 9 + ctx.count]
        wanted = [*of_states, *needs[2:6]]
        saved = ctx.saved_tensors  # read once: a checkpoint counts the reads
        out, kept, *tables = saved[:9]
        states, links = saved[9 : 9 + ctx.count], saved[9 + ctx.count :]
        if links and torch.is_grad_enabled():
            tensors = (grad_out, out, kept, *tables, *states, *links)
            found = _Backward.apply(ctx.count, ctx.batch_statistics, wanted, ctx.settings, *tensors)
        else:
            options = (ctx.batch_statistics, wanted, *ctx.settings)
            found = _backward_op(grad_out, list(states), out, kept, *tables, *options)
        found = iter(found)
        images = next(found).unbind() if any(of_states) else [None] * ctx.count
        gradients = [next(found) if want else None for want in wanted[ctx.count :]]
        images = [image if need else None for image, need in zip(images, of_states)]
        return None, None, *gradients, None, None, None, *images, *(None for _ in links)


class _Backward(torch.autograd.Function):
    """`tensors` are those of the op, the states and perhaps links behind them."""

    @staticmethod
    def forward(ctx, count, batch_statistics, wanted, settings, *tensors):
        grad_out, *rest = tensors[:STATES]
        states = list(tensors[STATES : STATES + count])
        with torch._C._AutoDispatchBelowAutograd():
            found = _backward_op(grad_out, states, *rest, batch_statistics, wanted, *settings)
        ctx.count, ctx.batch_statistics, ctx.wanted, ctx.settings = count, batch_statistics, wanted, settings
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @batched.one_at_a_time
    def backward(ctx, *directions):
        if all(direction is None for direction in directions):
            return (None,) * len(ctx.needs_input_grad)
        of_states = any(ctx.wanted[: ctx.count])
        only_states = of_states and all(direction is None for direction in directions[1:])
        if only_states and not ctx.batch_statistics and not torch.is_grad_enabled():
            return None, None, None, None, *_second_linear(ctx, directions)
        if ctx.settings.keep == fused.MASKS:
            raise RuntimeError(
                "mixed_op: only masks were kept, as nothing but the states required a gradient; they do not give third "
                "derivatives. Let the mixing weights require a gradient, or set RNAS_BACKEND=reference"
            )
        return None, None, None, None, *second_derivatives(ctx, directions)


def _second_linear(ctx, directions):
    """On fixed statistics a cell is linear between its kinks: one pass along the direction gives everything."""
    saved = ctx.saved_tensors
    grad_out, *rest = saved[:STATES]
    states = list(saved[STATES : STATES + ctx.count])
    needs = ctx.needs_input_grad[4:]
    wanted = [needs[WEIGHTS], needs[THETA], needs[GAMMA]]
    found = iter(_double_backward_op(directions[0], grad_out, states, *rest, wanted, *ctx.settings))
    gradients = [None] * len(needs)
    for position in (BETA, *range(STATES, len(needs))):
        gradients[position] = torch.zeros_like(saved[position]) if needs[position] else None
    gradients[GRAD_OUT] = next(found)
    for position, want in zip((WEIGHTS, THETA, GAMMA), wanted):
        gradients[position] = next(found) if want else None
    return gradients


_TABLES = "Tensor weights, Tensor theta, Tensor? gamma, Tensor? beta"
_SETTINGS = "str primitives, int nodes, int stride, bool pool_norm, float eps, int keep, bool last, bool planes_out, "
_SETTINGS += "bool planes_grad"
_SAVED = f"Tensor grad_out, Tensor[] states, Tensor out, Tensor kept, {_TABLES}, Tensor mean, Tensor variance, "
_SAVED += "Tensor? scales"


def _forward_autograd(states, weights, theta, gamma, beta, mean, variance, scales, *settings):
    settings = Settings(*settings)
    links = [fused.Link.apply(state) for state in states] if settings.keep == fused.MASKS else []
    tables = (weights, theta, gamma, beta, mean, variance, scales)
    return _Forward.apply(len(states), settings, *tables, *states, *links)


def _backward_autograd(grad_out, states, *rest):
    *tensors, batch_statistics, wanted = rest[:11]
    settings = Settings(*rest[11:])
    return list(_Backward.apply(len(states), batch_statistics, wanted, settings, grad_out, *tensors, *states))


forward_op = define_differentiable_op(
    f"mixed_cell_forward(Tensor[] states, {_TABLES}, Tensor? mean, Tensor? variance, Tensor? scales, "
    f"{_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _forward_autograd,
)
_backward_op = define_differentiable_op(
    f"mixed_cell_backward({_SAVED}, bool batch_statistics, bool[] wanted, {_SETTINGS}) -> Tensor[]",
    _backward,
    _backward_fake,
    _backward_autograd,
)
_double_backward_op = define_constant_op(
    f"mixed_cell_double_backward(Tensor direction, {_SAVED}, bool[] wanted, {_SETTINGS}) -> Tensor[]",
    _double_backward,
    _double_backward_fake,
)
