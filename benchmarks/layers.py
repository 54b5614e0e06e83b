"""The engine's layer times, mapped back to the detector's layers by way of the ONNX file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.records import LayerTime

REALISED = 0.25  # of the share of multiplications removed that must show in a layer's time to call it faster
SMALL_MS = 0.02  # kernels of this size are mostly launch and call
# ONNX Runtime's CPU kernels work on blocks of 8 channels (16 with AVX-512), TensorRT's in fp16 on 8 too.
CHANNEL_BLOCK = 8

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ACTIVATIONS = ("LeakyRelu", "Relu", "Sigmoid", "Clip", "HardSwish", "BatchNormalization")
_BLOCKED = re.compile(r"_nchwc$")  # ONNX Runtime's name for the blocked layout


def layer_times(model_path: Path, times_ms: Mapping[str, float]) -> tuple[LayerTime, ...]:
    """Time of each layer with weights, in the order of the graph.

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
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return tuple(
        LayerTime(node.name, found.get(node.name), shape[1], shape[0])
        for node in model.graph.node
        if node.op_type in _WEIGHTED and len(shape := shapes.get(node.input[1], ())) == 4
    )


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


def not_faster(before: Sequence[LayerTime], after: Sequence[LayerTime]) -> list[NotFaster]:
    """Layers that are narrower than in the unpruned detector, and took about the same time."""
    originals = {layer.layer: layer for layer in before}
    found = []
    for layer in after:
        original = originals.get(layer.layer)
        if original is None or layer.shape == original.shape:
            continue
        if _faster(original, layer):
            continue
        channels = f"{original.shape} to {layer.shape}"
        found.append(
            NotFaster(layer.layer, channels, original.time_ms, layer.time_ms, _cause(original, layer))
        )
    return found


def _faster(before: LayerTime, after: LayerTime) -> bool:
    if before.time_ms is None or after.time_ms is None:
        return False
    removed = 1 - after.in_channels * after.out_channels / (before.in_channels * before.out_channels)
    return after.time_ms < before.time_ms * (1 - REALISED * removed)


def _cause(before: LayerTime, after: LayerTime) -> str:
    if before.time_ms is None or after.time_ms is None:
        return "fused elsewhere: no kernel of its own"
    sides = [(before.out_channels, after.out_channels)]
    if not after.depthwise:
        sides.append((before.in_channels, after.in_channels))
    odd = sorted({now for was, now in sides if now != was and now % CHANNEL_BLOCK})
    causes = []
    if odd:
        causes.append(f"misaligned: {' and '.join(map(str, odd))} channels, no multiple of {CHANNEL_BLOCK}")
    if after.depthwise:
        causes.append("memory-bound: depthwise")
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


def shortfalls(before: Sequence[LayerTime], after: Sequence[LayerTime]) -> list[Shortfall]:
    """Where the speed-up that the MACs promise is lost, the layer that loses most first; both need a time."""
    originals = {layer.layer: layer for layer in before}
    found = []
    for layer in after:
        original = originals.get(layer.layer)
        if original is None or original.time_ms is None or layer.time_ms is None:
            continue
        left = layer.in_channels * layer.out_channels / (original.in_channels * original.out_channels)
        promised_ms = original.time_ms * left
        if layer.time_ms > promised_ms:
            channels, cause = f"{original.shape} to {layer.shape}", _cause(original, layer)
            found.append(
                Shortfall(layer.layer, channels, original.time_ms, layer.time_ms, promised_ms, cause)
            )
    return sorted(found, key=lambda layer: -layer.lost_ms)
