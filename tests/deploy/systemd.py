"""systemd for tests: a stand-in that records what it is told, and a real one of the tests' own."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SYSTEMCTL = """\
#!/bin/sh
echo "$*" >> {folder}/calls
cat {folder}/says >&2
exit $(cat {folder}/status)
"""
# systemd refuses to run where the machine was not started with it, and takes every process of its root control
# group under its wing: it gets a control group and mounts of its own, and sees no others.
ALONE = """\
cd "$0" && mkdir groups && mount -t cgroup -o none,name=systemd none groups && mkdir groups/$$ || exit 1
sh -c 'echo $$ > $0/cgroup.procs; exec unshare --cgroup --mount sh -c "$1"' groups/$$ "$1" &
trap "kill $!" TERM
wait $!; wait $!
find groups/$$ -depth -type d -exec rmdir {} +
"""
INSIDE = """\
mount -t tmpfs none /run/systemd && mkdir /run/systemd/system &&
mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/systemd &&
mount -t cgroup -o none,name=systemd none /sys/fs/cgroup/systemd && exec /lib/systemd/systemd --user
"""


class FakeSystemctl:
    """A `systemctl` that records its arguments.

    Attributes:
        path: to put in front of PATH.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = folder / "bin"
        self.path.mkdir(parents=True)
        self.answers()
        (folder / "calls").touch()
        program = self.path / "systemctl"
        program.write_text(SYSTEMCTL.format(folder=folder))
        program.chmod(0o755)

    def answers(self, status: int = 0, says: str = "") -> None:
        """What every call gives from now on."""
        (self._folder / "status").write_text(str(status))
        (self._folder / "says").write_text(says)

    @property
    def calls(self) -> list[str]:
        return (self._folder / "calls").read_text().splitlines()


@contextmanager
def real_systemd(folder: Path) -> Iterator[dict[str, str] | None]:
    """Run a user's systemd; gives the environment that reaches it, None where it cannot be run."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder / "run"), "HOME": str(folder / "home")}
    for name in ("XDG_CONFIG_HOME", "DBUS_SESSION_BUS_ADDRESS"):
        environment.pop(name, None)
    (folder / "home").mkdir(parents=True)
    (folder / "run").mkdir(mode=0o700)
    if os.getuid() or not shutil.which("unshare") or not Path("/lib/systemd/systemd").exists():
        yield None
        return
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", ALONE, str(folder), INSIDE],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    socket = folder / "run" / "systemd" / "private"
    give_up_at = time.monotonic() + 10
    while not socket.exists() and process.poll() is None and time.monotonic() < give_up_at:
        time.sleep(0.05)
    try:
        yield environment if socket.exists() and process.poll() is None else None
    finally:
        process.terminate()
        process.wait(30)
