"""The Darknet reader: layers against plain loops, weight files by round trip, whole networks the whole way."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from whole_way import (
    check_falling_loss,
    check_gradient,
    check_per_image,
    check_whole_way,
    shake,
    some_targets,
)

from edgeprune.detectors.darknet import Darknet, MaxPool, Reorg, Section, parse_cfg
from edgeprune.detectors.protocol import DetectorError, Targets
from edgeprune.detectors.registry import load_detector, save_weights
from edgeprune.detectors.weights import COCO_CLASSES, WeightsError

YOLO = """
[net]
# a comment
width=64
height = 64
channels=3

[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation=leaky

[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
groups=8
activation=swish

[convolutional]
batch_normalize=1
filters=16
size=1
activation=mish

[route]
layers=-1
groups=2
group_id=1

[convolutional]
batch_normalize=1
filters=8
size=3
pad=1
activation=relu

[shortcut]
from=-2
activation=linear

[dropout]
probability=.1

[maxpool]
size=2
stride=2

[convolutional]
batch_normalize=1
filters=24
size=3
stride=2
pad=1
activation=leaky

[maxpool]
size=5
stride=1

[route]
layers=-1,-2

[convolutional]
batch_normalize=1
filters=16
size=1
activation=leaky

[convolutional]
filters=255
size=1
activation=linear

[yolo]
mask=2,3
anchors=4,6, 10,14, 23,27, 37,58
classes=80
num=4
scale_x_y=1.1

[route]
layers=-3

[upsample]
stride=2

[route]
layers=-1,7

[convolutional]
filters=170
size=1
activation=linear

[yolo]
mask=0,1
anchors=4,6, 10,14, 23,27, 37,58
classes=80
num=4
""".replace("filters=255", "filters=170")

REGION = """
[net]
channels=3
[convolutional]
batch_normalize=1
filters=8
size=3
stride=4
pad=1
activation=leaky
[convolutional]
filters=8
size=3
stride=2
pad=1
activation=leaky
[route]
layers=-2
[reorg]
stride=2
[route]
layers=-1,-3
[convolutional]
batch_normalize=1
filters=16
size=3
stride=2
pad=1
activation=leaky
[maxpool]
size=2
stride=1
[convolutional]
filters=50
size=1
activation=linear
[region]
anchors=1.0,1.2, 2.5,3.0
num=2
classes=20
softmax=1
object_scale=5
"""


def a_section(**options: object) -> Section:
    return Section("maxpool", 1, {key: str(value) for key, value in options.items()})


def their_maxpool(x: NDArray[np.float32], size: int, stride: int) -> NDArray[np.float32]:
    """Darknet's loop: padding of size - 1, half of it before; what lies outside does not count."""
    padding = size - 1
    channels, height, width = x.shape
    out_h, out_w = (height + padding - size) // stride + 1, (width + padding - size) // stride + 1
    out = np.full((channels, out_h, out_w), -np.inf, np.float32)
    for k, i, j in np.ndindex(channels, out_h, out_w):
        for n, m in np.ndindex(size, size):
            row, column = i * stride + n - padding // 2, j * stride + m - padding // 2
            if 0 <= row < height and 0 <= column < width:
                out[k, i, j] = max(out[k, i, j], x[k, row, column])
    return out


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 6, 9), (1, 13, 5)])
def test_maxpool_is_darknets(size: int, stride: int, shape: tuple[int, int, int]) -> None:
    """Sizes odd and even, strides, sides: the same values at the same places as Darknet's loop."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = their_maxpool(x, size, stride)
    layer = MaxPool(a_section(size=size, stride=stride), "replicate")
    assert [layer.output(side) for side in shape[1:]] == list(expected.shape[1:])
    np.testing.assert_array_equal(layer(torch.from_numpy(x)[None])[0].numpy(), expected)


def test_reorg_is_darknets() -> None:
    """The flat copy of Darknet's routine, element by element."""
    channels, height, width, stride = 8, 4, 6, 2
    x = np.arange(channels * height * width, dtype=np.float32)
    out = np.empty_like(x)
    deep = channels // stride**2
    for k, j, i in np.ndindex(channels, height, width):
        here = i + width * (j + height * k)
        column = i * stride + (k // deep) % stride
        row = j * stride + (k // deep) // stride
        out[here] = x[column + width * stride * (row + height * stride * (k % deep))]
    found = Reorg(stride)(torch.from_numpy(x).view(1, channels, height, width))
    assert found.shape == (1, channels * 4, 2, 3)
    np.testing.assert_array_equal(found.numpy().ravel(), out)


def write_weights(path: Path, detector: Darknet, version: tuple[int, int, int] = (0, 2, 0)) -> None:
    """As Darknet writes: header, then layer by layer biases, scales, means, variances, weights."""
    seen = struct.pack("<q", 32013312) if version[1] >= 2 or version[0] else struct.pack("<i", 32013312)
    state = detector.state_dict()
    parts = [struct.pack("<3i", *version), seen]
    for index in range(len(detector.layers)):
        names = ["norm.bias", "norm.weight", "norm.running_mean", "norm.running_var"]
        if f"layers.{index}.conv.bias" in state:
            names = ["conv.bias"]
        if f"layers.{index}.conv.weight" in state:
            tensors = [state[f"layers.{index}.{name}"] for name in [*names, "conv.weight"]]
            parts += [tensor.numpy().astype("<f4").tobytes() for tensor in tensors]
    path.write_bytes(b"".join(parts))


@pytest.fixture
def written(tmp_path: Path) -> tuple[Darknet, Path, Path]:
    """An 80-class network, its cfg and its weights."""
    torch.manual_seed(0)
    detector = Darknet((64, 64), COCO_CLASSES, cfg=YOLO).eval()
    shake(detector)
    (tmp_path / "net.cfg").write_text(YOLO)
    write_weights(tmp_path / "net.weights", detector)
    return detector, tmp_path / "net.cfg", tmp_path / "net.weights"


@pytest.mark.parametrize("version", [(0, 1, 0), (0, 2, 0), (0, 2, 5), (1, 0, 0)])
def test_weights_round_trip(written: tuple[Darknet, Path, Path], version: tuple[int, int, int]) -> None:
    """Files with a 4 byte and with an 8 byte count of images fill the network bit by bit."""
    detector, cfg, weights = written
    write_weights(weights, detector, version)
    again = load_detector(str(cfg), weights, (64, 64), COCO_CLASSES)
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) or name.endswith("num_batches_tracked")


@pytest.mark.parametrize("classes", [("person",), ("dog", "person")])
def test_classes_keep_their_rows(written: tuple[Darknet, Path, Path], classes: tuple[str, ...]) -> None:
    """The outputs of the network for some classes are those of the whole one: box, object, these classes."""
    detector, cfg, weights = written
    kept = load_detector(str(cfg), weights, (64, 64), classes).eval()
    images = torch.rand(2, 3, 64, 64)
    rows = [*range(5), *(5 + COCO_CLASSES.index(name) for name in classes)]
    for found, expected in zip(kept(images), detector(images), strict=True):
        blocks = expected.unflatten(1, (2, 85))[:, :, rows].flatten(1, 2)
        torch.testing.assert_close(found, blocks)
    assert kept.untrained is False


def test_names_beside_the_cfg(written: tuple[Darknet, Path, Path]) -> None:
    """A .names file gives the classes their names; a wrong count is refused."""
    detector, cfg, weights = written
    cfg.with_suffix(".names").write_text("\n".join(f"thing {i}" for i in range(80)))
    kept = load_detector(str(cfg), weights, (64, 64), ("thing 3",)).eval()
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(kept(images)[0][:, 5], detector(images)[0][:, 8])
    cfg.with_suffix(".names").write_text("thing\n")
    with pytest.raises(WeightsError, match="names 1 classes"):
        load_detector(str(cfg), weights, (64, 64), ("thing",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data + b"\0\0\0\0", "holds .* values, the network of the cfg takes"),
        (lambda data: data[:-4], "holds .* values, the network of the cfg takes"),
        (lambda data: data[:-3], "cut short"),
        (lambda data: data[:9], "no Darknet weight file"),
        (lambda data: b"\x80\x02" + data, "no Darknet weight file"),
        (lambda data: data[:-4] + struct.pack("<f", float("nan")), "not finite"),
        (lambda data: b"", "no Darknet weight file"),
    ],
)
def test_every_value_has_its_place(written: tuple[Darknet, Path, Path], change: Any, message: str) -> None:
    """A value more, a value less, a cut, another header, NaN: refused, naming the file."""
    _, cfg, weights = written
    weights.write_bytes(change(weights.read_bytes()))
    with pytest.raises(WeightsError, match=message) as caught:
        load_detector(str(cfg), weights, (64, 64))
    assert "net.weights" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[net]", "[convolution]", "first section is not"),
        ("[upsample]", "[lstm]", r"\[lstm\] in line \d+.*not supported"),
        ("activation=mish", "activation=hardtan", r"\[convolutional\] in line 25.*hardtan"),
        ("filters=170", "filters=172", "needs 170"),
        ("from=-2", "from=5", "no earlier layers"),
        ("from=-2", "from=-3", "differ"),
        ("layers=-1,7", "layers=-1,0", "sizes"),
        ("groups=8", "groups=7", "7 groups"),
        ("filters=24", "filters=many", "no number"),
        ("groups=2", "groups=2\nstretch=1", r"line \d+: stretch is not supported"),
        ("mask=2,3", "mask=2,4", "anchors"),
        ("anchors=4,6", "anchors=nan,6", "anchors"),
        ("width=64", "width", "line 4"),
        ("channels=3", "channels=1", "3 channels"),
        ("classes=80\nnum=4\nscale", "classes=79\nnum=4\nscale", "needs 168"),
    ],
)
def test_what_a_cfg_cannot_say(old: str, new: str, message: str) -> None:
    """What is not understood is an error with its line, never a network that is a little different."""
    assert old in YOLO
    with pytest.raises(DetectorError, match=message):
        Darknet((64, 64), COCO_CLASSES, cfg=YOLO.replace(old, new, 1))


