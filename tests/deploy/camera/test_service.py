"""The camera as a service: what systemd is told, and what a real one makes of it."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from camera_jobs import MjpegServer, camera_job, descendants, wait_for
from sshd import Sshd
from stand_in import StandIn
from systemd import FakeSystemctl, real_systemd

from edgeprune.deploy import camera_service
from edgeprune.deploy.camera_service import Service, install_service, remove_service
from edgeprune.deploy.errors import DeviceError
from edgeprune.deploy.records import Engine
from edgeprune.deploy.session import Session
from edgeprune.deploy.targets import load_target
from edgeprune.deploy.transport import Local, Ssh

TOKEN = "nobody-else-reads-this"


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSystemctl:
    fake = FakeSystemctl(tmp_path / "systemd")
    monkeypatch.setenv("PATH", f"{fake.path}:{os.environ['PATH']}")
    return fake


def service_job(engine: Engine, source: str = "/dev/video0", **fields: Any) -> dict[str, Any]:
    listen = {"host": "0.0.0.0", "port": 8080, "token": TOKEN}
    return camera_job(engine, source, **{"listen": listen, **fields})


def install(session: Session, job: dict[str, Any], name: str) -> Service:
    """Install a job whose engines are built already."""
    engines = dict(zip(job["names"], map(Engine.from_json, job["engines"]), strict=True))
    return install_service(session, job, name, lambda: engines)


def source_of(folder: Path) -> str:
    source: str = json.loads((folder / "job.json").read_text())["source"]
    return source


def test_what_systemd_is_told(session: Session, engine: Engine, work: Path, systemctl: FakeSystemctl) -> None:
    """The unit is linked, started and waited for; nobody else reads the token; removal leaves nothing."""
    service = install(session, service_job(engine), "door")
    folder = work / "services" / "door"
    assert service.unit == "edgeprune-door.service"
    assert service.path == str(folder / service.unit)
    assert (folder / service.unit).read_text() == service.text
    assert systemctl.calls == [
        f"--user enable {service.path}",
        "--user daemon-reload",
        "--user restart edgeprune-door.service",
    ]
    assert TOKEN not in service.text
    holders = [path for path in work.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert holders == [folder / "job.json"]
    assert stat.S_IMODE(holders[0].stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for line in (
        "Type=notify",
        "NotifyAccess=all",
        "WatchdogSec=30",
        "Restart=always",
        "StartLimitIntervalSec=0",  # a camera may be plugged in again after any time
    ):
        assert line in service.text.splitlines()
    remove_service(session, "door")
    assert systemctl.calls[3:] == [
        "--user disable --now edgeprune-door.service",
        "--user daemon-reload",
        "--user reset-failed edgeprune-door.service",
    ]
    assert not folder.exists()
    with pytest.raises(DeviceError, match="no camera service 'door'"):
        remove_service(session, "door")


def test_a_service_outlives_clean(
    session: Session, engine: Engine, work: Path, systemctl: FakeSystemctl
) -> None:
    """After `clean` the engine is still there, and the agent runs its job from the service's folder alone."""
    video = work.parent / "nothing.avi"
    install(session, service_job(engine, str(video), listen=None), "door")
    session.clean()
    assert not (work / engine.path).exists()
    folder = Path("services/door")
    command = [session.transport.python, f"{folder}/agent.zip", "camera"]
    paths = [f"{folder}/job.json", f"{folder}/result.json"]
    subprocess.run([*command, *paths], cwd=work, check=False, capture_output=True)
    result = json.loads((work / folder / "result.json").read_text())
    assert str(video) in result["error"]["message"]  # it got as far as its source, and that is not there
    job = json.loads((work / folder / "job.json").read_text())
    assert (work / job["engines"][0]["path"]).is_file()


