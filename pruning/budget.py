"""Which units go: the least important first, until the budget is met and not one further.

Units are taken in one fixed order that does not depend on how much is asked, so a higher request removes the
same units and then more. Costs are exact at every moment (`counting.Terms`), so a budget in parameters, MACs
or channels is met to the last unit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeprune.data.errors import EdgePruneError
from edgeprune.pruning.counting import Terms, channel_terms, mac_terms, parameter_terms
from edgeprune.pruning.groups import Group, Groups
from edgeprune.pruning.importance import Scores


class BudgetError(EdgePruneError):
    """A budget cannot be met at all."""


COSTS: dict[str, Callable[[Groups], Terms]] = {
    "params": parameter_terms,
    "macs": mac_terms,
    "channels": channel_terms,
}


@dataclass(frozen=True)
class Limits:
    """What must stay, whatever the importance.

    Raises:
        BudgetError: If a value is out of its range.
    """

    min_channels: int = 1
    """Every layer keeps at least so many channels."""
    max_layer_ratio: float = 1.0
    """At most this share of a layer's original channels goes, in all iterations together."""
    channel_multiple: int = 1
    """Channels of a layer go down to multiples of this."""

    def __post_init__(self) -> None:
        for valid, rule in (
            (self.min_channels >= 1, "--min-channels is 1 or more"),
            (0 < self.max_layer_ratio <= 1, "--max-layer-ratio is above 0 and at most 1"),
            (self.channel_multiple >= 1, "--channel-multiple is 1 or more"),
        ):
            if not valid:
                raise BudgetError(rule)


@dataclass(frozen=True)
class Choice:
    """Units to remove, and how far they reach."""

    units: tuple[int, ...]
    cost: float
    """What is left, in the unit of the budget."""
    stopped: str | None
    """What kept the budget from being met; None if it was."""


def choose(
    groups: Groups,
    scores: Scores,
    *,
    cost: str,
    goal: float,
    per: str,
    limits: Limits,
    original: Mapping[str, int],
) -> Choice:
    """Choose units until the cost is at most `goal`.

    Args:
        scores: importance by unit id.
        cost: what `goal` counts: "params", "macs" or "channels".
        per: "params" or "macs" ranks by importance for what a unit's removal alone saves now, "none" by
            importance.
        original: channels of each layer before any pruning.

    Raises:
        BudgetError: If the cost is above `goal` and nothing can be removed.
    """
    goal = math.floor(goal * (1 + 1e-12))  # costs are whole; 59.999999999999996 asks for 60
    savings = None if per == "none" else _savings(COSTS[per](groups))
    ledger = Ledger(groups, limits, original)
    spent = _Spending(COSTS[cost](groups))
    bundles = [
        (rank, index, place, units)
        for index, group in enumerate(groups.groups)
        for place, (rank, units) in enumerate(_bundles(group, scores, savings, ledger))
    ]
    removed: list[int] = []
    for _, _, _, units in sorted(bundles):
        if spent.total <= goal:
            break
        if ledger.take(units):
            removed += units
            spent.take(units)
    stopped = None
    if spent.total > goal:
        binding = ", ".join(sorted(ledger.binding)) or "there is no other removable channel"
        stopped = f"{spent.total:,.0f} {cost} are left where {goal:,} were asked: {binding}"
        if not removed:
            whole = list(groups.protected.items())
            kept = "; ".join(f"{layer} ({reason})" for layer, reason in whole[:5])
            more = f" and {len(whole) - 5} more" if len(whole) > 5 else ""
            raise BudgetError(
                f"nothing can be removed: {stopped}" + (f"; kept whole: {kept}{more}" if kept else "")
            )
    return Choice(tuple(sorted(removed)), spent.total, stopped)


def _bundles(
    group: Group, scores: Scores, savings: Mapping[int, float] | None, ledger: Ledger
) -> list[tuple[float, tuple[int, ...]]]:
    """Units of a group in the order of removal, in bundles that bring its layers to multiples, each with its
    rank; what fills no bundle stays."""
    multiple = ledger.limits.channel_multiple
    order = sorted(group.units, key=lambda unit: (_rank([unit], scores, savings), unit))
    left = {layer: ledger.channels[layer] for layer in group.layers}
    bundles: list[tuple[float, tuple[int, ...]]] = []
    pending: list[int] = []
    rank = 0.0
    for unit in order:
        pending.append(unit)
        for layer, channels in ledger.members[unit].items():
            left[layer] -= channels
        if all(count % multiple == 0 for count in left.values()):
            rank = max(rank, _rank(pending, scores, savings))  # never before what comes first in its group
            bundles.append((rank, tuple(pending)))
            pending = []
    if pending:
        ledger.binding.add(f"--channel-multiple {multiple}")
    return bundles


