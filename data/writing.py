"""Writing a data set as COCO JSON."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.data.dataset import Dataset
from edgeprune.data.files import write_json
from edgeprune.data.precision import ImageDetections
from edgeprune.data.readers.coco import default_root
from edgeprune.data.video import frame_of


def write_coco(dataset: Dataset, path: Path) -> Path | None:
    """Write the usable images and boxes.

    Returns:
        The folder of images to name when the file is read; None where the images are found without.

    Raises:
        EdgePruneError: If the file cannot be written.
    """
    root = default_root(path)
    names = {sample.file_name: _below(dataset, sample.file_name, root) for sample in dataset.samples}
    found = {name: below for name, below in names.items() if below is not None}
    complete = len(found) == len(names)
    images = [
        {**image, "file_name": found[image["file_name"]] if complete else image["file_name"]}
        for image in dataset.coco["images"]
    ]
    write_json(path, {**dataset.coco, "images": images})
    return None if complete else dataset.root


def _below(dataset: Dataset, name: str, root: Path) -> str | None:
    """The image's name below another folder; None if it is not in there."""
    frame = frame_of(name)
    if frame is None:
        file, suffix = dataset.root.resolve() / name, ""
    else:
        video = dataset.videos[frame.video]
        file, suffix = video.parent.resolve() / video.name, f"#{frame.number:06d}"
    if not file.is_relative_to(root.resolve()):
        return None
    return file.relative_to(root.resolve()).as_posix() + suffix


def labelled_by(dataset: Dataset, detections: Sequence[ImageDetections], threshold: float) -> Dataset:
    """The same images with a detector's boxes for labels, for a person to correct.

    Args:
        detections: of one class, a record for each image.
        threshold: lowest score of a box; it stays in the annotation as `score`.
    """
    found = {record.image_id: record for record in detections}
    annotations: list[dict[str, Any]] = []
    samples = []
    for sample in dataset.samples:
        record = found[sample.image_id]
        sure = record.scores >= threshold
        boxes = record.boxes[sure]
        for (x1, y1, x2, y2), score in zip(boxes.tolist(), record.scores[sure].tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": sample.image_id,
                    "category_id": 1,
                    "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
                    "area": round((x2 - x1) * (y2 - y1), 2),
                    "iscrowd": 0,
                    "score": round(score, 4),
                }
            )
        samples.append(replace(sample, boxes=boxes, ignore=np.zeros(len(boxes), bool)))
    return replace(dataset, samples=tuple(samples), coco={**dataset.coco, "annotations": annotations})
