"""What image files are, from their headers and ends: size, kind, and whether they are whole.

JPEG and PNG are not decoded for it, others are. Answers are kept in the user's cache by the file's size and
time, so that a data set is looked through once.
"""

import hashlib
import json
import logging
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import cv2

from edgeprune.data.assets import cache_folder
from edgeprune.data.errors import EdgePruneError
from edgeprune.data.files import write_bytes
from edgeprune.deploy.device.imaging import ImageError, load_image

log = logging.getLogger(__name__)

MAX_PIXELS = 1 << 27
"""Largest image, 400 MB once decoded; a header may claim any size."""

CACHE = "image-files-1"
"""Folder of what is remembered; another number when the rules here change."""

HEAD_BYTES = 1 << 16
TAIL_BYTES = 1 << 10
WORKERS = 4  # files are waited for, not computed with

JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF markers (ITU-T T.81, table B.1)
PNG_KINDS = {0: "grey", 2: "colour", 3: "colour", 4: "alpha", 6: "alpha"}  # colour types (PNG, 11.2.2)


@dataclass(frozen=True)
class ImageFile:
    """What is known of an image file; no size where it is damaged."""

    size_bytes: int
    mtime_ns: int
    width: int = 0
    """Pixels, as stored."""
    height: int = 0
    kind: str = ""
    """"colour", "grey", "CMYK", "16-bit" or "alpha"; all are read as 8-bit BGR."""
    orientation: int = 1
    """Of EXIF: 1 is upright, up to 8."""
    damage: str = ""
    """What is wrong with it; empty if nothing is known to be."""
    decoded: bool = False
    """Whether all of it was decoded."""


class _Damage(Exception):
    """What is wrong with a file."""


def look(root: Path, names: Iterable[str]) -> dict[str, ImageFile]:
    """Look at image files without decoding them where possible.

    Args:
        root: folder that the names are below.

    Returns:
        By name, those that exist.
    """
    return _remembered(root, names, lambda known: True, _look)


def decode(root: Path, names: Iterable[str], done: Callable[[], None]) -> dict[str, ImageFile]:
    """Make sure that image files decode to the size in their headers; like `look`.

    Args:
        done: called after each file.
    """

    def look_and_decode(path: Path, found: ImageFile) -> ImageFile:
        found = _look(path, found)
        return found if found.damage else _decode(path, found)

    return _remembered(root, names, lambda known: known.decoded or bool(known.damage), look_and_decode, done)


def _remembered(
    root: Path,
    names: Iterable[str],
    suffices: Callable[[ImageFile], bool],
    examine: Callable[[Path, ImageFile], ImageFile],
    done: Callable[[], None] = lambda: None,
) -> dict[str, ImageFile]:
    """Examine files of which too little is remembered."""
    place = hashlib.sha256(str(root.absolute()).encode("utf-8", "surrogatepass")).hexdigest()
    memory = _recall(place)

    def find(name: str) -> tuple[str, ImageFile | None]:
        try:
            status = (root / name).stat()
            fresh = ImageFile(status.st_size, status.st_mtime_ns)
            known = memory.get(name)
            if known is None or (known.size_bytes, known.mtime_ns) != (fresh.size_bytes, fresh.mtime_ns):
                return name, examine(root / name, fresh)
            return name, known if suffices(known) else examine(root / name, fresh)
        except (OSError, ValueError):  # gone, or a name that no file can have
            return name, None
        finally:
            done()

    with ThreadPoolExecutor(WORKERS) as pool:
        found = {name: file for name, file in pool.map(find, names) if file is not None}
    if any(memory.get(name) != file for name, file in found.items()):
        _remember(place, {**memory, **found})
    return found


def _recall(place: str) -> dict[str, ImageFile]:
    try:
        content = json.loads((cache_folder(CACHE) / f"{place}.json").read_bytes())
        return {name: ImageFile(**record) for name, record in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, EdgePruneError):
        return {}  # nothing remembered, or of another version


