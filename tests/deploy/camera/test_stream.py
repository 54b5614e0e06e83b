"""The camera's stream over HTTP: who may look, and that nobody who looks can hold the camera up."""

import http.client
import json
import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import cv2
import numpy as np
import pytest

from edgeprune.deploy.device.camera import stream as module
from edgeprune.deploy.device.camera.stream import MAX_CONNECTIONS, MAX_STREAMS, Stream
from edgeprune.deploy.device.errors import AgentError

TOKEN = "a token, with signs: ü&=;"
QUERY = "token=a%20token%2C%20with%20signs%3A%20%C3%BC%26%3D%3B"
NUMBERS = {"fps": 12.5, "frames": 7}


@pytest.fixture
def make() -> Iterator[Callable[..., Stream]]:
    """Make streams; when they are closed, every thread of theirs is gone and the port free again."""
    before = set(threading.enumerate())
    made: list[Stream] = []

    def stream(token: str | None = None) -> Stream:
        made.append(Stream("127.0.0.1", 0, token))
        return made[-1]

    yield stream
    for one in made:
        one.close()
        socket.create_server(("127.0.0.1", one.port)).close()
    eventually(lambda: set(threading.enumerate()) <= before, "a thread is left")


class Served(NamedTuple):
    """A stream of another process."""

    port: int


