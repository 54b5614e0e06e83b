"""Files written whole or not at all, and read with errors that name the file."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgeprune.data.errors import EdgePruneError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix, that replaces `path` when the block succeeds.

    Raises:
        EdgePruneError: If the file system refuses (no space, no permission, no such folder). `path` is
            then as it was and the temporary file is gone, as it is after any other exception.
    """
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise EdgePruneError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # never made; what failed before says why
            temporary.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data`, whole or not at all; errors as `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON, whole or not at all; errors as `atomic_path`.

    Raises:
        ValueError: If a number is not finite: JSON has none, and an unmeasured value is null.
    """
    write_bytes(path, (json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        EdgePruneError: If it is missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise EdgePruneError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise EdgePruneError(f"{path} is not valid JSON: {error}") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits.

    Raises:
        EdgePruneError: If it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise EdgePruneError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()
