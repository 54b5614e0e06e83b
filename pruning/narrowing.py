"""Narrow a network until a budget is met: a cost that is counted, or latency and memory that are measured.

Both depend on widths alone, so they are measured before any fine-tuning: units are chosen by the table, the
engine of what is left is timed, the table is corrected by that, and the choice is made anew until the engine
takes what was asked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from edgeprune.detectors import distributed
from edgeprune.pruning.budget import COSTS, BudgetError, Limits, choose
from edgeprune.pruning.graph import Network
from edgeprune.pruning.groups import Groups, find_groups
from edgeprune.pruning.importance import Scores
from edgeprune.pruning.latency import LatencyTable
from edgeprune.pruning.records import CLOSE, LatencyRecord, MeasuredLatency, MemoryRecord
from edgeprune.pruning.selection import (
    Budget,
    Selection,
    check_in_reach,
    latency_costs,
    memory_costs,
    select,
)

log = logging.getLogger(__name__)

TRIALS = 3  # engines measured in one iteration, at most
SPARE = 0.01  # of the memory: aimed so far below, since an engine that is above does not fit


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
    asked: float  # share of the unpruned network's cost, latency or memory that was to go
    left: float  # share of it that is left
    stopped: str | None  # what kept the budget from being met
    latency: LatencyRecord | None = None


@dataclass(frozen=True)
class Goals:
    """What an engine may take, or takes; None: no matter what."""

    ms: float | None
    mib: float | None

    def budgets(self, groups: Groups, table: LatencyTable) -> list[Budget]:
        """The goals with what the table says of a network."""
        found = []
        if self.ms is not None:
            found.append(Budget(latency_costs(groups, table), self.ms))
        if self.mib is not None:
            found.append(Budget(memory_costs(groups, table), self.mib))
        return found

    def taken(self, found: LatencyRecord) -> Goals:
        """What an engine takes, of that for which there are goals."""
        mib = found.memory.mib if found.memory else None
        return Goals(self.ms and found.ms, self.mib and mib)

    def share(self, found: LatencyRecord) -> float:
        """What an engine takes of the goal that it takes most of."""
        taken = self.taken(found)
        pairs = ((taken.ms, self.ms), (taken.mib, self.mib))
        return max(own / goal for own, goal in pairs if own is not None and goal is not None)

    def __str__(self) -> str:
        words = [] if self.ms is None else [f"{self.ms:.4g} ms"]
        return " and ".join(words + ([] if self.mib is None else [f"{self.mib:.4g} MiB"]))


@dataclass(frozen=True)
class LatencyBudget:
    """What the engine may take: the lowest latency of what is asked, and memory.

    Raises:
        BudgetError: If nothing is asked, a value is out of its range, or the table has no energy or memory.
    """

    table: LatencyTable
    """Of the device that the detector is for."""
    goal_ms: float | None = None
    speedup: float | None = None
    """Latency of the unpruned engine over the goal."""
    energy_mj: float | None = None
    """Of one image."""
    memory_mib: float | None = None
    measure: Callable[[Network], MeasuredLatency] | None = None
    """Measures the engine of a network. None: there is no device, and the table's prediction is all there is."""

    def __post_init__(self) -> None:
        asked = (self.goal_ms, self.speedup, self.energy_mj, self.memory_mib)
        for valid, rule in (
            (
                any(asked),
                "a latency budget needs --latency-budget-ms, --speedup, --energy-budget-mj or "
                "--memory-budget-mib",
            ),
            (
                all(value is None or value > 0 for value in asked),
                "a latency, energy or memory budget is above 0",
            ),
            (self.speedup is None or self.speedup > 1, "--speedup is above 1"),
            (
                self.energy_mj is None or self.table.power_w is not None,
                "--energy-budget-mj: the latency table holds no power, which its device does not tell",
            ),
            (
                self.memory_mib is None or self.table.memory is not None,
                "--memory-budget-mib: the latency table holds no memory: it was measured by an earlier version, or "
                "its device does not tell",
            ),
        ):
            if not valid:
                raise BudgetError(rule)

    def final(self, unpruned: LatencyRecord) -> Goals:
        """The goals of the last iteration."""
        goals_ms = [self.goal_ms, self.speedup and unpruned.ms / self.speedup]
        if self.energy_mj is not None and self.table.power_w is not None:
            goals_ms.append(self.energy_mj / self.table.power_w)
        return Goals(min((goal for goal in goals_ms if goal), default=None), self.memory_mib)

    def goals(self, unpruned: LatencyRecord, gone: Callable[[float], float]) -> Goals:
        """The goals of an iteration.

        Args:
            gone: of the share that is to go in all, the share that is gone after the iteration.
        """
        final = self.final(unpruned)

        def on_the_way(goal: float | None, whole: float) -> float | None:
            return goal if goal is None or goal >= whole else whole * (1 - gone(1 - goal / whole))

        whole_mib = 0.0 if unpruned.memory is None else unpruned.memory.mib
        return Goals(on_the_way(final.ms, unpruned.ms), on_the_way(final.mib, whole_mib))

    def begin(self, network: Network, groups: Groups, limits: Limits) -> LatencyRecord:
        """Measure the unpruned network, and make sure that the goals can be met.

        Args:
            groups: of the network, with what is protected.

        Raises:
            BudgetError: If they are met already, or are out of reach within the limits.
            LatencyTableError: If the table is not of this network.
        """
        record = self.record(network, groups, (), self.table, Goals(None, None))
        final = self.final(record)
        if final.share(record) <= 1:
            raise BudgetError(f"the unpruned network takes {final.taken(record)}, no more than {final}")
        table = corrected(self.table, record)
        check_in_reach(groups, final.budgets(groups, table), limits=limits, original=groups.channel_counts)
        return record

    def record(
        self,
        network: Network,
        groups: Groups,
        units: tuple[int, ...],
        table: LatencyTable,
        goals: Goals,
        *,
        gap: float = 0.0,
        trials: int = 1,
    ) -> LatencyRecord:
        """Measure the engine of a network, which lacks `units` of `groups`, beside what the table predicts."""
        first = distributed.rank() == 0
        measured = distributed.from_first(self.measure(network) if self.measure and first else None)
        predicted_ms, memory = latency_costs(groups, table).of(units), None
        if table.memory is not None:
            predicted_mib = memory_costs(groups, table).of(units)
            measured_mib = measured.memory_mib if measured else None
            model = table.memory.corrected(predicted_mib, measured_mib) if measured_mib else table.memory
            memory = MemoryRecord(goals.mib, predicted_mib, measured_mib, model.correction)
        table = table.corrected(predicted_ms, measured.ms) if measured else table
        return LatencyRecord(goals.ms, predicted_ms, measured, table.correction, gap, trials, memory)


