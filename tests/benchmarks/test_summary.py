"""Figures and headline of a report whose numbers were chosen by hand."""

import json
from dataclasses import replace

import pytest
from benchmarks_example import HOST, report, result

from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.records import BenchmarkResult, Block, Device, Report
from edgeprune.benchmarks.statistics import summarise
from edgeprune.benchmarks.summary import ap_drops, headline, row_figures

JETSON = Device("jetson-nano", "tensorrt", "NVIDIA Jetson Nano Developer Kit")


def steady(iteration: int, engine_ms: float, blocks: int = 10) -> BenchmarkResult:
    """Every run takes the same time."""
    samples = {"engine": (engine_ms,) * 4, "end_to_end": (engine_ms + 2,) * 4}
    return replace(
        result(iteration),
        latencies=tuple(summarise(ms * blocks, scope) for scope, ms in samples.items()),
        blocks=tuple(Block(k, k, k + 0.5, samples) for k in range(blocks)),
    )


def test_what_was_not_measured_is_none() -> None:
    """A run without benchmarks has its pruning figures, and None, not 0, for everything of the device."""
    figures = row_figures(report(3, [None] * 3))
    assert [row["params"] for row in figures] == [950_000, 912_000, 874_000]
    for row in figures:
        measured = [
            name for name in row if name.startswith(("latency", "device", "fps")) and row[name] is not None
        ]
        assert measured == []
    assert headline(report(3, [None] * 3)).text == (
        "Iteration 2 against the unpruned detector: "
        "8.0 % fewer parameters (950,000 → 874,000; 7.3 % fewer MACs); "
        "not measured latency (no benchmark of both steps); "
        "\N{MINUS SIGN}0.006 AP50 on the host (0.601 → 0.595; AP 0.302 → 0.298). "
        "Device: not measured. Latency not measured."
    )


def test_headline_by_hand() -> None:
    """From 12 ms to 8 ms is 1.50 times as fast, from 950,000 to 912,000 parameters 4.0 % fewer."""
    text = headline(report(2, [steady(0, 12.0), steady(1, 8.0)])).text
    assert text == (
        "Iteration 1 against the unpruned detector: "
        "4.0 % fewer parameters (950,000 → 912,000; 3.7 % fewer MACs); "
        "1.50\N{MULTIPLICATION SIGN} as fast (engine p50 12.00 → 8.00 ms; 95 % interval 1.50 to 1.50); "
        "\N{MINUS SIGN}0.003 AP50 on the device (0.600 → 0.597; AP 0.301 → 0.299). "
        "target: host · backend: onnxruntime on the CPU · board: x86_64 example processor. "
        "Batch 1, fp32, 40 runs a step in 10 blocks interleaved over all steps."
    )


def test_the_headline_does_not_contradict_itself() -> None:
    """Where most runs of a step fell into the device's fast minutes, its own p50 would say that it is faster.

    Beside the unpruned it took 1.05 times as long in ten of eleven blocks, and 10.5 / 15 in the one between.
    """

    def blocks(latencies_ms: list[float]) -> BenchmarkResult:
        samples = [{"engine": (ms,) * 4, "end_to_end": (ms + 2,) * 4} for ms in latencies_ms]
        return replace(
            steady(0, 1.0),
            latencies=(summarise([ms for each in samples for ms in each["engine"]], "engine"),),
            blocks=tuple(Block(k, k, k + 0.5, each) for k, each in enumerate(samples)),
        )

    unpruned, last = blocks([10.0] * 5 + [15.0] * 6), blocks([10.5] * 6 + [15.75] * 5)
    ratio = (1.05**10 * 10.5 / 15) ** (1 / 11)
    assert last.latencies[0].p50_ms < unpruned.latencies[0].p50_ms and ratio > 1
    faster = headline(report(2, [unpruned, last])).faster
    assert faster.value == f"{1 / ratio:.2f}\N{MULTIPLICATION SIGN}" and faster.what.endswith(
        "no difference shown"
    )
    assert faster.detail.startswith(f"engine p50 15.00 → {15 * ratio:.2f} ms")


@pytest.mark.parametrize(
    ("latencies_ms", "choice"),
    [
        # AP50 is 0.600 - 0.003 an iteration: the first four are within 0.01 of the unpruned.
        (
            [12.0, 11.0, 10.0, 10.5, 8.0],
            "0, 1, 2, 4; fastest within 0.01 AP50 of the unpruned: iteration 2, 1.20",
        ),
        (
            [12.0, 12.0, 13.0, 12.5, 8.0],
            "0, 4; within 0.01 AP50 of the unpruned none is shown to be faster than it",
        ),
    ],
)
def test_the_choice_by_hand(latencies_ms: list[float], choice: str) -> None:
    """Which iteration to ship is answered: the front, and the fastest that keeps the unpruned's accuracy."""
    found = headline(report(5, [steady(i, ms) for i, ms in enumerate(latencies_ms)])).choice
    assert found is not None and found.startswith(f"Pareto front of AP50 against latency: {choice}")


