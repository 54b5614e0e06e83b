"""A camera that runs unattended: systemd on the device starts it, watches it, and starts it again.

It is a unit of the user's own systemd, so nothing needs root. What it runs lies in services/NAME in the
device's work folder, which neither `clean` nor the cache's limit touches: the agent, the engines, the job (it
may hold the page's token, so nobody else may read it) and the unit itself, which systemd is told to link to.
The camera holds the device's lock like any job: stop it to benchmark, and the figures are not disturbed. For the
same reason a camera that is to be replaced is stopped first; it lies in services/NAME.old until the new one runs.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.data.files import write_json
from edgeprune.deploy.device.agent import PROTOCOL
from edgeprune.deploy.errors import DeviceError
from edgeprune.deploy.records import Engine
from edgeprune.deploy.session import Session, agent_zip
from edgeprune.deploy.transport import Completed, Transport

LOCK_WAIT_S = 60.0  # for another job on the device; then systemd tries again
START_S = 180.0  # from the start to the first frame: lock, engine, camera
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")

# Understood by systemd 237, JetPack 4.6's, and later. Starting is never given up: a camera may be plugged in
# again after any time. The limit of a file bounds the log of what libraries print; frames in shared memory are
# under it, too.
UNIT = """\
[Unit]
Description=edgeprune camera {name}
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=all
WorkingDirectory={work}
ExecStart="{python}" {folder}/agent.zip camera {folder}/job.json {folder}/result.json
ExecStopPost=-/bin/sh -c "cat {folder}/result.json >&2"
Restart=always
RestartSec=30
TimeoutStartSec={start_s:.0f}
TimeoutStopSec=20
KillMode=mixed
WatchdogSec=30
StandardOutput=null
StandardError=journal
LimitFSIZE=64M

