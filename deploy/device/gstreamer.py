"""What OpenCV and GStreamer can do here."""

import re
import shutil
import subprocess

try:
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]


def opencv_has(part: str) -> bool:
    """Whether OpenCV was built with a part: "GStreamer", "FFMPEG"."""
    built = "" if cv2 is None else cv2.getBuildInformation()
    return re.search(r"^\s*{}:\s+YES".format(part), built, re.MULTILINE) is not None


def element_exists(element: str) -> bool:
    """Whether GStreamer has an element; opening a pipeline without it can hang for ever."""
    program = shutil.which("gst-inspect-1.0")
    if not program:
        return False
    try:
        done = subprocess.run(
            [program, "--exists", element],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=20,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
