"""The camera on a device, from here: its job, its page through a forwarded port, what it saved brought back.

What runs there is deploy/device/camera/command.py.
"""

import contextlib
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.deploy.device.imaging import Preprocessing, Thresholds
from edgeprune.deploy.device.plan import page_address
from edgeprune.deploy.errors import DeviceError
from edgeprune.deploy.records import CameraSummary, Engine
from edgeprune.deploy.session import Files, Session, new_job_folder
from edgeprune.deploy.transport import Local, Stop

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # each with the loopback address among them
ANSWER_S = 10.0  # for the page's first byte through a forwarded port


@dataclass(frozen=True)
class CameraOptions:
    """What the camera does; the options' help texts of `edgeprune camera` say what each means."""

    source: str = "csi://0"
    width: int = 1280  # asked of a camera, pixels
    height: int = 720
    fps: int = 30
    listen_host: str = "127.0.0.1"  # the page's, on the device
    listen_port: int = 0  # 0: any free one
    token: str | None = None  # None: whoever is on the device, or has its forwarded port, may look
    save: Path | None = None  # annotated video, here
    jsonl: bool = False  # report each frame's detections
    snapshots: Path | None = None  # folder, here; it is there
    cooldown_s: float = 10.0
    track: bool = False
    max_frames: int | None = None
    max_seconds: float | None = None

    def address(self, host: str, port: int) -> str:
        """The page's, where it is reached at a host and port."""
        return page_address(host, port, self.token)


def watch(
    session: Session,
    engines: Mapping[str, Engine],
    preprocessing: Preprocessing,
    thresholds: Sequence[Thresholds],
    options: CameraOptions,
    *,
    on_event: Callable[[Mapping[str, Any]], None],
    stop: Stop,
) -> CameraSummary:
    """Run the camera until its source ends, a limit is reached, or `stop` is called.

    Args:
        engines: one, or two to compare on the same frames, by the name that is shown.
        thresholds: one for each engine.
        on_event: takes the device's events: "camera" about once a second, "detections" for each frame if
            asked, "waiting" for another job. "listening" has "address", the page's from here, or None and
            "reason" where it cannot be reached.

    Raises:
        DeviceError: If the device, its camera or the way to it fails.
        EdgePruneError: If what it saved cannot be written here.
    """
    folder = new_job_folder()
    source, files = send_source(session, options.source)
    job = camera_job(engines, source, preprocessing, thresholds, options, folder)
    with contextlib.ExitStack() as forwarded:

        def progress(event: Mapping[str, Any]) -> None:
            if event["event"] == "listening":
                try:
                    page = forwarded.enter_context(_page(session, options, event["port"]))
                    event = {**event, "address": page}
                except DeviceError as error:  # what else was asked for goes on
                    event = {**event, "address": None, "reason": str(error)}
            on_event(event)

        session.progress = progress
        try:
            found = session.camera(job, files, folder, stop)
        except DeviceError as error:
            saved: list[Path] = []
            with contextlib.suppress(DeviceError):  # it is the first error that counts
                saved = _fetch(session, job, options)
            if not saved:
                raise
            kept = ", ".join(map(str, saved))
            raise DeviceError(f"{error} (what was saved until then: {kept})", error.kind) from error
    _fetch(session, job, options)
    return CameraSummary.from_json(found)


def camera_job(
    engines: Mapping[str, Engine],
    source: str,
    preprocessing: Preprocessing,
    thresholds: Sequence[Thresholds],
    options: CameraOptions,
    folder: str,
) -> dict[str, Any]:
    """The agent's job.

    Args:
        source: as the device finds it.
        folder: on the device, where video and snapshots are written.
    """
    save = f"{folder}/video{options.save.suffix.lower()}" if options.save else None
    snapshots = {"folder": f"{folder}/snapshots", "cooldown_s": options.cooldown_s}
    return {
        "engines": [engine.to_json() for engine in engines.values()],
        "names": list(engines),
        "source": source,
        "capture": _capture(options),
        "preprocessing": preprocessing.to_json(),
        "thresholds": [each._asdict() for each in thresholds],
        "listen": {"host": options.listen_host, "port": options.listen_port, "token": options.token},
        "save": save,
        "jsonl": options.jsonl,
        "snapshots": snapshots if options.snapshots else None,
        "track": options.track,
        "max_frames": options.max_frames,
        "max_seconds": options.max_seconds,
    }


def check_source(session: Session, options: CameraOptions) -> None:
    """Look whether the source gives frames, before minutes go into engines.

    Raises:
        DeviceError: If it is not there, or busy or silent, or something that it needs is missing.
    """
    source, files = send_source(session, options.source)
    if not files.references:
        session.check_source(source, _capture(options))


def _capture(options: CameraOptions) -> dict[str, int]:
    return {"width": options.width, "height": options.height, "fps": options.fps}


def send_source(session: Session, source: str) -> tuple[str, Files]:
    """The source as the device finds it, and what has to be sent: a file of this machine, to another one."""
    path = Path(source)
    if "://" in source or not path.exists():
        return source, Files([])
    if isinstance(session.transport, Local):
        return str(path.absolute()), Files([])
    if path.is_file():
        files = Files([path])
        return files.references[0]["path"], files
    return source, Files([])


@contextlib.contextmanager
def _page(session: Session, options: CameraOptions, port: int) -> Iterator[str]:
    """The page's address from here.

    Raises:
        DeviceError: If the device's port cannot be forwarded.
    """
    host = EVERY_ADDRESS.get(options.listen_host, options.listen_host)
    if host not in LOOPBACK:
        yield options.address(host, port)
        return
    with session.transport.forward(host, port) as here:
        if not _answers(*here):
            raise DeviceError(
                f"{session.transport.name} does not forward ports (AllowTcpForwarding in its sshd_config): the page "
                f"is at {options.address(host, port)} on the device itself",
                "forward",
            )
        yield options.address(*here)


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), ANSWER_S) as connection:
            connection.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
            return bool(connection.recv(1))
    except OSError:
        return False


def _fetch(session: Session, job: Mapping[str, Any], options: CameraOptions) -> list[Path]:
    """Bring video and snapshots here, as far as there are any; they are not kept on the device."""
    transport = session.transport
    fetched = []
    if options.save and transport.run(["test", "-f", job["save"]]).status == 0:
        transport.get(job["save"], options.save)
        transport.run(["rm", "-f", "--", job["save"]])
        fetched.append(options.save)
    if options.snapshots:
        remote = job["snapshots"]["folder"]
        names: list[str] = []
        transport.run(["ls", "--", remote], on_line=names.append)
        for name in names:
            if re.fullmatch(r"\w[\w.-]*", name):  # the device's names are no paths here
                transport.get(f"{remote}/{name}", options.snapshots / name)
        if names:
            fetched.append(options.snapshots)
        transport.run(["rm", "-rf", "--", remote])
    return fetched
