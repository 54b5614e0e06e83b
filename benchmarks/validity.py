"""Which rounds of a benchmark were disturbed: throttling, heat, another power mode, another load."""

import math
from collections.abc import Collection, Mapping, Sequence
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
BUSY_PERCENT = 90.0  # of a GPU: with less to do, its governor lowers the clock by itself


def disturbances(
    rounds: Mapping[int, tuple[float, float]],
    telemetry: Mapping[str, Any],
    own_threads: int,
    on_gpu: bool,
) -> dict[int, str]:
    """Find what disturbed each round.

    Args:
        rounds: index -> start and end, seconds on the telemetry's clock.
        telemetry: as `deploy.records.Latencies` has it; what the device does not tell cannot disturb.
        own_threads: that the benchmark itself keeps busy.
        on_gpu: whether the engines run on the GPU, else on the CPU: its clock is the one that counts.

    Returns:
        Index -> what happened, for the disturbed rounds alone.
    """
    before, after = telemetry["before"].get("power_mode"), telemetry["after"].get("power_mode")
    if not rounds:
        return {}
    if before != after:
        return dict.fromkeys(rounds, f"the power mode changed from {before} to {after}")
    samples = telemetry["samples"]
    clocks = _clocks(telemetry, rounds.values(), on_gpu)
    found = {}
    for index, (start_s, end_s) in rounds.items():
        inside = _around(samples, start_s, end_s)
        reason = (
            _heat(inside)
            or _throttling(clocks, start_s, end_s, "GPU" if on_gpu else "CPU")
            or _other_load(samples, start_s, end_s, own_threads)
        )
        if reason:
            found[index] = reason
    return found


def _clocks(
    telemetry: Mapping[str, Any], rounds: Collection[tuple[float, float]], on_gpu: bool
) -> Sequence[Mapping[str, Any]]:
    """Clocks in MHz during the rounds; 0 where a low one would say nothing.

    A benchmark keeps a core of the CPU busy from beginning to end, and a governor gives a busy core its highest
    clock. A GPU waits for the CPU in between, so it has to be fully busy, or its clock locked.
    """
    first_s, last_s = min(start_s for start_s, _ in rounds), max(end_s for _, end_s in rounds)
    any_clock = not on_gpu or telemetry["before"].get("clocks_locked")
    found = []
    for sample in telemetry["samples"]:
        if first_s <= sample["time_s"] <= last_s:
            counts = any_clock or sample.get("gpu_percent", 0) >= BUSY_PERCENT
            mhz = max(sample.get("gpu_mhz" if on_gpu else "cpu_mhz", ()), default=0)
            found.append({"time_s": sample["time_s"], "mhz": mhz if counts else 0})
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


def _throttling(
    clocks: Sequence[Mapping[str, Any]], start_s: float, end_s: float, processor: str
) -> str | None:
    inside = [clock["mhz"] for clock in _around(clocks, start_s, end_s) if clock["mhz"]]
    if not inside:
        return None
    usual_mhz = float(np.median([clock["mhz"] for clock in clocks if clock["mhz"]]))
    if min(inside) >= CLOCK_SHARE * usual_mhz:
        return None
    return f"the {processor}'s clock fell to {min(inside):.0f} of {usual_mhz:.0f} MHz"


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
