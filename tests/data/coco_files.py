"""Small data sets in COCO JSON."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

WIDTH, HEIGHT = 40, 30


def write_coco(
    folder: Path, annotations: list[Any], images: list[Any] | None = None, categories: list[Any] | None = None
) -> Path:
    """Write labels.json and two images, a.png (id 1) and b.png (id 2), of 40x30 pixels."""
    for value, name in enumerate(("a.png", "b.png")):
        cv2.imwrite(str(folder / name), np.full((HEIGHT, WIDTH, 3), 100 * value, np.uint8))
    if images is None:
        images = [image(1, "a.png"), image(2, "b.png")]
    if categories is None:
        categories = [{"id": 7, "name": "dog"}, {"id": 9, "name": "person"}]
    path = folder / "labels.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def image(number: Any, name: Any, width: Any = WIDTH, height: Any = HEIGHT) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": width, "height": height}


def person(number: Any, image_id: Any, bbox: Any, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "category_id": 9, "bbox": bbox, **more}
