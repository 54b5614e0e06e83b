"""Over a real sshd on loopback, to a stand-in Jetson: the whole way, and what may go wrong on it."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_model import write_model
from sshd import Sshd
from stand_in import StandIn

from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.errors import DeviceError
from edgeprune.deploy.session import Session, local_session
from edgeprune.deploy.targets import detect_target, load_target
from edgeprune.deploy.transport import Ssh

PREPROCESSING = Preprocessing("rgb", (100.0, 110.0, 120.0), (60.0, 60.0, 60.0), 30)
# A Jetson's CPU alone: TensorRT cannot run here, and the results say that they are not its.
TARGET = load_target("jetson-nano").without_tensorrt()


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path / "jetson")


@pytest.fixture
def start(tmp_path: Path, stand_in: StandIn) -> Iterator[Callable[..., Sshd]]:
    """Start an sshd whose commands see the stand-in Jetson."""
    servers: list[Sshd] = []

    def make(**environment: str) -> Sshd:
        servers.append(Sshd(tmp_path / f"sshd{len(servers)}", {**stand_in.environment, **environment}))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def ssh(work: Path, agent_python: Callable[[str], str]) -> Iterator[Callable[[Path], Ssh]]:
    """A transport to the host "board" of an ssh configuration."""
    made: list[Ssh] = []

    def make(config: Path) -> Ssh:
        made.append(Ssh("board", str(work), agent_python("3.6"), config))
        return made[-1]

    yield make
    for transport in made:
        transport.close()


def wait_for(condition: Callable[[], Any], failure: str) -> Any:
    give_up_at = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < give_up_at, failure
        time.sleep(0.05)
    return found


def in_background(call: Callable[[], Any]) -> Callable[[], DeviceError]:
    """Run a call that will fail; the returned function waits for its error."""
    errors: list[DeviceError] = []

    def run() -> None:
        with pytest.raises(DeviceError) as raised:
            call()
        errors.append(raised.value)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> DeviceError:
        thread.join(60)
        assert errors, "the call did not fail"
        return errors[0]

    return result


def sleeping_runtime(folder: Path) -> tuple[dict[str, str], Path]:
    """An environment in which builds sleep, and the file that then holds the child's process id."""
    folder.mkdir()
    marker = folder / "child.pid"
    (folder / "onnxruntime.py").write_text(
        "import os, time\n__version__ = '1.10.0'\nclass SessionOptions: pass\nclass InferenceSession:\n"
        f"    def __init__(self, *a, **k):\n        open({str(marker)!r}, 'w').write(str(os.getpid()))\n"
        "        time.sleep(60)\n"
    )
    return {"PYTHONPATH": str(folder)}, marker


def started(marker: Path) -> int:
    return int(wait_for(lambda: marker.exists() and marker.read_text(), "the build did not start"))


