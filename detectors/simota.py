"""The loss of YOLOX, each image's by itself, with the assignment SimOTA (Ge et al. 2021, arXiv:2107.08430).

A cell may be assigned to an object where its centre lies in the box or near the box's centre. Of these, an object
takes as many as its best overlaps add up to, those that cost least.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.detectors.losses import EPS, box_iou, inside
from edgeprune.detectors.protocol import Targets

RADIUS = 2.5  # in cells: how near the centre of a box is near
BEST_OVERLAPS = 10  # whose sum is the number of cells an object takes
IOU_COST = 3.0
OUTSIDE_COST = 1e5  # of a cell that is not both in the box and near its centre
IOU_WEIGHT = 5.0


def simota_losses(
    boxes: Tensor,
    objects: Tensor,
    logits: Tensor,
    targets: Sequence[Targets],
    *,
    centres: Tensor,
    strides: Tensor,
) -> Tensor:
    """5 x (1 - IoU^2), and the entropies of object and class, over the number of cells assigned.

    The class is to be the box's IoU. Cells whose centre lies in an ignored box, and that are not assigned, are left
    out of the entropy for objects.

    Args:
        boxes: ``(N, M, 4)`` xyxy, input pixels.
        objects: ``(N, M)`` logits of there being an object.
        logits: ``(N, M)`` of its class.
        targets: of each image.
        centres: ``(M, 2)`` of the cells, input pixels.
        strides: ``(M,)`` input pixels per cell.

    Returns:
        ``(N,)``.
    """
    images = zip(boxes, objects, logits, targets, strict=True)
    return torch.stack([_image_loss(*image, centres=centres, strides=strides) for image in images])


def _image_loss(
    boxes: Tensor, objects: Tensor, logits: Tensor, targets: Targets, *, centres: Tensor, strides: Tensor
) -> Tensor:
    wanted = targets.boxes[~targets.ignore]
    with torch.no_grad():
        assigned = assign(boxes, objects, logits, wanted, centres=centres, strides=strides)
    positive = torch.nonzero(assigned >= 0).squeeze(1)  # (P,)
    counted = ~inside(centres, targets.boxes[targets.ignore]).any(1) | (assigned >= 0)
    truth = (assigned >= 0).to(objects.dtype)
    entropy = functional.binary_cross_entropy_with_logits(objects, truth, reduction="none")
    loss = (entropy * counted).sum()
    overlap = box_iou(boxes[positive], wanted[assigned[positive]])
    loss = loss + IOU_WEIGHT * (1 - overlap.square()).sum()
    loss = loss + functional.binary_cross_entropy_with_logits(
        logits[positive], overlap.detach().clamp(0, 1), reduction="sum"
    )
    return loss / max(1, len(positive))


def assign(
    boxes: Tensor, objects: Tensor, logits: Tensor, wanted: Tensor, *, centres: Tensor, strides: Tensor
) -> Tensor:
    """SimOTA: which object each cell has to predict.

    Args:
        boxes: ``(M, 4)`` as predicted.
        objects, logits: ``(M,)``.
        wanted: ``(K, 4)`` boxes of the objects.

    Returns:
        ``(M,)`` int64: index of the object, -1 for none.
    """
    found = torch.full((len(boxes),), -1, dtype=torch.long, device=boxes.device)
    if not len(wanted):
        return found
    middles = (wanted[:, :2] + wanted[:, 2:]) / 2
    within = inside(centres, wanted)  # (M, K)
    near = ((centres[:, None] - middles).abs() < RADIUS * strides[:, None, None]).all(2)
    candidate = torch.nonzero((within | near).any(1)).squeeze(1)  # (C,)
    if not len(candidate):
        return found
    overlap = box_iou(boxes[candidate, None], wanted)  # (C, K)
    score = (objects[candidate].sigmoid() * logits[candidate].sigmoid()).sqrt()
    cost = -score.clamp(min=EPS).log()[:, None] - IOU_COST * (overlap + 1e-8).log()
    cost = cost + OUTSIDE_COST * ~(within & near)[candidate]

    best = overlap.topk(min(BEST_OVERLAPS, len(candidate)), 0).values
    counts = best.sum(0).long().clamp(min=1, max=len(candidate))  # (K,)
    rank = cost.argsort(dim=0, stable=True).argsort(dim=0)
    takes = rank < counts  # (C, K)
    # A cell that several objects take goes to the one where it costs least.
    chosen = cost.masked_fill(~takes, torch.inf).min(1)
    taken = takes.any(1)
    found[candidate[taken]] = chosen.indices[taken]
    return found
