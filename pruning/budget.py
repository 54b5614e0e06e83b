"""Which units go: the least important first, until the budget is met and not one further.

Units are taken in one fixed order that does not depend on how much is asked, so a higher request removes the same units
and then more. Costs are exact at every moment (`counting.Terms`), so a budget in parameters, MACs or channels is met
to the last unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

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
        per: "params" or "macs" ranks by importance for what a unit's removal alone saves now; "none" by importance.
        original: channels of each layer before any pruning.

    Raises:
        BudgetError: If the cost is above `goal` and nothing can be removed.
    """
    terms = COSTS[cost](groups)
    savings = None if per == "none" else _savings(COSTS[per](groups))
    ledger = _Ledger(groups, limits, original)
    spent = _Spending(terms)
    bundles = [
        (key, index, place, units)
        for index, group in enumerate(groups.groups)
        for place, (key, units) in enumerate(_bundles(group, scores, savings, ledger, limits.channel_multiple))
    ]
    removed: list[int] = []
    closed: set[int] = set()
    for _, index, _, units in sorted(bundles):
        if spent.total <= goal:
            break
        if index in closed:
            continue
        if not ledger.take(units):
            closed.add(index)
            continue
        removed += units
        spent.take(units)
    stopped = None
    if spent.total > goal:
        binding = ", ".join(sorted(ledger.binding)) or "every removable channel is gone"
        stopped = f"{spent.total:,.0f} {cost} are left where {goal:,.0f} were asked: {binding}"
        if not removed:
            protected = "; ".join(f"{layer}: {reason}" for layer, reason in list(groups.protected.items())[:5])
            raise BudgetError(f"nothing can be removed: {stopped}" + (f"; kept whole: {protected}" if protected else ""))
    return Choice(tuple(sorted(removed)), spent.total, stopped)


def _bundles(
    group: Group, scores: Scores, savings: Mapping[int, float] | None, ledger: _Ledger, multiple: int
) -> list[tuple[float, tuple[int, ...]]]:
    """Units of a group in the order of removal, in bundles that bring its layers to multiples, each with its rank."""
    order = sorted(group.units, key=lambda unit: (_rank([unit], scores, savings), unit))
    bundles: list[tuple[float, tuple[int, ...]]] = []
    left = {layer: ledger.channels[layer] for layer in group.layers}
    pending: list[int] = []
    rank = 0.0
    for unit in order:
        pending.append(unit)
        for layer, channels in ledger.taken_by(unit).items():
            if layer in left:
                left[layer] -= channels
        if all(count % multiple == 0 for count in left.values()):
            # Never before what comes first in the same group.
            rank = max(rank, _rank(pending, scores, savings))
            bundles.append((rank, tuple(pending)))
            pending = []
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

    def _value(self, term: int, sizes: np.ndarray) -> float:  # type: ignore[type-arg]
        value = float(self.terms.coefficients[term])
        for factor in self.terms.factors[term]:
            value *= int(sizes[factor])
        return value

    def _touched(self, unit: int) -> set[int]:
        return {term for factor in self.terms.members[unit] for term in self.of_factor.get(factor, [])}

    def saved_by(self, unit: int) -> float:
        sizes = self.sizes.copy()
        for factor, positions in self.terms.members[unit].items():
            sizes[factor] -= positions
        return sum(self.values[term] - self._value(term, sizes) for term in self._touched(unit))

    def take(self, units: tuple[int, ...]) -> None:
        touched: set[int] = set()
        for unit in units:
            for factor, positions in self.terms.members[unit].items():
                self.sizes[factor] -= positions
            touched |= self._touched(unit)
        for term in touched:
            self.values[term] = self._value(term, self.sizes)
        self.total = float(self.values.sum())


class _Ledger:
    """How many channels each layer, and each tensor, has left, and what may still go."""

    def __init__(self, groups: Groups, limits: Limits, original: Mapping[str, int]) -> None:
        self.binding: set[str] = set()
        self.channels: dict[str, int] = {}
        self.floor: dict[str, tuple[int, str]] = {}
        self.members: dict[int, dict[str, int]] = {}
        for producer in groups.producers:
            ids = groups.axes[producer.weight, producer.axis]
            self.channels[producer.layer] = len(ids)
            by_ratio = original[producer.layer] - int(original[producer.layer] * limits.max_layer_ratio + 1e-9)
            lowest = max(limits.min_channels, by_ratio, limits.channel_multiple)
            reason = (
                f"--max-layer-ratio {limits.max_layer_ratio:g}"
                if by_ratio == lowest
                else f"--channel-multiple {limits.channel_multiple}"
                if limits.channel_multiple == lowest > 1
                else f"--min-channels {limits.min_channels}"
            )
            self.floor[producer.layer] = (lowest, reason)
            for unit, positions in zip(*np.unique(ids, return_counts=True), strict=True):
                self.members.setdefault(int(unit), {})[producer.layer] = int(positions)
        self.pieces: dict[int, list[int]] = {}
        self.left = [len(piece) for piece in groups.pieces]
        for index, piece in enumerate(groups.pieces):
            for unit in piece:
                self.pieces.setdefault(int(unit), []).append(index)

    def taken_by(self, unit: int) -> Mapping[str, int]:
        return self.members.get(unit, {})

    def take(self, units: tuple[int, ...]) -> bool:
        """Take all of them, or none and note which limit forbids it."""
        layers: dict[str, int] = {}
        pieces: dict[int, int] = {}
        for unit in units:
            for layer, channels in self.taken_by(unit).items():
                layers[layer] = layers.get(layer, 0) + channels
            for piece in self.pieces.get(unit, []):
                pieces[piece] = pieces.get(piece, 0) + 1
        for layer, channels in layers.items():
            floor, reason = self.floor[layer]
            if self.channels[layer] - channels < floor:
                self.binding.add(reason)
                return False
        if any(self.left[piece] - count < 1 for piece, count in pieces.items()):
            self.binding.add("a tensor needs one channel")
            return False
        for layer, channels in layers.items():
            self.channels[layer] -= channels
        for piece, count in pieces.items():
            self.left[piece] -= count
        return True
