"""A detector and a data set small enough to train within a test: bright squares on dark noise."""

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.detectors.protocol import Targets

SIDE = 64  # pixels
STRIDE = 8  # pixels per cell


class TinyDetector(nn.Module):
    """One level of cells; raw outputs ``(N, 5, H / 8, W / 8)``: class logit and four distances."""

    classes = ("person",)
    input_size = (SIDE, SIDE)
    preprocessing = Preprocessing("rgb", (40.0, 40.0, 40.0), (60.0, 60.0, 60.0), 114, "letterbox")

    def __init__(self, seed: int = 0, batch_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1),
                nn.BatchNorm2d(8) if batch_norm else nn.Identity(),
                nn.ReLU(),
                nn.Conv2d(8, 16, 3, 2, 1),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, 2, 1),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Conv2d(16, 16, 3, 1, 1),
                nn.ReLU(),
            )
            self.output = nn.Conv2d(16, 5, 1)
        y, x = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(8) + 0.5, indexing="ij")
        self.register_buffer("centres", torch.stack((x, y)).flatten(1), persistent=False)  # (2, 64), in cells

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"cells": self.output(self.body(images))}

    def decode(self, raw: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        cells = raw["cells"].flatten(2)
        distances = functional.softplus(cells[:, 1:])
        corners = torch.cat((self.centres - distances[:, :2], self.centres + distances[:, 2:]), 1)
        return (corners * STRIDE).transpose(1, 2), cells[:, 0].sigmoid()

    def loss(self, raw: dict[str, Tensor], targets: Sequence[Targets]) -> Tensor:
        boxes = self.decode(raw)[0]
        logits = raw["cells"][:, 0].flatten(1)
        losses = []
        for image_logits, image_boxes, target in zip(logits, boxes, targets, strict=True):
            wanted = target.boxes[~target.ignore]
            centre = ((wanted[:, :2] + wanted[:, 2:]) / 2 / STRIDE).long().clamp(0, 7)
            cell = centre[:, 1] * 8 + centre[:, 0]
            labels = torch.zeros_like(image_logits).index_fill(0, cell, 1.0)
            loss = functional.binary_cross_entropy_with_logits(image_logits, labels, reduction="sum")
            losses.append(loss + (image_boxes[cell] - wanted).abs().sum() / STRIDE)
        return torch.stack(losses)


def write_squares(folder: Path, count: int, seed: int) -> Dataset:
    """Write `count` images, each with one square, and their labels."""
    generator = np.random.default_rng(seed)
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for number in range(1, count + 1):
        pixels = generator.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        side = int(generator.integers(14, 28))
        x, y = (int(value) for value in generator.integers(0, SIDE - side, 2))
        pixels[y : y + side, x : x + side] = generator.integers(200, 255)
        cv2.imwrite(str(folder / "images" / f"{number}.png"), pixels)
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        box = {"id": number, "image_id": number, "category_id": 1, "bbox": [x, y, side, side]}
        annotations.append({**box, "area": side * side, "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    path = folder / "images.json"
    path.write_text(json.dumps(content))
    return load_dataset(path, folder / "images")
