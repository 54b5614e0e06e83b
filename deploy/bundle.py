"""Bundles: where there is no connection, one archive goes to the device and one comes back.

The archive holds the agent, the models, the validation images, a plan of what to build and measure,
checksums, and ``run.sh``. What that writes on the board is read back here, and answers a session's questions
as the device would.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.data.files import atomic_path, sha256_of
from edgeprune.deploy.device.agent import PROTOCOL
from edgeprune.deploy.device.bench import END_TO_END
from edgeprune.deploy.device.imaging import DEFAULT_THRESHOLDS, Preprocessing
from edgeprune.deploy.device.plan import RESULTS
from edgeprune.deploy.errors import DeviceError
from edgeprune.deploy.records import Engine, Latencies
from edgeprune.deploy.session import Files, Session, agent_sources
from edgeprune.deploy.targets import Target

FOLDER = "edgeprune-bundle"
CAMERA_FOLDER = "edgeprune-camera"
MAX_RESULTS_BYTES = 1 << 30  # an archive that says more is not ours
RUN_SH = """#!/bin/sh
# Builds and measures what `edgeprune build` prepared. Run it on the device: sh run.sh
set -eu
cd "$(dirname "$0")"
sha256sum --check --quiet SHA256SUMS
exec "${PYTHON:-python3}" -m edgeprune_device --plan plan.json results.tar.gz
"""
CAMERA_SH = """#!/bin/sh
# Shows what `edgeprune camera` prepared. Run it on the device: sh camera.sh [SOURCE]; ctrl-C ends it.
set -eu
cd "$(dirname "$0")"
sha256sum --check --quiet SHA256SUMS
exec "${PYTHON:-python3}" -m edgeprune_device --camera camera.json "$@"
"""


@dataclass(frozen=True)
class BenchmarkPlan:
    """How the models of a bundle are timed; the fields are those of `Session.benchmark`."""

    runs: int = 200
    min_seconds: float = 30.0
    block_runs: int = 10
    warmup_runs: int = 20
    seed: int = 0
    images: int = 16  # that end-to-end runs take in turn
    profile_runs: int = 50
    energy_seconds: float = 5.0  # idle, then each engine alone, where the board tells its power


def write_bundle(
    path: Path,
    target: Target,
    models: Sequence[Path],
    images: Mapping[int, Path],
    preprocessing: Preprocessing,
    *,
    precision: str = "fp32",
    options: Mapping[str, Any] | None = None,
    benchmark: BenchmarkPlan = BenchmarkPlan(),
    power_mode: str | None = None,
    lock_clocks: bool = False,
) -> str:
    """Write the archive for a device; whole or not at all.

    Args:
        path: of the archive, ``.tar.gz``.
        models: ONNX files, all built, timed together and evaluated.
        images: image id -> file, as `image_files` gives them.
        options: of the backend, as for `Session.build`.

    Returns:
        The plan's SHA-256, which the results will name.
    """
    sent_models, sent_images = Files(models), Files(list(images.values()))
    plan = {
        **_to_build(target, sent_models, precision, options),
        "images": sent_images.references,
        "preprocessing": preprocessing.to_json(),
        "thresholds": DEFAULT_THRESHOLDS._asdict(),
        "bench": {
            "runs": benchmark.runs,
            "min_seconds": benchmark.min_seconds,
            "block_runs": benchmark.block_runs,
            "warmup_runs": benchmark.warmup_runs,
            "seed": benchmark.seed,
            "image_count": benchmark.images,
        },
        "energy": {
            "runs": 1,
            "min_seconds": benchmark.energy_seconds,
            "idle_seconds": benchmark.energy_seconds,
            "scopes": [END_TO_END],
        },
        "profile_runs": benchmark.profile_runs,
        "power": {"mode": power_mode, "lock_clocks": lock_clocks},
    }
    content = {"plan.json": json.dumps(plan, indent=1).encode(), "run.sh": RUN_SH.encode()}
    _write_archive(path, FOLDER, content, {**sent_models.by_remote, **sent_images.by_remote})
    return _sha256(content["plan.json"])


def write_camera_bundle(
    path: Path,
    target: Target,
    models: Mapping[str, Path],
    job: Mapping[str, Any],
    *,
    precision: str = "fp32",
    options: Mapping[str, Any] | None = None,
    power_mode: str | None = None,
    lock_clocks: bool = False,
) -> None:
    """Write the archive that runs the camera on a device; whole or not at all.

    Args:
        path: of the archive, ``.tar.gz``.
        models: ONNX files by the name that is shown, one, or two to compare.
        job: as `camera_job` makes it; its engines are built on the device.
        options: of the backend, as for `Session.build`.
    """
    sent = Files(list(models.values()))
    plan = {
        **_to_build(target, sent, precision, options),
        "camera": {**job, "names": list(models), "power": {"mode": power_mode, "lock_clocks": lock_clocks}},
    }
    content = {"camera.json": json.dumps(plan, indent=1).encode(), "camera.sh": CAMERA_SH.encode()}
    _write_archive(path, CAMERA_FOLDER, content, sent.by_remote)


def _to_build(
    target: Target, models: Files, precision: str, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The part of a plan that says what is built, and how (deploy/device/plan.py)."""
    return {
        "protocol": PROTOCOL,
        "backend": target.backend,
        "models": models.references,
        "precision": precision,
        "options": dict(options or {}),
    }


