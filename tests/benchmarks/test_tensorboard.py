"""Scalars read back with TensorBoard's own reader."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks_example import report

from edgeprune.benchmarks.tensorboard import write_scalars


def scalars(folder: Path) -> Any:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    reader = events.EventAccumulator(str(folder))
    reader.Reload()
    return reader


def test_scalars_read_back(tmp_path: Path) -> None:
    """Written twice, each curve has each point once: AP by iteration, loss and held-out AP by epoch."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    for _ in range(2):
        assert write_scalars(report(3), tmp_path / "scalars")
    reader = scalars(tmp_path / "scalars")
    ap50 = [(event.step, event.value) for event in reader.Scalars("pruning/ap50_after")]
    assert ap50 == [(0, pytest.approx(0.601)), (1, pytest.approx(0.598)), (2, pytest.approx(0.595))]
    loss = [(event.step, event.value) for event in reader.Scalars("fine-tuning/iteration-02/loss")]
    assert loss == [(1, pytest.approx(1.5)), (2, pytest.approx(1.2))]
    assert [event.step for event in reader.Scalars("fine-tuning/iteration-01/held_out_ap")] == [0, 1]


def test_without_tensorboard_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed the report does without."""
    monkeypatch.setattr("edgeprune.benchmarks.tensorboard.find_spec", lambda name: None)
    assert not write_scalars(report(1), tmp_path / "scalars")
    assert not (tmp_path / "scalars").exists()
