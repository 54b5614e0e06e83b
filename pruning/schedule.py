"""Prune iteratively: score, remove, fine-tune, evaluate; again, until the asked share is gone.

The main path of edgeprune. Each step is saved before it is yielded, and what was saved is not computed again, so a run
that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from edgeprune.data.dataset import Dataset
from edgeprune.data.errors import EdgePruneError
from edgeprune.data.precision import ImageDetections, average_precision, detection_quality
from edgeprune.deploy.device.imaging import normalise
from edgeprune.detectors import distributed
from edgeprune.detectors.batches import batches
from edgeprune.detectors.canvases import Canvases
from edgeprune.detectors.evaluation import detect
from edgeprune.detectors.protocol import Detector, Progress
from edgeprune.detectors.training import (
    FineTuneOptions,
    FineTuneResult,
    fine_tune,
    recalibrate_batch_norm,
)
from edgeprune.pruning.budget import COSTS, Limits
from edgeprune.pruning.checkpoint import RECORD, describe, load_step, save_step, trace_detector
from edgeprune.pruning.counting import count
from edgeprune.pruning.graph import Network
from edgeprune.pruning.groups import Groups, find_groups
from edgeprune.pruning.imitation import Imitation
from edgeprune.pruning.importance import LossBatch, Scores, Scoring, find_criterion, score
from edgeprune.pruning.narrowing import Candidates, LatencyBudget, within_cost, within_latency
from edgeprune.pruning.records import FineTuneRecord, LatencyRecord, PrunedDetector, PruningStep
from edgeprune.pruning.replacement import REPLACEMENTS
from edgeprune.pruning.surgery import largest_difference, masked, remove

log = logging.getLogger(__name__)

T = TypeVar("T")

Stage = Callable[
    [str], AbstractContextManager[Progress]
]  # names what begins; gives what is called as it proceeds

UNFINISHED = "before-fine-tuning"  # folder of a step whose fine-tuning is not done
SCORING_BATCH = 8
TOLERANCE = (
    1e-4  # of an output's range, between the narrowed network and the original with its channels zeroed
)


class PruningError(EdgePruneError):
    """Pruning options clash, or pruning cannot go on."""


@dataclass(frozen=True)
class PruningOptions:
    """How to prune.

    Raises:
        PruningError: If a value is out of its range.
    """

    iterations: int = 10
    remove: float = 0.4
    """Share of the original cost that is gone after the last iteration."""
    budget: str = "params"
    """What `remove` is a share of: "params", "macs" or "channels"."""
    schedule: str = "linear"
    """"linear": equal shares of the original; "geometric": equal shares of what is left."""
    criterion: str = "taylor-sum"
    per: str = "params"
    """Rank by importance per parameter ("params") or MAC ("macs") saved, or by importance alone ("none")."""
    replacement: str = "linear"
    """What stands in for a removed channel: "zero", its "mean", or its "linear" prediction from those that stay."""
    scoring_images: int = 128
    """Training images that importance is computed from, at most."""
    limits: Limits = field(default_factory=Limits)
    protect: tuple[str, ...] = ()
    """Layers, by name or glob pattern, that keep all their channels."""
    finetune: FineTuneOptions = field(default_factory=FineTuneOptions)
    min_ap: float | None = None
    """Stop before a step whose AP on held-out training data is lower."""
    stop_ap_drop: float | None = None
    """Stop before a step that lost more AP than this against the unpruned detector, on held-out training data."""
    seed: int = 0

    def __post_init__(self) -> None:
        for valid, rule in (
            (self.iterations >= 1, "--iterations is 1 or more"),
            (0 < self.remove < 1, "--remove is a share above 0 and below 1"),
            (self.budget in COSTS, f"--budget is one of {', '.join(COSTS)}"),
            (self.schedule in ("linear", "geometric"), "--schedule is linear or geometric"),
            (self.per in ("params", "macs", "none"), "--per is params, macs or none"),
            (self.replacement in REPLACEMENTS, f"--replacement is one of {', '.join(REPLACEMENTS)}"),
            (self.scoring_images >= 1, "--scoring-images is 1 or more"),
        ):
            if not valid:
                raise PruningError(rule)
        find_criterion(self.criterion)

    def share(self, iteration: int) -> float:
        """Share of the original cost that is to be gone after an iteration."""
        if self.schedule == "geometric":
            return float(1 - (1 - self.remove) ** (iteration / self.iterations))
        return self.remove * iteration / self.iterations


@dataclass(frozen=True)
class PruningData:
    """`train` scores and trains, `select` chooses between weights, `val` decides nothing and reports."""

    train: Dataset
    select: Dataset
    val: Dataset
    unlabelled: tuple[Dataset, ...] = ()
    """Further images for distillation."""


def prune_iteratively(
    name: str,
    detector: nn.Module,
    data: PruningData,
    options: PruningOptions,
    folder: Callable[[int], Path],
    *,
    device: str | torch.device = "cpu",
    stage: Stage,
    latency: LatencyBudget | None = None,
) -> Iterator[PrunedDetector]:
    """Yield the unpruned detector as iteration 0, then one detector an iteration, each on the CPU.

    Ends early after a step that met its limits, or before a step whose AP fell too low; the record of the last
    step then says so (`PruningStep.stopped`). Under torchrun all processes call it, with the same arguments.

    Args:
        name: the detector's in the registry.
        detector: a `Detector` with its trained weights; it is not changed.
        folder: where each iteration is saved; what is saved there already is loaded instead of computed.
        device: where scoring, fine-tuning and evaluation run.
        latency: what to come down to, instead of the options' share of a cost.

    Raises:
        EdgePruneError: If the network cannot be followed, nothing can be removed, data or weights are
            unusable, or something cannot be written.
    """
    run = _Run(name, detector, data, options, folder, torch.device(device), stage, latency)
    pruned = run.saved(0) or run.begin()
    original = pruned
    yield pruned
    for iteration in range(1, options.iterations + 1):
        if pruned.steps[-1].stopped is not None:
            return
        following = run.saved(iteration) or run.step(iteration, pruned, original)
        if following is None:
            return
        pruned = following
        yield pruned


class _Run:
    """What all iterations of one run share."""

    def __init__(
        self,
        name: str,
        detector: nn.Module,
        data: PruningData,
        options: PruningOptions,
        folder: Callable[[int], Path],
        device: torch.device,
        stage: Stage,
        latency: LatencyBudget | None,
    ) -> None:
        self.name, self.detector, self.data, self.options = name, detector, data, options
        self.latency = latency
        self.protocol: Detector = detector  # type: ignore[assignment]
        self.folder, self.device, self.stage = folder, device, stage
        self.val = Canvases(data.val, self.protocol.input_size, self.protocol.preprocessing)

    def saved(self, iteration: int) -> PrunedDetector | None:
        return _load_if_saved(self.folder(iteration))

    def begin(self) -> PrunedDetector:
        network = trace_detector(self.detector, self.protocol.input_size).eval()
        cost = count(network)
        latency = None
        if self.latency is not None:
            groups = find_groups(network).protect(self.options.protect)
            latency = self.latency.begin(network, groups, self.options.limits)
        found = self.validated("iteration 0: AP of the unpruned detector", network)
        step = PruningStep(
            iteration=0,
            criterion="none",
            params=cost.params,
            macs=cost.macs,
            activation_bytes=cost.activation_bytes,
            channels={layer.layer: layer.channels for layer in cost.layers},
            removed={},
            channels_removed=0,
            requested_share=0.0,
            achieved_share=0.0,
            ap_before=found["ap_after"],
            ap50_before=found["ap50_after"],
            latency=latency,
            **found,
        )
        return self.save(network, (step,), self.folder(0))

    def step(self, iteration: int, last: PrunedDetector, original: PrunedDetector) -> PrunedDetector | None:
        """One iteration; None if AP fell too low, which `last` then records.

        What removal left is saved before fine-tuning, which goes on from its own checkpoint.
        """
        folder = self.folder(iteration)
        unfinished = folder / UNFINISHED
        narrow = _load_if_saved(unfinished)
        if narrow is None:
            narrow = self.narrowed(iteration, last, original)
            narrow = self.save(narrow.network, narrow.steps, unfinished)
        step = narrow.steps[-1]
        if self.options.finetune.epochs:
            result = self.fine_tuned(iteration, narrow.network, original.network, folder)
            found = self.validated(f"iteration {iteration}: AP after fine-tuning", narrow.network)
            step = replace(step, finetune=_record(result, self.options.finetune), **found)
        reason = self.too_low(iteration, narrow.network, original.network)
        if reason is None:
            pruned = self.save(narrow.network, (*last.steps, step), folder)
        else:
            log.warning("stopped before iteration %d: %s", iteration, reason)
            ended = replace(last.steps[-1], stopped=f"before iteration {iteration}: {reason}")
            self.save(last.network, (*last.steps[:-1], ended), self.folder(iteration - 1))
            pruned = None
        distributed.gather(True)  # all have read what the first now clears away
        if distributed.rank() == 0:
            (folder / "checkpoint.pt").unlink(missing_ok=True)
            shutil.rmtree(unfinished)
            if pruned is None:
                folder.rmdir()
        return pruned

    def narrowed(self, iteration: int, last: PrunedDetector, original: PrunedDetector) -> PrunedDetector:
        """Score and remove."""
        options = self.options
        network = last.network.to(self.device)
        self.detector.to(self.device)
        groups = find_groups(network).protect(options.protect)
        with self.stage(
            f"iteration {iteration}: importance of {groups.units} channels ({options.criterion})"
        ) as told:
            images = min(options.scoring_images, len(self.data.train))
            scoring = Scoring(
                groups,
                self.protocol,
                self.scoring_batches(images),
                replacement=options.replacement,
                seed=options.seed + iteration,
                progress=lambda done, _: told(done, images),
            )
            scores = score(options.criterion, scoring)
            statistics = scoring.statistics

        def without(units: tuple[int, ...]) -> Network:
            stand_ins = REPLACEMENTS[options.replacement](groups, units, statistics)
            return remove(groups, units, stand_ins).to("cpu")

        candidates = Candidates(groups, scores, without, find_groups(original.network), options.limits)
        if self.latency is None:
            share = options.share(iteration)
            narrow = within_cost(candidates, cost=options.budget, share=share, per=options.per)
        else:
            first = _latency(original)
            goals = self.latency.goals(first, lambda share: replace(options, remove=share).share(iteration))
            narrow = within_latency(candidates, self.latency, goals, first, _latency(last))
        self.prove(groups, narrow.units)
        network.to("cpu")
        self.detector.to("cpu")
        if options.finetune.recalibrate:
            self.recalibrate(narrow.network)
        cost = count(narrow.network)
        found = self.validated(f"iteration {iteration}: AP before fine-tuning", narrow.network)
        removed = _removed(groups, narrow.units)
        step = PruningStep(
            iteration=iteration,
            criterion=options.criterion,
            params=cost.params,
            macs=cost.macs,
            activation_bytes=cost.activation_bytes,
            channels={layer.layer: layer.channels for layer in cost.layers},
            removed=removed,
            channels_removed=sum(removed.values()),
            requested_share=narrow.asked,
            achieved_share=1 - narrow.left,
            importance=_spread(groups, scores),
            ap_before=found["ap_after"],
            ap50_before=found["ap50_after"],
            stopped=narrow.stopped,
            latency=narrow.latency,
            **found,
        )
        spec = describe(self.name, self.protocol, narrow.network)
        return PrunedDetector(spec, self.detector, narrow.network, (*last.steps, step))

    def scoring_batches(self, images: int) -> Callable[[], Iterator[LossBatch]]:
        """The same images at each call, a seeded choice, those with boxes first; this process' share of them."""
        samples = self.data.train.samples
        order = np.random.default_rng(self.options.seed).permutation(len(samples)).tolist()
        chosen = sorted(order, key=lambda index: bool(samples[index].ignore.all()))[:images]
        canvases = Canvases(
            self.data.train.subset(sorted(chosen)), self.protocol.input_size, self.protocol.preprocessing
        )

        def give() -> Iterator[LossBatch]:
            for batch in batches(
                canvases,
                batch_size=SCORING_BATCH,
                augmentation=None,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
            ):
                yield (
                    batch.images.to(self.device),
                    [
                        type(target)(*(tensor.to(self.device) for tensor in target))
                        for target in batch.targets
                    ],
                )

        return give

    def prove(self, groups: Groups, units: Sequence[int]) -> None:
        """Removal is exact, or this run ends: compare with the original whose channels are zeroed."""
        if groups.fragile.intersection(units):
            return  # a norm over channels measures other statistics now, as it would in a network built narrow
        canvas, _ = self.val[0]
        images = torch.from_numpy(normalise(canvas, self.protocol.preprocessing)).to(self.device)
        difference = largest_difference(masked(groups, units), remove(groups, units), (images,))
        log.info(
            "the narrowed network differs by %.1e of its outputs' range from the one with zeroed channels",
            difference,
        )
        if not difference <= TOLERANCE:
            raise AssertionError(
                f"removal changed the outputs by {difference:.1e} of their range; please report this"
            )

    def recalibrate(self, network: Network) -> None:
        """Fit batch norm's statistics to what removal has left, which fine-tuning then starts from."""
        canvases = Canvases(self.data.train, self.protocol.input_size, self.protocol.preprocessing)
        network.to(self.device)
        recalibrate_batch_norm(network, canvases, self.options.finetune.batch_size, self.device)
        network.to("cpu")

    def fine_tuned(self, iteration: int, network: Network, teacher: Network, folder: Path) -> FineTuneResult:
        folder.mkdir(parents=True, exist_ok=True)
        with self.stage(f"iteration {iteration}: fine-tuning {self.options.finetune.epochs} epochs") as told:
            return fine_tune(
                self.protocol,
                network,
                teacher if self.options.finetune.distill else None,
                self.data.train,
                self.data.select,
                replace(self.options.finetune, recalibrate=False),  # that was done before
                seed=self.options.seed + iteration,
                checkpoint=folder / "checkpoint.pt",
                progress=told,
                device=self.device,
                unlabelled=self.data.unlabelled if self.options.finetune.distill else (),
                follow=Imitation(find_groups(teacher), network),
            )

    def validated(self, what: str, network: Network) -> dict[str, Any]:
        """A step's fields about its detections on the validation data."""
        return self.evaluated(what, network, self.val, _validation_fields)

    def evaluated(
        self,
        what: str,
        network: Network,
        canvases: Canvases,
        measure: Callable[[Dataset, Sequence[ImageDetections]], T],
    ) -> T:
        """What `measure` makes of a network's detections, by the first process for all."""
        found = None
        if distributed.rank() == 0:
            self.detector.to(self.device)
            with self.stage(what) as told:
                data = canvases.dataset
                network.to(self.device)
                detections = detect(self.protocol, network, data, self.device, told, canvases=canvases)
                found = measure(data, detections)
            network.to("cpu")
            self.detector.to("cpu")
        shared = distributed.from_first(found)
        assert shared is not None
        return shared

    def too_low(self, iteration: int, network: Network, original: Network) -> str | None:
        """Why the run should stop before this iteration, by AP on held-out training data."""
        options = self.options
        if options.min_ap is None and options.stop_ap_drop is None:
            return None
        select = Canvases(self.data.select, self.protocol.input_size, self.protocol.preprocessing)
        what = f"iteration {iteration}: AP on held-out training data"
        now, first = (
            self.evaluated(what, each, select, average_precision).ap for each in (network, original)
        )
        if options.min_ap is not None and now < options.min_ap:
            return f"AP on held-out training data is {now:.3f}, below --min-ap {options.min_ap:g}"
        if options.stop_ap_drop is not None and first - now > options.stop_ap_drop:
            return f"AP on held-out training data fell from {first:.3f} to {now:.3f}, over --stop-ap-drop"
        return None

    def save(self, network: Network, steps: tuple[PruningStep, ...], folder: Path) -> PrunedDetector:
        pruned = PrunedDetector(describe(self.name, self.protocol, network), self.detector, network, steps)
        if distributed.rank() == 0:
            save_step(folder, pruned)
        return pruned


