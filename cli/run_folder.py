"""A run's folder: what lies where, who may write, what belongs together.

run.json             RunRecord: command, date, configuration, versions, hashes of data and weights, what was dropped
step-00/ ...         one folder a step, 00 the unpruned detector
report.html, report.json
"""

import datetime
import fcntl
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from edgeprune.cli.config import BuildConfig
from edgeprune.data.dataset import Dataset
from edgeprune.data.errors import EdgePruneError
from edgeprune.data.files import read_json, write_json

SCHEMA_VERSION = 1
_PACKAGES = ("edgeprune", "torch", "numpy", "opencv-python-headless", "onnx", "onnxruntime", "pycocotools")


PROBLEMS_LISTED = 20  # `edgeprune data inspect --json` lists all


class RunError(EdgePruneError):
    """A run folder that is not there, not ours, in use, or of another configuration."""


@dataclass(frozen=True)
class RunRecord:
    """run.json."""

    config: BuildConfig
    hashes: Mapping[str, Any]
    """SHA-256 of "train", "val", "weights" (by file where they are published ones, None without a file), and of
    "select" and "unlabelled 1", "unlabelled 2" ... where there are any."""
    versions: Mapping[str, str]
    data: Mapping[str, Any] = field(default_factory=dict)
    """What `contents_of` says of each data set."""
    command: str | None = None
    """As it was typed when the run began, for a shell; with `date`, None in a run of before."""
    date: str | None = None

    @classmethod
    def of(cls, config: BuildConfig, hashes: Mapping[str, Any], data: Mapping[str, Dataset]) -> "RunRecord":
        """The record of a run that this process begins now."""
        import torch

        from edgeprune.detectors import distributed

        versions = {name: version(name) for name in _PACKAGES}
        threads = str(torch.get_num_threads())  # sums depend on how they are split over threads
        versions = {"python": platform.python_version(), "threads": threads} | versions
        if (processes := distributed.world_size()) > 1:  # over which they are split too
            versions["processes"] = str(processes)
        contents = {name: contents_of(dataset) for name, dataset in data.items()}
        command = shlex.join(["edgeprune", *sys.argv[1:]])
        return cls(config, hashes, versions, contents, command, datetime.date.today().isoformat())

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "date": self.date,
            "config": self.config.to_json(),
            "hashes": dict(self.hashes),
            "versions": dict(self.versions),
            "data": dict(self.data),
        }

    def differences(self, other: "RunRecord") -> list[str]:
        """What keeps this run from going on as `other`: options, data and weights."""
        # A run of before has no hash of published weights, nor of "select" and "unlabelled".
        changed = [name for name, found in self.hashes.items() if other.hashes.get(name) not in (None, found)]
        return self.config.differences(other.config) + [
            f"the {name} file has other contents" for name in changed
        ]


def contents_of(dataset: Dataset) -> dict[str, Any]:
    """What a data set holds and what of it could not be used, to be written beside a result."""
    problems = [str(problem) for problem in dataset.problems[:PROBLEMS_LISTED]]
    return {"path": str(dataset.path), **asdict(dataset.contents), "first_problems": problems}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def record_path(self) -> Path:
        return self.path / "run.json"

    def step(self, iteration: int) -> Path:
        return self.path / f"step-{iteration:02d}"

    def steps(self) -> list[int]:
        """Iterations whose pruned detector is saved, from 0 on without a gap."""
        return list(takewhile(lambda step: (self.step(step) / "detector.json").is_file(), count()))

    def read_record(self) -> RunRecord:
        """run.json.

        Raises:
            RunError: If it is not there or not a record of ours.
        """
        if not self.record_path.is_file():
            raise RunError(f"{self.path} is no run folder: it has no run.json. `edgeprune build` makes one")
        record = read_json(self.record_path)
        try:
            if record["schema_version"] != SCHEMA_VERSION:
                raise RunError(f"{self.record_path} was written by another edgeprune: start a new run")
            config = BuildConfig.from_json(record["config"])
            return RunRecord(
                config,
                record["hashes"],
                record["versions"],
                record.get("data", {}),
                record.get("command"),
                record.get("date"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.record_path} is damaged ({error!r}): start a new run") from error

    def start(self, record: RunRecord, *, resume: bool) -> RunRecord | None:
        """Write run.json, or find that it already says the same; call it under `lock`.

        Returns:
            The record found, None where the run is new.

        Raises:
            RunError: If the folder is in the way, or holds a run that differs from `record`.
        """
        if not self.record_path.is_file():
            others = [entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")]
            if others:
                raise RunError(
                    f"{self.path} holds {others[0]} and is no run folder: choose another --run-dir"
                )
            write_json(self.record_path, record.to_json())
            return None
        if not resume:
            raise RunError(
                f"{self.path} holds a run already: --resume goes on with it, another --run-dir starts anew"
            )
        found = self.read_record()
        if differences := record.differences(found):
            raise RunError(
                f"cannot go on with {self.path}, where another run began: {'; '.join(differences)}"
            )
        return found

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing this run; the system frees the lock whenever this process ends.

        Raises:
            RunError: If another process holds it, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunError(f"cannot write the run folder {self.path}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"{self.path} is in use by another edgeprune: wait for it, or stop it"
                ) from None
            yield
