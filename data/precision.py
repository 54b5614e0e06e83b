"""Average precision by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from edgeprune.data.dataset import Dataset
from edgeprune.data.errors import DataError


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """What a detector found in one image."""

    image_id: int
    boxes: NDArray[np.float32]
    """``(K, 4)`` xyxy, pixels of the original image."""
    scores: NDArray[np.float32]
    """``(K,)``."""

    def __post_init__(self) -> None:
        if self.boxes.shape != (len(self.scores), 4) or self.scores.ndim != 1:
            raise ValueError(
                f"boxes {self.boxes.shape} and scores {self.scores.shape} do not fit (K, 4) and (K,)"
            )


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's figures for one class."""

    ap: float
    """Mean over IoU 0.50:0.95."""
    ap50: float
    ap75: float
    images: int
    boxes: int
    """Without the ignored ones."""


def average_precision(dataset: Dataset, detections: Sequence[ImageDetections]) -> AveragePrecision:
    """Score detections as COCO does: best 100 an image, all areas; one on a crowd is neither right nor wrong.

    Args:
        detections: one record for each image of `dataset`, also where nothing was found.

    Raises:
        DataError: If the data set has no box to find or several classes, or a detection is not finite.
        ValueError: If the records are not one for each image.
    """
    if len(dataset.classes) != 1:
        raise DataError(
            f"detections are of one class, {dataset.path} was read for: {', '.join(dataset.classes)}"
        )
    boxes = sum(int((~sample.ignore).sum()) for sample in dataset.samples)
    if boxes == 0:
        raise DataError(f"{dataset.path} has no boxes of {dataset.classes[0]} to score against")
    if sorted(found.image_id for found in detections) != sorted(s.image_id for s in dataset.samples):
        raise ValueError("detections need one record for each image of the data set")

    evaluation = _evaluate(dataset.coco, [entry for found in detections for entry in _coco_entries(found)])
    precision = evaluation.eval["precision"][:, :, 0, 0, -1]  # (10 IoU thresholds, 101 recalls)
    return AveragePrecision(
        ap=float(precision.mean()),
        ap50=float(precision[0].mean()),
        ap75=float(precision[5].mean()),
        images=len(dataset),
        boxes=boxes,
    )


def _coco_entries(found: ImageDetections) -> list[dict[str, Any]]:
    boxes, scores = found.boxes.astype(np.float64), found.scores.astype(np.float64)
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):  # pycocotools counts NaN as a match
        raise DataError(
            f"the detections in image {found.image_id} are not finite: the training diverged, or the "
            "engine's precision overflows"
        )
    sizes = boxes[:, 2:] - boxes[:, :2]
    return [
        {
            "image_id": found.image_id,
            "category_id": 1,
            "bbox": [*corner, *size],
            "area": size[0] * size[1],
            "score": s,
        }
        for corner, size, s in zip(boxes[:, :2].tolist(), sizes.tolist(), scores.tolist(), strict=True)
    ]


def _evaluate(ground_truth: dict[str, Any], entries: list[dict[str, Any]]) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        evaluation = COCOeval(_index(ground_truth), _index({**ground_truth, "annotations": entries}), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _index(content: dict[str, Any]) -> COCO:
    # Copies: COCOeval writes into the annotations. loadRes would refuse an empty list of detections.
    coco = COCO()
    annotations = [
        {"iscrowd": 0, **entry, "id": number} for number, entry in enumerate(content["annotations"], 1)
    ]
    coco.dataset = {**content, "annotations": annotations}
    coco.createIndex()
    return coco
