"""Certified radii of the architectures that DSRNA and DARTS find on the MNIST subset, with random ones as control.

    python scripts/certified_epsilon.py [--seeds 0 1 ...] [--rows darts dsrna-0.01 ...] [--run FOLDER] [--output FOLDER]

Searches one architecture per row and seed, trains all of them with one recipe, and finds for every correctly
classified test image the largest radius that is certified and the smallest at which PGD fools the network. Seed by
seed; what a run folder holds already stays, so an interrupted run goes on and more seeds or rows can be added. Writes
certified.json, table.md and radii.png. Radii are in pixel units of [0, 1]; times are those of the process on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from certified_report import write_report
from torch import Tensor, nn

from rnas import attacks, data, search, seeding, train
from rnas.certify import certified_epsilon
from rnas.compare_notes import describe_machine
from rnas.config import (
    ArchitectureOptimizerConfig,
    CompareConfig,
    DataConfig,
    SearchConfig,
    TrainConfig,
    WeightOptimizerConfig,
)
from rnas.loop import cpu_threads
from rnas.methods import options_for
from rnas.network import count_parameters
from rnas.runs import write_text

ROOT = Path(__file__).resolve().parents[1]
SMALLEST = 1e-6
LARGEST = {"certified": {"linf": 0.1, "l2": 1.0}, "attack": {"linf": 1.0, "l2": 10.0}}
RADIUS = {"linf": 0.01, "l2": 0.02}
"""Of the certificate in the search: a few times what the trained networks certify, where the method's default for
Linf, 0.1, is tens of times that (first trials, one seed)."""


@dataclass(frozen=True)
class Row:
    """One line of the table: how its architectures are found."""

    method: str
    options: dict = field(default_factory=dict)


def _dsrna(gamma: float, norm: str) -> Row:
    return Row("dsrna", {"variant": "certified", "gamma": gamma, "norm": norm, "epsilon": RADIUS[norm]})


ROWS = {
    "darts": Row("darts", {"adversarial": "none"}),  # as DSRNA's: no attack in the search
    "dsrna-0.01": _dsrna(0.01, "linf"),  # the published gamma
    "dsrna-0.1": _dsrna(0.1, "linf"),
    "dsrna-1": _dsrna(1.0, "linf"),
    "dsrna-1-l2": _dsrna(1.0, "l2"),
    "random": Row("random"),
}
DEFAULT_ROWS = ["darts", "dsrna-0.01", "dsrna-0.1", "dsrna-1", "random"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; its defaults are the run in docs/certified."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=DEFAULT_ROWS)
    parser.add_argument("--run", type=Path, default=Path("runs/certified-epsilon"))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "certified")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is finished")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dataset", default="mnist-subset")
    for name, default, meaning in (
        ("channels", 4, "C of the first cells, in the search and after it"),
        ("layers", 3, "cells, in the search and after it"),
        ("nodes", 1, "nodes of a cell"),
        ("stem-stride", 2, "stride of the first convolution"),
        ("search-images", 1920, "training images that the search sees, half of them per level"),
        ("search-epochs", 3, "the first without architecture steps"),
        ("search-batch", 64, "images per step and level of the search"),
        ("certified-images", 4, "images of a batch that DSRNA's certificate sees"),
        ("train-images", 4000, "training images of the recipe"),
        ("train-epochs", 2, "epochs of the recipe"),
        ("test-images", 40, "test images whose radii are measured, balanced; the accuracy is that of all"),
        ("bisection", 8, "halvings of the logarithmic range of a radius"),
        ("attack-steps", 20, "steps of PGD per radius tried"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    return parser.parse_args(arguments)


def attack(
    network: nn.Module, x: Tensor, y: Tensor, epsilon: Tensor, norm: str, steps: int, generator: torch.Generator
) -> Tensor:
    """Distance (N,) from each image to a misclassified one that PGD on the margin finds in its ball, else inf."""
    options = {"step_size": epsilon / 4, "steps": steps, "norm": norm, "generator": generator}
    x_adv = attacks.pgd(network, x, y, epsilon=epsilon, early_drop=True, loss="margin", **options)
    with torch.no_grad():
        fooled = network(x_adv).argmax(dim=1) != y
    step = (x_adv - x).flatten(1)
    distance = step.abs().amax(dim=1) if norm == "linf" else step.norm(dim=1)
    return torch.where(fooled, distance, math.inf)


def attacked_epsilon(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str,
    largest: float,
    smallest: float,
    steps: int,
    pgd_steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Distance (N,) of the nearest misclassified image that PGD has found, inf where it found none.

    An upper bound of every radius that can be certified. PGD climbs the margin loss in balls whose radius is bisected
    on a logarithmic scale between `smallest` and `largest`, `steps` times; it knows nothing of certified radii.
    """
    found = torch.full((len(x),), math.inf, dtype=x.dtype)
    low, high = torch.full_like(found, smallest), torch.full_like(found, largest)
    epsilon = high
    for _ in range(steps + 1):
        reached = attack(network, x, y, epsilon, norm, pgd_steps, generator)
        fooled = torch.isfinite(reached)
        found = torch.minimum(found, reached)
        low = torch.where(fooled | (epsilon == high), low, epsilon)
        high = torch.minimum(high, found)
        epsilon = (low * high).sqrt()
    return found


