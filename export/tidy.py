"""Make a traced ONNX graph clean: folded, static, narrowed, and with nodes named after the detector's layers.

TensorRT's layer profile prints node names, so a name is what ties a measured time to a layer of the network:
a convolution is called like its layer (``stem.conv``), a node without weights like the layer that feeds it
(``stem.conv/LeakyRelu``), and a node of the decoding ``decode/...``.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import onnx
import onnxslim
from onnx import ModelProto, NodeProto, TensorProto, defs, numpy_helper

from edgeprune.export.errors import ExportError

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
INT32 = np.iinfo(np.int32)


def tidy(model: ModelProto, network_scope: str) -> ModelProto:
    """Clean a graph that `torch.onnx.export` traced from a module with the attribute `network_scope`.

    Args:
        model: traced without batch norm folding, so that initialisers bear their parameters' names.
        network_scope: name of the attribute that holds the network; everything else in the graph is decoding.

    Returns:
        A new model with the same function.
    """
    tidied = ModelProto()
    tidied.CopyFrom(model)
    fold_batch_norm(tidied.graph)
    tidied = onnxslim.slim(tidied)
    narrow_int64(tidied)
    _name_nodes(tidied.graph, network_scope)
    drop_unused_initializers(tidied.graph)
    tidied.graph.ClearField("value_info")  # may name tensors that are gone
    return onnx.shape_inference.infer_shapes(tidied, strict_mode=True, data_prop=True)


def free_batch(model: ModelProto, traced: int) -> ModelProto | None:
    """Let the first dimension of a static model be any number, named "batch".

    A network traced with a free batch computes each Reshape's target from the input's shape; here the target
    stays a constant whose first entry copies the input's batch.

    Args:
        traced: the batch it was traced with, a number that no other first dimension of an activation has.

    Returns:
        A new model; None if another node than Reshape has the batch built in.
    """
    free = ModelProto()
    free.CopyFrom(model)
    targets = {tensor.name: tensor for tensor in free.graph.initializer}
    for node in free.graph.node:
        if node.op_type == "Reshape" and node.input[1] in targets:
            target = numpy_helper.to_array(targets[node.input[1]]).copy()
            if target[0] == traced:
                target[0] = 0  # ONNX: copy this dimension from the input
                targets[node.input[1]].CopyFrom(numpy_helper.from_array(target, node.input[1]))
    for value in (*free.graph.input, *free.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    free.graph.ClearField("value_info")
    try:
        free = onnx.shape_inference.infer_shapes(free, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return None
    if any(value.type.tensor_type.shape.dim[0].dim_value == traced for value in _activations(free.graph)):
        return None
    return free if _outputs_follow_input(free.graph) else None


def check_free_batch(model: ModelProto) -> None:
    """Accept a model that was traced with a free batch.

    Raises:
        ExportError: If an output has the traced batch built in.
    """
    if not _outputs_follow_input(model.graph):
        raise ExportError("the batch cannot be left free: an output does not depend on the images' batch")


def _activations(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    return [value for value in graph.value_info if value.type.tensor_type.shape.dim]


def _outputs_follow_input(graph: onnx.GraphProto) -> bool:
    """Whether every output is computed from the input (a constant one has a batch of its own)."""
    reached = {value.name for value in graph.input}
    for node in graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
    free = all(output.type.tensor_type.shape.dim[0].dim_param for output in graph.output)
    return free and all(output.name in reached for output in graph.output)


def fold_batch_norm(graph: onnx.GraphProto) -> None:
    """Fold each batch norm that alone follows a convolution into it; the convolution keeps its names."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    uses = count_uses(graph)
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        conv = producers.get(norm.input[0])
        constants = all(name in weights for name in norm.input[1:])
        if conv is None or conv.op_type != "Conv" or uses[norm.input[0]] != 1 or not constants:
            continue
        if not all(name in weights and uses[name] == 1 for name in conv.input[1:]):
            continue
        gamma, beta, mean, variance = (_float64(weights[name]) for name in norm.input[1:5])
        epsilon = next((attribute.f for attribute in norm.attribute if attribute.name == "epsilon"), 1e-5)
        scale = gamma / np.sqrt(variance + epsilon)  # (C,)
        kernel = weights[conv.input[1]]  # (C, C_in / groups, kh, kw)
        kernel.CopyFrom(_like(kernel, _float64(kernel) * scale.reshape(-1, *[1] * (len(kernel.dims) - 1))))
        if len(conv.input) == 2:
            name = f"{kernel.name.removesuffix('.weight')}.bias"
            graph.initializer.append(numpy_helper.from_array(np.zeros(len(scale), np.float32), name))
            conv.input.append(name)
            weights[name] = graph.initializer[-1]
        bias = weights[conv.input[2]]
        bias.CopyFrom(_like(bias, (_float64(bias) - mean) * scale + beta))
        conv.output[0] = norm.output[0]
        graph.node.remove(norm)


