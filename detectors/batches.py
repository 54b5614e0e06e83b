"""Training batches: letterboxed, augmented, the same for a seed and epoch with any number of workers."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.deploy.device.imaging import Placement, normalise
from edgeprune.detectors.canvases import Canvases
from edgeprune.detectors.protocol import Targets

SCALE = (0.7, 1.4)  # of the letterboxed image, drawn evenly in the logarithm
SHIFT = 0.1  # of the canvas' side, either way
BRIGHTNESS = 16  # grey levels, either way
CONTRAST = 0.2  # of the pixel values, either way
SATURATION = 0.3  # of the distance from grey, either way
GREY = (0.114, 0.587, 0.299)  # of blue, green, red (ITU-R BT.601)
VISIBLE = 0.3  # share of a box that must stay in the canvas for it to be learnt; below, it is ignored
MOSAIC_CENTRE = (0.3, 0.7)  # of the canvas' side: where the four images of a mosaic meet
PREFETCH = 2  # batches prepared ahead


@dataclass(frozen=True)
class Batch:
    """One process' part of a global batch."""

    images: Tensor
    """``(N, 3, H, W)`` float32, preprocessed."""
    targets: list[Targets]
    """Of each image; no boxes where it has no labels."""
    labelled: Tensor
    """``(N,)`` bool."""
    global_size: int
    """Images of all processes."""


@dataclass(frozen=True)
class Augmented:
    """A canvas after augmentation, and its boxes."""

    canvas: NDArray[np.uint8]
    """``(H, W, 3)``."""
    boxes: NDArray[np.float32]
    """``(K, 4)`` xyxy, canvas pixels, clipped to the canvas."""
    ignore: NDArray[np.bool_]
    """``(K,)``."""


