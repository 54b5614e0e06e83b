"""The one interface that inference runtimes are used through."""

import importlib
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from .errors import AgentError
from .imaging import Placement, Preprocessing, letterbox, normalise


class Detections(NamedTuple):
    """The network's candidates for one image, as the exported graph gives them."""

    boxes: np.ndarray  # (M, 4) float32 xyxy, input pixels
    scores: np.ndarray  # (M,) float32


Log = Callable[[str], None]


class Runner:
    """An engine loaded for inference. One thread uses it."""

    input_size: Tuple[int, int]  # (H, W)
    uint8 = False  # the engine takes the letterboxed BGR image itself, (N, H, W, 3), and normalises it

    def prepare(self, image: np.ndarray, preprocessing: Preprocessing) -> Tuple[np.ndarray, Placement]:
        """Turn an image ``(H, W, 3)`` uint8 BGR into the engine's input, and say where it lies in it."""
        canvas, placement = letterbox(image, self.input_size, preprocessing)
        return (canvas[None] if self.uint8 else normalise(canvas, preprocessing)), placement

    def run(self, images: np.ndarray) -> Detections:
        """Run one image as `prepare` gives it. The arrays are valid until the next run."""
        raise NotImplementedError

    def measure(self, images: np.ndarray, runs: int) -> Dict[str, List[float]]:
        """Time `runs` inferences of one prepared image.

        Returns:
            Milliseconds of each run, by scope; "engine" is the inference alone.
        """
        clock, run = time.perf_counter, self.run
        samples = []
        for _ in range(runs):
            start = clock()
            run(images)
            samples.append((clock() - start) * 1e3)
        return {"engine": samples}

    def seconds_in_flight(self, images: np.ndarray, runs: int) -> Optional[float]:
        """Time `runs` inferences of one prepared image of which several are in flight: their copies overlap.

        Returns:
            Seconds for all of them once the first ones are under way; None where nothing can overlap.
        """
        return None

    def profile(self, images: np.ndarray, runs: int) -> Dict[str, List[float]]:
        """Time each layer in `runs` inferences of one prepared image; slower than `measure`.

        Returns:
            Milliseconds of each run, by layer of the engine.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Free the device's memory."""


class Backend:
    """A runtime: turns a model into an engine, and an engine into a runner.

    `options` are the runtime's own settings; they are part of an engine's key.
    """

    name = ""

    def probe(self) -> Dict[str, Any]:
        """Say what is there: at least "version"; runs in a child process of its own.

        Raises:
            AgentError: If the runtime cannot be used here, with the remedy.
        """
        raise NotImplementedError

    def build(self, model: str, engine: str, precision: str, options: Dict[str, Any], log: Log) -> None:
        """Write the engine file for the ONNX file `model`; `log` takes lines worth keeping.

        Raises:
            AgentError: If the model cannot be built here.
        """
        raise NotImplementedError

    def load(self, engine: str, options: Dict[str, Any]) -> Runner:
        """Load an engine file for inference.

        Raises:
            AgentError: If it does not load here.
        """
        raise NotImplementedError

    def memory_mib(self, engine: str, options: Dict[str, Any]) -> Optional[float]:
        """Say what an engine file holds of the device's memory while it runs: its weights and activations.

        What no pruning changes is left out: inputs and outputs, and the runtime itself.

        Returns:
            None where it cannot be told.
        """
        raise NotImplementedError


BACKENDS = ("tensorrt", "onnxruntime")


def open_backend(name: str) -> Backend:
    """Import a backend, in a child process only: the import of a broken runtime can end the process."""
    if name not in BACKENDS:
        raise AgentError("job", "unknown backend {!r}; there are {}".format(name, ", ".join(BACKENDS)))
    backend: Backend = importlib.import_module(".backend_" + name, __package__).BACKEND
    return backend
