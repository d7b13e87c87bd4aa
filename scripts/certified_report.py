"""The report of certified_epsilon.py: table.md, certified.json and a picture of all radii."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rnas.canvas import INK, QUIET, panels, save, style
from rnas.compare_notes import machine_text
from rnas.compare_table import Spread, chance_of_separation, text, verdict
from rnas.plot import CYCLE
from rnas.runs import write_text

NORMS = {"linf": "Linf", "l2": "L2"}
REFERENCES = ("darts", "random")
NOT_FOUND = "not found"  # by the attack, for at least half of some network's images
COLOURS = {"darts": INK, "random": QUIET}


def summary(network: Mapping, norm: str) -> dict[str, float]:
    """Mean and median radii of one network over its correctly classified images, and how loose they are.

    looseness: the median over the images of attacked radius / certified radius; an attack that failed counts as inf.
    Raises ValueError where no image is classified right.
    """
    radii = network["radii"][norm]
    if not network["correct"]:
        raise ValueError(f"{network['row']}, seed {network['seed']}, classifies no test image right: train it longer")
    attack = [math.inf if each is None else each for each in radii["attack"]]
    pairs = zip(attack, radii["certified"])
    return {
        "mean": statistics.fmean(radii["certified"]),
        "median": statistics.median(radii["certified"]),
        "interval": statistics.fmean(radii["interval"]),
        "attack": statistics.median(attack),
        "looseness": statistics.median(upper / lower if lower else math.inf for upper, lower in pairs),
    }


def by_row(networks: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """The networks of each row, in the order of their first one."""
    return {row: [each for each in networks if each["row"] == row] for row in dict.fromkeys(n["row"] for n in networks)}


def radius_text(radii: Sequence[float]) -> str:
    """mean ± standard deviation (least to most) times a power of ten."""
    if not math.isfinite(max(radii)):
        return NOT_FOUND
    spread = Spread.of(radii)
    power = math.floor(math.log10(spread.mean)) if spread.mean else 0
    found = text(spread, 10.0**-power, 2)
    return f"{found} · 10^{power}" if power else found


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of Markdown, all columns but the first to the right."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---", *["---:"] * (len(head) - 1)], *lines)]


def norm_table(rows: Mapping[str, Sequence[Mapping]], norm: str) -> list[str]:
    """The radii in one norm, one line per row."""
    lines = []
    for name, networks in rows.items():
        found = [summary(network, norm) for network in networks]
        radii = [radius_text([each[key] for each in found]) for key in ("mean", "median", "interval", "attack")]
        looseness = [each["looseness"] for each in found]
        ratio = text(Spread.of(looseness), 1, 1) if math.isfinite(max(looseness)) else NOT_FOUND
        lines.append([name, *radii, ratio])
    head = ["row", "certified, mean", "certified, median", "interval alone, mean", "PGD, median", "PGD / certified"]
    return table(head, lines)


def network_table(rows: Mapping[str, Sequence[Mapping]]) -> list[str]:
    """Accuracy, size and time, one line per row."""
    lines = []
    for name, networks in rows.items():
        seconds = [
            text(Spread.of([network["seconds"][key] for network in networks]), 1, 1)
            for key in ("search", "train", "certified", "attack")
        ]
        accuracy = text(Spread.of([network["accuracy"] for network in networks]), 100, 1)
        lines.append([name, accuracy, text(Spread.of([n["parameters"] for n in networks]), 1, 0), *seconds])
    head = ["row", "accuracy, %", "parameters", "search, s", "training, s", "CROWN-IBP, s", "PGD, s"]
    return table(head, lines)


def operations(rows: Mapping[str, Sequence[Mapping]]) -> list[str]:
    """What was found: the operations of every node, by seed."""
    lines = []
    for name, networks in rows.items():
        for network in networks:
            cells = network["genotype"]["cells"].values()
            found = ["; ".join(", ".join(f"{op} {source}" for op, source in node) for node in cell) for cell in cells]
            lines.append([name, str(network["seed"]), *found])
    cells = list(next(iter(rows.values()))[0]["genotype"]["cells"])
    return table(["row", "seed", *cells], lines)


def ratio(spread: Spread, reference: Spread) -> str:
    """The ratio of two means."""
    return f"{spread.mean / reference.mean:.3g} times" if reference.mean else "of 0"


def verdicts(rows: Mapping[str, Sequence[Mapping]]) -> list[str]:
    """Whether the differences to the references are larger than the spread, for the radii and the accuracy."""
    measures = {}
    for norm, title in NORMS.items():
        for key, name in (("mean", "mean certified {} radius"), ("attack", "median {} radius under PGD")):
            measures[name.format(title)] = lambda network, norm=norm, key=key: summary(network, norm)[key]
    measures["accuracy"] = lambda network: network["accuracy"]
    words = {
        "above": "above it in every seed",
        "below": "below it in every seed",
        "within the spread": "within the spread, so no difference is shown",
        "unknown": "unknown, as one seed has no spread",
    }
    found = []
    for reference in (each for each in REFERENCES if each in rows):
        for name, measure in measures.items() if len(rows) > 1 else ():
            values = {row: [measure(each) for each in networks] for row, networks in rows.items()}
            if not math.isfinite(max(max(each) for each in values.values())):
                continue  # the attack failed on half of the images
            spreads = {row: Spread.of(each) for row, each in values.items()}
            parts = [
                f"{row} {words[verdict(spread, spreads[reference])]} (mean {ratio(spread, spreads[reference])})"
                for row, spread in spreads.items()
                if row != reference
            ]
            found.append(f"{name} against {reference}: {'; '.join(parts)}.")
    seeds = min(len(networks) for networks in rows.values())
    if seeds > 1:
        found.append(
            f"Every seed on one side of every seed of the reference: with {seeds} seeds each, two rows that do not "
            f"differ separate like that in 1 of {chance_of_separation(seeds)} comparisons."
        )
    return found


def notes(networks: Sequence[Mapping], context: Mapping) -> list[str]:
    """Sentences for a reader who wants to judge the tables, or to make them again."""
    settings, first = context["settings"], networks[0]
    seeds = sorted({network["seed"] for network in networks})
    broken = sum(network["broken"] for network in networks)
    images = sum(network["correct"] for network in networks)
    halvings = 2.0 ** -settings["bisection"]
    step = {norm: (context["largest"]["certified"][norm] / context["smallest"]) ** halvings for norm in NORMS}
    return [
        f"Mean ± standard deviation (with n - 1) and range over the seeds {', '.join(map(str, seeds))}; radii in pixel "
        "units of [0, 1].",
        f"Radii of the correctly classified of {first['images']} test images, the same for all networks; accuracy on "
        "all test images.",
        "certified: largest radius found by bisection at which CROWN-IBP proves every margin positive, in float64; "
        "interval alone: the same from interval bounds. A radius larger by the factor "
        f"{step['linf']:.3f} (Linf) or {step['l2']:.3f} (L2) was not certified.",
        f"PGD: distance of the nearest misclassified image that PGD-{settings['attack_steps']} on the margin found in "
        "balls of bisected radius, an upper bound of what anyone can certify. PGD / certified: the median over images "
        "of their ratio; the true radius lies between the two.",
        f"Inside the certified balls PGD fooled {broken} of {2 * images} (image, norm) pairs.",
        f"One space and budget: {settings['nodes']} node{'s' * (settings['nodes'] != 1)} per cell, "
        f"{settings['layers']} cells, C={settings['channels']}, stem stride {settings['stem_stride']}; "
        f"{settings['search_epochs']} search "
        f"epochs on {settings['search_images']} images, the first without architecture steps, no attacks; the "
        f"certificate sees {settings['certified_images']} images of a batch. One recipe: clean images, weight decay "
        f"3e-4, {settings['train_epochs']} epochs on {settings['train_images']} images.",
        f"Measured on {machine_text(context['machine'])}; commit {context['commit']}. Seconds of the process on the "
        "CPU, which other work shared.",
        f"Command: `{context['command']}`",
    ]


def draw(networks: Sequence[Mapping], path: Path) -> Path:
    """The share of all test images that is certified, and that withstands PGD, against the radius."""
    with style():
        figure, axes = panels(len(NORMS))
        colours = iter(CYCLE)
        for name, own in by_row(networks).items():
            colour = COLOURS.get(name) or next(colours)
            for panel, norm in zip(axes, NORMS):
                for kind, line in (("certified", "-"), ("attack", ":")):
                    images = sum(network["images"] for network in own)
                    radii = [r for network in own for r in network["radii"][norm][kind]]
                    radii = sorted(each for each in radii if each)  # an image without a radius is only in the height
                    above = len([r for network in own for r in network["radii"][norm][kind] if r is None])
                    shares = [100 * (above + len(radii) - index) / images for index in range(len(radii))]
                    label = name if kind == "certified" else None
                    panel.step(radii, shares, where="pre", color=colour, linestyle=line, label=label)
        for panel, norm in zip(axes, NORMS):
            panel.set_xscale("log")
            panel.set_ylim(0, 100)
            panel.set_xlabel(f"{NORMS[norm]} radius")
            panel.set_title(f"{NORMS[norm]}: certified (solid), withstands PGD (dotted)", loc="left")
        axes[0].set_ylabel("share of the test images (%)")
        axes[0].legend(loc="lower left")
        return save(figure, path)


def write_report(networks: Sequence[Mapping], context: Mapping, folder: Path) -> list[Path]:
    """Write certified.json, table.md and radii.png, the last where matplotlib is installed."""
    rows = by_row(networks)
    lines = ["# Certified radii on the MNIST subset", "", *network_table(rows)]
    for norm, title in NORMS.items():
        lines += ["", f"## {title}", "", *norm_table(rows, norm)]
    lines += ["", "## What was found: operation and the state that it reads", "", *operations(rows), ""]
    lines += [f"- {line}" for line in (*verdicts(rows), *notes(networks, context))]
    folder.mkdir(parents=True, exist_ok=True)
    kept = [{**network, "radii": rounded(network["radii"])} for network in networks]
    for network in kept:
        del network["settings"]
    records = ",\n  ".join(json.dumps(network) for network in kept)
    head = json.dumps(dict(context), indent=1)[:-2]
    files = [
        write_text(folder / "table.md", "\n".join(lines) + "\n"),
        write_text(folder / "certified.json", f'{head},\n "networks": [\n  {records}\n ]\n}}\n'),
    ]
    try:
        files.append(draw(networks, folder / "radii.png"))
    except ImportError as error:  # matplotlib is missing: the table itself is complete
        print(f"no picture: {error}")
    return files


def rounded(radii: Mapping) -> dict:
    """Four digits of every radius."""
    return {
        norm: {kind: [each and float(f"{each:.4g}") for each in values] for kind, values in kinds.items()}
        for norm, kinds in radii.items()
    }
