"""report.json and report.html: the same numbers for a program and for a person."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from edgeprune.benchmarks.figures import draw
from edgeprune.benchmarks.layers import NotFaster, channel_block, not_faster
from edgeprune.benchmarks.records import SAMPLE_SCORE, SCOPES, Report
from edgeprune.benchmarks.samples import draw_samples
from edgeprune.benchmarks.summary import FLAG_AP_DROP, ap_drops, headline, row_figures
from edgeprune.benchmarks.table import (
    AFTER_FINE_TUNING,
    BUDGET_CAPTION,
    BUDGET_COLUMNS,
    COLUMNS,
    DEVICE_COLUMNS,
    NOT_MEASURED,
    PRUNING_COLUMNS,
    QUALITY_CAPTION,
    QUALITY_COLUMNS,
    measured,
)
from edgeprune.benchmarks.tensorboard import write_scalars
from edgeprune.data.files import write_bytes, write_json
from edgeprune.pruning.records import PruningStep

Frames = Mapping[int, NDArray[np.uint8]]  # image id -> (H, W, 3) BGR
NO_FRAMES: Frames = MappingProxyType({})

SCHEMA_VERSION = 1  # of report.json: raised when a name changes its meaning or goes away


def report_json(report: Report, *, flag_ap_drop: float = FLAG_AP_DROP) -> dict[str, Any]:
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
            "choice": summary.choice,
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
        "warnings": warnings(report, flag_ap_drop),
        "layers": [
            {"iteration": row.step.iteration, **asdict(layer)} for row in report.rows for layer in row.layers
        ],
        "not_faster": [asdict(layer) for layer in layers_not_faster(report)],
        "steps": [row.step.to_json() for row in report.rows],
        "provenance": dict(report.provenance),
    }


def report_html(report: Report, frames: Frames = NO_FRAMES, *, flag_ap_drop: float = FLAG_AP_DROP) -> str:
    """One self-contained page: no script, no request, light and dark, from a phone's width to print.

    Args:
        frames: images to draw detections on, as `samples.sample_frames` gives them; none are drawn without.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = row_figures(report)
    details = report.device.details if report.device else {}
    on_device = measured(rows, DEVICE_COLUMNS)
    unmeasured = [column.title for column in DEVICE_COLUMNS if column not in on_device]
    unmeasured += ["time per layer"] * (not report.rows[-1].layers)
    return environment.get_template("report.html").render(
        report=report,
        headline=headline(report),
        columns=COLUMNS,
        quality=(*AFTER_FINE_TUNING, *QUALITY_COLUMNS),
        quality_caption=QUALITY_CAPTION,
        pruning=PRUNING_COLUMNS,
        on_device=on_device,
        on_budget=measured(rows, BUDGET_COLUMNS),
        budget_caption=BUDGET_CAPTION,
        unmeasured=unmeasured,
        rows=rows,
        drawings=draw(report, rows),
        not_measured=NOT_MEASURED,
        warnings=warnings(report, flag_ap_drop),
        not_faster=layers_not_faster(report),
        samples=draw_samples(report, frames),
        sample_score=SAMPLE_SCORE,
        provenance=[
            *_flat(report.provenance),
            *_flat({"device": details}, null=NOT_MEASURED),
            *_engines(report),
            *_parities(report),
        ],
    )


def write_report(
    report: Report, run_dir: Path, frames: Frames = NO_FRAMES, *, flag_ap_drop: float = FLAG_AP_DROP
) -> tuple[Path, Path]:
    """Write report.html and report.json, and return their paths in this order.

    Where TensorBoard is installed, its scalars go into the folder tensorboard/.

    Args:
        frames: as for `report_html`.
        flag_ap_drop: warn where AP on the device is lower than on the host by more.
    """
    html, json = run_dir / "report.html", run_dir / "report.json"
    write_bytes(html, report_html(report, frames, flag_ap_drop=flag_ap_drop).encode())
    write_json(json, report_json(report, flag_ap_drop=flag_ap_drop))
    write_scalars(report, run_dir / "tensorboard")
    return html, json


def layers_not_faster(report: Report) -> list[NotFaster]:
    """Of the last step, the layers that were pruned in vain."""
    if report.device is None:
        return []
    return not_faster(report.rows[0].layers, report.rows[-1].layers, channel_block(report.device))


def warnings(report: Report, flag_ap_drop: float = FLAG_AP_DROP) -> list[str]:
    """What a reader must know before using the numbers, a sentence each."""
    disturbed = {row.result.disturbed for row in report.rows if row.result and row.result.disturbed}
    return [
        *(f"The latencies were measured under a disturbance: {reason}." for reason in sorted(disturbed)),
        *(f"{drop}." for drop in ap_drops(report, flag_ap_drop)),
        *_budget_missed(report.rows[-1].step),
        *_left_out(report.provenance.get("data", {})),
    ]


def _budget_missed(last: PruningStep) -> Iterator[str]:
    """Where the engine that was chosen last, of several that were measured, is clearly above the budget."""
    missed = last.latency.missed if last.latency else None
    if missed:
        yield f"Iteration {last.iteration} misses its budget: {missed}."


def _left_out(data: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What of the data sets in run.json could not be used."""
    for name, held in data.items():
        images, boxes, cut = (held[key] for key in ("dropped_images", "dropped_boxes", "clipped_boxes"))
        if images or boxes or cut:
            left = f"{held['images']} images with {held['boxes']} boxes are left"
            yield (
                f"{name} data: {images} images and {boxes} boxes could not be used, {cut} boxes were cut; {left}. "
                "run.json lists the first, `edgeprune data inspect` all."
            )


def _engines(report: Report) -> Iterator[tuple[str, str]]:
    """Which model each step was measured with, and how many threads one inference had on a CPU."""
    threads = None
    for row in report.rows:
        if row.result:
            yield f"model sha256.iteration {row.step.iteration}", row.result.model_sha256
            threads = row.result.threads
    if report.device and not report.device.on_gpu:
        yield from _flat(threads, "engine threads", null=NOT_MEASURED)


def _parities(report: Report) -> Iterator[tuple[str, str]]:
    """How far each step's ONNX file is from PyTorch on real images."""
    for row in report.rows:
        if row.parity:
            boxes_px, scores = row.parity.max_box_difference_px, row.parity.max_score_difference
            text = f"boxes {boxes_px:.1g} px, scores {scores:.1g} at most, on {row.parity.images} images"
            yield f"ONNX against PyTorch.iteration {row.step.iteration}", text


def _flat(value: Any, name: str = "", null: str = "none") -> Iterator[tuple[str, str]]:
    """A nested mapping as (dotted name, text) pairs, None as `null`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key), null)
    elif isinstance(value, list | tuple):
        yield name, ", ".join(map(str, value)) or "none"
    else:
        yield name, null if value is None else str(value)