def batches(
    labelled: Canvases,
    unlabelled: Sequence[Canvases] = (),
    *,
    batch_size: int,
    augmentation: tuple[int, int] | None,
    mosaic: float = 0.0,
    workers: int = 2,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield all images once, in batches.

    Args:
        unlabelled: further images, whose labels, if any, are not used.
        batch_size: of the global batch; the last one may be smaller.
        augmentation: ``(seed, epoch)`` of order and augmentation; None for the given order and plain images.
        mosaic: share of the augmented images that are put together from four, itself and three others.
        workers: threads that prepare images.
        rank, world_size: of the global batch, this process gets every `world_size`-th image from `rank` on.

    Raises:
        DataError: If an image does not decode.
    """
    sources = (labelled, *unlabelled)
    places = [(source, index) for source, canvases in enumerate(sources) for index in range(len(canvases))]
    order: Sequence[int] = range(len(places))
    if augmentation is not None:
        order = np.random.default_rng(augmentation).permutation(len(places)).tolist()

    def prepare(place: int) -> tuple[NDArray[np.float32], Targets, bool]:
        source, index = places[place]
        generator = None if augmentation is None else np.random.default_rng((*augmentation, place))
        if generator is not None and mosaic and generator.random() < mosaic:
            example = _mosaic(sources[source], index, generator)
        else:
            example = _example(sources[source], index, generator)
        image = normalise(example.canvas, sources[source].preprocessing)
        keep = slice(None) if source == 0 else slice(0)
        targets = Targets(torch.from_numpy(example.boxes[keep]), torch.from_numpy(example.ignore[keep]))
        return image, targets, source == 0

    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[tuple[list[Future[Any]], int]] = deque()
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ahead.append(([pool.submit(prepare, place) for place in chosen[rank::world_size]], len(chosen)))
            if len(ahead) > PREFETCH:
                yield _collate(*ahead.popleft(), labelled.size)
        while ahead:
            yield _collate(*ahead.popleft(), labelled.size)


def _collate(futures: list["Future[Any]"], global_size: int, size: tuple[int, int]) -> Batch:
    prepared = [future.result() for future in futures]
    images = [image for image, _, _ in prepared] or [np.empty((0, 3, *size), np.float32)]
    return Batch(
        torch.from_numpy(np.concatenate(images)),
        [targets for _, targets, _ in prepared],
        torch.tensor([has_labels for _, _, has_labels in prepared], dtype=torch.bool),
        global_size,
    )


def _example(canvases: Canvases, index: int, generator: np.random.Generator | None) -> Augmented:
    canvas, placement = canvases[index]
    boxes, ignore = _canvas_boxes(canvases, index, placement), canvases.dataset.samples[index].ignore
    if generator is None:
        return Augmented(canvas, boxes, ignore)
    pad_value = canvases.preprocessing.pad_value
    return augment(canvas, placement, boxes, ignore, pad_value=pad_value, generator=generator)


def _canvas_boxes(canvases: Canvases, index: int, placement: Placement) -> NDArray[np.float32]:
    scale = np.array([placement.scale_x, placement.scale_y] * 2, np.float32)
    offset = np.array([placement.left, placement.top] * 2, np.float32)
    boxes: NDArray[np.float32] = canvases.dataset.samples[index].boxes * scale + offset
    return boxes


def _mosaic(canvases: Canvases, index: int, generator: np.random.Generator) -> Augmented:
    """Four images, each augmented, in the quarters of one canvas (Bochkovskiy et al. 2020, arXiv:2004.10934).

    Each quarter shows a window of its image at the size it would have alone.
    """
    height, width = canvases.size
    x, y = (generator.uniform(*MOSAIC_CENTRE, 2) * (width, height)).astype(int).tolist()
    quarters = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    whole = np.empty((height, width, 3), np.uint8)
    boxes, ignore = [], []
    others = generator.integers(0, len(canvases), 3).tolist()
    for member, (left, top, right, bottom) in zip([index, *others], quarters, strict=True):
        canvas, placement = canvases[member]
        moved, moved_boxes = _move(
            canvas,
            placement,
            _canvas_boxes(canvases, member, placement),
            pad_value=canvases.preprocessing.pad_value,
            generator=generator,
        )
        from_left = int(generator.integers(0, width - (right - left) + 1))
        from_top = int(generator.integers(0, height - (bottom - top) + 1))
        window = moved[from_top : from_top + bottom - top, from_left : from_left + right - left]
        whole[top:bottom, left:right] = window
        shifted = moved_boxes + np.tile([left - from_left, top - from_top], 2)
        kept, kept_ignore = _cut(shifted, canvases.dataset.samples[member].ignore, (left, top, right, bottom))
        boxes.append(kept)
        ignore.append(kept_ignore)
    return Augmented(whole, np.concatenate(boxes), np.concatenate(ignore))


def augment(
    canvas: NDArray[np.uint8],
    placement: Placement,
    boxes: NDArray[np.float32],
    ignore: NDArray[np.bool_],
    *,
    pad_value: int,
    generator: np.random.Generator,
) -> Augmented:
    """Flip, scale and shift, and vary the colours of the image in a canvas, never of its padding.

    Boxes that leave the canvas are dropped; those of which less than 30 % stays in it are ignored.

    Args:
        canvas: ``(H, W, 3)`` uint8 BGR.
        boxes: ``(K, 4)`` xyxy, canvas pixels.
        ignore: ``(K,)``.
    """
    moved, whole = _move(canvas, placement, boxes, pad_value=pad_value, generator=generator)
    return Augmented(moved, *_cut(whole, ignore, (0, 0, canvas.shape[1], canvas.shape[0])))


def _move(
    canvas: NDArray[np.uint8],
    placement: Placement,
    boxes: NDArray[np.float32],
    *,
    pad_value: int,
    generator: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A canvas flipped, scaled, shifted and recoloured, and its boxes, which may reach outside."""
    size = np.array([canvas.shape[1], canvas.shape[0]], np.float64)
    factor = np.full(2, np.exp(generator.uniform(*np.log(SCALE))))
    if generator.random() < 0.5:
        factor[0] = -factor[0]
    # Continuous coordinates: x -> factor * x + offset, about the centre of the canvas.
    offset = size / 2 * (1 - factor) + generator.uniform(-SHIFT, SHIFT, 2) * size
    # warpAffine counts pixels at their centres.
    shift = offset + (factor - 1) / 2
    moved: NDArray[np.uint8] = cv2.warpAffine(
        _recolour(canvas, placement, generator),
        np.array([[factor[0], 0, shift[0]], [0, factor[1], shift[1]]]),
        (canvas.shape[1], canvas.shape[0]),
        flags=cv2.INTER_LINEAR,
        borderValue=(pad_value,) * 3,
    )

    corners = boxes.reshape(-1, 2, 2) * factor + offset  # (K, 2, 2)
    return moved, np.concatenate([corners.min(1), corners.max(1)], 1)


def _cut(
    boxes: NDArray[np.float64], ignore: NDArray[np.bool_], bounds: tuple[int, int, int, int]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Clip boxes to bounds (xyxy); drop those outside and ignore those mostly outside."""
    left, top, right, bottom = bounds
    clipped = np.clip(boxes, (left, top, left, top), (right, bottom, right, bottom))
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    sides = clipped[:, 2:] - clipped[:, :2]
    stays = (sides >= 1).all(1)
    cut = np.prod(sides, axis=1) < VISIBLE * area
    return clipped[stays].astype(np.float32), (ignore | cut)[stays]


def _recolour(
    canvas: NDArray[np.uint8], placement: Placement, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Vary brightness, contrast and saturation of the image within its canvas."""
    contrast = 1 + generator.uniform(-CONTRAST, CONTRAST)
    saturation = 1 + generator.uniform(-SATURATION, SATURATION)
    brightness = generator.uniform(-BRIGHTNESS, BRIGHTNESS)
    mixing = contrast * (saturation * np.eye(3) + (1 - saturation) * np.array(GREY))
    right = placement.left + round(placement.width * placement.scale_x)
    bottom = placement.top + round(placement.height * placement.scale_y)
    image = canvas[placement.top : bottom, placement.left : right]
    recoloured: NDArray[np.uint8] = canvas.copy()
    recoloured[placement.top : bottom, placement.left : right] = cv2.transform(
        image, np.column_stack([mixing, np.full(3, brightness)])
    )
    return recoloured
