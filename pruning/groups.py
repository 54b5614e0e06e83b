"""Which channels must go together, found by following every channel of every tensor through the graph.

Each channel that a layer produces gets a label. Labels travel with the tensor's elements: an operation that only moves
data (view, split, index, pixel shuffle ...) is executed on the labels themselves, so there is no rule per architecture.
Where elements meet (addition, gate, batch norm, a weight's input axis) their labels are united. What is united goes
together: it is one unit. A tensor can lose whole slices along one axis only; where labels vary along more than one
(channel shuffle, grouped convolution, attention heads) they are united until one axis is left, the one that keeps the
most units apart. What cannot be followed keeps its channels, with the reason.

Label arrays are numpy int64, shaped like the tensor but with size 1 along every axis on which labels do not vary
(also the batch). Label 0 is what is always kept: pictures, constants, outputs.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from edgeprune.pruning.graph import Network, UnsupportedNetwork, aten, layer_of, shapes, tensors, where

Ids = npt.NDArray[np.int64]


class Labels(NamedTuple):
    """Labels of one tensor: `array` broadcasts to `shape`."""

    array: Ids
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Reader:
    """A place where channels end: an operation that sums over them, so that a zero there is a removal.

    `weight` is None for a product of two activations (attention scores).
    """

    node: fx.Node
    position: int  # of the tensor among the node's arguments
    tensor: fx.Node
    dim: int  # the tensor's channel axis, non-negative
    weight: str | None
    axis: int  # the weight's input axis
    foldable: bool  # a constant channel can move into the bias


@dataclass(frozen=True)
class Producer:
    """A layer whose weight makes new channels."""

    layer: str
    weight: str
    axis: int  # the weight's output axis


@dataclass(frozen=True)
class Group:
    """Units of the same layers, ranked and limited together."""

    layers: tuple[str, ...]
    units: tuple[int, ...]


@dataclass(frozen=True)
class Groups:
    """What `find_groups` found. Unit ids run from 1; 0 is what is always kept."""

    network: Network
    units: int  # how many there are
    groups: tuple[Group, ...]
    producers: tuple[Producer, ...]
    readers: tuple[Reader, ...]
    nodes: Mapping[fx.Node, Any]  # Labels of unit ids, or a list of them
    axes: Mapping[tuple[str, int], Ids]  # (parameter or buffer, axis) -> unit ids
    protected: Mapping[str, str]  # layer -> why none of its channels may go
    fragile: frozenset[int]  # units under group or layer norm: their removal changes what the norm measures
    pieces: tuple[Ids, ...]  # sets of positions, as unit ids, of which one must stay

    def channels(self, layer: str) -> Ids:
        """Unit ids of the channels that a layer produces."""
        producer = next(producer for producer in self.producers if producer.layer == layer)
        return self.axes[producer.weight, producer.axis]

    def protect(self, patterns: Sequence[str]) -> Groups:
        """The same with every unit kept that a layer matching one of the glob patterns takes part in.

        Raises:
            UnsupportedNetwork: If a pattern matches no layer.
        """
        from fnmatch import fnmatchcase

        layers = {producer.layer for producer in self.producers}
        for pattern in patterns:
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                raise UnsupportedNetwork(
                    f"--protect {pattern}: no layer of that name; there are {', '.join(sorted(layers))}"
                )
        named = {layer for layer in layers for pattern in patterns if fnmatchcase(layer, pattern)}
        barred = {int(unit) for layer in named for unit in self.channels(layer)}
        groups = tuple(
            Group(group.layers, tuple(unit for unit in group.units if unit not in barred)) for group in self.groups
        )
        reasons = dict.fromkeys(sorted(named), "protected by name")
        return Groups(
            **{**self.__dict__, "groups": tuple(g for g in groups if g.units), "protected": {**reasons, **self.protected}}
        )


def find_groups(network: Network) -> Groups:
    """Follow all channels of `network`; the network is not changed."""
    return _Follower(network).follow()


class _Follower:
    def __init__(self, network: Network) -> None:
        self.network = network
        self.values = shapes(network)
        self.labels: dict[fx.Node, Any] = {}
        self.count = 1  # labels given out; 0 is taken
        self.edges: list[tuple[Ids, Ids]] = []
        self.pins: list[tuple[Ids, str]] = []
        self.axes: dict[tuple[str, int], Ids] = {}
        self.raw: dict[str, Labels] = {}
        self.grids: list[Ids] = []  # (blocks, offsets): channels that an operation sees as a grid
        self.readers: list[Reader] = []
        self.producers: dict[str, Producer] = {}
        self.fragile: list[Ids] = []

    # --- the labels' own arithmetic ------------------------------------------------------------------------------

    def fresh(self, *shape: int) -> Ids:
        size = int(np.prod(shape))
        made = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        return made

    def pin(self, labels: Ids, reason: str) -> None:
        if labels.any():
            self.pins.append((labels[labels > 0], reason))

    def unite(self, left: Ids, right: Ids, reason: str) -> None:
        """The two sides go together, position by position; beside what is always kept, both are kept."""
        left, right = np.broadcast_arrays(left, right)
        both = (left > 0) & (right > 0)
        if both.any():
            self.edges.append((left[both], right[both]))
        self.pin(np.where(both, 0, np.maximum(left, right)), reason)

    def collapse(self, labels: Labels, dim: int, reason: str) -> Ids:
        """Unite what shares a position along `dim`; returns one label for each."""
        array = np.moveaxis(labels.array, dim, 0)
        array = array.reshape(array.shape[0], -1)
        if array.shape[1] > 1:
            self.unite(array[:, 1:], array[:, :1], reason)
        first = array[:, 0]
        return np.broadcast_to(first, (labels.shape[dim],)) if len(first) == 1 else first

    def along(self, channels: Ids, node: fx.Node, dim: int) -> Labels:
        """Labels of a node's result that vary along `dim` only."""
        shape = tuple(self.values[node].shape)
        array = channels.reshape([-1 if axis == dim % len(shape) else 1 for axis in range(len(shape))])
        return Labels(array, shape)

    def kept(self, node: fx.Node) -> Any:
        """Label 0 for all that a node returns."""
        value = self.values[node]
        if isinstance(value, Tensor):
            return Labels(np.zeros((1,) * value.dim(), dtype=np.int64), tuple(value.shape))
        if isinstance(value, (list, tuple)):
            return [
                Labels(np.zeros((1,) * item.dim(), dtype=np.int64), tuple(item.shape))
                for item in value
                if isinstance(item, Tensor)
            ]
        return None

    def refuse(self, node: fx.Node, reason: str) -> Any:
        for tensor in node.all_input_nodes:
            for labels in self.of(tensor):
                self.pin(labels.array, reason)
        return self.kept(node)

    # --- parameters ----------------------------------------------------------------------------------------------

    def axis(self, name: str, axis: int, size: int) -> Ids:
        """Labels along one axis of a weight; the same whenever the weight is used again."""
        if name in self.raw:
            return self.collapse(self.raw[name], axis, f"{name} is used in two ways")
        if (name, axis) not in self.axes:
            self.axes[name, axis] = self.fresh(size)
        return self.axes[name, axis]

    def of(self, node: fx.Node) -> list[Labels]:
        """Labels of a node's result; a parameter that flows like an activation gets one for each element."""
        if node.op == "get_attr" and node not in self.labels:
            name, shape = str(node.target), tuple(self.values[node].shape)
            if any(key[0] == name for key in self.axes):
                for key, labels in self.axes.items():
                    if key[0] == name:
                        self.pin(labels, f"{name} is used in two ways")
                return [Labels(np.zeros((1,) * len(shape), dtype=np.int64), shape)]
            if name not in self.raw:
                self.raw[name] = Labels(self.fresh(*shape), shape)
            return [self.raw[name]]
        labels = self.labels.get(node)
        if labels is None:
            return []
        return labels if isinstance(labels, list) else [labels]

    def one(self, node: fx.Node) -> Labels:
        return self.of(node)[0]

    def constant(self, node: Any) -> Any:
        """The value of an argument that no input and no parameter decides."""
        if not isinstance(node, fx.Node):
            return node
        if node.op == "get_attr":
            value = dict(tensors(self.network))[str(node.target)]
            if isinstance(value, torch.nn.Parameter):
                raise UnsupportedNetwork(f"{where(node)}: an index that is learned")
            return value
        if node.op != "call_function":
            raise UnsupportedNetwork(f"{where(node)}: an index that depends on the input")
        if not isinstance(self.values[node], Tensor):
            return self.values[node]
        assert callable(node.target)
        arguments = [self.constant(argument) for argument in node.args]
        return node.target(*arguments, **{key: self.constant(value) for key, value in node.kwargs.items()})

    # --- the walk ------------------------------------------------------------------------------------------------

    def follow(self) -> Groups:
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                self.labels[node] = self.kept(node)
            elif node.op == "call_function":
                self.labels[node] = self.step(node)
            elif node.op == "output":
                for result in node.all_input_nodes:
                    for labels in self.of(result):
                        self.pin(labels.array, "an output of the network")
        return self.resolve()

    def step(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            held = self.labels.get(source)  # type: ignore[arg-type]
            return held[index] if isinstance(held, list) else None  # type: ignore[index]
        if not any(self.of(tensor) for tensor in node.all_input_nodes):
            return self.kept(node)
        name = getattr(getattr(node.target, "_schema", None), "name", str(node.target)).removeprefix("aten::")
        rule = _RULES.get(name)
        try:
            if rule is not None:
                return rule(self, node)
            if name in _MOVES:
                return self.move(node)
            if name in _PASSES or torch.Tag.pointwise in getattr(node.target, "tags", ()):
                return self.pointwise(node)
        except UnsupportedNetwork as error:
            return self.refuse(node, str(error))
        spatial = re.fullmatch(r"(?:_?adaptive_)?(?:max|avg|lp)_pool([123])d|upsample_[a-z]+([123])d", name)
        if spatial:
            axes = int(spatial[1] or spatial[2])
            dims = self.values[node].dim()
            return self.mixes(node, range(dims - axes, dims))
        if name in _REDUCTIONS:
            dims = argument(node, "dim")
            every = range(self.one(node.args[0]).array.ndim)  # type: ignore[arg-type]
            return self.mixes(node, every if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims)
        return self.refuse(node, f"{where(node)} cannot be followed")

    def pointwise(self, node: fx.Node) -> Labels:
        shape = tuple(self.values[node].shape)
        total: Labels | None = None
        for tensor in node.all_input_nodes:
            for labels in self.of(tensor):
                total = labels if total is None else self.join(total, labels, where(node))
        assert total is not None
        array = total.array.reshape((1,) * (len(shape) - total.array.ndim) + total.array.shape)
        return Labels(array, shape)

    def join(self, left: Labels, right: Labels, reason: str) -> Labels:
        """Elements that meet in a sum or a product go together, but one that is spread over many channels stays."""
        dims = max(len(left.shape), len(right.shape))
        sides = []
        for labels in (left, right):
            fill = (1,) * (dims - len(labels.shape))
            sides.append(Labels(labels.array.reshape(fill + labels.array.shape), fill + labels.shape))
        shape = tuple(max(pair) for pair in zip(sides[0].shape, sides[1].shape, strict=True))
        joined = []
        for labels, other in (sides, sides[::-1]):
            if any(labels.shape[d] < shape[d] and other.array.shape[d] > 1 for d in range(dims)):
                self.pin(labels.array, f"{reason}: one channel is spread over several")
                continue
            joined.append(labels.array)
        if len(joined) == 2:
            self.unite(joined[0], joined[1], f"{reason} with a constant")
            return Labels(np.where(joined[0] > 0, joined[0], joined[1]), shape)
        return Labels(joined[0] if joined else np.zeros((1,) * dims, dtype=np.int64), shape)

    def move(self, node: fx.Node) -> Any:
        """Execute an operation that only moves data on the labels (float64 holds them exactly)."""

        def spread(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            if not self.of(argument):
                return self.values[argument]  # a size
            labels = self.one(argument)
            if argument.op == "get_attr" and self.values[argument].dtype in (torch.int64, torch.bool, torch.int32):
                return self.constant(argument)
            return torch.from_numpy(labels.array.astype(np.float64)).expand(labels.shape)

        # Labels are spread without memory of their own, which view() does not take.
        action = aten.reshape.default if node.target in (aten.view.default, aten._unsafe_view.default) else node.target
        assert callable(action)
        moved = action(*fx.map_arg(node.args, spread), **fx.map_arg(node.kwargs, spread))
        return [_compact(item) for item in moved] if isinstance(moved, (list, tuple)) else _compact(moved)

    def mixes(self, node: fx.Node, dims: Sequence[int] | range) -> Any:
        """An operation that mixes elements along `dims` and keeps every other position apart."""
        labels = self.one(node.args[0])  # type: ignore[arg-type]
        axes = {dim % labels.array.ndim for dim in dims}
        if any(labels.array.shape[axis] > 1 for axis in axes):
            return self.refuse(node, f"{where(node)} mixes channels without weights")
        value = self.values[node]
        value = value if isinstance(value, Tensor) else value[0]
        array = labels.array
        if value.dim() < array.ndim:
            array = array.reshape([size for axis, size in enumerate(array.shape) if axis not in axes])
        if isinstance(self.values[node], Tensor):
            return Labels(array, tuple(value.shape))
        return [Labels(array, tuple(item.shape)) for item in self.values[node]]

    # --- the result ----------------------------------------------------------------------------------------------

    def resolve(self) -> Groups:
        """Unite until every tensor varies along one axis, then number the units."""
        while True:
            classes = self.classes()
            before = len(self.edges)
            for array in self.arrays():
                self.make_rectangular(array, classes)
            if len(self.edges) == before:
                break
        return self.number(classes)

    def arrays(self) -> list[Ids]:
        flowing = [labels.array for node in self.labels for labels in self.of(node)]
        return [array for array in flowing if array.size > 1] + [raw.array for raw in self.raw.values()] + self.grids

    def classes(self) -> Ids:
        """Label -> class; class 0 is kept."""
        left = np.concatenate([edge[0] for edge in self.edges] or [np.zeros(0, np.int64)])
        right = np.concatenate([edge[1] for edge in self.edges] or [np.zeros(0, np.int64)])
        links = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(self.count, self.count))
        _, found = connected_components(links, directed=False)
        classes = found.astype(np.int64) + 1
        pinned = np.concatenate([labels for labels, _ in self.pins] or [np.zeros(0, np.int64)])
        classes[np.isin(classes, classes[pinned])] = 0
        classes[0] = 0
        return classes

    def make_rectangular(self, array: Ids, classes: Ids) -> None:
        seen = _compact_array(classes[array])
        axes = [axis for axis, size in enumerate(seen.shape) if size > 1]
        if len(axes) < 2:
            return
        best = max(axes, key=lambda axis: (_classes_left(seen, axis), -axis))
        flat = np.moveaxis(array if array.shape == seen.shape else np.broadcast_to(array, array.shape), best, 0)
        flat = flat.reshape(flat.shape[0], -1)
        self.unite(flat[:, 1:], flat[:, :1], "varies along two axes")

    def number(self, classes: Ids) -> Groups:
        # Only what a layer produces can be removed; a class of nothing but inputs (none is known) stays.
        made: list[Ids] = [classes[self.axes[p.weight, p.axis]] for p in self.producers.values()]
        alive = np.unique(np.concatenate(made or [np.zeros(1, np.int64)]))
        alive = alive[alive > 0]
        ids = np.zeros(int(classes.max()) + 1, dtype=np.int64)
        ids[alive] = np.arange(1, len(alive) + 1)
        unit = ids[classes]

        def renumber(labels: Any) -> Any:
            if isinstance(labels, list):
                return [renumber(item) for item in labels]
            return Labels(_compact_array(unit[labels.array]), labels.shape)

        nodes = {node: renumber(labels) for node, labels in self.labels.items() if labels is not None}
        axes = {key: unit[labels] for key, labels in self.axes.items()}
        for name, raw in self.raw.items():
            narrowed = renumber(raw).array
            for dim, size in enumerate(narrowed.shape):
                if size > 1:
                    axes[name, dim] = np.moveaxis(narrowed, dim, 0).reshape(size, -1)[:, 0]
        fragile = frozenset(int(i) for labels in self.fragile for i in unit[labels].ravel() if i)
        return Groups(
            network=self.network,
            units=len(alive),
            groups=self.gather(unit),
            producers=tuple(self.producers.values()),
            readers=tuple(reader for reader in self.readers),
            nodes=nodes,
            axes={key: labels for key, labels in axes.items() if labels.any()} | {
                (p.weight, p.axis): axes[p.weight, p.axis] for p in self.producers.values()
            },
            protected=self.reasons(unit),
            fragile=fragile,
            pieces=_pieces(nodes, axes),
        )

    def gather(self, unit: Ids) -> tuple[Group, ...]:
        """Units that share a producer belong to one group; producers in the order of execution."""
        parent = list(range(int(unit.max(initial=0)) + 1))

        def root(index: int) -> int:
            while parent[index] != index:
                parent[index] = parent[parent[index]]
                index = parent[index]
            return index

        members = {p.layer: [int(i) for i in unit[self.axes[p.weight, p.axis]] if i] for p in self.producers.values()}
        for units in members.values():
            for other in units[1:]:
                parent[root(other)] = root(units[0])
        layers: dict[int, list[str]] = {}
        found: dict[int, dict[int, None]] = {}
        for layer, units in members.items():
            if units:
                layers.setdefault(root(units[0]), []).append(layer)
                found.setdefault(root(units[0]), {}).update(dict.fromkeys(units))
        return tuple(Group(tuple(layers[key]), tuple(found[key])) for key in layers)

    def reasons(self, unit: Ids) -> dict[str, str]:
        """Why a layer keeps all its channels: the first reason that reached one of them."""
        left = np.concatenate([edge[0] for edge in self.edges] or [np.zeros(0, np.int64)])
        right = np.concatenate([edge[1] for edge in self.edges] or [np.zeros(0, np.int64)])
        links = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(self.count, self.count))
        _, component = connected_components(links, directed=False)
        reason_of: dict[int, str] = {}
        for labels, reason in self.pins:
            for index in np.unique(component[labels]):
                reason_of.setdefault(int(index), reason)
        reasons = {}
        for producer in self.producers.values():
            labels = self.axes[producer.weight, producer.axis]
            if not unit[labels].any():
                reasons[producer.layer] = reason_of.get(int(component[labels[0]]), "nothing reads its channels one by one")
        return reasons


