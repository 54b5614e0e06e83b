"""`edgeprune adapt`, and `build` where the weights' classes differ: rows kept, frozen layers, resumed, best kept."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import edgeprune.cli.adaptation
from edgeprune.cli import app
from edgeprune.data.dataset import load_dataset
from edgeprune.data.files import read_json, sha256_of
from edgeprune.detectors.classes import VOC_CLASSES
from edgeprune.detectors.evaluation import evaluate
from edgeprune.detectors.registry import load_detector, save_weights
from edgeprune.detectors.tiny_yolov2 import TinyYoloV2

SIDE = 64
NARROW = (4, 8, 8, 8, 16, 16, 16, 16)


def write_data(folder: Path, name: str, count: int) -> Path:
    """Dark noise with one bright square an image."""
    rng = np.random.default_rng(count)
    (folder / name).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        pixels = rng.integers(0, 80, (SIDE, SIDE, 3), dtype=np.uint8)
        x, y = (int(value) for value in rng.integers(2, 30, 2))
        pixels[y : y + 30, x : x + 30] += 150
        assert cv2.imwrite(str(folder / name / f"{number}.png"), pixels)
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        box = {"id": number, "image_id": number, "category_id": 1, "bbox": [x, y, 30, 30]}
        boxes.append({**box, "area": 900, "iscrowd": 0})
    path = folder / f"boxes_{name}.json"
    categories = [{"id": 1, "name": "person"}]
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return path


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of these tests' own, and one thread: sums depend on how they are split over threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the 20 classes of VOC, as the course's checkpoints have them, and data."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    state = TinyYoloV2((SIDE, SIDE), VOC_CLASSES, channels=NARROW).state_dict()
    numbers = {0: 1, 2: 2, 4: 3, 6: 4, 8: 5, 10: 6, 12: 7, 13: 8, 14: 9}
    theirs = {}
    for name, tensor in state.items():
        _, index, kind, rest = name.split(".")
        theirs[f"{'bn' if kind == 'norm' else 'conv'}{numbers[int(index)]}.{rest}"] = tensor
    torch.save(theirs, folder / "voc.pt")
    write_data(folder, "train", 20)
    write_data(folder, "val", 6)
    return folder


def options(inputs: Path, **changes: Any) -> list[str]:
    values = {
        "detector": "tiny-yolov2",
        "weights": inputs / "voc.pt",
        "input_size": SIDE,
        "train": inputs / "boxes_train.json",
        "train_device": "cpu",
    } | changes
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def adapt(inputs: Path, out: Path, *flags: str, **changes: Any) -> Result:
    arguments = options(inputs, **{"epochs": 3} | changes)
    return CliRunner().invoke(app, ["adapt", *arguments, "--out", str(out), *flags])


def succeed(result: Result) -> Result:
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adaptation that nothing interrupted, frozen at first."""
    out = tmp_path_factory.mktemp("finished") / "out"
    succeed(adapt(inputs, out, "--freeze", "layers.[0-9]", "--unfreeze-epoch", "3", epochs=4))
    return out


def test_the_best_is_kept(inputs: Path, finished: Path) -> None:
    """The record has AP of every epoch; the weights kept are those of the best one, of one class, and score so."""
    record = read_json(finished / "adapt.json")
    result = record["result"]
    assert [epoch["epoch"] for epoch in result["epochs"]] == [1, 2, 3, 4]
    aps = [max(epoch["ap"], epoch["ema_ap"]) for epoch in result["epochs"]]
    assert result["after"]["ap"] == max([result["before"]["ap"], *aps])
    detector = load_detector("tiny-yolov2", finished / "weights.safetensors", (SIDE, SIDE))
    assert detector.state_dict()["layers.14.conv.bias"].shape == (5 * 6,)
    _, select = load_dataset(inputs / "boxes_train.json").hold_out(0.2, 0)
    assert evaluate(detector, detector, select).ap == pytest.approx(result["after"]["ap"], abs=1e-6)
    assert not list(finished.glob("checkpoint*"))


