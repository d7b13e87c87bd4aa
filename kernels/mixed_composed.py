"""The mixed operation composed of PyTorch's own operations, from packed parameters: for what the kernels do not do."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from rnas.kernels import engine, fused
from rnas.kernels import mixed_arguments as arguments
from rnas.kernels.reference import mixed_op as reference

# Positions of the tensors that the backward op takes and can be differentiated by; the states come behind.
GRAD_OUT, WEIGHTS, THETA, GAMMA, BETA, SCALES, STATES = 0, 3, 4, 5, 6, 9, 10


def second_derivatives(ctx, directions):
    """What the backward of the backward op returns for its tensors; ctx: of that."""
    tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[4:]
    positions = [*range(STATES, STATES + ctx.count), WEIGHTS, THETA, GAMMA, BETA]
    directions, of_states = list(directions), ctx.wanted[: ctx.count]
    if any(of_states):
        along = [None] * ctx.count if directions[0] is None else directions[0].unbind()
        directions[:1] = [each for each, want in zip(along, of_states) if want]
    statistics = (None, None) if ctx.batch_statistics else tensors[7:9]

    def cell(*inputs):
        nodes = _composed(inputs[: ctx.count], *inputs[ctx.count :], *statistics, tensors[SCALES], ctx.settings)
        return nodes[:, -tensors[GRAD_OUT].shape[1] :]

    with fused.without_autocast(tensors[STATES]):
        found = fused.differentiate_twice(
            cell,
            [tensors[position] for position in positions],
            tensors[GRAD_OUT],
            ctx.wanted,
            directions,
            [needs[position] for position in (GRAD_OUT, *positions)],
        )
    gradients = [None] * len(needs)
    for position, gradient in zip((GRAD_OUT, *positions), found):
        gradients[position] = gradient
    return gradients


def _composed(states, weights, theta, gamma, beta, mean, variance, scales, settings) -> Tensor:
    """The cell by its definition. mean None: batch statistics. settings: `mixed_registered.Settings`.

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
        image_scales=scales,
    )
    return out.to(images)


def _norm(mean, variance, gamma, beta, eps: float, x: Tensor) -> Tensor:
    if gamma is None and beta is not None:  # of which PyTorch has no second derivative
        return F.batch_norm(x, mean, variance, training=mean is None, eps=eps) + beta[:, None, None]
    return F.batch_norm(x, mean, variance, gamma, beta, training=mean is None, eps=eps)
