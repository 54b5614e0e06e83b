"""Latency of several engines, interleaved in random blocks: heat and clock drift hit all of them alike."""

import gc
import random
import time
from typing import Any, Callable, Dict, List

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


def bench(job: Dict[str, Any], report: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Time engines on images.

    Job: "engines" (records), "images" (file references, decoded before the clock runs and used in turn),
    "preprocessing", "thresholds", "runs" (at least, per engine and scope), "min_seconds" (at least, in all),
    "block_runs" (per engine and scope in one round), "warmup_runs" (at least, per engine), "seed".

    Scopes: "engine", the inference alone on one preprocessed image; "end_to_end", from the decoded image to
    its detections: letterbox, normalise, copies, inference, NMS. A backend may add scopes.

    Result: "blocks": list of {"engine" (index), "round", "start_s", "end_s" (monotonic clock), "samples_ms":
    {scope: [...]}}; "warmup_runs": per engine; "timer_overhead_ms".
    """
    preprocessing = Preprocessing.from_json(job["preprocessing"])
    thresholds = Thresholds(**job["thresholds"])
    images = [read_image(reference) for reference in job["images"]]
    if not images or not job["engines"]:
        raise AgentError("job", "a benchmark needs at least one engine and one image")

    runners: List[Runner] = []
    try:
        for engine in job["engines"]:  # one by one: those loaded are closed when the next one fails
            runners.append(load(engine))  # noqa: PERF401
        subjects = [_Subject(runner, images, preprocessing, thresholds) for runner in runners]
        warmup_runs = [_warm_up(subject, job["warmup_runs"]) for subject in subjects]
        gc.collect()
        gc.disable()
        blocks = _rounds(subjects, job, report)
        gc.enable()
    finally:
        for runner in runners:
            runner.close()
    return {"blocks": blocks, "warmup_runs": warmup_runs, "timer_overhead_ms": _timer_overhead_ms()}


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

    def detect(self) -> None:
        """From the next decoded image to its detections."""
        image = self._images[self._next]
        self._next = (self._next + 1) % len(self._images)
        values, placement = self._runner.prepare(image, self._preprocessing)
        found = self._runner.run(values)
        postprocess(found.boxes, found.scores, placement, self._thresholds)

    def measure(self, runs: int) -> Dict[str, List[float]]:
        """Milliseconds of `runs` runs, by scope."""
        self._runner.measure(self._input, SETTLE_RUNS)
        samples = self._runner.measure(self._input, runs)
        self.detect()
        end_to_end = samples["end_to_end"] = []
        clock = time.perf_counter
        for _ in range(runs):
            start = clock()
            self.detect()
            end_to_end.append((clock() - start) * 1e3)
        return samples


def _warm_up(subject: _Subject, least_runs: int) -> int:
    """Run until the latency is stable, within a bound; returns how many runs it took."""
    samples: List[float] = []
    while len(samples) < WARMUP_LIMIT * max(least_runs, 1):
        samples += subject.measure(STABLE_WINDOW)["engine"]
        before, last = samples[-2 * STABLE_WINDOW : -STABLE_WINDOW], samples[-STABLE_WINDOW:]
        if len(samples) >= max(least_runs, 2 * STABLE_WINDOW):
            if abs(np.median(last) / np.median(before) - 1) <= STABLE_SHARE:
                break
    return len(samples)


def _rounds(
    subjects: List[_Subject], job: Dict[str, Any], report: Callable[[Dict[str, Any]], None]
) -> List[Dict[str, Any]]:
    order = list(range(len(subjects)))
    shuffle = random.Random(job["seed"]).shuffle
    rounds = -(-job["runs"] // job["block_runs"])
    blocks: List[Dict[str, Any]] = []
    start = time.monotonic()
    number = 0
    while number < rounds or time.monotonic() - start < job["min_seconds"]:
        shuffle(order)
        for index in order:
            block_start = time.monotonic()
            samples = subjects[index].measure(job["block_runs"])
            blocks.append(
                {
                    "engine": index,
                    "round": number,
                    "start_s": block_start,
                    "end_s": time.monotonic(),
                    "samples_ms": samples,
                }
            )
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
