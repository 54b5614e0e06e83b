"""What was measured: latencies, intervals, one benchmark, and the report that puts it beside the pruning."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.deploy.records import DeviceInfo
from edgeprune.export.model import Parity
from edgeprune.pruning.records import PruningStep

# What each scope holds. A latency without its scope is no figure. A backend may measure more of them.
SCOPES: Mapping[str, str] = {
    "engine": "the network alone, copies excluded",
    "engine_with_copies": "the network with the copies to and from the device",
    "end_to_end": "letterbox, copy, network, copy, NMS; decoding of the image file excluded",
}


SAMPLE_SCORE = 0.3  # a sample detection below is not kept: what a camera would not show


@dataclass(frozen=True)
class Latency:
    """Latency of one image, batch size 1."""

    scope: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    std_ms: float | None  # None with a single run
    runs: int


@dataclass(frozen=True)
class Ratio:
    """Latency divided by the baseline's latency; below 1 is faster."""

    value: float
    low: float | None  # 95 % interval; None with too few blocks for one
    high: float | None
    blocks: int

    @property
    def shows_difference(self) -> bool:
        """Whether the interval excludes 1. Without an interval no difference was shown."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


@dataclass(frozen=True)
class Block:
    """Consecutive runs of one step; the steps' blocks of one index ran together, in random order."""

    index: int
    start_s: float  # the device's monotonic clock
    end_s: float
    samples_ms: Mapping[str, tuple[float, ...]]  # by scope
    invalid: str | None = None  # why it is left out: throttling, another power mode, another load
    images_per_s: float | None = None  # throughput with several images in flight; None: not measured


def counted(blocks: Sequence[Block], disturbed: str | None) -> tuple[Block, ...]:
    """The blocks that figures are made of: the valid ones, or all where too few were, which `disturbed` says."""
    return tuple(block for block in blocks if disturbed or block.invalid is None)


def samples_by_block(blocks: Sequence[Block], scope: str) -> dict[int, Sequence[float]]:
    """Milliseconds of one scope, as `statistics.paired_ratio` takes them."""
    return {block.index: block.samples_ms[scope] for block in blocks if scope in block.samples_ms}


@dataclass(frozen=True)
class Device:
    """Where a benchmark ran. Less than DeviceInfo: a run stays readable when a newer probe tells more."""

    target: str  # the kind of device asked for, such as "host" or "jetson-nano"
    backend: str  # what ran the engine: "onnxruntime" or "tensorrt"
    board: str  # what the machine says it is
    details: Mapping[str, Any] = field(default_factory=dict)  # all that the probe found

    @classmethod
    def of(cls, info: DeviceInfo) -> "Device":
        return cls(info.target, info.backend, info.board, info.to_json())

    @property
    def power_mode(self) -> str | None:
        return self.details.get("power_mode")

    @property
    def clocks_locked(self) -> bool | None:
        return self.details.get("clocks_locked")

    @property
    def identity(self) -> tuple[str, str, str, str | None, bool | None]:
        """What two benchmarks must share for their latencies to be compared."""
        return (self.target, self.backend, self.board, self.power_mode, self.clocks_locked)

    @property
    def on_gpu(self) -> bool:
        return self.backend == "tensorrt"

    @property
    def line(self) -> str:
        """The line under which every figure stands: it says CPU where a CPU ran, whatever the target."""
        processor = "GPU" if self.on_gpu else "CPU"
        return f"target: {self.target} · backend: {self.backend} on the {processor} · board: {self.board}"


@dataclass(frozen=True)
class SampleDetections:
    """What an engine found in one validation image, kept to be drawn."""

    image_id: int
    boxes: tuple[tuple[float, float, float, float], ...]  # xyxy, pixels of the original image
    scores: tuple[float, ...]


@dataclass(frozen=True)
class LayerTime:
    """One detector layer in one engine."""

    layer: str
    time_ms: float | None  # p50; None: no kernel bears its name, it was fused into another
    in_channels: int  # of each group
    out_channels: int
    macs_per_value: float  # for each activation read or written; weights are not counted

    @property
    def shape(self) -> str:
        return f"{self.in_channels} x {self.out_channels}"


