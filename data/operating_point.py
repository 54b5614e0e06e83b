"""The score from which a detector is to report, chosen for what its user can bear.

That is a share of right detections, or so many false ones a minute. Right is what pycocotools matches to a box at
IoU 0.5; a detection on an ignored box counts as nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.data.dataset import Dataset
from edgeprune.data.errors import DataError
from edgeprune.data.files import read_json, write_json
from edgeprune.data.precision import ImageDetections, Interval, Matches, match_detections
from edgeprune.deploy.device.imaging import DEFAULT_THRESHOLDS

THRESHOLD_FILE = "threshold.json"
"""In a step's folder, beside the weights that it belongs to."""

MATCHED_PER_IMAGE = 100
"""pycocotools matches no more: what an image has below its hundredth score is not known."""


@dataclass(frozen=True)
class Wish:
    """What a user asks of a detector: exactly one of the first two."""

    precision: float | None = None
    """Smallest share of detections that are right."""
    false_positives_per_minute: float | None = None
    """Most false detections a minute, over all images looked at in it."""
    frames_per_second: float | None = None
    """Images looked at; what false positives a minute are counted with, None where it is not known."""

    def __post_init__(self) -> None:
        if (self.precision is None) == (self.false_positives_per_minute is None):
            raise ValueError("a wish is either for a precision or for false positives per minute")
        if self.false_positives_per_minute is not None and not self.frames_per_second:
            raise ValueError("false positives per minute need the frames per second")

    def __str__(self) -> str:
        if self.precision is not None:
            return f"precision {self.precision:g}"
        return (
            f"{self.false_positives_per_minute:g} false positives a minute at {self.frames_per_second:g} "
            "frames a second"
        )


@dataclass(frozen=True)
class OperatingPoint:
    """A score and what a detector does from it up, on the images that it was chosen on.

    The intervals say where a figure may lie on other images of the same kind (95 %). Of the bootstrap over
    images and the exact interval of the counts the wider end is taken: the first knows that an image's
    detections hang together, the second that none wrong of few is not none.
    """

    threshold: float
    """Detections need a higher score."""
    precision: float
    precision_interval: Interval
    recall: float
    recall_interval: Interval
    false_positives_per_minute: float | None
    """None where the frames per second are not known."""
    false_positives_per_minute_interval: Interval | None
    detections: int
    """Right and false ones."""
    false_positives: int
    boxes: int
    images: int

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "OperatingPoint":
        """Read what `dataclasses.asdict` gave; TypeError or KeyError if a field is missing or unknown."""
        names = ("precision_interval", "recall_interval", "false_positives_per_minute_interval")
        intervals = {name: Interval(**record[name]) if record[name] else None for name in names}
        return cls(**{**record, **intervals})


def choose_operating_point(
    dataset: Dataset,
    detections: Sequence[ImageDetections],
    wish: Wish,
    *,
    seed: int = 0,
    replicates: int = 1000,
) -> OperatingPoint:
    """The lowest score, so the highest recall, at which the wish is met on these images.

    Args:
        detections: as for `average_precision`, of scores above `DEFAULT_THRESHOLDS.score`.
        seed: of the bootstrap.
        replicates: of the bootstrap.

    Raises:
        DataError: If no score meets it, saying the best that can be had; and as `average_precision`.
    """
    matches = match_detections(dataset, detections)
    cuts = _Cuts.of(matches)
    finds = cuts.hits > 0  # a detector that reports nothing makes no mistake, and is no answer
    if not finds.any():
        raise DataError(f"none of the detections on the {len(dataset)} images of {dataset.path} is right")
    if wish.precision is not None:
        figure = cuts.hits / np.maximum(cuts.hits + cuts.wrong, 1)
        met = finds & (figure >= wish.precision)
        best = int(np.argmax(np.where(finds, figure, -1)))
        what = f"precision {figure[best]:.3f}"
    else:
        assert wish.false_positives_per_minute is not None
        figure = _per_minute(cuts.wrong / len(dataset), wish)
        met = finds & (figure <= wish.false_positives_per_minute)
        best = int(np.argmin(np.where(finds, figure, np.inf)))
        what = f"{figure[best]:.3g} false positives a minute"
    if not met.any():
        recall = cuts.hits[best] / int(matches.boxes.sum())
        raise DataError(
            f"{wish} cannot be had on the {len(dataset)} images of {dataset.path}: the best is {what}, from "
            f"score {cuts.threshold(best):.3f} up, with recall {recall:.3f}"
        )
    threshold = cuts.threshold(int(np.flatnonzero(met)[-1]))
    return _describe(matches, threshold, wish, np.random.default_rng(seed), replicates)


