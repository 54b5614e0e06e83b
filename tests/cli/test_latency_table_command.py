"""`latency-table`: measured on ONNX Runtime here, shown, and refused where it is not what it should be."""

import json
from pathlib import Path

import pytest
import tiny_detector
import torch
from typer.testing import CliRunner, Result

from edgeprune.benchmarks import latency_table as measuring
from edgeprune.cli import app
from edgeprune.deploy.session import Session
from edgeprune.detectors.registry import build_detector
from edgeprune.pruning.checkpoint import load_step, save_step, trace_detector
from edgeprune.pruning.footprint import footprint
from edgeprune.pruning.groups import find_groups
from edgeprune.pruning.latency import LatencyTable, layer_uses, wasteful
from edgeprune.pruning.records import DetectorSpec, PrunedDetector
from edgeprune.pruning.surgery import remove

SIDE = tiny_detector.SIDE


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["latency-table", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latency")


@pytest.fixture(scope="module")
def table(folder: Path) -> Path:
    """A table of the tiny detector, measured as shortly as possible: fewer rounds and networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name, value in {"ROUNDS": 1, "PROFILE_RUNS": 5, "NETWORKS": 4, "NETWORK_RUNS": 5}.items():
            patch.setattr(measuring, name, value)
        patch.setattr(measuring, "MOST_OUT", 3)
        patch.setattr(measuring, "MOST_IN", 2)
        path = folder / "table.json"
        measure = ["--target", "host", "--detector", "tiny", "--input-size", SIDE, "--json"]
        result = run("measure", *measure, "--out", path)
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)
        assert rows[0]["kinds"] == 4
        assert rows[0]["median_error"] >= 0
        assert rows[0]["memory_median_error"] >= 0
        patch.setattr(Session, "profile", None)
        patch.setattr(Session, "benchmark", None)
        assert run("measure", *measure, "--out", folder / "again.json").exit_code == 0
        assert LatencyTable.read(folder / "again.json").networks == LatencyTable.read(path).networks
        return path


def test_a_real_table_predicts_the_order_of_networks(table: Path) -> None:
    """ONNX Runtime's kernels are told apart and cost something, and half a network is predicted to be faster than
    the whole; a second measurement is taken from the cache."""
    found = LatencyTable.read(table)
    module = build_detector("tiny", (SIDE, SIDE))
    network = trace_detector(module, (SIDE, SIDE))
    groups = find_groups(network)
    half = remove(groups, [unit for group in groups.groups for unit in group.units[::2]])
    assert 0 < found.predict_ms(half) < found.predict_ms(network) * 1.5
    assert found.predict_ms(network) < 1000
    assert (found.target, found.backend, found.precision) == ("host", "onnxruntime", "fp32")
    assert len(found.networks) == 4
    assert found.memory is not None
    assert 0 < found.memory.networks[0].measured_mib < 20


def pruned_run(folder: Path) -> Path:
    """A run folder with two steps, the second of 13 and 11 channels."""
    module = build_detector("tiny", (SIDE, SIDE)).eval()
    groups = find_groups(trace_detector(module, (SIDE, SIDE)))
    gone = [
        unit for group in groups.groups[:2] for unit in group.units[: 3 if len(group.units) == 16 else 13]
    ]
    for number, network in enumerate((groups.network, remove(groups, gone))):
        spec = DetectorSpec(
            "tiny",
            (SIDE, SIDE),
            ("person",),
            tiny_detector.TinyDetector.preprocessing.to_json(),
            {},
            network.kept,
            network.added_biases,
        )
        save_step(folder / f"step-{number:02d}", PrunedDetector(spec, module, network, ()))
    return folder


def test_show_names_the_wasteful_counts_of_a_run(table: Path, tmp_path: Path) -> None:
    """Those of the library, of the last step unless another is asked for; the picture is drawn."""
    folder = pruned_run(tmp_path / "run")
    picture = tmp_path / "stairs.svg"
    shown = run("show", table, folder, "--picture", picture)
    assert shown.exit_code == 0, shown.output
    assert picture.read_text().startswith("<?xml")
    measured = LatencyTable.read(table)
    assert measured.memory is not None
    network = load_step(folder / "step-01").network
    mib = measured.memory.predict_mib(footprint(network, measured.rest_step))
    assert f"ms and {mib:.1f} MiB predicted" in " ".join(shown.stdout.split())
    assert "Memory: " in shown.stdout
    found = json.loads(run("show", table, folder, "--json").stdout)
    groups = find_groups(trace_detector(build_detector("tiny", (SIDE, SIDE)), (SIDE, SIDE)))
    gone = [
        unit for group in groups.groups[:2] for unit in group.units[: 3 if len(group.units) == 16 else 13]
    ]
    expected = wasteful(LatencyTable.read(table), layer_uses(remove(groups, gone)))
    assert [(w["layer"], w["axis"], w["channels"]) for w in found["wasteful"]] == [
        (w.layer, w.axis, w.channels) for w in expected
    ]
    for each in expected:
        assert str(each) in shown.stdout
    first = json.loads(run("show", table, folder, "--step", 0, "--json").stdout)
    assert first["predicted_ms"] != found["predicted_ms"]
    assert found["predicted_mib"] == pytest.approx(mib)
    assert found["memory"]["per_weight"] == measured.memory.per_weight
    assert json.loads(run("show", table, "--json").stdout)["predicted_ms"] is None


def test_what_cannot_be_shown_is_one_line(table: Path, tmp_path: Path) -> None:
    """A foreign file, no file, a run without steps, a picture of no known kind."""
    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"hello": 1}')
    for arguments, said in [
        (["show", foreign], "is no latency table"),
        (["show", tmp_path / "none.json"], "cannot read"),
        (["show", table, tmp_path], "has no step"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert said in result.output
        assert "Traceback" not in result.output
    assert run("show", table, "--picture", tmp_path / "stairs.docx").exit_code == 2


def test_a_board_out_of_reach_gives_no_table(tmp_path: Path) -> None:
    """This machine's times are never written under a Jetson's name."""
    out = tmp_path / "nano.json"
    result = run(
        "measure", "--target", "jetson-nano", "--detector", "tiny", "--input-size", SIDE, "--out", out
    )
    assert result.exit_code == 1
    assert "this machine is no jetson-nano" in result.output
    bundled = run("measure", "--target", "jetson-nano", "--bundle", tmp_path / "b.tar.gz", "--out", out)
    assert bundled.exit_code == 2
    assert not out.exists()


def test_weights_do_not_matter() -> None:
    """A table is of an architecture: two seeds give the same kernels."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(layer_uses(trace_detector(build_detector("tiny", (SIDE, SIDE)), (SIDE, SIDE))))
    assert found[0] == found[1]
