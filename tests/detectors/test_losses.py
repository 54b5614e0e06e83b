"""The losses against hand calculation, finite differences and straightforward loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask
from torch import Tensor

from edgeprune.detectors import losses
from edgeprune.detectors.protocol import Targets

SIZES = ((8, 8), (4, 4), (2, 2))  # of a 64 x 64 input
STRIDES = torch.tensor([8.0, 16.0, 32.0]).repeat_interleave(torch.tensor([64, 16, 4]))
POINTS = torch.cat(
    [torch.cartesian_prod(torch.arange(h) + 0.5, torch.arange(w) + 0.5).flip(1) for h, w in SIZES]
)
CELLS = len(POINTS)


def detection_losses(logits: Tensor, distributions: Tensor, targets: list[Targets]) -> Tensor:
    return losses.detection_losses(
        logits, distributions, targets, points=POINTS, strides=STRIDES, level_sizes=SIZES
    )


def labels(*boxes: list[float], ignored: int = 0) -> Targets:
    """The last `ignored` boxes are ignored."""
    tensor = torch.tensor(boxes).reshape(-1, 4)
    return Targets(tensor, torch.arange(len(tensor)) >= len(tensor) - ignored)


def random_outputs(images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(images, CELLS, generator=generator),
        torch.randn(images, 4, CELLS, 11, generator=generator),
    )


coordinates = st.floats(0, 60, width=32)
boxes = st.tuples(coordinates, coordinates, st.floats(1, 60, width=32), st.floats(1, 60, width=32)).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@given(st.lists(boxes, min_size=1, max_size=5), st.lists(boxes, min_size=1, max_size=5))
def test_iou_is_that_of_pycocotools(first: list[list[float]], second: list[list[float]]) -> None:
    """`box_iou` agrees with pycocotools' IoU of boxes."""
    a, b = np.array(first), np.array(second)
    expected = mask.iou(
        np.c_[a[:, :2], a[:, 2:] - a[:, :2]], np.c_[b[:, :2], b[:, 2:] - b[:, :2]], [0] * len(b)
    )
    found = losses.box_iou(torch.tensor(first)[:, None], torch.tensor(second))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_giou_by_hand() -> None:
    """Two unit squares, a unit apart: IoU 0, hull 3, union 2, so GIoU -1/3; equal boxes: 1."""
    square, apart = torch.tensor([0.0, 0, 1, 1]), torch.tensor([2.0, 0, 3, 1])
    assert losses.generalized_iou(square, apart).item() == pytest.approx(-1 / 3, abs=1e-5)
    assert losses.generalized_iou(square, square).item() == pytest.approx(1, abs=1e-5)


def test_quality_focal_loss_by_hand() -> None:
    """A score of 0.5 for a quality of 1 costs ln 2 x 0.25; a score equal to the quality costs nothing."""
    zero = torch.zeros(())
    assert losses.quality_focal_loss(zero, torch.ones(())).item() == pytest.approx(math.log(2) / 4)
    assert losses.quality_focal_loss(zero, torch.tensor(0.5)).item() == 0


def test_distribution_focal_loss_is_least_at_the_distance() -> None:
    """The cross-entropy for 3.25 cells is least where 3 has 0.75 and 4 has 0.25: their entropy."""
    distribution = torch.full((11,), 1e-9)
    distribution[3], distribution[4] = 0.75, 0.25
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    distance = torch.tensor(3.25)
    at_optimum = losses.distribution_focal_loss(distribution.log(), distance)
    assert at_optimum.item() == pytest.approx(entropy, abs=1e-5)
    assert losses.distribution_focal_loss(torch.zeros(11), distance).item() == pytest.approx(math.log(11))


