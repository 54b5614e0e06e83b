"""Will float16 hold this network's numbers? Activation ranges on real images, before deployment."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

from edgeprune.data.dataset import Dataset
from edgeprune.export.errors import ExportError
from edgeprune.export.float16 import LARGEST
from edgeprune.export.runtime import OnnxModel, inputs_of


@dataclass(frozen=True)
class LayerRange:
    """The largest absolute value that a layer computed, or holds as weights."""

    layer: str
    operator: str  # "weights" for weights
    largest: float  # inf where even float32 overflowed

    @property
    def headroom(self) -> float:
        """How many times larger float16 could hold; below 1 it overflows."""
        return LARGEST / self.largest if self.largest else float("inf")


def float16_ranges(path: Path, dataset: Dataset, *, images: int = 16) -> tuple[LayerRange, ...]:
    """Measure every layer of an edgeprune export in float32 on real images, least headroom first.

    Raises:
        ExportError: If the file cannot be run, or the data set is empty.
    """
    if not dataset.samples:
        raise ExportError(f"{dataset.path} has no image: activation ranges need real ones")
    model = onnx.load(path)
    outputs = {value.name for value in model.graph.output}
    producers = {name: node for node in model.graph.node for name in node.output}
    floats = [
        value
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name in producers
    ]
    model.graph.output.extend(value for value in floats if value.name not in outputs)
    names = [value.name for value in model.graph.output]

    largest = dict.fromkeys(names, 0.0)
    runner = OnnxModel(path, model)
    for _, inputs, _ in inputs_of(runner, dataset, images):
        for name, array in zip(names, runner.run_all(names, inputs), strict=True):
            seen = np.abs(array).max(initial=0)
            largest[name] = max(largest[name], float(seen) if np.isfinite(seen) else float("inf"))
    activations = [
        LayerRange(producers[name].name, producers[name].op_type, value) for name, value in largest.items()
    ]
    return tuple(sorted([*activations, *_weights(model)], key=lambda found: found.headroom))


def _weights(model: ModelProto) -> Iterator[LayerRange]:
    readers = {name: node.name for node in model.graph.node for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name in readers:
            largest = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))
            yield LayerRange(readers[tensor.name], "weights", largest)
