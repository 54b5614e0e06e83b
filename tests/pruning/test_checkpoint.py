"""A step on disk is the network that was saved, or one clear error."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import squares
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgeprune.data.errors import EdgePruneError
from edgeprune.data.files import sha256_of
from edgeprune.pruning.checkpoint import RECORD, WEIGHTS, StepError, load_step, save_step
from edgeprune.pruning.records import PrunedDetector


@pytest.fixture(scope="module")
def pruned(square_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PrunedDetector:
    """Narrowed twice, with biases added, a frozen parameter and weights changed since."""
    detector = squares.detector_of(square_data)
    detector.get_submodule("output").requires_grad_(False)
    options = {"iterations": 2, "finetune": {"epochs": 0}}
    *_, last = squares.run(square_data, tmp_path_factory.mktemp("run"), options, detector=detector)
    with torch.no_grad():
        for parameter in last.network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return last


@pytest.fixture
def folder(pruned: PrunedDetector, tmp_path: Path) -> Path:
    save_step(tmp_path, pruned)
    return tmp_path


def test_what_was_saved_comes_back(pruned: PrunedDetector, folder: Path) -> None:
    """Outputs and decoded boxes to the bit, specification, statistics, added biases, frozen parameters, mode."""
    loaded = load_step(folder)
    images = torch.rand(3, 3, 64, 64)
    pruned.network.eval()
    with torch.no_grad():
        raw, again = pruned.network(images), loaded.network(images)
        assert torch.equal(raw["cells"], again["cells"])
        for left, right in zip(pruned.detector.decode(raw), loaded.detector.decode(again), strict=True):  # type: ignore[operator]
            assert torch.equal(left, right)
    assert loaded.network.added_biases == pruned.network.added_biases != ()
    assert loaded.network.kept == pruned.network.kept != {}
    assert loaded.spec == pruned.spec
    assert loaded.steps == pruned.steps
    assert not loaded.network.training
    frozen = {name for name, parameter in loaded.network.named_parameters() if not parameter.requires_grad}
    assert frozen == {"output.weight", "output.bias"}
    assert [name for name, _ in loaded.network.named_parameters()] == [
        name for name, _ in pruned.network.named_parameters()
    ]


def tied(input_size: tuple[int, int], classes: Sequence[str]) -> nn.Module:
    """One head under four names, and beside the network one factor under three and a view of it."""

    class Tied(squares.tiny_detector.TinyDetector):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__(seed=1)
            self.heads = nn.ModuleList([self.output] * 3)
            self.factors = nn.ParameterList([nn.Parameter(torch.ones(2))] * 3)
            self.register_buffer("first", self.factors[0].detach()[:1])

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            x = self.body(images)
            return {"cells": sum(head(x) for head in self.heads)}

    return Tied().eval()


def test_tied_tensors_come_back(square_data: Path, tmp_path: Path) -> None:
    """A head used three times is saved once, narrow, and gives the same outputs to the bit; what is tied beside the
    network comes back under all its names."""
    detector: Any = tied((64, 64), ("person",))
    detector.factors[0].detach().copy_(torch.tensor([2.0, 3.0]))
    name = f"{Path(__file__).resolve()}:tied"
    options = {"iterations": 1, "finetune": {"epochs": 0}}
    *_, pruned = squares.run(square_data, tmp_path / "run", options, detector=detector, name=name)
    save_step(tmp_path, pruned)
    loaded = load_step(tmp_path)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(pruned.network.eval()(images)["cells"], loaded.network(images)["cells"])
    heads = [value for key, value in load_file(tmp_path / WEIGHTS).items() if key.endswith("output.weight")]
    assert [head.shape for head in heads] == [pruned.network.get_parameter("output.weight").shape]
    assert heads[0].shape[1] < 16
    again: Any = loaded.detector
    assert [factor.tolist() for factor in (*again.factors, again.first)] == [[2.0, 3.0]] * 3 + [[2.0]]


def test_saving_again_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """What is loaded and saved is the same files."""
    save_step(tmp_path / "again", load_step(folder))
    for name in (RECORD, WEIGHTS):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / RECORD).read_text())
    change(record)
    (folder / RECORD).write_text(json.dumps(record))


def swap_a_kept_channel(record: dict[str, Any]) -> None:
    kept = record["spec"]["kept"]["body.8"]
    kept[0] = next(channel for channel in range(16) if channel not in kept)
    kept.sort()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def rehash(folder: Path) -> None:
    edit(folder, lambda record: record.update(weights_sha256=sha256_of(folder / WEIGHTS)))


def damage_with_hash(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 100)
    rehash(folder)


def other_weights(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"spec_sha256": "0"})
    rehash(folder)


def reshape_with_hash(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    state = load_file(folder / WEIGHTS)
    state["output.weight"] = state["output.weight"][:, :1].contiguous()
    save_file(state, folder / WEIGHTS, metadata)
    rehash(folder)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no record": (lambda folder: (folder / RECORD).unlink(), "cannot read"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "is missing"),
    "a record cut short": (lambda folder: (folder / RECORD).write_text('{"spec'), "not valid JSON"),
    "another kind of JSON": (lambda folder: (folder / RECORD).write_text("[1, 2]"), "is damaged"),
    "another version": (lambda folder: edit(folder, lambda r: r.update(schema_version=99)), "schema 99"),
    "no specification": (lambda folder: edit(folder, lambda r: r.pop("spec")), "is damaged"),
    "an unknown key": (lambda folder: edit(folder, lambda r: r["spec"].update(x=1)), "is damaged"),
    "no statistics": (lambda folder: edit(folder, lambda r: r["steps"][0].pop("params")), "is damaged"),
    "kept of another type": (
        lambda folder: edit(folder, lambda r: r["spec"].update(kept={"a": 5})),
        "is damaged",
    ),
    "another channel kept": (lambda folder: edit(folder, swap_a_kept_channel), "another specification"),
    "a channel less": (
        lambda folder: edit(folder, lambda r: r["spec"]["kept"]["body.8"].pop()),
        "another spec",
    ),
    "weights cut short": (lambda folder: cut(folder / WEIGHTS), "sha256 differs"),
    "weights of another step": (other_weights, "another specification"),
    "damaged with its hash": (damage_with_hash, "is damaged"),
    "a tensor of another shape": (reshape_with_hash, "do not fit"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_clear_error(folder: Path, damage: str) -> None:
    """Missing, cut, mixed up or edited files, also where the hash was adapted: a StepError of one line with the
    folder in it."""
    do, reason = DAMAGES[damage]
    do(folder)
    with pytest.raises(StepError, match=reason) as raised:
        load_step(folder)
    assert isinstance(raised.value, EdgePruneError)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_nothing_is_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading works with unpickling made impossible; a pickle in place of the weights is refused unread."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    with monkeypatch.context() as patch:
        for name in ("load", "loads", "Unpickler"):
            patch.setattr(pickle, name, forbidden)
        patch.setattr(torch, "load", forbidden)
        load_step(folder)
        (folder / WEIGHTS).write_bytes(pickle.dumps({"body.0.weight": Bomb()}))
        rehash(folder)
        with pytest.raises(StepError, match="is damaged"):
            load_step(folder)


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (Path.touch, ("never",))


def test_a_step_is_written_whole_or_not_at_all(
    pruned: PrunedDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the record the folder holds no step: it is written last."""
    written: list[str] = []
    replace = Path.replace

    def watch(self: Path, target: Path) -> Path:
        written.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    save_step(tmp_path, pruned)
    assert written == [WEIGHTS, RECORD]
    with pytest.raises(EdgePruneError, match="cannot write"):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / WEIGHTS).mkdir()  # cannot be replaced
        save_step(tmp_path / "full", pruned)
    assert not (tmp_path / "full" / RECORD).exists()