# --- rules ---------------------------------------------------------------------------------------------------------


def argument(node: fx.Node, name: str) -> Any:
    """An operation's argument by its name in the schema; None if it is not given and has no default."""
    schema = node.target._schema  # type: ignore[union-attr]
    for position, declared in enumerate(schema.arguments):
        if declared.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[position] if position < len(node.args) else declared.default_value
    return None


def _weight(follower: _Follower, node: fx.Node, name: str) -> tuple[str, tuple[int, ...]] | None:
    weight = argument(node, name)
    if not isinstance(weight, fx.Node):
        return None
    if weight.op != "get_attr":
        raise UnsupportedNetwork(f"{where(node)}: its {name} is computed, not a parameter")
    return str(weight.target), tuple(follower.values[weight].shape)


def _convolution(follower: _Follower, node: fx.Node) -> Labels:
    tensor: fx.Node = node.args[0]  # type: ignore[assignment]
    found = _weight(follower, node, "weight")
    assert found is not None
    weight, shape = found
    transposed = "transpose" in str(node.target)
    blocks = int(argument(node, "groups"))
    inputs = follower.collapse(follower.one(tensor), 1, where(node))
    outputs_in_block = shape[1] if transposed else shape[0] // blocks
    inputs_in_block = len(inputs) // blocks
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    reason = where(node)
    if blocks == 1:
        follower.unite(follower.axis(weight, in_axis, shape[in_axis]), inputs, reason)
        outputs = follower.axis(weight, out_axis, shape[out_axis])
        _read(follower, node, tensor, 1, weight, in_axis, foldable=not transposed)
    else:
        # The axis that the weight has in full: outputs, or inputs when transposed.
        full = follower.axis(weight, 0, shape[0])
        grid = full.reshape(blocks, -1)
        grid_in = inputs.reshape(blocks, inputs_in_block)
        if inputs_in_block == 1 or outputs_in_block == 1 or blocks > inputs_in_block:
            # Whole blocks go: a block's inputs and outputs are one unit.
            outputs = np.repeat(grid[:, 0], outputs_in_block) if transposed else full
            follower.unite(grid, grid[:, :1], reason)
            follower.unite(grid_in, grid[:, :1], reason)
        else:
            # The same place in every block goes.
            inner = follower.axis(weight, 1, shape[1])
            if transposed:
                follower.unite(grid, grid[:1], reason)
                outputs = np.tile(inner, blocks)
                follower.unite(grid_in, grid[:1], reason)
            else:
                follower.unite(grid, grid[:1], reason)
                outputs = full
                follower.unite(grid_in, inner[None], reason)
            _read(follower, node, tensor, 1, weight, in_axis, foldable=not transposed)
    bias = _weight(follower, node, "bias")
    if bias is not None:
        follower.unite(follower.axis(bias[0], 0, len(outputs)), outputs, reason)
    axis = 0 if transposed and blocks > 1 and (weight, 1) not in follower.axes else out_axis
    follower.producers.setdefault(weight, Producer(layer_of(weight), weight, axis))
    return follower.along(outputs, node, 1)


