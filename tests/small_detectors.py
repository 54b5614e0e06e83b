"""Small detectors for the export's tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.detectors.protocol import Targets


class SmallDetector(nn.Module):
    """One of each operator that people's detectors are made of; decodes with exp, as YOLO does."""

    classes = ("person",)
    input_size = (64, 96)
    preprocessing = Preprocessing("rgb", (100.0, 110.0, 120.0), (50.0, 55.0, 60.0), 114, "letterbox")

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 3, 2, 1)
        self.head = nn.Conv2d(24, 5, 1)
        for norm in (self.norm, self.depthwise_norm):
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
                tensor.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        fine = functional.leaky_relu(self.norm(self.stem(images)), 0.1)
        fine = fine + functional.silu(self.depthwise_norm(self.depthwise(fine)))
        coarse = functional.relu(self.down(fine))
        coarse = functional.pad(coarse, (0, 1, 0, 1), mode="replicate")
        coarse = functional.max_pool2d(coarse, 2, 1)
        fine = torch.cat((fine, functional.interpolate(coarse, scale_factor=2.0, mode="nearest")), 1)
        output: Tensor = self.head(functional.avg_pool2d(fine, 2))
        return output

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        cells = raw.flatten(2).transpose(1, 2)  # (N, M, 5)
        centre = cells[..., :2].sigmoid() * torch.tensor([96.0, 64.0])
        size = cells[..., 2:4].clamp(max=4.0).exp() * 8
        return torch.cat((centre - size / 2, centre + size / 2), 2), cells[..., 4].sigmoid()

    def loss(self, raw: Any, targets: Sequence[Targets]) -> Tensor:
        raise NotImplementedError


class Unexportable(SmallDetector):
    """Uses an operator that ONNX lacks."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.special.bessel_j0(super().forward(images))


class DataDependent(SmallDetector):
    """Branches on its input's values: tracing keeps one branch."""

    def forward(self, images: Tensor) -> Tensor:
        raw = super().forward(images)
        return raw if images.abs().sum() == 0 else raw + 1


def make_dataset(folder: Path, images: int) -> Dataset:
    """Images of noise with one person box each, in COCO's layout."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for index in range(images):
        cv2.imwrite(
            str(folder / "images" / f"{index}.png"), generator.integers(0, 256, (48, 80, 3), np.uint8)
        )
    entry = {"width": 80, "height": 48}
    coco = {
        "images": [{"id": i + 1, "file_name": f"{i}.png", **entry} for i in range(images)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": i + 1,
                "category_id": 1,
                "bbox": [5, 5, 20, 30],
                "area": 600,
                "iscrowd": 0,
            }
            for i in range(images)
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    (folder / "labels.json").write_text(json.dumps(coco))
    return load_dataset(folder / "labels.json", folder / "images")
