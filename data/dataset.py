"""Images with boxes of the classes to detect, read from COCO JSON; what cannot be used is dropped and listed.

Boxes are xyxy pixels of the image as stored: an EXIF rotation is not applied. Boxes of a crowd
(`iscrowd`) and boxes marked `ignore` are kept as ignored: they train nothing and count as COCO counts crowds.
"""

import hashlib
import math
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from edgeprune.data.assets import ASSETS, fetch
from edgeprune.data.errors import DataError
from edgeprune.data.files import read_json, sha256_of
from edgeprune.data.video import Frame, check_opens, frame_of, frame_path
from edgeprune.deploy.device.imaging import ImageError, load_image

CLIP_TOLERANCE = 1.0
"""Pixels that a box may reach outside its image by rounding; more is clipped too, but listed as a problem."""

MAX_SIDE = 2**24 - 1
"""Largest width and height in pixels: float32 boxes are exact to a pixel up to here."""


@dataclass(frozen=True)
class Problem:
    """Something in a data set that was dropped or changed."""

    file: str
    """Label file or image."""
    where: str
    """Place in the file."""
    what: str
    """What is wrong, and what was done."""

    def __str__(self) -> str:
        return f"{self.file}: {self.where}: {self.what}"


@dataclass(frozen=True, eq=False)
class Sample:
    """An image and its boxes."""

    image_id: int
    file_name: str
    """Below `Dataset.root`; a video frame is ``"vtest.avi#000123"``, counted from 0."""
    width: int
    height: int
    boxes: NDArray[np.float32]
    """``(K, 4)`` xyxy pixels, inside the image, x1 < x2 and y1 < y2."""
    ignore: NDArray[np.bool_]
    """``(K,)``."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples of one label file."""

    path: Path
    """The label file."""
    root: Path
    """Folder of the images."""
    classes: tuple[str, ...]
    sha256: str
    """Of the labels, the images' names and sizes in bytes, and the choice of samples."""
    samples: tuple[Sample, ...]
    coco: dict[str, Any]
    """Ground truth as pycocotools reads it: category 1 is the first class; ignored boxes are crowds."""
    problems: tuple[Problem, ...] = ()
    """What was dropped or clipped."""
    videos: Mapping[str, Path] = field(default_factory=dict)
    """Files of the videos that the samples name."""

    def __len__(self) -> int:
        return len(self.samples)

    def image_path(self, index: int) -> Path:
        """The image file of a sample; a video frame is extracted to a PNG in the user's cache first.

        Raises:
            DataError: If the video has no such frame.
        """
        sample = self.samples[index]
        frame = frame_of(sample.file_name)
        if frame is None:
            return self.root / sample.file_name
        of_this_video = (other.number for other in self._frames() if other and other.video == frame.video)
        return frame_path(self.videos[frame.video], frame.number, of_this_video)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Decode the image of a sample: ``(H, W, 3)``, BGR.

        Raises:
            DataError: If the file does not decode, or its size is not the one in the labels. A caller that
                can do without the image goes on with `drop`.
        """
        sample, path = self.samples[index], self.image_path(index)
        try:
            image: NDArray[np.uint8] = load_image(str(path))
        except ImageError as error:
            raise DataError(str(error)) from error
        height, width = image.shape[:2]
        if (width, height) != (sample.width, sample.height):
            raise DataError(
                f"{path} is {width}x{height} pixels and {self.path} says {sample.width}x{sample.height}: "
                "the boxes would not fit"
            )
        return image

    def subset(self, indices: Iterable[int]) -> "Dataset":
        """The samples at `indices`, in that order."""
        samples = tuple(self.samples[index] for index in indices)
        ids = {sample.image_id for sample in samples}
        coco = {
            **self.coco,
            "images": [image for image in self.coco["images"] if image["id"] in ids],
            "annotations": [box for box in self.coco["annotations"] if box["image_id"] in ids],
        }
        choice = f"{self.sha256} {[sample.image_id for sample in samples]}"
        return replace(self, sha256=hashlib.sha256(choice.encode()).hexdigest(), samples=samples, coco=coco)

    def drop(self, reasons: Mapping[int, str]) -> "Dataset":
        """Leave out samples that turned out unusable.

        Args:
            reasons: what is wrong, by index of the sample; listed in `problems`.
        """
        problems = [
            Problem(
                self.samples[index].file_name, f"image {self.samples[index].image_id}", f"{what}; dropped"
            )
            for index, what in reasons.items()
        ]
        kept = self.subset(index for index in range(len(self)) if index not in reasons)
        return replace(kept, problems=(*self.problems, *problems))

    def hold_out(self, share: float, seed: int) -> tuple["Dataset", "Dataset"]:
        """Split into a part to train on and a part to select by.

        Still images are drawn; of each video the last frames are taken, because neighbouring frames are
        almost the same image and would leak.

        Args:
            share: of the images that goes to the second part, between 0 and 1.

        Raises:
            DataError: If there are too few images to fill both parts.
        """
        if not 0 < share < 1:
            raise ValueError(f"share must be between 0 and 1, not {share}")
        stills: list[int] = []
        videos: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for index, frame in enumerate(self._frames()):
            if frame is None:
                stills.append(index)
            else:
                videos[frame.video].append((frame.number, index))
        orders = [[index for _, index in sorted(frames)] for _, frames in sorted(videos.items())]
        orders.append([stills[position] for position in np.random.default_rng(seed).permutation(len(stills))])

        selected: set[int] = set()
        for order in orders:
            count = min(max(round(share * len(order)), 1), len(order) - 1)
            selected.update(order[len(order) - count :] if count > 0 else ())
        if not selected:
            raise DataError(f"{self.path}: {len(self)} images are too few to hold some out")
        train = [index for index in range(len(self)) if index not in selected]
        return self.subset(train), self.subset(sorted(selected))

    def _frames(self) -> list[Frame | None]:
        return [frame_of(sample.file_name) for sample in self.samples]


def load_dataset(path: Path, images: Path | None = None, classes: Sequence[str] = ("person",)) -> Dataset:
    """Read COCO JSON (`images`, `annotations` with `bbox`, `categories`).

    Args:
        path: the JSON.
        images: folder of the images. Default: a folder beside the JSON named like its end
            (`person_val2017.json`: `val2017/`), or else the JSON's own folder. A video is looked for there,
            then beside the JSON, then among the assets.
        classes: names of the categories to keep.

    Raises:
        DataError: If it is no COCO JSON, lacks a class, names a file outside the folder or a video that is
            missing or does not open, or has no usable image. Single bad images and boxes are dropped and
            listed in `Dataset.problems`.
        AssetError: If a video is an asset and cannot be had.
    """
    content = read_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(
                f"{path} is not COCO JSON: it has no list {key!r}; expected an object with the lists images, "
                "annotations and categories"
            )
    if images is not None and not images.is_dir():
        raise DataError(f"no folder of images at {images}")
    root = images or _default_root(path)
    classes = tuple(dict.fromkeys(classes))
    problems: list[Problem] = []

    category_ids = _read_categories(content["categories"], path, classes, problems)
    found = _read_images(content["images"], path, root, problems)
    if not found.entries:
        first = f"; first problem: {problems[0]}" if problems else ""
        raise DataError(f"{path}: none of its {len(content['images'])} images in {root} can be used{first}")
    annotations = _read_annotations(content["annotations"], path, found, category_ids, problems)

    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        by_image[annotation["image_id"]].append(annotation)
    digest = hashlib.sha256(sha256_of(path).encode())
    for name, size_bytes in sorted(found.sizes_bytes.items()):
        digest.update(f"\n{name} {size_bytes}".encode())
    return Dataset(
        path=path,
        root=root,
        classes=classes,
        sha256=digest.hexdigest(),
        samples=tuple(_sample(entry, by_image[entry["id"]]) for entry in found.entries.values()),
        coco={
            "info": {},
            "images": list(found.entries.values()),
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in enumerate(classes, 1)],
        },
        problems=tuple(problems),
        videos=found.videos,
    )


class _Unusable(Exception):
    """What is wrong with an entry of a label file."""


def _clean_box(bbox: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """Check a COCO `bbox` and clip it to its image.

    Args:
        bbox: whatever the file holds; should be ``[x, y, width, height]``, pixels.
        width, height: of the image.

    Returns:
        xyxy, with x1 < x2 and y1 < y2 also in float32.

    Raises:
        _Unusable: If it is no box, or none in the image.
    """
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise _Unusable("bbox is no list of four numbers")
    numbers = [_number(value) for value in bbox]
    if not all(math.isfinite(number) for number in numbers):
        raise _Unusable("bbox has a value that is no finite number")
    x, y, box_width, box_height = numbers
    if box_width <= 0 or box_height <= 0:
        raise _Unusable(f"bbox is inverted or empty ({box_width:g} wide, {box_height:g} high)")
    x1, x2 = (min(max(value, 0.0), float(width)) for value in (x, x + box_width))
    y1, y2 = (min(max(value, 0.0), float(height)) for value in (y, y + box_height))
    if not (np.float32(x1) < np.float32(x2) and np.float32(y1) < np.float32(y2)):
        raise _Unusable(f"bbox is outside the {width}x{height} image, or thinner than float32 resolves")
    return x1, y1, x2, y2


def _default_root(path: Path) -> Path:
    # instances_val2017.json: val2017 beside it; of several folders that fit, the most specific
    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError as error:
        raise DataError(f"cannot list {path.parent}: {error.strerror}") from error
    fitting = [name for name in beside if f"_{path.stem}".endswith(f"_{name}")]
    return path.parent / max(fitting, key=len) if fitting else path.parent


def _read_categories(
    categories: list[Any], path: Path, classes: tuple[str, ...], problems: list[Problem]
) -> dict[int, int | None]:
    """Category id in the file -> category id in `Dataset.coco`, None for a class that was not asked for."""
    names: dict[int, str] = {}
    for position, category in enumerate(categories):
        number, name = _get(category, "id"), _get(category, "name")
        if not _is_id(number) or not isinstance(name, str) or number in names:
            what = "needs an id of its own and a name; dropped"
            problems.append(Problem(str(path), f"categories[{position}]", what))
        else:
            names[number] = name
    missing = [name for name in classes if name not in names.values()]
    if missing:
        known = ", ".join(sorted(set(names.values()))) or "none"
        raise DataError(f"{path} has no class {missing[0]!r}; its classes are: {known}")
    return {number: classes.index(name) + 1 if name in classes else None for number, name in names.items()}


@dataclass
class _Images:
    """What the list of images gave."""

    entries: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Usable ones, in pycocotools' form, by id."""
    dropped: set[int] = field(default_factory=set)
    """Ids; their boxes go without a problem of their own."""
    videos: dict[str, Path] = field(default_factory=dict)
    sizes_bytes: dict[str, int] = field(default_factory=dict)
    """Of the file, by file_name."""


