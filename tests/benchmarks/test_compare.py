"""Comparison, picking and shipping of runs whose figures are known."""

import csv
import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks_example import HOST, report, result
from run_folder import write_run
from typer.testing import CliRunner

from edgeprune.benchmarks.compare import COMPARE_COLUMNS, compare, parse_conditions, pick, reservations
from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.records import BenchmarkResult, Block, Device, Report
from edgeprune.benchmarks.ship import CARD, ship
from edgeprune.benchmarks.statistics import summarise
from edgeprune.benchmarks.table import render_markdown
from edgeprune.cli import app
from edgeprune.data.errors import DataError
from edgeprune.data.operating_point import Calibration, OperatingPoint, Wish
from edgeprune.data.precision import Interval

JETSON = Device("jetson-nano", "tensorrt", "NVIDIA Jetson Nano Developer Kit")


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


def run_of(
    name: str, latencies_ms: list[float], ap50s: list[float], val: str = "v", **changes: Any
) -> Report:
    """A run whose every step takes the same time in each block; the unpruned engine is the same in all runs."""
    results = [steady(i, *figures) for i, figures in enumerate(zip(latencies_ms, ap50s, strict=True))]
    found = report(len(results), [replace(each, **changes) for each in results], {"hashes": {"val": val}})
    return replace(found, name=name)


def steady(iteration: int, latency_ms: float, ap50: float) -> BenchmarkResult:
    samples = {"engine": (latency_ms,) * 4, "end_to_end": (latency_ms + 2,) * 4}
    return replace(
        result(iteration),
        ap50=ap50,
        latencies=tuple(summarise(ms * 10, scope) for scope, ms in samples.items()),
        blocks=tuple(Block(k, k, k + 0.5, samples) for k in range(10)),
    )


def test_runs_of_another_hour_are_ranked_by_the_ratio() -> None:
    """9.5 of 10 ms is slower than 10 of 12 ms where both runs timed the same unpruned engine, and that is said."""
    rows = compare([run_of("day", [10.0, 9.5], [0.6, 0.55]), run_of("night", [12.0, 10.0], [0.6, 0.55])])
    assert [row["on_front"] for row in rows] == [True, False, True, True]
    picked = pick(rows, parse_conditions("ap50>=0.5"))
    assert (picked["run"], picked["iteration"], picked["latency_engine_paired_ms"]) == ("night", 1, 10.0)
    assert reservations(rows) == [
        "Timed apart: day, night. Their one unpruned engine took 10.00, 12.00 ms; they are ranked by the ratio to it."
    ]


def test_runs_with_nothing_in_common_are_said_to_be_timed_apart() -> None:
    """Without one unpruned engine the milliseconds decide, and the reader is told how far to trust them."""
    other = run_of("fp16", [12.0, 10.0], [0.6, 0.55], precision="fp16")
    rows = compare([run_of("fp32", [10.0, 9.5], [0.6, 0.55]), other])
    assert pick(rows, parse_conditions("ap50>=0.5"))["run"] == "fp32"
    (told,) = reservations(rows)
    assert told.startswith("Timed apart, with no unpruned engine in common: fp32, fp16.")
    assert reservations(compare([other])) == []


def test_other_conditions_do_not_compare() -> None:
    """Another power mode, clocks held or free, other validation images: a front of its own, and no pick."""
    plain = run_of("plain", [10.0, 9.0], [0.6, 0.55])
    slow_clock = replace(HOST, details={**HOST.details, "power_mode": "5W"})
    for other, reason in (
        (run_of("other", [8.0, 7.0], [0.7, 0.65], val="w"), "several validation sets"),
        (run_of("other", [8.0, 7.0], [0.7, 0.65], device=slow_clock), "several power modes"),
    ):
        rows = compare([plain, other])
        assert [row["on_front"] for row in rows] == [True] * 4
        assert reservations(rows)[0].endswith("each has a Pareto front of its own.")
        with pytest.raises(BenchmarkError, match=reason):
            pick(rows, parse_conditions("ap50>=0.1"))
    held = replace(HOST, details={**slow_clock.details, "clocks_locked": True})
    rows = compare(
        [run_of(name, [9.0], [0.6], device=device) for name, device in (("a", slow_clock), ("b", held))]
    )
    assert [row["device"] for row in rows] == [
        "host (onnxruntime), 5W",
        "host (onnxruntime), 5W, clocks locked",
    ]
    with pytest.raises(BenchmarkError, match="several power modes"):
        pick(rows, parse_conditions("ap50>=0.1"))


