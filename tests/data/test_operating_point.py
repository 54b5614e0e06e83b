"""The threshold is the lowest that meets the wish; counts come from pycocotools on what is left above it."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from coco_files import image, person, write_coco
from hypothesis import given
from hypothesis import strategies as st
from test_precision import coco_evaluation, found, scattered

from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.data.errors import DataError
from edgeprune.data.operating_point import Calibration, Wish, choose_operating_point
from edgeprune.data.precision import ImageDetections


def count(dataset: Dataset, detections: list[ImageDetections], threshold: float) -> tuple[int, int]:
    """Right and false detections above a threshold, the others taken away before pycocotools sees them."""
    evaluation = coco_evaluation(dataset, detections, threshold)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.evaluate()
    images = [entry for entry in evaluation.evalImgs if entry is not None]
    counted = [~np.asarray(entry["dtIgnore"], bool)[0] for entry in images]
    matched = [np.asarray(entry["dtMatches"])[0] > 0 for entry in images]
    right = sum(int((m & c).sum()) for m, c in zip(matched, counted, strict=True))
    return right, sum(int((~m & c).sum()) for m, c in zip(matched, counted, strict=True))


def at_all_cuts(dataset: Dataset, detections: list[ImageDetections]) -> dict[float, tuple[int, int]]:
    """Right and false detections by the score that they are above."""
    scores = np.unique(np.concatenate([record.scores for record in detections]))
    cuts = [0.01, *scores[scores > 0.01].astype(float)]
    return {cut: count(dataset, detections, cut) for cut in cuts}


@given(seed=st.integers(0, 200), precision=st.floats(0.3, 1.0))
def test_the_threshold_reaches_the_precision_with_the_highest_recall(seed: int, precision: float) -> None:
    """Counted anew above the threshold the precision is the one asked; no lower cut has it."""
    dataset, detections = scattered([3, 0, 2, 5, 1, 4], seed)
    counted = at_all_cuts(dataset, detections)
    good = [cut for cut, (right, false) in counted.items() if right and right / (right + false) >= precision]
    wish = Wish(precision=precision)
    if not good:
        with pytest.raises(DataError, match=r"cannot be had|is right"):
            choose_operating_point(dataset, detections, wish, replicates=5)
        return
    point = choose_operating_point(dataset, detections, wish, replicates=5)
    right, false = count(dataset, detections, point.threshold)
    assert (right, false) == counted[min(good)]
    assert point.precision == pytest.approx(right / (right + false)) and point.precision >= precision
    assert point.recall == pytest.approx(right / point.boxes)
    assert (point.detections, point.false_positives) == (right + false, false)
    assert np.float32(point.threshold) == point.threshold or point.threshold == 0.01  # as devices compare


@given(seed=st.integers(0, 200), per_minute=st.floats(0, 4000))
def test_the_threshold_keeps_to_the_false_positives(seed: int, per_minute: float) -> None:
    """Counted anew there are so many false detections a minute at most; no lower cut has so few."""
    dataset, detections = scattered([3, 1, 2, 5, 1, 4], seed)
    counted = at_all_cuts(dataset, detections)
    good = [
        cut
        for cut, (right, false) in counted.items()
        if right and false / len(dataset) * 20 * 60 <= per_minute
    ]
    wish = Wish(false_positives_per_minute=per_minute, frames_per_second=20)
    if not good:
        with pytest.raises(DataError, match=r"cannot be had|is right"):
            choose_operating_point(dataset, detections, wish, replicates=5)
        return
    point = choose_operating_point(dataset, detections, wish, replicates=5)
    right, false = count(dataset, detections, point.threshold)
    assert (right, false) == counted[min(good)]
    assert point.false_positives_per_minute == pytest.approx(false / len(dataset) * 20 * 60)


@pytest.fixture
def two_people(tmp_path: Path) -> Dataset:
    """A person in each image, and a crowd in the second."""
    annotations = [
        person(1, 1, [0, 0, 10, 10]),
        person(2, 2, [0, 0, 10, 10]),
        person(3, 2, [20, 10, 20, 20], iscrowd=1),
    ]
    return load_dataset(write_coco(tmp_path, annotations))


DETECTIONS = [
    found(1, [0, 0, 10, 10, 0.75], [20, 20, 30, 30, 0.5]),
    found(2, [0, 0, 10, 10, 0.25], [21, 11, 30, 20, 0.375], [21, 11, 30, 20, 0.875]),
]  # crowd, right, false, crowd, right


def test_by_hand(two_people: Dataset) -> None:
    """Precision 1 lies between 0.75 and 0.5, 2/3 from the floor; what is on a crowd counts as nothing."""
    point = choose_operating_point(two_people, DETECTIONS, Wish(precision=1))
    assert (point.threshold, point.precision, point.recall) == (0.625, 1, 0.5)
    assert point.false_positives_per_minute is None
    point = choose_operating_point(two_people, DETECTIONS, Wish(precision=0.6, frames_per_second=0.1))
    assert (point.threshold, point.precision, point.recall) == (pytest.approx(0.13, abs=1e-6), 2 / 3, 1)
    assert point.false_positives_per_minute == pytest.approx(1 / 2 * 0.1 * 60)


def test_a_wish_that_cannot_be_met_names_the_best(two_people: Dataset) -> None:
    """The surest detection is false: no score has precision 0.9; the best one has 2/3."""
    detections = [found(1, [0, 0, 10, 10, 0.7], [20, 20, 30, 30, 0.8]), found(2, [0, 0, 10, 10, 0.6])]
    with pytest.raises(DataError, match=r"precision 0\.9 cannot be had on the 2 images.*0\.667.*recall 1"):
        choose_operating_point(two_people, detections, Wish(precision=0.9))
    wish = Wish(false_positives_per_minute=10, frames_per_second=1)
    with pytest.raises(DataError, match=r"the best is 30 false positives a minute"):
        choose_operating_point(two_people, detections, wish)
    with pytest.raises(DataError, match="none of the detections on the 2 images"):
        choose_operating_point(two_people, [found(1), found(2)], Wish(precision=0.5))


def test_few_images_have_wide_intervals(two_people: Dataset) -> None:
    """One right of one is no proof: 0.025 to 1 (exact binomial); no false one in 2 images may be 3.69 / 2 an image."""
    wish = Wish(precision=1, frames_per_second=1)
    point = choose_operating_point(two_people, DETECTIONS, wish)
    assert point.precision_interval.low == pytest.approx(0.025)
    assert point.precision_interval.high == 1
    assert point.false_positives_per_minute_interval is not None
    assert point.false_positives_per_minute_interval.low == 0
    assert point.false_positives_per_minute_interval.high == pytest.approx(3.689 / 2 * 60, rel=1e-3)
    widths = []
    for copies in (8, 32):
        dataset, detections = scattered([2, 4, 1, 3] * copies, seed=0)
        interval = choose_operating_point(dataset, detections, Wish(precision=0.5)).precision_interval
        widths.append(interval.high - interval.low)
    assert 1.4 < widths[0] / widths[1] < 2.8


def test_what_an_image_has_beyond_its_hundred_best_is_not_assumed(tmp_path: Path) -> None:
    """pycocotools matches 100 an image: the threshold stays above the hundredth, whatever the wish."""
    dataset = load_dataset(write_coco(tmp_path, [person(1, 1, [0, 0, 10, 10])], [image(1, "a.png")]))
    scores = np.linspace(0.9, 0.1, 150, dtype=np.float32)
    boxes = np.tile(np.array([[0, 0, 10, 10]], np.float32), (150, 1))
    point = choose_operating_point(dataset, [ImageDetections(1, boxes, scores)], Wish(precision=0.001))
    assert point.threshold >= scores[99]


def test_the_record_comes_back_and_names_its_weights(two_people: Dataset, tmp_path: Path) -> None:
    """What is written is what is read; weights that it was not chosen for and damage are refused."""
    wish = Wish(false_positives_per_minute=30, frames_per_second=1)
    written = Calibration(wish, choose_operating_point(two_people, DETECTIONS, wish), "a" * 64, "b" * 64)
    assert Calibration.read(tmp_path, "a" * 64) is None
    written.write(tmp_path)
    assert Calibration.read(tmp_path, "a" * 64) == written
    with pytest.raises(DataError, match="other weights: run `edgeprune calibrate`"):
        Calibration.read(tmp_path, "c" * 64)
    for damaged in ("{}", '{"wish": {"precision": 2, "x": 1}, "point": {}}'):
        (tmp_path / "threshold.json").write_text(damaged)
        with pytest.raises(DataError, match="is damaged"):
            Calibration.read(tmp_path, "a" * 64)


@pytest.mark.parametrize(
    "wish",
    [{}, {"precision": 0.5, "false_positives_per_minute": 1}, {"false_positives_per_minute": 1}],
)
def test_a_wish_is_one_thing(wish: dict[str, float]) -> None:
    """Nothing, two things, or a rate without frames a second is no wish."""
    with pytest.raises(ValueError):
        Wish(**wish)