def gone(process: int) -> bool:
    path = Path(f"/proc/{process}/stat")
    return not path.exists() or path.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_the_whole_way(
    *,
    start: Callable[..., Sshd],
    ssh: Callable[[Path], Ssh],
    stand_in: StandIn,
    work: Path,
    model: Path,
    images: dict[int, Path],
) -> None:
    """Probe, build, benchmark and evaluation over SSH under Python 3.6, power mode and clocks held for what is timed.

    Detections are those of a local agent in the same Python; nothing stays changed on the board. A user who is not
    root sees the kernel's clocks where tegrastats has none, and no placeholder for a temperature.
    """
    transport = ssh(start().config)
    session = Session(TARGET, transport, power_mode="5W", lock_clocks=True)
    info = session.probe()
    assert info.board == "stand-in for NVIDIA Jetson Nano Developer Kit"
    assert (info.l4t, info.transport, info.backend) == ("32.7.6", "board", "onnxruntime")
    assert info.python.startswith("3.6.")
    assert (info.power_mode, info.power_modes, info.clocks_locked) == ("MAXN", ("5W", "MAXN"), False)
    assert info.memory_mib["total"] == 3964
    assert info.temperatures_c == {"CPU-therm": 23.0}
    assert detect_target(info).name == "jetson-nano"
    assert TARGET.fitted(info).memory_mib == 3964

    engine = session.build(model)
    assert engine.device == info.board
    latencies = session.benchmark([engine], list(images.values()), PREPROCESSING, runs=10, min_seconds=1.5)
    assert len(latencies.samples_ms(0, "end_to_end")) >= 10
    assert latencies.telemetry["before"] == {"power_mode": "5W", "clocks_locked": True}
    assert latencies.telemetry["after"] == {"power_mode": "5W", "clocks_locked": True}
    sample = latencies.telemetry["samples"][-1]
    assert (sample["gpu_percent"], sample["power_mw"]["POM_5V_IN"]) == (61, 933)
    assert (sample["gpu_mhz"], sample["cpu_mhz"]) == ([460.8], [1428.0])
    assert sample["temperatures_c"] == {
        "CPU-therm": 23.0,
        "pll": 20.5,
        "cpu": 23,
        "gpu": 22.5,
        "thermal": 22.5,
    }
    assert (stand_in.power_mode, stand_in.clocks_locked) == ("0", False)
    held = [
        *(
            "nvpmodel -m 1",
            "jetson_clocks --store",
            "jetson_clocks ",
            "jetson_clocks --restore",
            "nvpmodel -m 0",
        )
    ]
    assert stand_in.calls == held
    assert session.profile(engine, images[100], PREPROCESSING).times_ms
    assert stand_in.calls == held * 2

    found = session.evaluate(engine, images, PREPROCESSING)
    here = local_session(load_target("host"), work.with_name("here"))
    expected = here.evaluate(here.build(model), images, PREPROCESSING)
    for ours, theirs in zip(expected.detections, found.detections, strict=True):
        assert np.allclose(ours.boxes, theirs.boxes, atol=1e-4)
        assert np.allclose(ours.scores, theirs.scores, atol=2e-3)
    assert {check.name for check in session.doctor()} >= {"power mode", "clocks", "swap", "desktop session"}
    assert session.clean() > 0
    assert not any((work / "engines").iterdir())


def test_only_what_the_device_lacks_is_sent(
    start: Callable[..., Sshd], ssh: Callable[[Path], Ssh], work: Path, tmp_path: Path
) -> None:
    """A file that is there is not sent again; one that was damaged there is."""
    server = start()
    (tmp_path / "big").write_bytes(np.random.default_rng(0).bytes(3 << 20))
    ssh(server.config).put({"files/big": tmp_path / "big"})
    narrow = ssh(server.write_config("narrow", cut_after_bytes=1 << 20))
    narrow.put({"files/big": tmp_path / "big"})
    damaged = bytearray((work / "files/big").read_bytes())
    damaged[1000] ^= 1
    (work / "files/big").write_bytes(damaged)
    ssh(server.config).put({"files/big": tmp_path / "big"})
    assert (work / "files/big").read_bytes() == (tmp_path / "big").read_bytes()


def test_a_cut_transfer_goes_on_where_it_ended(
    start: Callable[..., Sshd], ssh: Callable[[Path], Ssh], work: Path, tmp_path: Path
) -> None:
    """The link breaks in the middle: one line, nothing half-written; the second try sends the rest alone."""
    server = start()
    content = np.random.default_rng(0).bytes(8 << 20)
    (tmp_path / "big").write_bytes(content)
    with pytest.raises(DeviceError, match=r"connection to board was lost.*goes on") as raised:
        ssh(server.write_config("weak", cut_after_bytes=6 << 20)).put({"files/big": tmp_path / "big"})
    assert raised.value.kind == "connection"
    assert not (work / "files/big").exists()
    # This connection would break too if all of it were sent again.
    ssh(server.write_config("rest", cut_after_bytes=6 << 20)).put({"files/big": tmp_path / "big"})
    assert (work / "files/big").read_bytes() == content
    assert not (work / "files/big.part").exists()


