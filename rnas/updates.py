"""The two updates of one iteration of a search, eagerly or from CUDA graphs, and their numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from .graphs import fingerprint
from .methods import Method, SearchStep
from .methods.method import Batch, Level, Uncaptured, accuracy, deferred, number
from .supernet import Supernet

Numbers = dict[str, float | Tensor]


def architecture_update(
    supernet: Supernet,
    method: Method,
    train: Batch,
    valid: Batch,
    step: SearchStep,
    optimizer: torch.optim.Optimizer,
) -> Numbers:
    """The gradient of the architecture's objective and one step of its optimizer."""

    def update(step: SearchStep, train: Batch, valid: Batch) -> Numbers:
        result = method.architecture_step(supernet, train, valid, step)
        optimizer.step()
        optimizer.zero_grad()
        return {"architecture_loss": result.loss, "architecture_accuracy": result.accuracy, **result.numbers}

    watched = (supernet, method, optimizer, step.weight_optimizer)
    return _run("architecture", update, {"train": train, "valid": valid}, method, step, watched)


def weight_update(supernet: Supernet, method: Method, train: Batch, step: SearchStep, *, grad_clip: float) -> Numbers:
    """The gradient of the weights' loss, clipped to an L2 norm of `grad_clip` (0: not), and their optimizer's step."""

    def update(step: SearchStep, train: Batch) -> Numbers:
        # To None: in a graph the gradients are made in its own memory, and nothing adds to what an earlier step left.
        step.weight_optimizer.zero_grad()
        loss, logits = method.weight_loss(supernet, train, step)
        loss.backward()
        if grad_clip:
            nn.utils.clip_grad_norm_(supernet.parameters(), grad_clip)
        step.weight_optimizer.step()
        numbers = {"weight_loss": number(loss), "weight_accuracy": accuracy(logits, train.y)}
        if step.captured:
            step.weight_optimizer.zero_grad()
        return numbers

    watched = (supernet, method, step.weight_optimizer)
    return _run("weights", update, {"train": train}, method, step, watched, grad_clip)


def read(numbers: Mapping[str, float | Tensor]) -> dict[str, float]:
    """The numbers as Python floats; those that are on a device in one transfer."""
    waiting = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
    if not waiting:
        return dict(numbers)
    values = torch.stack([value.detach().double() for value in waiting.values()]).tolist()
    return {**numbers, **dict(zip(waiting, values))}


def make_capturable(
    weight_optimizer: torch.optim.SGD, architecture_optimizer: torch.optim.Adam, device: torch.device
) -> None:
    """Let both optimizers keep on the device what changes from step to step; after a checkpoint was loaded, not before.

    Both become fused ones: those alone read a learning rate from the device. The rate of the weights becomes a tensor,
    which `rnas.loop.set_learning_rate` fills, so that a schedule asks for no other graph.
    """
    for optimizer in (weight_optimizer, architecture_optimizer):
        for group in optimizer.param_groups:
            group["foreach"], group["fused"] = None, True
            if "capturable" in group:
                group["capturable"] = device.type == "cuda"
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(device)
    # It warms up without a capture, and would warn of that.
    architecture_optimizer._warned_capturable_if_run_uncaptured = True
    for group in weight_optimizer.param_groups:
        group["lr"] = torch.full((), float(group["lr"]), device=device)


def _run(
    level: Level,
    update: Callable[..., Numbers],
    batches: dict[str, Batch],
    method: Method,
    step: SearchStep,
    watched: tuple,
    *settings: float,
) -> Numbers:
    graphs, name = (
        step.graphs,
        {"weights": "the step of the weights", "architecture": "the step of the architecture"}[level],
    )
    if graphs is None:
        return update(step, **batches)
    key = method.capture_key(level, step)
    if isinstance(key, Uncaptured):
        graphs.refuse(name, f"{method.name} {key.reason}")
        return update(step, **batches)
    inside = dataclasses.replace(step, generator=_no_generator, graphs=None, captured=True)

    def function(**tensors: Tensor) -> Numbers:
        with deferred():
            return update(inside, **{each: _batch(each, tensors) for each in batches})

    tensors = {f"{each}_{field}": tensor for each, batch in batches.items() for field, tensor in _tensors(batch)}
    key = (method.name, method.options, step.attack, key, settings)
    return graphs.run(name, function, tensors, key=key, watch=partial(fingerprint, *watched))


def _tensors(batch: Batch) -> list[tuple[str, Tensor]]:
    fields = (("x", batch.x), ("y", batch.y), ("x_adv", batch.x_adv))
    draws = [(f"draws_{name}", tensor) for name, tensor in batch.draws.items()]
    return [*[(name, tensor) for name, tensor in fields if tensor is not None], *draws]


def _batch(name: str, tensors: Mapping[str, Tensor]) -> Batch:
    prefix = f"{name}_draws_"
    draws = {each.removeprefix(prefix): tensor for each, tensor in tensors.items() if each.startswith(prefix)}
    return Batch(tensors[f"{name}_x"], tensors[f"{name}_y"], tensors.get(f"{name}_x_adv"), draws)


def _no_generator(purpose: str) -> torch.Generator:
    raise RuntimeError(f"random numbers ({purpose}) cannot be drawn in a step that is captured: draw them in `prepare`")
