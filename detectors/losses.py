"""The losses of dense one-class detectors, each image's by itself.

Generalized focal loss (Li et al. 2020, arXiv:2006.04388) with ATSS assignment (Zhang et al. 2020,
arXiv:1912.02424), and distillation from a teacher of the same outputs. Cells are the M places of all levels;
every loss is normalised by its own image's positives, so that an image's loss (and with it the importance of
a channel) does not depend on the rest of the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.detectors.protocol import Targets

CANDIDATES = 9  # ATSS: cells a level that are considered for a box
ANCHOR_SIDE = 5  # ATSS: side of a cell's square anchor, in strides
DISTRIBUTION_WEIGHT = 0.25
GIOU_WEIGHT = 2.0
EPS = 1e-7


def detection_losses(
    logits: Tensor,
    distributions: Tensor,
    targets: Sequence[Targets],
    *,
    points: Tensor,
    strides: Tensor,
    level_sizes: Sequence[tuple[int, int]],
) -> Tensor:
    """Quality focal + 0.25 x distribution focal + 2 x GIoU loss of each image.

    Cells whose centre lies in an ignored box and in no assigned one are left out. An image without boxes has
    the quality focal loss of its background.

    Args:
        logits: ``(N, M)`` class logits.
        distributions: ``(N, 4, M, B)`` logits over distances of 0 to B - 1 cells to left, top, right, bottom.
        targets: of each image.
        points: ``(M, 2)`` centres of the cells, in cells of their level.
        strides: ``(M,)`` input pixels per cell.
        level_sizes: ``(H, W)`` of each level, in cells, in the order of the M cells.

    Returns:
        ``(N,)`` float32.
    """
    cells = [height * width for height, width in level_sizes]
    losses = [
        _image_loss(*image, points=points, strides=strides, cells=cells)
        for image in zip(logits.float(), distributions.float(), targets, strict=True)
    ]
    return torch.stack(losses)


def _image_loss(
    logits: Tensor,
    distributions: Tensor,
    targets: Targets,
    *,
    points: Tensor,
    strides: Tensor,
    cells: list[int],
) -> Tensor:
    centres = points * strides[:, None]
    half = ANCHOR_SIDE / 2 * strides[:, None]
    objects = targets.boxes[~targets.ignore]
    assigned = assign(torch.cat((centres - half, centres + half), 1), cells, objects)
    positive = torch.nonzero(assigned >= 0).squeeze(1)  # (P,)
    counted = ~inside(centres, targets.boxes[targets.ignore]).any(1) | (assigned >= 0)
    quality = torch.zeros_like(logits)
    if not len(positive):
        return (quality_focal_loss(logits, quality) * counted).sum()

    stride = strides[positive, None]
    wanted = objects[assigned[positive]] / stride  # (P, 4), in cells
    bins = distributions.shape[2]
    logits_of_sides = distributions[:, positive].transpose(0, 1)  # (P, 4, B)
    distances = logits_of_sides.softmax(2) @ torch.arange(bins, device=logits.device, dtype=logits.dtype)
    predicted = torch.cat((points[positive] - distances[:, :2], points[positive] + distances[:, 2:]), 1)
    quality[positive] = box_iou(predicted.detach(), wanted).clamp(min=0)
    # Boxes that the class head already believes in count more, as upstream weighs them.
    weight = logits.detach()[positive].sigmoid()
    weight = weight / weight.sum()

    true_distances = torch.cat((points[positive] - wanted[:, :2], wanted[:, 2:] - points[positive]), 1)
    distribution = distribution_focal_loss(logits_of_sides, true_distances.clamp(0, bins - 1 - 0.1)).mean(1)
    return (
        (quality_focal_loss(logits, quality) * counted).sum() / len(positive)
        + DISTRIBUTION_WEIGHT * (distribution * weight).sum()
        + GIOU_WEIGHT * ((1 - generalized_iou(predicted, wanted)) * weight).sum()
    )


def quality_focal_loss(logits: Tensor, quality: Tensor) -> Tensor:
    """Cross-entropy of a score against a quality in [0, 1], times their squared difference, elementwise."""
    entropy = functional.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return entropy * (logits.sigmoid() - quality).square()


def distribution_focal_loss(logits: Tensor, distance: Tensor) -> Tensor:
    """Cross-entropy of distributions ``(..., B)`` against the bins next to a distance ``(...)`` < B - 1."""
    left = distance.long()
    log = logits.log_softmax(-1)
    share = distance - left
    at_left = log.gather(-1, left[..., None]).squeeze(-1)
    at_right = log.gather(-1, left[..., None] + 1).squeeze(-1)
    return -(at_left * (1 - share) + at_right * share)


def assign(anchors: Tensor, cells: Sequence[int], boxes: Tensor) -> Tensor:
    """Adaptive training sample selection: which box each cell has to predict.

    A box's candidates are the 9 cells a level nearest to its centre; of these it takes those whose anchor
    overlaps it by at least mean + standard deviation of the candidates' IoU and whose centre lies in it. A
    cell that several boxes take goes to the one that its anchor overlaps most.

    Args:
        anchors: ``(M, 4)`` xyxy.
        cells: number of cells of each level; they sum to M.
        boxes: ``(K, 4)`` xyxy.

    Returns:
        ``(M,)`` int64: index of the box, -1 for none.
    """
    if not len(boxes):
        return torch.full((len(anchors),), -1, dtype=torch.long, device=anchors.device)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    distance = torch.cdist(
        (boxes[:, :2] + boxes[:, 2:]) / 2, centres, compute_mode="donot_use_mm_for_euclid_dist"
    )
    candidates, start = [], 0
    for count in cells:
        nearest = distance[:, start : start + count].topk(min(CANDIDATES, count), largest=False).indices
        candidates.append(nearest + start)
        start += count
    candidate = torch.cat(candidates, 1)  # (K, C)
    overlap = box_iou(anchors[candidate], boxes[:, None])  # (K, C)
    threshold = overlap.mean(1, keepdim=True) + overlap.std(1, keepdim=True)
    taken = (overlap >= threshold) & inside(centres, boxes).T.gather(1, candidate)
    scores = torch.full_like(distance, -1).scatter(1, candidate, torch.where(taken, overlap, -1.0))  # (K, M)
    best, box = scores.max(0)
    return torch.where(best >= 0, box, -1)


def inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points ``(P, 2)`` lie in boxes ``(K, 4)``, borders excluded: ``(P, K)``."""
    return ((points[:, None] > boxes[:, :2]) & (points[:, None] < boxes[:, 2:])).all(2)


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of boxes ``(..., 4)`` xyxy, pair by pair (broadcast)."""
    shared, union = _shared_and_union(first, second)
    return shared / (union + EPS)


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """GIoU in (-1, 1] of boxes ``(..., 4)`` xyxy, pairwise (Rezatofighi et al. 2019, arXiv:1902.09630)."""
    shared, union = _shared_and_union(first, second)
    sides = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    hull = _area(sides)
    return shared / (union + EPS) - (hull - union) / (hull + EPS)


def _shared_and_union(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    sides = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    shared = _area(sides)
    return shared, _area(first[..., 2:] - first[..., :2]) + _area(second[..., 2:] - second[..., :2]) - shared


def _area(sides: Tensor) -> Tensor:
    width, height = sides.clamp(min=0).unbind(-1)
    return width * height


def dense_distillation_losses(
    logits: Tensor, distributions: Tensor, teacher_logits: Tensor, teacher_distributions: Tensor
) -> Tensor:
    """How far a student's dense outputs are from its teacher's, 0 where they agree.

    The divergence of the class scores at every cell plus that of the distance distributions, weighted by the
    teacher's score: where it sees nothing its boxes mean nothing. Normalised by the sum of those scores.

    Args:
        logits, teacher_logits: ``(N, C, M)``.
        distributions, teacher_distributions: ``(N, 4, M, B)``, logits.

    Returns:
        ``(N,)`` float32.
    """
    scores = teacher_logits.float().sigmoid()
    believed = scores.amax(1)  # (N, M)
    box = functional.kl_div(
        distributions.float().log_softmax(3),
        teacher_distributions.float().log_softmax(3),
        reduction="none",
        log_target=True,
    )
    box = box.sum(3).mean(1)  # (N, M)
    divergence = _score_divergence(logits.float(), scores).sum(1) + box * believed
    return divergence.sum(1) / believed.sum(1).clamp(min=1)


def decoded_distillation_losses(
    boxes: Tensor, scores: Tensor, teacher_boxes: Tensor, teacher_scores: Tensor
) -> Tensor:
    """The same idea for any detector, on what `decode` returns: score divergence and 1 - GIoU of the boxes.

    Args:
        boxes, teacher_boxes: ``(N, M, 4)`` xyxy.
        scores, teacher_scores: ``(N, M)`` in [0, 1].

    Returns:
        ``(N,)`` float32.
    """
    target = teacher_scores.float()
    logits = scores.float().clamp(1e-6, 1 - 1e-6).logit()
    box = 1 - generalized_iou(boxes.float(), teacher_boxes.float())
    divergence = _score_divergence(logits, target) + box * target
    return divergence.sum(1) / target.sum(1).clamp(min=1)


def _score_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence of Bernoulli scores from the target's, elementwise."""
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return entropy + target.xlogy(target) + (1 - target).xlogy(1 - target)
