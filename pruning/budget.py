"""Which units go: the least important first, until the budget is met and not one further.

Units are taken in one fixed order that does not depend on how much is asked, so a higher request removes the
same units and then more. Costs are exact at every moment (`counting.Terms`), so a budget in parameters, MACs
or channels is met to the last unit.

Where layers come down to multiples, units go in bundles. Units that take the same positions in the same layers (a
class) are exchangeable, so a bundle is the least important of one class, as few as bring all its layers to multiples.
Where layers that classes share are at no multiple, one class alone may not do; then a bundle is of several.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from typing import NamedTuple

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
    bundles = [_Bundles(group, scores, savings, ledger) for group in groups.groups]
    queue: list[tuple[float, int, tuple[int, ...]]] = []

    def enqueue(index: int) -> None:
        units = bundles[index].next()
        if units:
            heappush(queue, (bundles[index].rank(units), index, units))

    for index in range(len(bundles)):
        enqueue(index)
    removed: list[int] = []
    while queue and spent.total > goal:
        _, index, units = heappop(queue)
        if ledger.allows(units):  # else another group has since taken from a tensor that both are part of
            ledger.take(units)
            spent.take(units)
            bundles[index].drop(units)
            removed += units
        enqueue(index)
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


class _Bundles:
    """The units of a group that may go, in bundles that bring its layers to multiples."""

    def __init__(
        self, group: Group, scores: Scores, savings: Mapping[int, float] | None, ledger: Ledger
    ) -> None:
        self.scores, self.savings, self.ledger = scores, savings, ledger
        alike: dict[object, list[int]] = {}
        for unit in sorted(group.units, key=lambda unit: (self.rank([unit]), unit)):
            alike.setdefault(tuple(ledger.members[unit].items()), []).append(unit)
        self.class_of = {unit: units for units in alike.values() for unit in units}
        self.classes = list(alike.values())  # each with the least important unit first

    def rank(self, units: Sequence[int]) -> float:
        importance = float(self.scores[list(units)].sum())
        saved = len(units) if self.savings is None else sum(self.savings[unit] for unit in units)
        return importance / max(saved, 1e-12)

    def next(self) -> tuple[int, ...]:
        """The bundle to go next; empty where none may."""
        self.classes = [units for units in self.classes if units]
        alone, short = [], []
        for units in self.classes:
            count = self._count_to_multiples(units)
            if not count:
                short.append(units)
                continue
            bundle = tuple(islice(self.ledger.spare(units), count))
            if self.ledger.allows(bundle if len(bundle) == count else units[:count]):
                alone.append(bundle)
        # First what several classes must give: one of them may be short of units later.
        together = self._of_several(short) if short else ()
        return together or min(alone, key=lambda units: (self.rank(units), units), default=())

    def drop(self, units: tuple[int, ...]) -> None:
        """Forget units that are gone."""
        for unit in units:
            self.class_of[unit].remove(unit)

    def _count_to_multiples(self, units: Sequence[int]) -> int:
        """How many units of a class bring all its layers to multiples, at the least; 0 where no number does."""
        multiple = self.ledger.limits.channel_multiple
        layers = [(self.ledger.channels[layer], n) for layer, n in self.ledger.members[units[0]].items()]
        counts = range(1, min(multiple, len(units)) + 1)
        return next((k for k in counts if all((left - k * n) % multiple == 0 for left, n in layers)), 0)

    def _of_several(self, short: Sequence[list[int]]) -> tuple[int, ...]:
        """The fewest units of several classes, one at least of those that fall short alone, that bring all their
        layers to multiples within the floors; of as few the least important; empty where there are none.

        Class by class: among choices that take as much of the layers that later classes are part of as well, all but
        the best can be forgotten.
        """
        ledger, multiple = self.ledger, self.ledger.limits.channel_multiple
        classes = sorted(self.classes, key=lambda units: list(ledger.members[units[0]]))
        last = {layer: index for index, units in enumerate(classes) for layer in ledger.members[units[0]]}
        best: dict[_Taken, _Best] = {_Taken(False, frozenset()): _Best(0, 0.0, ())}
        for index, units in enumerate(classes):
            members = ledger.members[units[0]]
            spare = tuple(islice(ledger.spare(units), multiple))  # more than that would be two bundles
            further: dict[_Taken, _Best] = {}
            for (helps, before), bundle in best.items():
                for count in range(len(spare) + 1):
                    taken = Counter(dict(before))
                    taken.update({layer: count * channels for layer, channels in members.items()})
                    left = {layer: ledger.channels[layer] - n for layer, n in taken.items() if n}
                    if any(n < ledger.floors[layer][0] for layer, n in left.items()) or any(
                        n % multiple for layer, n in left.items() if last[layer] == index
                    ):
                        continue
                    going = bundle.units + spare[:count]
                    later = frozenset((layer, n) for layer, n in taken.items() if last[layer] > index)
                    key = _Taken(helps or (count > 0 and units in short), later)
                    longer = _Best(len(going), float(self.scores[list(going)].sum()), going)
                    further[key] = min(longer, further.get(key, longer))
            best = further
        found = best.get(_Taken(True, frozenset()))
        if found is None:
            ledger.binding.add(f"--channel-multiple {multiple}")
        return found.units if found and ledger.allows(found.units) else ()


class _Taken(NamedTuple):
    """What the classes so far take, as far as it matters to the others."""

    helps: bool  # one of those that fall short is among them
    channels: frozenset[tuple[str, int]]  # of each layer that later classes are part of as well


class _Best(NamedTuple):
    size: int
    importance: float
    units: tuple[int, ...]


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

    def spare(self, units: Sequence[int]) -> Iterator[int]:
        """Those of the units that together leave every tensor a channel: each but the last of one."""
        gone = Counter[int]()
        for unit in units:
            pieces = self.pieces.get(unit, [])
            if all(self.left[piece] - gone[piece] > 1 for piece in pieces):
                gone.update(pieces)
                yield unit

    def allows(self, units: Sequence[int]) -> bool:
        """Whether all of them may go together; which limit forbids it is noted."""
        layers, pieces = self._reach(units)
        against = {
            self.floors[layer][1]
            for layer, channels in layers.items()
            if self.channels[layer] - channels < self.floors[layer][0]
        }
        multiple = self.limits.channel_multiple
        if any((self.channels[layer] - channels) % multiple for layer, channels in layers.items()):
            against.add(f"--channel-multiple {multiple}")
        if not against and any(self.left[piece] == count for piece, count in pieces.items()):
            against.add("every tensor needs a channel")
        self.binding |= against
        return not against

    def take(self, units: Sequence[int]) -> None:
        layers, pieces = self._reach(units)
        for layer, channels in layers.items():
            self.channels[layer] -= channels
        for piece, count in pieces.items():
            self.left[piece] -= count

    def _reach(self, units: Sequence[int]) -> tuple[Counter[str], Counter[int]]:
        """How many channels of each layer, and of each piece, units are."""
        layers = Counter[str]()
        for unit in units:
            layers.update(self.members[unit])
        return layers, Counter(piece for unit in units for piece in self.pieces.get(unit, []))
