"""Detection on anchors, as YOLOv2 (`region`) and YOLOv3 (`yolo`) do it: decoding and loss.

Redmon and Farhadi, arXiv:1612.08242 and arXiv:1804.02767. Each cell of each level predicts, for each of its
anchors, an offset of the box's centre, the logarithm of its size over the anchor's, whether there is an object,
and its class. A slot is one anchor of one cell; M counts the slots of all levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.detectors.losses import box_iou, inside
from edgeprune.detectors.protocol import Targets

LARGEST = 2.0  # of the input's sides: no box is decoded larger, so that exp cannot overflow
BOX = 5  # values of a slot before its classes: x, y, width, height, object


@dataclass(frozen=True)
class AnchorLevel:
    """One region or yolo layer."""

    anchors: tuple[tuple[float, float], ...]
    """Width and height of its anchors, input pixels."""
    size: tuple[int, int]
    """``(H, W)`` in cells."""
    scale_xy: float = 1.0
    """Stretches the offsets about the middle of the cell, so that its border can be reached."""


@dataclass(frozen=True)
class AnchorLoss:
    """What the squared errors of YOLOv2, or YOLOv3's entropies, weigh and leave out."""

    ignore_iou: float = 0.6
    """A box that overlaps an object by more is no background, though another slot is responsible."""
    object_scale: float = 5.0
    noobject_scale: float = 1.0
    coord_scale: float = 1.0
    class_scale: float = 1.0


