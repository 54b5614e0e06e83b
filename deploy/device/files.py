"""Files on the device: written whole or not at all, never outside the work folder, checked before use."""

import errno
import hashlib
import json
import os
from typing import Any, Dict

from .errors import AgentError


def write_json(path: str, record: Any) -> None:
    """Write `record` so that `path` holds all of it or what it held before.

    Raises:
        AgentError: If the disk is full or the folder cannot be written.
    """
    temporary = "{}.{}.tmp".format(path, os.getpid())
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise disk_error(error, path) from error


def read_json(path: str) -> Any:
    """Read a JSON file.

    Raises:
        AgentError: If it is missing or is no JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise AgentError("job", "{} cannot be read: {}".format(path, error)) from error


def disk_error(error: OSError, path: str) -> AgentError:
    """Say what a failed write means for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return AgentError("disk", "the device's disk is full: {} was not written".format(path), CLEAN)
    return AgentError("disk", "{} cannot be written on the device: {}".format(path, error.strerror), WRITABLE)


CLEAN = "free space there, or empty edgeprune's cache with `edgeprune device clean`"
WRITABLE = "make the folder writable, or choose another one with --device-folder"


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def inside(path: str) -> str:
    """Return the relative `path` when it stays in the work folder (the current one).

    Raises:
        AgentError: If it is absolute or leads out of the folder.
    """
    root = os.path.realpath(os.curdir)
    if os.path.isabs(path) or not os.path.realpath(path).startswith(root + os.sep):
        raise AgentError("job", "the job names {!r}, which lies outside the work folder".format(path))
    return path


def verified(reference: Dict[str, str]) -> str:
    """Return the path of a file reference ``{"path", "sha256", ...}`` whose content is what the job says.

    Raises:
        AgentError: If the file is missing or differs; it is removed then, so that the next run sends it anew.
    """
    path = inside(reference["path"])
    if not os.path.isfile(path):
        raise AgentError("checksum", "{} is not on the device".format(path), "run the command again")
    if sha256_of(path) != reference["sha256"]:
        os.unlink(path)
        raise AgentError(
            "checksum", "{} on the device is not the file that was sent".format(path), "run the command again"
        )
    return path
