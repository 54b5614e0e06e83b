"""Where frames come from: the address of a camera, a video or a folder, and how it is opened.

Whatever can be missing is looked for first: a GStreamer pipeline with an element that is not there can hang
for ever.
"""

import glob
import os
import re
import socket
import stat
from typing import Any, Dict, List, NamedTuple, Optional
from urllib.parse import urlsplit

from .. import system
from ..errors import AgentError
from ..gstreamer import element_exists, opencv_has

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DEFAULT_PORTS = {"rtsp": 554, "http": 80, "https": 443}
CONNECT_S = 5.0
KNOWN = "csi://0, /dev/video0, a video file, a folder of images, rtsp://..., http(s)://... or test://"
# The newest frame only: what nobody took is overwritten, and no clock holds a frame back.
TO_BGR = "videoconvert ! video/x-raw,format=BGR ! appsink drop=1 max-buffers=1 sync=false"


class Source(NamedTuple):
    """Where frames come from, checked as far as it can be without opening it."""

    kind: str  # "csi", "usb", "test", "network", "pipe", "video" or "images"
    place: str  # what is opened: a GStreamer pipeline, a device, an address (with its password) or a path
    label: str  # for people and records: an address without user, password and query

    @property
    def live(self) -> bool:
        """Frames come at their own pace: the newest counts, and those that nobody took are dropped."""
        return self.kind not in ("video", "images")

    @property
    def camera(self) -> bool:
        """It may be busy or silent, which only opening it tells."""
        return self.kind in ("csi", "usb", "network")


def find_source(address: str, settings: Dict[str, Any]) -> Source:
    """Read an address.

    Args:
        settings: "width", "height", "fps": wanted of a camera.

    Raises:
        AgentError: If it is no address of a source, or something that it needs is missing here.
    """
    csi = re.fullmatch(r"csi://(\d{1,2})", address)
    if csi:
        camera = "nvarguscamerasrc sensor-id={} ! video/x-raw(memory:NVMM),format=NV12,{} ! nvvidconv"
        pipeline = camera.format(csi.group(1), _caps(settings)) + " ! video/x-raw,format=BGRx"
        return _gstreamer("csi", address, pipeline)
    if address == "test://":
        pipeline = "videotestsrc is-live=true pattern=ball ! video/x-raw," + _caps(settings)
        return _gstreamer("test", address, pipeline)
    if "://" in address:
        return _network(address)
    if address.startswith("/dev/"):
        return _usb(address)
    return _stored(address)


def _caps(settings: Dict[str, Any]) -> str:
    width, height, fps = (int(settings[name]) for name in ("width", "height", "fps"))
    return "width={},height={},framerate={}/1".format(width, height, fps)


def _gstreamer(kind: str, address: str, pipeline: str) -> Source:
    if not opencv_has("GStreamer"):
        raise AgentError("camera", "this OpenCV has no GStreamer, which {} needs".format(address), OWN_OPENCV)
    whole = "{} ! {}".format(pipeline, TO_BGR)
    for element in (step.split()[0] for step in whole.split(" ! ") if not step.startswith("video/")):
        if element == "nvarguscamerasrc" and not element_exists(element):
            message = "{} needs nvarguscamerasrc, which is not here".format(address)
            remedy = "it comes with JetPack (`gst-inspect-1.0 nvarguscamerasrc`); for USB use /dev/video0"
            raise AgentError("camera", message, remedy)
        if not element_exists(element):
            message = "{} needs GStreamer's {}, which is not here".format(address, element)
            raise AgentError("camera", message, GSTREAMER)
    return Source(kind, whole, address)


OWN_OPENCV = (
    "use the system's own OpenCV: one from pip has no GStreamer and hides that one "
    "(python3 -m pip uninstall opencv-python opencv-python-headless)"
)
GSTREAMER = "sudo apt-get install gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-good"


