"""What pruning hands on: the specification of a narrowed detector and one record per pruning step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from edgeprune.data.precision import DetectionQuality

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.pruning.graph import Network


@dataclass(frozen=True)
class LayerCost:
    """What one layer with weights costs at batch 1."""

    layer: str
    params: int
    macs: int
    channels: int  # that it produces
    output_shape: tuple[int, ...]  # without the batch


@dataclass(frozen=True)
class Cost:
    """What a network costs at batch 1. MACs: one multiply-add is one; additions of a bias are not counted."""

    params: int
    macs: int
    activation_bytes: int  # peak of what must live at once, float32, executed in order
    layers: tuple[LayerCost, ...]


@dataclass(frozen=True)
class FineTuneRecord:
    """What fine-tuning did in one step."""

    epochs: int
    learning_rate: float
    best_epoch: int  # 0: before fine-tuning; chosen on held-out training data
    weights: str  # "raw", "ema" or "before" (rolled back)
    rolled_back: bool
    losses: tuple[float, ...]  # mean per epoch
    select_ap: tuple[float, ...]  # on held-out training data, index 0 before fine-tuning


CLOSE = 0.02  # of a latency that is asked: an engine this near it is not improved on


@dataclass(frozen=True)
class MeasuredLatency:
    """Latency of an engine, by its ratio to the unpruned one, measured in turn with it."""

    ms: float  # ratio x the unpruned engine's when the run began: free of what has slowed the device since
    low_ms: float | None  # 95 % interval; None with too few rounds for one
    high_ms: float | None
    memory_mib: float | None = None  # that the engine holds; None: the device does not tell


@dataclass(frozen=True)
class MemoryRecord:
    """The memory of a step's engine where the latency table predicts it."""

    asked_mib: float | None  # None for iteration 0, and where no memory is asked for
    predicted_mib: float  # by the table, as the measurements before had corrected it
    measured_mib: float | None  # None: there was no device, or it did not tell
    correction: float  # of the table's memory, after this measurement

    @property
    def mib(self) -> float:
        """The best that is known."""
        return self.predicted_mib if self.measured_mib is None else self.measured_mib


@dataclass(frozen=True)
class LatencyRecord:
    """A step's engine in a run whose budget is a latency or memory, before fine-tuning, which changes neither."""

    asked_ms: float | None  # None for iteration 0, and where no latency is asked for
    predicted_ms: float  # by the table, as the measurements before had corrected it
    measured: MeasuredLatency | None  # None: there was no device
    correction: float  # of the table, after this measurement
    gap: float  # the best choice loses at most this share less importance
    trials: int  # choices that were measured
    memory: MemoryRecord | None = None  # None: the table does not predict it

    @property
    def ms(self) -> float:
        """The best that is known."""
        return self.measured.ms if self.measured else self.predicted_ms

    @property
    def missed(self) -> str | None:
        """What the engine takes, if that is clearly more than it may: all of the interval is `CLOSE` above."""
        found, memory, words = self.measured, self.memory, []
        low_ms = found.low_ms if found else None
        if found and low_ms and self.asked_ms and low_ms > self.asked_ms * (1 + CLOSE):
            interval = f"{found.ms:.2f} ms ({low_ms:.2f} to {found.high_ms:.2f})"
            words.append(f"{interval} where {self.asked_ms:.2f} ms were asked")
        if memory and memory.asked_mib and memory.measured_mib and memory.measured_mib > memory.asked_mib:
            words.append(f"{memory.measured_mib:.1f} MiB where {memory.asked_mib:.1f} MiB were asked")
        return f"the engine takes {' and '.join(words)}" if words else None


@dataclass(frozen=True)
class PruningStep:
    """One iteration: score, remove, fine-tune, evaluate. AP is on the validation data, which decides nothing."""

    iteration: int  # 0 is the unpruned detector
    criterion: str  # "none" for iteration 0
    params: int
    macs: int
    activation_bytes: int
    channels: Mapping[str, int]  # layer -> channels it produces now
    removed: Mapping[str, int]  # layer -> channels removed in this step
    channels_removed: int  # in this step, over all layers
    requested_share: float  # of the original parameters, MACs, channels, latency or memory, up to this step
    achieved_share: float
    importance: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # layer -> min, quartiles, max
    ap_before: float | None = None  # before this step's fine-tuning
    ap50_before: float | None = None
    ap_after: float | None = None
    ap50_after: float | None = None
    ap75_after: float | None = None
    quality: DetectionQuality | None = None  # of `ap_after`
    images: int | None = None  # behind each AP
    boxes: int | None = None
    finetune: FineTuneRecord | None = None
    stopped: str | None = None  # why the run ended here, if it did not reach its last step
    latency: LatencyRecord | None = None  # where the budget is a latency or memory

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PruningStep:
        known = dict(record)
        if known.get("finetune"):
            tuned = dict(known["finetune"])
            tuned["losses"] = tuple(tuned["losses"])
            tuned["select_ap"] = tuple(tuned["select_ap"])
            known["finetune"] = FineTuneRecord(**tuned)
        if known.get("quality"):
            known["quality"] = DetectionQuality.from_json(known["quality"])
        if known.get("latency"):
            latency = dict(known["latency"])
            latency["measured"] = latency["measured"] and MeasuredLatency(**latency["measured"])
            latency["memory"] = latency.get("memory") and MemoryRecord(**latency["memory"])
            known["latency"] = LatencyRecord(**latency)
        known["importance"] = {layer: tuple(values) for layer, values in known["importance"].items()}
        return cls(**known)


@dataclass(frozen=True)
class DetectorSpec:
    """Enough to rebuild a narrowed detector from its code: no pickled objects, no graph on disk."""

    name: str  # in detectors/registry.py, or package.module:function
    input_size: tuple[int, int]  # (H, W)
    classes: tuple[str, ...]
    preprocessing: Mapping[str, Any]  # Preprocessing.to_json()
    channels: Mapping[str, int]  # layer -> channels it produces
    kept: Mapping[str, Sequence[int]]  # layer -> which of its original channels, where some were removed
    added_biases: tuple[str, ...] = ()  # layers that got a bias to carry what removed channels leave behind
    variant: Mapping[str, Any] = field(default_factory=dict)  # what else the detector takes to be built
    frozen: tuple[str, ...] = ()  # parameters that fine-tuning leaves alone

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> DetectorSpec:
        known = dict(record)
        for name in ("input_size", "classes", "added_biases", "frozen"):
            known[name] = tuple(known[name])
        known["kept"] = {layer: tuple(channels) for layer, channels in known["kept"].items()}
        return cls(**known)


@dataclass(frozen=True)
class PrunedDetector:
    """A detector at one step. `detector` gives loss, decode and preprocessing; `network` is what runs."""

    spec: DetectorSpec
    detector: nn.Module
    network: Network
    steps: tuple[PruningStep, ...]
