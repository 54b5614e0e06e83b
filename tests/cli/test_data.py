"""`edgeprune data`: what a person sees, on small data sets in every format."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny_detector import TinyDetector
from typer.main import get_command
from typer.testing import CliRunner, Result

from edgeprune.cli import app
from edgeprune.data.dataset import load_dataset

DATA = get_command(app).commands["data"]  # type: ignore[attr-defined]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Twelve images with a box each, in two parts of nine and three."""
    for number in range(12):
        part = "val" if number >= 9 else "train"
        for kind in ("images", "labels"):
            (tmp_path / kind / part).mkdir(parents=True, exist_ok=True)
        pixels = np.full((48, 64, 3), number * 10, np.uint8)
        cv2.imwrite(str(tmp_path / "images" / part / f"{number}.png"), pixels)
        (tmp_path / "labels" / part / f"{number}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [pedestrian, dog]\n")
    return tmp_path


def test_inspect_shows_each_part_and_its_problems(yolo: Path) -> None:
    """The format, counts and problems of each part; with --json the same for a program."""
    (yolo / "labels" / "val" / "9.txt").write_text("0 0.5 0.5 0.25 0.5\n0 0.5 nan 1 1\n")
    shown = run("inspect", yolo)
    assert shown.exit_code == 0
    assert shown.stdout.count("YOLO") == 2
    assert "9.txt: line 2: bbox has a value that is no finite number; dropped" in shown.stdout
    train, val = json.loads(run("inspect", yolo, "--json").stdout)
    assert (train["images"], train["boxes"], val["images"], val["boxes"]) == (9, 9, 3, 3)
    assert train["problems"] == [] and len(val["problems"]) == 1


def test_strict_refuses(yolo: Path) -> None:
    """--strict fails where something would be dropped, also what only decoding shows; without, it is dropped."""
    image = yolo / "images" / "val" / "10.png"
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    content = bytearray(image.read_bytes())
    content[200:2000] = bytes(1800)
    image.write_bytes(content)
    assert run("inspect", yolo / "images" / "val").exit_code == 0
    refused = run("inspect", yolo / "images" / "val", "--strict")
    assert refused.exit_code == 1 and "does not decode" in refused.output
    assert run("convert", yolo / "images" / "val", "--out", yolo / "val.json", "--strict").exit_code == 1
    assert not (yolo / "val.json").exists()


def test_convert_and_preview(yolo: Path) -> None:
    """A converted part is a data set by itself; the preview is a picture."""
    told = json.loads(run("convert", yolo / "images" / "val", "--out", yolo / "val.json", "--json").stdout)
    written = {"file": str(yolo / "val.json"), "images": 3, "boxes": 3, "images_folder": None}
    assert told["files"] == [written]
    assert len(load_dataset(yolo / "val.json")) == 3
    assert run("inspect", yolo / "val.json", "--preview", yolo / "sheet.png").exit_code == 0
    assert cv2.imread(str(yolo / "sheet.png")).shape[2] == 3
    assert run("inspect", yolo, "--preview", yolo / "both.png").exit_code == 0
    sheet, both = (cv2.imread(str(yolo / name)) for name in ("sheet.png", "both.png"))
    assert both.shape[0] == 4 * 320  # three rows of nine images in training, one of three in validation
    assert (both[3 * 320 :] == sheet).all()


def test_split_writes_two_files(yolo: Path) -> None:
    """train.json and val.json share no image and have them all."""
    split = run("split", yolo / "images" / "train", "--out", yolo / "parts", "--share", "0.3")
    assert split.exit_code == 0 and "name this folder" in split.stdout
    again = run("split", yolo / "images" / "train", "--out", yolo / "parts", "--share", "0.3", "--json")
    told = json.loads(again.stdout)
    assert (told["images"], told["boxes"], told["dropped_boxes"]) == (9, 9, 0)
    assert [Path(file["file"]).name for file in told["files"]] == ["train.json", "val.json"]
    assert [(file["images"], file["boxes"]) for file in told["files"]] == [(6, 6), (3, 3)]
    assert {file["images_folder"] for file in told["files"]} == {str(yolo)}
    names = [
        {sample.file_name for sample in load_dataset(yolo / "parts" / f"{part}.json", yolo).samples}
        for part in ("train", "val")
    ]
    assert [len(part) for part in names] == [6, 3] and not names[0] & names[1]


def test_a_class_that_is_not_there(yolo: Path) -> None:
    """One line that lists the classes there are; others can be asked for."""
    missing = run("inspect", yolo / "images" / "val", "--classes", "cat")
    assert missing.exit_code == 1 and "its classes are: dog, pedestrian" in missing.output
    assert '"dog"' in run("inspect", yolo / "images" / "val", "--classes", "dog", "--json").stdout


def test_autolabel_writes_a_detectors_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third frame of a video is labelled, and the file is a data set beside its video."""
    from edgeprune.detectors import registry

    monkeypatch.setattr(registry, "load_detector", lambda *_: TinyDetector((64, 64)))
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for _ in range(7):
        writer.write(np.zeros((64, 64, 3), np.uint8))
    writer.release()
    labelled = run(
        "autolabel",
        tmp_path / "clip.avi",
        "--out",
        tmp_path / "clip.json",
        "--every",
        3,
        "--threshold",
        0.01,
        "--json",
    )
    assert labelled.exit_code == 0, labelled.output
    told = json.loads(labelled.stdout)
    assert (told["images"], told["boxes"]) == (3, 0)  # of what was labelled
    dataset = load_dataset(tmp_path / "clip.json")
    assert [sample.file_name for sample in dataset.samples] == [f"clip.avi#{n:06d}" for n in (0, 3, 6)]
    content = json.loads((tmp_path / "clip.json").read_text())
    assert all(entry["score"] >= 0.01 for entry in content["annotations"])
    assert told["files"][0]["boxes"] == len(content["annotations"])


@pytest.mark.parametrize("name", DATA.commands)
def test_every_option_has_help(name: str) -> None:
    """Each command and each of its options and arguments says what it is for."""
    assert DATA.commands[name].help
    for parameter in DATA.commands[name].params:
        assert parameter.name == "help" or parameter.help, f"{name} {parameter.name} has no help"
