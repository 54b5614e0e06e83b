"""The agent's command "camera", for real: from an address to a result, and to nothing that is left behind."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from camera_jobs import (
    DEFAULTS,
    PREPROCESSING,
    MjpegServer,
    alive,
    camera_job,
    descendants,
    read_video,
    wait_for,
    write_video,
)
from small_model import write_model

from edgeprune.deploy.device.agent import PROTOCOL
from edgeprune.deploy.device.camera import command
from edgeprune.deploy.device.camera.capture import Frame
from edgeprune.deploy.device.camera.pipeline import Detected, Found
from edgeprune.deploy.device.camera.sources import find_source
from edgeprune.deploy.device.imaging import Thresholds
from edgeprune.deploy.errors import DeviceError
from edgeprune.deploy.records import Engine
from edgeprune.deploy.session import Session
from edgeprune.deploy.targets import load_target
from edgeprune.deploy.transport import Local

Run = Callable[..., Any]
STAGES = {"capture", "prepare", "run", "postprocess"}
THRESHOLDS = Thresholds(score=0.3)


def boxes_reported(events: list[Mapping[str, Any]], engine: int = 0) -> dict[int, tuple[Any, Any]]:
    """Boxes and scores by the frame's number, as float32."""
    return {
        event["frame"]: (
            np.array(event["boxes"], np.float32).reshape(-1, 4),
            np.array(event["scores"], np.float32),
        )
        for event in events
        if event["event"] == "detections" and event["engine"] == engine
    }


def check_against_evaluate(
    session: Session,
    engine: Engine,
    images: Mapping[int, np.ndarray],
    reported: Mapping[int, Any],
    folder: Path,
) -> None:
    """Boxes of frames equal those that `evaluate` finds in the same pictures as PNGs, to the last bit."""
    files = {number: folder / f"{number:06d}.png" for number in images}
    for number, image in images.items():
        cv2.imwrite(str(files[number]), image)
    found = session.evaluate(engine, files, PREPROCESSING, THRESHOLDS)
    for detections in found.detections:
        boxes, scores = reported[detections.image_id]
        assert len(scores) >= 2
        assert np.array_equal(boxes, detections.boxes)
        assert np.array_equal(scores, detections.scores)


def test_a_videos_boxes_are_those_of_evaluate(
    run: Run, session: Session, engine: Engine, events: list[Mapping[str, Any]], tmp_path: Path
) -> None:
    """Every frame is counted, once, and its boxes are those of the same picture as a file."""
    video = write_video(tmp_path / "clip.avi", 60)
    result = run(video, jsonl=True)
    assert (result["frames"], result["dropped"], result["ended"]) == (60, 0, "end of stream")
    reported = boxes_reported(events)
    assert list(reported) == list(range(60))
    images = dict(enumerate(read_video(video)))
    check_against_evaluate(session, engine, images, reported, tmp_path)


@pytest.mark.shared_data
def test_vtests_boxes_are_those_of_evaluate(
    *,
    run: Run,
    session: Session,
    engine: Engine,
    events: list[Mapping[str, Any]],
    tmp_path: Path,
    shared: Path,
) -> None:
    """On a real video: all 795 frames, boxes of evaluate, stage times that add up to the whole."""
    video = shared / "pets-vtest" / "vtest.avi"
    result = run(video, jsonl=True)
    assert (result["frames"], result["dropped"], result["ended"]) == (795, 0, "end of stream")
    images = {number: image for number, image in enumerate(read_video(video)) if number % 40 == 0}
    check_against_evaluate(session, engine, images, boxes_reported(events), tmp_path)
    check_times(result)


def check_times(result: Mapping[str, Any]) -> None:
    """The stages' sum is the latency, and with waiting and output the time from frame to frame."""
    stages_ms = {stage: times["mean"] for stage, times in result["stages_ms"].items()}
    assert set(stages_ms) == STAGES
    assert sum(stages_ms.values()) == pytest.approx(result["latency_ms"]["mean"], rel=0.03, abs=0.02)
    between_ms = sum(stages_ms.values()) - stages_ms["capture"]
    between_ms += result["wait_ms"]["mean"] + result["output_ms"]["mean"]
    assert between_ms == pytest.approx(1e3 * result["seconds"] / result["frames"], rel=0.03, abs=0.02)
    for times in (*result["stages_ms"].values(), result["latency_ms"]):
        assert 0 < times["p50"] <= times["p90"] <= times["p99"]


