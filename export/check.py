"""Will the target's TensorRT read this ONNX file? Known before the board is touched, for any exporter's file.

A violation names node, operator, reason and remedy; what the parser reads with a loss is a warning.
Restrictions come from the published operator tables (operators.py) and, where those are silent, from field
reports.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, defs, numpy_helper
from onnx.inliner import inline_local_functions

from edgeprune.export.errors import ExportError
from edgeprune.export.operators import Entry, OperatorTable, table_for

STANDARD_DOMAINS = ("", "ai.onnx")
MAX_RANK = 8  # TensorRT's Dims::MAX_DIMS
# TensorRT's names of ONNX's element types.
TYPE_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.DOUBLE: "DOUBLE",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
}
ARITHMETIC = {
    *("Abs", "Add", "Div", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Pow", "Sub", "Sum"),
    *("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"),
}
QUANTISED = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Violation:
    """Something that TensorRT will refuse ("error"), or read with a loss ("warning")."""

    node: str  # empty where it concerns the file as a whole
    operator: str
    reason: str
    remedy: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        where = f"{self.node} ({self.operator}): " if self.operator else ""
        return f"{where}{self.reason}; remedy: {self.remedy}"


@dataclass(frozen=True)
class CheckReport:
    """What was found, and by which table."""

    tensorrt: str
    table: str  # TensorRT version of the operator table that was used
    verified: bool  # whether that table was read for its very version
    violations: tuple[Violation, ...]

    @property
    def ok(self) -> bool:
        return all(violation.severity != "error" for violation in self.violations)

    def __str__(self) -> str:
        return ". ".join(str(violation) for violation in self.violations)


def check_model(path: Path, tensorrt: str, *, int8: bool = True) -> CheckReport:
    """Check an ONNX file against what a TensorRT version accepts.

    Args:
        path: of any ONNX file, weights inside or beside it.
        tensorrt: version, such as "8.2.1".
        int8: whether the device has INT8 in hardware.

    Raises:
        ExportError: If the file is missing or is no ONNX file.
    """
    table = table_for(tensorrt)
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # protobuf's error, whose class is not public
        raise ExportError(f"{path} is no ONNX file, or a damaged one: {error}") from error
    found = [*_check_file(model, table), *_check_external_data(model, path.parent)]
    if model.functions:
        model = inline_local_functions(model)
    found += _check_nodes(model, table, tensorrt, int8)
    return CheckReport(tensorrt, table.tensorrt, table.verified, tuple(found))


def _check_file(model: ModelProto, table: OperatorTable) -> Iterator[Violation]:
    if not model.graph.node or not model.graph.output:
        yield Violation(
            "",
            "",
            "the graph is empty: TensorRT parses it without complaint and builds nothing",
            "export the model again",
        )
    opset = _opset(model)
    if opset > table.max_opset:
        yield Violation(
            "",
            "",
            f"opset {opset}; TensorRT {table.tensorrt} reads up to {table.max_opset}",
            f"export with opset {table.max_opset}",
        )
    if opset < table.min_opset:
        yield Violation(
            "",
            "",
            f"opset {opset}; TensorRT {table.tensorrt} reads from {table.min_opset} on",
            f"export with opset {table.max_opset}",
        )
    if model.ir_version > table.max_ir_version:
        yield Violation(
            "",
            "",
            f"IR version {model.ir_version}; TensorRT {table.tensorrt} reads up to {table.max_ir_version}",
            f"save the model with ir_version = {table.max_ir_version}",
        )
    for value in model.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.UINT8 and not table.uint8_input:
            yield Violation(
                "",
                "",
                f"input {value.name} is UINT8; TensorRT {table.tensorrt} takes none",
                "export with --input float32",
            )


def _check_external_data(model: ModelProto, folder: Path) -> Iterator[Violation]:
    for tensor in _all_initializers(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        file = folder / location
        if not location or Path(location).is_absolute() or ".." in Path(location).parts:
            yield Violation(
                "",
                "",
                f"weight {tensor.name} lies in {location!r}, outside the model's folder",
                "save the model again as one file",
            )
        elif not file.is_file():
            yield Violation(
                "",
                "",
                f"weight {tensor.name} lies in {location}, which is missing",
                "copy it beside the model, or save the model as one file",
            )
        elif file.stat().st_size < int(entries.get("offset", 0)) + int(entries.get("length", 0)):
            yield Violation(
                "",
                "",
                f"weight {tensor.name} reaches beyond the end of {location}: it is truncated",
                "copy the file again",
            )


class Origin(IntEnum):
    """What a tensor depends on, most harmless first."""

    CONSTANT = 0
    STATIC_SHAPE = 1  # shapes that are known
    DYNAMIC_SHAPE = 2  # shapes that are free
    DATA = 3  # the model's inputs


@dataclass
class _Graph:
    """A graph being walked: what is known of each tensor so far."""

    opset: int
    int8: bool
    table: OperatorTable
    tensorrt: str
    types: dict[str, int]
    shapes: dict[str, tuple[int | None, ...]]  # None for a free dimension
    origins: dict[str, Origin]
    constants: dict[str, TensorProto]

    @property
    def version(self) -> str:
        return f"TensorRT {self.table.tensorrt}"


@dataclass(frozen=True)
class _Node:
    """A node with what the rules ask of it."""

    proto: NodeProto
    schema: defs.OpSchema
    graph: _Graph

    @property
    def attributes(self) -> dict[str, Any]:
        return {a.name: onnx.helper.get_attribute_value(a) for a in self.proto.attribute}

    def input(self, name: str) -> str:
        """The tensor at the formal input `name`, "" where it is left out."""
        slots = [formal.name.lower() for formal in self.schema.inputs]
        slot = slots.index(name.lower()) if name.lower() in slots else len(self.proto.input)
        return self.proto.input[slot] if slot < len(self.proto.input) else ""

    def shape(self, slot: int) -> tuple[int | None, ...] | None:
        return self.graph.shapes.get(self.proto.input[slot]) if slot < len(self.proto.input) else None

    def type(self, slot: int) -> int:
        return self.graph.types.get(self.proto.input[slot], TensorProto.UNDEFINED)

    def origin(self, tensor: str) -> Origin:
        return self.graph.origins.get(tensor, Origin.DATA)

    def value(self, tensor: str) -> np.ndarray | None:
        constant = self.graph.constants.get(tensor)
        known = constant is not None and constant.data_location != TensorProto.EXTERNAL
        return numpy_helper.to_array(constant) if constant is not None and known else None


Finding = tuple[str, str] | tuple[str, str, Literal["error", "warning"]]  # reason, remedy, severity


def _check_nodes(model: ModelProto, table: OperatorTable, tensorrt: str, int8: bool) -> Iterator[Violation]:
    with suppress(onnx.shape_inference.InferenceError):  # the faults that it stumbles over are named below
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = _Graph(_opset(model), int8, table, tensorrt, {}, {}, {}, {})
    yield from _check_graph(model.graph, graph)


def _check_graph(proto: GraphProto, graph: _Graph) -> Iterator[Violation]:
    for value in (*proto.input, *proto.value_info, *proto.output):
        tensor = value.type.tensor_type
        graph.types[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            dims = tensor.shape.dim
            graph.shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
    for value in proto.input:
        graph.origins[value.name] = Origin.DATA
    for tensor in proto.initializer:
        _note_constant(graph, tensor.name, tensor)
    for node in proto.node:
        found = list(_check_node(node, graph))
        name = node.name or f"{node.op_type} -> {', '.join(node.output)}"
        for finding in found:
            yield Violation(name, node.op_type, *finding)
        for attribute in node.attribute:
            for body in (
                (attribute.g, *attribute.graphs)
                if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)
                else ()
            ):
                yield from _check_graph(body, graph)
        _note_outputs(node, graph)


def _note_constant(graph: _Graph, name: str, tensor: TensorProto) -> None:
    graph.types[name] = tensor.data_type
    graph.shapes[name] = tuple(tensor.dims)
    graph.origins[name] = Origin.CONSTANT
    graph.constants[name] = tensor


def _note_outputs(node: NodeProto, graph: _Graph) -> None:
    if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
        _note_constant(graph, node.output[0], node.attribute[0].t)
        return
    origin = max(
        (graph.origins.get(name, Origin.DATA) for name in node.input if name), default=Origin.CONSTANT
    )
    if node.op_type in ("Shape", "Size"):
        shape = graph.shapes.get(node.input[0])
        origin = Origin.DYNAMIC_SHAPE if shape is None or None in shape else Origin.STATIC_SHAPE
    if node.op_type.startswith("Random") or any(a.type == AttributeProto.GRAPH for a in node.attribute):
        origin = Origin.DATA
    if node.op_type in ("Identity", "Cast") and node.input[0] in graph.constants:
        graph.constants[node.output[0]] = graph.constants[node.input[0]]
    graph.origins.update(dict.fromkeys(node.output, origin))


def _check_node(proto: NodeProto, graph: _Graph) -> Iterator[Finding]:
    if proto.op_type == "NonMaxSuppression":
        yield (
            "NMS in the engine is experimental, or parses and then fails to build",
            "end the graph before it: edgeprune's agent does NMS on the device",
        )
        return
    if proto.domain not in STANDARD_DOMAINS or not defs.has(proto.op_type):
        yield (
            f"{proto.op_type} of domain {proto.domain!r} is no ONNX operator but needs a plugin",
            "export without it; for NMS plugins end the graph at boxes and scores",
        )
        return
    entry = graph.table.entries.get(proto.op_type)
    if entry is None or entry.value != "Y":
        said = "is not in the operator table of" if entry is None else "is not supported by"
        yield f"{proto.op_type} {said} {graph.version}", _replacement(proto.op_type)
        return
    try:
        schema = defs.get_schema(proto.op_type, graph.opset)
    except defs.SchemaError:
        yield (
            f"opset {graph.opset} has no {proto.op_type}",
            "export again with one of the exporter's own opsets",
        )
        return
    node = _Node(proto, schema, graph)
    yield from _check_types(node, entry)
    yield from _check_rank(node)
    if proto.op_type in QUANTISED and not graph.int8:
        yield "the device has no INT8 in hardware", "export in fp16"
    for pattern, rule in RESTRICTIONS:
        if re.search(pattern, entry.restrictions):
            yield from rule(node, entry)
    if proto.op_type == "Resize" and int(graph.tensorrt.split(".")[0]) < 10:
        yield from _constant_inputs(node, ("roi", "scales", "sizes"), "field reports: failures on TensorRT 8")


def _replacement(operator: str) -> str:
    replacements = {
        "Mod": "compute a - floor(a / b) * b, or fold it",
        "Reciprocal": "divide 1 by it",
        "LayerNormalization": "export with an opset below 17, which writes it out as arithmetic",
        "HardSwish": "export with opset 13, which writes it as HardSigmoid and Mul",
        "NonZero": "end the graph before it",
        "OneHot": "compare with a constant range",
        "GridSample": "sample with a fixed Resize, or outside the network",
    }
    return replacements.get(operator, "replace it in the network, or move it out of the graph")


def _check_types(node: _Node, entry: Entry) -> Iterator[Finding]:
    """Element types of the inputs that may be floats; shapes and indices are TensorRT's own business."""
    allowed = {c.type_param_str: c.allowed_type_strs for c in node.schema.type_constraints}
    int64 = "INT64" in node.graph.table.entries["Add"].types
    for slot, name in enumerate(node.proto.input):
        formal = node.schema.inputs[min(slot, len(node.schema.inputs) - 1)]
        kind = TYPE_NAMES.get(node.graph.types.get(name, TensorProto.UNDEFINED))
        if not name or kind is None or "tensor(float)" not in allowed.get(formal.type_str, ()):
            continue
        if node.origin(name) < Origin.DATA:
            continue
        if kind == "DOUBLE":
            yield f"{name} is DOUBLE; TensorRT computes in FP32", "export the network in float32", "warning"
            continue
        if kind == "INT64" and not int64 and node.proto.op_type in ARITHMETIC:
            yield (
                f"INT64 arithmetic on {name}; {node.graph.version} clamps INT64 to INT32",
                "compute in int32 or float32, or outside the graph",
            )
            continue
        if (
            kind == "UINT8"
            and node.graph.origins.get(name) is Origin.DATA
            and not node.graph.table.uint8_input
        ):
            continue  # named once, for the file
        if kind == "INT64" and not int64:
            kind = "INT32"  # how the parser reads it
        if kind not in entry.types and not (kind in ("INT8", "UINT8") and node.proto.op_type in QUANTISED):
            yield (
                f"{name} is {kind}; {node.graph.version} takes {', '.join(sorted(entry.types))}",
                f"cast to {'FP32' if 'FP32' in entry.types else sorted(entry.types)[0]} before it",
            )


