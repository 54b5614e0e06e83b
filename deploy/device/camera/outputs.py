"""What a viewer gets of the boxes: a picture with them, a video, snapshots; each file whole or not at all."""

import os
import re
import shutil
import time
from typing import Any, List, Optional, Sequence, Tuple

import cv2
import numpy as np

from ..errors import AgentError
from ..files import CLEAN, inside
from .pipeline import Found

CODECS = {".avi": "MJPG", ".mp4": "mp4v"}
STORED_FPS = 25.0  # of the video of a stored source that does not say, as a folder
LIVE_FPS = 10.0  # of a live source's video: its frames come irregularly, and each costs time to encode
MOST_REPEATS = 10  # of one frame there, a second's: a night's outage would hang the camera and fill the disk
KEPT_FREE_BYTES = 64 << 20  # on the disk, for results and logs
KEPT_SNAPSHOTS = 1000  # the newest
SNAPSHOT = re.compile(r"\d{8}-\d{6}-\d{6,}\.jpg")  # local time, and the frame's number
COLOURS = ((60, 20, 200), (40, 130, 30), (190, 90, 0), (0, 100, 205), (160, 30, 130), (130, 120, 0))  # BGR


def annotate(image: np.ndarray, found: Found, title: str) -> np.ndarray:
    """A copy of ``(H, W, 3)`` uint8 BGR with boxes, ids and a title."""
    drawn: np.ndarray = image.copy()
    scale = max(0.4, image.shape[0] / 1200)
    for index, (box, score) in enumerate(zip(found.boxes, found.scores)):
        identity = found.ids[index] if found.ids else 0
        colour = COLOURS[identity % len(COLOURS)]
        x1, y1, x2, y2 = (int(round(float(value))) for value in box)
        cv2.rectangle(drawn, (x1, y1), (x2, y2), colour, max(2, image.shape[0] // 400))
        label = "{:.0f}%".format(100 * score)
        _label(drawn, "#{} {}".format(identity, label) if found.ids else label, (x1, y1), scale, colour)
    _label(drawn, title, (0, 0), 1.4 * scale, (32, 32, 32))
    return drawn


def _label(
    image: np.ndarray, text: str, corner: Tuple[int, int], scale: float, ground: Sequence[int]
) -> None:
    """White on a coloured ground that stands on a corner, or hangs from it at the picture's edge."""
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    x, bottom = corner[0], max(corner[1], height + below + 2)
    cv2.rectangle(image, (x, bottom - height - below - 2), (x + width + 4, bottom), ground, cv2.FILLED)
    at = (x + 2, bottom - below)
    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)


def check_space(folder: str) -> None:
    """Raise before the disk is full: a full one stops the board."""
    if shutil.disk_usage(folder).free < KEPT_FREE_BYTES:
        raise AgentError("disk", "the device's disk is full: the camera was ended", CLEAN)


class Video:
    """A video file that appears under its name when it is closed, and plays then.

    Args:
        path: inside the work folder; its ending says how it is written.
        live: frames come as they do: time is kept by leaving out and repeating some, but of an outage only a
            second is. Else every frame is written.

    Attributes:
        saved: the path, once the file is there.
    """

    def __init__(self, path: str, live: bool) -> None:
        self.saved: Optional[str] = None
        self._path = inside(path)
        root, ending = os.path.splitext(path)
        if ending.lower() not in CODECS:
            message = "a video is saved as {}, not as {!r}".format(" or ".join(sorted(CODECS)), path)
            raise AgentError("save", message, "choose another name")
        self._temporary = "{}.{}.tmp{}".format(root, os.getpid(), ending)
        self._codec = cv2.VideoWriter.fourcc(*CODECS[ending.lower()])
        self._live = live
        self._writer: Any = None
        self._start_s = 0.0
        self._written = 0

    def due(self, time_s: float) -> int:
        """How often a frame that came at `time_s` is to be written."""
        if not self._live:
            return 1
        if self._writer is None:
            self._start_s = time_s
        times = max(int((time_s - self._start_s) * LIVE_FPS) + 1 - self._written, 0)
        left_out = max(times - MOST_REPEATS, 0)
        self._start_s += left_out / LIVE_FPS
        return times - left_out

    def add(self, image: np.ndarray, times: int, source_fps: float) -> None:
        """Append a frame ``(H, W, 3)`` uint8 BGR, as often as `due` said; 0 FPS: the source does not say."""
        if self._writer is None:
            self._size = (image.shape[1], image.shape[0])
            fps = LIVE_FPS if self._live else source_fps or STORED_FPS
            self._writer = cv2.VideoWriter(self._temporary, self._codec, fps, self._size)
            if not self._writer.isOpened():
                message = "this OpenCV cannot write {}".format(self._path)
                raise AgentError("save", message, "choose a name that ends in .avi")
        if image.shape[1::-1] != self._size:  # a folder's images may differ
            image = cv2.resize(image, self._size)
        for _ in range(times):
            self._writer.write(image)
        self._written += times

    def close(self) -> None:
        """Finish the file; without a frame there is none."""
        if self._writer is not None:
            self._writer.release()
        if self._written:
            os.replace(self._temporary, self._path)
            self.saved = self._path
        elif os.path.exists(self._temporary):
            os.unlink(self._temporary)


class Snapshots:
    """A picture whenever something is seen, but not again before `cooldown_s`; the newest are kept."""

    def __init__(self, folder: str, cooldown_s: float) -> None:
        self._folder = inside(folder)
        self._cooldown_s = cooldown_s
        self._next_s = 0.0
        os.makedirs(folder, exist_ok=True)

    def due(self) -> bool:
        return time.monotonic() >= self._next_s

    def add(self, image: np.ndarray, number: int) -> None:
        self._next_s = time.monotonic() + self._cooldown_s
        name = "{}-{:06d}.jpg".format(time.strftime("%Y%m%d-%H%M%S"), number)
        path = os.path.join(self._folder, name)
        with open(path + ".tmp", "wb") as file:
            file.write(cv2.imencode(".jpg", image)[1].tobytes())
        os.replace(path + ".tmp", path)
        for old in self.paths()[:-KEPT_SNAPSHOTS]:
            os.unlink(old)

    def paths(self) -> List[str]:
        """The pictures, the oldest first."""
        names = sorted(name for name in os.listdir(self._folder) if SNAPSHOT.fullmatch(name))
        return [os.path.join(self._folder, name) for name in names]