def _write_archive(path: Path, folder: str, content: Mapping[str, bytes], files: Mapping[str, Path]) -> None:
    """Write an archive of a folder that holds `content`, the agent, the files and the checksums of all."""
    content = {
        **content,
        **{f"edgeprune_device/{name}": text for name, text in agent_sources().items()},
    }
    with atomic_path(path) as temporary, tarfile.open(temporary, "w:gz", compresslevel=1) as archive:
        sums = []
        for name, data in content.items():
            _add(archive, f"{folder}/{name}", data)
            sums.append(f"{_sha256(data)}  {name}\n")
        for remote, local in files.items():
            archive.add(local.resolve(), f"{folder}/{remote}", filter=_plain)
            sums.append(f"{sha256_of(local)}  {remote}\n")
        _add(archive, f"{folder}/SHA256SUMS", "".join(sums).encode())


def read_results(path: Path) -> dict[str, Any]:
    """Read the archive that ``run.sh`` wrote on the device.

    Nothing is unpacked: the names in it are the device's, and no paths for this machine.

    Raises:
        DeviceError: If it is no such archive, or of another version of edgeprune.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            entry = archive.next()
            if entry is None or entry.name != RESULTS or not entry.isreg() or entry.size > MAX_RESULTS_BYTES:
                raise ValueError(f"it does not begin with {RESULTS}")
            file = archive.extractfile(entry)
            assert file is not None
            results = json.loads(file.read())
        if not isinstance(results, dict) or results.keys() != FIELDS:
            raise ValueError("its results have other fields")
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise DeviceError(
            f"{path} is no results archive ({error}): run.sh writes results.tar.gz on the device",
            "import",
        ) from error
    if results["protocol"] != PROTOCOL:
        raise DeviceError(f"{path} comes from another version of edgeprune: write the bundle anew", "import")
    return results


FIELDS = {
    *("plan_sha256", "protocol", "probe", "engines", "bench", "energy", "profiles", "evaluations"),
}


class ImportedSession(Session):
    """A session whose device has answered already: each question is looked up in the results of a bundle.

    Args:
        target: what the bundle was written for.
        results: as `read_results` gives them.
        plan_sha256: of the bundle that was written here.

    Raises:
        DeviceError: If the results are damaged, or those of another bundle.
    """

    def __init__(self, target: Target, results: Mapping[str, Any], plan_sha256: str) -> None:
        super().__init__(target, _NoTransport())
        if results["plan_sha256"] != plan_sha256:
            raise DeviceError(
                "the results are those of another bundle: run this run's own on the device", "import"
            )
        self._results = results
        self._asked: list[tuple[list[str], list[str]]] = []  # the benchmarks' engines and scopes
        self._check()

    def _check(self) -> None:
        """Read every record once, so that nothing damaged is met later."""
        try:
            self.probe()
            for engine, evaluation in zip(
                self._results["engines"], self._results["evaluations"], strict=True
            ):
                Engine.from_json(engine)
                for image in evaluation["images"]:
                    np.array(image["boxes"], np.float32).reshape(len(image["scores"]), 4)
                int(evaluation["not_finite"])
            for bench in (self._results["bench"], *self._results["energy"]):
                Latencies.from_json({**bench, "engines": []})
            for profile in self._results["profiles"]:
                {layer: tuple(times) for layer, times in profile["times_ms"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DeviceError(
                f"the results are damaged ({error!r}): run the bundle again", "import"
            ) from error

    def _call(self, command: str, job: Mapping[str, Any], files: Files | None = None, **options: Any) -> Any:
        engines = self._results["engines"]
        if command == "probe":
            return self._results["probe"]
        if command == "build":
            for engine in engines:
                if engine["model_sha256"] == job["model"]["sha256"]:
                    return engine
        if command == "bench":
            return self._bench([engine["key"] for engine in job["engines"]], job["scopes"])
        if command == "profile":
            for engine, profile in zip(engines, self._results["profiles"], strict=True):
                if engine["key"] == job["engine"]["key"]:
                    return profile
        if command == "evaluate":
            for engine, evaluation in zip(engines, self._results["evaluations"], strict=True):
                if engine["key"] == job["engine"]["key"] and len(evaluation["images"]) == len(job["images"]):
                    return evaluation
        raise DeviceError(f"the bundle's results do not hold this {command}: write the bundle anew", "import")

    def _bench(self, keys: list[str], scopes: list[str]) -> Any:
        """All engines together, or one alone end to end; asked once more, the device has no more blocks to give."""
        every = [engine["key"] for engine in self._results["engines"]]
        known = [(every, self._results["bench"])]
        if scopes == [END_TO_END]:
            known = [([key], alone) for key, alone in zip(every, self._results["energy"], strict=False)]
        answer = next((bench for engines, bench in known if engines == keys), None)
        if answer is None:
            raise DeviceError("the bundle's results hold no benchmark of these engines", "import")
        if (keys, scopes) in self._asked:
            return {**answer, "blocks": [], "telemetry": {**answer["telemetry"], "samples": []}}
        self._asked.append((keys, scopes))
        return answer


class _NoTransport:
    """Stands where a session has its transport; nothing goes over it."""

    name = "bundle"
    python = "python3"

    def run(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError

    def put(self, files: Mapping[str, Path]) -> None:
        raise NotImplementedError

    def get(self, remote: str, local: Path) -> None:
        raise NotImplementedError

    def forward(self, host: str, port: int) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        pass


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """No owner, time or rights of this machine."""
    plain = tarfile.TarInfo(entry.name)
    plain.size = entry.size
    return plain


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
