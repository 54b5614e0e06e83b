"""Bundles: an archive to a device without a connection, and the results back."""

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_model import write_images, write_model
from stand_in import StandIn

from edgeprune.deploy.bundle import FOLDER, BenchmarkPlan, ImportedSession, read_results, write_bundle
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.errors import DeviceError
from edgeprune.deploy.session import local_session
from edgeprune.deploy.targets import load_target

PREPROCESSING = Preprocessing("rgb", (100.0, 110.0, 120.0), (60.0, 60.0, 60.0), 30)
TARGET = load_target("jetson-nano").without_tensorrt()
SHORT = BenchmarkPlan(runs=20, min_seconds=0.0, profile_runs=2, energy_seconds=0.2)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_model(tmp_path / f"{index}.onnx", weight=0.01 * index) for index in (1, 2)]


@pytest.fixture
def bundle(tmp_path: Path, models: list[Path], images: dict[int, Path]) -> tuple[Path, str]:
    """The unpacked bundle, as on the device, and its plan's hash."""
    path = tmp_path / "bundle.tar.gz"
    plan_sha256 = write_bundle(path, TARGET, models, images, PREPROCESSING, benchmark=SHORT, power_mode="5W")
    shutil.unpack_archive(path, tmp_path / "device")
    return tmp_path / "device" / FOLDER, plan_sha256


