"""Tiny YOLOv2: size, the course's checkpoints in all their variants, Darknet's files, borders, the whole way."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from whole_way import check_falling_loss, check_whole_way, shake, some_targets

from edgeprune.detectors.classes import VOC_CLASSES
from edgeprune.detectors.protocol import DetectorError
from edgeprune.detectors.registry import load_detector
from edgeprune.detectors.tiny_yolov2 import COCO_CHANNELS, VOC_ANCHORS, TinyYoloV2
from edgeprune.detectors.weights import COCO_CLASSES, WeightsError
from edgeprune.pruning.checkpoint import trace_detector
from edgeprune.pruning.counting import count

NARROW = (4, 8, 8, 8, 16, 16, 24, 16)
State = dict[str, Tensor]


def checkpoint(channels: tuple[int, ...] = NARROW, outputs: int = 125) -> State:
    """A state dict with the course's names, random but as a trained network could be, exact in float16."""
    generator = torch.Generator().manual_seed(0)
    state: State = {"anchors": torch.tensor(VOC_ANCHORS)}
    for number, (inputs, filters) in enumerate(zip((3, *channels), channels, strict=False), 1):
        scale = (2 / (9 * inputs)) ** 0.5
        state[f"conv{number}.weight"] = torch.randn(filters, inputs, 3, 3, generator=generator) * scale
        state[f"bn{number}.weight"] = torch.rand(filters, generator=generator) + 0.5
        state[f"bn{number}.bias"] = torch.randn(filters, generator=generator) * 0.2
        state[f"bn{number}.running_mean"] = torch.randn(filters, generator=generator) * 0.2
        state[f"bn{number}.running_var"] = torch.rand(filters, generator=generator) + 0.5
        state[f"bn{number}.num_batches_tracked"] = torch.tensor(7)
    state["conv9.weight"] = torch.randn(outputs, channels[-1], 1, 1, generator=generator) * 0.3
    state["conv9.bias"] = torch.randn(outputs, generator=generator) * 0.3
    exact = {name: tensor.half().float() for name, tensor in state.items() if tensor.is_floating_point()}
    return {**state, **exact, "anchors": state["anchors"]}


def their_forward(state: State, x: Tensor, border: str) -> Tensor:
    """The course's network, written from its description: batch norm, pool, LeakyReLU in that order."""
    for n in range(1, 9):
        x = functional.conv2d(x, state[f"conv{n}.weight"], state.get(f"conv{n}.bias"), padding=1)
        if f"bn{n}.weight" in state:
            mean, var = state[f"bn{n}.running_mean"], state[f"bn{n}.running_var"]
            x = functional.batch_norm(x, mean, var, state[f"bn{n}.weight"], state[f"bn{n}.bias"])
        if n <= 5:
            x = functional.max_pool2d(x, 2, 2)
        elif n == 6:
            x = functional.max_pool2d(functional.pad(x, (0, 1, 0, 1), border), 2, 1)
        x = functional.leaky_relu(x, 0.1)
    return functional.conv2d(x, state["conv9.weight"], state["conv9.bias"])


