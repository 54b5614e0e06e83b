"""Pixels in, boxes out: image loading, letterbox, normalisation, NMS; here once, for host and devices alike.

Coordinates are continuous: pixel column ``i`` covers ``[i, i + 1)``. Boxes are ``(x1, y1, x2, y2)``.
"""

import os
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

try:
    import cv2
except ImportError:  # Pillow then: a board without JetPack's OpenCV
    cv2 = None  # type: ignore[assignment]

IMAGE_LIBRARY = "pillow" if cv2 is None else "opencv " + cv2.__version__


class ImageError(Exception):
    """An image file is missing or does not decode."""


class Preprocessing(NamedTuple):
    """How pixels become the network's input."""

    color: str = "bgr"  # channel order that the network expects: "bgr" or "rgb"
    mean: Tuple[float, float, float] = (0.0, 0.0, 0.0)  # 0-255 units, in `color` order
    std: Tuple[float, float, float] = (1.0, 1.0, 1.0)  # 0-255 units, in `color` order
    pad_value: int = 0  # 0-255, before normalising, all channels
    resize: str = "letterbox"  # "letterbox" (ratio kept, centred), "letterbox-top-left" or "stretch"

    def to_json(self) -> Dict[str, Any]:
        return {**self._asdict(), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, record: Dict[str, Any]) -> "Preprocessing":
        """Read what `to_json` wrote.

        Raises:
            ValueError: If a field is missing, unknown or out of its range.
        """
        if set(record) != set(cls._fields):
            raise ValueError("preprocessing needs exactly {}; got {}".format(cls._fields, sorted(record)))
        mean, std = (tuple(float(value) for value in record[name]) for name in ("mean", "std"))
        if record["color"] not in ("bgr", "rgb"):
            raise ValueError("color is 'bgr' or 'rgb', not {!r}".format(record["color"]))
        if record["resize"] not in ("letterbox", "letterbox-top-left", "stretch"):
            raise ValueError("unknown resize {!r}".format(record["resize"]))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError("mean and std need three values each, std above 0")
        if not 0 <= record["pad_value"] <= 255:
            raise ValueError("pad_value {} is outside 0 to 255".format(record["pad_value"]))
        return cls(record["color"], mean, std, int(record["pad_value"]), record["resize"])


class Placement(NamedTuple):
    """Where the image lies in the canvas: canvas = original * scale + offset, per axis."""

    scale_x: float
    scale_y: float
    left: int  # canvas pixels
    top: int  # canvas pixels
    width: int  # of the original, pixels
    height: int  # of the original, pixels


class Thresholds(NamedTuple):
    """What is kept of the network's candidates. The defaults are those of every AP in this project."""

    score: float = 0.01  # candidates need more
    candidates: int = 1000  # best ones that enter NMS
    iou: float = 0.6  # NMS removes a box that overlaps a better one by more
    detections: int = 300  # at most, per image


def load_image(path: str) -> np.ndarray:
    """Decode an image file as stored (an EXIF rotation is not applied: labels refer to stored pixels).

    Returns:
        ``(H, W, 3)`` uint8, BGR.

    Raises:
        ImageError: If the file is missing or is no image.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ImageError("no image file at {}".format(path))
    if cv2 is not None:
        image: Optional[np.ndarray] = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise ImageError("{} does not decode as an image".format(path))
        return image
    from PIL import Image

    try:
        with Image.open(path) as file:
            return np.ascontiguousarray(np.asarray(file.convert("RGB"))[:, :, ::-1])
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's plugins raise all three on broken files
        raise ImageError("{} does not decode as an image ({})".format(path, error)) from None


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bilinear, pixel centres aligned, not antialiased: cv2's INTER_LINEAR."""
    if image.shape[:2] == (height, width):
        return image
    if cv2 is not None:
        resized: np.ndarray = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        return resized
    from PIL import Image

    # Pillow's own resize antialiases; its affine transform samples the same points as cv2.
    scale_x, scale_y = image.shape[1] / width, image.shape[0] / height
    affine = (scale_x, 0, 0, 0, scale_y, 0)
    source = Image.fromarray(image)
    return np.asarray(source.transform((width, height), Image.AFFINE, affine, resample=Image.BILINEAR))


def letterbox(
    image: np.ndarray, size: Tuple[int, int], preprocessing: Preprocessing
) -> Tuple[np.ndarray, Placement]:
    """Fit an image into the network's input.

    Args:
        image: ``(H, W, 3)`` uint8.
        size: ``(H, W)`` of the canvas.

    Returns:
        The canvas, ``(H, W, 3)`` uint8 in the image's channel order, and where the image lies in it.
    """
    height, width = image.shape[:2]
    canvas_height, canvas_width = size
    if preprocessing.resize == "stretch":
        resized = _resize(image, canvas_width, canvas_height)
        return resized, Placement(canvas_width / width, canvas_height / height, 0, 0, width, height)

    scale = min(canvas_width / width, canvas_height / height)
    new_width = min(max(int(round(width * scale)), 1), canvas_width)
    new_height = min(max(int(round(height * scale)), 1), canvas_height)
    left = top = 0
    if preprocessing.resize == "letterbox":
        left, top = (canvas_width - new_width) // 2, (canvas_height - new_height) // 2
    canvas = np.full((canvas_height, canvas_width, 3), preprocessing.pad_value, np.uint8)
    canvas[top : top + new_height, left : left + new_width] = _resize(image, new_width, new_height)
    return canvas, Placement(new_width / width, new_height / height, left, top, width, height)


