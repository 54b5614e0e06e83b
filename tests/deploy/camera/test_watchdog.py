"""What systemd hears of the camera, on a socket of our own."""

import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from camera_jobs import write_video

from edgeprune.deploy.device.camera.watchdog import Watchdog
from edgeprune.deploy.errors import DeviceError


def listen(address: str) -> socket.socket:
    systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    systemd.bind(address)
    systemd.settimeout(5)
    return systemd


@pytest.mark.parametrize("abstract", [False, True])
def test_it_speaks_three_times_in_a_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    """READY=1 at once, then WATCHDOG=1 a third of WATCHDOG_USEC apart, however often it is called."""
    name = f"@{tmp_path}" if abstract else str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    with listen(name.replace("@", "\0") if abstract else name) as systemd:
        watchdog = Watchdog()
        watchdog.ready()
        assert systemd.recv(100) == b"READY=1"
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            watchdog.alive()
            time.sleep(0.001)
        heard = 0
        while select.select([systemd], [], [], 0)[0]:
            assert systemd.recv(100) == b"WATCHDOG=1"
            heard += 1
        assert 3 <= heard <= 5  # at 0, 0.2, 0.4, 0.6 and 0.8 s


def test_it_never_holds_the_camera_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A systemd that reads nothing, and one that is gone, cost no time and no error."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "1")
    with listen(str(tmp_path / "notify")):
        watchdog = Watchdog()
        start = time.monotonic()
        for _ in range(2000):  # more than any queue takes
            watchdog.alive()
        assert time.monotonic() - start < 5
    watchdog.ready()


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """No NOTIFY_SOCKET, no watchdog in the unit: calls do nothing."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    watchdog = Watchdog()
    watchdog.ready()
    watchdog.alive()


def test_the_camera_is_ready_with_its_first_frame(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd hears READY=1 of a video that plays, and nothing of one that is broken."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    broken = tmp_path / "broken.avi"
    broken.write_bytes(b"RIFF")
    with listen(str(tmp_path / "notify")) as systemd:
        with pytest.raises(DeviceError):
            run(broken)
        systemd.setblocking(False)
        with pytest.raises(BlockingIOError):
            systemd.recv(100)
        run(write_video(tmp_path / "video.avi", 5))
        assert systemd.recv(100) == b"READY=1"
        with pytest.raises(BlockingIOError):
            systemd.recv(100)
