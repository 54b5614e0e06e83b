"""Results on standard output: a table for a person, JSON for a program.

torch, which the report brings with it, is loaded only for what prints a report: a camera starts without it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from edgeprune.benchmarks.records import Report

_WIDTH_OF_A_FILE = 200  # characters: where no terminal sets the width, tables need not be squeezed


def print_report(
    report: "Report", files: Sequence[Path] = (), *, as_json: bool, flag_ap_drop: float | None = None
) -> None:
    """The report's tables, warnings and headline, and where its files lie; as JSON the content of report.json.

    Args:
        flag_ap_drop: as for `write_report`; None: its default.
    """
    from edgeprune.benchmarks.report import layers_not_faster, report_json, warnings
    from edgeprune.benchmarks.summary import FLAG_AP_DROP, headline, row_figures
    from edgeprune.benchmarks.table import (
        BUDGET_CAPTION,
        BUDGET_COLUMNS,
        DEVICE_COLUMNS,
        measured,
        render_table,
    )

    limit = FLAG_AP_DROP if flag_ap_drop is None else flag_ap_drop
    if as_json:
        print_json(report_json(report, flag_ap_drop=limit))
        return
    out = console()
    device = report.device.line if report.device else "no device: prune alone has run"
    rows = row_figures(report)
    out.print(render_table(rows, caption=device))
    on_device = measured(rows, DEVICE_COLUMNS)
    if len(on_device) > 1:
        out.print(render_table(rows, caption=device, columns=on_device))
    on_budget = measured(rows, BUDGET_COLUMNS)
    if len(on_budget) > 1:
        out.print(render_table(rows, caption=BUDGET_CAPTION, columns=on_budget))
    if in_vain := layers_not_faster(report):
        out.print("Pruned, and not faster:")
        print_rows([asdict(layer) for layer in in_vain], as_json=False)
    for warning in warnings(report, limit):
        out.print(f"Warning: {warning}", markup=False, style="yellow")
    summary = headline(report)
    out.print(summary.text, markup=False)
    if summary.choice:
        out.print(f"{summary.choice}.", markup=False, style="bold")
    for file in files:
        out.print(str(file), markup=False, soft_wrap=True)


def print_rows(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Rows that share their names, which bear the units."""
    if as_json:
        print_json(list(rows))
        return
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    console().print(table)


def print_quality(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """What `evaluate` found, each AP with its interval."""
    from edgeprune.benchmarks.table import EVALUATED, QUALITY_CAPTION, QUALITY_COLUMNS, render_table

    if as_json:
        print_json(list(rows))
        return
    caption = f"On {rows[0]['images']} images with {rows[0]['boxes']} boxes. {QUALITY_CAPTION}"
    console().print(render_table(rows, caption, (*EVALUATED, *QUALITY_COLUMNS)))


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_json(value: Any) -> None:
    """For a program: indented, and an error where a number is not finite."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def console() -> Console:
    """Standard output; wide where it is no terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_WIDTH_OF_A_FILE)
