"""Several runs side by side, the Pareto front, and the step that meets a condition."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any

from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.records import Report
from edgeprune.benchmarks.summary import Figures, row_figures
from edgeprune.benchmarks.table import COLUMNS, Column

# What a condition may name, and the figure that it means.
CONDITION_NAMES: Mapping[str, str] = {
    "ap": "device_ap",
    "ap50": "device_ap50",
    "latency_ms": "latency_engine_p50_ms",
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

COMPARE_COLUMNS: tuple[Column, ...] = (
    Column("run", ("run",), str),
    Column("device", ("target", "backend"), "{} ({})".format),
    Column("precision", ("precision",), str),
    Column("criterion", ("criterion",), str),
    *(column for column in COLUMNS if column.title in ("iteration", "params", "MACs", "AP50 on device")),
    Column("latency p50 ms (engine)", ("latency_engine_p50_ms",), "{:.2f}".format),
    Column("of the unpruned (95 %)", ("latency_engine_ratio", "ratio_interval"), "{:.3f} ({})".format),
    Column("FPS", ("fps",), "{:.1f}".format),
    Column("Pareto front", ("on_front",), lambda on_front: "yes" if on_front else "no"),
)


def compare(reports: Sequence[Report]) -> list[Figures]:
    """One row a step of each run: its figures, where they were measured, whether it is on the Pareto front.

    A step is on the front if none on its device is as good in AP50 and latency and better in one.
    """
    rows: list[dict[str, Any]] = []
    for report in reports:
        device = report.device
        where = {name: getattr(device, name) if device else None for name in ("target", "backend", "board")}
        rows += [
            {"run": report.name, **where, **figures, "ratio_interval": _interval(figures)}
            for figures in row_figures(report)
        ]
    for row in rows:
        rivals = [other for other in rows if _device(other) == _device(row)]
        row["on_front"] = on_front(row, rivals)
    return list(rows)


def on_front(row: Figures, rivals: Iterable[Figures]) -> bool | None:
    """Whether no rival is as good in AP50 and latency and better in one; None where one was not measured."""
    point = _point(row)
    if point is None:
        return None
    others = [other for other in map(_point, rivals) if other is not None]
    return not any(
        latency <= point[0] and ap50 >= point[1] and (latency, ap50) != point for latency, ap50 in others
    )


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
    Conditions on cost alone leave accuracy: the highest AP50 wins. Fewer parameters decide a tie.

    Raises:
        BenchmarkError: If the rows are of several devices, or no step meets the conditions.
    """
    if len({_device(row) for row in rows if row["target"]}) > 1:
        raise BenchmarkError("the runs were measured on several devices: pick among runs of one device")
    meeting = [row for row in rows if _point(row) and all(condition.holds(row) for condition in conditions)]
    if not meeting:
        raise BenchmarkError(_nearest(rows, conditions))
    if any(condition.name in _ACCURACY for condition in conditions):
        return min(meeting, key=lambda row: (row["latency_engine_p50_ms"], row["params"]))
    return min(meeting, key=lambda row: (-row["device_ap50"], row["params"]))


def _nearest(rows: Sequence[Figures], conditions: Sequence[Condition]) -> str:
    """Why no step was picked, and how near the best one comes to each condition."""
    wanted = ", ".join(map(str, conditions))
    best = []
    for condition in conditions:
        values = [value for row in rows if (value := row[CONDITION_NAMES[condition.name]]) is not None]
        if values:
            extreme = max(values) if condition.operator.startswith(">") else min(values)
            best.append(f"{condition.name} reaches {extreme:.4g}")
        else:
            best.append(f"{condition.name} was not measured")
    return f"no step has {wanted}: {'; '.join(best)}"


def _point(row: Figures) -> tuple[float, float] | None:
    latency, ap50 = row["latency_engine_p50_ms"], row["device_ap50"]
    return None if latency is None or ap50 is None else (latency, ap50)


def _device(row: Figures) -> tuple[Any, Any, Any]:
    return (row["target"], row["backend"], row["board"])


def _interval(figures: Figures) -> str | None:
    low, high = figures["latency_engine_ratio_low"], figures["latency_engine_ratio_high"]
    if low is None or high is None:
        return None
    if low == high == 1:
        return "the unpruned"
    return f"{low:.3f} to {high:.3f}" + (", no difference shown" if low <= 1 <= high else "")