@dataclass(frozen=True)
class Energy:
    """Power while one engine alone took image after image end to end, and what that makes an image."""

    watts: float  # of the whole board, idle included
    joules_per_image: float
    rails: tuple[str, ...]  # that were summed
    samples: int
    idle_watts: float | None = None  # just before, with nothing running; None: not measured
    joules_per_image_above_idle: float | None = None


@dataclass(frozen=True)
class BenchmarkResult:
    """One engine on one device."""

    model_sha256: str
    precision: str
    device: Device
    engine_size_bytes: int
    engine_build_s: float
    ap: float  # of the detections that the device returned, scored on the host
    ap50: float
    images: int  # behind the AP
    boxes: int
    not_finite: int  # candidates that were no numbers, over all images
    latencies: tuple[Latency, ...]  # of the valid blocks; of all where `disturbed` says why
    blocks: tuple[Block, ...]
    disturbed: str | None  # too few blocks were valid: what disturbed them
    layer_times_ms: Mapping[str, float]  # p50 by layer of the engine, from the runtime's profiler
    energy: Energy | None  # None: the device does not tell its power
    samples: tuple[SampleDetections, ...]  # of the same few images in every step
    telemetry: Mapping[str, Any]  # as deploy.records.Latencies has it
    warmup_runs: int
    timer_overhead_ms: float
    threads: int | None = None  # of one inference; None: a GPU ran it, or an older edgeprune

    @property
    def counted_blocks(self) -> tuple[Block, ...]:
        """The blocks behind the latencies."""
        return counted(self.blocks, self.disturbed)

    @property
    def fps(self) -> float | None:
        """Images per second end to end, one after the other."""
        end_to_end = self.latency("end_to_end")
        return None if end_to_end is None else 1000 / end_to_end.mean_ms

    @property
    def throughput(self) -> float | None:
        """Images per second with several in flight, so that copies and inferences overlap."""
        measured = [block.images_per_s for block in self.counted_blocks if block.images_per_s is not None]
        return median(measured) if measured else None

    def latency(self, scope: str) -> Latency | None:
        return next((latency for latency in self.latencies if latency.scope == scope), None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "BenchmarkResult":
        """Read what `to_json` wrote.

        Raises:
            BenchmarkError: If a field is missing, unknown or malformed.
        """
        try:
            return cls(
                **{
                    **record,
                    "device": Device(**record["device"]),
                    "latencies": tuple(Latency(**latency) for latency in record["latencies"]),
                    "blocks": tuple(_block(block) for block in record["blocks"]),
                    "energy": _energy(record["energy"]),
                    "samples": tuple(_sample(sample) for sample in record["samples"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BenchmarkError(f"a benchmark record is damaged ({error!r}): measure it again") from error


def _block(record: Mapping[str, Any]) -> Block:
    return Block(**{**record, "samples_ms": {scope: tuple(ms) for scope, ms in record["samples_ms"].items()}})


def _sample(record: Mapping[str, Any]) -> SampleDetections:
    boxes = tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in record["boxes"])
    return SampleDetections(record["image_id"], boxes, tuple(record["scores"]))


def _energy(record: Mapping[str, Any] | None) -> Energy | None:
    return None if record is None else Energy(**{**record, "rails": tuple(record["rails"])})


@dataclass(frozen=True)
class ReportRow:
    """One pruning step beside what was measured of it."""

    step: PruningStep
    model_size_bytes: int | None  # of the ONNX file
    result: BenchmarkResult | None
    layers: tuple[LayerTime, ...] = ()  # of the engine, mapped to the detector; empty where not profiled
    parity: Parity | None = None  # of the model with PyTorch, on real images


@dataclass(frozen=True)
class Report:
    """A run's steps in order, the unpruned detector first, all measured on one device."""

    name: str
    rows: tuple[ReportRow, ...]
    provenance: Mapping[str, Any]  # run.json: command, date, versions, hashes of data and weights

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a report needs at least the unpruned detector's row")
        if len({row.result.device.identity for row in self.rows if row.result}) > 1:
            raise ValueError("the rows of one report come from one device")

    @property
    def device(self) -> Device | None:
        return next((row.result.device for row in self.rows if row.result), None)
