"""Benchmarks of simulated devices that drift, throttle and are disturbed."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from benchmarks_example import result
from simulated import SimulatedDevice

from edgeprune.benchmarks.energy import energy_of
from edgeprune.benchmarks.measure import REPEATS, BenchmarkOptions, Interleaved, measure_interleaved
from edgeprune.benchmarks.statistics import paired_ratio
from edgeprune.benchmarks.validity import disturbances
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.records import Latencies, LatencyBlock
from edgeprune.deploy.session import Session

STEPS_MS = [10.0, 9.7, 9.4, 9.1, 8.8, 8.5]  # each step is 3 % faster than the one before
OPTIONS = BenchmarkOptions(runs=200, min_seconds=0.0, block_runs=10)


def measure(device: SimulatedDevice, options: BenchmarkOptions = OPTIONS) -> Interleaved:
    return measure_interleaved(cast(Session, device), device.engines, [], Preprocessing(), options)


def ranking(medians: list[float]) -> list[int]:
    """Steps from the slowest to the fastest."""
    return sorted(range(len(medians)), key=lambda step: -medians[step])


def test_the_ranking_survives_a_drift_of_30_percent() -> None:
    """While a device grows 30 % slower, interleaved ratios rank all steps right; one after another fails.

    The naive way measures the last, fastest step on the hottest device and finds it slower than the unpruned.
    """
    seconds = sum(STEPS_MS) * OPTIONS.runs / 1000 * 1.15

    def slower(time_s: float) -> float:
        return 1 + 0.3 * min(time_s / seconds, 1)

    one_by_one = SimulatedDevice(STEPS_MS, slower)
    naive = [float(np.median([one_by_one.run(step) for _ in range(OPTIONS.runs)])) for step in range(6)]
    assert ranking(naive) != list(range(6))
    assert naive[-1] > naive[0]

    blocks = [
        {block.index: block.samples_ms["engine"] for block in of_engine}
        for of_engine in measure(SimulatedDevice(STEPS_MS, slower)).blocks
    ]
    ratios = [paired_ratio(of_step, blocks[0]) for of_step in blocks]
    assert ranking([ratio.value for ratio in ratios if ratio]) == list(range(6))
    for ratio, true_ms in zip(ratios[1:], STEPS_MS[1:], strict=True):
        assert ratio is not None and ratio.low is not None and ratio.high is not None
        assert ratio.value == pytest.approx(true_ms / STEPS_MS[0], rel=0.01)
        assert ratio.shows_difference


def test_throughput_is_of_the_valid_blocks() -> None:
    """Each step's blocks keep their throughput; the result is the median of those that count."""
    blocks = measure(SimulatedDevice([10.0, 5.0])).blocks[1]
    assert {block.images_per_s for block in blocks} == {300.0}
    slow = replace(blocks[0], images_per_s=1.0)
    odd = tuple(replace(block, invalid="hot", images_per_s=9000.0) for block in blocks)
    measured = replace(result(0), blocks=(slow, *blocks, *odd))
    assert measured.throughput == 300.0
    assert replace(measured, blocks=result(0).blocks).throughput is None


def test_throttled_rounds_are_measured_again() -> None:
    """Rounds during which the GPU's clock fell are marked, and measured again until enough are valid."""

    def throttled(time_s: float) -> bool:
        return 3 <= time_s < 5

    device = SimulatedDevice(
        STEPS_MS,
        slowdown=lambda time_s: 2.0 if throttled(time_s) else 1.0,
        telemetry=lambda time_s: {"gpu_mhz": [460 if throttled(time_s) else 921], "gpu_percent": 99},
    )
    device.engines = [replace(engine, backend="tensorrt") for engine in device.engines]
    found = measure(device)
    assert found.disturbed is None
    assert len(device.calls) == 2
    for blocks in found.blocks:
        assert sum(block.invalid is None for block in blocks) == 20
        assert len({block.index for block in blocks}) == len(blocks)
        slow = [block for block in blocks if np.median(block.samples_ms["engine"]) > 15]
        assert slow
        assert {block.invalid for block in slow} == {"the GPU's clock fell to 460 of 921 MHz"}


def test_a_disturbance_that_comes_again_is_not_waited_out_for_ever() -> None:
    """Measuring again ends after a few attempts, also when each attempt is partly disturbed."""
    device = SimulatedDevice(
        STEPS_MS, telemetry=lambda time_s: {"temperatures_c": {"gpu": 97.0 if int(time_s) % 6 == 0 else 60.0}}
    )
    measure(device)
    assert 1 < len(device.calls) <= 1 + REPEATS


def test_a_lasting_disturbance_is_said() -> None:
    """Where every round is disturbed there is one attempt, all its rounds count, and the result says why."""
    device = SimulatedDevice(
        STEPS_MS, telemetry=lambda time_s: {"temperatures_c": {"gpu": 99.4, "cpu": 80.0}}
    )
    found = measure(device)
    assert found.disturbed == "gpu reached 99 °C"
    assert len(device.calls) == 1
    assert all(block.invalid for blocks in found.blocks for block in blocks)


