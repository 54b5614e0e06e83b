"""Which rounds of a benchmark were disturbed: throttling, heat, another power mode, another load."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# A Jetson slows down between 95 and 105 degrees Celsius, by zone; workstations at about the same.
TEMPERATURE_LIMIT_C = 95.0
CLOCK_SHARE = (
    0.9  # of the benchmark's median clock: a lower one is throttling, or a clock that has not risen yet
)
OTHER_LOAD = 0.8  # runnable threads besides the benchmark's own, on average
LOAD_WINDOW_S = 15.0  # the kernel looks once in 5 s: three looks
LOAD_DECAY_S = 60.0  # of the load average over one minute


def disturbances(
    rounds: Mapping[int, tuple[float, float]], telemetry: Mapping[str, Any], own_threads: int
) -> dict[int, str]:
    """Find what disturbed each round.

    Args:
        rounds: index -> start and end, seconds on the telemetry's clock.
        telemetry: as `deploy.records.Latencies` has it; what the device does not tell cannot disturb.
        own_threads: that the benchmark itself keeps busy.

    Returns:
        Index -> what happened, for the disturbed rounds alone.
    """
    before, after = telemetry["before"].get("power_mode"), telemetry["after"].get("power_mode")
    if before != after:
        return dict.fromkeys(rounds, f"the power mode changed from {before} to {after}")
    samples = telemetry["samples"]
    clocks = [max(sample["gpu_mhz"]) for sample in samples if sample.get("gpu_mhz")]
    usual_mhz = float(np.median(clocks)) if clocks else None
    found = {}
    for index, (start_s, end_s) in rounds.items():
        inside = _around(samples, start_s, end_s)
        reason = (
            _heat(inside)
            or _throttling(inside, usual_mhz)
            or _other_load(samples, start_s, end_s, own_threads)
        )
        if reason:
            found[index] = reason
    return found


def _around(samples: Sequence[Mapping[str, Any]], start_s: float, end_s: float) -> list[Mapping[str, Any]]:
    """Samples inside a span, and the nearest one on each side: a round may be shorter than the interval."""
    before = [sample for sample in samples if sample["time_s"] < start_s][-1:]
    after = [sample for sample in samples if sample["time_s"] > end_s][:1]
    return before + [sample for sample in samples if start_s <= sample["time_s"] <= end_s] + after


def _heat(samples: Sequence[Mapping[str, Any]]) -> str | None:
    zones = [(value, zone) for sample in samples for zone, value in sample.get("temperatures_c", {}).items()]
    hottest, zone = max(zones, default=(-math.inf, ""))
    return f"{zone} reached {hottest:.0f} °C" if hottest >= TEMPERATURE_LIMIT_C else None


def _throttling(samples: Sequence[Mapping[str, Any]], usual_mhz: float | None) -> str | None:
    clocks = [max(sample["gpu_mhz"]) for sample in samples if sample.get("gpu_mhz")]
    if usual_mhz is None or not clocks or min(clocks) >= CLOCK_SHARE * usual_mhz:
        return None
    return f"the GPU's clock fell to {min(clocks):.0f} of {usual_mhz:.0f} MHz"


def _other_load(
    samples: Sequence[Mapping[str, Any]], start_s: float, end_s: float, own_threads: int
) -> str | None:
    """Runnable threads around a round, from how the load average moved.

    The average itself still remembers what ran minutes ago (the fine-tuning before); its movement does not.
    n runnable threads make L into ``L e^(-t/60) + n (1 - e^(-t/60))`` in the kernel; here solved for n.
    """
    margin_s = max(0.0, LOAD_WINDOW_S - (end_s - start_s)) / 2
    known = [s for s in samples if s.get("load") is not None]
    window = [s for s in known if start_s - margin_s <= s["time_s"] <= end_s + margin_s]
    if len(window) < 2 or window[-1]["time_s"] - window[0]["time_s"] < LOAD_WINDOW_S / 2:
        return None
    kept = math.exp(-(window[-1]["time_s"] - window[0]["time_s"]) / LOAD_DECAY_S)
    others = (window[-1]["load"] - window[0]["load"] * kept) / (1 - kept) - own_threads
    return f"another load: {others:.1f} threads besides the benchmark's" if others >= OTHER_LOAD else None
