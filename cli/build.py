"""How the stages compose: prune -> export -> deploy once an iteration, then measure all iterations together.

Each stage reads and writes the run folder (`cli/run_folder.py`). A stage is done where its record is there
and names the hashes of what lies beside it: a resumed run goes on with the first thing that is missing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from mimetypes import guess_type
from pathlib import Path
from typing import Any

import torch

import edgeprune.data
from edgeprune.benchmarks.measure import benchmark_engines
from edgeprune.benchmarks.records import Report
from edgeprune.benchmarks.report import write_report
from edgeprune.benchmarks.runs import load_report
from edgeprune.cli.config import BuildConfig
from edgeprune.cli.progress import device_progress, progress, say
from edgeprune.cli.run_folder import RunError, RunFolder, RunRecord
from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.data.files import read_json, sha256_of, write_json
from edgeprune.deploy.records import Engine
from edgeprune.deploy.session import Progress as DeviceProgress
from edgeprune.deploy.session import Session, image_files, local_session
from edgeprune.deploy.targets import Target, load_target
from edgeprune.detectors.evaluation import evaluate as average_precision_of
from edgeprune.export.model import ExportedModel, check_parity, export_onnx
from edgeprune.pruning.checkpoint import load_step
from edgeprune.pruning.records import PrunedDetector

SELECT_SHARE = 0.2  # of the training images: held out to choose the best epoch by
EXAMPLE = Path(edgeprune.data.__file__).parent  # holds the labels of the example video


@dataclass(frozen=True)
class Data:
    """A run's images: `train` trains, `select` chooses the best epoch, `val` decides nothing and reports."""

    train: Dataset
    select: Dataset
    val: Dataset


def build(config: BuildConfig, run_dir: Path | None, *, resume: bool) -> tuple[Report, Sequence[Path]]:
    """From weights to a report.

    Returns:
        The report, and the files that hold it.

    Raises:
        EdgePruneError: What a user can act on, from any stage.
        KeyboardInterrupt: Saying how to go on.
    """
    _session(load_target(config.target)).probe()  # a missing device is better known before hours of pruning
    with _running(config, run_dir, resume=resume) as (run, data):
        for pruned in _prune(run, config, data):
            model = _exported(run, config, pruned, data.val)
            _built(config, model)
        if not all(row.result for row in load_report(run.path).rows):
            _measure(run, config, data.val)
        report = load_report(run.path)
        return report, write_report(report, run.path)


def prune(config: BuildConfig, run_dir: Path | None, *, resume: bool) -> Report:
    """The first stage alone; errors as `build`."""
    with _running(config, run_dir, resume=resume) as (run, data):
        for _ in _prune(run, config, data):
            pass
        return load_report(run.path)


def export(path: Path, step: int | None) -> list[dict[str, Any]]:
    """Export one step or all, whether or not they are; a row a step.

    Raises:
        EdgePruneError: If this is no run folder, the step is not there, or the export fails.
    """
    with _opened(path) as (run, record):
        val = _val(record)
        rows = []
        for iteration in _chosen(run, step):
            model = _export(run, record.config, load_step(run.step(iteration)), val)
            rows.append(
                {
                    "iteration": iteration,
                    "file": str(model.path),
                    "opset": model.opset,
                    "size_bytes": model.size_bytes,
                    "nodes": model.nodes,
                    **read_json(run.step(iteration) / "parity.json")["parity"],
                }
            )
        return rows


def deploy(path: Path, step: int | None) -> list[dict[str, Any]]:
    """Build the engine of one step or all on the device, or find it built; a row a step.

    Raises:
        EdgePruneError: If this is no run folder, a step is not exported, or the device fails.
    """
    with _opened(path) as (run, record):
        rows = []
        for iteration in _chosen(run, step):
            engine = _built(record.config, _model(run, iteration))
            rows.append(
                {
                    "iteration": iteration,
                    "backend": f"{engine.backend} {engine.backend_version}",
                    "device": engine.device,
                    "precision": engine.precision,
                    "size_bytes": engine.size_bytes,
                    "build_s": engine.build_s,
                    "found_built": engine.reused,
                    "key": engine.key[:12],
                }
            )
        return rows


