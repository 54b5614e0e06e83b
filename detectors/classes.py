"""Names of the classes of well-known data sets, and keeping some of a detector's classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from edgeprune.detectors.protocol import DetectorError
from edgeprune.detectors.weights import COCO_CLASSES, WeightsError

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on


class _Adaptable(Protocol):
    """A detector of this package: what it takes to build another of other classes, and to carry weights over."""

    classes: tuple[str, ...]
    input_size: tuple[int, int]
    variant: Mapping[str, Any]

    def class_rows(self, kept: Sequence[int]) -> Mapping[str, Sequence[int]]:
        """Tensor of the state dict -> which rows of its first axis belong to the classes `kept`, or to all."""

    def state_dict(self) -> dict[str, Tensor]: ...


T = TypeVar("T", bound=_Adaptable)


def names_of(count: int, asked: Sequence[str], path: Path) -> tuple[str, ...]:
    """Names of the classes of a head with `count` of them: those asked for, or those of COCO or VOC.

    Raises:
        WeightsError: If the head is none of these.
    """
    for known in (tuple(asked), VOC_CLASSES, COCO_CLASSES):
        if count == len(known):
            return known
    raise WeightsError(
        f"{path} is for {count} classes whose names are not known (20 are VOC's, 80 are COCO's, "
        f"{len(asked)} those asked for): ask for all {count}, in its order"
    )


def keep_classes(detector: T, classes: Sequence[str], path: Path) -> T:
    """Build the same detector for some of its classes, with their rows of its head and the rest of its weights.

    Args:
        path: of the weights, for messages.

    Raises:
        WeightsError: If the detector does not know a class.
    """
    if tuple(classes) == detector.classes:
        return detector
    unknown = [name for name in classes if name not in detector.classes]
    if unknown:
        known = ", ".join(detector.classes[:5]) + (", ..." if len(detector.classes) > 5 else "")
        raise WeightsError(
            f"{path} knows {len(detector.classes)} classes ({known}); {unknown[0]!r} is none of them"
        )
    rows = detector.class_rows([detector.classes.index(name) for name in classes])
    kept = type(detector)(detector.input_size, tuple(classes), **detector.variant)  # type: ignore[call-arg]
    assert isinstance(kept, nn.Module)
    kept.load_state_dict(
        {
            name: tensor[list(rows[name])] if name in rows else tensor
            for name, tensor in detector.state_dict().items()
        }
    )
    return kept


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the class names of a detector.

    Raises:
        DetectorError: If there is none or one is named twice.
    """
    names = tuple(classes)
    if not names or len(set(names)) < len(names):
        raise DetectorError(f"a detector needs one class or several different ones, not {list(names)}")
    return names
