"""Layer times mapped back to the detector's layers, and the layers that did not get faster."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.layers import layer_times, not_faster, shortfalls
from edgeprune.benchmarks.records import LayerTime


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """stem (3 -> 8) - leaky - blocks.1 (depthwise) - relu - blocks.10 (8 -> 16), names that begin alike."""
    rng = np.random.default_rng(0)
    weights = {
        "stem.weight": (8, 3, 3, 3),
        "blocks.1.weight": (8, 1, 3, 3),
        "blocks.10.weight": (16, 8, 1, 1),
    }
    nodes = [
        helper.make_node("Conv", ["images", "stem.weight"], ["a"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("LeakyRelu", ["a"], ["b"], "stem/LeakyRelu"),
        helper.make_node("Conv", ["b", "blocks.1.weight"], ["c"], "blocks.1", group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"], "blocks.1/Relu"),
        helper.make_node("Conv", ["d", "blocks.10.weight"], ["e"], "blocks.10"),
    ]
    graph = helper.make_graph(
        nodes,
        "three_layers",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, 64, 64))],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, (1, 16, 64, 64))],
        [
            numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7), path)
    return path


def test_fused_names_of_tensorrt(model: Path) -> None:
    """A kernel "a + b" counts for the layer that it begins with; a layer without a kernel is fused elsewhere.

    "blocks.1" is not found in "blocks.10", and copies count for no layer.
    """
    times = {"stem + PWN(stem/LeakyRelu)": 0.5, "blocks.10 || blocks.1": 0.25, "Reformatting CopyNode": 9.0}
    assert layer_times(model, times) == (
        LayerTime("stem", 0.5, 3, 8),
        LayerTime("blocks.1", None, 1, 8),
        LayerTime("blocks.10", 0.25, 8, 16),
    )


def test_names_of_onnxruntime(model: Path, tmp_path: Path) -> None:
    """Whatever ONNX Runtime fuses in this graph, its profile gives each of the three layers a time."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    session.run(None, {"images": np.zeros((1, 3, 64, 64), np.float32)})
    events = json.loads(Path(session.end_profiling()).read_text())
    times = {
        e["name"].removesuffix("_kernel_time"): e["dur"] / 1e3
        for e in events
        if e["cat"] == "Node" and e["name"].endswith("_kernel_time")
    }
    found = layer_times(model, times)
    assert [layer.layer for layer in found] == ["stem", "blocks.1", "blocks.10"]
    assert all(layer.time_ms is not None and layer.time_ms > 0 for layer in found)


def test_a_damaged_model_is_said(tmp_path: Path) -> None:
    """A file that is no ONNX is one error that names it."""
    (tmp_path / "model.onnx").write_bytes(b"\x0a\xff\xff no model")
    with pytest.raises(BenchmarkError, match=r"model\.onnx cannot be read"):
        layer_times(tmp_path / "model.onnx", {"stem": 1.0})


def test_who_did_not_get_faster() -> None:
    """Narrower layers with their old time are named with a cause; faster or unchanged ones are not."""
    before = [
        LayerTime("aligned", 1.0, 64, 64),
        LayerTime("faster", 1.0, 64, 64),
        LayerTime("untouched", 1.0, 64, 64),
        LayerTime("odd", 1.0, 64, 64),
        LayerTime("depthwise", 1.0, 1, 64),
        LayerTime("fused", 1.0, 64, 64),
        LayerTime("tiny", 0.01, 64, 64),
    ]
    after = [
        LayerTime("aligned", 1.0, 64, 48),
        LayerTime("faster", 0.8, 64, 48),
        LayerTime("untouched", 1.2, 64, 64),
        LayerTime("odd", 0.96, 64, 50),  # 22 % fewer multiplications
        LayerTime("depthwise", 1.1, 1, 48),
        LayerTime("fused", None, 64, 48),
        LayerTime("tiny", 0.01, 64, 48),
    ]
    assert {layer.layer: layer.cause for layer in not_faster(before, after)} == {
        "aligned": "no cause found",
        "odd": "misaligned: 50 channels, no multiple of 8",
        "depthwise": "memory-bound: depthwise",
        "fused": "fused elsewhere: no kernel of its own",
        "tiny": "small: mostly the cost of a call",
    }


def test_where_the_promised_speed_up_is_lost() -> None:
    """Half the channels promise half the time; what a layer takes beyond it is lost, the most first.

    A layer that kept its channels loses only where it grew slower; without a time there is nothing to say.
    """
    before = [
        LayerTime("kept", 1.0, 8, 8),
        LayerTime("halved", 1.0, 64, 64),
        LayerTime("as promised", 1.0, 64, 64),
        LayerTime("depthwise", 1.0, 1, 64),
        LayerTime("fused", None, 64, 64),
    ]
    after = [
        LayerTime("kept", 1.0, 8, 8),
        LayerTime("halved", 0.6, 64, 32),
        LayerTime("as promised", 0.5, 32, 64),
        LayerTime("depthwise", 0.875, 1, 32),
        LayerTime("fused", None, 64, 32),
    ]
    found = shortfalls(before, after)
    assert [(layer.layer, round(layer.lost_ms, 6)) for layer in found] == [
        ("depthwise", 0.375),
        ("halved", 0.1),
    ]
    assert found[0].cause == "memory-bound: depthwise"
    assert found[1].promised_ms == 0.5
