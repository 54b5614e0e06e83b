"""`check`: will a target's TensorRT read an ONNX file, and will float16 hold its numbers?"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli import Json, Verbose, app
from edgeprune.cli.run_options import ValImages

if TYPE_CHECKING:
    from rich.console import Console

    from edgeprune.export.check import CheckReport
    from edgeprune.export.ranges import LayerRange

LEAST_SHOWN = 10  # layers with the least headroom


@app.command("check")
def _check(
    model: Annotated[Path, typer.Argument(help="ONNX file, from any exporter.", show_default=False)],
    target: Annotated[
        str, typer.Option(help="Kind of device whose TensorRT is to read it.", show_default=False)
    ],
    fp16: Annotated[
        bool,
        typer.Option(
            "--fp16", help="Also measure each layer's range on real images (--val): does float16 hold it?"
        ),
    ] = False,
    val: Annotated[
        Path | None, typer.Option(help="COCO JSON that names the images for --fp16.", show_default=False)
    ] = None,
    val_images: ValImages = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Name everything in an ONNX file that a device's TensorRT would refuse, before the device is touched."""
    from edgeprune.cli.output import console, print_json
    from edgeprune.deploy.targets import load_target
    from edgeprune.export.check import check_model
    from edgeprune.export.errors import ExportError
    from edgeprune.export.runtime import open_session

    if fp16 != (val is not None):
        raise typer.BadParameter("--fp16 and --val go together: ranges need real images")
    kind = load_target(target)
    report = check_model(model, kind.tensorrt, int8="int8" in kind.precisions) if kind.tensorrt else None
    if report is None:
        open_session(model)
    ranges = _ranges(model, val, val_images) if val else ()
    overflowing = [found for found in ranges if found.headroom < 1]
    if json:
        print_json(
            {
                "schema_version": 1,
                "target": target,
                "check": None if report is None else asdict(report),
                "float16_ranges": [_finite(asdict(found) | {"headroom": found.headroom}) for found in ranges],
            }
        )
    else:
        _print(console(), model, target, report, ranges)
    refused = [] if report is None else [v for v in report.violations if v.severity == "error"]
    if refused or overflowing:
        found = [f"{len(refused)} violations"] * bool(refused)
        found += [f"{len(overflowing)} layers beyond float16"] * bool(overflowing)
        raise ExportError(f"{model} is not fit for {target}: {' and '.join(found)}")


def _ranges(model: Path, val: Path, val_images: Path | None) -> "tuple[LayerRange, ...]":
    from edgeprune.data.dataset import load_dataset
    from edgeprune.export.ranges import float16_ranges

    return float16_ranges(model, load_dataset(val, val_images))


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: a value beyond float32, and the headroom of a layer of zeros, become null."""
    return {name: None if value == float("inf") else value for name, value in record.items()}


def _print(
    out: "Console", model: Path, target: str, report: "CheckReport | None", ranges: "tuple[LayerRange, ...]"
) -> None:
    if report is None:
        out.print(f"{model}: ONNX Runtime, which {target} uses, loads it.", markup=False)
    else:
        verified = "" if report.verified else ", carried over from an older version: not verified"
        table = f"operator table of TensorRT {report.table}{verified}"
        out.print(f"{model} for {target}, TensorRT {report.tensorrt} ({table}):", markup=False)
        for violation in report.violations:
            out.print(f"  {violation.severity}: {violation}", markup=False, soft_wrap=True)
        if not report.violations:
            out.print("  nothing that it would refuse", markup=False)
    if ranges:
        out.print(
            f"Largest values against float16's 65,504, the {LEAST_SHOWN} layers with the least headroom:"
        )
        for found in ranges[:LEAST_SHOWN]:
            line = f"  {found.layer} ({found.operator}): {found.largest:.6g}, headroom {found.headroom:.3g}x"
            out.print(line, markup=False)
