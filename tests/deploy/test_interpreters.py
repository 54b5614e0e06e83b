"""The agent under the Pythons of the boards: the whole way from a job to a result, in real interpreters."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from agent_venvs import REQUIREMENTS

from edgeprune.deploy import session as session_module
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.session import Session, local_session
from edgeprune.deploy.targets import load_target
from edgeprune.deploy.transport import Local

DEVICE = Path(session_module.__file__).parent / "device"
PREPROCESSING = Preprocessing("rgb", (100.0, 110.0, 120.0), (60.0, 60.0, 60.0), 30)
PYTHONS = [name for name in REQUIREMENTS if name[0].isdigit()]


@pytest.mark.parametrize("version", PYTHONS)
def test_the_agent_runs(
    version: str, work: Path, model: Path, images: dict[int, Path], agent_python: Callable[[str], str]
) -> None:
    """Probe, build, benchmark, evaluation and profile work, and detections are those of this Python.

    Other versions of ONNX Runtime and OpenCV, or Pillow, may differ in the last digits and by a grey level.
    """
    session = Session(load_target("host"), Local(work, agent_python(version)))
    info = session.probe()
    assert info.python.startswith(version + ".")
    assert info.images == ("pillow" if version == "3.12" else info.images)
    engine = session.build(model)
    assert session.build(model).reused
    here = local_session(load_target("host"), work.with_name("here"))
    expected = here.evaluate(here.build(model), images, PREPROCESSING)
    found = session.evaluate(engine, images, PREPROCESSING)
    for ours, theirs in zip(expected.detections, found.detections, strict=True):
        assert np.allclose(ours.boxes, theirs.boxes, atol=1e-4)
        assert np.allclose(ours.scores, theirs.scores, atol=2e-3)
    latencies = session.benchmark([engine], list(images.values()), PREPROCESSING, runs=5, warmup_runs=1)
    assert len(latencies.samples_ms(0, "end_to_end")) >= 5
    profile = session.profile(engine, images[100], PREPROCESSING, runs=3)
    assert any("Sigmoid" in layer.title() for layer in profile.times_ms)
    assert all(len(times) == 3 for times in profile.times_ms.values())
    assert {check.name for check in session.doctor()} >= {"Python", "numpy", "free disk"}


def test_every_agent_file_is_python_3_6(agent_python: Callable[[str], str]) -> None:
    """CPython 3.6 itself compiles each file, and vermin finds no later library call."""
    files = [str(path) for path in sorted(DEVICE.rglob("*.py"))]
    code = "import sys\nfor path in sys.argv[1:]: compile(open(path, encoding='utf-8').read(), path, 'exec')"
    subprocess.run([agent_python("3.6"), "-c", code, *files], check=True)
    found = subprocess.run(
        ["vermin", "--target=3.6-", "--no-tips", "--violations", *files],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(Path(sys.executable).parent)},
    )
    assert found.returncode == 0, found.stdout


def test_nms_is_quick_under_python_3_6(agent_python: Callable[[str], str]) -> None:
    """2,100 candidates take a few milliseconds in the oldest numpy.

    The bound is generous, since tests share the machine; the exact figures are a benchmark's business.
    """
    code = """
import importlib.util, sys, time
import numpy as np
spec = importlib.util.spec_from_file_location("imaging", sys.argv[1])
imaging = importlib.util.module_from_spec(spec); spec.loader.exec_module(imaging)
random = np.random.RandomState(0)
people = random.uniform(0, 320, (40, 2))  # candidates crowd around people, as a detector's do
centres = people[random.randint(0, 40, 2100)] + random.normal(0, 6, (2100, 2))
sizes = np.array([24.0, 60.0]) * random.uniform(0.8, 1.25, (2100, 2))
boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1).astype(np.float32)
scores = (random.uniform(0, 1, 2100) ** 6).astype(np.float32)
place = imaging.Placement(1.0, 1.0, 0, 0, 320, 320)
for threshold in (0.3, 0.01):
    wanted, times = imaging.Thresholds(score=threshold), []
    for _ in range(30):
        start = time.perf_counter()
        imaging.postprocess(boxes, scores, place, wanted)
        times.append(time.perf_counter() - start)
    print(min(times) * 1e3)
"""
    done = subprocess.run(
        [agent_python("3.6"), "-c", code, str(DEVICE / "imaging.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    camera_ms, evaluation_ms = (float(line) for line in done.stdout.split())
    print(f"NMS: {camera_ms:.2f} ms at 0.3, {evaluation_ms:.2f} ms at 0.01")
    assert camera_ms < 3
    assert evaluation_ms < 15
