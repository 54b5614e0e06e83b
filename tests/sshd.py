"""A real sshd on loopback, with throwaway keys, and ssh configurations that reach it, or fail to."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

# Forwards a connection, and cuts it after so many bytes towards the server.
CUT = """
import os, select, socket, sys
port, left = int(sys.argv[1]), int(sys.argv[2])
server = socket.create_connection(("127.0.0.1", port))
while True:
    for ready in select.select([0, server], [], [])[0]:
        chunk = server.recv(65536) if ready is server else os.read(0, 65536)
        if not chunk or left <= 0:
            sys.exit(1)
        if ready is server:
            os.write(1, chunk)
        else:
            server.sendall(chunk[:left])
            left -= len(chunk)
"""


class Sshd:
    """Attributes:
    config: an ssh configuration whose host "board" works.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], options: str = "") -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True)
        for name in ("host", "other_host", "user", "stranger"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.copy(folder / "user.pub", folder / "authorized_keys")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        values = " ".join(f'"{name}={value}"' for name, value in environment.items())
        (folder / "sshd_config").write_text(
            f"""
ListenAddress 127.0.0.1
Port {self.port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized_keys
PidFile {folder}/sshd.pid
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
{"SetEnv " + values if values else ""}
{options}
"""
        )
        program = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
        assert program
        with (folder / "sshd.log").open("wb") as log:
            command = [program, "-D", "-e", "-f", str(folder / "sshd_config")]
            self._process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
        give_up_at = time.monotonic() + 10
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert time.monotonic() < give_up_at, (folder / "sshd.log").read_text()
            time.sleep(0.02)
        self.config = self.write_config("config")

    def write_config(
        self,
        name: str,
        *,
        key: str = "user",
        known: str | None = "host",
        port: int | None = None,
        cut_after_bytes: int | None = None,
    ) -> Path:
        """Write an ssh configuration for the host "board".

        Args:
            known: whose key is in known_hosts; None: it is empty.
            port: another than the server's.
            cut_after_bytes: the connection breaks after so many bytes.
        """
        known_hosts = self.folder / f"{name}.known_hosts"
        host_key = (self.folder / f"{known}.pub").read_text() if known else ""
        known_hosts.write_text(f"[127.0.0.1]:{port or self.port} {host_key}" if known else "")
        proxy = ""
        if cut_after_bytes is not None:
            (self.folder / "cut.py").write_text(CUT)
            proxy = f"ProxyCommand {sys.executable} {self.folder}/cut.py {self.port} {cut_after_bytes}"
        path = self.folder / name
        path.write_text(
            f"""
Host board
  HostName 127.0.0.1
  Port {port or self.port}
  User {getpass.getuser()}
  IdentityFile {self.folder}/{key}
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {known_hosts}
  GlobalKnownHostsFile /dev/null
  {proxy}
"""
        )
        return path

    def cut(self) -> None:
        """Kill the server's side of every connection; it goes on listening."""
        for process in _descendants(self._process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                if Path(f"/proc/{process}/comm").read_text().strip() in ("sshd", "sshd-session"):
                    os.kill(process, signal.SIGKILL)

    def stop(self) -> None:
        for process in _descendants(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.kill()
        self._process.wait()


def _descendants(process: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{process}/task/{process}/children").read_text()
        found = [int(child) for child in children.split()]
    return [*found, *(further for child in found for further in _descendants(child))]
