"""Run a bundle: everything that the host would ask for one by one, without a connection.

``run.sh`` calls it in the bundle's folder. Engines are kept, so that a second run goes on where the first one
ended.
"""

import io
import json
import os
import sys
import tarfile
from typing import Any, Dict

from .errors import AgentError
from .files import read_json, sha256_of, write_json

RESULTS = "results.json"  # the one file in the archive


def run_plan(plan_path: str, archive_path: str) -> int:
    """Build, time and evaluate every model of a plan; write one archive for `edgeprune import`.

    Returns:
        The exit status: 0 if all went well, else 1; no archive is written then.
    """
    try:
        results = _run(read_json(plan_path), sha256_of(plan_path))
        _write(results, archive_path)
    except AgentError as error:
        sys.stderr.write("Error: {} {}\n".format(error.message, error.remedy).rstrip() + "\n")
        return 1
    sys.stderr.write(
        "Done: take {} back and run `edgeprune import RUN {}` there.\n".format(*[archive_path] * 2)
    )
    return 0


def _run(plan: Dict[str, Any], plan_sha256: str) -> Dict[str, Any]:
    found: Dict[str, Any] = {"plan_sha256": plan_sha256, "protocol": plan["protocol"]}
    found["probe"] = _job(plan, "probe", "probe", {})
    shared = {name: plan[name] for name in ("preprocessing", "thresholds")}
    found["engines"] = [
        _job(
            plan,
            "build",
            "build-{}".format(index),
            {
                "model": model,
                "backend": plan["backend"],
                "precision": plan["precision"],
                "options": plan["options"],
            },
        )
        for index, model in enumerate(plan["models"])
    ]
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
            dict(shared, engine=engine, image=plan["images"][0], runs=plan["profile_runs"]),
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


def _job(plan: Dict[str, Any], command: str, name: str, job: Dict[str, Any]) -> Any:
    from .agent import supervise  # which imports this module

    folder = os.path.join("jobs", name)
    os.makedirs(folder, exist_ok=True)
    job_path, result_path = os.path.join(folder, "job.json"), os.path.join(folder, "result.json")
    write_json(job_path, dict(job, protocol=plan["protocol"]))

    def report(event: Dict[str, Any]) -> None:
        if event["event"] == "progress":
            sys.stderr.write("\r{}: {} of {}  ".format(name, event["done"], event["total"]))
            sys.stderr.flush()

    sys.stderr.write("{} ...".format(name))
    result = supervise(command, job_path, result_path, report)
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