class Answer:
    """What came back for one request."""

    def __init__(self, stream: Stream | Served, path: str, method: str = "GET", **headers: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", stream.port, timeout=10)
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        self.status, self.headers, self.body = response.status, response.headers, response.read()
        connection.close()


class Viewer:
    """A client of the stream that reads when it is told to."""

    def __init__(self, stream: Stream | Served, receive_buffer: int | None = None) -> None:
        self._socket = socket.socket()
        if receive_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(10)
        self._socket.connect(("127.0.0.1", stream.port))
        self._socket.sendall(b"GET /stream.mjpg HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self._file = self._socket.makefile("rb")
        self.status = int(self._file.readline().split()[1])
        self.headers = dict(iter(self._header, None))

    def _header(self) -> tuple[str, str] | None:
        name, _, value = self._file.readline().decode().strip().partition(": ")
        return (name, value) if name else None

    def picture(self) -> Any:
        """The next picture, decoded; read as RFC 2046 says, by its own length."""
        boundary = self.headers["Content-Type"].split("boundary=")[1]
        assert self._file.readline().strip().decode() == f"--{boundary}"
        head = dict(iter(self._header, None))
        assert head["Content-Type"] == "image/jpeg"
        encoded = self._file.read(int(head["Content-Length"]))
        assert self._file.read(2) == b"\r\n"
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)

    def ended(self) -> bool:
        """Whether the server hung up, once all that it sent is read."""
        try:
            while self._file.read(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def grey(level: int, noise: int = 0) -> Any:
    picture = np.full((120, 160, 3), level, np.uint8)
    return picture + np.random.default_rng(level).integers(0, noise + 1, picture.shape, np.uint8)


def eventually(condition: Callable[[], Any], failure: str) -> None:
    give_up_at = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up_at, failure
        time.sleep(0.01)


def test_pictures_and_numbers_arrive(make: Callable[..., Stream]) -> None:
    """A viewer gets each picture that is published, as JPEG, and the numbers are the last ones."""
    stream = make()
    assert not stream.wanted()
    viewer = Viewer(stream)
    assert viewer.status == 200
    eventually(stream.wanted, "the viewer is not seen")
    for level in (40, 90, 200):
        stream.publish(grey(level), {**NUMBERS, "level": level})
        shown = viewer.picture()
        assert shown.shape == (120, 160, 3)
        assert abs(shown.mean() - level) < 2
    stream.publish(None, {**NUMBERS, "level": 201})
    assert json.loads(Answer(stream, "/numbers.json").body) == {**NUMBERS, "level": 201}
    page = Answer(stream, "/")
    assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"stream.mjpg" in page.body
    viewer.close()
    eventually(lambda: not stream.wanted(), "the viewer is still counted")


def test_a_picture_is_encoded_once_and_only_for_viewers(
    make: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody looks: nothing is encoded. Three look: each picture is encoded once."""
    encoded: list[int] = []
    encode = cv2.imencode
    monkeypatch.setattr(module.cv2, "imencode", lambda *args: encoded.append(1) or encode(*args))
    stream = make()
    for _ in range(10):
        stream.publish(grey(1), NUMBERS)
    Answer(stream, "/numbers.json")
    assert encoded == []
    viewers = [Viewer(stream) for _ in range(3)]
    eventually(lambda: stream._viewers == 3, "the viewers are not seen")
    for count in range(1, 6):
        stream.publish(grey(count), NUMBERS)
        for viewer in viewers:
            viewer.picture()
        assert len(encoded) == count
    for viewer in viewers:
        viewer.close()


def test_a_viewer_that_reads_nothing_is_dropped_and_never_waited_for(
    make: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it hangs, publishing takes no time and others get their pictures; then it is gone."""
    monkeypatch.setattr(module._Handler, "timeout", 1.0)
    stream = make()
    hanging, other = Viewer(stream, 4096), Viewer(stream)
    eventually(lambda: stream._viewers == 2, "the viewers are not seen")
    slowest_s, seen = 0.0, 0
    picture = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), np.uint8)  # about 1 MB as JPEG
    give_up_at = time.monotonic() + 10
    while stream._viewers == 2 and time.monotonic() < give_up_at:
        start = time.perf_counter()
        stream.publish(picture, NUMBERS)
        slowest_s = max(slowest_s, time.perf_counter() - start)
        other.picture()
        seen += 1
    assert stream._viewers == 1, "the viewer that reads nothing is still there"
    assert seen > 3
    assert slowest_s < 0.1  # microseconds, but for a machine that runs other tests beside it
    assert hanging.ended()
    hanging.close()
    other.close()


def test_a_slow_viewer_sees_the_present(make: Callable[..., Stream]) -> None:
    """Whoever did not read for a while gets a few old pictures at most, then the newest."""
    stream = make()
    viewer = Viewer(stream, 4096)
    eventually(stream.wanted, "the viewer is not seen")
    for level in range(200):
        stream.publish(grey(level, noise=40), NUMBERS)
        time.sleep(0.005)
    behind = 0
    while abs(viewer.picture().mean() - (199 + 20)) > 3:
        behind += 1
    assert behind < 60
    viewer.close()


def test_a_viewer_that_leaves_while_the_camera_stands_still_is_noticed(make: Callable[..., Stream]) -> None:
    """No picture comes, so none fails to be sent; its place is free all the same."""
    stream = make()
    viewer = Viewer(stream)
    eventually(stream.wanted, "the viewer is not seen")
    viewer.close()
    eventually(lambda: not stream.wanted(), "the viewer is still counted")


def test_viewers_are_bounded(make: Callable[..., Stream]) -> None:
    """One viewer too many gets 503 and the numbers still come; a flood of connections gets 503, too."""
    stream = make()
    viewers = [Viewer(stream) for _ in range(MAX_STREAMS)]
    eventually(lambda: stream._viewers == MAX_STREAMS, "the viewers are not seen")
    assert Answer(stream, "/stream.mjpg").status == 503
    assert Answer(stream, "/numbers.json").status == 200
    idle = [
        socket.create_connection(("127.0.0.1", stream.port)) for _ in range(MAX_CONNECTIONS - MAX_STREAMS)
    ]
    eventually(lambda: Answer(stream, "/numbers.json").status == 503, "connections are not bounded")
    assert threading.active_count() < MAX_CONNECTIONS + 10
    for connection in idle:
        connection.close()
    eventually(lambda: Answer(stream, "/numbers.json").status == 200, "it does not recover")
    viewers.pop().close()
    eventually(lambda: stream._viewers < MAX_STREAMS, "the viewer is still counted")
    viewers.append(Viewer(stream))
    assert viewers[-1].status == 200
    for viewer in viewers:
        viewer.close()


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize(
    "path",
    [
        *("/../etc/passwd", "/..%2f..%2fetc/passwd", "//etc/passwd", "/stream.mjpg/..", "/page.py", "//["),
        *("http://localhost/", "/numbers.json%00", "/index.html", "/%2e%2e/", "*"),
    ],
)
def test_no_other_path_is_served(make: Callable[..., Stream], path: str, token: str | None) -> None:
    """404 for whoever may look, 403 for whoever may not: nothing tells what is there."""
    stream = make(token)
    assert Answer(stream, path + "?" + QUERY).status == 404
    if token:
        assert Answer(stream, path).status == 403


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_other_methods_are_refused(make: Callable[..., Stream], method: str) -> None:
    """405 says that GET is all there is; a method that HTTP does not know gets 501."""
    stream = make()
    answer = Answer(stream, "/", method)
    assert (answer.status, answer.headers["Allow"], answer.body) == (405, "GET", b"")
    assert Answer(stream, "/", "BREW").status == 501


@pytest.mark.parametrize("path", ["/", "/stream.mjpg", "/numbers.json"])
def test_the_token_is_needed(make: Callable[..., Stream], path: str) -> None:
    """Without it, with a wrong one, or with another camera's cookie: 403."""
    stream = make(TOKEN)
    name = Answer(stream, f"/?{QUERY}").headers["Set-Cookie"].partition("=")[0]
    assert Answer(stream, path).status == 403
    assert Answer(stream, f"{path}?token=wrong").status == 403
    assert Answer(stream, f"{path}?token=").status == 403
    assert Answer(stream, f"{path}?{QUERY}x").status == 403
    for cookie in (name, f"{name}=", f"{name}={'0' * 64}", "edgeprune-=", "=", ";;", "\xfc"):
        assert Answer(stream, path, Cookie=cookie).status == 403
    if path != "/stream.mjpg":
        assert Answer(stream, f"{path}?{QUERY}").status == (303 if path == "/" else 200)


def test_the_first_visit_leaves_a_cookie(make: Callable[..., Stream]) -> None:
    """It goes on without the token in the address: page, numbers and stream come with the cookie."""
    stream = make(TOKEN)
    first = Answer(stream, f"/?{QUERY}")
    assert (first.status, first.headers["Location"]) == (303, "/")
    cookie, *attributes = first.headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} == set(attributes)
    assert "token" not in cookie
    for path in ("/", "/numbers.json"):
        answer = Answer(stream, path, Cookie=f"other=1; {cookie}")
        assert answer.status == 200
        assert TOKEN.encode() not in answer.body
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cache-Control"] == "no-store"
    connection = http.client.HTTPConnection("127.0.0.1", stream.port, timeout=10)
    connection.request("GET", "/stream.mjpg", headers={"Cookie": cookie})
    assert connection.getresponse().status == 200
    connection.close()


