"""YOLOX: size, decoding, SimOTA, official checkpoints, the whole way."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from whole_way import (
    check_falling_loss,
    check_gradient,
    check_per_image,
    check_whole_way,
    shake,
    some_targets,
)

from edgeprune.detectors.protocol import DetectorError, Targets
from edgeprune.detectors.registry import build_detector, load_detector
from edgeprune.detectors.simota import assign
from edgeprune.detectors.weights import COCO_CLASSES, WeightsError
from edgeprune.detectors.yolox import Focus, YoloX
from edgeprune.pruning.checkpoint import trace_detector
from edgeprune.pruning.counting import count

PUBLISHED = {
    "yolox-nano": (416, 0.91e6, 1.08e9),
    "yolox-tiny": (416, 5.06e6, 6.45e9),
    "yolox-s": (640, 9.0e6, 26.8e9),
}  # input side, parameters, FLOPs (two a MAC, and those of batch norm and activations too)


@pytest.mark.parametrize("name", PUBLISHED)
def test_size(name: str) -> None:
    """Parameters and MACs of 80 classes are the published ones."""
    side, params, flops = PUBLISHED[name]
    cost = count(trace_detector(build_detector(name, (side, side), COCO_CLASSES), (side, side)))
    assert cost.params == pytest.approx(params, rel=0.005)
    assert 0.96 * flops < 2 * cost.macs <= flops


def test_focus_order() -> None:
    """Channels come as top left, bottom left, top right, bottom right, three colours each."""
    x = torch.arange(3 * 4 * 4).float().view(1, 3, 4, 4)
    focus = Focus(8)
    seen: list[Tensor] = []
    focus.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    focus(x)
    corners = [(0, 0), (1, 0), (0, 1), (1, 1)]
    expected = torch.cat([x[:, :, row::2, column::2] for row, column in corners], 1)
    assert torch.equal(seen[0], expected)


# What stands at some places of the official state dicts, by the names that their modules give.
NAMES = {
    "backbone.backbone.stem.conv.conv.weight": (32, 12, 3, 3),
    "backbone.backbone.dark2.0.conv.weight": (64, 32, 3, 3),
    "backbone.backbone.dark3.1.m.2.conv2.bn.running_var": (64,),
    "backbone.backbone.dark5.1.conv2.conv.weight": (512, 1024, 1, 1),
    "backbone.backbone.dark5.2.conv3.conv.weight": (512, 512, 1, 1),
    "backbone.lateral_conv0.conv.weight": (256, 512, 1, 1),
    "backbone.C3_p4.m.0.conv1.conv.weight": (128, 128, 1, 1),
    "backbone.reduce_conv1.bn.weight": (128,),
    "backbone.bu_conv2.conv.weight": (128, 128, 3, 3),
    "backbone.C3_n4.conv1.conv.weight": (256, 512, 1, 1),
    "head.cls_convs.0.0.conv.weight": (128, 128, 3, 3),
    "head.reg_convs.2.1.bn.num_batches_tracked": (),
    "head.cls_preds.1.weight": (80, 128, 1, 1),
    "head.reg_preds.1.bias": (4,),
    "head.obj_preds.2.weight": (1, 128, 1, 1),
    "head.stems.2.conv.weight": (128, 512, 1, 1),
}


def test_names_are_the_official_ones() -> None:
    """yolox-s has the official names and shapes; yolox-nano the separable ones."""
    state = build_detector("yolox-s", (64, 64), COCO_CLASSES).state_dict()
    assert {name: tuple(state[name].shape) for name in NAMES} == NAMES
    nano = build_detector("yolox-nano", (64, 64), COCO_CLASSES).state_dict()
    assert nano["backbone.backbone.dark2.0.dconv.conv.weight"].shape == (16, 1, 3, 3)
    assert nano["backbone.backbone.dark2.0.pconv.conv.weight"].shape == (32, 16, 1, 1)
    assert nano["head.reg_convs.0.1.dconv.conv.weight"].shape == (64, 1, 3, 3)


@pytest.mark.parametrize("classes", [COCO_CLASSES, ("person",), ("dog", "person")])
@pytest.mark.parametrize("nested", [True, False])
def test_checkpoints(classes: tuple[str, ...], nested: bool, tmp_path: Path) -> None:
    """A checkpoint with `model` beside the optimizer's state, or a plain one, gives the outputs of its classes."""
    torch.manual_seed(0)
    detector = build_detector("yolox-nano", (64, 64), COCO_CLASSES).eval()
    shake(detector)
    state = detector.state_dict()
    whole = {
        "start_epoch": 300,
        "model": state,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
    }
    torch.save(whole if nested else state, tmp_path / "w.pth")
    kept = load_detector("yolox-nano", tmp_path / "w.pth", (64, 64), classes).eval()
    rows = [0, 1, 2, 3, 4, *(5 + COCO_CLASSES.index(name) for name in classes)]
    images = torch.rand(1, 3, 64, 64) * 255
    for found, expected in zip(kept(images), detector(images), strict=True):
        torch.testing.assert_close(found, expected[:, rows])


