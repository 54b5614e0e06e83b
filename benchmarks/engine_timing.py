"""Time the engines of narrowed networks against the unpruned one's."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from edgeprune.benchmarks.latency_table import is_typed_half
from edgeprune.benchmarks.measure import BenchmarkOptions, gray_image, measure_interleaved
from edgeprune.benchmarks.records import Ratio, samples_by_block
from edgeprune.benchmarks.statistics import paired_ratio, summarise
from edgeprune.deploy.device.bench import ENGINE
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.records import Engine
from edgeprune.deploy.session import Session
from edgeprune.deploy.targets import Target
from edgeprune.detectors.protocol import Detector
from edgeprune.export.model import export_onnx
from edgeprune.pruning.graph import Network
from edgeprune.pruning.records import MeasuredLatency

# 12 rounds are enough for an interval, and many networks are timed.
OPTIONS = BenchmarkOptions(runs=120, min_seconds=0.0, block_runs=10)


def exporter(detector: Detector, target: Target, precision: str) -> Callable[[Network, Path], None]:
    """Writes networks of a detector, with their decoding, as ONNX files for engines of a target."""
    typed: Literal["fp16", "fp32"] = "fp16" if is_typed_half(target, precision) else "fp32"

    def export(network: Network, path: Path) -> None:
        export_onnx(detector, network, path, opset=target.max_opset, metadata={}, precision=typed)

    return export


class Timed(NamedTuple):
    """The latency of one engine, network alone."""

    p50_ms: float
    to_first: Ratio
    """To the first of the engines that it was timed with."""
    disturbed: str | None
    """What else ran meanwhile."""

    def to_json(self) -> dict[str, Any]:
        ratio = {
            "ratio": self.to_first.value,
            "ratio_low": self.to_first.low,
            "ratio_high": self.to_first.high,
        }
        return {"p50_ms": self.p50_ms, **ratio, "disturbed": self.disturbed}


def time_together(
    session: Session, engines: Sequence[Engine], preprocessing: Preprocessing, options: BenchmarkOptions
) -> list[Timed]:
    """Time engines in interleaved blocks.

    Raises:
        DeviceError: If the device fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        images = [gray_image(Path(folder))]
        found = measure_interleaved(session, engines, images, preprocessing, options)
    blocks = [samples_by_block(found.counted_blocks(index), ENGINE) for index in range(len(engines))]
    timed = []
    for samples in blocks:
        p50_ms = summarise([ms for block in samples.values() for ms in block], ENGINE).p50_ms
        ratio = paired_ratio(samples, blocks[0])
        assert ratio is not None  # they were measured in the same rounds
        timed.append(Timed(p50_ms, ratio, found.disturbed))
    return timed


def time_networks(session: Session, detector: Detector, networks: Sequence[Network]) -> list[Timed]:
    """Time the engines of a detector's networks together, in float32.

    Raises:
        EdgePruneError: If a network cannot be exported, or the device fails.
    """
    export = exporter(detector, session.target, "fp32")
    with tempfile.TemporaryDirectory() as folder:
        engines = []
        for index, network in enumerate(networks):
            path = Path(folder) / f"{index}.onnx"
            export(network, path)
            engines.append(session.build(path))
        return time_together(session, engines, detector.preprocessing, BenchmarkOptions())


class EngineTimer:
    """Called with a network, gives latency and memory of its engine on the session's device.

    For a run whose budget is a latency. The weights do not matter, so it is done before any fine-tuning.
    """

    def __init__(
        self,
        session: Session,
        build: Callable[[Path], Engine],
        export: Callable[[Network, Path], object],
        preprocessing: Preprocessing,
        unpruned: Network,
        unpruned_ms: float | None,
        options: BenchmarkOptions = OPTIONS,
    ) -> None:
        """
        Args:
            build: builds an ONNX file's engine with the session, in the run's precision.
            export: writes a network, with its decoding, as ONNX.
            unpruned: what each network is timed beside.
            unpruned_ms: its latency when the run began; None: it begins with the first call.
        """
        self.session, self.build, self.export = session, build, export
        self.preprocessing, self.options = preprocessing, options
        self.unpruned, self.unpruned_ms = unpruned, unpruned_ms
        self._unpruned_engine: Engine | None = None  # built once: it is timed beside every other

    def __call__(self, network: Network) -> MeasuredLatency:
        """
        Raises:
            EdgePruneError: If the network cannot be exported, or the device fails.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if self._unpruned_engine is None:
                self._unpruned_engine = self._built(self.unpruned, folder / "unpruned.onnx")
            engines = [self._unpruned_engine, self._built(network, folder / "narrowed.onnx")]
            unpruned, narrowed = time_together(self.session, engines, self.preprocessing, self.options)
        if self.unpruned_ms is None:
            self.unpruned_ms = unpruned.p50_ms
        ratio = narrowed.to_first
        low, high = (end and end * self.unpruned_ms for end in (ratio.low, ratio.high))
        return MeasuredLatency(ratio.value * self.unpruned_ms, low, high, engines[1].memory_mib)

    def _built(self, network: Network, path: Path) -> Engine:
        self.export(network, path)
        return self.build(path)
