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


def _latency(*values_ms: float) -> str:
    return " / ".join(f"{value:.2f}" for value in values_ms)


COLUMNS: tuple[Column, ...] = (
    Column("iteration", ("iteration",), str),
    Column("params", ("params",), _whole),
    Column("MACs", ("macs",), _millions),
    Column("channels removed", ("channels_removed",), _whole),
    Column("AP before fine-tuning", ("ap_before",), _ap),
    Column("AP after", ("ap_after",), _ap),
    Column("AP on device", ("device_ap",), _ap),
    Column("AP50 on device", ("device_ap50",), _ap),
    Column(
        "latency p50 / p90 / p99 ms (engine)",
        ("latency_engine_p50_ms", "latency_engine_p90_ms", "latency_engine_p99_ms"),
        _latency,
    ),
    Column("latency p50 ms (end to end)", ("latency_end_to_end_p50_ms",), _latency),
    Column("FPS", ("fps",), "{:.1f}".format),
    Column("size MB", ("model_size_bytes",), _megabytes),
)


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