def _load_if_saved(folder: Path) -> PrunedDetector | None:
    """The first process looks, so that all do the same."""
    return load_step(folder) if distributed.from_first((folder / RECORD).is_file()) else None


def _validation_fields(dataset: Dataset, detections: Sequence[ImageDetections]) -> dict[str, Any]:
    found = average_precision(dataset, detections)
    return {
        "ap_after": found.ap,
        "ap50_after": found.ap50,
        "ap75_after": found.ap75,
        "quality": detection_quality(dataset, detections),
        "images": found.images,
        "boxes": found.boxes,
    }


def _latency(pruned: PrunedDetector) -> LatencyRecord:
    """Of a step in a run whose budget is a latency or memory."""
    record = pruned.steps[-1].latency
    assert record is not None
    return record


def _removed(groups: Groups, units: Sequence[int]) -> dict[str, int]:
    counts = {layer: int(np.isin(ids, units).sum()) for layer, ids in groups.outputs.items()}
    return {layer: removed for layer, removed in counts.items() if removed}


def _spread(groups: Groups, scores: Scores) -> dict[str, tuple[float, ...]]:
    """Smallest, quartiles and largest importance of each layer's removable channels."""
    spread: dict[str, tuple[float, ...]] = {}
    for group in groups.groups:
        values = np.quantile(scores[list(group.units)], [0, 0.25, 0.5, 0.75, 1])
        spread |= {layer: tuple(float(value) for value in values) for layer in group.layers}
    return spread


def _record(result: FineTuneResult, options: FineTuneOptions) -> FineTuneRecord:
    best = "before" if result.best_epoch == 0 else "ema" if result.averaged else "raw"
    return FineTuneRecord(
        epochs=len(result.epochs),
        learning_rate=options.learning_rate,
        best_epoch=result.best_epoch,
        weights=best,
        rolled_back=result.rolled_back,
        losses=tuple(epoch.loss for epoch in result.epochs),
        select_ap=(result.before.ap, *(max(epoch.ap, epoch.ema_ap) for epoch in result.epochs)),
    )
