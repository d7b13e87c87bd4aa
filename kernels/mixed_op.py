"""The mixed operation of differentiable architecture search: all candidates of an edge, weighted and summed, fused.

`mixed_op` is one edge, `mixed_cell` a cell of them, which computes what its edges share once. Both take parameters and
BN modules as they lie in a supernet, and are differentiable, twice too, in the images, the mixing weights, the
convolution weights and the affine parameters of the norms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rnas.kernels import backend, batched, engine, formats, fused, partial
from rnas.kernels import mixed_arguments as arguments
from rnas.kernels.reference import mixed_op as reference
from rnas.kernels.registration import define_constant_op, define_differentiable_op

PRIMITIVES = reference.PRIMITIVES


def mixed_op(
    x: Tensor,
    weights: Tensor,
    parameters: Sequence[Tensor],
    norms: Sequence[nn.BatchNorm2d],
    *,
    primitives: tuple[str, ...],
    stride: int = 1,
    pool_norm: bool = True,
    partial: int = 1,
) -> Tensor:
    """One mixed edge: `sum_k weights[k] * primitive_k(x)`.

    Args:
        x: (N, C, H, W) the source state, floating-point, contiguous or channels_last.
        weights: (K,) mixing weights: a softmax, log-normal samples, one-hot, anything. Of the dtype of x, or float32.
        parameters: the convolution weights as PyTorch stores them, in the order and shapes of
            `parameter_shapes(primitives, C, stride)`.
        norms: the BN modules in the order in which the primitives meet them, as many as
            `norm_count(primitives, stride, pool_norm)` says. Each is used as if it were called: its training flag
            decides between batch and running statistics, and in training mode its running averages move.
        primitives: the names of the K candidates, each at most once: none, skip_connect (at stride 2 FactorizedReduce),
            max_pool_3x3, avg_pool_3x3, sep_conv_3x3, sep_conv_5x5, dil_conv_3x3, dil_conv_5x5, conv_1x1, conv_3x3; and
            ones, an image of ones: its weight is a number that is added, as GDAS adds those of unsampled candidates.
        stride: 1 or 2.
        pool_norm: whether each pool is followed by a BN, as in DARTS.
        partial: K of PC-DARTS: the first C / K channels go through the candidates, the rest go around them (at stride 2
            through a 2x2 max pool), and the channels are shuffled. Parameters and norms are those of C / K channels.

    Returns:
        (N, C, ceil(H / stride), ceil(W / stride)), channels_last where `x` is and else contiguous.

    Only the gradients that are asked for are computed, and only what they need is kept: signs and winners (a few bits
    per element) where statistics are fixed and nothing but `x` requires a gradient; else one activation per separable
    convolution, the nodes of a cell but for the last, and on batch statistics the results of the dense 3x3 convolutions
    and, from 32 channels on, of the 5x5 ones, or, where the convolution weights require no gradient, the results of all
    convolutions, but of 1x1 ones on a CPU at most a covariance of what enters them; on a GPU, one activation per
    separable convolution and the result, wherever anything requires a gradient. Bit for bit the same for the same
    inputs and, on a CPU, number of threads. On a GPU nothing waits for the device, so that a CUDA graph can capture the
    call.
    The fused kernels serve float32, on a GPU also bfloat16 and float16; calls that they do not cover (float64, norms
    that disagree on mode, eps or dtype, autocast on a CPU) go to plain PyTorch, and so does a second derivative on
    batch statistics.

    In bfloat16 and float16 the kernels compute and add up in float32, and round each image once; parameters are those
    of a converted model, of whose norms all or the running averages may be float32. Under autocast on a GPU `x` is cast
    to its dtype, which the result has, while everything else stays as it is, gradients included. Where C is no multiple
    of 4 they run as float32 between two conversions.

    Equivalent to::

        sum(weight * candidate(x) for weight, candidate in zip(weights, candidates))

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message says what was expected.
        RuntimeError: an input carries a forward-mode tangent on the fused path, or `RNAS_BACKEND` forces a backend that
            cannot serve the call.

    Source: Liu, Simonyan, Yang, DARTS (ICLR 2019), equation 2; Xu et al., PC-DARTS (arXiv 1907.05737), section 3.1.
    """
    arguments.check_state("x", x)
    names = arguments.row_of(primitives)
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor of shape ({len(names)},), got {type(weights).__name__}")
    if weights.dim() != 1:
        raise ValueError(
            f"weights must have shape ({len(names)},), one number per primitive; got {tuple(weights.shape)}"
        )
    return mixed_cell(
        (x,),
        weights[None],
        (parameters,),
        (norms,),
        primitives=names,
        nodes=1,
        stride=stride,
        pool_norm=pool_norm,
        partial=partial,
    )


def mixed_cell(
    states: Sequence[Tensor],
    weights: Tensor,
    parameters: Sequence[Sequence[Tensor]],
    norms: Sequence[Sequence[nn.BatchNorm2d]],
    *,
    primitives: reference.Primitives,
    nodes: int,
    stride: int = 1,
    pool_norm: bool = True,
    partial: int = 1,
    edge_weights: Tensor | None = None,
    last: bool = False,
    biases: Sequence[Sequence[Tensor | None]] | None = None,
) -> Tensor:
    """A cell of mixed edges: node j is the sum of the edges from all S input states and all nodes before it.

    Args:
        states: the S input states, (N, C, H, W) each.
        weights: (E, K) mixing weights, edges node by node and source by source: E = sum over j of (S + j).
        parameters, norms: those of `mixed_op` for each of the E edges.
        primitives: as in `mixed_op`, common to all edges; or such a tuple for each of the E edges. K is then the length
            of the longest, and weights behind the last primitive of an edge are not read. An empty one: no edge.
        pool_norm, partial: as in `mixed_op`, common to all edges.
        nodes: J.
        stride: 1 or 2, of the edges that leave the input states; edges between nodes have stride 1.
        edge_weights: (E,) numbers by which the edges are multiplied, as in PC-DARTS; None for ones.
        last: whether the last node alone is wanted, as in NAS-Bench-201. The others are then not written out.
        biases: (C,) or None for each norm of each edge: of the convolution in front of it. On batch statistics they
            change nothing but running averages, and their gradients are zero. None: there are none at all.

    Returns:
        (N, J * C, ceil(H / stride), ceil(W / stride)): the nodes, concatenated along the channels, or with `last`
        (N, C, ceil(H / stride), ceil(W / stride)); channels_last where the first state is and else contiguous.

    What depends on a state alone (its ReLU, its pools) is computed once for all edges that leave it. With partial
    channels the edges into a node are one fused call (two where they differ in stride), and their sum is shuffled once.
    All else, errors included, is as in `mixed_op`.

    Equivalent to::

        for node in range(nodes):
            into = [mixed_op(state, ..., partial=partial) for state in states]  # with the rows of each edge
            states = [*states, sum(weight * edge for weight, edge in zip(edge_weights_of_node, into))]
        states[-1] if last else torch.cat(states[S:], dim=1)

    Source: Liu, Simonyan, Yang, DARTS (ICLR 2019); Xu et al., PC-DARTS (arXiv 1907.05737), sections 3.1 (partial
    channels) and 3.2 (edge weights, there a softmax over the edges into a node).
    """
    states = arguments.check_states(states)
    arguments.check_options(nodes, stride)
    x = states[0]
    channels = arguments.check_partial(partial, int(x.shape[1]))
    names = arguments.rows_of(primitives, nodes * len(states) + nodes * (nodes - 1) // 2)
    edges = arguments.edges_of(names, len(states), nodes, stride, bool(pool_norm), channels)
    arguments.check_weights(x, weights, names, len(edges.shapes))
    arguments.check_groups(parameters, norms, len(edges.shapes))
    read = arguments.read_parameters(x, channels, parameters, norms, edges)
    if edge_weights is not None:
        arguments.check_edge_weights(x, edge_weights, len(edges.shapes))
    if biases is not None:
        arguments.check_biases(x, channels, biases, norms)
        read = (read[0], fused.read_norms(_flattened(norms), channels, _flattened(biases)))
    options = (names, nodes, stride, bool(pool_norm), partial, edge_weights, bool(last) and nodes > 1, biases)
    call = _Call(states, weights, parameters, norms, *options, *read)
    on = engine.of(x)
    autocast = on.autocast_dtype(x)
    if call.norms_read.on_batch and x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride) == 1:
        raise ValueError(
            f"batch statistics need more than 1 value per channel, got states of shape {tuple(x.shape)} at stride "
            f"{stride}; pass more images or call .eval() on the norms"
        )
    obstacle = fused.obstacle(x, call.norms_read, autocast) or on.obstacle(channels)
    if autocast and len({parameter.dtype for edge in parameters for parameter in edge}) > 1:
        obstacle = obstacle or "the parameters differ in dtype"
    run = OP.choose(x.device, autocast or x.dtype, obstacle)
    return formats.arranged(run(call), formats.layout(x))


def arrange(x: Tensor) -> Tensor:
    """Images (N, C, H, W) in the memory format in which the mixed operation will take them without a copy.

    Equivalent to: x.contiguous(memory_format=torch.channels_last) where a compiled kernel serves x, else x itself.
    """
    serving, _ = OP.decide(x.device, x.dtype)
    return formats.arranged(x, torch.channels_last) if serving in ("cpu", "cuda") else x


def _flattened(rows: Sequence[Sequence]) -> list:
    return [each for row in rows for each in row]


# ---- what the fused op takes -----------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A checked call of mixed_cell."""

    states: tuple[Tensor, ...]
    weights: Tensor
    parameters: Sequence[Sequence[Tensor]]
    norms: Sequence[Sequence[nn.BatchNorm2d]]
    primitives: tuple[tuple[str, ...], ...]  # one row for all edges, or one for each
    nodes: int
    stride: int
    pool_norm: bool
    partial: int
    edge_weights: Tensor | None
    last: bool
    biases: Sequence[Sequence[Tensor | None]] | None
    arrays: object | None  # the parameters as compiled code has read them
    norms_read: fused.Norms | fused.CompiledNorms


