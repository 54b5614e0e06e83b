"""ONNX Runtime on the CPU: the engine is the ONNX file itself.

No throughput apart from the latency: there are no copies to overlap, and a second image in flight takes the
cores of the first.
"""

import ctypes
import json
import os
import re
import shutil
import tempfile
from typing import Any, Dict, List, Optional

import numpy as np

from .backend import Backend, Detections, Log, Runner
from .errors import AgentError
from .system import read_text

try:
    import onnxruntime
except ImportError as error:
    raise AgentError(
        "backend",
        "ONNX Runtime cannot be imported: {}".format(error),
        "install it for the device's python3: python3 -m pip install onnxruntime",
    ) from error


KERNEL_TIME = "_kernel_time"  # ends the names of the profiler's events for kernels
RUNS_TO_GROW = 2  # the first plans the activations' memory, the second allocates it as planned


class OnnxRunner(Runner):
    def __init__(self, engine: str, options: Dict[str, Any]) -> None:
        self._engine = engine
        self._options = options
        session = _session(engine, _settings(options))
        inputs, outputs = session.get_inputs(), {output.name for output in session.get_outputs()}
        if len(inputs) != 1 or not {"boxes", "scores"} <= outputs:
            raise AgentError("model", "the model needs one input and the outputs boxes and scores")
        self._session = session
        self._input = inputs[0].name
        self.uint8 = inputs[0].type == "tensor(uint8)"
        shape = inputs[0].shape
        self.input_size = (shape[1], shape[2]) if self.uint8 else (shape[2], shape[3])
        self._batch = shape[0] if isinstance(shape[0], int) else 1
        _give_back()

    def run(self, images: np.ndarray) -> Detections:
        if self._batch > 1:
            images = images.repeat(self._batch, axis=0)
        boxes, scores = self._session.run(["boxes", "scores"], {self._input: images})
        return Detections(boxes[0], scores[0])

    def profile(self, images: np.ndarray, runs: int) -> Dict[str, List[float]]:
        with tempfile.TemporaryDirectory() as folder:
            settings = _settings(self._options)
            settings.enable_profiling = True
            settings.profile_file_prefix = os.path.join(folder, "profile")
            profiled = OnnxRunner.__new__(OnnxRunner)
            profiled.__dict__.update(self.__dict__, _session=_session(self._engine, settings))
            for _ in range(runs):
                profiled.run(images)
            with open(profiled._session.end_profiling(), encoding="utf-8") as file:
                events = json.load(file)
        times_ms: Dict[str, List[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(KERNEL_TIME):
                layer = event["name"][: -len(KERNEL_TIME)]
                times_ms.setdefault(layer, []).append(event["dur"] / 1e3)
        return times_ms


def _give_back() -> None:
    """Return to the system what loading has freed: up to twice an engine's weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _resident_mib() -> Optional[float]:
    """This process's memory in RAM, without files that are mapped into it; None where Linux does not tell."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", read_text("/proc/self/status") or "", re.MULTILINE)
    return int(found.group(1)) / 1024 if found else None


def _settings(options: Dict[str, Any]) -> "onnxruntime.SessionOptions":
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.get("threads", 1)
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    if hasattr(settings, "use_deterministic_compute"):  # absent in 1.10, the last one for Python 3.6
        settings.use_deterministic_compute = True
    return settings


def _session(engine: str, settings: "onnxruntime.SessionOptions") -> "onnxruntime.InferenceSession":
    try:
        return onnxruntime.InferenceSession(engine, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception classes are private and change names
        raise AgentError("model", "ONNX Runtime refuses {}: {}".format(engine, error)) from error


class OnnxRuntime(Backend):
    name = "onnxruntime"

    def probe(self) -> Dict[str, Any]:
        return {"version": onnxruntime.__version__}

    def build(self, model: str, engine: str, precision: str, options: Dict[str, Any], log: Log) -> None:
        if precision != "fp32":
            raise AgentError("precision", "ONNX Runtime on the CPU runs fp32, not {}".format(precision))
        self.load(model, options)
        shutil.copyfile(model, engine)

    def load(self, engine: str, options: Dict[str, Any]) -> Runner:
        """`options`: "threads", the number of threads of one inference (default 1)."""
        return OnnxRunner(engine, options)

    def memory_mib(self, engine: str, options: Dict[str, Any]) -> Optional[float]:
        """What the process grows by."""
        runner = OnnxRunner(engine, options)  # what the runtime sets up once, for all engines
        shape = runner.input_size + (3,) if runner.uint8 else (3,) + runner.input_size
        images = np.ones((1,) + shape, np.uint8 if runner.uint8 else np.float32)
        del runner
        _give_back()
        before = _resident_mib()
        runner = OnnxRunner(engine, options)
        for _ in range(RUNS_TO_GROW):
            runner.run(images)
        after = _resident_mib()
        return None if before is None or after is None else after - before


BACKEND = OnnxRuntime()
