"""The table of a comparison: mean and spread over the seeds, and which differences the spread is too wide for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["within the spread", "above", "below", "unknown"]


@dataclass(frozen=True)
class Spread:
    """A number over several seeds."""

    mean: float
    std: float | None
    """Standard deviation of a sample, with n - 1 in the denominator; None for one seed."""
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one number."""
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, min(values), max(values), len(values))


@dataclass(frozen=True)
class MethodRow:
    """One line of the table: accuracies in [0, 1] by column, seconds, and parameters without auxiliary head."""

    method: str
    space: str
    accuracies: dict[str, Spread]
    search_seconds: Spread
    parameters: Spread


@dataclass(frozen=True)
class Table:
    """All rows, and how each method stands to the references by clean accuracy and by the last column's."""

    rows: tuple[MethodRow, ...]
    columns: tuple[str, ...]
    against: dict[str, dict[str, dict[str, Verdict]]]
    """Column -> reference -> method -> verdict."""
    seeds: int


def make_table(networks: Sequence[Mapping], references: Sequence[str]) -> Table:
    """The table of networks given as {method, space, accuracies, search_seconds, parameters}, one per seed."""
    rows = []
    for method in dict.fromkeys(network["method"] for network in networks):
        own = [network for network in networks if network["method"] == method]
        columns = tuple(own[0]["accuracies"])
        rows.append(
            MethodRow(
                method,
                own[0]["space"],
                {column: Spread.of([network["accuracies"][column] for network in own]) for column in columns},
                Spread.of([network["search_seconds"] for network in own]),
                Spread.of([network["parameters"] for network in own]),
            )
        )
    by_name = {row.method: row for row in rows}
    against = {
        column: {
            reference: {
                row.method: verdict(row.accuracies[column], by_name[reference].accuracies[column])
                for row in rows
                if row.method != reference
            }
            for reference in references
        }
        for column in dict.fromkeys((columns[0], columns[-1]))
    }
    return Table(tuple(rows), columns, against, rows[0].search_seconds.count)


def verdict(spread: Spread, reference: Spread) -> Verdict:
    """above or below where every seed is on that side of every seed of the reference; unknown for a single seed."""
    if spread.count < 2 or reference.count < 2:
        return "unknown"
    if spread.least > reference.most:
        return "above"
    return "below" if spread.most < reference.least else "within the spread"


def chance_of_separation(seeds: int) -> int:
    """n, where the ranges of two methods that do not differ separate by chance in 1 of n comparisons.

    All orders of 2 * seeds results are equally likely then, and 2 of the (2 seeds choose seeds) splits separate them.
    """
    return math.comb(2 * seeds, seeds) // 2


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table as text."""
    head = ["method", *(f"{column}, %" for column in table.columns), "search, s", "parameters"]
    lines = [
        [
            row.method,
            *(text(row.accuracies[column], 100, 1) for column in table.columns),
            text(row.search_seconds, 1, 1),
            text(row.parameters, 1, 0),
        ]
        for row in table.rows
    ]
    return head, lines


def text(spread: Spread, scale: float, digits: int) -> str:
    """mean ± standard deviation (least to most); the mean alone where all seeds agree or there is one."""
    mean, std, least, most = (
        f"{scale * (value or 0.0):,.{digits}f}" for value in (spread.mean, spread.std, spread.least, spread.most)
    )
    return mean if spread.least == spread.most else f"{mean} ± {std} ({least} to {most})"


def sentences(table: Table) -> list[str]:
    """What the spread allows to say about the methods beside the references."""
    if table.seeds < 2:
        return ["One seed has no spread: no difference in this table is shown to be more than chance."]
    found = []
    for column, references in table.against.items():
        for reference, verdicts in references.items():
            groups = {
                "within the spread, so no difference is shown": "within the spread",
                "above it in every seed": "above",
                "below it in every seed": "below",
            }
            parts = [
                f"{', '.join(names)} {words}"
                for words, wanted in groups.items()
                if (names := [method for method, given in verdicts.items() if given == wanted])
            ]
            found.append(f"{column} against {reference}: {'; '.join(parts)}.")
    found.append(
        f"Within the spread: the ranges over the seeds overlap. Even where they do not, {table.seeds} seeds prove "
        f"little: the ranges of two methods that do not differ separate in 1 of {chance_of_separation(table.seeds)} "
        "comparisons."
    )
    return found


def markdown(table: Table, notes: Sequence[str]) -> str:
    """The table in Markdown, the sentences on its differences, and `notes`."""
    head, lines = cells(table)
    rule = ["---", *["---:"] * (len(head) - 1)]
    rows = [f"| {' | '.join(line)} |" for line in (head, rule, *lines)]
    points = [f"- {line}" for line in (*sentences(table), *notes)]
    return "\n".join([*rows, "", *points]) + "\n"
