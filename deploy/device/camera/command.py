"""The agent's command "camera": detect in what a camera sees, live, until somebody stops it.

Before it, "source" tells whether there is something to see.
"""

import contextlib
import os
import signal
import time
from typing import Any, Callable, Dict, List

import numpy as np

from ..engines import load
from ..errors import AgentError
from ..evaluate import numbers
from ..imaging import Preprocessing, Thresholds
from ..lock import device_lock
from ..telemetry import Telemetry, board_rails
from .capture import Capture
from .outputs import Snapshots, Video, annotate, check_space
from .pipeline import Detected, Detector, Pipeline
from .sources import Source, find_source
from .stream import Stream
from .watchdog import Watchdog

WAIT_S = 0.5  # for a frame, before it is looked whether to stop
TELL_EVERY_S = 1.0

Report = Callable[[Dict[str, Any]], None]


def check_source(job: Dict[str, Any], report: Report) -> Dict[str, Any]:
    """Look whether a source can be used: the agent's command "source".

    A camera is opened, gives a frame, and is closed again. That needs the device, so that neither a benchmark
    is disturbed nor the camera of another job found busy; what is plainly wrong is said without waiting for it.

    Job: "source", "capture": as for "camera". Result: "label" (without a password).

    Raises:
        AgentError: If something is missing, or no frame comes.
    """
    source = find_source(job["source"], job["capture"])
    if source.camera:
        with device_lock(job.get("lock_wait_s", 0), report):
            stop = _stop_signals()  # from now on there is a camera to be closed in order
            with Capture(source, job["capture"]) as capture:
                while capture.next(WAIT_S) is None:
                    if stop:
                        raise AgentError("interrupted", "told to stop before a frame came")
    return {"label": source.label}


def camera(job: Dict[str, Any], report: Report) -> Dict[str, Any]:
    """Detect until the source ends, a limit is reached, or this process is told to stop (SIGTERM).

    Job: "engines" (one record, or two to compare on the same frames), "names" (one each), "source"
    (`sources.find_source`), "capture" ("width", "height", "fps", wanted of a camera), "preprocessing",
    "thresholds" (one each); "listen" (None, or "host", "port", "token": `stream.Stream`), "save" (None, or
    the path of a video, .avi or .mp4), "snapshots" (None, or "folder", "cooldown_s"), "jsonl" (whether
    detections are reported), "track", "max_frames", "max_seconds" (None: no limit). Paths are inside the
    work folder.

    Events: "listening" ("port"). "camera", once a second: "fps", "frames", "dropped", "reconnects", "people",
    "stages_ms" (means, their sum is "latency_ms"), "latency_ms", "output_ms", "temperature_c" (of the hottest
    zone), "power_w" (of the board), and with two engines "engines": list of {"name", "fps" (alone), "people",
    "stages_ms"}. "detections", for each engine and frame: "engine" (index), "frame" (number, from 0; dropped
    ones count), "time_s" (Unix time of arrival), "boxes" (xyxy, pixels), "scores", "ids" (None: not tracked).

    Result: `Pipeline.summary` ("frames", "dropped", "seconds", "fps", times with "mean", "p50", "p90", "p99",
    ...), "ended" ("end of stream", "stopped", "max_frames" or "max_seconds"), "source" (without a password),
    "saved" (path or None), "snapshots" (paths).

    Raises:
        AgentError: If the source does not open or breaks off, the engine does not load, or the disk is full.
            A video is finished all the same.
    """
    stop = _stop_signals()
    if not 1 <= len(job["engines"]) == len(job["names"]) == len(job["thresholds"]) <= 2:
        raise AgentError("job", "a camera runs one engine or two, each with a name and thresholds")
    source = find_source(job["source"], job["capture"])
    preprocessing = Preprocessing.from_json(job["preprocessing"])
    with contextlib.ExitStack() as stack:
        outputs = _Outputs(job, source, report)
        stack.callback(outputs.close)
        detectors = []
        for name, engine, thresholds in zip(job["names"], job["engines"], job["thresholds"]):
            runner = load(engine)
            stack.callback(runner.close)
            detectors.append(Detector(name, runner, preprocessing, Thresholds(**thresholds), job["track"]))
        pipeline = Pipeline(stack.enter_context(Capture(source, job["capture"])), detectors)
        ended = _run(job, pipeline, outputs, stack.enter_context(Telemetry(kept=1)), stop)
    return dict(pipeline.summary(), ended=ended, source=source.label, **outputs.files())