[Install]
WantedBy=default.target
"""

# Runs on the device, in the work folder.
LOOK = """\
import json, os, pwd, sys
user = pwd.getpwuid(os.getuid()).pw_name
lingers = os.path.exists("/var/lib/systemd/linger/" + user)
print(json.dumps({"python": sys.executable, "work": os.getcwd(), "user": user, "lingers": lingers}))
"""


@dataclass(frozen=True)
class Service:
    """A camera service that was started and gave its first frame."""

    unit: str  # "edgeprune-door.service"
    text: str
    path: str  # of the unit on the device
    user: str  # whose systemd runs it
    lingers: bool  # whether it runs while that user is not logged in: `sudo loginctl enable-linger USER`


def install_service(
    session: Session, job: Mapping[str, Any], name: str, prepare: Callable[[], Mapping[str, Engine]]
) -> Service:
    """Have a camera run from now on and after each boot; one of that name is replaced.

    Args:
        job: of the agent's command "camera", without engines, their names and the session's power settings.
        name: of the service: small letters, digits and hyphens.
        prepare: gives the engines on the device, by the names that are shown. An older service of that name is
            stopped meanwhile, as it would hold camera and device.

    Raises:
        DeviceError: If the job is none for a service, systemd refuses, or the camera gives no frame. An older
            service runs again then, as the error says; else nothing is left.
    """
    _check_job(session, job, name)
    unit, folder = _unit_and_folder(name)
    transport = session.transport
    found = _look(transport)
    text = _unit_text(found, folder, name)
    path = f"{found['work']}/{folder}/{unit}"
    with _replacing(transport, unit, folder, path):
        engines = prepare()
        records = [engine.to_json() for engine in engines.values()]
        whole = {**job, "engines": records, "names": list(engines), "power": session.power}
        _fill(transport, whole, folder, text, unit)
        _enable_and_start(transport, unit, folder, path)
    return Service(unit, text, path, found["user"], found["lingers"])


@contextlib.contextmanager
def _replacing(transport: Transport, unit: str, folder: str, path: str) -> Iterator[None]:
    """Set an older service aside, and put it back if its successor fails.

    Raises:
        DeviceError: What failed inside, with what became of the older service.
        KeyboardInterrupt: The same of ctrl-C.
    """
    older = _is_there(transport, folder) or _is_there(transport, _older(folder))
    try:
        if older:
            _set_aside(transport, unit, folder)
        yield
    except BaseException as error:
        if not older:
            with contextlib.suppress(DeviceError):  # what failed before says more
                transport.run(["systemctl", "--user", "disable", "--now", unit])
                _forget(transport, unit, folder)
            raise
        outcome = f"the service that was there before {_put_back(transport, unit, folder, path)}"
        if isinstance(error, DeviceError):
            raise DeviceError(f"{error}; {outcome}", error.kind) from error
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"Interrupted; {outcome}") from error
        raise
    _run(transport, "rm", "-rf", "--", _older(folder))


def _set_aside(transport: Transport, unit: str, folder: str) -> None:
    """Stop the service that is there, and keep its files elsewhere."""
    _stop(transport, unit)
    if _is_there(transport, _older(folder)):  # an installation was cut off: that one is the last known to run
        _run(transport, "rm", "-rf", "--", folder)
    else:
        _run(transport, "mv", "--", folder, _older(folder))


def _put_back(transport: Transport, unit: str, folder: str, path: str) -> str:
    """Have the older service run again, whether it was set aside yet or not; returns what became of it."""
    outcome = "may not run any more"
    try:
        _stop(transport, unit)
        if _is_there(transport, _older(folder)):
            _run(transport, "rm", "-rf", "--", folder)
            _run(transport, "mv", "--", _older(folder), folder)
        outcome = "is back and does not start either"
        _enable_and_start(transport, unit, folder, path)
    except DeviceError as error:
        return f"{outcome}: {error}"
    return "runs again"


def _check_job(session: Session, job: Mapping[str, Any], name: str) -> None:
    """Refuse what could not be a service, before anything is changed on the device.

    Args:
        job: as for `install_service`.

    Raises:
        DeviceError: If it writes what fills the disk, ends, or cannot be found: in its name, source or port.
    """
    _unit_and_folder(name)
    where = session.transport.name
    if any(job.get(field) for field in ("save", "snapshots", "jsonl")):
        raise DeviceError(
            "a service that runs for ever would fill the device's disk: leave --save, --snapshots and --jsonl "
            "out",
            "service",
        )
    if any(job.get(field) for field in ("max_frames", "max_seconds")):
        raise DeviceError(
            "a service that ends is started again: leave --max-frames and --max-seconds out", "service"
        )
    if job["source"].startswith("files/"):
        raise DeviceError(
            f"a service needs a source of the device's own: copy the file to {where} and name it by its path "
            "there",
            "service",
        )
    listen = job.get("listen")
    if listen and not listen["port"]:
        raise DeviceError(
            "a service is looked for at a port that does not change: name one with --listen 127.0.0.1:PORT",
            "service",
        )


def remove_service(session: Session, name: str) -> None:
    """Stop a camera service and forget it, with all its files.

    Raises:
        DeviceError: If systemd refuses, or there is none of that name.
    """
    unit, folder = _unit_and_folder(name)
    transport = session.transport
    if not _is_there(transport, folder) and not _is_there(transport, _older(folder)):
        raise DeviceError(f"there is no camera service {name!r} on {transport.name}", "service")
    disabled = transport.run(["systemctl", "--user", "disable", "--now", unit])
    if disabled.status and "does not exist" not in disabled.stderr:  # an installation may have been cut off
        raise _refused(transport, "disable", disabled)
    _forget(transport, unit, folder, _older(folder))


def _unit_and_folder(name: str) -> tuple[str, str]:
    if not NAME.fullmatch(name):
        raise DeviceError(
            f"{name!r} is no name for a service: it takes 1 to 32 small letters, digits and hyphens",
            "service",
        )
    return f"edgeprune-{name}.service", f"services/{name}"


def _older(folder: str) -> str:
    return f"{folder}.old"  # no service's own: a name has no dot


def _is_there(transport: Transport, folder: str) -> bool:
    return transport.run(["test", "-d", folder]).status == 0


def _look(transport: Transport) -> dict[str, Any]:
    lines: list[str] = []
    looked = transport.run([transport.python, "-c", LOOK], on_line=lines.append)
    if looked.status:
        raise _refused(transport, transport.python, looked)
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _fill(transport: Transport, job: Mapping[str, Any], folder: str, text: str, unit: str) -> None:
    """Put everything into the service's folder, which others cannot enter."""
    _run(transport, "mkdir", "-p", "--", folder)
    _run(transport, "chmod", "700", "--", folder)
    engines = []
    for record in job["engines"]:
        engine = Engine.from_json(record)
        path = f"{folder}/{engine.key}.engine"
        _run(transport, "ln", "-f", "--", engine.path, path)  # a second name: `clean` removes the first alone
        engines.append({**record, "path": path})
    limits = {"protocol": PROTOCOL, "lock_wait_s": LOCK_WAIT_S, "timeout_s": None, "job_folder": folder}
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary)
        write_json(local / "job.json", {**job, "engines": engines, **limits})
        (local / "agent.zip").write_bytes(agent_zip()[1])
        (local / unit).write_text(text)
        transport.put({f"{folder}/{path.name}": path for path in sorted(local.iterdir())})
    _run(transport, "chmod", "600", "--", f"{folder}/job.json")


