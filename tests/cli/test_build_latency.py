"""`edgeprune build --speedup` on a tiny detector: measured on this machine, over ssh, by a table alone, refused."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_device import table_of
from sshd import Sshd
from tiny_detector import SIDE, TinyDetector, load_tiny, own_surroundings, write_inputs
from torch import nn
from typer.testing import CliRunner, Result

from edgeprune.benchmarks.engine_timing import exporter
from edgeprune.cli import app
from edgeprune.data.files import read_json
from edgeprune.deploy.session import local_session
from edgeprune.deploy.targets import load_target
from edgeprune.detectors.registry import DETECTORS, Registered
from edgeprune.pruning.checkpoint import load_step, trace_detector
from edgeprune.pruning.graph import Network
from edgeprune.pruning.latency import FILE_NAME, LatencyTable
from edgeprune.pruning.memory import MemoryModel


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, training and validation data."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of these tests' own, which keeps what is measured of kernels; one thread."""
    with own_surroundings(tmp_path_factory.mktemp("cache")):
        yield


def edgeprune(command: str, inputs: Path, run: Path, *more: object, **changes: Any) -> Result:
    values = {
        "target": "host",
        "detector": "tiny",
        "weights": inputs / "tiny.pt",
        "input_size": SIDE,
        "train": inputs / "boxes_train.json",
        "val": inputs / "boxes_val.json",
        "iterations": 1,
        "finetune_epochs": 0,
        "train_device": "cpu",
        "run_dir": run,
    } | changes
    options = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]
    return CliRunner().invoke(app, [str(part) for part in (command, *options, *more)])


def succeed(*arguments: Any, **changes: Any) -> Result:
    result = edgeprune(*arguments, **changes)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def write_table(inputs: Path, path: Path, target: str) -> Path:
    """A table of made-up costs that says it is of this machine, as the given kind of device."""
    host_table(tiny_network(inputs), 4, target).write(path)
    return path


def tiny_network(inputs: Path) -> Network:
    return trace_detector(load_tiny(inputs / "tiny.pt", (SIDE, SIDE), ("person",)), (SIDE, SIDE))


def host_table(network: Network, step: int, target: str) -> LatencyTable:
    info = local_session(load_target("host")).probe()
    version = info.backend_version or ""
    here = {"target": target, "device": info.board, "backend": info.backend, "backend_version": version}
    return replace(table_of(network, step), **here)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def table(inputs: Path) -> Path:
    return write_table(inputs, inputs / "host.json", "host")


