"""A session with this machine: the agent in a process of its own, every failure a clear error."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_model import SIZE, write_model

from edgeprune.data.dataset import Dataset, Sample
from edgeprune.deploy.device.imaging import Preprocessing, letterbox, load_image, normalise, postprocess
from edgeprune.deploy.errors import DeviceError
from edgeprune.deploy.records import DeviceInfo, Engine, Latencies
from edgeprune.deploy.session import Session, image_files, local_session
from edgeprune.deploy.targets import load_target
from edgeprune.deploy.transport import Local

PREPROCESSING = Preprocessing("rgb", (100.0, 110.0, 120.0), (60.0, 60.0, 60.0), 30)
MIB = 1 << 20


@pytest.fixture
def session(work: Path, events: list[Mapping[str, Any]]) -> Session:
    return local_session(load_target("host"), work, events.append)


def replace_runtime(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Have the agent import an `onnxruntime` whose sessions do `body`."""
    folder.mkdir()
    (folder / "onnxruntime.py").write_text(
        textwrap.dedent(
            f"""
            import ctypes, os, signal, time
            __version__ = "1.10.0"
            class SessionOptions: pass
            class InferenceSession:
                def __init__(self, *args, **kwargs):
                    {body}
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))


def leftovers(work: Path) -> list[Path]:
    return [path for path in work.rglob("*") if path.suffix == ".tmp" or path.name.startswith("probe-")]


def test_probe_describes_this_machine(session: Session, work: Path) -> None:
    """The probe's answers are those of this process, and the record survives JSON."""
    info = session.probe()
    assert info.target == "host"
    assert info.backend_version == onnxruntime.__version__
    assert info.python == ".".join(map(str, sys.version_info[:3]))
    assert info.cpus == os.cpu_count()
    total_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    assert info.memory_mib["total"] == pytest.approx(total_mib, abs=1)
    assert DeviceInfo.from_json(info.to_json()) == info
    assert not leftovers(work)


def test_detections_are_those_of_this_process(session: Session, model: Path, images: dict[int, Path]) -> None:
    """The agent's detections equal ONNX Runtime, letterbox and NMS run here, to the last bit."""
    engine = session.build(model)
    found = session.evaluate(engine, images, PREPROCESSING)
    runtime = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert [detections.image_id for detections in found.detections] == list(images)
    assert found.not_finite == 0
    for path, detections in zip(images.values(), found.detections, strict=True):
        canvas, placement = letterbox(load_image(str(path)), SIZE, PREPROCESSING)
        boxes, scores = runtime.run(["boxes", "scores"], {"images": normalise(canvas, PREPROCESSING)})
        boxes, scores = postprocess(boxes[0], scores[0], placement)
        assert len(scores) >= 3
        assert np.array_equal(detections.boxes, boxes)
        assert np.array_equal(detections.scores, scores)
        assert detections.boxes.dtype == detections.scores.dtype == np.float32


def test_an_engine_is_built_once(session: Session, model: Path, tmp_path: Path) -> None:
    """The same model and settings find the engine built; another model, or other settings, do not."""
    engine = session.build(model)
    assert not engine.reused
    assert Engine.from_json(engine.to_json()) == engine
    assert session.build(model).reused
    assert session.build(model).key == engine.key
    assert not session.build(model, options={"threads": 2}).reused
    assert not session.build(write_model(tmp_path / "other.onnx", weight=0.02)).reused


def write_large_model(path: Path, features: int, weights: int) -> Path:
    """Reads the image by a 1x1 convolution to so many channels, and their mean by so many columns of weights."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (features, 3, 1, 1), "columns": (features, weights)}
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["features"]),
        helper.make_node("ReduceMean", ["features"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "columns"], ["numbers"]),
        helper.make_node("ReduceMean", ["numbers"], ["scores"], axes=[1], keepdims=1),
        helper.make_node("Identity", ["candidates"], ["boxes"]),
    ]
    initializers = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, *SIZE))],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, (1, 1, 4)),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, (1, 1)),
        ],
        [*initializers, numpy_helper.from_array(np.zeros((1, 1, 4), np.float32), "candidates")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7), path)
    return path


def test_an_engine_tells_its_memory(session: Session, tmp_path: Path) -> None:
    """It grows by as much as weights do, and by a few times as much as activations do: ONNX Runtime holds those of
    the first run and, planned by it, those of all others; the same build tells the same."""
    area = SIZE[0] * SIZE[1]
    found = {
        (features, weights): session.build(
            write_large_model(tmp_path / "m.onnx", features, weights)
        ).memory_mib
        for features, weights in [(512, 64), (512, 16384), (2048, 64)]
    }
    few, heavy, wide = found.values()
    assert few is not None and heavy is not None and wide is not None
    assert few >= 512 * area * 4 / MIB
    assert heavy - few == pytest.approx(512 * (16384 - 64) * 4 / MIB, rel=0.1)
    more = 1536 * area * 4 / MIB
    assert 0.9 * more < wide - few < 6 * more
    again = session.build(tmp_path / "m.onnx", options={"threads": 1})
    assert not again.reused
    assert again.memory_mib == pytest.approx(wide, abs=0.5)


def test_a_record_without_memory_is_no_record(session: Session, work: Path, model: Path) -> None:
    """An engine that an earlier version built is built again, so that its memory is known."""
    engine = session.build(model)
    path = (work / engine.path).with_suffix(".json")
    record = json.loads(path.read_text())
    del record["memory_mib"]
    path.write_text(json.dumps(record))
    again = session.build(model)
    assert not again.reused
    assert again.memory_mib is not None
    assert Engine.from_json({**record, "log": []}).memory_mib is None


def test_a_damaged_engine_is_built_again_and_never_run(
    session: Session, work: Path, model: Path, images: dict[int, Path]
) -> None:
    """An engine whose content changed is refused; building gives a good one."""
    engine = session.build(model)
    (work / engine.path).write_bytes(b"damaged")
    with pytest.raises(DeviceError, match="not the file") as raised:
        session.evaluate(engine, images, PREPROCESSING)
    assert raised.value.kind == "checksum"
    again = session.build(model)
    assert not again.reused
    assert session.evaluate(again, images, PREPROCESSING).detections


def test_an_engine_of_another_version_is_refused(
    session: Session, model: Path, images: dict[int, Path]
) -> None:
    """An engine runs only with the runtime that built it."""
    engine = session.build(model)
    other = Engine.from_json({**engine.to_json(), "backend_version": "0.1"})
    with pytest.raises(DeviceError, match=r"built for backend_version '0\.1'"):
        session.evaluate(other, images, PREPROCESSING)


def test_benchmark_interleaves_engines(session: Session, tmp_path: Path, images: dict[int, Path]) -> None:
    """Every engine has a block in each round, rounds differ in order, blocks hold their runs by scope."""
    engines = [session.build(write_model(tmp_path / f"{i}.onnx", weight=0.01 * i)) for i in (1, 2, 3)]
    found = session.benchmark(engines, list(images.values()), PREPROCESSING, runs=40, block_runs=4, seed=1)
    assert found.engines == tuple(engine.key for engine in engines)
    rounds = [[b.engine for b in found.blocks if b.round == number] for number in range(10)]
    assert all(sorted(order) == [0, 1, 2] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert [b.start_s for b in found.blocks] == sorted(b.start_s for b in found.blocks)
    for index in range(3):
        engine_ms, whole_ms = (found.samples_ms(index, scope) for scope in ("engine", "end_to_end"))
        assert engine_ms.shape == whole_ms.shape == (40,)
        assert 0 < np.median(engine_ms) < np.median(whole_ms)
    for block in found.blocks:
        recorded_s = sum(map(sum, block.samples_ms.values())) / 1e3
        assert recorded_s <= block.end_s - block.start_s
        assert block.images == 1 + len(block.samples_ms["end_to_end"])
        assert block.images_per_s is None  # no copies to overlap in ONNX Runtime on the CPU
    assert all(runs >= 10 for runs in found.warmup_runs)
    assert len(found.warmup_stable) == 3
    assert 0 < found.timer_overhead_ms < 0.1
    assert Latencies.from_json(found.to_json()) == found


def test_benchmark_lasts_as_long_as_asked(session: Session, model: Path, images: dict[int, Path]) -> None:
    """The least duration adds rounds."""
    engine = session.build(model)
    found = session.benchmark(
        [engine], list(images.values()), PREPROCESSING, runs=1, block_runs=1, min_seconds=0.5
    )
    assert found.blocks[-1].end_s - found.blocks[0].start_s >= 0.49
    assert len(found.samples_ms(0, "engine")) > 1


def test_progress_counts_images(
    session: Session, model: Path, images: dict[int, Path], events: list[Mapping[str, Any]]
) -> None:
    """The host hears of every image."""
    session.evaluate(session.build(model), images, PREPROCESSING)
    done = [event["done"] for event in events if event["event"] == "progress"]
    assert done == [1, 2, 3]


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed", "most likely for memory"),
        ("ctypes.string_at(0)", "crashed", "SIGSEGV"),
        ("raise RuntimeError('no such operator')", "model", "no such operator"),
        ("raise MemoryError", "model", "refuses"),
    ],
)
def test_a_dying_runtime_is_a_result(
    *,
    session: Session,
    work: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    kind: str,
    said: str,
) -> None:
    """Killed, crashed or refused: one clear line, nothing half-written, and the next try works."""
    with monkeypatch.context() as patch:
        replace_runtime(patch, tmp_path / "fake", body)
        with pytest.raises(DeviceError, match=said) as raised:
            session.build(model)
    assert raised.value.kind == kind
    assert not leftovers(work)
    assert not session.build(model).reused


def test_a_missing_runtime_names_the_remedy(
    session: Session, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ONNX Runtime the probe still answers, and a build says how to install it."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "onnxruntime.py").write_text("raise ImportError('no module')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    info = session.probe()
    assert info.backend_version is None
    assert info.backends["onnxruntime"]["error"]["kind"] == "backend"
    with pytest.raises(DeviceError, match="pip install onnxruntime"):
        session.build(model)


@pytest.mark.parametrize("content", [b"not a model", b""])
def test_a_file_that_is_no_model_is_refused(session: Session, tmp_path: Path, content: bytes) -> None:
    """A damaged ONNX file is named as such, and leaves no engine."""
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(DeviceError, match="ONNX Runtime refuses") as raised:
        session.build(tmp_path / "bad.onnx")
    assert "\n" not in str(raised.value).strip()


def test_an_image_that_does_not_decode_is_named(session: Session, model: Path, tmp_path: Path) -> None:
    """The error says that an image is broken."""
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 broken")
    engine = session.build(model)
    with pytest.raises(DeviceError, match=r"broken\.jpg.*does not decode"):
        session.evaluate(engine, {1: tmp_path / "broken.jpg"}, PREPROCESSING)


def test_a_precision_that_the_target_lacks_is_refused(session: Session, model: Path) -> None:
    """The host target runs fp32 only, and says so."""
    with pytest.raises(DeviceError, match="fp32"):
        session.build(model, "int8")


def test_files_are_sent_once(session: Session, work: Path, model: Path, images: dict[int, Path]) -> None:
    """The work folder holds each content once, under its hash."""
    engine = session.build(model)
    session.evaluate(engine, images, PREPROCESSING)
    session.evaluate(engine, {7: images[100], **images}, PREPROCESSING)
    assert len(list((work / "files").iterdir())) == 1 + len(images)


def test_two_jobs_do_not_share_the_device(
    work: Path, model: Path, images: dict[int, Path], events: list[Mapping[str, Any]]
) -> None:
    """While one job holds the device another one waits, and gives up after the time it was given."""
    session = Session(load_target("host"), Local(work), events.append, lock_wait_s=0.3)
    work.mkdir()
    lock = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{lock}; print(1, flush=True); input()", str(work / "device.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(DeviceError, match="busy with another edgeprune job") as raised:
            session.build(model)
        assert raised.value.kind == "busy"
        assert any(event["event"] == "waiting" for event in events)
        other.communicate(b"\n")
    assert session.build(model)


def test_the_agent_ends_with_its_host(
    work: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the host process is killed, agent and child end too and the device is free again."""
    marker = tmp_path / "child.pid"
    body = f"open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    replace_runtime(monkeypatch, tmp_path / "fake", body)
    code = textwrap.dedent(
        f"""
        from pathlib import Path
        from edgeprune.deploy.session import local_session
        from edgeprune.deploy.targets import load_target
        local_session(load_target("host"), Path({str(work)!r})).build(Path({str(model)!r}))
        """
    )
    with subprocess.Popen([sys.executable, "-c", code]) as host:
        wait_for(lambda: marker.exists() and bool(marker.read_text()), "the child did not start")
        host.kill()
    child = int(marker.read_text())
    wait_for(lambda: not alive(child), "the child outlived its host")
    monkeypatch.undo()
    session = Session(load_target("host"), Local(work), lock_wait_s=5)
    assert session.build(model)


def test_an_agent_that_is_stopped_ends_its_child(
    work: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that takes too long is ended, with all that it started."""
    marker = tmp_path / "child.pid"
    body = f"open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    replace_runtime(monkeypatch, tmp_path / "fake", body)
    session = Session(load_target("host"), Local(work), timeout_s=1.5)
    with pytest.raises(DeviceError, match="over 2 s") as raised:
        session.build(model)
    assert raised.value.kind == "timeout"
    assert not alive(int(marker.read_text()))


def wait_for(condition: Any, failure: str) -> None:
    give_up_at = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_at, failure
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_image_files_keeps_stills_and_writes_frames(tmp_path: Path, images: dict[int, Path]) -> None:
    """Still images stay where they are; a video's frame becomes a PNG with the same pixels."""
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)

    class Video(Dataset):
        def image(self, index: int) -> np.ndarray:
            return frame

    empty, none = np.zeros((0, 4), np.float32), np.zeros(0, bool)
    still = images[100]
    samples = (
        Sample(100, still.name, 60, 40, empty, none),
        Sample(7, "walk.avi#000123", 30, 20, empty, none),
    )
    dataset = Video(tmp_path / "labels.json", tmp_path, ("person",), "0" * 64, samples, {})
    files = image_files(dataset, tmp_path / "frames")
    assert files[100] == still
    assert np.array_equal(load_image(str(files[7])), frame)


def test_ctrl_c_ends_the_agent(
    work: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a build ends host and agent in order."""
    marker = tmp_path / "child.pid"
    body = f"open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    replace_runtime(monkeypatch, tmp_path / "fake", body)

    def interrupt(event: Mapping[str, Any]) -> None:
        wait_for(lambda: marker.exists() and bool(marker.read_text()), "the child did not start")
        os.kill(os.getpid(), signal.SIGINT)  # to the process, as a terminal does, not to this thread

    # A shell that starts the tests in the background lets them inherit a SIGINT that is ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            local_session(load_target("host"), work, interrupt).build(model)
    finally:
        signal.signal(signal.SIGINT, inherited)
    wait_for(lambda: not alive(int(marker.read_text())), "the child outlived ctrl-C")
    assert not leftovers(work)