def test_tokens_are_compared_in_constant_time(
    make: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every comparison is hmac.compare_digest's, of two digests of the same length."""
    compared: list[tuple[Any, Any]] = []
    compare = module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    stream = make(TOKEN)
    for given in ("", "a", TOKEN):
        Answer(stream, "/numbers.json?token=" + quote(given) if given else "/numbers.json")
    assert len(compared) == 3
    assert {len(pair[0]) for pair in compared[1:]} == {64}
    assert {len(pair[1]) for pair in compared} == {64}


def test_the_token_is_never_logged(
    make: Callable[..., Stream], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is printed or logged, whatever is asked for."""
    caplog.set_level(logging.DEBUG)
    stream = make(TOKEN)
    for path in (f"/?{QUERY}", f"/nothing?{QUERY}", f"/numbers.json?{QUERY}", "/?token=wrong"):
        Answer(stream, path)
    Answer(stream, f"/?{QUERY}", "BREW")
    with socket.create_connection(("127.0.0.1", stream.port)) as connection:
        connection.sendall(f"GET /?{QUERY} nonsense\r\n\r\n".encode())
        connection.recv(1 << 16)
    with socket.create_connection(("127.0.0.1", stream.port)) as connection:
        connection.sendall(f"GET /?{QUERY}".encode())  # and leaves
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(("localhost", 200), ("localhost:9000", 200), ("127.0.0.1", 200), ("[::1]:80", 200)),
        *(("LOCALHOST:1", 200), ("attacker.example", 403), ("127.0.0.1.attacker.example:80", 403)),
        *(("localhost.attacker.example", 403), ("192.168.1.4", 403), ("", 403), ("[", 403)),
    ],
)
def test_a_web_page_cannot_rename_itself_to_the_camera(
    make: Callable[..., Stream], host: str, status: int
) -> None:
    """Without a token only this machine's own names are answered, at any port: an SSH forward changes it."""
    assert Answer(make(), "/numbers.json", Host=host).status == status


def test_with_a_token_any_name_will_do(make: Callable[..., Stream]) -> None:
    """The device has names that nobody can list; the token is what counts."""
    assert Answer(make(TOKEN), f"/numbers.json?{QUERY}", Host="nano.local").status == 200


def test_what_cannot_be_listened_on() -> None:
    """A taken port, another machine's address, an unknown host, all the world without a token: one line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AgentError, match=f"port {port} on 127.0.0.1 is taken") as raised:
            Stream("127.0.0.1", port)
        assert "--listen" in raised.value.remedy
    with pytest.raises(AgentError, match="cannot be listened on"):
        Stream("192.0.2.1", 0, TOKEN)
    with pytest.raises(AgentError, match="cannot be listened on"):
        Stream("no.such.name.invalid", 0)
    for everywhere in ("0.0.0.0", "::"):
        with pytest.raises(AgentError, match="there is no token"):
            Stream(everywhere, 0)


def test_closing_waits_for_nobody(make: Callable[..., Stream]) -> None:
    """A viewer that looks, one that hangs in mid-picture, and one that never asks: closing is quick."""
    stream = make()
    looking, hanging = Viewer(stream), Viewer(stream, 4096)
    silent = socket.create_connection(("127.0.0.1", stream.port))
    eventually(lambda: stream._viewers == 2, "the viewers are not seen")
    picture = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), np.uint8)
    for _ in range(3):
        stream.publish(picture, NUMBERS)
        looking.picture()
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 2
    assert looking.ended()
    assert hanging.ended()
    for one in (looking, hanging, silent):
        one.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", stream.port))
    stream.close()  # once more does no harm


def test_under_python_3_6(agent_python: Callable[[str], str]) -> None:
    """JetPack 4.6's Python serves page, numbers and pictures all the same, and ends when it is told to."""
    code = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import numpy as np
from device.camera.stream import Stream
stream = Stream("127.0.0.1", 0)
stream.publish(None, {"frames": 7})
print(stream.port, flush=True)
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
while not ended.wait(0.02):
    stream.publish(np.full((120, 160, 3), 90, np.uint8), {"frames": 7})
stream.close()
print(threading.active_count() <= 2, stream.wanted())
"""
    folder = str(Path(module.__file__).parents[2])
    command = [agent_python("3.6"), "-c", code, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        there = Served(int(process.stdout.readline()))
        assert Answer(there, "/").status == 200
        assert json.loads(Answer(there, "/numbers.json").body) == {"frames": 7}
        assert Answer(there, "/../etc/passwd").status == 404
        assert Answer(there, "/", "HEAD").status == 405
        assert Answer(there, "/", Host="attacker.example").status == 403
        viewer = Viewer(there)
        assert abs(viewer.picture().mean() - 90) < 2
        told, _ = process.communicate(timeout=10)
        assert told.split() == ["True", "False"]  # only this thread, or the one that waited as well
        viewer.close()
