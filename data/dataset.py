"""Images with boxes of the classes to detect, in any format; what cannot be used is dropped and listed.

`readers/` reads each format, here every entry is checked. Boxes are xyxy pixels of the image as stored: an
EXIF rotation is not applied. Boxes of a crowd (`iscrowd`) and boxes marked `ignore` are kept as ignored: they
train nothing and count as COCO counts crowds.
"""

import hashlib
import itertools
import logging
import math
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from edgeprune.data.assets import ASSETS, fetch
from edgeprune.data.errors import DataError
from edgeprune.data.image_files import ImageFile, decode, look
from edgeprune.data.labels import Labels, Problem, check_inside
from edgeprune.data.readers import read_images, read_labels
from edgeprune.data.video import Frame, check_opens, frame_of, frame_path
from edgeprune.deploy.device.imaging import ImageError, load_image

log = logging.getLogger(__name__)

PERSON_NAMES = ("person", "pedestrian", "people")
"""Names under which data sets have people, in any case; all of a data set's are one class, `person`."""

CLIP_TOLERANCE = 1.0
"""Pixels that a box may reach outside its image by rounding; more is clipped too, but listed as a problem."""

MAX_SIDE = 2**24 - 1
"""Largest width and height in pixels: float32 boxes are exact to a pixel up to here."""


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
    frame: Frame | None = None
    """Its place in a video, also where the frame is stored as an image; None for a still."""


@dataclass(frozen=True)
class Contents:
    """How much of a data set can be used, and how much had to go."""

    images: int
    boxes: int
    """Without the ignored ones."""
    ignored_boxes: int
    dropped_images: int
    dropped_boxes: int
    """Unusable by themselves; those of dropped images go uncounted."""
    clipped_boxes: int
    """More than a pixel outside their image, and cut."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples of one data set."""

    path: Path
    """The label file, or the folder of labels."""
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
    format: str = "COCO JSON"

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
        others = (frame_of(other.file_name) for other in self.samples)
        of_this_video = (other.number for other in others if other and other.video == frame.video)
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
                self.samples[index].file_name,
                f"image {self.samples[index].image_id}",
                f"{what}; dropped",
                lost="image",
            )
            for index, what in reasons.items()
        ]
        kept = self.subset(index for index in range(len(self)) if index not in reasons)
        return replace(kept, problems=(*self.problems, *problems))

    def decodable(self, progress: Callable[[int, int], None] = lambda done, total: None) -> "Dataset":
        """Decode every image once, ever: what headers did not show is dropped and listed.

        Args:
            progress: called with images done and in all.
        """
        reasons: dict[int, str] = {}
        names: dict[Path, dict[str, int]] = defaultdict(dict)  # index by name, of each folder
        for index, sample in enumerate(self.samples):
            if frame_of(sample.file_name) is None:
                names[self.root][sample.file_name] = index
                continue
            try:
                path = self.image_path(index)
            except DataError as error:
                reasons[index] = str(error)
            else:
                names[path.parent][path.name] = index
        ticks = itertools.count(len(reasons) + 1)
        for folder, indices in names.items():
            files = decode(folder, indices, lambda: progress(next(ticks), len(self)))
            for name, index in indices.items():
                file, sample = files.get(name), self.samples[index]
                if file is None:
                    reasons[index] = "the image file is gone"
                elif file.damage:
                    reasons[index] = f"the image file {file.damage}"
                elif (file.width, file.height) != (sample.width, sample.height):
                    reasons[index] = (
                        f"decodes to {file.width}x{file.height} pixels, not {sample.width}x{sample.height}"
                    )
        if not reasons:
            return self
        kept = self.drop(reasons)
        log.warning("%s: dropped %d images, first %s", self.path, len(reasons), kept.problems[-len(reasons)])
        return kept

    @property
    def contents(self) -> Contents:
        """Counts of the samples, and of all problems on the way to them."""
        ignored = sum(int(sample.ignore.sum()) for sample in self.samples)
        lost = Counter(problem.lost for problem in self.problems)
        return Contents(
            images=len(self),
            boxes=sum(len(sample.boxes) for sample in self.samples) - ignored,
            ignored_boxes=ignored,
            dropped_images=lost["image"],
            dropped_boxes=lost["box"],
            clipped_boxes=lost["nothing"],
        )

    def refuse_problems(self) -> None:
        """For who wants a data set that needs no repair.

        Raises:
            DataError: If anything was dropped or clipped.
        """
        if self.problems:
            raise DataError(
                f"{self.path}: {len(self.problems)} images or boxes cannot be used as they are, first "
                f"{self.problems[0]}; `edgeprune data inspect` lists them"
            )

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
        for index, frame in enumerate(sample.frame for sample in self.samples):
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