def test_a_service_holds_power_mode_and_clocks(
    engine: Engine, work: Path, tmp_path: Path, systemctl: FakeSystemctl
) -> None:
    """They are those of the session: set when systemd starts the camera, put back when it ends."""
    session = Session(load_target("host"), Local(work), power_mode="5W", lock_clocks=True)
    install(session, service_job(engine, str(work.parent / "nothing.avi"), listen=None), "door")
    board = StandIn(tmp_path / "jetson")
    command = [sys.executable, "services/door/agent.zip", "camera", "services/door/job.json", "result.json"]
    subprocess.run(command, cwd=work, env={**os.environ, **board.environment}, check=False)
    assert [call.partition(" /")[0] for call in board.calls] == [
        "nvpmodel -m 1",
        "jetson_clocks --store",
        "jetson_clocks ",
        "jetson_clocks --restore",
        "nvpmodel -m 0",
    ]


def test_installing_again_replaces(
    session: Session, engine: Engine, work: Path, systemctl: FakeSystemctl
) -> None:
    """The old one is stopped before engines are built, and nothing of it stays."""
    install(session, service_job(engine), "door")
    folder = work / "services" / "door"
    (folder / "old.engine").touch()

    def prepare() -> dict[str, Engine]:
        assert systemctl.calls[3:] == ["--user stop edgeprune-door.service"]
        return {"step 0": engine}

    install_service(session, service_job(engine, "csi://0"), "door", prepare)
    assert not (folder / "old.engine").exists()
    assert source_of(folder) == "csi://0"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("interruption", "said"),
    [(DeviceError("no memory"), "no memory"), (KeyboardInterrupt(), "Interrupted")],
)
def test_what_fails_to_replace_leaves_the_old_one(
    session: Session,
    engine: Engine,
    work: Path,
    systemctl: FakeSystemctl,
    interruption: BaseException,
    said: str,
) -> None:
    """It has its files again and is started, and the error says so; after ctrl-C, too."""
    install(session, service_job(engine), "door")
    folder = work / "services" / "door"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def prepare() -> dict[str, Engine]:
        raise interruption

    with pytest.raises(type(interruption)) as raised:
        install_service(session, service_job(engine, "csi://0"), "door", prepare)
    assert str(raised.value) == f"{said}; the service that was there before runs again"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert systemctl.calls[-1] == "--user restart edgeprune-door.service"
    assert list(folder.parent.iterdir()) == [folder]


def test_an_installation_that_was_cut_off_has_not_lost_the_old_one(
    session: Session, engine: Engine, work: Path, systemctl: FakeSystemctl
) -> None:
    """The host went away while the old service was set aside: it is what the next failure brings back."""
    install(session, service_job(engine), "door")
    folder = work / "services" / "door"
    older = folder.with_name("door.old")
    folder.rename(older)
    folder.mkdir()  # begun, and cut off
    broken = {**service_job(engine, "csi://0"), "engines": [{**engine.to_json(), "path": "engines/none"}]}
    with pytest.raises(DeviceError, match=r"engines/none.*; the service that was there before runs again"):
        install(session, broken, "door")
    assert source_of(folder) == "/dev/video0"
    folder.rename(older)
    install(session, service_job(engine, "csi://0"), "door")
    assert source_of(folder) == "csi://0"
    assert not older.exists()
    folder.rename(older)
    remove_service(session, "door")
    assert not older.exists()


@pytest.mark.parametrize(
    ("status", "says", "told"),
    [
        (1, "Failed to connect to bus: No such file or directory", "loginctl enable-linger"),
        (1, "Failed to enable unit: Access denied", "Access denied"),
        (127, "", "needs systemd"),
    ],
)
def test_systemd_refuses(
    session: Session, engine: Engine, work: Path, systemctl: FakeSystemctl, status: int, says: str, told: str
) -> None:
    """One line says what and why, and nothing is left."""
    systemctl.answers(status, says)
    with pytest.raises(DeviceError, match=told) as raised:
        install(session, service_job(engine), "door")
    assert "\n" not in str(raised.value)
    assert not (work / "services" / "door").exists()


