"""The report's figures as inline SVG: one drawing for light and dark, its text readable on a phone."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

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
        speed_against_macs(rows),
        size_by_iteration(rows),
        latency_histogram(report),
        channels_by_layer(report),
        time_by_layer(report),
        importance_by_layer(report),
        telemetry_over_time(report),
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
        canvas.axes.set(xlabel="pruning iteration", ylabel="AP50")
        canvas.axes.set_ylim(0, 1.08 * canvas.axes.get_ylim()[1])
        _whole_steps(canvas.axes)
        canvas.axes.legend(loc="lower left")
        return canvas.drawing("AP50 against iteration", "What each pass cost, and what fine-tuning won back.")


def latency_by_iteration(report: Report, rows: Sequence[Figures]) -> Drawing | None:
    timed = [row for row in rows if row["latency_engine_paired_ms"] is not None]
    if report.device is None or not timed:
        return None
    with _canvas("latency") as canvas:
        canvas.axes.errorbar(
            [row["iteration"] for row in timed],
            [row["latency_engine_paired_ms"] for row in timed],
            yerr=_intervals_ms(timed),
            fmt="o-",
            color=ACCENT,
            capsize=4,
            label="engine",
        )
        end_to_end = _points(rows, "iteration", "latency_end_to_end_p50_ms")
        if end_to_end:
            canvas.axes.plot(*zip(*end_to_end, strict=True), "s--", color=SECOND, label="end to end, p50")
        canvas.axes.set(xlabel="pruning iteration", ylabel="latency, ms")
        canvas.axes.set_ylim(0, 1.05 * canvas.axes.get_ylim()[1])
        _whole_steps(canvas.axes)
        canvas.axes.legend(loc="lower left")
        return canvas.drawing(
            "Latency against iteration",
            "Engine: ratio to the unpruned in interleaved blocks, with its 95 % interval, times the unpruned's p50. "
            + report.device.line,
        )


def ap_by_latency(rows: Sequence[Figures]) -> Drawing | None:
    measured = [row for row in rows if row["on_front"] is not None]
    if not measured:
        return None
    with _canvas("pareto") as canvas:
        axes = canvas.axes
        names = ("latency_engine_paired_ms", "device_ap50")
        front = sorted(_points([row for row in measured if row["on_front"]], *names))
        axes.plot(*zip(*front, strict=True), "o-", color=ACCENT, label="Pareto front", linewidth=1.2)
        rest = _points([row for row in measured if not row["on_front"]], *names)
        if rest:
            axes.plot(*zip(*rest, strict=True), "o", color=MUTED, markerfacecolor="none", label="behind it")
        for row in measured:
            axes.annotate(
                str(row["iteration"]),
                (row[names[0]], row[names[1]]),
                xytext=(-4, 5),
                textcoords="offset points",
                ha="right",
                color=MUTED,
                fontsize=9,
            )
        axes.set(xlabel="engine latency, ms", ylabel="AP50 on the device")
        axes.margins(0.12)
        axes.legend(loc="lower right")
        return canvas.drawing(
            "AP50 against latency",
            "Up and to the left is better; the numbers are iterations. Where no difference to the unpruned was shown, "
            "an iteration counts as no faster and no slower.",
        )


def speed_against_macs(rows: Sequence[Figures]) -> Drawing | None:
    compared = [row for row in rows if row["latency_engine_ratio_low"] is not None]
    if len(compared) < 2:
        return None
    with _canvas("ratio") as canvas:
        axes = canvas.axes
        x = [row["iteration"] for row in compared]
        y, low, high = (
            np.array([row[f"latency_engine_ratio{end}"] for row in compared]) for end in ("", "_low", "_high")
        )
        axes.axhline(1, color=GRID, linewidth=1)
        axes.plot(x, [row["macs"] / rows[0]["macs"] for row in compared], "s--", color=SECOND, label="MACs")
        axes.errorbar(
            x,
            y,
            yerr=np.array([y - low, high - y]),
            fmt="o-",
            color=ACCENT,
            capsize=4,
            label="latency, engine",
        )
        axes.set(xlabel="pruning iteration", ylabel="share of the unpruned")
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        _whole_steps(axes)
        axes.legend(loc="lower left")
        return canvas.drawing(
            "Latency won against MACs removed",
            "Ratio to the unpruned in interleaved blocks; a 95 % interval across 100 % shows no difference.",
        )


def size_by_iteration(rows: Sequence[Figures]) -> Drawing:
    series = [
        ("parameters", "params", ACCENT, "o-"),
        ("MACs", "macs", SECOND, "s--"),
        ("activation memory", "activation_bytes", MUTED, "v:"),
    ]
    with _canvas("size") as canvas:
        iterations = [row["iteration"] for row in rows]
        for label, name, color, style in series:
            shares = [row[name] / rows[0][name] for row in rows]
            canvas.axes.plot(iterations, shares, style, color=color, label=label)
        canvas.axes.set(xlabel="pruning iteration", ylabel="share of the unpruned", ylim=(0, 1.05))
        canvas.axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        _whole_steps(canvas.axes)
        canvas.axes.legend(loc="lower left")
        return canvas.drawing("What is left", "Counted in the pruned network; activations at their peak.")


def latency_histogram(report: Report) -> Drawing | None:
    samples = {
        row.step.iteration: [ms for block in row.result.counted_blocks for ms in block.samples_ms["engine"]]
        for row in (report.rows[0], report.rows[-1])
        if row.result and row.result.blocks
    }
    if not samples:
        return None
    with _canvas("histogram") as canvas:
        # A rare pause of the system would squeeze everything else into one bar.
        low = min(map(min, samples.values()))
        high = max(float(np.percentile(ms, 99.5)) for ms in samples.values())
        bins = np.linspace(low, high, 60).tolist()
        for iteration, ms in samples.items():
            label, color = (f"iteration {iteration}", ACCENT) if iteration else ("unpruned", MUTED)
            canvas.axes.hist(np.clip(ms, low, high), bins, color=color, alpha=0.65, label=label)
        canvas.axes.set(xlabel="engine latency, ms", ylabel="runs")
        _legend_above(canvas.axes)
        return canvas.drawing("Every run", "Runs beyond the slowest half percent stand in the last bar.")


def channels_by_layer(report: Report) -> Drawing | None:
    step, original = report.rows[-1].step, report.rows[0].step.channels
    layers = [layer for layer, before in original.items() if before != step.channels.get(layer, 0)]
    if not layers:
        return None
    shares = {layer: 1 - step.channels.get(layer, 0) / original[layer] for layer in layers}
    labels = [f"{layer}  -{share:.0%}" for layer, share in shares.items()]
    with _bars("channels", labels, "channels") as canvas:
        canvas.axes.barh(
            labels, [original[layer] for layer in layers], color=GRID, height=0.75, label="before"
        )
        kept = [step.channels.get(layer, 0) for layer in layers]
        canvas.axes.barh(labels, kept, color=ACCENT, height=0.75, label="kept")
        _legend_above(canvas.axes)
        return canvas.drawing(
            "Channels per layer",
            f"Before pruning and after iteration {step.iteration}; layers that kept all are left out.",
        )


def time_by_layer(report: Report) -> Drawing | None:
    first, last = report.rows[0].layers, report.rows[-1].layers
    if not first or not last:
        return None
    before = {layer.layer: layer.time_ms or 0.0 for layer in first}
    after = {layer.layer: layer.time_ms or 0.0 for layer in last}
    layers = [layer for layer in before if before[layer] or after.get(layer)]
    with _bars("layers", layers, "time, ms") as canvas:
        canvas.axes.barh(
            layers, [before[layer] for layer in layers], color=GRID, height=0.75, label="unpruned"
        )
        last_label = f"iteration {report.rows[-1].step.iteration}"
        now = [after.get(layer, 0.0) for layer in layers]
        canvas.axes.barh(layers, now, color=ACCENT, height=0.4, label=last_label)
        _legend_above(canvas.axes)
        return canvas.drawing(
            "Time per layer",
            "Medians by the runtime's profiler, which slows the whole; activations count with their layer.",
        )


def importance_by_layer(report: Report) -> Drawing | None:
    importance = report.rows[-1].step.importance
    layers = [layer for layer, values in importance.items() if len(values) == 5 and values[4] > 0]
    if not layers:
        return None
    with _bars("importance", layers, "importance, log scale") as canvas:
        floor = min(value for layer in layers for value in importance[layer] if value > 0)
        low, lower, middle, upper, high = (
            [max(importance[layer][quartile], floor) for layer in layers] for quartile in range(5)
        )
        canvas.axes.hlines(layers, low, high, color=MUTED, linewidth=0.8, label="least to most")
        canvas.axes.hlines(layers, lower, upper, color=ACCENT, linewidth=4, label="middle half")
        canvas.axes.plot(middle, layers, "o", color=INK, markersize=2.5, label="median")
        canvas.axes.set_xscale("log")
        _legend_above(canvas.axes)
        return canvas.drawing(
            "Importance of the channels",
            f"As {report.rows[-1].step.criterion} scored them before the last removal.",
        )


def telemetry_over_time(report: Report) -> Drawing | None:
    result = next((row.result for row in report.rows if row.result), None)
    samples = result.telemetry["samples"] if result else []
    series: list[tuple[str, str, Callable[[Any], float]]] = [
        ("hottest zone, °C", "temperatures_c", lambda zones: max(zones.values())),
        (
            "power of the strongest rail, W",
            "power_mw",
            lambda rails: rails[max(rails, key=rails.__getitem__)] / 1000,
        ),
        ("GPU clock, MHz", "gpu_mhz", max),
        ("load average", "load", float),
    ]
    told = [
        (label, [(sample["time_s"], value(sample[name])) for sample in samples if sample.get(name)])
        for label, name, value in series
    ]
    told = [(label, points) for label, points in told if len(points) > 1]
    if not told:
        return None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, 0.6 + 1.1 * len(told)), layout="constrained")
        panels = figure.subplots(len(told), sharex=True, squeeze=False)[:, 0]
        start_s = min(points[0][0] for _, points in told)
        for axes, (label, points) in zip(panels, told, strict=True):
            times, values = zip(*points, strict=True)
            axes.plot([time_s - start_s for time_s in times], values, color=ACCENT, linewidth=1.2)
            axes.set_title(label, loc="left", fontsize=9, color=MUTED)
            axes.margins(y=0.2)
        panels[-1].set_xlabel("time, s")
        return _Canvas(figure, panels[-1], "telemetry").drawing(
            "The device while it was measured", "What the device told, once a second."
        )


@contextmanager
def svg_file(path: Path, height_in: float = _HEIGHT_IN, columns: int = 1) -> Iterator[Any]:
    """A plot in a file of its own, for the result of an experiment; the same numbers give the same file.

    Yields its axes; with more than one of `columns`, side by side, their sequence.
    """
    with mpl.rc_context({"svg.hashsalt": path.stem, "axes.spines.top": False, "axes.spines.right": False}):
        width_in = (1.6 if columns == 1 else columns) * _WIDTH_IN
        figure = Figure(figsize=(width_in, height_in), layout="constrained", facecolor="white")
        yield figure.subplots(1, columns)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


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


@contextmanager
def _bars(name: str, labels: Sequence[str], quantity: str) -> Iterator[_Canvas]:
    """A canvas for horizontal bars, one a label from top to bottom."""
    with _canvas(name, height_in=1 + 0.17 * len(labels)) as canvas:
        axes = canvas.axes
        axes.tick_params(axis="y", labelsize=7.5, length=0)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.set_xlabel(quantity)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        yield canvas


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def _percent(share: float, _: int) -> str:
    return f"{100 * share:.4g}%"


def _points(rows: Sequence[Figures], x: str, y: str) -> list[tuple[float, float]]:
    return [(row[x], row[y]) for row in rows if row[x] is not None and row[y] is not None]


def _intervals_ms(rows: Sequence[Figures]) -> NDArray[np.float64]:
    """(2, rows): how far the interval reaches down and up from the latency; not at all where there is none."""
    reach: NDArray[np.float64] = np.zeros((2, len(rows)))
    for index, row in enumerate(rows):
        ms, low, high = (row[f"latency_engine_paired{end}_ms"] for end in ("", "_low", "_high"))
        if low is not None and high is not None:
            reach[:, index] = ms - low, high - ms
    return np.maximum(reach, 0)  # equal ends differ by rounding


def _whole_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