def _linear(follower: _Follower, node: fx.Node) -> Labels:
    tensor: fx.Node = node.args[0]  # type: ignore[assignment]
    found = _weight(follower, node, "weight")
    assert found is not None
    weight, shape = found
    inputs = follower.collapse(follower.one(tensor), -1, where(node))
    follower.unite(follower.axis(weight, 1, shape[1]), inputs, where(node))
    outputs = follower.axis(weight, 0, shape[0])
    bias = _weight(follower, node, "bias")
    if bias is not None:
        follower.unite(follower.axis(bias[0], 0, shape[0]), outputs, where(node))
    follower.producers.setdefault(weight, Producer(layer_of(weight), weight, 0))
    _read(follower, node, tensor, follower.values[tensor].dim() - 1, weight, 1, foldable=True)
    return follower.along(outputs, node, -1)


def _read(
    follower: _Follower, node: fx.Node, tensor: fx.Node, dim: int, weight: str | None, axis: int, foldable: bool
) -> None:
    follower.readers.append(Reader(node, node.args.index(tensor), tensor, dim, weight, axis, foldable))


def _channel_norm(follower: _Follower, node: fx.Node) -> Labels:
    """Batch norm, instance norm, PReLU: parameters with one entry for each channel."""
    tensor: fx.Node = node.args[0]  # type: ignore[assignment]
    labels = follower.one(tensor)
    for name in ("weight", "bias", "running_mean", "running_var"):
        found = _weight(follower, node, name)
        if found is not None and found[1] != (1,):
            channels = follower.collapse(labels, 1, where(node))
            follower.unite(follower.axis(found[0], 0, len(channels)), channels, where(node))
    return Labels(labels.array, labels.shape)