def _network(address: str) -> Source:
    try:
        parts = urlsplit(address)
        known = parts.scheme in DEFAULT_PORTS and parts.hostname and (parts.port or 1)
    except ValueError:  # the port is no number
        known = False
    # The label cannot be made of an address that cannot be read: it is not repeated, it may hold a password.
    if not known or not re.fullmatch(r"[!#-&(-;=?-\[\]^_a-~]+", address):
        raise AgentError("source", "the source is no address of a camera", "choose {}".format(KNOWN))
    if not opencv_has("FFMPEG"):
        raise AgentError("camera", "this OpenCV has no FFmpeg, which network cameras need", OWN_OPENCV)
    place = parts.netloc.rpartition("@")[2]
    return Source("network", address, "{}://{}{}".format(parts.scheme, place, parts.path))


def _usb(path: str) -> Source:
    device = os.path.join(system.ROOT, path.lstrip("/"))
    if not os.path.exists(device):
        found = sorted(os.path.basename(name) for name in glob.glob(os.path.join(system.ROOT, "dev/video*")))
        message = "there is no camera at {}; found: {}".format(path, ", ".join(found) or "none")
        raise AgentError("camera", message, "plug it in, or name another one with --source")
    if not os.access(device, os.R_OK | os.W_OK):
        remedy = "sudo usermod -aG video $USER, then log in again"
        raise AgentError("camera", "this user may not use {}".format(path), remedy)
    return Source("usb", device, path)


def _stored(path: str) -> Source:
    place = os.path.abspath(path)
    if not os.path.exists(place):
        message = "there is no file or folder {} on the device".format(path)
        raise AgentError("source", message, "choose {}".format(KNOWN))
    if os.path.isdir(place):
        if not images_of(place):
            message = "the folder {} holds no image".format(path)
            raise AgentError("source", message, "known are {}".format(", ".join(IMAGE_SUFFIXES)))
        return Source("images", place, path)
    if not opencv_has("FFMPEG"):
        raise AgentError("camera", "this OpenCV has no FFmpeg, which videos need", OWN_OPENCV)
    return Source("pipe" if stat.S_ISFIFO(os.stat(place).st_mode) else "video", place, path)


def images_of(folder: str) -> List[str]:
    """The folder's image files in the order of their names."""
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES))
    return [os.path.join(folder, name) for name in names]


def opening_failure(source: Source, said: str) -> AgentError:
    """Say why a source did not open.

    Args:
        said: what OpenCV and its libraries printed. Of a network camera it is not shown: it may hold the
            password.
    """
    if source.kind == "network":
        return _unreachable(source)
    if source.kind == "usb":
        holder = _holder(source.place)
        if holder:
            message = "the camera {} is busy: {} has it open".format(source.label, holder)
            return AgentError("busy", message, "end that program, then run the command again")
        remedy = "is it a camera, and in use by no other program? try another of /dev/video*"
        return AgentError("camera", "{} does not open as a camera".format(source.label), remedy)
    if source.kind == "csi":
        if "Failed to create CaptureSession" in said:
            remedy = "end the program that uses it, or: sudo systemctl restart nvargus-daemon"
            return AgentError("busy", "the camera {} is busy".format(source.label), remedy)
        remedy = "check its ribbon cable with the board switched off; `dmesg` names what was found"
        return AgentError("camera", "there is no camera at {}".format(source.label), remedy)
    message = "{} does not open as a video".format(source.label)
    return AgentError("source", message, "convert it with another program, or choose another file")


def _unreachable(source: Source) -> AgentError:
    parts = urlsplit(source.place)
    host, port = parts.hostname or "", parts.port or DEFAULT_PORTS[parts.scheme]
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        message = "the camera {} cannot be reached: {}".format(source.label, error.strerror or error)
        return AgentError("camera", message, "is it on, and is the address right?")
    message = "{} answers, but gives no video".format(source.label)
    return AgentError("camera", message, "check the path, the user and the password in the address")


def _holder(device: str) -> Optional[str]:
    """The program that has a device open, as far as this user may see."""
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        process = link.split("/")[2]
        try:
            if int(process) != os.getpid() and os.path.samefile(link, device):
                with open("/proc/{}/comm".format(process), encoding="utf-8", errors="replace") as file:
                    return "{} (process {})".format(file.read().strip(), process)
        except OSError:
            continue  # it just ended, or is another user's
    return None
