"""trtexec, TensorRT's own command: a second way to build and to time, with the flags of each version."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import system
from .child import die_with_parent
from .errors import AgentError

USUAL_PLACE = "/usr/src/tensorrt/bin/trtexec"  # JetPack puts it there, and not on the PATH


def program() -> Optional[str]:
    """Where trtexec is, None if it is not installed."""
    usual = os.path.join(system.ROOT, USUAL_PLACE.lstrip("/"))
    return usual if os.access(usual, os.X_OK) else shutil.which("trtexec")


def release(version: str) -> Tuple[int, int]:
    """(8, 2) of "8.2.1.8"."""
    parts = version.split(".")
    return int(parts[0]), int(parts[1])


def build_flags(version: str, precision: str, options: Dict[str, Any], workspace_mib: int) -> List[str]:
    """The flags that build an engine, for a TensorRT version.

    Raises:
        AgentError: If the version has no such flag.
    """
    number = release(version)
    if number < (8, 4):
        flags = ["--workspace={}".format(workspace_mib)]
    else:
        flags = ["--memPoolSize=workspace:{}".format(workspace_mib)]
    flags.append("--buildOnly" if number < (8, 6) else "--skipInference")
    if precision != "fp32" and number < (11, 0):  # later the model's types say it
        flags.append("--fp16")
        if precision == "int8":
            flags.append("--int8")
    if options.get("optimization_level") is not None and number >= (8, 6):
        flags.append("--builderOptimizationLevel={}".format(options["optimization_level"]))
    if options.get("dla_core") is not None:
        flags += ["--useDLACore={}".format(options["dla_core"]), "--allowGPUFallback"]
    if "batch" in options:
        raise AgentError("trtexec", "--via trtexec builds models of a fixed batch only", "leave out --via")
    return flags


def time_flags(version: str, runs: int, times_path: str) -> List[str]:
    """The flags that time an engine, copies included and without CUDA graphs in every version."""
    flags = [
        "--iterations={}".format(runs),
        "--duration=0",
        "--warmUp=500",
        "--exportTimes=" + times_path,
    ]
    if release(version) >= (11, 0):  # whose defaults are others
        flags += ["--includeDataTransfers", "--noCudaGraph", "--noSpinWait"]
    return flags


def build(
    version: str,
    model: str,
    engine: str,
    precision: str,
    options: Dict[str, Any],
    workspace_mib: int,
    log: Callable[[str], None],
) -> None:
    """Write the engine file of a model.

    Raises:
        AgentError: If trtexec is not there or fails.
    """
    flags = build_flags(version, precision, options, workspace_mib)
    log("trtexec " + " ".join(flags))
    _run(["--onnx=" + model, "--saveEngine=" + engine] + flags)


def measure(version: str, engine: str, runs: int) -> Dict[str, List[float]]:
    """Milliseconds of each run by trtexec's clock: "engine", "copy_in", "copy_out", "engine_with_copies".

    Raises:
        AgentError: If trtexec is not there or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "times.json")
        _run(["--loadEngine=" + engine] + time_flags(version, runs, path))
        with open(path, encoding="utf-8") as file:
            return read_times(json.load(file))


def read_times(records: List[Dict[str, float]]) -> Dict[str, List[float]]:
    """Turn what --exportTimes wrote into samples by scope."""
    names = {
        "engine": "computeMs",
        "copy_in": "h2dMs",
        "copy_out": "d2hMs",
        "engine_with_copies": "latencyMs",
    }
    return {scope: [float(record[name]) for record in records] for scope, name in names.items()}


def _run(arguments: List[str]) -> None:
    found = program()
    if found is None:
        message = "trtexec is not installed ({})".format(USUAL_PLACE)
        raise AgentError("trtexec", message, "leave out --via, or sudo apt-get install libnvinfer-bin")
    done = subprocess.run(
        [found] + arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=die_with_parent,
        check=False,
    )
    text = done.stdout.decode("utf-8", "replace")
    sys.stderr.write(text)
    if done.returncode == -signal.SIGKILL:
        os.kill(os.getpid(), signal.SIGKILL)  # most likely for memory: end alike, and the supervisor says so
    if done.returncode or "&&&& PASSED" not in text:
        errors = [line.strip() for line in text.splitlines() if "[E]" in line]
        raise AgentError("trtexec", "trtexec failed: " + ("; ".join(errors[-2:]) or "it gave no reason"))