def test_gradients_are_those_of_finite_differences() -> None:
    """The parts of the loss have the gradients that finite differences give."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, dtype=torch.float64, generator=generator, requires_grad=True)
    distance = torch.rand(5, dtype=torch.float64, generator=generator) * 9
    corners = torch.tensor([[0.0, 0, 3, 4], [1, 1, 2, 5]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[1.0, 2, 5, 6], [4, 1, 6, 3]], dtype=torch.float64)
    quality = torch.rand(5, 11, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: losses.distribution_focal_loss(x, distance), logits)
    assert torch.autograd.gradcheck(lambda x: losses.quality_focal_loss(x, quality), logits)
    assert torch.autograd.gradcheck(lambda x: losses.generalized_iou(x, other), corners)


@settings(deadline=None, max_examples=50)
@given(st.lists(boxes, max_size=6))
def test_assignment_is_atss(objects: list[list[float]]) -> None:
    """`assign` gives what the paper's algorithm gives, written as loops over boxes, levels and candidates."""
    centres = POINTS * STRIDES[:, None]
    anchors = torch.cat((centres - 2.5 * STRIDES[:, None], centres + 2.5 * STRIDES[:, None]), 1)
    found = losses.assign(anchors, [64, 16, 4], torch.tensor(objects).reshape(-1, 4))
    best = np.full(CELLS, -1.0)
    expected = np.full(CELLS, -1)
    ties = np.zeros(CELLS, bool)
    for number, box in enumerate(objects):
        middle = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
        distance = np.linalg.norm(centres.numpy() - middle, axis=1)
        candidates: list[int] = []
        for start, count in ((0, 64), (64, 16), (80, 4)):
            order = np.argsort(distance[start : start + count], kind="stable")
            candidates += (start + order[:9]).tolist()
            if count > 9 and np.isclose(*np.sort(distance[start : start + count])[8:10], atol=1e-3):
                return  # equally near cells: either choice is right
        overlap = losses.box_iou(anchors[candidates], torch.tensor(box)).numpy()
        threshold = overlap.mean() + overlap.std(ddof=1)
        for cell, value in zip(candidates, overlap, strict=True):
            x, y = centres[cell].tolist()
            if abs(value - threshold) < 1e-5:
                ties[cell] = True
            if value < threshold or not (box[0] < x < box[2] and box[1] < y < box[3]):
                continue
            ties[cell] |= abs(value - best[cell]) < 1e-6
            if value > best[cell]:
                best[cell], expected[cell] = value, number
    np.testing.assert_array_equal(found.numpy()[~ties], expected[~ties])


def test_a_loss_is_of_its_image_alone() -> None:
    """An image's loss is the same alone and beside other images."""
    logits, distributions = random_outputs(3)
    targets = [labels([4, 4, 40, 40]), labels(), labels([0, 0, 12, 60], [30, 30, 60, 60], ignored=1)]
    together = detection_losses(logits, distributions, targets)
    alone = [
        detection_losses(logits[i : i + 1], distributions[i : i + 1], targets[i : i + 1]) for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)


def test_an_image_without_boxes_teaches_background() -> None:
    """Without boxes the loss is finite and its gradient lowers every score."""
    logits, distributions = random_outputs(1)
    logits.requires_grad_()
    loss = detection_losses(logits, distributions, [labels()])
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert logits.grad is not None
    assert (logits.grad > 0).all()


def test_ignored_regions_are_no_background() -> None:
    """Cells in an ignored box have no gradient; the others have one."""
    logits, distributions = random_outputs(1)
    logits.requires_grad_()
    detection_losses(logits, distributions, [labels([0, 0, 32, 64], ignored=1)]).sum().backward()
    assert logits.grad is not None
    in_box = (POINTS * STRIDES[:, None])[:, 0] < 32
    assert (logits.grad[0, in_box] == 0).all()
    assert (logits.grad[0, ~in_box] != 0).all()


def test_descending_the_loss_finds_the_boxes() -> None:
    """Outputs that are fitted to the loss alone decode to the labelled boxes, and to nothing else."""
    logits, distributions = random_outputs(1)
    target = labels([6, 10, 30, 58], [34, 4, 60, 22])
    parameters = [logits.requires_grad_(), distributions.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        detection_losses(logits, distributions, [target]).sum().backward()
        optimizer.step()
    distances = distributions.detach()[0].softmax(2) @ torch.arange(11.0) * STRIDES  # (4, M)
    centres = (POINTS * STRIDES[:, None]).T
    found = torch.cat((centres - distances[:2], centres + distances[2:])).T
    overlap = losses.box_iou(found[:, None], target.boxes).amax(1)
    scores = logits.detach()[0].sigmoid()
    assert losses.box_iou(found[scores > 0.5][:, None], target.boxes).amax(0).min() > 0.95
    assert overlap[scores > 0.5].min() > 0.9
    assert (scores > 0.5).sum() < CELLS / 4


def test_distillation_is_least_at_the_teacher() -> None:
    """Both distillation losses are 0 with no gradient at the teacher's outputs and positive elsewhere."""
    logits, distributions = random_outputs(2)
    boxes, scores = torch.tensor([[[0.0, 0, 9, 9]], [[3, 3, 5, 7]]]), torch.tensor([[0.3], [0.9]])
    for measure, teacher in (
        (losses.dense_distillation_losses, (logits[:, None], distributions)),
        (losses.decoded_distillation_losses, (boxes, scores)),
    ):
        student = [tensor.clone().requires_grad_() for tensor in teacher]
        loss = measure(*student, *teacher)
        loss.sum().backward()
        torch.testing.assert_close(loss.detach(), torch.zeros(2), rtol=0, atol=1e-4)
        if measure is losses.dense_distillation_losses:  # 1 - GIoU has a kink at equal boxes
            for tensor in student:
                assert tensor.grad is not None
                assert tensor.grad.abs().max() < 1e-5
        assert (measure(*(tensor * 0.8 for tensor in teacher), *teacher) > 1e-3).all()