class _Settings(NamedTuple):
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


def _fused(call: _Call) -> Tensor:
    autocast = engine.of(call.states[0]).autocast_dtype(call.states[0])
    if autocast is None:
        return _mix(call)
    with fused.without_autocast(call.states[0]):
        return _mix(call._replace(states=tuple([state.to(autocast) for state in call.states])))


def _mix(call: _Call) -> Tensor:
    weights = call.weights if call.edge_weights is None else call.weights * call.edge_weights[:, None]
    if call.partial == 1:
        theta = _flat([parameter for edge in call.parameters for parameter in edge], call.states[0], call.arrays)
        options = (call.primitives, call.nodes, call.stride, call.last, call, *_planes(call.states))
        return _cell(list(map(formats.taken, call.states)), weights, theta, call.norms_read, *options)
    nodes = _partial_cell(call, weights)
    return nodes[-1] if call.last else torch.cat(nodes, dim=1)


def _planes(states: Sequence[Tensor]) -> tuple[bool, bool]:
    """Whether the kernels are to make the result of a cell on these, and the gradients to them, channels first."""
    if torch.compiler.is_compiling() or not engine.of(states[0]).TAKES_PLANES:  # rearranged behind the op
        return False, False
    planes = [formats.layout(state) == torch.contiguous_format for state in states]
    return planes[0], all(planes) and not any(map(formats.takes_any_format, states))


