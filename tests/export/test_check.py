"""Files that a target's TensorRT will not read are named beforehand, and no others."""

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from edgeprune.deploy.targets import known_targets
from edgeprune.export.check import CheckReport, check_model
from edgeprune.export.errors import ExportError
from edgeprune.export.operators import table_for, tables

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str]],
    initializers: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 13,
    ir_version: int = 8,
    kind: int = FLOAT,
) -> ModelProto:
    """A model whose last node makes the output."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_empty_tensor_value_info(nodes[-1].output[0])],
        [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def check(model: ModelProto, tmp_path: Path, tensorrt: str = "8.2.1") -> CheckReport:
    onnx.save(model, tmp_path / "model.onnx")
    return check_model(tmp_path / "model.onnx", tensorrt)


def mod() -> ModelProto:
    return model_of([helper.make_node("Mod", ["x", "y"], ["z"], "mod", fmod=1)], {"x": [4], "y": [4]})


def float_range() -> ModelProto:
    return model_of(
        [helper.make_node("Range", ["start", "limit", "delta"], ["r"], "range")],
        {"start": [], "limit": []},
        {"delta": np.float32(1)},
    )


def nms() -> ModelProto:
    return model_of(
        [helper.make_node("NonMaxSuppression", ["boxes", "scores"], ["kept"], "nms")],
        {"boxes": [1, 10, 4], "scores": [1, 1, 10]},
    )


def dynamic_resize() -> ModelProto:
    return model_of(
        [helper.make_node("Resize", ["x", "", "scales"], ["y"], "resize")], {"x": [1, 3, 8, 8], "scales": [4]}
    )


def high_opset() -> ModelProto:
    return model_of([helper.make_node("Relu", ["x"], ["y"], "relu")], {"x": [1]}, opset=18)


def high_ir_version() -> ModelProto:
    return model_of([helper.make_node("Relu", ["x"], ["y"], "relu")], {"x": [1]}, ir_version=10)


def int64_arithmetic() -> ModelProto:
    return model_of([helper.make_node("Add", ["x", "x"], ["y"], "add")], {"x": [4]}, kind=INT64)


def plugin() -> ModelProto:
    return model_of(
        [helper.make_node("EfficientNMS_TRT", ["boxes", "scores"], ["kept"], "plugin")],
        {"boxes": [1, 10, 4], "scores": [1, 10, 1]},
    )


def five_d() -> ModelProto:
    return model_of(
        [helper.make_node("GridSample", ["x", "grid"], ["y"], "sample")],
        {"x": [1, 3, 4, 8, 8], "grid": [1, 4, 8, 8, 3]},
        opset=20,
    )


def external_data() -> ModelProto:
    model = model_of(
        [helper.make_node("Add", ["x", "w"], ["y"], "add")], {"x": [4]}, {"w": np.ones(4, np.float32)}
    )
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "weights.bin")
    model.graph.initializer[0].ClearField("raw_data")
    return model


PLANTED: dict[
    Callable[[], ModelProto], tuple[str, str, str, str]
] = {  # TensorRT, node, operator, in the reason
    mod: ("8.2.1", "mod", "Mod", "not supported"),
    float_range: ("8.2.1", "range", "Range", "start is computed at run time"),
    nms: ("8.2.1", "nms", "NonMaxSuppression", "NMS"),
    dynamic_resize: ("8.2.1", "resize", "Resize", "scales is computed"),
    high_opset: ("8.2.1", "", "", "opset 18"),
    high_ir_version: ("8.2.1", "", "", "IR version 10"),
    int64_arithmetic: ("8.2.1", "add", "Add", "INT64"),
    plugin: ("8.2.1", "plugin", "EfficientNMS_TRT", "plugin"),
    five_d: ("10.3", "sample", "GridSample", "5-D"),
    external_data: ("8.2.1", "", "", "weights.bin, which is missing"),
}


@pytest.mark.parametrize("make", PLANTED, ids=lambda make: make.__name__)
def test_planted_violations(make: Callable[[], ModelProto], tmp_path: Path) -> None:
    """Each planted violation is named by node, operator and reason, with a remedy."""
    tensorrt, node, operator, reason = PLANTED[make]
    report = check(make(), tmp_path, tensorrt)
    assert not report.ok
    assert any(
        (v.node, v.operator) == (node, operator) and reason in v.reason and v.remedy and v.severity == "error"
        for v in report.violations
    ), report.violations


def test_volumetric_convolution_is_warned_of(tmp_path: Path) -> None:
    """A 3-D convolution is in TensorRT 8.2's table, so it is a warning that names the 5-D tensor."""
    weight = {"w": np.zeros((2, 3, 3, 3, 3), np.float32)}
    model = model_of([helper.make_node("Conv", ["x", "w"], ["y"], "conv")], {"x": [1, 3, 8, 8, 8]}, weight)
    report = check(model, tmp_path)
    assert report.ok and ["5-D" in v.reason for v in report.violations] == [True]


