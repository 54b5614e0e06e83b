"""The agent: one command, one JSON job in, one JSON result out.

The process that is called only supervises: the command runs in a child, so that a crash or an out-of-memory
kill becomes a result. Standard output carries progress, one JSON record a line; the last one is
``{"event": "end", "ok": ...}``. The result is ``{"ok": true, "result": {...}}`` or
``{"ok": false, "error": {"kind", "message", "remedy"}}``, written whole or not at all.

Paths in jobs are relative to the current folder, the work folder, and may not leave it:
``files/`` what the host sent, by content; ``engines/`` what was built here; ``jobs/`` one folder a job.
"""

import errno
import json
import os
import signal
import sys
from typing import Any, Callable, Dict, List

from . import power
from .cache import forget_jobs
from .child import die_with_parent, run_child
from .errors import AgentError
from .files import disk_error, inside, read_json, write_json
from .lock import device_lock
from .telemetry import Telemetry

PROTOCOL = 2  # changes when host and agent of different versions would misunderstand each other

Report = Callable[[Dict[str, Any]], None]


def _command(name: str) -> Callable[[Dict[str, Any], Report], Dict[str, Any]]:
    # Imported where they run: the supervisor stays small, and starts without numpy.
    if name == "probe":
        from .probe import probe as command
    elif name == "build":
        from .engines import build as command
    elif name == "bench":
        from .bench import bench as command
    elif name == "evaluate":
        from .evaluate import evaluate as command
    elif name == "profile":
        from .profile import profile as command
    elif name == "trtexec":
        from .profile import time_with_trtexec as command
    elif name == "doctor":
        from .doctor import doctor as command
    elif name == "camera":
        from .camera.command import camera as command
    elif name == "source":
        from .camera.command import check_source as command
    elif name == "clean":
        from .cache import clean as command
    else:
        raise AgentError("job", "unknown command {!r}".format(name))
    return command


# Alone on the device: they would disturb each other, or lose what they work with.
NEEDS_DEVICE = ("build", "bench", "evaluate", "profile", "trtexec", "camera", "clean")

GRACE_S = {"camera": 10.0, "source": 10.0}  # to close the camera, finish a video and write the summary


def main(argv: List[str]) -> int:
    """Run ``[--attached] COMMAND JOB RESULT``, ``--plan PLAN RESULTS`` or ``--camera PLAN [SOURCE]``.

    ``--attached``: standard input belongs to a host, and its end means that the host is gone.

    Returns:
        The exit status: 0 if the result is ok, else 1.
    """
    if len(argv) == 4 and argv[0] == "--child":
        return _child(*argv[1:])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _interrupted)
    if len(argv) == 3 and argv[0] == "--plan":
        from .plan import run_plan

        return run_plan(argv[1], argv[2])
    if len(argv) in (2, 3) and argv[0] == "--camera":
        from .plan import run_camera

        return run_camera(argv[1], argv[2] if len(argv) == 3 else None)
    attached = argv[:1] == ["--attached"]
    if len(argv) != 3 + attached:
        sys.stderr.write(
            "usage: python3 -m edgeprune_device COMMAND JOB RESULT | --plan PLAN RESULTS | "
            "--camera PLAN [SOURCE]\n"
        )
        return 2
    command, job_path, result_path = argv[attached:]
    try:
        result = supervise(command, job_path, result_path, _print, attached)
    except AgentError as error:
        result = {"ok": False, "error": error.to_json()}
        try:
            write_json(result_path, result)
        except AgentError:
            pass  # the disk is full: the last line still says what happened
    end = {"event": "end", "ok": result["ok"]}
    if not result["ok"]:
        end["error"] = result["error"]
    try:
        _print(end)
    except BrokenPipeError:  # the host went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0 if result["ok"] else 1


def supervise(
    command: str, job_path: str, result_path: str, report: Report, attached: bool = False
) -> Dict[str, Any]:
    """Run a command's job in a child, with telemetry and the power settings that the job asks for.

    Returns:
        What the child wrote.

    Raises:
        AgentError: If the job is refused, or the child gave no result.
    """
    job = read_json(inside(job_path))
    if job.get("protocol") != PROTOCOL:
        message = "host and agent differ: protocol {} and {}".format(job.get("protocol"), PROTOCOL)
        raise AgentError("job", message, "use the same version of edgeprune on both sides")
    if os.path.exists(inside(result_path)):
        os.unlink(result_path)
    forget_jobs(os.path.dirname(job_path))
    arguments = ["--child", command, job_path, result_path]
    grace_s = GRACE_S.get(command, 0.0)
    log_path = os.path.splitext(result_path)[0] + ".log"
    try:
        if command not in NEEDS_DEVICE:
            run_child(arguments, log_path, report, job.get("timeout_s"), attached, grace_s=grace_s)
            return _result(result_path)
        with device_lock(job.get("lock_wait_s", 0), report), power.held(job.get("power", {})):
            if command == "camera":  # runs until it is stopped, and looks at the board itself
                folder = os.path.dirname(job_path) or os.curdir
                run_child(
                    arguments,
                    log_path,
                    report,
                    job.get("timeout_s"),
                    attached,
                    lambda: os.utime(folder),  # old jobs are removed: this one is not old
                    grace_s,
                )
                return _result(result_path)
            with Telemetry() as telemetry:
                before = power.state()
                run_child(arguments, log_path, report, job.get("timeout_s"), attached, telemetry.tick)
                after = power.state()
    except BrokenPipeError as error:
        raise AgentError("disconnected", "the host went away") from error
    except OSError as error:
        raise disk_error(error, job_path) from error
    result = _result(result_path)
    if command == "bench" and result["ok"]:
        result["result"]["telemetry"] = {"before": before, "after": after, "samples": list(telemetry.samples)}
        write_json(result_path, result)
    return result


def _result(path: str) -> Dict[str, Any]:
    result: Dict[str, Any] = read_json(path)
    return result


def _child(command: str, job_path: str, result_path: str) -> int:
    die_with_parent()
    progress = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print on standard output belongs into the log

    def report(record: Dict[str, Any]) -> None:
        progress.write(json.dumps(record) + "\n")
        progress.flush()

    try:
        result = {"ok": True, "result": _command(command)(read_json(job_path), report)}
    except AgentError as error:
        result = {"ok": False, "error": error.to_json()}
    except MemoryError:
        remedy = "close other programs and the desktop session, add swap, or use a smaller input size"
        result = {"ok": False, "error": AgentError("memory", "out of memory", remedy).to_json()}
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        result = {"ok": False, "error": disk_error(error, error.filename or job_path).to_json()}
    write_json(result_path, result)
    return 0


def _print(record: Dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def _interrupted(number: int, frame: Any) -> None:
    raise AgentError("interrupted", "the agent was told to stop ({})".format(signal.Signals(number).name))