@dataclass(frozen=True, eq=False)
class _Cuts:
    """Where detections, best first, can be cut off: never between two of the same score."""

    above: NDArray[np.float64]
    """``(C,)``: lowest score that stays, falling."""
    below: NDArray[np.float64]
    """``(C,)``: highest that goes."""
    hits: NDArray[np.intp]
    """``(C,)``: right detections that stay."""
    wrong: NDArray[np.intp]

    @classmethod
    def of(cls, matches: Matches) -> "_Cuts":
        floor = DEFAULT_THRESHOLDS.score
        for image in np.flatnonzero(np.bincount(matches.image) >= MATCHED_PER_IMAGE):
            floor = max(floor, float(matches.scores[matches.image == image].min()))
        scores = matches.scores
        below = np.append(scores[1:], 0.0)
        ends = np.flatnonzero((scores > below) & (scores > floor))
        return cls(
            scores[ends],
            np.maximum(below[ends], floor),
            np.cumsum(matches.hit[0])[ends],
            np.cumsum(matches.wrong[0])[ends],
        )

    def threshold(self, index: int) -> float:
        """In the middle between what stays and what goes, in float32 as devices compare."""
        below, above = float(self.below[index]), float(self.above[index])
        middle = float(np.float32((below + above) / 2))
        return middle if below < middle < above else below


def _describe(
    matches: Matches, threshold: float, wish: Wish, rng: np.random.Generator, replicates: int
) -> OperatingPoint:
    from scipy import stats

    images, above = len(matches.boxes), matches.scores > threshold
    counts = np.stack(
        [
            np.bincount(matches.image[above & matches.hit[0]], minlength=images),
            np.bincount(matches.image[above & matches.wrong[0]], minlength=images),
            matches.boxes,
        ],
        axis=1,
    )  # (N, 3): right, false, boxes
    hits, wrong, boxes = (int(count) for count in counts.sum(axis=0))
    drawn = np.stack([counts[rng.integers(0, images, images)].sum(axis=0) for _ in range(replicates)])

    def share(whole: int, drawn_whole: NDArray[np.intp]) -> Interval:
        exact = stats.binomtest(hits, whole).proportion_ci(0.95)
        some = drawn_whole > 0
        return _widest((exact.low, exact.high), drawn[some, 0] / drawn_whole[some])

    rate, rate_interval = None, None
    if wish.frames_per_second is not None:
        # Poisson: Garwood 1936, doi:10.1093/biomet/28.3-4.437
        exact = (
            stats.chi2.ppf(0.025, 2 * wrong) / 2 if wrong else 0.0,
            stats.chi2.ppf(0.975, 2 * wrong + 2) / 2,
        )
        rate = float(_per_minute(wrong / images, wish))
        rate_interval = _widest(
            tuple(_per_minute(count / images, wish) for count in exact),
            _per_minute(drawn[:, 1] / images, wish),
        )
    return OperatingPoint(
        threshold=threshold,
        precision=hits / (hits + wrong),
        precision_interval=share(hits + wrong, drawn[:, 0] + drawn[:, 1]),
        recall=hits / boxes,
        recall_interval=share(boxes, drawn[:, 2]),
        false_positives_per_minute=rate,
        false_positives_per_minute_interval=rate_interval,
        detections=hits + wrong,
        false_positives=wrong,
        boxes=boxes,
        images=images,
    )


def _per_minute(per_image: Any, wish: Wish) -> Any:
    assert wish.frames_per_second is not None
    return per_image * wish.frames_per_second * 60


def _widest(exact: tuple[float, ...], drawn: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(min(exact[0], float(low)), max(exact[1], float(high)))


@dataclass(frozen=True)
class Calibration:
    """A step's threshold.json."""

    wish: Wish
    point: OperatingPoint
    weights_sha256: str
    data_sha256: str
    """Of the data set that it was chosen on."""

    def write(self, folder: Path) -> None:
        write_json(folder / THRESHOLD_FILE, {"schema_version": 1, **asdict(self)})

    @classmethod
    def read(cls, folder: Path, weights_sha256: str) -> "Calibration | None":
        """The step's record; None where there is none.

        Raises:
            DataError: If it is damaged, or was chosen for other weights.
        """
        path = folder / THRESHOLD_FILE
        if not path.is_file():
            return None
        record = read_json(path)
        try:
            found = cls(
                Wish(**record["wish"]),
                OperatingPoint.from_json(record["point"]),
                record["weights_sha256"],
                record["data_sha256"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error!r}): run `edgeprune calibrate` again") from error
        if found.weights_sha256 != weights_sha256:
            raise DataError(f"{path} was chosen for other weights: run `edgeprune calibrate` again")
        return found
