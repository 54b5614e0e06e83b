"""Images of every kind are read or named; Pillow, which the code does not use, writes them."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from coco_files import image, write_coco
from formats import yolo
from PIL import Image

from edgeprune.data import image_files
from edgeprune.data.dataset import load_dataset
from edgeprune.data.image_files import ImageFile, decode, look

SIZE = (30, 20)  # width, height
RNG = np.random.default_rng(0)
COLOUR = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), np.uint8))

KINDS: dict[str, tuple[str, Image.Image, str]] = {
    "colour": ("a.jpg", COLOUR, "colour"),
    "grey JPEG": ("a.jpg", COLOUR.convert("L"), "grey"),
    "CMYK": ("a.jpg", COLOUR.convert("CMYK"), "CMYK"),
    "PNG": ("x.png", COLOUR, "colour"),
    "palette": ("x.png", COLOUR.convert("P"), "colour"),
    "grey PNG": ("x.png", COLOUR.convert("L"), "grey"),
    "alpha": ("x.png", COLOUR.convert("RGBA"), "alpha"),
    "16-bit": ("x.png", Image.fromarray(RNG.integers(0, 65536, (20, 30), np.uint16)), "16-bit"),
    "BMP": ("a.bmp", COLOUR, "colour"),
    "WebP": ("a.webp", COLOUR, "colour"),
    "TIFF": ("a.tif", COLOUR, "colour"),
    "unicode": ("Überweg 人 \U0001f6b6.jpg", COLOUR, "colour"),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_images(name: str, tmp_path: Path) -> None:
    """Size and kind are those that were written, and the image is read as the 8-bit colours it shows."""
    file_name, written, kind = KINDS[name]
    written.save(tmp_path / file_name)
    found = look(tmp_path, [file_name])[file_name]
    assert (found.width, found.height, found.kind, found.damage) == (*SIZE, kind, "")
    dataset = load_dataset(write_coco(tmp_path, [], [image(1, file_name, *SIZE)]))
    assert dataset.problems == ()
    pixels = dataset.image(0)
    with Image.open(tmp_path / file_name) as reopened:
        shown = reopened.point(lambda value: value / 256).convert("L") if kind == "16-bit" else reopened
        expected = np.asarray(shown.convert("RGB"))[:, :, ::-1].astype(int)
    assert np.abs(pixels - expected).mean() < (20 if kind == "CMYK" else 3)  # CMYK has no one conversion


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated JPEG": lambda folder: _truncate(folder / "a.jpg", 0.7),
    "JPEG cut in its header": lambda folder: _truncate(folder / "a.jpg", 0.1),
    "truncated PNG": lambda folder: _truncate(folder / "x.png", 0.7),
    "truncated BMP": lambda folder: _truncate(folder / "a.bmp", 0.7),
    "empty": lambda folder: (folder / "a.jpg").write_bytes(b""),
    "text": lambda folder: (folder / "a.jpg").write_text("no image"),
    "two bytes": lambda folder: (folder / "a.jpg").write_bytes(b"\xff\xd8"),
    "a huge size": lambda folder: _claim_size(folder / "x.png", 60_000),
}


def _truncate(path: Path, share: float) -> None:
    COLOUR.resize((300, 200)).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def _claim_size(path: Path, side: int) -> None:
    COLOUR.save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = side.to_bytes(4, "big") * 2
    path.write_bytes(content)


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_named_at_the_start(name: str, tmp_path: Path) -> None:
    """What header and end show is found without decoding, and the image is dropped and listed."""
    DAMAGES[name](tmp_path)
    (file,) = tmp_path.iterdir()
    found = look(tmp_path, [file.name])[file.name]
    assert found.damage and not found.width
    dataset = load_dataset(write_coco(tmp_path, [], [image(1, "b.png"), image(2, file.name, 300, 200)]))
    (problem,) = dataset.problems
    assert found.damage in problem.what and len(dataset) == 1


def test_what_a_header_does_not_show_is_dropped_at_the_first_decode(tmp_path: Path) -> None:
    """A PNG damaged in its middle passes the look; `decodable` drops and lists it, and the rest stays."""
    content = [image(1, "b.png"), image(2, "c.png", 300, 200)]
    Image.fromarray(RNG.integers(0, 256, (200, 300, 3), np.uint8)).save(tmp_path / "c.png")
    damaged = bytearray((tmp_path / "c.png").read_bytes())
    damaged[1000:2000] = bytes(1000)
    (tmp_path / "c.png").write_bytes(damaged)
    dataset = load_dataset(write_coco(tmp_path, [], content))
    assert dataset.problems == () and len(dataset) == 2
    steps: list[tuple[int, int]] = []
    kept = dataset.decodable(lambda done, total: steps.append((done, total)))
    assert [sample.file_name for sample in kept.samples] == ["b.png"]
    (problem,) = kept.problems
    assert problem.file == "c.png" and "does not decode" in problem.what
    assert sorted(steps) == [(1, 2), (2, 2)]
    assert kept.sha256 != dataset.sha256 and kept.decodable() is kept


def test_bytes_behind_an_image_are_no_damage(tmp_path: Path) -> None:
    """Cameras write more behind the end marker; such a file is whole, and one cut before it is not."""
    COLOUR.resize((300, 200)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole + bytes(100))
    (tmp_path / "c.jpg").write_bytes(whole + b"trailer" * 1000)
    (tmp_path / "d.jpg").write_bytes(whole[:-50] + b"trailer" * 1000)
    found = look(tmp_path, ["b.jpg", "c.jpg", "d.jpg"])
    assert [bool(found[name].damage) for name in ("b.jpg", "c.jpg", "d.jpg")] == [False, False, True]


def test_a_thumbnail_and_a_long_header_hide_nothing(tmp_path: Path) -> None:
    """Size and wholeness are those of the image, not of a JPEG inside its header that fills 200 KB."""
    COLOUR.resize((300, 200)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    thumbnail = (b"\xff\xe2\xff\xff" + whole + b"\xff\xda\xff\xd9" * 20_000)[: 2 + 0xFFFF]
    (tmp_path / "b.jpg").write_bytes(whole[:2] + thumbnail * 3 + whole[2:])
    (tmp_path / "c.jpg").write_bytes(whole[:2] + thumbnail * 3 + whole[2:-200])
    found = look(tmp_path, ["b.jpg", "c.jpg"])
    assert (found["b.jpg"].width, found["b.jpg"].height, found["b.jpg"].damage) == (300, 200, "")
    assert found["c.jpg"].damage == "is a truncated JPEG"


@pytest.mark.parametrize("order", ["little", "big"])
def test_exif_rotation(tmp_path: Path, order: str) -> None:
    """The orientation is read; labels of the stored size are used, of the turned size or of none refused."""
    exif = Image.Exif()
    exif[0x0112] = 6
    if order == "big":
        exif.endian = ">"
    COLOUR.save(tmp_path / "a.jpg", exif=exif)
    assert look(tmp_path, ["a.jpg"])["a.jpg"].orientation == 6
    stored = load_dataset(write_coco(tmp_path, [], [image(1, "a.jpg", 30, 20)]))
    assert stored.problems == () and stored.image(0).shape == (20, 30, 3)
    turned = load_dataset(write_coco(tmp_path, [], [image(1, "a.jpg", 20, 30), image(2, "b.png")]))
    assert "EXIF orientation is 6" in turned.problems[0].what and len(turned) == 1

    path = yolo(tmp_path / "yolo")
    COLOUR.save(path / "images" / "val" / "turned.jpg", exif=exif)
    (problem,) = load_dataset(path).problems
    assert problem.file.endswith("turned.jpg") and "store it upright" in problem.what


def test_files_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time only sizes and times are read; a changed file is looked at again."""
    names = [f"{number}.png" for number in range(20)]
    for name in names:
        cv2.imwrite(str(tmp_path / name), np.zeros((20, 30, 3), np.uint8))
    first = look(tmp_path, names)
    looked: list[str] = []
    original = image_files._look

    def spy(path: Path, found: ImageFile) -> ImageFile:
        looked.append(path.name)
        return original(path, found)

    monkeypatch.setattr(image_files, "_look", spy)
    assert look(tmp_path, names) == first and looked == []
    cv2.imwrite(str(tmp_path / "3.png"), np.zeros((25, 30, 3), np.uint8))
    os.utime(tmp_path / "4.png", ns=(0, 0))
    assert look(tmp_path, names)["3.png"].height == 25 and sorted(looked) == ["3.png", "4.png"]
    decode(tmp_path, names, lambda: None)
    looked.clear()
    assert all(file.decoded for file in decode(tmp_path, names, lambda: None).values()) and looked == []


def test_a_thousand_images_take_a_second(tmp_path: Path) -> None:
    """The first look takes well under a millisecond an image: 10,000 take seconds."""
    COLOUR.resize((640, 480)).save(tmp_path / "0.jpg")
    for number in range(1, 1000):
        os.link(tmp_path / "0.jpg", tmp_path / f"{number}.jpg")
    start = time.process_time()
    assert len(look(tmp_path, [f"{number}.jpg" for number in range(1000)])) == 1000
    assert time.process_time() - start < 1
