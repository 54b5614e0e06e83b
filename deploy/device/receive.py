"""Receive files from the host. Stands alone: it is sent as the text of ``python3 -c``, before the agent.

The host writes one JSON line to standard input, {"files": [{"path", "size", "sha256"}], "limit_bytes"}; this
answers with one line, {"have": [bytes of each file that are already here]}, reads the rest of each file in
order, and ends with {"ok": true} or {"error": {"kind", "message", "remedy"}}. A cut connection leaves
FILE.part, and the next try goes on there. Old content in files/ makes room when the limit is reached.
"""

import errno
import fcntl
import hashlib
import json
import os
import sys
import time
from typing import Any, BinaryIO, Dict, Set, TextIO

CHUNK = 1 << 16
LOCK_WAIT_S = 60.0
KEPT_FREE_BYTES = 64 << 20  # on the disk, for results and logs


class Failure(Exception):
    def __init__(self, kind: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.record = {"kind": kind, "message": message, "remedy": remedy}


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def hold_folder() -> TextIO:
    """Wait for an earlier transfer to end: one whose connection was cut may still be writing what it got."""
    lock = open("receive.lock", "w", encoding="utf-8")  # held until this process ends
    give_up_at = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:  # noqa: PERF203
            if time.monotonic() > give_up_at:
                message = "another transfer to the device is going on"
                raise Failure("busy", message, "wait for it to end, then run the command again") from None
            time.sleep(0.1)


def held_bytes(entry: Dict[str, Any]) -> int:
    """How much of a file is here; a whole file that is not what it should be counts as nothing."""
    path, part = entry["path"], entry["path"] + ".part"
    if os.path.isfile(path):
        if os.path.getsize(path) == entry["size"] and sha256_of(path) == entry["sha256"]:
            os.utime(path, None)  # used just now: the last to be removed
            return os.path.getsize(path)
        os.unlink(path)
    if os.path.isfile(part):
        if os.path.getsize(part) <= entry["size"]:
            return os.path.getsize(part)
        os.unlink(part)
    return 0


def make_room(needed: int, limit: int, wanted: Set[str]) -> None:
    """Remove the content that was not used for longest until `needed` bytes fit into the limit."""
    found = []
    if os.path.isdir("files"):
        for name in os.listdir("files"):
            path = "files/" + name
            if path not in wanted:
                found.append((os.path.getmtime(path), os.path.getsize(path), path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total + needed <= limit:
            break
        os.unlink(path)
        total -= size
    disk = os.statvfs(".")
    free = disk.f_bavail * disk.f_frsize
    if needed and free < needed + KEPT_FREE_BYTES:
        message = "the device's disk is full: {} MiB are to be sent, {} MiB are free".format(
            needed >> 20, free >> 20
        )
        raise Failure(
            "disk", message, "free space there, or empty edgeprune's cache with `edgeprune device clean`"
        )


def receive(entry: Dict[str, Any], have: int, source: BinaryIO) -> None:
    path, part = entry["path"], entry["path"] + ".part"
    if have == entry["size"] and os.path.isfile(path):
        return
    with open(part, "ab") as file:
        left = entry["size"] - have
        while left:
            chunk = source.read(min(left, CHUNK))
            if not chunk:
                raise Failure(
                    "connection", "the connection was cut in the middle of " + path, "run the command again"
                )
            file.write(chunk)
            file.flush()
            left -= len(chunk)
        os.fsync(file.fileno())
    if sha256_of(part) != entry["sha256"]:
        os.unlink(part)
        raise Failure("checksum", path + " arrived damaged and was removed", "run the command again")
    os.replace(part, path)


def inside(path: str) -> None:
    if os.path.isabs(path) or ".." in path.split("/"):
        raise Failure("job", "{!r} lies outside the work folder".format(path), "")


def main(root: str) -> None:
    source, sink = sys.stdin.buffer, sys.stdout
    os.umask(0o077)  # a job may hold a camera's password or the token of its page
    place = root
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        os.chdir(root)
        lock = hold_folder()
        order = json.loads(source.readline().decode("utf-8"))
        files = order["files"]
        for entry in files:
            inside(entry["path"])
            place = entry["path"]
            os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
        have = [held_bytes(entry) for entry in files]
        needed = sum(entry["size"] for entry in files) - sum(have)
        make_room(needed, order["limit_bytes"], {entry["path"] for entry in files})
        sink.write(json.dumps({"have": have}) + "\n")
        sink.flush()
        for entry, held in zip(files, have):
            place = entry["path"]
            receive(entry, held, source)
        sink.write(json.dumps({"ok": True}) + "\n")
        lock.close()
    except Failure as failure:
        sink.write(json.dumps({"error": failure.record}) + "\n")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = "the device's disk is full" if full else error.strerror
        record = {
            "kind": "disk",
            "message": "{} cannot be written on the device: {}".format(place, kind),
            "remedy": "free space there, or choose another folder with --device-folder",
        }
        sink.write(json.dumps({"error": record}) + "\n")
    sink.flush()


if __name__ == "__main__":
    main(sys.argv[1])