def narrow_int64(model: ModelProto) -> None:
    """Replace int64 initialisers by int32 ones wherever ONNX allows both and every value fits.

    TensorRT before 10 has no INT64 and warns about each such weight. A Slice end of 2**63 - 1 means "to the
    end" and becomes 2**31 - 1, which means the same.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    graph = model.graph
    constants = {t.name: t for t in graph.initializer if t.data_type == TensorProto.INT64}
    narrowed: dict[str, str] = {}
    for node in graph.node:
        for slots in _int64_slots(node, opset):
            tensors = [constants.get(node.input[slot]) for slot in slots]
            if any(tensor is None for tensor in tensors):
                continue
            arrays = [numpy_helper.to_array(tensor) for tensor in tensors if tensor is not None]
            if node.op_type != "Slice" and any(
                np.any(a < INT32.min) or np.any(a > INT32.max) for a in arrays
            ):
                continue
            for slot, array in zip(slots, arrays, strict=True):
                name = node.input[slot]
                if name not in narrowed:
                    narrowed[name] = f"{name}_int32"
                    clipped = array.clip(INT32.min, INT32.max).astype(np.int32)
                    graph.initializer.append(numpy_helper.from_array(clipped, narrowed[name]))
                node.input[slot] = narrowed[name]
    drop_unused_initializers(graph)


def _int64_slots(node: NodeProto, opset: int) -> list[list[int]]:
    """Groups of input positions that share an integer type which may be int32 and which no output shares."""
    if node.domain not in ("", "ai.onnx"):
        return []
    schema = defs.get_schema(node.op_type, opset)
    allowed = {
        constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints
    }
    groups: dict[str, list[int]] = {}
    for slot, name in enumerate(node.input):
        formal = schema.inputs[min(slot, len(schema.inputs) - 1)]
        if name:
            groups.setdefault(formal.type_str, []).append(slot)
    outputs = {formal.type_str for formal in schema.outputs}
    indices = {"tensor(int32)", "tensor(int64)"}
    return [
        slots
        for kind, slots in groups.items()
        if set(allowed.get(kind, ())) == indices and kind not in outputs
    ]


def _name_nodes(graph: onnx.GraphProto, network_scope: str) -> None:
    """Name nodes after layers, and weights after parameters (without the wrapper's prefix)."""
    prefix = f"{network_scope}."
    renamed = {t.name: t.name.removeprefix(prefix) for t in graph.initializer if t.name.startswith(prefix)}
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    layer_of: dict[str, str] = {}  # tensor name -> layer that produced it
    taken: Counter[str] = Counter()
    for node in graph.node:
        in_network = node.name.startswith(f"/{network_scope}/")
        for slot, name in enumerate(node.input):
            node.input[slot] = renamed.get(name, name)
        if node.op_type in WEIGHTED and node.input[1].endswith(".weight"):
            layer = name = node.input[1].removesuffix(".weight")
        else:
            layer = next((layer_of[source] for source in node.input if source in layer_of), "input")
            layer = layer if in_network or layer == "input" else "decode"
            name = f"{layer}/{node.op_type}"
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        layer_of.update(dict.fromkeys(node.output, layer))


def drop_unused_initializers(graph: onnx.GraphProto) -> None:
    """Remove initialisers that no node reads and that are no output."""
    uses = count_uses(graph)
    for tensor in [tensor for tensor in graph.initializer if not uses[tensor.name]]:
        graph.initializer.remove(tensor)


def count_uses(graph: onnx.GraphProto) -> Counter[str]:
    """How often each tensor is read, by nodes or as an output of the graph."""
    names: Iterable[str] = (name for node in graph.node for name in node.input)
    return Counter(names) + Counter(output.name for output in graph.output)


def _float64(tensor: TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor).astype(np.float64)


def _like(tensor: TensorProto, values: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(values.astype(numpy_helper.to_array(tensor).dtype), tensor.name)
