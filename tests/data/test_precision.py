import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from coco_files import image, person, write_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from edgeprune.data.dataset import Dataset, Sample, load_dataset
from edgeprune.data.errors import DataError
from edgeprune.data.precision import (
    AREAS,
    ImageDetections,
    Matches,
    _evaluate,
    average_precision,
    detection_quality,
)


def found(image_id: int, *boxes: list[float]) -> ImageDetections:
    """Detections from rows of x1, y1, x2, y2, score."""
    rows = np.array(boxes, np.float32).reshape(-1, 5)
    return ImageDetections(image_id, rows[:, :4], rows[:, 4])


@pytest.fixture
def two_people(tmp_path: Path) -> Dataset:
    """A person in each image, and a crowd in the second."""
    annotations = [
        person(1, 1, [0, 0, 10, 10]),
        person(2, 2, [0, 0, 10, 10]),
        person(3, 2, [20, 10, 20, 20], iscrowd=1),
    ]
    return load_dataset(write_coco(tmp_path, annotations))


def test_hand_computed_case(two_people: Dataset) -> None:
    """A hit, a miss, a hit of IoU 0.64: precision 1 up to recall 1/2, above it 2/3 at IoU <= 0.6, else 0."""
    precision = average_precision(
        two_people, [found(1, [0, 0, 10, 10, 0.9], [20, 20, 30, 30, 0.8]), found(2, [0, 0, 8, 8, 0.7])]
    )
    lax, strict = (51 + 50 * 2 / 3) / 101, 51 / 101  # COCO samples 101 recalls; 51 of them are at most 1/2
    assert precision.ap50 == pytest.approx(lax)
    assert precision.ap75 == pytest.approx(strict)
    assert precision.ap == pytest.approx((3 * lax + 7 * strict) / 10)  # 0.50, 0.55, 0.60 are below 0.64
    assert (precision.images, precision.boxes) == (2, 2)


def test_detections_on_a_crowd_count_as_nothing(two_people: Dataset) -> None:
    """Any number of detections inside a crowd, however sure, leave a perfect result perfect."""
    hits = [found(1, [0, 0, 10, 10, 0.5]), found(2, [0, 0, 10, 10, 0.5])]
    crowd = found(2, [0, 0, 10, 10, 0.5], [21, 11, 30, 20, 0.9], [25, 15, 39, 29, 0.8])
    assert average_precision(two_people, hits).ap == pytest.approx(1)
    assert average_precision(two_people, [hits[0], crowd]).ap == pytest.approx(1)


def test_ignored_boxes_count_like_crowds(tmp_path: Path) -> None:
    """An `ignore` box is neither to be found nor wrong to find, which pycocotools itself would overlook."""
    annotations = [person(1, 1, [0, 0, 10, 10]), person(2, 1, [20, 10, 20, 20], ignore=1)]
    dataset = load_dataset(write_coco(tmp_path, annotations))
    hits = found(1, [0, 0, 10, 10, 0.5], [20, 10, 40, 30, 0.9])
    assert average_precision(dataset, [hits, found(2)]).ap == pytest.approx(1)
    assert average_precision(dataset, [found(1, [0, 0, 10, 10, 0.5]), found(2)]).ap == pytest.approx(1)


