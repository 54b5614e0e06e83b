"""The report's table: its columns, once, for the terminal, HTML, Markdown and CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from edgeprune.benchmarks.summary import Figures

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Column:
    """Some figures of a row and how a person reads them."""

    title: str
    names: tuple[str, ...]  # in `Figures`
    render: Callable[..., str]  # of these figures, none of them None

    def text(self, figures: Figures) -> str:
        values = [figures[name] for name in self.names]
        return NOT_MEASURED if any(value is None for value in values) else self.render(*values)


def _whole(value: int) -> str:
    return f"{value:,}"


def _millions(value: int) -> str:
    return f"{value / 1e6:,.1f} M" if value >= 1e5 else f"{value:,}"


def _megabytes(value: int) -> str:
    return f"{value / 1e6:.2f}"


def _ap(value: float) -> str:
    return f"{value:.3f}"


def _interval(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}"


def _latency(*values_ms: float) -> str:
    return " / ".join(f"{value:.2f}" for value in values_ms)


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _ratio(value: float, low: float, high: float) -> str:
    if low == high == 1:
        return "1"
    return f"{value:.3f} ({low:.3f} to {high:.3f}{', no difference shown' if low <= 1 <= high else ''})"


COLUMNS: tuple[Column, ...] = (
    Column("iteration", ("iteration",), str),
    Column("params", ("params",), _whole),
    Column("MACs", ("macs",), _millions),
    Column("channels removed", ("channels_removed",), _whole),
    Column("AP before fine-tuning", ("ap_before",), _ap),
    Column("AP after", ("ap_after",), _ap),
    Column("AP on device", ("device_ap",), _ap),
    Column("AP50 on device", ("device_ap50",), _ap),
    Column("latency ms (engine, free of drift)", ("latency_engine_paired_ms",), _latency),
    Column("latency p50 ms (end to end)", ("latency_end_to_end_p50_ms",), _latency),
    Column("FPS", ("fps",), "{:.1f}".format),
    Column("size MB", ("model_size_bytes",), _megabytes),
    Column("Pareto front", ("on_front",), _yes_no),
)


EVALUATED: tuple[Column, ...] = (
    Column("iteration", ("iteration",), str),
    Column("params", ("params",), _whole),
    Column("AP", ("ap",), _ap),
    Column("AP50", ("ap50",), _ap),
    Column("AP75", ("ap75",), _ap),
)

AFTER_FINE_TUNING: tuple[Column, ...] = (
    Column("iteration", ("iteration",), str),
    Column("AP", ("ap_after",), _ap),
    Column("AP50", ("ap50_after",), _ap),
    Column("AP75", ("ap75_after",), _ap),
)

QUALITY_COLUMNS: tuple[Column, ...] = (
    Column("AP, 95 %", ("ap_low", "ap_high"), _interval),
    Column("AP50, 95 %", ("ap50_low", "ap50_high"), _interval),
    Column("AP small", ("ap_small",), _ap),
    Column("AP medium", ("ap_medium",), _ap),
    Column("AP large", ("ap_large",), _ap),
    Column("precision", ("precision_at_threshold",), _ap),
    Column("recall", ("recall_at_threshold",), _ap),
    Column("at score", ("threshold",), "{:g}".format),
    Column("miss rate", ("miss_rate",), _ap),
)

QUALITY_CAPTION = (
    "95 %: bootstrap over the images. Small: below 32 x 32 pixels, large: from 96 x 96. Precision and recall of "
    "detections from that score up, at IoU 0.5. Miss rate: share of boxes missed at 0.1 false detections an image."
)

# Where the budget is a latency or memory.
BUDGET_COLUMNS: tuple[Column, ...] = (
    Column("iteration", ("iteration",), str),
    Column("latency asked ms", ("latency_asked_ms",), _latency),
    Column("predicted ms", ("latency_predicted_ms",), _latency),
    Column("measured ms", ("latency_chosen_ms",), _latency),
    Column("95 %", ("latency_chosen_low_ms", "latency_chosen_high_ms"), "{:.2f} to {:.2f}".format),
    Column("memory asked MiB", ("memory_asked_mib",), "{:.1f}".format),
    Column("predicted MiB", ("memory_predicted_mib",), "{:.1f}".format),
    Column("measured MiB", ("memory_chosen_mib",), "{:.1f}".format),
)

BUDGET_CAPTION = (
    "Asked of each iteration, predicted by the latency table as it was then, and measured of its engine before "
    "fine-tuning, beside the unpruned engine."
)


DEVICE_COLUMNS: tuple[Column, ...] = (
    Column("iteration", ("iteration",), str),
    Column(
        "latency of the unpruned (engine, 95 %)",
        ("latency_engine_ratio", "latency_engine_ratio_low", "latency_engine_ratio_high"),
        _ratio,
    ),
    Column(
        "latency p50 / p90 / p99 ms (engine, all runs)",
        ("latency_engine_p50_ms", "latency_engine_p90_ms", "latency_engine_p99_ms"),
        _latency,
    ),
    Column("speed-up over MAC reduction", ("realised_speedup",), "{:.2f}".format),
    Column("latency p50 ms (engine with copies)", ("latency_engine_with_copies_p50_ms",), _latency),
    Column("images/s (copies overlapped)", ("throughput_images_per_s",), "{:.1f}".format),
    Column("W", ("watts",), "{:.2f}".format),
    Column("W idle", ("idle_watts",), "{:.2f}".format),
    Column("J an image", ("joules_per_image",), "{:.3f}".format),
    Column("J an image above idle", ("joules_per_image_above_idle",), "{:.3f}".format),
    Column("engine MB", ("engine_size_bytes",), _megabytes),
    Column("build s", ("engine_build_s",), "{:.1f}".format),
)

PRUNING_COLUMNS: tuple[Column, ...] = (
    Column("iteration", ("iteration",), str),
    Column("channels removed in this step", ("channels_removed_this_step",), _whole),
    Column("activations MB", ("activation_bytes",), _megabytes),
    Column("fine-tuning", ("fine_tuning",), str),
    Column("AP50 before fine-tuning", ("ap50_before",), _ap),
    Column("AP50 after", ("ap50_after",), _ap),
)


def measured(rows: Sequence[Figures], columns: Sequence[Column]) -> tuple[Column, ...]:
    """The columns that any row has figures for: a board that tells no power has no energy to show."""
    return tuple(column for column in columns if any(column.text(row) != NOT_MEASURED for row in rows))


def render_table(rows: Sequence[Figures], caption: str, columns: Sequence[Column] = COLUMNS) -> Table:
    """The table for a terminal; printing it is the command line's work."""
    table = Table(caption=caption, caption_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="right", overflow="fold")
    for row in rows:
        cells = [column.text(row) for column in columns]
        table.add_row(*(f"[dim]{cell}[/dim]" if cell == NOT_MEASURED else cell for cell in cells))
    return table


def render_markdown(rows: Sequence[Figures], columns: Sequence[Column] = COLUMNS) -> str:
    """The same table in Markdown."""
    lines = [[column.title for column in columns], ["---:"] * len(columns)]
    lines += [[column.text(row).replace("|", "\\|") for column in columns] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def render_csv(rows: Sequence[Figures]) -> str:
    """Every figure under its name in report.json; what was not measured is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
