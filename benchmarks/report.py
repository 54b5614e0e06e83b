"""report.json and report.html: the same numbers for a program and for a person."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from edgeprune.benchmarks.figures import draw
from edgeprune.benchmarks.records import SCOPES, Report
from edgeprune.benchmarks.summary import headline, row_figures
from edgeprune.benchmarks.table import COLUMNS, NOT_MEASURED
from edgeprune.data.files import write_bytes, write_json

SCHEMA_VERSION = 1  # of report.json: raised when a name changes its meaning or goes away


def report_json(report: Report) -> dict[str, Any]:
    """The content of report.json: units in the names, null where something was not measured."""
    device = report.device
    summary = headline(report)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": report.name,
        "headline": {
            "iteration": summary.iteration,
            "text": summary.text,
            "device": summary.device,
            "measured": summary.measured,
        },
        "device": None
        if device is None
        else {
            "target": device.target,
            "backend": device.backend,
            "board": device.board,
            "on_gpu": device.on_gpu,
            "line": device.line,
            "details": dict(device.details),
        },
        "scopes": dict(SCOPES),
        "rows": row_figures(report),
        "steps": [row.step.to_json() for row in report.rows],
        "provenance": dict(report.provenance),
    }


def report_html(report: Report) -> str:
    """One self-contained page: no script, no request, light and dark, from a phone's width to print."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = row_figures(report)
    details = report.device.details if report.device else {}
    return environment.get_template("report.html").render(
        report=report,
        headline=headline(report),
        columns=COLUMNS,
        rows=rows,
        drawings=draw(report, rows),
        not_measured=NOT_MEASURED,
        provenance=[*_flat(report.provenance), *_flat({"device": details})],
    )


def write_report(report: Report, run_dir: Path) -> tuple[Path, Path]:
    """Write report.html and report.json into the run folder, and return their paths in this order."""
    html, json = run_dir / "report.html", run_dir / "report.json"
    write_bytes(html, report_html(report).encode())
    write_json(json, report_json(report))
    return html, json


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """A nested mapping as (dotted name, text) pairs."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield name, ", ".join(map(str, value))
    else:
        yield name, NOT_MEASURED if value is None else str(value)