def _check_rank(node: _Node) -> Iterator[Finding]:
    for name in (*node.proto.input, *node.proto.output):
        shape = node.graph.shapes.get(name)
        if shape is not None and len(shape) > MAX_RANK:
            yield f"{name} has {len(shape)} dimensions; TensorRT has at most {MAX_RANK}", "merge dimensions"
    shape = node.shape(0)
    volumetric = (
        "Conv",
        "ConvTranspose",
        "AveragePool",
        "MaxPool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Resize",
        "BatchNormalization",
        "InstanceNormalization",
    )
    if shape is not None and len(shape) == 5 and node.proto.op_type in volumetric:
        yield (
            "5-D tensor: volumetric kernels are few in FP16 and INT8, and a DLA takes 4-D tensors only",
            "make it 2-D, with 4-D tensors, if the network allows",
            "warning",
        )


def _constant_inputs(node: _Node, names: Iterable[str], why: str) -> Iterator[Finding]:
    for name in names:
        tensor = node.input(name)
        if not tensor:
            continue
        origin = node.origin(tensor)
        if origin is Origin.STATIC_SHAPE:
            yield (
                f"{name} is computed from a shape that is known: {why}",
                "fold the graph with onnxslim",
                "warning",
            )
        elif origin is not Origin.CONSTANT:
            yield f"{name} is computed at run time: {why}", "export with a static shape and a fixed value"


