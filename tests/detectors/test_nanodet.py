"""NanoDet-g: size, decoding, export, and the published detector's scores."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from whole_way import check_whole_way

from edgeprune.data.dataset import load_dataset
from edgeprune.detectors.evaluation import evaluate
from edgeprune.detectors.nanodet import NanoDetG
from edgeprune.detectors.protocol import DetectorError, Targets
from edgeprune.detectors.registry import build_detector, load_detector

SIMPLE_OPERATIONS = {
    "Add", "AveragePool", "Concat", "Constant", "Conv", "LeakyRelu", "MatMul", "MaxPool", "Mul", "Reshape",
    "Resize", "Sigmoid", "Softmax", "Split", "Transpose",
}  # fmt: skip


def random_raw(detector: NanoDetG, images: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels = len(detector.classes) + 44
    return [torch.randn(images, channels, h, w, generator=generator) * 2 for h, w in detector.level_sizes]


def test_size() -> None:
    """The person head has 45 channels, the detector 3,755,495 parameters; each further class adds 3 x 129."""
    person = build_detector("nanodet-g", (320, 320))
    coco = build_detector("nanodet-g", (320, 320), [str(i) for i in range(80)])
    assert sum(parameter.numel() for parameter in person.parameters()) == 3_755_495
    assert sum(parameter.numel() for parameter in coco.parameters()) == 3_755_495 + 3 * 79 * 129
    raw = person(torch.zeros(2, 3, 320, 320))
    assert [tuple(level.shape) for level in raw] == [(2, 45, 40, 40), (2, 45, 20, 20), (2, 45, 10, 10)]


def test_decoding_is_that_of_the_description() -> None:
    """`decode` gives what the description gives, cell by cell, also where height and width differ."""
    detector = NanoDetG((64, 96))
    raw = random_raw(detector, 2)
    boxes, scores = detector.decode(raw)
    place = 0
    for level, stride in zip(raw, (8, 16, 32), strict=True):
        for row in range(64 // stride):
            for column in range(96 // stride):
                for image in range(2):
                    values = level[image, :, row, column].numpy().astype(np.float64)
                    bins = np.exp(values[1:].reshape(4, 11))
                    left, top, right, bottom = bins @ np.arange(11) / bins.sum(1) * stride
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    np.testing.assert_allclose(
                        boxes[image, place], [x - left, y - top, x + right, y + bottom], atol=1e-3
                    )
                    assert scores[image, place].item() == pytest.approx(
                        1 / (1 + np.exp(-values[0])), abs=1e-5
                    )
                place += 1
    assert boxes.shape == (2, place, 4)
    assert scores.shape == (2, place)


def test_decoding_in_half_precision() -> None:
    """In float16 boxes of a 416 input stay within half a pixel."""
    detector = NanoDetG((416, 416))
    raw = random_raw(detector, 1)
    exact = detector.decode(raw)
    half = detector.half().decode([level.half() for level in raw])
    assert (half[0].float() - exact[0]).abs().max() < 0.5
    assert (half[1].float() - exact[1]).abs().max() < 2e-3


class Decoded(nn.Module):
    def __init__(self, detector: NanoDetG) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.detector.decode(self.detector(images))


def test_export_to_opset_13(tmp_path: Path) -> None:
    """With its decoding it exports to opset 13 in simple operations and ONNX Runtime agrees."""
    torch.manual_seed(0)
    model = Decoded(NanoDetG((96, 64))).eval()
    images = torch.randn(1, 3, 96, 64)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (images,), path, opset_version=13, dynamo=False)
    written = onnx.load(path)
    assert written.opset_import[0].version == 13
    assert {node.op_type for node in written.graph.node} <= SIMPLE_OPERATIONS
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    expected = model(images)
    np.testing.assert_allclose(found[0], expected[0].detach(), atol=1e-3)
    np.testing.assert_allclose(found[1], expected[1].detach(), atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_traced_with_any_batch(training: bool) -> None:
    """torch.export follows it with a dynamic batch, in either mode, and the graph gives the same outputs."""
    torch.manual_seed(0)
    detector = NanoDetG((64, 64)).train(training)
    exported = torch.export.export(
        detector,
        (torch.randn(2, 3, 64, 64),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
    )
    for count in (1, 5):
        images = torch.randn(count, 3, 64, 64)
        for found, expected in zip(exported.module()(images), detector(images), strict=True):
            torch.testing.assert_close(found, expected)


def test_several_classes() -> None:
    """With several classes a cell's score is its best one, and that is what the loss trains."""
    detector = NanoDetG((64, 64), ("person", "car"))
    raw = random_raw(detector, 1)
    expected = torch.cat([level[:, :2].flatten(2) for level in raw], 2).amax(1).sigmoid()
    torch.testing.assert_close(detector.decode(raw)[1], expected)
    best = [torch.cat((level[:, :2].amax(1, keepdim=True), level[:, 2:]), 1) for level in raw]
    targets = [Targets(torch.tensor([[4.0, 4.0, 40.0, 50.0]]), torch.tensor([False]))]
    torch.testing.assert_close(detector.loss(raw, targets), NanoDetG((64, 64)).loss(best, targets))


def test_pruned_exported_and_run(tmp_path: Path) -> None:
    """30 % pruned, saved and loaded, exported, run by the agent."""
    torch.manual_seed(0)
    step = check_whole_way("nanodet-g", NanoDetG((64, 64)), tmp_path)
    assert set(step.spec.kept) & {"heads.0.features", "stages.1.entry"}


def test_what_cannot_be_built() -> None:
    """An input size that is no multiple of 32 and an unknown name are refused by name."""
    with pytest.raises(DetectorError, match="300x320"):
        NanoDetG((300, 320))
    with pytest.raises(DetectorError, match="nanodet-g"):
        build_detector("nanodet", (320, 320))


@pytest.mark.shared_data
@pytest.mark.parametrize(("side", "ap", "ap50"), [(320, 0.317, 0.562), (416, 0.377, 0.636)])
def test_published_weights_score_as_known(shared: Path, side: int, ap: float, ap50: float) -> None:
    """On coco-person val the unpruned detector reaches the AP and AP50 known for it, within 0.003."""
    detector = load_detector("nanodet-g", shared / "nanodet-g" / "nanodet_g_coco80_convs.npz", (side, side))
    precision = evaluate(detector, detector, load_dataset(shared / "coco-person" / "person_val2017.json"))
    assert precision.ap == pytest.approx(ap, abs=0.003)
    assert precision.ap50 == pytest.approx(ap50, abs=0.003)
