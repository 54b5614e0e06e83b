import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from coco_files import person, write_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.data.errors import DataError
from edgeprune.data.precision import ImageDetections, average_precision


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
    """On coco-person val, with noisy and false detections, the figures are pycocotools' own from its files."""
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