def load_dataset(path: Path, images: Path | None = None, classes: Sequence[str] | None = None) -> Dataset:
    """Read COCO JSON, Pascal VOC, YOLO, CrowdHuman or MOT: `readers/` says which files each has.

    Image headers and ends are looked at, which takes seconds for 10,000 images, once.

    Args:
        path: the label file, or the folder of a data set.
        images: folder of the images, where they are not where the format has them. A video is looked for
            there, then beside the labels, then among the assets.
        classes: names of the classes to keep, as the data set has them. Default: those in `PERSON_NAMES`,
            all as `person`.

    Raises:
        DataError: If the format is not known or the labels are damaged, lack a class, name a file outside the
            folder or a video that is missing or does not open, or have no usable image. Single bad images
            and boxes are dropped and listed in `Dataset.problems`.
        AssetError: If a video is an asset and cannot be had.
    """
    return _checked(read_labels(path, images), classes)


def load_images(path: Path, every: int = 1) -> Dataset:
    """Images without labels, of the class `person`: those of a folder and its folders, or a video's frames.

    Args:
        every: of a video, every so many frames.

    Raises:
        DataError: If there is no image, or the video does not open.
    """
    return _checked(read_images(path, every), None)


def _checked(labels: Labels, classes: Sequence[str] | None) -> Dataset:
    """What of the labels can be used; errors as `load_dataset`."""
    problems = list(labels.problems)
    kept, category_ids = _read_categories(labels, classes, problems)
    found = _read_images(labels, problems)
    if not found.entries:
        first = f" First problem: {problems[0]}" if problems else ""
        raise DataError(
            f"{labels.path}: none of its {len(labels.images)} images in {labels.root} can be used; are they in another "
            f"folder (--images, --train-images, --val-images)?{first}"
        )
    annotations = _read_annotations(labels, found, category_ids, problems)

    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        by_image[annotation["image_id"]].append(annotation)
    digest = hashlib.sha256(labels.sha256.encode())
    for name, size_bytes in sorted(found.sizes_bytes.items()):
        digest.update(f"\n{name} {size_bytes}".encode())
    return Dataset(
        path=labels.path,
        root=labels.root,
        classes=kept,
        sha256=digest.hexdigest(),
        samples=tuple(_sample(entry, by_image[entry["id"]]) for entry in found.entries.values()),
        coco={
            "info": {},
            "images": list(found.entries.values()),
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in enumerate(kept, 1)],
        },
        problems=tuple(problems),
        videos=found.videos,
        format=labels.format,
    )


class _Unusable(Exception):
    """What is wrong with an entry of a label file."""


def _numbers(bbox: Any) -> list[float]:
    """The four numbers of whatever a file holds for `bbox`."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise _Unusable("bbox is no list of four numbers")
    numbers = [_number(value) for value in bbox]
    if not all(math.isfinite(number) for number in numbers):
        raise _Unusable("bbox has a value that is no finite number")
    return numbers


def _from_shares(bbox: list[float], width: int, height: int) -> list[float]:
    """Pixels ``[x, y, width, height]`` of YOLO's box; whole pixels written in full come back whole."""
    x, y, box_width, box_height = bbox
    corner = [(x - box_width / 2) * width, (y - box_height / 2) * height]
    pixels = [*corner, box_width * width, box_height * height]
    if not all(map(math.isfinite, pixels)):
        raise _Unusable("bbox has a value that is no finite number of pixels")
    return [round(value, 6) for value in pixels]


