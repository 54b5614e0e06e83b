"""Detectors by name: those of this package, any Darknet `.cfg`, and a user's own function."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from edgeprune.data.assets import ASSETS, fetch
from edgeprune.data.files import atomic_path
from edgeprune.detectors.classes import keep_classes
from edgeprune.detectors.darknet import BORDERS, build_darknet, load_darknet
from edgeprune.detectors.nanodet import NanoDetG
from edgeprune.detectors.own import build_own, is_own, load_own
from edgeprune.detectors.protocol import DetectorError
from edgeprune.detectors.tiny_yolov2 import TinyYoloV2, load_tiny_yolov2
from edgeprune.detectors.weights import WeightsError, check_state_dict, load_nanodet, read_state_dict
from edgeprune.detectors.yolox import YoloX, load_yolox

METADATA = "edgeprune"  # key of a saved detector's description in its safetensors file


@dataclass(frozen=True)
class Registered:
    """How a detector is made."""

    build: Callable[..., nn.Module]
    """``(input size (H, W), classes, **variant)``: with random weights."""
    load: Callable[[Path, tuple[int, int], Sequence[str]], nn.Module]
    """``(weight file, input size, classes)``."""
    asset: str | None = None
    """Name of its published weights for `data.assets.fetch`, where they can be had."""


def _yolox(**size: Any) -> Registered:
    return Registered(partial(YoloX, **size), partial(load_yolox, **size))


DETECTORS = {
    "nanodet-g": Registered(NanoDetG, load_nanodet, "nanodet-g"),
    "tiny-yolov2": Registered(TinyYoloV2, load_tiny_yolov2),
    # The same where the border that the weights were trained with is not that of most files of their kind.
    **{
        f"tiny-yolov2-{border}": Registered(
            partial(TinyYoloV2, border=border), partial(load_tiny_yolov2, border=border)
        )
        for border in BORDERS
    },
    "yolox-nano": _yolox(width=16, depthwise=True),
    "yolox-tiny": _yolox(width=24),
    "yolox-s": _yolox(width=32),
}


def build_detector(
    name: str,
    input_size: tuple[int, int],
    classes: Sequence[str] = ("person",),
    variant: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a detector with random weights.

    Args:
        name: a registered one, a `.cfg` file, ``package.module:function`` or ``file.py:function``.
        input_size: ``(H, W)``.
        variant: what its `variant` said, to build the same again.

    Raises:
        DetectorError: If the name is unknown or the size does not fit.
    """
    return _registered(name).build(input_size, classes, **(variant or {}))


def load_detector(
    name: str, weights: Path | None, input_size: tuple[int, int], classes: Sequence[str] = ("person",)
) -> nn.Module:
    """Build a detector with trained weights: of a file, or else its published ones.

    A user's own detector without a file is as its function returns it. Where the file knows more classes, the rows
    of those asked for are kept; if their scores are then no longer what was trained, as with a softmax over
    classes, the detector's attribute `untrained` is true.

    Raises:
        DetectorError: If the name is unknown or the size does not fit.
        WeightsError: If the file is missing, damaged, of another network or lacks a class.
        AssetError: If the published weights cannot be had.
    """
    registered = _registered(name)
    if weights is None and registered.asset is None:
        if not is_own(name):
            raise WeightsError(f"{name} has no published weights here: give --weights")
        return registered.build(input_size, classes)
    path = fetch(registered.asset) if weights is None and registered.asset else weights
    assert path is not None
    if (saved := _description(path)) is not None:
        return _load_saved(path, saved, name, input_size, classes)
    return registered.load(path, input_size, classes)


def published_files(name: str) -> dict[str, str] | None:
    """SHA-256 by file of a detector's published weights; None where there are none here."""
    asset = _registered(name).asset
    return dict(ASSETS[asset].files) if asset else None


def save_weights(path: Path, name: str, detector: nn.Module) -> None:
    """Write a detector's weights, its classes and variant beside them, for `load_detector`.

    Raises:
        EdgePruneError: If it cannot be written.
    """
    description = {
        "detector": name,
        "classes": list(detector.classes),  # type: ignore[arg-type]
        "variant": dict(getattr(detector, "variant", {})),
    }
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in detector.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, {METADATA: json.dumps(description)})


def slug(name: str) -> str:
    """A detector's name as part of a file name: of a path or module, its last part."""
    return Path(name.replace(":", "-")).name.removesuffix(".cfg").replace(".py-", "-")


def _description(path: Path) -> dict[str, Any] | None:
    """What `save_weights` wrote beside the weights; None for other files."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get(METADATA)
        return None if written is None else dict(json.loads(written))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is no safetensors file, or a damaged one: {error}") from error


def _load_saved(
    path: Path, saved: Mapping[str, Any], name: str, input_size: tuple[int, int], classes: Sequence[str]
) -> nn.Module:
    try:
        if saved["detector"] != name:
            raise WeightsError(f"{path} holds the weights of {saved['detector']}, not of {name}")
        detector = build_detector(name, input_size, tuple(saved["classes"]), saved["variant"])
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{path}: its description is damaged ({error!r})") from error
    state = read_state_dict(path)
    check_state_dict(state, detector.state_dict(), path)
    detector.load_state_dict(state)
    if tuple(classes) == detector.classes:
        return detector
    if not hasattr(detector, "class_rows"):
        raise WeightsError(f"{path} is for the classes {', '.join(saved['classes'])}: ask for these")
    return keep_classes(detector, classes, path)


def _registered(name: str) -> Registered:
    if name in DETECTORS:
        return DETECTORS[name]
    if name.endswith(".cfg"):
        return Registered(build_darknet(name), partial(load_darknet, name))
    if is_own(name):
        return Registered(build_own(name), partial(load_own, name))
    raise DetectorError(
        f"unknown detector {name!r}; known: {', '.join(sorted(DETECTORS))}, any Darknet .cfg file, and your own as "
        "package.module:function or file.py:function"
    )