def test_no_detection_layer_is_refused() -> None:
    """A classifier detects nothing, and an empty file is no network."""
    with pytest.raises(DetectorError, match="detects nothing"):
        Darknet((64, 64), cfg="[net]\n[convolutional]\nfilters=4\n[avgpool]\n[softmax]")
    with pytest.raises(DetectorError, match="first section"):
        parse_cfg("# nothing\n")


def yolo_by_hand(raw: list[NDArray[np.float64]], scale: tuple[float, float]) -> NDArray[np.float64]:
    """YOLOv3's formulas, slot by slot: x1, y1, x2, y2, score."""
    anchors = [(4, 6), (10, 14), (23, 27), (37, 58)]
    rows = []
    for level, mask, s in zip(raw, ((2, 3), (0, 1)), scale, strict=True):
        cells = level.shape[-1]
        blocks = level.reshape(2, 7, cells, cells)
        for a, row, column in np.ndindex(2, cells, cells):
            t = blocks[a, :, row, column]
            sigmoid = 1 / (1 + np.exp(-t))
            x = (sigmoid[0] * s - (s - 1) / 2 + column) / cells * 64
            y = (sigmoid[1] * s - (s - 1) / 2 + row) / cells * 64
            w, h = np.exp(t[2]) * anchors[mask[a]][0], np.exp(t[3]) * anchors[mask[a]][1]
            rows.append(
                [x - w / 2, y - h / 2, x + w / 2, y + h / 2, sigmoid[4] * max(sigmoid[5], sigmoid[6])]
            )
    return np.array(rows)


