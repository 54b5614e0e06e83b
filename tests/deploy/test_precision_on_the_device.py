"""AP of NanoDet-g on real images: what the agent finds against what this process finds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.data.precision import AveragePrecision, average_precision
from edgeprune.deploy.session import Session, image_files
from edgeprune.deploy.targets import load_target
from edgeprune.deploy.transport import Local
from edgeprune.detectors.evaluation import evaluate
from edgeprune.detectors.registry import load_detector
from edgeprune.export.model import export_onnx
from edgeprune.export.runtime import evaluate_model
from edgeprune.pruning.checkpoint import trace_detector

pytestmark = pytest.mark.shared_data

SIZE = (320, 320)
METRICS = ("ap", "ap50", "ap75")


@pytest.fixture(scope="module")
def detector(shared: Path) -> Any:
    return load_detector("nanodet-g", shared / "nanodet-g" / "nanodet_g_coco80_convs.npz", SIZE).eval()


@pytest.fixture(scope="module")
def dataset(shared: Path) -> Dataset:
    return load_dataset(shared / "coco-person" / "person_val2017.json").subset(range(24))


@pytest.fixture(scope="module")
def model(detector: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("precision") / "model.onnx"
    export_onnx(detector, trace_detector(detector, SIZE), path, opset=13, metadata={})
    return path


def on_the_agent(
    work: Path, python: str | None, model: Path, dataset: Dataset, detector: Any
) -> AveragePrecision:
    session = Session(load_target("host"), Local(work, python) if python else Local(work))
    files = image_files(dataset, work / "frames")
    found = session.evaluate(session.build(model), files, detector.preprocessing)
    return average_precision(dataset, found.detections)


def test_the_same_runtime_gives_the_same_ap(work: Path, model: Path, dataset: Dataset, detector: Any) -> None:
    """With this process's ONNX Runtime, OpenCV and numpy, the agent's AP is the host's to 1e-6."""
    ours, theirs = evaluate_model(model, dataset), on_the_agent(work, None, model, dataset, detector)
    assert ours.ap > 0.2
    for name in METRICS:
        assert getattr(theirs, name) == pytest.approx(getattr(ours, name), abs=1e-6)


def test_another_runtime_gives_nearly_the_same_ap(
    work: Path, model: Path, dataset: Dataset, detector: Any, agent_python: Callable[[str], str]
) -> None:
    """A Jetson Nano's Python 3.6, with its older libraries, is within 0.002 of PyTorch on this machine."""
    host = evaluate(detector, trace_detector(detector, SIZE), dataset)
    theirs = on_the_agent(work, agent_python("3.6"), model, dataset, detector)
    for name in METRICS:
        assert getattr(theirs, name) == pytest.approx(getattr(host, name), abs=0.002)