def _clip(bbox: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    """Check a box and clip it to its image.

    Args:
        bbox: ``[x, y, width, height]``, pixels.
        width, height: of the image.

    Returns:
        xyxy, with x1 < x2 and y1 < y2 also in float32.

    Raises:
        _Unusable: If it is no box, or none in the image.
    """
    x, y, box_width, box_height = bbox
    if box_width <= 0 or box_height <= 0:
        raise _Unusable(f"bbox is inverted or empty ({box_width:g} wide, {box_height:g} high)")
    x1, x2 = (min(max(value, 0.0), float(width)) for value in (x, x + box_width))
    y1, y2 = (min(max(value, 0.0), float(height)) for value in (y, y + box_height))
    if not (np.float32(x1) < np.float32(x2) and np.float32(y1) < np.float32(y2)):
        raise _Unusable(f"bbox is outside the {width}x{height} image, or thinner than float32 resolves")
    return x1, y1, x2, y2


def _read_categories(
    labels: Labels, classes: Sequence[str] | None, problems: list[Problem]
) -> tuple[tuple[str, ...], dict[int, int | None]]:
    """The classes to keep, and category id in the labels -> in `Dataset.coco`, or None."""
    names: dict[int, str] = {}
    for category, file, where in labels.categories:
        number, name = _get(category, "id"), _get(category, "name")
        if not _is_id(number) or not isinstance(name, str) or number in names:
            problems.append(Problem(file, where, "needs an id of its own and a name; dropped", lost="class"))
        else:
            names[number] = name
    known = ", ".join(sorted(set(names.values()))) or "none"
    if classes is None:
        people = {number: 1 for number, name in names.items() if name.lower() in PERSON_NAMES}
        if not people:
            raise DataError(
                f"{labels.path} has no class {', '.join(map(repr, PERSON_NAMES))}; its classes are: {known}"
            )
        return PERSON_NAMES[:1], {number: people.get(number) for number in names}
    kept = tuple(dict.fromkeys(classes))
    missing = [name for name in kept if name not in names.values()]
    if missing:
        raise DataError(f"{labels.path} has no class {missing[0]!r}; its classes are: {known}")
    return kept, {number: kept.index(name) + 1 if name in kept else None for number, name in names.items()}


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


def _read_images(labels: Labels, problems: list[Problem]) -> _Images:
    found = _Images()
    names = (_get(content, "file_name") for content, _, _ in labels.images)
    stills = [
        check_inside(name, labels.path, "file_name")
        for name in names
        if isinstance(name, str) and not frame_of(name)
    ]
    files = look(labels.root, dict.fromkeys(stills))
    for image, file, where in labels.images:
        number = _get(image, "id")
        try:
            if not _is_id(number):
                raise _Unusable(f"id {number!r} is no whole number")
            if number in found.entries:
                raise _Unusable(f"its id {number} belongs to another image")
            found.entries[number] = _read_image(image, labels, files, found)
        except _Unusable as unusable:
            problems.append(Problem(file, where, f"{unusable}; dropped", lost="image"))
            if _is_id(number):
                found.dropped.add(number)
    return found


def _read_image(
    image: dict[str, Any], labels: Labels, files: Mapping[str, ImageFile], found: _Images
) -> dict[str, Any]:
    name = image.get("file_name")
    if not isinstance(name, str):
        raise _Unusable("has no file_name")
    if name in found.sizes_bytes:
        raise _Unusable(f"file_name {name!r} belongs to another image")  # it would leak through a split
    frame = frame_of(name)
    stated = "width" in image or labels.sized
    width, height = (_number(image.get(side)) for side in ("width", "height"))
    if stated and not all(1 <= side <= MAX_SIDE and side.is_integer() for side in (width, height)):
        raise _Unusable(f"width and height are no whole numbers of pixels from 1 to {MAX_SIDE}")
    entry = {"id": image["id"], "file_name": name}
    if frame is None:
        file = files.get(name)
        if file is None:
            raise _Unusable(f"no image file {str(labels.root / name)!r}")
        if not _is_text(name):
            raise _Unusable("its name is no text in UTF-8")
        _check_file(file, (int(width), int(height)) if stated else None)
        video = [image.get(key) for key in ("video_id", "frame_id")]
        if all(_is_id(number) for number in video):
            entry |= {"video_id": video[0], "frame_id": video[1]}
        found.sizes_bytes[name] = file.size_bytes
        return entry | {"width": file.width, "height": file.height}
    check_inside(name, labels.path, "file_name")
    if frame.video not in found.videos:
        found.videos[frame.video] = _find_video(frame.video, labels.path, labels.root)
    size_bytes = _size_bytes(found.videos[frame.video])
    if size_bytes is None:
        raise _Unusable(f"no video file {str(found.videos[frame.video])!r}")
    found.sizes_bytes[name] = size_bytes
    return entry | {"width": int(width), "height": int(height)}


def _check_file(file: ImageFile, stated: tuple[int, int] | None) -> None:
    """Compare an image file with the size that the labels state, if they do."""
    if file.damage:
        raise _Unusable(f"its image file {file.damage}")
    stored = (file.width, file.height)
    turned = f"its EXIF orientation is {file.orientation}, and images are read as stored; store it upright"
    if stated is None:
        if file.orientation != 1:  # the boxes may be meant for either way
            raise _Unusable(turned)
    elif stated != stored:
        if file.orientation != 1 and stated == stored[::-1]:
            raise _Unusable(turned)
        raise _Unusable(
            f"its image file is {stored[0]}x{stored[1]} pixels, not {stated[0]}x{stated[1]}: "
            "the boxes would not fit"
        )


def _read_annotations(
    labels: Labels, images: _Images, category_ids: Mapping[int, int | None], problems: list[Problem]
) -> list[dict[str, Any]]:
    """The usable boxes of the classes to keep, in pycocotools' form."""
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    for annotation, file, where in labels.boxes:
        try:
            entry, outside = _read_annotation(annotation, labels, seen, images, category_ids) or (None, 0)
        except _Unusable as unusable:
            problems.append(Problem(file, where, f"{unusable}; dropped", lost="box"))
            continue
        if entry is None:
            continue
        if outside > CLIP_TOLERANCE and not labels.amodal:
            what = f"bbox reaches {outside:g} px outside the image; clipped"
            problems.append(Problem(file, where, what, lost="nothing"))
        found.append({"id": len(found) + 1, **entry})  # pycocotools takes a match with id 0 for none
    return found


def _read_annotation(
    annotation: Any,
    labels: Labels,
    seen: set[int],
    images: _Images,
    category_ids: Mapping[int, int | None],
) -> tuple[dict[str, Any], float] | None:
    """An annotation without its id, and by how many pixels it was clipped.

    None for one of a class that is not kept, or of a dropped image.
    """
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
    width, height = image["width"], image["height"]
    bbox = _numbers(annotation.get("bbox"))
    if labels.centred_shares:
        bbox = _from_shares(bbox, width, height)
    x1, y1, x2, y2 = _clip(bbox, width, height)
    outside = max(abs(a - b) for a, b in zip([x1, y1, x2 - x1, y2 - y1], bbox, strict=True))
    entry = {
        "image_id": image_id,
        "category_id": category_ids[category],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": int(any(marks)),
    }
    return entry, outside


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
        frame=frame_of(entry["file_name"]) or _stored_frame(entry),
    )


def _stored_frame(entry: dict[str, Any]) -> Frame | None:
    return Frame(str(entry["video_id"]), entry["frame_id"]) if "video_id" in entry else None


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


def _is_text(name: str) -> bool:
    """Whether a name can be written and printed: a file's may hold any bytes."""
    return name.encode("utf-8", "replace") == name.encode("utf-8", "surrogatepass")


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
