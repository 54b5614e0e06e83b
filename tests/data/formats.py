"""The same images and boxes in every format, each written by its own documentation."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

WIDTH, HEIGHT = 161, 119  # no powers of two: shares of them are not exact
Boxes = list[tuple[int, int, int, int]]  # x, y, width, height

BOXES: dict[int, Boxes] = {
    1: [(10, 20, 33, 71), (100, 5, 40, 100)],
    2: [(0, 0, 161, 119)],
    3: [],
    4: [(60, 30, 7, 19), (80, 30, 13, 37), (120, 61, 41, 58)],
}


def write_images(folder: Path) -> None:
    """000001.png and so on, of noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in BOXES:
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        assert cv2.imwrite(str(folder / f"{number:06d}.png"), pixels)


def coco(folder: Path) -> Path:
    write_images(folder / "val")
    rows = [(number, box) for number, boxes in BOXES.items() for box in boxes]
    content = {
        "images": [
            {"id": number, "file_name": f"{number:06d}.png", "width": WIDTH, "height": HEIGHT}
            for number in BOXES
        ],
        "annotations": [
            {"id": position, "image_id": number, "category_id": 1, "bbox": box, "iscrowd": 0}
            for position, (number, box) in enumerate(rows)
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    (folder / "instances_val.json").write_text(json.dumps(content))
    return folder / "instances_val.json"


def voc(folder: Path) -> Path:
    write_images(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for number, boxes in BOXES.items():
        objects = "".join(
            f"<object><name>person</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>"
            f"<ymin>{y + 1}</ymin><xmax>{x + width}</xmax><ymax>{y + height}</ymax></bndbox></object>\n"
            for x, y, width, height in boxes
        )
        (folder / "Annotations" / f"{number:06d}.xml").write_text(
            f"<annotation>\n<filename>{number:06d}.png</filename>\n<size><width>{WIDTH}</width>"
            f"<height>{HEIGHT}</height><depth>3</depth></size>\n{objects}</annotation>\n"
        )
    return folder


def yolo(folder: Path) -> Path:
    write_images(folder / "images" / "val")
    (folder / "labels" / "val").mkdir(parents=True)
    for number, boxes in BOXES.items():
        shares = [
            ((x + width / 2) / WIDTH, (y + height / 2) / HEIGHT, width / WIDTH, height / HEIGHT)
            for x, y, width, height in boxes
        ]
        lines = ["1 " + " ".join(map(repr, box)) + "\n" for box in shares]
        if lines:
            (folder / "labels" / "val" / f"{number:06d}.txt").write_text("".join(lines))
    (folder / "data.yaml").write_text("path: .\nval: images/val\nnames:\n  0: dog\n  1: person\n")
    return folder


def mot(folder: Path) -> Path:
    write_images(folder / "img1")
    (folder / "gt").mkdir()
    lines = [
        f"{number},{track},{x},{y},{width},{height},1,1,1\n"
        for number, boxes in BOXES.items()
        for track, (x, y, width, height) in enumerate(boxes, 1)
    ]
    (folder / "gt" / "gt.txt").write_text("".join(lines))
    return folder


def mot_video(folder: Path) -> Path:
    path = mot(folder)
    shutil.rmtree(folder / "img1")
    writer = cv2.VideoWriter(str(folder / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (WIDTH, HEIGHT))
    for _ in BOXES:
        writer.write(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    writer.release()
    return path


def crowdhuman(folder: Path) -> Path:
    write_images(folder / "Images")
    lines = [
        json.dumps(
            {
                "ID": f"{number:06d}",
                "gtboxes": [
                    {"tag": "person", "fbox": box, "vbox": [0, 0, 1, 1], "extra": {}} for box in boxes
                ],
            }
        )
        for number, boxes in BOXES.items()
    ]
    (folder / "annotation_val.odgt").write_text("\n".join(lines))
    return folder


FORMATS: dict[str, Callable[[Path], Path]] = {
    "COCO JSON": coco,
    "Pascal VOC": voc,
    "YOLO": yolo,
    "MOT": mot,
    "CrowdHuman": crowdhuman,
}
