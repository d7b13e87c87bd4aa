"""Measures one job on one batch by all its providers: first whether they agree, then what each costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import measure
import profiles
import torch
from providers import CapturedGraph, Prepared
from torch import Tensor, nn

MEASURED, REFUSED, UNSUPPORTED, FAILED = "measured", "refused", "unsupported", "failed"


@dataclass
class Row:
    """What one provider costs for one job. Numbers are None where they were not or could not be measured.

    status: measured; refused (it disagrees with the reference, so its time means nothing); unsupported; failed.
    error: distance to the reference in the job's measure. first_call_seconds: with compilation, capture and warm-up.
    peak_bytes: memory of a run beside images and weights. saved_bytes: most that autograd holds for backward.
    launches: by the host, a CUDA graph counting as one. flops: of convolutions, a multiply-add being two.
    bytes_moved: the fewest that the job must read and write. profile: of a run of the sample, from profiles.take.
    """

    job: str
    provider: str
    batch: int
    status: str = MEASURED
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    first_call_seconds: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    launches: int | None = None
    flops: int | None = None
    bytes_moved: int | None = None
    profile: dict | None = None
    note: str = ""

    def as_dict(self) -> dict:
        """The row as it goes into the results file: best and median in place of all times."""
        row = {name: value for name, value in vars(self).items() if name != "seconds"}
        row["rounds"] = len(self.seconds)
        row["seconds_best"] = min(self.seconds) if self.seconds else None
        row["seconds_median"] = statistics.median(self.seconds) if self.seconds else None
        return row


@dataclass(frozen=True)
class Gate:
    """When two providers agree: distance(sample, reference's sample) <= tolerance.

    outcome: a number that sums up a whole run, for jobs whose sample is shorter than the job; it may differ from the
    reference's by a tenth.

    Of providers under autocast to one dtype, the first is plain PyTorch and the measure of the others, which may be 1.5
    times as far from the reference as it is: no fixed number fits what 16 bits do to a gradient.
    """

    distance: Callable[[list[Tensor], list[Tensor]], float]
    tolerance: float
    outcome: Callable[[list[Tensor]], float] | None = None


def compare(
    job: str,
    batch: int,
    candidates: dict[str, Callable[[], Prepared]],
    gate: Gate,
    *,
    device: str,
    budget_seconds: float,
    network: nn.Module | None = None,
    sample_of: int = 1,
    repeats: int = 1,
    profiled: Collection[str] = (),
) -> list[Row]:
    """One row per candidate; the first candidate is the reference, and an error of it is raised.

    budget_seconds: time for the timed rounds, of which there are at least two. network: whose parameters do not count
    as saved for backward (None: nothing is saved). sample_of: samples in a run. repeats: calls per timed round.
    profiled: candidates whose sample runs once more after the timed rounds, under the profile of the CPU kernels.
    """
    rows = {name: Row(job, name, batch) for name in candidates}
    ready: dict[str, Prepared] = {}
    expected: list[Tensor] | None = None
    plain: dict[torch.dtype, float] = {}
    for name, prepare in candidates.items():
        found = _first_call(rows[name], prepare, ready)
        if found is None:
            if expected is None:
                raise RuntimeError(f"{job}, batch {batch}: the reference {name} does not run: {rows[name].note}")
            continue
        expected = found if expected is None else expected
        error, autocast = gate.distance(found, expected), ready[name].autocast
        allowed = gate.tolerance if autocast is None else 1.5 * plain.setdefault(autocast, error)
        _check(rows[name], error, allowed, "distance to the reference")

    one_round = 0.0
    for name in _measured(rows):
        one_round += sample_of * repeats * _observe(rows[name], ready[name], device, network)
    rounds = max(2, min(20, int(budget_seconds / one_round)))
    outputs: dict[str, list[Tensor]] = {}
    times = measure.interleaved(
        {name: _keeping(ready[name].run, outputs, name) for name in _measured(rows)}, device, rounds, repeats
    )
    for name in times:
        rows[name].seconds = times[name]
        if name in profiled:
            rows[name].profile = profiles.take(ready[name].sample)
    if gate.outcome is not None:
        _check_outcomes(rows, {name: gate.outcome(output) for name, output in outputs.items()})
    return list(rows.values())


def _first_call(row: Row, prepare: Callable[[], Prepared], ready: dict[str, Prepared]) -> list[Tensor] | None:
    """Prepares and calls the sample once. None, and the reason in the row, where that is impossible."""
    start = time.perf_counter()
    try:
        prepared = prepare()
        found = [each.detach().clone() for each in prepared.sample()]
    except NotImplementedError as reason:
        row.status, row.note = UNSUPPORTED, str(reason)
        return None
    except Exception as error:  # a compiler or a capture may fail in any way, and the other rows are still worth having
        row.status, row.note = FAILED, f"{type(error).__name__}: {error}".splitlines()[0]
        return None
    row.first_call_seconds = time.perf_counter() - start
    row.note = prepared.note
    ready[row.provider] = prepared
    return found


def _check(row: Row, error: float, tolerance: float, what: str) -> None:
    row.error = error
    if not error <= tolerance:  # written so that NaN is refused
        row.status = REFUSED
        row.note = f"{what} {error:.2g}, allowed {tolerance:.2g}"


def _check_outcomes(rows: dict[str, Row], outcomes: dict[str, float]) -> None:
    expected = next(iter(outcomes.values()))
    for name, outcome in outcomes.items():
        if not abs(outcome - expected) <= 0.1 * abs(expected):
            rows[name].status, rows[name].seconds, rows[name].profile = REFUSED, [], None
            rows[name].note = f"a whole run ends at {outcome:.3g}, the reference's at {expected:.3g}"


def _measured(rows: dict[str, Row]) -> list[str]:
    return [name for name, row in rows.items() if row.status == MEASURED]


def _observe(row: Row, prepared: Prepared, device: str, network: nn.Module | None) -> float:
    """Memory, saved bytes and launches into the row. Returns the time of one sample."""
    times: list[float] = []
    row.peak_bytes = measure.peak_bytes(lambda: times.append(measure.seconds(prepared.sample, device)), device)
    if isinstance(prepared.sample, CapturedGraph):
        row.peak_bytes = prepared.sample.peak_bytes
    if network is not None:
        row.saved_bytes = measure.saved_bytes(prepared.eager, network)
    if device == "cuda":
        row.launches = measure.launches(prepared.run)
    return times[0]


def _keeping(run: Callable[[], list[Tensor]], outputs: dict[str, list[Tensor]], name: str) -> Callable[[], None]:
    def keep() -> None:
        outputs[name] = run()

    return keep