def _needs_constants(node: _Node, entry: Entry) -> Iterator[Finding]:
    for sentence in re.split(r"(?<=\.) ", entry.restrictions):
        if not re.search(r"initi?ali[sz]er|initailizer|constant", sentence):
            continue
        names = [
            f.name for f in node.schema.inputs if re.search(rf"(?<!\w){re.escape(f.name)}(?!\w)", sentence)
        ]
        if sentence.startswith("Floating point") and node.type(0) not in (
            TensorProto.FLOAT,
            TensorProto.FLOAT16,
        ):
            continue
        yield from _constant_inputs(node, names, f"{node.graph.version}: {sentence.rstrip('.')}")


def _zero_point(node: _Node, _: Entry) -> Iterator[Finding]:
    tensor = node.input("x_zero_point") or node.input("y_zero_point")
    value = node.value(tensor)
    if tensor and (value is None or np.any(value.astype(np.float32) != 0)):
        yield "the zero point is not 0", "quantise symmetrically"


def _spatial(least: int, most: int) -> Callable[[_Node, Entry], Iterator[Finding]]:
    def rule(node: _Node, _: Entry) -> Iterator[Finding]:
        shape = node.shape(0)
        if shape is not None and not least <= len(shape) - 2 <= most:
            yield (
                f"{len(shape)}-D tensor; {node.graph.version} takes {least + 2}-D"
                f"{f' to {most + 2}-D' if most > least else ''}",
                "reshape it, or write it with 4-D tensors",
            )

    return rule


