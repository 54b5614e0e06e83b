"""From a frame to its boxes, with the time of each stage: capture, prepare, run, postprocess.

One thread does all of it, since one thread has to own CUDA; only capture runs beside it, in its own process.
With two engines each works on the same frame, one after the other.
"""

import contextlib
import math
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from ..backend import Runner
from ..imaging import Preprocessing, Thresholds, postprocess
from .capture import Capture, Frame
from .tracking import Smoothed, Tracker

STAGES = ("prepare", "run", "postprocess")
LEAST_MS, RESOLUTION, BINS = 1e-3, 1.01, 2100  # 1 us to 1,000 s


class Found(NamedTuple):
    """What one engine sees in a frame."""

    boxes: np.ndarray  # (K, 4) float32 xyxy, pixels of the frame
    scores: np.ndarray  # (K,) float32, best first
    ids: Optional[List[int]]  # None: not tracked
    people: int  # in view; smoothed when tracked


class Detected(NamedTuple):
    frame: Frame
    found: List[Found]  # one for each engine


class Times:
    """Durations of any number of frames in little memory: counted in bins one per cent apart."""

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, np.int64)
        self._sum_ms = 0.0
        self._recent: List[float] = []

    def add(self, duration_s: float) -> None:
        duration_ms = duration_s * 1e3
        position = math.log(max(duration_ms, LEAST_MS) / LEAST_MS, RESOLUTION)
        self._counts[min(int(position), BINS - 1)] += 1
        self._sum_ms += duration_ms
        self._recent.append(duration_ms)

    def recent_ms(self) -> Optional[float]:
        """Their mean since this was last asked, None if there was none."""
        recent, self._recent = self._recent, []
        return float(np.mean(recent)) if recent else None

    def summary(self) -> Dict[str, Optional[float]]:
        """ "mean", and percentiles to one per cent; None where nothing was measured."""
        count = int(self._counts.sum())
        if not count:
            return dict.fromkeys(("mean", "p50", "p90", "p99"))
        below = np.cumsum(self._counts)
        values: Dict[str, Optional[float]] = {"mean": self._sum_ms / count}
        for percent in (50, 90, 99):
            position = int(np.searchsorted(below, count * percent / 100))
            values["p{}".format(percent)] = LEAST_MS * RESOLUTION ** (position + 0.5)
        return values


class Detector:
    """One engine and what it makes of frames."""

    def __init__(
        self, name: str, runner: Runner, preprocessing: Preprocessing, thresholds: Thresholds, track: bool
    ) -> None:
        self.name = name
        self.times = {stage: Times() for stage in STAGES}
        self._runner = runner
        self._preprocessing = preprocessing
        self._thresholds = thresholds
        self._tracker = Tracker() if track else None
        self._smoothed = Smoothed()
        # The first run of an engine takes many times as long as the next: it is not the first frame's.
        values, _ = runner.prepare(np.zeros(runner.input_size + (3,), np.uint8), preprocessing)
        runner.run(values)

    def detect(self, frame: Frame) -> Tuple[Found, List[float]]:
        """What it finds, and the seconds of each stage."""
        marks_s = [time.monotonic()]
        values, placement = self._runner.prepare(frame.image, self._preprocessing)
        marks_s.append(time.monotonic())
        candidates = self._runner.run(values)
        marks_s.append(time.monotonic())
        boxes, scores = postprocess(candidates.boxes, candidates.scores, placement, self._thresholds)
        found = Found(boxes, scores, None, len(boxes))
        if self._tracker:
            ids = self._tracker.update(boxes, frame.number)
            found = Found(boxes, scores, ids, self._smoothed.update(len(boxes)))
        marks_s.append(time.monotonic())
        return found, [end - start for start, end in zip(marks_s, marks_s[1:])]


