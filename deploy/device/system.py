"""What the machine says about itself: board, releases, memory, temperatures; None for what is not there."""

import glob
import os
import platform
import re
from typing import Any, Dict, List, Optional

# Tests put a stand-in Jetson's /etc, /proc and /sys under another folder; results made so are labelled.
ROOT = os.environ.get("EDGEPRUNE_DEVICE_ROOT", "/")
SENSOR_OFF_C = -256.0


def read_text(path: str) -> Optional[str]:
    """Read a small system file, None if it cannot be read."""
    try:
        with open(os.path.join(ROOT, path.lstrip("/")), encoding="utf-8", errors="replace") as file:
            return file.read().strip("\0\n ")
    except OSError:
        return None


def folders(pattern: str) -> List[str]:
    """Folders that match a pattern, as `read_text` takes them."""
    found = glob.glob(os.path.join(ROOT, pattern.lstrip("/")))
    return sorted("/" + os.path.relpath(folder, ROOT) for folder in found)


def gpu_folders() -> List[str]:
    """Where the kernel tells the GPU's clocks: 57000000.gpu on a Nano, 17000000.gp10b, .gv11b, .ga10b, .gpu later."""
    return folders("/sys/class/devfreq/*gpu*") + folders("/sys/class/devfreq/*.g[ampv]??b")


def cpu_folders() -> List[str]:
    """Where the kernel tells the processor's clocks."""
    return folders("/sys/devices/system/cpu/cpufreq/policy*")


def board() -> str:
    """Name the device model, as "NVIDIA Jetson Nano Developer Kit"; elsewhere the processor."""
    model = read_text("/proc/device-tree/model")
    if not model:
        found = re.search(r"model name\s*:\s*(.+)", read_text("/proc/cpuinfo") or "")
        model = found.group(1) if found else platform.machine()
    return model if ROOT == "/" else "stand-in for " + model


def avx512() -> Optional[bool]:
    """Whether an x86 processor has AVX-512; None where it does not say, and elsewhere."""
    flags = re.search(r"^flags\s*:(.*)$", read_text("/proc/cpuinfo") or "", re.MULTILINE)
    return "avx512f" in flags.group(1).split() if flags else None


def l4t() -> Optional[str]:
    """The Jetson Linux release, as "32.7.6"."""
    found = re.search(r"R(\d+).*REVISION:\s*([\d.]+)", read_text("/etc/nv_tegra_release") or "")
    return "{}.{}".format(*found.groups()) if found else None


def memory_mib() -> Dict[str, Optional[int]]:
    """Total, available and swap memory in MiB."""
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB", read_text("/proc/meminfo") or "", re.MULTILINE))
    names = {
        "total": "MemTotal",
        "available": "MemAvailable",
        "swap_total": "SwapTotal",
        "swap_free": "SwapFree",
    }
    return {key: int(values[name]) // 1024 if name in values else None for key, name in names.items()}


def temperatures_c() -> Dict[str, float]:
    """Degrees Celsius by thermal zone, as far as they are `measured`."""
    found = {}
    for folder in folders("/sys/class/thermal/thermal_zone*"):
        name, value = read_text(folder + "/type"), read_text(folder + "/temp")
        if name and value and re.match(r"-?\d+$", value):
            found[name] = int(value) / 1000
    return measured(found)


def measured(zones: Dict[str, float]) -> Dict[str, float]:
    """Leave out sensors that are off (-256), and the PMIC's, which stand at 100 on every board: a placeholder."""
    return {
        name: value
        for name, value in zones.items()
        if value > SENSOR_OFF_C and not name.lower().startswith("pmic")
    }


def describe() -> Dict[str, Any]:
    """Everything above in one record."""
    return {
        "board": board(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "l4t": l4t(),
        "cpus": os.cpu_count(),
        "avx512": avx512(),
        "memory_mib": memory_mib(),
        "temperatures_c": temperatures_c(),
    }
