"""Power and energy an image, where the board tells its power."""

from collections.abc import Mapping, Sequence

import numpy as np

from edgeprune.benchmarks.records import Energy
from edgeprune.deploy.records import Latencies

SETTLE_S = 1.0  # a sample averages over the second before it: the first one still holds what came before
INPUT_RAIL_ENDS = ("_IN", "SYS_5V0", "SYS5V")  # names of rails that feed the whole board


def energy_of(latencies: Latencies) -> Energy | None:
    """What one engine, benchmarked alone, drew.

    The board's input rail counts where there is one, else the sum of all rails. Runs of every scope count as
    images; idle power is part of it.

    Returns:
        None where the device tells no power, or the benchmark was too short for a sample.
    """
    start_s, end_s = latencies.blocks[0].start_s, latencies.blocks[-1].end_s
    samples = [
        sample["power_mw"]
        for sample in latencies.telemetry["samples"]
        if sample.get("power_mw") and start_s + SETTLE_S <= sample["time_s"] <= end_s
    ]
    if not samples:
        return None
    rails = _board_rails(samples)
    watts = float(np.mean([sum(sample.get(rail, 0) for rail in rails) for sample in samples])) / 1000
    images = sum(len(ms) for block in latencies.blocks for ms in block.samples_ms.values())
    return Energy(watts, watts * (end_s - start_s) / images, rails, len(samples))


def _board_rails(samples: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    names = sorted({rail for sample in samples for rail in sample})
    whole = tuple(name for name in names if name.endswith(INPUT_RAIL_ENDS))
    return whole[:1] or tuple(names)
