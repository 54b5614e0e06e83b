"""The model card and what goes along with it, measured or not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks_example import HOST, result
from run_folder import write, write_run

from edgeprune.benchmarks.records import BenchmarkResult, Device
from edgeprune.benchmarks.ship import CARD, ship

PARITY = {
    "images": 16,
    "max_box_difference_px": 2e-4,
    "max_score_difference": 3e-6,
    "ap_pytorch": 0.5,
    "ap_onnx": 0.5,
}
NANO = Device(
    "jetson-nano",
    "tensorrt",
    "NVIDIA Jetson Nano Developer Kit",
    {
        "l4t": "32.7.6",
        "backends": {"tensorrt": {"version": "8.2.1"}},
        "power_mode": "MAXN",
        "clocks_locked": True,
    },
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "night")


def measured(run: Path, iteration: int, found: BenchmarkResult) -> None:
    """Put `found` in place of a step's benchmark."""
    folder = run / f"step-{iteration:02d}"
    sha256 = json.loads((folder / "export.json").read_text())["sha256"]
    write(folder / "benchmark.json", replace(found, model_sha256=sha256).to_json())


def card(run: Path, iteration: int) -> str:
    out = run.with_name(f"shipped-{iteration}")
    ship(run, iteration, out)
    return (out / CARD).read_text()


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def test_the_state_of_the_device_is_told(run: Path) -> None:
    """Runtime, L4T, power mode, clocks and rounds left out stand under the figures; a CPU's threads too."""
    blocks = tuple(
        replace(block, invalid="gpu reached 99 °C" if block.index < 2 else None) for block in result(1).blocks
    )
    for iteration in range(3):
        measured(run, iteration, replace(result(iteration, device=NANO), blocks=blocks))
    told = section(card(run, 1), "Measured")
    for line in (
        "- tensorrt: 8.2.1",
        "- Jetson Linux (L4T): 32.7.6",
        "- power mode: MAXN",
        "- clocks: locked",
        "- rounds left out as disturbed: 2 of 12",
    ):
        assert line in told.splitlines()
    assert "threads" not in told


def test_what_the_device_did_not_tell_is_not_measured(run: Path) -> None:
    """A workstation has no L4T and no power mode, and the card says that they were not measured."""
    lines = section(card(run, 1), "Measured").splitlines()
    assert HOST.details["l4t"] is None
    assert {"- onnxruntime: 1.18", "- threads: 1", "- rounds left out as disturbed: 0 of 12"} <= set(lines)
    for name in ("Jetson Linux (L4T)", "power mode", "clocks"):
        assert f"- {name}: not measured" in lines


def test_the_card_warns_of_its_own_step(run: Path) -> None:
    """A drop in AP and a disturbance are in the card where they are the step's or the unpruned one's, once each."""
    measured(run, 1, replace(result(1), ap=0.1, disturbed="gpu reached 99 °C"))
    mind = section(card(run, 1), "Mind")
    assert "- iteration 1: AP 0.100 on the device, 0.300 on the host" in mind
    assert "under a disturbance: gpu reached 99 °C" in mind
    other = section(card(run, 2), "Mind")
    assert "iteration 1" not in other and "disturbance" not in other
    measured(run, 0, replace(result(0), ap=0.1))
    assert section(card(run, 0), "Mind").count("iteration 0: AP 0.100 on the device") == 1


def test_parity_is_shipped_without_a_benchmark(run: Path, tmp_path: Path) -> None:
    """The proof that the model is the detector needs no device and goes along, unless it is of another model."""
    folder = run / "step-02"
    (folder / "benchmark.json").unlink()
    sha256 = json.loads((folder / "export.json").read_text())["sha256"]
    write(folder / "parity.json", {"model_sha256": sha256, "parity": PARITY})
    names = {path.name for path in ship(run, 2, tmp_path / "with")}
    assert "parity.json" in names and "benchmark.json" not in names
    write(folder / "parity.json", {"model_sha256": "0" * 64, "parity": PARITY})
    assert "parity.json" not in {path.name for path in ship(run, 2, tmp_path / "without")}