def test_a_disturbed_run_is_named() -> None:
    """A run that was measured under a disturbance is named with it, once."""
    hot = run_of("hot", [10.0, 9.0], [0.6, 0.55], disturbed="gpu reached 99 °C")
    assert reservations(compare([hot])) == ["hot was measured under a disturbance: gpu reached 99 °C."]


def test_noise_is_no_speed_up() -> None:
    """A step whose interval holds 1 is not picked as the fastest, however low its p50, nor put on the front."""
    unpruned, noisy = steady(0, 10.0, 0.6), steady(1, 9.0, 0.59)
    blocks = tuple(
        replace(block, samples_ms={"engine": (9.0 if block.index % 3 else 11.5,) * 4})
        for block in noisy.blocks
    )
    rows = compare([report(2, [unpruned, replace(noisy, blocks=blocks)])])
    assert rows[1]["latency_engine_ratio"] < 1 < rows[1]["latency_engine_ratio_high"]
    assert [row["on_front"] for row in rows] == [True, False]
    assert pick(rows, parse_conditions("ap50>=0.5"))["iteration"] == 0


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


def test_an_unmeasured_step_is_no_candidate() -> None:
    """Without a benchmark the error says how to get one; an unmeasured step's figures are not what is reached."""
    with pytest.raises(BenchmarkError, match="no step was measured: run `edgeprune bench`"):
        pick(compare([report(2, [None, None])]), parse_conditions("params<=920000"))
    half = compare([report(3, [result(0), result(1), None])])
    message = "no measured step has params<=900000: params reaches 9.12e+05; not measured: 1"
    with pytest.raises(BenchmarkError, match=re.escape(message)):
        pick(half, parse_conditions("params<=900000"))


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
    assert "picked" not in rows[0]
    assert invoke("compare", str(run), "--csv", "--json").exit_code == 2
    shipped = invoke("ship", str(run), "--pick", "ap50>=0.596", "--out", str(tmp_path / "out"), "--json")
    assert shipped.exit_code == 0
    assert json.loads(shipped.stdout)["iteration"] == 1
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == b"weights 1"
    assert invoke("ship", str(run), "--out", str(tmp_path / "x")).exit_code == 2


def test_the_pick_is_in_every_form(run: Path) -> None:
    """Markdown names the picked step below its table; CSV keeps every row and marks the one."""
    markdown = invoke("compare", str(run), "--pick", "ap50>=0.596", "--markdown").stdout.splitlines()
    assert [line.startswith("|") for line in markdown[:6]] == [True] * 5 + [False]
    assert f"ap50>=0.596: iteration 1 of {run}" in markdown
    rows = list(
        csv.DictReader(io.StringIO(invoke("compare", str(run), "--pick", "ap50>=0.596", "--csv").stdout))
    )
    assert [(row["iteration"], row["picked"]) for row in rows] == [
        ("0", "False"),
        ("1", "True"),
        ("2", "False"),
    ]


def test_what_to_mind_is_in_every_form(run: Path, tmp_path: Path) -> None:
    """Two runs timed apart are said to be so below the table, in Markdown and in JSON."""
    both = ["compare", str(run), str(write_run(tmp_path / "again"))]
    (told,) = json.loads(invoke(*both, "--json").stdout)["reservations"]
    assert told.startswith("Timed apart: ")
    assert told in invoke(*both).stdout and told in invoke(*both, "--markdown").stdout


def test_commands_fail_in_one_line(run: Path, tmp_path: Path) -> None:
    """A condition that nothing meets and a folder that is no run end with status 1 and one line."""
    for arguments in (["compare", str(run), "--pick", "ap50>=0.9"], ["compare", str(tmp_path)]):
        failed = invoke(*arguments)
        assert failed.exit_code == 1
        assert failed.output.count("\n") == 1 and failed.output.startswith("Error: ")