class Pipeline:
    """Takes frames and detects in them.

    Two sums agree, but for microseconds: "capture" (from a frame's arrival in the capture process until it is
    taken), "prepare", "run" and "postprocess" with "latency" (from its arrival to its boxes); and "wait",
    "prepare", "run", "postprocess" and "output" with the time from frame to frame.
    """

    def __init__(self, capture: Capture, detectors: List[Detector]) -> None:
        self.capture = capture
        self.detectors = detectors
        self.frames = 0
        self._times = {name: Times() for name in ("capture",) + STAGES + ("latency", "wait", "output")}
        self._started_s: Optional[float] = None  # when the first frame was taken
        self._last_s = 0.0
        self._told_s, self._told_frames = time.monotonic(), 0

    def step(self, wait_s: float) -> Optional[Detected]:
        """Detect in the next frame; None if none came in time. Errors as `Capture.next`."""
        frame = self.capture.next(wait_s)
        if frame is None:
            return None
        taken_s = time.monotonic()
        both = [detector.detect(frame) for detector in self.detectors]
        boxes_s = time.monotonic()
        self._times["capture"].add(taken_s - frame.arrival_s)
        self._times["latency"].add(boxes_s - frame.arrival_s)
        if self._started_s is None:
            self._started_s = taken_s
        else:
            self._times["wait"].add(taken_s - self._last_s)
        self._last_s = boxes_s
        self.frames += 1
        for index, stage in enumerate(STAGES):
            for detector, (_, durations_s) in zip(self.detectors, both):
                detector.times[stage].add(durations_s[index])
            self._times[stage].add(sum(durations_s[index] for _, durations_s in both))
        return Detected(frame, [found for found, _ in both])

    @contextlib.contextmanager
    def output(self) -> Iterator[None]:
        """Counts the time of what is done with a frame's boxes."""
        yield
        now_s = time.monotonic()
        self._times["output"].add(now_s - self._last_s)
        self._last_s = now_s

    def seconds(self) -> float:
        """Since the first frame was taken."""
        return 0.0 if self._started_s is None else time.monotonic() - self._started_s

    def recent(self) -> Dict[str, Any]:
        """Rates and mean times since this was last asked; an engine's "fps" is what it would reach alone."""
        now_s = time.monotonic()
        ms = {name: times.recent_ms() for name, times in self._times.items()}
        fps = (self.frames - self._told_frames) / max(now_s - self._told_s, 1e-9)
        self._told_s, self._told_frames = now_s, self.frames
        engines = []
        for detector in self.detectors:
            own_ms = {stage: times.recent_ms() for stage, times in detector.times.items()}
            engines.append({"name": detector.name, "fps": _alone(own_ms) or 0.0, "stages_ms": _known(own_ms)})
        return {
            "fps": fps,
            "frames": self.frames,
            "dropped": self.capture.dropped,
            "reconnects": self.capture.reconnects,
            "stages_ms": _known({stage: ms[stage] for stage in ("capture",) + STAGES}),
            "latency_ms": ms["latency"],
            "output_ms": ms["output"],
            "engines": engines,
        }

    def summary(self) -> Dict[str, Any]:
        """All since the start. Times are None where no frame came."""
        ms = {name: times.summary() for name, times in self._times.items()}
        engines = []
        for detector in self.detectors:
            stages_ms = {stage: times.summary() for stage, times in detector.times.items()}
            alone = _alone({stage: times["mean"] for stage, times in stages_ms.items()})
            engines.append({"name": detector.name, "fps": alone, "stages_ms": stages_ms})
        seconds = 0.0 if self._started_s is None else self._last_s - self._started_s
        return {
            "frames": self.frames,
            "dropped": self.capture.dropped,
            "reconnects": self.capture.reconnects,
            "seconds": seconds,
            "fps": self.frames / seconds if seconds else None,
            "stages_ms": {stage: ms[stage] for stage in ("capture",) + STAGES},
            "latency_ms": ms["latency"],
            "wait_ms": ms["wait"],
            "output_ms": ms["output"],
            "engines": engines,
        }


def _alone(stages_ms: Dict[str, Optional[float]]) -> Optional[float]:
    """Frames a second of an engine that has every frame at once."""
    known = _known(stages_ms)
    return 1e3 / sum(known.values()) if known else None


def _known(values: Dict[str, Optional[float]]) -> Dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