@pytest.fixture(scope="module")
def finished(inputs: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    succeed("build", inputs, run, speedup=1.3, latency_table=table)
    return run


def test_a_speedup_is_measured_and_reported(finished: Path) -> None:
    """The table is kept, engines are timed, and the report tells what was asked, predicted and measured of each
    iteration; the engine that was asked to be faster is."""
    report = read_json(finished / "report.json")
    first, last = report["rows"]
    assert first["latency_asked_ms"] is None
    assert first["latency_chosen_ms"] > 0
    assert last["latency_asked_ms"] == pytest.approx(first["latency_chosen_ms"] / 1.3)
    assert last["latency_chosen_low_ms"] <= last["latency_chosen_ms"] <= last["latency_chosen_high_ms"]
    assert last["latency_chosen_ms"] < first["latency_chosen_ms"]
    assert last["macs"] < first["macs"]
    assert f"{last['latency_asked_ms']:.2f} ms asked" in report["headline"]["text"]
    assert "What was asked of the engine" in (finished / "report.html").read_text()


def test_resume_keeps_table_and_scale(finished: Path, inputs: Path, table: Path, tmp_path: Path) -> None:
    """A run whose last step is gone goes on by its own table, towards the same milliseconds."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = read_json(run / "report.json")["rows"]
    shutil.rmtree(run / "step-01")
    kept = (run / FILE_NAME).read_bytes()
    assert kept == table.read_bytes()
    succeed("build", inputs, run, "--resume", speedup=1.3, latency_table=table)
    after = read_json(run / "report.json")["rows"]
    assert (run / FILE_NAME).read_bytes() == kept
    assert after[0]["latency_chosen_ms"] == before[0]["latency_chosen_ms"]
    assert after[1]["latency_asked_ms"] == before[1]["latency_asked_ms"]


@pytest.mark.slow
def test_without_a_table_one_is_measured(inputs: Path, tmp_path: Path) -> None:
    """On this machine, before anything is pruned; it says what it was measured on and how well it predicts."""
    run = tmp_path / "run"
    succeed("prune", inputs, run, speedup=1.1)
    measured = LatencyTable.read(run / FILE_NAME)
    assert measured.target == "host"
    assert measured.networks
    first, last = load_step(run / "step-01").steps
    assert first.latency is not None
    assert last.latency is not None
    assert last.latency.asked_ms == pytest.approx(first.latency.ms / 1.1)
    assert last.latency.measured is not None
    assert last.params < first.params


def test_over_ssh(inputs: Path, tmp_path: Path) -> None:
    """Engines are timed through a real sshd, on the other side."""
    if shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin") is None:
        pytest.skip("no sshd here (Debian: openssh-server)")
    server = Sshd(tmp_path / "sshd", {"OMP_NUM_THREADS": "1"})
    try:
        way = {"host": "board", "ssh_config": server.config, "device_python": sys.executable}
        folder = tmp_path / "work"
        way |= {"latency_table": write_table(inputs, tmp_path / "linux.json", "linux")}
        succeed("prune", inputs, tmp_path / "run", target="linux", speedup=1.1, device_folder=folder, **way)
    finally:
        server.stop()
    first, last = load_step(tmp_path / "run" / "step-01").steps
    assert first.latency is not None
    assert last.latency is not None
    assert last.latency.measured is not None
    assert last.latency.asked_ms == pytest.approx(first.latency.ms / 1.1)
    assert list((folder / "engines").iterdir())


class HeavyDetector(TinyDetector):
    """With weights enough that pruning them shows in a process's memory."""

    def __init__(self, input_size: tuple[int, int], classes: Sequence[str] = ("person",)) -> None:
        super().__init__(input_size, classes)
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.stem = nn.Conv2d(3, 64, 3, 4, 1)
            self.middle = nn.Conv2d(64, 384, 3, 2, 1)
            self.deep = nn.Conv2d(384, 512, 3, 2, 1)
            self.head = nn.Conv2d(512, 1, 1)


def load_heavy(path: Path, input_size: tuple[int, int], classes: Sequence[str]) -> HeavyDetector:
    detector = HeavyDetector(input_size, classes)
    detector.load_state_dict(torch.load(path, weights_only=True))
    return detector


def test_a_memory_is_met_by_the_engine(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is measured within the memory asked for, although the table says a third too much of weights; what
    was asked, predicted and measured is recorded, and shown."""
    monkeypatch.setitem(DETECTORS, "heavy", Registered(HeavyDetector, load_heavy, "nanodet-g"))
    detector = HeavyDetector((SIDE, SIDE)).eval()
    torch.save(detector.state_dict(), tmp_path / "heavy.pt")
    network = trace_detector(detector, (SIDE, SIDE))
    session = local_session(load_target("host"))
    exporter(detector, session.target, "fp32")(network, tmp_path / "heavy.onnx")
    whole_mib = session.build(tmp_path / "heavy.onnx").memory_mib
    assert whole_mib is not None
    table = replace(host_table(network, 8, "host"), memory=MemoryModel(0.2, 1.33, 3.0, ()))
    table.write(tmp_path / "table.json")
    run, asked_mib = tmp_path / "run", 0.6 * whole_mib
    given = {"detector": "heavy", "weights": tmp_path / "heavy.pt", "latency_table": tmp_path / "table.json"}
    result = succeed("prune", inputs, run, memory_budget_mib=asked_mib, **given)
    first, last = (step.latency for step in load_step(run / "step-01").steps)
    assert first is not None and first.memory is not None
    assert first.memory.measured_mib == pytest.approx(whole_mib, rel=0.05)
    assert last is not None and last.memory is not None
    assert last.asked_ms is None
    assert last.memory.asked_mib == asked_mib
    assert last.memory.measured_mib is not None
    assert asked_mib / 2 < last.memory.measured_mib <= asked_mib
    assert f"and {last.memory.measured_mib:.1f} MiB" in result.stderr


@pytest.fixture
def nano_table(inputs: Path, tmp_path: Path) -> Path:
    """A table that says it is a Jetson's."""
    table = table_of(tiny_network(inputs), 8)
    path = tmp_path / "nano.json"
    replace(table, target="jetson-nano", device="Jetson Nano", backend="tensorrt").write(path)
    return path


def test_by_a_table_alone(inputs: Path, nano_table: Path, tmp_path: Path) -> None:
    """Without a way to the board its table decides, nothing is measured in its place, and the record says so."""
    run = tmp_path / "run"
    succeed("prune", inputs, run, target="jetson-nano", speedup=1.3, latency_table=nano_table)
    first, last = load_step(run / "step-01").steps
    table = LatencyTable.read(nano_table)
    assert first.latency is not None
    assert last.latency is not None
    assert first.latency.measured is last.latency.measured is None
    assert last.latency.predicted_ms == pytest.approx(table.predict_ms(load_step(run / "step-01").network))
    assert last.latency.predicted_ms <= first.latency.predicted_ms / 1.3 * (1 + 1e-6)
    row = read_json(run / "run.json")["config"]
    assert (row["remove"], row["budget"], row["speedup"]) == (None, None, 1.3)


def fails(*arguments: Any, **changes: Any) -> str:
    result = edgeprune(*arguments, **changes)
    assert result.exit_code == 1, result.output + repr(result.exception)
    return result.stderr.splitlines()[-1]


def test_neither_device_nor_table(inputs: Path, nano_table: Path, tmp_path: Path) -> None:
    """What cannot be known is refused before anything is written: a board out of reach, another device's table,
    a file that is no table, a precision that has none, energy or memory where none was measured."""
    run = tmp_path / "run"
    assert "--latency-table" in fails("build", inputs, run, target="jetson-nano", speedup=1.3)
    assert "its target is jetson-nano, not host" in fails(
        "build", inputs, run, speedup=1.3, latency_table=nano_table
    )
    (tmp_path / "other.json").write_text(json.dumps({"version": 1}))
    other = {"speedup": 1.3, "latency_table": tmp_path / "other.json"}
    assert "is no latency table" in fails("build", inputs, run, **other)
    assert "int8 has no latency tables" in fails("prune", inputs, run, speedup=1.3, precision="int8")
    energy = {"target": "jetson-nano", "energy_budget_mj": 1.0, "latency_table": nano_table}
    assert "holds no power" in fails("prune", inputs, run, **energy)
    memory = {"target": "jetson-nano", "memory_budget_mib": 1.0, "latency_table": nano_table}
    assert "holds no memory" in fails("prune", inputs, run, **memory)
    assert not list(tmp_path.rglob("detector.json"))


def test_a_table_of_another_dla_core_or_power_mode(inputs: Path, nano_table: Path, tmp_path: Path) -> None:
    """A table of a DLA is not for a GPU, nor the reverse; the power that an energy is taken by is of one power mode,
    while milliseconds are corrected in any."""
    table = LatencyTable.read(nano_table)
    dla, powered = tmp_path / "dla.json", tmp_path / "powered.json"
    replace(table, options={"dla_core": 0}).write(dla)
    replace(table, power_mode="MAXN", power_w=5.0).write(powered)

    def refused(**options: object) -> str:
        return fails("prune", inputs, tmp_path / "run", **nano, **options)

    nano = {"target": "jetson-nano"}
    assert "its dla core is 0, not None" in refused(speedup=1.3, latency_table=dla)
    assert "its dla core is None, not 0" in refused(speedup=1.3, latency_table=nano_table, dla_core=0)
    given = {"latency_table": powered, "power_mode": "5W"}
    goal_mj = 5.0 * table.predict_ms(tiny_network(inputs)) / 1.3
    assert "its power mode is MAXN, not 5W" in refused(energy_budget_mj=goal_mj, **given)
    succeed("prune", inputs, tmp_path / "speedup", speedup=1.3, **nano, **given)
    given["power_mode"] = "MAXN"
    succeed("prune", inputs, tmp_path / "energy", energy_budget_mj=goal_mj, **nano, **given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speedup": 1.5, "remove": 0.3}, "--remove, --budget and --per do not go with"),
        ({"latency_budget_ms": 5, "budget": "macs"}, "--remove, --budget and --per do not go with"),
        ({"speedup": 1.5, "per": "macs"}, "--remove, --budget and --per do not go with"),
        ({"latency_budget_ms": 5, "speedup": 1.5}, "exclude each other"),
        ({"latency_table": "table.json"}, "--latency-table needs"),
        ({"memory_budget_mib": 5, "remove": 0.3}, "--remove, --budget and --per do not go with"),
        ({"speedup": 0.5}, "--speedup"),
    ],
)
def test_options_that_clash(options: dict[str, Any], words: str, inputs: Path, tmp_path: Path) -> None:
    """A usage error (2) that names the options."""
    result = edgeprune("build", inputs, tmp_path / "run", **options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "run").exists()
