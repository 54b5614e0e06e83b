"""`compare` and `ship`: which step of which run to take, and taking it."""

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli import Json, Verbose, app

if TYPE_CHECKING:
    from edgeprune.benchmarks.records import Report
    from edgeprune.benchmarks.summary import Figures

Pick = Annotated[
    str | None,
    typer.Option(
        help='Name the step to ship: "ap50>=0.55" picks the fastest that is so accurate, "latency_ms<=15" '
        "the most accurate that is so fast. Separate several by commas. Figures: ap, ap50 (on the device), "
        "latency_ms, p99_ms (engine), end_to_end_ms, fps, images_per_s (copies overlapped), params, macs, size_bytes, "
        "joules_per_image, joules_above_idle.",
        show_default=False,
    ),
]


@app.command("compare")
def _compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    pick: Pick = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print every figure as CSV, and nothing else.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Put the steps of runs side by side, and mark those on the Pareto front of AP50 against latency."""
    from edgeprune.benchmarks import compare
    from edgeprune.benchmarks.table import render_csv, render_markdown, render_table
    from edgeprune.cli.output import console, print_json

    if csv + markdown + json > 1:
        raise typer.BadParameter("choose one of --csv, --markdown and --json")
    rows = compare.compare([_report(run) for run in runs])
    picked = compare.pick(rows, compare.parse_conditions(pick)) if pick else None
    reservations = compare.reservations(rows)
    told = reservations + _choice(pick, picked)
    if json:
        print_json({"schema_version": 1, "rows": rows, "pick": picked, "reservations": reservations})
    elif csv:
        marked = [{**row, "picked": row is picked} for row in rows] if picked else rows
        typer.echo(render_csv(marked), nl=False)
    elif markdown:
        typer.echo(render_markdown(rows, compare.COMPARE_COLUMNS), nl=False)
        for line in told:
            typer.echo(f"\n{line}")
    else:
        caption = "latency: the p50 of the run's unpruned, times the ratio to it in interleaved blocks"
        console().print(render_table(rows, caption, compare.COMPARE_COLUMNS))
        for line in told:
            typer.echo(line)


@app.command("ship")
def _ship(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="New folder to write.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(min=0, help="Step to ship; 0 is the unpruned detector.", show_default=False)
    ] = None,
    pick: Pick = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Copy one step of a run, weights, model and records, into a folder with a model card."""
    from edgeprune.benchmarks import compare
    from edgeprune.benchmarks.ship import ship
    from edgeprune.cli.output import print_json

    if (step is None) == (pick is None):
        raise typer.BadParameter("give either --step or --pick")
    if pick is not None:
        step = compare.pick(compare.compare([_report(run)]), compare.parse_conditions(pick))["iteration"]
    assert step is not None
    files = ship(run, step, out)
    if json:
        print_json({"iteration": step, "files": [str(file) for file in files]})
    else:
        typer.echo(f"iteration {step}:")
        for file in files:
            typer.echo(str(file))


def _choice(pick: str | None, picked: "Figures | None") -> list[str]:
    if picked is None:
        return []
    run, step = picked["run"], picked["iteration"]
    return [
        f"{pick}: iteration {step} of {run}",
        f"edgeprune ship {quote(run)} --step {step} --out FOLDER copies it",
    ]


def _report(run: Path) -> "Report":
    """The run's report under the path that the user gave: two runs may have the same folder name."""
    from edgeprune.benchmarks.runs import load_report

    return replace(load_report(run), name=str(run))
