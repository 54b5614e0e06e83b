"""Iterations remove what was asked, survive interruption with the same bits, and stop where they should."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import squares
import torch
from torch.nn import functional

from edgeprune.detectors.batches import batches
from edgeprune.detectors.canvases import Canvases
from edgeprune.detectors.evaluation import evaluate
from edgeprune.detectors.training import recalibrate_batch_norm
from edgeprune.pruning.checkpoint import load_step
from edgeprune.pruning.counting import count
from edgeprune.pruning.records import PrunedDetector
from edgeprune.pruning.schedule import PruningError, PruningOptions

NO_TUNING = {"finetune": {"epochs": 0}}


def prune(data: Path, folder: Path, **options: Any) -> list[PrunedDetector]:
    return list(squares.run(data, folder, options))


def test_each_iteration_removes_its_share(square_data: Path, tmp_path: Path) -> None:
    """Iteration 0 is the unpruned detector; then equal shares of the original parameters go, never less than
    asked, and the records say what the networks are."""
    steps = prune(square_data, tmp_path, **NO_TUNING)
    detector = squares.detector_of(square_data)
    whole = sum(parameter.numel() for parameter in detector.parameters())
    assert steps[0].steps[-1].params == count(steps[0].network).params == whole
    val = squares.data_of(square_data).val
    unpruned = evaluate(detector, detector, val)  # type: ignore[arg-type]
    assert steps[0].steps[-1].ap_after == pytest.approx(unpruned.ap, abs=1e-6)
    assert unpruned.ap > 0.3
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(steps[0].network(images)["cells"], detector(images)["cells"])
    for iteration, pruned in enumerate(steps):
        record = pruned.steps[-1]
        assert record.iteration == iteration == len(pruned.steps) - 1
        assert record.params == sum(parameter.numel() for parameter in pruned.network.parameters())
        assert record.requested_share == pytest.approx(0.5 * iteration / 3)
        assert record.achieved_share == pytest.approx(1 - record.params / whole)
        assert record.requested_share <= record.achieved_share < record.requested_share + 0.05
        before = steps[max(iteration - 1, 0)].steps[-1].channels
        lost = {
            layer: before[layer] - left for layer, left in record.channels.items() if left < before[layer]
        }
        assert lost == record.removed
        assert record.channels_removed == sum(lost.values())
        assert record.ap_after == record.ap_before
        assert (record.images, record.boxes) == (12, 12)
        assert record.finetune is None
    assert steps[-1].network.added_biases  # what made this test's exactness hard
    assert set(record.importance) == {"body.0", "body.3", "body.5", "body.8"}
    assert all(list(values) == sorted(values) for values in record.importance.values())


def test_geometric_takes_equal_shares_of_what_is_left() -> None:
    """Both schedules end at what was asked; geometric's ratios of what is left are all the same."""
    linear, geometric = (
        PruningOptions(iterations=4, remove=0.6, schedule=name) for name in ("linear", "geometric")
    )
    assert [linear.share(i) for i in range(5)] == pytest.approx([0, 0.15, 0.3, 0.45, 0.6])
    left = [1 - geometric.share(i) for i in range(5)]
    assert left[-1] == pytest.approx(0.4)
    assert [b / a for a, b in itertools.pairwise(left)] == pytest.approx([0.4**0.25] * 4)


@pytest.mark.parametrize("budget", ["macs", "channels"])
def test_other_budgets(square_data: Path, tmp_path: Path, budget: str) -> None:
    """Shares of MACs and of channels, counted on the networks."""
    steps = prune(square_data, tmp_path, budget=budget, iterations=1, remove=0.3, **NO_TUNING)
    costs = [
        count(pruned.network).macs if budget == "macs" else sum(pruned.spec.channels.values())
        for pruned in steps
    ]
    removed = 1 - costs[1] / costs[0]
    assert 0.3 <= removed < 0.4
    assert steps[1].steps[-1].achieved_share == pytest.approx(removed)


def test_protected_layers_and_frozen_ones(square_data: Path, tmp_path: Path) -> None:
    """--protect keeps a layer whole; frozen parameters are narrowed and neither trained nor thawed, also after a
    resume."""
    detector = squares.detector_of(square_data)
    detector.get_submodule("body.3").requires_grad_(False)
    options = {"protect": ["body.0"], "iterations": 2, "finetune": {"epochs": 1, "learning_rate": 0.01}}
    options |= {"replacement": "zero"}
    steps = list(squares.run(square_data, tmp_path, options, detector=detector))
    assert steps[-1].spec.channels["body.0"] == 8
    kept = steps[-1].spec.kept["body.3"]
    assert len(kept) < 16
    weight = steps[-1].network.get_parameter("body.3.weight")
    assert torch.equal(weight, detector.get_parameter("body.3.weight")[list(kept)])
    assert not weight.requires_grad
    assert not load_step(tmp_path / "step-02").network.get_parameter("body.3.weight").requires_grad
    with pytest.raises(Exception, match=r"body\.7x"):
        prune(square_data, tmp_path / "other", protect=["body.7x"], **NO_TUNING)


