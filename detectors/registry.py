"""Detectors by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from edgeprune.data.assets import fetch
from edgeprune.detectors.nanodet import NanoDetG
from edgeprune.detectors.protocol import DetectorError
from edgeprune.detectors.weights import load_nanodet


@dataclass(frozen=True)
class Registered:
    """How a detector is made."""

    build: Callable[[tuple[int, int], Sequence[str]], nn.Module]
    """``(input size (H, W), classes)``: with random weights."""
    load: Callable[[Path, tuple[int, int], Sequence[str]], nn.Module]
    """``(weight file, input size, classes)``."""
    asset: str
    """Name of its published weights for `data.assets.fetch`."""


DETECTORS = {"nanodet-g": Registered(NanoDetG, load_nanodet, "nanodet-g")}


def build_detector(name: str, input_size: tuple[int, int], classes: Sequence[str] = ("person",)) -> nn.Module:
    """Build a detector with random weights.

    Args:
        input_size: ``(H, W)``.

    Raises:
        DetectorError: If the name is unknown or the size does not fit.
    """
    return _registered(name).build(input_size, classes)


def load_detector(
    name: str, weights: Path | None, input_size: tuple[int, int], classes: Sequence[str] = ("person",)
) -> nn.Module:
    """Build a detector with trained weights: of a file, or else its published ones.

    Raises:
        DetectorError: If the name is unknown or the size does not fit.
        WeightsError: If the file is missing, damaged or of another network.
        AssetError: If the published weights cannot be had.
    """
    registered = _registered(name)
    return registered.load(fetch(registered.asset) if weights is None else weights, input_size, classes)


def _registered(name: str) -> Registered:
    if name not in DETECTORS:
        raise DetectorError(f"unknown detector {name!r}; known: {', '.join(sorted(DETECTORS))}")
    return DETECTORS[name]
