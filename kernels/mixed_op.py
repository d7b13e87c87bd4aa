"""The mixed operation of differentiable architecture search: all candidates of an edge, weighted and summed, fused.

`mixed_op` is one edge, `mixed_cell` a cell of them, which computes what its edges share once. Both take parameters and
BN modules as they lie in a supernet, and are differentiable, twice too, in the images, the mixing weights, the
convolution weights and the affine parameters of the norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rnas.kernels import backend, batched, engine, formats, fused, partial
from rnas.kernels import mixed_arguments as arguments
from rnas.kernels.mixed_registered import Settings, forward_op
from rnas.kernels.reference import mixed_op as reference

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
    batch statistics. On a GPU with C a multiple of 4, tensor cores multiply matrices, each float as two numbers of 11
    bits: an error of some 2^-22 of each product, where float32 has 2^-24, and infinity times a weight of 11 bits or
    fewer is NaN.

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
    image_scales: Tensor | None = None,
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
        image_scales: (E, N) numbers by which the images of each edge are multiplied, as drop path does; None for ones.
            Finite. Fused without partial channels, in the dtype of the images and where they require no gradient; on a
            CPU on batch statistics.

    Returns:
        (N, J * C, ceil(H / stride), ceil(W / stride)): the nodes, concatenated along the channels, or with `last`
        (N, C, ceil(H / stride), ceil(W / stride)); channels_last where the first state is and else contiguous.

    What depends on a state alone (its ReLU, its pools) is computed once for all edges that leave it. With partial
    channels the edges into a node are one fused call (two where they differ in stride), and their sum is shuffled once.
    All else, errors included, is as in `mixed_op`.

    Equivalent to::

        for node in range(nodes):
            into = [mixed_op(state, ..., partial=partial) for state in states]  # with the rows of each edge
            into = [scales[:, None, None, None] * edge for scales, edge in zip(image_scales_of_node, into)]
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
    if image_scales is not None:
        arguments.check_image_scales(x, image_scales, len(edges.shapes))
    if biases is not None:
        arguments.check_biases(x, channels, biases, norms)
        read = (read[0], fused.read_norms(_flattened(norms), channels, _flattened(biases)))
    options = (names, nodes, stride, bool(pool_norm), partial, edge_weights, bool(last) and nodes > 1)
    call = _Call(states, weights, parameters, norms, *options, biases, image_scales, *read)
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
    if image_scales is not None:
        if not any(map(len, norms)) and not on.SCALES_ON_FIXED:
            call.norms_read.on_batch = True  # without norms both ways are one, and scales go this one
        obstacle = obstacle or _obstacle_of_scales(call, autocast or x.dtype)
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
    image_scales: Tensor | None
    arrays: object | None  # the parameters as compiled code has read them
    norms_read: fused.Norms | fused.CompiledNorms


def _obstacle_of_scales(call: _Call, images: torch.dtype) -> str | None:
    """Why no kernel covers the call's `image_scales` on images of this dtype, or None."""
    if call.image_scales.dtype != images:  # the result would be of neither
        return f"image_scales are not {images}"
    if call.partial > 1:
        return "image_scales are not fused beside partial channels"
    if not call.norms_read.on_batch and not engine.of(call.states[0]).SCALES_ON_FIXED:
        return "the CPU's kernels take image_scales on batch statistics only"
    return "image_scales require a gradient" if call.image_scales.requires_grad and torch.is_grad_enabled() else None


def _fused(call: _Call) -> Tensor:
    autocast = engine.of(call.states[0]).autocast_dtype(call.states[0])
    if autocast is None:
        return _mix(call)
    with fused.without_autocast(call.states[0]):
        return _mix(call._replace(states=tuple([state.to(autocast) for state in call.states])))


def _mix(call: _Call) -> Tensor:
    weights = call.weights if call.edge_weights is None else call.weights * call.edge_weights[:, None]
    call = call._replace(weights=weights)
    if call.partial == 1:
        return _cell(call)
    nodes = _partial_cell(call)
    return nodes[-1] if call.last else torch.cat(nodes, dim=1)


def _planes(states: Sequence[Tensor]) -> tuple[bool, bool]:
    """Whether the kernels are to make the result of a cell on these, and the gradients to them, channels first."""
    if torch.compiler.is_compiling() or not engine.of(states[0]).TAKES_PLANES:  # rearranged behind the op
        return False, False
    planes = [formats.layout(state) == torch.contiguous_format for state in states]
    return planes[0], all(planes) and not any(map(formats.takes_any_format, states))


def _partial_cell(call: _Call) -> list[Tensor]:
    """The nodes of a cell with partial channels, whose weights are those of the candidates times those of the edges.

    The shuffle is linear and common to the edges into a node, so it takes their sum.
    """
    parameters, norms = list(call.parameters), list(call.norms)
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
                into = call._replace(
                    states=tuple(sources),
                    weights=call.weights[rows, : max(map(len, names[rows]))],
                    parameters=parameters[rows],
                    primitives=names[rows],
                    nodes=1,
                    stride=stride,
                    last=False,
                    arrays=fused.read_arrays(parameters[rows], shapes[rows]),
                    norms_read=fused.read_norms(_flattened(norms[rows]), channels, shifts),
                )
                total = total + _cell(into)
                edge = rows.stop
        scales = None if call.edge_weights is None else call.edge_weights[first:edge]
        nodes.append(partial.join(total, around, scales, call.partial, layout))
    return nodes


def _cell(call: _Call) -> Tensor:
    """A cell all of whose channels are mixed."""
    states, norms = formats.all_taken(call.states), call.norms_read
    x, on = states[0], engine.of(states[0])
    theta = _flat(_flattened(call.parameters), x, call.arrays)
    tables = (call.weights, theta, *norms.affine(x), *norms.statistics(x), call.image_scales)
    if x.dtype != torch.float32:  # images alone have 16 bits
        tables = [None if table is None else table.float() for table in tables]
    keep = on.what_to_keep(states, tables[:4], norms.on_batch)
    primitives = ";".join([",".join(row) for row in arguments.once(call.primitives)])
    options = (call.nodes, call.stride, call.pool_norm, norms.eps, keep, call.last)
    out, mean, variance, *_ = forward_op(states, *tables, *Settings(primitives, *options, *_planes(call.states)))
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
        image_scales=call.image_scales,
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


OP = backend.Op(
    "mixed_op",
    {
        "reference": backend.Implementation(_reference),
        "cpu": backend.Implementation(_fused, (torch.float32,)),
        "cuda": backend.Implementation(_fused, (torch.float32, *fused.HALVES)),
    },
)