def within_cost(candidates: Candidates, *, cost: str, share: float, per: str) -> Narrowed:
    """Remove until a share of the unpruned network's cost is gone, and not one bundle of units further.

    Biases that carry what removed channels leave behind count, and are known once the network is narrowed.

    Args:
        cost, per: as for `budget.choose`.

    Raises:
        BudgetError: If nothing can be removed.
    """
    whole = COSTS[cost](candidates.unpruned).total()
    asked = goal = math.floor(whole * (1 - share) * (1 + 1e-12))  # as `choose` reads it
    while True:
        choice = choose(
            candidates.groups,
            candidates.scores,
            cost=cost,
            goal=asked,
            per=per,
            limits=candidates.limits,
            original=candidates.unpruned.channel_counts,
        )
        network = candidates.remove(choice.units)
        left = COSTS[cost](find_groups(network)).total()
        if left <= goal or choice.stopped:
            stopped = choice.stopped if left > goal else None
            return Narrowed(network, choice.units, share, left / whole, stopped)
        asked = round(choice.cost) - 1  # costs are whole: next the first choice that takes more


def within_latency(
    candidates: Candidates, budget: LatencyBudget, goals: Goals, first: LatencyRecord, last: LatencyRecord
) -> Narrowed:
    """Remove until the engine takes what it may.

    Up to `TRIALS` choices are measured, each by the table that the one before corrected; the one nearest to the
    goals counts, of those within the memory if any is.

    Args:
        first: of the unpruned network.
        last: of the iteration before, whose correction of the table holds on.

    Raises:
        BudgetError: If nothing can be removed.
    """
    table = corrected(budget.table, last)
    spare = SPARE if budget.measure else 0.0
    aim = replace(goals, mib=goals.mib and goals.mib * (1 - spare))
    trials: list[Narrowed] = []
    for trial in range(1, TRIALS + 1):
        chosen = _selected(candidates, table, aim)
        if chosen.units in [known.units for known in trials]:
            break  # no other choice lies nearer
        network = candidates.remove(chosen.units)
        record = budget.record(
            network, candidates.groups, chosen.units, table, goals, gap=chosen.gap, trials=trial
        )
        predicted = ", ".join(f"{left:.4g}" for left in chosen.left)
        log.info("trial %d: %s asked, %s predicted, %s found", trial, goals, predicted, goals.taken(record))
        asked, left = _shares(goals, first, record)
        trials.append(Narrowed(network, chosen.units, asked, left, chosen.stopped, record))
        if record.measured is None or _miss(trials[-1], goals) <= (False, CLOSE):
            break
        table = corrected(budget.table, record)
    nearest = min(trials, key=lambda each: _miss(each, goals))
    if nearest.latency is not None and nearest.latency.missed:
        log.warning("the nearest of %d choices: %s", len(trials), nearest.latency.missed)
    return nearest


def corrected(table: LatencyTable, record: LatencyRecord) -> LatencyTable:
    """The table by which the engine of a record would have been predicted as measured."""
    memory = table.memory
    if memory is not None and record.memory is not None:
        memory = replace(memory, correction=record.memory.correction)
    return replace(table, correction=record.correction, memory=memory)


def _miss(trial: Narrowed, goals: Goals) -> tuple[bool, float]:
    """Whether it is over the memory, which unlike a latency is no matter of noise; how far off the goals it is."""
    record = trial.latency
    assert record is not None
    over = goals.mib is not None and record.memory is not None and record.memory.mib > goals.mib
    return over, abs(goals.share(record) - 1)


def _shares(goals: Goals, first: LatencyRecord, found: LatencyRecord) -> tuple[float, float]:
    """Shares of the unpruned engine's latency, or if none is asked for of its memory: to go, and left."""
    if goals.ms is not None:
        return 1 - goals.ms / first.ms, found.ms / first.ms
    assert goals.mib is not None and first.memory is not None and found.memory is not None
    return 1 - goals.mib / first.memory.mib, found.memory.mib / first.memory.mib


def _selected(candidates: Candidates, table: LatencyTable, goals: Goals) -> Selection:
    """The first process chooses, for all: where time is short, two might end with different choices."""
    chosen = None
    if distributed.rank() == 0:
        chosen = select(
            candidates.groups,
            candidates.scores,
            goals.budgets(candidates.groups, table),
            limits=candidates.limits,
            original=candidates.unpruned.channel_counts,
        )
    shared = distributed.from_first(chosen)
    assert shared is not None
    return shared