def test_nothing_found_is_zero(two_people: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """Empty detections give 0, not an error; nothing is printed."""
    precision = average_precision(two_people, [found(1), found(2)])
    assert (precision.ap, precision.ap50, precision.ap75) == (0, 0, 0)
    assert capsys.readouterr() == ("", "")


def test_false_detections_in_empty_images_count(tmp_path: Path) -> None:
    """A sure detection in an image without boxes halves the precision."""
    dataset = load_dataset(write_coco(tmp_path, [person(1, 1, [0, 0, 10, 10])]))
    wrong = found(2, [0, 0, 10, 10, 0.9])
    assert average_precision(dataset, [found(1, [0, 0, 10, 10, 0.5]), wrong]).ap == pytest.approx(0.5)


def test_what_cannot_be_scored_is_refused(two_people: Dataset, tmp_path: Path) -> None:
    """No boxes, several classes, images without record, detections that are no numbers: no figure."""
    nothing = [found(1), found(2)]
    with pytest.raises(DataError, match="no boxes of person to score"):
        average_precision(load_dataset(write_coco(tmp_path, [])), nothing)
    with pytest.raises(DataError, match="person, dog"):
        average_precision(load_dataset(two_people.path, classes=("person", "dog")), nothing)
    for records in ([found(1)], [found(1), found(1)], [found(1), found(2), found(2)], [found(1), found(3)]):
        with pytest.raises(ValueError, match="one record for each image"):
            average_precision(two_people, records)
    with pytest.raises(DataError, match="image 1 are not finite"):
        average_precision(two_people, [found(1, [0, 0, float("nan"), 10, 0.9]), found(2)])
    with pytest.raises(ValueError, match="do not fit"):
        ImageDetections(1, np.zeros((2, 4), np.float32), np.zeros(3, np.float32))


@pytest.mark.shared_data
def test_agrees_with_pycocotools_used_by_hand(shared: Path, tmp_path: Path) -> None:
    """On coco-person val, with noisy and false detections, the figures are pycocotools' from its files."""
    path = shared / "coco-person" / "person_val2017.json"
    dataset, rng = load_dataset(path), np.random.default_rng(0)
    detections = []
    for sample in dataset.samples:
        near = np.repeat(sample.boxes[rng.random(len(sample.boxes)) < 0.8], 2, axis=0)
        near += rng.normal(0, 0.08, near.shape) * np.tile(near[:, 2:] - near[:, :2], 2)
        corners = rng.uniform(0, 300, (120, 2))  # more than COCO's 100 an image
        boxes = np.concatenate([near, np.concatenate([corners, corners + rng.uniform(5, 200, (120, 2))], 1)])
        boxes, scores = boxes.astype(np.float32), rng.uniform(0, 1, len(boxes)).astype(np.float32)
        scores[: len(near)] += 0.5
        detections.append(ImageDetections(sample.image_id, boxes, scores))

    rows = [
        {
            "image_id": record.image_id,
            "category_id": 1,
            "bbox": [float(x1), float(y1), float(x2) - float(x1), float(y2) - float(y1)],
            "score": float(score),
        }
        for record in detections
        for (x1, y1, x2, y2), score in zip(record.boxes, record.scores, strict=True)
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps(rows))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = average_precision(dataset, detections)
    assert 0.1 < precision.ap < 0.9
    assert [precision.ap, precision.ap50, precision.ap75] == pytest.approx(evaluation.stats[:3], abs=1e-9)


def scattered(sizes: list[int], seed: int) -> tuple[Dataset, list[ImageDetections]]:
    """Boxes and detections near them, misses and false ones, in images of 640x480; made, never read."""
    rng = np.random.default_rng(seed)
    samples, annotations, detections = [], [], []
    for image_id, count in enumerate(sizes, 1):
        corners = rng.uniform(0, 300, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(8, 180, (count, 2))], 1).astype(np.float32)
        ignore = rng.random(count) < 0.1
        samples.append(Sample(image_id, f"{image_id}.png", 640, 480, boxes, ignore))
        for (x1, y1, x2, y2), crowd in zip(boxes.astype(float).tolist(), ignore.tolist(), strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": int(crowd)}
                | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            )
        near = boxes[rng.random(count) < 0.8] + rng.normal(0, 5, 4)
        wrong = rng.uniform(0, 300, (rng.integers(0, 3), 2))
        all_boxes = np.concatenate([near, np.concatenate([wrong, wrong + 60], 1)]).astype(np.float32)
        detections.append(ImageDetections(image_id, all_boxes, rng.random(len(all_boxes)).astype(np.float32)))
    images = [{"id": s.image_id, "file_name": s.file_name, "width": 640, "height": 480} for s in samples]
    coco = {"info": {}, "images": images, "annotations": annotations}
    coco["categories"] = [{"id": 1, "name": "person"}]
    return Dataset(Path("made"), Path(), ("person",), "", tuple(samples), coco), detections


