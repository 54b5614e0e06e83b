"""A session with a device: send what it lacks, give the agent a job, take the result back."""

import hashlib
import io
import json
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgeprune.data.dataset import Dataset
from edgeprune.data.files import atomic_path, read_json, sha256_of, write_json
from edgeprune.data.precision import ImageDetections
from edgeprune.deploy.device.agent import PROTOCOL
from edgeprune.deploy.device.bench import SCOPES
from edgeprune.deploy.device.imaging import DEFAULT_THRESHOLDS, Preprocessing, Thresholds
from edgeprune.deploy.errors import DeviceError
from edgeprune.deploy.records import Check, DeviceInfo, Engine, Evaluation, Latencies, Profile
from edgeprune.deploy.targets import Target
from edgeprune.deploy.transport import Completed, Local, Stop, Transport, default_folder

Progress = Callable[[Mapping[str, Any]], None]

KILLED = (-9, 137)
LOCK_WAIT_S = 600.0  # how long a job waits for another one on the same device


class Session:
    """A device of a kind, and the way to it.

    Args:
        target: what kind of device it is.
        transport: the way to it.
        progress: takes events: {"event": "progress", "stage", "done", "total"}, "build", "waiting".
        lock_wait_s: how long a job may wait for another one on the same device.
        timeout_s: a job that takes longer is ended.
        power_mode: set for whatever is timed and put back afterwards; None: left alone.
        lock_clocks: whether clocks are held at their highest meanwhile.
    """

    def __init__(
        self,
        target: Target,
        transport: Transport,
        progress: Progress | None = None,
        *,
        lock_wait_s: float = LOCK_WAIT_S,
        timeout_s: float | None = None,
        power_mode: str | None = None,
        lock_clocks: bool = False,
    ) -> None:
        self.target = target
        self._transport = transport
        self.progress = progress
        self._limits = {"protocol": PROTOCOL, "lock_wait_s": lock_wait_s, "timeout_s": timeout_s}
        self.power = {"mode": power_mode, "lock_clocks": lock_clocks}  # as the agent's jobs say it

    @property
    def transport(self) -> Transport:
        """The way to the device."""
        return self._transport

    @property
    def power_mode(self) -> str | None:
        """Set for whatever is timed; None: left as the device has it."""
        mode = self.power["mode"]
        return None if mode is None else str(mode)

    def probe(self) -> DeviceInfo:
        """Ask the device what it is and which runtimes work on it.

        Raises:
            DeviceError: If the device or its agent fails, here and below.
        """
        found = self._call("probe", {})
        device = {
            "target": self.target.name,
            "transport": self._transport.name,
            "backend": self.target.backend,
        }
        return DeviceInfo.from_json({**found, **device})

    def doctor(self) -> tuple[Check, ...]:
        """Have the device check what it needs."""
        found = self._call("doctor", {"backend": self.target.backend})
        return tuple(Check(**check) for check in found["checks"])

    def clean(self) -> int:
        """Remove sent files, engines and old jobs from the device; returns the bytes freed."""
        freed: int = self._call("clean", {})["freed_bytes"]
        return freed

    def build(self, model: Path, precision: str = "fp32", options: Mapping[str, Any] | None = None) -> Engine:
        """Build an engine from an ONNX file on the device, or find it built.

        Args:
            options: of the backend. ONNX Runtime: "threads" (1 unless said). TensorRT: "workspace_mib",
                "batch", "optimization_level", "dla_core", "via" (deploy/device/backend_tensorrt.py).
        """
        if precision not in self.target.precisions:
            known = ", ".join(self.target.precisions)
            raise DeviceError(
                f"{self.target.name} has no {precision} in hardware; choose from: {known}", "precision"
            )
        files = Files([model])
        job = {
            "model": files.references[0],
            "backend": self.target.backend,
            "precision": precision,
            "options": dict(options or {}),
        }
        return Engine.from_json(self._call("build", job, files))

    def benchmark(
        self,
        engines: Sequence[Engine],
        images: Sequence[Path],
        preprocessing: Preprocessing,
        *,
        runs: int = 100,
        min_seconds: float = 0.0,
        block_runs: int = 10,
        warmup_runs: int = 10,
        seed: int = 0,
        scopes: Sequence[str] = SCOPES,
        idle_seconds: float = 0.0,
        thresholds: Thresholds = DEFAULT_THRESHOLDS,
    ) -> Latencies:
        """Time engines together, interleaved in blocks of random order.

        Args:
            images: used in turn; decoded before the clock runs.
            runs: at least, per engine and scope.
            min_seconds: at least, over all engines.
            block_runs: per engine and scope in one block.
            warmup_runs: at least, per engine; more until the latency is stable.
            seed: of the blocks' order.
            scopes: of those in deploy/device/bench.py.
            idle_seconds: for which nothing runs before the engines are loaded: power is idle power then.
        """
        files = Files(images)
        job = {
            "engines": [engine.to_json() for engine in engines],
            "images": files.references,
            "power": self.power,
            "preprocessing": preprocessing.to_json(),
            "thresholds": thresholds._asdict(),
            "runs": runs,
            "min_seconds": min_seconds,
            "block_runs": block_runs,
            "warmup_runs": warmup_runs,
            "seed": seed,
            "scopes": list(scopes),
            "idle_seconds": idle_seconds,
        }
        found = self._call("bench", job, files)
        return Latencies.from_json({**found, "engines": [engine.key for engine in engines]})

    def evaluate(
        self,
        engine: Engine,
        images: Mapping[int, Path],
        preprocessing: Preprocessing,
        thresholds: Thresholds = DEFAULT_THRESHOLDS,
    ) -> Evaluation:
        """Run an engine over images.

        Args:
            images: image id -> file, as `image_files` gives them.
        """
        files = Files(list(images.values()))
        job = {
            "engine": engine.to_json(),
            "images": files.references,
            "preprocessing": preprocessing.to_json(),
            "thresholds": thresholds._asdict(),
        }
        found = self._call("evaluate", job, files)
        detections = tuple(
            ImageDetections(
                image_id,
                np.array(image["boxes"], np.float32).reshape(-1, 4),
                np.array(image["scores"], np.float32),
            )
            for image_id, image in zip(images, found["images"], strict=True)
        )
        return Evaluation(detections, found["not_finite"])

    def profile(
        self, engine: Engine, image: Path, preprocessing: Preprocessing, *, runs: int = 50
    ) -> Profile:
        """Time the layers of an engine."""
        files = Files([image])
        job = {
            "engine": engine.to_json(),
            "image": files.references[0],
            "power": self.power,
            "preprocessing": preprocessing.to_json(),
            "runs": runs,
        }
        found = self._call("profile", job, files)
        return Profile({layer: tuple(values) for layer, values in found["times_ms"].items()})

    def time_with_trtexec(self, engine: Engine, *, runs: int = 100) -> Mapping[str, tuple[float, ...]]:
        """Time an engine with TensorRT's own command; milliseconds of each run, by scope."""
        found = self._call("trtexec", {"engine": engine.to_json(), "power": self.power, "runs": runs})
        return {scope: tuple(samples) for scope, samples in found["samples_ms"].items()}

    def check_source(self, source: str, capture: Mapping[str, int]) -> None:
        """Look whether the device has a camera's source and what that needs; a camera has to give a frame.

        Args:
            capture: width, height and fps, wanted of a camera.
        """
        self._call("source", {"source": source, "capture": capture})

    def camera(self, job: Mapping[str, Any], files: "Files", folder: str, stop: Stop) -> Any:
        """Run the camera until it ends or is stopped; `progress` takes its events (deploy/camera.py).

        Args:
            folder: of the job, on the device; it may write there.
        """
        return self._call("camera", {**job, "power": self.power}, files, folder=folder, stop=stop)

    def _call(
        self,
        command: str,
        job: Mapping[str, Any],
        files: "Files | None" = None,
        *,
        folder: str | None = None,
        stop: Stop | None = None,
    ) -> Any:
        """Give the agent a job and return its result."""
        agent, content = agent_zip()
        folder = folder or new_job_folder()
        job_path, result_path = f"{folder}/job.json", f"{folder}/result.json"
        end: dict[str, Any] = {}

        def on_line(line: str) -> None:
            event = json.loads(line)
            if event["event"] == "end":
                end.update(event)
            elif self.progress:
                self.progress(event)

        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary)
            write_json(local / "job.json", {**job, **self._limits, "job_folder": folder})
            (local / "agent.zip").write_bytes(content)
            sent = {agent: local / "agent.zip", job_path: local / "job.json"}
            self._transport.put({**sent, **(files.by_remote if files else {})})
            arguments = [self._transport.python, agent, "--attached", command, job_path, result_path]
            completed = self._transport.run(arguments, on_line=on_line, stop=stop)
            if not end.get("ok"):
                raise self._failure(command, completed, end)
            self._transport.get(result_path, local / "result.json")
            return read_json(local / "result.json")["result"]

    def _failure(self, command: str, completed: Completed, end: Mapping[str, Any]) -> DeviceError:
        where = f"{command} on {self._transport.name}"
        if end:
            return DeviceError.of_agent(f"{where} failed", end["error"])
        if completed.status in KILLED:
            return DeviceError(
                f"{where} failed: the agent was killed (137), most likely for memory; close other programs "
                "there, then run the command again",
                "killed",
            )
        said = completed.stderr.strip().splitlines()
        reason = said[-1] if said else "it said nothing"
        return DeviceError(
            f"{where} failed: the agent ended with status {completed.status}: {reason}", "agent"
        )


