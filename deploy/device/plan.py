"""Run a bundle: everything that the host would ask for one by one, without a connection.

``run.sh`` and ``camera.sh`` call it in the bundle's folder. Engines are kept, so that a second run goes on where
the first one ended.
"""

import io
import json
import os
import sys
import tarfile
from typing import Any, Callable, Dict, List, Optional

from .errors import AgentError
from .files import read_json, sha256_of, write_json

RESULTS = "results.json"  # the one file in the archive

Report = Callable[[Dict[str, Any]], None]


def run_plan(plan_path: str, archive_path: str) -> int:
    """Build, time and evaluate every model of a plan; write one archive for `edgeprune import`.

    Returns:
        The exit status: 0 if all went well, else 1; no archive is written then.
    """
    try:
        results = _run(read_json(plan_path), sha256_of(plan_path))
        _write(results, archive_path)
    except AgentError as error:
        _say(error)
        return 1
    sys.stderr.write(
        "Done: take {} back and run `edgeprune import RUN {}` there.\n".format(*[archive_path] * 2)
    )
    return 0


def run_camera(plan_path: str, source: Optional[str]) -> int:
    """Build a plan's engines and run its camera until it ends or ctrl-C is pressed.

    Standard output has the detections, one JSON record a line, if the plan asks for them; everything else goes
    to standard error.

    Args:
        source: instead of the plan's.

    Returns:
        The exit status: 0 if all went well, else 1.
    """
    try:
        plan = read_json(plan_path)
        job = dict(plan["camera"])
        if source is not None:
            job["source"] = source
        # Before the engines, which may take minutes.
        _job(plan, "source", "source", {"source": job["source"], "capture": job["capture"]})
        job["engines"] = _engines(plan)
        sys.stderr.write("Ctrl-C ends the camera.\n")
        found = _job(plan, "camera", "camera", job, _CameraReport(job))
    except AgentError as error:
        _say(error)
        return 1
    line = "{frames} frames in {seconds:.1f} s, {dropped} dropped; {ended}\n"
    sys.stderr.write(line.format(**found))
    for path in filter(None, [found["saved"]] + found["snapshots"]):
        sys.stderr.write("{}\n".format(path))
    return 0


def _say(error: AgentError) -> None:
    sys.stderr.write("\nError: {}\n".format(": ".join(filter(None, (error.message, error.remedy)))))


def page_address(host: str, port: int, token: Optional[str]) -> str:
    """The camera's page, where it is reached at a host and port."""
    query = "?token={}".format(token) if token else ""
    return "http://{}:{}/{}".format("[{}]".format(host) if ":" in host else host, port, query)


class _CameraReport:
    """What a person at the board is told."""

    def __init__(self, job: Dict[str, Any]) -> None:
        self._listen = job["listen"]

    def __call__(self, event: Dict[str, Any]) -> None:
        if event["event"] == "listening":
            place = page_address(self._listen["host"], event["port"], self._listen["token"])
            sys.stderr.write("\nThe camera is at {}\n".format(place))
        elif event["event"] == "camera":
            line = "\r{:.1f} FPS, people {}, {} frames, {} dropped  "
            sys.stderr.write(line.format(event["fps"], event["people"], event["frames"], event["dropped"]))
        elif event["event"] == "detections":
            sys.stdout.write(json.dumps(event) + "\n")
        sys.stderr.flush()


def _engines(plan: Dict[str, Any]) -> List[Any]:
    shared = {name: plan[name] for name in ("backend", "precision", "options")}
    return [
        _job(plan, "build", "build-{}".format(index), dict(shared, model=model))
        for index, model in enumerate(plan["models"])
    ]


def _run(plan: Dict[str, Any], plan_sha256: str) -> Dict[str, Any]:
    found: Dict[str, Any] = {"plan_sha256": plan_sha256, "protocol": plan["protocol"]}
    found["probe"] = _job(plan, "probe", "probe", {})
    shared = {name: plan[name] for name in ("preprocessing", "thresholds")}
    found["engines"] = _engines(plan)
    timed = dict(plan["bench"], engines=found["engines"], power=plan["power"], **shared)
    timed["images"] = plan["images"][: plan["bench"]["image_count"]]
    found["bench"] = _job(plan, "bench", "bench", timed)
    # As a host does: where the board tells its power, each engine also runs alone for a while.
    tells_power = any(sample.get("power_mw") for sample in found["bench"]["telemetry"]["samples"])
    found["energy"] = [
        _job(plan, "bench", "energy-{}".format(index), dict(timed, engines=[engine], **plan["energy"]))
        for index, engine in enumerate(found["engines"] if tells_power else [])
    ]
    found["profiles"] = [
        _job(
            plan,
            "profile",
            "profile-{}".format(index),
            dict(
                shared,
                engine=engine,
                image=plan["images"][0],
                runs=plan["profile_runs"],
                power=plan["power"],
            ),
        )
        for index, engine in enumerate(found["engines"])
    ]
    found["evaluations"] = [
        _job(
            plan, "evaluate", "evaluate-{}".format(index), dict(shared, engine=engine, images=plan["images"])
        )
        for index, engine in enumerate(found["engines"])
    ]
    return found


def _job(
    plan: Dict[str, Any], command: str, name: str, job: Dict[str, Any], report: Optional[Report] = None
) -> Any:
    from .agent import supervise  # which imports this module

    folder = os.path.join("jobs", name)
    os.makedirs(folder, exist_ok=True)
    job_path, result_path = os.path.join(folder, "job.json"), os.path.join(folder, "result.json")
    write_json(job_path, dict(job, protocol=plan["protocol"]))

    def progress(event: Dict[str, Any]) -> None:
        if event["event"] == "progress":
            sys.stderr.write("\r{}: {} of {}  ".format(name, event["done"], event["total"]))
            sys.stderr.flush()

    sys.stderr.write("{} ...".format(name))
    result = supervise(command, job_path, result_path, report or progress)
    sys.stderr.write("\n")
    if not result["ok"]:
        error = result["error"]
        raise AgentError(error["kind"], "{} failed: {}".format(name, error["message"]), error["remedy"])
    return result["result"]


def _write(results: Dict[str, Any], archive_path: str) -> None:
    content = json.dumps(results).encode("utf-8")
    temporary = archive_path + ".tmp"
    with tarfile.open(temporary, "w:gz") as archive:
        entry = tarfile.TarInfo(RESULTS)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    os.replace(temporary, archive_path)
