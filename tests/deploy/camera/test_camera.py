"""`edgeprune camera` from the workstation: on this machine, over a real SSH connection, and by hand."""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from camera_jobs import PREPROCESSING, MjpegServer, descendants, frames, read_video, wait_for, write_video
from camera_run import WEIGHTS_SHA256, calibrate, write_run
from sshd import Sshd
from typer.testing import CliRunner, Result

from edgeprune.cli import app
from edgeprune.deploy.device.imaging import Thresholds
from edgeprune.deploy.session import Session

EDGEPRUNE = [sys.executable, "-c", "from edgeprune.cli import app; app()"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own: this machine's agent works there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files; a short path, since control sockets lie there."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def edgeprune(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["camera", *map(str, arguments)])


def succeed(*arguments: object) -> Result:
    result = edgeprune(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def detections(text: str, engine: int = 0) -> dict[int, Any]:
    """Boxes and scores by frame, of JSON lines."""
    records = [json.loads(line) for line in text.splitlines()]
    return {
        record["frame"]: (
            np.array(record["boxes"], np.float32).reshape(-1, 4),
            np.array(record["scores"], np.float32),
        )
        for record in records
        if record["engine"] == engine
    }


def check_against_evaluate(
    session: Session, model: Path, video: Path, found: dict[int, Any], score: float
) -> None:
    """The boxes are those of the agent's `evaluate` on the same frames as PNGs, to the last bit."""
    files = {}
    for number, image in enumerate(read_video(video)):
        files[number] = video.parent / f"{number:06d}.png"
        cv2.imwrite(str(files[number]), image)
    evaluated = session.evaluate(session.build(model), files, PREPROCESSING, Thresholds(score=score))
    assert list(found) == list(files)
    for expected in evaluated.detections:
        boxes, scores = found[expected.image_id]
        assert len(scores) > 0
        assert np.array_equal(boxes, expected.boxes)
        assert np.array_equal(scores, expected.scores)


def test_a_videos_boxes_are_those_of_evaluate(run_folder: Path, session: Session, tmp_path: Path) -> None:
    """Of every frame; `--jsonl -` leaves standard output to the lines, the summary is on standard error."""
    video = write_video(tmp_path / "clip.avi", 30)
    result = succeed(run_folder, "--source", video, "--jsonl", "-", "--score-threshold", 0.4)
    found = detections(result.stdout)
    check_against_evaluate(session, run_folder / "step-01/model.onnx", video, found, 0.4)
    assert re.search(r"30 frames in .* 0 dropped; end of stream", result.stderr)


def test_two_steps_look_at_the_same_frames(run_folder: Path, session: Session, tmp_path: Path) -> None:
    """Each has its boxes, its name and its rate; the saved video shows both side by side."""
    video = write_video(tmp_path / "clip.avi", 12)
    written, saved = tmp_path / "boxes.jsonl", tmp_path / "both.avi"
    result = succeed(
        *(run_folder, "--source", video, "--compare", 0, 1, "--jsonl", written, "--save", saved),
        *("--score-threshold", 0.4, "--json"),
    )
    summary = json.loads(result.stdout)
    assert [engine["name"] for engine in summary["engines"]] == ["step 0", "step 1"]
    assert all(engine["fps"] > 0 for engine in summary["engines"])
    assert summary["frames"] == len(read_video(saved)) == 12
    assert read_video(saved)[0].shape == (48, 128, 3)
    for step in (0, 1):
        model = run_folder / f"step-{step:02d}/model.onnx"
        check_against_evaluate(session, model, video, detections(written.read_text(), step), 0.4)


def test_the_threshold_is_the_calibrated_one(run_folder: Path, tmp_path: Path) -> None:
    """Each step's own: used and said. None: 0.3, said in a line. For other weights: refused in a line."""
    video = write_video(tmp_path / "clip.avi", 28)  # the last ones have scores above 0.51

    def lowest(result: Result, engine: int = 0) -> float:
        return min(min(scores) for _, scores in detections(result.stdout, engine).values() if len(scores))

    result = succeed(run_folder, "--source", video, "--jsonl", "-")
    assert 0.3 < lowest(result) < 0.5
    assert len([line for line in result.stderr.splitlines() if "`edgeprune calibrate" in line]) == 1
    calibrate(run_folder, 1, 0.51)
    result = succeed(run_folder, "--source", video, "--jsonl", "-")
    assert lowest(result) > 0.51
    assert "Step 1 reports from score 0.510 up, chosen for precision 0.9" in result.stderr
    calibrate(run_folder, 0, 0.4)
    compared = succeed(run_folder, "--source", video, "--jsonl", "-", "--compare", 0, 1)
    assert 0.4 < lowest(compared, 0) < 0.51 < lowest(compared, 1)
    calibrate(run_folder, 1, 0.51, weights_sha256=WEIGHTS_SHA256[::-1] + "c")
    result = edgeprune(run_folder, "--source", video)
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: .*threshold\.json was chosen for other weights: run .*\n", result.stderr)


def test_what_is_saved_comes_here_and_goes_there(run_folder: Path, tmp_path: Path) -> None:
    """Video and snapshots are fetched and removed on the device, also when the camera fails on the way."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, image in enumerate(frames(6)):
        cv2.imwrite(str(pictures / f"{number}.png"), image)
    options = ("--source", pictures, "--save", tmp_path / "out.avi", "--snapshots", tmp_path / "seen")
    result = succeed(run_folder, *options, "--cooldown-s", 0, "--max-frames", 4)
    assert len(read_video(tmp_path / "out.avi")) == len(list((tmp_path / "seen").glob("*.jpg"))) == 4
    assert str(tmp_path / "out.avi") in result.stderr
    (tmp_path / "out.avi").unlink()
    (pictures / "5.png").write_bytes(b"no image")
    result = edgeprune(run_folder, *options)
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert re.search(r"^Error: .*5\.png does not decode.*saved until then: .*out\.avi", error)
    assert len(read_video(tmp_path / "out.avi")) == 5
    jobs = tmp_path / "cache/edgeprune/device/jobs"
    assert not [path for path in jobs.rglob("*") if path.suffix in (".avi", ".jpg")]


@pytest.mark.parametrize(
    ("options", "exit_code", "said"),
    [
        (["--listen", "8080"], 2, "HOST:PORT"),
        (["--listen", "127.0.0.1:80800"], 2, "HOST:PORT"),
        (["--capture", "720p"], 2, "WIDTHxHEIGHT@FPS"),
        (["--save", "out.mkv"], 2, ".avi or .mp4"),
        (["--save", "/no/such/folder/out.avi"], 2, "there is no folder"),
        (["--token", "short"], 2, "at least 8"),
        (["--step", "1", "--compare", "0", "1"], 2, "one of --step and --compare"),
        (["--compare", "1", "1"], 2, "two steps that differ"),
        (["--json", "--jsonl", "-"], 2, "standard output"),
        (["--bundle", "x.tar.gz", "--install-service", "door"], 2, "one of --bundle and --install-service"),
        (["--snapshots", "/dev/null"], 2, "--snapshots /dev/null: File exists"),
        (["--step", "7"], 1, "has no model of step 7: it has 0, 1"),
        (["--source", "nowhere.avi"], 1, "there is no file or folder nowhere.avi"),
        (["--source", "ftp://x"], 1, "no address of a camera"),
        (["--source", "/dev/video99"], 1, "there is no camera at /dev/video99"),
        (["--source", "rtsp://me:secret@127.0.0.1:9/x"], 1, "rtsp://127.0.0.1:9/x cannot be reached"),
        (["--jsonl", "/no/such/folder/x.jsonl"], 1, "cannot write"),
    ],
)
def test_what_cannot_be_done_is_said(run_folder: Path, options: list[str], exit_code: int, said: str) -> None:
    """Wrong usage is 2, before anything is reached; what a user can act on is 1 and one line."""
    result = edgeprune(run_folder, "--score-threshold", 0.5, *options)
    assert result.exit_code == exit_code
    words = " ".join(re.sub("[│╭╰─╮╯]", " ", result.stderr).split())
    assert said in words
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == (exit_code == 1)
    assert "building the engine" not in result.stderr  # which takes minutes on a board


def test_a_run_without_models_is_refused(run_folder: Path, tmp_path: Path) -> None:
    """No run, a step that is not exported, a model that was exchanged: each says what to run."""
    (tmp_path / "empty").mkdir()
    assert "is no run folder" in edgeprune(tmp_path / "empty").stderr
    (run_folder / "step-01/model.onnx").write_bytes(b"another")
    assert "is not the file that export.json describes" in edgeprune(run_folder).stderr
    for step in (0, 1):
        (run_folder / f"step-0{step}/export.json").unlink()
    assert "run `edgeprune export" in edgeprune(run_folder).stderr


def test_the_camera_starts_without_torch(run_folder: Path, tmp_path: Path) -> None:
    """The command loads neither torch nor matplotlib: a camera is on within seconds."""
    video = write_video(tmp_path / "clip.avi", 3)
    script = (
        "import sys\nfrom edgeprune.cli import app\n"
        f"try:\n    app(['camera', {str(run_folder)!r}, '--source', {str(video)!r}, '--json'])\n"
        "except SystemExit as end:\n    print(end.code)\n"
        "print([name for name in ('torch', 'matplotlib') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert shown.stdout.splitlines()[-2:] == ["0", "[]"], shown.stderr


class Program:
    """`edgeprune camera` in a process of its own, ended by the test."""

    def __init__(self, *arguments: object) -> None:
        command = [*EDGEPRUNE, "camera", *map(str, arguments)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr
        self.said.extend(iter(self._process.stderr.readline, ""))

    def wait_for(self, pattern: str) -> str:
        """The first group of a line that it says."""
        found: list[str] = []

        def said() -> bool:
            found[:] = [match[1] for match in map(re.compile(pattern).search, self.said) if match]
            return bool(found)

        wait_for(said, f"{pattern} was not said: {self.said}", limit_s=60)
        return found[0]

    def interrupt(self, number: int = signal.SIGINT) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """Wait for it; its exit status."""
        status = self._process.wait(60)
        self._reader.join(10)
        return status

    @property
    def number(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def make(*arguments: object) -> Program:
        programs.append(Program(*arguments))
        return programs[-1]

    yield make
    for program in programs:
        program.kill()


@pytest.fixture
def network_camera() -> Iterator[MjpegServer]:
    server = MjpegServer(fps=50)
    yield server
    server.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Sshd]:
    started = Sshd(tmp_path / "sshd", {})
    yield started
    started.stop()


def read(address: str, limit: int = 1 << 20) -> bytes:
    with urllib.request.urlopen(address, timeout=10) as answer:
        content: bytes = answer.read(limit)
        return content


def numbers(page: str) -> Any:
    return json.loads(read(page + "numbers.json"))


def test_over_ssh_seen_through_the_forward_and_ended_by_ctrl_c(
    *,
    run_folder: Path,
    start: Callable[..., Program],
    network_camera: MjpegServer,
    server: Sshd,
    agent_python: Callable[[str], str],
    temporary: Path,
    tmp_path: Path,
) -> None:
    """Python 3.6 at the far end: the page moves; ctrl-C gives summary and video; nothing is left on either side."""
    work, saved = tmp_path / "board", tmp_path / "out.avi"
    program = start(
        *(run_folder, "--host", "board", "--ssh-config", server.config, "--device-folder", work),
        *("--device-python", agent_python("3.6"), "--source", f"http://127.0.0.1:{network_camera.port}/"),
        *("--save", saved, "--score-threshold", 0.4),
    )
    page = program.wait_for(r"The camera is at (http://127\.0\.0\.1:\d+/)")
    assert b"<html" in read(page)
    assert b"\xff\xd8\xff" in read(page + "stream.mjpg", 20_000)  # a JPEG begins
    wait_for(lambda: numbers(page).get("frames", 0) > 20, "no frame is counted")
    first = numbers(page)["frames"]
    wait_for(lambda: numbers(page)["frames"] > first, "the numbers do not move")
    program.wait_for(r"([\d.]+) FPS, [\d.]+ ms to the boxes \(capture")
    remote = descendants(server._process.pid)
    assert any("--child camera" in command for command in remote.values())

    program.interrupt()
    assert program.end() == 0, program.said
    assert re.search(r"\d+ frames in .* dropped; stopped", "".join(program.said))
    assert len(read_video(saved)) > 10
    check_nothing_is_left(program, server, page, work)
    assert list(temporary.iterdir()) == []
    assert not list(work.rglob("*.avi"))


def check_nothing_is_left(program: Program, server: Sshd, page: str, work: Path) -> None:
    """No process, no port, no lock."""
    assert not descendants(program.number)
    wait_for(lambda: not descendants(server._process.pid), f"left: {descendants(server._process.pid)}")
    port = int(page.rsplit(":", 1)[1].strip("/"))
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    with (work / "device.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_board_that_forwards_no_ports_still_detects(
    run_folder: Path, agent_python: Callable[[str], str], tmp_path: Path
) -> None:
    """One line says that the page cannot be seen, and why; the video is sent, its frames are detected in."""
    server = Sshd(tmp_path / "sshd", {}, "AllowTcpForwarding no")
    try:
        result = succeed(
            *(run_folder, "--host", "board", "--ssh-config", server.config, "--score-threshold", 0.4),
            *("--device-folder", tmp_path / "board", "--device-python", agent_python("3.6")),
            *("--source", write_video(tmp_path / "clip.avi", 5), "--jsonl", "-"),
        )
    finally:
        server.stop()
    assert len(detections(result.stdout)) == 5
    assert "The page cannot be seen from here: board does not forward ports" in result.stderr


@pytest.mark.parametrize("way", ["local", "over SSH"])
def test_a_page_on_the_other_loopback_address_is_seen(
    *,
    way: str,
    run_folder: Path,
    start: Callable[..., Program],
    network_camera: MjpegServer,
    server: Sshd,
    agent_python: Callable[[str], str],
    temporary: Path,
    tmp_path: Path,
) -> None:
    """What listens on ::1 listens on no other address: the printed one leads there."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no ::1: {error}")
    board = ["--host", "board", "--ssh-config", server.config, "--device-folder", tmp_path / "board"]
    program = start(
        *(run_folder, "--source", f"http://127.0.0.1:{network_camera.port}/", "--score-threshold", 0.4),
        *("--listen", "[::1]:0"),
        *([*board, "--device-python", agent_python("3.6")] if way == "over SSH" else []),
    )
    page = program.wait_for(r"The camera is at (http://\S+/) ")
    assert page.startswith("http://[::1]:" if way == "local" else "http://127.0.0.1:")
    assert b"<html" in read(page)
    wait_for(lambda: numbers(page).get("frames", 0) > 0, "no frame is counted")
    program.interrupt()
    assert program.end() == 0, program.said


def test_ctrl_c_while_a_camera_is_tried(run_folder: Path, start: Callable[..., Program]) -> None:
    """A camera that says nothing does not hold the workstation: 130, and no process is left."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        program = start(run_folder, "--source", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        wait_for(
            lambda: any(".camera.capture" in command for command in descendants(program.number).values()),
            "the camera is not opened",
        )
        program.interrupt()
        assert program.end() == 130, program.said
    assert not any("building the engine" in line for line in program.said)
    assert not descendants(program.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_before_the_first_frame_interrupts(
    number: int, run_folder: Path, start: Callable[..., Program], tmp_path: Path
) -> None:
    """While another job holds the device there is nothing to sum up: 130, and nothing is left."""
    work = tmp_path / "cache/edgeprune/device"
    succeed(run_folder, "--source", write_video(tmp_path / "clip.avi", 2), "--score-threshold", 0.4)
    with (work / "device.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        program = start(run_folder, "--source", tmp_path / "clip.avi")
        program.wait_for("(Waiting for another job)")
        program.interrupt(number)
        assert program.end() == 130
    assert not descendants(program.number)


def test_sigterm_ends_it_like_ctrl_c(
    run_folder: Path, start: Callable[..., Program], network_camera: MjpegServer, tmp_path: Path
) -> None:
    """As `timeout` and systemd send it: summary, video, status 0."""
    saved, source = tmp_path / "out.avi", f"http://127.0.0.1:{network_camera.port}/"
    program = start(run_folder, "--source", source, "--save", saved, "--score-threshold", 0.4)
    program.wait_for(r"([\d.]+) FPS")
    program.interrupt(signal.SIGTERM)
    assert program.end() == 0, program.said
    assert re.search(r"\d+ frames in .* dropped; stopped", "".join(program.said))
    assert read_video(saved)


def test_ctrl_c_twice_ends_at_once(
    run_folder: Path, start: Callable[..., Program], network_camera: MjpegServer
) -> None:
    """An agent that does not answer any more, here one that is held, does not hold the workstation."""
    program = start(
        run_folder, "--source", f"http://127.0.0.1:{network_camera.port}/", "--score-threshold", 0.4
    )
    program.wait_for(r"([\d.]+) FPS")
    agents = [number for number, command in descendants(program.number).items() if "--attached" in command]
    for agent in agents:
        os.kill(agent, signal.SIGSTOP)
    program.interrupt()
    time.sleep(0.5)
    program.interrupt()
    assert program.end() == 130
    assert agents and not descendants(program.number)


def test_a_page_for_other_machines_needs_its_token(
    run_folder: Path, start: Callable[..., Program], network_camera: MjpegServer
) -> None:
    """A token is made and printed once; without it 403, with it the page."""
    source = f"http://127.0.0.1:{network_camera.port}/"
    program = start(run_folder, "--source", source, "--listen", "0.0.0.0:0", "--score-threshold", 0.4)
    address = program.wait_for(r"The camera is at (\S+)")
    page, token = address.split("?token=")
    assert len(token) >= 20
    with pytest.raises(urllib.error.HTTPError) as raised:
        read(page)
    assert raised.value.code == 403
    cookies = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with cookies.open(address, timeout=10) as answer:
        assert b"<html" in answer.read()
    program.interrupt()
    assert program.end() == 0
    assert "".join(program.said).count(token) == 1


def program_that_notes(path: Path) -> Path:
    """A program that writes its arguments, a line a call, into a file beside it."""
    path.write_text('#!/bin/sh\necho "$@" >> "$0.calls"\n')
    path.chmod(0o755)
    return path


def test_view_opens_the_address_in_the_browser(run_folder: Path, tmp_path: Path) -> None:
    """The browser gets the address that is printed; one that would take the terminal is not started."""
    browser = program_that_notes(tmp_path / "browser")
    video = write_video(tmp_path / "clip.avi", 3)
    command = [*EDGEPRUNE, "camera", run_folder, "--source", video, "--score-threshold", "0.4", "--view"]

    def said(browser_setting: str) -> str:
        environment = {**os.environ, "BROWSER": browser_setting}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr

    assert "No browser was found" in said(f"{browser} %s")
    shown = said(f"{browser} %s &")
    calls = browser.with_name("browser.calls")
    wait_for(calls.exists, "the browser was not started")
    assert f"The camera is at {calls.read_text().strip()} " in shown


def test_a_service_is_installed_and_removed(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd is told to start this camera with these engines; a wrong option leaves the old one as it is."""
    systemctl = program_that_notes(tmp_path / "systemctl")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    video = write_video(tmp_path / "clip.avi", 2)
    options = ("--source", video, "--score-threshold", 0.4, "--install-service", "door")
    said = succeed(run_folder, *options, "--listen", "127.0.0.1:8080").stderr
    assert "edgeprune-door.service runs on this machine; its page is port 8080 there" in said
    folder = tmp_path / "cache/edgeprune/device/services/door"
    job = json.loads((folder / "job.json").read_text())
    assert (job["source"], job["names"], job["thresholds"][0]["score"]) == (str(video), ["step 1"], 0.4)
    calls = systemctl.with_name("systemctl.calls")
    assert "--user restart edgeprune-door.service" in calls.read_text()
    for wrong, told in (
        (("--listen", "127.0.0.1:0"), "--listen 127.0.0.1:PORT"),
        (("--source", "x"), "no file"),
    ):
        refused = edgeprune(run_folder, *options, "--listen", "127.0.0.1:8080", *wrong)
        assert (refused.exit_code, told in refused.stderr) == (1, True)
    assert json.loads((folder / "job.json").read_text()) == job
    assert "disable" not in calls.read_text()
    succeed(run_folder, "--remove-service", "door")
    assert not folder.exists()
    removed = edgeprune(run_folder, "--remove-service", "door")
    assert (removed.exit_code, "there is no camera service 'door'" in removed.stderr) == (1, True)


def test_by_hand_the_source_is_looked_for_first(run_folder: Path, tmp_path: Path) -> None:
    """As from the workstation: one line, before the engine is built; the page's address is one for a browser."""
    archive = tmp_path / "camera.tar.gz"
    video = write_video(tmp_path / "clip.avi", 2)
    succeed(
        *(run_folder, "--bundle", archive, "--source", video, "--score-threshold", 0.4),
        *("--listen", "[::1]:0"),
    )
    with tarfile.open(archive) as content:
        content.extractall(tmp_path / "unpacked", filter="data")
    command = ["sh", tmp_path / "unpacked/edgeprune-camera/camera.sh"]
    environment = {**os.environ, "PYTHON": sys.executable}
    board = subprocess.run(
        [*command, "/dev/video98"], env=environment, capture_output=True, text=True, check=False
    )
    assert board.returncode == 1
    assert "Error: source failed: there is no camera at /dev/video98" in board.stderr
    assert "build" not in board.stderr
    board = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert re.search(r"The camera is at http://\[::1\]:\d+/\n", board.stderr), board.stderr


@pytest.mark.parametrize("ended_by", ["the video", "ctrl-C"])
def test_by_hand_without_a_connection(
    ended_by: str,
    run_folder: Path,
    network_camera: MjpegServer,
    agent_python: Callable[[str], str],
    tmp_path: Path,
) -> None:
    """The archive builds the engine and shows the camera on the board itself, under Python 3.6."""
    archive = tmp_path / "camera.tar.gz"
    video = write_video(tmp_path / "clip.avi", 8)
    result = succeed(
        *(run_folder, "--bundle", archive, "--source", video, "--jsonl", "-", "--save", tmp_path / "out.avi"),
        *("--score-threshold", 0.4),
    )
    assert "sh camera.sh" in result.stderr
    with tarfile.open(archive) as content:
        content.extractall(tmp_path / "unpacked", filter="data")
    (tmp_path / "cache").mkdir(exist_ok=True)
    folder = tmp_path / "unpacked/edgeprune-camera"
    source = [] if ended_by == "the video" else [f"http://127.0.0.1:{network_camera.port}/"]
    environment = {**os.environ, "PYTHON": agent_python("3.6")}
    with (tmp_path / "out").open("w+") as output, (tmp_path / "err").open("w+") as errors:
        board = subprocess.Popen(
            ["sh", folder / "camera.sh", *source], stdout=output, stderr=errors, env=environment
        )
        if source:
            wait_for(lambda: (tmp_path / "out").stat().st_size > 1000, "nothing is detected", limit_s=60)
            board.send_signal(signal.SIGINT)
        status = board.wait(60)
    said = (tmp_path / "err").read_text()
    assert status == 0, said
    found = detections((tmp_path / "out").read_text())
    assert re.search(r"The camera is at http://127\.0\.0\.1:\d+/\n", said)
    if source:
        assert re.search(r"\d+ frames in .*; stopped", said)
    else:
        assert list(found) == list(range(8))
        assert "8 frames in" in said
    assert read_video(folder / "video.avi")
    shutil.rmtree(folder)
