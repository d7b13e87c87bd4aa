"""Writes tables into README.md: benchmarks from benchmarks/results/*.json, the demo from docs/demo/evaluation.json.

python scripts/render_readme.py            rewrites what stands between the markers
python scripts/render_readme.py --check    changes nothing; exit code 1 if README.md is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "docs" / "demo" / "evaluation.json"

JOBS = {
    "forward": "forward",
    "training_step": "training step",
    "alpha_gradient": "gradient to alpha",
    "pgd_7": "PGD-7",
    "search_iteration": "search iteration, PGD-7 on both levels",
    "jacobian_norm": "CE + Jacobian norm",
    "pgd_step_32": "`pgd_step`, 3x32x32",
    "pgd_step_224": "`pgd_step`, 3x224x224",
}
PROVIDERS = {
    "eager": "eager NCHW",
    "eager_in_place": "eager in place",
    "channels_last": "channels_last",
    "compile": "torch.compile",
    "eager_graph": "NCHW in a CUDA graph",
    "channels_last_graph": "channels_last in a CUDA graph",
    "compile_graph": "torch.compile in a CUDA graph",
    "accelerate": "accelerated",
    "accelerate_last": "accelerated, channels_last",
    "rnas": "rnas",
    "rnas_graph": "rnas in a CUDA graph",
    "channels_last_bf16": "channels_last, bf16",
    "rnas_bf16": "rnas, bf16",
    "rnas_bf16_graph": "rnas, bf16, in a CUDA graph",
}
LEGEND = """\
Best of the rounds, all implementations of a row timed in turns in one process, and how many times as fast as eager
NCHW; medians, rounds and notes are in the JSON. *Saved*: what autograd holds for backward; *peak*: all memory beside
images and weights; each for eager NCHW and, where it was measured, for rnas. *Of peak*: the convolutions' arithmetic in
the fastest time, as a share of the best float32 rate measured there (a large matrix product or convolution); what is
computed a second time does not count, and dense 3x3 convolutions count in full, of which Winograd's algorithm computes
less than half. Kernels: bytes that must move, and their share of the bandwidth of an addition in place (images of 32
pixels stay in a CPU's cache). *Eager* makes new tensors, which cost a CPU page faults; the others work in place."""
EDGES = "mixed_edge_"
METHODS = "architecture_step"
ACCELERATE = ("accelerate one cell, ", "accelerate, ")  # the fused op by itself, and the supernet around it
KINDS = {  # of work, in a profile
    "tiles": "ReLU, into tiles",
    "depthwise": "depthwise",
    "depthwise_input": "depthwise, to the input",
    "depthwise_weight": "depthwise, to the weights",
    "pointwise": "pointwise",
    "pointwise_input": "pointwise, to the input",
    "pointwise_weight": "pointwise, to the weights",
    "norms": "norms",
    "pools": "pools",
    "nodes": "sums at nodes",
}


def main() -> int:
    """Renders or checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if README.md is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--demo", type=Path, default=DEMO)
    options = parser.parse_args()
    try:
        old = options.readme.read_text(encoding="utf-8")
        new = replaced(old, "benchmarks", render(load(options.results)))
        new = replaced(new, "demo", demo_table(json.loads(options.demo.read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        print(f"render_readme: {error}", file=sys.stderr)
        return 1
    if old == new:
        return 0
    if options.check:
        print(f"{options.readme} is out of date; type: python scripts/render_readme.py", file=sys.stderr)
        return 1
    options.readme.write_text(new, encoding="utf-8")
    print(f"{options.readme}: tables written")
    return 0


def load(folder: Path) -> list[dict]:
    """The results files of a folder, CPUs first. Raises ValueError for one that cannot be read."""
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            results.append(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
    return sorted(results, key=lambda result: result["kind"])


def replaced(text: str, name: str, tables: str) -> str:
    """`text` with new tables between the markers of `name`. Raises ValueError where they are not there once each."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} and after it one {end}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{tables}\n{end}{rest.partition(end)[2]}"


def demo_table(content: dict) -> str:
    """The evaluation that `make demo` ends with: one network a line."""
    threat = content["threat"]
    columns = list(content["networks"][0]["accuracies"])
    table = [["network", "parameters", *columns]]
    for network in content["networks"]:
        name = {"pgd-at": "trained against PGD", "standard": "trained on clean images"}[network["recipe"]]
        accuracies = [f"{network['accuracies'][column]:.1%}" for column in columns]
        table.append([name, f"{network['parameters']:,}", *accuracies])
    ball = f"{threat['norm'].capitalize()} ball of radius {threat['epsilon']:g}"
    note = f"Accuracy on {content['images']:,} test images; attacks in the {ball}. One run, one seed."
    return f"{markdown(table)}\n\n{note}"


def render(results: list[dict]) -> str:
    """All tables as markdown, and what has not been measured."""
    parts = [device_section(result) for result in results]
    if not any(result["kind"] == "cpu" for result in results):
        parts.append("Not measured on a CPU yet: `make bench`.")
    if not any(result["kind"] == "cuda" for result in results):
        parts.append("Not measured on a GPU yet: `make gpu`.")
    return "\n\n".join([LEGEND, *parts] if results else parts)


def device_section(result: dict) -> str:
    """One device: what it is, the supernet's tables, the kernels' table."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    threads = f"{result['cpu_capability']}, {result['threads']} threads, " if result["kind"] == "cpu" else ""
    load = f"load {result['load_before'][0]:.2f} before the start, " if result["kind"] == "cpu" else ""
    ceilings = result["ceilings"]
    flops, stream = ceilings["flops_per_second"], ceilings["in_place_bytes_per_second"]
    head = (
        f"**{result['device']}** ({threads}{result['precision']}; {versions}; commit {result['commit']}; {load}"
        f"{result['date'][:10]}; `{result['command']}`). Ceilings measured there: {flops / 1e9:,.0f} GFLOP/s, "
        f"copy {ceilings['copy_bytes_per_second'] / 1e9:,.1f} GB/s, addition in place {stream / 1e9:,.1f} GB/s."
    )
    if result.get("selected"):
        head += " A part of the benchmarks."
    elif not result["complete"]:
        head += " The run did not finish: some rows are missing."
    rows = result["rows"]
    edges = [row for row in rows if row["job"].startswith(EDGES)]
    methods = [row for row in rows if row["job"] == METHODS]
    styles = [row for row in rows if row["job"].startswith(ACCELERATE)]
    networks = [row for row in rows if row["bytes_moved"] is None and row not in [*edges, *methods, *styles]]
    kernels = [row for row in rows if row["bytes_moved"] is not None]
    tables = [supernet_table(networks, flops)] if networks else []
    tables += profile_table(networks, flops, result["threads"])
    for batch in sorted({row["batch"] for row in edges}):
        tables.append(edge_table([row for row in edges if row["batch"] == batch], flops))
    tables += [method_table(methods)] if methods else []
    for prefix in ACCELERATE:
        part = [row for row in styles if row["job"].startswith(prefix)]
        tables += [style_table(part, flops, prefix)] if part else []
    tables += [kernel_table(kernels, stream)] if kernels else []
    return "\n\n".join([head, *tables, *remarks(rows)])


def supernet_table(rows: list[dict], peak: float) -> str:
    """One line per job and batch, one column per provider."""
    names = [name for name in PROVIDERS if any(row["provider"] == name for row in rows)]
    table = [["job", "batch", *(PROVIDERS[name] for name in names), "saved", "peak", "of peak"]]
    for group in groups(rows):
        eager = group.get("eager", {})
        times = [row["seconds_best"] for row in group.values() if row["seconds_best"]]
        flops = next((row["flops"] for row in group.values() if row["flops"]), None)
        first = next(iter(group.values()))
        table.append(
            [
                JOBS.get(first["job"], first["job"]),
                str(first["batch"]),
                *(time_and_ratio(group.get(name), eager) for name in names),
                both(group, "saved_bytes"),
                both(group, "peak_bytes"),
                f"{flops / min(times) / peak:.1%}" if flops and times else "-",
            ]
        )
    return markdown(table)


def both(group: dict[str, dict], field: str) -> str:
    """A size of eager NCHW, and that of rnas behind it."""
    text = size(group.get("eager", {}).get(field))
    ours = group.get("rnas", {}).get(field)
    return text if ours is None else f"{text}, rnas {size(ours)}"


def profile_table(rows: list[dict], peak: float, threads: int) -> list[str]:
    """Where the time of rnas goes, one column per job at its largest batch; nothing where no row has a profile."""
    largest: dict[str, dict] = {}
    for row in rows:  # there is none in files older than profiles, nor in those of GPUs
        if row.get("profile") and row["batch"] >= largest.get(row["job"], row)["batch"]:
            largest[row["job"]] = row
    columns = [largest[job] for job in JOBS if job in largest]
    if not columns:
        return []
    profiles = [row["profile"] for row in columns]
    table = [["where the time goes", *(f"{JOBS[row['job']]}, {row['batch']}" for row in columns)]]
    for kind in dict.fromkeys(kind for profile in profiles for kind in profile["seconds"]):
        cells = [share_and_rate(profile, kind, peak, threads) for profile in profiles]
        if any(cell != "-" for cell in cells):
            table.append([KINDS.get(kind, kind), *cells])
    whole = [threads * profile["wall_seconds"] for profile in profiles]
    inside = [profile["total_seconds"] for profile in profiles]
    waiting = [max(0, total - sum(profile["seconds"].values())) for profile, total in zip(profiles, inside)]
    table.append(["waiting, tables", *(f"{part / wall:.1%}" for part, wall in zip(waiting, whole))])
    table.append(["outside the kernels", *(f"{1 - part / wall:.1%}" for part, wall in zip(inside, whole))])
    note = (
        "Where the time of rnas goes, by job and batch: share of all threads' time in one run; in brackets the rate of "
        "the convolutions meanwhile, as a share of the arithmetic ceiling, for which what is computed a second time "
        "counts. *To the input*, *to the weights*: gradients. *Outside the kernels*: Python, stem, classifier, loss, "
        "`pgd_step`. Of PGD-7, one step."
    )
    return [f"{note}\n\n{markdown(table)}"]


def share_and_rate(profile: dict, kind: str, peak: float, threads: int) -> str:
    """A cell such as 31.2% (64%): of the time, and of the peak meanwhile; the latter only where there is arithmetic."""
    seconds, multiply_adds = profile["seconds"].get(kind, 0), profile["multiply_adds"].get(kind, 0)
    if not seconds:
        return "-"
    text = f"{seconds / (threads * profile['wall_seconds']):.1%}"
    return f"{text} ({2 * multiply_adds / seconds / (peak / threads):.0%})" if multiply_adds else text


def edge_table(rows: list[dict], peak: float) -> str:
    """Mixed edges by width, size and mode: times as fast as channels_last, and share of the peak."""
    found = groups(rows)
    cases = [next(iter(group.values()))["job"].removeprefix(EDGES).split("_") for group in found]
    columns = list(dict.fromkeys((mode, pixels) for mode, _, pixels in cases))
    table = [["mixed edge", *(f"{mode}, {pixels}" for mode, pixels in columns)]]
    for channels in sorted({int(channels) for _, channels, _ in cases}):
        cells = []
        for mode, pixels in columns:
            group = next((g for g, case in zip(found, cases) if case == [mode, str(channels), pixels]), {})
            ours, usual = (group.get(name, {}).get("seconds_best") for name in ("rnas", "channels_last"))
            if not ours or not usual:
                cells.append("-")
                continue
            share = group["rnas"]["flops"] / ours / peak
            cells.append(f"{duration(ours)} ({usual / ours:.1f}x), {share:.0%}")
        table.append([f"C={channels}", *cells])
    batch = rows[0]["batch"]
    note = (
        f"One mixed edge of the eight DARTS candidates by itself, batch {batch}: time of rnas, how many times as fast "
        "as channels_last, share of the arithmetic ceiling. *Training*: all gradients on batch statistics; *attack*: "
        "the gradient to the images on fixed ones."
    )
    return f"{note}\n\n{markdown(table)}"


def method_table(rows: list[dict]) -> str:
    """One line per method: the time of a step of the architecture, and how many times that of plain DARTS."""
    plain = rows[0]["seconds_best"]
    table = [["method", "one step of the architecture", "against plain DARTS", "peak memory"]]
    for row in rows:
        best = row["seconds_best"]
        times = [duration(best), f"{best / plain:.2g}x" if plain else "-"] if best else [row["status"], "-"]
        table.append([row["provider"], *times, size(row["peak_bytes"])])
    note = (
        f"One step of the architecture by every method, on the same supernet and a batch of {rows[0]['batch']}: making "
        "the examples of D_V, where the method has any, and the gradient. DSARA searches its own space; PC-DARTS mixes "
        "a quarter of the channels."
    )
    return f"{note}\n\n{markdown(table)}"


def style_table(rows: list[dict], peak: float, prefix: str) -> str:
    """One line per style of supernet: a training step before and after rnas.accelerate, in both memory formats."""
    names = ("eager", "channels_last", "accelerate", "accelerate_last")
    table = [["supernet", *(PROVIDERS[name] for name in names), "of peak"]]
    for group in groups(rows):
        first = next(iter(group.values()))
        seconds = [group[name]["seconds_best"] for name in names if name in group]
        cells = [time_and_ratio(group.get(name), group.get("eager", {})) for name in names]
        usual, ours = (group.get(name, {}).get("seconds_best") for name in ("channels_last", "accelerate_last"))
        if usual and ours:
            cells[-1] += f", {usual / ours:.1f}x channels_last"
        fastest = min((each for each in seconds if each), default=None)
        share = f"{first['flops'] / fastest / peak:.0%}" if fastest and first["flops"] else "-"
        table.append([first["job"].removeprefix(prefix), *cells, share])
    step = f"One training step, all gradients, batch {rows[0]['batch']}, "
    note = {
        ACCELERATE[0]: step + "of the first cell of supernets in the styles of other code (`tests/supernets`, C=16, "
        "32x32), as it is and after `rnas.accelerate`: what the fused operation gains by itself. *Samples*: the sum of "
        "so many steps, each with candidates of its own.",
        ACCELERATE[1]: step + "of the whole supernets (8 cells), with what is around the cells in plain PyTorch.",
    }[prefix]
    return f"{note}\n\n{markdown(table)}"


def kernel_table(rows: list[dict], stream: float) -> str:
    """One line per kernel and size: time, ratio, and share of the bandwidth of an addition in place."""
    names = [name for name in PROVIDERS if any(row["provider"] == name for row in rows)]
    table = [["kernel", "batch", *(PROVIDERS[name].replace("eager NCHW", "eager") for name in names)]]
    for group in groups(rows):
        first = next(iter(group.values()))
        cells = []
        for name in names:
            row = group.get(name)
            cell = time_and_ratio(row, group.get("eager", {}))
            if row and row["seconds_best"]:
                rate = row["bytes_moved"] / row["seconds_best"]
                cell += f", {rate / 1e9:,.1f} GB/s = {rate / stream:.0%}"
            cells.append(cell)
        table.append([JOBS.get(first["job"], first["job"]), str(first["batch"]), *cells])
    return markdown(table)


def groups(rows: list[dict]) -> list[dict[str, dict]]:
    """Rows of one job and batch together, by provider, in the order of JOBS."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        found.setdefault((row["job"], row["batch"]), {})[row["provider"]] = row
    order = list(JOBS)
    return [found[key] for key in sorted(found, key=lambda key: (order.index(key[0]) if key[0] in order else 99, *key))]


def time_and_ratio(row: dict | None, eager: dict) -> str:
    """A cell such as 3.58 s (1.8x); the status where there is no time."""
    if row is None:
        return "-"
    if row["seconds_best"] is None:
        return row["status"]
    text = duration(row["seconds_best"])
    if row is not eager and eager.get("seconds_best"):
        ratio = eager["seconds_best"] / row["seconds_best"]
        text += f" ({ratio:.{0 if ratio >= 10 else 1 if ratio >= 1 else 2}f}x)"
    return text


def remarks(rows: list[dict]) -> list[str]:
    """What the notes of the rows say, each once, with the providers that it is about."""
    said: dict[str, list[str]] = {}
    for row in rows:
        if row["note"]:
            who = PROVIDERS.get(row["provider"], row["provider"])
            if row["status"] != "measured":
                who = f"{who} for {JOBS.get(row['job'], row['job'])}, batch {row['batch']}"
            if who not in said.setdefault(row["note"], []):
                said[row["note"]].append(who)
    return ["\n".join(f"- {', '.join(who)}: {note}" for note, who in said.items())] if said else []


def markdown(table: list[list[str]]) -> str:
    """The first row is the head; numbers stand to the right."""
    rule = ["---", *(["---:"] * (len(table[0]) - 1))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [table[0], rule, *table[1:]])


def duration(seconds: float) -> str:
    """Three digits in a unit that fits."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            number = seconds * factor
            return f"{number:.{max(0, 3 - len(str(int(number))))}f} {unit}"
    raise AssertionError


def size(count: int | None) -> str:
    """Bytes in MiB or GiB."""
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