def _remember(place: str, memory: dict[str, ImageFile]) -> None:
    content = {name: asdict(file) for name, file in memory.items()}
    try:
        write_bytes(cache_folder(CACHE) / f"{place}.json", json.dumps(content).encode())
    except EdgePruneError as error:  # slower next time, no less right
        log.warning("%s", error)


def _look(path: Path, found: ImageFile) -> ImageFile:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            if head.startswith(b"\xff\xd8"):
                found = _jpeg(file, head, found)
            elif head.startswith(b"\x89PNG\r\n\x1a\n"):
                found = _png(file, head, found)
            else:
                return _decode(path, found)
        if found.width * found.height > MAX_PIXELS:
            raise _Damage(f"says it is {found.width}x{found.height} pixels, over {MAX_PIXELS:,}")
        return found
    except _Damage as damage:
        return ImageFile(found.size_bytes, found.mtime_ns, damage=str(damage))


def _decode(path: Path, found: ImageFile) -> ImageFile:
    try:
        height, width = load_image(str(path)).shape[:2]
    except (ImageError, cv2.error):  # OpenCV refuses a header that claims too many pixels by an exception
        return ImageFile(found.size_bytes, found.mtime_ns, damage="does not decode as an image")
    return replace(found, width=width, height=height, kind=found.kind or "colour", decoded=True)


def _jpeg(file: BinaryIO, head: bytes, found: ImageFile) -> ImageFile:
    """Read the segments, and look for the end marker."""
    try:
        data_at, found = _segments(head, found)
    except (IndexError, struct.error):  # a long profile or thumbnail may stand before the data
        try:
            data_at, found = _segments(head + file.read(), found)
        except (IndexError, struct.error):
            raise _Damage("is a truncated JPEG") from None
    if not found.width or not found.height:
        raise _Damage("is a damaged JPEG")
    if not _ends_with(file, b"\xff\xd9"):
        # A camera may have written something behind the image; compressed data has no end marker inside
        file.seek(data_at)
        if b"\xff\xd9" not in file.read():
            raise _Damage("is a truncated JPEG")
    return found


def _segments(head: bytes, found: ImageFile) -> tuple[int, ImageFile]:
    """Walk through the segments up to the compressed data (ITU-T T.81, annex B); returns where it begins."""
    at = 2
    while True:
        marker = head[at + 1]
        if head[at] != 0xFF:
            raise _Damage("is a damaged JPEG")
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        (length,) = struct.unpack_from(">H", head, at + 2)
        if marker in JPEG_SIZES:
            _, height, width, channels = struct.unpack_from(">BHHB", head, at + 4)
            kind = {1: "grey", 4: "CMYK"}.get(channels, "colour")
            found = replace(found, width=width, height=height, kind=kind)
        elif marker == 0xE1 and head[at + 4 : at + 10] == b"Exif\0\0":
            found = replace(found, orientation=_orientation(head[at + 10 : at + 2 + length]))
        elif marker == 0xDA:
            return at, found
        at += 2 + length


def _orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory (TIFF 6.0, section 2); 1 if there is none that makes sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        for number in range(count):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * number)
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _png(file: BinaryIO, head: bytes, found: ImageFile) -> ImageFile:
    """Read the IHDR chunk and look for the IEND chunk (PNG, 11.2)."""
    if len(head) < 33 or head[12:16] != b"IHDR":
        raise _Damage("is a damaged PNG")
    width, height, depth, colour = struct.unpack_from(">IIBB", head, 16)
    if not width or not height or colour not in PNG_KINDS:
        raise _Damage("is a damaged PNG")
    if not _ends_with(file, b"IEND\xae\x42\x60\x82"):
        file.seek(0)
        if b"IEND\xae\x42\x60\x82" not in file.read():
            raise _Damage("is a truncated PNG")
    return replace(found, width=width, height=height, kind="16-bit" if depth == 16 else PNG_KINDS[colour])


def _ends_with(file: BinaryIO, end: bytes) -> bool:
    file.seek(0, 2)
    file.seek(max(file.tell() - TAIL_BYTES, 0))
    return file.read().rstrip(b"\0").endswith(end)
