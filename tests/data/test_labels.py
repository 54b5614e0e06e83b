"""The labels that come with edgeprune for vtest.avi, against the boxes others drew on the same video.

`pytest -s tests/data/test_labels.py` prints the figures of data/VTEST.md.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.data.precision import average_precision
from edgeprune.data.video import frame_of
from edgeprune.detectors.evaluation import detect
from edgeprune.detectors.registry import load_detector

DATA = Path(__file__).resolve().parents[2] / "data"
PARTS = ("train", "test")

Boxes = NDArray[np.float64]


class Reference(NamedTuple):
    """The reference boxes of a frame, ``(K, 4)`` xyxy pixels."""

    people: Boxes
    ignore: Boxes


class Agreement(NamedTuple):
    """Of labels with reference boxes, at IoU 0.5."""

    precision: float
    recall: float


def read_reference(path: Path) -> dict[int, Reference]:
    """Read MOT text by frame: ``frame, id, left, top, width, height, flag, ...``; flag 0 is ignored."""
    by_frame: dict[int, list[list[float]]] = defaultdict(list)
    for line in path.read_text().splitlines():
        frame, _, left, top, width, height, flag = map(float, line.split(",")[:7])
        by_frame[int(frame)].append([left, top, left + width, top + height, flag])
    rows = {frame: np.array(boxes) for frame, boxes in by_frame.items()}
    return {frame: Reference(row[row[:, 4] == 1, :4], row[row[:, 4] == 0, :4]) for frame, row in rows.items()}


def frame_number(file_name: str) -> int:
    """The number in ``"vtest.avi#000123"``."""
    frame = frame_of(file_name)
    assert frame is not None
    return frame.number


def overlap(first: Boxes, second: Boxes) -> tuple[Boxes, Boxes]:
    """IoU, and intersection over the first box's own area: each ``(len(first), len(second))``."""
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    sides = np.clip(np.minimum(first[:, None, 2:], second[None, :, 2:]) - corner, 0, None)
    shared_area = sides.prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - shared_area
    return shared_area / union, shared_area / areas[0][:, None]


def agreement(labels: Dataset, reference: dict[int, Reference], first_frame: int) -> Agreement:
    """Pair each label with at most one reference box.

    Args:
        first_frame: number that the reference gives to the first frame.

    Returns:
        Precision leaves out labels without a partner that lie, by half of their area, in an ignored box.
    """
    paired = labelled = referenced = 0
    for sample in labels.samples:
        people, ignore = reference[frame_number(sample.file_name) + first_frame]
        boxes = sample.boxes.astype(np.float64)
        iou, _ = overlap(boxes, people)
        fits = iou >= 0.5
        rows, columns = linear_sum_assignment(np.where(fits, iou, 0), maximize=True)
        partners = rows[fits[rows, columns]]
        ignored = np.asarray((overlap(boxes, ignore)[1] >= 0.5).any(1))
        ignored[partners] = False
        paired += len(partners)
        labelled += int((~ignored).sum())
        referenced += len(people)
    return Agreement(paired / labelled, paired / referenced)


@pytest.fixture(scope="module")
def labels(shared: Path) -> dict[str, Dataset]:
    """Both label files."""
    return {part: load_dataset(DATA / f"vtest_{part}.json", shared / "pets-vtest") for part in PARTS}


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[int, Reference]:
    """The reference boxes by frame, the first being 1."""
    return read_reference(shared / "pets-vtest" / "gt.txt")


@pytest.fixture(scope="module")
def reference_test(
    shared: Path, reference: dict[int, Reference], tmp_path_factory: pytest.TempPathFactory
) -> Dataset:
    """The test frames with the reference boxes; what the reference ignores is a crowd."""
    content = json.loads((DATA / "vtest_test.json").read_text())
    boxes = [
        (image["id"], crowd, box)
        for image in content["images"]
        for crowd, kind in enumerate(reference[frame_number(image["file_name"]) + 1])
        for box in kind.tolist()
    ]
    content["annotations"] = [
        {"id": number, "image_id": image_id, "category_id": 1, "iscrowd": crowd}
        | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        for number, (image_id, crowd, (x1, y1, x2, y2)) in enumerate(boxes, 1)
    ]
    path = tmp_path_factory.mktemp("reference") / "reference.json"
    path.write_text(json.dumps(content))
    return load_dataset(path, shared / "pets-vtest")


