"""What the device needs, checked one by one, each with what to do where it is missing."""

import contextlib
import glob
import importlib.util
import os
import shutil
import sys
from typing import Any, Callable, Dict, List, Optional

from . import power, system, trtexec
from .gstreamer import element_exists, opencv_has
from .probe import probe_backend

try:
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]

LEAST_FREE_MIB = 1024  # a build of a small detector on a Nano
LEAST_SWAP_MIB = 2048
LEAST_DISK_MIB = 1024
HOT_C = 80.0
DESKTOPS = ("gnome-shell", "Xorg", "lxsession", "unity-panel-ser")


def doctor(job: Dict[str, Any], report: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Check the device.

    Job: "backend", the one that will be used. Result: "checks": list of {"name", "ok" (None: not applicable,
    or only worth knowing), "found", "remedy"}.
    """
    checks: List[Dict[str, Any]] = [_python(), _numpy(), _images()]
    checks += _backend(job["backend"])
    jetson = system.l4t() is not None
    if job["backend"] == "tensorrt":
        found = trtexec.program()
        remedy = "only needed for --via trtexec: sudo apt-get install libnvinfer-bin"
        checks.append(_check("trtexec", True if found else None, found or "not installed", remedy))
    checks += [_memory(), _swap(), _disk()]
    if jetson:
        checks += [_desktop(), _power_mode(), _clocks(), _tegrastats()]
    checks += [_temperatures(), _gstreamer(), _cameras()]
    return {"checks": checks}


def _check(name: str, ok: Optional[bool], found: str, remedy: str) -> Dict[str, Any]:
    return {"name": name, "ok": ok, "found": found, "remedy": "" if ok else remedy}


def _python() -> Dict[str, Any]:
    found = "{}.{}.{} at {}".format(*(list(sys.version_info[:3]) + [sys.executable]))
    return _check("Python", sys.version_info >= (3, 6), found, "the system's python3 must be 3.6 or later")


def _numpy() -> Dict[str, Any]:
    try:
        import numpy
    except ImportError as error:
        return _check("numpy", False, str(error), "sudo apt-get install python3-numpy")
    return _check("numpy", True, numpy.__version__, "")


def _images() -> Dict[str, Any]:
    if cv2 is not None:
        return _check("images", True, "OpenCV " + cv2.__version__, "")
    if importlib.util.find_spec("PIL") is not None:
        return _check("images", True, "Pillow", "")
    return _check("images", False, "neither OpenCV nor Pillow", "sudo apt-get install python3-opencv")


def _backend(name: str) -> List[Dict[str, Any]]:
    answer = probe_backend(name)
    if "error" in answer:
        error = answer["error"]
        return [
            _check(
                error["kind"] if error["kind"] == "pycuda" else name, False, error["message"], error["remedy"]
            )
        ]
    details = ", ".join(
        "{} {}".format(key, value) for key, value in sorted(answer.items()) if key != "version" and value
    )
    return [_check(name, True, "{} {}".format(answer["version"], details).strip(), "")]


def _memory() -> Dict[str, Any]:
    memory = system.memory_mib()
    available, total = memory["available"], memory["total"]
    remedy = "close other programs; sudo systemctl isolate multi-user.target ends the desktop session"
    return _check(
        "free memory",
        None if available is None else available >= LEAST_FREE_MIB,
        "{} of {} MiB".format(available, total),
        remedy,
    )


def _swap() -> Dict[str, Any]:
    memory = system.memory_mib()
    total = memory["total"] or 0
    swap = memory["swap_total"] or 0
    remedy = (
        "builds are killed without it: sudo fallocate -l 4G /swap; sudo chmod 600 /swap; sudo mkswap /swap; "
        "sudo swapon /swap"
    )
    enough = swap >= LEAST_SWAP_MIB or total >= 8 * 1024
    return _check("swap", enough, "{} MiB".format(swap), remedy)


def _disk() -> Dict[str, Any]:
    disk = os.statvfs(".")
    free = disk.f_bavail * disk.f_frsize >> 20
    remedy = (
        "empty edgeprune's cache with `edgeprune device clean`, or choose another folder with --device-folder"
    )
    return _check("free disk", free >= LEAST_DISK_MIB, "{} MiB at {}".format(free, os.getcwd()), remedy)


def _desktop() -> Dict[str, Any]:
    names = set()
    for path in glob.glob("/proc/[0-9]*/comm"):
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            names.add(file.read().strip())  # a process may end meanwhile
    running = sorted(names & set(DESKTOPS))
    remedy = "it takes memory and disturbs timings: sudo systemctl isolate multi-user.target"
    return _check("desktop session", None if running else True, ", ".join(running) or "none", remedy)


def _power_mode() -> Dict[str, Any]:
    mode, known = power.power_mode(), ", ".join(sorted(power.power_modes()))
    remedy = "numbers compare only in the same mode; --power-mode NAME sets one of: {}".format(known)
    return _check("power mode", None, mode or "unknown", remedy)


def _clocks() -> Dict[str, Any]:
    locked = power.clocks_locked()
    found = {True: "locked", False: "not locked", None: "unknown"}[locked]
    return _check("clocks", True if locked else None, found, "--lock-clocks holds them during a benchmark")


def _tegrastats() -> Dict[str, Any]:
    found = shutil.which("tegrastats")
    return _check(
        "tegrastats", bool(found), found or "not found", "it comes with JetPack; is /usr/bin on the PATH?"
    )


def _temperatures() -> Dict[str, Any]:
    found = system.temperatures_c()
    if not found:
        return _check("temperatures", None, "no sensor", "")
    zone = max(found, key=lambda name: found[name])
    return _check(
        "temperatures",
        found[zone] < HOT_C,
        "{} {:.0f} C".format(zone, found[zone]),
        "let it cool; clean or add the fan",
    )


def _gstreamer() -> Dict[str, Any]:
    remedy = (
        "only cameras need it: use JetPack's own OpenCV; one from pip has no GStreamer and hides that one "
        "(python3 -m pip uninstall opencv-python)"
    )
    if cv2 is None:
        return _check("OpenCV with GStreamer", None, "no OpenCV", remedy)
    has = opencv_has("GStreamer")
    return _check("OpenCV with GStreamer", True if has else None, "yes" if has else "no", remedy)


def _cameras() -> Dict[str, Any]:
    devices = sorted(glob.glob("/dev/video*"))
    if element_exists("nvarguscamerasrc"):
        devices.append("CSI (nvarguscamerasrc)")
    return _check(
        "cameras",
        True if devices else None,
        ", ".join(devices) or "none",
        "only `edgeprune camera` needs one",
    )