def normalise(canvas: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Turn a BGR canvas ``(H, W, 3)`` uint8 into the network's input ``(1, 3, H, W)`` float32, contiguous."""
    planes = canvas.transpose(2, 0, 1)
    if preprocessing.color == "rgb":
        planes = planes[::-1]
    values: np.ndarray = planes.astype(np.float32, order="C")
    values -= np.array(preprocessing.mean, np.float32)[:, None, None]
    values /= np.array(preprocessing.std, np.float32)[:, None, None]
    return values.reshape((1,) + values.shape)


NMS_BLOCK = 64  # candidates resolved together: enough for numpy, few enough to skip what is already removed


def nms(boxes: np.ndarray, scores: np.ndarray, iou: float, limit: Optional[int] = None) -> np.ndarray:
    """Greedy non-maximum suppression, the same result as one box at a time.

    A box goes when it overlaps a kept, better one by more than `iou`; of equal scores the earlier is better.

    Args:
        boxes: ``(K, 4)`` xyxy.
        scores: ``(K,)``.
        limit: stop after so many kept boxes.

    Returns:
        Indices of the kept boxes, best first.
    """
    order: np.ndarray = np.argsort(-scores, kind="stable")
    kept: np.ndarray = order[_survivors(boxes[order], iou, len(order) if limit is None else limit)]
    return kept


def _survivors(boxes: np.ndarray, iou: float, limit: int) -> np.ndarray:
    """NMS of boxes ``(K, 4)`` that come best first: indices of the kept ones, `limit` at most.

    The time goes into walking memory that the network has just pushed out of the caches, so few arrays are
    made, and within a block bits of whole numbers say who is removed.
    """
    count = len(boxes)
    limit = min(limit, count)
    corners = np.empty((5, count), boxes.dtype)  # x1, y1, x2, y2, area
    corners[:4] = boxes.T
    np.multiply(corners[2] - corners[0], corners[3] - corners[1], out=corners[4])
    best = np.empty((5, limit + NMS_BLOCK), boxes.dtype)  # the kept ones' corners
    kept: np.ndarray = np.empty(limit + NMS_BLOCK, np.intp)
    found = 0
    for start in range(0, count, NMS_BLOCK):
        if found >= limit:
            break
        block = corners[:, start : start + NMS_BLOCK]
        indices = np.arange(start, min(start + NMS_BLOCK, count))
        if found:
            free = ~_overlaps(best[:, :found], block, iou).any(axis=0)
            block, indices = block[:, free], indices[free]
        chosen = _greedy(_overlaps(block, block, iou))
        best[:, found : found + len(chosen)] = block[:, chosen]
        kept[found : found + len(chosen)] = indices[chosen]
        found += len(chosen)
    return kept[: min(found, limit)]


def _overlaps(first: np.ndarray, second: np.ndarray, iou: float) -> np.ndarray:
    """Whether boxes overlap by more than `iou`: ``(5, N)`` and ``(5, M)`` give ``(N, M)`` bool."""
    one, other = first[:, :, None], second[:, None, :]
    width = np.minimum(one[2], other[2])  # (N, M)
    width -= np.maximum(one[0], other[0])
    height = np.minimum(one[3], other[3])
    height -= np.maximum(one[1], other[1])
    shared = np.maximum(width, 0)
    shared *= np.maximum(height, 0)
    needed = one[4] + other[4]
    needed -= shared  # the union
    needed *= iou
    removes: np.ndarray = shared > needed
    return removes


def _greedy(overlaps: np.ndarray) -> List[int]:
    """Go through candidates ``(N, N)``, best first: each one that is left is kept and removes its row."""
    rows = np.packbits(overlaps, axis=1)
    width, data = rows.shape[1], rows.tobytes()
    chosen, removed, bit = [], 0, 1 << 8 * width
    for index in range(len(rows)):
        bit >>= 1
        if not removed & bit:
            chosen.append(index)
            removed |= int.from_bytes(data[index * width : (index + 1) * width], "big")
    return chosen


DEFAULT_THRESHOLDS = Thresholds()


def postprocess(
    boxes: np.ndarray,
    scores: np.ndarray,
    placement: Placement,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
) -> Tuple[np.ndarray, np.ndarray]:
    """Turn the network's candidates for one image into detections in the original image.

    Candidates that are not finite (a float16 overflow) are dropped.

    Args:
        boxes: ``(M, 4)`` xyxy, input pixels.
        scores: ``(M,)``.

    Returns:
        Boxes ``(K, 4)`` float32 xyxy in original pixels, clipped to the image, and scores ``(K,)`` float32,
        best first.
    """
    chosen = np.flatnonzero(scores > thresholds.score)
    boxes, scores = boxes[chosen], scores[chosen]
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    if not finite.all():
        boxes, scores = boxes[finite], scores[finite]
    order = np.argsort(-scores, kind="stable")[: thresholds.candidates]
    boxes, scores = boxes[order], scores[order]
    kept = _survivors(boxes, thresholds.iou, thresholds.detections)
    found = boxes[kept].astype(np.float32)
    _to_original(found[:, 0::2], placement.left, placement.scale_x, placement.width)
    _to_original(found[:, 1::2], placement.top, placement.scale_y, placement.height)
    return found, scores[kept].astype(np.float32)


def _to_original(values: np.ndarray, offset: int, scale: float, limit: int) -> None:
    """Turn coordinates of the canvas into the original image's, clipped to it, in place."""
    values -= offset
    values /= scale
    np.maximum(values, 0, out=values)
    np.minimum(values, limit, out=values)