OTHER = [
    # node type, inputs, attributes, initialisers, opset, TensorRT, in the reason
    ("TopK", {"x": [8], "k": [1]}, {}, {}, 13, "8.2", "K is computed"),
    (
        "MaxPool",
        {"x": [1, 1, 8, 8]},
        {"kernel_shape": [2, 2], "dilations": [2, 2]},
        {},
        13,
        "10.3",
        "dilated",
    ),
    (
        "Resize",
        {"x": [1, 1, 8, 8]},
        {"mode": "cubic"},
        {"": 0, "s": np.ones(4, np.float32)},
        13,
        "8.2",
        "cubic",
    ),
    ("Einsum", {"x": [2, 2]}, {"equation": "ii->i"}, {}, 13, "8.2", "diagonal"),
    ("Conv", {"x": [1, 1, 8, 8], "w": [1, 1, 3, 3]}, {}, {}, 13, "8.2", "W is computed"),
    ("BitShift", {"x": [2], "y": [2]}, {"direction": "LEFT"}, {}, 13, "8.2", "not supported"),
    ("LayerNormalization", {"x": [2, 2], "s": [2]}, {}, {}, 17, "8.5", "not supported"),
    ("LayerNormalization", {"x": [2, 2], "s": [2]}, {}, {}, 17, "8.2", "not in the operator table"),
]


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "constants", "opset", "tensorrt", "reason"), OTHER
)
def test_restrictions(
    operator: str,
    inputs: dict[str, list[int]],
    attributes: dict[str, object],
    constants: dict[str, np.ndarray],
    opset: int,
    tensorrt: str,
    reason: str,
    tmp_path: Path,
) -> None:
    """What the published tables restrict is found in the nodes."""
    node = helper.make_node(operator, [*inputs, *constants], ["y"], "node", **attributes)
    arrays = {name: array for name, array in constants.items() if name}
    report = check(model_of([node], inputs, arrays, opset=opset), tmp_path, tensorrt)
    assert any(reason in v.reason and v.node == "node" for v in report.violations), report.violations


def test_zero_point(tmp_path: Path) -> None:
    """Only symmetric quantisation is read, and none where the device has no INT8."""
    for zero_point, int8, allowed in ((0, True, True), (3, True, False), (0, False, False)):
        constants = {"scale": np.float32(0.1), "zero": np.int8(zero_point)}
        model = model_of(
            [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])], {"x": [4]}, constants
        )
        onnx.save(model, tmp_path / "model.onnx")
        assert check_model(tmp_path / "model.onnx", "8.5.2", int8=int8).ok == allowed


def test_violations_inside_branches(tmp_path: Path) -> None:
    """Nodes in the bodies of If are looked at too."""
    body = helper.make_graph(
        [helper.make_node("Mod", ["x", "x"], ["m"], "inner", fmod=1)],
        "body",
        [],
        [helper.make_tensor_value_info("m", FLOAT, [4])],
    )
    node = helper.make_node("If", ["condition"], ["y"], "if", then_branch=body, else_branch=body)
    model = model_of([node], {"x": [4]})
    model.graph.input.append(helper.make_tensor_value_info("condition", TensorProto.BOOL, []))
    assert {v.node for v in check(model, tmp_path).violations} == {"inner"}


def test_shape_arithmetic_is_no_int64_arithmetic(tmp_path: Path) -> None:
    """What PyTorch makes of x.shape[0] * 2 is shape arithmetic, which TensorRT 8 reads."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Mul", ["shape", "two"], ["double"]),
        helper.make_node("Expand", ["x", "double"], ["y"]),
    ]
    assert check(model_of(nodes, {"x": ["n"]}, {"two": np.array([2])}), tmp_path).ok


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.projection(x).chunk(3, 2)
        attention: torch.Tensor = (query @ key.transpose(1, 2) / 8**0.5).softmax(2) @ value
        return attention


IMAGE, SEQUENCE = (1, 8, 16, 16), (1, 6, 8)
COMMON: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    **{
        type(layer).__name__: (layer, IMAGE)
        for layer in (
            nn.Conv2d(8, 4, 3, 2, 1),
            nn.ConvTranspose2d(8, 4, 2, 2),
            nn.BatchNorm2d(8),
            nn.GroupNorm(2, 8),
            nn.InstanceNorm2d(8, affine=True),
            nn.ReLU(),
            nn.ReLU6(),
            nn.LeakyReLU(),
            nn.PReLU(),
            nn.SiLU(),
            nn.GELU(),
            nn.ELU(),
            nn.SELU(),
            nn.Hardsigmoid(),
            nn.Softplus(),
            nn.Mish(),
            nn.Sigmoid(),
            nn.Tanh(),
            nn.Softmax(1),
            nn.LogSoftmax(1),
            nn.MaxPool2d(3, 2, 1),
            nn.AvgPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.AdaptiveAvgPool2d(4),
            nn.PixelShuffle(2),
            nn.PixelUnshuffle(2),
            nn.ZeroPad2d(1),
            nn.ReflectionPad2d(1),
            nn.ReplicationPad2d(1),
            nn.Dropout(),
            nn.Flatten(),
            nn.Identity(),
        )
    },
    "nearest": (nn.Upsample(scale_factor=2, mode="nearest"), IMAGE),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "bilinear to size": (nn.Upsample(size=(20, 20), mode="bilinear", align_corners=True), IMAGE),
    "Linear": (nn.Linear(8, 4), SEQUENCE),
    "LSTM": (nn.LSTM(8, 4, batch_first=True), SEQUENCE),
    "GRU": (nn.GRU(8, 4, batch_first=True), SEQUENCE),
    "Attention": (Attention(), SEQUENCE),
}


def export_layer(layer: nn.Module, shape: tuple[int, ...], opset: int, path: Path) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer.eval(), (torch.zeros(shape),), buffer, dynamo=False, opset_version=opset)  # type: ignore[arg-type]
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("name", COMMON)
def test_no_false_alarm_on_common_layers(name: str, tmp_path: Path) -> None:
    """PyTorch's own export of common layers passes everywhere, and the real parser and builder agree."""
    from rtx import build_engine

    layer, shape = COMMON[name]
    for opset, versions in (
        (13, ("8.2.1", "8.5.2", "8.6.1", "10.3", "10.16", "11.4")),
        (16, ("8.5.2", "10.16")),
    ):
        path = tmp_path / f"{opset}.onnx"
        export_layer(layer, shape, opset, path)
        for version in versions:
            report = check_model(path, version)
            assert report.ok, (version, report.violations)
    build_engine(path)


