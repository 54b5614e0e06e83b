"""What edgeprune asks of a detector: its loss, decoding and preprocessing around an ordinary `nn.Module`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from edgeprune.data.errors import EdgePruneError
from edgeprune.deploy.device.imaging import Preprocessing

Progress = Callable[[int, int], None]  # (done, total), called as work proceeds


class DetectorError(EdgePruneError):
    """A detector is unknown or cannot do what was asked."""


class Targets(NamedTuple):
    """The labels of one training image."""

    boxes: Tensor  # (K, 4) float32, xyxy in input pixels
    ignore: Tensor  # (K,) bool: neither an object to find nor background (crowds, boxes cut by augmentation)


class Detector(Protocol):
    """A network with its loss, its decoding and its preprocessing; an `nn.Module` in practice.

    A method ``distillation_loss(raw, teacher_raw) -> (N,)`` may be added; without it fine-tuning compares
    what `decode` returns.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what it detects."""

    @property
    def input_size(self) -> tuple[int, int]:
        """``(H, W)`` of the images it takes."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How pixels become its input."""

    def forward(self, images: Tensor) -> Any:
        """Map preprocessed images ``(N, 3, H, W)`` to a tensor, or a tuple, list or dict of them."""

    def loss(self, raw: Any, targets: Sequence[Targets]) -> Tensor:
        """Return ``(N,)``: one loss an image, which must not depend on the other images of the batch."""

    def decode(self, raw: Any) -> tuple[Tensor, Tensor]:
        """Return boxes ``(N, M, 4)``, xyxy in input pixels, and scores ``(N, M)``; is exported."""
