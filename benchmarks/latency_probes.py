"""Convolutions side by side in one ONNX file, so that one profile of one engine times many of them.

Each has a small producer of its own and writes to a mean: nothing is shared that an engine could merge or
fold, and its input was written just before it runs, as in a network.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.data.files import write_bytes
from edgeprune.deploy.records import Profile
from edgeprune.export.float16 import to_float16
from edgeprune.export.model import MAX_IR_VERSION
from edgeprune.pruning.latency import DEPTHWISE, LayerKind

WEIGHT = 0.01  # of all weights: no kernel's time depends on it, and float16 holds it
QUANTILE = 0.1  # of a kernel's runs: other work on the machine makes runs longer, never shorter
REFERENCES = 4  # places of the reference kernel in a file
REFERENCE_SIZE = 40
_OWNER = re.compile(r"(?<![\w.])((?:reference|probe)\d+)(?=/)")

_ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "relu": ("Relu", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.1}),
    "sigmoid": ("Sigmoid", {}),
}


@dataclass(frozen=True)
class Probe:
    """One kernel to be timed."""

    kind: LayerKind
    in_channels: int
    out_channels: int  # as `in_channels` where the kind has one axis

    @property
    def weight_shape(self) -> tuple[int, ...]:
        groups = self.in_channels if self.kind.groups == DEPTHWISE else self.kind.groups
        if self.kind.op == "conv_transpose":
            return (self.in_channels, self.out_channels // groups, *self.kind.kernel)
        return (self.out_channels, self.in_channels // groups, *self.kind.kernel)

    @property
    def weight_bytes(self) -> int:
        return 4 * int(np.prod(self.weight_shape))


REFERENCE_PROBE = Probe(
    LayerKind("conv", (REFERENCE_SIZE, REFERENCE_SIZE), (3, 3), padding=(1, 1), activation="relu"), 64, 64
)


def write_probes(probes: Sequence[Probe], path: Path, *, opset: int, half: bool) -> None:
    """Write a file with all of `probes`, which share one input size, and the reference kernel among them.

    Args:
        half: typed in float16, for engines that take their precision from the file.
    """
    [(height, width)] = {probe.kind.input for probe in probes}
    graph = _Graph()
    scale = [1.0, 1.0, REFERENCE_SIZE / height, REFERENCE_SIZE / width]
    graph.add(
        "Resize", ["images", "", graph.constant(np.array(scale, np.float32))], "resized", mode="nearest"
    )
    references = iter(_references())
    means = []
    for index, probe in enumerate(probes):
        if index % (len(probes) // REFERENCES + 1) == 0:
            means.append(_chain(graph, next(references), "resized", REFERENCE_PROBE))
        means.append(_chain(graph, _name(index), "images", probe))
    means += [_chain(graph, name, "resized", REFERENCE_PROBE) for name in references]
    graph.add("Concat", means, "means", axis=0)
    count = len(means)
    graph.add("Reshape", ["means", graph.constant(np.array([1, count], np.int64))], "scores")
    graph.add("Reshape", ["means", graph.constant(np.array([1, count, 1], np.int64))], "column")
    graph.add("Concat", ["column"] * 4, "boxes", axis=2)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "probes",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, height, width))],
            [
                helper.make_tensor_value_info("boxes", TensorProto.FLOAT, (1, count, 4)),
                helper.make_tensor_value_info("scores", TensorProto.FLOAT, (1, count)),
            ],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=MAX_IR_VERSION,
    )
    write_bytes(path, (to_float16(model) if half else model).SerializeToString())


@dataclass(frozen=True)
class ProbeTimes:
    """What one profile says of a file of probes."""

    reference_ms: float  # the reference kernel undisturbed: the fastest of its places, lower decile
    times_ms: tuple[tuple[float, ...], ...]  # of each probe, one value a run


def probe_times(profile: Profile, count: int) -> ProbeTimes:
    """The times of `count` probes, in their order.

    A kernel is named after a node or after the tensor that it writes, and all those of one probe begin with
    its name. Copies from one layout to another are left out: they depend on the neighbours.

    Raises:
        BenchmarkError: If the engine names no kernel after one of them.
    """
    found: dict[str, np.ndarray] = {}
    for name, times_ms in profile.times_ms.items():
        owners = _OWNER.findall(name)
        if owners and not name.lower().startswith(("reformatting", "reorder")):
            found[owners[0]] = found.get(owners[0], 0.0) + np.array(times_ms)
    names = [*_references(), *map(_name, range(count))]
    missing = sum(name not in found for name in names)
    if missing:
        raise BenchmarkError(
            f"{missing} of {len(names)} convolutions have no kernel of their own in the engine's profile: "
            "its kernels cannot be timed one by one"
        )
    return ProbeTimes(
        min(float(np.quantile(found[name], QUANTILE)) for name in _references()),
        tuple(tuple(found[name].tolist()) for name in map(_name, range(count))),
    )


def _references() -> list[str]:
    return [f"reference{index}" for index in range(REFERENCES)]


def _name(index: int) -> str:
    return f"probe{index}"


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def constant(self, value: np.ndarray) -> str:
        name = f"constant{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, shape: tuple[int, ...]) -> str:
        return self.constant(np.full(shape, WEIGHT, np.float32))

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output


def _chain(graph: _Graph, name: str, source: str, probe: Probe) -> str:
    """Producer, convolution with activation, mean; only the second bears the probe's name."""
    made = graph.add("Conv", [source, graph.weight((probe.in_channels, 3, 1, 1))], f"producer_of_{name}")
    kind = probe.kind
    result = graph.add(
        "ConvTranspose" if kind.op == "conv_transpose" else "Conv",
        [made, graph.weight(probe.weight_shape), graph.weight((probe.out_channels,))],
        f"{name}/conv",
        strides=kind.stride,
        pads=kind.padding * 2,
        dilations=kind.dilation,
        kernel_shape=kind.kernel,
        group=probe.in_channels if kind.groups == DEPTHWISE else kind.groups,
    )
    written = _activate(graph, name, result, kind.activation)
    return graph.add("ReduceMean", [written], f"mean_of_{name}", axes=[1, 2, 3], keepdims=0)


def _activate(graph: _Graph, name: str, value: str, activation: str) -> str:
    if activation == "silu":
        gate = graph.add("Sigmoid", [value], f"{name}/sigmoid")
        return graph.add("Mul", [value, gate], f"{name}/silu")
    if activation == "hardswish":  # its own operator is not in every target's opset and TensorRT
        gate = graph.add("HardSigmoid", [value], f"{name}/hardsigmoid", alpha=1 / 6, beta=0.5)
        return graph.add("Mul", [value, gate], f"{name}/hardswish")
    if activation == "hardtanh":
        limits = [graph.constant(np.array(limit, np.float32)) for limit in (0.0, 6.0)]
        return graph.add("Clip", [value, *limits], f"{name}/clip")
    if activation:
        op, attributes = _ACTIVATIONS[activation]
        return graph.add(op, [value], f"{name}/{activation}", **attributes)
    return value
