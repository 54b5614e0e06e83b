"""YOLOX (Ge et al. 2021, arXiv:2107.08430) in its three small sizes, with the names of its official checkpoints.

A CSPDarknet over a focus stem, a pyramid that goes down and up again, and a head whose branches for class and box are
apart. Each cell predicts one box, without anchors.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.detectors.classes import check_classes, keep_classes, names_of
from edgeprune.detectors.protocol import DetectorError, Targets
from edgeprune.detectors.simota import simota_losses
from edgeprune.detectors.weights import WeightsError, check_state_dict, read_state_dict

STRIDES = (8, 16, 32)  # input pixels per cell of each level
LARGEST_LOGARITHM = 7.0  # of a side in cells: exp stays below 1,100, so that nothing overflows in float16
POOLS = (5, 9, 13)  # windows of the spatial pyramid pooling
PRIOR = 0.01  # score that an untrained head gives


class BaseConv(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.bn(self.conv(x)))


class SeparableConv(nn.Module):
    """A depthwise convolution, then one of 1x1: what takes the place of a 3x3 convolution in yolox-nano."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.dconv = BaseConv(inputs, inputs, size, stride, groups=inputs)
        self.pconv = BaseConv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pconv(self.dconv(x))
        return x


def _conv(depthwise: bool, inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return (SeparableConv if depthwise else BaseConv)(inputs, outputs, 3, stride)


class Focus(nn.Module):
    """Every second pixel of every second row as channels of their own: a quarter of the size, four times as deep."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = BaseConv(12, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[..., ::2, :], x[..., 1::2, :]
        parts = (row[..., start::2] for start in (0, 1) for row in rows)
        output: Tensor = self.conv(torch.cat(tuple(parts), 1))
        return output


class Bottleneck(nn.Module):
    def __init__(self, channels: int, shortcut: bool, depthwise: bool) -> None:
        super().__init__()
        self.conv1 = BaseConv(channels, channels, 1)
        self.conv2 = _conv(depthwise, channels, channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x))
        return y + x if self.shortcut else y


class CspLayer(nn.Module):
    """Half of the channels through bottlenecks, the other half past them."""

    def __init__(self, inputs: int, outputs: int, blocks: int, shortcut: bool, depthwise: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = BaseConv(inputs, half, 1)
        self.conv2 = BaseConv(inputs, half, 1)
        self.conv3 = BaseConv(2 * half, outputs, 1)
        self.m = nn.Sequential(*(Bottleneck(half, shortcut, depthwise) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.conv3(torch.cat((self.m(self.conv1(x)), self.conv2(x)), 1))
        return output


class PyramidPooling(nn.Module):
    """What lies around each cell, in windows of three sizes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = BaseConv(channels, channels // 2, 1)
        self.conv2 = BaseConv(channels // 2 * (len(POOLS) + 1), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        output: Tensor = self.conv2(
            torch.cat((x, *(functional.max_pool2d(x, n, 1, n // 2) for n in POOLS)), 1)
        )
        return output


class CspDarknet(nn.Module):
    """The backbone; gives its levels of strides 8, 16 and 32."""

    def __init__(self, width: int, depth: int, depthwise: bool) -> None:
        super().__init__()
        self.stem = Focus(width)
        stages = []
        for doublings, blocks in ((1, depth), (2, 3 * depth), (3, 3 * depth), (4, depth)):
            inputs, channels = width * 2 ** (doublings - 1), width * 2**doublings
            last = doublings == 4
            stages.append(
                nn.Sequential(
                    _conv(depthwise, inputs, channels, 2),
                    *([PyramidPooling(channels)] if last else []),
                    CspLayer(channels, channels, blocks, not last, depthwise),
                )
            )
        self.dark2, self.dark3, self.dark4, self.dark5 = stages

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.dark3(self.dark2(self.stem(x)))
        middle = self.dark4(fine)
        return fine, middle, self.dark5(middle)


class Pyramid(nn.Module):
    """The neck: coarse levels lend their view to fine ones, and these their detail to coarse ones."""

    def __init__(self, width: int, depth: int, depthwise: bool) -> None:
        super().__init__()
        fine, middle, coarse = 4 * width, 8 * width, 16 * width
        self.backbone = CspDarknet(width, depth, depthwise)
        self.lateral_conv0 = BaseConv(coarse, middle, 1)
        self.C3_p4 = CspLayer(2 * middle, middle, depth, False, depthwise)
        self.reduce_conv1 = BaseConv(middle, fine, 1)
        self.C3_p3 = CspLayer(2 * fine, fine, depth, False, depthwise)
        self.bu_conv2 = _conv(depthwise, fine, fine, 2)
        self.C3_n3 = CspLayer(2 * fine, middle, depth, False, depthwise)
        self.bu_conv1 = _conv(depthwise, middle, middle, 2)
        self.C3_n4 = CspLayer(2 * middle, coarse, depth, False, depthwise)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, coarse = self.backbone(images)
        coarse = self.lateral_conv0(coarse)
        middle = self.reduce_conv1(self.C3_p4(torch.cat((_double(coarse), middle), 1)))
        fine = self.C3_p3(torch.cat((_double(middle), fine), 1))
        middle = self.C3_n3(torch.cat((self.bu_conv2(fine), middle), 1))
        coarse = self.C3_n4(torch.cat((self.bu_conv1(middle), coarse), 1))
        return fine, middle, coarse


class Head(nn.Module):
    """Box (4), object (1) and classes of each level, ``(N, 5 + classes, H, W)``."""

    def __init__(self, width: int, classes: int, depthwise: bool) -> None:
        super().__init__()
        channels = 4 * width

        def branch() -> nn.Module:
            return nn.Sequential(*(_conv(depthwise, channels, channels) for _ in range(2)))

        self.stems = nn.ModuleList(BaseConv(width * factor, channels, 1) for factor in (4, 8, 16))
        self.cls_convs = nn.ModuleList(branch() for _ in STRIDES)
        self.reg_convs = nn.ModuleList(branch() for _ in STRIDES)
        self.cls_preds = nn.ModuleList(nn.Conv2d(channels, classes, 1) for _ in STRIDES)
        self.reg_preds = nn.ModuleList(nn.Conv2d(channels, 4, 1) for _ in STRIDES)
        self.obj_preds = nn.ModuleList(nn.Conv2d(channels, 1, 1) for _ in STRIDES)
        for prediction in (*self.cls_preds, *self.obj_preds):
            nn.init.constant_(prediction.bias, -math.log(1 / PRIOR - 1))

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        outputs = []
        for index, level in enumerate(levels):
            x = self.stems[index](level)
            box = self.reg_convs[index](x)
            parts = (
                self.reg_preds[index](box),
                self.obj_preds[index](box),
                self.cls_preds[index](self.cls_convs[index](x)),
            )
            outputs.append(torch.cat(parts, 1))
        return tuple(outputs)


class YoloX(nn.Module):
    """YOLOX as a `Detector`. Raw outputs: one ``(N, 5 + classes, H / stride, W / stride)`` a level.

    Args:
        input_size: ``(H, W)``, multiples of 32.
        classes: rows of the class head, in order.
        width: channels behind the stem: 16 nano, 24 tiny, 32 s.
        depthwise: separable convolutions in place of 3x3 ones (nano).

    Raises:
        DetectorError: If the input size is no multiple of 32.
    """

    preprocessing = Preprocessing("bgr", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 114, "letterbox-top-left")
    points: Tensor  # (2, M) left and top of every cell, in cells
    strides: Tensor  # (M,)

    def __init__(
        self,
        input_size: tuple[int, int],
        classes: Sequence[str] = ("person",),
        *,
        width: int,
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        if any(side <= 0 or side % STRIDES[-1] for side in input_size):
            raise DetectorError(
                f"yolox takes sides in multiples of {STRIDES[-1]}, not {input_size[0]}x{input_size[1]}"
            )
        self.input_size, self.classes = input_size, check_classes(classes)
        self.variant = {"width": width, "depthwise": depthwise}
        self.backbone = Pyramid(width, 1, depthwise)
        self.head = Head(width, len(self.classes), depthwise)
        self.level_sizes = tuple((input_size[0] // stride, input_size[1] // stride) for stride in STRIDES)
        grids = [
            torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy")).flatten(1)
            for h, w in self.level_sizes
        ]
        cells = torch.tensor([grid.shape[1] for grid in grids])
        self.register_buffer("points", torch.cat(grids, 1).float(), persistent=False)
        self.register_buffer(
            "strides", torch.tensor(STRIDES).repeat_interleave(cells).float(), persistent=False
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.head(self.backbone(images))
        return outputs

    def decode(self, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        values = self._values(raw)
        logits = values[:, 5:] if len(self.classes) == 1 else values[:, 5:].amax(1, keepdim=True)
        scores = (values[:, 4:5].sigmoid() * logits.sigmoid()).reshape(-1, self.points.shape[1])
        return self._boxes(values).transpose(1, 2), scores

    def loss(self, raw: Sequence[Tensor], targets: Sequence[Targets]) -> Tensor:
        """YOLOX's loss of each image with SimOTA's assignment (see `simota.simota_losses`), ``(N,)``.

        Boxes carry no class: with several, a cell's best class is taken for the object's.
        """
        values = self._values(raw)
        return simota_losses(
            self._boxes(values).transpose(1, 2),
            values[:, 4],
            values[:, 5:].amax(1),
            targets,
            centres=((self.points + 0.5) * self.strides).T,
            strides=self.strides,
        )

    def class_rows(self, kept: Sequence[int]) -> dict[str, list[int]]:
        return {
            f"head.cls_preds.{level}.{name}": list(kept)
            for level in range(len(STRIDES))
            for name in ("weight", "bias")
        }

    def _values(self, raw: Sequence[Tensor]) -> Tensor:
        """Raw outputs as ``(N, 5 + classes, M)``."""
        values = 5 + len(self.classes)
        levels = zip(raw, self.level_sizes, strict=True)
        return torch.cat([level.reshape(-1, values, height * width) for level, (height, width) in levels], 2)

    def _boxes(self, values: Tensor) -> Tensor:
        """Corners ``(N, 4, M)``, input pixels."""
        centre = values[:, :2] + self.points  # in cells
        half = values[:, 2:4].clamp(max=LARGEST_LOGARITHM).exp() / 2
        return torch.cat((centre - half, centre + half), 1) * self.strides


def load_yolox(
    path: Path, input_size: tuple[int, int], classes: Sequence[str], *, width: int, depthwise: bool = False
) -> YoloX:
    """Build YOLOX with the weights of an official checkpoint (nested under `model`) or a plain state dict.

    Raises:
        WeightsError: If the file is missing, damaged, of another network, or lacks a class.
        DetectorError: If the input size does not fit.
    """
    if not path.is_file():
        raise WeightsError(f"no weight file at {path}")
    state = read_state_dict(path)
    head = state.get("head.cls_preds.0.bias")
    if head is None:
        raise WeightsError(f"{path} is no YOLOX checkpoint: it lacks head.cls_preds.0.bias")
    names = names_of(head.numel(), classes, path)
    detector = YoloX(input_size, names, width=width, depthwise=depthwise)
    expected = detector.state_dict()
    check_state_dict(state, expected, path)
    detector.load_state_dict({name: state[name].to(tensor.dtype) for name, tensor in expected.items()})
    return keep_classes(detector, classes, path)


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")