def coco_evaluation(dataset: Dataset, detections: list[ImageDetections], above: float = -1.0) -> COCOeval:
    """pycocotools on detections above a score, not run yet."""
    truth, found = COCO(), COCO()
    truth.dataset = {**dataset.coco, "annotations": [dict(box) for box in dataset.coco["annotations"]]}
    rows = [
        {
            "image_id": record.image_id,
            "category_id": 1,
            "iscrowd": 0,
            "bbox": [float(x1), float(y1), float(x2) - float(x1), float(y2) - float(y1)],
            "area": (float(x2) - float(x1)) * (float(y2) - float(y1)),
            "score": float(score),
        }
        for record in detections
        for (x1, y1, x2, y2), score in zip(record.boxes, record.scores, strict=True)
        if score > above
    ]
    found.dataset = {**dataset.coco, "annotations": [{"id": n, **row} for n, row in enumerate(rows, 1)]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        return COCOeval(truth, found, "bbox")


def stats(dataset: Dataset, detections: list[ImageDetections]) -> list[float]:
    """pycocotools' own twelve figures."""
    evaluation = coco_evaluation(dataset, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(figure) for figure in evaluation.stats]


def repeated(
    dataset: Dataset, detections: list[ImageDetections], times: list[int]
) -> tuple[Dataset, list[ImageDetections]]:
    """A data set that has each image so many times, under new ids."""
    samples, records, images, annotations = [], [], [], []
    for sample, record, count in zip(dataset.samples, detections, times, strict=True):
        for _ in range(count):
            number = len(samples) + 1
            samples.append(replace(sample, image_id=number))
            records.append(replace(record, image_id=number))
            images.append({"id": number, "file_name": f"{number}.png", "width": 640, "height": 480})
            own = [box for box in dataset.coco["annotations"] if box["image_id"] == sample.image_id]
            annotations += [
                {**box, "image_id": number, "id": len(annotations) + n} for n, box in enumerate(own, 1)
            ]
    coco = {**dataset.coco, "images": images, "annotations": annotations}
    return replace(dataset, samples=tuple(samples), coco=coco), records


def test_ap_by_size_is_that_of_pycocotools() -> None:
    """Small, medium and large as pycocotools' summary has them; None where there is no such box."""
    dataset, detections = scattered([3, 0, 5, 2, 4] * 6, seed=1)
    quality = detection_quality(dataset, detections, 0.5, replicates=10)
    expected = stats(dataset, detections)
    assert min(expected[3:6]) > 0
    assert [quality.ap_small, quality.ap_medium, quality.ap_large] == pytest.approx(expected[3:6], abs=1e-12)
    small = [box for box in dataset.coco["annotations"] if box["area"] < 32**2]
    only_small = replace(dataset, coco={**dataset.coco, "annotations": small})
    assert detection_quality(only_small, detections, 0.5, replicates=10).ap_large is None


@pytest.mark.parametrize("seed", range(5))
def test_a_draw_of_the_bootstrap_is_ap_of_repeated_images(seed: int) -> None:
    """AP with an image counted n times is pycocotools' AP of a data set that has it n times."""
    dataset, detections = scattered([3, 1, 5, 2, 4, 0, 6, 2], seed)
    times = np.random.default_rng(seed).integers(0, 4, 8)
    matches = Matches.of(_evaluate(dataset, detections, list(AREAS)))
    for count in (np.ones(8, int), times):
        expected = stats(*repeated(dataset, detections, count.tolist()))
        found = matches.average_precision(count)
        assert found is not None
        assert [found.mean(), found[0], found[5]] == pytest.approx(expected[:3], abs=1e-12)
    assert matches.average_precision(np.zeros(8, int)) is None


def test_the_interval_covers_ap_and_shrinks() -> None:
    """The interval contains AP, is the same for a seed, and is half as wide with four times the images."""
    few = scattered([2, 4, 1, 3] * 8, seed=0)
    many = scattered([2, 4, 1, 3] * 32, seed=0)
    widths = []
    for dataset, detections in (few, many):
        interval = detection_quality(dataset, detections, 0.5, replicates=400).ap_interval
        assert interval.low < average_precision(dataset, detections).ap < interval.high
        widths.append(interval.high - interval.low)
    assert 1.4 < widths[0] / widths[1] < 2.8
    again = [detection_quality(*few, 0.5, seed=3, replicates=50) for _ in range(2)]
    assert again[0] == again[1] != detection_quality(*few, 0.5, seed=4, replicates=50)


def test_precision_and_recall_at_a_threshold(two_people: Dataset) -> None:
    """By hand: two boxes; a hit at 0.9, a false one at 0.8, one on a crowd at 0.7, a hit at 0.6."""
    detections = [
        found(1, [0, 0, 10, 10, 0.9], [20, 20, 30, 30, 0.8]),
        found(2, [0, 0, 10, 10, 0.6], [21, 11, 30, 20, 0.7]),
    ]
    for threshold, precision, recall in ((0.85, 1, 0.5), (0.65, 0.5, 0.5), (0.6, 2 / 3, 1), (0.95, None, 0)):
        quality = detection_quality(two_people, detections, np.float32(threshold), replicates=5)
        assert quality.precision == (None if precision is None else pytest.approx(precision))
        assert quality.recall == pytest.approx(recall)


def test_miss_rate(two_people: Dataset, tmp_path: Path) -> None:
    """By hand: of two images 0.1 false ones an image is none at all, so what comes after the first is missed."""
    detections = [found(1, [0, 0, 10, 10, 0.9], [20, 20, 30, 30, 0.8]), found(2, [0, 0, 10, 10, 0.7])]
    assert detection_quality(two_people, detections, 0.5, replicates=5).miss_rate == pytest.approx(0.5)
    detections = [found(1, [0, 0, 10, 10, 0.7], [20, 20, 30, 30, 0.8]), found(2, [0, 0, 10, 10, 0.7])]
    assert detection_quality(two_people, detections, 0.5, replicates=5).miss_rate == 1
    # 20 images with a box each: two false ones are allowed, and the box after the third is missed
    images, boxes = zip(
        *[(image(n, f"{n}.png"), person(n, n, [0, 0, 10, 10])) for n in range(1, 21)], strict=True
    )
    for entry in images:
        cv2.imwrite(str(tmp_path / entry["file_name"]), np.zeros((30, 40, 3), np.uint8))
    dataset = load_dataset(write_coco(tmp_path, list(boxes), list(images)))
    records = [
        found(
            n,
            [0, 0, 10, 10, 1 - n / 100],
            *([[20, 20, 30, 30, 1 - n / 100 - 0.001]] if n in (5, 9, 14) else []),
        )
        for n in range(1, 21)
    ]
    assert detection_quality(dataset, records, 0.5, replicates=5).miss_rate == pytest.approx(6 / 20)