def random_raw(detector: Darknet, images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    detector.eval()
    with torch.no_grad():
        shapes = [output.shape[1:] for output in detector(torch.zeros(1, 3, *detector.input_size))]
    return [torch.randn(images, *shape, generator=generator) for shape in shapes]


def test_yolo_decoding() -> None:
    """Boxes and scores are those of YOLOv3's formulas, with scale_x_y and with several classes."""
    detector = Darknet((64, 64), ("person", "dog"), cfg=YOLO)
    raw = [level / 3 for level in random_raw(detector, 1)]  # no box reaches the largest size
    boxes, scores = detector.decode(raw)
    expected = yolo_by_hand([level[0].double().numpy() for level in raw], (1.1, 1.0))
    np.testing.assert_allclose(boxes[0], expected[:, :4], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(scores[0], expected[:, 4], rtol=1e-4)


def test_decoding_cannot_overflow() -> None:
    """Sizes are bounded by twice the input, also in float16, whatever the network says."""
    for cfg in (YOLO, REGION):
        detector = Darknet((64, 64), cfg=cfg)
        wild = [torch.full_like(level, 1000.0).half() for level in random_raw(detector)]
        boxes, scores = detector.half().decode(wild)
        assert torch.isfinite(boxes).all() and torch.isfinite(scores).all()
        assert (boxes[..., 2:] - boxes[..., :2]).max() <= 2.01 * 64


@pytest.mark.parametrize("cfg", [YOLO, REGION])
@pytest.mark.parametrize("classes", [("person",), ("person", "dog")])
def test_loss(cfg: str, classes: tuple[str, ...]) -> None:
    """An image's loss does not depend on its mates, and its gradient is that of finite differences."""
    detector = Darknet((64, 64), classes, cfg=cfg)
    raw = random_raw(detector)
    check_per_image(detector, raw, some_targets())
    if cfg is YOLO:  # YOLOv2's confidence follows the IoU, which is no part of its gradient
        check_gradient(detector, raw, some_targets())


def test_region_loss_by_hand() -> None:
    """One object at a slot of known outputs: YOLOv2's squared errors, term by term."""
    detector = Darknet((64, 64), cfg=REGION)
    (shape,) = [level.shape[1:] for level in random_raw(detector)]
    raw = torch.zeros(1, *shape)  # (12, 4, 4): cells of 16 pixels
    box = torch.tensor([[20.0, 18.0, 60.0, 62.0]])  # 40x44 around (40, 40): cell (2, 2), anchor 40x48
    found = detector.loss([raw], [Targets(box, torch.tensor([False]))]).item()
    x = 40 / 16 - 2
    coordinates = (2 - 40 * 44 / 64**2) * (2 * (0.5 - x) ** 2 + 0**2 + np.log(44 / 48) ** 2)
    boxes, _ = detector.decode([raw])
    left, top, right, bottom = boxes[0].double().numpy().T
    shared = (np.minimum(right, 60) - np.maximum(left, 20)).clip(0) * (
        np.minimum(bottom, 62) - np.maximum(top, 18)
    ).clip(0)
    overlap = shared / ((right - left) * (bottom - top) + 40 * 44 - shared)
    slot = 16 + 2 * 4 + 2
    others = np.delete(overlap, slot)
    background = (others <= 0.6).sum() * 0.25
    assert found == pytest.approx(5 * (0.5 - overlap[slot]) ** 2 + background + coordinates, rel=1e-4)


def test_ignored_boxes_are_no_background() -> None:
    """Confidence in cells under an ignored box costs nothing."""
    for cfg in (YOLO, REGION):
        detector = Darknet((64, 64), cfg=cfg)
        raw = [level.requires_grad_() for level in random_raw(detector, 1)]
        whole = Targets(torch.tensor([[-1.0, -1.0, 65.0, 65.0]]), torch.tensor([True]))
        detector.loss(raw, [whole]).sum().backward()
        assert all(not level.grad.any() for level in raw)


@pytest.mark.parametrize("cfg", [YOLO, REGION])
def test_loss_falls(cfg: str) -> None:
    """Training on a batch lowers the loss."""
    torch.manual_seed(0)
    check_falling_loss(Darknet((64, 64), cfg=cfg), torch.rand(2, 3, 64, 64), some_targets(), steps=15)


@pytest.mark.parametrize("cfg", [YOLO, REGION])
def test_pruned_exported_and_run(cfg: str, tmp_path: Path) -> None:
    """30 % pruned, rebuilt from its specification alone (the cfg file is gone), exported, run by the agent."""
    torch.manual_seed(0)
    detector = Darknet((64, 64), cfg=cfg)
    shake(detector)
    step = check_whole_way("gone.cfg", detector, tmp_path)
    assert step.spec.variant["cfg"] == cfg


def test_saved_weights_need_no_cfg_file(tmp_path: Path) -> None:
    """What `save_weights` wrote brings the cfg along; another detector's name is refused."""
    torch.manual_seed(0)
    detector = Darknet((64, 64), ("person", "dog"), cfg=YOLO).eval()
    save_weights(tmp_path / "w.safetensors", "gone.cfg", detector)
    again = load_detector("gone.cfg", tmp_path / "w.safetensors", (64, 64), ("dog",)).eval()
    images = torch.rand(1, 3, 64, 64)
    rows = [0, 1, 2, 3, 4, 6]
    torch.testing.assert_close(
        again(images)[0], detector(images)[0].unflatten(1, (2, 7))[:, :, rows].flatten(1, 2)
    )
    with pytest.raises(WeightsError, match=r"of gone\.cfg, not of nanodet-g"):
        load_detector("nanodet-g", tmp_path / "w.safetensors", (64, 64))
