"""What a device reports: itself, the engines built on it, their latencies and detections."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from edgeprune.data.precision import ImageDetections


@dataclass(frozen=True)
class DeviceInfo:
    """What the probe found. None: the device does not say."""

    target: str
    transport: str  # "this machine", "user@nano.local"
    board: str
    machine: str  # "x86_64", "aarch64"
    system: str
    python: str
    l4t: str | None  # Jetson Linux release
    cpus: int
    memory_mib: Mapping[str, int | None]  # total, available, swap_total, swap_free
    temperatures_c: Mapping[str, float]  # by zone
    images: str  # library that decodes and resizes there
    backend: str
    backends: Mapping[str, Mapping[str, Any]]  # by name: {"version", ...} or {"error": {...}}
    power_mode: str | None = None
    power_modes: tuple[str, ...] = ()  # that the board has
    clocks_locked: bool | None = None
    avx512: bool | None = None  # decides how many channels ONNX Runtime's kernels take at once

    @property
    def backend_version(self) -> str | None:
        """Version of the backend in use, None where it does not work."""
        return self.backends.get(self.backend, {}).get("version")

    @property
    def compute_capability(self) -> str | None:
        """Of the GPU, "5.3"; None where TensorRT does not work."""
        return self.backends.get("tensorrt", {}).get("compute_capability")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "power_modes": list(self.power_modes)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "DeviceInfo":
        return cls(**{**record, "power_modes": tuple(record["power_modes"])})


@dataclass(frozen=True)
class Engine:
    """An engine on the device. It runs only where everything in its key is the same."""

    key: str  # sha256 over the next seven
    model_sha256: str
    backend: str
    backend_version: str
    device: str  # device model
    compute_capability: str | None
    precision: str
    options: Mapping[str, Any]
    path: str  # relative to the device's work folder
    sha256: str
    size_bytes: int
    build_s: float
    log: tuple[str, ...]  # lines of the build worth keeping
    reused: bool  # found built
    memory_mib: float | None = None  # its weights and activations while it runs; None: the device cannot tell

    @property
    def threads(self) -> int | None:
        """Of one inference; None where a GPU runs it."""
        return int(self.options.get("threads", 1)) if self.backend == "onnxruntime" else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "log": list(self.log)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Engine":
        known = {field.name for field in fields(cls)}
        return cls(
            **{name: value for name, value in record.items() if name in known} | {"log": tuple(record["log"])}
        )


@dataclass(frozen=True)
class LatencyBlock:
    """A run of inferences of one engine, undisturbed by the other engines."""

    engine: int  # index into the engines that were timed together
    round: int  # every engine has one block in a round, in random order
    start_s: float  # the device's monotonic clock
    end_s: float
    samples_ms: Mapping[str, tuple[float, ...]]  # by scope
    images_per_s: float | None = None  # throughput with several in flight; None: not measured
    images: int = 0  # that went end to end, the unrecorded first one included


@dataclass(frozen=True)
class Latencies:
    """Raw latencies of engines that were timed together.

    Scopes: "engine", the inference alone; "end_to_end", from the decoded image to its detections (letterbox,
    normalise, copies, inference, NMS); a backend may add more.
    """

    engines: tuple[str, ...]  # keys
    blocks: tuple[LatencyBlock, ...]  # in the order in which they ran
    warmup_runs: tuple[int, ...]  # per engine
    timer_overhead_ms: float
    # "before" and "after": power_mode, clocks_locked. "samples": "time_s" on the clock of the blocks,
    # "temperatures_c", "power_mw", "available_mib", "load", clocks, and what tegrastats tells (device/telemetry.py).
    telemetry: Mapping[str, Any] = field(default_factory=dict)
    idle_s: tuple[float, float] | None = None  # on the clock of the blocks: from when to when nothing ran
    warmup_stable: tuple[bool, ...] = ()  # per engine: whether its latency was stable when warm-up ended

    def samples_ms(self, engine: int, scope: str) -> np.ndarray:
        """All samples of one engine in one scope, in the order of measurement."""
        chosen = [block.samples_ms[scope] for block in self.blocks if block.engine == engine]
        return np.array([sample for samples in chosen for sample in samples])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Latencies":
        blocks = tuple(
            LatencyBlock(
                **{**block, "samples_ms": {scope: tuple(ms) for scope, ms in block["samples_ms"].items()}}
            )
            for block in record["blocks"]
        )
        return cls(
            tuple(record["engines"]),
            blocks,
            tuple(record["warmup_runs"]),
            record["timer_overhead_ms"],
            record["telemetry"],
            tuple(record["idle_s"]) if record.get("idle_s") else None,
            tuple(record["warmup_stable"]),
        )


@dataclass(frozen=True)
class Profile:
    """Where an engine's time goes."""

    times_ms: Mapping[str, tuple[float, ...]]  # by layer, one value a run


@dataclass(frozen=True)
class Check:
    """One thing that is needed, and what to do where it is missing."""

    name: str
    ok: bool | None  # None: not needed here, or only worth knowing
    found: str
    remedy: str


@dataclass(frozen=True)
class Evaluation:
    """Detections of an engine on the device."""

    detections: tuple[ImageDetections, ...]
    not_finite: int  # candidates that were no numbers, over all images: a float16 overflow shows here


@dataclass(frozen=True)
class CameraSummary:
    """What the camera did from its first frame to its last."""

    frames: int
    dropped: int  # that came while another one was worked on
    reconnects: int
    seconds: float
    fps: float | None  # None: no two frames
    source: str  # an address without its password
    ended: str  # "end of stream", "stopped", "max_frames", "max_seconds"
    # Times have "mean", "p50", "p90" and "p99", all None where no frame came.
    latency_ms: Mapping[str, float | None]  # from a frame's arrival to its boxes
    stages_ms: Mapping[str, Mapping[str, float | None]]  # of that: capture, prepare, run, postprocess
    wait_ms: Mapping[str, float | None]  # for the next frame
    output_ms: Mapping[str, float | None]  # drawing, writing, showing
    engines: tuple[Mapping[str, Any], ...]  # each "name", "fps" alone, "stages_ms" of its own

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "engines": list(self.engines)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "CameraSummary":
        known = {field.name: record[field.name] for field in fields(cls)}
        return cls(**known | {"engines": tuple(record["engines"])})
