"""Half precision on real images: what it moves, and what it cannot hold."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from small_detectors import SmallDetector, make_dataset
from torch import nn

from edgeprune.data.dataset import load_dataset
from edgeprune.deploy.device.imaging import letterbox, normalise
from edgeprune.detectors.registry import load_detector
from edgeprune.export.errors import ExportError
from edgeprune.export.model import export_onnx
from edgeprune.export.ranges import float16_ranges


@pytest.mark.shared_data
@pytest.mark.parametrize("side", [320, 416])
def test_decoding_in_half_precision(side: int, shared: Path) -> None:
    """Network and decoding computed in float16 by PyTorch move no box by 0.5 px and no score by 0.01.

    ONNX Runtime's CPU provider computes float16 in float32, and could not show it.
    """
    weights = shared / "nanodet-g" / "nanodet_g_coco80_convs.npz"
    detector = load_detector("nanodet-g", weights, (side, side)).eval()
    half = copy.deepcopy(detector).half()
    dataset = load_dataset(shared / "coco-person" / "person_val2017.json")
    for index in range(4):
        canvas, _ = letterbox(dataset.image(index), (side, side), detector.preprocessing)
        images = torch.from_numpy(normalise(canvas, detector.preprocessing))
        with torch.no_grad():
            boxes, scores = detector.decode(detector(images))
            half_boxes, half_scores = half.decode(half(images.half()))
        assert half_boxes.dtype == torch.float16
        assert (boxes - half_boxes.float()).abs().max() <= 0.5
        assert (scores - half_scores.float()).abs().max() <= 0.01


@pytest.mark.shared_data
def test_nanodet_has_headroom(shared: Path, tmp_path: Path) -> None:
    """No layer of NanoDet-g comes near float16's limit on real images."""
    weights = shared / "nanodet-g" / "nanodet_g_coco80_convs.npz"
    detector = load_detector("nanodet-g", weights, (320, 320)).eval()
    exported = export_onnx(detector, detector, tmp_path / "model.onnx", opset=13, metadata={})
    dataset = load_dataset(shared / "coco-person" / "person_val2017.json")
    ranges = float16_ranges(exported.path, dataset, images=4)
    assert ranges[0].headroom > 50
    assert [found.headroom for found in ranges] == sorted(found.headroom for found in ranges)


def test_ranges_are_those_of_pytorch(tmp_path: Path) -> None:
    """A layer's largest value is what a hook in PyTorch sees on the same images."""
    torch.manual_seed(0)
    detector = SmallDetector().eval()
    dataset = make_dataset(tmp_path / "data", images=3)
    exported = export_onnx(detector, detector, tmp_path / "model.onnx", opset=13, metadata={})
    largest: list[float] = []
    detector.head.register_forward_hook(lambda *call: largest.append(call[2].abs().max().item()))
    for index in range(3):
        canvas, _ = letterbox(dataset.image(index), detector.input_size, detector.preprocessing)
        detector(torch.from_numpy(normalise(canvas, detector.preprocessing)))
    ranges = {(found.layer, found.operator): found for found in float16_ranges(exported.path, dataset)}
    head = ranges["head", "Conv"]
    assert head.largest == pytest.approx(max(largest), rel=1e-4)
    assert head.headroom == pytest.approx(65504 / max(largest), rel=1e-4)
    assert ranges["decode/Exp", "Exp"].largest <= np.exp(4) * 1.001  # the detector clamps at 4


def test_planted_overflows_are_named(tmp_path: Path) -> None:
    """Layers whose activations or weights exceed float16 are named; the others are not."""
    torch.manual_seed(0)
    detector = SmallDetector().eval()
    nn.init.constant_(detector.down.bias, 1e5)
    detector.head.weight.data[:, 8:] *= 1e-5  # reads it
    detector.head.weight.data[0, 0] = 70000.0
    dataset = make_dataset(tmp_path / "data", images=2)
    exported = export_onnx(detector, detector, tmp_path / "model.onnx", opset=13, metadata={})
    overflowing = {(r.layer, r.operator) for r in float16_ranges(exported.path, dataset) if r.headroom < 1}
    assert {("down", "Conv"), ("down/Relu", "Relu"), ("head", "weights"), ("down", "weights")} <= overflowing
    assert not {layer for layer, _ in overflowing} & {"stem", "stem/LeakyRelu", "depthwise"}


def test_float32_overflow_is_an_overflow(tmp_path: Path) -> None:
    """Values beyond float32 itself, and NaN, leave no headroom."""
    torch.manual_seed(0)
    detector = SmallDetector().eval()
    nn.init.constant_(detector.down.weight, 3e38)
    dataset = make_dataset(tmp_path / "data", images=1)
    exported = export_onnx(detector, detector, tmp_path / "model.onnx", opset=13, metadata={})
    assert next(r for r in float16_ranges(exported.path, dataset) if r.layer == "down/Relu").headroom == 0


def test_ranges_need_images(tmp_path: Path) -> None:
    """An empty data set is refused."""
    detector = SmallDetector().eval()
    dataset = make_dataset(tmp_path / "data", images=1)
    exported = export_onnx(detector, detector, tmp_path / "model.onnx", opset=13, metadata={})
    with pytest.raises(ExportError, match="no image"):
        float16_ranges(exported.path, dataset.subset([]))