def _group_norm(follower: _Follower, node: fx.Node) -> Labels:
    labels = _channel_norm(follower, node)
    channels = follower.collapse(labels, 1, where(node))
    blocks = int(argument(node, "num_groups"))
    follower.grids.append(channels.reshape(blocks, -1))
    follower.fragile.append(channels)
    return labels


def _layer_norm(follower: _Follower, node: fx.Node) -> Labels:
    labels = follower.one(node.args[0])  # type: ignore[arg-type]
    axes = len(argument(node, "normalized_shape"))
    for name in ("weight", "bias"):
        parameter = argument(node, name)
        if isinstance(parameter, fx.Node):
            raw = follower.one(parameter)
            follower.unite(raw.array, labels.array.reshape(labels.array.shape[-axes:]) if _constant_outside(labels, axes)
                           else labels.array, where(node))
    follower.fragile.append(labels.array)
    return labels


def _constant_outside(labels: Labels, axes: int) -> bool:
    return all(size == 1 for size in labels.array.shape[:-axes])


def _concatenate(follower: _Follower, node: fx.Node) -> Labels:
    shape = tuple(follower.values[node].shape)
    dim = int(argument(node, "dim")) % len(shape)
    parts = [follower.one(tensor) for tensor in node.args[0]]  # type: ignore[union-attr,arg-type]
    parts = [part for part in parts if len(part.shape) == len(shape)]  # torch lets an empty 1-D tensor pass
    common = [max(part.array.shape[axis] for part in parts) for axis in range(len(shape))]
    pieces = []
    for part in parts:
        size = [part.shape[axis] if axis == dim else common[axis] for axis in range(len(shape))]
        pieces.append(np.broadcast_to(part.array, size))
    return Labels(_compact_array(np.concatenate(pieces, axis=dim)), shape)


