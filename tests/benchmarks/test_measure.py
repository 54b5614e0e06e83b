"""Real engines on this machine, measured through the agent."""

import json
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from benchmarks_example import step
from onnx import TensorProto, helper, numpy_helper

from edgeprune.benchmarks.measure import BenchmarkOptions, benchmark_engines
from edgeprune.benchmarks.records import Report, ReportRow
from edgeprune.benchmarks.samples import sample_frames
from edgeprune.benchmarks.statistics import summarise
from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.data.files import sha256_of
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.session import image_files, local_session
from edgeprune.deploy.targets import load_target

PERSON = [8.0, 8.0, 24.0, 30.0]  # xyxy
ELSEWHERE = [30.0, 2.0, 44.0, 14.0]


def write_model(path: Path, scores: list[float]) -> Path:
    """A detector that finds the person and something elsewhere in every image, with these scores."""
    values = {"found": np.array([[PERSON, ELSEWHERE]], np.float32), "sure": np.array([scores], np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["found"], ["boxes"]),
            helper.make_node("Identity", ["sure"], ["scores"]),
        ],
        "two_boxes",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, 32, 48))],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, (1, 2, 4)),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, (1, 2)),
        ],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7), path)
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three images of 48 x 32 pixels, one person in each."""
    x1, y1, x2, y2 = PERSON
    for number in range(3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((32, 48, 3), 100, np.uint8))
    coco = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 48, "height": 32} for n in range(3)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {
                "id": 1 + n,
                "image_id": n,
                "category_id": 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            for n in range(3)
        ],
    }
    (tmp_path / "labels.json").write_text(json.dumps(coco))
    return load_dataset(tmp_path / "labels.json", tmp_path)


def test_engines_are_measured_together(dataset: Dataset, tmp_path: Path) -> None:
    """Each result belongs to its model; rounds are shared; AP is 1 where the person scores best, else 1/2.

    With the wrong box always ahead, precision at every recall is k / 2k.
    """
    models = [
        write_model(tmp_path / f"{n}.onnx", scores) for n, scores in enumerate(([0.9, 0.4], [0.4, 0.9]))
    ]
    session = local_session(load_target("host"), tmp_path / "work")
    engines = [session.build(model) for model in models]
    right, wrong = benchmark_engines(
        session,
        engines,
        dataset,
        image_files(dataset, tmp_path),
        Preprocessing(),
        options=BenchmarkOptions(runs=20, min_seconds=0.0, block_runs=5, warmup_runs=5),
    )
    assert [right.model_sha256, wrong.model_sha256] == [sha256_of(model) for model in models]
    assert (right.ap, right.ap50) == pytest.approx((1, 1))
    assert (wrong.ap, wrong.ap50) == pytest.approx((0.5, 0.5), abs=0.01)
    assert (right.images, right.boxes) == (3, 3)
    assert right.device.target == "host" and not right.device.on_gpu
    assert right.engine_size_bytes == models[0].stat().st_size
    for result in (right, wrong):
        assert [block.index for block in result.blocks] == [0, 1, 2, 3]
        for scope in ("engine", "end_to_end"):
            samples = [ms for block in result.blocks for ms in block.samples_ms[scope]]
            assert len(samples) == 20
            assert result.latency(scope) == summarise(samples, scope)
        engine, whole = result.latency("engine"), result.latency("end_to_end")
        assert engine is not None and whole is not None
        assert engine.p50_ms < whole.p50_ms
    spans = sorted((block.start_s, block.end_s) for result in (right, wrong) for block in result.blocks)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_samples_are_the_same_images_for_every_engine(dataset: Dataset, tmp_path: Path) -> None:
    """Detections of at least 0.3 are kept for the same images, whose frames are the data set's."""
    session = local_session(load_target("host"), tmp_path / "work")
    engines = [
        session.build(write_model(tmp_path / f"{n}.onnx", scores))
        for n, scores in enumerate(([0.9, 0.1], [0.4, 0.9]))
    ]
    options = BenchmarkOptions(runs=1, min_seconds=0.0, block_runs=1, warmup_runs=1, profile_runs=1)
    first, last = benchmark_engines(
        session, engines, dataset, image_files(dataset, tmp_path), Preprocessing(), options=options
    )
    assert [sample.image_id for sample in first.samples] == [0, 1, 2]
    assert all(sample.boxes == (tuple(PERSON),) for sample in first.samples)
    assert all(sample.boxes == (tuple(ELSEWHERE), tuple(PERSON)) for sample in last.samples)
    rows = tuple(ReportRow(step(n), 1, measured) for n, measured in enumerate((first, last)))
    frames = sample_frames(Report("run", rows, {}), dataset)
    assert frames.keys() == {0, 1, 2}
    assert all((frame == 100).all() and frame.shape == (32, 48, 3) for frame in frames.values())
