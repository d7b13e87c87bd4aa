"""What was found in a model, what was made faster, and what was left as it is and why."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counts:
    """What the accelerated modules have computed, and how, since the call of `accelerate`."""

    cells: int = 0
    """Whole cells by one call of the fused operation."""
    edges: int = 0
    """Mixed edges by the fused operation, those of whole cells included."""
    alone: int = 0
    """Results of single candidates by their own forward: something else than a weighted sum was made of them."""
    given_back: int = 0
    """Modules that run as before after all, because their code does not take results that are not computed yet."""


@dataclass(frozen=True)
class Replaced:
    """A module whose candidates are fused now."""

    name: str
    """As in `model.named_modules()`; "" for the model itself."""
    kind: str
    """Its class."""
    candidates: dict[str, str]
    """Name of each fused candidate, from the module on, and the primitive that it is."""


@dataclass(frozen=True)
class Left:
    """A module that stays as it is."""

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """What `rnas.accelerate` did. `print(report)` tells it in words; `counts` goes on while the model runs."""

    replaced: list[Replaced] = field(default_factory=list)
    in_front: dict[str, str] = field(default_factory=dict)
    """Name of each fused layer in front of a cell, and what it is."""
    left: list[Left] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def __str__(self) -> str:
        lines = []
        if not self.replaced:
            lines.append("rnas.accelerate found no mixed operations; the model is as it was.")
        else:
            fused = sum(len(each.candidates) for each in self.replaced)
            lines.append(f"rnas.accelerate fused {fused} candidates of {len(self.replaced)} mixed operations:")
            lines += _rows([(each.name or "the model", each.kind, _listed(each.candidates)) for each in self.replaced])
            if self.in_front:
                lines.append(f"and {len(self.in_front)} layers in front of cells.")
        if self.left:
            lines.append("Left as they are:")
            lines += _rows([(each.name or "the model", each.kind, each.reason) for each in self.left])
        if self.counts != Counts():
            lines.append(
                f"Since then: {self.counts.edges} edges fused, in {self.counts.cells} whole cells and by themselves; "
                f"{self.counts.alone} candidates computed alone, {self.counts.given_back} modules that run as before "
                "after all."
            )
        return "\n".join(lines)


def _listed(candidates: dict[str, str]) -> str:
    return ", ".join(candidates.values())


def _rows(rows: list[tuple[str, str, str]], most: int = 12) -> list[str]:
    """Lines of (name, class, text); those with one class and text together."""
    merged: dict[tuple[str, str], list[str]] = {}
    for name, kind, text in rows:
        merged.setdefault((kind, text), []).append(name)
    lines = []
    for (kind, text), names in list(merged.items())[:most]:
        shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        lines.append(f"  {shown} ({kind}): {text}")
    if len(merged) > most:
        lines.append(f"  and {len(merged) - most} other kinds: see the report's lists")
    return lines