def test_what_is_refused(tmp_path: Path) -> None:
    """Another size of YOLOX, a missing tensor, another network and a bad input size are named."""
    path = tmp_path / "w.pth"
    state = build_detector("yolox-nano", (64, 64), COCO_CLASSES).state_dict()
    torch.save({"model": state}, path)
    with pytest.raises(WeightsError, match="of another network"):
        load_detector("yolox-tiny", path, (64, 64))
    torch.save({name: t for name, t in state.items() if name != "head.stems.0.bn.bias"}, path)
    with pytest.raises(WeightsError, match=r"lacks 1 tensors, first head\.stems\.0\.bn\.bias"):
        load_detector("yolox-nano", path, (64, 64))
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(WeightsError, match="no YOLOX checkpoint"):
        load_detector("yolox-nano", path, (64, 64))
    with pytest.raises(WeightsError, match="no weight file"):
        load_detector("yolox-nano", tmp_path / "none.pth", (64, 64))
    with pytest.raises(DetectorError, match="300x320"):
        build_detector("yolox-s", (300, 320))


def random_raw(detector: YoloX, images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels = 5 + len(detector.classes)
    return [torch.randn(images, channels, h, w, generator=generator) / 2 for h, w in detector.level_sizes]


def test_decoding() -> None:
    """Cell by cell: centre = (offset + cell) x stride, size = exp x stride, score = object x best class."""
    detector = YoloX((64, 96), ("person", "dog"), width=16)
    raw = random_raw(detector, 1)
    boxes, scores = detector.decode(raw)
    place = 0
    for level, stride in zip(raw, (8, 16, 32), strict=True):
        for row, column in np.ndindex(*level.shape[2:]):
            x, y, w, h, *logits = level[0, :, row, column].double().numpy()
            sigmoid = 1 / (1 + np.exp(-np.array(logits)))
            cx, cy = (x + column) * stride, (y + row) * stride
            w, h = np.exp(w) * stride, np.exp(h) * stride
            expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            np.testing.assert_allclose(boxes[0, place], expected, atol=1e-3)
            assert scores[0, place].item() == pytest.approx(sigmoid[0] * sigmoid[1:].max(), abs=1e-5)
            place += 1
    assert boxes.shape == (1, place, 4)
    wild = [torch.full_like(level, 1000.0).half() for level in raw]
    assert all(torch.isfinite(output).all() for output in detector.half().decode(wild))


def slow_simota(
    boxes: Tensor, objects: Tensor, logits: Tensor, wanted: Tensor, centres: Tensor, strides: Tensor
) -> Sequence[int]:
    """SimOTA as the paper tells it, with loops."""
    cells = len(boxes)
    cost: dict[tuple[int, int], float] = {}
    overlaps: dict[int, list[float]] = {}
    for k, (x1, y1, x2, y2) in enumerate(wanted.double().tolist()):
        overlaps[k] = []
        for m in range(cells):
            cx, cy = centres[m].tolist()
            reach = 2.5 * strides[m].item()
            usable = False
            for a1, b1, a2, b2 in wanted.double().tolist():  # near or in any object
                usable |= a1 < cx < a2 and b1 < cy < b2
                usable |= abs(cx - (a1 + a2) / 2) < reach and abs(cy - (b1 + b2) / 2) < reach
            if not usable:
                continue
            p1, q1, p2, q2 = boxes[m].double().tolist()
            shared = max(0.0, min(x2, p2) - max(x1, p1)) * max(0.0, min(y2, q2) - max(y1, q1))
            overlap = shared / ((x2 - x1) * (y2 - y1) + (p2 - p1) * (q2 - q1) - shared)
            within = x1 < cx < x2 and y1 < cy < y2
            near = abs(cx - (x1 + x2) / 2) < reach and abs(cy - (y1 + y2) / 2) < reach
            score = (objects[m].double().sigmoid() * logits[m].double().sigmoid()).sqrt().item()
            cost[m, k] = -np.log(score) - 3 * np.log(overlap + 1e-8) + 1e5 * (not (within and near))
            overlaps[k].append(overlap)
    owner: dict[int, tuple[float, int]] = {}
    for k in range(len(wanted)):
        take = max(1, int(sum(sorted(overlaps[k])[-10:])))
        for value, m in sorted((value, m) for (m, j), value in cost.items() if j == k)[:take]:
            owner[m] = min(owner.get(m, (np.inf, -1)), (value, k))
    return [owner[m][1] if m in owner else -1 for m in range(cells)]


def test_simota_is_the_papers() -> None:
    """The assignment equals one written with loops, for random predictions and crowded objects."""
    detector = YoloX((64, 64), width=16)
    centres, strides = ((detector.points + 0.5) * detector.strides).T, detector.strides
    some = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        corner = torch.rand(4, 2, generator=generator) * 40
        wanted = torch.cat((corner, corner + 4 + torch.rand(4, 2, generator=generator) * 30), 1)
        raw = [torch.randn(1, 6, h, w, generator=generator) / 2 for h, w in detector.level_sizes]
        for level, stride in zip(raw, (8, 16, 32), strict=True):
            level[:, 2:4] += np.log(24 / stride)
        boxes = detector.decode(raw)[0][0]
        objects, logits = torch.cat([level[0, 4:].flatten(1) for level in raw], 1)
        found = assign(boxes, objects, logits, wanted, centres=centres, strides=strides)
        assert found.tolist() == slow_simota(boxes, objects, logits, wanted, centres, strides)
        some += int((found >= 0).sum())
    assert some > 100


@pytest.mark.parametrize("classes", [("person",), ("person", "dog")])
def test_loss(classes: tuple[str, ...]) -> None:
    """An image's loss does not depend on its mates; without objects it is the entropy of all cells."""
    detector = YoloX((64, 64), classes, width=16)
    raw = random_raw(detector)
    check_per_image(detector, raw, some_targets())
    logits = torch.cat([level[1, 4].flatten() for level in raw])
    expected = functional.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="sum")
    torch.testing.assert_close(detector.loss(raw, some_targets())[1], expected)
    whole = Targets(torch.tensor([[-1.0, -1.0, 65.0, 65.0]]), torch.tensor([True]))
    assert detector.loss([level[:1] for level in raw], [whole]).item() == 0


def test_gradient() -> None:
    """Where the class's target, the IoU, stands still (saturated), the gradient is that of finite differences."""
    detector = YoloX((64, 64), width=16)
    raw = random_raw(detector)
    for level in raw:
        level[:, 5] = 0.0  # its entropy does not depend on the target then
    check_gradient(detector, raw, some_targets())


def test_loss_falls() -> None:
    """Training on a batch lowers the loss."""
    torch.manual_seed(0)
    detector = YoloX((64, 64), width=16, depthwise=True)
    check_falling_loss(detector, torch.rand(2, 3, 64, 64) * 255, some_targets(), steps=15)


def test_pruned_exported_and_run(tmp_path: Path) -> None:
    """yolox-nano: 30 % pruned, saved and loaded, exported, run by the agent."""
    torch.manual_seed(0)
    detector = build_detector("yolox-nano", (64, 64))
    shake(detector)
    for prediction in detector.head.obj_preds:
        prediction.bias.data.zero_()  # else nothing reaches the score threshold
    for prediction in detector.head.cls_preds:
        prediction.bias.data.zero_()
    check_whole_way("yolox-nano", detector, tmp_path)