def test_two_engines_see_the_same_frames(
    run: Run, session: Session, engine: Engine, events: list[Mapping[str, Any]], tmp_path: Path
) -> None:
    """Each one's boxes are those of evaluate; the saved video shows both beside each other."""
    other = session.build(write_model(tmp_path / "other.onnx", weight=0.02))
    video = write_video(tmp_path / "clip.avi", 30)
    engines = [engine.to_json(), other.to_json()]
    result = run(
        video, engines=engines, names=["step 0", "step 4"], jsonl=True, save="both.avi", max_frames=20
    )
    assert (result["frames"], result["ended"]) == (20, "max_frames")
    assert [entry["name"] for entry in result["engines"]] == ["step 0", "step 4"]
    assert all(entry["fps"] > 0 for entry in result["engines"])
    images = dict(enumerate(read_video(video)[:20]))
    for index, compared in enumerate((engine, other)):
        check_against_evaluate(session, compared, images, boxes_reported(events, index), tmp_path)
    stages_ms = [entry["stages_ms"]["run"]["mean"] for entry in result["engines"]]
    assert sum(stages_ms) == pytest.approx(result["stages_ms"]["run"]["mean"], rel=1e-6)


def test_a_saved_video_has_every_frame_with_its_boxes(run: Run, work: Path, tmp_path: Path) -> None:
    """Of a file: as many frames, the same rate, the same pictures where no box was drawn."""
    source = write_video(tmp_path / "clip.avi", 25, size=(320, 240), fps=12.5)
    result = run(source, save="saved.avi")
    assert result["saved"] == "saved.avi"
    saved, expected = read_video(work / "saved.avi"), read_video(source)
    assert cv2.VideoCapture(str(work / "saved.avi"), cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FPS) == 12.5
    assert len(saved) == 25
    for one, other in zip(saved, expected, strict=True):
        assert np.abs(one[-20:, -20:].astype(int) - other[-20:, -20:]).mean() < 3
        assert np.abs(one.astype(int) - other).max() > 50  # something was drawn
    assert not list(work.glob("*.tmp*"))


def test_snapshots_come_with_detections_and_not_too_often(run: Run, work: Path, tmp_path: Path) -> None:
    """One picture with a long cool-down, several without, none where nothing is seen."""
    source = write_video(tmp_path / "clip.avi", 10)
    once = run(source, snapshots={"folder": "once", "cooldown_s": 60})["snapshots"]
    always = run(source, snapshots={"folder": "always", "cooldown_s": 0})["snapshots"]
    never = run(source, snapshots={"folder": "never", "cooldown_s": 0}, thresholds=[{"score": 0.999}])
    assert (len(once), len(always), never["snapshots"]) == (1, 10, [])
    assert all(cv2.imread(str(work / path)).shape == (48, 64, 3) for path in once + always)


def test_tracked_people_keep_ids(run: Run, events: list[Mapping[str, Any]], tmp_path: Path) -> None:
    """Boxes that stand still have the same ids in every frame."""
    run(write_video(tmp_path / "clip.avi", 10), jsonl=True, track=True, thresholds=[{"score": 0.01}])
    ids = [sorted(event["ids"]) for event in events if event["event"] == "detections"]
    assert len(ids) == 10
    assert all(found == ids[0] for found in ids)
    assert ids[0] == list(range(1, len(ids[0]) + 1))


