"""The camera's page over HTTP: the newest picture as motion JPEG, and the newest numbers.

Whoever publishes never waits. A picture is encoded once for all viewers, in a thread of its own, and only
while there is one; each viewer has a thread that sends the newest picture whenever the last one is sent, and
is dropped when it takes none for `SEND_S`.

Who may look: without a token only this machine's own names count as the host, so that no web page can reach
the camera by renaming itself (DNS rebinding), and only loopback addresses are listened on. With a token
every request needs it; the first visit's address is replaced by one without it, and a cookie goes on.
"""

import errno
import hashlib
import hmac
import http.server
import ipaddress
import json
import re
import select
import socket
import socketserver
import threading
from typing import Any, Dict, Optional, Tuple
from urllib.parse import parse_qs

import cv2
import numpy as np

from ..errors import AgentError
from .page import PAGE

MAX_STREAMS = 8
MAX_CONNECTIONS = 2 * MAX_STREAMS  # a page has its stream, and asks for numbers beside it
SEND_S = 5.0  # to take one picture, or to send one request
JPEG_QUALITY = 80
SEND_BUFFER_BYTES = 128 << 10  # the system's own holds seconds of pictures: a slow viewer would see the past
LOOK_S = 1.0  # how often a viewer without a new picture is looked after
BOUNDARY = b"--picture"
REFUSED = "Open the camera at the address that was printed when it was started.\n"
OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")
Headers = Tuple[Tuple[str, str], ...]
HEADERS: Headers = (
    ("Cache-Control", "no-store"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    (
        "Content-Security-Policy",
        "default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
)


class Stream:
    """Serves `/`, `/stream.mjpg` and `/numbers.json` from the moment it is made.

    Args:
        host: name or address to listen on.
        port: 0: any that is free; `port` says which.
        token: what a viewer has to know; None: only this machine may look.

    Raises:
        AgentError: If it cannot listen there, or would be open to others without a token.
    """

    def __init__(self, host: str, port: int, token: Optional[str] = None) -> None:
        # A new frame concerns the encoder alone: viewers that it woke would take the interpreter from detection.
        lock = threading.Lock()
        self._new_frame, self._new_picture = threading.Condition(lock), threading.Condition(lock)
        self._closed = False
        self._viewers = 0
        self._frame: Optional[np.ndarray] = None  # not encoded yet
        self._part = b""  # the newest picture as every viewer gets it
        self._parts = 0  # encoded so far
        self._numbers: Dict[str, Any] = {}
        self._server = _listen(host, port, token, self)
        self.port: int = self._server.server_address[1]
        self._threads = [
            threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True),
            threading.Thread(target=self._encode, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def wanted(self) -> bool:
        """Whether somebody looks: then it pays to draw."""
        return self._viewers > 0

    def publish(self, frame: Optional[np.ndarray], numbers: Dict[str, Any]) -> None:
        """Show this from now on. It takes microseconds, whatever the viewers do.

        Args:
            frame: ``(H, W, 3)`` uint8 BGR; it is not copied, so nobody may write to it afterwards. None: only
                the numbers are new, as while no picture is `wanted`.
            numbers: for the page (`page.py`), to be written as JSON; not copied either.
        """
        with self._new_frame:
            self._numbers = numbers
            if frame is not None and self._viewers:
                self._frame = frame
                self._new_frame.notify()

    def close(self) -> None:
        """Send every viewer away and free the port; no thread is left."""
        with self._new_frame:
            self._closed = True
            self._new_frame.notify()
            self._new_picture.notify_all()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join()

    def numbers(self) -> str:
        """What was published last, as JSON."""
        return json.dumps(self._numbers)

    def send_pictures(self, viewer: socket.socket) -> None:
        """Send the parts of a multipart answer until the viewer leaves or the stream closes.

        Raises:
            OSError: If the viewer left in the middle of a picture, or takes too long.
        """
        with self._new_picture:
            self._viewers += 1
            sent = self._parts
        try:
            viewer.sendall(BOUNDARY)
            while True:
                with self._new_picture:
                    while self._parts == sent and not self._closed:
                        if not self._new_picture.wait(LOOK_S) and select.select([viewer], [], [], 0)[0]:
                            return  # nothing is to be read from a viewer but its end
                    part, sent = self._part, self._parts
                if self._closed:
                    return
                viewer.sendall(part)
        finally:
            with self._new_picture:
                self._viewers -= 1

    def full(self) -> bool:
        """Whether no further viewer is taken."""
        return self._viewers >= MAX_STREAMS

    def _encode(self) -> None:
        while True:
            with self._new_frame:
                while self._frame is None and not self._closed:
                    self._new_frame.wait()
                frame, self._frame = self._frame, None
            if self._closed:
                return
            _, encoded = cv2.imencode(".jpg", frame, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))
            head = "\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n\r\n".format(encoded.size)
            # The boundary goes out behind each picture, not before the next: browsers show it at once.
            part = head.encode("ascii") + encoded.tobytes() + b"\r\n" + BOUNDARY
            with self._new_picture:
                self._part = part
                self._parts += 1
                self._new_picture.notify_all()


def _listen(host: str, port: int, token: Optional[str], stream: Stream) -> "_Server":
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if token is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            message = "{} can be reached from other machines, and there is no token".format(host)
            raise AgentError("listen", message, "give one with --token, or listen on 127.0.0.1")
        return _Server(family, address, token, stream)
    except OSError as error:
        message = "port {} on {} cannot be listened on: {}".format(port, host, error.strerror)
        if error.errno == errno.EADDRINUSE:
            message = "port {} on {} is taken by another program".format(port, host)
        remedy = "choose another port with --listen; 0 means any free one"
        raise AgentError("listen", message, remedy) from error


class _Server(socketserver.TCPServer):
    """One thread a connection, and only so many; closing ends them, whatever they wait for."""

    allow_reuse_address = True  # a restart need not wait until old connections are forgotten
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, family: int, address: Tuple[Any, ...], token: Optional[str], stream: Stream) -> None:
        self.address_family = family
        self.stream = stream
        self.token_digest = None if token is None else _digest(token)
        self._lock = threading.Lock()
        self._connections: Dict[threading.Thread, socket.socket] = {}
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Connections inherit it.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._connections) < MAX_CONNECTIONS:
                thread = threading.Thread(target=self._serve, args=(request, client_address), daemon=True)
                self._connections[thread] = request
                thread.start()
                return
        try:
            request.settimeout(0.2)
            request.recv(1 << 16)  # an answer to a request that was not read may never arrive
            request.sendall(b"HTTP/1.0 503 Too many viewers\r\n\r\n")
        except OSError:
            pass
        self.shutdown_request(request)

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError:
            pass  # the viewer left, or took too long
        finally:
            self.shutdown_request(request)
            with self._lock:
                del self._connections[threading.current_thread()]

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            connections = dict(self._connections)
        for thread, connection in connections.items():
            try:
                connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that sends or receives
            except OSError:
                pass  # it just ended
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "edgeprune", ""
    timeout = SEND_S

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        given = parse_qs(query).get("token", [None])[0]
        digest, stream = self.server.token_digest, self.server.stream
        if not self._allowed(given):
            self._answer(403, REFUSED)
        elif path == "/" and digest and given:
            cookie = "{}={}; Path=/; HttpOnly; SameSite=Lax".format(self._cookie, digest)
            self._answer(303, "", headers=(("Location", "/"), ("Set-Cookie", cookie)))
        elif path == "/":
            self._answer(200, PAGE, "text/html")
        elif path == "/numbers.json":
            self._answer(200, stream.numbers(), "application/json")
        elif path != "/stream.mjpg":
            self._answer(404, "Here are /, /stream.mjpg and /numbers.json.\n")
        elif stream.full():
            self._answer(503, "There are too many viewers.\n")
        else:
            boundary = BOUNDARY[2:].decode("ascii")
            self._head(200, "multipart/x-mixed-replace; boundary=" + boundary)
            stream.send_pictures(self.connection)

    def _refuse(self) -> None:
        self._answer(405, "", headers=(("Allow", "GET"),))

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    @property
    def _cookie(self) -> str:
        # Cookies go to every port of a host: cameras forwarded to one machine must not share a name.
        return "edgeprune-{}".format((self.server.token_digest or "")[:8])

    def _allowed(self, given: Optional[str]) -> bool:
        digest = self.server.token_digest
        if digest is None:
            return re.sub(r":\d*$", "", self.headers.get("Host", "")).lower() in OWN_NAMES
        if given is not None:
            return hmac.compare_digest(_digest(given), digest)
        pairs = (pair.strip().partition("=") for pair in self.headers.get("Cookie", "").split(";"))
        shown = {name: value for name, _, value in pairs}.get(self._cookie, "")
        return hmac.compare_digest(shown.encode("utf-8"), digest.encode("ascii"))

    def _head(self, status: int, kind: str, headers: Headers = ()) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), *HEADERS, *headers):
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, text: str, kind: str = "text/plain", headers: Headers = ()) -> None:
        body = text.encode("utf-8")
        self._head(status, kind + "; charset=utf-8", (("Content-Length", str(len(body))), *headers))
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: their addresses may hold the token."""


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8")).hexdigest()