def test_ap_is_chosen_on_select_and_reported_on_val(square_data: Path, tmp_path: Path) -> None:
    """Other validation data change what is reported and nothing else; rollback and epochs are recorded."""
    one = prune(square_data, tmp_path / "one", iterations=1)
    other = list(squares.run(square_data, tmp_path / "other", {"iterations": 1}, replaced={"val": "train"}))
    for name, value in one[1].network.state_dict().items():
        assert torch.equal(value, other[1].network.state_dict()[name])
    a, b = one[1].steps[-1], other[1].steps[-1]
    assert a.ap_after != b.ap_after
    assert (a.images, b.images) == (12, 24)
    assert a.finetune == b.finetune
    assert a.finetune is not None
    assert len(a.finetune.select_ap) == a.finetune.epochs + 1 == 3
    assert a.finetune.select_ap[a.finetune.best_epoch] >= a.finetune.select_ap[0]


def test_a_fine_tuning_that_hurts_is_rolled_back_and_said(square_data: Path, tmp_path: Path) -> None:
    """A learning rate that destroys the detector: the weights of before, best epoch 0, `rolled_back`."""
    tuning = {"epochs": 1, "learning_rate": 5.0, "optimizer": "sgd", "warmup_epochs": 0}
    hurt = prune(square_data, tmp_path / "hurt", iterations=1, finetune=tuning)[1].steps[-1]
    assert hurt.finetune is not None
    assert hurt.finetune.rolled_back
    assert (hurt.finetune.best_epoch, hurt.finetune.weights) == (0, "before")


@pytest.mark.parametrize("epochs", [0, 1])
def test_batch_norm_is_recalibrated_before_ap_is_measured(
    square_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    """Statistics that are far off are, once a step, with or without fine-tuning, those of the training images, before
    AP before fine-tuning is measured."""
    calls = []

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        recalibrate_batch_norm(*arguments)

    for module in ("pruning.schedule", "detectors.training"):
        monkeypatch.setattr(f"edgeprune.{module}.recalibrate_batch_norm", counted)
    data = squares.data_of(square_data)
    canvases = Canvases(data.train, (64, 64), squares.tiny_detector.TinyDetector.preprocessing)
    images = next(batches(canvases, batch_size=len(data.train), augmentation=None)).images
    detector = squares.detector_of(square_data)
    detector.get_buffer("body.1.running_mean").add_(3.0)
    options = {"iterations": 1, "finetune": {"epochs": epochs, "learning_rate": 1e-9}}
    unpruned, pruned = squares.run(square_data, tmp_path, options, detector=detector)
    assert len(calls) == 1
    weight, bias = (pruned.network.get_parameter(f"body.0.{name}") for name in ("weight", "bias"))
    with torch.no_grad():
        mean = functional.conv2d(images, weight, bias, stride=2, padding=1).mean((0, 2, 3))
    found = pruned.network.get_buffer("body.1.running_mean")
    torch.testing.assert_close(found, mean, rtol=0.1, atol=0.1)
    assert pruned.steps[-1].ap_before > unpruned.steps[-1].ap_after + 0.05


@pytest.mark.parametrize("option", [{"min_ap": 0.99}, {"stop_ap_drop": 0.0}])
def test_it_stops_before_a_step_whose_ap_is_too_low(
    square_data: Path, tmp_path: Path, option: dict[str, float]
) -> None:
    """The last good step is the last one, says why, and a resumed run ends there too."""
    options = {"remove": 0.9, "iterations": 2, "criterion": "random", **NO_TUNING, **option}
    steps = prune(square_data, tmp_path, **options)
    assert len(steps) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00"]
    reason = load_step(tmp_path / "step-00").steps[-1].stopped
    assert reason is not None
    assert reason.startswith("before iteration 1: AP on held-out training data")
    assert "--" + next(iter(option)).replace("_", "-") in reason
    assert [pruned.steps[-1].stopped for pruned in prune(square_data, tmp_path, **options)] == [reason]


def test_a_budget_that_cannot_be_met_ends_the_run(square_data: Path, tmp_path: Path) -> None:
    """Limits that bind: as much as may go goes, the step says which limit, and no further iteration follows."""
    steps = prune(square_data, tmp_path, remove=0.9, limits={"max_layer_ratio": 0.25}, **NO_TUNING)
    last = steps[-1].steps[-1]
    assert last.stopped is not None
    assert "--max-layer-ratio 0.25" in last.stopped
    assert last.iteration < 3
    assert last.channels == {"body.0": 6, "body.3": 12, "body.5": 12, "body.8": 12, "output": 5}


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0},
        {"remove": 1.0},
        {"budget": "flops"},
        {"schedule": "cubic"},
        {"per": "x"},
        {"replacement": "x"},
    ],
)
def test_options_check_themselves(wrong: dict[str, Any]) -> None:
    """A value out of its range is refused by its option's name."""
    with pytest.raises(PruningError, match="--" + next(iter(wrong))):
        PruningOptions(**wrong)


