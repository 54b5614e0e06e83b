"""Which channels must go together, found by following every channel of every tensor through the graph.

Each channel that a layer produces gets a label (`labels.py`); what each operation does to labels is in
`rules.py`. What is united goes together: it is one unit. A tensor can lose whole slices along one axis only;
where labels vary along more than one (channel shuffle, grouped convolution, attention heads) they are united
until one axis is left, the one that keeps the most units apart. What cannot be followed keeps its channels,
with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import fx

from edgeprune.pruning.graph import Network, UnsupportedNetwork
from edgeprune.pruning.labels import Book, Ids, Labels, Producer, Reader, by_position, compact
from edgeprune.pruning.rules import follow

__all__ = ["Group", "Groups", "Labels", "Producer", "Reader", "find_groups"]


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
    outputs: Mapping[str, Ids]  # layer -> unit ids of the channels that it produces
    protected: Mapping[str, str]  # layer -> why none of its channels may go
    fragile: frozenset[int]  # units under group or layer norm: their removal changes what the norm measures
    pieces: tuple[Ids, ...]  # sets of positions, as unit ids, of which one must stay

    def channels(self, layer: str) -> Ids:
        """Unit ids of the channels that a layer produces."""
        return self.outputs[layer]

    @property
    def channel_counts(self) -> dict[str, int]:
        """Channels that each layer makes."""
        return {layer: len(ids) for layer, ids in self.outputs.items()}

    def protect(self, patterns: Sequence[str]) -> Groups:
        """The same with every unit kept that a layer matching one of the glob patterns takes part in.

        Raises:
            UnsupportedNetwork: If a pattern matches no layer.
        """
        layers = {producer.layer for producer in self.producers}
        for pattern in patterns:
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                raise UnsupportedNetwork(
                    f"--protect {pattern}: no layer of that name; there are {', '.join(sorted(layers))}"
                )
        named = {layer for layer in layers for pattern in patterns if fnmatchcase(layer, pattern)}
        barred = {int(unit) for layer in named for unit in self.channels(layer)}
        groups = (Group(g.layers, tuple(unit for unit in g.units if unit not in barred)) for g in self.groups)
        reasons = dict.fromkeys(sorted(named), "protected by name")
        return replace(
            self,
            groups=tuple(group for group in groups if group.units),
            protected={**reasons, **self.protected},
        )


def find_groups(network: Network) -> Groups:
    """Follow all channels of `network`; the network is not changed."""
    book = Book(network)
    for node in network.graph.nodes:
        if node.op == "placeholder":
            book.labels[node] = book.kept(node)
        elif node.op == "call_function":
            book.labels[node] = follow(book, node)
        elif node.op == "output":
            for result in node.all_input_nodes:
                for labels in book.of(result):
                    book.pin(labels.array, "an output of the network")
    return _number(book, _resolve(book))


def _resolve(book: Book) -> Ids:
    """Label -> class, 0 is kept; every tensor varies along one axis and can lose any class."""
    while True:
        classes = _classes(book)
        before = len(book.edges), len(book.pins)
        for array in _arrays(book):
            _unite_to_one_axis(book, array, classes)
        if before == (len(book.edges), len(book.pins)):
            for piece in _pieces(_arrays(book), classes):
                if len(piece) == 1:
                    book.pin(
                        np.flatnonzero(classes == piece[0]), "its channels go all together or not at all"
                    )
            if before[1] == len(book.pins):
                return classes


def _arrays(book: Book) -> list[Ids]:
    """Labels of everything that must stay rectangular."""
    flowing = [labels.array for node in book.labels for labels in book.of(node)]
    return [*flowing, *(raw.array for raw in book.raw.values()), *book.grids, *book.axes.values()]


def _components(book: Book) -> Ids:
    empty = [np.zeros(0, np.int64)]
    left, right = (np.concatenate([edge[side] for edge in book.edges] or empty) for side in (0, 1))
    links = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(book.count, book.count))
    return connected_components(links, directed=False)[1].astype(np.int64)


def _classes(book: Book) -> Ids:
    """Label -> class; class 0 is kept."""
    classes = _components(book) + 1
    kept = np.zeros(int(classes.max()) + 1, dtype=bool)
    for labels, _ in book.pins:
        kept[classes[labels]] = True
    classes[kept[classes]] = 0
    classes[0] = 0
    return classes


def _unite_to_one_axis(book: Book, array: Ids, classes: Ids) -> None:
    if array.size < 2:
        return
    seen = compact(classes[array])
    axes = [axis for axis, size in enumerate(seen.shape) if size > 1]
    if len(axes) > 1:
        best = max(axes, key=lambda axis: (_classes_left(seen, axis), -axis))
        rows = by_position(array, best)
        book.unite(rows[:, 1:], rows[:, :1], "its labels vary along two axes")


def _classes_left(classes: Ids, axis: int) -> int:
    """How many removable classes remain when all that shares a position along `axis` is united."""
    rows = by_position(classes, axis)
    names, inverse = np.unique(rows, return_inverse=True)
    row = np.repeat(np.arange(len(rows)) + len(names), rows.shape[1])
    size = len(names) + len(rows)
    links = coo_matrix((np.ones(inverse.size, np.int8), (inverse.ravel(), row)), shape=(size, size))
    count, _ = connected_components(links, directed=False)
    return int(count - (names[0] == 0))


def _pieces(arrays: Sequence[Ids], classes: Ids) -> tuple[Ids, ...]:
    """Sets of positions, as classes, of which one must stay so that no tensor and no weight is left empty."""
    found: dict[bytes, Ids] = {}
    for array in arrays:
        held = np.unique(classes[array])
        if held.size and held[0] > 0:  # a class 0 in it stays anyway
            found.setdefault(held.tobytes(), held)
    return tuple(found.values())


def _number(book: Book, classes: Ids) -> Groups:
    """Number the classes that layers produce; a class of nothing but parameters stays."""
    producers = tuple(book.producers.values())
    made = [classes[book.axes[producer.weight, producer.axis]] for producer in producers]
    alive = np.unique(np.concatenate([*made, np.zeros(1, np.int64)]))
    alive = alive[alive > 0]
    ids = np.zeros(int(classes.max()) + 1, dtype=np.int64)
    ids[alive] = np.arange(1, len(alive) + 1)
    unit = ids[classes]

    def renumber(held: Any) -> Any:
        if isinstance(held, list):
            return [renumber(item) for item in held]
        return Labels(compact(unit[held.array]), held.shape)

    flowing = {node: held for node, held in book.labels.items() if held is not None}
    flowing |= {
        node: book.raw[node.target]
        for node in book.network.graph.nodes
        if node.op == "get_attr" and node.target in book.raw
    }
    axes = {key: unit[labels] for key, labels in book.axes.items()}
    for name, raw in book.raw.items():
        array = compact(unit[raw.array])
        axes |= {
            (name, dim): by_position(array, dim)[:, 0] for dim, size in enumerate(array.shape) if size > 1
        }
    produced = {(producer.weight, producer.axis) for producer in producers}
    normed = (row for grid in book.normed for row in unit[grid] if len(np.unique(row)) > 1)
    return Groups(
        network=book.network,
        units=len(alive),
        groups=_gather(book, unit),
        producers=producers,
        readers=_foldable(book),
        nodes={node: renumber(held) for node, held in flowing.items()},
        axes={key: labels for key, labels in axes.items() if labels.any() or key in produced},
        outputs={layer: unit[labels] for layer, labels in book.outputs.items()},
        protected=_reasons(book, unit),
        fragile=frozenset(int(i) for row in normed for i in row if i),
        pieces=_pieces(_arrays(book), unit),
    )


def _foldable(book: Book) -> tuple[Reader, ...]:
    """The readers; a constant moves into a bias only if all users of weight and bias agree on it."""
    constants = {
        node: {str(source.target) for source in node.all_input_nodes if source.op == "get_attr"}
        for node in book.network.graph.nodes
    }
    folding = {reader.node for reader in book.readers if reader.foldable}

    def agreed(reader: Reader) -> bool:
        own = constants[reader.node]
        return all(node in folding and used == own for node, used in constants.items() if used & own)

    return tuple(replace(reader, foldable=reader.foldable and agreed(reader)) for reader in book.readers)


def _gather(book: Book, unit: Ids) -> tuple[Group, ...]:
    """Units that share a producer belong to one group; producers in the order of execution."""
    parent = list(range(int(unit.max(initial=0)) + 1))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    members = {
        p.layer: [int(i) for i in unit[book.axes[p.weight, p.axis]] if i] for p in book.producers.values()
    }
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


def _reasons(book: Book, unit: Ids) -> dict[str, str]:
    """Why a layer keeps all its channels: the first reason that reached one of them."""
    component = _components(book)
    reason_of: dict[int, str] = {}
    for labels, reason in book.pins:
        for index in np.unique(component[labels]):
            reason_of.setdefault(int(index), reason)
    kept = ((p.layer, book.axes[p.weight, p.axis]) for p in book.producers.values())
    return {layer: reason_of[int(component[labels[0]])] for layer, labels in kept if not unit[labels].any()}
