"""Int8 files keep AP, say what they cost, and are what TensorRT's builder takes."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_detectors import SmallDetector, make_dataset
from torch import nn

from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.detectors.registry import load_detector
from edgeprune.export.check import check_model
from edgeprune.export.errors import ExportError
from edgeprune.export.model import Batch, export_onnx
from edgeprune.export.quantise import int8_macs_share, quantise
from edgeprune.export.runtime import OnnxModel, evaluate_model


@pytest.fixture(scope="session")
def nanodet(shared: Path) -> nn.Module:
    return load_detector("nanodet-g", shared / "nanodet-g" / "nanodet_g_coco80_convs.npz", (320, 320)).eval()


@pytest.fixture(scope="session")
def train(shared: Path) -> tuple[Dataset, Dataset]:
    dataset = load_dataset(shared / "coco-person" / "person_train2017.json")
    return dataset.hold_out(0.4, 0)


@pytest.mark.shared_data
def test_nanodet_in_int8(
    nanodet: nn.Module, train: tuple[Dataset, Dataset], shared: Path, tmp_path: Path
) -> None:
    """AP50 of NanoDet-g on validation images within 1 point of fp32, at least 90 % of the MACs in int8."""
    val = load_dataset(shared / "coco-person" / "person_val2017.json")
    exact = export_onnx(nanodet, nanodet, tmp_path / "fp32.onnx", opset=17, metadata={})
    found = quantise(exact, tmp_path / "int8.onnx", train[0], train[1].subset(range(32)))
    assert found.int8_macs_share >= 0.9 and found.ap_float - found.ap <= 0.01
    assert evaluate_model(exact.path, val).ap50 - evaluate_model(found.model.path, val).ap50 <= 0.01
    assert found.model.size_bytes < 0.3 * exact.size_bytes


@pytest.mark.shared_data
def test_costly_layer_stays_in_float(
    nanodet: nn.Module, train: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    """A layer whose input has one huge channel loses AP in int8: it is the one that stays in float.

    The channel is enlarged by one layer and shrunk by the next, which leaves the float network as it was.
    """
    from rtx import build_engine

    network = copy.deepcopy(nanodet)
    head = network.heads[1]
    with torch.no_grad():
        head.features.weight[3] *= 1e4
        head.features.bias[3] *= 1e4
        head.output.weight[:, 3] /= 1e4
    exact = export_onnx(nanodet, network, tmp_path / "fp32.onnx", opset=17, metadata={})
    calibrate, select = train[0].subset(range(4)), train[1].subset(range(12))
    calls: list[tuple[int, int]] = []
    found = quantise(
        exact,
        tmp_path / "int8.onnx",
        calibrate,
        select,
        max_ap_drop=0.05,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert found.float_layers[0] == "heads.1.output"
    assert found.ap_float - found.ap <= 0.05 and 0.9 < found.int8_macs_share < 1
    assert evaluate_model(found.model.path, select).ap == pytest.approx(found.ap)
    assert calls[-1] == (34, 34)
    build_engine(found.model.path)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_what_is_quantised(method: str, tmp_path: Path) -> None:
    """Inputs and weights of every convolution, symmetric, weights per channel, bias float; metadata kept."""
    from rtx import build_engine

    torch.manual_seed(0)
    detector = SmallDetector().eval()
    dataset = make_dataset(tmp_path / "data", images=3)
    exact = export_onnx(detector, detector, tmp_path / "fp32.onnx", opset=13, metadata={"detector": "small"})
    found = quantise(exact, tmp_path / "int8.onnx", dataset, dataset, method=method, max_ap_drop=1.0)
    assert found.int8_macs_share == 1.0 and found.float_layers == () and found.images == 3
    model = onnx.load(found.model.path)
    producers = {name: node for node in model.graph.node for name in node.output}
    tensors = {t.name: t for t in model.graph.initializer}
    for node in (node for node in model.graph.node if node.op_type == "Conv"):
        activation, weight = (producers[name] for name in node.input[:2])
        assert tensors[weight.input[0]].data_type == TensorProto.INT8
        assert numpy_helper.to_array(tensors[weight.input[1]]).shape == (tensors[weight.input[0]].dims[0],)
        for quantised in (activation, weight):
            assert not numpy_helper.to_array(tensors[quantised.input[2]]).any()
        assert tensors[node.input[2]].data_type == TensorProto.FLOAT
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert (metadata["precision"], metadata["detector"], metadata["calibration"]) == ("int8", "small", method)
    assert (
        check_model(found.model.path, "8.5.2").ok
        and not check_model(found.model.path, "8.2.1", int8=False).ok
    )
    build_engine(found.model.path)


def test_outputs_stay_close(tmp_path: Path) -> None:
    """Int8 changes what the network gives by little, and it does change it."""
    torch.manual_seed(0)
    detector = SmallDetector().eval()
    dataset = make_dataset(tmp_path / "data", images=4)
    batch = Batch.parse("2")
    exact = export_onnx(detector, detector, tmp_path / "fp32.onnx", opset=13, metadata={}, batch=batch)
    found = quantise(exact, tmp_path / "int8.onnx", dataset, dataset, max_ap_drop=1.0)
    models = OnnxModel(exact.path), OnnxModel(found.model.path)
    inputs = models[0].prepare(dataset.image(0))[0]
    scores = [model.run(inputs)[1] for model in models]
    assert inputs.shape[0] == 2 and 0 < np.abs(scores[0] - scores[1]).max() < 0.05


def test_share_of_macs(tmp_path: Path) -> None:
    """By hand: 1x1 convolutions on 4x4, 2 -> 3 channels in int8, 3 -> 1 in float: 96 of 144 MACs."""
    zero, scale = np.int8(0), np.float32(0.1)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w1", "scale", "zero"], ["w"]),
        helper.make_node("Conv", ["d", "w"], ["y"]),
        helper.make_node("Conv", ["y", "w2"], ["z"]),
    ]
    weights = {"w1": np.zeros((3, 2, 1, 1), np.int8), "w2": np.zeros((1, 3, 1, 1), np.float32)}
    initializers = [
        numpy_helper.from_array(a, n) for n, a in {**weights, "zero": zero, "scale": scale}.items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 2, 4, 4])],
        [helper.make_tensor_value_info("z", 1, [1, 1, 4, 4])],
        initializers,
    )
    model = onnx.shape_inference.infer_shapes(helper.make_model(graph))
    assert int8_macs_share(model) == pytest.approx(96 / 144)


def test_refusals(tmp_path: Path) -> None:
    """A float16 file is not quantised again, and without images there are no ranges."""
    torch.manual_seed(0)
    detector = SmallDetector().eval()
    dataset = make_dataset(tmp_path / "data", images=1)
    half = export_onnx(detector, detector, tmp_path / "h.onnx", opset=17, metadata={}, precision="fp16")
    with pytest.raises(ExportError, match="fp32"):
        quantise(half, tmp_path / "int8.onnx", dataset, dataset)
    exact = export_onnx(detector, detector, tmp_path / "f.onnx", opset=17, metadata={})
    with pytest.raises(ExportError, match="no training image"):
        quantise(exact, tmp_path / "int8.onnx", dataset.subset([]), dataset)
    assert not (tmp_path / "int8.onnx").exists()
