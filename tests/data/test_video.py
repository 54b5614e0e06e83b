import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from coco_files import image, person
from numpy.typing import NDArray

from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.data.errors import DataError
from edgeprune.data.video import Frame, frame_of, frame_path

SIZE = (64, 48)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """30 frames of a square that moves, with frames that depend on earlier ones."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, SIZE)
    for number in range(30):
        pixels = np.full((SIZE[1], SIZE[0], 3), 40, np.uint8)
        pixels[10:20, number : number + 10] = (255, 5 * number, 0)
        writer.write(pixels)
    writer.release()
    return path


def decode_all(path: Path) -> list[NDArray[np.uint8]]:
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        decoded, pixels = capture.read()
        if not decoded:
            return frames
        frames.append(pixels)


def dataset_of(folder: Path, names: list[str], size: tuple[int, int] = SIZE) -> Dataset:
    path = folder / "frames.json"
    content = {
        "images": [image(number, name, *size) for number, name in enumerate(names)],
        "annotations": [person(number + 1, number, [1, 1, 5, 5]) for number in range(len(names))],
        "categories": [{"id": 9, "name": "person"}],
    }
    path.write_text(json.dumps(content))
    return load_dataset(path)


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("vtest.avi#000123", Frame("vtest.avi", 123)),
        ("a#1/b.mp4#7", Frame("a#1/b.mp4", 7)),
        ("photo#12.jpg", None),
        ("vtest.avi", None),
        ("#5", None),
    ],
)
def test_frame_names(name: str, frame: Frame | None) -> None:
    """Video and number of a frame are read from its name; other names are image files."""
    assert frame_of(name) == frame


def test_frames_are_exact_in_any_order(tmp_path: Path, video: Path) -> None:
    """Each frame, in whatever order, is the one that decoding from the start gives, to the last bit."""
    expected = decode_all(video)
    numbers = [29, 0, 17, 5]
    dataset = dataset_of(tmp_path, [f"clip.avi#{number:06d}" for number in numbers])
    for index, number in enumerate(numbers):
        np.testing.assert_array_equal(dataset.image(index), expected[number])
        np.testing.assert_array_equal(cv2.imread(str(dataset.image_path(index))), expected[number])


def test_a_video_is_decoded_once(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first frame asked for brings all labelled ones into the cache; a copy of the video uses them."""
    dataset = dataset_of(tmp_path, ["clip.avi#000003", "clip.avi#000020"])
    dataset.image(0)
    (tmp_path / "other").mkdir()
    shutil.copy(video, tmp_path / "other" / "same.avi")
    again = dataset_of(tmp_path / "other", ["same.avi#20"])
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: pytest.fail("decoded again"))
    assert dataset.image_path(1) == again.image_path(0)
    assert sorted(path.name for path in dataset.image_path(1).parent.iterdir()) == [
        "000003.png",
        "000020.png",
    ]


def test_a_changed_video_is_decoded_again(tmp_path: Path, video: Path) -> None:
    """Frames are kept by the video's content: another video under the same name gives its own frames."""
    before = frame_path(video, 3).read_bytes()
    content = video.read_bytes()
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"mp4v"), 10, SIZE)
    for _ in range(5):
        writer.write(np.full((SIZE[1], SIZE[0], 3), 200, np.uint8))
    writer.release()
    assert video.read_bytes() != content
    assert frame_path(video, 3).read_bytes() != before


def test_a_frame_after_the_end_is_named(tmp_path: Path, video: Path) -> None:
    """A label on a frame that the video does not have says how many it has; the other frames can be read."""
    dataset = dataset_of(tmp_path, ["clip.avi#000030", "clip.avi#000029"])
    with pytest.raises(
        DataError, match=r"clip\.avi has no frame 30: it decodes to 30 frames, numbered from 0"
    ):
        dataset.image(0)
    dataset.image(1)


def test_a_missing_or_broken_video_is_named(tmp_path: Path) -> None:
    """A video that is not there, or is none, is an error at loading."""
    with pytest.raises(DataError, match=r"names the video 'gone\.avi', which is not in "):
        dataset_of(tmp_path, ["gone.avi#000001"])
    (tmp_path / "text.avi").write_text("no video")
    with pytest.raises(DataError, match=r"text\.avi does not open as a video"):
        dataset_of(tmp_path, ["text.avi#000001"])


def test_frames_of_another_size_than_labelled_are_refused(tmp_path: Path, video: Path) -> None:
    """Boxes made on another resolution of the video do not pass."""
    with pytest.raises(DataError, match=r"is 64x48 pixels and .* says 640x480"):
        dataset_of(tmp_path, ["clip.avi#000001"], (640, 480)).image(0)


def test_hold_out_takes_the_end_of_a_video(tmp_path: Path, video: Path) -> None:
    """All held-out frames come after all training frames, whatever the order of the labels and the seed."""
    numbers = [int(number) for number in np.random.default_rng(1).permutation(30)[:12]]
    dataset = dataset_of(tmp_path, [f"clip.avi#{number:06d}" for number in numbers])
    for seed in range(3):
        parts = dataset.hold_out(0.25, seed)
        train, select = ([int(sample.file_name[-6:]) for sample in part.samples] for part in parts)
        assert len(train) == 9 and sorted(select) == sorted(numbers)[-3:]


def test_processes_extract_side_by_side(tmp_path: Path, video: Path, cache: Path) -> None:
    """Two processes that need the same frames at once both get them, and no temporary files stay."""
    code = "import sys; from pathlib import Path; from edgeprune.data.video import frame_path; "
    code += "print(frame_path(Path(sys.argv[1]), 29, range(29)))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(video)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {Path(process.communicate()[0].strip()) for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (path,) = paths
    assert sorted(file.name for file in path.parent.iterdir()) == [
        f"{number:06d}.png" for number in range(30)
    ]


@pytest.mark.shared_data
def test_vtest_frames_are_exact(shared: Path, tmp_path: Path) -> None:
    """Frames of the PETS video are those of decoding it from the start, the last of its 795 included."""
    numbers = [794, 0, 123, 646]
    (tmp_path / "vtest.avi").symlink_to(shared / "pets-vtest" / "vtest.avi")
    dataset = dataset_of(tmp_path, [f"vtest.avi#{number:06d}" for number in numbers], (768, 576))
    expected = decode_all(shared / "pets-vtest" / "vtest.avi")
    assert len(expected) == 795
    for index, number in enumerate(numbers):
        np.testing.assert_array_equal(dataset.image(index), expected[number])
