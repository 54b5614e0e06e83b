"""A device whose latency is known: a table with stairs for every kernel of a network, and engines timed by it."""

from __future__ import annotations

from dataclasses import replace

from edgeprune.pruning.footprint import footprint
from edgeprune.pruning.graph import Network
from edgeprune.pruning.groups import find_groups
from edgeprune.pruning.latency import (
    KindCosts,
    LatencyTable,
    LayerKind,
    RestTerm,
    Stairs,
    Surface,
    layer_uses,
)
from edgeprune.pruning.records import MeasuredLatency

OFF = 1.2  # what a kernel off its alignment costs more


def table_of(network: Network, step: int, alignment: int | None = None) -> LatencyTable:
    """Kernels cost in proportion to their MACs at the next multiple of `step`, and OFF times that off the
    alignment (by default the step)."""
    alignment = step if alignment is None else alignment
    most: dict[LayerKind, tuple[int, int]] = {}
    for use in layer_uses(network):
        before = most.get(use.kind, (0, 0))
        most[use.kind] = max(before[0], use.in_channels), max(before[1], use.out_channels)
    stairs = Stairs(step, alignment)

    def counts(largest: int) -> tuple[int, ...]:
        return tuple(range(step, largest + step, step))

    def costs_of(kind: LayerKind, taken: int, given: int) -> KindCosts:
        area = kind.input[0] * kind.input[1] * kind.kernel[0] * kind.kernel[1] / kind.stride[0] ** 2 / 1e5
        rows = (0,) if kind.one_axis else counts(taken)
        grid = tuple(tuple(0.01 + area * max(i, 1) * o for o in counts(given)) for i in rows)
        aligned = Surface(rows, counts(given), grid)
        if alignment == 1:
            return KindCosts(kind, stairs, stairs, aligned)
        # Off the alignment a table is linear between its counts: it is given all of them.
        every = tuple(range(1, counts(given)[-1] + 1))
        lengths = (0,) if kind.one_axis else tuple(range(1, counts(taken)[-1] + 1))

        def above(count: int) -> int:
            return -(-count // step) * step

        slower = tuple(
            tuple(OFF * aligned.at(0 if kind.one_axis else above(i), above(o)) for o in every)
            for i in lengths
        )
        return KindCosts(kind, stairs, stairs, aligned, Surface(lengths, every, slower))

    return LatencyTable(
        device="simulated",
        target="host",
        backend="none",
        backend_version="1",
        precision="fp32",
        options={},
        power_mode=None,
        input_size=(64, 64),
        date="2026-01-01T00:00:00+00:00",
        kinds=tuple(costs_of(kind, *counts) for kind, counts in most.items() if kind.measured),
        rest=tuple(RestTerm(op, 0.5, 0.6) for op in sorted({kind.op for kind in most if not kind.measured})),
        rest_step=step,
        scale=1.0,
        constant_ms=0.05,
        networks=(),
    )


class Engines:
    """Measures a network by a table, which may be another than the one that channels are chosen by."""

    def __init__(self, table: LatencyTable, slower: float = 1.0) -> None:
        self.table = replace(table, correction=slower)
        self.timed = 0

    def __call__(self, network: Network) -> MeasuredLatency:
        self.timed += 1
        ms, memory = self.table.predict_ms(network), self.table.memory
        mib = memory and memory.predict_mib(footprint(network, self.table.rest_step))
        return MeasuredLatency(ms, ms * 0.99, ms * 1.01, mib)


def channels_of(network: Network) -> dict[str, int]:
    """Channels of each layer."""
    return {layer: len(ids) for layer, ids in find_groups(network).outputs.items()}