def _rank(units: list[int], scores: Scores, savings: Mapping[int, float] | None) -> float:
    importance = float(scores[units].sum())
    return importance / (len(units) if savings is None else max(sum(savings[unit] for unit in units), 1e-12))


def _savings(terms: Terms) -> dict[int, float]:
    """What the removal of each unit alone saves."""
    spending = _Spending(terms)
    return {unit: spending.saved_by(unit) for unit in terms.members}


class _Spending:
    """The cost that is left, followed exactly."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.sizes = terms.sizes.copy()
        self.of_factor: dict[int, list[int]] = {}
        for term, factors in enumerate(terms.factors):
            for factor in set(factors):
                self.of_factor.setdefault(factor, []).append(term)
        self.values = np.array([self._value(term, self.sizes) for term in range(len(terms.factors))])
        self.total = float(self.values.sum())

    def _value(self, term: int, sizes: npt.NDArray[np.int64]) -> float:
        kept = (int(sizes[factor]) for factor in self.terms.factors[term])
        return float(self.terms.coefficients[term] * math.prod(kept))

    def _touched(self, unit: int) -> set[int]:
        return {term for factor in self.terms.members[unit] for term in self.of_factor.get(factor, [])}

    def saved_by(self, unit: int) -> float:
        sizes = self.sizes.copy()
        for factor, positions in self.terms.members[unit].items():
            sizes[factor] -= positions
        return sum(float(self.values[term]) - self._value(term, sizes) for term in self._touched(unit))

    def take(self, units: tuple[int, ...]) -> None:
        touched: set[int] = set()
        for unit in units:
            for factor, positions in self.terms.members[unit].items():
                self.sizes[factor] -= positions
            touched |= self._touched(unit)
        for term in touched:
            self.values[term] = self._value(term, self.sizes)
        self.total = float(self.values.sum())


class Ledger:
    """How many channels each layer, and each tensor, has left; what may still go, and what forbids it."""

    def __init__(self, groups: Groups, limits: Limits, original: Mapping[str, int]) -> None:
        self.limits = limits
        self.binding: set[str] = set()
        self.channels = groups.channel_counts
        self.members: dict[int, dict[str, int]] = {unit: {} for unit in range(1, groups.units + 1)}
        multiple = limits.channel_multiple
        self.floors: dict[str, tuple[int, str]] = {}  # the highest, and the option that sets it
        for layer, ids in groups.outputs.items():
            by_ratio = original[layer] - math.floor(original[layer] * limits.max_layer_ratio + 1e-9)
            self.floors[layer] = max(
                (limits.min_channels, f"--min-channels {limits.min_channels}"),
                (by_ratio, f"--max-layer-ratio {limits.max_layer_ratio:g}"),
                (multiple if multiple > 1 else 0, f"--channel-multiple {multiple}"),
            )
            for unit, channels in zip(*np.unique(ids[ids > 0], return_counts=True), strict=True):
                self.members[int(unit)][layer] = int(channels)
        self.left = [len(piece) for piece in groups.pieces]
        self.pieces: dict[int, list[int]] = {}
        for index, piece in enumerate(groups.pieces):
            for unit in piece:
                self.pieces.setdefault(int(unit), []).append(index)

    def take(self, units: tuple[int, ...]) -> bool:
        """Take all of them, or none and note which limit forbids it."""
        layers = Counter[str]()
        for unit in units:
            layers.update(self.members[unit])
        pieces = Counter(piece for unit in units for piece in self.pieces.get(unit, []))
        against = {
            self.floors[layer][1]
            for layer, channels in layers.items()
            if self.channels[layer] - channels < self.floors[layer][0]
        }
        multiple = self.limits.channel_multiple
        if any((self.channels[layer] - channels) % multiple for layer, channels in layers.items()):
            against.add(f"--channel-multiple {multiple}")  # an earlier bundle of the group had to stay
        if not against and any(self.left[piece] == count for piece, count in pieces.items()):
            against.add("every tensor needs a channel")
        self.binding |= against
        if not against:
            self.channels = {layer: count - layers[layer] for layer, count in self.channels.items()}
            self.left = [count - pieces[piece] for piece, count in enumerate(self.left)]
        return not against