def test_memory_is_flat_over_10_000_frames(
    session: Session, engine: Engine, events: list[Mapping[str, Any]], tmp_path: Path
) -> None:
    """Tracked, saved and reported: after the first 4,000 frames no process of the agent grows."""
    source = write_video(tmp_path / "long.avi", 10_000)
    job = camera_job(engine, source, track=True, jsonl=True, save="saved.avi")
    sizes_kib: dict[int, dict[str, int]] = {}

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "detections" and event["frame"] in (4000, 9990):
            sizes_kib[event["frame"]] = {
                name: int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[0])
                for process, command in descendants(os.getpid()).items()
                for name in (".capture", "--child", "--attached")
                if f"{name} " in command
            }

    session.progress = watch
    result = session._call("camera", job)
    assert result["frames"] == 10_000
    before, after = sizes_kib[4000], sizes_kib[9990]
    assert set(before) == set(after) == {".capture", "--child", "--attached"}
    growth_kib = {name: after[name] - before[name] for name in before}
    print(f"growth over 6,000 frames, KiB: {growth_kib} of {before}")
    assert all(growth < 512 for growth in growth_kib.values())


@pytest.mark.parametrize("version", ["3.6", "3.8", "debian"])
def test_the_camera_runs_under_the_boards_pythons(
    *,
    version: str,
    work: Path,
    model: Path,
    tmp_path: Path,
    events: list[Mapping[str, Any]],
    agent_python: Callable[[str], str],
) -> None:
    """Video, folder, saving, snapshots, tracking and the page work; boxes are those of its own evaluate."""
    session = Session(load_target("host"), Local(work, agent_python(version)), events.append)
    engine = session.build(model)
    video = write_video(tmp_path / "clip.avi", 40)
    listen = {"host": "127.0.0.1", "port": 0, "token": None}
    snapshots = {"folder": "seen", "cooldown_s": 60}
    job = camera_job(engine, video, save="saved.avi", snapshots=snapshots, listen=listen, track=True)
    result = session._call("camera", job)
    assert (result["frames"], result["dropped"], result["ended"]) == (40, 0, "end of stream")
    assert len(read_video(work / "saved.avi")) == 40
    assert len(result["snapshots"]) == 1
    check_times(result)
    folder = tmp_path / "images"
    folder.mkdir()
    images = dict(enumerate(np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)))
    for number, image in images.items():
        cv2.imwrite(str(folder / f"{number:06d}.png"), image)
    events.clear()
    session._call("camera", camera_job(engine, folder, jsonl=True))
    check_against_evaluate(session, engine, images, boxes_reported(events), tmp_path)


def test_a_gstreamer_source_is_a_camera(
    work: Path, model: Path, events: list[Mapping[str, Any]], agent_python: Callable[[str], str]
) -> None:
    """GStreamer's test pattern comes at its own pace; its ball moves, frames and seconds agree."""
    session = Session(load_target("host"), Local(work, agent_python("debian")), events.append)
    engine = session.build(model)
    settings = {"width": 320, "height": 240, "fps": 15}
    job = camera_job(engine, "test://", capture=settings, max_seconds=3.0, save="saved.avi", jsonl=True)
    result = session._call("camera", job)
    assert result["ended"] == "max_seconds"
    assert result["frames"] + result["dropped"] == pytest.approx(15 * result["seconds"], rel=0.25)
    check_times(result)
    told = [event for event in events if event["event"] == "camera"]
    assert len(told) >= 2
    assert [event["frames"] for event in told] == sorted(event["frames"] for event in told)
    assert told[-1]["fps"] == pytest.approx(15, rel=0.3)
    saved = read_video(work / "saved.avi")
    assert len(saved) == pytest.approx(10 * result["seconds"], abs=3)  # live sources are saved at 10 FPS
    assert saved[0].shape == (240, 320, 3)
    assert any(np.abs(saved[0].astype(int) - other).max() > 100 for other in saved[1:])


