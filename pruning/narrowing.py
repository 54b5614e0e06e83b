"""Narrow a network until a budget is met: a cost that is counted, or a latency that is measured.

A latency depends on widths alone, so it is measured before any fine-tuning: units are chosen by the table, the
engine of what is left is timed, the table is corrected by that, and the choice is made anew until the engine
takes what was asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from edgeprune.detectors import distributed
from edgeprune.pruning.budget import COSTS, BudgetError, Limits, choose
from edgeprune.pruning.graph import Network
from edgeprune.pruning.groups import Groups, find_groups
from edgeprune.pruning.importance import Scores
from edgeprune.pruning.latency import LatencyTable
from edgeprune.pruning.records import LatencyRecord, MeasuredLatency
from edgeprune.pruning.selection import Selection, check_in_reach, latency_costs, select

log = logging.getLogger(__name__)

TRIALS = 3  # engines measured in one iteration, at most
CLOSE = 0.02  # of the goal: an engine this near it is not improved on


@dataclass(frozen=True)
class Candidates:
    """What may go, and how."""

    groups: Groups
    scores: Scores
    remove: Callable[[tuple[int, ...]], Network]
    """Units -> the network without them."""
    unpruned: Groups
    limits: Limits


@dataclass(frozen=True)
class Narrowed:
    """A network without the units that a budget took."""

    network: Network
    units: tuple[int, ...]
    left: float  # share of the unpruned network's cost or latency
    stopped: str | None  # what kept the budget from being met
    latency: LatencyRecord | None = None


@dataclass(frozen=True)
class LatencyBudget:
    """A latency to come down to: the lowest of what is asked.

    Raises:
        BudgetError: If nothing is asked, a value is out of its range, or the table has no energy.
    """

    table: LatencyTable
    """Of the device that the detector is for."""
    goal_ms: float | None = None
    speedup: float | None = None
    """Latency of the unpruned engine over the goal."""
    energy_mj: float | None = None
    """Of one image."""
    measure: Callable[[Network], MeasuredLatency] | None = None
    """Times the engine of a network. None: there is no device, and the table's prediction is all there is."""

    def __post_init__(self) -> None:
        asked = (self.goal_ms, self.speedup, self.energy_mj)
        for valid, rule in (
            (any(asked), "a latency budget needs --latency-budget-ms, --speedup or --energy-budget-mj"),
            (all(value is None or value > 0 for value in asked), "a latency or energy budget is above 0"),
            (self.speedup is None or self.speedup > 1, "--speedup is above 1"),
            (
                self.energy_mj is None or self.table.power_w is not None,
                "--energy-budget-mj: the latency table holds no power, which its device does not tell",
            ),
        ):
            if not valid:
                raise BudgetError(rule)

    def final_ms(self, unpruned_ms: float) -> float:
        """The goal of the last iteration."""
        goals = [self.goal_ms, self.speedup and unpruned_ms / self.speedup]
        if self.energy_mj is not None and self.table.power_w is not None:
            goals.append(self.energy_mj / self.table.power_w)
        return min(goal for goal in goals if goal)

    def begin(self, network: Network, groups: Groups, limits: Limits) -> LatencyRecord:
        """Time the unpruned network, and make sure that the goal can be met.

        Args:
            groups: of the network, with what is protected.

        Raises:
            BudgetError: If it is met already, or is out of reach within the limits.
            LatencyTableError: If the table is not of this network.
        """
        predicted_ms = self.table.predict_ms(network)
        record = _record(None, predicted_ms, self.timed(network), self.table, 0.0, 1)
        goal_ms = self.final_ms(record.ms)
        if goal_ms >= record.ms:
            raise BudgetError(f"the unpruned network takes {record.ms:.4g} ms, no more than {goal_ms:.4g} ms")
        table = replace(self.table, correction=record.correction)
        costs = latency_costs(groups, table)
        check_in_reach(groups, costs, goal_ms, limits=limits, original=groups.channel_counts)
        return record

    def timed(self, network: Network) -> MeasuredLatency | None:
        """The first process times, for all."""
        first = distributed.rank() == 0
        return distributed.from_first(self.measure(network) if self.measure and first else None)


def within_cost(candidates: Candidates, *, cost: str, share: float, per: str) -> Narrowed:
    """Remove until a share of the unpruned network's cost is gone.

    Args:
        cost, per: as for `budget.choose`.

    Raises:
        BudgetError: If nothing can be removed.
    """
    whole = COSTS[cost](candidates.unpruned).total()
    added = 0.0  # biases that carry what removed channels leave behind
    while True:
        choice = choose(
            candidates.groups,
            candidates.scores,
            cost=cost,
            goal=whole * (1 - share) - added,
            per=per,
            limits=candidates.limits,
            original=candidates.unpruned.channel_counts,
        )
        network = candidates.remove(choice.units)
        left = COSTS[cost](find_groups(network)).total()
        if choice.stopped or left - choice.cost <= added:
            return Narrowed(network, choice.units, left / whole, choice.stopped)
        added = left - choice.cost


def within_latency(
    candidates: Candidates, budget: LatencyBudget, share: float, first: LatencyRecord, last: LatencyRecord
) -> Narrowed:
    """Remove until a share of the unpruned engine's latency is gone.

    Up to `TRIALS` choices are measured, each by the table that the one before corrected; the one nearest to the
    goal counts.

    Args:
        first: of the unpruned network.
        last: of the iteration before, whose correction of the table holds on.

    Raises:
        BudgetError: If nothing can be removed.
    """
    goal_ms = first.ms * (1 - share)
    table = replace(budget.table, correction=last.correction)
    trials: list[Narrowed] = []
    for trial in range(1, TRIALS + 1):
        chosen = _selected(candidates, table, goal_ms)
        if chosen.units in [known.units for known in trials]:
            break  # no other choice lies nearer
        network = candidates.remove(chosen.units)
        record = _record(goal_ms, chosen.cost, budget.timed(network), table, chosen.gap, trial)
        log.info(
            "trial %d: %.3f ms predicted, %.3f ms found, %.3f asked", trial, chosen.cost, record.ms, goal_ms
        )
        trials.append(Narrowed(network, chosen.units, record.ms / first.ms, chosen.stopped, record))
        if record.measured is None or abs(record.ms / goal_ms - 1) <= CLOSE:
            break
        table = replace(table, correction=record.correction)
    return min(trials, key=lambda each: abs(each.left - (1 - share)))


def _selected(candidates: Candidates, table: LatencyTable, goal_ms: float) -> Selection:
    """The first process chooses, for all: where time is short, two might end with different choices."""
    chosen = None
    if distributed.rank() == 0:
        chosen = select(
            candidates.groups,
            candidates.scores,
            latency_costs(candidates.groups, table),
            goal_ms,
            limits=candidates.limits,
            original=candidates.unpruned.channel_counts,
        )
    shared = distributed.from_first(chosen)
    assert shared is not None
    return shared


def _record(
    asked_ms: float | None,
    predicted_ms: float,
    measured: MeasuredLatency | None,
    table: LatencyTable,
    gap: float,
    trials: int,
) -> LatencyRecord:
    corrected = table.corrected(predicted_ms, measured.ms) if measured else table
    return LatencyRecord(asked_ms, predicted_ms, measured, corrected.correction, gap, trials)
