"""The way to a device: run a command there, put files there, get files back. The one seam to the outside."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

from edgeprune.data.files import atomic_path, sha256_of
from edgeprune.deploy.errors import DeviceError

END_GRACE_S = 5.0  # between asking a process to end and ending it
CHUNK_BYTES = 1 << 16
CACHE_LIMIT_BYTES = 4 << 30  # of sent files kept on a device
SSH_FAILED = 255  # ssh's own status for every failure of its own
FORWARD_TRIES = 5  # ssh cannot choose a free port here: ours may be taken by then
MAX_SOCKETS_IN = 26  # bytes of a path that takes ours and ssh's names
REMOTE_FOLDER = ".cache/edgeprune/device"  # in the user's home


@dataclass(frozen=True)
class Completed:
    """A command that ended."""

    status: int  # negative: ended by that signal
    stderr: str


class Stop:
    """Asks the command that runs with it to end in order; a signal handler may call it, at any time."""

    def __init__(self) -> None:
        self._asked = False
        self._end_input: Callable[[], None] | None = None

    def __call__(self) -> None:
        self._asked = True
        if self._end_input:
            self._end_input()

    def attach(self, end_input: Callable[[], None]) -> None:
        """Say how: the end of a command's standard input tells it that nobody waits for more."""
        self._end_input = end_input
        if self._asked:
            end_input()


class Transport(Protocol):
    """Commands run in the device's work folder; remote paths are relative to it."""

    name: str  # for people: "this machine", "user@nano.local"
    python: str  # the interpreter on the device

    def run(
        self,
        args: Sequence[str],
        *,
        timeout_s: float | None = None,
        on_line: Callable[[str], None] | None = None,
        stop: Stop | None = None,
    ) -> Completed:
        """Run a command; `on_line` takes each line of its standard output.

        Standard input stays open while the caller lives, or until `stop` is called: its end tells the command
        that the host is gone.

        Raises:
            DeviceError: If the command could not be started, took over `timeout_s`, or lost its connection.
        """

    def put(self, files: Mapping[str, Path]) -> None:
        """Have files on the device, each whole or not at all: remote path -> local file.

        What is there is not sent again, and what a cut connection left goes on where it ended.

        Raises:
            DeviceError: If a file could not be written there.
        """

    def get(self, remote: str, local: Path) -> None:
        """Copy a file from the device, whole or not at all.

        Raises:
            DeviceError: If it could not be read there.
        """

    def forward(self, host: str, port: int) -> contextlib.AbstractContextManager[tuple[str, int]]:
        """Reach a port of the device from here: gives the host and port that do.

        Args:
            host: as the device knows it; its loopback's name or an address of it.

        Raises:
            DeviceError: If the device does not forward.
        """

    def close(self) -> None:
        """End what is kept open between commands."""


class _Processes:
    """What transports share whose commands are processes here: the command itself, or ssh."""

    name: str
    python: str

    def command(self, args: Sequence[str]) -> list[str]:
        """The local process that runs `args` in the work folder."""
        raise NotImplementedError

    def starting(self) -> list[str]:
        """The local process that receives files, before there is a work folder."""
        raise NotImplementedError

    def failure(self, completed: Completed) -> DeviceError | None:
        """What it means if the way to the device failed, None if it did not."""
        raise NotImplementedError

    def run(
        self,
        args: Sequence[str],
        *,
        timeout_s: float | None = None,
        on_line: Callable[[str], None] | None = None,
        stop: Stop | None = None,
    ) -> Completed:
        with _Process(self.command(args), timeout_s) as process:
            if stop:
                stop.attach(process.end_input)
            for line in process.lines():
                if on_line:
                    on_line(line)
        if failure := self.failure(process.completed):
            raise failure
        return process.completed

    def put(self, files: Mapping[str, Path]) -> None:
        entries = [
            {"path": remote, "size": local.stat().st_size, "sha256": sha256_of(local)}
            for remote, local in files.items()
        ]
        order = {"files": entries, "limit_bytes": CACHE_LIMIT_BYTES}
        answers: list[dict[str, Any]] = []
        with _Process(self.starting()) as process:
            lines = (json.loads(line) for line in process.lines())
            with contextlib.suppress(BrokenPipeError):  # its last words say why it stopped reading
                process.write(json.dumps(order).encode() + b"\n")
                answers += islice(lines, 1)
                have = answers[0].get("have", []) if answers else []
                for local, held_bytes in zip(files.values(), have, strict=False):
                    with local.open("rb") as file:
                        file.seek(held_bytes)
                        while chunk := file.read(CHUNK_BYTES):
                            process.write(chunk)
                process.end_input()
            answers += lines
        answer = answers[-1] if answers else {}
        if failure := self.failure(process.completed):
            raise failure
        if "error" in answer:
            error = answer["error"]
            raise DeviceError(f"{self.name}: {error['message']}; {error['remedy']}", error["kind"])
        if "ok" not in answer:
            reason = _last_line(process.completed.stderr)
            raise DeviceError(f"{self.name} did not take the files: {reason}", "transfer")

    def get(self, remote: str, local: Path) -> None:
        with atomic_path(local) as temporary:
            with temporary.open("wb") as file, _Process(self.command(["cat", "--", remote])) as process:
                while chunk := process.read(CHUNK_BYTES):
                    file.write(chunk)
            if failure := self.failure(process.completed):
                raise failure
            if process.completed.status:
                reason = _last_line(process.completed.stderr)
                raise DeviceError(f"{remote} could not be read on {self.name}: {reason}", "missing")


