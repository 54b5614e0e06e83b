"""Frames of videos as image files.

A frame is named by its number in decoding order, from 0. Seeking is not exact in AVI and MPEG-4, so a video
is decoded from its start, once, and the frames that labels name are kept as PNGs in the user's cache.
"""

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2

from edgeprune.data.assets import cache_folder
from edgeprune.data.errors import DataError
from edgeprune.data.files import sha256_of, write_bytes


class Frame(NamedTuple):
    """A frame of a video."""

    video: str
    number: int


def frame_of(file_name: str) -> Frame | None:
    """Read ``"vtest.avi#000123"``; None if the name is not of a video frame."""
    match = re.fullmatch(r"(.+)#([0-9]{1,9})", file_name, re.DOTALL)
    return Frame(match[1], int(match[2])) if match else None


def check_opens(video: Path) -> None:
    """Make sure that a video can be decoded.

    Raises:
        DataError: If it does not open.
    """
    _open(video).release()


def frame_size(video: Path) -> tuple[int, int]:
    """Width and height of a video's frames, pixels.

    Raises:
        DataError: If it does not open or has no frame.
    """
    capture = _open(video)
    try:
        decoded, pixels = capture.read()  # the size in the file's header may be another
    finally:
        capture.release()
    if not decoded:
        raise DataError(f"{video} has no frame that decodes")
    return pixels.shape[1], pixels.shape[0]


def count_frames(video: Path) -> int:
    """How many frames a video decodes to; errors as `check_opens`."""
    capture = _open(video)
    try:
        count = 0
        while capture.grab():  # the count in the file's header may be wrong
            count += 1
        return count
    finally:
        capture.release()


def frames_per_second(video: Path) -> float:
    """The rate that a video's header says.

    Raises:
        DataError: If it does not open, or says none.
    """
    capture = _open(video)
    try:
        rate = float(capture.get(cv2.CAP_PROP_FPS))
    finally:
        capture.release()
    if not (math.isfinite(rate) and rate > 0):
        raise DataError(f"{video} does not say its frames per second")
    return rate


def frame_path(video: Path, number: int, also: Iterable[int] = ()) -> Path:
    """The PNG of a frame, lossless, as decoded.

    Args:
        also: numbers of frames that will be asked for too: where the video must be decoded, they are
            extracted in the same pass.

    Raises:
        DataError: If the video does not open or ends before the frame.
    """
    folder = cache_folder("frames", _sha256(video, *_version(video)))
    path = _png(folder, number)
    if not path.is_file():
        wanted = {number} | {other for other in also if not _png(folder, other).is_file()}
        count = _extract(video, wanted, folder)
        if not path.is_file():
            raise DataError(f"{video} has no frame {number}: it decodes to {count} frames, numbered from 0")
    return path


def _extract(video: Path, wanted: set[int], folder: Path) -> int:
    """Write the wanted frames; returns how many were decoded until the last wanted one, or the end."""
    capture = _open(video)
    count = 0
    try:
        while count <= max(wanted) and capture.grab():
            if count in wanted:
                decoded, pixels = capture.retrieve()
                if not decoded:
                    break
                # imwrite does not notice a full disk
                write_bytes(_png(folder, count), cv2.imencode(".png", pixels)[1].tobytes())
            count += 1
    finally:
        capture.release()
    return count


def _open(video: Path) -> cv2.VideoCapture:
    # Another backend would read "clip_001.mp4" as the pattern of an image sequence
    capture = cv2.VideoCapture(str(video), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise DataError(f"{video} does not open as a video")
    return capture


def _png(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _version(video: Path) -> tuple[int, int]:
    try:
        status = video.stat()
    except OSError as error:
        raise DataError(f"cannot read {video}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


@lru_cache
def _sha256(video: Path, size_bytes: int, mtime_ns: int) -> str:
    return sha256_of(video)
