"""What the device agent adds: its runner to ONNX Runtime's own loop, its way to what lies on it.

    python benchmarks/experiments/agent_overhead.py        # about two minutes on a quiet machine

Paired: each round times every part, in random order, over the same test frames of the example video at 320.
Writes benchmarks/results/agent_overhead.json. Aims: the runner within 2 % of the loop; end to end minus the
network minus letterbox, normalisation and NMS below 3 % of end to end.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import edgeprune.data
from edgeprune.benchmarks.provenance import provenance
from edgeprune.benchmarks.statistics import paired_ratio
from edgeprune.data.dataset import load_dataset
from edgeprune.data.files import write_json
from edgeprune.deploy.device.backend_onnxruntime import OnnxRuntime
from edgeprune.deploy.device.imaging import letterbox, normalise, postprocess
from edgeprune.detectors.registry import load_detector
from edgeprune.export.model import export_onnx
from edgeprune.pruning.checkpoint import trace_detector

RESULTS = Path(__file__).resolve().parents[1] / "results"
SIZE = (320, 320)
FRAMES = 8


def parts(model: Path) -> dict[str, Callable[[int], object]]:
    """What is timed, by name; each takes the number of a frame."""
    detector: Any = load_detector("nanodet-g", None, SIZE)
    preprocessing = detector.preprocessing
    export_onnx(detector, trace_detector(detector, SIZE), model, opset=13, metadata={})
    runner = OnnxRuntime().load(str(model), {"threads": 1})
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.use_deterministic_compute = True
    session = onnxruntime.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])

    dataset = load_dataset(Path(edgeprune.data.__file__).parent / "vtest_test.json")
    frames = [dataset.image(index) for index in range(FRAMES)]
    prepared = [runner.prepare(frame, preprocessing) for frame in frames]
    found = [runner.run(values) for values, _ in prepared]
    candidates = [(np.copy(one.boxes), np.copy(one.scores)) for one in found]

    def end_to_end(number: int) -> object:
        values, placement = runner.prepare(frames[number], preprocessing)
        outputs = runner.run(values)
        return postprocess(outputs.boxes, outputs.scores, placement)

    def bare(number: int) -> object:
        canvas, placement = letterbox(frames[number], SIZE, preprocessing)
        normalise(canvas, preprocessing)
        return postprocess(*candidates[number], placement)

    return {
        "end_to_end": end_to_end,
        "engine": lambda number: runner.run(prepared[number][0]),
        "onnxruntime": lambda number: session.run(["boxes", "scores"], {"images": prepared[number][0]}),
        "letterbox_and_nms": bare,
    }


def time_ms(part: Callable[[int], object], runs: int) -> list[float]:
    samples = []
    for run in range(runs):
        start = time.perf_counter()
        part(run % FRAMES)
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def measure(rounds: int, runs: int) -> dict[str, dict[int, list[float]]]:
    """Part -> round -> milliseconds of each run."""
    with tempfile.TemporaryDirectory() as folder:
        timed = parts(Path(folder) / "model.onnx")
        for part in timed.values():
            time_ms(part, 3 * runs)
        blocks: dict[str, dict[int, list[float]]] = {name: {} for name in timed}
        order = list(timed)
        shuffle = random.Random(0).shuffle
        for number in range(rounds):
            shuffle(order)
            for name in order:
                time_ms(timed[name], 2)  # the caches hold the part before
                blocks[name][number] = time_ms(timed[name], runs)
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--runs", type=int, default=16, help="of each part in a round")
    arguments = parser.parse_args()
    command = f"agent_overhead.py --rounds {arguments.rounds} --runs {arguments.runs}"
    origin = provenance(command, ("numpy", "onnxruntime", "opencv-python-headless"))
    blocks = measure(arguments.rounds, arguments.runs)
    median = {
        name: np.array([np.median(rounds[number]) for number in range(arguments.rounds)])
        for name, rounds in blocks.items()
    }
    # Per round, so that drift cancels as in a ratio; then the median of the rounds.
    added = (median["end_to_end"] - median["engine"] - median["letterbox_and_nms"]) / median["end_to_end"]
    runner = paired_ratio(blocks["engine"], blocks["onnxruntime"])
    assert runner is not None
    result = {
        "schema_version": 1,
        "provenance": origin,
        "p50_ms": {name: float(np.median(values)) for name, values in median.items()},
        "runner_of_onnxruntime_loop": asdict(runner),
        "added_share_of_end_to_end": float(np.median(added)),
        "added_share_quartiles": [float(q) for q in np.quantile(added, [0.25, 0.75])],
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "agent_overhead.json", result)
    print(f"runner / ONNX Runtime's loop: {runner.value:.4f} ({runner.low:.4f} to {runner.high:.4f})")
    print(f"added by the agent: {np.median(added):.2%} of end to end")


if __name__ == "__main__":
    main()