def test_another_power_mode_disturbs_everything() -> None:
    """When the power mode after the benchmark is not the one before it, no round is trusted."""
    assert measure(SimulatedDevice(STEPS_MS, power_modes=[("MAXN", "5W")])).disturbed == (
        "the power mode changed from MAXN to 5W"
    )


def test_another_power_mode_between_two_attempts_disturbs_the_second() -> None:
    """Rounds that are measured again in another mode than the first ones are not put beside them."""
    device = SimulatedDevice(
        STEPS_MS,
        telemetry=lambda time_s: {"temperatures_c": {"gpu": 97.0 if time_s < 3 else 60.0}},
        power_modes=[("MAXN", "MAXN"), ("5W", "5W")],
    )
    found = measure(device)
    assert len(device.calls) == 2
    assert (found.telemetry["before"], found.telemetry["after"]) == (
        {"power_mode": "MAXN"},
        {"power_mode": "5W"},
    )
    for blocks in found.blocks:
        again = {block.invalid for block in blocks if block.index >= 20}
        assert again == {"the power mode changed from MAXN to 5W"}
        assert any(block.invalid is None for block in blocks)


def test_a_latency_that_never_settles_is_said() -> None:
    """Where the warm-up ended without a stable latency, all rounds count and the result says so."""
    found = measure(SimulatedDevice(STEPS_MS, stable=False))
    assert found.disturbed == "engine 0 had no stable latency within 20 warm-up runs"
    assert all(block.invalid for blocks in found.blocks for block in blocks)


def test_a_benchmark_lasts_long_enough_to_be_judged() -> None:
    """Fast engines run for 30 s by default, not for 200 runs alone; what is measured again, for 15 s.

    A disturbed round among more valid ones than were asked for is not measured again.
    """
    device = SimulatedDevice([1.0, 0.9], noise=0.0)
    assert measure(device, BenchmarkOptions()).disturbed is None
    assert device.calls == [{"runs": 200, "seed": 0, "min_seconds": 30.0}]
    assert device.run(0) and device._time_s >= 30

    def hot_until(second: float) -> SimulatedDevice:
        return SimulatedDevice(
            STEPS_MS, telemetry=lambda time_s: {"temperatures_c": {"gpu": 97.0 if time_s < second else 60.0}}
        )

    few, many = hot_until(3), hot_until(25)
    measure(few, BenchmarkOptions())
    measure(many, BenchmarkOptions())
    assert [call["min_seconds"] for call in few.calls] == [30.0]
    assert [call["min_seconds"] for call in many.calls] == [30.0, 15.0]


@pytest.mark.parametrize(
    ("on_gpu", "locked", "sample", "found"),
    [
        (True, False, {"gpu_mhz": [460.8], "gpu_percent": 99.0}, "the GPU's clock fell to 461 of 922 MHz"),
        (True, True, {"gpu_mhz": [460.8], "gpu_percent": 20.0}, "the GPU's clock fell to 461 of 922 MHz"),
        # It waits for the CPU, and its governor saves; or perhaps it does.
        (True, False, {"gpu_mhz": [460.8], "gpu_percent": 60.0}, None),
        (True, False, {"gpu_mhz": [460.8]}, None),
        (True, True, {"gpu_mhz": [0], "gpu_percent": 99.0}, None),  # switched off
        (True, True, {"cpu_mhz": [102.0]}, None),
        (False, False, {"cpu_mhz": [102.0, 710.0]}, "the CPU's clock fell to 710 of 1479 MHz"),
        (False, False, {"cpu_mhz": [102.0, 1428.0]}, None),  # one core is busy
        (False, True, {"gpu_mhz": [76.8], "gpu_percent": 99.0, "cpu_mhz": [1479.0]}, None),
    ],
)
def test_a_low_clock_is_throttling_where_its_processor_works(
    on_gpu: bool, locked: bool, sample: dict[str, Any], found: str | None
) -> None:
    """The clock that counts is that of the engines' processor, and a low one where nothing explains it but
    throttling: it disturbs the round it is in and the one that ended just before. Outside the benchmark it says
    nothing."""
    usual = {"gpu_mhz": [921.6], "gpu_percent": 99.0, "cpu_mhz": [1479.0, 102.0]}
    odd = {0.0: sample, 5.0: sample, 11.0: sample}
    telemetry = {
        "before": {"clocks_locked": locked},
        "after": {},
        "samples": [{"time_s": time_s, **odd.get(time_s, usual)} for time_s in map(float, range(12))],
    }
    rounds = {number: (2.0 * number + 0.5, 2.0 * number + 2.4) for number in range(5)}
    expected = dict.fromkeys((1, 2), found) if found else {}
    assert disturbances(rounds, telemetry, own_threads=1, on_gpu=on_gpu) == expected


