"""The engine's layer times, mapped back to the detector's layers by way of the ONNX file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.records import Device, LayerTime
from edgeprune.deploy.targets import load_target

REMOVED = 0.05  # share of a layer's multiplications below which noise hides what they were worth
REALISED = 0.25  # of the share of multiplications removed that must show in a layer's time to call it faster
SMALL_MS = 0.02  # kernels of this size are mostly launch and call
# A Jetson Nano does 18 MACs in the time that its memory takes for a float32 (118e9 and 6.4e9 a second; twice as many
# of either in float16), a CPU core with AVX2 about as many: layers with fewer wait for the memory.
COMPUTE_BOUND = 16

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ACTIVATIONS = ("LeakyRelu", "Relu", "Sigmoid", "Clip", "HardSwish", "BatchNormalization")
_BLOCKED = re.compile(r"_nchwc$")  # ONNX Runtime's name for the blocked layout


def layer_times(model_path: Path, times_ms: Mapping[str, float]) -> tuple[LayerTime, ...]:
    """Time of each layer with weights, in the order of the graph; none where no kernel can be told to be a layer's.

    An engine's layer is named after the nodes that it fuses (TensorRT: ``a + b``) or after the tensor that it
    gives (ONNX Runtime). Nodes bear the names of detector layers, because the exporter names them so.

    Raises:
        BenchmarkError: If the ONNX file cannot be read.
    """
    try:
        model = onnx.load(model_path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BenchmarkError(f"{model_path} cannot be read: {error}") from error
    owners = _owners(model)
    found: dict[str, float] = {}
    for name, time_ms in times_ms.items():
        tokens = (_BLOCKED.sub("", token) for token in re.split(r"[\s+(),|]+", name))
        layers = dict.fromkeys(owners[token] for token in tokens if token in owners)
        if layers:
            # A kernel that computes several layers counts for the first; the others are "fused elsewhere".
            layer = next(iter(layers))
            found[layer] = found.get(layer, 0.0) + time_ms
    if not found:
        return ()
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return tuple(
        LayerTime(node.name, found.get(node.name), shape[1], shape[0], _macs_per_value(node, shape))
        for node in model.graph.node
        if node.op_type in _WEIGHTED and len(shape := shapes.get(node.input[1], ())) == 4
    )


def _macs_per_value(node: onnx.NodeProto, shape: tuple[int, ...]) -> float:
    """Arithmetic intensity of a convolution: MACs and activations for one position of its coarser side."""
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    coarse, fine = shape[0], shape[1] * attributes.get("group", 1)  # channels out and in; transposed, in, out
    return float(prod(shape) / (coarse + fine * prod(attributes.get("strides", []))))


def _owners(model: onnx.ModelProto) -> dict[str, str]:
    """Node and tensor names -> the weighted layer that a kernel of this name computes.

    An activation belongs to the layer before it: engines fuse the two, and name the kernel after either.
    """
    owners: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in _WEIGHTED:
            owner = node.name
        elif len([name for name in node.input if name in owners]) == 1 and node.op_type in _ACTIVATIONS:
            owner = next(owners[name] for name in node.input if name in owners)
        else:
            continue
        owners[node.name] = owner
        owners.update(dict.fromkeys(node.output, owner))
    return owners


@dataclass(frozen=True)
class NotFaster:
    """A layer that lost channels and no time, and why that may be."""

    layer: str
    channels: str  # in x out, before and after: "24 x 58 to 20 x 50"
    before_ms: float | None
    after_ms: float | None
    cause: str


def channel_block(device: Device) -> int:
    """How many channels the device's kernels compute at once: a count between two multiples costs the next one.

    ONNX Runtime's take 8 on x86, and 16 with AVX-512, which is also assumed of a processor that did not say.
    """
    if not device.on_gpu and device.details.get("machine") == "x86_64":
        return 8 if device.details.get("avx512") is False else 16
    return load_target(device.target).channel_multiple


def not_faster(before: Sequence[LayerTime], after: Sequence[LayerTime], block: int) -> list[NotFaster]:
    """Layers that are clearly narrower than in the unpruned detector, and took about the same time.

    Args:
        block: the device's `channel_block`.
    """
    originals = {layer.layer: layer for layer in before}
    found = []
    for layer in after:
        original = originals.get(layer.layer)
        if original is None or _removed(original, layer) < REMOVED or _faster(original, layer):
            continue
        channels, cause = f"{original.shape} to {layer.shape}", _cause(original, layer, block)
        found.append(NotFaster(layer.layer, channels, original.time_ms, layer.time_ms, cause))
    return found


def _removed(before: LayerTime, after: LayerTime) -> float:
    """Share of the multiplications."""
    return 1 - after.in_channels * after.out_channels / (before.in_channels * before.out_channels)


def _faster(before: LayerTime, after: LayerTime) -> bool:
    if before.time_ms is None or after.time_ms is None:
        return False
    return after.time_ms < before.time_ms * (1 - REALISED * _removed(before, after))


def _cause(before: LayerTime, after: LayerTime, block: int) -> str:
    if before.time_ms is None or after.time_ms is None:
        return "fused elsewhere: no kernel of its own"
    sides = ((before.in_channels, after.in_channels), (before.out_channels, after.out_channels))
    odd = sorted({now for was, now in sides if now != was and now % block})
    causes = []
    if odd:
        causes.append(f"misaligned: {' and '.join(map(str, odd))} channels, no multiple of {block}")
    if after.macs_per_value < COMPUTE_BOUND:
        causes.append(f"memory-bound: {after.macs_per_value:.2g} MACs a value")
    if after.time_ms < SMALL_MS:
        causes.append("small: mostly the cost of a call")
    return "; ".join(causes) or "no cause found"


@dataclass(frozen=True)
class Shortfall:
    """A layer that takes longer than its share of the multiplications left would, and why that may be."""

    layer: str
    channels: str  # as in NotFaster
    before_ms: float
    after_ms: float
    promised_ms: float  # before_ms, scaled by the multiplications that are left
    cause: str

    @property
    def lost_ms(self) -> float:
        return self.after_ms - self.promised_ms


def shortfalls(before: Sequence[LayerTime], after: Sequence[LayerTime], block: int) -> list[Shortfall]:
    """Where the speed-up that the MACs promise is lost, the layer that loses most first; both need a time.

    Args:
        block: the device's `channel_block`.
    """
    originals = {layer.layer: layer for layer in before}
    found = []
    for layer in after:
        original = originals.get(layer.layer)
        if original is None or original.time_ms is None or layer.time_ms is None:
            continue
        promised_ms = original.time_ms * (1 - _removed(original, layer))
        if layer.time_ms > promised_ms:
            channels, cause = f"{original.shape} to {layer.shape}", _cause(original, layer, block)
            found.append(
                Shortfall(layer.layer, channels, original.time_ms, layer.time_ms, promised_ms, cause)
            )
    return sorted(found, key=lambda layer: -layer.lost_ms)