def test_the_choice_without_an_unpruned() -> None:
    """Steps are compared with each other where the unpruned was not measured; where none was, nothing is said."""
    rows = report(3, [None, steady(1, 10.0), steady(2, 8.0)])
    assert headline(rows).choice == (
        "Pareto front of AP50 against latency: 1, 2; the unpruned was not measured"
    )
    figures = row_figures(rows)
    assert [row["latency_engine_paired_ms"] for row in figures] == [None, 10.0, pytest.approx(8.0)]
    assert [row["latency_engine_ratio"] for row in figures] == [None] * 3
    assert headline(report(3, [None] * 3)).choice is None


def test_no_difference_is_said() -> None:
    """When the interval of the ratio holds 1, the headline says that no difference was shown."""
    same = replace(result(0), model_sha256="other")
    assert headline(report(2, [result(0), same])).faster.what == "as fast, no difference shown"
    assert headline(report(2, [steady(0, 12.0, 3), steady(1, 8.0, 3)])).faster.detail.endswith(
        "for an interval"
    )


def test_fps_is_of_the_whole_way() -> None:
    """8 ms in the engine and 10 ms end to end are 100 FPS, not 125."""
    assert row_figures(report(1, [steady(0, 8.0)]))[0]["fps"] == pytest.approx(100)


def test_invalid_blocks_do_not_count() -> None:
    """A throttled block, ten times slower, moves the ratio only when it is not marked."""
    slow = Block(99, 99.0, 99.5, {"engine": (120.0,) * 4})
    first, last = steady(0, 12.0), steady(1, 8.0)
    first = replace(first, blocks=(*first.blocks, Block(99, 99.0, 99.5, {"engine": (12.0,) * 4})))
    ratios = [
        row_figures(report(2, [first, replace(last, blocks=(*last.blocks, block))]))[1][
            "latency_engine_ratio"
        ]
        for block in (slow, replace(slow, invalid="the clock fell"))
    ]
    assert ratios[1] == pytest.approx(2 / 3)
    assert ratios[0] > 0.8


def test_channels_removed_is_what_is_gone() -> None:
    """The column counts channels gone since the unpruned detector, beside what the step itself removed."""
    first, second, third = row_figures(report(3))
    assert first["channels_removed"] == 0
    assert second["channels_removed_this_step"] == second["channels_removed"]
    assert third["channels_removed"] == second["channels_removed"] + third["channels_removed_this_step"]


def test_a_cpu_is_never_shown_as_a_jetson_gpu() -> None:
    """The device line names target, backend and board, and says CPU where a CPU ran the engine."""
    on_cpu = replace(JETSON, backend="onnxruntime")
    assert on_cpu.line == (
        "target: jetson-nano · backend: onnxruntime on the CPU · board: NVIDIA Jetson Nano Developer Kit"
    )
    assert "tensorrt on the GPU" in JETSON.line


def test_one_report_has_one_device() -> None:
    """Rows of two devices do not make one report, and no rows make none."""
    with pytest.raises(ValueError, match="one device"):
        report(2, [result(0, device=HOST), result(1, device=JETSON)])
    with pytest.raises(ValueError, match="at least"):
        Report("empty", (), {})


def test_records_read_back() -> None:
    """A benchmark written as JSON reads back equal; a damaged one is refused with what to do."""
    measured = result(3)
    record = json.loads(json.dumps(measured.to_json()))
    assert BenchmarkResult.from_json(record) == measured
    for damage in ({"latencies": [{}]}, {"device": {}}, {"more": 1}, {"blocks": None}):
        with pytest.raises(BenchmarkError, match="measure it again"):
            BenchmarkResult.from_json({**record, **damage})


def test_a_lower_ap_on_the_device_is_flagged_with_its_cause() -> None:
    """A drop beyond the limit is named with its likely cause: here from 0.300 to 0.280 at iteration 1."""

    def flagged(limit: float = 0.01, **changes: object) -> list[str]:
        return ap_drops(report(2, [result(0), replace(result(1), ap=0.28, **changes)]), limit)

    assert ap_drops(report()) == []
    (same,) = flagged()
    assert (
        same.startswith("iteration 1: AP 0.280 on the device, 0.300 on the host") and "preprocessing" in same
    )
    assert "3 candidates were no numbers: fp16 overflows" in flagged(precision="fp16", not_finite=3)[0]
    assert "fp16 rounding" in flagged(precision="fp16")[0]
    assert "int8 calibration" in flagged(precision="int8")[0]
    assert flagged(limit=0.03) == []


def test_a_disturbed_benchmark_says_so() -> None:
    """Where too few blocks were valid all of them count, and the headline names the disturbance."""
    disturbed = [replace(steady(i, 12.0 - i), disturbed="gpu reached 99 °C") for i in range(2)]
    disturbed = [replace(r, blocks=tuple(replace(b, invalid="hot") for b in r.blocks)) for r in disturbed]
    summary = headline(report(2, disturbed))
    assert summary.measured == "Batch 1, fp32, 40 runs a step, disturbed (gpu reached 99 °C)"
    assert summary.faster.value.startswith("1.09")


def test_realised_speedup_by_hand() -> None:
    """Half the latency for 289 of 300 million MACs is 2 / 1.038 of the speed-up that the MACs promise."""
    figures = row_figures(report(2, [steady(0, 12.0), steady(1, 6.0)]))
    assert figures[0]["realised_speedup"] == pytest.approx(1)
    assert figures[1]["realised_speedup"] == pytest.approx(2 * 289 / 300)
