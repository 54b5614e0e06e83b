"""Capture: every frame of what is stored, the newest of what is live, whatever happens to its process."""

import contextlib
import http.server
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from camera_jobs import MjpegServer, descendants, frames, read_video, wait_for, write_video

from edgeprune.deploy.device.camera.capture import Capture, Frame
from edgeprune.deploy.device.camera.sources import find_source
from edgeprune.deploy.device.errors import AgentError

SETTINGS = {"width": 64, "height": 48, "fps": 30}


def capture(address: object) -> Capture:
    return Capture(find_source(str(address), SETTINGS), SETTINGS)


def take(captured: Capture) -> Frame:
    """The next frame, waited for."""
    give_up_at = time.monotonic() + 20
    while (frame := captured.next(0.5)) is None:
        assert time.monotonic() < give_up_at, "no frame came"
        assert not captured.ended
    return frame


def read_all(captured: Capture) -> Iterator[Frame]:
    while not captured.ended:
        if frame := captured.next(0.5):
            yield frame


def captures() -> list[int]:
    return [number for number, command in descendants(os.getpid()).items() if ".camera.capture" in command]


def test_every_frame_of_a_video_comes_once(tmp_path: Path) -> None:
    """A file's frames are those of OpenCV in this process, in order, however slow they are taken."""
    video = write_video(tmp_path / "clip.avi", 60, fps=12.5)
    with capture(video) as captured:
        for number, (frame, expected) in enumerate(zip(read_all(captured), read_video(video), strict=True)):
            assert frame.number == number
            assert np.array_equal(frame.image, expected)
            time.sleep(0.01 if number < 20 else 0)
        assert captured.dropped == 0
        assert captured.fps == 12.5
    assert not captures()


def test_a_stored_frame_arrives_when_it_is_asked_for(tmp_path: Path) -> None:
    """It is read ahead while the one before is worked on, which is no latency of its own."""
    with capture(write_video(tmp_path / "clip.avi", 8)) as captured:
        ages_s = []
        for _ in range(8):
            frame = take(captured)
            ages_s.append(time.monotonic() - frame.arrival_s)
            time.sleep(0.2)
    assert 0 < np.median(ages_s) < 0.05


def test_images_of_a_folder_come_in_order_and_may_differ_in_size(tmp_path: Path) -> None:
    """Larger and smaller images follow each other without damage; other files are left out."""
    sizes = [(64, 48), (200, 100), (10, 10), (300, 300), (64, 48)]
    for number, size in enumerate(sizes):
        image = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{number}.png"), image)
    (tmp_path / "notes.txt").write_text("no image")
    with capture(tmp_path) as captured:
        for number, frame in enumerate(read_all(captured)):
            assert np.array_equal(frame.image, cv2.imread(str(tmp_path / f"{number}.png")))
    assert frame.number == len(sizes) - 1


def test_a_live_source_gives_the_newest_frame() -> None:
    """Taken ten times slower than it comes, a frame is never older than the next one: the rest is dropped."""
    server = MjpegServer(fps=50)
    with capture(f"http://127.0.0.1:{server.port}/") as captured:
        first = take(captured)
        ages_s, numbers = [], [first.number]
        for _ in range(10):
            time.sleep(0.2)
            frame = take(captured)
            ages_s.append(time.monotonic() - frame.arrival_s)
            numbers.append(frame.number)
        dropped = captured.dropped
    server.close()
    assert np.median(ages_s) < 0.03  # 20 ms lie between frames
    assert dropped > 50
    assert numbers[-1] == len(numbers) - 1 + dropped
    assert not captures()


def test_a_network_camera_is_reached_again() -> None:
    """When it dies and comes back, frames go on and numbers go on."""
    server = MjpegServer(fps=50)
    with capture(f"http://127.0.0.1:{server.port}/") as captured:
        before = [take(captured).number for _ in range(3)]
        server.close()
        start = time.monotonic()
        while not captured.next(0.1) and captured._process:
            assert time.monotonic() < start + 20
        time.sleep(0.1)
        server = MjpegServer(fps=50, port=server.port)
        wait_for(lambda: captured.next(0.2) and captured.reconnects, "it was not reached again")
        after = take(captured).number
    server.close()
    assert captured.reconnects == 1
    assert after > before[-1]


