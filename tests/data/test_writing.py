"""What is written as COCO JSON reads back the same; splits do not leak; a summary counts what is there."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from coco_files import image, person, write_coco
from formats import BOXES, FORMATS, coco, mot, mot_video, voc

from edgeprune.data.dataset import Dataset, load_dataset, load_images
from edgeprune.data.errors import EdgePruneError
from edgeprune.data.precision import ImageDetections
from edgeprune.data.splitting import split
from edgeprune.data.summary import BOX_COLOR, CELL, IGNORED_COLOR, preview, summarise
from edgeprune.data.writing import labelled_by
from edgeprune.data.writing import write_coco as write


def same(first: Dataset, second: Dataset) -> bool:
    """Whether the boxes and frames of two data sets are the same, and their images."""
    return len(first) == len(second) and all(
        a.boxes.tolist() == b.boxes.tolist()
        and a.ignore.tolist() == b.ignore.tolist()
        and (a.frame is None) == (b.frame is None)
        and (first.image(n) == second.image(n)).all()
        for n, (a, b) in enumerate(zip(first.samples, second.samples, strict=True))
    )


@pytest.mark.parametrize("convert", [*FORMATS.values(), mot_video])
@pytest.mark.parametrize("beside", [True, False])
def test_conversion_keeps_images_and_boxes(
    convert: Callable[[Path], Path], beside: bool, tmp_path: Path
) -> None:
    """Beside its images a converted file needs no folder named; elsewhere it says which; it reads the same."""
    dataset = load_dataset(convert(tmp_path / "set"))
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / ("set" if beside else "elsewhere") / "converted.json"
    folder = write(dataset, out)
    assert folder == (None if beside else dataset.root)
    assert same(load_dataset(out, folder), dataset)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """No folder, no file: one error with the path."""
    dataset = load_dataset(coco(tmp_path / "set"))
    with pytest.raises(EdgePruneError, match=r"cannot (list|write) .*gone"):
        write(dataset, tmp_path / "gone" / "out.json")


def test_stills_are_split_by_lot(tmp_path: Path) -> None:
    """Each image is in one part; the share and the seed decide."""
    images = [image(number, f"{number}.png") for number in range(20)]
    for entry in images:
        cv2.imwrite(str(tmp_path / entry["file_name"]), np.zeros((30, 40, 3), np.uint8))
    dataset = load_dataset(write_coco(tmp_path, [], images))
    first, second = split(dataset, 0.25, seed=0)
    names = [{sample.file_name for sample in part.samples} for part in (first, second)]
    assert len(names[0]) == 15 and len(names[1]) == 5 and not names[0] & names[1]
    assert {sample.file_name for sample in split(dataset, 0.25, seed=1)[1].samples} != names[1]


@pytest.mark.parametrize("convert", [mot, mot_video])
def test_one_video_is_split_in_time(convert: Callable[[Path], Path], tmp_path: Path) -> None:
    """Of one video, stored as images or not, the end is split off; also after a conversion."""
    dataset = load_dataset(convert(tmp_path / "set"))
    write(dataset, tmp_path / "set" / "converted.json")
    for source in (dataset, load_dataset(tmp_path / "set" / "converted.json")):
        for seed in range(3):
            first, second = split(source, 0.5, seed)
            assert [sample.file_name for part in (first, second) for sample in part.samples] == [
                sample.file_name for sample in source.samples
            ]
            assert len(second) == 2


def test_videos_are_split_whole(tmp_path: Path) -> None:
    """Of several videos no one is in both parts, and both parts have some."""
    for name in "abcde":
        mot(tmp_path / name)
    dataset = load_dataset(tmp_path)
    for share, expected in ((0.2, 1), (0.4, 2), (0.01, 1), (0.99, 4)):
        for seed in range(3):
            parts = split(dataset, share, seed)
            videos = [{sample.frame.video for sample in part.samples if sample.frame} for part in parts]
            assert not videos[0] & videos[1]
            assert (len(videos[1]), len(videos[0] | videos[1])) == (expected, 5)


def test_a_detectors_boxes_become_labels(tmp_path: Path) -> None:
    """Boxes from the threshold up are written with their score; the rest is not."""
    dataset = load_images(voc(tmp_path / "set") / "JPEGImages")
    boxes = np.array([[1, 2, 31, 42], [5, 5, 25, 65]], np.float32)
    detections = [
        ImageDetections(sample.image_id, boxes, np.array([0.75, 0.3], np.float32))
        for sample in dataset.samples
    ]
    write(labelled_by(dataset, detections, 0.5), tmp_path / "set" / "JPEGImages" / "labels.json")
    written = load_dataset(tmp_path / "set" / "JPEGImages" / "labels.json")
    assert [sample.boxes.tolist() for sample in written.samples] == [[[1, 2, 31, 42]]] * 4
    content = json.loads((tmp_path / "set" / "JPEGImages" / "labels.json").read_text())
    assert {entry["score"] for entry in content["annotations"]} == {0.75}


def test_a_summary_counts(tmp_path: Path) -> None:
    """The figures are those of the boxes that were written."""
    summary = summarise(load_dataset(voc(tmp_path / "set")))
    areas = [width * height for boxes in BOXES.values() for _, _, width, height in boxes]
    assert (summary.format, summary.images, summary.boxes) == ("Pascal VOC", 4, 6)
    assert (summary.images_without_boxes, summary.boxes_per_image_max, summary.boxes_per_image_mean) == (
        1,
        3,
        1.5,
    )
    assert summary.box_heights_px[0] == 19 and summary.box_heights_px[-1] == 119
    assert summary.boxes_by_size["small"] == sum(area < 32**2 for area in areas)
    assert summary.boxes_by_size["large"] == sum(area >= 96**2 for area in areas)
    assert summary.image_sizes == {"161x119": 4} and summary.image_kinds == {"colour": 4}


def test_the_preview_draws_boxes_where_they_are(tmp_path: Path) -> None:
    """Boxes are outlined in the image, ignored ones in grey; what does not decode stays black."""
    boxes = [person(1, 1, [4, 6, 20, 12]), person(2, 1, [30, 20, 8, 8], iscrowd=1)]
    dataset = load_dataset(write_coco(tmp_path, boxes))
    (tmp_path / "b.png").write_bytes(b"gone")
    sheet = preview(dataset)
    scale = CELL // 40
    assert sheet.shape == (CELL, 4 * CELL, 3)
    for (x, y), color in (((4, 12), BOX_COLOR), ((14, 6), BOX_COLOR), ((30, 24), IGNORED_COLOR)):
        assert tuple(sheet[y * scale, x * scale].tolist()) == color
    assert not sheet[12 * scale, 14 * scale].any()  # inside a box of the black image
    assert not sheet[:, CELL:].any()
