"""Average precision by pycocotools, and what else its matches say."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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


AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""COCO's sizes of boxes, square pixels."""

OPERATING_THRESHOLD = 0.3
"""Score from which detections count where nobody chose one: below it, most are false."""

FALSE_PER_IMAGE = 0.1
"""At which the miss rate is stated."""


# fmt: off
QUALITY_FIGURES = (
    "ap_small", "ap_medium", "ap_large", "ap_low", "ap_high", "ap50_low", "ap50_high",
    "threshold", "precision_at_threshold", "recall_at_threshold", "miss_rate",
)
"""Names of what `DetectionQuality` says, in tables."""
# fmt: on


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


@dataclass(frozen=True)
class Interval:
    """Where a figure would lie had other images of the same kind been drawn: 95 %, bootstrap percentiles."""

    low: float
    high: float


@dataclass(frozen=True)
class DetectionQuality:
    """What AP does not say; None where there is no box of that size."""

    ap_small: float | None
    """Boxes below 32 x 32 pixels of the original image."""
    ap_medium: float | None
    ap_large: float | None
    """Boxes from 96 x 96 pixels."""
    ap_interval: Interval
    ap50_interval: Interval
    threshold: float
    """Score at which the detector is to operate; the next two are for detections from it up, at IoU 0.5."""
    precision: float | None
    """None where nothing is found."""
    recall: float
    miss_rate: float
    """Smallest share of missed boxes with at most 0.1 false detections an image, at IoU 0.5 (Dollar et al.
    2012, doi:10.1109/TPAMI.2011.155); 1 where even the best detection is false too often."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "DetectionQuality":
        """Read what `dataclasses.asdict` gave; TypeError or KeyError if a field is missing or unknown."""
        intervals = {name: Interval(**record[name]) for name in ("ap_interval", "ap50_interval")}
        return cls(**{**record, **intervals})

    def figures(self) -> dict[str, float | None]:
        """All figures by the names in `QUALITY_FIGURES`."""
        by_size = (self.ap_small, self.ap_medium, self.ap_large)
        intervals = (
            self.ap_interval.low,
            self.ap_interval.high,
            self.ap50_interval.low,
            self.ap50_interval.high,
        )
        at_threshold = (self.threshold, self.precision, self.recall)
        return dict(zip(QUALITY_FIGURES, (*by_size, *intervals, *at_threshold, self.miss_rate), strict=True))


def average_precision(dataset: Dataset, detections: Sequence[ImageDetections]) -> AveragePrecision:
    """Score detections as COCO does: best 100 an image, all areas; one on a crowd is neither right nor wrong.

    Args:
        detections: one record for each image of `dataset`, also where nothing was found.

    Raises:
        DataError: If the data set has no box to find or several classes, or a detection is not finite.
        ValueError: If the records are not one for each image.
    """
    boxes = _check(dataset, detections)
    evaluation = _evaluate(dataset, detections, ["all"])
    precision = evaluation.eval["precision"][:, :, 0, 0, -1]  # (10 IoU thresholds, 101 recalls)
    return AveragePrecision(
        ap=float(precision.mean()),
        ap50=float(precision[0].mean()),
        ap75=float(precision[5].mean()),
        images=len(dataset),
        boxes=boxes,
    )


def detection_quality(
    dataset: Dataset,
    detections: Sequence[ImageDetections],
    threshold: float = OPERATING_THRESHOLD,
    *,
    seed: int = 0,
    replicates: int = 1000,
) -> DetectionQuality:
    """Score detections by size and at an operating point, and say how far AP depends on the images.

    Args:
        detections: as for `average_precision`, with the same errors.
        threshold: score from which the detector is to report.
        seed: of the bootstrap, which draws images with replacement (Efron & Tibshirani 1993, chapter 13).
        replicates: of the bootstrap.
    """
    _check(dataset, detections)
    evaluation = _evaluate(dataset, detections, list(AREAS))
    precision = evaluation.eval["precision"][:, :, 0, :, -1].mean((0, 1))  # (areas,); -1: no box of the size
    by_size = [None if value < 0 else float(value) for value in precision]
    matches = Matches.of(evaluation)

    rng, images = np.random.default_rng(seed), len(dataset)
    drawn = []
    for _ in range(replicates):
        ap = matches.average_precision(np.bincount(rng.integers(0, images, images), minlength=images))
        if ap is not None:  # a draw without any box has none
            drawn.append(ap)
    low, high = np.percentile([(ap.mean(), ap[0]) for ap in drawn], (2.5, 97.5), axis=0).tolist()

    above = matches.scores >= threshold
    hits, wrong = (int((of[0] & above).sum()) for of in (matches.hit, matches.wrong))
    boxes = matches.boxes.sum()
    allowed = np.cumsum(matches.wrong[0]) <= FALSE_PER_IMAGE * images
    return DetectionQuality(
        ap_small=by_size[1],
        ap_medium=by_size[2],
        ap_large=by_size[3],
        ap_interval=Interval(low[0], high[0]),
        ap50_interval=Interval(low[1], high[1]),
        threshold=threshold,
        precision=hits / (hits + wrong) if hits + wrong else None,
        recall=hits / int(boxes),
        miss_rate=1 - int(matches.hit[0][allowed].sum()) / int(boxes),
    )


def match_detections(dataset: Dataset, detections: Sequence[ImageDetections]) -> "Matches":
    """Which detections are right: the best 100 of each image, all areas; arguments as `average_precision`."""
    _check(dataset, detections)
    return Matches.of(_evaluate(dataset, detections, ["all"]))


@dataclass(frozen=True, eq=False)
class Matches:
    """pycocotools' matches of all detections, best score first."""

    scores: NDArray[np.float64]
    """``(D,)``."""
    image: NDArray[np.intp]
    """``(D,)``: position of its image."""
    hit: NDArray[np.bool_]
    """``(10, D)``: matched to a box, at each IoU."""
    wrong: NDArray[np.bool_]
    """``(10, D)``: matched to nothing; neither of both on an ignored box."""
    boxes: NDArray[np.intp]
    """``(N,)``: boxes of each image, ignored ones left out."""
    recalls: NDArray[np.float64]
    """``(101,)`` at which COCO reads precision."""

    @classmethod
    def of(cls, evaluation: COCOeval) -> "Matches":
        ids = evaluation.params.imgIds
        images: list[dict[str, Any] | None] = evaluation.evalImgs[: len(ids)]  # of the first area, all
        filled = [(position, image) for position, image in enumerate(images) if image is not None]
        scores = np.concatenate([np.array(image["dtScores"], float) for _, image in filled])
        matched, ignored = (
            np.concatenate([np.asarray(image[key], bool) for _, image in filled], 1)
            for key in ("dtMatches", "dtIgnore")
        )
        order = np.argsort(-scores, kind="mergesort")
        image_of = np.repeat(
            [position for position, _ in filled], [len(image["dtScores"]) for _, image in filled]
        )
        boxes = np.zeros(len(ids), np.intp)
        for position, image in filled:
            boxes[position] = int((np.asarray(image["gtIgnore"]) == 0).sum())
        return cls(
            scores[order],
            image_of[order],
            (matched & ~ignored)[:, order],
            (~matched & ~ignored)[:, order],
            boxes,
            evaluation.params.recThrs,
        )

    def average_precision(self, times: NDArray[np.intp]) -> NDArray[np.float64] | None:
        """COCO's AP at each IoU, ``(10,)``, if each image were there so many times, ``(N,)``."""
        boxes = int((self.boxes * times).sum())
        if boxes == 0:
            return None
        weights = times[self.image]
        # Precision peaks where something is found: most detections, wrong at each IoU, are only counted.
        places, hit, wrong = self._found
        always_wrong = np.cumsum(self._always_wrong * weights)[places]
        hits = np.cumsum(hit * weights[places], axis=1)
        errors = np.cumsum(wrong * weights[places], axis=1) + always_wrong
        precision = hits / np.maximum(hits + errors, 1)
        envelopes = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        found = np.zeros(len(self.hit))
        for level, envelope in enumerate(envelopes):
            at = np.searchsorted(hits[level] / boxes, self.recalls)
            found[level] = envelope[at[at < len(envelope)]].sum() / len(self.recalls)
        return found

    @cached_property
    def _found(self) -> tuple[NDArray[np.intp], NDArray[np.bool_], NDArray[np.bool_]]:
        """Positions ``(F,)`` of what is not wrong at each IoU, and `hit` and `wrong` there, ``(10, F)``."""
        places = np.flatnonzero(~self._always_wrong)
        return places, self.hit[:, places], self.wrong[:, places]

    @cached_property
    def _always_wrong(self) -> NDArray[np.bool_]:
        """``(D,)``."""
        always: NDArray[np.bool_] = np.logical_and.reduce(self.wrong)
        return always


def _check(dataset: Dataset, detections: Sequence[ImageDetections]) -> int:
    """Make sure that there is something to score; returns how many boxes."""
    if len(dataset.classes) != 1:
        raise DataError(
            f"detections are of one class, {dataset.path} was read for: {', '.join(dataset.classes)}"
        )
    boxes = sum(int((~sample.ignore).sum()) for sample in dataset.samples)
    if boxes == 0:
        raise DataError(f"{dataset.path} has no boxes of {dataset.classes[0]} to score against")
    if sorted(found.image_id for found in detections) != sorted(s.image_id for s in dataset.samples):
        raise ValueError("detections need one record for each image of the data set")
    return boxes


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


def _evaluate(dataset: Dataset, detections: Sequence[ImageDetections], areas: list[str]) -> COCOeval:
    entries = [entry for found in detections for entry in _coco_entries(found)]
    ground_truth = dataset.coco
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        evaluation = COCOeval(_index(ground_truth), _index({**ground_truth, "annotations": entries}), "bbox")
        evaluation.params.areaRng = [list(AREAS[area]) for area in areas]
        evaluation.params.areaRngLbl = areas
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