def run(folder: Path, python: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run the bundle by hand on a stand-in Jetson."""
    environment = StandIn(tmp_path / "jetson").environment | {"PYTHON": python}
    command = ["sh", f"{folder.name}/run.sh"]
    return subprocess.run(
        command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False
    )


def test_the_whole_way(
    *,
    bundle: tuple[Path, str],
    models: list[Path],
    images: dict[int, Path],
    tmp_path: Path,
    agent_python: Callable[[str], str],
) -> None:
    """run.sh under Python 3.6 gives results that answer as a live session would, telemetry included.

    Whatever is timed is timed in the power mode that was asked for.
    """
    folder, plan_sha256 = bundle
    done = run(folder, agent_python("3.6"), tmp_path)
    assert done.returncode == 0, done.stderr
    results = read_results(folder / "results.tar.gz")
    imported = ImportedSession(TARGET, results, plan_sha256)
    info = imported.probe()
    assert (info.board, info.transport) == ("stand-in for NVIDIA Jetson Nano Developer Kit", "bundle")
    engines = [imported.build(model) for model in models]
    assert [engine.backend_version for engine in engines] == ["1.10.0", "1.10.0"]
    latencies = imported.benchmark(engines, list(images.values()), PREPROCESSING)
    assert all(len(latencies.samples_ms(index, "engine")) >= 20 for index in (0, 1))
    assert (info.power_mode, latencies.telemetry["before"]["power_mode"]) == ("MAXN", "5W")
    timed = 1 + len(results["energy"]) + len(results["profiles"])
    assert len(results["profiles"]) == 2
    assert (tmp_path / "jetson/calls").read_text().split("\n").count("nvpmodel -m 1") == timed
    found = imported.evaluate(engines[1], images, PREPROCESSING)
    here = local_session(load_target("host"), tmp_path / "here")
    expected = here.evaluate(here.build(models[1]), images, PREPROCESSING)
    for ours, theirs in zip(expected.detections, found.detections, strict=True):
        assert ours.image_id == theirs.image_id
        assert ours.scores == pytest.approx(theirs.scores, abs=2e-3)


def test_a_damaged_bundle_does_not_run(
    bundle: tuple[Path, str], tmp_path: Path, agent_python: Callable[[str], str]
) -> None:
    """A file that changed on the way is named before anything is built."""
    folder, _ = bundle
    victim = next((folder / "files").glob("*.onnx"))
    victim.write_bytes(victim.read_bytes()[:-1])
    done = run(folder, agent_python("3.6"), tmp_path)
    assert done.returncode != 0
    assert victim.name in done.stdout
    assert not (folder / "results.tar.gz").exists()


def test_a_failed_step_is_said_and_a_rerun_completes(
    bundle: tuple[Path, str], tmp_path: Path, agent_python: Callable[[str], str]
) -> None:
    """Where a library is missing the step and the remedy are named; the second run goes on."""
    folder, _ = bundle
    done = run(folder, agent_python("rtx"), tmp_path)  # has no ONNX Runtime, and no OpenCV or Pillow
    assert done.returncode == 1
    assert "Error: " in done.stderr
    assert ": install it for the device's python3: python3 -m pip install" in done.stderr
    assert "Traceback" not in done.stderr
    shutil.rmtree(tmp_path / "jetson")
    assert run(folder, agent_python("3.8"), tmp_path).returncode == 0


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, agent_python: Callable[[str], str]
) -> tuple[dict[str, Any], str]:
    """What run.sh of a bundle with one model wrote, and its plan's hash."""
    folder = tmp_path_factory.mktemp("bundle")
    model, images = write_model(folder / "model.onnx"), write_images(folder)
    plan_sha256 = write_bundle(folder / "b.tar.gz", TARGET, [model], images, PREPROCESSING, benchmark=SHORT)
    shutil.unpack_archive(folder / "b.tar.gz", folder)
    assert run(folder / FOLDER, agent_python("3.8"), folder).returncode == 0
    return read_results(folder / FOLDER / "results.tar.gz"), plan_sha256


def test_results_of_another_bundle_are_refused(results: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    """Results belong to one plan; questions that it did not hold are not answered."""
    whole, plan_sha256 = results
    with pytest.raises(DeviceError, match="another bundle"):
        ImportedSession(TARGET, whole, "0" * 64)
    imported = ImportedSession(TARGET, whole, plan_sha256)
    with pytest.raises(DeviceError, match="do not hold this build"):
        imported.build(write_model(tmp_path / "unknown.onnx", weight=0.5))


def test_a_benchmark_is_given_once(results: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    """The benchmark, then the engine alone with its power; asked again there is nothing to count twice."""
    whole, plan_sha256 = results
    session = ImportedSession(TARGET, whole, plan_sha256)
    engine = session.build(write_model(tmp_path / "model.onnx"))
    together, more = (session.benchmark([engine], [], PREPROCESSING) for _ in range(2))
    alone = session.benchmark([engine], [], PREPROCESSING, scopes=["end_to_end"])
    assert len(together.samples_ms(0, "engine")) >= 20
    assert alone.telemetry["samples"][-1]["power_mw"]["POM_5V_IN"] == 933
    assert together.idle_s is None
    assert alone.idle_s is not None
    assert alone.idle_s[1] - alone.idle_s[0] > 0.19
    assert alone.idle_s[1] <= alone.blocks[0].start_s
    for block in alone.blocks:
        assert block.samples_ms.keys() == {"end_to_end"}
        assert block.images == 1 + len(block.samples_ms["end_to_end"])
    assert more.blocks == ()
    assert session.profile(engine, tmp_path / "model.onnx", PREPROCESSING).times_ms


def archive(path: Path, name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as file:
        entry = tarfile.TarInfo(name)
        entry.size, entry.type, entry.linkname = len(content), kind, "/etc/passwd"
        file.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"not an archive"),
        lambda path: path.write_bytes(b""),
        lambda path: archive(path, "../../results.json", b"{}"),
        lambda path: archive(path, "results.json", b"", tarfile.SYMTYPE),
        lambda path: archive(path, "results.json", b"{"),
        lambda path: archive(path, "results.json", json.dumps({"probe": {}}).encode()),
        lambda path: archive(path, "results.json", b"[]"),
    ],
)
def test_an_archive_that_is_not_ours_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """Whatever the file is, one error says so, and nothing is written anywhere."""
    make(tmp_path / "results.tar.gz")
    with pytest.raises(DeviceError, match="is no results archive"):
        read_results(tmp_path / "results.tar.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["results.tar.gz"]


def test_results_of_an_older_version_are_told_from_damaged_ones(
    results: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    """Running that bundle again would give the same: it has to be written anew."""
    bench = {name: value for name, value in results[0]["bench"].items() if name != "warmup_stable"}
    older = {**results[0], "protocol": 1, "bench": bench}
    path = archive(tmp_path / "results.tar.gz", "results.json", json.dumps(older).encode())
    with pytest.raises(DeviceError, match="another version of edgeprune: write the bundle anew"):
        read_results(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"engines": [{}]},
        {"engines": 3},
        {"probe": {"board": 1}},
        {"bench": None},
        {"bench": {"blocks": [{"engine": 0}]}},
        {"evaluations": [{"images": [{"boxes": [[1, 2]], "scores": [0.5]}]}]},
    ],
)
def test_damaged_results_are_one_error(
    damage: dict[str, object], results: tuple[dict[str, Any], str]
) -> None:
    """Results whose fields are not what they should be are refused when they are read."""
    whole, plan_sha256 = results
    ImportedSession(TARGET, whole, plan_sha256)
    with pytest.raises(DeviceError, match="the results are damaged"):
        ImportedSession(TARGET, {**whole, **damage}, plan_sha256)