def _like(follower: _Follower, node: fx.Node) -> Labels:
    return follower.one(node.args[0])  # type: ignore[arg-type]


def _pad(follower: _Follower, node: fx.Node) -> Any:
    labels = follower.one(node.args[0])  # type: ignore[arg-type]
    axes = len(argument(node, "padding") or argument(node, "pad")) // 2
    if all(size == 1 for size in labels.array.shape[-axes:]):
        return Labels(labels.array, tuple(follower.values[node].shape))
    if str(argument(node, "mode") or "constant") != "constant":
        raise UnsupportedNetwork(f"{where(node)} mirrors channels")
    amounts = list(argument(node, "padding") or argument(node, "pad"))
    spread = torch.from_numpy(labels.array.astype(np.float64)).expand(labels.shape)
    return _compact(torch.nn.functional.pad(spread, amounts))


def _shuffle(follower: _Follower, node: fx.Node) -> Any:
    channels = follower.collapse(follower.one(node.args[0]), 1, where(node))  # type: ignore[arg-type]
    follower.grids.append(channels.reshape(int(argument(node, "groups")), -1))
    return follower.move(node)


def _product(follower: _Follower, node: fx.Node) -> Labels:
    """matmul: `(..., M, K) x (..., K, N)`."""
    left_node, right_node = node.args[0], node.args[1]
    assert isinstance(left_node, fx.Node) and isinstance(right_node, fx.Node)
    shape = tuple(follower.values[node].shape)
    if right_node.op == "get_attr" and follower.values[right_node].dim() == 2:
        name, (inputs, outputs) = str(right_node.target), tuple(follower.values[right_node].shape)
        channels = follower.collapse(follower.one(left_node), -1, where(node))
        follower.unite(follower.axis(name, 0, inputs), channels, where(node))
        follower.producers.setdefault(name, Producer(layer_of(name), name, 1))
        _read(follower, node, left_node, follower.values[left_node].dim() - 1, name, 0, foldable=False)
        return follower.along(follower.axis(name, 1, outputs), node, -1)
    left, right = follower.one(left_node), follower.one(right_node)
    if len(left.shape) < 2 or len(right.shape) < 2:
        raise UnsupportedNetwork(f"{where(node)}: a product with a vector cannot be followed")
    scores = _scores(follower, node, left, right, left_node, contiguous=True)
    return Labels(np.broadcast_to(scores, scores.shape), shape)


