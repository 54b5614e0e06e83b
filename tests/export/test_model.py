"""Exported files are the network they came from, and say what they are."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_detectors import DataDependent, SmallDetector, Unexportable
from torch import nn

from edgeprune.data.dataset import load_dataset
from edgeprune.detectors.nanodet import NanoDetG
from edgeprune.detectors.registry import load_detector
from edgeprune.export.errors import ExportError
from edgeprune.export.model import Batch, ExportedModel, check_parity, export_onnx

# What issue 2 and the reading of TensorRT 8.2's operator table allow for NanoDet-g.
NANODET_OPERATORS = {
    *("Conv", "LeakyRelu", "Concat", "Add", "MaxPool", "AveragePool", "Resize", "Reshape", "Transpose"),
    *("Softmax", "Sigmoid", "Mul", "MatMul", "Split", "Gather", "Squeeze"),
}


def run(path: Path, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    boxes, scores = session.run(["boxes", "scores"], {"images": images})
    return boxes, scores


def expected(detector: SmallDetector, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        boxes, scores = detector.decode(detector.eval()(torch.from_numpy(images)))
    return boxes.numpy(), scores.numpy()


@pytest.fixture
def detector() -> SmallDetector:
    torch.manual_seed(0)
    return SmallDetector().eval()


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_runs_as_in_pytorch(detector: SmallDetector, tmp_path: Path, opset: int) -> None:
    """ONNX Runtime gives PyTorch's outputs; the written file has the wanted opset and an IR version <= 8."""
    exported = export_onnx(detector, detector, tmp_path / "model.onnx", opset=opset, metadata={})
    images = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
    for actual, wanted in zip(run(exported.path, images), expected(detector, images), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)
    written = onnx.load(exported.path)
    assert (written.opset_import[0].version, written.ir_version) == (opset, exported.ir_version)
    assert exported.opset == opset and exported.ir_version <= 8
    assert [(t.name, t.shape, t.dtype) for t in (*exported.inputs, *exported.outputs)] == [
        ("images", (1, 3, 64, 96), "float32"),
        ("boxes", (1, 384, 4), "float32"),
        ("scores", (1, 384), "float32"),
    ]


def test_graph_is_clean(detector: SmallDetector, tmp_path: Path) -> None:
    """No batch norm, shape arithmetic or unread initialiser is left, and every shape is a number."""
    exported = export_onnx(detector, detector, tmp_path / "model.onnx", opset=13, metadata={})
    graph = onnx.load(exported.path).graph
    operators = {node.op_type for node in graph.node}
    assert not operators & {"BatchNormalization", "Shape", "Constant", "ConstantOfShape", "Cast", "Identity"}
    assert {name for node in graph.node for name in node.input} >= {t.name for t in graph.initializer}
    assert all(dim.dim_value > 0 for value in graph.value_info for dim in value.type.tensor_type.shape.dim)
    assert len(graph.value_info) == sum(len(node.output) for node in graph.node) - 2
    assert exported.nodes == len(graph.node) < exported.nodes_traced


def test_nodes_are_named_after_layers(detector: SmallDetector, tmp_path: Path) -> None:
    """A convolution is called like its layer, its activation after it, decoding `decode/...`; all differ."""
    exported = export_onnx(detector, detector, tmp_path / "model.onnx", opset=13, metadata={})
    nodes = onnx.load(exported.path).graph.node
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    convolutions = {node.name: node.input[1] for node in nodes if node.op_type == "Conv"}
    assert convolutions == {f"{name}": f"{name}.weight" for name in ("stem", "depthwise", "down", "head")}
    assert {"stem/LeakyRelu", "down/Relu", "down/Resize", "decode/Exp"} <= set(names)


def test_metadata_describes_the_file(detector: SmallDetector, tmp_path: Path) -> None:
    """The file says how to feed it: classes, size and preprocessing, beside what the caller adds."""
    exported = export_onnx(detector, detector, tmp_path / "m.onnx", opset=13, metadata={"detector": "small"})
    metadata = {entry.key: entry.value for entry in onnx.load(exported.path).metadata_props}
    assert metadata["detector"] == "small" and json.loads(metadata["classes"]) == ["person"]
    assert json.loads(metadata["input_size"]) == [64, 96]
    assert json.loads(metadata["preprocessing"])["mean"] == [100.0, 110.0, 120.0]
    assert (metadata["batch"], metadata["precision"]) == ("1", "fp32")


