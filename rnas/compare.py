"""The comparison job: methods and seeds on one budget, one training recipe, one protocol, and one table with spread."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from . import compare_plot, evaluate, search, train
from .compare_notes import added_note, describe_machine, notes
from .compare_plan import (
    REFERENCES,
    Cell,
    added_methods,
    all_cells,
    all_methods,
    evaluate_config,
    resolve,
    search_config,
    train_config,
)
from .compare_table import Table, make_table, markdown
from .config import CompareConfig
from .loop import Interrupted, cpu_threads
from .network import count_parameters
from .runs import Run, write_text
from .settings import merge, to_dict

STAGES = ("search", "train", "evaluate")


@dataclass(frozen=True)
class CompareResult:
    """What a comparison leaves behind."""

    table: Table
    notes: tuple[str, ...]
    """What table.md says below the table: protocol, budget, machine and command."""
    run: Path
    files: tuple[Path, ...]


def compare(config: CompareConfig, *, command: str = "") -> CompareResult:
    """Search, train and evaluate every method with every seed and write the table to the run folder.

    command: what the user typed, for table.md.
    Raises ValueError, FileNotFoundError or ImportError for anything that one of the jobs would refuse, FileExistsError
    for a run folder that is there already, all before anything is written; `rnas.loop.Interrupted` after Ctrl-C or
    SIGTERM, with everything finished kept.
    """
    config = resolve(config)
    Run.refuse_existing(config.run, "compare")
    files = {"command.txt": (command or "rnas.compare.compare, called from Python") + "\n"}
    return _compare(config, Run.create(config.run, "compare", to_dict(config), files))


def resume(path: str | Path, *, quiet: bool = False) -> CompareResult:
    """Go on with an interrupted comparison; what is finished stays. On a CPU every number but the times is then that of
    an uninterrupted comparison. Raises as `compare` does."""
    run = Run.open(path, "compare")
    config = merge(CompareConfig(), _without_options(run.read_config()))
    return _compare(resolve(dataclasses.replace(config, run=str(path), quiet=quiet)), run)


def _without_options(values: dict) -> dict:
    """A saved configuration without the search's options, which are never set: each method has its own."""
    shared = {key: value for key, value in values.get("search", {}).items() if key != "options"}
    return {**values, "search": shared}


def _compare(config: CompareConfig, run: Run) -> CompareResult:
    with run.locked(), cpu_threads(config.threads), _terminable():
        try:
            journal = Journal(run)
            journal.log("session", at=time.time(), machine=describe_machine(config), load=os.getloadavg())
            report = _Report(config, journal)
            for number, (cell, stage) in enumerate((cell, stage) for cell in all_cells(config) for stage in STAGES):
                if journal.find("done", stage, cell):
                    continue
                report.stage(number, stage, cell)
                try:
                    _work(config, run, journal, stage, cell)
                except FloatingPointError as error:
                    raise FloatingPointError(f"{stage} of {cell.method}, seed {cell.seed}: {error}") from None
            return _finish(config, run, journal)
        except (Interrupted, KeyboardInterrupt):
            raise Interrupted(str(run.path)) from None


class Journal:
    """What a comparison has done so far: the records of its metrics.jsonl, which hold every number of the table."""

    def __init__(self, run: Run) -> None:
        self.run, self.records = run, run.read_metrics()
        # a line that a kill cut off would swallow the next one
        write_text(run.metrics_path, "".join(json.dumps(record) + "\n" for record in self.records))

    def log(self, kind: str, stage: str = "", cell: Cell | None = None, **values: object) -> None:
        """Append one record; it is on the disk when this returns."""
        place = {"stage": stage, **dataclasses.asdict(cell)} if cell else {}
        self.records.append({"kind": kind, **place, **values})
        self.run.log(self.records[-1])

    def find(self, kind: str, stage: str = "", cell: Cell | None = None) -> list[dict]:
        """The records of that kind, of one stage and one network where these are given."""
        wanted = {"kind": kind, **({"stage": stage} if stage else {}), **(dataclasses.asdict(cell) if cell else {})}
        return [record for record in self.records if all(record.get(key) == wanted[key] for key in wanted)]