def _attribute(name: str, allowed: Iterable[Any]) -> Callable[[_Node, Entry], Iterator[Finding]]:
    def rule(node: _Node, _: Entry) -> Iterator[Finding]:
        value = node.attributes.get(name)
        value = value.decode() if isinstance(value, bytes) else value
        if value is not None and value not in allowed:
            choices = ", ".join(str(choice) for choice in allowed)
            yield (
                f"{name} {value}; {node.graph.version} takes {choices}",
                f"use {name} {choices}",
            )

    return rule


def _no_dilation(node: _Node, _: Entry) -> Iterator[Finding]:
    if any(dilation != 1 for dilation in node.attributes.get("dilations", ())):
        yield "the pooling is dilated", "pool without dilation"


def _only_first_output(node: _Node, _: Entry) -> Iterator[Finding]:
    if any(node.proto.output[1:]):
        yield (
            f"more than its first output is used ({', '.join(node.proto.output[1:])})",
            "use the first output alone",
        )


def _einsum(node: _Node, _: Entry) -> Iterator[Finding]:
    equation = node.attributes["equation"].decode()
    terms = re.split(r",|->", equation.replace(" ", ""))
    if "..." in equation or any(len(set(term)) < len(term) for term in terms):
        yield f"equation {equation} has an ellipsis or a diagonal", "name every dimension once a term"


