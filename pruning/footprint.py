"""What a network must hold to run: its weights, and the activations that live at once.

A runtime folds batch norm and activations into convolutions, a view lies in its source's memory, and feature
maps lie in blocks of channels from the first convolution on. So there are fewer buffers than tensors in
`counting.Cost.activation_bytes`. A width between two blocks holds as much as the block above, and is held a second
time without blocks, for the kernels that take none. The input is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, fx

from edgeprune.pruning.counting import TermBuilder, Terms, add_parameters, unit_ids
from edgeprune.pruning.graph import Network, operation, shapes
from edgeprune.pruning.groups import Groups, find_groups
from edgeprune.pruning.latency import free_operations
from edgeprune.pruning.memory import Footprint

FLOAT_MIB = 4 / (1 << 20)
FEATURE_MAP_AXES = 3  # (C, H, W): channels lie in blocks


@dataclass(frozen=True)
class Buffer:
    """What one operation writes for one image."""

    shape: tuple[int, ...]
    blocked: bool  # its channels lie in blocks
    axis: int  # along which channels go
    factor: int | None  # of its length; None: it stays

    def mib(self, length: int, block: int) -> float:
        """As float32.

        Args:
            length: of `axis`.
            block: channels; where they lie in blocks, what is no multiple is held in both layouts.
        """
        shape = [*self.shape[: self.axis], length, *self.shape[self.axis + 1 :]]
        if self.blocked and shape[0] % block:
            shape[0] += -(-shape[0] // block) * block
        return math.prod(shape) * FLOAT_MIB


@dataclass(frozen=True)
class FootprintTerms:
    """Weights and activations of a network in terms of the units kept."""

    parameters: Terms  # its sizes and members hold for the buffers' factors too
    buffers: tuple[Buffer, ...]
    points: tuple[tuple[int, ...], ...]  # buffers that live at once, without what is part of another point

    def footprint(self, block: int, sizes: npt.NDArray[np.int64] | None = None) -> Footprint:
        """With `sizes[f]` channels in factor f; all of them where None."""
        kept = self.parameters.sizes if sizes is None else sizes
        held = [
            buffer.mib(
                buffer.shape[buffer.axis] if buffer.factor is None else int(kept[buffer.factor]), block
            )
            for buffer in self.buffers
        ]
        most = max((sum(held[index] for index in point) for point in self.points), default=0.0)
        return Footprint(self.parameters.total(kept) * FLOAT_MIB, most)


def footprint(network: Network, block: int) -> Footprint:
    """What a network must hold.

    Args:
        block: channels in which feature maps lie (`LatencyTable.rest_step`).
    """
    return footprint_terms(find_groups(network)).footprint(block)


def footprint_terms(groups: Groups) -> FootprintTerms:
    """What a grouped network must hold, as a function of the units kept."""
    build = TermBuilder(groups)
    add_parameters(build, groups)
    values = shapes(groups.network)
    tenures = _tenures(groups.network, values)
    buffers = []
    for tenure in tenures:
        shape = tuple(values[tenure.tensor].shape[1:])
        blocked = tenure.convolved and len(shape) == FEATURE_MAP_AXES
        buffer = Buffer(shape, blocked, 0, None)
        for axis in range(len(shape)):
            ids = unit_ids(groups, tenure.tensor, axis + 1)
            if ids is not None and ids.any():
                buffer = Buffer(shape, blocked, axis, build.factor(ids))
        buffers.append(buffer)
    alive = {
        frozenset(index for index, each in enumerate(tenures) if each.begin <= moment <= each.end)
        for moment in (tenure.begin for tenure in tenures)
    }
    whole = [point for point in alive if not any(point < other for other in alive)]
    return FootprintTerms(
        build.terms(), tuple(buffers), tuple(sorted(tuple(sorted(point)) for point in whole))
    )


@dataclass
class _Tenure:
    """When a buffer is needed: from one node of the graph to another, by their numbers."""

    tensor: fx.Node  # of the buffer's shape
    convolved: bool  # a convolution wrote it, or what it was made from
    begin: int
    end: int


def _tenures(network: Network, values: Mapping[fx.Node, Any]) -> list[_Tenure]:
    """In the order of the graph, whose nodes give `values`."""
    free = free_operations(network)
    held: dict[fx.Node, _Tenure] = {}  # node -> the buffer that its result lies in
    tenures = []
    for moment, node in enumerate(network.graph.nodes):
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        read = [held[source] for source in sources if source in held]
        for tenure in read:
            tenure.end = moment
        if node in free and sources:
            if sources[0] in held:
                held[node] = held[sources[0]]
        elif node.op == "call_function":
            # what gives several tensors writes as much as it reads
            tensor = node if isinstance(values[node], Tensor) else sources[0]
            if values[tensor].dim() > 1:  # others are a few numbers, without a batch
                convolved = operation(node).startswith("conv") or any(tenure.convolved for tenure in read)
                held[node] = _Tenure(tensor, convolved, moment, moment)
                tenures.append(held[node])
    return tenures