def test_static_batch(detector: SmallDetector, tmp_path: Path) -> None:
    """`batch` images go through at once, each as it would alone."""
    exported = export_onnx(
        detector, detector, tmp_path / "m.onnx", opset=13, metadata={}, batch=Batch.parse("3")
    )
    images = np.random.default_rng(0).normal(size=(3, 3, 64, 96)).astype(np.float32)
    for actual, wanted in zip(run(exported.path, images), expected(detector, images), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


def test_dynamic_batch(detector: SmallDetector, tmp_path: Path) -> None:
    """Any batch goes through, and the file has as many nodes as the static one: no shape arithmetic."""
    batch = Batch.parse("1:2:8")
    exported = export_onnx(detector, detector, tmp_path / "d.onnx", opset=13, metadata={}, batch=batch)
    static = export_onnx(detector, detector, tmp_path / "s.onnx", opset=13, metadata={})
    assert exported.nodes == static.nodes and exported.inputs[0].shape == ("batch", 3, 64, 96)
    for size in (1, 2, 5):
        images = np.random.default_rng(size).normal(size=(size, 3, 64, 96)).astype(np.float32)
        for actual, wanted in zip(run(exported.path, images), expected(detector, images), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


class Expanding(SmallDetector):
    """Its boxes do not depend on the image: a constant, expanded to the batch."""

    def decode(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, scores = super().decode(raw)
        return torch.arange(4.0 * 384).reshape(1, 384, 4).expand(raw.shape[0], -1, -1), scores


def test_dynamic_batch_of_expanded_constants(tmp_path: Path) -> None:
    """Where decoding has the batch in a shape, that is computed on the device: any batch goes through."""
    torch.manual_seed(0)
    detector = Expanding().eval()
    batch = Batch.parse("1:2:8")
    exported = export_onnx(detector, detector, tmp_path / "d.onnx", opset=13, metadata={}, batch=batch)
    for size in (1, 3):
        images = np.random.default_rng(size).normal(size=(size, 3, 64, 96)).astype(np.float32)
        for actual, wanted in zip(run(exported.path, images), expected(detector, images), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


class Baked(SmallDetector):
    """Takes the batch as a Python number: tracing makes it a constant."""

    def decode(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, scores = super().decode(raw)
        return torch.zeros(1, 384, 4).expand(len(raw), -1, -1), scores


def test_batch_that_cannot_be_free(tmp_path: Path) -> None:
    """A batch that decoding has built in is refused, and no file is left."""
    detector = Baked().eval()
    with pytest.raises(ExportError, match="batch cannot be left free"):
        export_onnx(
            detector, detector, tmp_path / "d.onnx", opset=13, metadata={}, batch=Batch.parse("1:2:8")
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["0", "2:1:4", "1:2", "a", "-1", "1:8:4"])
def test_bad_batch(text: str) -> None:
    """A batch that is no number or no ascending range is refused with what was given."""
    with pytest.raises(ExportError, match="batch"):
        Batch.parse(text)


def test_uint8_input(detector: SmallDetector, tmp_path: Path) -> None:
    """A uint8 BGR image gives what its normalised planes give: the graph orders and normalises channels."""
    from edgeprune.deploy.device.imaging import normalise

    exported = export_onnx(detector, detector, tmp_path / "m.onnx", opset=17, metadata={}, input="uint8")
    assert [(t.shape, t.dtype) for t in exported.inputs] == [((1, 64, 96, 3), "uint8")]
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    wanted = expected(detector, normalise(image, detector.preprocessing))
    for actual, value in zip(run(exported.path, image[None]), wanted, strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-4, atol=1e-4)


def test_float16_typed(detector: SmallDetector, tmp_path: Path) -> None:
    """The network's weights are float16, inputs, outputs and decoding float32; outputs stay close."""
    exported = export_onnx(detector, detector, tmp_path / "h.onnx", opset=17, metadata={}, precision="fp16")
    model = onnx.shape_inference.infer_shapes(onnx.load(exported.path), strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for node in model.graph.node:
        if node.op_type != "Cast":
            wanted = single if node.name.startswith("decode/") else half
            assert {types[name] for name in node.output} == {wanted}, node.name
    assert all(t.data_type == half for t in model.graph.initializer if t.name.startswith("stem"))
    assert sum(node.op_type == "Cast" for node in model.graph.node) == 2  # one in, one out
    assert {t.dtype for t in (*exported.inputs, *exported.outputs)} == {"float32"}
    images = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
    boxes, scores = run(exported.path, images)
    wanted_boxes, wanted_scores = expected(detector, images)
    assert 0 < np.abs(boxes - wanted_boxes).max() < 0.5 and np.abs(scores - wanted_scores).max() < 0.01


def test_float16_names_overflowing_weights(detector: SmallDetector, tmp_path: Path) -> None:
    """A weight that float16 cannot hold is refused by name, and no file is left."""
    detector.down.weight.data[0] = 1e5
    with pytest.raises(ExportError, match=r"down\.weight"):
        export_onnx(detector, detector, tmp_path / "h.onnx", opset=17, metadata={}, precision="fp16")
    assert not list(tmp_path.iterdir())


def test_network_is_left_untouched(detector: SmallDetector, tmp_path: Path) -> None:
    """Exporting a network in training neither changes its mode nor its statistics, and exports evaluation."""
    detector.train()
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    exported = export_onnx(detector, detector, tmp_path / "model.onnx", opset=13, metadata={})
    assert detector.norm.training
    assert all(torch.equal(before[name], tensor) for name, tensor in detector.state_dict().items())
    images = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
    np.testing.assert_allclose(
        run(exported.path, images)[0], expected(detector, images)[0], rtol=1e-4, atol=1e-4
    )


def test_unknown_operator(tmp_path: Path) -> None:
    """A network that ONNX cannot express is refused with the operator's name, and no file is left."""
    detector = Unexportable().eval()
    with pytest.raises(ExportError, match="bessel_j0"):
        export_onnx(detector, detector, tmp_path / "model.onnx", opset=13, metadata={})
    assert not list(tmp_path.iterdir())


def test_record_reads_back(detector: SmallDetector, tmp_path: Path) -> None:
    """The record goes through JSON unchanged, wherever the run folder then lies."""
    exported = export_onnx(detector, detector, tmp_path / "model.onnx", opset=13, metadata={})
    record = json.loads(json.dumps(exported.to_json()))
    assert ExportedModel.from_json(record, tmp_path) == exported
    moved = ExportedModel.from_json(record, tmp_path / "elsewhere")
    assert moved == dataclasses.replace(exported, path=tmp_path / "elsewhere" / "model.onnx")
    for damaged in ({**record, "path": "../model.onnx"}, {**record, "opset_": 1}, {"path": "model.onnx"}):
        with pytest.raises(ExportError, match="damaged"):
            ExportedModel.from_json(damaged, tmp_path)


def test_nanodet_operators(tmp_path: Path) -> None:
    """NanoDet-g is made of operators that every target has, 34 convolutions among them."""
    detector = NanoDetG((320, 320)).eval()
    exported = export_onnx(detector, detector, tmp_path / "model.onnx", opset=13, metadata={})
    operators = [node.op_type for node in onnx.load(exported.path).graph.node]
    assert set(operators) <= NANODET_OPERATORS and operators.count("Conv") == 34
    assert exported.nodes <= 100


@pytest.mark.shared_data
def test_parity_on_real_images(shared: Path, tmp_path: Path) -> None:
    """NanoDet-g with its weights agrees with ONNX Runtime on real images: boxes, scores and AP."""
    detector = load_detector("nanodet-g", shared / "nanodet-g" / "nanodet_g_coco80_convs.npz", (320, 320))
    exported = export_onnx(detector, detector, tmp_path / "model.onnx", opset=13, metadata={})
    dataset = load_dataset(shared / "coco-person" / "person_val2017.json")
    parity = check_parity(detector, detector, exported.path, dataset, images=8)
    assert parity.images == 8 and parity.max_box_difference_px < 0.01 and parity.max_score_difference < 1e-4
    assert parity.ap_onnx == pytest.approx(parity.ap_pytorch, abs=1e-3) and parity.ap_pytorch > 0.2


@pytest.mark.shared_data
def test_parity_finds_another_network(shared: Path, tmp_path: Path) -> None:
    """Parity fails for a file of other weights, and where tracing kept one branch of a network."""
    dataset = load_dataset(shared / "coco-person" / "person_val2017.json")
    torch.manual_seed(0)
    detector = SmallDetector().eval()
    exported = export_onnx(detector, detector, tmp_path / "model.onnx", opset=13, metadata={})
    nn.init.normal_(detector.head.weight)
    with pytest.raises(ExportError, match="not the network"):
        check_parity(detector, detector, exported.path, dataset, images=2)
    branching = DataDependent().eval()
    exported = export_onnx(branching, branching, tmp_path / "branch.onnx", opset=13, metadata={})
    with pytest.raises(ExportError, match="branch"):
        check_parity(branching, branching, exported.path, dataset, images=2)


def test_foreign_files_cannot_be_run(tmp_path: Path) -> None:
    """A file without our metadata, and one that is no ONNX, give one clear error."""
    from edgeprune.export.runtime import OnnxModel

    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [value],
        [onnx.helper.make_tensor_value_info("y", 1, [1])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "foreign.onnx")
    (tmp_path / "damaged.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match="preprocessing"):
        OnnxModel(tmp_path / "foreign.onnx")
    for name in ("damaged.onnx", "missing.onnx"):
        with pytest.raises(ExportError, match=name):
            OnnxModel(tmp_path / name)
