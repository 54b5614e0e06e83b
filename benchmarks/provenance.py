"""What a committed figure must carry: when, at which commit, on what machine and with which versions."""

import datetime
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgeprune.data.files import sha256_of


def provenance(command: str, packages: Sequence[str], inputs: Sequence[Path] = ()) -> dict[str, Any]:
    """Call it before measuring: the load average is that of whatever else runs.

    Args:
        inputs: files that the figure depends on, as labels and weights; their hashes are kept.
    """
    return {
        "command": command,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("edgeprune", *packages)},
        "sha256": {path.name: sha256_of(path) for path in inputs},
    }


def without_folders(record: Any) -> Any:
    """The record with absolute paths cut to file names: what is committed names nobody's folders.

    Of a text that is called "command" each word counts.
    """
    if isinstance(record, dict):
        return {
            name: shlex.join(without_folders(shlex.split(value)))
            if name == "command" and isinstance(value, str)
            else without_folders(value)
            for name, value in record.items()
        }
    if isinstance(record, list | tuple):
        return [without_folders(value) for value in record]
    return Path(record).name if isinstance(record, str) and record.startswith("/") else record


def _commit() -> str | None:
    """Of the checkout, with "-dirty" where files differ from it; None where there is none."""
    ask = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
