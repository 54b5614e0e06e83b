"""`latency-table`: measure what a network's kernels cost on a device, and look at the stairs."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from edgeprune.cli import Json, Verbose, app
from edgeprune.cli.device_options import with_device
from edgeprune.cli.run_options import Classes, Detector, InputSize, Precision, Target

if TYPE_CHECKING:
    from edgeprune.deploy.connection import Connection
    from edgeprune.deploy.session import Session
    from edgeprune.detectors import protocol
    from edgeprune.pruning.graph import Network
    from edgeprune.pruning.groups import Groups
    from edgeprune.pruning.latency import LatencyTable, LayerUse
    from edgeprune.pruning.memory import MemoryModel

CACHE = "latency-tables"  # in the user's cache

latency_table = typer.Typer(
    no_args_is_help=True, help="What a network's kernels cost on a device, against their channels."
)
app.add_typer(latency_table, name="latency-table")


def measured_table(
    session: "Session",
    detector: "protocol.Detector",
    groups: "Groups",
    *,
    precision: str,
    options: dict[str, Any],
    again: bool = False,
) -> "LatencyTable":
    """The table of a detector on a session's device, with the progress shown; what the cache holds is not
    measured again.

    Args:
        groups: of the unpruned network.
        options: of the engine.
        again: all is measured although the cache has it.

    Raises:
        DeviceError: If the device fails.
        BenchmarkError: If the device's kernels cannot be timed one by one.
    """
    from edgeprune.benchmarks.engine_timing import exporter
    from edgeprune.benchmarks.latency_table import measure_table
    from edgeprune.cli.progress import progress
    from edgeprune.data.assets import cache_folder

    with progress("Measuring the kernels' latency table") as update:
        return measure_table(
            session,
            groups,
            exporter(detector, session.target, precision),
            detector.preprocessing,
            cache_folder(CACHE),
            input_size=detector.input_size,
            precision=precision,
            options=options,
            again=again,
            progress=update,
        )


@latency_table.command("measure")
@with_device
def _measure(
    connection: "Connection",
    target: Target,
    out: Annotated[Path, typer.Option(help="File to write the table to (.json).", show_default=False)],
    detector: Detector = "nanodet-g",
    classes: Classes = "person",
    input_size: InputSize = 320,
    precision: Precision = "fp32",
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Measure all again, and keep that: what was kept was disturbed, or the device has changed.",
        ),
    ] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure a detector's kernels on the device. What was measured before there is reused."""
    from edgeprune.cli.config import class_names
    from edgeprune.cli.output import print_rows
    from edgeprune.cli.progress import say
    from edgeprune.deploy.connection import connect
    from edgeprune.detectors.protocol import Detector as Protocol
    from edgeprune.detectors.registry import build_detector
    from edgeprune.pruning.checkpoint import trace_detector
    from edgeprune.pruning.groups import find_groups

    if connection.bundle is not None:
        raise typer.BadParameter("a latency table is measured over a connection: leave --bundle out")
    session = connect(target, connection)
    module = build_detector(detector, (input_size, input_size), class_names(classes)).eval()
    started_s = time.monotonic()
    table = measured_table(
        session,
        cast(Protocol, module),
        find_groups(trace_detector(module, (input_size, input_size))),
        precision=precision,
        options=connection.engine_options(session.target),
        again=again,
    )
    table.write(out)
    if table.disturbed is not None:
        say(
            f"Whole networks were disturbed: {table.disturbed}. On a quiet device, --again measures all anew."
        )
    row = {
        "table": str(out),
        "device": table.device,
        "backend": f"{table.backend} {table.backend_version}",
        "kinds": len(table.kinds),
        "median_error": table.median_error,
        "memory_median_error": table.memory and table.memory.median_error,
        "seconds": time.monotonic() - started_s,
    }
    print_rows([row], as_json=json)


