"""Layer times mapped back to the detector's layers, and the layers that did not get faster."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.layers import channel_block, layer_times, not_faster, shortfalls
from edgeprune.benchmarks.records import Device, LayerTime


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
        LayerTime("stem", 0.5, 3, 8, 8 * 3 * 9 / (3 + 8)),
        LayerTime("blocks.1", None, 1, 8, 8 * 9 / (8 + 8)),
        LayerTime("blocks.10", 0.25, 8, 16, 8 * 16 / (8 + 16)),
    )


def test_an_engine_whose_kernels_bear_no_layers_names_is_not_profiled(model: Path) -> None:
    """Where no kernel can be mapped there are no layers at all: none was fused into another one."""
    assert layer_times(model, {"[Myelin] ForeignNode 0": 1.0, "copy": 0.5}) == ()


@pytest.mark.parametrize(
    ("operator", "weights", "attributes", "macs", "values"),
    [
        # 64 x 64 becomes 32 x 32, and with the transposed 128 x 128
        ("Conv", (24, 3, 3, 3), {"strides": [2, 2]}, 24 * 3 * 9 * 32**2, 3 * 64**2 + 24 * 32**2),
        ("Conv", (24, 4, 5, 5), {"group": 6}, 24 * 4 * 25 * 64**2, (24 + 24) * 64**2),
        ("ConvTranspose", (8, 4, 2, 2), {"strides": [2, 2]}, 8 * 4 * 4 * 64**2, 8 * 64**2 + 4 * 128**2),
    ],
)
def test_arithmetic_intensity(
    operator: str,
    weights: tuple[int, ...],
    attributes: dict[str, Any],
    macs: int,
    values: int,
    tmp_path: Path,
) -> None:
    """MACs for each activation read or written are those of the whole layer, counted by hand."""
    node = helper.make_node(operator, ["images", "weight"], ["found"], "layer", **attributes)
    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "one_layer",
        [helper.make_tensor_value_info("images", float32, (1, None, 64, 64))],
        [helper.make_tensor_value_info("found", float32, None)],
        [numpy_helper.from_array(np.zeros(weights, np.float32), "weight")],
    )
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    (layer,) = layer_times(tmp_path / "model.onnx", {"layer": 1.0})
    assert layer.macs_per_value == pytest.approx(macs / values)


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


def layer(
    name: str, time_ms: float | None, in_channels: int, out_channels: int, macs_per_value: float = 100.0
) -> LayerTime:
    """Bound by computing unless it says otherwise."""
    return LayerTime(name, time_ms, in_channels, out_channels, macs_per_value)


def test_who_did_not_get_faster() -> None:
    """Narrower layers with their old time are named with a cause; faster or unchanged ones are not.

    Nor is one that lost so little that noise may hide it: one channel of 128.
    """
    before = [
        layer("aligned", 1.0, 64, 64),
        layer("faster", 1.0, 64, 64),
        layer("untouched", 1.0, 64, 64),
        layer("one channel", 1.0, 64, 128),
        layer("odd", 1.0, 64, 64),
        layer("depthwise", 1.0, 1, 64, 4.5),
        layer("few channels", 1.0, 16, 32, 10.7),
        layer("fused", 1.0, 64, 64),
        layer("tiny", 0.01, 64, 64),
    ]
    after = [
        layer("aligned", 1.0, 64, 48),
        layer("faster", 0.8, 64, 48),
        layer("untouched", 1.2, 64, 64),
        layer("one channel", 1.02, 64, 127),
        layer("odd", 0.96, 64, 50),  # 22 % fewer multiplications
        layer("depthwise", 1.1, 1, 48, 4.5),
        layer("few channels", 1.0, 16, 24, 9.6),
        layer("fused", None, 64, 48),
        layer("tiny", 0.01, 64, 48),
    ]
    assert {layer.layer: layer.cause for layer in not_faster(before, after, 8)} == {
        "aligned": "no cause found",
        "odd": "misaligned: 50 channels, no multiple of 8",
        "depthwise": "memory-bound: 4.5 MACs a value",
        "few channels": "memory-bound: 9.6 MACs a value",
        "fused": "fused elsewhere: no kernel of its own",
        "tiny": "small: mostly the cost of a call",
    }


def test_the_block_is_the_devices() -> None:
    """128 to 120 channels win nothing where kernels take 16 at once: with AVX-512, and so it is said there."""
    details = {"machine": "x86_64"}
    wide = Device("host", "onnxruntime", "Xeon", details | {"avx512": True})
    narrow = Device("host", "onnxruntime", "Ryzen", details | {"avx512": False})
    unknown = Device("host", "onnxruntime", "measured before the probe told", details)
    nano = Device("jetson-nano", "tensorrt", "NVIDIA Jetson Nano Developer Kit", {"machine": "aarch64"})
    assert [channel_block(device) for device in (wide, narrow, unknown, nano)] == [16, 8, 16, 8]
    before, after = [layer("conv", 1.0, 64, 128)], [layer("conv", 1.0, 64, 120)]
    causes = [not_faster(before, after, channel_block(device))[0].cause for device in (wide, narrow)]
    assert causes == ["misaligned: 120 channels, no multiple of 16", "no cause found"]


def test_where_the_promised_speed_up_is_lost() -> None:
    """Half the channels promise half the time; what a layer takes beyond it is lost, the most first.

    A layer that kept its channels loses only where it grew slower; without a time there is nothing to say.
    """
    before = [
        layer("kept", 1.0, 8, 8),
        layer("halved", 1.0, 64, 64),
        layer("as promised", 1.0, 64, 64),
        layer("depthwise", 1.0, 1, 64, 4.5),
        layer("fused", None, 64, 64),
    ]
    after = [
        layer("kept", 1.0, 8, 8),
        layer("halved", 0.6, 64, 32),
        layer("as promised", 0.5, 32, 64),
        layer("depthwise", 0.875, 1, 32, 4.5),
        layer("fused", None, 64, 32),
    ]
    found = shortfalls(before, after, 8)
    assert [(layer.layer, round(layer.lost_ms, 6)) for layer in found] == [
        ("depthwise", 0.375),
        ("halved", 0.1),
    ]
    assert found[0].cause == "memory-bound: 4.5 MACs a value"
    assert found[1].promised_ms == 0.5
