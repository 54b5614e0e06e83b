"""NanoDet-g: a detector of plain 3x3 and 1x1 convolutions, made for GPUs.

Architecture and weights: RangiLyu/nanodet (Apache-2.0), written here from its description. Batch norm is
folded, so every convolution has a bias. Each of three levels (strides 8, 16, 32) predicts at each of its
cells the class logits and, for each side of the box, a distribution over its distance from the cell's centre.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.detectors.losses import dense_distillation_losses, detection_losses
from edgeprune.detectors.protocol import DetectorError, Targets

STRIDES = (8, 16, 32)  # input pixels per cell of each level
BINS = 11  # a side's distance is the mean over 0 to 10 cells
LEAK = 0.1
NECK = 128  # channels of every level behind the laterals


class Csp(nn.Module):
    """A stage that keeps its input beside what it computes from it: C channels in, 2 C out."""

    def __init__(self, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        half = channels // 2
        self.entry = nn.Conv2d(channels, channels, 3, stride, 1)
        self.reduce = nn.ModuleList(nn.Conv2d(channels, half, 3, 1, 1) for _ in range(blocks))
        self.refine = nn.ModuleList(nn.Conv2d(half, half, 3, 1, 1) for _ in range(blocks))
        self.exit = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        entry = x = _leaky(self.entry(x))
        for reduce, refine in zip(self.reduce, self.refine, strict=True):
            reduced = _leaky(reduce(x))
            x = torch.cat((_leaky(refine(reduced)), reduced), 1)
        return torch.cat((_leaky(self.exit(x)), entry), 1)


class Head(nn.Module):
    """One level's prediction from the neck's features."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(NECK, NECK, 3, 1, 1)
        self.output = nn.Conv2d(NECK, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.output(_leaky(self.features(x)))
        return output


class NanoDetG(nn.Module):
    """NanoDet-g as a `Detector`. Raw outputs: one ``(N, classes + 44, H / stride, W / stride)`` a level.

    Args:
        input_size: ``(H, W)``, multiples of 32.
        classes: rows of the class head, in order.

    Raises:
        DetectorError: If the input size is no multiple of 32.
    """

    preprocessing = Preprocessing("bgr", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395), 0, "letterbox")
    points: Tensor  # (4, M) centres of all cells (x, y, x, y), in cells of their level
    strides: Tensor  # (M,) input pixels per cell
    sides: Tensor  # (4, 1) -1 for left and top, 1 for right and bottom
    bins: Tensor  # (BINS, 1) the distances, in cells

    def __init__(self, input_size: tuple[int, int], classes: Sequence[str] = ("person",)) -> None:
        super().__init__()
        if any(side <= 0 or side % STRIDES[-1] for side in input_size):
            raise DetectorError(
                f"nanodet-g takes sides in multiples of {STRIDES[-1]}, not {input_size[0]}x{input_size[1]}"
            )
        self.input_size = input_size
        self.classes = tuple(classes)
        self.variant: dict[str, object] = {}
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.stages = nn.ModuleList([Csp(32, 1, 1), Csp(64, 2, 2), Csp(128, 2, 2), Csp(256, 3, 2)])
        self.laterals = nn.ModuleList(nn.Conv2d(channels, NECK, 1) for channels in (128, 256, 512))
        self.heads = nn.ModuleList(Head(len(self.classes) + 4 * BINS) for _ in STRIDES)

        self.level_sizes = tuple((input_size[0] // stride, input_size[1] // stride) for stride in STRIDES)
        centres = []
        for height, width in self.level_sizes:
            y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            centres.append(torch.stack((x, y, x, y)).flatten(1))
        cells = [height * width for height, width in self.level_sizes]
        self.cells = sum(cells)  # M
        self.register_buffer("points", torch.cat(centres, 1), persistent=False)
        self.register_buffer(
            "strides", torch.tensor(STRIDES).repeat_interleave(torch.tensor(cells)).float(), persistent=False
        )
        self.register_buffer("sides", torch.tensor([[-1.0], [-1.0], [1.0], [1.0]]), persistent=False)
        self.register_buffer("bins", torch.arange(BINS).float()[:, None], persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = functional.max_pool2d(_leaky(self.stem(images)), 3, 2, 1)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        fine, middle, coarse = (
            lateral(level) for lateral, level in zip(self.laterals, levels[1:], strict=True)
        )
        middle = middle + _double(coarse)
        fine = fine + _double(middle)
        middle = middle + functional.avg_pool2d(fine, 2)
        coarse = coarse + functional.avg_pool2d(middle, 2)
        return self.heads[0](fine), self.heads[1](middle), self.heads[2](coarse)

    def decode(self, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Decode, in float16 as well: distances stay in cells, which are small, until the last product."""
        logits, distributions = self._split(raw)
        distances = (distributions.softmax(3) @ self.bins).reshape(-1, 4, self.cells)
        boxes = (self.points + distances * self.sides) * self.strides
        best = logits if len(self.classes) == 1 else logits.amax(1)
        return boxes.transpose(1, 2), best.reshape(-1, self.cells).sigmoid()

    def loss(self, raw: Sequence[Tensor], targets: Sequence[Targets]) -> Tensor:
        """Quality focal, distribution focal and GIoU loss of each image (see `losses.detection_losses`).

        Boxes carry no class: with several, a cell's best class, which is its score, is taken for the object's.
        """
        logits, distributions = self._split(raw)
        return detection_losses(
            logits.amax(1),
            distributions,
            targets,
            points=self.points[:2].T,
            strides=self.strides,
            level_sizes=self.level_sizes,
        )

    def distillation_loss(self, raw: Sequence[Tensor], teacher_raw: Sequence[Tensor]) -> Tensor:
        """Divergence of each image's scores and distance distributions from the teacher's, ``(N,)``."""
        return dense_distillation_losses(*self._split(raw), *self._split(teacher_raw))

    def class_rows(self, kept: Sequence[int]) -> dict[str, list[int]]:
        """Tensor of the state dict -> rows of the classes `kept` and of the box (see `classes.keep_classes`)."""
        rows = [*kept, *range(len(self.classes), len(self.classes) + 4 * BINS)]
        return {
            f"heads.{level}.output.{name}": rows
            for level in range(len(STRIDES))
            for name in ("weight", "bias")
        }

    def _split(self, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return class logits ``(N, classes, M)`` and logits of the distances ``(N, 4, M, BINS)``."""
        channels = [len(self.classes), 4 * BINS]
        # Reshapes to constants rather than `flatten`: no Shape operation in the exported graph.
        levels = [
            level.reshape(-1, sum(channels), height * width)
            for level, (height, width) in zip(raw, self.level_sizes, strict=True)
        ]
        logits, distances = torch.split(torch.cat(levels, 2), channels, 1)
        return logits, distances.reshape(-1, 4, BINS, self.cells).transpose(2, 3)


def _leaky(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, LEAK)


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