def start(job: dict[str, Any], path: Path, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    path.write_text(json.dumps(job))
    script = str(Path(squares.__file__))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, script, str(path)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in finished.stderr, finished.stderr
    return finished


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_anywhere_it_ends_with_the_same_bytes(square_data: Path, tmp_path: Path) -> None:
    """Killed (SIGKILL) again and again, at random moments of scoring, fine-tuning, evaluation and writing, and
    resumed: every file of every step is the same, weights and AP to the bit; so it is after later steps were
    deleted."""
    job = {"data": str(square_data), "options": {"iterations": 2}}
    whole = start({**job, "folder": str(tmp_path / "whole")}, tmp_path / "job.json")
    assert whole.returncode == 0
    events = int(whole.stdout)
    expected = files(tmp_path / "whole")
    assert sorted(expected) == [
        f"step-0{i}/{name}" for i in range(3) for name in ("detector.json", "weights.safetensors")
    ]
    rng = random.Random(4)
    kills = 0
    while kills < 3:  # then to the end
        at = rng.randrange(1, events // 2)
        finished = start({**job, "folder": str(tmp_path / "killed"), "kill_at": at}, tmp_path / "job.json")
        kills += finished.returncode == -9
        if finished.returncode == 0:
            break
    assert kills >= 2
    assert start({**job, "folder": str(tmp_path / "killed")}, tmp_path / "job.json").returncode == 0
    left = {name: content for name, content in files(tmp_path / "killed").items() if "/." not in name}
    assert left == expected
    for file in (tmp_path / "killed" / "step-02").iterdir():
        file.unlink()
    assert start({**job, "folder": str(tmp_path / "killed")}, tmp_path / "job.json").returncode == 0
    assert {
        name: content for name, content in files(tmp_path / "killed").items() if "/." not in name
    } == expected


def test_an_unfinished_step_is_used(
    square_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What removal left before an interrupted fine-tuning is loaded: its weights are not scored again."""
    torch.set_num_threads(1)
    steps = prune(square_data, tmp_path / "one", iterations=1)
    seen = 0

    class Interrupted(Exception):
        pass

    def event() -> None:
        nonlocal seen
        seen += (tmp_path / "two" / "step-01" / "before-fine-tuning" / "detector.json").is_file()
        if seen == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        list(squares.run(square_data, tmp_path / "two", {"iterations": 1}, event))
    unfinished = load_step(tmp_path / "two" / "step-01" / "before-fine-tuning")
    assert unfinished.steps[-1].ap_before == steps[1].steps[-1].ap_before
    monkeypatch.delattr("edgeprune.pruning.schedule.score")
    again = prune(square_data, tmp_path / "two", iterations=1)
    assert again[1].steps == steps[1].steps
    assert not (tmp_path / "two" / "step-01" / "before-fine-tuning").exists()


def test_two_processes_prune_as_one(tmp_path: Path) -> None:
    """Under torchrun (gloo): the same channels go, and weights and AP are those of one process with the same
    global batch. Without batch norm, whose statistics are those of each process' share."""
    squares.write_data(tmp_path / "data", batch_norm=False)
    options = {"iterations": 2, "finetune": {"optimizer": "sgd", "learning_rate": 0.001}}
    job = {"data": str(tmp_path / "data"), "batch_norm": False, "options": options}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for name, prefix in (("one", ()), ("two", launcher)):
        finished = start({**job, "folder": str(tmp_path / name)}, tmp_path / "job.json", prefix)
        assert finished.returncode == 0, finished.stderr
    one, two = (load_step(tmp_path / name / "step-02") for name in ("one", "two"))
    assert one.spec == two.spec
    for left, right in zip(one.steps, two.steps, strict=True):
        assert replace(left, **NUMBERS) == replace(right, **NUMBERS)
        assert left.ap_before == pytest.approx(right.ap_before, abs=0.02)
        assert left.ap_after == pytest.approx(right.ap_after, abs=0.02)
    for name, value in one.network.state_dict().items():
        torch.testing.assert_close(two.network.state_dict()[name], value, rtol=1e-3, atol=1e-4)


NUMBERS: dict[str, Any] = dict.fromkeys(
    ("ap_before", "ap50_before", "ap_after", "ap50_after", "finetune")
) | {"importance": {}}
