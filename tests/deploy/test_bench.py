"""How a benchmark warms up, on engines whose latency is a function of how often they were timed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgeprune.deploy.device import bench
from edgeprune.deploy.device.backend import Detections, Runner
from edgeprune.deploy.device.bench import STABLE_WINDOW, WARMUP_LIMIT
from edgeprune.deploy.device.imaging import DEFAULT_THRESHOLDS, Preprocessing

LATE = 12  # windows


class FakeRunner(Runner):
    """Each window of the warm-up has the latency that `latency_ms` gives for its number."""

    input_size = (8, 8)

    def __init__(self, latency_ms: Callable[[int], float]) -> None:
        self._latency_ms = latency_ms
        self._window = 0

    def run(self, images: np.ndarray) -> Detections:
        return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))

    def measure(self, images: np.ndarray, runs: int) -> dict[str, list[float]]:
        if runs != STABLE_WINDOW:  # those before a window, which are not recorded
            return {"engine": [999.0] * runs}
        self._window += 1
        return {"engine": [self._latency_ms(self._window)] * runs}


def test_warm_up_lasts_until_the_latency_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A steady engine has the least number of runs, one that settles late has two steady windows more, and one
    that never does ends at the limit, which the result says."""
    runners = {
        "steady": FakeRunner(lambda window: 10.0),
        "late": FakeRunner(lambda window: 10.0 * 0.9 ** min(window, LATE)),
        "never": FakeRunner(lambda window: 10.0 + window % 2),
    }
    monkeypatch.setattr(bench, "load", lambda engine: runners[engine["path"]])
    monkeypatch.setattr(bench, "read_image", lambda reference: np.zeros((8, 8, 3), np.uint8))
    job: dict[str, Any] = {
        "engines": [{"path": name} for name in runners],
        "images": [{}],
        "preprocessing": Preprocessing().to_json(),
        "thresholds": DEFAULT_THRESHOLDS._asdict(),
        "runs": 1,
        "min_seconds": 0,
        "block_runs": 1,
        "warmup_runs": 20,
        "seed": 0,
    }
    found = bench.bench(job, lambda event: None)
    assert found["warmup_runs"] == [20, (LATE + 1) * STABLE_WINDOW, WARMUP_LIMIT * 20]
    assert found["warmup_stable"] == [True, True, False]
