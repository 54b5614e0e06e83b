"""Power and energy an image, where the board tells its power."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeprune.benchmarks.records import Energy
from edgeprune.deploy.device.telemetry import board_rails
from edgeprune.deploy.records import Latencies

SETTLE_S = 1.0  # a sample averages over the second before it: the first one still holds what came before


def tells_power(telemetry: Mapping[str, Any]) -> bool:
    """Whether the device told its power while a benchmark ran."""
    return any(sample.get("power_mw") for sample in telemetry["samples"])


def energy_of(latencies: Latencies) -> Energy | None:
    """What one engine, benchmarked alone and end to end, drew, with the board's idle power and without it.

    The board's input rail counts where there is one, else the sum of all rails.

    Returns:
        None where the device tells no power, or the benchmark was too short for a sample.
    """
    start_s, end_s = latencies.blocks[0].start_s, latencies.blocks[-1].end_s
    images = sum(block.images for block in latencies.blocks)
    samples = _power_mw(latencies, start_s, end_s)
    if not samples or not images:
        return None
    rails = tuple(board_rails({rail for sample in samples for rail in sample}))
    watts = _watts(samples, rails)
    idle = _power_mw(latencies, *latencies.idle_s) if latencies.idle_s else []
    idle_watts = _watts(idle, rails) if idle else None
    image_s = (end_s - start_s) / images
    return Energy(
        watts=watts,
        joules_per_image=watts * image_s,
        rails=rails,
        samples=len(samples),
        idle_watts=idle_watts,
        joules_per_image_above_idle=None if idle_watts is None else (watts - idle_watts) * image_s,
    )


def _power_mw(latencies: Latencies, start_s: float, end_s: float) -> list[Mapping[str, float]]:
    """Power by rail of the samples that hold nothing but this span."""
    return [
        sample["power_mw"]
        for sample in latencies.telemetry["samples"]
        if sample.get("power_mw") and start_s + SETTLE_S <= sample["time_s"] <= end_s
    ]


def _watts(samples: Sequence[Mapping[str, float]], rails: Sequence[str]) -> float:
    return float(np.mean([sum(sample.get(rail, 0) for rail in rails) for sample in samples])) / 1000
