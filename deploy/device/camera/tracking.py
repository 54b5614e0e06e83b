"""Who is who from frame to frame: overlap with where each box would be at constant velocity.

As SORT does it (Bewley et al. 2016, arXiv:1602.00763), with a smoothed velocity instead of its Kalman filter
and the best overlap first instead of an optimal assignment: it takes microseconds on the smallest board.
"""

import collections
import statistics
from typing import Deque, List

import numpy as np

LEAST_IOU = 0.2  # of a box with the place where its track is expected
FORGOTTEN_AFTER = 30  # frames without a box
VELOCITY_GAIN = 0.3  # share of a new measurement in the velocity
SMOOTHED_OVER = 15  # frames, half a second: longer than a detector's flicker, shorter than a person's stay


class _Track:
    def __init__(self, identity: int, box: np.ndarray, number: int) -> None:
        self.identity = identity
        self.number = number  # frame of its last box
        self._box = box
        self._velocity = np.zeros(2)  # of the centre, pixels a frame
        self._boxes = 1

    def expected(self, number: int) -> np.ndarray:
        """Its box ``(4,)`` in a frame."""
        return self._box + np.tile(self._velocity * (number - self.number), 2)

    def follow(self, box: np.ndarray, number: int) -> None:
        moved = (box[:2] + box[2:] - self._box[:2] - self._box[2:]) / 2 / (number - self.number)
        gain = max(1 / self._boxes, VELOCITY_GAIN)  # the mean at first
        self._velocity += gain * (moved - self._velocity)
        self._box, self.number = box, number
        self._boxes += 1


class Tracker:
    """Gives each box an id, the same one for as long as it follows the same thing. Ids start at 1."""

    def __init__(self) -> None:
        self._tracks: List[_Track] = []
        self._given = 0

    def update(self, boxes: np.ndarray, number: int) -> List[int]:
        """The ids of a frame's boxes.

        Args:
            boxes: ``(N, 4)`` xyxy.
            number: of the frame, larger than the one before; numbers may be left out.
        """
        self._tracks = [track for track in self._tracks if number - track.number <= FORGOTTEN_AFTER]
        ids = [0] * len(boxes)
        places = np.array([track.expected(number) for track in self._tracks]).reshape(-1, 4)
        overlap = iou(places, boxes.astype(float))  # (tracks, boxes)
        while overlap.size:
            row, column = divmod(int(overlap.argmax()), len(boxes))
            if overlap[row, column] < LEAST_IOU:
                break
            self._tracks[row].follow(boxes[column].astype(float), number)
            ids[column] = self._tracks[row].identity
            overlap[row], overlap[:, column] = 0, 0
        for column, identity in enumerate(ids):
            if not identity:
                self._given += 1
                ids[column] = self._given
                self._tracks.append(_Track(self._given, boxes[column].astype(float), number))
        return ids


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair: ``(N, 4)`` and ``(M, 4)`` xyxy give ``(N, M)``."""
    least = np.maximum(first[:, None, :2], second[None, :, :2])
    most = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(most - least, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    together = areas[0][:, None] + areas[1][None] - shared
    found: np.ndarray = shared / np.maximum(together, 1e-9)
    return found


class Smoothed:
    """The median of the last counts: a person that one frame misses has not left."""

    def __init__(self) -> None:
        self._counts: Deque[int] = collections.deque(maxlen=SMOOTHED_OVER)

    def update(self, count: int) -> int:
        self._counts.append(count)
        return int(statistics.median_low(self._counts))
