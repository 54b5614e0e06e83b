"""Labels: which channel an element of a tensor belongs to, and the book that is kept while following them.

Label arrays are numpy int64, shaped like the tensor but with size 1 along every axis on which labels do not
vary (also the batch). Label 0 is what is always kept: pictures, constants, outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from edgeprune.pruning.graph import Network, UnsupportedNetwork, layer_of, shapes, tensors, where

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
    axis: (
        int  # the weight's output axis (a transposed convolution with blocks may have it within a block only)
    )


class Book:
    """Labels of all that was followed so far, and which of them go together (`edges`) or stay (`pins`)."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.values = shapes(network)
        self.labels: dict[fx.Node, Any] = {}  # Labels, or a list of them
        self.count = 1  # labels given out; 0 is taken
        self.edges: list[tuple[Ids, Ids]] = []
        self.pins: list[tuple[Ids, str]] = []
        self.axes: dict[tuple[str, int], Ids] = {}  # of weights: (name, axis) -> labels
        self.raw: dict[str, Labels] = {}  # of parameters that flow like activations
        self.grids: list[Ids] = []  # (blocks, offsets): channels that an operation sees as a grid
        self.readers: list[Reader] = []
        self.producers: dict[str, Producer] = {}
        self.outputs: dict[str, Ids] = {}  # layer -> labels of the channels that it produces
        self.normed: list[Ids] = []  # (norm groups, channels): what a group or layer norm measures together

    # --- arithmetic -----------------------------------------------------------------------------------------

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
        array = by_position(labels.array, dim)
        if array.shape[1] > 1:
            self.unite(array[:, 1:], array[:, :1], reason)
        return np.broadcast_to(array[:, 0], (labels.shape[dim],))

    # --- results of operations ------------------------------------------------------------------------------

    def along(self, channels: Ids, node: fx.Node, dim: int) -> Labels:
        """Labels of a node's result that vary along `dim` only."""
        shape = tuple(self.values[node].shape)
        array = channels.reshape([-1 if axis == dim % len(shape) else 1 for axis in range(len(shape))])
        return Labels(array, shape)

    def kept(self, node: fx.Node) -> Any:
        """Label 0 for all that a node returns."""
        value = self.values[node]
        if isinstance(value, (list, tuple)):
            return [nothing(item) for item in value if isinstance(item, Tensor)]
        return nothing(value) if isinstance(value, Tensor) else None

    def refuse(self, node: fx.Node, reason: str) -> Any:
        """Keep all that a node reads and returns."""
        for tensor in node.all_input_nodes:
            for labels in self.of(tensor):
                self.pin(labels.array, reason)
        return self.kept(node)

    def read(
        self, node: fx.Node, tensor: fx.Node, dim: int, weight: str | None, axis: int, foldable: bool
    ) -> None:
        self.readers.append(Reader(node, node.args.index(tensor), tensor, dim, weight, axis, foldable))

    def produce(self, weight: str, axis: int, outputs: Ids) -> None:
        producer = self.producers.setdefault(weight, Producer(layer_of(weight), weight, axis))
        self.outputs.setdefault(producer.layer, outputs)

    # --- what nodes and parameters hold ---------------------------------------------------------------------

    def axis(self, name: str, axis: int, size: int) -> Ids:
        """Labels along one axis of a weight; the same whenever the weight is used again."""
        if (name, axis) not in self.axes:
            raw = self.raw.get(name)
            self.axes[name, axis] = (
                self.fresh(size) if raw is None else self.collapse(raw, axis, f"{name} is used in two ways")
            )
        return self.axes[name, axis]

    def of(self, node: fx.Node) -> list[Labels]:
        """Labels of a node's result; a parameter that flows like an activation gets one for each element."""
        if node.op == "get_attr" and node not in self.labels:
            name, shape = str(node.target), tuple(self.values[node].shape)
            if name in self.raw:
                return [self.raw[name]]
            used = [labels for (owner, _), labels in self.axes.items() if owner == name]
            for labels in used:
                self.pin(labels, f"{name} is used in two ways")
            if used:
                return [nothing(self.values[node])]
            self.raw[name] = Labels(self.fresh(*shape), shape)
            return [self.raw[name]]
        held = self.labels.get(node)
        return held if isinstance(held, list) else [] if held is None else [held]

    def one(self, node: Any) -> Labels:
        """Labels of a node that returns one tensor."""
        return self.of(node)[0]

    def constant(self, node: Any) -> Any:
        """The value of an argument that no input and no parameter decides.

        Raises:
            UnsupportedNetwork: If one does.
        """
        return constant(self.network, self.values, node)


def nothing(value: Tensor) -> Labels:
    """A tensor that is kept whole."""
    return Labels(np.zeros((1,) * value.dim(), dtype=np.int64), tuple(value.shape))


def constant(network: Network, values: Any, node: Any) -> Any:
    """The value of `node`, computed from buffers; sizes are those in `values`."""
    if isinstance(node, (list, tuple)):
        return type(node)(constant(network, values, item) for item in node)
    if not isinstance(node, fx.Node) or not isinstance(values[node], Tensor):
        return values[node] if isinstance(node, fx.Node) else node
    if node.op == "get_attr":
        value = dict(tensors(network))[str(node.target)]
        if isinstance(value, torch.nn.Parameter):
            raise UnsupportedNetwork(f"{where(node)}: an index that is learned")
        return value
    if node.op != "call_function":
        raise UnsupportedNetwork(f"{where(node)}: an index that depends on the input")
    assert callable(node.target)
    keywords = {key: constant(network, values, value) for key, value in node.kwargs.items()}
    return node.target(*(constant(network, values, value) for value in node.args), **keywords)


def compact(array: Ids) -> Ids:
    """Size 1 along every axis on which nothing varies."""
    for axis, size in enumerate(array.shape):
        if size > 1:
            first = np.take(array, [0], axis=axis)
            if (array == first).all():
                array = first
    return array


def by_position(array: npt.NDArray[np.int64], dim: int) -> Ids:
    """`(positions along dim, the rest)`."""
    turned = np.moveaxis(array, dim, 0)
    return turned.reshape(len(turned), turned[:1].size)
