"""What a run was asked to do: the options of `build` and `prune`, as run.json keeps them."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
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
    remove: float | None  # share of the budget; None, with budget and per: a latency or memory is asked for
    budget: str | None
    schedule: str
    criterion: str
    per: str | None
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
    # Later additions have defaults, which hold for the run.json of before.
    mosaic: float = 0.0
    latency_budget_ms: float | None = None
    speedup: float | None = None
    energy_budget_mj: float | None = None
    memory_budget_mib: float | None = None
    latency_table: Path | None = None  # None: measured, where a latency or memory is asked for

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
        if self.unlabelled and not (self.distill and self.finetune_epochs):
            raise ValueError(
                "--unlabelled needs distillation: it does not go with --no-distill or --finetune-epochs 0"
            )
        if self.by_latency and (self.remove, self.budget, self.per) != (None, None, None):
            raise ValueError(
                "--remove, --budget and --per do not go with --speedup, --latency-budget-ms, --energy-budget-mj, "
                "--memory-budget-mib"
            )
        if self.speedup is not None and self.latency_budget_ms is not None:
            raise ValueError("--speedup and --latency-budget-ms exclude each other")
        if self.latency_table is not None and not self.by_latency:
            raise ValueError(
                "--latency-table needs --speedup, --latency-budget-ms, --energy-budget-mj or --memory-budget-mib"
            )

    @property
    def by_latency(self) -> bool:
        """Whether a latency, energy or memory of the engine is asked for instead of a share of a cost."""
        asked = (self.latency_budget_ms, self.speedup, self.energy_budget_mj, self.memory_budget_mib)
        return any(value is not None for value in asked)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "BuildConfig":
        """The fields among a command's options. Paths become absolute: a run may go on from elsewhere."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = options[field.name]
            if isinstance(value, list):
                value = tuple(item.absolute() if isinstance(item, Path) else item for item in value)
            values[field.name] = value.absolute() if isinstance(value, Path) else value
        config = cls(**values | {"detector": absolute_detector(values["detector"])})
        if config.by_latency:
            return config
        remove = 0.4 if config.remove is None else config.remove
        return replace(config, remove=remove, budget=config.budget or "params", per=config.per or "params")

    @property
    def class_names(self) -> tuple[str, ...]:
        return class_names(self.classes)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "BuildConfig":
        """Read what `to_json` wrote; KeyError if a field is missing."""
        paths = ("weights", "train", "train_images", "select", "val", "val_images", "latency_table")
        values = {f.name: record[f.name] for f in fields(cls) if f.default is MISSING or f.name in record}
        values |= {name: Path(values[name]) for name in paths if values.get(name) is not None}
        values["unlabelled"] = tuple(Path(path) for path in values["unlabelled"])
        if values["remove"] is None:
            values["per"] = None  # a run of before kept it, though it decided nothing
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
