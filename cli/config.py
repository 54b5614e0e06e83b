"""What a run was asked to do: the options of `build` and `prune`, as run.json keeps them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides a run's result; the options' help texts say what each means."""

    target: str
    detector: str
    weights: Path | None  # None: the detector's published weights
    classes: str  # separated by commas
    adapt_epochs: int
    input_size: int  # side of the square, pixels
    train: Path | None  # None, with val: the labels that come with edgeprune
    train_images: Path | None
    select: Path | None  # None: a part of train is held out
    unlabelled: tuple[Path, ...]  # folders, videos, or video.avi#FIRST-LAST
    val: Path | None
    val_images: Path | None
    iterations: int
    remove: float  # share of the budget
    budget: str
    schedule: str
    criterion: str
    per: str
    replacement: str
    min_channels: int
    max_layer_ratio: float
    channel_multiple: int | None  # None: the target's
    protect: tuple[str, ...]
    train_device: str
    finetune_epochs: int
    learning_rate: float
    distill: bool
    min_ap: float | None
    stop_ap_drop: float | None
    seed: int
    precision: str

    def __post_init__(self) -> None:
        """Check what one option alone cannot show; ValueError says which options clash."""
        if (self.train is None) != (self.val is None):
            raise ValueError(
                "--train and --val go together: give both, or neither for the labels of edgeprune"
            )
        if not self.class_names:
            raise ValueError("--classes names no class")
        if self.train is None and (self.train_images or self.val_images):
            raise ValueError("--train-images and --val-images need --train and --val")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "BuildConfig":
        """The fields among a command's options. Paths become absolute: a run may go on from elsewhere."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = options[field.name]
            if isinstance(value, list):
                value = tuple(item.absolute() if isinstance(item, Path) else item for item in value)
            values[field.name] = value.absolute() if isinstance(value, Path) else value
        return cls(**values | {"detector": absolute_detector(values["detector"])})

    @property
    def class_names(self) -> tuple[str, ...]:
        return class_names(self.classes)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "BuildConfig":
        """Read what `to_json` wrote; KeyError if a field is missing."""
        paths = ("weights", "train", "train_images", "select", "val", "val_images")
        values = {field.name: record[field.name] for field in fields(cls)}
        values |= {name: Path(values[name]) for name in paths if values[name] is not None}
        values["unlabelled"] = tuple(Path(path) for path in values["unlabelled"])
        return cls(**values | {"protect": tuple(values["protect"])})

    def to_json(self) -> dict[str, Any]:
        return {name: _plain(value) for name, value in asdict(self).items()}

    def differences(self, other: "BuildConfig") -> list[str]:
        """The options that differ, each with the value here and there."""
        here, there = self.to_json(), other.to_json()
        return [
            f"--{name.replace('_', '-')} is {_shown(here[name])} here and {_shown(there[name])} there"
            for name in here
            if here[name] != there[name]
        ]


def class_names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def absolute_detector(name: str) -> str:
    """A detector's name, absolute where it is a file's: a run may go on from elsewhere."""
    return str(Path(name).absolute()) if name.endswith(".cfg") or ".py:" in name else name


def _plain(value: Any) -> Any:
    """Paths as text, tuples as lists."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _shown(value: Any) -> str:
    return "the default" if value is None else str(value)
