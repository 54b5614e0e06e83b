"""Addresses of sources: what they mean, what is refused, and what nobody may read."""

import os
from pathlib import Path
from urllib.parse import quote

import cv2
import pytest
from camera_jobs import frames
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.deploy.device.camera import sources
from edgeprune.deploy.device.camera.sources import find_source, opening_failure
from edgeprune.deploy.device.errors import AgentError

SETTINGS = {"width": 1280, "height": 720, "fps": 30}


@pytest.fixture
def jetson(monkeypatch: pytest.MonkeyPatch) -> None:
    """A board whose OpenCV and GStreamer have everything."""
    monkeypatch.setattr(sources, "opencv_has", lambda part: True)
    monkeypatch.setattr(sources, "element_exists", lambda element: True)


@pytest.mark.usefixtures("jetson")
def test_a_csi_camera_is_nvidias_pipeline() -> None:
    """The string is that of NVIDIA's documentation, with the newest frame only at its end."""
    source = find_source("csi://1", SETTINGS)
    assert source.place == (
        "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM),format=NV12,width=1280,height=720,"
        "framerate=30/1 ! nvvidconv ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=BGR ! "
        "appsink drop=1 max-buffers=1 sync=false"
    )
    assert source.live


@pytest.mark.parametrize("missing", ["nvarguscamerasrc", "nvvidconv", "videoconvert", "appsink"])
@pytest.mark.usefixtures("jetson")
def test_every_element_is_looked_for_first(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline with any element missing is never opened, which could hang for ever."""
    monkeypatch.setattr(sources, "element_exists", lambda element: element != missing)
    with pytest.raises(AgentError, match=missing) as raised:
        find_source("csi://0", SETTINGS)
    assert raised.value.remedy


@pytest.mark.parametrize(
    "address",
    [
        "csi://x",
        "csi://0\n",
        "csi://0 ! filesink location=x",
        "ftp://camera/",
        "rtsp://",
        "rtsp:///live",
        "http://camera:99999/",
        "http://camera:port/",
        "rtsp://camera/li ve",
        "rtsp://camera/$(reboot)\n",
        "rtsp://camera/`reboot`",
        'rtsp://camera/" ! filesink',
        "file:///etc/passwd",
        "concat://a|b",
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    """The answer lists what there is, and does not repeat an address that may hold a password."""
    with pytest.raises(AgentError) as raised:
        find_source(address, SETTINGS)
    assert raised.value.kind == "source"
    assert "csi://0, /dev/video0" in raised.value.remedy


def test_sizes_are_numbers_before_they_enter_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text of a job becomes a part of a GStreamer pipeline."""
    monkeypatch.setattr(sources, "opencv_has", lambda part: True)
    with pytest.raises(ValueError, match="invalid literal"):
        find_source("test://", {**SETTINGS, "width": "1 ! filesink location=x"})


SECRETS = st.text("abcdefghijkXYZ0189-._~!$&()*+,;=:", min_size=8, max_size=20)


@given(user=SECRETS, password=SECRETS, key=SECRETS, scheme=st.sampled_from(["rtsp", "http", "https"]))
def test_labels_hold_no_secret(user: str, password: str, key: str, scheme: str) -> None:
    """Of an address with user, password and query people see scheme, host, port and path alone."""
    address = f"{scheme}://{quote(user)}:{quote(password)}@camera.local:8554/live?key={quote(key)}"
    source = find_source(address, SETTINGS)
    assert source.place == address
    assert source.label == f"{scheme}://camera.local:8554/live"


def test_what_libraries_print_about_an_address_is_not_shown() -> None:
    """FFmpeg may print the whole address; the error has only the label."""
    source = find_source("rtsp://user:Zk8pass@127.0.0.1:9/live", SETTINGS)
    error = opening_failure(source, "error: rtsp://user:Zk8pass@127.0.0.1:9/live refused")
    assert "Zk8" not in error.message + error.remedy


def test_stored_sources_are_told_apart(tmp_path: Path) -> None:
    """A file gives every frame, a folder its images; a named pipe is live; nothing else is there."""
    (tmp_path / "clip.avi").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.JPG"), frames(1)[0])
    kinds = {name: find_source(str(tmp_path / name), SETTINGS) for name in ("clip.avi", "pipe", "images")}
    assert [(source.kind, source.live) for source in kinds.values()] == [
        ("video", False),
        ("pipe", True),
        ("images", False),
    ]
    with pytest.raises(AgentError, match="holds no image"):
        find_source(str(tmp_path / "empty"), SETTINGS)
    with pytest.raises(AgentError, match="no file or folder"):
        find_source(str(tmp_path / "none"), SETTINGS)


def test_missing_cameras_name_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error lists the cameras that were found."""
    monkeypatch.setattr(sources.system, "ROOT", str(tmp_path))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "video2").touch()
    with pytest.raises(AgentError, match="no camera at /dev/video0; found: video2"):
        find_source("/dev/video0", SETTINGS)
    assert find_source("/dev/video2", SETTINGS).kind == "usb"


def test_a_camera_without_permission_names_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is the one command that helps."""
    monkeypatch.setattr(sources.system, "ROOT", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "video0").touch()
    with pytest.raises(AgentError, match="may not use /dev/video0") as raised:
        find_source("/dev/video0", SETTINGS)
    assert "usermod -aG video" in raised.value.remedy


@pytest.mark.parametrize(
    ("said", "kind"),
    [("(Argus) Error: Failed to create CaptureSession", "busy"), ("No cameras available", "camera")],
)
@pytest.mark.usefixtures("jetson")
def test_argus_failures_are_told_apart(said: str, kind: str) -> None:
    """A CSI camera that another program uses is busy; else there is none."""
    assert opening_failure(find_source("csi://0", SETTINGS), said).kind == kind