def test_a_wrong_address_is_told_from_one_that_is_not_there() -> None:
    """A server without that page answers, a closed port refuses: the first attempt is an error with a remedy."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # 501 to everything
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    with capture(address) as captured, pytest.raises(AgentError, match="answers, but gives no video"):
        take(captured)
    server.shutdown()
    server.server_close()
    thread.join()
    with (
        capture(address) as captured,
        pytest.raises(AgentError, match="cannot be reached: Connection refused"),
    ):
        take(captured)


def test_an_address_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes the connection and says nothing is not waited for longer than a camera may need."""
    from edgeprune.deploy.device.camera import capture as module

    monkeypatch.setattr(module, "OPENING_S", 1.0)
    monkeypatch.setattr(module, "END_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for scheme in ("rtsp", "http"):
            address = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/"
            start_s = time.monotonic()
            with capture(address) as captured, pytest.raises(AgentError, match="answers, but gives no video"):
                take(captured)
            assert time.monotonic() - start_s < 5
    assert not captures()


def test_a_capture_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation is not taken for a broken video."""
    (tmp_path / "cv2.py").write_text("raise RuntimeError('libGL is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = r"clip\.avi: its capture process ended: .*libGL is missing"
    video = write_video(tmp_path / "clip.avi", 3)
    with capture(video) as captured, pytest.raises(AgentError, match=said):
        take(captured)


def test_attempts_to_reach_a_camera_become_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt waits twice as long as the one before, up to a limit."""
    from edgeprune.deploy.device.camera import capture as module

    monkeypatch.setattr(module, "BACK_OFF_S", (0.1, 0.4))
    server = MjpegServer(fps=50)
    with capture(f"http://127.0.0.1:{server.port}/") as captured:
        take(captured)
        server.close()
        pauses_s = []
        while len(pauses_s) < 4:
            running = captured._process
            captured.next(0.05)
            if running and not captured._process:
                pauses_s.append(captured._retry_s - time.monotonic())
    assert pauses_s == pytest.approx([0.1, 0.2, 0.4, 0.4], abs=0.02)


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[tuple[Path, threading.Event]]:
    """A named pipe that stands for a camera: frames come at 50 a second until it is unplugged."""
    path, unplugged = tmp_path / "camera", threading.Event()
    os.mkfifo(path)
    content = write_video(tmp_path / "clip.avi", 200).read_bytes()
    step = len(content) // 200

    def write() -> None:
        with path.open("wb", buffering=0) as file, contextlib.suppress(BrokenPipeError):
            for start in range(0, len(content), step):
                file.write(content[start : start + step])
                if unplugged.wait(0.02):
                    return
            unplugged.wait()

    thread = threading.Thread(target=write)
    thread.start()
    yield path, unplugged
    unplugged.set()
    thread.join()


def test_an_unplugged_camera_is_one_clear_line(pipe: tuple[Path, threading.Event]) -> None:
    """The error says which camera, and after how many frames."""
    path, unplugged = pipe
    with capture(path) as captured:
        taken = [take(captured) for _ in range(3)]
        unplugged.set()
        with pytest.raises(
            AgentError, match=rf"{path} broke off after .* frames: no more frames came"
        ) as raised:
            while True:
                captured.next(0.5)
    assert len(taken) == 3
    assert raised.value.kind == "camera"
    assert "plugged in" in raised.value.remedy
    assert not captures()


def test_a_capture_process_that_dies_is_one_clear_line(pipe: tuple[Path, threading.Event]) -> None:
    """A driver that crashes takes only its own process with it."""
    with capture(pipe[0]) as captured:
        take(captured)
        (process,) = captures()
        os.kill(process, signal.SIGKILL)
        with pytest.raises(AgentError, match=r"broke off after .* frames: its capture process ended"):
            while True:
                captured.next(0.5)
    assert not captures()


def test_a_camera_that_hangs_is_ended(
    pipe: tuple[Path, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a frame for too long the process is ended by force, and the error says for how long it hung."""
    from edgeprune.deploy.device.camera import capture as module

    monkeypatch.setattr(module, "STALLED_S", 1.0)
    monkeypatch.setattr(module, "END_S", 0.2)
    with capture(pipe[0]) as captured:
        take(captured)
        (process,) = captures()
        os.kill(process, signal.SIGSTOP)
        with pytest.raises(AgentError, match="no frame came for 1 s"):
            while True:
                captured.next(0.5)
    assert not captures()


def test_a_source_may_take_its_time_to_close(pipe: tuple[Path, threading.Event]) -> None:
    """One that needs more than two seconds, as Argus may, is closed in order and not killed."""
    with capture(pipe[0]) as captured:
        take(captured)
        assert captured._process
        process = captured._process._process
        process.send_signal(signal.SIGSTOP)
        goes_on = threading.Timer(2.5, process.send_signal, [signal.SIGCONT])
        goes_on.start()
    goes_on.join()
    assert process.returncode == 0


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    """What came before is given; the error names the file."""
    cv2.imwrite(str(tmp_path / "1.png"), frames(1)[0])
    (tmp_path / "2.jpg").write_bytes(b"\xff\xd8 broken")
    with capture(tmp_path) as captured:
        assert take(captured).number == 0
        with pytest.raises(AgentError, match=r"2\.jpg does not decode as an image"):
            take(captured)


def test_a_file_that_is_no_video_is_named(tmp_path: Path) -> None:
    """The error says that it does not open, not that nothing was found."""
    (tmp_path / "notes.avi").write_text("no video")
    with (
        capture(tmp_path / "notes.avi") as captured,
        pytest.raises(AgentError, match=r"notes\.avi does not open"),
    ):
        take(captured)
