"""Several runs side by side, the Pareto front, and the step that meets a condition."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from statistics import mean
from typing import Any, TypeVar

from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.ranking import fastest, is_ranked, most_accurate, on_front
from edgeprune.benchmarks.records import BenchmarkResult, Device, Report
from edgeprune.benchmarks.summary import Figures, row_figures
from edgeprune.benchmarks.table import COLUMNS, Column

Row = TypeVar("Row", bound=Figures)

# What a condition may name, and the figure that it means.
CONDITION_NAMES: Mapping[str, str] = {
    "ap": "device_ap",
    "ap50": "device_ap50",
    "latency_ms": "latency_engine_paired_ms",
    "p99_ms": "latency_engine_p99_ms",
    "end_to_end_ms": "latency_end_to_end_p50_ms",
    "fps": "fps",
    "images_per_s": "throughput_images_per_s",
    "params": "params",
    "macs": "macs",
    "size_bytes": "model_size_bytes",
    "joules_per_image": "joules_per_image",
    "joules_above_idle": "joules_per_image_above_idle",
}
_ACCURACY = ("ap", "ap50")
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {">=": ge, ">": gt, "<=": le, "<": lt}

CONDITIONS = ("target", "backend", "board", "power_mode", "clocks_locked")  # of one device, in one state
COMPARE_COLUMNS: tuple[Column, ...] = (
    Column("run", ("run",), str),
    Column("device", ("device",), str),
    Column("precision", ("precision",), str),
    Column("criterion", ("criterion",), str),
    *(column for column in COLUMNS if column.title in ("iteration", "params", "MACs", "AP50 on device")),
    Column("latency ms (engine)", ("latency_engine_paired_ms",), "{:.2f}".format),
    Column("of the unpruned (95 %)", ("latency_engine_ratio", "ratio_interval"), "{:.3f} ({})".format),
    *(column for column in COLUMNS if column.title in ("FPS", "Pareto front")),
)


def compare(reports: Sequence[Report]) -> list[Figures]:
    """One row a step of each run: its figures, where they were measured, whether it is on the Pareto front.

    A step is on the front if none under its conditions is as good in AP50 and latency and better in one. Runs
    that timed one and the same unpruned engine are ranked by their ratios to it: these are free of what changed
    on the device between the runs.
    """
    rows = [row for report in reports for row in _rows(report)]
    for group in _groups(rows):
        if _one_unpruned(group):
            unpruned_ms = mean({row["run"]: row["unpruned_ms"] for row in group}.values())
            for row in group:
                if row["latency_ranked_ms"] is not None:
                    row["latency_ranked_ms"] *= unpruned_ms / row["unpruned_ms"]
        for row in group:
            row["on_front"] = on_front(row, group)
    return list(rows)


def reservations(rows: Sequence[Figures]) -> list[str]:
    """What a reader must know before setting one run of `compare` against another, a sentence each."""
    found = []
    groups = [group for group in _groups(rows) if any(map(is_ranked, group))]
    if len(groups) > 1:
        found.append(
            "The runs differ in device, power mode, clocks or validation set: each has a Pareto front of its own."
        )
    for group in groups:
        unpruned_ms = {row["run"]: row["unpruned_ms"] for row in group}
        runs = ", ".join(unpruned_ms)
        if len(unpruned_ms) > 1 and _one_unpruned(group):
            took = ", ".join(f"{ms:.2f}" for ms in unpruned_ms.values())
            found.append(
                f"Timed apart: {runs}. Their one unpruned engine took {took} ms; they are ranked by the ratio to it."
            )
        elif len(unpruned_ms) > 1:
            found.append(
                f"Timed apart, with no unpruned engine in common: {runs}. Between them a small difference in latency "
                "may be the device's, not the detector's."
            )
    disturbed = {(row["run"], row["disturbed"]) for row in rows if row["disturbed"]}
    found += [f"{run} was measured under a disturbance: {reason}." for run, reason in sorted(disturbed)]
    return found


def _rows(report: Report) -> Iterator[dict[str, Any]]:
    device, unpruned = report.device, report.rows[0].result
    figures = row_figures(report)
    told = {
        "run": report.name,
        "device": _short(device) if device else None,
        **{name: getattr(device, name) if device else None for name in CONDITIONS},
        "val_sha256": report.provenance.get("hashes", {}).get("val"),
        "unpruned_engine": _engine(unpruned) if unpruned else None,
        "unpruned_ms": figures[0]["latency_engine_p50_ms"],
    }
    for row in figures:
        yield {**told, **row, "ratio_interval": _interval(row)}


@dataclass(frozen=True)
class Condition:
    """One comparison, such as ``ap50>=0.55``."""

    name: str  # in CONDITION_NAMES
    operator: str
    limit: float

    def holds(self, row: Figures) -> bool:
        """False, too, for what was not measured."""
        value = row[CONDITION_NAMES[self.name]]
        return value is not None and _OPERATORS[self.operator](value, self.limit)

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.limit:g}"


def parse_conditions(text: str) -> tuple[Condition, ...]:
    """Read conditions separated by commas: ``"ap50>=0.55"`` or ``"latency_ms<=15, ap50>0.5"``.

    Raises:
        BenchmarkError: If one is malformed or names no figure.
    """
    conditions = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*([0-9.eE+-]+)\s*", part)
        try:
            name, operator, limit = found.groups() if found else ("", "", "")
            conditions.append(Condition(name, operator, float(limit)))
        except ValueError:
            raise BenchmarkError(f'condition "{part.strip()}": write it as "ap50>=0.55"') from None
        if name not in CONDITION_NAMES:
            raise BenchmarkError(
                f"unknown figure {name!r} in a condition; known: {', '.join(CONDITION_NAMES)}"
            )
    return tuple(conditions)


def pick(rows: Sequence[Figures], conditions: Sequence[Condition]) -> Figures:
    """The step to ship: of those that meet all conditions the fastest, or the most accurate.

    Conditions on accuracy alone, or on both sides, leave speed to be gained: the lowest engine latency wins.
    Conditions on cost alone leave accuracy: the highest AP50 wins. The other one of the two decides a tie, then
    the parameters.

    Args:
        rows: as `compare` gives them.

    Raises:
        BenchmarkError: If no step was measured, the rows were measured on several devices or validation sets, or
            no step meets the conditions.
    """
    ranked = [row for row in rows if is_ranked(row)]
    if not ranked:
        raise BenchmarkError("no step was measured: run `edgeprune bench`")
    if len({_device(row) for row in ranked}) > 1:
        raise BenchmarkError(
            "the runs were measured on several devices, or in several power modes: pick among runs of one"
        )
    if len({row["val_sha256"] for row in ranked}) > 1:
        raise BenchmarkError(
            "the runs have several validation sets, so no AP compares: pick among runs of one"
        )
    meeting = [row for row in ranked if all(condition.holds(row) for condition in conditions)]
    if not meeting:
        raise BenchmarkError(_nearest(ranked, conditions, unmeasured=len(rows) - len(ranked)))
    return (fastest if any(condition.name in _ACCURACY for condition in conditions) else most_accurate)(
        meeting
    )


def _nearest(ranked: Sequence[Figures], conditions: Sequence[Condition], unmeasured: int) -> str:
    """Why no step was picked, and how near the best one comes to each condition."""
    wanted = ", ".join(map(str, conditions))
    best = []
    for condition in conditions:
        values = [value for row in ranked if (value := row[CONDITION_NAMES[condition.name]]) is not None]
        if values:
            extreme = max(values) if condition.operator.startswith(">") else min(values)
            best.append(f"{condition.name} reaches {extreme:.4g}")
        else:
            best.append(f"{condition.name} was not measured")
    if unmeasured:
        best.append(f"not measured: {unmeasured}, run `edgeprune bench`")
    return f"no{' measured' if unmeasured else ''} step has {wanted}: {'; '.join(best)}"


def _engine(result: BenchmarkResult) -> str:
    """What makes an engine's latency, but for the device."""
    version = result.device.details.get("backends", {}).get(result.device.backend, {}).get("version")
    return f"{result.model_sha256} {result.precision} version={version} threads={result.threads}"


def _short(device: Device) -> str:
    """Its line, short enough for a table."""
    parts = (
        f"{device.target} ({device.backend})",
        device.power_mode,
        device.clocks_locked and "clocks locked",
    )
    return ", ".join(part for part in parts if part)


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one device, in one power mode, on one validation set: what a Pareto front holds for."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((_device(row), row["val_sha256"]), []).append(row)
    return list(groups.values())


def _device(row: Figures) -> tuple[Any, ...]:
    return tuple(row[name] for name in CONDITIONS)


def _one_unpruned(group: Sequence[Figures]) -> bool:
    """Whether all runs timed their steps beside the same engine."""
    engines = {row["unpruned_engine"] for row in group}
    return len(engines) == 1 and None not in engines


def _interval(figures: Figures) -> str | None:
    low, high = figures["latency_engine_ratio_low"], figures["latency_engine_ratio_high"]
    if low is None or high is None:
        return None
    if low == high == 1:
        return "the unpruned"
    return f"{low:.3f} to {high:.3f}" + (", no difference shown" if low <= 1 <= high else "")