def measure(network: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> dict:
    """Radii of the images that are classified right, by norm and kind, and the seconds that each kind took.

    In float64: {"correct": n, "radii": {norm: {"certified", "interval", "attack": [n radii]}}, "seconds": {...},
    "broken": images, counted once per norm, that PGD fools inside their certified radius}; None where PGD found none.
    """
    network, x = copy.deepcopy(network).double().eval(), x.double()
    with torch.no_grad():
        right = network(x).argmax(dim=1) == y
    x, y, seconds, radii = x[right], y[right], {"certified": 0.0, "interval": 0.0, "attack": 0.0}, {}
    broken = 0
    for norm in RADIUS:
        radii[norm] = {}
        random = seeding.generator(0, "certified epsilon", norm)
        for kind in seconds:
            began = time.process_time()
            largest = LARGEST["attack" if kind == "attack" else "certified"][norm]
            bisection = {"norm": norm, "smallest": SMALLEST, "largest": largest, "steps": options.bisection}
            if kind == "attack":
                found = attacked_epsilon(network, x, y, **bisection, pgd_steps=options.attack_steps, generator=random)
            else:
                method = {"certified": "crown-ibp", "interval": "interval"}[kind]
                found = certified_epsilon(network, None, x, y, **bisection, method=method)
            seconds[kind] += time.process_time() - began
            radii[norm][kind] = [each if math.isfinite(each) else None for each in found.tolist()]
            if kind == "certified":
                reached = attack(network, x, y, found, norm, options.attack_steps, random)
                broken += int(torch.isfinite(reached).sum())
    return {"correct": len(x), "broken": broken, "radii": radii, "seconds": seconds}


def accuracy(network: nn.Module, split: data.Split) -> float:
    """Share of the images that are classified right."""
    hits = 0
    with torch.no_grad():
        for x, y in data.batches(split, 250, seed=0, epoch=0, shuffle=False):
            hits += int((network(x).argmax(dim=1) == y).sum())
    return hits / len(split)


def search_config(options: argparse.Namespace, row: Row, seed: int, folder: Path) -> SearchConfig:
    """The search of one architecture: settings of configs/compare_mnist.toml, but for sizes and attack."""
    own = dict(row.options)
    if row.method == "dsrna":
        own["certified_images"] = options.certified_images
    return SearchConfig(
        run=str(folder),
        seed=seed,
        device="cpu",
        threads=options.threads,
        quiet=True,
        method=row.method,
        options=dataclasses.replace(options_for(row.method), **own),
        nodes=options.nodes,
        channels=options.channels,
        layers=options.layers,
        stem_stride=options.stem_stride,
        epochs=options.search_epochs,
        batch_size=options.search_batch,
        warmup_epochs=1,
        data=DataConfig(dataset=options.dataset, train_images=options.search_images),
        weights=WeightOptimizerConfig(learning_rate=0.1),
        # Few architecture steps: at Adam's 3e-4 of long searches alpha would stay where it starts.
        architecture=ArchitectureOptimizerConfig(learning_rate=0.05),
    )


def train_config(options: argparse.Namespace, searched: Path, seed: int, folder: Path) -> TrainConfig:
    """The one recipe: clean images, weight decay."""
    return TrainConfig(
        run=str(folder),
        seed=seed,
        device="cpu",
        threads=options.threads,
        quiet=True,
        genotype=str(searched),
        recipe="standard",
        channels=options.channels,
        layers=options.layers,
        stem_stride=options.stem_stride,
        auxiliary_weight=0.0,
        epochs=options.train_epochs,
        batch_size=64,
        data=DataConfig(dataset=options.dataset, train_images=options.train_images),
        weights=WeightOptimizerConfig(learning_rate=0.1),
    )


def work(options: argparse.Namespace, name: str, seed: int) -> dict:
    """Search, train and measure one network, or read what an earlier call has measured.

    Raises ValueError where that was measured with other settings.
    """
    folder, row = options.run / f"{name}-s{seed}", ROWS[name]
    result = folder / "result.json"
    settings = {**common_settings(options), "method": row.method, "options": row.options}
    if result.exists():
        found = json.loads(result.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise ValueError(f"{result} was measured with other settings: choose another folder with --run")
        return found
    searched, trained, spent = folder / "search", folder / "train", folder / "seconds.json"
    # Of the process that finished a stage: one that is interrupted takes its time with it.
    seconds = json.loads(spent.read_text(encoding="utf-8")) if spent.exists() else {}
    began = time.process_time()
    if searched.exists():
        genotype = search.resume(searched, quiet=True).genotype
    else:
        genotype = search.search(search_config(options, row, seed, searched)).genotype
    seconds.setdefault("search", time.process_time() - began)
    write_text(spent, json.dumps(seconds))
    began = time.process_time()
    if trained.exists():
        network = train.resume(trained, quiet=True).network
    else:
        network = train.train(train_config(options, searched, seed, trained)).network
    seconds.setdefault("train", time.process_time() - began)
    write_text(spent, json.dumps(seconds))
    test = data.load(DataConfig(dataset=options.dataset)).test
    chosen = data.load(DataConfig(dataset=options.dataset, test_images=options.test_images)).test
    x, y = next(data.batches(chosen, len(chosen), seed=0, epoch=0, shuffle=False))
    measured = measure(network, x, y, options)
    found = {
        "row": name,
        "seed": seed,
        "settings": settings,
        "genotype": genotype.to_dict(),
        "parameters": count_parameters(network),
        "accuracy": accuracy(network, test),
        "images": len(chosen),
        **measured,
        "seconds": {key: round(value, 2) for key, value in {**seconds, **measured["seconds"]}.items()},
    }
    write_text(result, json.dumps(found) + "\n")
    return found


def common_settings(options: argparse.Namespace) -> dict:
    """What all networks of a table share."""
    apart = ("seeds", "rows", "run", "output", "report", "threads")
    return {key: value for key, value in vars(options).items() if key not in apart}


def commit() -> str:
    """Of the working tree, with a mark where the library or this script differ from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        paths = ["rnas", "kernels", "csrc", "scripts"]
        status = [*git, "status", "--porcelain", "--untracked-files=no", *paths]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + (" with changes" if changed else "")


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing and writes the report."""
    options = parse(arguments)
    command = " ".join(["python scripts/certified_epsilon.py", *(sys.argv[1:] if arguments is None else arguments)])
    networks, version = [], commit()
    with cpu_threads(options.threads):
        for seed in options.seeds:
            for name in options.rows:
                if options.report and not (options.run / f"{name}-s{seed}" / "result.json").exists():
                    print(f"{name}, seed {seed}: not finished")
                    continue
                found = work(options, name, seed)
                networks.append(found)
                spent = ", ".join(f"{key} {value:.1f} s" for key, value in found["seconds"].items())
                print(f"{name}, seed {seed}: accuracy {found['accuracy']:.1%}; {spent}", flush=True)
    if not networks:
        print(f"nothing is finished in {options.run}")
        return 1
    context = {
        "command": command,
        "commit": version,
        "machine": describe_machine(CompareConfig(threads=options.threads, device="cpu")),
        "settings": common_settings(options),
        "smallest": SMALLEST,
        "largest": LARGEST,
    }
    for path in write_report(networks, context, options.output):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
