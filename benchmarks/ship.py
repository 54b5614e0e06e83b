"""Copy one step out of a run: weights, model, records, and a model card that says what they are."""

import json
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.records import Report, ReportRow
from edgeprune.benchmarks.report import warnings
from edgeprune.benchmarks.runs import load_report
from edgeprune.benchmarks.summary import Figures, row_figures
from edgeprune.benchmarks.table import COLUMNS, DEVICE_COLUMNS, NOT_MEASURED, measured
from edgeprune.data.errors import EdgePruneError
from edgeprune.data.files import read_json, sha256_of
from edgeprune.data.operating_point import THRESHOLD_FILE, Calibration
from edgeprune.pruning.records import DetectorSpec

# PyTorch takes the first two, a device the third; the records say where all came from.
REQUIRED = ("detector.json", "weights.safetensors", "model.onnx", "export.json")
CARD = "MODEL_CARD.md"
MIND = (
    "AP holds for images like those it was measured on; measure on your own before relying on it.",
    "Latency holds for the device, precision and versions above, and for no other.",
    "The weights descend from the detector that was pruned: its licence and its training data's apply.",
)


def ship(run_dir: Path, iteration: int, out: Path) -> list[Path]:
    """Copy a step's files into the new folder `out`, whole or not at all.

    Returns:
        The files written, the model card first.

    Raises:
        BenchmarkError: If the step is not there or not exported, its files are not those that its records
            name, or `out` exists.
        EdgePruneError: If `out` cannot be written.
    """
    report = load_report(run_dir)
    row = next((row for row in report.rows if row.step.iteration == iteration), None)
    if row is None:
        raise BenchmarkError(
            f"{run_dir} has no step {iteration}: its last is {report.rows[-1].step.iteration}"
        )
    folder = run_dir / f"step-{iteration:02d}"
    _check(folder)
    if out.exists():
        raise BenchmarkError(f"{out} exists: choose a new folder")
    names = [*REQUIRED]
    names += ["parity.json"] * (row.parity is not None) + ["benchmark.json"] * (row.result is not None)
    names += [THRESHOLD_FILE] * (_calibration(folder) is not None)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        for name in names:
            shutil.copyfile(folder / name, temporary / name)
        (temporary / CARD).write_text(model_card(report, row, folder), encoding="utf-8")
        temporary.rename(out)
    except OSError as error:
        raise EdgePruneError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [out / CARD, *(out / name for name in names)]


def _check(folder: Path) -> None:
    """The files are there, and are those that the records name."""
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        raise BenchmarkError(
            f"{folder} has no {', '.join(missing)}: run `edgeprune export {folder.parent}` first"
        )
    for file, record, name in (
        ("weights.safetensors", "detector.json", "weights_sha256"),
        ("model.onnx", "export.json", "sha256"),
    ):
        if read_json(folder / record).get(name) != sha256_of(folder / file):
            raise BenchmarkError(
                f"{folder / file} is not the file that {record} describes: make the step again"
            )


def model_card(report: Report, row: ReportRow, folder: Path) -> str:
    """What this detector is, how it was made, what was measured and where, and what to mind: Markdown."""
    spec = _spec(folder / "detector.json")
    rows = row_figures(report)
    first, own = rows[0], next(figures for figures in rows if figures["iteration"] == row.step.iteration)
    shown = warnings(replace(report, rows=(report.rows[0], *[row] * (own is not first))))
    height, width = spec.input_size
    sections = [
        f"# {spec.name}, pruning iteration {row.step.iteration}",
        f"Detects: {', '.join(spec.classes)}. Input {width} x {height} pixels (width x height). "
        f"Made by edgeprune from the run `{report.name}`.",
        "## Measured",
        report.device.line if report.device and row.result else "Not measured on a device.",
        _figures(first, own),
        _evidence(row),
        "## Made",
        _made(row, own),
        "## Use",
        "`model.onnx` takes `images (1, 3, H, W)` and gives `boxes (1, M, 4)`, xyxy in input pixels, and "
        "`scores (1, M)`; NMS comes after it. Preprocessing:",
        f"```json\n{json.dumps(spec.preprocessing, indent=2)}\n```",
        _threshold(folder),
        "`weights.safetensors` with `detector.json` rebuild the PyTorch detector: "
        "`edgeprune.pruning.checkpoint.load_step(folder)`.",
        "## Mind",
        "\n".join(f"- {sentence}" for sentence in (*shown, *MIND)),
        "## Files",
        "\n".join(f"- `{name}` sha256 {sha256_of(folder / name)}" for name in REQUIRED),
        "## Run",
        f"```json\n{json.dumps(dict(report.provenance), indent=2, ensure_ascii=False)}\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _calibration(folder: Path) -> Calibration | None:
    return Calibration.read(folder, read_json(folder / "detector.json")["weights_sha256"])


def _threshold(folder: Path) -> str:
    found = _calibration(folder)
    if found is None:
        return "No score threshold was chosen: `edgeprune calibrate` does."
    point = found.point
    low, high = point.precision_interval.low, point.precision_interval.high
    rate = point.false_positives_per_minute
    false = "" if rate is None else f", {rate:.3g} false positives a minute"
    return (
        f"`{THRESHOLD_FILE}`: report what scores above {point.threshold:.4g}, chosen for {found.wish}. On "
        f"{point.images} images with {point.boxes} boxes that has precision {point.precision:.3f} (95 % interval "
        f"{low:.3f} to {high:.3f}) and recall {point.recall:.3f}{false}."
    )


def _spec(path: Path) -> DetectorSpec:
    try:
        return DetectorSpec.from_json(read_json(path)["spec"])
    except (KeyError, TypeError, ValueError) as error:
        raise BenchmarkError(
            f"{path} is damaged, or of another edgeprune ({error!r}): start a new run"
        ) from error


def _figures(first: Figures, own: Figures) -> str:
    lines = ["| | unpruned | this |", "|---|---:|---:|"]
    columns = (*COLUMNS, *measured([own], DEVICE_COLUMNS))
    lines += [
        f"| {column.title} | {column.text(first)} | {column.text(own)} |"
        for column in columns
        if column.names != ("iteration",)
    ]
    return "\n".join(lines)


def _evidence(row: ReportRow) -> str:
    """On what, how and in which state of the device the step was measured."""
    result = row.result
    if result is None:
        return ""
    latency, device = result.latency("engine"), result.device
    runs = f", latency of {latency.runs} runs at batch 1" if latency else ""
    measured = f"AP on {result.images} images with {result.boxes} boxes, {result.precision}{runs}."
    clocks = {True: "locked", False: "not locked", None: None}
    left_out = len(result.blocks) - len(result.counted_blocks)
    state = {
        device.backend: device.details.get("backends", {}).get(device.backend, {}).get("version"),
        **({} if device.on_gpu else {"threads": result.threads}),
        "Jetson Linux (L4T)": device.details.get("l4t"),
        "power mode": device.power_mode,
        "clocks": clocks[device.clocks_locked],
        "rounds left out as disturbed": f"{left_out} of {len(result.blocks)}",
    }
    lines = (f"- {name}: {NOT_MEASURED if value is None else value}" for name, value in state.items())
    return "\n".join([measured, "", *lines])


def _made(row: ReportRow, own: Figures) -> str:
    step = row.step
    made = f"Criterion {step.criterion}; {step.achieved_share:.1%} removed in {step.iteration} iterations."
    return f"{made} Last fine-tuning: {own['fine_tuning']}."
