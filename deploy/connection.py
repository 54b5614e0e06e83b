"""From a user's words, a target's name and a host, to a session with a device that is known to work."""

import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.deploy.device.system import l4t
from edgeprune.deploy.errors import DeviceError
from edgeprune.deploy.records import Check, DeviceInfo
from edgeprune.deploy.session import Session
from edgeprune.deploy.targets import Target, check_device, detect_target, load_target
from edgeprune.deploy.transport import REMOTE_FOLDER, Local, Ssh, Transport, default_folder

AUTO = "auto"  # the target that the device is found to be
SYSTEM_PYTHON = "/usr/bin/python3"  # JetPack's TensorRT is in the system's Python, which a venv hides


class NoDevice(DeviceError):
    """A target that is not this machine, and no host to reach it: a bundle is the way then."""


@dataclass(frozen=True)
class Connection:
    """How a device is reached and what it is asked for; the options' help texts say what each means."""

    host: str | None = None
    device_folder: str | None = None
    device_python: str | None = None
    ssh_config: Path | None = None
    bundle: Path | None = None
    backend: str | None = None
    power_mode: str | None = None
    lock_clocks: bool = False
    via: str | None = None
    workspace_mib: int | None = None
    dla_core: int | None = None
    force: bool = False

    def to_json(self) -> dict[str, Any]:
        paths = {"ssh_config": self.ssh_config, "bundle": self.bundle}
        return {**asdict(self), **{name: str(path) if path else None for name, path in paths.items()}}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Connection":
        """Read what `to_json` wrote."""
        paths = {name: Path(record[name]) if record[name] else None for name in ("ssh_config", "bundle")}
        return cls(**{**record, **paths})

    def engine_options(self, target: Target) -> dict[str, Any]:
        """The options of `Session.build` for a target; those of TensorRT are left out without it."""
        if target.backend != "tensorrt":
            return {}
        wanted = {"via": self.via, "workspace_mib": self.workspace_mib, "dla_core": self.dla_core}
        return {name: value for name, value in wanted.items() if value is not None}

    def open(self, target: Target) -> Session:
        """A session with the device, which is not asked anything yet.

        Raises:
            NoDevice: If there is no host, and this machine is no such device.
            DeviceError: If the host's name is refused.
        """
        if self.backend == "onnxruntime":
            target = target.without_tensorrt()
        return Session(
            target, self._transport(target), power_mode=self.power_mode, lock_clocks=self.lock_clocks
        )

    def _transport(self, target: Target) -> Transport:
        if self.host is not None:
            return Ssh(
                self.host,
                self.device_folder or REMOTE_FOLDER,
                self.device_python or "python3",
                self.ssh_config,
            )
        on_jetson = l4t() is not None
        if target.is_jetson and not on_jetson:
            raise NoDevice(f"this machine is no {target.name}: name one with --host user@name", "no-device")
        folder = Path(self.device_folder) if self.device_folder else default_folder()
        if self.device_python:
            return Local(folder, self.device_python)
        return Local(folder, SYSTEM_PYTHON) if on_jetson and target.name != "host" else Local(folder)


def connect(name: str, connection: Connection) -> Session:
    """Open a session with a target's device and make sure that it can do its work.

    Args:
        name: of a target, or "auto": what the device is found to be.

    Returns:
        A session whose target has what was found on the device (TensorRT, Python, memory) for defaults.

    Raises:
        NoDevice: If there is no way to such a device.
        TargetError: If the name is unknown, or the device's GPU is of another kind and it is not forced.
        DeviceError: If the device cannot be reached, or its runtime does not work.
    """
    if name == AUTO:
        probed = connection.open(load_target("linux")).probe()
        name = detect_target(probed).name
        if name == "linux" and connection.host is None:
            name = "host"
    session = connection.open(load_target(name))
    info = session.probe()
    if not connection.force:
        check_device(load_target(name), info)
    _need_backend(info)
    session.target = session.target.fitted(info)
    return session


def _need_backend(info: DeviceInfo) -> None:
    error = info.backends.get(info.backend, {}).get("error")
    if error:
        raise DeviceError.of_agent(info.transport, error)


def doctor(name: str, connection: Connection) -> tuple[Check, ...]:
    """Check on both sides what a target needs, from the way to it to its cameras.

    Raises:
        NoDevice, TargetError: As `connect`.
    """
    checks = []
    if connection.host is not None:
        try:
            done = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False)
            checks.append(Check("ssh here", True, done.stderr.strip(), ""))
        except OSError as error:
            return (Check("ssh here", False, str(error), "install OpenSSH's client (openssh-client)"),)
    auto = name == AUTO
    session = connection.open(load_target("linux" if auto else name))
    try:
        info = session.probe()
    except DeviceError as error:
        what, _, remedy = str(error).rpartition(";")
        return (*checks, Check("connection", False, what or str(error), remedy.strip()))
    checks.append(Check("connection", True, f"{info.transport}: {info.board}, {info.system}", ""))
    found = detect_target(info)
    if auto:
        session.target = found if connection.backend is None else found.without_tensorrt()
    else:
        wanted = load_target(name)
        fits = not wanted.is_jetson or found.name == name
        remedy = "" if fits else f"use --target {found.name}"
        checks.append(Check("target", fits, f"{name} was asked for, this is {found.name}", remedy))
    return (*checks, *session.doctor())
