"""The pipeline's times, against numpy and against a stub engine whose times are known."""

import time
from pathlib import Path

import numpy as np
import pytest
from camera_jobs import PREPROCESSING, write_video

from edgeprune.deploy.device.backend import Detections, Runner
from edgeprune.deploy.device.camera.capture import Capture
from edgeprune.deploy.device.camera.pipeline import Detector, Pipeline, Times
from edgeprune.deploy.device.camera.sources import find_source
from edgeprune.deploy.device.imaging import Thresholds

SETTINGS = {"width": 64, "height": 48, "fps": 30}


def test_percentiles_are_those_of_all_samples() -> None:
    """Counted in bins, 100,000 durations from microseconds to seconds give numpy's percentiles to 1%."""
    durations_s = np.random.default_rng(0).lognormal(-5, 1.5, 100_000)
    times = Times()
    for duration_s in durations_s:
        times.add(float(duration_s))
    found = times.summary()
    assert found["mean"] == pytest.approx(durations_s.mean() * 1e3)
    for percent in (50, 90, 99):
        assert found[f"p{percent}"] == pytest.approx(np.percentile(durations_s, percent) * 1e3, rel=0.01)


@pytest.mark.parametrize("duration_s", [0.0, 1e-9, 1e5])
def test_durations_out_of_range_count_at_the_ends(duration_s: float) -> None:
    """No duration is lost, and the mean is right."""
    times = Times()
    times.add(duration_s)
    assert times.summary()["mean"] == pytest.approx(duration_s * 1e3)


def test_nothing_measured_is_no_zero() -> None:
    """Without a sample every value is None."""
    assert Times().summary() == {"mean": None, "p50": None, "p90": None, "p99": None}
    assert Times().recent_ms() is None


def test_recent_times_are_those_since_the_last_question() -> None:
    """The mean starts anew with each question, the summary does not."""
    times = Times()
    times.add(0.001)
    assert times.recent_ms() == pytest.approx(1.0)
    times.add(0.003)
    assert times.recent_ms() == pytest.approx(3.0)
    assert times.recent_ms() is None
    assert times.summary()["mean"] == pytest.approx(2.0)


class Sleeper(Runner):
    """An engine that takes a known time and sees one box."""

    input_size = (32, 48)

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.took_ms: list[float] = []

    def run(self, images: np.ndarray) -> Detections:
        start = time.perf_counter()
        time.sleep(self._seconds)
        self.took_ms.append((time.perf_counter() - start) * 1e3)
        return Detections(np.array([[0, 0, 9, 9]], np.float32), np.array([0.9], np.float32))


def test_each_engine_has_its_own_time(tmp_path: Path) -> None:
    """Two engines on the same frames: each one's time is its own, the latency is that of both."""
    source = find_source(str(write_video(tmp_path / "clip.avi", 30)), SETTINGS)
    engines = [Sleeper(0.02), Sleeper(0.01)]
    detectors = [Detector("", engine, PREPROCESSING, Thresholds(0.3), False) for engine in engines]
    with Capture(source, SETTINGS) as capture:
        pipeline = Pipeline(capture, detectors)
        while not capture.ended:
            if detected := pipeline.step(0.5):
                assert [len(found.boxes) for found in detected.found] == [1, 1]
                with pipeline.output():
                    time.sleep(0.01)
    recent, summary = pipeline.recent(), pipeline.summary()
    took_ms = [engine.took_ms[1:] for engine in engines]  # the first run warms up
    for told, expected_ms in zip(summary["engines"], took_ms, strict=True):
        assert told["stages_ms"]["run"]["mean"] == pytest.approx(np.mean(expected_ms), rel=0.02)
        assert told["stages_ms"]["run"]["p90"] == pytest.approx(np.percentile(expected_ms, 90), rel=0.05)
        assert 0.7 / np.mean(expected_ms) < told["fps"] / 1e3 < 1 / np.mean(expected_ms)
    assert summary["stages_ms"]["run"]["mean"] == pytest.approx(np.sum(took_ms) / 30, rel=0.02)
    assert summary["output_ms"]["p50"] >= 10
    together_ms = sum(times["mean"] for times in summary["stages_ms"].values())
    assert together_ms == pytest.approx(summary["latency_ms"]["mean"], rel=0.01)
    assert sum(recent["stages_ms"].values()) == pytest.approx(recent["latency_ms"], rel=0.01)
    assert recent["frames"] == 30
