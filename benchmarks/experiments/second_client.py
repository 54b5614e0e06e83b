"""Whether a second viewer of the camera's page slows detection: frames per second with none, one and two.

    python benchmarks/experiments/second_client.py         # about three minutes on a quiet machine

Paired: each round detects in the test frames of the example video at 320 with each number of viewers, in
random order, as fast as it goes: letterbox, inference, NMS, boxes drawn, published. A viewer is a process of
its own on this machine that reads all it gets; a real one would read elsewhere, so what is measured bounds
from above what it costs. Writes benchmarks/results/second_client.{json,svg}. Aim: two viewers within 1 % of one.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import edgeprune.data
from edgeprune.benchmarks.figures import svg_file
from edgeprune.benchmarks.provenance import provenance
from edgeprune.benchmarks.records import Ratio
from edgeprune.benchmarks.statistics import paired_ratio
from edgeprune.data.dataset import load_dataset
from edgeprune.data.files import write_json
from edgeprune.deploy.device.backend_onnxruntime import OnnxRuntime
from edgeprune.deploy.device.camera.outputs import annotate
from edgeprune.deploy.device.camera.pipeline import Found
from edgeprune.deploy.device.camera.stream import Stream
from edgeprune.deploy.device.imaging import Thresholds, postprocess
from edgeprune.detectors.registry import load_detector
from edgeprune.export.model import export_onnx
from edgeprune.pruning.checkpoint import trace_detector

RESULTS = Path(__file__).resolve().parents[1] / "results"
SIZE = (320, 320)
FRAMES = 8
VIEWERS = (0, 1, 2)
# Says when the first picture has begun to come, then reads on.
VIEWER = """
import sys, urllib.request
stream = urllib.request.urlopen(sys.argv[1])
stream.read(1000)
print(flush=True)
while stream.read(1 << 16):
    pass
"""


def detection(model: Path, stream: Stream) -> Callable[[], None]:
    """Detects in the next frame and publishes it."""
    detector: Any = load_detector("nanodet-g", None, SIZE)
    export_onnx(detector, trace_detector(detector, SIZE), model, opset=13, metadata={})
    runner = OnnxRuntime().load(str(model), {"threads": 1})
    dataset = load_dataset(Path(edgeprune.data.__file__).parent / "vtest_test.json")
    frames = [dataset.image(index) for index in range(FRAMES)]
    number = 0

    def detect() -> None:
        nonlocal number
        frame = frames[number % FRAMES]
        number += 1
        values, placement = runner.prepare(frame, detector.preprocessing)
        candidates = runner.run(values)
        boxes, scores = postprocess(candidates.boxes, candidates.scores, placement, Thresholds(score=0.3))
        picture = (
            annotate(frame, Found(boxes, scores, None, len(boxes)), "step 0") if stream.wanted() else None
        )
        stream.publish(picture, {"frames": number})

    return detect


@contextmanager
def viewers(count: int, address: str, detect: Callable[[], None]) -> Iterator[None]:
    """So many viewers, each with its first picture; meanwhile detection goes on."""
    processes = [
        subprocess.Popen([sys.executable, "-c", VIEWER, address], stdout=subprocess.PIPE)
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            while not process.stdout.read(1):
                detect()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def measure(rounds: int, runs: int) -> dict[int, dict[int, list[float]]]:
    """Number of viewers -> round -> milliseconds of each frame."""
    blocks: dict[int, dict[int, list[float]]] = {count: {} for count in VIEWERS}
    order = list(VIEWERS)
    shuffle = random.Random(0).shuffle
    stream = Stream("127.0.0.1", 0)
    with tempfile.TemporaryDirectory() as folder:
        detect = detection(Path(folder) / "model.onnx", stream)
        for _ in range(2 * runs):
            detect()
        for number in range(rounds):
            shuffle(order)
            for count in order:
                with viewers(count, f"http://127.0.0.1:{stream.port}/stream.mjpg", detect):
                    blocks[count][number] = time_ms(detect, runs)
                while stream.wanted():
                    detect()  # until the last one's absence is noticed
    stream.close()
    return blocks


def time_ms(detect: Callable[[], None], runs: int) -> list[float]:
    samples = []
    for _ in range(runs):
        start = time.perf_counter()
        detect()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def plot(ratios: dict[str, Ratio]) -> None:
    with svg_file(RESULTS / "second_client.svg", height_in=1.8) as axes:
        axes.axvline(1, color="0.7", linewidth=1)
        values = [ratio.value for ratio in ratios.values()]
        errors = [(r.value - (r.low or r.value), (r.high or r.value) - r.value) for r in ratios.values()]
        axes.errorbar(values, list(ratios), xerr=np.transpose(errors), fmt="o", capsize=3)
        axes.set(xlabel="time of a frame with so many viewers, as a ratio (95 %)", ylim=(-0.5, 1.5))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--runs", type=int, default=50, help="frames of each part in a round")
    arguments = parser.parse_args()
    command = f"second_client.py --rounds {arguments.rounds} --runs {arguments.runs}"
    origin = provenance(command, ("numpy", "onnxruntime", "opencv-python-headless"))
    blocks = measure(arguments.rounds, arguments.runs)
    fps = {
        count: float(np.median([1e3 / np.mean(samples) for samples in rounds.values()]))
        for count, rounds in blocks.items()
    }
    first, second = (paired_ratio(blocks[more], blocks[fewer]) for more, fewer in ((1, 0), (2, 1)))
    assert first is not None
    assert second is not None
    result = {
        "schema_version": 1,
        "provenance": origin,
        "fps_by_viewers": {str(count): value for count, value in fps.items()},
        "time_of_a_frame_one_to_none": asdict(first),
        "time_of_a_frame_two_to_one": asdict(second),
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "second_client.json", result)
    plot({"one to none": first, "two to one": second})
    print("FPS with none, one and two viewers: " + ", ".join(f"{value:.1f}" for value in fps.values()))
    for name, ratio in (("one to none", first), ("two to one", second)):
        interval = "" if ratio.low is None else f" ({ratio.low:.4f} to {ratio.high:.4f})"
        print(f"time of a frame, {name}: {ratio.value:.4f}{interval}")


if __name__ == "__main__":
    main()
