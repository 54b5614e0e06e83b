"""Adapting a detector in a folder: a record of what was asked, the weights kept, and checkpoints on the way.

adapt.json             what was asked and, once it is done, what became of it
weights.safetensors    the adapted detector, for --weights
checkpoint*.pt         while training
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from edgeprune.cli.progress import progress, say
from edgeprune.cli.run_folder import RunError, RunFolder
from edgeprune.data.dataset import Dataset
from edgeprune.data.files import read_json, sha256_of, write_json
from edgeprune.detectors import distributed
from edgeprune.detectors.adaptation import AdaptOptions, AdaptResult, adapt
from edgeprune.detectors.registry import load_detector, save_weights
from edgeprune.detectors.training import EpochRecord

SCHEMA_VERSION = 1
RECORD, WEIGHTS = "adapt.json", "weights.safetensors"


@dataclass(frozen=True)
class Request:
    """What to adapt, and on which images."""

    name: str
    """The detector's in the registry."""
    detector: nn.Module
    """With the rows of its classes; it is trained in place."""
    weights_sha256: str | None
    """Of the file that it came from; None: published weights, checked on fetching."""
    train: Dataset
    select: Dataset
    options: AdaptOptions
    seed: int
    data: Mapping[str, Any]
    """What the labels, before anything was held out, hold and had to drop: `contents_of`."""

    def to_json(self) -> dict[str, Any]:
        return {
            "detector": self.name,
            "classes": list(self.detector.classes),  # type: ignore[arg-type]
            "input_size": list(self.detector.input_size),  # type: ignore[arg-type]
            "weights_sha256": self.weights_sha256,
            "train_sha256": self.train.sha256,
            "train_images": len(self.train),
            "select_sha256": self.select.sha256,
            "select_images": len(self.select),
            "options": {**asdict(self.options), "freeze": list(self.options.freeze)},
            "seed": self.seed,
        }


def adapt_in(folder: Path, request: Request, device: str) -> dict[str, Any]:
    """Adapt, or find it done: the record, with `result`. The caller holds the folder's lock.

    An interrupted adaptation goes on after its last whole epoch. Of several processes all train, and the first writes.

    Raises:
        RunError: If another adaptation was begun in the folder.
        EdgePruneError: If training fails or something cannot be written.
    """
    asked = {"schema_version": SCHEMA_VERSION, **request.to_json()}
    first = distributed.rank() == 0
    record = distributed.from_first(_begun(folder, asked) if first else None)
    if record is None:
        record = {**asked, "data": dict(request.data)}
        if first:
            folder.mkdir(exist_ok=True)
            write_json(folder / RECORD, record)
    if "result" not in record:
        result = adapt(
            request.detector,
            request.train,
            request.select,
            request.options,
            seed=request.seed,
            folder=folder,
            progress=progress,
            on_epoch=lambda epoch: say(_line(epoch)),
            device=device,
        )
        if first:
            save_weights(folder / WEIGHTS, request.name, request.detector)
            record = {**record, "result": _result(result, sha256_of(folder / WEIGHTS))}
            write_json(folder / RECORD, record)
    if first:
        for checkpoint in folder.glob("checkpoint*.pt"):
            checkpoint.unlink()
    return distributed.from_first(record)


def adapted(folder: Path, request: Request, device: str) -> nn.Module:
    """The detector that `adapt_in` made in the folder; errors as there."""
    record = adapt_in(folder, request, device)
    path = folder / WEIGHTS
    if not path.is_file() or sha256_of(path) != record["result"]["weights_sha256"]:
        raise RunError(f"{path} is not what {folder / RECORD} describes: remove {folder} to adapt anew")
    height, width = record["input_size"]
    return load_detector(request.name, path, (height, width), record["classes"])


def adaptation_folder(path: Path, *, resume: bool) -> RunFolder:
    """The folder of an adaptation, to be locked.

    Raises:
        RunError: If it holds an adaptation and is not to be gone on with, or holds other things.
    """
    begun = (path / RECORD).is_file()
    if begun and not resume:
        raise RunError(
            f"{path} holds an adaptation already: --resume goes on with it, another --out starts anew"
        )
    if not begun and path.is_dir():
        others = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
        if others:
            raise RunError(f"{path} holds {others[0]} and no adaptation: choose another --out")
    return RunFolder(path)


def _begun(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    record = read_json(path)
    if not isinstance(record, dict):
        raise RunError(f"{path} is damaged: remove {folder} to adapt anew")
    differing = [name for name in asked if record.get(name) != asked[name]]
    if differing:
        raise RunError(
            f"cannot go on in {folder}, where another adaptation began: {', '.join(differing)} differ"
        )
    return record


def _line(epoch: EpochRecord) -> str:
    return f"epoch {epoch.epoch}: loss {epoch.loss:.3f}, AP {epoch.ap:.3f}, of the averaged weights {epoch.ema_ap:.3f}"


def _result(result: AdaptResult, weights_sha256: str) -> dict[str, Any]:
    return {
        "before": asdict(result.before),
        "after": asdict(result.after),
        "best_epoch": result.best_epoch,
        "epochs": [asdict(epoch) for epoch in result.epochs],
        "weights_sha256": weights_sha256,
    }
