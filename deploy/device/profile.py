"""Time of each layer of an engine, and what trtexec says of the whole."""

from typing import Any, Callable, Dict

from . import trtexec
from .engines import load
from .errors import AgentError
from .evaluate import read_image
from .files import verified
from .imaging import Preprocessing

WARMUP_RUNS = 10


def profile(job: Dict[str, Any], report: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Time the layers of an engine.

    Job: "engine" (its record), "image" (file reference), "preprocessing", "runs". Result: "times_ms": by
    layer, one value a run.
    """
    runner = load(job["engine"])
    try:
        values, _ = runner.prepare(read_image(job["image"]), Preprocessing.from_json(job["preprocessing"]))
        runner.measure(values, WARMUP_RUNS)
        times_ms = runner.profile(values, job["runs"])
    finally:
        runner.close()
    return {"times_ms": times_ms}


def time_with_trtexec(job: Dict[str, Any], report: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Time an engine with trtexec. Job: "engine" (its record), "runs". Result: "samples_ms" by scope."""
    engine = job["engine"]
    if engine["backend"] != "tensorrt":
        raise AgentError(
            "trtexec", "trtexec times TensorRT engines, not those of {}".format(engine["backend"])
        )
    return {"samples_ms": trtexec.measure(engine["backend_version"], verified(engine), job["runs"])}