def _partial_cell(call: _Call, weights: Tensor) -> list[Tensor]:
    """The nodes of a cell with partial channels.

    The shuffle is linear and common to the edges into a node, so it takes their sum.

    weights: those of the candidates times those of the edges.
    """
    parameters, norms = list(call.parameters), list(call.norms)
    scales = call.edge_weights
    layout = formats.layout(call.states[0])  # kept, as most channels only go around
    nodes, through, around, edge = [], [], [], 0
    channels = call.states[0].shape[1] // call.partial
    options = (call.nodes, call.stride, call.pool_norm, channels)
    shapes = arguments.edges_of(call.primitives, len(call.states), *options).shapes
    names = arguments.of_each_edge(call.primitives, len(shapes))
    for node in range(call.nodes):
        for state in nodes[-1:] if node else call.states:
            mixed, other = reference.split_channels(state, call.partial, 1 if node else call.stride)
            through.append(formats.arranged(mixed, torch.channels_last))  # once for all edges that leave it
            around.append(other)
        first = edge
        total, inputs = 0, len(call.states) if call.stride == 2 else len(through)
        for sources, stride in ((through[:inputs], call.stride), (through[inputs:], 1)):
            if sources:
                rows = slice(edge, edge + len(sources))
                shifts = None if call.biases is None else _flattened(call.biases[rows])
                read = fused.read_norms(_flattened(norms[rows]), channels, shifts)
                arrays = fused.read_arrays(parameters[rows], shapes[rows])
                theta = _flat([parameter for each in parameters[rows] for parameter in each], sources[0], arrays)
                longest = max(map(len, names[rows]))
                options = (names[rows], 1, stride, False, call)
                total = total + _cell(sources, weights[rows, :longest], theta, read, *options)
                edge = rows.stop
        nodes.append(partial.join(total, around, None if scales is None else scales[first:edge], call.partial, layout))
    return nodes