def their_decode(raw: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Centre and size as shares of the image, scores ``(5, classes, H, W)``, from the description."""
    height, width = raw.shape[2:]
    x = raw[0].view(5, 5 + classes, height, width)
    anchors = torch.tensor(VOC_ANCHORS)[:, :, None, None]
    column, row = torch.arange(width), torch.arange(height)[:, None]
    boxes = torch.stack(
        (
            (x[:, 0].sigmoid() + column) / width,
            (x[:, 1].sigmoid() + row) / height,
            x[:, 2].exp() * anchors[:, 0] / width,
            x[:, 3].exp() * anchors[:, 1] / height,
        ),
        1,
    )
    return boxes, x[:, 4:5].sigmoid() * x[:, 5:].softmax(1)


def fused(state: State) -> State:
    """Batch norm folded into the convolutions."""
    folded = {name: tensor for name, tensor in state.items() if not name.startswith("bn")}
    for n in range(1, 9):
        factor = state[f"bn{n}.weight"] / (state[f"bn{n}.running_var"] + 1e-5).sqrt()
        folded[f"conv{n}.weight"] = state[f"conv{n}.weight"] * factor[:, None, None, None]
        folded[f"conv{n}.bias"] = state[f"bn{n}.bias"] - state[f"bn{n}.running_mean"] * factor
    return folded


def test_size() -> None:
    """Parameters and MACs are the published ones: 15.87 M with what Darknet stores, 15.76 M for one class."""
    voc = TinyYoloV2((416, 416), VOC_CLASSES)
    cost = count(trace_detector(voc, (416, 416)))
    statistics = 2 * sum((16, 32, 64, 128, 256, 512, 1024, 1024))
    assert cost.params + statistics == 15_867_885
    assert cost.macs == pytest.approx(3.5e9, rel=0.01)
    assert sum(p.numel() for p in TinyYoloV2((320, 320)).parameters()) == pytest.approx(15.76e6, rel=1e-3)


VARIANTS: dict[str, Callable[[State], object]] = {
    "plain": lambda state: state,
    "nested": lambda state: {"sd": state, "cfg": list(NARROW)},
    "trained": lambda state: {"state_dict": state, "epoch": 12},
    "extra keys": lambda state: {**state, "epoch": 3, "seen": torch.tensor(5)},
    "fused": fused,
    "nested and fused": lambda state: {"sd": fused(state), "cfg": list(NARROW)},
    "half": lambda state: {
        k: v.half() if "." in k and v.is_floating_point() else v for k, v in state.items()
    },
    "no counters": lambda state: {k: v for k, v in state.items() if "tracked" not in k},
    "no anchors": lambda state: {k: v for k, v in state.items() if k != "anchors"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_courses_checkpoints(variant: str, tmp_path: Path) -> None:
    """Every variant, narrow as after pruning, gives the outputs, boxes and scores of the course's network."""
    state = checkpoint()
    torch.save(VARIANTS[variant](state), tmp_path / "voc_pretrained.pt")
    detector = load_detector("tiny-yolov2", tmp_path / "voc_pretrained.pt", (96, 64), VOC_CLASSES).eval()
    images = torch.rand(1, 3, 96, 64)
    expected = their_forward(state, images, "reflect")
    (raw,) = detector(images)
    torch.testing.assert_close(raw, expected, atol=1e-4, rtol=1e-4)

    boxes, scores = detector.decode((expected,))
    theirs, their_scores = their_decode(expected, 20)
    size = torch.tensor([64.0, 96.0])[:, None, None]
    centre, half = theirs[:, :2] * size, (theirs[:, 2:] * size / 2).minimum(size)
    corners = torch.cat((centre - half, centre + half), 1).permute(0, 2, 3, 1).reshape(1, -1, 4)
    torch.testing.assert_close(boxes, corners, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(scores, their_scores.amax(1).reshape(1, -1))


def test_person_keeps_its_rows(tmp_path: Path) -> None:
    """For person each anchor keeps box, confidence and class 14; its score is then the confidence."""
    state = checkpoint()
    torch.save(state, tmp_path / "voc_pretrained.pt")
    detector = load_detector("tiny-yolov2", tmp_path / "voc_pretrained.pt", (64, 64)).eval()
    rows = [anchor * 25 + value for anchor in range(5) for value in (0, 1, 2, 3, 4, 5 + 14)]
    images = torch.rand(1, 3, 64, 64)
    expected = their_forward(state, images, "reflect")[:, rows]
    (raw,) = detector(images)
    torch.testing.assert_close(raw, expected, atol=1e-4, rtol=1e-4)
    scores = detector.decode((raw,))[1]
    torch.testing.assert_close(scores, raw.view(5, 6, -1)[:, 4].reshape(1, -1).sigmoid())
    assert detector.untrained, "softmax over 20 classes is gone: build has to fine-tune"


@pytest.mark.parametrize(
    ("border", "theirs"), [("reflect", "reflect"), ("replicate", "replicate"), ("zeros", "constant")]
)
def test_borders(border: str, theirs: str, tmp_path: Path) -> None:
    """The border that a checkpoint was trained with is named by the detector, and kept in its variant."""
    state = checkpoint()
    torch.save(state, tmp_path / "w.pt")
    detector = load_detector(f"tiny-yolov2-{border}", tmp_path / "w.pt", (64, 64), VOC_CLASSES).eval()
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(
        detector(images)[0], their_forward(state, images, theirs), atol=1e-4, rtol=1e-4
    )
    assert detector.variant["border"] == border


@pytest.mark.parametrize(
    ("channels", "classes"),
    [((16, 32, 64, 128, 256, 512, 1024, 1024), VOC_CLASSES), (COCO_CHANNELS, COCO_CLASSES)],
)
def test_darknets_files(channels: tuple[int, ...], classes: tuple[str, ...], tmp_path: Path) -> None:
    """tiny-yolov2-voc and yolov2-tiny (COCO) are told apart by their size, and keep person."""
    values = np.random.default_rng(0)
    body = sum(9 * a * b + 4 * b for a, b in zip((3, *channels), channels, strict=False))
    outputs = 5 * (5 + len(classes))
    total = body + outputs * (channels[-1] + 1)
    data = (values.random(total, np.float32) + 0.5).astype("<f4")
    (tmp_path / "w.weights").write_bytes(struct.pack("<3iq", 0, 2, 0, 0) + data.tobytes())
    detector = load_detector("tiny-yolov2", tmp_path / "w.weights", (64, 64))
    state = detector.state_dict()
    np.testing.assert_array_equal(state["layers.0.norm.bias"], data[:16])
    np.testing.assert_array_equal(state["layers.0.norm.weight"], data[16:32])
    head = data[body:]
    biases, weights = head[:outputs], head[outputs:].reshape(outputs, channels[-1])
    person = 5 + classes.index("person")
    np.testing.assert_array_equal(state["layers.14.conv.bias"][5::6], biases[person :: 5 + len(classes)])
    np.testing.assert_array_equal(
        state["layers.14.conv.weight"][5::6, :, 0, 0], weights[person :: 5 + len(classes)]
    )
    assert detector.variant["border"] == "replicate"
    (tmp_path / "w.weights").write_bytes(struct.pack("<3iq", 0, 2, 0, 0) + data[:-1].tobytes())
    with pytest.raises(WeightsError, match="fit no tiny-yolov2"):
        load_detector("tiny-yolov2", tmp_path / "w.weights", (64, 64))


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_what_is_refused(tmp_path: Path) -> None:
    """Another network, unknown classes, a size that does not fit and code in a pickle are errors that say what."""
    path = tmp_path / "w.pt"
    state = checkpoint()
    for changed, message in (
        ({k: v for k, v in state.items() if k != "conv7.weight"}, "lacks conv1.weight to conv9.weight"),
        ({k: v for k, v in state.items() if k != "bn3.running_var"}, "lacks 1 tensors.*bn3.running_var"),
        ({**state, "conv10.weight": torch.ones(1)}, "adds 1 tensors.*conv10"),
        ({**state, "bn2.bias": torch.ones(7)}, r"bn2\.bias has the shape \(7,\)"),
        ({**state, "conv9.weight": torch.ones(123, 16, 1, 1)}, "123 outputs for 5 anchors"),
        ({**state, "conv1.weight": state["conv1.weight"] * float("inf")}, "not finite"),
        ({**state, "anchors": torch.ones(5)}, "anchors"),
        (checkpoint(outputs=35), "2 classes whose names are not known"),
    ):
        torch.save(changed, path)
        with pytest.raises(WeightsError, match=message):
            load_detector("tiny-yolov2", path, (64, 64))
    torch.save(state, path)
    with pytest.raises(WeightsError, match=r"20 classes.*'pedestrian' is none of them"):
        load_detector("tiny-yolov2", path, (64, 64), ("pedestrian",))
    with pytest.raises(DetectorError, match="300x320"):
        load_detector("tiny-yolov2", path, (300, 320))
    torch.save({"sd": state, "trap": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(WeightsError, match=r"safetensors\.torch\.save_file"):
        load_detector("tiny-yolov2", path, (64, 64))
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(WeightsError, match="give --weights"):
        load_detector("tiny-yolov2", None, (64, 64))


def test_loss_falls() -> None:
    """Training on a batch lowers the loss."""
    torch.manual_seed(0)
    detector = TinyYoloV2((64, 64), channels=NARROW)
    check_falling_loss(detector, torch.rand(2, 3, 64, 64), some_targets(), steps=15)


@pytest.mark.parametrize("border", ["reflect", "replicate", "zeros"])
def test_pruned_exported_and_run(border: str, tmp_path: Path) -> None:
    """30 % pruned, rebuilt from its specification with its border, exported, run by the agent."""
    torch.manual_seed(0)
    detector = TinyYoloV2((64, 64), channels=NARROW, border=border)
    shake(detector)
    step = check_whole_way("tiny-yolov2", detector, tmp_path)
    assert step.spec.variant["border"] == border
