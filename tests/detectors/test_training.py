"""Fine-tuning learns, keeps the best, and ends with the same weights whatever interrupts it."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from squares_detector import TinyDetector, write_squares
from torch import Tensor, nn

from edgeprune.data.dataset import Dataset
from edgeprune.detectors.batches import batches
from edgeprune.detectors.canvases import Canvases
from edgeprune.detectors.evaluation import evaluate
from edgeprune.detectors.nanodet import NanoDetG
from edgeprune.detectors.protocol import Targets
from edgeprune.detectors.registry import build_detector
from edgeprune.detectors.training import (
    FineTuneOptions,
    TrainingError,
    distillation_losses,
    fine_tune,
    last_parameters,
    recalibrate_batch_norm,
)

LABELS = FineTuneOptions(
    epochs=40, learning_rate=1e-2, batch_size=4, distill=False, ema_decay=0.9, workers=1, warmup_epochs=1
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More threads only get in each other's way on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("squares")


@pytest.fixture(scope="module")
def train(folder: Path) -> Dataset:
    return write_squares(folder / "train", 24, seed=1)


@pytest.fixture(scope="module")
def select(folder: Path) -> Dataset:
    return write_squares(folder / "select", 8, seed=2)


@pytest.fixture(scope="module")
def trained(train: Dataset, select: Dataset) -> TinyDetector:
    """A detector that finds the squares."""
    network = TinyDetector()
    fine_tune(network, network, None, train, select, replace(LABELS, epochs=100), seed=0)
    return network


def test_it_learns_and_keeps_the_best_epoch(train: Dataset, select: Dataset) -> None:
    """The loss falls, AP rises, and the weights afterwards are those whose AP is reported."""
    network = TinyDetector()
    before = evaluate(network, network, select)
    steps: list[tuple[int, int]] = []
    result = fine_tune(
        network,
        network,
        None,
        train,
        select,
        LABELS,
        seed=0,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert result.before == before
    assert all(parameter.grad is None for parameter in network.parameters())
    assert result.epochs[-1].loss < result.epochs[0].loss / 2
    assert result.after.ap > before.ap + 0.05
    assert not result.rolled_back
    assert result.after.ap == max(max(record.ap, record.ema_ap) for record in result.epochs)
    assert evaluate(network, network, select).ap == pytest.approx(result.after.ap, abs=1e-3)
    assert steps == [(step, 240) for step in range(1, 241)]
    rates = [record.learning_rate for record in result.epochs]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.02 * LABELS.learning_rate)


def test_with_a_teacher_the_held_out_loss_decides(
    train: Dataset, select: Dataset, trained: TinyDetector
) -> None:
    """Of the epochs whose held-out AP is not below the one from before, that with the lowest held-out loss is kept; the
    loss of the kept weights is what a pass over the held-out images gives."""
    network = TinyDetector()
    options = replace(LABELS, distill=True)
    result = fine_tune(network, network, trained, train, select, options, seed=0)
    candidates = {
        (record.epoch, averaged): loss
        for record in result.epochs
        for averaged, ap, loss in (
            (False, record.ap, record.select_loss),
            (True, record.ema_ap, record.ema_select_loss),
        )
        if ap >= result.before.ap
    }
    assert (result.best_epoch, result.averaged) == min(candidates, key=candidates.__getitem__)
    canvases = Canvases(select, network.input_size, network.preprocessing)
    images = torch.cat([batch.images for batch in batches(canvases, batch_size=4, augmentation=None)])
    with torch.no_grad():
        wanted = distillation_losses(network, network(images), trained(images)).mean().item()
    assert candidates[result.best_epoch, result.averaged] == pytest.approx(wanted, rel=1e-4)


def test_what_hurts_is_rolled_back(train: Dataset, select: Dataset, trained: TinyDetector) -> None:
    """A learning rate that destroys the detector leaves it as it was, and the result says so."""
    network = copy.deepcopy(trained)
    options = replace(LABELS, epochs=3, optimizer="sgd", learning_rate=1.0, warmup_epochs=0, patience=2)
    result = fine_tune(network, network, None, train, select, options, seed=0)
    assert result.rolled_back
    assert result.best_epoch == 0
    assert len(result.epochs) == 2  # patience ended it
    assert result.after == result.before
    for name, tensor in trained.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)


def test_what_is_worse_than_no_fine_tuning_is_not_kept(
    train: Dataset, select: Dataset, trained: TinyDetector
) -> None:
    """A student that is its teacher has nothing to gain: epochs whose AP is no lower are further from it, and go."""
    network = copy.deepcopy(trained)
    options = replace(LABELS, distill=True, epochs=2, optimizer="sgd", learning_rate=1e-3, warmup_epochs=0)
    result = fine_tune(network, network, trained, train, select, options, seed=0)
    assert any(record.ap >= result.before.ap for record in result.epochs)
    assert result.rolled_back
    assert all(torch.equal(tensor, trained.state_dict()[n]) for n, tensor in network.state_dict().items())


def test_frozen_parameters_stay(train: Dataset, select: Dataset) -> None:
    """Parameters without requires_grad keep their bits; the others change; with none left it is an error."""
    network = TinyDetector(batch_norm=True)
    network.body[0].requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    result = fine_tune(network, network, None, train, select, LABELS, seed=0)
    assert result.best_epoch > 0
    assert torch.equal(network.body[0].weight, before["body.0.weight"])
    assert not torch.equal(network.output.weight, before["output.weight"])
    with pytest.raises(TrainingError, match="frozen"):
        fine_tune(network, network.requires_grad_(False), None, train, select, LABELS, seed=0)


def test_last_layers_make_the_outputs() -> None:
    """Of NanoDet-g they are the three heads' 1x1 convolutions, of a detector with one head its last layer, frozen or
    not."""
    tiny = TinyDetector(batch_norm=True)
    assert last_parameters(tiny, torch.zeros(1, 3, 64, 64)) == {tiny.output.weight, tiny.output.bias}
    tiny.output.requires_grad_(False)
    assert last_parameters(tiny, torch.zeros(1, 3, 64, 64)) == {tiny.output.weight, tiny.output.bias}
    assert not tiny.output.weight.requires_grad
    nanodet = NanoDetG((64, 64))
    expected = {parameter for head in nanodet.heads for parameter in head.output.parameters()}
    assert last_parameters(nanodet, torch.zeros(1, 3, 64, 64)) == expected
    yolox = build_detector("yolox-nano", (64, 64))
    assert last_parameters(yolox, torch.zeros(1, 3, 64, 64)) == {
        parameter for name, parameter in yolox.named_parameters() if "_preds." in name
    }


def test_the_body_learns_at_its_share(train: Dataset, select: Dataset, tmp_path: Path) -> None:
    """AdamW's first step moves weights by the rate, here the 2 % where the cosine ends: the last layer's by all
    of it, others by their share."""
    network = TinyDetector()
    before = copy.deepcopy(network.state_dict())
    options = replace(LABELS, epochs=1, batch_size=24, warmup_epochs=0, body_share=0.1, learning_rate=0.1)
    checkpoint = tmp_path / "checkpoint.pt"
    fine_tune(network, network, None, train, select, options, seed=0, checkpoint=checkpoint)
    after = torch.load(checkpoint, weights_only=True)["network"]
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in after.items()}
    assert moved["output.weight"] == pytest.approx(2e-3, rel=0.02)
    assert [moved["body.0.weight"], moved["body.8.weight"]] == pytest.approx([2e-4] * 2, rel=0.02)


def test_mosaics_train(train: Dataset, select: Dataset) -> None:
    """A share of mosaics changes what is learnt, and not with the number of workers."""
    states = []
    for mosaic, workers in ((0.0, 1), (0.5, 1), (0.5, 4)):
        network = TinyDetector()
        options = replace(LABELS, epochs=3, mosaic=mosaic, workers=workers)
        fine_tune(network, network, None, train, select, options, seed=0)
        states.append(network.state_dict())
    plain, one, four = states
    assert all(torch.equal(one[name], four[name]) for name in one)
    assert not torch.equal(plain["output.weight"], one["output.weight"])


def test_distillation_needs_no_labels(train: Dataset, select: Dataset, trained: TinyDetector) -> None:
    """A damaged copy comes back towards its teacher by the teacher's outputs alone."""
    network = copy.deepcopy(trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    unlabelled = replace(train, samples=train.samples[:12], sha256="b")
    options = replace(LABELS, distill=True, epochs=10)
    teacher_before = copy.deepcopy(trained.state_dict())
    result = fine_tune(trained, network, trained, train, select, options, seed=0, unlabelled=[unlabelled])
    assert result.epochs[-1].loss < result.epochs[0].loss / 2
    assert result.after.ap > result.before.ap + 0.1
    assert all(torch.equal(tensor, teacher_before[name]) for name, tensor in trained.state_dict().items())


def test_labels_beside_distillation_count_for_labelled_images_alone(
    train: Dataset, select: Dataset, trained: TinyDetector
) -> None:
    """At the teacher's weights the loss is label_weight x the labels' loss, of labelled images only."""
    options = replace(LABELS, distill=True, label_weight=0.5, epochs=1, learning_rate=1e-12, batch_size=30)
    plain = replace(options, distill=False, label_weight=0.0, batch_size=24)

    def loss(options: FineTuneOptions, unlabelled: Sequence[Dataset]) -> float:
        network = copy.deepcopy(trained)
        teacher = trained if options.distill else None
        result = fine_tune(network, network, teacher, train, select, options, seed=0, unlabelled=unlabelled)
        return result.epochs[0].loss

    half = loss(options, [])
    assert half == pytest.approx(0.5 * loss(plain, []), rel=1e-3)
    # A quarter as many images again without labels, in the mean of the loss. Other draws: a rough equality.
    extra = replace(train, samples=train.samples[:6], sha256="b")
    assert loss(options, [extra]) == pytest.approx(half * 24 / 30, rel=0.25)


class Diverging(TinyDetector):
    """Its loss is infinite from the third call on."""

    calls = 0

    def loss(self, raw: dict[str, Tensor], targets: Sequence[Targets]) -> Tensor:
        self.calls += 1
        return super().loss(raw, targets) * (float("inf") if self.calls > 12 else 1.0)


def test_a_loss_that_is_not_finite_stops(train: Dataset, select: Dataset) -> None:
    """The error names the epoch: 6 steps an epoch, so the 13th is in epoch 3."""
    network = Diverging()
    with pytest.raises(TrainingError, match="epoch 3"):
        fine_tune(network, network, None, train, select, LABELS, seed=0)


def test_what_cannot_start(train: Dataset, select: Dataset) -> None:
    """Wrong options and data are refused by name, before anything changes."""
    network = TinyDetector()
    with pytest.raises(TrainingError, match="teacher"):
        fine_tune(network, network, network, train, select, FineTuneOptions(), seed=0)
    with pytest.raises(TrainingError, match="labels"):
        fine_tune(network, network, None, train, select, LABELS, seed=0, unlabelled=[train])
    with pytest.raises(TrainingError, match="images"):
        fine_tune(network, network, None, train, select.subset([]), LABELS, seed=0)
    for wrong in ({"epochs": -1}, {"learning_rate": 0.0}, {"optimizer": "adam"}, {"batch_size": 0}):
        with pytest.raises(TrainingError, match=next(iter(wrong))):
            replace(LABELS, **wrong)


def test_a_checkpoint_of_another_run_is_refused(train: Dataset, select: Dataset, tmp_path: Path) -> None:
    """Other options or a damaged file are an error; the same call again gives the finished result at once."""
    checkpoint = tmp_path / "checkpoint.pt"
    options = replace(LABELS, epochs=2)
    first, again = TinyDetector(), TinyDetector()
    result = fine_tune(first, first, None, train, select, options, seed=0, checkpoint=checkpoint)
    steps: list[int] = []
    same = fine_tune(
        again,
        again,
        None,
        train,
        select,
        replace(options, workers=3),
        seed=0,
        checkpoint=checkpoint,
        progress=lambda done, _: steps.append(done),
    )
    assert same == result
    assert not steps
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())
    other = TinyDetector()
    with pytest.raises(TrainingError, match="other"):
        fine_tune(other, other, None, train, select, options, seed=1, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"checkpoint\.pt"):
        fine_tune(other, other, None, train, select, options, seed=0, checkpoint=checkpoint)


