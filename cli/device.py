"""Commands about devices: which there are, whether one is ready, what is left on it, results from afar."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli import EXIT_ERROR, Json, Run, Verbose, app
from edgeprune.cli.device_options import with_device

if TYPE_CHECKING:
    from edgeprune.deploy.connection import Connection

device = typer.Typer(no_args_is_help=True, help="What edgeprune keeps on a device.")
app.add_typer(device, name="device")

AnyTarget = Annotated[
    str, typer.Option(help="Kind of device, as `edgeprune targets` lists them; auto asks the device.")
]


@app.command("targets")
def _targets(json: Json = False, verbose: Verbose = False) -> None:
    """List the kinds of device; what is found on a device replaces these defaults."""
    from edgeprune.cli.output import print_rows
    from edgeprune.deploy.targets import known_targets

    rows = [
        {
            "target": target.name,
            "compute_capability": target.compute_capability,
            "jetpack": target.jetpack,
            "tensorrt": target.tensorrt,
            "python": target.python,
            "opset": target.max_opset,
            "precisions": " ".join(target.precisions),
            "memory_mib": target.memory_mib,
            "channel_multiple": target.channel_multiple,
            "dla_cores": target.dla_cores,
        }
        for target in known_targets().values()
    ]
    if not json:
        rows = [{name: "-" if value is None else value for name, value in row.items()} for row in rows]
    print_rows(rows, as_json=json)


@app.command("doctor")
@with_device
def _doctor(
    connection: "Connection", target: AnyTarget = "auto", json: Json = False, verbose: Verbose = False
) -> None:
    """Check on both sides what is needed, and say what to do; exit status 1 if something is missing."""
    from edgeprune.cli.output import print_rows
    from edgeprune.deploy.connection import doctor

    checks = doctor(target, connection)
    words = {True: "ok", False: "MISSING", None: "-"}
    rows = [asdict(check) if json else {**asdict(check), "ok": words[check.ok]} for check in checks]
    print_rows(rows, as_json=json)
    if any(check.ok is False for check in checks):
        raise typer.Exit(EXIT_ERROR)


@device.command("clean")
@with_device
def _clean(connection: "Connection", json: Json = False, verbose: Verbose = False) -> None:
    """Remove models, images, engines and logs that edgeprune left on a device."""
    from edgeprune.cli.output import print_rows
    from edgeprune.deploy.targets import load_target

    freed = connection.open(load_target("linux")).clean()
    print_rows([{"freed_mib": freed / 2**20}], as_json=json)


@app.command("import")
def _import(
    run: Run,
    results: Annotated[Path, typer.Argument(help="The results.tar.gz that run.sh wrote on the device.")],
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Take back what a bundle measured on its device, and write the report with it."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_report

    print_report(*stages.import_results(run, results), as_json=json)
