"""A device that drifts and is disturbed as a test says: its engines' times are known."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.records import Engine, Latencies, LatencyBlock


def engine(index: int) -> Engine:
    return Engine(
        key=f"key-{index}",
        model_sha256=f"{index:064x}",
        backend="onnxruntime",
        backend_version="1",
        device="simulated",
        compute_capability=None,
        precision="fp32",
        options={},
        path="engine",
        sha256="0" * 64,
        size_bytes=1,
        build_s=1.0,
        log=(),
        reused=False,
    )


class SimulatedDevice:
    """Answers `benchmark` as a session does.

    Args:
        latencies_ms: of each engine on an undisturbed device.
        slowdown: time in seconds -> factor on every latency at that time.
        telemetry: time in seconds -> what a sample of the telemetry says then.
        power_modes: before and after each call; the last one's from then on.
        stable: whether latencies are, at the end of the warm-up.
    """

    def __init__(
        self,
        latencies_ms: Sequence[float],
        slowdown: Callable[[float], float] = lambda time_s: 1.0,
        telemetry: Callable[[float], Mapping[str, Any]] = lambda time_s: {},
        noise: float = 0.02,
        power_modes: Sequence[tuple[str | None, str | None]] = ((None, None),),
        stable: bool = True,
    ) -> None:
        self.engines = [engine(index) for index in range(len(latencies_ms))]
        self.calls: list[Mapping[str, Any]] = []
        self._latencies_ms = latencies_ms
        self._slowdown = slowdown
        self._telemetry = telemetry
        self._noise = noise
        self._power_modes = power_modes
        self._stable = stable
        self._time_s = 0.0
        self._random = random.Random(0)

    def run(self, index: int) -> float:
        """One run's latency in milliseconds, by which the time goes on."""
        latency_ms = self._latencies_ms[index] * self._slowdown(self._time_s)
        latency_ms *= self._random.lognormvariate(0, self._noise)
        self._time_s += latency_ms / 1000
        return latency_ms

    def benchmark(
        self,
        engines: Sequence[Engine],
        images: Sequence[Path],
        preprocessing: Preprocessing,
        *,
        runs: int,
        min_seconds: float = 0.0,
        block_runs: int = 10,
        warmup_runs: int = 20,
        seed: int = 0,
        scopes: Sequence[str] = ("engine",),
        idle_seconds: float = 0.0,
    ) -> Latencies:
        before, after = self._power_modes[min(len(self.calls), len(self._power_modes) - 1)]
        self.calls.append({"runs": runs, "seed": seed, "min_seconds": min_seconds})
        start_s = self._time_s
        self._time_s += idle_seconds
        idle_s = (start_s, self._time_s) if idle_seconds else None
        order = list(range(len(engines)))
        shuffle = random.Random(seed).shuffle
        blocks = []
        first_s, number = self._time_s, 0
        while number < -(-runs // block_runs) or self._time_s - first_s < min_seconds:
            shuffle(order)
            for index in order:
                block_start_s = self._time_s
                samples = tuple(self.run(index) for _ in range(block_runs))
                blocks.append(
                    LatencyBlock(
                        index,
                        number,
                        block_start_s,
                        self._time_s,
                        {scopes[0]: samples},
                        images_per_s=1500 / self._latencies_ms[index],
                        images=block_runs,
                    )
                )
            number += 1
        times = [start_s + second for second in range(int(self._time_s - start_s) + 1)]
        return Latencies(
            engines=tuple(engine.key for engine in engines),
            blocks=tuple(blocks),
            warmup_runs=(warmup_runs,) * len(engines),
            timer_overhead_ms=0.0001,
            telemetry={
                "before": {"power_mode": before},
                "after": {"power_mode": after},
                "samples": [{"time_s": time_s, **self._telemetry(time_s)} for time_s in times],
            },
            idle_s=idle_s,
            warmup_stable=(self._stable,) * len(engines),
        )
