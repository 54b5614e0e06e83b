"""Pictures, videos and snapshots: right in content, whole or not there."""

import shutil
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pytest
from camera_jobs import frames, read_video

from edgeprune.deploy.device.camera import outputs
from edgeprune.deploy.device.camera.outputs import Snapshots, Video, annotate, check_space
from edgeprune.deploy.device.camera.pipeline import Found
from edgeprune.deploy.device.errors import AgentError


@pytest.fixture(autouse=True)
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_boxes_are_drawn_where_they_are_on_a_copy() -> None:
    """Only the box's edge and texts change; the frame itself, which the next one overwrites, does not."""
    image = np.full((240, 320, 3), 128, np.uint8)
    found = Found(np.array([[200, 100, 260, 200]], np.float32), np.array([0.87], np.float32), [3], 1)
    drawn = annotate(image, found, "step 0")
    assert (image == 128).all()
    changed = (drawn != 128).any(axis=2)
    assert changed[100, 200:261].all()
    assert changed[100:201, 260].all()
    assert not changed[110:190, 210:250].any()
    assert changed[:30, :150].any()  # the title
    assert not changed[205:].any()


@pytest.mark.parametrize("ending", [".avi", ".mp4"])
def test_a_video_appears_when_it_is_closed(work_folder: Path, ending: str) -> None:
    """Until then there is only a temporary file; then every frame is there, those of another size too."""
    video = Video("clip" + ending, False)
    for image in [*frames(9), np.full((100, 30, 3), 7, np.uint8)]:
        assert video.due(0.0) == 1
        video.add(image, 1, 12.5)
    assert not (work_folder / f"clip{ending}").exists()
    video.close()
    assert video.saved == "clip" + ending
    assert [path.name for path in work_folder.iterdir()] == ["clip" + ending]
    saved = read_video(work_folder / f"clip{ending}")
    assert len(saved) == 10
    for one, other in zip(saved[:9], frames(9), strict=True):
        assert np.abs(one.astype(int) - other).mean() < 4


def test_a_live_video_keeps_time(work_folder: Path) -> None:
    """Frames at 30, then 4 a second: the video has ten a second, and each at its time."""
    video, images = Video("clip.avi", True), frames(98)
    times_s = [*(number / 30 for number in range(90)), *(3 + number / 4 for number in range(8))]
    for image, time_s in zip(images, times_s, strict=True):
        if times := video.due(100 + time_s):
            video.add(image, times, 30.0)
    video.close()
    saved = read_video(work_folder / "clip.avi")
    assert len(saved) == pytest.approx(10 * times_s[-1], abs=1.1)


def test_an_outage_is_a_second_of_a_live_video(work_folder: Path) -> None:
    """A camera that comes back after an hour adds no hour of the same picture; from then on time is kept again."""
    video, image = Video("clip.avi", True), frames(1)[0]
    times = []
    for time_s in (100.0, 100.1001, 3700.1001, *(3700.1001 + number / 5 for number in range(1, 11))):
        times.append(video.due(time_s))
        video.add(image, times[-1], 30.0)
    assert times == [1, 1, 10, *[2] * 10]
    video.close()
    assert len(read_video(work_folder / "clip.avi")) == 32


def test_a_video_without_a_frame_leaves_nothing(work_folder: Path) -> None:
    """No frame, no file."""
    video = Video("clip.avi", True)
    video.close()
    assert video.saved is None
    assert not list(work_folder.iterdir())


def test_other_places_and_endings_are_refused(tmp_path: Path) -> None:
    """Files stay in the work folder, and are of a kind that can be written."""
    with pytest.raises(AgentError, match="outside the work folder"):
        Video("../clip.avi", True)
    with pytest.raises(AgentError, match="outside the work folder"):
        Snapshots(str(tmp_path), 1)
    with pytest.raises(AgentError, match=r"saved as \.avi or \.mp4"):
        Video("clip.mkv", True)
    with pytest.raises(AgentError, match="cannot write"):
        Video("no-such-folder/clip.avi", True).add(frames(1)[0], 1, 0.0)


def test_the_newest_snapshots_are_kept(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go; what the folder holds besides is left alone."""
    monkeypatch.setattr(outputs, "KEPT_SNAPSHOTS", 3)
    snapshots = Snapshots("seen", 0)
    (work_folder / "seen" / "holiday.jpg").write_bytes(b"not ours")
    for number in range(5):
        assert snapshots.due()
        snapshots.add(frames(1)[0], number)
    assert [path[-10:] for path in snapshots.paths()] == ["000002.jpg", "000003.jpg", "000004.jpg"]
    assert len(list((work_folder / "seen").iterdir())) == 4
    assert cv2.imread(snapshots.paths()[0]) is not None


def test_snapshots_wait_for_their_cooldown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before so many seconds after the last one."""
    now = [100.0]
    monkeypatch.setattr(outputs.time, "monotonic", lambda: now[0])
    snapshots = Snapshots("seen", 10)
    assert snapshots.due()
    snapshots.add(frames(1)[0], 0)
    now[0] = 109.9
    assert not snapshots.due()
    now[0] = 110.0
    assert snapshots.due()


def test_a_full_disk_ends_the_camera_before_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the agent's usual one of a full disk."""
    usage = namedtuple("usage", "total used free")
    check_space(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1 << 20))
    with pytest.raises(AgentError, match="disk is full") as raised:
        check_space(".")
    assert raised.value.kind == "disk"
