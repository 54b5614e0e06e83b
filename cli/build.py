"""How the stages compose: prune -> export -> deploy once an iteration, then measure all iterations together.

Each stage reads and writes the run folder (`cli/run_folder.py`). A stage is done where its record is there
and names the hashes of what lies beside it: a resumed run goes on with the first thing that is missing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from mimetypes import guess_type
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import edgeprune.data
from edgeprune.benchmarks.measure import benchmark_engines
from edgeprune.benchmarks.records import Report
from edgeprune.benchmarks.report import NO_FRAMES, write_report
from edgeprune.benchmarks.runs import load_report
from edgeprune.benchmarks.samples import sample_frames, sample_ids
from edgeprune.benchmarks.summary import FLAG_AP_DROP
from edgeprune.cli.adaptation import Request, adapted
from edgeprune.cli.config import BuildConfig
from edgeprune.cli.export import OWN, ExportVariant
from edgeprune.cli.latency_budget import check_latency_options, latency_budget
from edgeprune.cli.progress import device_progress, progress, say
from edgeprune.cli.run_device import RunDevice, plan_of, run_target
from edgeprune.cli.run_folder import RunError, RunFolder, RunRecord
from edgeprune.cli.unlabelled import refuse_shared, unlabelled_images
from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.data.errors import DataError
from edgeprune.data.files import read_json, sha256_of, write_json
from edgeprune.data.operating_point import Calibration, Wish, choose_operating_point
from edgeprune.data.precision import (
    OPERATING_THRESHOLD,
    ImageDetections,
    average_precision,
    detection_quality,
)
from edgeprune.deploy.bundle import ImportedSession, read_results
from edgeprune.deploy.connection import AUTO, Connection
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.records import Engine
from edgeprune.deploy.session import Session, image_files
from edgeprune.deploy.targets import load_target
from edgeprune.detectors import distributed
from edgeprune.detectors.adaptation import AdaptOptions
from edgeprune.detectors.evaluation import detect
from edgeprune.detectors.protocol import Detector, Progress
from edgeprune.detectors.registry import load_detector, published_files, slug
from edgeprune.detectors.training import FineTuneOptions
from edgeprune.export.model import Batch, ExportedModel
from edgeprune.export.target import Int8Options, Precision, TargetExport, export_for_target
from edgeprune.pruning.budget import Limits
from edgeprune.pruning.checkpoint import load_step
from edgeprune.pruning.narrowing import LatencyBudget
from edgeprune.pruning.records import PrunedDetector
from edgeprune.pruning.schedule import PruningData, PruningOptions, prune_iteratively

SELECT_SHARE = 0.2  # of the training images: held out to choose the best epoch by
EXAMPLE = Path(edgeprune.data.__file__).parent  # holds the labels of the example video


@dataclass(frozen=True)
class ReportOptions:
    """How the report is written."""

    frames: bool = True  # draw sample detections on validation images
    flag_ap_drop: float = FLAG_AP_DROP  # warn where AP on the device is lower than on the host by more


DEFAULT_REPORT = ReportOptions()


def build(
    config: BuildConfig,
    run_dir: Path | None,
    connection: Connection,
    *,
    resume: bool,
    strict: bool = False,
    options: ReportOptions = DEFAULT_REPORT,
) -> tuple[Report, Sequence[Path]] | None:
    """From weights to a report. Of several processes (`together`) all prune, and the first does the rest.

    Returns:
        The report, and the files that hold it; None in all processes but the first.

    Raises:
        EdgePruneError: What a user can act on, from any stage.
        KeyboardInterrupt: Saying how to go on.
    """
    config, device = _found(config, connection)  # what is wrong with it is better known before hours
    if device and config.precision not in device.target.precisions:
        known = ", ".join(device.target.precisions)
        raise RunError(
            f"{config.target} has no {config.precision} in hardware; --precision is one of: {known}"
        )
    with _running(config, run_dir, device, resume=resume, strict=strict) as (run, steps, val):
        if device is None:
            _to_the_end(steps)
            return None
        device.save(run.path)
        models, engines = [], []
        for pruned in steps:
            models.append(_exported(run, config, pruned, val))
            engines.append(_built(device, config, models[-1]))
        results = [row.result for row in load_report(run.path).rows]
        if not all(result and result.device.target == device.session.target.name for result in results):
            _measure(run, device.session, engines, val)
        if device.away:
            files = image_files(val, run.path / "frames")
            device.write_bundle(
                run.path, [model.path for model in models], files, _preprocessing(run), config.precision
            )
        report = load_report(run.path)
        return report, _write_report(report, run, lambda: val, options)


def prune(
    config: BuildConfig, run_dir: Path | None, connection: Connection, *, resume: bool, strict: bool = False
) -> Report | None:
    """The first stage alone; None and errors as `build`. The device is asked nothing, unless for what it is or
    for a latency to come down to."""
    device = None
    if config.target == AUTO or config.by_latency:
        config, device = _found(config, connection)
    with _running(config, run_dir, device, resume=resume, strict=strict) as (run, steps, _):
        _to_the_end(steps)
        return load_report(run.path) if distributed.rank() == 0 else None


def _found(config: BuildConfig, connection: Connection) -> tuple[BuildConfig, RunDevice | None]:
    """The run's device, which the first process alone reaches, and the configuration with its kind."""
    device = RunDevice.find(config.target, connection) if distributed.rank() == 0 else None
    kind = distributed.from_first(device.target.name if device else None)
    assert kind is not None
    return replace(config, target=kind), device  # "auto" left it open