def test_what_is_no_service(session: Session, engine: Engine, work: Path, systemctl: FakeSystemctl) -> None:
    """A name that leaves its folder, what fills the disk, ends, or is not at the same place; a file of the host's."""
    for name in ("../door", "Door", "", "-x", "a b", "door\n", "x" * 33):
        with pytest.raises(DeviceError, match="no name"):
            install(session, service_job(engine), name)
        with pytest.raises(DeviceError, match="no name"):
            remove_service(session, name)
    for field in ("save", "snapshots", "jsonl"):
        with pytest.raises(DeviceError, match="fill the device's disk"):
            install(session, service_job(engine, **{field: "x"}), "door")
    for field in ("max_frames", "max_seconds"):
        with pytest.raises(DeviceError, match="is started again"):
            install(session, service_job(engine, **{field: 5}), "door")
    with pytest.raises(DeviceError, match="--listen"):
        listen = {"host": "127.0.0.1", "port": 0, "token": None}
        install(session, service_job(engine, listen=listen), "door")
    with pytest.raises(DeviceError, match="copy the file"):
        install(session, service_job(engine, "files/0123.avi"), "door")
    assert systemctl.calls == []
    assert not (work / "services").exists()


def test_over_ssh(tmp_path: Path, work: Path, model: Path, agent_python: Callable[[str], str]) -> None:
    """Installed and removed on another machine, under Python 3.6."""
    fake = FakeSystemctl(tmp_path / "systemd")
    server = Sshd(tmp_path / "sshd", {"PATH": f"{fake.path}:/usr/bin:/bin"})
    transport = Ssh("board", str(work), agent_python("3.6"), server.config)
    session = Session(load_target("jetson-nano").without_tensorrt(), transport)
    try:
        service = install(session, service_job(session.build(model)), "door")
        assert fake.calls[-1] == "--user restart edgeprune-door.service"
        assert f'ExecStart="{agent_python("3.6")}" services/door/agent.zip' in service.text
        assert f"WorkingDirectory={work.resolve()}\n" in service.text
        assert Path(service.path).is_file()
        remove_service(session, "door")
        assert fake.calls[-3] == "--user disable --now edgeprune-door.service"
        assert not Path(service.path).parent.exists()
    finally:
        transport.close()
        server.stop()


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say; paths that it would read otherwise are refused."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed: the unit was not checked")
    work = tmp_path / "a work folder, ü #;"
    work.mkdir()
    python = work / "python3"
    python.symlink_to(sys.executable)
    found = {"python": str(python), "work": str(work)}
    unit = tmp_path / "edgeprune-door.service"
    unit.write_text(camera_service._unit_text(found, "services/door", "door"))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    command = ["systemd-analyze", "--user", "verify", str(unit)]
    checked = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    ours = [line for line in checked.stderr.splitlines() if "edgeprune" in line or "python3" in line]
    assert (checked.returncode, ours) == (0, [])
    for sign in "\"'\\%$\n":
        for path in ({"python": f"/a{sign}b"}, {"work": f"/a{sign}b"}):
            with pytest.raises(DeviceError, match="systemd reads otherwise"):
                camera_service._unit_text({**found, **path}, "services/door", "door")


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user's systemd of the test's own, with a unit whose times are shorter.

    With control groups of version 1 it is not told when a group is empty, and waits for TimeoutStopSec.
    """
    with real_systemd(tmp_path / "systemd") as environment:
        if environment is None:
            pytest.skip("a systemd of the test's own needs root and control groups: the unit was not run")
        for name in ("XDG_RUNTIME_DIR", "HOME"):
            monkeypatch.setenv(name, environment[name])
        for name in ("XDG_CONFIG_HOME", "DBUS_SESSION_BUS_ADDRESS"):
            monkeypatch.delenv(name, raising=False)
        quick = camera_service.UNIT
        for line, shorter in (("RestartSec=30", 1), ("WatchdogSec=30", 4), ("TimeoutStopSec=20", 6)):
            assert line in quick
            quick = quick.replace(line, f"{line.partition('=')[0]}={shorter}")
        monkeypatch.setattr(camera_service, "UNIT", quick)
        yield


def property_of(unit: str, name: str) -> str:
    command = ["systemctl", "--user", "show", "--property", name, "--value", unit]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_real_systemd_runs_it(session: Session, engine: Engine, work: Path, systemd: None) -> None:
    """Started, restarted after a crash and after a hang, stopped in order; no process is left."""
    network = MjpegServer(30)
    job = service_job(engine, f"http://127.0.0.1:{network.port}/", listen=None)
    service = install(session, job, "door")
    unit = service.unit
    assert property_of(unit, "ActiveState") == "active"
    assert property_of(unit, "UnitFileState") in ("enabled", "linked")
    assert property_of(unit, "StartLimitIntervalUSec") == "0"  # it never gives up

    first = int(property_of(unit, "MainPID"))
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: property_of(unit, "NRestarts") == "1", "it is not started again", 40)
    wait_for(lambda: property_of(unit, "ActiveState") == "active", "it does not come back")
    assert descendants(first) == {}

    hanging = int(property_of(unit, "MainPID"))
    assert hanging != first
    for process in descendants(hanging):
        os.kill(process, signal.SIGSTOP)
    wait_for(lambda: property_of(unit, "NRestarts") == "2", "a camera that hangs is not noticed", 40)
    wait_for(lambda: property_of(unit, "ActiveState") == "active", "it does not come back")

    processes = descendants(int(property_of(unit, "MainPID")))
    assert processes
    result = work / "services" / "door" / "result.json"
    assert not result.exists()  # removed at the start, written at the end
    subprocess.run(["systemctl", "--user", "stop", unit], check=True)
    assert json.loads(result.read_text())["result"]["ended"] == "stopped"
    subprocess.run(["systemctl", "--user", "start", unit], check=True)
    remove_service(session, "door")
    assert property_of(unit, "LoadState") == "not-found"
    wait_for(lambda: not any(Path(f"/proc/{number}").exists() for number in processes), "it is left running")
    network.close()


def test_a_real_systemd_and_no_camera(session: Session, engine: Engine, work: Path, systemd: None) -> None:
    """A camera that does not start says why, at once, and no service is left behind."""
    start = time.monotonic()
    with pytest.raises(DeviceError, match="/dev/video77"):
        install(session, service_job(engine, "/dev/video77", listen=None), "door")
    assert time.monotonic() - start < 60
    assert not (work / "services" / "door").exists()
    assert property_of("edgeprune-door.service", "LoadState") == "not-found"


def test_a_real_systemd_has_the_old_camera_again(
    session: Session, engine: Engine, work: Path, systemd: None
) -> None:
    """A new one that gives no frame leaves the old one running; one that does not start either is said to be back."""
    network = MjpegServer(30)
    unit, folder = "edgeprune-door.service", work / "services" / "door"
    address = f"http://127.0.0.1:{network.port}/"
    install(session, service_job(engine, address, listen=None), "door")
    first = property_of(unit, "MainPID")
    missing = service_job(engine, "/dev/video77", listen=None)
    with pytest.raises(DeviceError, match=r"/dev/video77.*; the service that was there before runs again"):
        install(session, missing, "door")
    assert property_of(unit, "ActiveState") == "active"
    assert property_of(unit, "MainPID") not in (first, "0")
    assert source_of(folder) == address
    network.close()
    with pytest.raises(DeviceError, match=r"is back and does not start either: .*Connection refused"):
        install(session, missing, "door")
    assert source_of(folder) == address
    network = MjpegServer(30, network.port)
    wait_for(lambda: property_of(unit, "ActiveState") == "active", "systemd does not go on trying", 40)
    remove_service(session, "door")
    network.close()
    assert not list(folder.parent.iterdir())
