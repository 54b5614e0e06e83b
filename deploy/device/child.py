"""Child processes: whatever happens in one, the agent lives on and says what it was."""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, Optional

from .errors import AgentError
from .system import memory_mib

PACKAGE_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # a folder, or the agent's zip
ALIVE_EVERY_S = 5.0  # a line this often: writing it is how a lost connection is noticed
LOG_TAIL_BYTES = 4000
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that ends (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_child(
    arguments: List[str],
    log_path: str,
    report: Callable[[Dict[str, Any]], None],
    timeout_s: Optional[float] = None,
    attached: bool = False,
    tick: Callable[[], None] = lambda: None,
    grace_s: float = 0.0,
) -> None:
    """Run this package once more in a child process and pass its progress on.

    Args:
        arguments: of `agent.main` in the child.
        log_path: takes all that the child and its libraries print.
        report: takes each progress record, and a sign of life every few seconds.
        timeout_s: the child is ended after so long.
        attached: our standard input belongs to a host; its end means that the host is gone.
        tick: is called about twice a second.
        grace_s: a child that is to end before its time is asked to, and has so long to finish by itself.

    Raises:
        AgentError: If the child did not end with status 0: killed, crashed, timed out, or failed.
    """
    command = [sys.executable, "-u", "-m", __package__] + arguments
    start = time.monotonic()
    with open(log_path, "wb") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment(),
            start_new_session=True,  # ctrl-C at a terminal reaches the agent, which ends the child in order
        )
    assert child.stdout is not None
    lowest_mib = memory_mib()["available"]
    lines = _Lines(report)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            if attached:
                selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
            alive_at = start
            while True:
                ready = [key.fileobj for key, _ in selector.select(timeout=0.5)]
                if child.stdout in ready:
                    chunk = os.read(child.stdout.fileno(), 1 << 16)
                    if not chunk:
                        break
                    lines.feed(chunk)
                elif ready and not os.read(sys.stdin.fileno(), 1 << 10):
                    raise AgentError("disconnected", "the host went away")
                tick()
                now = time.monotonic()
                available = memory_mib()["available"]
                lowest_mib = min(filter(None, (available, lowest_mib)), default=None)
                if timeout_s is not None and now - start > timeout_s:
                    raise AgentError(
                        "timeout", "{} took over {:.0f} s and was ended".format(arguments[0], timeout_s)
                    )
                if now - alive_at > ALIVE_EVERY_S:
                    alive_at = now
                    report({"event": "alive", "available_mib": available})
        child.wait()
    except (AgentError, BrokenPipeError):
        if not _finishes(child, lines, grace_s) or child.wait() == -signal.SIGTERM:
            raise
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        child.stdout.close()
    if child.returncode:
        raise _failure(child.returncode, log_path, lowest_mib)


def _finishes(child: "subprocess.Popen[bytes]", lines: "_Lines", grace_s: float) -> bool:
    """Ask a child to end and pass on its last words; whether it ended by itself in time."""
    assert child.stdout is not None
    if grace_s:
        child.terminate()
    give_up_at = time.monotonic() + grace_s
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while time.monotonic() < give_up_at:
            if selector.select(timeout=0.5):
                chunk = os.read(child.stdout.fileno(), 1 << 16)
                if not chunk:
                    return True
                with contextlib.suppress(BrokenPipeError):  # the host went away
                    lines.feed(chunk)
    return False


class _Lines:
    """Collects bytes and passes on each whole line, a JSON record."""

    def __init__(self, report: Callable[[Dict[str, Any]], None]) -> None:
        self._report = report
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._report(json.loads(line.decode("utf-8")))


def environment() -> Dict[str, str]:
    """This process's environment, in which Python also finds this package."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [PACKAGE_HOME] + [entry for entry in inherited if entry and entry != PACKAGE_HOME]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(path))


def log_tail(log_path: str) -> str:
    """The end of a child's log."""
    with open(log_path, "rb") as file:
        file.seek(max(0, os.path.getsize(log_path) - LOG_TAIL_BYTES))
        return file.read().decode("utf-8", "replace").strip()


def _failure(status: int, log_path: str, lowest_mib: Optional[int]) -> AgentError:
    tail = log_tail(log_path)
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        free = "" if lowest_mib is None else "; {} MiB of memory were free at the least".format(lowest_mib)
        return AgentError(
            "killed",
            "the process was killed (137), most likely for memory" + free,
            "close other programs and the desktop session, add swap, or use a smaller input size",
        )
    if status < 0:
        name = signal.Signals(-status).name
        return AgentError(
            "crashed", "the process crashed with {}: {}".format(name, tail), "see docs/jetson.md"
        )
    return AgentError("internal", "the agent failed (a bug of edgeprune, please report it): {}".format(tail))