@pytest.mark.parametrize("make", [nms, plugin, five_d], ids=lambda make: make.__name__)
def test_the_real_builder_refuses_them_too(make: Callable[[], ModelProto], tmp_path: Path) -> None:
    """What the check names is refused by TensorRT's own parser or builder."""
    from rtx import BuildError, build_engine

    onnx.save(make(), tmp_path / "model.onnx")
    with pytest.raises(BuildError):
        build_engine(tmp_path / "model.onnx")


def test_external_data_outside_the_folder(tmp_path: Path) -> None:
    """Weights that a file claims to have elsewhere on the disk are refused, and truncated ones named."""
    model = external_data()
    entries = {entry.key: entry for entry in model.graph.initializer[0].external_data}
    entries["location"].value = "../weights.bin"
    (tmp_path / "inner").mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(16))
    report = check(model, tmp_path / "inner")
    assert any("outside the model's folder" in v.reason for v in report.violations)
    entries["location"].value = "weights.bin"
    model.graph.initializer[0].external_data.add(key="length", value="16")
    assert check(model, tmp_path).ok
    (tmp_path / "weights.bin").write_bytes(bytes(8))
    assert any("truncated" in v.reason for v in check(model, tmp_path).violations)


def test_empty_graph(tmp_path: Path) -> None:
    """An empty file parses in TensorRT without complaint: here it is a violation."""
    assert any("empty" in v.reason for v in check(ModelProto(ir_version=8), tmp_path).violations)


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=200))
def test_damaged_files(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever bytes a file has, the answer is a report or one clear error, never another exception."""
    path = tmp_path_factory.mktemp("damaged") / "model.onnx"
    path.write_bytes(content)
    try:
        assert not check_model(path, "8.2.1").ok
    except ExportError as error:
        assert str(path) in str(error)


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is one clear error."""
    with pytest.raises(ExportError, match=r"missing\.onnx"):
        check_model(tmp_path / "missing.onnx", "8.2.1")


def test_every_row_has_a_source() -> None:
    """Each row names its source, unread tables are marked, and every target has a table."""
    for table in tables().values():
        assert all(entry.source for entry in table.entries.values())
        assert {entry.value for name, entry in table.entries.items() if name[0].isupper()} == {"Y", "N"}
    assert not table_for("11.4").verified and table_for("10.16").verified
    versions = {target.tensorrt for target in known_targets().values() if target.tensorrt}
    assert versions and all(table_for(version) for version in versions)


@pytest.mark.parametrize(
    ("version", "table"),
    [("8.2.1", "8.2"), ("8.5.2", "8.5"), ("10.3", "10.1"), ("10.16.1", "10.15"), ("11.4", "11.0")],
)
def test_table_of_a_version(version: str, table: str) -> None:
    """A version is checked by the newest table that is not newer."""
    assert table_for(version).tensorrt == table


@pytest.mark.parametrize("version", ["7.1", "eight", "", "8"])
def test_unknown_versions(version: str) -> None:
    """A version without a table is refused."""
    with pytest.raises(ExportError):
        table_for(version)


def test_tables_agree_with_the_shared_reading(shared: Path) -> None:
    """The rows of 8.2 to 10.1 are those of the maintainers' independent reading of the same tables."""
    lines = (shared.parent / "trt_operators.tsv").read_text().splitlines()[1:]
    assert len(lines) > 1000
    for line in lines:
        version, _, operator, supported, types, _ = line.split("\t")
        entry = table_for(version).entries[operator]
        assert entry.value == supported[0]
        assert entry.types == {name.strip() for name in types.split(",") if name.strip()}
