"""What the device agent adds: its runner to ONNX Runtime's own loop, its way to what lies on it.

    python benchmarks/experiments/agent_overhead.py        # about three minutes on a quiet machine
    python benchmarks/experiments/agent_overhead.py --clock cpu     # the process's own time, on a busy one

Paired: each round times every part, in random order, over the same test frames of the example video at 320.
Writes benchmarks/results/agent_overhead.json and .svg. Aims: the runner within 2 % of the loop; end to end minus
the network minus letterbox, normalisation and NMS below 3 % of end to end.

Letterbox, normalisation and NMS are timed twice: in a loop of their own, and around a network whose time is left
out. The second is slower, since the network has pushed their code and arrays out of the caches; the difference is
part of what the first says that the agent adds, and none of it is the agent's code.
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
from edgeprune.benchmarks.figures import svg_file
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
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Part = Callable[[int], float]  # the number of a frame -> seconds


def parts(model: Path, clock: Callable[[], float]) -> dict[str, Part]:
    """What is timed, by name."""
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

    def bare_around_the_network(number: int) -> float:
        start = clock()
        canvas, placement = letterbox(frames[number], SIZE, preprocessing)
        values = normalise(canvas, preprocessing)
        before = clock() - start
        outputs = runner.run(values)
        start = clock()
        postprocess(outputs.boxes, outputs.scores, placement)
        return before + clock() - start

    def timed(call: Callable[[int], object]) -> Part:
        def part(number: int) -> float:
            start = clock()
            call(number)
            return clock() - start

        return part

    return {
        "end_to_end": timed(end_to_end),
        "engine": timed(lambda number: runner.run(prepared[number][0])),
        "onnxruntime": timed(
            lambda number: session.run(["boxes", "scores"], {"images": prepared[number][0]})
        ),
        "letterbox_and_nms": timed(bare),
        "letterbox_and_nms_around_the_network": bare_around_the_network,
    }


def measure(rounds: int, runs: int, clock: Callable[[], float]) -> dict[str, dict[int, list[float]]]:
    """Part -> round -> milliseconds of each run."""
    with tempfile.TemporaryDirectory() as folder:
        timed = parts(Path(folder) / "model.onnx", clock)
    blocks: dict[str, dict[int, list[float]]] = {name: {} for name in timed}
    order = list(timed)
    shuffle = random.Random(0).shuffle
    for number in range(-2, rounds):  # two to warm up
        shuffle(order)
        for name in order:
            timed[name](0), timed[name](1)  # the caches hold the part before
            blocks[name][number] = [timed[name](run % FRAMES) * 1e3 for run in range(runs)]
    return {name: {n: ms for n, ms in of_part.items() if n >= 0} for name, of_part in blocks.items()}


def share(whole: np.ndarray, *parts_ms: np.ndarray) -> dict[str, float]:
    """What is left of the whole, of it: per round, so that drift cancels; then median and quartiles."""
    shares = (whole - sum(parts_ms)) / whole
    low, middle, high = (float(value) for value in np.quantile(shares, [0.25, 0.5, 0.75]))
    return {"median": middle, "quartile_low": low, "quartile_high": high}


def plot(p50_ms: dict[str, float]) -> None:
    """One bar: end to end, and what it is made of."""
    around, alone = p50_ms["letterbox_and_nms_around_the_network"], p50_ms["letterbox_and_nms"]
    pieces = {
        "network": p50_ms["engine"],
        "letterbox and NMS, alone": alone,
        "the same with cold caches": around - alone,
        "the agent": p50_ms["end_to_end"] - p50_ms["engine"] - around,
    }
    with svg_file(RESULTS / "agent_overhead.svg", height_in=2.2) as axes:
        left = 0.0
        for label, piece_ms in pieces.items():
            axes.barh(0, piece_ms, left=left, label=f"{label}: {piece_ms:.2f} ms")
            left += piece_ms
        axes.set(xlabel="end to end at 320, ms", yticks=[], ylim=(-0.5, 2.2))
        axes.legend(frameon=False, ncols=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--runs", type=int, default=16, help="of each part in a round")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    asked = parser.parse_args()
    command = f"agent_overhead.py --rounds {asked.rounds} --runs {asked.runs} --clock {asked.clock}"
    origin = provenance(command, ("numpy", "onnxruntime", "opencv-python-headless"))
    blocks = measure(asked.rounds, asked.runs, CLOCKS[asked.clock])
    median = {
        name: np.array([np.median(rounds[number]) for number in range(asked.rounds)])
        for name, rounds in blocks.items()
    }
    runner = paired_ratio(blocks["engine"], blocks["onnxruntime"])
    assert runner is not None
    whole, network = median["end_to_end"], median["engine"]
    added = share(whole, network, median["letterbox_and_nms"])
    own = share(whole, network, median["letterbox_and_nms_around_the_network"])
    p50_ms = {name: float(np.median(values)) for name, values in median.items()}
    result = {
        "schema_version": 2,
        "provenance": origin,
        "p50_ms": p50_ms,
        "runner_of_onnxruntime_loop": asdict(runner),
        "added_share_of_end_to_end": added,
        "added_share_without_cold_caches": own,
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "agent_overhead.json", result)
    plot(p50_ms)
    interval = f" ({runner.low:.4f} to {runner.high:.4f})" if runner.low and runner.high else ""
    print(f"runner / ONNX Runtime's loop: {runner.value:.4f}{interval}")
    print(f"added by the agent: {added['median']:.2%} of end to end, {own['median']:.2%} without cold caches")


if __name__ == "__main__":
    main()
