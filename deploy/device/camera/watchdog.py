"""systemd's notify protocol: a service says that it is ready, and then that it is alive (sd_notify(3))."""

import os
import socket
import time


class Watchdog:
    """Tells systemd; where systemd does not listen (no NOTIFY_SOCKET), nothing happens.

    The service is the supervisor of this process, so WATCHDOG_PID names another one: the unit lets every
    process of the service speak (NotifyAccess=all).
    """

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address  # "@": abstract
        self._every_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 / 3
        self._next_s = 0.0
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)  # a full queue at systemd must not hold up the camera

    def ready(self) -> None:
        """The service does its work from now on; the watchdog runs."""
        self._send(b"READY=1")

    def alive(self) -> None:
        """Call it as often as work gets done; it speaks three times in the watchdog's period."""
        now_s = time.monotonic()
        if self._every_s and now_s >= self._next_s:
            self._next_s = now_s + self._every_s
            self._send(b"WATCHDOG=1")

    def _send(self, message: bytes) -> None:
        if self._address:
            try:
                self._socket.sendto(message, self._address)
            except OSError:
                pass  # systemd restarts a service that it does not hear: nothing better can be done here
