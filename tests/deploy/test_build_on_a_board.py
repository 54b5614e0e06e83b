"""`edgeprune build` with a stand-in Jetson at the end of a real SSH connection, and without one."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sshd import Sshd
from stand_in import StandIn
from typer.testing import CliRunner, Result

from edgeprune.benchmarks.measure import BenchmarkOptions, benchmark_engines
from edgeprune.cli import app
from edgeprune.deploy.bundle import BenchmarkPlan
from edgeprune.deploy.records import Latencies
from edgeprune.deploy.session import Session

TINY = (
    Path(__file__).parents[1] / "cli" / "tiny_detector.py"
)  # the command line, with a tiny detector registered
sys.path.append(str(TINY.parent))

from tiny_detector import SIDE, write_data, write_weights  # noqa: E402


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "inputs"
    folder.mkdir()
    write_weights(folder / "tiny.pt")
    write_data(folder, "train", 8, seed=1)
    write_data(folder, "val", 4, seed=2)
    return folder


@pytest.fixture
def board(tmp_path: Path) -> Iterator[tuple[StandIn, Sshd]]:
    stand_in = StandIn(tmp_path / "jetson")
    server = Sshd(tmp_path / "sshd", stand_in.environment)
    yield stand_in, server
    server.stop()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own: this machine's agent works there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def edgeprune(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def build(tmp_path: Path, inputs: Path, *more: object) -> Result:
    options = {
        "detector": "tiny",
        "weights": inputs / "tiny.pt",
        "input-size": SIDE,
        "train": inputs / "boxes_train.json",
        "val": inputs / "boxes_val.json",
        "iterations": 1,
        "finetune-epochs": 0,
        "train-device": "cpu",
        "run-dir": tmp_path / "run",
    }
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    return edgeprune("build", *given, *more)


def device_of(run: Path) -> dict[str, Any]:
    device: dict[str, Any] = json.loads((run / "report.json").read_text())["device"]
    return device


def benchmark_of(run: Path) -> dict[str, Any]:
    benchmark: dict[str, Any] = json.loads((run / "step-01" / "benchmark.json").read_text())
    return benchmark


def test_build_over_ssh(
    *,
    tmp_path: Path,
    inputs: Path,
    board: tuple[StandIn, Sshd],
    agent_python: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """build -> deploy -> bench -> report on the board that --target auto finds, named as what it is.

    The power mode is the benchmark's, not the idle board's. Energy is the 0.933 W at the board's input, for as long
    as an image took the engine that ran alone.
    """
    benchmark = Session.benchmark
    timed: list[Latencies] = []

    def recorded(*args: Any, **options: Any) -> Latencies:
        timed.append(benchmark(*args, **options))
        return timed[-1]

    monkeypatch.setattr(Session, "benchmark", recorded)
    monkeypatch.setitem(benchmark_engines.__kwdefaults__, "options", BenchmarkOptions(min_seconds=3.0))
    monkeypatch.setattr("edgeprune.benchmarks.measure.ENERGY_S", 3.0)
    stand_in, server = board
    way = (
        *("--host", "board", "--ssh-config", server.config, "--device-folder", tmp_path / "work"),
        *("--device-python", agent_python("3.6"), "--backend", "onnxruntime", "--power-mode", "5W"),
    )
    done = build(tmp_path, inputs, "--target", "auto", *way)
    assert done.exit_code == 0, done.stderr
    device = device_of(tmp_path / "run")
    assert (device["target"], device["backend"]) == ("jetson-nano", "onnxruntime")
    assert device["board"] == "stand-in for NVIDIA Jetson Nano Developer Kit"
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert all(row["latency_engine_p50_ms"] > 0 and row["device_ap"] is not None for row in rows)
    assert "nvpmodel -m 1" in stand_in.calls
    assert stand_in.power_mode == "0"
    measured = benchmark_of(tmp_path / "run")
    assert measured["device"]["details"]["power_mode"] == "5W"
    assert not any("PMIC" in str(block["invalid"]) for block in measured["blocks"])
    energy = measured["energy"]
    assert (energy["watts"], energy["rails"]) == (pytest.approx(0.933), ["POM_5V_IN"])
    assert (energy["idle_watts"], energy["joules_per_image_above_idle"]) == pytest.approx((0.933, 0.0))
    blocks = timed[-1].blocks
    image_s = (blocks[-1].end_s - blocks[0].start_s) / sum(block.images for block in blocks)
    assert energy["joules_per_image"] == pytest.approx(0.933 * image_s)
    # Later commands on the run know the way, and the engines are there already.
    again = edgeprune("deploy", tmp_path / "run", "--json")
    assert again.exit_code == 0, again.stderr
    assert [row["found_built"] for row in json.loads(again.stdout)] == [True, True]
    checks = edgeprune("doctor", *way[:8], "--json")
    assert {check["name"]: check["ok"] for check in json.loads(checks.stdout)}["connection"] is True
    cleaned = edgeprune("device", "clean", *way[:8], "--json")
    assert json.loads(cleaned.stdout)[0]["freed_mib"] > 0


def test_build_without_a_board(
    tmp_path: Path, inputs: Path, agent_python: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Jetson that is out of reach: this machine is measured, a bundle waits, import replaces.

    The power mode is the benchmark's there.
    """
    quick = partial(BenchmarkPlan, min_seconds=0.0, energy_seconds=0.2)
    monkeypatch.setattr("edgeprune.cli.run_device.BenchmarkPlan", quick)
    target = ("--target", "jetson-nano", "--backend", "onnxruntime", "--power-mode", "5W")
    done = build(tmp_path, inputs, *target)
    assert done.exit_code == 0, done.stderr
    assert "this machine is no jetson-nano" in done.stderr
    assert f"edgeprune import {tmp_path / 'run'} results.tar.gz" in " ".join(done.stderr.split())
    assert device_of(tmp_path / "run")["target"] == "host"
    shutil.unpack_archive(tmp_path / "run" / "bundle.tar.gz", tmp_path)
    environment = StandIn(tmp_path / "jetson").environment | {"PYTHON": agent_python("3.6")}
    folder = tmp_path / "edgeprune-bundle"
    ran = subprocess.run(["sh", "run.sh"], cwd=folder, env=environment, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    imported = edgeprune("import", tmp_path / "run", folder / "results.tar.gz")
    assert imported.exit_code == 0, imported.stderr
    device = device_of(tmp_path / "run")
    assert (device["target"], device["board"]) == (
        "jetson-nano",
        "stand-in for NVIDIA Jetson Nano Developer Kit",
    )
    assert benchmark_of(tmp_path / "run")["device"]["details"]["power_mode"] == "5W"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--target", "jetson-mega"), "known: jetson-nano"),
        (("--target", "jetson-nano", "--host", "-oProxyCommand=true"), "no host name"),
        (("--target", "auto", "--bundle", "b.tar.gz"), "name it with --target"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(
    tmp_path: Path, inputs: Path, options: tuple[str, ...], said: str
) -> None:
    """One line, exit status 1, no run folder."""
    done = build(tmp_path, inputs, *options)
    assert done.exit_code == 1
    assert said in done.stderr
    assert not (tmp_path / "run").exists()
