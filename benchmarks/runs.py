"""Read a run folder into a report."""

from pathlib import Path

from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.layers import layer_times
from edgeprune.benchmarks.records import BenchmarkResult, Report, ReportRow
from edgeprune.data.files import read_json
from edgeprune.export.model import ExportedModel, Parity
from edgeprune.pruning.records import PruningStep


def load_report(run_dir: Path) -> Report:
    """Read what each stage wrote; what is not there yet, or belongs to another model, counts as not measured.

    Raises:
        BenchmarkError: If this is no run folder, or a record in it is damaged.
    """
    if not (run_dir / "run.json").is_file():
        raise BenchmarkError(f"{run_dir} is no run folder: it has no run.json. `edgeprune build` makes one")
    folders = [path.parent for path in run_dir.glob("step-*/detector.json")]
    if not folders:
        raise BenchmarkError(f"{run_dir} holds no step yet: run `edgeprune build --resume` on it")
    rows = tuple(sorted(map(_row, folders), key=lambda row: row.step.iteration))
    if len({row.result.device.identity for row in rows if row.result}) > 1:
        raise BenchmarkError(
            f"{run_dir} was measured on several devices or in several power modes: "
            "`edgeprune bench` measures all steps"
        )
    return Report(run_dir.resolve().name, rows, read_json(run_dir / "run.json"))


def _row(folder: Path) -> ReportRow:
    try:
        step = PruningStep.from_json(read_json(folder / "detector.json")["steps"][-1])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BenchmarkError(
            f"{folder / 'detector.json'} is damaged ({error!r}): prune the run again"
        ) from error
    if not (folder / "export.json").is_file():
        return ReportRow(step, None, None)
    model = ExportedModel.from_json(read_json(folder / "export.json"), folder)
    result = _result(folder / "benchmark.json", model)
    layers = layer_times(model.path, result.layer_times_ms) if result and result.layer_times_ms else ()
    return ReportRow(step, model.size_bytes, result, layers, _parity(folder / "parity.json", model))


def _parity(path: Path, model: ExportedModel) -> Parity | None:
    if not path.is_file():
        return None
    record = read_json(path)
    try:
        parity = Parity(**record["parity"])
        return parity if record["model_sha256"] == model.sha256 else None
    except (KeyError, TypeError) as error:
        raise BenchmarkError(f"{path} is damaged ({error!r}): export the step again") from error


def _result(path: Path, model: ExportedModel) -> BenchmarkResult | None:
    if not path.is_file():
        return None
    try:
        result = BenchmarkResult.from_json(read_json(path))
    except BenchmarkError as error:
        raise BenchmarkError(f"{path}: {error}") from error
    return result if result.model_sha256 == model.sha256 else None  # None: of a model that was exported again