def test_a_slow_engine_sees_the_newest_frames(
    session: Session, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an engine of 100 ms and a camera of 50 FPS frames are dropped, and none waits for the engine."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "onnxruntime.py").write_text(
        textwrap.dedent(
            """
            import os, sys, time
            sys.path.remove(os.path.dirname(__file__))
            del sys.modules[__name__]
            import onnxruntime
            run = onnxruntime.InferenceSession.run
            def slowly(self, *args):
                time.sleep(0.1)
                return run(self, *args)
            onnxruntime.InferenceSession.run = slowly
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(slow))
    server = MjpegServer(fps=50)
    result = session._call(
        "camera", camera_job(engine, f"http://127.0.0.1:{server.port}/?key=secret", max_frames=20)
    )
    server.close()
    assert result["frames"] == 20
    assert result["dropped"] > 40
    assert 100 < result["latency_ms"]["p50"] < 140  # the engine's, and at most one frame's 20 ms
    assert result["source"] == f"http://127.0.0.1:{server.port}/"
    check_times(result)


# Failures: one clear line each.


def failure(run: Run, source: object, **fields: Any) -> DeviceError:
    with pytest.raises(DeviceError) as raised:
        run(source, **fields)
    assert "\n" not in str(raised.value)
    return raised.value


def test_missing_sources_are_named(run: Run, tmp_path: Path) -> None:
    """What is not there is said to be not there, and what to do."""
    assert "no camera at /dev/video97" in str(failure(run, "/dev/video97"))
    assert "no file or folder" in str(failure(run, tmp_path / "none.avi"))
    assert "this OpenCV has no GStreamer, which csi://0 needs" in str(failure(run, "csi://0"))
    assert "has no GStreamer, which test:// needs" in str(failure(run, "test://"))


def test_a_missing_csi_driver_is_named(work: Path, model: Path, agent_python: Callable[[str], str]) -> None:
    """With GStreamer but without NVIDIA's element the camera is refused at once instead of hanging."""
    session = Session(load_target("host"), Local(work, agent_python("debian")), timeout_s=60)
    job = camera_job(session.build(model), "csi://0")
    with pytest.raises(DeviceError, match="csi://0 needs nvarguscamerasrc, which is not here") as raised:
        session._call("camera", job)
    assert raised.value.kind == "camera"


def test_a_python_without_opencv_is_told(work: Path, model: Path, agent_python: Callable[[str], str]) -> None:
    """The error says what to install."""
    session = Session(load_target("host"), Local(work, agent_python("3.12")))
    job = camera_job(session.build(model), "test://")
    with pytest.raises(DeviceError, match=r"needs OpenCV.*apt-get install python3-opencv"):
        session._call("camera", job)


def test_a_busy_camera_names_who_has_it(
    session: Session, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program that holds the device is named; a device that is no camera is told apart."""
    (tmp_path / "root" / "dev").mkdir(parents=True)
    device = tmp_path / "root" / "dev" / "video0"
    device.write_bytes(b"")
    monkeypatch.setenv("EDGEPRUNE_DEVICE_ROOT", str(tmp_path / "root"))
    job = camera_job(session.build(model), "/dev/video0")
    code = "import sys; file = open(sys.argv[1]); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(device)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for look in (
            lambda: session.check_source("/dev/video0", job["capture"]),
            lambda: session._call("camera", job),
        ):
            with pytest.raises(DeviceError, match=r"/dev/video0 is busy: .* has it open") as raised:
                look()
            assert raised.value.kind == "busy"
            assert f"(process {other.pid})" in str(raised.value)
        other.communicate()
    with pytest.raises(DeviceError, match="/dev/video0 does not open as a camera"):
        session._call("camera", job)


def test_an_unreachable_camera_does_not_tell_its_password(run: Run, work: Path) -> None:
    """Neither the error nor any file of the agent but the job itself holds the password or the query."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for scheme in ("rtsp", "http"):
        error = failure(run, f"{scheme}://user:Zk8pass@127.0.0.1:{port}/live?key=Zk8key")
        assert f"{scheme}://127.0.0.1:{port}/live cannot be reached: Connection refused" in str(error)
        assert "Zk8" not in str(error)
    holding = [path for path in work.rglob("*") if path.is_file() and b"Zk8" in path.read_bytes()]
    assert {path.name for path in holding} <= {"job.json"}


# Before there is an engine: can the source be used?


def test_a_camera_is_tried_and_free_again(session: Session, work: Path) -> None:
    """It is opened for a frame and nobody looks any more once that is said; the device is free, too."""
    server = MjpegServer(fps=30)
    session.check_source(f"http://127.0.0.1:{server.port}/", DEFAULTS["capture"])
    assert server.opened
    wait_for(lambda: not server.viewers, "somebody still looks", 2)
    assert not descendants(os.getpid())
    with (work / "device.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    server.close()


def test_only_a_camera_waits_for_another_job(work: Path, tmp_path: Path) -> None:
    """Opening one would disturb that job; what is missing, or needs no opening, is told at once."""
    session = Session(load_target("host"), Local(work), lock_wait_s=0)
    session.probe()  # makes the work folder
    video = write_video(tmp_path / "clip.avi", 3)
    with (work / "device.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        session.check_source(str(video), DEFAULTS["capture"])
        for source, said in (
            ("http://127.0.0.1:9/", "busy with another edgeprune job"),
            ("/dev/video97", "no camera at /dev/video97"),
            (str(tmp_path / "none.avi"), "no file or folder"),
        ):
            with pytest.raises(DeviceError, match=said):
                session.check_source(source, DEFAULTS["capture"])


# Ends: whatever ends it, nothing is left.


class Agent:
    """The agent as a process of its own, its standard input held as by a host."""

    def __init__(self, session: Session, work: Path, job: dict[str, Any]) -> None:
        session.probe()  # sends the agent
        (agent,) = (work / "agent").glob("*.zip")
        folder = work / "jobs" / "camera"
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(json.dumps({**job, "protocol": PROTOCOL, "lock_wait_s": 0}))
        self._work = work
        self.result_path = folder / "result.json"
        arguments = ["--attached", "camera", "jobs/camera/job.json", "jobs/camera/result.json"]
        self.process = subprocess.Popen(
            [sys.executable, str(agent), *arguments],
            cwd=work,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started: set[int] = set()
        self.port = 0  # of the page

    def wait_for_frames(self) -> dict[int, str]:
        """Read until frames were counted; returns the processes it started."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] == "end":
                raise AssertionError(line)
            if event["event"] == "listening":
                self.port = event["port"]
            if event["event"] == "camera" and event["frames"]:
                break
        found = descendants(self.process.pid)
        self.started = set(found)
        return found

    def finish(self) -> dict[str, Any]:
        """Wait for its end; checks that nothing is left, and returns what it wrote."""
        assert self.process.stdout is not None
        with self.process:
            self.process.stdout.read()
            self.process.wait(15)
        wait_for(lambda: not any(map(alive, self.started)), "a process outlived the agent", 5)
        with (self._work / "device.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not list(self._work.rglob("*.tmp*"))
        result: dict[str, Any] = json.loads(self.result_path.read_text())
        return result


@pytest.fixture
def server() -> Any:
    server = MjpegServer(fps=30)
    yield server
    server.close()


def test_the_page_shows_what_the_camera_sees(
    session: Session, engine: Engine, work: Path, server: MjpegServer
) -> None:
    """While it runs, the page's numbers move and its stream is the camera's picture with something drawn."""
    listen = {"host": "127.0.0.1", "port": 0, "token": None}
    agent = Agent(session, work, camera_job(engine, f"http://127.0.0.1:{server.port}/", listen=listen))
    agent.wait_for_frames()
    numbers: dict[str, Any] = {}

    def frames_counted() -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{agent.port}/numbers.json", timeout=10) as answer:
            numbers.update(json.load(answer))
        return numbers.get("frames", 0)

    wait_for(frames_counted, "the page has no numbers")
    first = numbers["frames"]
    wait_for(lambda: frames_counted() > first, "the page's numbers stand still")
    assert set(numbers["stages_ms"]) == STAGES
    with urllib.request.urlopen(f"http://127.0.0.1:{agent.port}/stream.mjpg", timeout=10) as answer:
        content = b""
        while b"\xff\xd9" not in content:
            content += answer.read1(1 << 16)
    picture = cv2.imdecode(np.frombuffer(content[content.index(b"\xff\xd8") :], np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (48, 64, 3)
    assert picture.std() > 5  # the camera's own pictures are flat
    agent.process.terminate()
    assert agent.finish()["ok"]


def test_without_a_viewer_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's numbers move all the same."""

    def draw(*_: object) -> None:
        raise AssertionError("a picture was drawn for nobody")

    monkeypatch.setattr(command, "annotate", draw)
    video = write_video(tmp_path / "clip.avi", 1)
    listen = {"host": "127.0.0.1", "port": 0, "token": None}
    job = {**DEFAULTS, "listen": listen}
    outputs = command._Outputs(job, find_source(str(video), job["capture"]), lambda event: None)
    recent = {"fps": 5.0, "engines": [{"name": "step 0", "fps": 5.0}]}
    outputs.tell(recent, {"power_mw": {}, "temperatures_c": {}})
    box = np.array([[1, 1, 9, 9]], np.float32)
    frame = Frame(np.zeros((48, 64, 3), np.uint8), 0, 0.0)
    outputs.add(Detected(frame, [Found(box, np.ones(1, np.float32), None, 1)]), 25.0)
    assert outputs._stream is not None
    assert json.loads(outputs._stream.numbers())["fps"] == 5.0
    outputs.close()


@pytest.mark.parametrize("way", ["SIGTERM", "SIGINT", "host gone"])
def test_it_is_stopped_in_order(
    session: Session, engine: Engine, work: Path, server: MjpegServer, way: str
) -> None:
    """Told to stop, or left by its host, it writes its summary and a video that plays, and leaves nothing."""
    address = f"http://127.0.0.1:{server.port}/"
    listen = {"host": "127.0.0.1", "port": 0, "token": None}
    agent = Agent(session, work, camera_job(engine, address, save="saved.avi", listen=listen))
    assert len(agent.wait_for_frames()) == 2  # the engine's process and the capture's
    if way == "host gone":
        assert agent.process.stdin is not None
        agent.process.stdin.close()
    else:
        agent.process.send_signal(getattr(signal, way))
    result = agent.finish()
    assert result["ok"]
    assert result["result"]["ended"] == "stopped"
    assert result["result"]["frames"] > 0
    assert read_video(work / "saved.avi")


def test_a_capture_process_that_crashes_leaves_nothing(
    session: Session, engine: Engine, work: Path, tmp_path: Path
) -> None:
    """The error is the result, and what was saved until then plays."""
    source = write_video(tmp_path / "long.avi", 20_000)
    agent = Agent(session, work, camera_job(engine, source, save="saved.avi"))
    started = agent.wait_for_frames()
    (capture,) = [number for number, command in started.items() if ".capture" in command]
    os.kill(capture, signal.SIGKILL)
    result = agent.finish()
    assert not result["ok"]
    assert "broke off after" in result["error"]["message"]
    assert read_video(work / "saved.avi")


def test_an_agent_that_is_killed_leaves_no_process(
    session: Session, engine: Engine, work: Path, server: MjpegServer
) -> None:
    """Even SIGKILL on the supervisor ends the engine's and the capture's process, and frees the device."""
    agent = Agent(session, work, camera_job(engine, f"http://127.0.0.1:{server.port}/"))
    started = agent.wait_for_frames()
    agent.process.kill()
    agent.process.communicate()
    wait_for(lambda: not any(map(alive, started)), "a process outlived the agent", 5)
    with (work / "device.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_engine_that_hangs_is_ended_by_force(
    session: Session, engine: Engine, work: Path, server: MjpegServer
) -> None:
    """What does not follow the request to stop in time is killed, and the result says so."""
    agent = Agent(session, work, camera_job(engine, f"http://127.0.0.1:{server.port}/"))
    started = agent.wait_for_frames()
    (child,) = [number for number, command in started.items() if "--child" in command]
    os.kill(child, signal.SIGSTOP)
    agent.process.terminate()
    result = agent.finish()
    assert result["error"]["kind"] == "interrupted"
