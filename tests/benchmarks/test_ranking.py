"""Fronts by hand and by property, and rankings that a drifting device must not change."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from benchmarks_example import report, result
from hypothesis import given
from hypothesis import strategies as st
from simulated import SimulatedDevice

from edgeprune.benchmarks.compare import compare, parse_conditions, pick
from edgeprune.benchmarks.measure import BenchmarkOptions, measure_interleaved
from edgeprune.benchmarks.ranking import fastest, most_accurate, on_front
from edgeprune.benchmarks.records import Report
from edgeprune.benchmarks.statistics import summarise
from edgeprune.benchmarks.summary import headline, row_figures
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.session import Session

STEPS_MS = [10.0, 9.7, 9.4, 9.1, 8.8, 8.5]  # each step is 3 % faster than the one before
OPTIONS = BenchmarkOptions(
    runs=210, min_seconds=0, block_runs=10
)  # 21 rounds: the clock falls within the middle one
SECONDS = sum(STEPS_MS) * OPTIONS.runs / 1000


def row(latency_ms: float | None, ap50: float | None, params: int = 1) -> dict[str, Any]:
    return {"latency_ranked_ms": latency_ms, "device_ap50": ap50, "params": params}


def front(points: Sequence[tuple[float, float]]) -> list[bool | None]:
    rows = [row(latency, ap50) for latency, ap50 in points]
    return [on_front(one, rows) for one in rows]


def test_the_front_by_hand() -> None:
    """Off the front: slower and less accurate, or equal in one and worse in the other; equals share it."""
    assert front([(10, 0.6), (8, 0.5), (9, 0.45), (10, 0.55), (12, 0.6), (8, 0.5)]) == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    assert on_front(row(None, 0.6), [row(1, 1)]) is None


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_the_front_bounds_all(points: list[tuple[int, int]]) -> None:
    """What is off the front is beaten by one on it; along the front AP50 rises with latency."""
    marks = front(points)
    on = {point for point, mark in zip(points, marks, strict=True) if mark}
    for point, mark in zip(points, marks, strict=True):
        if not mark:
            assert any(x <= point[0] and y >= point[1] and (x, y) != point for x, y in on)
    aps = [ap50 for _, ap50 in sorted(on)]
    assert aps == sorted(set(aps))


def test_ties_go_to_the_better_step() -> None:
    """Of equally fast steps the accurate one is taken, of equally accurate ones the fast, of equal ones the small."""
    rows = [row(8, 0.5), row(8, 0.6, params=3), row(8, 0.6, params=2), row(9, 0.6)]
    assert fastest(rows) is rows[2]
    assert most_accurate(rows) is rows[2]


def gradual(time_s: float) -> float:
    return 1 + 0.3 * min(time_s / SECONDS, 1)


def at_once(time_s: float) -> float:
    return 1.3 if time_s > SECONDS / 2 else 1.0


def measured(slowdown: Callable[[float], float]) -> Report:
    """A run of `STEPS_MS` on a device that drifts; AP50 falls by 0.003 an iteration from 0.600."""
    device = SimulatedDevice(STEPS_MS, slowdown)
    found = measure_interleaved(cast(Session, device), device.engines, [], Preprocessing(), OPTIONS)
    results = []
    for iteration, blocks in enumerate(found.blocks):
        samples = [ms for block in blocks for ms in block.samples_ms["engine"]]
        latencies = (summarise(samples, "engine"),)
        results.append(replace(result(iteration), latencies=latencies, blocks=tuple(blocks)))
    return report(len(results), results)


@pytest.mark.parametrize("slowdown", [gradual, at_once])
def test_a_drift_of_30_percent_changes_no_choice(slowdown: Callable[[float], float]) -> None:
    """Front, pick and headline name the steps that are truly faster, whenever the device grew 30 % slower."""
    drifted = measured(slowdown)
    rows = compare([drifted])
    assert [row["on_front"] for row in rows] == [True] * 6
    for lowest, iteration in (("0.0", 5), ("0.59", 3), ("0.599", 0)):
        assert pick(rows, parse_conditions(f"ap50>={lowest}"))["iteration"] == iteration
    # The round in which the clock falls is wrong by 1.3; of 21 rounds that is 1.3 % in their geometric mean.
    for row, true_ms in zip(rows, STEPS_MS, strict=True):
        assert row["latency_engine_paired_ms"] / rows[0]["latency_engine_p50_ms"] == pytest.approx(
            true_ms / STEPS_MS[0], rel=0.02
        )
    choice = headline(drifted).choice
    assert choice is not None and "latency: 0, 1, 2, 3, 4, 5; fastest within 0.01 AP50" in choice
    assert "iteration 3, 1.1" in choice


def test_the_pooled_median_would_have_chosen_wrong() -> None:
    """Where the clock fell in the middle round, each step's p50 tells on which side most of its runs lie."""
    pooled = [row["latency_engine_p50_ms"] for row in row_figures(measured(at_once))]
    assert pooled != sorted(pooled, reverse=True)
