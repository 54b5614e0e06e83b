"""A run folder, whole or half done, read into a report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks_example import report, result, step
from run_folder import write, write_run

from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.records import BenchmarkResult, Device
from edgeprune.benchmarks.report import report_html
from edgeprune.benchmarks.runs import load_report
from edgeprune.benchmarks.summary import row_figures


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three steps, all measured."""
    return write_run(tmp_path / "night")


def test_a_run_folder_reads_back(run: Path) -> None:
    """Steps, sizes and benchmarks come back as they were written, named after the folder."""
    found = load_report(run)
    assert found.name == "night"
    assert [row.step for row in found.rows] == [step(0), step(1), step(2)]
    for read, written in zip(found.rows, report(3).rows, strict=True):
        assert read.result is not None and written.result is not None
        assert replace(read.result, model_sha256=written.result.model_sha256) == written.result
        assert read.model_size_bytes == written.model_size_bytes
    assert found.provenance == {"config": {"target": "host"}}


def test_steps_come_in_the_order_of_their_numbers(run: Path) -> None:
    """Step 100 comes after step 11, not before it."""
    for iteration in (100, 11):
        write(
            run / f"step-{iteration}" / "detector.json",
            {"steps": [replace(step(0), iteration=iteration).to_json()]},
        )
    assert [row.step.iteration for row in load_report(run).rows] == [0, 1, 2, 11, 100]


def test_two_power_modes_are_no_comparison(run: Path) -> None:
    """Steps measured on one board in two power modes are refused like those of two boards."""
    path = run / "step-01" / "benchmark.json"
    measured = BenchmarkResult.from_json(json.loads(path.read_text()))
    device = replace(measured.device, details={**measured.device.details, "power_mode": "5W"})
    write(path, replace(measured, device=device).to_json())
    with pytest.raises(BenchmarkError, match="power modes"):
        load_report(run)


def test_what_is_not_done_is_not_measured(run: Path) -> None:
    """A step that is not exported or not measured has its pruning statistics alone."""
    (run / "step-01" / "benchmark.json").unlink()
    (run / "step-02" / "export.json").unlink()
    rows = load_report(run).rows
    assert [row.result is None for row in rows] == [False, True, True]
    assert [row.model_size_bytes is None for row in rows] == [False, False, True]


def test_a_benchmark_of_another_model_does_not_count(run: Path) -> None:
    """After a new export the old benchmark is of another model: not measured."""
    write(run / "step-01" / "benchmark.json", replace(result(1), model_sha256="0" * 64).to_json())
    assert [row.result is None for row in load_report(run).rows] == [False, True, False]


def test_two_devices_are_no_comparison(run: Path) -> None:
    """Steps measured on different devices are refused, with what to do."""
    other = Device("jetson-nano", "tensorrt", "NVIDIA Jetson Nano Developer Kit")
    path = run / "step-01" / "benchmark.json"
    measured = BenchmarkResult.from_json(json.loads(path.read_text()))
    write(path, replace(measured, device=other).to_json())
    with pytest.raises(BenchmarkError, match="edgeprune bench"):
        load_report(run)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", None, "is no run folder"),
        ("step-00/detector.json", {"steps": []}, "prune the run again"),
        ("step-00/detector.json", [], "prune the run again"),
        ("step-01/benchmark.json", {"model_sha256": 1}, "measure it again"),
        ("step-01/parity.json", {"parity": {}}, "export the step again"),
    ],
)
def test_damage_is_said(run: Path, file: str, content: Any, message: str) -> None:
    """A missing or damaged record is one error that names the file or folder and what to do."""
    if content is None:
        (run / file).unlink()
    else:
        write(run / file, content)
    with pytest.raises(BenchmarkError, match=message) as caught:
        load_report(run)
    assert str(run) in str(caught.value)


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    """A run that has not finished its first step cannot be reported."""
    write(tmp_path / "run.json", {})
    with pytest.raises(BenchmarkError, match="no step yet"):
        load_report(tmp_path)


def test_parity_is_the_models_own(run: Path) -> None:
    """The report tells how far ONNX is from PyTorch, unless the figure is of a model that was exported again."""
    sha256 = json.loads((run / "step-01" / "export.json").read_text())["sha256"]
    parity = {
        "images": 16,
        "max_box_difference_px": 2e-4,
        "max_score_difference": 3e-6,
        "ap_pytorch": 0.5,
        "ap_onnx": 0.5,
    }
    write(run / "step-01" / "parity.json", {"model_sha256": sha256, "parity": parity})
    report = load_report(run)
    figures = row_figures(report)
    assert figures[0]["parity_max_box_difference_px"] is None
    assert figures[1]["parity_max_box_difference_px"] == 2e-4
    assert figures[1]["parity_max_score_difference"] == 3e-6
    assert "boxes 0.0002 px, scores 3e-06 at most, on 16 images" in report_html(report)
    write(run / "step-01" / "parity.json", {"model_sha256": "0" * 64, "parity": parity})
    assert load_report(run).rows[1].parity is None
