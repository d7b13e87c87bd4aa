"""The arguments of the mixed operation: checked, and read once.

Every check raises TypeError or ValueError, whose message says what was expected.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rnas.kernels import backend, fused
from rnas.kernels.reference import mixed_op as reference

PRIMITIVES = reference.PRIMITIVES


def check_state(name: str, state: Tensor) -> None:
    """Floating-point images (N, C, H, W)."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (N, C, H, W), got {type(state).__name__}")
    if not state.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {state.dtype}; convert with .float()")
    if state.dim() != 4 or 0 in state.shape[1:]:
        raise ValueError(f"{name} must have shape (N, C, H, W) with C, H, W of at least 1; got {tuple(state.shape)}")


def check_states(states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Images of one shape, dtype and device."""
    if isinstance(states, Tensor) or not isinstance(states, Sequence):
        raise TypeError(f"states must be a sequence of tensors of shape (N, C, H, W), got {type(states).__name__}")
    if not states:
        raise ValueError("states must hold at least one tensor of shape (N, C, H, W), got none")
    first, taken = states[0], None
    for index, state in enumerate(states):
        check_state(f"states[{index}]", state)
        if state.shape != first.shape:
            raise ValueError(f"states must have one shape, {tuple(first.shape)}; states[{index}]: {tuple(state.shape)}")
        taken = taken or fused.dtypes_beside(first)
        if state.dtype not in taken:
            raise TypeError(f"states must have one dtype, {first.dtype}; states[{index}] has {state.dtype}")
        if state.device != first.device:
            raise ValueError(f"states must be on one device, {first.device}; states[{index}] is on {state.device}")
    return tuple(states)


def rows_of(primitives: reference.Primitives, edges: int) -> tuple[tuple[str, ...], ...]:
    """The primitives of a cell, checked: one row where they are common to all edges, else one for each."""
    if not isinstance(primitives, (list, tuple)) or all([isinstance(name, str) for name in primitives]):
        return (row_of(primitives),)
    if len(primitives) != edges:
        raise ValueError(
            f"primitives must be a tuple of names, or one for each of the {edges} edges; got {len(primitives)} of them"
        )
    return once(tuple([("none",) if row in ((), []) else row_of(row) for row in primitives]))


def once(rows: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """One row where all are the same."""
    return rows[:1] if len(set(rows)) == 1 else rows


def of_each_edge(rows: tuple[tuple[str, ...], ...], edges: int) -> tuple[tuple[str, ...], ...]:
    """The row of each edge; undoes `once`."""
    return rows if len(rows) > 1 else rows * edges


def row_of(primitives: Sequence[str]) -> tuple[str, ...]:
    """The primitives of an edge, checked, as a tuple."""
    is_names = isinstance(primitives, (list, tuple)) and all([isinstance(name, str) for name in primitives])
    if not is_names:
        raise TypeError(f"primitives must be a tuple of str, got {primitives!r:.80}")
    if any([name not in PRIMITIVES for name in primitives]):
        unknown = ", ".join(repr(name) for name in primitives if name not in PRIMITIVES)
        raise ValueError(f"primitives must be among {', '.join(PRIMITIVES)}; got {unknown}")
    if not primitives or len(set(primitives)) != len(primitives):
        raise ValueError(f"primitives must name at least one operation and each once; got {primitives}")
    return tuple(primitives)


def check_options(nodes: int, stride: int) -> None:
    """How many nodes there are, and the stride of the edges from input states."""
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise ValueError(f"nodes must be an integer of at least 1, got {nodes!r}")
    if isinstance(stride, bool) or not isinstance(stride, int) or stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride!r}")


def check_partial(partial: int, channels: int) -> int:
    """How many of the channels go through the candidates."""
    if isinstance(partial, bool) or not isinstance(partial, int) or partial < 1 or channels % partial:
        raise ValueError(f"partial must be an integer that divides the {channels} channels, got {partial!r}")
    return channels // partial


def check_edge_weights(x: Tensor, edge_weights: Tensor, edges: int) -> None:
    """(E,), beside the images x."""
    if not isinstance(edge_weights, Tensor):
        raise TypeError(f"edge_weights must be a tensor of shape ({edges},), got {type(edge_weights).__name__}")
    if tuple(edge_weights.shape) != (edges,):
        raise ValueError(
            f"edge_weights must have shape ({edges},), one number per edge; got {tuple(edge_weights.shape)}"
        )
    if edge_weights.dtype not in fused.dtypes_beside(x, mixing=True):
        raise TypeError(f"edge_weights must have the dtype of the states, {x.dtype}; got {edge_weights.dtype}")
    if edge_weights.device != x.device:
        raise ValueError(f"edge_weights must be on the device of the states, {x.device}; got {edge_weights.device}")


def check_image_scales(x: Tensor, image_scales: Tensor, edges: int) -> None:
    """(E, N), beside the images x."""
    expected = (edges, x.shape[0])
    if not isinstance(image_scales, Tensor):
        raise TypeError(f"image_scales must be a tensor of shape {expected}, got {type(image_scales).__name__}")
    if image_scales.shape != expected:
        found = tuple(image_scales.shape)
        raise ValueError(f"image_scales must have shape {expected}, one number per edge and image; got {found}")
    if image_scales.dtype not in fused.dtypes_beside(x, mixing=True):
        raise TypeError(f"image_scales must have the dtype of the states, {x.dtype}; got {image_scales.dtype}")
    if image_scales.device != x.device:
        raise ValueError(f"image_scales must be on the device of the states, {x.device}; got {image_scales.device}")


class Edges(NamedTuple):
    """What the edges of a cell have to come with."""

    shapes: list[list[tuple[int, ...]]]  # of the parameters of each edge
    norms: list[int]  # how many each edge has


@backend.constant_when_traced
def edges_of(names: tuple[tuple[str, ...], ...], inputs: int, nodes: int, stride: int, pool_norm, channels) -> Edges:
    """What the edges of a cell have to come with, worked out once."""
    return _edges_cached(names, inputs, nodes, stride, pool_norm, channels)


@functools.lru_cache(maxsize=256)
def _edges_cached(names, inputs, nodes, stride, pool_norm, channels) -> Edges:
    strides = [stride if source < inputs else 1 for node in range(nodes) for source in range(inputs + node)]
    rows = of_each_edge(names, len(strides))
    shapes = [reference.parameter_shapes(row, channels, each) for row, each in zip(rows, strides)]
    norms = [reference.norm_count(row, each, pool_norm) for row, each in zip(rows, strides)]
    return Edges(shapes, norms)


def check_weights(x: Tensor, weights: Tensor, names: tuple[tuple[str, ...], ...], edges: int) -> None:
    """(E, K), beside the images x."""
    count = max(map(len, names))
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor of shape ({edges}, {count}), got {type(weights).__name__}")
    if tuple(weights.shape) != (edges, count):
        # An edge alone was given a vector.
        cut = 1 if edges == 1 and weights.dim() == 2 else 0
        found, wanted = tuple(weights.shape)[cut:], (edges, count)[cut:]
        raise ValueError(f"weights must have shape {wanted}, one number per edge and primitive; got {found}")
    if weights.dtype not in fused.dtypes_beside(x, mixing=True):
        raise TypeError(f"weights must have the dtype of the states, {x.dtype}; got {weights.dtype}")
    if weights.device != x.device:
        raise ValueError(f"weights must be on the device of the states, {x.device}; got {weights.device}")


def check_groups(parameters, norms, edges: int) -> None:
    """One sequence for each edge."""
    for name, given, unit in (("parameters", parameters, "tensors"), ("norms", norms, "BN modules")):
        if not hasattr(given, "__len__"):
            raise TypeError(f"{name} must be a sequence of {unit} for each edge, got {type(given).__name__}")
        if len(given) != edges:
            raise ValueError(f"{name} must hold one sequence for each of the {edges} edges, got {len(given)}")
        for edge, members in enumerate(given):
            if not hasattr(members, "__len__"):
                where = _of_edge(edge, edges)
                raise TypeError(f"{name}{where} must be a sequence of {unit}, got {type(members).__name__}")


def check_biases(x: Tensor, channels: int, biases, norms) -> None:
    """(C,) or None for each norm of each edge, beside the images x."""
    if not hasattr(biases, "__len__") or list(map(len, biases)) != list(map(len, norms)):
        raise ValueError("biases must hold a tensor or None for each norm of each edge")
    taken = fused.dtypes_beside(x)
    for edge, members in enumerate(biases):
        for index, bias in enumerate(members):
            where = f"biases[{index}]{_of_edge(edge, len(biases))}"
            if bias is None:
                continue
            if not isinstance(bias, Tensor):
                raise TypeError(f"{where} must be a tensor or None, got {type(bias).__name__}")
            if bias.shape != (channels,):
                raise ValueError(f"{where} must have shape ({channels},), got {tuple(bias.shape)}")
            if bias.dtype not in taken or bias.device != x.device:
                raise TypeError(f"{where} must be {x.dtype} on {x.device}, got {bias.dtype} on {bias.device}")


def read_parameters(x: Tensor, channels: int, parameters, norms, expected: Edges):
    """The parameters and norms, checked and read: by compiled code where they are as usual, else one by one."""
    edges, arrays = len(expected.shapes), None
    if x.is_cpu and x.dtype == torch.float32:
        arrays = fused.read_arrays(list(parameters), expected.shapes)
    if arrays is None:
        for edge, (members, shapes) in enumerate(zip(parameters, expected.shapes)):
            _check_parameters(x, members, shapes, _of_edge(edge, edges))
    modules = [norm for edge in norms for norm in edge]
    read = fused.compiled_norms(modules, channels)
    if read is None or [len(edge) for edge in norms] != expected.norms:
        for edge, (members, count) in enumerate(zip(norms, expected.norms)):
            _check_norms(channels, members, count, _of_edge(edge, edges))
    read = fused.Norms(modules) if read is None else read
    return arrays, read


def _of_edge(edge: int, edges: int) -> str:
    return f" of edge {edge}" if edges > 1 else ""


def _check_parameters(x: Tensor, parameters: Sequence[Tensor], shapes: list[tuple[int, ...]], where: str) -> None:
    if len(parameters) != len(shapes):
        raise ValueError(f"parameters{where} must be {len(shapes)} tensors, got {len(parameters)}")
    taken = fused.dtypes_beside(x)
    for index, (tensor, shape) in enumerate(zip(parameters, shapes)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"parameters[{index}]{where} must be a tensor, got {type(tensor).__name__}")
        if not tensor.shape == shape:  # `!=` with a constant is not traced by PyTorch 2.11
            raise ValueError(f"parameters[{index}]{where} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype not in taken:
            raise TypeError(
                f"parameters[{index}]{where} must have the dtype of the states, {x.dtype}; got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(f"parameters[{index}]{where} must be on {x.device}, got {tensor.device}")


def _check_norms(channels: int, norms: Sequence[nn.BatchNorm2d], count: int, where: str) -> None:
    if len(norms) != count:
        raise ValueError(f"norms{where} must be {count} BN modules, got {len(norms)}")
    for index, norm in enumerate(norms):
        if not isinstance(norm, nn.BatchNorm2d):
            raise TypeError(f"norms[{index}]{where} must be an nn.BatchNorm2d, got {type(norm).__name__}")
        if norm.num_features != channels:
            raise ValueError(f"norms[{index}]{where} must have {channels} features, got {norm.num_features}")