def _stop_signals() -> List[int]:
    """The signals to stop that this process was sent: none yet, and none ends it from now on."""
    received: List[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda caught, frame: received.append(caught))
    return received


def _run(
    job: Dict[str, Any], pipeline: Pipeline, outputs: "_Outputs", telemetry: Telemetry, stop: List[int]
) -> str:
    """Returns why it ended."""
    watchdog = Watchdog()
    tell_at = time.monotonic() + TELL_EVERY_S
    while not stop:
        detected = pipeline.step(WAIT_S)
        if detected:
            if pipeline.frames == 1:
                watchdog.ready()  # source and engine work
            with pipeline.output():
                outputs.add(detected, pipeline.capture.fps)
        elif pipeline.capture.ended:
            return "end of stream"
        watchdog.alive()
        if time.monotonic() >= tell_at:
            tell_at = time.monotonic() + TELL_EVERY_S
            telemetry.tick()
            outputs.tell(pipeline.recent(), telemetry.samples[-1])
        if job["max_frames"] is not None and pipeline.frames >= job["max_frames"]:
            return "max_frames"
        if job["max_seconds"] is not None and pipeline.seconds() >= job["max_seconds"]:
            return "max_seconds"
    return "stopped"


class _Outputs:
    """Everything that is made of the boxes. A picture is drawn only for somebody, and once for all."""

    def __init__(self, job: Dict[str, Any], source: Source, report: Report) -> None:
        self._job = job
        self._report = report
        self._titles = list(job["names"])
        self._people = [0] * len(job["names"])
        self._numbers: Dict[str, Any] = {}
        snapshots, listen = job["snapshots"], job["listen"]
        self._video = Video(job["save"], source.live) if job["save"] else None
        self._snapshots = Snapshots(snapshots["folder"], snapshots["cooldown_s"]) if snapshots else None
        self._stream = Stream(listen["host"], listen["port"], listen["token"]) if listen else None
        if self._stream:
            report({"event": "listening", "port": self._stream.port})

    def add(self, detected: Detected, source_fps: float) -> None:
        frame = detected.frame
        self._people = [found.people for found in detected.found]
        if self._job["jsonl"]:
            self._report_boxes(detected)
        times = self._video.due(frame.arrival_s) if self._video else 0
        seen = any(len(found.boxes) for found in detected.found)
        snapshot = self._snapshots if seen and self._snapshots and self._snapshots.due() else None
        stream = self._stream if self._stream and self._stream.wanted() else None
        if not (times or snapshot or stream):
            return
        halves = [annotate(frame.image, found, title) for found, title in zip(detected.found, self._titles)]
        picture = np.hstack(halves)
        if self._video:
            self._video.add(picture, times, source_fps)
        if snapshot:
            snapshot.add(picture, frame.number)
        if stream:
            stream.publish(picture, self._numbers)

    def _report_boxes(self, detected: Detected) -> None:
        frame = detected.frame
        time_s = time.time() - (time.monotonic() - frame.arrival_s)
        for index, found in enumerate(detected.found):
            boxes, scores = [numbers(box) for box in found.boxes], numbers(found.scores)
            place = {"event": "detections", "engine": index, "frame": frame.number, "time_s": time_s}
            self._report(dict(place, boxes=boxes, scores=scores, ids=found.ids))

    def tell(self, recent: Dict[str, Any], sample: Dict[str, Any]) -> None:
        """Report the last second, and what the board says of itself."""
        rails, zones = sample["power_mw"], sample["temperatures_c"]
        engines = recent.pop("engines")
        both = len(engines) > 1
        self._titles = [
            "{}: {:.1f} FPS".format(engine["name"], engine["fps"] if both else recent["fps"])
            for engine in engines
        ]
        if both:
            recent["engines"] = [dict(engine, people=people) for engine, people in zip(engines, self._people)]
        recent["people"] = self._people[0]
        recent["temperature_c"] = max(zones.values()) if zones else None
        recent["power_w"] = sum(rails[rail] for rail in board_rails(rails)) / 1e3 if rails else None
        self._report(dict(recent, event="camera"))
        self._numbers = recent
        if self._stream:
            self._stream.publish(None, recent)
        for path in filter(None, (self._job["save"], (self._job["snapshots"] or {}).get("folder"))):
            check_space(os.path.dirname(path) or os.curdir)

    def files(self) -> Dict[str, Any]:
        """What was written."""
        saved = self._video.saved if self._video else None
        return {"saved": saved, "snapshots": self._snapshots.paths() if self._snapshots else []}

    def close(self) -> None:
        if self._video:
            self._video.close()
        if self._stream:
            self._stream.close()
