"""`edgeprune build` on a tiny detector: the whole way, its stages apart, interrupted, and with bad inputs."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.numpy
from tiny_detector import SIDE, own_surroundings, write_data, write_inputs
from typer.testing import CliRunner, Result

from edgeprune.cli import app
from edgeprune.data.files import read_json, sha256_of
from edgeprune.data.precision import QUALITY_FIGURES

PROGRAM = [sys.executable, str(Path(__file__).with_name("tiny_detector.py"))]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, training and validation data."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of these tests' own (the device works there), and one thread here as in the programs."""
    with own_surroundings(tmp_path_factory.mktemp("cache")):
        yield


def options(inputs: Path, run: Path, **changes: Any) -> list[str]:
    values = {
        "target": "host",
        "detector": "tiny",
        "weights": inputs / "tiny.pt",
        "input_size": SIDE,
        "train": inputs / "boxes_train.json",
        "val": inputs / "boxes_val.json",
        "iterations": 2,
        "remove": 0.4,
        "finetune_epochs": 2,
        "train_device": "cpu",
        "run_dir": run,
    } | changes
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def edgeprune(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = edgeprune(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def outcome(run: Path) -> dict[str, Any]:
    """What must not depend on interruptions: weights, models and every AP."""
    rows = read_json(run / "report.json")["rows"]
    aps = [
        {name: value for name, value in row.items() if "ap" in name.split("_") or "ap50" in name}
        for row in rows
    ]
    files = sorted([*run.glob("step-*/weights.safetensors"), *run.glob("step-*/model.onnx")])
    return {"aps": aps, "files": {str(path.relative_to(run)): sha256_of(path) for path in files}}


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("finished") / "run"
    succeed("build", *options(inputs, run))
    return run


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_build_goes_from_weights_to_report(finished: Path) -> None:
    """A row an iteration, the unpruned first; the share asked for is gone from weights, model and report."""
    report = read_json(finished / "report.json")
    assert [row["iteration"] for row in report["rows"]] == [0, 1, 2]
    assert report["device"]["target"] == "host"
    assert report["device"]["backend"] == "onnxruntime"
    params = [row["params"] for row in report["rows"]]
    for iteration, count in enumerate(params):
        step = finished / f"step-{iteration:02d}"
        saved = safetensors.numpy.load_file(step / "weights.safetensors")
        assert sum(array.size for array in saved.values()) == count
        model = onnx.load(step / "model.onnx")
        weights = [t for t in model.graph.initializer if re.search(r"(weight|bias)$", t.name)]
        assert sum(onnx.numpy_helper.to_array(t).size for t in weights) == count
    # 40 %, to within one channel of the middle layer: 3 x 3 x 16 in, 3 x 3 x 16 out, bias
    assert 0.4 * params[0] <= params[0] - params[2] <= 0.4 * params[0] + 9 * (16 + 16) + 1
    for row in report["rows"]:
        assert row["device_ap"] == pytest.approx(row["ap_after"], abs=0.002)
        assert row["latency_engine_p50_ms"] > 0
    assert report["rows"][0]["ap_after"] > 0, "an AP of 0 would hide errors"
    assert "<html" in (finished / "report.html").read_text()
    assert not list(finished.rglob("checkpoint*"))


def test_the_run_records_what_it_came_from(finished: Path, inputs: Path) -> None:
    """run.json holds every option and the hashes; models and benchmarks name the file they belong to."""
    record = read_json(finished / "run.json")
    assert record["config"]["finetune_epochs"] == 2
    assert record["hashes"]["weights"] == sha256_of(inputs / "tiny.pt")
    assert record["versions"]["torch"]
    for step in finished.glob("step-*"):
        parity = read_json(step / "parity.json")
        assert parity["weights_sha256"] == sha256_of(step / "weights.safetensors")
        assert parity["model_sha256"] == sha256_of(step / "model.onnx")
        assert read_json(step / "benchmark.json")["model_sha256"] == sha256_of(step / "model.onnx")


def test_stages_one_by_one_give_the_same(finished: Path, inputs: Path, tmp_path: Path) -> None:
    """prune, export, deploy, bench and report in turn end where build ends, and each can be repeated."""
    run = tmp_path / "run"
    succeed("prune", *options(inputs, run))
    assert not (run / "step-00" / "model.onnx").exists()
    for _ in range(2):
        exported = json.loads(succeed("export", run, "--json").stdout)
        assert [row["iteration"] for row in exported] == [0, 1, 2]
    built = json.loads(succeed("deploy", run, "--step", 1, "--json").stdout)
    assert [row["iteration"] for row in built] == [1]
    measured = json.loads(succeed("bench", run, "--json").stdout)
    assert measured["rows"][2]["device_ap50"] is not None
    assert json.loads(succeed("report", run, "--json").stdout) == read_json(run / "report.json")
    assert outcome(run) == outcome(finished)


def test_prune_then_build_resume_is_build(finished: Path, inputs: Path, tmp_path: Path) -> None:
    """A run begun with `prune` is finished by `build --resume` with the same options."""
    run = tmp_path / "run"
    succeed("prune", *options(inputs, run))
    succeed("build", *options(inputs, run), "--resume")
    assert outcome(run) == outcome(finished)


def test_evaluate_gives_the_ap_of_any_step(finished: Path, inputs: Path) -> None:
    """On the run's own data AP is what the run recorded; on other data it counts that data's images."""
    rows = read_json(finished / "report.json")["rows"]
    found = json.loads(succeed("evaluate", finished, "--json").stdout)
    assert [row["ap"] for row in found] == [row["ap_after"] for row in rows]
    for row, recorded in zip(found, rows, strict=True):
        assert row["ap_low"] <= row["ap"] <= row["ap_high"]
        assert {name: row[name] for name in QUALITY_FIGURES} == {
            name: recorded[name] for name in QUALITY_FIGURES
        }
    (strict,) = json.loads(succeed("evaluate", finished, "--step", 0, "--threshold", 0.99, "--json").stdout)
    assert strict["recall_at_threshold"] <= found[0]["recall_at_threshold"]
    table = succeed("evaluate", finished).stdout
    assert "miss rate" in table and "On 8 images with 8 boxes" in table
    (other,) = json.loads(
        succeed("evaluate", finished, "--step", 2, "--val", inputs / "boxes_train.json", "--json").stdout
    )
    assert (other["iteration"], other["images"]) == (2, 16)


def test_a_finished_run_is_left_as_it_is(copied: Path, inputs: Path) -> None:
    """--resume on a finished run measures nothing again."""
    before = {path: sha256_of(path) for path in copied.rglob("benchmark.json")}
    succeed("build", *options(inputs, copied), "--resume")
    assert {path: sha256_of(path) for path in copied.rglob("benchmark.json")} == before


def remove(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        remove("report.json"),
        remove("step-02/benchmark.json"),
        remove("step-01/export.json"),
        remove("step-01/model.onnx"),
        cut("step-01/model.onnx"),
        remove("step-02/detector.json"),
        lambda run: [shutil.rmtree(run / name) for name in ("step-01", "step-02")],
    ],
)
def test_resume_makes_what_is_missing(
    damage: Callable[[Path], None], copied: Path, finished: Path, inputs: Path
) -> None:
    """Whatever a run lacks or holds in part, --resume ends with the same weights, models and AP."""
    damage(copied)
    succeed("build", *options(inputs, copied), "--resume")
    assert outcome(copied) == outcome(finished)


def appears(pattern: str) -> Callable[[Path], bool]:
    return lambda run: any(run.glob(pattern))


KILL_POINTS = {
    "run.json": appears("run.json"),
    "unpruned": appears("step-00/detector.json"),
    "fine-tuning": appears("step-01/checkpoint.pt"),
    "pruned": appears("step-01/detector.json"),
    "exporting": appears("step-02/export.json"),
    "measuring": appears("step-02/parity.json"),
}


def start(inputs: Path, run: Path, **changes: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*PROGRAM, "build", *options(inputs, run, **changes), "--resume"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[Path], bool], run: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not condition(run):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("point", KILL_POINTS)
def test_kill_9_and_resume(point: str, finished: Path, inputs: Path, tmp_path: Path) -> None:
    """Killed at any point, a resumed run ends with the same weights, models and AP."""
    run = tmp_path / "run"
    process = start(inputs, run)
    wait_for(KILL_POINTS[point], run, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    succeed("build", *options(inputs, run), "--resume")
    assert outcome(run) == outcome(finished)
    assert not [path for path in run.rglob("*.tmp*") if path.is_file()]


def test_ctrl_c_leaves_a_run_that_goes_on(finished: Path, inputs: Path, tmp_path: Path) -> None:
    """ctrl-C ends with 130 and one line that says how to go on; that way leads to the same result."""
    run = tmp_path / "run"
    process = start(inputs, run)
    wait_for(KILL_POINTS["fine-tuning"], run, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "--resume" in said.splitlines()[-1]
    succeed("build", *options(inputs, run), "--resume")
    assert outcome(run) == outcome(finished)


def fails(*arguments: object) -> str:
    """The one line in which a command says what is wrong."""
    result = edgeprune(*arguments)
    assert result.exit_code == 1, result.output + repr(result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stderr.splitlines()[-1:] == errors, result.stderr
    assert "Traceback" not in result.output
    return errors[0]


def test_two_builds_on_one_folder(inputs: Path, tmp_path: Path) -> None:
    """While a build runs, another one on its folder is refused, and the first is not disturbed."""
    run = tmp_path / "run"
    process = start(inputs, run)
    wait_for(KILL_POINTS["run.json"], run, process)
    process.send_signal(signal.SIGSTOP)  # it must not finish first
    try:
        assert "in use" in fails("build", *options(inputs, run), "--resume")
    finally:
        process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said


def test_an_existing_run_is_not_overwritten(finished: Path, inputs: Path) -> None:
    """Without --resume a run folder is refused; with other options or data too, naming what differs."""
    assert "--resume" in fails("build", *options(inputs, finished))
    said = fails("build", *options(inputs, finished, iterations=3, seed=7), "--resume")
    assert "--iterations is 3 here and 2 there" in said
    assert "--seed is 7 here and 0 there" in said


def test_changed_data_is_not_mixed(copied: Path, inputs: Path, tmp_path: Path) -> None:
    """Validation data that changed since the run began is refused: its APs could not be compared."""
    record = read_json(copied / "run.json")
    record["hashes"]["val"] = "0" * 64
    (copied / "run.json").write_text(json.dumps(record))
    assert "val" in fails("build", *options(inputs, copied), "--resume")
    assert "changed" in fails("bench", copied)


def test_what_selects_does_not_report(inputs: Path, tmp_path: Path) -> None:
    """Images of --val in --select, or images that select among those without labels, are refused by name."""
    run = tmp_path / "run"
    val = inputs / "boxes_val.json"
    assert "--val" in fails("prune", *options(inputs, run, select=val))
    said = fails("prune", *options(inputs, run, unlabelled=inputs / "train"))
    assert "what is held out of --train" in said
    select = {"train": val, "val": write_data(tmp_path, "other", 4, seed=5)}
    select |= {"select": inputs / "boxes_train.json", "unlabelled": inputs / "train"}
    assert "with --select" in fails("prune", *options(inputs, run, **select))
    assert not run.exists()


def test_resume_notices_other_images_to_select_by(inputs: Path, tmp_path: Path) -> None:
    """What changed in --select and --unlabelled is named; a run that kept no hash of them goes on."""
    run, more = tmp_path / "run", tmp_path / "more"
    select = write_data(tmp_path, "select", 4, seed=5)
    write_data(tmp_path, "more", 4, seed=6)
    arguments = options(inputs, run, select=select, unlabelled=more, iterations=1, finetune_epochs=1)
    succeed("prune", *arguments)
    succeed("prune", *arguments, "--resume")
    (more / "4.png").unlink()
    select.write_text(json.dumps(read_json(select), indent=1))
    said = fails("prune", *arguments, "--resume")
    assert "the select file has other contents; the unlabelled 1 file has other contents" in said
    record = read_json(run / "run.json")
    del record["hashes"]["select"], record["hashes"]["unlabelled 1"]
    (run / "run.json").write_text(json.dumps(record))
    succeed("prune", *arguments, "--resume")


def test_a_folder_with_other_things_is_left_alone(inputs: Path, tmp_path: Path) -> None:
    """A folder that is no run folder is refused and keeps its files."""
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    assert "no run folder" in fails("build", *options(inputs, tmp_path))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["photo.jpg"]


def test_an_unknown_target_lists_the_known(inputs: Path, tmp_path: Path) -> None:
    """A target that is not known is refused with those that are, before anything is written."""
    assert "host" in fails("build", *options(inputs, tmp_path / "run", target="toaster"))
    assert not (tmp_path / "run").exists()


def test_a_precision_that_the_target_lacks(inputs: Path, tmp_path: Path) -> None:
    """It is refused before anything is pruned, naming those that the target has."""
    said = fails("build", *options(inputs, tmp_path / "run", target="jetson-nano", precision="int8"))
    assert "jetson-nano has no int8 in hardware; --precision is one of: fp32, fp16" in said
    assert not (tmp_path / "run").exists()


def test_an_unknown_criterion_lists_the_known(inputs: Path, tmp_path: Path) -> None:
    """A criterion that is not known is refused with those that are, before anything is written."""
    said = fails("build", *options(inputs, tmp_path / "run", criterion="guess"))
    assert all(name in said for name in ("taylor", "magnitude", "random"))
    assert not (tmp_path / "run").exists()


def test_missing_weights(inputs: Path, tmp_path: Path) -> None:
    """The weight file that is not there is named, and no run folder is left."""
    said = fails("build", *options(inputs, tmp_path / "run", weights=tmp_path / "none.pt"))
    assert str(tmp_path / "none.pt") in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not valid JSON"), ("[]", "not COCO"), ('{"images": []}', "not COCO"), (None, "no data set at")],
)
def test_labels_that_are_not_coco(content: str | None, words: str, inputs: Path, tmp_path: Path) -> None:
    """A label file that is no COCO JSON is named with what is wrong, and no run folder is left."""
    path = tmp_path / "labels.json"
    if content is not None:
        path.write_text(content)
    said = fails("build", *options(inputs, tmp_path / "run", train=path))
    assert str(path) in said
    assert words in said
    assert not (tmp_path / "run").exists()


def test_a_video_without_labels(inputs: Path, tmp_path: Path) -> None:
    """A video given as data is answered with what labels of a video look like."""
    video = tmp_path / "street.avi"
    video.write_bytes(b"RIFF\x00\x00\x00\x00AVI LIST")
    said = fails("build", *options(inputs, tmp_path / "run", train=video))
    assert "street.avi#000123" in said


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_image_that_does_not_decode(part: str, inputs: Path, tmp_path: Path) -> None:
    """The image is named in one line and left out, whether it trains or validates; the run goes on."""
    damaged = tmp_path / "damaged"
    shutil.copytree(inputs, damaged)
    (damaged / part / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    said = succeed("prune", *options(damaged, damaged / "run", iterations=1)).output
    told = f"{damaged / f'boxes_{part}.json'}: 1 images and 0 boxes were dropped, 0 boxes cut"
    (line,) = [line for line in said.splitlines() if line.startswith(told)]
    assert "images[2]: its image file is a damaged PNG; dropped" in line


def test_what_was_dropped_is_recorded(inputs: Path, tmp_path: Path) -> None:
    """run.json counts what each data set lost and lists it, the report warns of it; --strict refuses the same."""
    damaged = tmp_path / "damaged"
    shutil.copytree(inputs, damaged)
    (damaged / "train" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    labels = damaged / "boxes_val.json"
    content = read_json(labels)
    content["annotations"][0]["bbox"] = [40, 40, -5, 10]
    content["annotations"][1]["bbox"] = [40, 40, 30, 10]
    labels.write_text(json.dumps(content))
    arguments = options(damaged, tmp_path / "run", iterations=1, finetune_epochs=0)
    refused = fails("build", *arguments, "--strict")
    assert "boxes_train.json: 1 images or boxes cannot be used" in refused
    assert not (tmp_path / "run").exists()
    succeed("build", *arguments)
    held = read_json(tmp_path / "run" / "run.json")["data"]
    counts = ("images", "boxes", "dropped_images", "dropped_boxes", "clipped_boxes")
    assert [held["train"][name] for name in counts] == [15, 15, 1, 0, 0]
    assert [held["val"][name] for name in counts] == [8, 7, 0, 1, 1]
    assert "inverted or empty" in held["val"]["first_problems"][0]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "val data: 0 images and 1 boxes could not be used, 1 boxes were cut" in page
    assert "train data: 1 images and 0 boxes could not be used" in page
    strict = edgeprune("evaluate", tmp_path / "run", "--strict")
    assert strict.exit_code == 1 and "boxes_val.json: 2 images or boxes" in strict.stderr


def test_a_run_of_before_is_still_read(finished: Path, tmp_path: Path) -> None:
    """run.json and steps without what was added later are read, and the report shows that it was not measured."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    record = read_json(run / "run.json")
    del record["data"], record["command"], record["date"], record["config"]["mosaic"]
    (run / "run.json").write_text(json.dumps(record))
    for path in run.glob("step-*/detector.json"):
        saved = read_json(path)
        for step in saved["steps"]:
            del step["quality"], step["ap75_after"]
        path.write_text(json.dumps(saved))
    succeed("report", run)
    rows = read_json(run / "report.json")["rows"]
    assert [row["miss_rate"] for row in rows] == [None] * 3
    assert [row["ap_after"] for row in rows] == [
        row["ap_after"] for row in read_json(finished / "report.json")["rows"]
    ]
    succeed("evaluate", run)


def test_warnings_have_the_limit_that_was_asked_for(copied: Path) -> None:
    """Terminal, --json and report.json warn of the same: a drop in AP beyond --flag-ap-drop, disturbances, and
    on the terminal the layers that were pruned in vain."""
    paths = [copied / f"step-{iteration:02d}" / "benchmark.json" for iteration in range(3)]
    first, last = read_json(paths[0]), read_json(paths[2])
    host_ap = read_json(copied / "report.json")["rows"][2]["ap_after"]
    last |= {"ap": host_ap - 0.1, "disturbed": "gpu reached 99 °C"}
    last["layer_times_ms"] = first["layer_times_ms"]  # narrower, and takes as long
    paths[2].write_text(json.dumps(last))
    for limit, drops in ((0.2, 0), (0.05, 1)):
        printed = json.loads(succeed("report", copied, "--flag-ap-drop", limit, "--json").stdout)
        assert printed == read_json(copied / "report.json")
        assert ["AP" in warning for warning in printed["warnings"]].count(True) == drops
        shown = " ".join(succeed("report", copied, "--flag-ap-drop", limit).stdout.split())
        assert shown.count("Warning: iteration 2: AP") == drops
        assert "Warning: The latencies were measured under a disturbance: gpu reached 99 °C." in shown
        assert "Pruned, and not faster:" in shown
        assert all(layer["layer"] in shown for layer in printed["not_faster"])
    assert printed["not_faster"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with little space."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, inputs: Path, finished: Path) -> None:
    """What did not fit is named and nothing half-written is left; with space again the run goes on."""
    run = small_disk / "run"
    said = fails("build", *options(inputs, run))
    assert "No space left" in said
    for path in run.rglob("*.json"):
        read_json(path)
    partial = [path for path in run.rglob(".*") if path.is_file() and path.name != ".lock"]
    assert partial == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    succeed("build", *options(inputs, run), "--resume")
    assert outcome(run) == outcome(finished)


def test_a_folder_that_cannot_be_made(inputs: Path, tmp_path: Path) -> None:
    """A run folder below a file is refused with its name."""
    (tmp_path / "file").touch()
    assert str(tmp_path / "file" / "run") in fails("build", *options(inputs, tmp_path / "file" / "run"))