def _cell(
    states,
    weights,
    theta,
    norms,
    names,
    nodes: int,
    stride: int,
    last: bool,
    call: _Call,
    planes_out: bool = False,
    planes_grad: bool = False,
) -> Tensor:
    """A cell all of whose channels are mixed, with the other options of `call`, states in the kernels' memory format.

    names: as `_Call.primitives`. planes: as `_Settings`.
    """
    x = states[0]
    gamma, beta = norms.affine(x)
    mean, variance = norms.statistics(x)
    if x.dtype != torch.float32:  # images alone have 16 bits
        tables = (weights, theta, gamma, beta, mean, variance)
        weights, theta, gamma, beta, mean, variance = [None if t is None else t.float() for t in tables]
    keep = engine.of(x).what_to_keep(states, (weights, theta, gamma, beta), norms.on_batch)
    primitives = ";".join([",".join(row) for row in arguments.once(names)])
    settings = _Settings(primitives, nodes, stride, call.pool_norm, norms.eps, keep, last, planes_out, planes_grad)
    tables = (weights, theta, gamma, beta, mean, variance)
    out, mean, variance, *_ = _forward_op(list(states), *tables, *settings)
    if norms.on_batch:
        norms.move_averages(mean, variance, out.shape[0] * out.shape[2] * out.shape[3])
    return out


def _shifted(norm: nn.BatchNorm2d, bias: Tensor | None):
    """The norm of images plus the bias."""
    return norm if bias is None else lambda y: norm(y + bias[:, None, None])


def _reference(call: _Call) -> Tensor:
    norms = call.norms
    if call.biases is not None:
        norms = [list(map(_shifted, *each)) for each in zip(norms, call.biases)]
    nodes = reference.mixed_cell(
        call.states,
        call.weights,
        call.parameters,
        norms,
        primitives=call.primitives if len(call.primitives) > 1 else call.primitives[0],
        nodes=call.nodes,
        stride=call.stride,
        pool_norm=call.pool_norm,
        partial=call.partial,
        edge_weights=call.edge_weights,
    )
    return nodes[:, -call.states[0].shape[1] :].clone() if call.last else nodes


def _flat(tensors: list[Tensor], x: Tensor, arrays=None) -> Tensor:
    """All of them behind one another, as a tensor of one dimension. arrays: them, as compiled code has read them."""
    if not tensors:
        return x.new_empty(0)
    if len(tensors) == 1 or fused.is_watched(()):
        return torch.cat([tensor.reshape(-1) for tensor in tensors])
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors]):
        return _Flat.apply(arrays, *tensors)
    return _flatten(arrays, tensors)


