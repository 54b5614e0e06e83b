"""One job at a time on a device: a second one would take its memory and spoil its timings."""

import contextlib
import fcntl
import os
import time
from typing import Any, Callable, Dict, Iterator

from .errors import AgentError

LOCK_FILE = "device.lock"


@contextlib.contextmanager
def device_lock(wait_s: float, report: Callable[[Dict[str, Any]], None]) -> Iterator[None]:
    """Hold the device; the kernel lets go of it when this process ends, however it ends.

    Raises:
        AgentError: If another job holds it for longer than `wait_s`.
    """
    with open(LOCK_FILE, "a+", encoding="utf-8") as file:
        give_up_at = time.monotonic() + wait_s
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                if time.monotonic() >= give_up_at:
                    message = "the device is busy with another edgeprune job ({})".format(holder)
                    raise AgentError(
                        "busy", message, "wait for it to end, then run the command again"
                    ) from None
                if not told:
                    report({"event": "waiting", "holder": holder})
                    told = True
                time.sleep(0.2)
        file.seek(0)
        file.truncate()
        file.write("process {}".format(os.getpid()))
        file.flush()
        yield
