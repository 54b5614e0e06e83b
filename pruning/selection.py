"""Which units go so that measured budgets are met: the choice that loses the least importance.

The cost of a kernel is a staircase in its channel counts, so units cannot be ranked one by one as in
`budget.py`: what one saves depends on how many others go, there and in the layers beside it. The choice is a
mixed-integer program, solved by HiGHS through scipy:

- Units that take the same positions everywhere (a class) are exchangeable: the least important of them go.
  A class is thus one choice between counts, and what each count loses is known.
- The length of an axis is a sum over classes, and a kernel's cost depends on two axes. Both are joint choices,
  tied to what they join by their marginals. This relaxation is exact where the choices form a tree
  (Wainwright and Jordan 2008, sec. 4.1), so little is left to branch on.
- Activations that live at once are a sum too. Each such moment is a row under one column, the peak, which memory
  is counted with.
- Counts that alone lose more than a choice already at hand (found greedily) are left out; so are those of a
  wide class that lie on no step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from edgeprune.pruning.budget import BudgetError, Ledger, Limits
from edgeprune.pruning.footprint import FLOAT_MIB, Buffer, footprint_terms
from edgeprune.pruning.groups import Groups
from edgeprune.pruning.importance import Scores
from edgeprune.pruning.latency import LatencyTable, LatencyTableError, LayerUse, latency_terms

Counts = npt.NDArray[np.int64]  # ascending
Columns = npt.NDArray[np.int64]  # of the program, one a count

GAP = 0.01
FEW = 16  # units of a class: then every count is worth choosing
TIME_LIMIT_S = 20.0
INFEASIBLE = 2  # scipy's status where there is no solution
TOLERANCE = 1e-6  # of a goal: what the solver's rounding may exceed it by


@dataclass(frozen=True)
class Part:
    """What one kernel, parameter or buffer costs as a function of the lengths of its axes."""

    factors: tuple[int, ...]  # its axes: none, one or two
    cost: Callable[..., float]  # of one length a factor
    counts: tuple[Sequence[int], ...] = ()  # of each factor: the lengths worth choosing; empty: no matter


@dataclass(frozen=True)
class Costs:
    """What a network takes: what is fixed, parts that add up, and of `moments` the dearest one.

    The axes of parts are factors as in `counting.Terms`.
    """

    unit: str  # "ms", "MiB"
    fixed: float
    parts: tuple[Part, ...]
    sizes: Counts  # (factors,): before any removal; not ascending
    members: Mapping[int, Mapping[int, int]]  # unit -> factor -> positions
    buffers: tuple[Part, ...] = ()
    moments: tuple[tuple[int, ...], ...] = ()  # buffers that live at once

    def of(self, units: Sequence[int]) -> float:
        """What is left after a removal."""
        sizes = self.sizes.copy()
        for unit in units:
            for factor, positions in self.members[unit].items():
                sizes[factor] -= positions
        parts, buffers = (
            [part.cost(*(int(sizes[factor]) for factor in part.factors)) for part in group]
            for group in (self.parts, self.buffers)
        )
        peak = max((sum(buffers[index] for index in moment) for moment in self.moments), default=0.0)
        return self.fixed + sum(parts) + peak


@dataclass(frozen=True)
class Budget:
    """What a network takes, and may take."""

    costs: Costs
    goal: float


@dataclass(frozen=True)
class Selection:
    """Units to remove, and what that means."""

    units: tuple[int, ...]
    left: tuple[float, ...]  # of each budget's costs
    lost: float  # importance
    gap: float  # the best choice loses at most this share of `lost` less
    stopped: str | None  # what keeps the goals out of reach; then the choice nearest to them


def latency_costs(groups: Groups, table: LatencyTable) -> Costs:
    """The predicted latency of a grouped network as a function of the units kept.

    Raises:
        LatencyTableError: If the table lacks one of the network's kernels.
    """
    terms = latency_terms(groups)
    kernels = []
    for use, i, o in zip(terms.uses, terms.inputs, terms.outputs, strict=True):
        axes = {"in": (i, use.in_channels)}
        if not use.kind.one_axis:
            axes["out"] = (o, use.out_channels)

        def cost(
            *lengths: int, use: LayerUse = use, axes: Mapping[str, tuple[int | None, int]] = axes
        ) -> float:
            given = iter(lengths)
            found = [length if factor is None else next(given) for factor, length in axes.values()]
            return table.cost_ms(use.kind, found[0], found[-1])

        free = {axis: (factor, most) for axis, (factor, most) in axes.items() if factor is not None}
        kernels.append(
            Part(
                tuple(factor for factor, _ in free.values()),
                cost,
                tuple(table.candidates(use.kind, axis, most) for axis, (_, most) in free.items()),
            )
        )
    return Costs("ms", table.fixed_ms, tuple(kernels), terms.sizes, terms.members)


def memory_costs(groups: Groups, table: LatencyTable) -> Costs:
    """The predicted memory of a grouped network's engine as a function of the units kept.

    Raises:
        LatencyTableError: If the table holds no memory.
    """
    model, block = table.memory, table.rest_step
    if model is None:
        raise LatencyTableError("the latency table holds no memory, which its device does not tell")
    terms = footprint_terms(groups)
    sizes = terms.parameters.sizes
    weights: dict[tuple[int, ...], float] = {}  # parameters with the same axes are one part
    for coefficient, factors in zip(terms.parameters.coefficients, terms.parameters.factors, strict=True):
        key = tuple(sorted(factors))
        weights[key] = weights.get(key, 0.0) + float(coefficient) * FLOAT_MIB

    def weights_of(factors: tuple[int, ...], mib: float) -> Part:
        counts = tuple(table.multiples(int(sizes[factor])) for factor in factors)
        each = model.correction * model.per_weight * mib
        return Part(factors, lambda *lengths: each * math.prod(lengths), counts)

    def held_by(buffer: Buffer) -> Part:
        each = model.correction * model.per_activation
        if buffer.factor is None:
            given = each * buffer.mib(buffer.shape[buffer.axis], block)
            return Part((), lambda: given)
        return Part((buffer.factor,), lambda length: each * buffer.mib(length, block))

    return Costs(
        "MiB",
        model.correction * model.constant_mib,
        tuple(weights_of(factors, mib) for factors, mib in weights.items()),
        sizes,
        terms.parameters.members,
        tuple(held_by(buffer) for buffer in terms.buffers),
        terms.points if model.per_activation else (),
    )


def select(
    groups: Groups,
    scores: Scores,
    budgets: Sequence[Budget],
    *,
    limits: Limits,
    original: Mapping[str, int],
    gap: float = GAP,
    time_limit_s: float = TIME_LIMIT_S,
) -> Selection:
    """Choose the units that lose the least importance and leave no cost above its goal.

    Args:
        scores: importance by unit id.
        original: channels of each layer before any pruning.
        gap: stop once the best choice is known to lose at most this share less.
        time_limit_s: stop then with the best choice found so far, and its gap.

    Raises:
        BudgetError: If a cost is above its goal and nothing can be removed.
    """
    unpruned = tuple(budget.costs.of(()) for budget in budgets)
    if all(cost <= budget.goal for cost, budget in zip(unpruned, budgets, strict=True)):
        return Selection((), unpruned, 0.0, 0.0, None)
    program = _Program(groups, scores, budgets, limits, original)
    found, stopped = program.solve(gap, time_limit_s), None
    if found is None:
        found = program.nearest(gap, time_limit_s)
        if float(program.takes(found.counts).max()) > 1 + TOLERANCE:
            stopped = program.short_of(found)
        else:  # the solver's time was up before it had any choice, and so any bound of what is lost
            found = found._replace(gap=1.0)
    units = program.removed(found.counts)
    if not units:
        raise BudgetError(f"nothing can be removed: {stopped}")
    left = tuple(budget.costs.of(units) for budget in budgets)
    return Selection(units, left, float(scores[list(units)].sum()), found.gap, stopped)


def check_in_reach(
    groups: Groups, budgets: Sequence[Budget], *, limits: Limits, original: Mapping[str, int]
) -> None:
    """Refuse goals of which it is known that the limits do not allow all at once; arguments as `select`.

    Raises:
        BudgetError: If they do not, with the least that they allow and what binds.
    """
    program = _Program(groups, np.zeros(groups.units + 1), budgets, limits, original)
    if program.greedily() is not None:
        return
    found = program.nearest(GAP, TIME_LIMIT_S)
    if (1 - found.gap) * float(program.takes(found.counts).max()) > 1 + TOLERANCE:
        raise BudgetError(program.short_of(found))


@dataclass(frozen=True)
class _Class:
    """Units that take the same positions everywhere."""

    units: tuple[int, ...]  # the least important first
    lost: npt.NDArray[np.float64]  # importance, by how many go
    counts: Counts  # that may be kept

    def losses(self, kept: Counts) -> npt.NDArray[np.float64]:
        losses: npt.NDArray[np.float64] = self.lost[len(self.units) - kept]
        return losses


class _Axis(NamedTuple):
    """The length of an axis: what always stays and the kept units of classes times the positions each takes."""

    fixed: int
    parts: tuple[tuple[int, int], ...]  # (class, positions)

    def length(self, kept: Sequence[int]) -> int:
        return self.fixed + sum(positions * kept[index] for index, positions in self.parts)


class _Steps(NamedTuple):
    """From one count of a class to others."""

    counts: Counts
    lost: npt.NDArray[np.float64]  # importance, of each
    added: npt.NDArray[np.float64]  # (counts, rows): to the shares of the goals that are taken


class _Found(NamedTuple):
    counts: tuple[int, ...]  # kept of each class
    gap: float


class _Bound:
    """A budget in terms of the classes."""

    def __init__(self, budget: Budget, axes: Mapping[int, _Axis]) -> None:
        costs, self.goal = budget.costs, budget.goal
        self.costs = costs
        self.parts = (*costs.parts, *costs.buffers)
        self.axes = [tuple(axes[factor] for factor in part.factors) for part in self.parts]
        # (rows, parts): a row for each moment; what its parts add up to is within the goal.
        self.rows = np.zeros((max(1, len(costs.moments)), len(self.parts)))
        self.rows[:, : len(costs.parts)] = 1
        for row, moment in zip(self.rows, costs.moments, strict=False):
            row[[len(costs.parts) + index for index in moment]] = 1
        self.prices: dict[tuple[int, ...], float] = {}

    def price(self, part: int, kept: Sequence[int]) -> float:
        return self.price_at(part, *(axis.length(kept) for axis in self.axes[part]))

    def price_at(self, part: int, *lengths: int) -> float:
        key = (part, *lengths)
        if key not in self.prices:
            self.prices[key] = self.parts[part].cost(*lengths)
        return self.prices[key]

    def takes(self, kept: Sequence[int]) -> npt.NDArray[np.float64]:
        """``(rows,)``: shares of the goal."""
        prices = [self.price(part, kept) for part in range(len(self.parts))]
        taken: npt.NDArray[np.float64] = (self.costs.fixed + self.rows @ prices) / self.goal
        return taken


class _Program:
    """The classes of a network, what their counts cost and lose, and which counts are allowed."""

    def __init__(
        self,
        groups: Groups,
        scores: Scores,
        budgets: Sequence[Budget],
        limits: Limits,
        original: Mapping[str, int],
    ) -> None:
        self.limits = limits
        self.ledger = Ledger(groups, limits, original)
        used = [
            sorted({factor for part in (*costs.parts, *costs.buffers) for factor in part.factors})
            for costs in (budget.costs for budget in budgets)
        ]
        alike: dict[object, list[int]] = {}
        for unit in (unit for group in groups.groups for unit in group.units):
            taken = tuple(
                tuple(budget.costs.members[unit].get(factor, 0) for factor in factors)
                for budget, factors in zip(budgets, used, strict=True)
            )
            layers = tuple(sorted(self.ledger.members[unit].items()))
            alike.setdefault((taken, layers, tuple(self.ledger.pieces.get(unit, ()))), []).append(unit)
        members = [sorted(units, key=lambda unit: (scores[unit], unit)) for units in alike.values()]
        first = [units[0] for units in members]
        sizes = [len(units) for units in members]

        def axis(length: int, positions: Sequence[int]) -> _Axis:
            """Of a length before any removal, and the positions that each class's units take."""
            parts = tuple((index, taken) for index, taken in enumerate(positions) if taken)
            return _Axis(length - sum(taken * sizes[index] for index, taken in parts), parts)

        self.bounds = [
            _Bound(
                budget,
                {
                    factor: axis(
                        int(budget.costs.sizes[factor]),
                        [budget.costs.members[unit].get(factor, 0) for unit in first],
                    )
                    for factor in factors
                },
            )
            for budget, factors in zip(budgets, used, strict=True)
        ]
        self.layers = {
            layer: axis(channels, [self.ledger.members[unit].get(layer, 0) for unit in first])
            for layer, channels in self.ledger.channels.items()
        }
        pieces: dict[int, list[int]] = {}
        for index, unit in enumerate(first):
            for piece in self.ledger.pieces.get(unit, ()):
                pieces.setdefault(piece, []).append(index)
        self.pieces = [
            held for piece, held in pieces.items() if sum(sizes[i] for i in held) == len(groups.pieces[piece])
        ]
        self.classes = [
            _Class(
                tuple(units),
                np.concatenate(([0.0], np.cumsum(scores[units]))),
                self._counts_of(index, len(units)),
            )
            for index, units in enumerate(members)
        ]

    def _counts_of(self, index: int, whole: int) -> Counts:
        """Counts of a class that bring the axes it is part of to lengths worth choosing."""
        found = set(range(whole + 1)) if whole <= FEW else {whole}

        def multiples(step: int, positions: int) -> None:
            found.update(range(0, whole, step // math.gcd(step, positions)))

        for (fixed, parts), lengths in self.worth_choosing():
            positions = dict(parts).get(index)
            if positions is None:
                continue
            multiples(lengths[0], positions)
            if len(parts) == 1:
                exact = ((length - fixed) / positions for length in lengths)
                found.update(int(count) for count in exact if count.is_integer() and 0 <= count < whole)
        alone = {layer: axis for layer, axis in self.layers.items() if [i for i, _ in axis.parts] == [index]}
        if self.limits.channel_multiple > 1:
            for axis in alone.values():
                multiples(self.limits.channel_multiple, axis.parts[0][1])
        return np.array(
            [
                count
                for count in sorted(found)
                if (count or [index] not in self.pieces)
                and all(
                    self.allowed(layer, axis.fixed + axis.parts[0][1] * count)
                    for layer, axis in alone.items()
                )
            ],
            dtype=np.int64,
        )

    def worth_choosing(self) -> Iterator[tuple[_Axis, Sequence[int]]]:
        """Axes of all parts, each with the lengths that its cost is made of."""
        for bound in self.bounds:
            for part, axes in zip(bound.parts, bound.axes, strict=True):
                yield from zip(axes, part.counts, strict=False)

    def allowed(self, layer: str, channels: int) -> bool:
        """Whether the limits let a layer have so many channels."""
        return channels == self.ledger.channels[layer] or (
            channels >= self.ledger.floors[layer][0] and channels % self.limits.channel_multiple == 0
        )

    def short_of(self, nearest: _Found) -> str:
        """What the nearest counts leave, and the options whose floors layers have come down to."""
        kept = nearest.counts
        steps: dict[_Axis, int] = {}  # to the next length that costs less
        for axis, lengths in self.worth_choosing():
            steps[axis] = max(lengths[0], steps.get(axis, self.limits.channel_multiple))
        binding = {
            self.ledger.floors[layer][1]
            for layer, axis in self.layers.items()
            if axis.parts and axis.length(kept) - steps.get(axis, 1) < self.ledger.floors[layer][0]
        }
        because = ", ".join(sorted(binding)) or "there is no other removable channel"
        units = self.removed(kept)
        least = " and ".join(f"{bound.costs.of(units):.4g} {bound.costs.unit}" for bound in self.bounds)
        goals = " and ".join(f"{bound.goal:.4g} {bound.costs.unit}" for bound in self.bounds)
        known = "can be left" if nearest.gap <= GAP else "was found in time"
        return f"{least} is the least that {known} where {goals} were asked: {because}"

    def removed(self, kept: Sequence[int]) -> tuple[int, ...]:
        """The units that go where so many of each class stay."""
        gone = (of.units[: len(of.units) - count] for of, count in zip(self.classes, kept, strict=True))
        return tuple(sorted(unit for units in gone for unit in units))

    def lost(self, kept: Sequence[int]) -> float:
        """Importance."""
        return sum(float(of.lost[len(of.units) - n]) for of, n in zip(self.classes, kept, strict=True))

    def greedily(self) -> tuple[int, ...] | None:
        """Kept counts within the goals: class by class the step that loses least for what it saves where a goal is
        missed, then back up where the goals leave room. None where single steps do not lead there."""
        kept = [len(of.units) for of in self.classes]
        taken = self.takes(kept)
        touched = [
            [
                [part for part, axes in enumerate(bound.axes) if any(i in dict(axis.parts) for axis in axes)]
                for bound in self.bounds
            ]
            for i in range(len(kept))
        ]
        together = [
            {
                other
                for other, theirs in enumerate(touched)
                if any(set(a) & set(b) for a, b in zip(theirs, own, strict=True))
            }
            for own in touched
        ]

        def steps(index: int, counts: Counts) -> _Steps:
            """To those of the counts that the limits allow."""
            of, before = self.classes[index], kept[index]

            def takes() -> npt.NDArray[np.float64]:
                """``(rows,)``: of what the class has a part in."""
                return np.concatenate(
                    [
                        bound.rows[:, parts] @ [bound.price(part, kept) for part in parts] / bound.goal
                        for bound, parts in zip(self.bounds, touched[index], strict=True)
                    ]
                )

            now = takes()
            allowed, added = [], [np.zeros((0, len(now)))]
            for count in counts.tolist():
                kept[index] = count
                if self.fits(index, kept):
                    allowed.append(count)
                    added.append((takes() - now)[None])
            kept[index] = before
            to = np.array(allowed, np.int64)
            return _Steps(to, of.losses(to) - of.losses(np.array([before])), np.concatenate(added))

        down: dict[int, _Steps] = {}  # of each class
        changed = set(range(len(kept)))
        while (missed := taken > 1).any():
            for index in changed:
                counts = self.classes[index].counts
                down[index] = steps(index, counts[counts < kept[index]])
            best = (math.inf, 0, 0)
            for index, each in down.items():
                saved = -each.added[:, missed].sum(1)
                saves = np.flatnonzero(saved > 0)
                ratios = each.lost[saves] / saved[saves]
                if len(saves):
                    best = min(best, (float(ratios.min()), index, int(saves[ratios.argmin()])))
            ratio, index, number = best
            if ratio == math.inf:
                return None
            kept[index] = int(down[index].counts[number])
            taken = taken + down[index].added[number]
            changed = together[index]
        while True:
            best = (0.0, 0, 0)
            added = taken
            for index, of in enumerate(self.classes):
                up = steps(index, of.counts[of.counts > kept[index]])
                for number in np.flatnonzero((taken + up.added <= 1).all(1)).tolist():
                    if up.lost[number] < best[0]:
                        best = (float(up.lost[number]), index, int(up.counts[number]))
                        added = up.added[number]
            lost, index, count = best
            if lost == 0:
                return tuple(kept)
            kept[index] = count
            taken = taken + added

    def takes(self, kept: Sequence[int]) -> npt.NDArray[np.float64]:
        """Shares of the goals, all rows of all budgets."""
        return np.concatenate([bound.takes(kept) for bound in self.bounds])

    def fits(self, changed: int, kept: Sequence[int]) -> bool:
        """Whether the limits allow it, as far as one class has a part in it."""
        return all(
            self.allowed(layer, axis.length(kept))
            for layer, axis in self.layers.items()
            if changed in dict(axis.parts)
        ) and all(any(kept[i] for i in piece) for piece in self.pieces if changed in piece)

    def solve(self, gap: float, time_limit_s: float) -> _Found | None:
        """The kept counts that lose least within the goals; None if there are none."""
        if not self.classes:
            return None
        greedy = self.greedily()
        most = math.inf if greedy is None else self.lost(greedy)
        model = _Model(self, most)
        for taken in model.taken:
            model.row(taken.columns, taken.values, -np.inf, 1 - taken.fixed)
        scale = most if 0 < most < math.inf else 1.0  # the solver's tolerances are for numbers near 1
        counts, bound = model.minimise(*model.lost(scale), gap, time_limit_s)
        candidates = [kept for kept in (counts, greedy) if kept is not None]
        if not candidates:
            return None
        kept = min(candidates, key=self.lost)
        lost = self.lost(kept)
        return _Found(kept, max(0.0, 1 - bound * scale / lost) if lost else 0.0)

    def nearest(self, gap: float, time_limit_s: float) -> _Found:
        """The kept counts whose costs are the smallest shares of their goals, the largest of them counting."""
        if not self.classes:
            return _Found((), 0.0)
        model = _Model(self, math.inf)
        whole = tuple(len(of.units) for of in self.classes)
        unpruned = float(self.takes(whole).max())
        largest = model.new(1)
        for taken in model.taken:
            columns = np.append(taken.columns, largest)
            model.row(columns, np.append(taken.values / unpruned, -1.0), -np.inf, -taken.fixed / unpruned)
        counts, bound = model.minimise(largest, np.ones(1), gap, time_limit_s)
        kept = counts or whole
        return _Found(kept, max(0.0, 1 - bound * unpruned / float(self.takes(kept).max())))


class _Choice(NamedTuple):
    """A number that is chosen: its possible values, and the column that is 1 where the value is chosen."""

    values: Counts
    columns: Columns


class _Sum(NamedTuple):
    """A linear function of columns."""

    columns: Columns
    values: npt.NDArray[np.float64]
    fixed: float


class _Model:
    """The mixed-integer program: columns 0 to 1, of which those of the classes are whole."""

    def __init__(self, program: _Program, most_lost: float) -> None:
        """
        Args:
            most_lost: counts of a class that alone lose more importance are left out.
        """
        self.upper: list[float] = []  # bounds of the columns
        self.rows: list[tuple[Columns, npt.NDArray[np.float64], float, float]] = []
        self.sums: dict[tuple[tuple[int, int], ...], _Choice] = {}
        self.joints: dict[tuple[int, int], Columns] = {}
        self.classes: list[_Choice] = []
        for of in program.classes:
            values = of.counts[of.losses(of.counts) <= most_lost * (1 + TOLERANCE)]
            self.classes.append(_Choice(values, self.new(len(values))))
        self.whole = len(self.upper)
        for choice in self.classes:
            self.row(choice.columns, 1.0, 1, 1)
        for piece in program.pieces:
            some = [choice.columns[choice.values > 0] for choice in map(self.classes.__getitem__, piece)]
            self.row(np.concatenate(some), 1.0, 1, np.inf)
        for layer, axis in program.layers.items():
            if len(axis.parts) > 1:  # counts of others are allowed ones only
                values, columns = self.total(axis.parts)
                for value, column in zip(values.tolist(), columns.tolist(), strict=True):
                    self.upper[column] = float(program.allowed(layer, axis.fixed + value))
        self.taken = [self.taken_of(bound) for bound in program.bounds]
        self._losses = [
            of.losses(choice.values) for of, choice in zip(program.classes, self.classes, strict=True)
        ]

    def lost(self, scale: float) -> tuple[Columns, npt.NDArray[np.float64]]:
        """Importance over `scale`."""
        columns = np.concatenate([choice.columns for choice in self.classes])
        return columns, np.concatenate(self._losses) / scale

    def taken_of(self, bound: _Bound) -> _Sum:
        """The share of its goal that a budget's costs take: the parts, and a column above all moments."""
        priced = [self.priced(bound, part) for part in range(len(bound.parts))]
        parts, buffers = priced[: len(bound.costs.parts)], priced[len(bound.costs.parts) :]
        taken = _added([_Sum(np.zeros(0, np.int64), np.zeros(0), bound.costs.fixed), *parts])
        if bound.costs.moments:
            moments = [_added([buffers[index] for index in moment]) for moment in bound.costs.moments]
            highest = [buffer.fixed + buffer.values.max(initial=0.0) for buffer in buffers]
            most = max(sum(highest[index] for index in moment) for moment in bound.costs.moments)
            peak = self.new(1)
            for moment in moments:
                columns = np.append(moment.columns, peak)
                self.row(columns, np.append(moment.values / most, -1.0), -np.inf, -moment.fixed / most)
            taken = _added([taken, _Sum(peak, np.array([most]), 0.0)])
        return _Sum(taken.columns, taken.values / bound.goal, taken.fixed / bound.goal)

    def new(self, count: int) -> Columns:
        self.upper += [1.0] * count
        return np.arange(len(self.upper) - count, len(self.upper))

    def row(self, columns: Columns, values: npt.ArrayLike, low: float, high: float) -> None:
        self.rows.append((columns, np.broadcast_to(np.asarray(values, np.float64), columns.shape), low, high))

    def total(self, parts: tuple[tuple[int, int], ...]) -> _Choice:
        """The sum of classes' counts times positions."""
        if parts not in self.sums:
            *before, (index, positions) = parts
            own = _Choice(self.classes[index].values * positions, self.classes[index].columns)
            self.sums[parts] = self.added(self.total(tuple(before)), own) if before else own
        return self.sums[parts]

    def added(self, left: _Choice, right: _Choice) -> _Choice:
        joint = self.joint(left, right)
        sums = (left.values[:, None] + right.values).ravel()
        if len(left.values) == 1 or len(right.values) == 1:
            return _Choice(sums, joint.ravel())
        values, place = np.unique(sums, return_inverse=True)
        columns = self.new(len(values))
        for index, column in enumerate(columns):
            parts = joint.ravel()[place.ravel() == index]
            self.row(np.append(parts, column), np.append(np.ones(len(parts)), -1.0), 0, 0)
        return _Choice(values, columns)

    def joint(self, left: _Choice, right: _Choice) -> Columns:
        """``(left, right)``: columns that are 1 where both values are chosen."""
        if len(left.values) == 1:
            return right.columns[None]
        if len(right.values) == 1:
            return left.columns[:, None]
        key = int(left.columns[0]), int(right.columns[0])
        if key not in self.joints:
            joint = self.joints[key] = self.new(left.columns.size * right.columns.size).reshape(
                left.columns.size, right.columns.size
            )
            for columns, sums in ((left.columns, joint), (right.columns, joint.T)):
                for column, row in zip(columns, sums, strict=True):
                    self.row(np.append(row, column), np.append(np.ones(len(row)), -1.0), 0, 0)
        return self.joints[key]

    def priced(self, bound: _Bound, part: int) -> _Sum:
        """Columns of the lengths that a part may have, and what it costs there; none if they are given."""
        axes = bound.axes[part]
        choices = {axis.parts: self.total(axis.parts) for axis in axes if axis.parts}
        if not choices:
            fixed = bound.price_at(part, *(axis.fixed for axis in axes))
            return _Sum(np.zeros(0, np.int64), np.zeros(0), fixed)
        lengths = np.meshgrid(*(choice.values for choice in choices.values()), indexing="ij")
        along = dict(zip(choices, lengths, strict=True))
        grid = [axis.fixed + along.get(axis.parts, np.zeros_like(lengths[0])) for axis in axes]
        columns = self.joint(*choices.values()) if len(choices) > 1 else next(iter(choices.values())).columns
        prices = [bound.price_at(part, *each) for each in np.stack(grid, -1).reshape(-1, len(axes)).tolist()]
        return _Sum(columns.ravel(), np.array(prices), 0.0)

    def minimise(
        self, columns: Columns, values: npt.NDArray[np.float64], gap: float, time_limit_s: float
    ) -> tuple[tuple[int, ...] | None, float]:
        """The counts chosen for the least sum of columns times values, which are not below 0, and a lower bound of
        it; None where none was found."""
        count = len(self.upper)
        objective = np.zeros(count)
        objective[columns] = values
        indices = np.concatenate([np.full(len(own), row) for row, (own, *_) in enumerate(self.rows)])
        places, entries = (np.concatenate([row[part] for row in self.rows]) for part in (0, 1))
        low, high = np.array([row[2:] for row in self.rows]).T
        matrix = coo_matrix((entries, (indices, places)), shape=(len(self.rows), count)).tocsr()
        result = milp(
            objective,
            integrality=(np.arange(count) < self.whole).astype(np.int64),
            bounds=Bounds(0, np.array(self.upper)),
            constraints=LinearConstraint(matrix, low, high),
            options={"mip_rel_gap": gap, "time_limit": time_limit_s},
        )
        bound = max(0.0, float(result.mip_dual_bound or 0.0))  # none where time was up before the first one
        if result.x is None:
            return None, math.inf if result.status == INFEASIBLE else bound
        return tuple(
            int(choice.values[np.argmax(result.x[choice.columns])]) for choice in self.classes
        ), bound


def _added(sums: Sequence[_Sum]) -> _Sum:
    """Their sum; each column once."""
    columns, place = np.unique(np.concatenate([each.columns for each in sums]), return_inverse=True)
    values = np.zeros(len(columns))
    np.add.at(values, place, np.concatenate([each.values for each in sums]))
    return _Sum(columns, values, sum(each.fixed for each in sums))
