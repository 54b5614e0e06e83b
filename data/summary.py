"""What a data set holds, in figures and as a sheet of images."""

from collections import Counter
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeprune.data.dataset import Dataset
from edgeprune.data.errors import DataError
from edgeprune.data.image_files import look
from edgeprune.data.precision import AREAS

CELL = 320
"""Side of an image in the sheet, pixels."""

BOX_COLOR, IGNORED_COLOR = (0, 200, 0), (160, 160, 160)  # BGR


@dataclass(frozen=True)
class Summary:
    """Figures of a data set; a box is one that is not ignored."""

    format: str
    path: str
    images_folder: str
    classes: tuple[str, ...]
    images: int
    images_without_boxes: int
    videos: int
    boxes: int
    ignored_boxes: int
    dropped_images: int
    dropped_boxes: int
    clipped_boxes: int
    boxes_per_image_mean: float
    boxes_per_image_max: int
    box_heights_px: tuple[float, ...]
    """Smallest, quartiles, largest; empty without boxes."""
    boxes_by_size: dict[str, int]
    """As COCO counts: small below 32 x 32 pixels, large from 96 x 96."""
    image_sizes: dict[str, int]
    """Images of each "WIDTHxHEIGHT", the most frequent first."""
    image_kinds: dict[str, int]
    """Images stored as colour, grey, CMYK, 16-bit or alpha; all are read as 8-bit colour."""
    sha256: str
    problems: tuple[str, ...]


def summarise(dataset: Dataset) -> Summary:
    """Count what a data set holds."""
    contents = dataset.contents
    counts = [int((~sample.ignore).sum()) for sample in dataset.samples]
    boxes = np.concatenate([sample.boxes[~sample.ignore] for sample in dataset.samples]).astype(float)
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides.prod(1)
    by_size = {
        name: int(((areas >= low) & (areas < high)).sum())
        for name, (low, high) in AREAS.items()
        if name != "all"
    }
    names = [sample.file_name for sample in dataset.samples]
    sizes = Counter(f"{sample.width}x{sample.height}" for sample in dataset.samples)
    return Summary(
        format=dataset.format,
        path=str(dataset.path),
        images_folder=str(dataset.root),
        classes=dataset.classes,
        images=len(dataset),
        images_without_boxes=counts.count(0),
        videos=len({sample.frame.video for sample in dataset.samples if sample.frame}),
        boxes=contents.boxes,
        ignored_boxes=contents.ignored_boxes,
        dropped_images=contents.dropped_images,
        dropped_boxes=contents.dropped_boxes,
        clipped_boxes=contents.clipped_boxes,
        boxes_per_image_mean=float(np.mean(counts)),
        boxes_per_image_max=max(counts),
        box_heights_px=tuple(np.percentile(sides[:, 1], (0, 25, 50, 75, 100)).tolist()) if len(sides) else (),
        boxes_by_size=by_size,
        image_sizes=dict(sizes.most_common()),
        image_kinds=dict(Counter(file.kind for file in look(dataset.root, names).values()).most_common()),
        sha256=dataset.sha256,
        problems=tuple(map(str, dataset.problems)),
    )


def preview(dataset: Dataset, columns: int = 4, rows: int = 4) -> NDArray[np.uint8]:
    """Images from all over a data set with their boxes, ignored ones in grey: ``(H, W, 3)``, BGR.

    An image that does not decode stays black.
    """
    chosen = np.linspace(0, len(dataset) - 1, min(columns * rows, len(dataset))).round().astype(int)
    shown = dataset.subset(chosen.tolist())  # of a video, only these frames are extracted
    sheet = np.zeros((-(-len(shown) // columns) * CELL, columns * CELL, 3), np.uint8)
    for place in range(len(shown)):
        cell = _cell(shown, place)
        top, left = place // columns * CELL, place % columns * CELL
        sheet[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return sheet


def _cell(dataset: Dataset, index: int) -> NDArray[np.uint8]:
    sample = dataset.samples[index]
    try:
        image = dataset.image(index)
    except DataError:
        return np.zeros((CELL, CELL, 3), np.uint8)
    scale = CELL / max(image.shape[:2])
    width, height = (max(round(side * scale), 1) for side in (sample.width, sample.height))
    cell: NDArray[np.uint8] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    for box, ignored in zip((sample.boxes * scale).round().astype(int).tolist(), sample.ignore, strict=True):
        cv2.rectangle(cell, box[:2], box[2:], IGNORED_COLOR if ignored else BOX_COLOR, 1)
    return cell
