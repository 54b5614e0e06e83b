"""`edgeprune check`, as a user meets it."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from small_detectors import SmallDetector, make_dataset
from torch import nn
from typer.testing import CliRunner

from edgeprune.cli import app
from edgeprune.export.model import export_onnx


@pytest.fixture
def modulo(tmp_path: Path) -> Path:
    """A file of somebody else's."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y", "z")]
    node = helper.make_node("Mod", ["x", "y"], ["z"], "wrap", fmod=1)
    graph = helper.make_graph([node], "graph", values[:2], values[2:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8),
        tmp_path / "m.onnx",
    )
    return tmp_path / "m.onnx"


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_a_violation_is_named(modulo: Path) -> None:
    """Node, operator, reason and remedy are printed, and the exit code is 1."""
    code, out, error = run(modulo, "--target", "jetson-nano")
    assert code == 1 and "1 violations" in error
    assert "wrap (Mod): Mod is not supported by TensorRT 8.2; remedy: " in out


def test_a_readable_file(modulo: Path) -> None:
    """The same file is read by a newer TensorRT, and by ONNX Runtime on the host."""
    code, out, _ = run(modulo, "--target", "jetson-orin-nano")
    assert code == 0 and "operator table of TensorRT 10.1" in out and "nothing that it would refuse" in out
    assert run(modulo, "--target", "host")[0] == 0


def test_json(modulo: Path) -> None:
    """--json prints the report alone."""
    code, out, _ = run(modulo, "--target", "jetson-nano", "--json")
    (violation,) = json.loads(out)["check"]["violations"]
    assert code == 1 and (violation["node"], violation["operator"]) == ("wrap", "Mod")


def test_layers_beyond_float16(tmp_path: Path) -> None:
    """--fp16 names the layers that overflow on the given images."""
    torch.manual_seed(0)
    detector = SmallDetector().eval()
    make_dataset(tmp_path / "data", images=2)
    labels = tmp_path / "data" / "labels.json"
    arguments = (tmp_path / "m.onnx", "--target", "jetson-nano", "--fp16", "--val", labels)
    arguments = (*arguments, "--val-images", tmp_path / "data" / "images")
    export_onnx(detector, detector, tmp_path / "m.onnx", opset=13, metadata={})
    assert run(*arguments)[0] == 0
    nn.init.constant_(detector.down.bias, 1e5)
    export_onnx(detector, detector, tmp_path / "m.onnx", opset=13, metadata={})
    code, out, error = run(*arguments)
    assert code == 1 and "layers beyond float16" in error and "down (Conv)" in out
    found = json.loads(run(*arguments, "--json")[1])["float16_ranges"]
    assert found[0]["headroom"] < 1


def test_errors(modulo: Path, tmp_path: Path) -> None:
    """An unknown target, a missing file, and --fp16 without images or on a foreign file are one line each."""
    make_dataset(tmp_path / "data", images=1)
    labels = tmp_path / "data" / "labels.json"
    code, _, error = run(modulo, "--target", "toaster")
    assert code == 1 and "jetson-nano" in error
    assert run(tmp_path / "none.onnx", "--target", "jetson-nano")[0] == 1
    assert run(modulo, "--target", "jetson-nano", "--fp16")[0] == 2
    images = ("--val-images", tmp_path / "data" / "images")
    code, _, error = run(modulo, "--target", "jetson-orin-nano", "--fp16", "--val", labels, *images)
    assert code == 1 and "preprocessing" in error and len(error.splitlines()) == 1