def test_batch_norm_is_recalibrated(train: Dataset) -> None:
    """The statistics become those of the training images, computed here over all of them at once."""
    network = TinyDetector(batch_norm=True).eval()
    canvases = Canvases(train, network.input_size, network.preprocessing)
    recalibrate_batch_norm(network, canvases, 8, "cpu")
    images = next(batches(canvases, batch_size=24, augmentation=None)).images
    activations = network.body[0](images)
    norm = network.body[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert not network.training
    torch.testing.assert_close(norm.running_mean, activations.mean((0, 2, 3)), rtol=0.05, atol=0.02)
    torch.testing.assert_close(norm.running_var, activations.var((0, 2, 3)), rtol=0.1, atol=0.02)


def run_job(folder: Path, job: dict[str, Any], *launcher: str) -> int:
    """Run fine_tune_tiny.py; returns its exit status."""
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    script = Path(__file__).with_name("fine_tune_tiny.py")
    command = [sys.executable, *launcher, str(script), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in finished.stderr, finished.stderr
    return finished.returncode


def test_killed_anywhere_it_ends_with_the_same_bits(
    folder: Path, train: Dataset, select: Dataset, tmp_path: Path
) -> None:
    """Killed (SIGKILL) in the first, third and last epoch and continued, the weights are bit-identical."""
    job = {
        "train": str(folder / "train"),
        "select": str(folder / "select"),
        "dropout": 0.1,
        "options": {"epochs": 5, "learning_rate": 0.01, "batch_size": 4, "distill": False},
    }
    assert run_job(tmp_path, {**job, "result": str(tmp_path / "whole.pt")}) == 0
    job |= {"checkpoint": str(tmp_path / "checkpoint.pt"), "result": str(tmp_path / "resumed.pt")}
    for step in (3, 14, 29):  # 6 steps an epoch
        assert run_job(tmp_path, {**job, "kill_at": step}) == -9
        assert not (tmp_path / "resumed.pt").exists()
    assert run_job(tmp_path, job) == 0
    whole, resumed = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "resumed.pt"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_two_processes_do_what_one_does(
    folder: Path, train: Dataset, select: Dataset, tmp_path: Path
) -> None:
    """Under torchrun (gloo) two processes end with the weights of one with the same global batch."""
    job = {
        "train": str(folder / "train"),
        "select": str(folder / "select"),
        # 24 images by 23: shares of 12 and 11, then of 1 and none.
        "options": {
            "epochs": 6,
            "learning_rate": 0.005,
            "batch_size": 23,
            "distill": False,
            "optimizer": "sgd",
        },
    }
    assert run_job(tmp_path, {**job, "result": str(tmp_path / "one.pt")}) == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert run_job(tmp_path, {**job, "result": str(tmp_path / "two.pt")}, *launcher) == 0
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    initial = TinyDetector().state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
        assert not torch.equal(initial[name], tensor)


def test_images_that_do_not_decode_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An image damaged in its middle is dropped at its first decode, with a warning, and training goes on."""
    train, select = (
        write_squares(tmp_path / "train", 6, seed=1),
        write_squares(tmp_path / "select", 4, seed=2),
    )
    for dataset, name in ((train, train.samples[2].file_name), (select, select.samples[0].file_name)):
        content = bytearray((dataset.root / name).read_bytes())
        content[200:-200] = bytes(len(content) - 400)
        (dataset.root / name).write_bytes(content)
    detector = TinyDetector()
    options = replace(LABELS, epochs=1, batch_size=2)
    result = fine_tune(detector, detector, None, train, select, options, seed=0)
    assert result.after.images == 3
    assert [record.epoch for record in result.epochs] == [1]
    assert sum("dropped 1 images" in record.getMessage() for record in caplog.records) == 2