def _read_images(images: list[Any], path: Path, root: Path, problems: list[Problem]) -> _Images:
    found = _Images()
    for position, image in enumerate(images):
        where, number = f"images[{position}]", _get(image, "id")
        try:
            if not _is_id(number):
                raise _Unusable(f"id {number!r} is no whole number")
            if number in found.entries:
                raise _Unusable(f"its id {number} belongs to another image")
            found.entries[number] = _read_image(image, path, root, found)
        except _Unusable as unusable:
            problems.append(Problem(str(path), where, f"{unusable}; dropped"))
            if _is_id(number):
                found.dropped.add(number)
    return found


def _read_image(image: dict[str, Any], path: Path, root: Path, found: _Images) -> dict[str, Any]:
    name = image.get("file_name")
    if not isinstance(name, str):
        raise _Unusable("has no file_name")
    parts = PureWindowsPath(name)  # knows both kinds of slash, and drives
    if parts.anchor or ".." in parts.parts:
        raise DataError(
            f"{path}: file_name {name!r} leaves the folder of images; only names below it are read"
        )
    if name in found.sizes_bytes:
        raise _Unusable(f"file_name {name!r} belongs to another image")  # it would leak through a split
    width, height = (_number(image.get(side)) for side in ("width", "height"))
    if not all(1 <= side <= MAX_SIDE and side.is_integer() for side in (width, height)):
        raise _Unusable(f"width and height are no whole numbers of pixels from 1 to {MAX_SIDE}")
    frame = frame_of(name)
    if frame is not None and frame.video not in found.videos:
        found.videos[frame.video] = _find_video(frame.video, path, root)
    file = root / name if frame is None else found.videos[frame.video]
    size_bytes = _size_bytes(file)
    if size_bytes is None:
        raise _Unusable(f"no image file {str(file)!r}")
    found.sizes_bytes[name] = size_bytes
    return {"id": image["id"], "file_name": name, "width": int(width), "height": int(height)}