def _to_the_end(steps: Iterator[PrunedDetector]) -> None:
    for _ in steps:
        pass


def export(path: Path, step: int | None, variant: ExportVariant) -> list[dict[str, Any]]:
    """Export one step or all, whether or not they are; a row a step.

    Raises:
        EdgePruneError: If this is no run folder, the step is not there, or the export fails.
    """
    with _opened(path) as (run, record):
        val = _val(record)
        rows = []
        for iteration in _chosen(run, step):
            found = _export(run, record.config, load_step(run.step(iteration)), val, variant)
            model, quantised = found.model, found.quantised
            rows.append(
                {
                    "iteration": iteration,
                    "file": str(model.path),
                    "opset": model.opset,
                    "size_bytes": model.size_bytes,
                    "nodes_traced": model.nodes_traced,
                    "nodes": model.nodes,
                    **asdict(found.parity),
                }
            )
            if quantised:
                rows[-1] |= {
                    "int8_ap": quantised.ap,
                    "float_ap": quantised.ap_float,
                    "int8_macs_share": quantised.int8_macs_share,
                    "float_layers": ", ".join(quantised.float_layers) or "none",
                }
        return rows


def deploy(path: Path, step: int | None) -> list[dict[str, Any]]:
    """Build the engine of one step or all on the device, or find it built; a row a step.

    Raises:
        EdgePruneError: If this is no run folder, a step is not exported, or the device fails.
    """
    with _opened(path) as (run, record):
        device = RunDevice.of(run.path, record.config.target)
        rows = []
        for iteration in _chosen(run, step):
            engine = _built(device, record.config, _model(run, iteration))
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
        config, val = record.config, _val(record)
        device = RunDevice.of(run.path, config.target)
        engines = [_built(device, config, _model(run, iteration)) for iteration in _chosen(run, None)]
        _measure(run, device.session, engines, val)
        return load_report(run.path)


def import_results(path: Path, archive: Path) -> tuple[Report, Sequence[Path]]:
    """Take what a bundle's run.sh measured for this run's measurements, and write the report.

    Raises:
        EdgePruneError: If the archive is damaged, or holds the results of another run.
    """
    with _opened(path) as (run, record):
        target = run_target(run.path, record.config.target)
        session = ImportedSession(target, read_results(archive), plan_of(run.path))
        engines = [
            session.build(_model(run, iteration).path, record.config.precision)
            for iteration in _chosen(run, None)
        ]
        _measure(run, session, engines, _val(record))
        found = load_report(run.path)
        return found, _write_report(found, run, lambda: _val(record), DEFAULT_REPORT)


def report(path: Path, options: ReportOptions = DEFAULT_REPORT) -> tuple[Report, Sequence[Path]]:
    """Write the report of what was measured so far.

    Raises:
        EdgePruneError: If this is no run folder, or a record in it is damaged.
    """
    with _opened(path) as (run, record):
        found = load_report(run.path)
        return found, _write_report(found, run, lambda: _val(record), options)


def _write_report(
    report: Report, run: RunFolder, val: Callable[[], Dataset], options: ReportOptions
) -> Sequence[Path]:
    """Write the report; the validation data is opened only if there is something to draw on it."""
    wanted = options.frames and sample_ids(report)
    frames = sample_frames(report, val()) if wanted else NO_FRAMES
    return write_report(report, run.path, frames, flag_ap_drop=options.flag_ap_drop)