@latency_table.command("show")
def _show(
    table: Annotated[Path, typer.Argument(help="Latency table, as `measure` writes it.", show_default=False)],
    run: Annotated[
        Path | None,
        typer.Argument(
            help="Run folder whose network is looked at for wasteful channel counts.", show_default=False
        ),
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Its step. Default: the last one.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw the stairs into this file (.svg, .png or .pdf).", show_default=False),
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show cost against channels, and which counts of a run's network cost as much as larger ones; memory."""
    from edgeprune.cli.output import console, print_json, print_rows
    from edgeprune.pruning.footprint import footprint
    from edgeprune.pruning.latency import LatencyTable, layer_uses, wasteful

    found = LatencyTable.read(table)
    network = _network(run, step) if run else None
    uses = () if network is None else layer_uses(network)
    wastes = wasteful(found, uses)
    predicted_ms = None if network is None else found.predict_ms(uses)
    predicted_mib = (
        None
        if network is None or found.memory is None
        else found.memory.predict_mib(footprint(network, found.rest_step))
    )
    if picture is not None:
        _draw(found, uses, picture)
    rows = [
        {
            "kernel": str(costs.kind),
            "in_step": costs.inputs.step,
            "out_step": costs.outputs.step,
            "in_alignment": costs.inputs.alignment,
            "out_alignment": costs.outputs.alignment,
            "most_channels": f"{'' if costs.kind.one_axis else f'{costs.aligned.in_channels[-1]} to '}"
            f"{costs.aligned.out_channels[-1]}",
            "ms": costs.aligned.ms[-1][-1] * found.scale * found.correction,
        }
        for costs in found.kinds
    ]
    memory = _memory(found.memory) if found.memory else None
    if json:
        print_json(
            {
                "schema_version": 1,
                "device": found.device,
                "target": found.target,
                "backend": found.backend,
                "backend_version": found.backend_version,
                "precision": found.precision,
                "date": found.date,
                "median_error": found.median_error,
                "disturbed": found.disturbed,
                "kinds": rows,
                "memory": memory,
                "predicted_ms": predicted_ms,
                "predicted_mib": predicted_mib,
                "wasteful": [asdict(each) | {"kind": str(each.kind)} for each in wastes],
            }
        )
        return
    out = console()
    out.print(
        f"Measured on {found.device} ({found.target}), {found.backend} {found.backend_version}, "
        f"{found.precision}, {found.date}.",
        markup=False,
    )
    print_rows(rows, as_json=False)
    if found.median_error is not None:
        out.print(
            f"{len(found.networks)} whole networks, each predicted without itself: off by "
            f"{found.median_error:.1%} in the median"
            + (f"; measured while disturbed: {found.disturbed}." if found.disturbed else "."),
            markup=False,
        )
    if memory is not None:
        median_error = memory["median_error"]
        error = "" if median_error is None else f"; off by {median_error:.1%} in the median"
        out.print(
            f"Memory: {memory['constant_mib']:.1f} MiB, {memory['per_weight']:.2f} times the weights and "
            f"{memory['per_activation']:.2f} times the activations as float32{error}.",
            markup=False,
        )
    if predicted_ms is not None:
        mib = "" if predicted_mib is None else f" and {predicted_mib:.1f} MiB"
        out.print(
            f"{run}: {predicted_ms:.2f} ms{mib} predicted; {len(wastes)} wasteful channel counts.",
            markup=False,
        )
    for each in wastes:
        out.print(f"  {each}", markup=False)
    if picture is not None:
        out.print(str(picture), markup=False, soft_wrap=True)


def _memory(model: "MemoryModel") -> dict[str, float | None]:
    """What a backend holds, as measured engines have corrected it."""
    parts = ("constant_mib", "per_weight", "per_activation")
    return {name: getattr(model, name) * model.correction for name in parts} | {
        "median_error": model.median_error
    }


def _network(run: Path, step: int | None) -> "Network":
    from edgeprune.cli.run_folder import RunError, RunFolder
    from edgeprune.pruning.checkpoint import load_step

    folder = RunFolder(run)
    steps = folder.steps()
    chosen = step if step is not None else max(steps, default=None)
    if chosen not in steps:
        raise RunError(
            f"{run} has no step{'' if chosen is None else f' {chosen}'}: `edgeprune prune` makes them"
        )
    return load_step(folder.step(chosen)).network


def _draw(table: "LatencyTable", uses: "tuple[LayerUse, ...]", path: Path) -> None:
    from edgeprune.benchmarks.latency_figure import draw_stairs
    from edgeprune.data.files import atomic_path

    if path.suffix not in (".svg", ".png", ".pdf"):
        raise typer.BadParameter(f"--picture {path}: name a file that ends in .svg, .png or .pdf")
    figure = draw_stairs(table, uses)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