def _flatten(arrays, tensors: Sequence[Tensor]) -> Tensor:
    if arrays is None:
        return torch._C._nn.flatten_dense_tensors(tensors)
    out = torch.empty(arrays.size, device="cpu", dtype=torch.float32)
    arrays.copy(out.data_ptr())
    return out


class _Flat(torch.autograd.Function):
    """`_flat` as one node of the graph, where concatenating reshaped tensors would make two per tensor."""

    @staticmethod
    def forward(ctx, arrays, *tensors):  # a `setup_context` would take as long as the rest
        ctx.like = tensors  # for their shapes
        return _flatten(arrays, tensors)

    @staticmethod
    @batched.one_at_a_time
    def backward(ctx, gradient):
        found = torch._C._nn.unflatten_dense_tensors(gradient, ctx.like)
        return None, *[each if need else None for each, need in zip(found, ctx.needs_input_grad[1:])]


# ---- the registered ops ----------------------------------------------------------------------------------------------


def _call(
    states: Sequence[Tensor], settings: _Settings, planes_out: bool = False, planes_grad: bool = False
) -> tuple[tuple[int, ...], engine.Sizes]:
    """The shape as the compiled functions take it, and the sizes that follow from it."""
    on = engine.of(states[0])
    n, c, h, w = (int(size) for size in states[0].shape)
    last = settings.last and on.MAKES_LAST
    flags = map(int, (settings.pool_norm, last, planes_out, planes_grad))
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


def _forward(states, weights, theta, gamma, beta, mean, variance, *settings):
    settings, on = _Settings(*settings), engine.of(states[0])
    shape, sizes = _call(states, settings, settings.planes_out)
    rows = engine.rows(settings.primitives)
    if theta.numel() != sizes.theta or weights.numel() != sizes.edges * max(map(len, rows)):
        raise ValueError(f"expected {sizes.theta} parameters and weights of {sizes.edges} edges")
    if any(table is not None and table.shape != (sizes.norms, shape[1]) for table in (gamma, beta, mean, variance)):
        raise ValueError(f"expected tables of {sizes.norms} norms with {shape[1]} channels")
    out, batch_mean, batch_variance, kept, all_nodes = _outputs(states, mean is None, settings, sizes, on.memory)
    dtype = on.image_dtype(states[0])
    raw = _nodes(_made(out, all_nodes), kept, dtype, settings, shape[1])
    images = on.images(states, dtype)
    tables = on.tables(weights, theta, gamma, beta, mean, variance)
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


def _nodes(out: Tensor, kept: Tensor, dtype: torch.dtype, settings: _Settings, channels: int) -> Tensor:
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


def _forward_fake(states, weights, theta, gamma, beta, mean, variance, *settings):
    take, settings = functools.partial(fused.empty_bytes, device=states[0].device), _Settings(*settings)
    _, sizes = _call(states, settings)
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


def _backward(
    grad_out, states, out, kept, weights, theta, gamma, beta, mean, variance, batch_statistics, wanted, *settings
):
    settings, on = _Settings(*settings), engine.of(states[0])
    if not on.MAKES_LAST:
        grad_out = _of_all_nodes(grad_out, settings.nodes * states[0].shape[1])
    planes = on.TAKES_PLANES and grad_out.is_contiguous()
    shape, sizes = _call(states, settings, planes, settings.planes_grad)
    of_states, *gradients = _gradients(states, weights, theta, gamma, beta, wanted, settings.planes_grad)
    dtype = on.image_dtype(states[0])
    raw = None if of_states is None else of_states.to(dtype)
    images, out = _read_images(on, states, out, kept, dtype, settings)
    tables = on.tables(weights, theta, gamma, beta, mean, variance)
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


def _read_images(on, states, out, kept, dtype: torch.dtype, settings: _Settings):
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


def _backward_fake(
    grad_out, states, out, kept, weights, theta, gamma, beta, mean, variance, batch_statistics, wanted, *settings
):
    gradients = _gradients(states, weights, theta, gamma, beta, wanted, _Settings(*settings).planes_grad)
    return [gradient for gradient in gradients if gradient is not None]


