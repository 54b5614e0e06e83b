"""Type a model in float16, for TensorRT versions that take precision from the file alone (11 and later)."""

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from edgeprune.export.errors import ExportError

LARGEST = 65504.0  # float16's largest finite value
HALF = "_half"  # ends the name of a float16 version of a tensor
ALWAYS_FLOAT32 = {"Resize": (1, 2)}  # input positions whose type ONNX fixes: roi and scales


def to_float16(model: ModelProto) -> ModelProto:
    """Type the network in float16; inputs, outputs, normalisation and decoding stay in float32.

    Decoding stays because float16 counts pixels in steps of 0.25 above 256.

    Args:
        model: with nodes named by `tidy` and shapes inferred.

    Raises:
        ExportError: If a weight overflows float16; the layers are named.
    """
    graph = model.graph
    tensors = (*graph.input, *graph.value_info, *graph.output)
    floats = {value.name for value in tensors if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    single_inputs = {name for node in graph.node if not _in_network(node) for name in node.input}
    wanted_single = single_inputs | {output.name for output in graph.output}

    nodes: list[NodeProto] = []
    half_weights: dict[str, TensorProto] = {}
    halved: set[str] = set()  # float32 tensors that have a float16 version

    def cast(source: str, result: str, beside: NodeProto, to: int) -> None:
        name = f"{beside.name}/Cast/{sum(node.op_type == 'Cast' for node in nodes)}"
        nodes.append(helper.make_node("Cast", [source], [result], name, to=to))

    for original in graph.node:
        node = NodeProto()
        node.CopyFrom(original)
        if _in_network(node):
            for slot, name in enumerate(node.input):
                if slot in ALWAYS_FLOAT32.get(node.op_type, ()) or name not in floats | weights.keys():
                    continue
                node.input[slot] = _half(name)
                if name in weights and name not in half_weights:
                    half_weights[name] = _half_tensor(weights[name])
                elif name in floats and name not in halved:
                    cast(name, _half(name), node, TensorProto.FLOAT16)
                    halved.add(name)
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = TensorProto.FLOAT16
            outputs = [name for name in node.output if name in floats]
            node.output[:] = [_half(name) if name in floats else name for name in node.output]
            nodes.append(node)
            halved.update(outputs)
            for name in sorted(wanted_single.intersection(outputs)):
                cast(_half(name), name, node, TensorProto.FLOAT)
        else:
            nodes.append(node)

    typed = ModelProto()
    typed.CopyFrom(model)
    kept = [
        tensor
        for tensor in graph.initializer
        if tensor.name not in half_weights or tensor.name in single_inputs
    ]
    for field, values in (
        ("node", nodes),
        ("initializer", [*kept, *half_weights.values()]),
        ("value_info", []),
    ):
        typed.graph.ClearField(field)
        getattr(typed.graph, field).extend(values)
    return shape_inference.infer_shapes(typed, strict_mode=True, data_prop=True)


def _in_network(node: NodeProto) -> bool:
    return not node.name.startswith(("input/", "decode/"))


def _half(name: str) -> str:
    return name + HALF


def _half_tensor(tensor: TensorProto) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    largest = np.abs(values).max(initial=0)
    if largest > LARGEST:
        raise ExportError(
            f"{tensor.name} reaches {largest:,.0f}, above float16's {LARGEST:,.0f}: "
            "export in fp32, or scale the layer"
        )
    return numpy_helper.from_array(values.astype(np.float16), _half(tensor.name))