def _static_input(node: _Node, _: Entry) -> Iterator[Finding]:
    shape = node.shape(0)
    if shape is None or None in shape:
        yield "its input's shape is free", "export with a static shape"


def _small_k(node: _Node, _: Entry) -> Iterator[Finding]:
    value = node.value(node.input("K"))
    if value is not None and value.max(initial=0) >= 3840:
        yield f"K {value.max()}; {node.graph.version} takes less than 3840", "choose fewer"


# A phrase of a published restriction, and what it forbids. What a file cannot show is left to the builder.
RESTRICTIONS: list[tuple[str, Callable[[_Node, Entry], Iterator[Finding]]]] = [
    (r"initi?ali[sz]er|initailizer|constant", _needs_constants),
    (r"zero_point must be", _zero_point),
    (r"2D or 3D \w+ only", _spatial(2, 3)),
    (r"must be 4D", _spatial(2, 2)),
    (r"1D or 2D spatial", _spatial(1, 2)),
    (r"rank must be >=3 & <=5", _spatial(1, 3)),
    (r"Indices output tensor unsupported|Only the first output", _only_first_output),
    (r"dilations must be", _no_dilation),
    (
        r"resize transformation modes",
        _attribute(
            "coordinate_transformation_mode",
            ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
        ),
    ),
    (r"resize modes: nearest, linear", _attribute("mode", ("nearest", "linear"))),
    (
        r"nearest modes",
        _attribute("nearest_mode", ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
    ),
    (r"ratio policy: stretch", _attribute("keep_aspect_ratio_policy", ("stretch",))),
    (r"Antialiasing is not", _attribute("antialias", (0,))),
    (r"Ellipsis and diagonal", _einsum),
    (r"Dynamic input shapes are|input must have static", _static_input),
    (r"sorted must be 1", _attribute("sorted", (1,))),
    (r"less than 3840", _small_k),
    (r"reduction (other than none )?is not", _attribute("reduction", ("none",))),
    (r"input_forget attribute", _attribute("input_forget", (0,))),
    (r"layout attribute", _attribute("layout", (0,))),
]


def _opset(model: ModelProto) -> int:
    return next((entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), 1)


def _all_initializers(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            for body in (
                (attribute.g, *attribute.graphs) if attribute.HasField("g") or attribute.graphs else ()
            ):
                yield from _all_initializers(body)