def _scores(
    follower: _Follower, node: fx.Node, left: Labels, right: Labels, left_node: fx.Node, contiguous: bool
) -> Ids:
    """Labels of `left @ right`. Attention heads, seen as labels on a leading axis, are kept whole."""
    dims = max(len(left.shape), len(right.shape))
    a, b = (x.array.reshape((1,) * (dims - x.array.ndim) + x.array.shape) for x in (left, right))
    summed = a.shape[-1] > 1 or b.shape[-2] > 1
    leading = any(size > 1 for array in (a, b) for size in array.shape[:-2])
    reason = where(node)
    if summed:
        if a.shape[-2] > 1 or b.shape[-1] > 1:
            raise UnsupportedNetwork(f"{reason}: a product over two channel axes cannot be followed")
        rows, columns = a[..., 0, :], b[..., :, 0]
        if not leading:
            follower.unite(rows, columns, reason)
            _read(follower, node, left_node, follower.values[left_node].dim() - 1, None, 0, foldable=False)
            return np.zeros((1,) * dims, dtype=np.int64)
        follower.unite(rows, rows[..., :1], reason)
        follower.unite(columns, columns[..., :1], reason)
        follower.unite(rows[..., :1], columns[..., :1], reason)
        heads = np.where(rows[..., :1] > 0, rows[..., :1], columns[..., :1])
        return heads[..., None]
    if leading:
        heads_left, heads_right = a[..., :1, :1], b[..., :1, :1]
        follower.unite(a, heads_left, reason)
        follower.unite(b, heads_right, reason)
        follower.unite(heads_left, heads_right, reason)
        return np.where(heads_left > 0, heads_left, heads_right)
    if a.shape[-2] > 1 and b.shape[-1] > 1:
        raise UnsupportedNetwork(f"{reason}: a product over two channel axes cannot be followed")
    return np.maximum(a[..., :, :1], b[..., :1, :])