def load_average(runnable: Mapping[int, float], start: float, seconds: int) -> list[dict[str, Any]]:
    """The kernel's one-minute average, a sample a second; `runnable` gives the threads from a second on."""
    samples, load, now = [], start, 1.0
    for second in range(seconds):
        now = runnable.get(second, now)
        if second % 5 == 0:
            load = load * math.exp(-5 / 60) + now * (1 - math.exp(-5 / 60))
        samples.append({"time_s": float(second), "load": round(load, 2)})
    return samples


def test_another_load_is_told_from_one_that_ended() -> None:
    """A load average still high from before is no disturbance; two more threads from second 60 on are one."""
    telemetry = {
        "before": {},
        "after": {},
        "samples": load_average({0: 1.0, 60: 3.0}, start=4.0, seconds=120),
    }
    rounds = {number: (10.0 * number, 10.0 * number + 9) for number in range(1, 11)}
    found = disturbances(rounds, telemetry, own_threads=1, on_gpu=False)
    assert not {1, 2, 3, 4} & found.keys()
    assert {7, 8, 9, 10} <= found.keys()
    assert found[9] == "another load: 2.0 threads besides the benchmark's"


def test_a_device_that_tells_nothing_is_not_blamed() -> None:
    """Without temperatures, clocks, load or power mode no round is called disturbed."""
    telemetry = {"before": {}, "after": {}, "samples": [{"time_s": 1.0}]}
    for on_gpu in (False, True):
        assert disturbances({0: (0.0, 2.0)}, telemetry, own_threads=1, on_gpu=on_gpu) == {}
        none = {**telemetry, "samples": []}
        assert disturbances({0: (0.0, 2.0)}, none, own_threads=1, on_gpu=on_gpu) == {}


def powered(power_mw: list[dict[str, int]]) -> Latencies:
    """Ten images in ten seconds after five idle ones, a sample a second; each block has an image unrecorded."""
    blocks = tuple(
        LatencyBlock(0, n, float(2 * n), 2 * n + 2.0, {"end_to_end": (900.0,)}, images=2) for n in range(5)
    )
    samples = [{"time_s": n - 4.5, "power_mw": power} for n, power in enumerate(power_mw)]
    telemetry = {"before": {}, "after": {}, "samples": samples}
    return Latencies(("key",), blocks, (1,), 0.0, telemetry, (-5.0, 0.0))


def test_energy_by_hand() -> None:
    """4 W on the input rail for ten seconds and images are 4 J an image, 2.5 J above 1.5 W idle.

    The first second of either span is left out: its sample holds what came before.
    """
    idle, busy = {"POM_5V_IN": 1500, "POM_5V_GPU": 0}, {"POM_5V_IN": 4000, "POM_5V_GPU": 900}
    changing = {"POM_5V_IN": 9000, "POM_5V_GPU": 1}
    measured = energy_of(powered([changing, *[idle] * 4, changing, *[busy] * 9]))
    assert measured is not None
    assert (measured.watts, measured.joules_per_image) == pytest.approx((4.0, 4.0))
    assert (measured.idle_watts, measured.joules_per_image_above_idle) == pytest.approx((1.5, 2.5))
    assert (measured.rails, measured.samples) == (("POM_5V_IN",), 9)


def test_energy_of_a_simulated_board() -> None:
    """On a board of 2 W idle and 5 W busy, 10 ms an image are 50 mJ, and 30 mJ above idle."""
    device = SimulatedDevice(
        [10.0], telemetry=lambda time_s: {"power_mw": {"VDD_IN": 2000 if time_s <= 5 else 5000}}, noise=0.0
    )
    session = cast(Session, device)
    measured = energy_of(
        session.benchmark(
            device.engines, [], Preprocessing(), runs=500, idle_seconds=5.0, scopes=["end_to_end"]
        )
    )
    assert measured is not None
    assert measured.joules_per_image == pytest.approx(0.050)
    assert measured.joules_per_image_above_idle == pytest.approx(0.030)
    assert (measured.idle_watts, measured.rails) == (2.0, ("VDD_IN",))


def test_energy_without_an_idle_time_is_not_subtracted() -> None:
    """Results of a device that was not idle first have joules an image, and None for those above idle."""
    measured = energy_of(replace(powered([{"VDD_IN": 3000}] * 15), idle_s=None))
    assert measured is not None
    assert measured.joules_per_image == pytest.approx(3.0)
    assert (measured.idle_watts, measured.joules_per_image_above_idle) == (None, None)


def test_energy_without_an_input_rail_is_the_sum() -> None:
    """A board that tells GPU and CPU alone gets their sum; one that tells nothing gets no energy."""
    measured = energy_of(powered([{"GPU": 1500, "CPU": 500}] * 15))
    assert measured is not None
    assert (measured.watts, measured.rails) == (pytest.approx(2.0), ("CPU", "GPU"))
    assert energy_of(powered([{}] * 15)) is None
