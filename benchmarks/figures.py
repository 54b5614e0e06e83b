"""The report's figures as inline SVG: one drawing for light and dark, its text readable on a phone."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from edgeprune.benchmarks.records import Report
from edgeprune.benchmarks.summary import Figures

# Drawn in colours that occur nowhere else, then replaced by the page's CSS variables.
INK, MUTED, GRID, ACCENT, SECOND = "#010203", "#010204", "#010205", "#010206", "#010207"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", ACCENT: "--accent", SECOND: "--second"}

# A phone shows a figure at about its natural width, so that 9 pt stays 9 pt.
_WIDTH_IN, _HEIGHT_IN = 5.0, 3.1

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's own typeface
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Drawing:
    """One figure of the report."""

    title: str
    caption: str  # what is drawn, and how it was measured
    svg: str


def draw(report: Report, rows: Sequence[Figures]) -> list[Drawing]:
    """The figures that this report has the numbers for."""
    candidates = [
        ap_by_iteration(rows),
        latency_by_iteration(report, rows),
        ap_by_latency(rows),
        size_by_iteration(rows),
        channels_by_layer(report),
    ]
    return [drawing for drawing in candidates if drawing is not None]


def ap_by_iteration(rows: Sequence[Figures]) -> Drawing | None:
    series = [
        ("before fine-tuning, host", "ap50_before", MUTED, "v:"),
        ("after fine-tuning, host", "ap50_after", SECOND, "s--"),
        ("on the device", "device_ap50", ACCENT, "o-"),
    ]
    with _canvas("ap") as canvas:
        for label, name, color, style in series:
            points = _points(rows, "iteration", name)
            if points:
                canvas.axes.plot(*zip(*points, strict=True), style, color=color, label=label)
        if not canvas.axes.lines:
            return None
        canvas.axes.set(xlabel="pruning iteration", ylabel="AP50", ylim=(0, None))
        _whole_steps(canvas.axes)
        canvas.axes.legend(loc="lower left")
        return canvas.drawing(
            "AP50 against iteration", "What each pruning pass cost, and what fine-tuning won back."
        )


def latency_by_iteration(report: Report, rows: Sequence[Figures]) -> Drawing | None:
    points = _points(rows, "iteration", "latency_engine_p50_ms")
    if report.device is None or not points:
        return None
    with _canvas("latency") as canvas:
        tails = [p90 - p50 for p50, p90 in _points(rows, "latency_engine_p50_ms", "latency_engine_p90_ms")]
        x, y = zip(*points, strict=True)
        canvas.axes.errorbar(
            x,
            y,
            yerr=np.array([np.zeros(len(tails)), tails]),
            fmt="o-",
            color=ACCENT,
            ecolor=MUTED,
            elinewidth=1,
            capsize=3,
            label="engine, p50 up to p90",
        )
        end_to_end = _points(rows, "iteration", "latency_end_to_end_p50_ms")
        if end_to_end:
            canvas.axes.plot(*zip(*end_to_end, strict=True), "s--", color=SECOND, label="end to end, p50")
        canvas.axes.set(xlabel="pruning iteration", ylabel="latency, ms", ylim=(0, None))
        _whole_steps(canvas.axes)
        canvas.axes.legend(loc="lower left")
        return canvas.drawing("Latency against iteration", report.device.line)


def ap_by_latency(rows: Sequence[Figures]) -> Drawing | None:
    measured = [
        row for row in rows if row["latency_engine_p50_ms"] is not None and row["device_ap50"] is not None
    ]
    if not measured:
        return None
    with _canvas("pareto") as canvas:
        axes = canvas.axes
        axes.plot(
            [row["latency_engine_p50_ms"] for row in measured],
            [row["device_ap50"] for row in measured],
            "o",
            color=ACCENT,
        )
        for row in measured:
            axes.annotate(
                str(row["iteration"]),
                (row["latency_engine_p50_ms"], row["device_ap50"]),
                xytext=(5, 4),
                textcoords="offset points",
                color=MUTED,
                fontsize=9,
            )
        axes.set(xlabel="engine latency p50, ms", ylabel="AP50 on the device")
        axes.margins(0.12)
        return canvas.drawing(
            "AP50 against latency", "Up and to the left is better; the numbers are iterations."
        )


def size_by_iteration(rows: Sequence[Figures]) -> Drawing:
    with _canvas("size") as canvas:
        iterations = [row["iteration"] for row in rows]
        for label, name, color, style in (
            ("parameters", "params", ACCENT, "o-"),
            ("MACs", "macs", SECOND, "s--"),
        ):
            canvas.axes.plot(
                iterations, [row[name] / rows[0][name] for row in rows], style, color=color, label=label
            )
        canvas.axes.set(xlabel="pruning iteration", ylabel="share of the unpruned", ylim=(0, 1.05))
        canvas.axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        _whole_steps(canvas.axes)
        canvas.axes.legend(loc="lower left")
        return canvas.drawing("What is left", "Parameters and MACs, counted in the pruned network.")


def channels_by_layer(report: Report) -> Drawing | None:
    step, original = report.rows[-1].step, report.rows[0].step.channels
    layers = [layer for layer, before in original.items() if before != step.channels.get(layer, 0)]
    if not layers:
        return None
    with _canvas("channels", height_in=1 + 0.17 * len(layers)) as canvas:
        axes = canvas.axes
        before = [original[layer] for layer in layers]
        kept = [step.channels.get(layer, 0) for layer in layers]
        axes.barh(layers, before, color=GRID, height=0.75, label="before")
        axes.barh(layers, kept, color=ACCENT, height=0.75, label="kept")
        axes.tick_params(axis="y", labelsize=7, length=0)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.set(xlabel="channels")
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        return canvas.drawing(
            "Channels per layer",
            f"Before pruning and after iteration {step.iteration}; layers that kept all are left out.",
        )


@dataclass(frozen=True)
class _Canvas:
    figure: Figure
    axes: Axes
    name: str

    def drawing(self, title: str, caption: str) -> Drawing:
        text = io.StringIO()
        # A fixed salt instead of a random one: the same report gives the same page.
        with mpl.rc_context({"svg.hashsalt": self.name}):
            self.figure.savefig(
                text, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
            )
        return Drawing(title, caption, _inline(text.getvalue(), self.name, title))


@contextmanager
def _canvas(name: str, height_in: float = _HEIGHT_IN) -> Iterator[_Canvas]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        yield _Canvas(figure, figure.subplots(), name)


def _inline(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: (\S+) [^;\"]*", r"font-size: \1", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _points(rows: Sequence[Figures], x: str, y: str) -> list[tuple[float, float]]:
    return [(row[x], row[y]) for row in rows if row[x] is not None and row[y] is not None]


def _whole_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