def test_a_link_that_breaks_during_a_build_ends_it(
    *,
    start: Callable[..., Sshd],
    ssh: Callable[[Path], Ssh],
    model: Path,
    tmp_path: Path,
) -> None:
    """Host and board both notice; the board is free again and the rerun completes."""
    environment, marker = sleeping_runtime(tmp_path / "fake")
    server = start(**environment)
    error = in_background(lambda: Session(TARGET, ssh(server.config)).build(model))
    child = started(marker)
    server.cut()
    assert error().kind == "connection"
    wait_for(lambda: gone(child), "the build went on without its host")
    assert Session(TARGET, ssh(start().config), lock_wait_s=10).build(model)


def test_an_agent_that_is_killed_is_told_from_a_lost_link(
    *, start: Callable[..., Sshd], ssh: Callable[[Path], Ssh], model: Path, tmp_path: Path
) -> None:
    """137, as the kernel kills for memory: said as such, and what the agent had started ends with it."""
    environment, marker = sleeping_runtime(tmp_path / "fake")
    error = in_background(lambda: Session(TARGET, ssh(start(**environment).config)).build(model))
    child = started(marker)
    parent = int(Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(parent, signal.SIGKILL)
    assert error().kind == "killed"
    assert "137" in str(error())
    wait_for(lambda: gone(child), "the child outlived its agent")
    assert Session(TARGET, ssh(start().config)).build(model)


def test_power_and_clocks_are_put_back_after_a_kill(
    *,
    start: Callable[..., Sshd],
    ssh: Callable[[Path], Ssh],
    stand_in: StandIn,
    model: Path,
    images: dict[int, Path],
    tmp_path: Path,
) -> None:
    """A failing benchmark puts them back at once; after a kill the next job does."""
    engine = Session(TARGET, ssh(start().config)).build(model)
    environment, marker = sleeping_runtime(tmp_path / "fake")
    session = Session(TARGET, ssh(start(**environment).config), power_mode="5W", lock_clocks=True)
    error = in_background(lambda: session.benchmark([engine], list(images.values()), PREPROCESSING))
    child = started(marker)
    assert (stand_in.power_mode, stand_in.clocks_locked) == ("1", True)
    os.kill(child, signal.SIGKILL)
    assert error().kind == "killed"
    assert (stand_in.power_mode, stand_in.clocks_locked) == ("0", False)

    marker.unlink()
    error = in_background(lambda: session.benchmark([engine], list(images.values()), PREPROCESSING))
    parent = int(Path(f"/proc/{started(marker)}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(parent, signal.SIGKILL)
    assert error().kind == "killed"
    assert (stand_in.power_mode, stand_in.clocks_locked) == ("1", True)
    Session(TARGET, ssh(start().config)).build(model)
    assert (stand_in.power_mode, stand_in.clocks_locked) == ("0", False)


def test_an_unknown_power_mode_lists_the_known(
    start: Callable[..., Sshd],
    ssh: Callable[[Path], Ssh],
    stand_in: StandIn,
    model: Path,
    images: dict[int, Path],
) -> None:
    """A wrong name changes nothing on the board."""
    session = Session(TARGET, ssh(start().config), power_mode="TURBO")
    engine = session.build(model)
    with pytest.raises(DeviceError, match=r"unknown power mode 'TURBO'.*5W, MAXN"):
        session.benchmark([engine], list(images.values()), PREPROCESSING)
    assert stand_in.calls == []


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"key": "stranger"}, "key", "ssh-copy-id board"),
        ({"known": "other_host"}, "host-key", "host key of board has changed"),
        ({"known": None}, "host-key", "not known; look at it and accept it with `ssh board`"),
        ({"port": 1}, "unreachable", "cannot be reached"),
    ],
)
def test_a_connection_that_is_refused(
    start: Callable[..., Sshd], ssh: Callable[[Path], Ssh], settings: Mapping[str, Any], kind: str, said: str
) -> None:
    """Key, host key, network: each is told apart and says what to do, without a question asked."""
    config = start().write_config("bad", **settings)
    with pytest.raises(DeviceError, match=said) as raised:
        Session(TARGET, ssh(config)).probe()
    assert raised.value.kind == kind
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("host", ["-oProxyCommand=true", "-v", "", " "])
def test_a_host_that_reads_as_an_option_is_refused(host: str) -> None:
    """No host name can become an option of ssh."""
    with pytest.raises(DeviceError, match="no host name"):
        Ssh(host)


