"""Jobs of the camera, and videos for it whose frames say their number."""

import contextlib
import http.server
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.records import Engine

PREPROCESSING = Preprocessing("rgb", (100.0, 110.0, 120.0), (60.0, 60.0, 60.0), 30)
DEFAULTS: dict[str, Any] = {
    "names": ["step 0"],
    "capture": {"width": 320, "height": 240, "fps": 30},
    "preprocessing": PREPROCESSING.to_json(),
    "listen": None,
    "save": None,
    "snapshots": None,
    "jsonl": False,
    "track": False,
    "max_frames": None,
    "max_seconds": None,
}


def camera_job(engine: Engine, source: object, **fields: Any) -> dict[str, Any]:
    job = {**DEFAULTS, "engines": [engine.to_json()], "source": str(source), **fields}
    return {"thresholds": [{"score": 0.3}] * len(job["names"]), **job}


def frames(count: int, size: tuple[int, int] = (64, 48)) -> list[np.ndarray]:
    """Flat pictures, each of a grey that says its number; ``(H, W, 3)`` uint8 of (W, H) `size`."""
    return [np.full((size[1], size[0], 3), 20 + number * 7 % 200, np.uint8) for number in range(count)]


def write_video(path: Path, count: int, size: tuple[int, int] = (64, 48), fps: float = 25.0) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, size)
    for frame in frames(count, size):
        writer.write(frame)
    writer.release()
    return path


def read_video(path: Path) -> list[np.ndarray]:
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    found = []
    while (read := video.read())[0]:
        found.append(read[1])
    return found


class MjpegServer:
    """A network camera: motion JPEG over HTTP at `fps`, frames as `frames` gives them, until it is closed.

    Attributes:
        opened: how often somebody began to look.
        viewers: who look now.
    """

    def __init__(self, fps: float, port: int = 0) -> None:
        pictures = [cv2.imencode(".jpg", frame)[1].tobytes() for frame in frames(50)]
        closed = self._closed = threading.Event()
        self.opened = self.viewers = 0
        camera = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera.opened += 1
                camera.viewers += 1
                try:
                    self._send()
                finally:
                    camera.viewers -= 1

            def _send(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                for number in itertools.count():
                    head = b"--frame\r\nContent-Type: image/jpeg\r\n\r\n"
                    self.wfile.write(head + pictures[number % len(pictures)] + b"\r\n")
                    if closed.wait(1 / fps):
                        return

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                pass  # the viewer left

        self._server = Server(("127.0.0.1", port), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()


def descendants(process: int) -> dict[int, str]:
    """The processes that a process started, and those that they did: number -> command line."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    found: dict[int, str] = {}
    new = {process}
    while new := {child for child, parent in parents.items() if parent in new}:
        for child in new:
            with contextlib.suppress(OSError):
                found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return found


def alive(process: int) -> bool:
    """Whether it runs; one that only waits to be buried does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], failure: str, limit_s: float = 20.0) -> None:
    give_up_at = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < give_up_at, failure
        time.sleep(0.02)
