"""`edgeprune calibrate`: the precision asked is the one reached, and what cannot be reached is said."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tiny_detector import SIDE, TinyDetector, write_data
from typer.testing import CliRunner, Result

from edgeprune.cli import app
from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.data.files import read_json, sha256_of
from edgeprune.deploy.device.imaging import normalise
from edgeprune.detectors.evaluation import detect
from edgeprune.detectors.protocol import Targets
from edgeprune.pruning.checkpoint import load_step

IMAGES = 24


def edgeprune(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_trained(path: Path, dataset: Dataset) -> None:
    """Weights that find the squares, but not all."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        detector = TinyDetector((SIDE, SIDE))
        images = [normalise(dataset.image(i), detector.preprocessing) for i in range(len(dataset))]
        targets = [
            Targets(torch.from_numpy(sample.boxes), torch.from_numpy(sample.ignore))
            for sample in dataset.samples
        ]
        optimizer = torch.optim.Adam(detector.parameters(), 0.003)
        for _ in range(60):
            loss = detector.loss(detector(torch.from_numpy(np.concatenate(images))), targets).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.save(detector.state_dict(), path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of a tiny detector, pruned once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("calibrate")
    train = write_data(folder, "train", 32, seed=1)
    write_trained(folder / "tiny.pt", load_dataset(train))
    options: dict[str, Any] = {
        "target": "host",
        "detector": "tiny",
        "weights": folder / "tiny.pt",
        "input-size": SIDE,
        "train": train,
        "val": write_data(folder, "val", IMAGES, seed=2),
        "iterations": 1,
        "remove": 0.2,
        "finetune-epochs": 4,
        "learning-rate": 0.001,
        "train-device": "cpu",
        "run-dir": folder / "run",
    }
    result = edgeprune("prune", *[part for name, value in options.items() for part in (f"--{name}", value)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    yield folder / "run"
    torch.set_num_threads(threads)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def calibrate(run: Path, *options: object) -> list[dict[str, Any]]:
    result = edgeprune("calibrate", run, *options, "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


class Counted:
    """What a step finds on its run's validation images, or others: counted without edgeprune's matching."""

    def __init__(self, run: Path, step: int, val: Path | None = None) -> None:
        self._dataset = load_dataset(val or Path(read_json(run / "run.json")["config"]["val"]))
        pruned = load_step(run / f"step-{step:02d}")
        self.found = detect(pruned.detector, pruned.network, self._dataset)  # type: ignore[arg-type]

    def above(self, threshold: float) -> tuple[int, int]:
        """Right and false detections. Each image has one box: one detection at most is right."""
        right = false = 0
        for sample, detections in zip(self._dataset.samples, self.found, strict=True):
            x1, y1, x2, y2 = sample.boxes[0].tolist()
            overlaps = []
            for left, top, right_side, bottom in detections.boxes[detections.scores > threshold].tolist():
                width, height = min(x2, right_side) - max(x1, left), min(y2, bottom) - max(y1, top)
                shared = max(width, 0) * max(height, 0)
                areas = (x2 - x1) * (y2 - y1) + (right_side - left) * (bottom - top)
                overlaps.append(shared / (areas - shared))
            hit = any(overlap >= 0.5 for overlap in overlaps)
            right, false = right + hit, false + len(overlaps) - hit
        return right, false


def test_the_precision_asked_is_reached(run: Path) -> None:
    """Counted anew above the threshold stored; the recall told is that of the count; every step has a record."""
    rows = calibrate(run, "--precision", 0.6)
    assert [row["iteration"] for row in rows] == [0, 1]
    for row in rows:
        right, false = Counted(run, row["iteration"]).above(row["threshold"])
        assert right / (right + false) >= 0.6
        assert row["precision"] == pytest.approx(right / (right + false))
        assert row["recall"] == pytest.approx(right / IMAGES)
        assert (row["images"], row["boxes"], row["detections"]) == (IMAGES, IMAGES, right + false)
        assert row["precision_low"] < row["precision"] <= row["precision_high"]
        folder = run / f"step-{row['iteration']:02d}"
        stored = read_json(folder / "threshold.json")
        assert stored["point"]["threshold"] == row["threshold"]
        assert stored["wish"]["precision"] == 0.6
        assert stored["weights_sha256"] == sha256_of(folder / "weights.safetensors")


def test_false_positives_a_minute_need_a_rate(run: Path) -> None:
    """Still images have none: it is asked for. With one, the count keeps to what was asked."""
    wish = ("--false-positives-per-minute", 60, "--step", 1)
    refused = edgeprune("calibrate", run, *wish)
    assert refused.exit_code == 1
    assert refused.stderr.splitlines()[-1].endswith("give --frames-per-second")
    assert not (run / "step-01/threshold.json").exists()
    (row,) = calibrate(run, *wish, "--frames-per-second", 10)
    _, false = Counted(run, 1).above(row["threshold"])
    assert row["false_positives_per_minute"] == pytest.approx(false / IMAGES * 600)
    assert row["false_positives_per_minute"] <= 60 < row["false_positives_per_minute_high"]


def test_frames_of_a_video_bring_their_rate(run: Path, tmp_path: Path) -> None:
    """The video's own 12.5 frames a second; a rate that is given goes before it."""
    record = read_json(run / "run.json")
    source = Path(record["config"]["val"])
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 12.5, (SIDE, SIDE))
    for number in range(1, IMAGES + 1):
        writer.write(cv2.imread(str(source.with_name("val") / f"{number}.png")))
    writer.release()
    labels = json.loads(source.read_text())
    for number, image in enumerate(labels["images"]):
        image["file_name"] = f"clip.avi#{number:06d}"
    (tmp_path / "clip.json").write_text(json.dumps(labels))
    for options, rate in (((), 12.5), (("--frames-per-second", 2), 2)):
        rows = calibrate(run, "--precision", 0.5, "--step", 1, "--val", tmp_path / "clip.json", *options)
        assert rows[0]["frames_per_second"] == rate
        expected = rows[0]["false_positives"] / IMAGES * rate * 60
        assert rows[0]["false_positives_per_minute"] == pytest.approx(expected)
    shown = edgeprune("calibrate", run, "--precision", 0.5, "--step", 1, "--val", tmp_path / "clip.json")
    assert f"On {IMAGES} images with {IMAGES} boxes" in shown.stderr
    assert "Frames of a video resemble each other" in shown.stderr


def test_what_cannot_be_had_names_the_best(run: Path, tmp_path: Path) -> None:
    """Where the labels of the surest half lie beside the squares: one line with the best, and nothing stored."""
    source = Path(read_json(run / "run.json")["config"]["val"])
    labels = json.loads(source.read_text())
    surest = sorted(Counted(run, 1).found, key=lambda found: -float(found.scores[0]))[: IMAGES // 2]
    beside = {found.image_id for found in surest}
    for annotation in labels["annotations"]:
        if annotation["image_id"] in beside:
            annotation["bbox"][:2] = [SIDE // 2 - corner for corner in annotation["bbox"][:2]]
    (tmp_path / "boxes_val.json").write_text(json.dumps(labels))
    shutil.copytree(source.with_name("val"), tmp_path / "val")
    counted = Counted(run, 1, tmp_path / "boxes_val.json")
    pairs = [counted.above(float(threshold)) for threshold in np.linspace(0.01, 0.999, 200)]
    best = max(right / (right + false) for right, false in pairs if right)
    assert best < 0.95
    result = edgeprune(
        "calibrate", run, "--precision", 0.99, "--step", 1, "--val", tmp_path / "boxes_val.json"
    )
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    told = re.search(
        r"precision 0.99 cannot be had on the 24 images.*the best is precision ([\d.]+), from", error
    )
    assert told is not None, error
    assert float(told[1]) >= round(best, 3)
    assert not (run / "step-01/threshold.json").exists()


@pytest.mark.parametrize(
    "options",
    [[], ["--precision", "0.9", "--false-positives-per-minute", "1"], ["--precision", "1.5"]],
)
def test_a_wish_is_one_thing(run: Path, options: list[str]) -> None:
    """Nothing, both, or a precision above 1 is wrong usage."""
    assert edgeprune("calibrate", run, *options).exit_code == 2
