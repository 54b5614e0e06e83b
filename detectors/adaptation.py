"""Adapting a detector whose head was cut to some of its classes: fine-tuning on labels, at first with frozen layers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.data.dataset import Dataset
from edgeprune.data.precision import AveragePrecision
from edgeprune.detectors.protocol import Detector, Progress
from edgeprune.detectors.training import EpochRecord, FineTuneOptions, TrainingError, fine_tune


@dataclass(frozen=True)
class AdaptOptions:
    """How to adapt.

    Raises:
        TrainingError: If a value is out of its range.
    """

    epochs: int = 20
    """Passes over the training images; 0 keeps the rows and trains nothing."""
    learning_rate: float = 1e-2
    """Of the last layers, which make the outputs and may know their classes badly or not at all."""
    body_share: float = 0.001
    """Of the learning rate, for all other layers: what they know serves new classes too. 1 for random weights."""
    mosaic: float = 0.0
    """Share of the training images that are put together from four."""
    freeze: tuple[str, ...] = ()
    """Parameters and layers, by name or glob pattern, that stay as they are."""
    unfreeze_epoch: int | None = None
    """The first epoch that trains everything. None: what is frozen stays frozen."""

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise TrainingError("--epochs is 0 or more")
        if self.unfreeze_epoch is not None and not (self.freeze and 1 < self.unfreeze_epoch <= self.epochs):
            raise TrainingError("--unfreeze-epoch needs --freeze, and is from 2 to the last epoch")


@dataclass(frozen=True)
class AdaptResult:
    """What became of it; AP on the images held out."""

    before: AveragePrecision
    after: AveragePrecision
    """Of the weights that were kept."""
    best_epoch: int
    """Whose weights were kept; 0: those from before."""
    epochs: tuple[EpochRecord, ...]


def adapt(
    detector: nn.Module,
    train: Dataset,
    select: Dataset,
    options: AdaptOptions,
    *,
    seed: int,
    folder: Path,
    progress: Callable[[str], AbstractContextManager[Progress]],
    on_epoch: Callable[[EpochRecord], None] | None = None,
    device: str | torch.device = "cpu",
) -> AdaptResult:
    """Fine-tune a `Detector` in place on its labels; the best epoch's weights are kept.

    What is frozen first and trained later is trained in two runs, each with its own warm-up, the second from the
    best of the first.

    Args:
        select: images held out of `train`, by which the best epoch is chosen.
        folder: for checkpoints, from which an interrupted adaptation goes on. The caller removes them.
        progress: names what begins; gives a context manager around a `Progress`.

    Raises:
        TrainingError: If a pattern matches nothing, everything is frozen, or training fails.
        DataError: If an image does not decode.
    """
    first = options.epochs if options.unfreeze_epoch is None else options.unfreeze_epoch - 1
    stages = [("checkpoint-frozen.pt" if options.freeze else "checkpoint.pt", options.freeze, first)]
    if options.unfreeze_epoch is not None:
        stages.append(("checkpoint.pt", (), options.epochs - first))
    results = []
    done = 0
    for name, patterns, epochs in stages:
        trained = _freeze(detector, patterns)
        what = f"training {trained:,} of {sum(p.numel() for p in detector.parameters()):,} parameters"
        with progress(f"{what}, epochs {done + 1} to {done + epochs}" if epochs else "AP before") as update:
            results.append(
                _fine_tune(
                    detector,
                    train,
                    select,
                    FineTuneOptions(
                        epochs=epochs,
                        learning_rate=options.learning_rate,
                        body_share=options.body_share,
                        # Its steps follow the gradient's size: new rows move far, good ones beside them stay.
                        optimizer="sgd",
                        mosaic=options.mosaic,
                        distill=False,
                        recalibrate=False,
                    ),
                    seed=seed + done,
                    checkpoint=folder / name,
                    progress=update,
                    on_epoch=on_epoch and _shifted(on_epoch, done),
                    device=device,
                )
            )
        done += epochs
    _freeze(detector, ())
    return _joined(results)


def _fine_tune(detector: Any, *arguments: Any, **options: Any) -> AdaptResult:
    protocol: Detector = detector
    found = fine_tune(protocol, detector, None, *arguments, **options)
    return AdaptResult(found.before, found.after, found.best_epoch, found.epochs)


def _freeze(network: nn.Module, patterns: Sequence[str]) -> int:
    """Freeze what matches, and nothing else; return how many parameters are trained."""
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise TrainingError(f"--freeze {pattern}: no parameter of that name; the first is {names[0]}")
    trained = 0
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not any(_matches(name, pattern) for pattern in patterns))
        trained += parameter.numel() if parameter.requires_grad else 0
    if not trained:
        raise TrainingError(f"--freeze {' '.join(patterns)} leaves nothing to train")
    return trained


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _shifted(on_epoch: Callable[[EpochRecord], None], done: int) -> Callable[[EpochRecord], None]:
    return lambda record: on_epoch(replace(record, epoch=record.epoch + done))


def _joined(results: Sequence[AdaptResult]) -> AdaptResult:
    """Several runs, each from the best of the one before, as one."""
    epochs: list[EpochRecord] = []
    best = 0
    for result in results:
        if result.best_epoch:
            best = len(epochs) + result.best_epoch
        epochs += [replace(record, epoch=len(epochs) + record.epoch) for record in result.epochs]
    return AdaptResult(results[0].before, results[-1].after, best, tuple(epochs))
