"""Names of the classes of well-known data sets, and keeping some of a detector's classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from edgeprune.detectors.protocol import DetectorError
from edgeprune.detectors.weights import COCO_CLASSES, WeightsError

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on


T = TypeVar("T", bound=nn.Module)


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
        detector: a `Detector` of this package; its method `class_rows` says which rows of which tensors belong to
            some classes, and to all.
        path: of the weights, for messages.

    Raises:
        WeightsError: If the detector does not know a class.
    """
    whole: Any = detector
    if tuple(classes) == whole.classes:
        return detector
    unknown = [name for name in classes if name not in whole.classes]
    if unknown:
        known = ", ".join(whole.classes[:5]) + (", ..." if len(whole.classes) > 5 else "")
        raise WeightsError(
            f"{path} knows {len(whole.classes)} classes ({known}); {unknown[0]!r} is none of them"
        )
    rows = whole.class_rows([whole.classes.index(name) for name in classes])
    kept: T = type(whole)(whole.input_size, tuple(classes), **whole.variant)
    kept.load_state_dict(
        {name: tensor[rows[name]] if name in rows else tensor for name, tensor in whole.state_dict().items()}
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
