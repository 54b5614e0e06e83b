"""The tiny detector of tests/detectors as a user's own (`squares.py:tiny`), trained, and a run of pruning it.

As a program, also under torchrun: `squares.py job.json`. Keys of the job: data (folder with train, select, val),
folder (where steps go), options, and optionally batch_norm and kill_at (the event at which the process kills itself).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.data.dataset import load_dataset
from edgeprune.detectors import distributed
from edgeprune.detectors.protocol import Progress
from edgeprune.detectors.training import FineTuneOptions, fine_tune
from edgeprune.pruning.budget import Limits
from edgeprune.pruning.records import PrunedDetector
from edgeprune.pruning.schedule import PruningData, PruningOptions, Stage, prune_iteratively

NAME = f"{Path(__file__).resolve()}:tiny"

# By its path: tests/cli has a module of the same name.
_spec = importlib.util.spec_from_file_location(
    "tiny_detector_of_squares", Path(__file__).parents[1] / "detectors" / "squares_detector.py"
)
assert _spec is not None
assert _spec.loader is not None
tiny_detector = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_detector)


def tiny(input_size: tuple[int, int], classes: Sequence[str], batch_norm: bool = True) -> nn.Module:
    """With batch norm, and two convolutions without a bias, so that removal has to add one."""
    detector: nn.Module = tiny_detector.TinyDetector(seed=1, batch_norm=batch_norm)
    for index in (3, 5):
        convolution = detector.get_submodule(f"body.{index}")
        assert isinstance(convolution, nn.Conv2d)
        convolution.bias = None
    return detector.eval()


def plain(input_size: tuple[int, int], classes: Sequence[str]) -> nn.Module:
    """The same without batch norm."""
    return tiny(input_size, classes, batch_norm=False)


def write_data(folder: Path, batch_norm: bool = True) -> None:
    """`train`, `select` and `val`, and `weights.pt` of a detector that finds the squares."""
    train = tiny_detector.write_squares(folder / "train", 24, seed=1)
    select = tiny_detector.write_squares(folder / "select", 8, seed=2)
    tiny_detector.write_squares(folder / "val", 12, seed=3)
    detector: Any = tiny((64, 64), ("person",), batch_norm)
    options = FineTuneOptions(epochs=60, learning_rate=0.01, batch_size=4, distill=False)
    fine_tune(detector, detector, None, train, select, options, seed=0)
    torch.save(detector.state_dict(), folder / "weights.pt")


def detector_of(folder: Path, batch_norm: bool = True) -> nn.Module:
    detector = tiny((64, 64), ("person",), batch_norm)
    detector.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return detector


def options_of(given: Mapping[str, Any]) -> PruningOptions:
    """From JSON; few images, few epochs, many changes a step."""
    changed = dict(given)
    tuning = {"epochs": 2, "learning_rate": 0.003, "batch_size": 4, **changed.pop("finetune", {})}
    limits = Limits(**changed.pop("limits", {}))
    defaults = {"iterations": 3, "remove": 0.5, "scoring_images": 12}
    return PruningOptions(**{**defaults, **changed}, finetune=FineTuneOptions(**tuning), limits=limits)


def data_of(folder: Path, **replaced: str) -> PruningData:
    parts = {"train": "train", "select": "select", "val": "val", **replaced}
    datasets = {
        name: load_dataset(folder / part / "images.json", folder / part / "images")
        for name, part in parts.items()
    }
    return PruningData(**datasets)


def stage_of(event: Callable[[], None]) -> Stage:
    @contextlib.contextmanager
    def stage(_: str) -> Iterator[Progress]:
        event()
        yield lambda done, total: event()

    return stage


def run(
    data: Path,
    folder: Path,
    options: Mapping[str, Any],
    event: Callable[[], None] = lambda: None,
    replaced: Mapping[str, str] | None = None,
    detector: nn.Module | None = None,
    name: str = NAME,
) -> Iterator[PrunedDetector]:
    return prune_iteratively(
        name,
        detector or detector_of(data),
        data_of(data, **(replaced or {})),
        options_of(options),
        lambda iteration: folder / f"step-{iteration:02d}",
        stage=stage_of(event),
    )


def main(job: Mapping[str, Any]) -> None:
    torch.set_num_threads(1)
    events = 0

    def event() -> None:
        nonlocal events
        events += 1
        if events == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    rename = Path.replace

    def watched(self: Path, target: Path) -> Path:
        event()  # a file is written and not yet in its place
        return rename(self, target)

    Path.replace = watched  # type: ignore[method-assign, assignment]
    data, batch_norm = Path(job["data"]), job.get("batch_norm", True)
    name = NAME if batch_norm else NAME.replace(":tiny", ":plain")
    with distributed.processes("cpu"):
        detector = detector_of(data, batch_norm)
        for _ in run(data, Path(job["folder"]), job["options"], event, detector=detector, name=name):
            pass
    print(events)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
