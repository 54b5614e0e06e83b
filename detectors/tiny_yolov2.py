"""Tiny YOLOv2 (Redmon and Farhadi, arXiv:1612.08242): nine convolutions and a region layer, as a Darknet cfg.

It reads the checkpoints that its users have: PyTorch state dicts with `conv1` to `conv9` and `bn1` to `bn8`, also
with batch norm folded into the convolutions and with channels removed, and Darknet's `.weights`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune.detectors.anchors import BOX
from edgeprune.detectors.classes import names_of
from edgeprune.detectors.darknet import Darknet, darknet_values, keep_competing, read_darknet_weights
from edgeprune.detectors.protocol import DetectorError
from edgeprune.detectors.weights import WeightsError, check_state_dict, read_state_dict

VOC_CHANNELS = (16, 32, 64, 128, 256, 512, 1024, 1024)
COCO_CHANNELS = (16, 32, 64, 128, 256, 512, 1024, 512)
VOC_ANCHORS = ((1.08, 1.19), (3.42, 4.41), (6.63, 11.38), (9.42, 5.11), (16.62, 10.52))  # cells of 32 pixels
COCO_ANCHORS = (
    (0.57273, 0.677385),
    (1.87446, 2.06253),
    (3.33843, 5.47434),
    (7.88282, 3.52778),
    (9.77052, 9.16828),
)
CONVOLUTIONS = (0, 2, 4, 6, 8, 10, 12, 13, 14)  # layers of the cfg; a pool follows each of the first six
STRIDE = 32


class TinyYoloV2(Darknet):
    """Tiny YOLOv2 as a `Detector`. Raw output: ``(N, 5 x (5 + classes), H / 32, W / 32)``.

    Args:
        input_size: ``(H, W)``, multiples of 32.
        channels: of the first eight convolutions.
        anchors: width and height in cells.
        border: what the sixth pool sees right of and below the image: "replicate" as in Darknet, where it
            ignores what lies outside, "reflect" as in the course on pruning, "zeros" as in other ports.
        batch_norm: False where it is folded into the convolutions.

    Raises:
        DetectorError: If the input size is no multiple of 32, or channels or anchors do not fit.
    """

    def __init__(
        self,
        input_size: tuple[int, int],
        classes: Sequence[str] = ("person",),
        *,
        channels: Sequence[int] = VOC_CHANNELS,
        anchors: Sequence[Sequence[float]] = VOC_ANCHORS,
        border: str = "replicate",
        batch_norm: bool = True,
    ) -> None:
        if any(side <= 0 or side % STRIDE for side in input_size):
            raise DetectorError(
                f"tiny-yolov2 takes sides in multiples of {STRIDE}, not {input_size[0]}x{input_size[1]}"
            )
        if len(channels) != len(VOC_CHANNELS):
            raise DetectorError(f"tiny-yolov2 has {len(VOC_CHANNELS)} channel counts, not {len(channels)}")
        cfg = _cfg(channels, anchors, len(classes), batch_norm)
        super().__init__(input_size, classes, cfg=cfg, border=border)
        self.variant: Mapping[str, Any] = {
            "channels": list(channels),
            "anchors": [list(anchor) for anchor in anchors],
            "border": border,
            "batch_norm": batch_norm,
        }


def _cfg(channels: Sequence[int], anchors: Sequence[Sequence[float]], classes: int, batch_norm: bool) -> str:
    lines = ["[net]", "channels=3"]
    for number, filters in enumerate(channels):
        lines += ["[convolutional]", f"batch_normalize={int(batch_norm)}", f"filters={filters}"]
        lines += ["size=3", "stride=1", "pad=1", "activation=leaky"]
        if number < 6:
            lines += ["[maxpool]", "size=2", f"stride={2 if number < 5 else 1}"]
    lines += ["[convolutional]", f"filters={len(anchors) * (BOX + classes)}", "size=1", "activation=linear"]
    sides = ",".join(repr(float(side)) for anchor in anchors for side in anchor)
    lines += ["[region]", f"anchors={sides}", f"num={len(anchors)}", f"classes={classes}"]
    return "\n".join(lines)


def load_tiny_yolov2(
    path: Path, input_size: tuple[int, int], classes: Sequence[str] = ("person",), border: str | None = None
) -> TinyYoloV2:
    """Build Tiny YOLOv2 with the weights of a file, for some of its classes.

    Args:
        path: a state dict (`.pt`, `.pth`, `.safetensors`), or Darknet's `.weights` of tiny-yolov2-voc or of
            yolov2-tiny (COCO); other Darknet networks need their cfg.
        border: as it was trained; no file says so. Default: "replicate" for `.weights`, else "reflect".

    Raises:
        WeightsError: If the file is missing, damaged, of another network, or lacks a class.
        DetectorError: If the input size does not fit.
    """
    if not path.is_file():
        raise WeightsError(f"no weight file at {path}")
    if path.suffix == ".weights":
        detector = _from_darknet(path, input_size, classes, border or "replicate")
    else:
        detector = _from_checkpoint(path, input_size, classes, border or "reflect")
    return keep_competing(detector, classes, path)


def _from_darknet(path: Path, input_size: tuple[int, int], classes: Sequence[str], border: str) -> TinyYoloV2:
    held = len(darknet_values(path))
    for channels, anchors in ((VOC_CHANNELS, VOC_ANCHORS), (COCO_CHANNELS, COCO_ANCHORS)):
        body = sum(9 * a * b + 4 * b for a, b in zip((3, *channels), channels, strict=False))
        row = channels[-1] + 1  # weights and bias of one output
        count, rest = divmod(held - body, row * len(anchors))
        if rest == 0 and count > BOX:
            names = names_of(count - BOX, classes, path)
            detector = TinyYoloV2(input_size, names, channels=channels, anchors=anchors, border=border)
            read_darknet_weights(detector, path)
            return detector
    raise WeightsError(f"{path} holds {held:,} values, which fit no tiny-yolov2; name its cfg as --detector")


def _from_checkpoint(
    path: Path, input_size: tuple[int, int], classes: Sequence[str], border: str
) -> TinyYoloV2:
    given = read_state_dict(path)
    layer = re.compile(r"(conv|bn)(\d+)\.(.+)")
    state = {name: tensor for name, tensor in given.items() if layer.fullmatch(name)}
    weights = [state.get(f"conv{number}.weight") for number in range(1, 10)]
    if any(weight is None or weight.ndim != 4 for weight in weights):
        raise WeightsError(f"{path} is no tiny-yolov2: it lacks conv1.weight to conv9.weight")
    counts = [len(weight) for weight in weights if weight is not None]
    anchors = _anchors(given.get("anchors"), path)
    outputs, rest = divmod(counts[-1], len(anchors))
    if rest or outputs <= BOX:
        raise WeightsError(
            f"{path} is no tiny-yolov2: conv9 has {counts[-1]} outputs for {len(anchors)} anchors"
        )
    detector = TinyYoloV2(
        input_size,
        names_of(outputs - BOX, classes, path),
        channels=counts[:-1],
        anchors=anchors,
        border=border,
        batch_norm=any(name.startswith("bn") for name in state),
    )
    expected = detector.state_dict()
    theirs = {_their_name(name): tensor for name, tensor in expected.items()}
    for name in theirs:
        if name.endswith("num_batches_tracked"):  # PyTorch before 0.4.1 has none
            state.setdefault(name, torch.tensor(0))
    check_state_dict(state, theirs, path)
    detector.load_state_dict(
        {name: state[_their_name(name)].to(tensor.dtype) for name, tensor in expected.items()}
    )
    return detector


def _their_name(name: str) -> str:
    """A tensor's name in the course's checkpoints."""
    _, index, kind, tensor = name.split(".")
    return f"{'bn' if kind == 'norm' else 'conv'}{CONVOLUTIONS.index(int(index)) + 1}.{tensor}"


def _anchors(found: Tensor | None, path: Path) -> tuple[tuple[float, float], ...]:
    if found is None:
        return VOC_ANCHORS
    if found.ndim != 2 or found.shape[1] != 2 or not bool((found > 0).all()):
        raise WeightsError(f"{path}: anchors have the shape {tuple(found.shape)} or are not above 0")
    return tuple((round(float(w), 6), round(float(h), 6)) for w, h in found.tolist())
