"""`edgeprune export` for another target, precision, batch and input than the run's own."""

import json
from pathlib import Path

import onnx
import pytest
from tiny_detector import SIDE, write_data, write_weights
from typer.testing import CliRunner, Result

from edgeprune.cli import app
from edgeprune.data.files import read_json, sha256_of


def edgeprune(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the unpruned detector and one step."""
    folder = tmp_path_factory.mktemp("run")
    write_weights(folder / "tiny.pt")
    write_data(folder, "train", 8, seed=1)
    write_data(folder, "val", 4, seed=2)
    train, val = folder / "boxes_train.json", folder / "boxes_val.json"
    size = ("--input-size", SIDE, "--iterations", 1, "--finetune-epochs", 0)
    data = ("--weights", folder / "tiny.pt", "--train", train, "--val", val)
    result = edgeprune(
        *("prune", "--target", "host", "--detector", "tiny", "--run-dir", folder / "run"), *data, *size
    )
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_int8_for_a_jetson(run: Path) -> None:
    """A Q/DQ file for an Orin lies beside the run's own, with a record of what int8 cost."""
    result = edgeprune(
        *("export", run, "--target", "jetson-orin-nano", "--precision", "int8", "--int8-ap-drop", 1, "--json")
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["iteration"] for row in rows] == [0, 1]
    for row in rows:
        step = run / f"step-{row['iteration']:02d}"
        record = read_json(step / "jetson-orin-nano-int8.json")
        model = onnx.load(step / "jetson-orin-nano-int8.onnx")
        assert record["model"]["sha256"] == sha256_of(step / "jetson-orin-nano-int8.onnx")
        assert record["weights_sha256"] == sha256_of(step / "weights.safetensors")
        assert row["int8_macs_share"] == record["quantised"]["int8_macs_share"] == 1.0
        assert record["check"]["violations"] == [] or record["check"]["violations"] == ()
        assert sum(node.op_type == "Conv" for node in model.graph.node) == 4


def test_batch_and_input(run: Path) -> None:
    """A free batch and a uint8 input are in the file and in its name; the run's own model is not touched."""
    assert edgeprune("export", run, "--step", 1).exit_code == 0
    own = sha256_of(run / "step-01" / "model.onnx")
    result = edgeprune(
        *("export", run, "--step", 1, "--target", "jetson-thor", "--precision", "fp16"),
        *("--dynamic-batch", "1:2:4", "--input", "uint8"),
    )
    assert result.exit_code == 0, result.output
    model = onnx.load(run / "step-01" / "jetson-thor-fp16-batch-1-2-4-uint8.onnx")
    images = model.graph.input[0].type.tensor_type
    assert images.elem_type == onnx.TensorProto.UINT8 and images.shape.dim[0].dim_param == "batch"
    assert sha256_of(run / "step-01" / "model.onnx") == own
    parity = read_json(run / "step-01" / "parity.json")
    assert parity["model_sha256"] == own and parity["parity"]["max_box_difference_px"] <= 0.05


def test_what_a_target_cannot_take(run: Path) -> None:
    """Int8 or uint8 for a Nano is one line that says why; wrong batches are wrong usage or one line."""
    nano = ("export", run, "--step", 0, "--target", "jetson-nano")
    result = edgeprune(*nano, "--precision", "int8")
    assert result.exit_code == 1 and "no int8 in hardware" in result.stderr.splitlines()[-1]
    result = edgeprune(*nano, "--precision", "fp16", "--input", "uint8")
    assert result.exit_code == 1 and "takes none; remedy: " in result.stderr.splitlines()[-1]
    assert not list((run / "step-00").glob("jetson-nano*"))
    assert edgeprune(*nano, "--dynamic-batch", "4:2:1").exit_code == 1
    assert edgeprune(*nano, "--batch", 2, "--dynamic-batch", "1:2:4").exit_code == 2