def new_job_folder() -> str:
    """A folder of a job's own, in the device's work folder."""
    return f"jobs/{uuid.uuid4().hex}"


class Files:
    """Local files under the names of their content, as jobs refer to them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.references: list[dict[str, str]] = []
        self.by_remote: dict[str, Path] = {}
        for path in paths:
            sha256 = sha256_of(path)
            remote = f"files/{sha256}{path.suffix.lower()}"
            self.references.append({"path": remote, "sha256": sha256, "name": path.name})
            self.by_remote[remote] = path


def local_session(target: Target, folder: Path | None = None, progress: Progress | None = None) -> Session:
    """A session with this machine; `folder` is the agent's work folder, by default in the user's cache."""
    return Session(target, Local(folder or default_folder()), progress)


def image_files(dataset: Dataset, folder: Path) -> dict[int, Path]:
    """Give each image of a data set as a file: image id -> path.

    Still images stay where they are; frames of a video are written into `folder` as PNG.
    """
    files = {}
    for index, sample in enumerate(dataset.samples):
        path = dataset.root / sample.file_name
        if not path.is_file():
            path = folder / (sample.file_name.replace("/", "_").replace("#", "_") + ".png")
            if not path.is_file():
                _, encoded = cv2.imencode(".png", dataset.image(index))
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as temporary:
                    temporary.write_bytes(encoded.tobytes())
        files[sample.image_id] = path
    return files


def agent_sources() -> dict[str, bytes]:
    """The agent's files by their path in its package."""
    folder = Path(__file__).parent / "device"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.py"))}


@cache
def agent_zip() -> tuple[str, bytes]:
    """The agent as one file that Python runs, under a name that tells its content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:

        def add(name: str, content: bytes) -> None:
            archive.writestr(
                zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), content
            )  # same bytes each time

        add(
            "__main__.py",
            b"import sys\nfrom edgeprune_device.agent import main\nsys.exit(main(sys.argv[1:]))\n",
        )
        for name, text in agent_sources().items():
            add(f"edgeprune_device/{name}", text)
    content = buffer.getvalue()
    return f"agent/{hashlib.sha256(content).hexdigest()[:16]}.zip", content
