"""What the report's figures draw, read back from their SVG."""

import re

import pytest
from benchmarks_example import report, result

from edgeprune.benchmarks.figures import latency_by_iteration, latency_histogram
from edgeprune.benchmarks.records import Report
from edgeprune.benchmarks.summary import row_figures


def inside(svg: str, name: str) -> str:
    """The drawing's group of this name, up to the next one of its kind."""
    (found,) = re.findall(rf'<g id="\w+-{name}">(.*?)</g>', svg, flags=re.DOTALL)
    return str(found)


def heights(svg: str) -> list[float]:
    return [float(y) for y in re.findall(r"[ML] \S+ (\S+)", svg)]


def test_latency_is_drawn_with_the_interval_of_the_ratio() -> None:
    """Each bar spans the 95 % interval of the ratio, times the unpruned's p50; the axis begins at 0 ms."""
    measured = report(6)
    rows = row_figures(measured)
    drawing = latency_by_iteration(measured, rows)
    assert drawing is not None
    bottom, *_, top = sorted(set(heights(inside(drawing.svg, "patch_2"))), reverse=True)
    ends = heights(inside(drawing.svg, "LineCollection_1"))  # low and high by iteration
    unpruned_ms = rows[0]["latency_engine_p50_ms"]
    per_ms = (bottom - ends[0]) / unpruned_ms
    assert bottom > ends[0] > top
    for row, low, high in zip(rows, ends[::2], ends[1::2], strict=True):
        assert (bottom - low) / per_ms == pytest.approx(row["latency_engine_ratio_low"] * unpruned_ms)
        assert (bottom - high) / per_ms == pytest.approx(row["latency_engine_ratio_high"] * unpruned_ms)
    assert ends[2] - ends[3] > 0


@pytest.mark.parametrize(
    ("run", "labels"),
    [
        (report(3), ["unpruned", "iteration 2"]),
        (report(3, [None, result(1), result(2)]), ["iteration 2"]),
        (report(1), ["unpruned"]),
    ],
    ids=["both", "last", "first"],
)
def test_the_histogram_names_what_it_shows(run: Report, labels: list[str]) -> None:
    """Each measured end of the run is named once for what it is, above the bars and not upon them."""
    drawing = latency_histogram(run)
    assert drawing is not None
    legend = drawing.svg[drawing.svg.index('id="histogram-legend_1"') :]
    assert re.findall(r">(unpruned|iteration \d+)</text>", legend) == labels
    top_of_axes = min(heights(inside(drawing.svg, "patch_2")))
    assert max(float(y) for y in re.findall(r' y="(\S+)" transform', legend)) < top_of_axes