def test_edits_lead_to_the_labels() -> None:
    """What the last edit of a box left is in the labels; what an edit changed or took away is not."""
    labelled: set[tuple[str, tuple[float, ...]]] = set()
    for part in PARTS:
        content = json.loads((DATA / f"vtest_{part}.json").read_text())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        labelled |= {(names[entry["image_id"]], tuple(entry["bbox"])) for entry in content["annotations"]}

    actions = {(False, True): "add", (True, True): "move", (True, False): "delete"}
    left: dict[tuple[str, int], list[float] | None] = {}
    for line in (DATA / "vtest_edits.jsonl").read_text().splitlines():
        edit = json.loads(line)
        name, before, after = edit["file_name"], edit["before"], edit["after"]
        assert edit["action"] == actions[bool(before), bool(after)]
        assert edit["why"]
        assert left.get((name, edit["box"]), before) == before
        assert before is None or (name, tuple(before)) not in labelled
        left[name, edit["box"]] = after
    assert {(name, tuple(box)) for (name, _), box in left.items() if box} <= labelled


@pytest.mark.shared_data
def test_labels_load(labels: dict[str, Dataset]) -> None:
    """Nothing is dropped or clipped; train is of the first 600 frames, test of the last 150 of 795."""
    frames = {part: [frame_number(s.file_name) for s in labels[part].samples] for part in PARTS}
    assert [labels[part].problems for part in PARTS] == [(), ()]
    assert len(set(frames["train"])) >= 60
    assert len(set(frames["test"])) >= 40
    assert 0 <= min(frames["train"]) <= max(frames["train"]) < 600
    assert 795 - 150 <= min(frames["test"]) <= max(frames["test"]) < 795


@pytest.mark.shared_data
def test_the_reference_counts_frames_from_1(
    labels: dict[str, Dataset], reference: dict[int, Reference]
) -> None:
    """Labels and reference agree best when the video's frame 0 is the reference's frame 1."""
    train = labels["train"].subset(range(1, len(labels["train"])))  # frame 0 has no neighbour before it
    recall = {first: agreement(train, reference, first).recall for first in (0, 1, 2)}
    assert max(recall, key=lambda first: recall[first]) == 1


@pytest.mark.shared_data
@pytest.mark.parametrize("part", PARTS)
def test_labels_agree_with_the_reference(
    labels: dict[str, Dataset], reference: dict[int, Reference], part: str
) -> None:
    """At IoU 0.5 the labels are the people of the reference."""
    found = agreement(labels[part], reference, 1)
    print(f"\n{part}: precision {found.precision:.3f}, recall {found.recall:.3f} at IoU 0.5")
    assert found.precision >= 0.9
    assert found.recall >= 0.95


@pytest.mark.shared_data
@pytest.mark.parametrize("side", [320, 416])
def test_labels_score_the_detector_as_the_reference_does(
    shared: Path,
    labels: dict[str, Dataset],
    reference: dict[int, Reference],
    reference_test: Dataset,
    side: int,
) -> None:
    """The unpruned detector's AP50 on the test frames differs by less than 0.05."""
    detector = load_detector("nanodet-g", shared / "nanodet-g" / "nanodet_g_coco80_convs.npz", (side, side))
    detections = detect(detector, detector, labels["test"])
    ours, theirs = (average_precision(truth, detections) for truth in (labels["test"], reference_test))
    assert theirs.boxes == sum(
        len(reference[frame_number(s.file_name) + 1].people) for s in labels["test"].samples
    )
    print(f"\n{side}: AP50 {ours.ap50:.3f} on the labels, {theirs.ap50:.3f} on the reference")
    print(f"{side}: AP {ours.ap:.3f} on the labels, {theirs.ap:.3f} on the reference")
    assert ours.ap50 == pytest.approx(theirs.ap50, abs=0.05)
