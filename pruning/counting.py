"""What a network costs: parameters, MACs and the activations that must live at once, all at batch 1.

`Terms` writes parameters and MACs as sums of products of kept channel counts, so that the budget can follow the exact
cost of a removal without building the narrowed network.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from edgeprune.pruning.graph import BATCH, Network, layer_of, shapes, tensors
from edgeprune.pruning.groups import Groups, Labels, argument
from edgeprune.pruning.records import Cost, LayerCost

_PRODUCTS = ("matmul", "bmm", "mm", "scaled_dot_product_attention")


def count(network: Network) -> Cost:
    """Parameters, MACs and peak activation memory; also of functional operations, which module hooks do not see."""
    values = shapes(network)
    parameters = dict(network.named_parameters())
    layers: dict[str, LayerCost] = {}
    macs = 0
    for node in network.graph.nodes:
        used = _macs(node, values)
        if used is None:
            continue
        macs += used
        weight = _weight_of(node)
        if weight is not None:
            layer = layer_of(weight)
            own = sum(value.numel() for name, value in parameters.items() if layer_of(name) == layer)
            shape = tuple(values[node].shape[1:])
            before = layers.get(layer)
            channels = shape[-1] if _name(node) in ("linear", *_PRODUCTS) else shape[0]
            layers[layer] = LayerCost(layer, own, used + (before.macs if before else 0), channels, shape)
    total = sum(value.numel() for value in parameters.values())
    return Cost(total, macs, _peak_bytes(network, values), tuple(layers.values()))


@dataclass(frozen=True)
class Terms:
    """Cost = sum over terms of coefficient x product of the kept counts of its factors.

    A factor is a set of channels (an axis of a tensor); `members[f, u]` says how many of its positions unit u takes.
    """

    coefficients: npt.NDArray[np.float64]  # (terms,)
    factors: tuple[tuple[int, ...], ...]  # of each term
    sizes: npt.NDArray[np.int64]  # (factors,): before any removal
    members: Mapping[int, Mapping[int, int]]  # unit -> factor -> positions

    def total(self, sizes: npt.NDArray[np.int64] | None = None) -> float:
        kept = self.sizes if sizes is None else sizes
        return float(
            sum(c * math.prod(int(kept[f]) for f in fs) for c, fs in zip(self.coefficients, self.factors, strict=True))
        )


def parameter_terms(groups: Groups) -> Terms:
    """The number of parameters as a function of the units kept."""
    build = _TermBuilder(groups)
    for name, parameter in groups.network.named_parameters():
        axes = [axis for axis in range(parameter.dim()) if (name, axis) in groups.axes]
        rest = parameter.numel() / math.prod(parameter.shape[axis] for axis in axes)
        build.add(rest, [groups.axes[name, axis] for axis in axes])
    return build.terms()


def mac_terms(groups: Groups) -> Terms:
    """The number of MACs as a function of the units kept."""
    build = _TermBuilder(groups)
    values = shapes(groups.network)
    for node in groups.network.graph.nodes:
        used = _macs(node, values)
        if not used:
            continue
        axes: list[npt.NDArray[np.int64]] = []
        weight = _weight_of(node)
        if weight is not None:
            shape = dict(tensors(groups.network))[weight].shape
            axes = [groups.axes[weight, axis] for axis in range(len(shape)) if (weight, axis) in groups.axes]
        elif isinstance(groups.nodes.get(node), Labels):
            labels = groups.nodes[node]
            varying = [axis for axis, size in enumerate(labels.array.shape) if size > 1]
            axes = [labels.array.ravel()] if varying else []
        build.add(used / math.prod(len(ids) for ids in axes), axes)
    return build.terms()


def channel_terms(groups: Groups) -> Terms:
    """The number of channels that layers produce, as a function of the units kept."""
    build = _TermBuilder(groups)
    for producer in groups.producers:
        build.add(1.0, [groups.axes[producer.weight, producer.axis]])
    return build.terms()


class _TermBuilder:
    def __init__(self, groups: Groups) -> None:
        self.known: dict[bytes, int] = {}
        self.sizes: list[int] = []
        self.members: dict[int, dict[int, int]] = {unit: {} for unit in range(1, groups.units + 1)}
        self.coefficients: list[float] = []
        self.factors: list[tuple[int, ...]] = []

    def add(self, coefficient: float, axes: list[npt.NDArray[np.int64]]) -> None:
        self.coefficients.append(coefficient)
        self.factors.append(tuple(self.factor(ids) for ids in axes))

    def factor(self, ids: npt.NDArray[np.int64]) -> int:
        key = ids.tobytes()
        if key not in self.known:
            index = self.known[key] = len(self.sizes)
            self.sizes.append(len(ids))
            for unit, positions in zip(*np.unique(ids, return_counts=True), strict=True):
                if unit:
                    self.members[int(unit)][index] = int(positions)
        return self.known[key]

    def terms(self) -> Terms:
        return Terms(
            np.asarray(self.coefficients), tuple(self.factors), np.asarray(self.sizes, dtype=np.int64), self.members
        )


def _name(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", "")).removeprefix("aten::")


def _weight_of(node: fx.Node) -> str | None:
    """The parameter that a convolution or linear operation multiplies with."""
    for source in node.all_input_nodes[1:]:
        if source.op == "get_attr":
            return str(source.target)
    return None


def _macs(node: fx.Node, values: Mapping[fx.Node, object]) -> int | None:
    """Multiply-adds of one operation for one image; None for what has none."""
    name = _name(node)
    result = values.get(node)
    if not isinstance(result, Tensor):
        return None
    source = values[node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else None
    if name.startswith("conv"):
        weight = argument(node, "weight")
        shape = values[weight].shape  # type: ignore[attr-defined]
        assert isinstance(source, Tensor)
        positions = source if "transpose" in name else result  # each is multiplied with the whole kernel once
        return positions[:1].numel() * math.prod(shape[1:])
    if name == "linear":
        assert isinstance(source, Tensor)
        return result.numel() // BATCH * source.shape[-1]
    if name == "scaled_dot_product_attention":
        key, value = values[node.args[1]], values[node.args[2]]  # type: ignore[index]
        assert isinstance(source, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
        scores = source.numel() // source.shape[-1] * key.shape[-2]
        return scores * (source.shape[-1] + value.shape[-1]) // BATCH
    if name in _PRODUCTS:
        assert isinstance(source, Tensor)
        return result.numel() // BATCH * source.shape[-1]
    return None


def _peak_bytes(network: Network, values: Mapping[fx.Node, object]) -> int:
    """Most bytes of float32 activations alive at once; views cost nothing, inputs count."""
    last_use = {source: node for node in network.graph.nodes for source in node.all_input_nodes}
    sizes: dict[fx.Node, int] = {}
    alive = peak = 0
    views = (operator.getitem, torch.ops.aten.view.default, torch.ops.aten.alias.default)
    for node in network.graph.nodes:
        value = values.get(node)
        if isinstance(value, Tensor) and node.op != "get_attr":
            sizes[node] = 0 if node.target in views else value.numel() // BATCH * 4
            alive += sizes[node]
            peak = max(peak, alive)
        alive -= sum(sizes.pop(source, 0) for source in node.all_input_nodes if last_use[source] is node)
    return peak
