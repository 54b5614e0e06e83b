"""Comparison, Pareto front, picking and shipping of runs whose figures are known."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks_example import report, result
from hypothesis import given
from hypothesis import strategies as st
from run_folder import write_run
from typer.testing import CliRunner

from edgeprune.benchmarks.compare import COMPARE_COLUMNS, compare, on_front, parse_conditions, pick
from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.records import Device
from edgeprune.benchmarks.ship import CARD, ship
from edgeprune.benchmarks.table import render_markdown
from edgeprune.cli import app
from edgeprune.data.errors import DataError
from edgeprune.data.operating_point import Calibration, OperatingPoint, Wish
from edgeprune.data.precision import Interval

JETSON = Device("jetson-nano", "tensorrt", "NVIDIA Jetson Nano Developer Kit")


def row(latency_ms: float | None, ap50: float | None, params: int = 1) -> dict[str, Any]:
    figures = {"target": "host", "backend": "onnxruntime", "board": "x86", "params": params}
    return figures | {"latency_engine_p50_ms": latency_ms, "device_ap50": ap50}


def front(points: Sequence[tuple[float, float]]) -> list[bool | None]:
    rows = [row(latency, ap50) for latency, ap50 in points]
    return [on_front(one, rows) for one in rows]


def test_the_front_by_hand() -> None:
    """Off the front: slower and less accurate, or equal in one and worse in the other; equals share it."""
    assert front([(10, 0.6), (8, 0.5), (9, 0.45), (10, 0.55), (12, 0.6), (8, 0.5)]) == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    assert on_front(row(None, 0.6), [row(1, 1)]) is None


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_the_front_bounds_all(points: list[tuple[int, int]]) -> None:
    """What is off the front is beaten by one on it; along the front AP50 rises with latency."""
    marks = front(points)
    on = {point for point, mark in zip(points, marks, strict=True) if mark}
    for point, mark in zip(points, marks, strict=True):
        if not mark:
            assert any(x <= point[0] and y >= point[1] and (x, y) != point for x, y in on)
    aps = [ap50 for _, ap50 in sorted(on)]
    assert aps == sorted(set(aps))


def test_runs_side_by_side() -> None:
    """Rows keep their run and device; each device has its own front."""
    faster = replace(
        report(2, [result(i, device=JETSON) for i in range(2)]),
        name="board",
    )
    rows = compare([report(3), faster])
    assert [(row["run"], row["target"], row["iteration"]) for row in rows] == [
        ("example", "host", 0),
        ("example", "host", 1),
        ("example", "host", 2),
        ("board", "jetson-nano", 0),
        ("board", "jetson-nano", 1),
    ]
    assert all(row["on_front"] for row in rows)
    text = render_markdown(rows, COMPARE_COLUMNS)
    assert "jetson-nano (tensorrt)" in text and "host (onnxruntime)" in text
    with pytest.raises(BenchmarkError, match="several devices"):
        pick(rows, parse_conditions("ap50>=0.1"))


@pytest.mark.parametrize(
    ("conditions", "iteration"),
    [
        ("ap50>=0.575", 8),  # AP50 is 0.600 - 0.003 an iteration: the last with 0.575 is the fastest such
        ("ap50>0.576", 7),
        ("fps>=1", 0),  # all are: the most accurate is the unpruned
        ("params<=800000", 4),  # 950,000 - 38,000 an iteration: the first below
        ("ap50>=0.575, params<=800000", 8),
        ("latency_ms<=10.5", 5),  # about 12 - 0.35 ms an iteration, within noise of a hundredth
    ],
)
def test_pick_by_hand(conditions: str, iteration: int) -> None:
    """A demand on accuracy gives the fastest step that meets it, one on cost the most accurate."""
    assert pick(compare([report()]), parse_conditions(conditions))["iteration"] == iteration


def test_no_step_says_how_near() -> None:
    """When nothing meets the condition, the error names the best value reached; unmeasured is no pass."""
    with pytest.raises(BenchmarkError, match=re.escape("no step has ap50>=0.7: ap50 reaches 0.6")):
        pick(compare([report()]), parse_conditions("ap50>=0.7"))
    with pytest.raises(BenchmarkError, match="joules_per_image was not measured"):
        pick(compare([report()]), parse_conditions("joules_per_image<=100"))
    with pytest.raises(BenchmarkError, match="latency_ms was not measured"):
        pick(compare([report(2, [None, None])]), parse_conditions("latency_ms<=100"))


@pytest.mark.parametrize("text", ["", "ap50", "ap50=0.5", "ap50>=", "ap50>=1.2.3", "ap50>=0.5;", "speed>=1"])
def test_a_malformed_condition_is_refused(text: str) -> None:
    """What is not NAME, comparison, number is refused with an example or the known names."""
    with pytest.raises(BenchmarkError, match=r"ap50>=0\.55|known: ap, ap50"):
        parse_conditions(text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "night")


def test_ship_copies_what_the_records_name(run: Path, tmp_path: Path) -> None:
    """The files are the step's, byte for byte; the card names device, figures and the files' hashes."""
    files = ship(run, 2, tmp_path / "out")
    assert {file.name for file in files} == {path.name for path in (tmp_path / "out").iterdir()}
    for file in files[1:]:
        assert file.read_bytes() == (run / "step-02" / file.name).read_bytes()
    card = (tmp_path / "out" / CARD).read_text()
    assert card.startswith("# nanodet-g, pruning iteration 2")
    assert "target: host · backend: onnxruntime on the CPU" in card
    assert "| params | 950,000 | 874,000 |" in card
    for name in ("model.onnx", "weights.safetensors"):
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() in card
    assert "40 images with 300 boxes" in card


def test_ship_takes_the_threshold_along(run: Path, tmp_path: Path) -> None:
    """What `calibrate` chose is copied and told in the card; one that was chosen for other weights is refused."""
    record = json.loads((run / "step-02" / "detector.json").read_text())
    interval = Interval(0.8, 0.95)
    point = OperatingPoint(0.4375, 0.9, interval, 0.7, interval, 1.5, interval, 100, 10, 120, 40)
    wish = Wish(precision=0.9, frames_per_second=10)
    Calibration(wish, point, record["weights_sha256"], "b" * 64).write(run / "step-02")
    ship(run, 2, tmp_path / "out")
    copied = (tmp_path / "out" / "threshold.json").read_bytes()
    assert copied == (run / "step-02" / "threshold.json").read_bytes()
    card = (tmp_path / "out" / CARD).read_text()
    assert "scores above 0.4375, chosen for precision 0.9. On 40 images with 120 boxes" in card
    assert (
        "precision 0.900 (95 % interval 0.800 to 0.950) and recall 0.700, 1.5 false positives a minute"
        in card
    )
    ship(run, 1, tmp_path / "without")
    assert "No score threshold was chosen" in (tmp_path / "without" / CARD).read_text()
    Calibration(wish, point, "c" * 64, "b" * 64).write(run / "step-02")
    with pytest.raises(DataError, match="other weights"):
        ship(run, 2, tmp_path / "stale")


def test_ship_refuses_what_does_not_fit(run: Path, tmp_path: Path) -> None:
    """A changed file, a missing step, an existing folder: one error each, and nothing is written."""
    out = tmp_path / "out"
    with pytest.raises(BenchmarkError, match="its last is 2"):
        ship(run, 7, out)
    (run / "step-01" / "model.onnx").write_bytes(b"other")
    with pytest.raises(BenchmarkError, match="is not the file that"):
        ship(run, 1, out)
    (run / "step-01" / "export.json").unlink()
    with pytest.raises(BenchmarkError, match=r"has no export\.json"):
        ship(run, 1, out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(BenchmarkError, match="choose a new folder"):
        ship(run, 2, out)
    assert list(out.iterdir()) == []
    record = json.loads((run / "step-00" / "detector.json").read_text())
    (run / "step-00" / "detector.json").write_text(json.dumps(record | {"spec": {}}))
    with pytest.raises(BenchmarkError, match="of another edgeprune"):
        ship(run, 0, tmp_path / "older")
    assert {path.name for path in tmp_path.iterdir()} == {"night", "out"}


def test_an_unmeasured_step_ships_and_says_so(run: Path, tmp_path: Path) -> None:
    """Without a benchmark the card says that nothing was measured on a device."""
    (run / "step-02" / "benchmark.json").unlink()
    ship(run, 2, tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text()
    assert "Not measured on a device." in card
    assert "| AP50 on device | 0.600 | not measured |" in card


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_commands(run: Path, tmp_path: Path) -> None:
    """`compare` prints the same figures in each form; `ship --pick` copies the picked step."""
    table = invoke("compare", str(run), "--pick", "ap50>=0.596")
    assert table.exit_code == 0
    assert f"iteration 1 of {run}" in table.stdout
    content = json.loads(invoke("compare", str(run), "--pick", "ap50>=0.596", "--json").stdout)
    assert content["pick"]["iteration"] == 1
    rows = list(csv.DictReader(io.StringIO(invoke("compare", str(run), "--csv").stdout)))
    assert [int(row["params"]) for row in rows] == [row["params"] for row in content["rows"]]
    assert invoke("compare", str(run), "--markdown").stdout.count("\n") == 5
    assert invoke("compare", str(run), "--csv", "--json").exit_code == 2
    shipped = invoke("ship", str(run), "--pick", "ap50>=0.596", "--out", str(tmp_path / "out"), "--json")
    assert shipped.exit_code == 0
    assert json.loads(shipped.stdout)["iteration"] == 1
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == b"weights 1"
    assert invoke("ship", str(run), "--out", str(tmp_path / "x")).exit_code == 2


def test_commands_fail_in_one_line(run: Path, tmp_path: Path) -> None:
    """A condition that nothing meets and a folder that is no run end with status 1 and one line."""
    for arguments in (["compare", str(run), "--pick", "ap50>=0.9"], ["compare", str(tmp_path)]):
        failed = invoke(*arguments)
        assert failed.exit_code == 1
        assert failed.output.count("\n") == 1 and failed.output.startswith("Error: ")
