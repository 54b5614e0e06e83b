"""A run folder with files of its own making, as the stages would write it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks_example import report, result, step

from edgeprune.export.model import Batch, ExportedModel
from edgeprune.pruning.records import DetectorSpec

SPEC = DetectorSpec(
    name="nanodet-g",
    input_size=(320, 320),
    classes=("person",),
    preprocessing={"color": "bgr", "mean": [103.53, 116.28, 123.675], "std": [57.4, 57.1, 58.4]},
    channels={},
    kept={},
)


def write(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def write_run(folder: Path, steps: int = 3) -> Path:
    """All steps measured; the model's bytes are no ONNX, their hashes are right."""
    write(folder / "run.json", {"config": {"target": "host"}})
    for iteration in range(steps):
        inside = folder / f"step-{iteration:02d}"
        inside.mkdir(parents=True)
        (inside / "model.onnx").write_bytes(b"model %d" % iteration)
        (inside / "weights.safetensors").write_bytes(b"weights %d" % iteration)
        sha256 = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (inside / "model.onnx", inside / "weights.safetensors")
        }
        record = {
            "spec": SPEC.to_json(),
            "steps": [step(i).to_json() for i in range(iteration + 1)],
            "weights_sha256": sha256["weights.safetensors"],
        }
        write(inside / "detector.json", record)
        size_bytes = report(steps).rows[iteration].model_size_bytes
        assert size_bytes is not None
        model = ExportedModel(
            inside / "model.onnx", sha256["model.onnx"], size_bytes, 13, 8, "fp32", Batch(), (), (), 9, 8
        )
        write(inside / "export.json", model.to_json())
        write(inside / "benchmark.json", result(iteration).to_json() | {"model_sha256": sha256["model.onnx"]})
    return folder