def evaluate(
    path: Path,
    step: int | None,
    val: Path | None,
    val_images: Path | None,
    *,
    threshold: float | None,
    strict: bool = False,
) -> list[dict[str, Any]]:
    """AP and what else the detections say of one step or all, with PyTorch on this machine; a row a step.

    Args:
        threshold: score from which the detector is to report; None: what `calibrate` chose, or else 0.3.

    Raises:
        EdgePruneError: If this is no run folder, the step is not there, or the data cannot be used.
    """
    run = RunFolder(path)  # not locked: it reads what a build has finished
    record = run.read_record()
    dataset = _scored_on(record, val, val_images, strict=strict)
    device = training_device(record.config.train_device)
    rows = []
    for iteration in _chosen(run, step):
        folder = run.step(iteration)
        pruned = load_step(folder)
        with progress(f"iteration {iteration}: AP on {len(dataset)} images") as update:
            found = _detections(pruned, dataset, device, update)
        calibrated = Calibration.read(folder, sha256_of(folder / "weights.safetensors"))
        usual = calibrated.point.threshold if calibrated else OPERATING_THRESHOLD
        rows.append(
            {
                "iteration": iteration,
                "params": pruned.steps[-1].params,
                **asdict(average_precision(dataset, found)),
                **detection_quality(dataset, found, usual if threshold is None else threshold).figures(),
            }
        )
    return rows


def calibrate(
    path: Path, step: int | None, val: Path | None, val_images: Path | None, wish: Callable[[Dataset], Wish]
) -> tuple[Dataset, dict[int, Calibration]]:
    """Choose the score from which one step or all report, from what PyTorch finds on this machine.

    Args:
        wish: what is asked, once the data is known.

    Returns:
        The data, and what was chosen and kept, by iteration.

    Raises:
        EdgePruneError: As `evaluate`, or if a step cannot meet the wish.
    """
    with _opened(path) as (run, record):
        dataset = _scored_on(record, val, val_images)
        device, asked = training_device(record.config.train_device), wish(dataset)
        found = {}
        for iteration in _chosen(run, step):
            folder = run.step(iteration)
            with progress(f"iteration {iteration}: detections on {len(dataset)} images") as update:
                detections = _detections(load_step(folder), dataset, device, update)
            try:
                point = choose_operating_point(dataset, detections, asked)
            except DataError as error:
                raise RunError(f"iteration {iteration}: {error}") from error
            weights_sha256 = sha256_of(folder / "weights.safetensors")
            found[iteration] = Calibration(asked, point, weights_sha256, dataset.sha256)
            found[iteration].write(folder)
        return dataset, found


def _scored_on(
    record: RunRecord, val: Path | None, val_images: Path | None, *, strict: bool = False
) -> Dataset:
    """The data that was named, else the run's own validation data."""
    if val is None:
        return _val(record, strict=strict)
    return load_labels(val, val_images, record.config.class_names, strict=strict)


def _detections(
    pruned: PrunedDetector, dataset: Dataset, device: str, update: Progress
) -> list[ImageDetections]:
    """What a step finds, with PyTorch on this machine."""
    pruned.detector.to(device)
    return detect(_protocol(pruned), pruned.network.to(device), dataset, device, update)


@contextmanager
def _running(
    config: BuildConfig, run_dir: Path | None, device: RunDevice | None, *, resume: bool, strict: bool
) -> Iterator[tuple[RunFolder, Iterator[PrunedDetector], Dataset]]:
    """A run folder that is ours to write, new or begun; its steps as they are pruned; its validation data.

    What the configuration names is read first: a run that cannot begin leaves no folder.
    """
    run = RunFolder(run_dir or Path("runs") / f"{slug(config.detector)}-{config.target}-{config.criterion}")
    if device and config.by_latency:
        check_latency_options(config, device)
    options, training = _pruning_options(config), training_device(config.train_device)
    if config.train is None:
        say("No --train and --val: the street video vtest.avi, with the labels that come with edgeprune.")
    data, read = _read(config, strict=strict)
    weights = sha256_of(config.weights) if config.weights else None
    size = (config.input_size, config.input_size)
    detector = load_detector(config.detector, config.weights, size, config.class_names)
    hashes: dict[str, Any] = {name: dataset.sha256 for name, dataset in read.items()}
    hashes |= {"train": data.train.sha256, "weights": weights or published_files(config.detector)}
    record = RunRecord.of(config, hashes, read)
    first = distributed.rank() == 0
    with run.lock() if first else nullcontext():
        found = run.start(record, resume=resume) if first else None
        if found is not None and found.versions != record.versions:
            say(f"{run.path} began with other versions (see run.json): the result may differ.")
        try:
            if getattr(detector, "untrained", False) and config.adapt_epochs:
                say(f"The weights are of more classes, which compete: adapting to {config.classes} first.")
                adapting = AdaptOptions(config.adapt_epochs)
                request = Request(
                    config.detector,
                    detector,
                    weights,
                    data.train,
                    data.select,
                    adapting,
                    config.seed,
                    record.data["train"],
                )
                detector = adapted(run.path / "adapted", request, training)
            latency = _latency_budget(config, run, device, detector) if config.by_latency else None
            steps = prune_iteratively(
                config.detector,
                detector,
                data,
                options,
                run.step,
                device=training,
                stage=progress,
                latency=latency,
            )
            yield run, steps, data.val
        except KeyboardInterrupt:
            how = f"Interrupted; {run.path} keeps what is done. The same command with --resume goes on."
            raise KeyboardInterrupt(how) from None


