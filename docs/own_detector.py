"""A detector of one's own, small enough to read: four convolutions, and one level of cells that predict.

edgeprune build --target host --detector docs/own_detector.py:small_detector --train ... --val ...
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.detectors.losses import generalized_iou
from edgeprune.detectors.protocol import Targets

STRIDE = 8  # input pixels per cell


class SmallDetector(nn.Module):
    """Each cell says whether an object's centre lies in it, and how far the object's sides are."""

    preprocessing = Preprocessing("rgb", (123.7, 116.3, 103.5), (58.4, 57.1, 57.4), 114, "letterbox")

    def __init__(self, input_size: tuple[int, int], classes: Sequence[str]) -> None:
        super().__init__()
        self.input_size, self.classes = input_size, tuple(classes)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(64, 5, 1)  # object, then the logarithms of four distances in cells
        rows, columns = (torch.arange(side // STRIDE) + 0.5 for side in input_size)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        self.register_buffer("centres", torch.stack((x, y)).flatten(1), persistent=False)  # (2, M), in cells

    def forward(self, images: Tensor) -> Tensor:
        raw: Tensor = self.head(self.body(images))  # (N, 5, H / 8, W / 8)
        return raw

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        cells = raw.reshape(-1, 5, self.centres.shape[1])  # (N, 5, M)
        distances = cells[:, 1:].clamp(max=5.0).exp()
        corners = torch.cat((self.centres - distances[:, :2], self.centres + distances[:, 2:]), 1)
        return (corners * STRIDE).transpose(1, 2), cells[:, 0].sigmoid()

    def loss(self, raw: Tensor, targets: Sequence[Targets]) -> Tensor:
        boxes, _ = self.decode(raw)
        logits = raw[:, 0].flatten(1)
        return torch.stack([self._loss(*image) for image in zip(logits, boxes, targets, strict=True)])

    def _loss(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        points = self.centres.T * STRIDE  # (M, 2)
        inside = ((points[:, None] > targets.boxes[:, :2]) & (points[:, None] < targets.boxes[:, 2:])).all(2)
        objects = targets.boxes[~targets.ignore]
        middles = (objects[:, :2] + objects[:, 2:]) / 2
        owned = (points[:, None] - middles).abs().amax(2) <= STRIDE / 2  # (M, K)
        cell, owner = owned.nonzero(as_tuple=True)
        wanted = owned.any(1).to(logits.dtype)
        entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        counted = ~inside[:, targets.ignore].any(1)  # what is marked to be ignored is no background
        return (entropy * counted).sum() + (1 - generalized_iou(boxes[cell], objects[owner])).sum()


def small_detector(input_size: tuple[int, int], classes: tuple[str, ...]) -> nn.Module:
    """What edgeprune calls: the detector with random weights, for an input size (H, W) and names of classes."""
    return SmallDetector(input_size, classes)
