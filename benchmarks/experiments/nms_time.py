"""Time of NMS on real candidates under the Python and numpy of a Jetson Nano's JetPack.

    python benchmarks/experiments/nms_time.py --python .venvs/3.6/bin/python

NanoDet-g's 2,100 candidates at 320 for each test frame of the example video go through the device agent's
`postprocess`: at a camera's score threshold, 0.3 (aim: median below 1 ms), and at evaluation's, 0.01 with the
best 1,000 candidates (below 5 ms). Writes benchmarks/results/nms_time.json and .svg.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import edgeprune.data
import edgeprune.deploy.device
from edgeprune.benchmarks.figures import svg_file
from edgeprune.benchmarks.provenance import provenance
from edgeprune.data.dataset import load_dataset
from edgeprune.data.files import write_json
from edgeprune.deploy.device.backend_onnxruntime import OnnxRuntime
from edgeprune.detectors.registry import load_detector
from edgeprune.export.model import export_onnx
from edgeprune.pruning.checkpoint import trace_detector

RESULTS = Path(__file__).resolve().parents[1] / "results"
SIZE = (320, 320)

# Runs in the other interpreter: Python 3.6, numpy, and the agent's imaging.py.
TIMED = """
import json, sys, time
import numpy as np
sys.path.insert(0, sys.argv[1])
from imaging import Placement, Thresholds, postprocess
data = np.load(sys.argv[2])
placement = Placement(*data["placement"].tolist())
result = {"python": sys.version.split()[0], "numpy": np.__version__}
for score in (0.3, 0.01):
    thresholds, wall, cpu, kept = Thresholds(score=score), [], [], []
    counts = [int(np.sum(scores > score)) for scores in data["scores"]]
    for repeat in range(23):
        for boxes, scores in zip(data["boxes"], data["scores"]):
            start, cpu_start = time.perf_counter(), time.process_time()
            found, _ = postprocess(boxes, scores, placement, thresholds)
            if repeat > 2:
                wall.append((time.perf_counter() - start) * 1e3)
                cpu.append((time.process_time() - cpu_start) * 1e3)
                kept.append(len(found))
    result["score {}".format(score)] = {
        "p50_ms": float(np.median(wall)), "p99_ms": float(np.percentile(wall, 99)),
        "cpu_p50_ms": float(np.median(cpu)), "runs": len(wall), "detections": float(np.mean(kept)),
        "candidates": float(np.mean(counts)),
        "candidates_by_frame": counts,
        "p50_ms_by_frame": np.median(np.reshape(wall, (-1, len(counts))), axis=0).tolist(),
    }
print(json.dumps(result))
"""


def candidates(path: Path) -> tuple[int, int]:
    """Write the candidates of every test frame; returns the number of frames and of candidates in each."""
    detector: Any = load_detector("nanodet-g", None, SIZE)
    model = path.with_name("model.onnx")
    export_onnx(detector, trace_detector(detector, SIZE), model, opset=13, metadata={})
    runner = OnnxRuntime().load(str(model), {"threads": 1})
    dataset = load_dataset(Path(edgeprune.data.__file__).parent / "vtest_test.json")
    boxes, scores = [], []
    for index in range(len(dataset)):
        values, placement = runner.prepare(dataset.image(index), detector.preprocessing)
        found = runner.run(values)
        boxes.append(np.copy(found.boxes))
        scores.append(np.copy(found.scores))
    # Placement's first two fields are scales, the others whole pixels.
    np.savez(path, boxes=np.stack(boxes), scores=np.stack(scores), placement=np.array(placement))
    return len(boxes), len(boxes[0])


def plot(measured: dict[str, Any]) -> None:
    """Each frame's median against the number of its candidates."""
    with svg_file(RESULTS / "nms_time.svg") as axes:
        for score, marker in ((0.3, "o"), (0.01, "s")):
            found = measured[f"score {score}"]
            label = f"score above {score}: median {found['p50_ms']:.2f} ms"
            axes.plot(
                found["candidates_by_frame"], found["p50_ms_by_frame"], marker, fillstyle="none", label=label
            )
        axes.set(xlabel="candidates of a frame", ylabel="median time of its NMS, ms", ylim=(0, None))
        axes.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="interpreter to time in, with numpy")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "candidates.npz"
        frames, each = candidates(path)
        agent = Path(edgeprune.deploy.device.__file__).parent
        origin = provenance("nms_time.py --python PYTHON", ("onnxruntime",))
        done = subprocess.run(
            [arguments.python, "-c", TIMED, str(agent), str(path)], check=True, capture_output=True, text=True
        )
    measured = json.loads(done.stdout)
    result = {
        "schema_version": 1,
        "provenance": origin,
        "frames": frames,
        "candidates_per_frame": each,
        **measured,
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "nms_time.json", result)
    plot(measured)
    for score in (0.3, 0.01):
        found = measured[f"score {score}"]
        print(f"score above {score}: p50 {found['p50_ms']:.3f} ms, p99 {found['p99_ms']:.3f} ms")


if __name__ == "__main__":
    main()