def test_it_learns(inputs: Path, tmp_path: Path) -> None:
    """A user's own detector with random weights finds squares after some epochs, and the best one is kept."""
    own = f"{Path(__file__).resolve().parents[2] / 'docs' / 'own_detector.py'}:small_detector"
    arguments = ["--detector", own, "--train", str(inputs / "boxes_train.json"), "--epochs", "12"]
    arguments += ["--body-share", "1"]
    arguments += [
        "--input-size",
        str(SIDE),
        "--train-device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    torch.manual_seed(0)
    result = json.loads(succeed(CliRunner().invoke(app, ["adapt", *arguments])).stdout)["result"]
    assert result["best_epoch"] > 0
    assert result["after"]["ap50"] > 0.3 + result["before"]["ap50"]


def test_what_is_frozen_stays(inputs: Path, tmp_path: Path) -> None:
    """Frozen parameters keep their values, others do not; the kept rows are person's where nothing is trained."""
    start = load_detector("tiny-yolov2", inputs / "voc.pt", (SIDE, SIDE)).state_dict()
    succeed(adapt(inputs, tmp_path / "none", epochs=0))
    untouched = load_detector("tiny-yolov2", tmp_path / "none" / "weights.safetensors", (SIDE, SIDE))
    assert torch.equal(untouched.state_dict()["layers.14.conv.weight"], start["layers.14.conv.weight"])

    record = succeed(adapt(inputs, tmp_path / "some", "--freeze", "layers.?.*", "--json", epochs=2)).stdout
    kept = load_detector("tiny-yolov2", tmp_path / "some" / "weights.safetensors", (SIDE, SIDE)).state_dict()
    for name in ("layers.0.conv.weight", "layers.8.norm.weight"):
        assert torch.equal(kept[name], start[name])
    trained = json.loads(record)["result"]["best_epoch"] > 0
    assert trained != torch.equal(kept["layers.14.conv.weight"], start["layers.14.conv.weight"])


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_interrupted_adaptation_goes_on(
    inputs: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    """Ctrl-C after an epoch, frozen or not, exits 130; --resume ends with the weights of an uninterrupted run."""

    def say(line: str) -> None:
        if line.startswith(f"epoch {epoch}:"):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    flags = ("--freeze", "layers.[0-9]", "--unfreeze-epoch", "3")
    with monkeypatch.context() as patch:
        patch.setattr(edgeprune.cli.adaptation, "say", say)
        stopped = adapt(inputs, out, *flags, epochs=4)
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr
    assert not (out / "weights.safetensors").exists()
    refused = adapt(inputs, out, *flags, epochs=4)
    assert refused.exit_code == 1 and "--resume goes on" in refused.stderr
    other = adapt(inputs, out, *flags, "--resume", epochs=5)
    assert other.exit_code == 1 and "options differ" in other.stderr
    succeed(adapt(inputs, out, *flags, "--resume", epochs=4))
    assert read_json(out / "adapt.json") == read_json(finished / "adapt.json")
    assert sha256_of(out / "weights.safetensors") == sha256_of(finished / "weights.safetensors")


def test_validation_is_reported_apart(inputs: Path, tmp_path: Path) -> None:
    """--val is measured before and after and changes nothing."""
    val = inputs / "boxes_val.json"
    record = json.loads(succeed(adapt(inputs, tmp_path / "a", "--val", str(val), "--json", epochs=1)).stdout)
    plain = json.loads(succeed(adapt(inputs, tmp_path / "b", "--json", epochs=1)).stdout)
    assert record["result"] == plain["result"]
    assert record["val_before"]["images"] == record["val_after"]["images"] == 6
    detector = load_detector("tiny-yolov2", tmp_path / "a" / "weights.safetensors", (SIDE, SIDE))
    assert evaluate(detector, detector, load_dataset(val)).ap == record["val_after"]["ap"]


def test_dropped_labels_are_counted(inputs: Path, tmp_path: Path) -> None:
    """adapt.json counts what could not be used; --strict refuses it before anything is written."""
    shutil.copytree(inputs, tmp_path / "inputs")
    (tmp_path / "inputs" / "train" / "3.png").write_bytes(b"nothing")
    refused = adapt(tmp_path / "inputs", tmp_path / "out", "--strict")
    assert refused.exit_code == 1 and "cannot be used as they are" in refused.stderr
    assert not (tmp_path / "out").exists()
    succeed(adapt(tmp_path / "inputs", tmp_path / "out", epochs=1))
    held = read_json(tmp_path / "out" / "adapt.json")["data"]
    assert (held["images"], held["boxes"], held["dropped_images"]) == (19, 19, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes", "zebra"], "no class 'zebra'"),
        (["--freeze", "conv1.*"], "no parameter of that name"),
        (["--freeze", "*"], "leaves nothing to train"),
        (["--unfreeze-epoch", "2"], "--freeze"),
        (["--detector", "resnet"], "unknown detector"),
    ],
)
def test_what_cannot_be_adapted_is_one_line(
    inputs: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    """A class that the weights lack, patterns that match nothing or all, options that clash."""
    result = adapt(inputs, tmp_path / "out", *flags)
    assert result.exit_code == 1, repr(result.exception)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def run_options(inputs: Path, run: Path, **changes: Any) -> list[str]:
    val = {"val": inputs / "boxes_val.json", "target": "host", "iterations": 1, "remove": 0.3}
    return options(inputs, **val | {"finetune_epochs": 0, "adapt_epochs": 1, "run_dir": run} | changes)


def test_prune_adapts_where_classes_compete(inputs: Path, tmp_path: Path) -> None:
    """From VOC weights `prune`, and so `build`, adapts before step 0; a resumed run does not again."""
    run = tmp_path / "run"
    succeed(CliRunner().invoke(app, ["prune", *run_options(inputs, run)]))
    record = read_json(run / "adapted" / "adapt.json")
    assert len(record["result"]["epochs"]) == 1
    adapted = load_detector("tiny-yolov2", run / "adapted" / "weights.safetensors", (SIDE, SIDE)).state_dict()
    spec = read_json(run / "step-00" / "detector.json")["spec"]
    assert (spec["classes"], spec["variant"]["border"]) == (["person"], "reflect")
    saved = load_step_weights(run / "step-00")
    assert torch.equal(saved["layers.14.conv.weight"], adapted["layers.14.conv.weight"])
    before = sha256_of(run / "adapted" / "weights.safetensors")
    succeed(CliRunner().invoke(app, ["prune", *run_options(inputs, run), "--resume"]))
    assert sha256_of(run / "adapted" / "weights.safetensors") == before


def test_prune_does_not_adapt_what_fits(inputs: Path, finished: Path, tmp_path: Path) -> None:
    """Weights made for the classes asked for go into step 0 as they are."""
    run = tmp_path / "run"
    weights = finished / "weights.safetensors"
    succeed(CliRunner().invoke(app, ["prune", *run_options(inputs, run, weights=weights)]))
    assert not (run / "adapted").exists()
    kept = load_detector("tiny-yolov2", weights, (SIDE, SIDE)).state_dict()
    saved = load_step_weights(run / "step-00")
    assert torch.equal(saved["layers.14.conv.weight"], kept["layers.14.conv.weight"])


def load_step_weights(step: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    state: dict[str, torch.Tensor] = safetensors.torch.load_file(step / "weights.safetensors")
    return state


def shared_options(shared: Path, weights: Path, **changes: Any) -> list[str]:
    values = {
        "weights": weights,
        "train": shared / "coco-person" / "person_train2017.json",
        "val": shared / "coco-person" / "person_val2017.json",
        "train_device": "cpu",
    } | changes
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.slow
@pytest.mark.shared_data
def test_coco_person_is_not_lost(shared: Path, tmp_path: Path) -> None:
    """From the COCO-80 weights, 3 epochs on coco-person at 320 keep AP at 0.31 or more."""
    weights = shared / "nanodet-g" / "nanodet_g_coco80_convs.npz"
    arguments = shared_options(shared, weights, epochs=3, out=tmp_path / "out")
    record = json.loads(succeed(CliRunner().invoke(app, ["adapt", *arguments, "--json"])).stdout)
    assert record["val_after"]["ap"] >= 0.31


@pytest.mark.slow
@pytest.mark.shared_data
def test_a_lost_person_row_is_learnt_back(shared: Path, tmp_path: Path) -> None:
    """With the person row re-initialised AP is near 0; what adapt does by default brings it to 0.25."""
    detector = load_detector("nanodet-g", shared / "nanodet-g" / "nanodet_g_coco80_convs.npz", (320, 320))
    torch.manual_seed(0)
    for head in detector.heads:  # type: ignore[union-attr]
        torch.nn.init.normal_(head.output.weight[:1].detach(), std=0.01)
        torch.nn.init.constant_(head.output.bias[:1].detach(), -4.6)
    save_weights(tmp_path / "reset.safetensors", "nanodet-g", detector)
    arguments = shared_options(shared, tmp_path / "reset.safetensors", epochs=3, out=tmp_path / "out")
    result = succeed(CliRunner().invoke(app, ["adapt", *arguments, "--json"]))
    record = json.loads(result.stdout)
    assert record["val_before"]["ap"] < 0.05
    assert record["result"]["best_epoch"] > 0
    assert record["val_after"]["ap"] >= 0.25
