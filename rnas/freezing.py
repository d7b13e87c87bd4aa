"""The state in which a model is attacked, and the way back to what the caller had: `rnas.attacks.frozen`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from .attack_inputs import check_choice

Model = Callable[[Tensor], Tensor]


@contextmanager
def frozen(model: nn.Module | Model, statistics: str = "running") -> Iterator[nn.Module | Model]:
    """Put a model in the state in which it is attacked; give it back exactly as it was, after an exception too.

    Inside, no parameter requires a gradient and every submodule is in eval mode (no dropout, no noise).
    statistics "running": normalisation layers use their running statistics, as at test time. "batch": layers with
    running statistics (batch normalisation of any kind, and whatever else has a `track_running_stats` attribute)
    use those of the batch instead, and their buffers are neither read nor moved. They are detached from the layers for
    that time: take no state_dict inside. Layers without running statistics use those of the batch in both cases.

    Flags are set on the submodules one by one, as `train()` and `eval()` would lose mixed flags and may be overridden.
    A model that is not an nn.Module is passed through. May be nested, but inside "batch" there are no running
    statistics that "running" could use.
    Equivalent to, for "running"::

        training = [module.training for module in model.modules()]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.eval().requires_grad_(False)
        ...                                                                      # the attack
        for module, was_training in zip(model.modules(), training):
            module.training = was_training
        for parameter in trainable:
            parameter.requires_grad_(True)

    Raises ValueError for other values of statistics.
    """
    check_choice("statistics", statistics, ("running", "batch"))
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module.training for module in modules]
    # The flag of a non-leaf (a weight computed from another tensor) cannot be set; its gradient is not computed anyway.
    parameters = {id(each): each for module in modules for each in module._parameters.values() if each is not None}
    trainable = [each for each in parameters.values() if each.requires_grad and each.is_leaf]
    # Without nn.Module's own look-up, which raises and catches an error for all that have no such attribute.
    name = "track_running_stats"
    tracking = [each for each in modules if each.__dict__.get(name, getattr(type(each), name, False))]
    buffers = [
        (module, {name: module._buffers[name] for name in _STATISTICS if name in module._buffers})
        for module in (tracking if statistics == "batch" else [])
    ]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in modules:
            _set_training(module, False)
        for module, held in buffers:
            # The state of a layer built with track_running_stats=False. Training mode as well, because only then
            # SyncBatchNorm gathers the batch over all processes.
            _set_training(module, True)
            module.track_running_stats = False
            module._buffers.update(dict.fromkeys(held))
        yield model
    finally:
        for module, held in buffers:
            module._buffers.update(held)
            module.track_running_stats = True
        for module, was_training in zip(modules, training):
            _set_training(module, was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)


def random_states_kept(model: Model | None, device: torch.device) -> AbstractContextManager[None]:
    """The global random states, of the CPU, `device` and the devices of the model, are afterwards what they were."""
    devices = {device}
    if isinstance(model, nn.Module):
        devices.update(parameter.device for parameter in model.parameters())
    return torch.random.fork_rng(devices=sorted(each.index for each in devices if each.type == "cuda"))


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _set_training(module: nn.Module, training: bool) -> None:
    if module.training == training:
        return
    if type(module).__setattr__ is nn.Module.__setattr__ and "training" in module.__dict__:
        # A supernet has thousands of modules, and nn.Module looks through all it holds before it sets a flag.
        module.__dict__["training"] = training
    else:
        module.training = training
