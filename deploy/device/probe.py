"""What this device is and which runtimes work on it."""

import os
import tempfile
from typing import Any, Callable, Dict

from . import power, system
from .backend import BACKENDS, open_backend
from .child import run_child
from .errors import AgentError
from .files import read_json, write_json
from .imaging import IMAGE_LIBRARY

BACKEND_TIMEOUT_S = 120


def probe(job: Dict[str, Any], report: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Describe the device.

    Job: "backend" to probe only that one, in this process. Result: `system.describe`, "images" (the library
    that decodes and resizes), "power_mode", "power_modes", "clocks_locked", "backends": by name, what
    `Backend.probe` said, or ``{"error": {...}}``.
    """
    if "backend" in job:
        return open_backend(job["backend"]).probe()
    return dict(
        system.describe(),
        images=IMAGE_LIBRARY,
        power_modes=sorted(power.power_modes()),
        backends={name: probe_backend(name) for name in BACKENDS},
        **power.state(),
    )


def probe_backend(name: str) -> Dict[str, Any]:
    """Probe a backend in a child of its own: TensorRT without a working driver ends the process."""
    with tempfile.TemporaryDirectory(dir=os.curdir, prefix="probe-") as folder:
        job, result, log = (os.path.join(folder, ending) for ending in ("job.json", "result.json", "log"))
        write_json(job, {"backend": name})
        try:
            run_child(["--child", "probe", job, result], log, lambda event: None, BACKEND_TIMEOUT_S)
            answer = read_json(result)
        except AgentError as error:
            answer = {"ok": False, "error": error.to_json()}
    found: Dict[str, Any] = answer["result"] if answer["ok"] else {"error": answer["error"]}
    return found