def _double_backward(
    direction, grad_out, states, out, kept, weights, theta, gamma, beta, mean, variance, wanted, *settings
):
    settings, on = _Settings(*settings), engine.of(states[0])
    shape, sizes = _call(states, settings)
    dtype = on.image_dtype(states[0])
    _, *gradients = _gradients(states, weights, theta, gamma, beta, [*[False] * len(states), *wanted, False])
    images, out = _read_images(on, states, out, kept, dtype, settings)
    tables = on.tables(weights, theta, gamma, beta, mean, variance)
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
    direction, grad_out, states, out, kept, weights, theta, gamma, beta, mean, variance, wanted, *settings
):
    _, *gradients = _gradients(states, weights, theta, gamma, beta, [*[False] * len(states), *wanted, False])
    grad_grad_out = formats.empty_image(grad_out, *grad_out.shape[1:])
    return [grad_grad_out, *(gradient for gradient in gradients if gradient is not None)]


@formats.with_any_format
class _Forward(torch.autograd.Function):
    """`images` are the states and, where only masks are kept, a link to each of them."""

    @staticmethod
    def forward(ctx, count, settings, weights, theta, gamma, beta, mean, variance, *images):
        states, links = images[:count], images[count:]
        with torch._C._AutoDispatchBelowAutograd():
            out, batch_mean, batch_variance, kept, all_nodes = _forward_op(
                list(states), weights, theta, gamma, beta, mean, variance, *settings
            )
        ctx.count, ctx.settings, ctx.batch_statistics = count, settings, mean is None
        statistics = (batch_mean, batch_variance) if mean is None else (mean, variance)
        # Where nobody reads the nodes others may change them in place.
        read = _made(out, all_nodes) if engine.of(out).READS_NODES else fused.shape_of(out)
        saved = [read, kept, weights, theta, gamma, beta, *statistics, *states]
        if settings.keep == fused.MASKS:  # they say all that counts of the states and nodes
            tables = [None if table is None else table.detach() for table in saved[2:8]]  # constants from here on
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
        of_states = needs[8 : 8 + ctx.count]
        wanted = [*of_states, *needs[2:6]]
        saved = ctx.saved_tensors  # read once: a checkpoint counts the reads
        out, kept, *tables = saved[:8]
        states, links = saved[8 : 8 + ctx.count], saved[8 + ctx.count :]
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
        return None, None, *gradients, None, None, *images, *(None for _ in links)


class _Backward(torch.autograd.Function):
    """`tensors` are those of the op, the states and perhaps links behind them."""

    @staticmethod
    def forward(ctx, count, batch_statistics, wanted, settings, *tensors):
        grad_out, *rest = tensors[:9]
        states = list(tensors[9 : 9 + count])
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
        return None, None, None, None, *_second_composed(ctx, directions)


# Positions of the tensors that _Backward takes and can be differentiated by; the states come behind.
_GRAD_OUT, _WEIGHTS, _THETA, _GAMMA, _BETA, _STATES = 0, 3, 4, 5, 6, 9


def _second_linear(ctx, directions):
    """On fixed statistics a cell is linear between its kinks: one pass along the direction gives everything."""
    saved = ctx.saved_tensors
    grad_out, *rest = saved[:9]
    states = list(saved[9 : 9 + ctx.count])
    needs = ctx.needs_input_grad[4:]
    wanted = [needs[_WEIGHTS], needs[_THETA], needs[_GAMMA]]
    found = iter(_double_backward_op(directions[0], grad_out, states, *rest, wanted, *ctx.settings))
    gradients = [None] * len(needs)
    for position in (_BETA, *range(_STATES, len(needs))):
        gradients[position] = torch.zeros_like(saved[position]) if needs[position] else None
    gradients[_GRAD_OUT] = next(found)
    for position, want in zip((_WEIGHTS, _THETA, _GAMMA), wanted):
        gradients[position] = next(found) if want else None
    return gradients


