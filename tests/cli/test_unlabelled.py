"""Images that must be kept apart: what trains without labels, what selects, what reports."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgeprune.cli.run_folder import RunError
from edgeprune.cli.unlabelled import refuse_shared, unlabelled_images
from edgeprune.data.dataset import Dataset, load_dataset


def write_video(path: Path, frames: int = 20) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for number in range(frames):
        writer.write(np.full((48, 64, 3), 10 * number, np.uint8))
    writer.release()


def labelled(folder: Path, names: list[str]) -> Dataset:
    images = [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(names)]
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [4, 4, 20, 30], "area": 600, "iscrowd": 0}
        for i in range(len(names))
    ]
    path = folder / "val.json"
    path.write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "person"}]})
    )
    return load_dataset(path, folder)


def test_frames_of_a_range(tmp_path: Path) -> None:
    """video.avi#FIRST-LAST gives frames of that range only, and one that lies before the validation's is accepted."""
    write_video(tmp_path / "street.avi")
    val = labelled(tmp_path, ["street.avi#000015", "street.avi#000019"])
    found = unlabelled_images(tmp_path / "street.avi#0-12")
    refuse_shared("--unlabelled", found, {"--val": val})
    numbers = [sample.frame.number for sample in found.samples if sample.frame]
    assert numbers and max(numbers) <= 12 and len(numbers) == len(found)
    assert all(not len(sample.boxes) for sample in found.samples)


@pytest.mark.parametrize("source", ["street.avi", "street.avi#10-16"])
def test_a_shared_time_range_is_refused(tmp_path: Path, source: str) -> None:
    """A video range that overlaps the validation frames' is refused, saying which frames."""
    write_video(tmp_path / "street.avi")
    val = labelled(tmp_path, ["street.avi#000015", "street.avi#000019"])
    with pytest.raises(RunError, match=r"frames 15 to 1[5-9]"):
        refuse_shared("--unlabelled", unlabelled_images(tmp_path / source), {"--val": val})


def test_a_shared_image_is_refused_by_its_content(tmp_path: Path) -> None:
    """A copy of a validation image under another name is found out."""
    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    others = tmp_path / "others"
    others.mkdir()
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    cv2.imwrite(str(others / "renamed.png"), picture)
    cv2.imwrite(str(others / "b.png"), picture[::-1])
    val = labelled(tmp_path, ["a.png"])
    with pytest.raises(RunError, match=r"--unlabelled shares the image renamed\.png with --val"):
        refuse_shared("--unlabelled", unlabelled_images(others), {"--val": val})
    (others / "renamed.png").unlink()
    found = unlabelled_images(others)
    assert len(found) == 1
    refuse_shared("--unlabelled", found, {"--val": val})