def bench(path: Path) -> Report:
    """Measure all steps on the device, whether or not they are; errors as `deploy`."""
    with _opened(path) as (run, record):
        _measure(run, record.config, _val(record))
        return load_report(run.path)


def report(path: Path) -> tuple[Report, Sequence[Path]]:
    """Write the report of what was measured so far.

    Raises:
        EdgePruneError: If this is no run folder, or a record in it is damaged.
    """
    with _opened(path) as (run, _):
        found = load_report(run.path)
        return found, write_report(found, run.path)


def evaluate(path: Path, step: int | None, val: Path | None, val_images: Path | None) -> list[dict[str, Any]]:
    """AP of one step or all with PyTorch on this machine; a row a step.

    Raises:
        EdgePruneError: If this is no run folder, the step is not there, or the data cannot be used.
    """
    run = RunFolder(path)  # not locked: it reads what a build has finished
    record = run.read_record()
    dataset = _val(record) if val is None else _load(val, val_images)
    device = _training_device(record.config)
    rows = []
    for iteration in _chosen(run, step):
        pruned = load_step(run.step(iteration))
        with progress(f"iteration {iteration}: AP on {len(dataset)} images") as update:
            found = average_precision_of(
                pruned.detector.to(device), pruned.network.to(device), dataset, device, update
            )
        rows.append({"iteration": iteration, "params": pruned.steps[-1].params, **asdict(found)})
    return rows


@contextmanager
def _running(config: BuildConfig, run_dir: Path | None, *, resume: bool) -> Iterator[tuple[RunFolder, Data]]:
    """A run folder that is ours to write, new or to go on with, and the data of its configuration."""
    run = RunFolder(run_dir or Path("runs") / f"{config.detector}-{config.target}-{config.criterion}")
    train, val = _load(config.train or EXAMPLE / "vtest_train.json", config.train_images), _load_val(config)
    if config.train is None:
        say("No --train and --val: the street video vtest.avi with the labels that come with edgeprune.")
    data = Data(*train.hold_out(SELECT_SHARE, config.seed), val)
    weights = sha256_of(config.weights) if config.weights else None
    record = RunRecord.of(config, {"train": train.sha256, "val": val.sha256, "weights": weights})
    with run.lock():
        found = run.start(record, resume=resume)
        if found is not None and found.versions != record.versions:
            say(f"{run.path} began with other versions (see run.json): the result may differ.")
        try:
            yield run, data
        except KeyboardInterrupt:
            how = f"Interrupted; {run.path} keeps what is done. The same command with --resume goes on."
            raise KeyboardInterrupt(how) from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[RunFolder, RunRecord]]:
    """An existing run folder, ours to write."""
    run = RunFolder(path)
    record = run.read_record()
    with run.lock():
        yield run, record


def _load(path: Path, images: Path | None) -> Dataset:
    if (guess_type(path.name)[0] or "").startswith("video/"):
        how = f'give COCO JSON whose file_name is "{path.name}#000123" for frame 123, counted from 0'
        raise RunError(f"{path} is a video without labels: {how}")
    dataset = load_dataset(path, images)
    if dataset.problems:
        say(
            f"{path}: {len(dataset.problems)} images or boxes were dropped or cut, first {dataset.problems[0]}"
        )
    return dataset


def _load_val(config: BuildConfig) -> Dataset:
    return _load(config.val or EXAMPLE / "vtest_test.json", config.val_images)


def _val(record: RunRecord) -> Dataset:
    """The run's validation data, if it is still what the run began with."""
    val = _load_val(record.config)
    if val.sha256 != record.hashes["val"]:
        raise RunError(f"{val.path} has changed since the run began: its APs could not be compared")
    return val


def _chosen(run: RunFolder, step: int | None) -> list[int]:
    steps = run.steps()
    if not steps:
        raise RunError(
            f"{run.path} holds no step yet: run `edgeprune prune --resume` with the options of the run"
        )
    if step is None:
        return steps
    if step not in steps:
        raise RunError(f"{run.path} has no step {step}: its last is {steps[-1]}")
    return [step]