def _read_annotations(
    annotations: list[Any],
    path: Path,
    images: _Images,
    category_ids: Mapping[int, int | None],
    problems: list[Problem],
) -> list[dict[str, Any]]:
    """The usable boxes of the classes asked for, in pycocotools' form."""
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    for position, annotation in enumerate(annotations):
        where = f"annotations[{position}]"
        try:
            entry = _read_annotation(annotation, seen, images, category_ids)
        except _Unusable as unusable:
            problems.append(Problem(str(path), where, f"{unusable}; dropped"))
            continue
        if entry is None:
            continue
        outside = max(
            abs(a - b) for a, b in zip(entry["bbox"], map(_number, annotation["bbox"]), strict=True)
        )
        if outside > CLIP_TOLERANCE:
            problems.append(
                Problem(str(path), where, f"bbox reaches {outside:g} px outside the image; clipped")
            )
        found.append({"id": len(found) + 1, **entry})  # pycocotools takes a match with id 0 for none
    return found


def _read_annotation(
    annotation: Any, seen: set[int], images: _Images, category_ids: Mapping[int, int | None]
) -> dict[str, Any] | None:
    """An annotation without its id; None for one of a class not asked for, or of a dropped image."""
    number, image_id, category = (_get(annotation, key) for key in ("id", "image_id", "category_id"))
    if not _is_id(number):
        raise _Unusable(f"id {number!r} is no whole number")
    if number in seen:
        raise _Unusable(f"its id {number} belongs to another annotation")
    seen.add(number)
    if not _is_id(image_id) or (image_id not in images.entries and image_id not in images.dropped):
        raise _Unusable(f"there is no image with the id {image_id!r}")
    if not _is_id(category) or category not in category_ids:
        raise _Unusable(f"there is no category with the id {category!r}")
    marks = [annotation.get(key, 0) for key in ("iscrowd", "ignore")]
    if any(mark not in (0, 1) for mark in marks):
        raise _Unusable("iscrowd and ignore must be 0 or 1")
    if image_id not in images.entries or category_ids[category] is None:
        return None
    image = images.entries[image_id]
    x1, y1, x2, y2 = _clean_box(annotation.get("bbox"), image["width"], image["height"])
    return {
        "image_id": image_id,
        "category_id": category_ids[category],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": int(any(marks)),
    }


def _sample(entry: dict[str, Any], annotations: list[dict[str, Any]]) -> Sample:
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Sample(
        image_id=entry["id"],
        file_name=entry["file_name"],
        width=entry["width"],
        height=entry["height"],
        boxes=boxes.astype(np.float32),
        ignore=np.array([annotation["iscrowd"] for annotation in annotations], bool),
    )


def _find_video(name: str, path: Path, root: Path) -> Path:
    folders = list(dict.fromkeys([root, path.parent]))
    for folder in folders:
        if _size_bytes(folder / name) is not None:
            video = folder / name
            break
    else:
        if name not in ASSETS:
            raise DataError(
                f"{path} names the video {name!r}, which is not in {' or '.join(map(str, folders))}"
            )
        video = fetch(name)
    check_opens(video)
    return video


def _size_bytes(file: Path) -> int | None:
    """Size of a regular file; None for what is missing or no file."""
    try:
        status = file.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _get(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63  # numpy's int64


def _number(value: Any) -> float:
    """A JSON number as float; NaN for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