class Local(_Processes):
    """This machine: the agent runs in a process of its own, in a work folder of its own."""

    name = "this machine"

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.python = python
        self._folder = folder

    def command(self, args: Sequence[str]) -> list[str]:
        # The shell only changes the folder: subprocess's own cwd fails where the folder is not there yet.
        return ["sh", "-c", 'cd -- "$0" && exec "$@"', str(self._folder), *args]

    def starting(self) -> list[str]:
        return [self.python, "-c", _receiver(), str(self._folder)]

    def failure(self, completed: Completed) -> DeviceError | None:
        return None

    def forward(self, host: str, port: int) -> contextlib.AbstractContextManager[tuple[str, int]]:
        return contextlib.nullcontext((host, port))

    def close(self) -> None:
        pass


class Ssh(_Processes):
    """A device over the OpenSSH client, with the user's own configuration, keys, jump hosts and known hosts.

    One connection serves all commands for as long as this object lives. Nothing ever asks for a password.

    Args:
        host: as for ssh: a name of ~/.ssh/config, ``user@name``, or ``ssh://user@name:port``.
        folder: the work folder there, relative to the home folder or absolute.
        python: the interpreter there that has TensorRT: the system's own.
        config: an ssh configuration file instead of the user's.

    Raises:
        DeviceError: If `host` would be read as an option.
    """

    def __init__(
        self, host: str, folder: str = REMOTE_FOLDER, python: str = "python3", config: Path | None = None
    ) -> None:
        if host.startswith("-") or not host.strip():
            raise DeviceError(f"{host!r} is no host name: it would be read as an option of ssh", "host")
        self.name = host
        self.python = python
        self._folder = folder
        # Short: the path of a socket may have 104 bytes, and ssh adds 58 to the folder's.
        usual = tempfile.gettempdir()
        short = usual if len(usual) <= MAX_SOCKETS_IN else "/tmp"
        self._sockets = tempfile.TemporaryDirectory(prefix="edgeprune-", dir=short)
        self._ssh = ["ssh", *(["-F", str(config)] if config else [])]
        for option in (
            "BatchMode=yes",
            "ConnectTimeout=10",
            "ServerAliveInterval=5",
            "ServerAliveCountMax=3",
            "ControlMaster=auto",
            "ControlPersist=60",
            f"ControlPath={self._sockets.name}/%C",
            "LogLevel=ERROR",
            "RequestTTY=no",
        ):
            self._ssh += ["-o", option]

    def command(self, args: Sequence[str]) -> list[str]:
        return self._remote(f"cd -- {shlex.quote(self._folder)} && exec {shlex.join(args)}")

    def starting(self) -> list[str]:
        return self._remote(shlex.join(["exec", self.python, "-c", _receiver(), self._folder]))

    def _remote(self, script: str) -> list[str]:
        # Without the subshell a command that is killed there looks like a lost connection: both give 255.
        return [*self._ssh, "--", self.name, f"( {script} ); exit $?"]

    def failure(self, completed: Completed) -> DeviceError | None:
        if completed.status != SSH_FAILED:
            return None
        said = completed.stderr
        for pattern, kind, message in _SSH_FAILURES:
            if re.search(pattern, said):
                return DeviceError(message.format(host=self.name, said=_last_line(said)), kind)
        return DeviceError(
            f"the connection to {self.name} was lost: {_last_line(said)}; run the command again, it goes on "
            "where it ended",
            "connection",
        )

    @contextlib.contextmanager
    def forward(self, host: str, port: int) -> Iterator[tuple[str, int]]:
        for _ in range(FORWARD_TRIES):
            here = _free_port()
            forward = ["-L", f"127.0.0.1:{here}:[{host}]:{port}", "--", self.name]
            asked = subprocess.run(
                [*self._ssh, "-O", "forward", *forward], capture_output=True, text=True, check=False
            )
            if asked.returncode == 0:
                break
        else:
            raise DeviceError(
                f"a port of {self.name} could not be forwarded: {_last_line(asked.stderr)}", "forward"
            )
        try:
            yield "127.0.0.1", here
        finally:
            subprocess.run([*self._ssh, "-O", "cancel", *forward], capture_output=True, check=False)

    def close(self) -> None:
        """End the shared connection."""
        subprocess.run([*self._ssh, "-O", "exit", "--", self.name], capture_output=True, check=False)
        self._sockets.cleanup()