def _unit_text(found: Mapping[str, Any], folder: str, name: str) -> str:
    for path in (found["work"], found["python"]):
        if re.search(r"""["'\\%$\n]""", path):
            raise DeviceError(f"{path!r} has signs in it that systemd reads otherwise", "service")
    return UNIT.format(name=name, folder=folder, start_s=START_S, **found)


def _forget(transport: Transport, unit: str, *folders: str) -> None:
    _run(transport, "rm", "-rf", "--", *folders)
    _systemctl(transport, "daemon-reload")
    transport.run(["systemctl", "--user", "reset-failed", unit])  # it says so where there is nothing to reset


def _stop(transport: Transport, unit: str) -> None:
    stopped = transport.run(["systemctl", "--user", "stop", unit])
    if stopped.status and "not loaded" not in stopped.stderr:  # an installation may have been cut off
        raise _refused(transport, "stop", stopped)


def _enable_and_start(transport: Transport, unit: str, folder: str, path: str) -> None:
    """Start the unit, which waits for the first frame, and say why none came."""
    _systemctl(transport, "enable", path)
    _systemctl(transport, "daemon-reload")
    started = transport.run(["systemctl", "--user", "restart", unit], timeout_s=START_S + 60)
    if not started.status:
        return
    lines: list[str] = []
    transport.run(["cat", "--", f"{folder}/result.json"], on_line=lines.append)
    error = json.loads("".join(lines) or "{}").get("error")
    if not error:
        raise _refused(transport, "restart", started)
    raise DeviceError.of_agent(f"the camera does not start on {transport.name}", error)


def _systemctl(transport: Transport, *args: str) -> None:
    _run(transport, "systemctl", "--user", *args)


def _run(transport: Transport, *args: str) -> None:
    completed = transport.run(args)
    if completed.status:
        raise _refused(transport, " ".join(args[:3]), completed)


def _refused(transport: Transport, what: str, completed: Completed) -> DeviceError:
    lines = completed.stderr.strip().splitlines()
    said = lines[-1].strip() if lines else f"status {completed.status}"
    remedy = ""
    if "connect to bus" in said or completed.status == 127:
        remedy = "; it needs systemd there, and a session of that user: `loginctl enable-linger` starts one at boot"
    return DeviceError(f"{what} failed on {transport.name}: {said}{remedy}", "service")