def _attention(follower: _Follower, node: fx.Node) -> Labels:
    query, key, value = (follower.one(node.args[index]) for index in range(3))  # type: ignore[arg-type]
    turned = Labels(np.swapaxes(key.array, -1, -2), (*key.shape[:-2], key.shape[-1], key.shape[-2]))
    weights = _scores(follower, node, query, turned, node.args[0], contiguous=False)  # type: ignore[arg-type]
    mask = argument(node, "attn_mask")
    if isinstance(mask, fx.Node):
        follower.unite(weights, follower.one(mask).array, where(node))
    scores = Labels(weights, (*query.shape[:-1], key.shape[-2]))
    return Labels(
        _scores(follower, node, scores, value, node.args[0], contiguous=False),  # type: ignore[arg-type]
        tuple(follower.values[node].shape),
    )


_RULES: dict[str, Callable[[_Follower, fx.Node], Any]] = {
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution
    ),
    "linear": _linear,
    **dict.fromkeys(("batch_norm", "instance_norm", "prelu"), _channel_norm),
    "group_norm": _group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("cat", "concat"), _concatenate),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"), _like),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "channel_shuffle": _shuffle,
    **dict.fromkeys(("matmul", "bmm", "mm"), _product),
    "scaled_dot_product_attention": _attention,
}

