"""What a network costs: parameters, MACs and the activations that must live at once, all at batch 1.

`Terms` writes parameters and MACs as sums of products of kept channel counts, so that the budget can follow
the exact cost of a removal without building the narrowed network.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from edgeprune.pruning.graph import BATCH, Network, argument, layer_of, operation, shapes
from edgeprune.pruning.groups import Groups
from edgeprune.pruning.labels import by_position
from edgeprune.pruning.records import Cost, LayerCost


def count(network: Network) -> Cost:
    """Parameters, MACs and peak activation memory; also of functional operations, without module hooks.

    Recurrent layers are not counted.
    """
    values = shapes(network)
    parameters = dict(network.named_parameters())
    layers: dict[str, LayerCost] = {}
    macs = 0
    for node in network.graph.nodes:
        used = sum(product.macs for product in _products(node, values))
        macs += used
        weight = _weight_of(node) if used else None
        if weight in parameters:
            layer, shape = layer_of(weight), tuple(values[node].shape[1:])
            own = {str(source.target) for source in node.all_input_nodes if source.op == "get_attr"}
            params = sum(parameters[name].numel() for name in own if name in parameters)
            before = layers[layer].macs if layer in layers else 0
            channels = shape[0] if operation(node).startswith("conv") else shape[-1]
            layers[layer] = LayerCost(layer, params, before + used, channels, shape)
    total = sum(value.numel() for value in parameters.values())
    return Cost(total, macs, _peak_bytes(network, values), tuple(layers.values()))


@dataclass(frozen=True)
class Terms:
    """Cost = sum over terms of coefficient x product of the kept counts of its factors.

    A factor is a set of channels (an axis of a tensor); `members[f, u]` says how many of its positions unit u
    takes.
    """

    coefficients: npt.NDArray[np.float64]  # (terms,)
    factors: tuple[tuple[int, ...], ...]  # of each term
    sizes: npt.NDArray[np.int64]  # (factors,): before any removal
    members: Mapping[int, Mapping[int, int]]  # unit -> factor -> positions

    def total(self, sizes: npt.NDArray[np.int64] | None = None) -> float:
        kept = self.sizes if sizes is None else sizes
        return float(
            sum(
                c * math.prod(int(kept[f]) for f in fs)
                for c, fs in zip(self.coefficients, self.factors, strict=True)
            )
        )


def parameter_terms(groups: Groups) -> Terms:
    """The number of parameters as a function of the units kept."""
    build = TermBuilder(groups)
    add_parameters(build, groups)
    return build.terms()


def add_parameters(build: TermBuilder, groups: Groups) -> None:
    """Add a term for each of a network's parameters."""
    for name, parameter in groups.network.named_parameters():
        axes = [axis for axis in range(parameter.dim()) if (name, axis) in groups.axes]
        rest = parameter.numel() / math.prod(parameter.shape[axis] for axis in axes)
        build.add(rest, [groups.axes[name, axis] for axis in axes])


def mac_terms(groups: Groups) -> Terms:
    """The number of MACs as a function of the units kept."""
    build = TermBuilder(groups)
    values = shapes(groups.network)
    for node in groups.network.graph.nodes:
        for product in _products(node, values):
            axes = [ids for source, dim in product.axes if (ids := unit_ids(groups, source, dim)) is not None]
            build.add(product.macs / math.prod(len(ids) for ids in axes), axes)
    return build.terms()


def unit_ids(groups: Groups, source: fx.Node, dim: int) -> npt.NDArray[np.int64] | None:
    """Unit ids along an axis; None if it loses nothing."""
    if source.op == "get_attr":
        return groups.axes.get((str(source.target), dim))
    labels = groups.nodes[source]
    return by_position(labels.array, dim)[:, 0] if labels.array.shape[dim] > 1 else None


def channel_terms(groups: Groups) -> Terms:
    """The number of channels that layers produce, as a function of the units kept."""
    build = TermBuilder(groups)
    for ids in groups.outputs.values():
        build.add(1.0, [ids])
    return build.terms()


class TermBuilder:
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
            np.asarray(self.coefficients),
            tuple(self.factors),
            np.asarray(self.sizes, dtype=np.int64),
            self.members,
        )


def _weight_of(node: fx.Node) -> str | None:
    """The parameter that a convolution or linear operation multiplies with."""
    for source in node.all_input_nodes[1:]:
        if source.op == "get_attr":
            return str(source.target)
    return None


class _Product(NamedTuple):
    """Multiply-adds of a sum of products for one image, and the axes whose sizes they are proportional to."""

    macs: int
    axes: tuple[tuple[fx.Node, int], ...]


def _products(node: fx.Node, values: Mapping[Any, Any]) -> list[_Product]:
    name = operation(node)
    if name.startswith("conv"):
        weight, result = argument(node, "weight"), values[node]
        # Each position is multiplied with the whole kernel once: of the input, if transposed.
        positions = values[node.args[0]] if "transpose" in name else result
        shape = values[weight].shape
        return [_Product(positions[:1].numel() * math.prod(shape[1:]), _axes(weight, shape))]
    if name == "linear":
        weight = argument(node, "weight")
        shape = values[weight].shape
        return [_Product(values[node].numel() // BATCH * shape[1], _axes(weight, shape))]
    if name in ("matmul", "bmm", "mm", "addmm", "baddbmm"):
        left, right = node.args[-2:]
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        summed = (left, values[left].dim() - 1)
        axes = (
            _axes(right, values[right].shape)
            if right.op == "get_attr"
            else (*_axes(node, values[node].shape), summed)
        )
        return [_Product(values[node].numel() // BATCH * values[left].shape[-1], axes)]
    if name == "scaled_dot_product_attention":
        query, key, value = node.args[:3]
        assert isinstance(query, fx.Node)
        *rows, width = values[query].shape
        scores = math.prod(rows) * values[key].shape[-2] // BATCH
        weighted = _Product(scores * values[value].shape[-1], _axes(node, values[node].shape))
        return [_Product(scores * width, _axes(query, values[query].shape)), weighted]
    return [_Product(_einsum_macs(node, values), ())] if name == "einsum" else []


def _axes(node: fx.Node, shape: Sequence[int]) -> tuple[tuple[fx.Node, int], ...]:
    return tuple((node, dim) for dim in range(len(shape)))


def _einsum_macs(node: fx.Node, values: Mapping[Any, Any]) -> int:
    """Every combination of indices once; "..." stands for the result's leading axes."""
    equation = str(node.args[0]).replace(" ", "")
    operands = [values[source] for source in node.all_input_nodes]
    sizes: dict[str, int] = {}
    for letters, tensor in zip(equation.split("->")[0].split(","), operands, strict=True):
        left, _, right = letters.partition("...")
        sizes |= dict(zip(left, tensor.shape, strict=False))
        sizes |= dict(zip(reversed(right or left), reversed(tensor.shape), strict=False))
    free = equation.split("->")[-1].replace("...", "")
    spread = values[node].numel() // math.prod(sizes[letter] for letter in free) if "..." in equation else 1
    return math.prod(sizes.values()) * spread // BATCH


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