def _prune(run: RunFolder, config: BuildConfig, data: Data) -> Iterator[PrunedDetector]:
    """All steps in order: those in the run folder, then the missing ones, each saved before it goes on."""
    raise NotImplementedError


def _training_device(config: BuildConfig) -> str:
    if config.train_device == "cuda" and not torch.cuda.is_available():
        raise RunError("--train-device cuda: PyTorch finds no CUDA GPU here; auto or cpu trains on the CPU")
    return "cuda" if config.train_device != "cpu" and torch.cuda.is_available() else "cpu"


def _exported(run: RunFolder, config: BuildConfig, pruned: PrunedDetector, val: Dataset) -> ExportedModel:
    """The step's model: the one in the run folder if it is whole and of these weights, else a new one."""
    folder = run.step(pruned.steps[-1].iteration)
    if (folder / "export.json").is_file() and (folder / "parity.json").is_file():
        model = _model(run, pruned.steps[-1].iteration)
        proof = read_json(folder / "parity.json")
        came_from = {
            "weights_sha256": sha256_of(folder / "weights.safetensors"),
            "model_sha256": model.sha256,
        }
        if (
            model.path.is_file()
            and sha256_of(model.path) == model.sha256
            and came_from.items() <= proof.items()
        ):
            return model
    return _export(run, config, pruned, val)


def _export(run: RunFolder, config: BuildConfig, pruned: PrunedDetector, val: Dataset) -> ExportedModel:
    """Export a step and prove on validation images that the model is the network."""
    iteration = pruned.steps[-1].iteration
    folder = run.step(iteration)
    weights_sha256 = sha256_of(folder / "weights.safetensors")
    say(f"iteration {iteration}: exporting and checking against PyTorch")
    model = export_onnx(
        pruned.detector,
        pruned.network,
        folder / "model.onnx",
        opset=load_target(config.target).max_opset,
        metadata={
            "detector": pruned.spec.name,
            "iteration": str(iteration),
            "weights_sha256": weights_sha256,
        },
    )
    write_json(folder / "export.json", model.to_json())
    parity = check_parity(pruned.detector, pruned.network, model.path, val)
    proof = {"weights_sha256": weights_sha256, "model_sha256": model.sha256, "parity": asdict(parity)}
    write_json(folder / "parity.json", proof)
    return model


def _model(run: RunFolder, iteration: int) -> ExportedModel:
    folder = run.step(iteration)
    if not (folder / "export.json").is_file():
        raise RunError(f"{folder} has no model yet: run `edgeprune export {run.path}`")
    return ExportedModel.from_json(read_json(folder / "export.json"), folder)


def _session(target: Target, events: DeviceProgress | None = None) -> Session:
    if target.name != "host":
        raise RunError(f"no way to a {target.name} yet: this version measures on --target host alone")
    return local_session(target, progress=events)


def _built(config: BuildConfig, model: ExportedModel) -> Engine:
    """The model's engine on the device, which keeps engines by what they were built from."""
    with device_progress(f"{model.path.parent.name}: building the engine") as events:
        return _session(load_target(config.target), events).build(model.path, config.precision)


def _measure(run: RunFolder, config: BuildConfig, val: Dataset) -> None:
    """Measure all steps together, and replace what was measured before."""
    engines = [_built(config, _model(run, iteration)) for iteration in _chosen(run, None)]
    preprocessing = load_step(run.step(0)).detector.preprocessing
    with device_progress(f"measuring {len(engines)} engines") as events:
        session = _session(load_target(config.target), events)
        results = benchmark_engines(
            session, engines, val, image_files(val, run.path / "frames"), preprocessing
        )
    # Results of two devices in one run would be no comparison, so the old ones go first.
    paths = [run.step(iteration) / "benchmark.json" for iteration in range(len(results))]
    for path in paths:
        path.unlink(missing_ok=True)
    for path, result in zip(paths, results, strict=True):
        write_json(path, result.to_json())
