"""What stands below the table of a comparison: protocol, budget, machine and command."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from . import __version__
from .compare_plan import added_methods, used_overrides
from .config import CompareConfig


def added_note(config: CompareConfig) -> str:
    """Which references were added to the methods that the user named."""
    added = added_methods(config)
    verb = "was" if len(added) == 1 else "were"
    return f"{' and '.join(added)} {verb} added: without them a comparison cannot show what a search is worth"


def notes(
    config: CompareConfig,
    networks: Sequence[Mapping],
    protocol: Mapping,
    machines: Sequence[Mapping],
    command: str,
) -> list[str]:
    """Sentences for a reader who wants to judge the table, or to make it again.

    networks: {method, seed, space, remarks} each; protocol: {threat: {norm, epsilon, step_size}, images}; machines:
    those of `describe_machine`, of every process that worked on the comparison.
    """
    spaces = {network["method"]: network["space"] for network in networks}
    elsewhere = [f"{method} searches {space}" for method, space in spaces.items() if space != config.search.space]
    found = [_seeds(config), _protocol(config, protocol), _budget(config), _recipe(config)]
    if elsewhere:
        found.append(
            f"Spaces differ, and with them the networks: {', '.join(elsewhere)}, the others {config.search.space}."
        )
    if used_overrides(config):
        found.append(f"Settings of one method alone: {', '.join(used_overrides(config))}.")
    for network in networks:
        found += [f"{network['method']}, seed {network['seed']}: {remark}." for remark in network["remarks"]]
    if added_methods(config):
        found.append(f"{added_note(config)}.")
    for machine in [each for index, each in enumerate(machines) if each not in machines[:index]]:
        found.append(f"Measured on {machine_text(machine)}.")
    return [*found, f"Command: `{command}`"]


def _seeds(config: CompareConfig) -> str:
    if len(config.seeds) == 1:
        return f"Seed {config.seeds[0]} alone."
    return (
        f"Mean ± standard deviation (with n - 1) and, in brackets, range over the seeds "
        f"{', '.join(map(str, config.seeds))}."
    )


def _protocol(config: CompareConfig, protocol: Mapping) -> str:
    threat, evaluation = protocol["threat"], config.evaluate
    counted = "any iterate counts" if evaluation.early_drop else "the last iterate counts"
    starts = "1 random start" if evaluation.restarts == 1 else f"{evaluation.restarts} random starts"
    return (
        f"One protocol: {protocol['images']:,} test images of {Path(config.train.data.dataset).stem}, {threat['norm']} "
        f"ball of epsilon {threat['epsilon']:.4g}; PGD with step {threat['step_size']:.4g}, {starts}, {counted}."
    )


def _budget(config: CompareConfig) -> str:
    budget = config.search
    return (
        f"Same budget: {budget.epochs} epochs in batches of {budget.batch_size} for every search; random searches "
        "nothing. Search time is that of the batches; of an interrupted search, what its checkpoints kept."
    )


def _recipe(config: CompareConfig) -> str:
    recipe = config.train
    chosen = "the last weights" if not recipe.validation_images else "the weights best on held-out training images"
    return (
        f"One recipe: {recipe.recipe}, {recipe.epochs} epochs, C={recipe.channels}, {recipe.layers} cells, {chosen}. "
        "Parameters are without auxiliary head."
    )


def describe_machine(config: CompareConfig) -> dict:
    """CPU model, threads, device and versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cuda = torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else ""
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "threads": config.threads,
        "device": f"{config.device} {cuda}".strip(),
        "rnas": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def machine_text(machine: Mapping) -> str:
    """`describe_machine` as one line."""
    threads = machine["threads"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("rnas", "Python", "torch"))
    return (
        f"{machine['cpu']}, {threads} thread{'s' * (threads != 1)}, device {machine['device']}; {versions}, "
        f"{machine['system']}"
    )
