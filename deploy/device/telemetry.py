"""Power, temperatures, clocks and load over time. Every value is optional: boards differ in what they tell.

tegrastats prints one line per interval. Its traps, each seen on a board: a date in front; cores that are
"off"; -256C for a sensor that is off; rails with and without "mW", with two or three values; zone names in
either case; no clock unless run as root; GR3D_FREQ without utilisation, or with a list of clocks. The kernel
shows the clocks to every user.
"""

import collections
import os
import re
import shutil
import subprocess
import time
from typing import Any, Deque, Dict, Iterable, List, Optional

from . import system

INTERVAL_S = 1.0
INPUT_RAIL_ENDS = ("_IN", "SYS_5V0", "SYS5V")  # names of rails that feed the whole board

_RAM = re.compile(r"\bRAM (\d+)/(\d+)MB")
_SWAP = re.compile(r"\bSWAP (\d+)/(\d+)MB")
_CPU = re.compile(r"\bCPU \[([^\]]*)\]")
_GPU = re.compile(r"\bGR3D_FREQ (?:(\d+)%)?(?:@(?:\[([\d,]+)\]|(\d+)))?")
_EMC = re.compile(r"\bEMC_FREQ (\d+)%")
_ZONE = re.compile(r"\b([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C\b")
_RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?(?:/\d+(?:mW)?)?(?![\dMm])")


def parse_tegrastats(line: str) -> Dict[str, Any]:
    """Read one line of tegrastats.

    Returns:
        Those of these fields that the line has: "ram_used_mib", "ram_total_mib", "swap_used_mib",
        "cpu_percent" (a list; None for a core that is off), "gpu_percent", "gpu_mhz" (a list), "emc_percent",
        "temperatures_c" (by zone, lower case), "power_mw" (by rail; the present value, not the average).
    """
    found: Dict[str, Any] = {}
    ram, swap, cpu = _RAM.search(line), _SWAP.search(line), _CPU.search(line)
    gpu, emc = _GPU.search(line), _EMC.search(line)
    if ram:
        found["ram_used_mib"], found["ram_total_mib"] = int(ram.group(1)), int(ram.group(2))
    if swap:
        found["swap_used_mib"] = int(swap.group(1))
    if cpu:
        cores = [re.match(r"(\d+)%", core.strip()) for core in cpu.group(1).split(",")]
        found["cpu_percent"] = [int(core.group(1)) if core else None for core in cores]
    if gpu:
        percent, clocks, clock = gpu.groups()
        if percent is not None:
            found["gpu_percent"] = int(percent)
        if clocks or clock:
            found["gpu_mhz"] = [int(value) for value in (clocks or clock).split(",")]
    if emc:
        found["emc_percent"] = int(emc.group(1))
    zones = system.measured({name.lower(): float(value) for name, value in _ZONE.findall(line)})
    if zones:
        found["temperatures_c"] = zones
    rails = {name: int(value) for name, value in _RAIL.findall(line) if name not in ("RAM", "SWAP")}
    if rails:
        found["power_mw"] = rails
    return found


def ina3221_mw() -> Dict[str, float]:
    """Power by rail from the board's INA3221 monitors: mV x mA / 1000."""
    found = {}
    for folder in system.folders("/sys/class/hwmon/hwmon*"):
        if system.read_text(folder + "/name") != "ina3221":
            continue
        for channel in range(1, 8):
            label = system.read_text("{}/in{}_label".format(folder, channel))
            millivolt = system.read_text("{}/in{}_input".format(folder, channel))
            milliampere = system.read_text("{}/curr{}_input".format(folder, channel))
            if label and millivolt and milliampere:  # the sum of the shunts has no current of its own
                found[label] = int(millivolt) * int(milliampere) / 1000
    return found


def clocks() -> Dict[str, Any]:
    """Clocks as the kernel has them, and how busy the GPU is at the same moment.

    Returns:
        Those of these fields that the machine tells: "gpu_mhz" and "cpu_mhz" (lists), "gpu_percent".
    """
    gpus = system.gpu_folders()
    found = {
        "gpu_mhz": _numbers(gpus, "cur_freq", 1e6),  # of Hz
        "cpu_mhz": _numbers(system.cpu_folders(), "scaling_cur_freq", 1e3),  # of kHz
        "gpu_percent": max(_numbers(gpus, "device/load", 10), default=None),
    }
    return {name: value for name, value in found.items() if value not in (None, [])}


def _numbers(folders: List[str], name: str, divisor: float) -> List[float]:
    texts = [system.read_text("{}/{}".format(folder, name)) for folder in folders]
    return [int(text) / divisor for text in texts if text and text.isdigit()]


def board_rails(names: Iterable[str]) -> List[str]:
    """The rails that together are the board's power: its input where that is measured, else all."""
    rails = sorted(names)
    return [name for name in rails if name.endswith(INPUT_RAIL_ENDS)][:1] or rails


class Telemetry:
    """Samples of the board while a job runs. `tick` is called often and samples once in a while.

    tegrastats, where it is there, runs as a process of its own, so that the job's timings are not disturbed.

    Args:
        kept: samples, the last ones; all of them unless it is said.
    """

    def __init__(self, kept: Optional[int] = None) -> None:
        self.samples: Deque[Dict[str, Any]] = collections.deque(maxlen=kept)
        self._process: Optional["subprocess.Popen[bytes]"] = None
        self._rest = b""
        self._due = 0.0

    def __enter__(self) -> "Telemetry":
        program = shutil.which("tegrastats")
        if program:
            interval = str(int(INTERVAL_S * 1000))
            self._process = subprocess.Popen(
                [program, "--interval", interval],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert self._process.stdout is not None
            os.set_blocking(self._process.stdout.fileno(), False)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._process:
            self._process.terminate()
            self._process.communicate()

    def tick(self) -> None:
        """Take a sample if one is due."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + INTERVAL_S
        sample: Dict[str, Any] = {
            "time_s": now,
            "available_mib": system.memory_mib()["available"],
            "load": os.getloadavg()[0],
            "temperatures_c": system.temperatures_c(),
            "power_mw": ina3221_mw(),
        }
        for name, value in parse_tegrastats(self._last_line()).items():
            if isinstance(value, dict):
                sample[name].update(value)
            else:
                sample[name] = value
        sample.update(clocks())
        self.samples.append(sample)

    def _last_line(self) -> str:
        if not self._process or not self._process.stdout:
            return ""
        *lines, self._rest = (self._rest + (self._process.stdout.read() or b"")).split(b"\n")
        return lines[-1].decode("utf-8", "replace") if lines else ""