def _second_composed(ctx, directions):
    """By plain PyTorch."""
    tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[4:]
    positions = [*range(_STATES, _STATES + ctx.count), _WEIGHTS, _THETA, _GAMMA, _BETA]
    directions, of_states = list(directions), ctx.wanted[: ctx.count]
    if any(of_states):
        along = [None] * ctx.count if directions[0] is None else directions[0].unbind()
        directions[:1] = [each for each, want in zip(along, of_states) if want]
    statistics = (None, None) if ctx.batch_statistics else tensors[7:9]

    def cell(*inputs):
        nodes = _composed(inputs[: ctx.count], *inputs[ctx.count :], *statistics, ctx.settings)
        return nodes[:, -tensors[_GRAD_OUT].shape[1] :]

    with fused.without_autocast(tensors[_STATES]):
        found = fused.differentiate_twice(
            cell,
            [tensors[position] for position in positions],
            tensors[_GRAD_OUT],
            ctx.wanted,
            directions,
            [needs[position] for position in (_GRAD_OUT, *positions)],
        )
    gradients = [None] * len(needs)
    for position, gradient in zip((_GRAD_OUT, *positions), found):
        gradients[position] = gradient
    return gradients


def _composed(states, weights, theta, gamma, beta, mean, variance, settings: _Settings) -> Tensor:
    """The cell by the plain-PyTorch definition, from the packed parameters. mean None: batch statistics.

    In the dtype of the parameters; rounded once to that of the states.
    """
    images, states = states[0].dtype, [state.to(theta.dtype) for state in states]
    rows, channels = tuple(map(tuple, engine.rows(settings.primitives))), int(states[0].shape[1])
    names = arguments.of_each_edge(rows, len(weights))
    parameters, norms, at, row = [], [], 0, 0
    for node in range(settings.nodes):
        for source in range(len(states) + node):
            stride = settings.stride if source < len(states) else 1
            edge, primitives = [], names[len(parameters)]
            for shape in reference.parameter_shapes(primitives, channels, stride):
                size = torch.Size(shape).numel()
                edge.append(theta[at : at + size].view(shape))
                at += size
            parameters.append(edge)
            count = reference.norm_count(primitives, stride, settings.pool_norm)
            tables = (mean, variance, gamma, beta)
            norms.append(
                [
                    functools.partial(_norm, *(None if t is None else t[each] for t in tables), settings.eps)
                    for each in range(row, row + count)
                ]
            )
            row += count
    out = reference.mixed_cell(
        states,
        weights,
        parameters,
        norms,
        primitives=names,
        nodes=settings.nodes,
        stride=settings.stride,
        pool_norm=settings.pool_norm,
    )
    return out.to(images)


def _norm(mean, variance, gamma, beta, eps: float, x: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, training=mean is None, eps=eps)


_TABLES = "Tensor weights, Tensor theta, Tensor? gamma, Tensor? beta"
_SETTINGS = "str primitives, int nodes, int stride, bool pool_norm, float eps, int keep, bool last, bool planes_out, "
_SETTINGS += "bool planes_grad"
_SAVED = f"Tensor grad_out, Tensor[] states, Tensor out, Tensor kept, {_TABLES}, Tensor mean, Tensor variance"


def _forward_autograd(states, weights, theta, gamma, beta, mean, variance, *settings):
    settings = _Settings(*settings)
    links = [fused.Link.apply(state) for state in states] if settings.keep == fused.MASKS else []
    return _Forward.apply(len(states), settings, weights, theta, gamma, beta, mean, variance, *states, *links)


def _backward_autograd(grad_out, states, *rest):
    *tensors, batch_statistics, wanted = rest[:10]
    settings = _Settings(*rest[10:])
    return list(_Backward.apply(len(states), batch_statistics, wanted, settings, grad_out, *tensors, *states))


_forward_op = define_differentiable_op(
    f"mixed_cell_forward(Tensor[] states, {_TABLES}, Tensor? mean, Tensor? variance, {_SETTINGS}) "
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

OP = backend.Op(
    "mixed_op",
    {
        "reference": backend.Implementation(_reference),
        "cpu": backend.Implementation(_fused, (torch.float32,)),
        "cuda": backend.Implementation(_fused, (torch.float32, *fused.HALVES)),
    },
)
