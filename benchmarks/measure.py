"""Measure the engines of a run on a device: interleaved latency, AP, layer times, energy."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgeprune.benchmarks.energy import energy_of, tells_power
from edgeprune.benchmarks.records import (
    SAMPLE_SCORE,
    BenchmarkResult,
    Block,
    Device,
    Latency,
    SampleDetections,
    counted,
)
from edgeprune.benchmarks.statistics import MIN_BLOCKS, summarise
from edgeprune.benchmarks.validity import LOAD_WINDOW_S, disturbances
from edgeprune.data.dataset import Dataset
from edgeprune.data.precision import ImageDetections, average_precision
from edgeprune.deploy.device.bench import END_TO_END
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.records import Engine, Latencies
from edgeprune.deploy.session import Session

log = logging.getLogger(__name__)

REPEATS = 2  # how often disturbed rounds are measured again
SAMPLE_IMAGES = 3  # whose detections are kept to be drawn
ENERGY_S = 5.0  # how long the device is idle, then each engine runs alone, where the device tells its power


@dataclass(frozen=True)
class BenchmarkOptions:
    """How long is measured. The defaults give at least 20 rounds, enough for narrow intervals."""

    runs: int = 200  # at least, per step and scope
    min_seconds: float = 30.0  # at least, over all steps: another load shows in 15 s, and heat takes its time
    block_runs: int = 10  # of one step before the next one's turn
    warmup_runs: int = 20  # at least; more until the latency is stable
    images: int = 16  # that end-to-end runs take in turn
    profile_runs: int = 50  # for the time of each layer
    seed: int = 0  # of the order within each round


def benchmark_engines(
    session: Session,
    engines: Sequence[Engine],
    dataset: Dataset,
    files: Mapping[int, Path],
    preprocessing: Preprocessing,
    *,
    options: BenchmarkOptions = BenchmarkOptions(),
) -> list[BenchmarkResult]:
    """Measure engines together, the unpruned step's first.

    Args:
        dataset: scored against.
        files: its images, as `deploy.session.image_files` gives them.

    Returns:
        One result an engine, in their order.

    Raises:
        DeviceError: If the device fails.
    """
    images = list(islice(files.values(), options.images))
    measured = measure_interleaved(session, engines, images, preprocessing, options)
    # The probe finds the device idle, as its owner left it; power mode and clocks were set for the benchmark.
    device = Device.of(replace(session.probe(), **measured.telemetry["before"]))
    with_energy = tells_power(measured.telemetry)
    results = []
    for index, engine in enumerate(engines):
        evaluation = session.evaluate(engine, files, preprocessing)
        precision = average_precision(dataset, evaluation.detections)
        profile = session.profile(engine, images[0], preprocessing, runs=options.profile_runs)
        alone = (
            session.benchmark(
                [engine],
                images,
                preprocessing,
                runs=1,
                min_seconds=ENERGY_S,
                idle_seconds=ENERGY_S,
                scopes=[END_TO_END],
            )
            if with_energy
            else None
        )
        results.append(
            BenchmarkResult(
                model_sha256=engine.model_sha256,
                precision=engine.precision,
                device=device,
                engine_size_bytes=engine.size_bytes,
                engine_build_s=engine.build_s,
                ap=precision.ap,
                ap50=precision.ap50,
                images=precision.images,
                boxes=precision.boxes,
                not_finite=evaluation.not_finite,
                latencies=_summaries(measured.counted_blocks(index)),
                blocks=tuple(measured.blocks[index]),
                disturbed=measured.disturbed,
                layer_times_ms={name: float(np.median(ms)) for name, ms in profile.times_ms.items()},
                energy=energy_of(alone) if alone else None,
                samples=_samples(evaluation.detections),
                telemetry=measured.telemetry,
                warmup_runs=measured.warmup_runs[index],
                timer_overhead_ms=measured.timer_overhead_ms,
                threads=engine.threads,
            )
        )
    return results


@dataclass(frozen=True)
class Interleaved:
    """Blocks of several engines that were measured together, repeats included."""

    blocks: Sequence[Sequence[Block]]  # per engine
    disturbed: str | None  # where too few rounds were valid
    telemetry: Mapping[str, Any]
    warmup_runs: Sequence[int]
    timer_overhead_ms: float

    def counted_blocks(self, engine: int) -> tuple[Block, ...]:
        """Those of one engine that figures are made of."""
        return counted(self.blocks[engine], self.disturbed)


def measure_interleaved(
    session: Session,
    engines: Sequence[Engine],
    images: Sequence[Path],
    preprocessing: Preprocessing,
    options: BenchmarkOptions,
) -> Interleaved:
    """Measure in rounds, and measure disturbed rounds again.

    A disturbance that lasts over a whole attempt will last on, so then it is not repeated. Where fewer than
    `MIN_BLOCKS` rounds were valid, `disturbed` says why, and all of them count: a latency that is known to be
    disturbed says more than none.
    """
    wanted = -(-options.runs // options.block_runs)
    blocks: list[list[Block]] = [[] for _ in engines]
    before: Mapping[str, Any] = {}
    samples: list[Mapping[str, Any]] = []
    reasons: dict[int, str] = {}
    next_round = 0
    for attempt in range(1 + REPEATS):
        missing = wanted - (next_round - len(reasons))
        latencies = session.benchmark(
            engines,
            images,
            preprocessing,
            runs=missing * options.block_runs,
            min_seconds=options.min_seconds if attempt == 0 else min(options.min_seconds, LOAD_WINDOW_S),
            block_runs=options.block_runs,
            warmup_runs=options.warmup_runs,
            seed=options.seed + attempt,
        )
        before = before or latencies.telemetry["before"]
        rounds, found = disturbed_rounds(latencies, engines, before)
        for index in range(len(engines)):
            blocks[index] += _blocks(latencies, index, next_round, found)
        samples += latencies.telemetry["samples"]
        reasons |= {next_round + number: reason for number, reason in found.items()}
        next_round += rounds
        if not found or len(found) == rounds or next_round - len(reasons) >= wanted:
            break
        log.info("%d of %d rounds were disturbed: %s", len(found), rounds, next(iter(found.values())))
    enough = next_round - len(reasons) >= min(MIN_BLOCKS, wanted)
    return Interleaved(
        blocks=blocks,
        disturbed=None if enough else next(iter(reasons.values())),
        telemetry={**latencies.telemetry, "before": before, "samples": samples},
        warmup_runs=latencies.warmup_runs,
        timer_overhead_ms=latencies.timer_overhead_ms,
    )


def disturbed_rounds(
    latencies: Latencies, engines: Sequence[Engine], before: Mapping[str, Any] | None = None
) -> tuple[int, dict[int, str]]:
    """How many rounds were measured, and what disturbed which of them.

    Args:
        before: the device's state before earlier attempts, which has to be that after this one.
    """
    spans: dict[int, tuple[float, float]] = {}
    for block in latencies.blocks:
        start_s, end_s = spans.get(block.round, (block.start_s, block.end_s))
        spans[block.round] = (min(start_s, block.start_s), max(end_s, block.end_s))
    reasons: dict[int, str] = {}
    if False in latencies.warmup_stable:
        engine = latencies.warmup_stable.index(False)
        runs = latencies.warmup_runs[engine]
        reasons = dict.fromkeys(spans, f"engine {engine} had no stable latency within {runs} warm-up runs")
    telemetry = {**latencies.telemetry, "before": before or latencies.telemetry["before"]}
    own_threads = max(each.threads or 1 for each in engines)
    on_gpu = engines[0].backend == "tensorrt"
    return len(spans), reasons | disturbances(spans, telemetry, own_threads, on_gpu)


def gray_image(folder: Path) -> Path:
    """A file for engines whose time alone counts: what it shows changes no latency."""
    path = folder / "gray.png"
    cv2.imwrite(str(path), np.full((64, 64, 3), 128, np.uint8))
    return path


def _blocks(latencies: Latencies, engine: int, first_round: int, invalid: Mapping[int, str]) -> list[Block]:
    return [
        Block(
            first_round + block.round,
            block.start_s,
            block.end_s,
            block.samples_ms,
            invalid.get(block.round),
            block.images_per_s,
        )
        for block in latencies.blocks
        if block.engine == engine
    ]


def _samples(detections: Sequence[ImageDetections]) -> tuple[SampleDetections, ...]:
    """Of a few images spread over the data set, the same ones for every engine."""
    chosen = detections[:: max(1, len(detections) // SAMPLE_IMAGES)][:SAMPLE_IMAGES]
    samples = []
    for image in chosen:
        shown = image.scores >= SAMPLE_SCORE
        boxes = tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in image.boxes[shown].tolist())
        samples.append(SampleDetections(image.image_id, boxes, tuple(image.scores[shown].tolist())))
    return tuple(samples)


def _summaries(blocks: Sequence[Block]) -> tuple[Latency, ...]:
    return tuple(
        summarise([ms for block in blocks for ms in block.samples_ms[scope]], scope)
        for scope in blocks[0].samples_ms
    )
