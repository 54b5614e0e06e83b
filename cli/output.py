"""Results on standard output: a table for a person, JSON for a program."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edgeprune.benchmarks.records import Report
from edgeprune.benchmarks.report import report_json
from edgeprune.benchmarks.summary import headline, row_figures
from edgeprune.benchmarks.table import render_table

_WIDTH_OF_A_FILE = 200  # characters: where no terminal sets the width, tables need not be squeezed


def print_report(report: Report, files: Sequence[Path] = (), *, as_json: bool) -> None:
    """The report's table and headline, and where its files lie; as JSON the content of report.json."""
    if as_json:
        print_json(report_json(report))
        return
    out = console()
    device = report.device.line if report.device else "no device: prune alone has run"
    out.print(render_table(row_figures(report), caption=device))
    out.print(headline(report).text, markup=False)
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
