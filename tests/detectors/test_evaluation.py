"""Detection on the host: boxes come back in the pixels of the original image."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.detectors.canvases import Canvases
from edgeprune.detectors.evaluation import detect, evaluate


class BrightPixels(nn.Module):
    """Detects where an image is bright, in the network's input; fails in training mode."""

    classes = ("person",)
    input_size = (96, 128)
    preprocessing = Preprocessing("bgr", (10.0, 10.0, 10.0), (50.0, 50.0, 50.0), 0, "letterbox")

    def forward(self, images: Tensor) -> list[Tensor]:
        assert not self.training
        return [image.amax(0) for image in images]

    def decode(self, raw: list[Tensor]) -> tuple[Tensor, Tensor]:
        boxes = []
        for image in raw:
            rows, columns = torch.nonzero(image > 2.3, as_tuple=True)  # (125 - 10) / 50
            boxes.append(torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)))
        return torch.stack(boxes)[:, None].float(), torch.full((len(raw), 1), 0.9)


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Images of many shapes, larger and smaller than the input, with one bright rectangle each."""
    folder = tmp_path_factory.mktemp("rectangles")
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for number, (height, width) in enumerate([(300, 200), (200, 400), (50, 60), (97, 129), (96, 128)], 1):
        pixels = np.zeros((height, width, 3), np.uint8)
        w, h = int(width * generator.uniform(0.4, 0.6)), int(height * generator.uniform(0.4, 0.6))
        x, y = int(generator.integers(0, width - w)), int(generator.integers(0, height - h))
        pixels[y : y + h, x : x + w] = 240
        cv2.imwrite(str(folder / f"{number}.png"), pixels)
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        box = {"id": number, "image_id": number, "category_id": 1, "bbox": [x, y, w, h]}
        annotations.append({**box, "area": w * h, "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    path: Path = folder / "labels.json"
    path.write_text(json.dumps(content))
    return load_dataset(path, folder)


def test_boxes_are_in_original_pixels(rectangles: Dataset) -> None:
    """What is found in the letterboxed input is where the label says, to the input's resolution."""
    detector = BrightPixels()
    for found, sample in zip(detect(detector, detector, rectangles), rectangles.samples, strict=True):
        assert found.image_id == sample.image_id
        pixel = max(sample.width / 128, sample.height / 96)  # original pixels per pixel of the input
        np.testing.assert_allclose(found.boxes, sample.boxes, atol=1.01 * max(pixel, 1))
    assert evaluate(detector, detector, rectangles).ap50 == pytest.approx(1)


def test_batches_cache_and_mode_do_not_matter(rectangles: Dataset) -> None:
    """Batch size and kept canvases change nothing, the mode is restored, and progress counts the images."""
    detector = BrightPixels().train()
    canvases = Canvases(rectangles, detector.input_size, detector.preprocessing)
    steps: list[tuple[int, int]] = []
    expected = detect(detector, detector, rectangles, "cpu", lambda *step: steps.append(step), batch_size=2)
    assert steps == [(2, 5), (4, 5), (5, 5)]
    assert detector.training
    for _ in range(2):
        again = detect(detector, detector, rectangles, canvases=canvases)
        for first, second in zip(expected, again, strict=True):
            np.testing.assert_array_equal(first.boxes, second.boxes)