def _read(config: BuildConfig, *, strict: bool) -> tuple[PruningData, Mapping[str, Dataset]]:
    """The data of a run, with nothing in two parts that must be kept apart; the data sets as they were named."""
    train, val = _load_train(config, strict=strict), _load_val(config, strict=strict)
    read = {"train": train, "val": val}
    if config.select:
        read["select"] = select = load_labels(config.select, None, config.class_names, strict=strict)
        refuse_shared(f"--select {config.select}", select, {"--val": val})
    else:
        train, select = train.hold_out(SELECT_SHARE, config.seed)
    apart = {"--val": val, "--select" if config.select else "what is held out of --train": select}
    for number, path in enumerate(config.unlabelled, 1):
        read[f"unlabelled {number}"] = images = _usable(unlabelled_images(path), strict=strict)
        refuse_shared(f"--unlabelled {path}", images, apart)
    unlabelled = tuple(images for name, images in read.items() if name.startswith("unlabelled"))
    return PruningData(train, select, val, unlabelled), read


def _latency_budget(
    config: BuildConfig, run: RunFolder, device: RunDevice | None, detector: nn.Module
) -> LatencyBudget:
    """As `latency_budget`, in all processes; the first one measures."""
    own = latency_budget(config, run, device, detector) if device else None
    shared = distributed.from_first(own and replace(own, measure=None))
    budget = own or shared
    assert budget is not None
    return budget


def _pruning_options(config: BuildConfig) -> PruningOptions:
    # A latency table knows which counts run fast, kernel by kernel.
    usual = 1 if config.by_latency else load_target(config.target).channel_multiple
    multiple = config.channel_multiple or usual
    share: dict[str, Any] = {}
    if not config.by_latency:
        share = {"remove": config.remove, "budget": config.budget, "per": config.per}
    return PruningOptions(
        **share,
        iterations=config.iterations,
        schedule=config.schedule,
        criterion=config.criterion,
        replacement=config.replacement,
        limits=Limits(config.min_channels, config.max_layer_ratio, multiple),
        protect=config.protect,
        finetune=FineTuneOptions(
            epochs=config.finetune_epochs,
            learning_rate=config.learning_rate,
            distill=config.distill,
            mosaic=config.mosaic,
        ),
        min_ap=config.min_ap,
        stop_ap_drop=config.stop_ap_drop,
        seed=config.seed,
    )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[RunFolder, RunRecord]]:
    """An existing run folder, ours to write."""
    run = RunFolder(path)
    record = run.read_record()
    with run.lock():
        yield run, record


def load_labels(path: Path, images: Path | None, classes: Sequence[str], *, strict: bool = False) -> Dataset:
    """A labelled data set, saying what had to be dropped; its persons, by any of their names, for `person`.

    Raises:
        EdgePruneError: If it cannot be used; with `strict`, if any of it cannot.
    """
    if (guess_type(path.name)[0] or "").startswith("video/"):
        how = f'give COCO JSON whose file_name is "{path.name}#000123" for frame 123, counted from 0'
        raise RunError(f"{path} is a video without labels: {how}")
    loaded = load_dataset(path, images, None if tuple(classes) == ("person",) else classes)
    return _usable(loaded, strict=strict)


