"""`torchrun` around edgeprune: its processes make one run, which one of them writes and tells of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_detector import SIDE, write_inputs

from edgeprune.data.files import read_json
from edgeprune.pruning.checkpoint import load_step

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PROGRAM = str(Path(__file__).with_name("tiny_detector.py"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, training and validation data."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def options(inputs: Path, run: Path) -> list[str]:
    values = {
        "target": "host",
        "detector": "tiny",
        "weights": inputs / "tiny.pt",
        "input-size": SIDE,
        "train": inputs / "boxes_train.json",
        "val": inputs / "boxes_val.json",
        "iterations": 2,
        "finetune-epochs": 2,
        "train-device": "cpu",
        "run-dir": run,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def launch(command: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_two_processes_build_as_one(inputs: Path, tmp_path: Path) -> None:
    """The same channels go, and the weights are those of one process with the same global batch; the record and the
    printed report are there once, with what the device measured."""
    runs = tmp_path / "one", tmp_path / "two"
    alone = launch([sys.executable, PROGRAM, "build", *options(inputs, runs[0]), "--json"], tmp_path)
    both = launch([*TORCHRUN, PROGRAM, "build", *options(inputs, runs[1]), "--json"], tmp_path)
    for finished in (alone, both):
        assert finished.returncode == 0, finished.stderr
    assert both.stderr.count("iteration 1: fine-tuning 2 epochs ...") == 1
    rows = json.loads(both.stdout)["rows"]
    assert all(row["latency_engine_p50_ms"] > 0 for row in rows)
    assert read_json(runs[1] / "run.json")["versions"]["processes"] == "2"
    one, two = (load_step(run / "step-02") for run in runs)
    assert one.spec == two.spec
    unpruned = load_step(runs[0] / "step-00").network.state_dict()
    for name, weights in one.network.state_dict().items():
        torch.testing.assert_close(two.network.state_dict()[name], weights, rtol=1e-4, atol=1e-5)
        assert weights.shape != unpruned[name].shape or not torch.equal(weights, unpruned[name])


@pytest.mark.parametrize("failing", [(0, 1), (1,)])
def test_what_failed_first_is_told_once(failing: tuple[int, ...], inputs: Path, tmp_path: Path) -> None:
    """An error in one process, or the same in both, ends both and is one line; no process leaves a traceback."""
    for rank in {0, 1}.difference(failing):
        (tmp_path / f"{rank}.pt").write_bytes((inputs / "tiny.pt").read_bytes())
    with_own_weights = f'exec {sys.executable} {PROGRAM} "$@" --weights {tmp_path}/$RANK.pt'
    logs = ["--redirects", "3", "--log-dir", str(tmp_path / "logs"), "--no-python"]
    command = ["sh", "-c", with_own_weights, "sh", "prune", *options(inputs, tmp_path / "run")]
    finished = launch([*TORCHRUN, *logs, *command], tmp_path)
    assert finished.returncode != 0
    said = [path.read_text() for path in (tmp_path / "logs").rglob("stderr.log")]
    assert len(said) == 2
    assert "Traceback" not in "".join(said)
    (error,) = [line for line in "".join(said).splitlines() if line.startswith(("Error", "Interrupted"))]
    assert any(f"{tmp_path}/{rank}.pt" in error for rank in failing)
