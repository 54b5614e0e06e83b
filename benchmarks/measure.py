"""Measure the engines of a run on a device: latency interleaved over all of them, AP of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from edgeprune.benchmarks.records import BenchmarkResult, Block, Device, Latency
from edgeprune.benchmarks.statistics import summarise
from edgeprune.data.dataset import Dataset
from edgeprune.data.precision import average_precision
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.records import Engine, Latencies
from edgeprune.deploy.session import Session


@dataclass(frozen=True)
class BenchmarkOptions:
    """How long is measured. The defaults give 20 blocks a step, enough for narrow intervals."""

    runs: int = 200  # at least, per step and scope
    min_seconds: float = 0.0  # at least, over all steps
    block_runs: int = 10  # of one step before the next one's turn
    warmup_runs: int = 20  # at least; more until the latency is stable
    images: int = 16  # that end-to-end runs take in turn
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
    device = Device.of(session.probe())
    latencies = session.benchmark(
        engines,
        list(islice(files.values(), options.images)),
        preprocessing,
        runs=options.runs,
        min_seconds=options.min_seconds,
        block_runs=options.block_runs,
        warmup_runs=options.warmup_runs,
        seed=options.seed,
    )
    results = []
    for index, engine in enumerate(engines):
        evaluation = session.evaluate(engine, files, preprocessing)
        precision = average_precision(dataset, evaluation.detections)
        blocks = _blocks(latencies, index)
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
                latencies=_summaries(blocks),
                blocks=blocks,
                warmup_runs=latencies.warmup_runs[index],
                timer_overhead_ms=latencies.timer_overhead_ms,
            )
        )
    return results


def _blocks(latencies: Latencies, engine: int) -> tuple[Block, ...]:
    return tuple(
        Block(block.round, block.start_s, block.end_s, block.samples_ms)
        for block in latencies.blocks
        if block.engine == engine
    )


def _summaries(blocks: Sequence[Block]) -> tuple[Latency, ...]:
    valid = [block for block in blocks if block.invalid is None]
    scopes = valid[0].samples_ms if valid else ()
    return tuple(
        summarise([ms for block in valid for ms in block.samples_ms[scope]], scope) for scope in scopes
    )