# Elementwise, though torch does not tag them so.
_PASSES = frozenset("dropout feature_dropout alias clone contiguous detach to _to_copy type_as hardswish".split())

_MOVES = frozenset(
    "view reshape _unsafe_view flatten unflatten permute transpose t numpy_T squeeze unsqueeze expand expand_as slice "
    "select split split_with_sizes chunk unbind stack index index_select pixel_shuffle pixel_unshuffle flip "
    "roll repeat tile movedim narrow swapaxes repeat_interleave view_as reshape_as".split()
)

_REDUCTIONS = frozenset(
    "mean sum amax amin max min softmax log_softmax logsumexp var std prod norm linalg_vector_norm cumsum argmax argmin "
    "var_mean std_mean".split()
)


# --- arrays --------------------------------------------------------------------------------------------------------


def _compact(tensor: Tensor) -> Labels:
    return Labels(_compact_array(tensor.numpy().astype(np.int64)), tuple(tensor.shape))


def _compact_array(array: Ids) -> Ids:
    """Size 1 along every axis on which nothing varies."""
    for axis, size in enumerate(array.shape):
        if size > 1:
            first = np.take(array, [0], axis=axis)
            if (array == first).all():
                array = first
    return array


def _classes_left(classes: Ids, axis: int) -> int:
    """How many removable units remain when all that shares a position along `axis` is united."""
    flat = np.moveaxis(classes, axis, 0)
    flat = flat.reshape(flat.shape[0], -1)
    names, inverse = np.unique(flat, return_inverse=True)
    inverse = inverse.reshape(flat.shape)
    rows = np.repeat(np.arange(len(flat)) + len(names), flat.shape[1])
    links = coo_matrix(
        (np.ones(inverse.size, np.int8), (inverse.ravel(), rows)), shape=(len(names) + len(flat),) * 2
    )
    count, component = connected_components(links, directed=False)
    kept = int(names[0] == 0)
    return count - kept if not kept else len(set(component[len(names) :]) - {component[0]})


def _pieces(nodes: Mapping[fx.Node, Any], axes: Mapping[tuple[str, int], Ids]) -> tuple[Ids, ...]:
    """Sets of positions of which one must stay, so that no tensor and no weight is left empty."""
    found: dict[bytes, Ids] = {}
    arrays = [labels.array.ravel() for held in nodes.values() for labels in (held if isinstance(held, list) else [held])]
    for array in arrays + list(axes.values()):
        if array.size and array.all():  # a label 0 in it stays anyway
            distinct = np.unique(array)
            found.setdefault(distinct.tobytes(), distinct)
    return tuple(found.values())

