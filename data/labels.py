"""What a reader hands over: the labels as its format states them, unchecked, and where each one stands."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, NamedTuple

from edgeprune.data.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".avi", ".mp4", ".mov", ".mkv", ".m4v", ".webm")


@dataclass(frozen=True)
class Problem:
    """Something in a data set that was dropped or changed."""

    file: str
    """Label file or image."""
    where: str
    """Place in the file."""
    what: str
    """What is wrong, and what was done."""
    lost: Literal["image", "box", "class", "nothing"]
    """What the data set has one less of; nothing where a box was only cut."""

    def __post_init__(self) -> None:
        for name, text in vars(self).items():  # a file's name need not be text that can be printed
            object.__setattr__(self, name, text.encode("utf-8", "backslashreplace").decode())

    def __str__(self) -> str:
        return f"{self.file}: {self.where}: {self.what}"


class Entry(NamedTuple):
    """One image, box or class of the labels, in COCO's form; any value may be of any type."""

    content: Any
    file: str
    where: str


@dataclass
class Labels:
    """Filled by one reader; `dataset.py` checks every entry."""

    format: str
    path: Path
    """The label file, or the folder of the label files."""
    root: Path
    """Folder that the images' names are below."""
    sized: bool = False
    """Whether the format states image sizes; they are checked then, else read from the images."""
    amodal: bool = False
    """Whether boxes are of whole people and so may reach outside their image."""
    centred_shares: bool = False
    """Whether boxes are YOLO's: the centre's x and y, width and height, as shares of the image's size."""
    categories: list[Entry] = field(default_factory=list)
    images: list[Entry] = field(default_factory=list)
    boxes: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    _hashes: list[str] = field(default_factory=list)
    _category_ids: dict[str, int] = field(default_factory=dict)

    def read(self, file: Path) -> bytes:
        """The content of a label file, which counts for `sha256`.

        Raises:
            DataError: If it cannot be read.
        """
        try:
            content = file.read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
        self._hashes.append(hashlib.sha256(content).hexdigest())
        return content

    def read_lines(self, file: Path) -> list[tuple[int, str]]:
        """The lines of a text that are not blank, with their numbers from 1; errors as `read`."""
        try:
            text = self.read(file).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is no text in UTF-8: {error}") from error
        return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]

    @property
    def sha256(self) -> str:
        """Of all label files that were read, in order."""
        if len(self._hashes) == 1:
            return self._hashes[0]
        return hashlib.sha256("\n".join(self._hashes).encode()).hexdigest()

    def problem(self, file: Path, where: str, what: str, lost: Literal["image", "box"] = "box") -> None:
        """List something that the reader itself could not use."""
        self.problems.append(Problem(str(file), where, what, lost))

    def add_class(self, name: str, where: str = "") -> int:
        """Add a class, unless it is known; returns its id."""
        if name not in self._category_ids:
            self._category_ids[name] = len(self._category_ids)
            category = {"id": self._category_ids[name], "name": name}
            self.categories.append(Entry(category, str(self.path), where or f"class {name!r}"))
        return self._category_ids[name]

    def add_image(self, name: Any, file: Path, where: str, **more: Any) -> int:
        """Add an image.

        Args:
            name: below `root`.
            more: `width` and `height`; `video_id` and `frame_id` of a frame that is stored as an image.

        Returns:
            Its id.
        """
        number = len(self.images) + 1
        self.images.append(Entry({"id": number, "file_name": name, **more}, str(file), where))
        return number

    def add_box(
        self, image_id: int, category_id: int, bbox: Any, file: Path, where: str, ignore: Any = 0
    ) -> None:
        """Add a box: ``[x, y, width, height]`` in pixels, or as `centred_shares` says."""
        box = {
            "id": len(self.boxes),
            "image_id": image_id,
            "category_id": category_id,
            "bbox": bbox,
            "ignore": ignore,
        }
        self.boxes.append(Entry(box, str(file), where))


def check_inside(name: str, file: Path, key: str) -> str:
    """Refuse a path in a label file that leads out of the folder it is below; returns it.

    Raises:
        DataError: If it is absolute or goes up.
    """
    parts = PureWindowsPath(name)  # knows both kinds of slash, and drives
    if parts.anchor or ".." in parts.parts:
        raise DataError(f"{file}: {key} {name!r} leaves the folder of images; only names below it are read")
    return name


def children(folder: Path, suffixes: tuple[str, ...] = (), *, deep: bool = False) -> list[Path]:
    """Files of a folder, sorted, hidden ones left out.

    Args:
        suffixes: in small letters; none for all.
        deep: also those of its folders.

    Raises:
        DataError: If the folder cannot be listed.
    """
    try:
        found = sorted(folder.rglob("*") if deep else folder.iterdir())
        return [
            path
            for path in found
            if not path.name.startswith(".")
            and (not suffixes or path.suffix.lower() in suffixes)
            and path.is_file()
        ]
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, sorted, hidden ones left out; errors as `children`."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error


def is_file(path: Path) -> bool:
    """Whether this is a file, also for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether this is a folder, also for a name that no folder can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def named_image(folder: Path, stem: str) -> str:
    """Name of the image with this stem in a folder; "stem.jpg" where there is none."""
    names = [stem + suffix for suffix in IMAGE_SUFFIXES]
    return next((name for name in names if is_file(folder / name)), names[0])


def to_number(text: str) -> float | None:
    """A number in a text; None for anything else, which the check of boxes then names."""
    try:
        return float(text)
    except ValueError:
        return None
