"""The camera: live detection on the device. Read `command.py` first."""

from ..errors import AgentError

try:
    import cv2  # noqa: F401
except ImportError as error:
    raise AgentError(
        "camera",
        "a camera needs OpenCV, and this python3 has none",
        "install the system's own: sudo apt-get install python3-opencv",
    ) from error
