"""Narrowing to a budget: nothing more goes than it takes, and what it misses is said."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from simulated_device import Engines, table_of
from small import groups_of, pictures, seeded
from torch import Tensor, nn

from edgeprune.pruning.budget import Limits, choose
from edgeprune.pruning.graph import Network, tensors
from edgeprune.pruning.narrowing import Candidates, LatencyBudget, within_cost, within_latency
from edgeprune.pruning.records import LatencyRecord, MeasuredLatency, MemoryRecord
from edgeprune.pruning.replacement import REPLACEMENTS, input_statistics
from edgeprune.pruning.surgery import remove


class Bare(nn.Module):
    """Convolutions without biases: the first removal before each adds one, as wide as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 20, 1, bias=False)
        self.c, self.z = nn.Conv2d(20, 8, 1, bias=False), nn.Conv2d(8, 12, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.z(self.c(self.b(self.a(x).relu()).relu()).relu())


def candidates_of(seed: int) -> Candidates:
    groups = groups_of(seeded(Bare))
    statistics = input_statistics(groups, lambda: [pictures()], covariances=False)

    @cache
    def without(units: tuple[int, ...]) -> Network:
        return remove(groups, units, REPLACEMENTS["mean"](groups, units, statistics))

    scores = np.random.default_rng(seed).lognormal(0, 1, groups.units + 1)
    return Candidates(groups, scores, without, groups, Limits())


def params(network: Network) -> int:
    return sum(tensor.numel() for _, tensor in tensors(network))


@pytest.mark.parametrize("seed", range(3))
def test_no_more_goes_than_the_budget_takes(seed: int) -> None:
    """Of all choices in their fixed order, every one narrowed and its parameters counted, biases that were added with
    them: the first that meets the budget, whatever is asked; so where more is asked, the same units go and more. Where
    none does, the last, and what binds is said."""
    candidates = candidates_of(seed)
    groups, scores = candidates.groups, candidates.scores
    whole = params(groups.network)
    chain = [()]
    for goal in range(whole, 0, -1):
        choice = choose(
            groups,
            scores,
            cost="params",
            goal=goal,
            per="params",
            limits=Limits(),
            original=groups.channel_counts,
        )
        chain += [choice.units] if choice.units != chain[-1] else []
        if choice.stopped:
            break
    left = [params(candidates.remove(units)) for units in chain]
    for goal in range(whole - 1, min(left) - 20, -3):
        found = within_cost(candidates, cost="params", share=1 - goal / whole, per="params")
        meets = [units for units, count in zip(chain, left, strict=True) if count <= goal]
        assert found.units == (meets[0] if meets else chain[-1])
        assert found.left == params(found.network) / whole
        assert (found.stopped is None) == bool(meets)


def test_a_budget_that_is_missed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """An engine that does not get as fast as any table says: the nearest of three choices counts, and a line says
    what it takes and what was asked; without a device there is nothing to say."""
    groups = groups_of(seeded(Bare))
    table = table_of(groups.network, 1)
    engines = Engines(table)
    whole_ms = table.predict_ms(groups.network)

    def stubborn(network: Network) -> MeasuredLatency:
        return replace(engines(network), ms=whole_ms, low_ms=0.98 * whole_ms, high_ms=1.02 * whole_ms)

    scores = np.ones(groups.units + 1)
    candidates = Candidates(groups, scores, lambda units: remove(groups, units), groups, Limits())
    for measure in (stubborn, None):
        caplog.clear()
        budget = LatencyBudget(table, speedup=1.2, measure=measure)
        first = budget.begin(groups.network, groups, Limits())
        with caplog.at_level(logging.WARNING):
            narrow = within_latency(candidates, budget, budget.final(first), first, first)
        assert narrow.latency is not None
        words = f"takes {whole_ms:.2f} ms ({0.98 * whole_ms:.2f} to {1.02 * whole_ms:.2f}) where"
        words += f" {whole_ms / 1.2:.2f} ms were asked"
        assert [words in line for line in caplog.messages] == ([True] if measure else [])


@pytest.mark.parametrize(
    ("low_ms", "memory_mib", "missed"),
    [
        (20.3, 10.0, None),  # within 2 %
        (20.5, 10.0, "the engine takes 21.00 ms (20.50 to 22.00) where 20.00 ms were asked"),
        (20.3, 10.2, "the engine takes 10.2 MiB where 10.0 MiB were asked"),
        (None, 10.0, None),  # too few rounds to know
    ],
)
def test_missed_is_what_is_clearly_above(low_ms: float | None, memory_mib: float, missed: str | None) -> None:
    """Latency by its interval, memory by what it is."""
    measured = MeasuredLatency(21.0, low_ms, None if low_ms is None else 22.0, memory_mib)
    record = LatencyRecord(20.0, 20.0, measured, 1.0, 0.0, 3, MemoryRecord(10.0, 10.0, memory_mib, 1.0))
    assert record.missed == missed