class Anchors(nn.Module):
    """Decoding and loss of all levels together.

    Args:
        levels: in the order of the raw outputs.
        input_size: ``(H, W)`` in pixels.
        classes: number of them.
        softmax: classes compete and confidence follows the IoU (YOLOv2); else each is a score of its own.
    """

    cell: Tensor  # (2, M) left and top of each slot's cell, in cells
    stride: Tensor  # (2, M) input pixels per cell
    anchor: Tensor  # (2, M) width and height, input pixels
    scale: Tensor  # (M,)
    limit: Tensor  # (2, M) of the logarithm of the size

    def __init__(
        self,
        levels: Sequence[AnchorLevel],
        input_size: tuple[int, int],
        classes: int,
        *,
        softmax: bool,
        loss: AnchorLoss,
    ) -> None:
        super().__init__()
        self.levels, self.input_size, self.classes = tuple(levels), input_size, classes
        self.softmax, self.weights = softmax, loss
        sides = torch.tensor([float(input_size[1]), float(input_size[0])])[:, None]
        cells, strides, anchors, scales = [], [], [], []
        for level in self.levels:
            height, width = level.size
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            count = len(level.anchors)
            cells.append(torch.stack((x, y)).flatten(1).float().repeat(1, count))
            strides.append((sides / torch.tensor([[width], [height]])).expand(2, count * height * width))
            anchors.append(torch.tensor(level.anchors).T.repeat_interleave(height * width, 1))
            scales.append(torch.full((count * height * width,), level.scale_xy))
        for name, parts in (("cell", cells), ("stride", strides), ("anchor", anchors), ("scale", scales)):
            self.register_buffer(name, torch.cat(parts, -1), persistent=False)
        self.register_buffer("limit", (LARGEST * sides / self.anchor).log(), persistent=False)

    def decode(self, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return boxes ``(N, M, 4)`` xyxy in input pixels, and each slot's object score times its best class."""
        slots = self._slots(raw)
        corners = torch.cat(self._corners(slots), 1)
        return corners.transpose(1, 2), slots[:, 4].sigmoid() * self._class_scores(slots[:, BOX:])

    def losses(self, raw: Sequence[Tensor], targets: Sequence[Targets]) -> Tensor:
        """Sum of squared errors (YOLOv2), or of entropies for object and class (YOLOv3), of each image: ``(N,)``.

        Boxes carry no class: with several, the best one of the responsible slot is taken to be right.
        """
        slots = self._slots(raw)
        return torch.stack([self._image_loss(*image) for image in zip(slots, targets, strict=True)])

    def _slots(self, raw: Sequence[Tensor]) -> Tensor:
        """Raw outputs as ``(N, 5 + classes, M)``."""
        values = BOX + self.classes
        levels = []
        for level, tensor in zip(self.levels, raw, strict=True):
            count, cells = len(level.anchors), level.size[0] * level.size[1]
            slots = tensor.reshape(-1, count, values, cells).transpose(1, 2)
            levels.append(slots.reshape(-1, values, count * cells))
        return torch.cat(levels, 2)

    def _offsets(self, slots: Tensor) -> Tensor:
        """Centres within their cells, ``(N, 2, M)``."""
        return slots[:, :2].sigmoid() * self.scale - (self.scale - 1) / 2

    def _corners(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        centre = (self._offsets(slots) + self.cell) * self.stride
        half = torch.minimum(slots[:, 2:4], self.limit).exp() * self.anchor / 2
        return centre - half, centre + half

    def _class_scores(self, logits: Tensor) -> Tensor:
        if self.softmax:
            return logits.softmax(1).amax(1)
        return (logits if self.classes == 1 else logits.amax(1)).reshape(-1, self.cell.shape[1]).sigmoid()

    def _image_loss(self, slots: Tensor, targets: Targets) -> Tensor:
        weights = self.weights
        offsets = self._offsets(slots[None])[0]  # (2, M)
        boxes = torch.cat(self._corners(slots[None]), 1)[0].T.detach()  # (M, 4)
        objects = targets.boxes[~targets.ignore]
        overlap = box_iou(boxes[:, None], objects)  # (M, K)
        responsible, wanted = self._responsible(objects)
        background = torch.ones_like(self.scale, dtype=torch.bool)
        if len(objects):
            background = overlap.amax(1) <= weights.ignore_iou
        middles = ((self.cell + 0.5) * self.stride).T
        background &= ~inside(middles, targets.boxes[targets.ignore]).any(1)
        background[responsible] = False

        confidence = slots[4]
        if self.softmax:
            scores = confidence.sigmoid()
            missed = (scores[responsible] - overlap[responsible, wanted]).square()
            false = scores[background].square()
        else:
            missed = functional.softplus(-confidence[responsible])  # entropy against 1
            false = functional.softplus(confidence[background])  # against 0
        loss = weights.object_scale * missed.sum() + weights.noobject_scale * false.sum()

        found = objects[wanted].T  # (4, P)
        size = (found[2:] - found[:2]).clamp(min=1e-3)
        offset = (found[:2] + found[2:]) / 2 / self.stride[:, responsible] - self.cell[:, responsible]
        area = size.prod(0) / (self.input_size[0] * self.input_size[1])
        errors = (offsets[:, responsible] - offset).square().sum(0)
        logarithm = (size / self.anchor[:, responsible]).log()
        errors = errors + (slots[2:4, responsible] - logarithm).square().sum(0)
        loss = loss + weights.coord_scale * ((2 - area) * errors).sum()  # small boxes count more
        if not self.softmax:
            best = slots[BOX:, responsible].amax(0)
            loss = loss + weights.class_scale * functional.softplus(-best).sum()
        return loss

    def _responsible(self, objects: Tensor) -> tuple[Tensor, Tensor]:
        """Slots that have to predict an object ``(P,)``, and which ``(P,)``.

        The cell that holds the object's centre, at the anchor, of all levels, whose shape overlaps it most.
        Where two objects want the same slot, the later one has it.
        """
        if not len(objects):
            nothing = torch.zeros(0, dtype=torch.long, device=objects.device)
            return nothing, nothing
        best_overlap = torch.full((len(objects),), -1.0, device=objects.device)
        slot = torch.zeros(len(objects), dtype=torch.long, device=objects.device)
        size = objects[:, 2:] - objects[:, :2]
        centre = (objects[:, :2] + objects[:, 2:]) / 2
        first = 0
        for level in self.levels:
            height, width = level.size
            anchors = torch.tensor(level.anchors, device=objects.device)
            shared = torch.minimum(size[:, None], anchors).prod(2)  # (K, A), as if they had one centre
            overlap = shared / (size.prod(1)[:, None] + anchors.prod(1) - shared)
            value, index = overlap.max(1)
            cells = torch.tensor([width, height], device=objects.device)
            sides = torch.tensor([self.input_size[1], self.input_size[0]], device=objects.device)
            cell = (centre / sides * cells).long().clamp(min=0).minimum(cells - 1)
            here = first + (index * height + cell[:, 1]) * width + cell[:, 0]
            slot = torch.where(value > best_overlap, here, slot)
            best_overlap = torch.maximum(value, best_overlap)
            first += len(level.anchors) * height * width
        owner = torch.full((first,), -1, dtype=torch.long, device=objects.device)
        order = torch.arange(len(objects), device=objects.device)
        owner = owner.scatter_reduce(0, slot, order, "amax")
        responsible = torch.nonzero(owner >= 0).squeeze(1)
        return responsible, owner[responsible]
