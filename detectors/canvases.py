"""Letterboxed images of a data set, decoded once as long as they fit into memory."""

import threading

import numpy as np
from numpy.typing import NDArray

from edgeprune.data.dataset import Dataset
from edgeprune.deploy.device.imaging import Placement, Preprocessing, letterbox

CACHE_BYTES = 2 << 30  # 7,000 canvases of 320 x 320


class Canvases:
    """The images of `dataset` as the network will see them, before normalising. Safe to read from threads.

    Args:
        size: ``(H, W)`` of the canvas.
        limit_bytes: what does not fit is decoded each time.
    """

    def __init__(
        self,
        dataset: Dataset,
        size: tuple[int, int],
        preprocessing: Preprocessing,
        limit_bytes: int = CACHE_BYTES,
    ) -> None:
        self.dataset = dataset
        self.size = size
        self.preprocessing = preprocessing
        self._free = limit_bytes // (size[0] * size[1] * 3)
        self._kept: dict[int, tuple[NDArray[np.uint8], Placement]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.dataset.samples)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], Placement]:
        """Return the canvas ``(H, W, 3)`` uint8 BGR, not to be written to, and where the image lies in it.

        Raises:
            DataError: If the image does not decode.
        """
        kept = self._kept.get(index)
        if kept is None:
            kept = letterbox(self.dataset.image(index), self.size, self.preprocessing)
            with self._lock:
                if self._free > 0 and index not in self._kept:
                    self._free -= 1
                    self._kept[index] = kept
        return kept