_SSH_FAILURES = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|[Hh]ost key for .* has changed",
        "host-key",
        "the host key of {host} has changed: it is another device, or was installed anew; if you know why, "
        "forget the old key (ssh-keygen -R HOST, see `ssh {host}`) and accept the new one with `ssh {host}`",
    ),
    (
        r"Host key verification failed|No .* host key is known",
        "host-key",
        "the host key of {host} is not known; look at it and accept it with `ssh {host}`",
    ),
    (
        r"Permission denied|Too many authentication failures",
        "key",
        "{host} does not accept your key ({said}); install it with `ssh-copy-id {host}`",
    ),
    (
        r"Could not resolve|Connection refused|timed out|No route to host|Network is unreachable",
        "unreachable",
        "{host} cannot be reached ({said}); is it on, and does `ssh {host}` work?",
    ),
)


def default_folder() -> Path:
    """The work folder of this user on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeprune" / "device"


@cache
def _receiver() -> str:
    return (Path(__file__).parent / "device" / "receive.py").read_text(encoding="utf-8")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


class _Process:
    """A local process that never outlives its `with` block, whatever interrupts it.

    Raises:
        DeviceError: If it cannot be started, or on leaving the block if it ran longer than `timeout_s`.
    """

    completed: Completed  # once the block is left

    def __init__(self, args: Sequence[str], timeout_s: float | None = None) -> None:
        self._args = args
        self._timeout_s = timeout_s
        self._timed_out = threading.Event()

    def __enter__(self) -> "_Process":
        # A file, not a pipe: ssh's shared connection lives on with this process's standard error.
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                self._args,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # ctrl-C reaches us alone, and we end it in order
            )
        except OSError as error:
            self._errors.close()
            raise DeviceError(f"{self._args[0]} cannot be started: {error.strerror}", "start") from error
        self._timer = threading.Timer(self._timeout_s or 0, self._expire)
        if self._timeout_s is not None:
            self._timer.start()
        return self

    def _expire(self) -> None:
        self._timed_out.set()
        self._end()

    @property
    def _output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def lines(self) -> Iterator[str]:
        for line in self._output:
            yield line.decode("utf-8", "replace").rstrip("\n")

    def read(self, size: int) -> bytes:
        return self._output.read(size)

    def write(self, content: bytes) -> None:
        self._input.write(content)
        self._input.flush()

    def end_input(self) -> None:
        self._input.close()

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                self._output.read()
                self._process.wait()
        finally:
            self._timer.cancel()
            self._end()
            with contextlib.suppress(BrokenPipeError):
                self._input.close()
            self._output.close()
            self._errors.seek(0)
            said = self._errors.read().decode("utf-8", "replace")
            self._errors.close()
        if self._timed_out.is_set():
            raise DeviceError(f"{self._args[0]} took over {self._timeout_s:.0f} s and was ended", "timeout")
        self.completed = Completed(self._process.returncode, said)

    def _end(self) -> None:
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(END_GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
