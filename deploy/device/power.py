"""Power mode and clocks of a Jetson: read always, set only when asked, and always put back.

What must be put back is noted in a file first, so that even after the agent was killed its next start does
it.
"""

import contextlib
import os
import re
import shutil
import subprocess
from typing import Any, Dict, Iterator, List, Optional

from . import system
from .errors import AgentError
from .files import read_json, write_json

RESTORE_FILE = "power.json"
CLOCKS_FILE = "clocks.conf"  # what jetson_clocks stored
COMMAND_TIMEOUT_S = 30


def power_modes() -> Dict[str, int]:
    """Ids of the board's power modes by name, as nvpmodel is configured: they differ between boards."""
    text = system.read_text("/etc/nvpmodel.conf") or ""
    found = re.findall(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", text, re.MULTILINE)
    return {name: int(number) for number, name in found}


def power_mode() -> Optional[str]:
    """The present power mode's name, None where nvpmodel is not there or does not say."""
    if not shutil.which("nvpmodel"):
        return None
    output = _run(["nvpmodel", "-q"], check=False)
    found = re.search(r"NV Power Mode:\s*(\S+)", output)
    return found.group(1) if found else None


def clocks_locked() -> Optional[bool]:
    """Whether least and greatest clock are the same, for GPU and processor; None where it is not said."""
    pairs = [
        tuple(system.read_text("{}/{}{}_freq".format(folder, prefix, end)) for end in ("min", "max"))
        for folders, prefix in ((system.gpu_folders(), ""), (system.cpu_folders(), "scaling_"))
        for folder in folders
    ]
    known = [pair for pair in pairs if None not in pair]
    return all(least == most for least, most in known) if known else None


def state() -> Dict[str, Any]:
    """Power mode and clocks as they are now."""
    return {"power_mode": power_mode(), "clocks_locked": clocks_locked()}


@contextlib.contextmanager
def held(wanted: Dict[str, Any]) -> Iterator[None]:
    """Set power mode and clocks for the time of a job.

    Args:
        wanted: "mode": name of a power mode, or None; "lock_clocks": whether to lock the clocks at their
        highest.

    Raises:
        AgentError: If the mode is unknown, sudo asks for a password, or the board keeps its mode.
    """
    put_back()  # of an earlier job that was killed
    mode, lock_clocks = wanted.get("mode"), wanted.get("lock_clocks")
    if not mode and not lock_clocks:
        yield
        return
    modes = power_modes()
    if mode and mode not in modes:
        known = ", ".join(sorted(modes)) or "none: this board has no /etc/nvpmodel.conf"
        raise AgentError("power", "unknown power mode {!r}".format(mode), "choose from: " + known)
    before = power_mode()
    note = {"mode_id": modes.get(before or "") if mode else None, "clocks": bool(lock_clocks)}
    write_json(RESTORE_FILE, note)
    try:
        if mode:
            _set_mode(modes[mode])
            if power_mode() != mode:
                message = "the board stays in power mode {}".format(power_mode())
                raise AgentError(
                    "power", message, "it may need a restart: sudo nvpmodel -m {}".format(modes[mode])
                )
        if lock_clocks:
            _run(_root() + ["jetson_clocks", "--store", os.path.abspath(CLOCKS_FILE)])
            _run(_root() + ["jetson_clocks"])
        yield
    finally:
        put_back()


def put_back() -> None:
    """Undo what `held` noted, if anything.

    Raises:
        AgentError: If the board refuses; the note stays, so that the next job tries again.
    """
    if not os.path.exists(RESTORE_FILE):
        return
    note = read_json(RESTORE_FILE)
    if note["clocks"] and os.path.exists(CLOCKS_FILE):
        _run(_root() + ["jetson_clocks", "--restore", os.path.abspath(CLOCKS_FILE)])
        os.unlink(CLOCKS_FILE)
    if note["mode_id"] is not None:
        _set_mode(note["mode_id"])
    os.unlink(RESTORE_FILE)


def _set_mode(number: int) -> None:
    _run(_root() + ["nvpmodel", "-m", str(number)])


def _root() -> List[str]:
    return [] if os.geteuid() == 0 else ["sudo", "-n"]


def _run(command: List[str], check: bool = True) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AgentError("power", "{} failed: {}".format(" ".join(command), error)) from error
    output = done.stdout.decode("utf-8", "replace").strip()
    if check and done.returncode:
        raise AgentError(
            "power",
            "{} failed: {}".format(" ".join(command), output.splitlines()[-1] if output else done.returncode),
            "allow it without a password (sudo visudo), or leave out --power-mode and --lock-clocks",
        )
    return output
