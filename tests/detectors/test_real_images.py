"""Every kind of detector learns from photographs: the loss of a fixed batch falls within a few steps."""

from pathlib import Path

import pytest
import torch
from test_darknet import REGION, YOLO
from test_own import EXAMPLE
from whole_way import check_falling_loss

from edgeprune.data.dataset import load_dataset
from edgeprune.detectors.batches import batches
from edgeprune.detectors.canvases import Canvases
from edgeprune.detectors.registry import build_detector

SIZE = (96, 96)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("nanodet-g", {}),
        ("tiny-yolov2", {"channels": (8, 16, 16, 32, 32, 64, 64, 64)}),
        ("yolox-nano", {}),
        ("yolo.cfg", {"cfg": YOLO}),
        ("region.cfg", {"cfg": REGION}),
        (EXAMPLE, {}),
    ],
)
def test_loss_falls_on_photographs(shared: Path, name: str, variant: dict[str, object]) -> None:
    """Fifteen steps on four images of coco-person, with augmentation's boxes and ignored ones."""
    torch.manual_seed(0)
    detector = build_detector(name, SIZE, variant=variant)
    dataset = load_dataset(shared / "coco-person" / "person_train2017.json").subset(range(4))
    canvases = Canvases(dataset, SIZE, detector.preprocessing)
    batch = next(batches(canvases, batch_size=4, augmentation=(0, 1)))
    check_falling_loss(detector, batch.images, batch.targets, steps=15)