def _work(config: CompareConfig, run: Run, journal: Journal, stage: str, cell: Cell) -> None:
    """Do or finish one stage of one network, and log its numbers."""
    began = time.monotonic()
    if stage == "evaluate":
        journal.log("start", stage, cell, at=time.time())
        table = evaluate.evaluate(evaluate_config(config, cell))
        seconds = time.monotonic() - began
        threat = {name: getattr(table.attack, name) for name in ("norm", "epsilon", "step_size")}
        numbers = {"accuracies": table.rows[0].accuracies, "images": table.images, "threat": threat}
    else:
        sub = Run(run.path / cell.folder(stage), stage)
        interrupted = sub.path.exists()
        journal.log("start", stage, cell, at=time.time())
        if stage == "search":
            found = search.resume(sub.path, quiet=True) if interrupted else search.search(search_config(config, cell))
            numbers = {"space": sub.read_config()["space"], "genotype": found.genotype.to_dict()}
            numbers["remarks"] = list(found.remarks)
        else:
            trained = train.resume(sub.path, quiet=True) if interrupted else train.train(train_config(config, cell))
            numbers = {"parameters": count_parameters(trained.network)}
        seconds = math.fsum(record["seconds"] for record in sub.read_metrics())
    journal.log("done", stage, cell, **numbers, seconds=round(seconds, 3), wall_seconds=time.monotonic() - began)


class _Report:
    """One line before every stage: where the comparison stands, the time so far, and about how long is left."""

    def __init__(self, config: CompareConfig, journal: Journal) -> None:
        self.config, self.journal = config, journal
        self.began = time.monotonic()
        self.before = math.fsum(record["wall_seconds"] for record in journal.find("done"))
        methods = all_methods(config)
        networks = len(methods) * len(config.seeds)
        self.total = networks * len(STAGES)
        self._write(f"{networks} networks: {', '.join(methods)}; seeds {', '.join(map(str, config.seeds))}")
        if added_methods(config):
            self._write(added_note(config))

    def stage(self, number: int, stage: str, cell: Cell) -> None:
        """Say what is done next; `number` stages are done."""
        so_far = _clock(self.before + time.monotonic() - self.began)
        left = self._left()
        remains = "" if left is None else f", about {_clock(left)} left"
        self._write(f"{number + 1}/{self.total}  {stage} {cell.method}, seed {cell.seed}  {so_far} so far{remains}")

    def _left(self) -> float | None:
        """Seconds of all open stages, each as long as those of its method or else of its kind; None: none is done."""
        left = 0.0
        for cell in all_cells(self.config):
            for stage in STAGES:
                if self.journal.find("done", stage, cell):
                    continue
                known = self.journal.find("done", stage)
                known = [record for record in known if record["method"] == cell.method] or known
                if not known:
                    return None
                left += math.fsum(record["wall_seconds"] for record in known) / len(known)
        return left

    def _write(self, text: str) -> None:
        if not self.config.quiet:
            print(f"compare: {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _finish(config: CompareConfig, run: Run, journal: Journal) -> CompareResult:
    """Write compare.json, table.md and the picture."""
    networks = [_network(journal, cell) for cell in all_cells(config)]
    table = make_table(networks, REFERENCES)
    evaluated = journal.find("done", "evaluate")[0]
    protocol = {name: evaluated[name] for name in ("threat", "images")}
    sessions = journal.find("session")
    command = (run.path / "command.txt").read_text(encoding="utf-8").strip()
    content = {
        "rows": [dataclasses.asdict(row) for row in table.rows],
        "against": table.against,
        "networks": networks,
        **protocol,
        "added_methods": added_methods(config),
        "command": command,
        "configuration": to_dict(config),
        "sessions": sessions,
        "stages": [{key: value for key, value in each.items() if key != "genotype"} for each in journal.find("done")],
    }
    below = notes(config, networks, protocol, [session["machine"] for session in sessions], command)
    files = [
        write_text(run.path / "table.md", markdown(table, below)),
        write_text(run.path / "compare.json", json.dumps(content, indent=2) + "\n"),
    ]
    try:
        picture = run.path / "clean_vs_robust"
        files += compare_plot.draw_clean_vs_robust(networks, table.columns[0], table.columns[-1], picture)
    except ImportError as error:  # matplotlib is missing: the table itself is complete
        print(f"no picture: {error}")
    return CompareResult(table, tuple(below), run.path, (*files, run.metrics_path, run.config_path))


def _network(journal: Journal, cell: Cell) -> dict:
    """Every number of one network."""
    found, trained, evaluated = (journal.find("done", stage, cell)[0] for stage in STAGES)
    return {
        **dataclasses.asdict(cell),
        "space": found["space"],
        "accuracies": evaluated["accuracies"],
        "parameters": trained["parameters"],
        "search_seconds": found["seconds"],
        "train_seconds": trained["seconds"],
        "evaluate_seconds": evaluated["seconds"],
        "genotype": found["genotype"],
        "remarks": found.get("remarks", []),
    }


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt between the loops of the jobs, as Ctrl-C does."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread: an embedding program keeps its own handling
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