def _usable(dataset: Dataset, *, strict: bool) -> Dataset:
    """What decodes, saying what had to be dropped; errors as `load_labels`."""
    with progress(f"{dataset.path.name}: do its images decode") as update:
        dataset = dataset.decodable(update)
    if strict:
        dataset.refuse_problems()
    if dataset.problems:
        found, first = dataset.contents, dataset.problems[0]
        dropped = f"{found.dropped_images} images and {found.dropped_boxes} boxes were dropped"
        say(f"{dataset.path}: {dropped}, {found.clipped_boxes} boxes cut, first {first}")
    return dataset


def _load_train(config: BuildConfig, *, strict: bool = False) -> Dataset:
    path = config.train or EXAMPLE / "vtest_train.json"
    return load_labels(path, config.train_images, config.class_names, strict=strict)


def _load_val(config: BuildConfig, *, strict: bool = False) -> Dataset:
    path = config.val or EXAMPLE / "vtest_test.json"
    return load_labels(path, config.val_images, config.class_names, strict=strict)


def _val(record: RunRecord, *, strict: bool = False) -> Dataset:
    """The run's validation data, if it is still what the run began with."""
    val = _load_val(record.config, strict=strict)
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


def training_device(chosen: str) -> str:
    """The device that --train-device stands for.

    Raises:
        RunError: If it is not there.
    """
    if chosen == "cuda" and not torch.cuda.is_available():
        raise RunError("--train-device cuda: PyTorch finds no CUDA GPU here; auto or cpu trains on the CPU")
    return "cuda" if chosen != "cpu" and torch.cuda.is_available() else "cpu"


def _protocol(pruned: PrunedDetector) -> Detector:
    return cast(Detector, pruned.detector)


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
    return _export(run, config, pruned, val).model


def _export(
    run: RunFolder,
    config: BuildConfig,
    pruned: PrunedDetector,
    val: Dataset,
    variant: ExportVariant = OWN,
) -> TargetExport:
    """Export a step, prove on validation images that it is the network, check that the target reads it.

    The run's own model is model.onnx with export.json and parity.json; another variant has one record, of its
    own name.
    """
    iteration = pruned.steps[-1].iteration
    folder = run.step(iteration)
    weights_sha256 = sha256_of(folder / "weights.safetensors")
    stem = variant.stem(config.target, config.precision)
    precision = cast(Precision, variant.precision or config.precision)
    int8 = None
    if precision == "int8":
        calibrate, select = _load_train(config).hold_out(SELECT_SHARE, config.seed)
        int8 = Int8Options(calibrate, select, variant.int8_calibration, variant.int8_ap_drop)
    say(f"iteration {iteration}: exporting and checking against PyTorch")
    found = export_for_target(
        _protocol(pruned),
        pruned.network,
        folder / f"{stem}.onnx",
        load_target(variant.target) if variant.target else run_target(run.path, config.target),
        precision=precision,
        parity=val,
        metadata={
            "detector": pruned.spec.name,
            "iteration": str(iteration),
            "weights_sha256": weights_sha256,
        },
        batch=Batch.parse(variant.batch),
        input=variant.input,
        int8=int8,
    )
    if stem != "model":
        write_json(folder / f"{stem}.json", {"weights_sha256": weights_sha256, **found.to_json()})
        return found
    write_json(folder / "export.json", found.model.to_json())
    proof = {"weights_sha256": weights_sha256, "model_sha256": found.model.sha256}
    write_json(folder / "parity.json", {**proof, **found.to_json()})
    return found


def _model(run: RunFolder, iteration: int) -> ExportedModel:
    folder = run.step(iteration)
    if not (folder / "export.json").is_file():
        raise RunError(f"{folder} has no model yet: run `edgeprune export {run.path}`")
    return ExportedModel.from_json(read_json(folder / "export.json"), folder)


def _built(device: RunDevice, config: BuildConfig, model: ExportedModel) -> Engine:
    return device.build(model.path, config.precision, f"{model.path.parent.name}: building the engine")


def _preprocessing(run: RunFolder) -> Preprocessing:
    return _protocol(load_step(run.step(0))).preprocessing


def _measure(run: RunFolder, session: Session, engines: Sequence[Engine], val: Dataset) -> None:
    """Measure the engines of all steps together, and replace what was measured before."""
    with device_progress(f"measuring {len(engines)} engines") as session.progress:
        results = benchmark_engines(
            session, engines, val, image_files(val, run.path / "frames"), _preprocessing(run)
        )
    # Results of two devices in one run would be no comparison, so the old ones go first.
    paths = [run.step(iteration) / "benchmark.json" for iteration in range(len(results))]
    for path in paths:
        path.unlink(missing_ok=True)
    for path, result in zip(paths, results, strict=True):
        write_json(path, result.to_json())