def test_a_folder_that_cannot_be_written_is_said(
    start: Callable[..., Sshd], agent_python: Callable[[str], str]
) -> None:
    """A read-only home, here a folder of the kernel's: one line that names --device-folder."""
    transport = Ssh("board", "/sys/edgeprune", agent_python("3.6"), start().config)
    with pytest.raises(DeviceError, match="--device-folder") as raised:
        Session(TARGET, transport).probe()
    assert raised.value.kind == "disk"
    transport.close()


def test_a_full_disk_is_said(
    start: Callable[..., Sshd], ssh: Callable[[Path], Ssh], work: Path, tmp_path: Path
) -> None:
    """Before anything is sent, and when the disk fills up meanwhile; afterwards there is room again."""
    work.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "none", work], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        transport = ssh(start().config)
        (tmp_path / "big").write_bytes(bytes(20 << 20))
        with pytest.raises(
            DeviceError, match=r"disk is full: 20 MiB are to be sent.*edgeprune device clean"
        ) as raised:
            transport.put({"files/big": tmp_path / "big"})
        assert raised.value.kind == "disk"
        assert not list(work.rglob("big*"))
        (work / "ballast").write_bytes(bytes((80 << 20) - 4096))
        with pytest.raises(DeviceError, match="disk is full"):
            Session(TARGET, transport).probe()
        (work / "ballast").unlink()
        assert Session(TARGET, transport).probe()
    finally:
        subprocess.run(["umount", "-l", work], check=True)


def test_a_clock_that_is_wrong_does_no_harm(
    start: Callable[..., Sshd], ssh: Callable[[Path], Ssh], work: Path, model: Path, images: dict[int, Path]
) -> None:
    """Files from 1970 and from 2099 on the device, as after a dead clock battery, are used as any."""
    session = Session(TARGET, ssh(start().config))
    engine = session.build(model)
    for index, path in enumerate(work.rglob("*")):
        os.utime(path, (0, 0) if index % 2 else (4.1e9, 4.1e9))
    assert session.build(model).reused
    assert session.evaluate(engine, images, PREPROCESSING).detections


def test_old_files_make_room(
    start: Callable[..., Sshd],
    ssh: Callable[[Path], Ssh],
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cache on the device has a limit: what was not used for longest goes first."""
    monkeypatch.setattr("edgeprune.deploy.transport.CACHE_LIMIT_BYTES", 2500)
    transport = ssh(start().config)
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    transport.put({"files/a": tmp_path / "a"})
    transport.put({"files/b": tmp_path / "b"})
    os.utime(work / "files/a", (2, 2))
    os.utime(work / "files/b", (1, 1))
    transport.put({"files/c": tmp_path / "c"})
    assert sorted(path.name for path in (work / "files").iterdir()) == ["a", "c"]


def test_many_models_share_one_connection(
    start: Callable[..., Sshd], ssh: Callable[[Path], Ssh], tmp_path: Path
) -> None:
    """The first command opens the connection, the others use it: sshd accepts one key only once."""
    server = start()
    session = Session(TARGET, ssh(server.config))
    for index in range(2):
        session.build(write_model(tmp_path / f"{index}.onnx", weight=0.01 + index))
    assert (server.folder / "sshd.log").read_text().count("Accepted publickey") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_port_leads_to_where_it_listens(
    host: str, start: Callable[..., Sshd], ssh: Callable[[Path], Ssh]
) -> None:
    """What listens there on one loopback address alone is reached from here, and only meanwhile."""
    transport = ssh(start().config)
    transport.run(["true"])
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listening:
        listening.settimeout(10)
        with (
            transport.forward(host, listening.getsockname()[1]) as here,
            socket.create_connection(here, 10) as near,
            listening.accept()[0] as far,
        ):
            near.sendall(b"to the device")
            assert far.recv(100) == b"to the device"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(here, 10)
