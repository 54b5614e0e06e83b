"""Latency of several engines, interleaved in random blocks: heat and clock drift hit all of them alike."""

import gc
import random
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from .backend import Runner
from .engines import load
from .errors import AgentError
from .evaluate import read_image
from .imaging import Preprocessing, Thresholds, postprocess

SETTLE_RUNS = 2  # unrecorded runs at the start of a block: the previous engine's data is still in the caches
STABLE_WINDOW = 5  # runs; warm-up ends when the medians of two windows in a row are close
STABLE_SHARE = 0.05
WARMUP_LIMIT = 10  # times the least number of warm-up runs

ENGINE, END_TO_END, THROUGHPUT = SCOPES = ("engine", "end_to_end", "throughput")


def bench(job: Dict[str, Any], report: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Time engines on images.

    Job: "engines" (records), "images" (file references, decoded before the clock runs and used in turn),
    "preprocessing", "thresholds", "runs" (at least, per engine and scope), "min_seconds" (at least, in all),
    "block_runs" (per engine and scope in one round), "warmup_runs" (at least, per engine), "seed"; optional:
    "scopes" (all unless said) and "idle_seconds", for which nothing runs before the engines are loaded: what
    the board draws then is its idle power.

    Scopes: "engine", the inference alone on one preprocessed image; "end_to_end", from the decoded image to
    its detections: letterbox, normalise, copies, inference, NMS; "throughput", several images in flight, where
    the backend can do that. A backend may add scopes to "engine".

    Result: "blocks": list of {"engine" (index), "round", "start_s", "end_s" (monotonic clock), "samples_ms":
    {scope: [...]}, "images_per_s" (throughput; null: not measured), "images" (that went end to end, the
    unrecorded first one included)}; "warmup_runs" and "warmup_stable" (whether the latency was, at last): per
    engine; "timer_overhead_ms"; "idle_s": [start, end] or null.
    """
    preprocessing = Preprocessing.from_json(job["preprocessing"])
    thresholds = Thresholds(**job["thresholds"])
    images = [read_image(reference) for reference in job["images"]]
    if not images or not job["engines"]:
        raise AgentError("job", "a benchmark needs at least one engine and one image")

    idle_s = _idle(job.get("idle_seconds", 0))
    runners: List[Runner] = []
    try:
        for engine in job["engines"]:  # one by one: those loaded are closed when the next one fails
            runners.append(load(engine))  # noqa: PERF401
        subjects = [_Subject(runner, images, preprocessing, thresholds) for runner in runners]
        warm_ups = [_warm_up(subject, job["warmup_runs"]) for subject in subjects]
        gc.collect()
        gc.disable()
        blocks = _rounds(subjects, job, report)
        gc.enable()
    finally:
        for runner in runners:
            runner.close()
    return {
        "blocks": blocks,
        "warmup_runs": [warm_up.runs for warm_up in warm_ups],
        "warmup_stable": [warm_up.stable for warm_up in warm_ups],
        "timer_overhead_ms": _timer_overhead_ms(),
        "idle_s": idle_s,
    }


def _idle(seconds: float) -> Optional[List[float]]:
    if not seconds:
        return None
    start = time.monotonic()
    time.sleep(seconds)
    return [start, time.monotonic()]


class _Subject:
    """One engine and what it is timed on."""

    def __init__(
        self,
        runner: Runner,
        images: List[np.ndarray],
        preprocessing: Preprocessing,
        thresholds: Thresholds,
    ) -> None:
        self._runner = runner
        self._images = images
        self._preprocessing = preprocessing
        self._thresholds = thresholds
        self._next = 0
        self._input, _ = runner.prepare(images[0], preprocessing)
        self._detected = 0

    def detect(self) -> None:
        """From the next decoded image to its detections."""
        image = self._images[self._next]
        self._next = (self._next + 1) % len(self._images)
        values, placement = self._runner.prepare(image, self._preprocessing)
        found = self._runner.run(values)
        postprocess(found.boxes, found.scores, placement, self._thresholds)
        self._detected += 1

    def engine_ms(self, runs: int) -> Dict[str, List[float]]:
        """Milliseconds of `runs` inferences, by the backend's scopes."""
        self._runner.measure(self._input, SETTLE_RUNS)
        return self._runner.measure(self._input, runs)

    def end_to_end_ms(self, runs: int) -> List[float]:
        """Milliseconds of `runs` images from the decoded image to its detections."""
        self.detect()
        samples = []
        clock = time.perf_counter
        for _ in range(runs):
            start = clock()
            self.detect()
            samples.append((clock() - start) * 1e3)
        return samples

    def images_per_s(self, runs: int) -> Optional[float]:
        """Throughput of `runs` images, None where the backend has no such thing."""
        seconds = self._runner.seconds_in_flight(self._input, runs)
        return None if seconds is None else runs / seconds

    def block(self, runs: int, scopes: Sequence[str]) -> Dict[str, Any]:
        """What one block of a round measures."""
        before = self._detected
        samples_ms = self.engine_ms(runs) if ENGINE in scopes else {}
        if END_TO_END in scopes:
            samples_ms[END_TO_END] = self.end_to_end_ms(runs)
        images_per_s = self.images_per_s(runs) if THROUGHPUT in scopes else None
        return {
            "samples_ms": samples_ms,
            "images_per_s": images_per_s,
            "images": self._detected - before,
        }


class _WarmUp(NamedTuple):
    runs: int
    stable: bool


def _warm_up(subject: _Subject, least_runs: int) -> _WarmUp:
    """Run until the latency is stable, within a bound."""
    samples: List[float] = []
    while len(samples) < WARMUP_LIMIT * max(least_runs, 1):
        samples += subject.engine_ms(STABLE_WINDOW)[ENGINE]
        subject.end_to_end_ms(STABLE_WINDOW)
        before, last = samples[-2 * STABLE_WINDOW : -STABLE_WINDOW], samples[-STABLE_WINDOW:]
        if len(samples) >= max(least_runs, 2 * STABLE_WINDOW):
            if abs(np.median(last) / np.median(before) - 1) <= STABLE_SHARE:
                return _WarmUp(len(samples), True)
    return _WarmUp(len(samples), False)


def _rounds(
    subjects: List[_Subject], job: Dict[str, Any], report: Callable[[Dict[str, Any]], None]
) -> List[Dict[str, Any]]:
    order = list(range(len(subjects)))
    scopes = job.get("scopes", SCOPES)
    shuffle = random.Random(job["seed"]).shuffle
    rounds = -(-job["runs"] // job["block_runs"])
    blocks: List[Dict[str, Any]] = []
    start = time.monotonic()
    number = 0
    while number < rounds or time.monotonic() - start < job["min_seconds"]:
        shuffle(order)
        for index in order:
            block_start = time.monotonic()
            measured = subjects[index].block(job["block_runs"], scopes)
            place = {"engine": index, "round": number, "start_s": block_start, "end_s": time.monotonic()}
            blocks.append(dict(place, **measured))
        number += 1
        report({"event": "progress", "stage": "bench", "done": number, "total": max(rounds, number)})
    return blocks


def _timer_overhead_ms() -> float:
    """Median cost of reading the clock twice."""
    clock = time.perf_counter
    samples = []
    for _ in range(1000):
        start = clock()
        samples.append(clock() - start)
    return float(np.median(samples)) * 1e3
