"""Which units go so that a measured budget is met: the choice that loses the least importance.

The cost of a kernel is a staircase in its channel counts, so units cannot be ranked one by one as in
`budget.py`: what one saves depends on how many others go, there and in the layers beside it. The choice is a
mixed-integer program, solved by HiGHS through scipy:

- Units that take the same positions everywhere (a class) are exchangeable: the least important of them go.
  A class is thus one choice between counts, and what each count loses is known.
- The length of an axis is a sum over classes, and a kernel's cost depends on two axes. Both are joint choices,
  tied to what they join by their marginals. This relaxation is exact where the choices form a tree
  (Wainwright and Jordan 2008, sec. 4.1), so little is left to branch on.
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
from edgeprune.pruning.groups import Groups
from edgeprune.pruning.importance import Scores
from edgeprune.pruning.latency import LatencyTable, LayerUse, latency_terms

Counts = npt.NDArray[np.int64]  # ascending
Columns = npt.NDArray[np.int64]  # of the program, one a count

GAP = 0.01
FEW = 16  # units of a class: then every count is worth choosing
TIME_LIMIT_S = 20.0
TIME_LIMIT = 1  # scipy's status where time ran out
TOLERANCE = 1e-6  # of a goal: what the solver's rounding may exceed it by


@dataclass(frozen=True)
class Kernel:
    """What one kernel costs as a function of the lengths of its axes."""

    factors: tuple[int, ...]  # its axes: none, one or two
    cost: Callable[..., float]  # of one length a factor
    counts: tuple[Sequence[int], ...]  # of each factor: the lengths worth choosing


@dataclass(frozen=True)
class KernelCosts:
    """A network's cost: what is fixed, and the kernels, whose axes are factors as in `counting.Terms`."""

    unit: str  # "ms"
    fixed: float
    kernels: tuple[Kernel, ...]
    sizes: Counts  # (factors,): before any removal; not ascending
    members: Mapping[int, Mapping[int, int]]  # unit -> factor -> positions

    def of(self, units: Sequence[int]) -> float:
        """What is left after a removal."""
        sizes = self.sizes.copy()
        for unit in units:
            for factor, positions in self.members[unit].items():
                sizes[factor] -= positions
        return self.fixed + sum(
            kernel.cost(*(int(sizes[factor]) for factor in kernel.factors)) for kernel in self.kernels
        )


@dataclass(frozen=True)
class Selection:
    """Units to remove, and what that means."""

    units: tuple[int, ...]
    cost: float  # what is left
    lost: float  # importance
    gap: float  # the best choice loses at most this share of `lost` less
    stopped: str | None  # what keeps the goal out of reach; then the cheapest choice that the limits allow


def latency_costs(groups: Groups, table: LatencyTable) -> KernelCosts:
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
            Kernel(
                tuple(factor for factor, _ in free.values()),
                cost,
                tuple(table.candidates(use.kind, axis, most) for axis, (_, most) in free.items()),
            )
        )
    return KernelCosts("ms", table.fixed_ms, tuple(kernels), terms.sizes, terms.members)


def select(
    groups: Groups,
    scores: Scores,
    costs: KernelCosts,
    goal: float,
    *,
    limits: Limits,
    original: Mapping[str, int],
    gap: float = GAP,
    time_limit_s: float = TIME_LIMIT_S,
) -> Selection:
    """Choose the units that lose the least importance and leave a cost of at most `goal`.

    Args:
        scores: importance by unit id.
        original: channels of each layer before any pruning.
        gap: stop once the best choice is known to lose at most this share less.
        time_limit_s: stop then with the best choice found so far, and its gap.

    Raises:
        BudgetError: If the cost is above `goal` and nothing can be removed.
    """
    unpruned = costs.of(())
    if unpruned <= goal:
        return Selection((), unpruned, 0.0, 0.0, None)
    program = _Program(groups, scores, costs, limits, original)
    found, stopped = program.solve(goal, gap, time_limit_s), None
    if found is None:
        found = program.cheapest(gap, time_limit_s)
        stopped = program.short_of(goal, found.counts)
    units = program.removed(found.counts)
    if not units:
        raise BudgetError(f"nothing can be removed: {stopped}")
    return Selection(units, costs.of(units), float(scores[list(units)].sum()), found.gap, stopped)


def check_in_reach(
    groups: Groups, costs: KernelCosts, goal: float, *, limits: Limits, original: Mapping[str, int]
) -> None:
    """Make sure that the limits allow a cost of at most `goal`; arguments as `select`.

    Raises:
        BudgetError: If they do not, with the least that they allow and what binds.
    """
    program = _Program(groups, np.zeros(groups.units + 1), costs, limits, original)
    counts = program.cheapest(GAP, TIME_LIMIT_S).counts
    if costs.of(program.removed(counts)) > goal * (1 + TOLERANCE):
        raise BudgetError(program.short_of(goal, counts))


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


class _Found(NamedTuple):
    counts: tuple[int, ...]  # kept of each class
    gap: float


class _Program:
    """The classes of a network, what their counts cost and lose, and which counts are allowed."""

    def __init__(
        self,
        groups: Groups,
        scores: Scores,
        costs: KernelCosts,
        limits: Limits,
        original: Mapping[str, int],
    ) -> None:
        self.costs, self.limits = costs, limits
        self.ledger = Ledger(groups, limits, original)
        used = {factor for kernel in costs.kernels for factor in kernel.factors}
        alike: dict[object, list[int]] = {}
        for unit in (unit for group in groups.groups for unit in group.units):
            taken = tuple((f, p) for f, p in sorted(costs.members[unit].items()) if f in used)
            layers = tuple(sorted(self.ledger.members[unit].items()))
            alike.setdefault((taken, layers, tuple(self.ledger.pieces.get(unit, ()))), []).append(unit)
        members = [sorted(units, key=lambda unit: (scores[unit], unit)) for units in alike.values()]
        first = [units[0] for units in members]
        sizes = [len(units) for units in members]

        def axis(length: int, positions: Mapping[int, int]) -> _Axis:
            """Of a length before any removal, and the positions that each class's units take."""
            parts = tuple((index, taken) for index, taken in positions.items() if taken)
            return _Axis(length - sum(taken * sizes[index] for index, taken in parts), parts)

        self.factors = {
            factor: axis(
                int(costs.sizes[factor]),
                {i: costs.members[unit].get(factor, 0) for i, unit in enumerate(first)},
            )
            for factor in sorted(used)
        }
        self.layers = {
            layer: axis(
                channels,
                {i: self.ledger.members[unit].get(layer, 0) for i, unit in enumerate(first)},
            )
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
        self.prices: dict[tuple[int, ...], float] = {}
        self.fixed = costs.fixed + sum(
            self.price(index, ())
            for index, kernel in enumerate(costs.kernels)
            if not any(self.factors[factor].parts for factor in kernel.factors)
        )

    def _counts_of(self, index: int, whole: int) -> Counts:
        """Counts of a class that bring the axes it is part of to lengths worth choosing."""
        found = set(range(whole + 1)) if whole <= FEW else {whole}

        def multiples(step: int, positions: int) -> None:
            found.update(range(0, whole, step // math.gcd(step, positions)))

        for kernel in self.costs.kernels:
            for factor, lengths in zip(kernel.factors, kernel.counts, strict=True):
                fixed, parts = self.factors[factor]
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

    def allowed(self, layer: str, channels: int) -> bool:
        """Whether the limits let a layer have so many channels."""
        return channels == self.ledger.channels[layer] or (
            channels >= self.ledger.floors[layer][0] and channels % self.limits.channel_multiple == 0
        )

    def short_of(self, goal: float, kept: Sequence[int]) -> str:
        """What the cheapest counts leave, and the options whose floors layers have come down to."""
        multiple = self.limits.channel_multiple
        binding = {
            self.ledger.floors[layer][1]
            for layer, axis in self.layers.items()
            if axis.parts and axis.length(kept) - multiple < self.ledger.floors[layer][0]
        }
        because = ", ".join(sorted(binding)) or "there is no other removable channel"
        least = self.costs.of(self.removed(kept))
        return f"{least:.4g} {self.costs.unit} is the least that can be left where {goal:.4g} were asked: {because}"

    def removed(self, kept: Sequence[int]) -> tuple[int, ...]:
        """The units that go where so many of each class stay."""
        gone = (of.units[: len(of.units) - count] for of, count in zip(self.classes, kept, strict=True))
        return tuple(sorted(unit for units in gone for unit in units))

    def cost(self, kept: Sequence[int]) -> float:
        return self.costs.fixed + sum(self.price(index, kept) for index in range(len(self.costs.kernels)))

    def price(self, kernel: int, kept: Sequence[int]) -> float:
        return self.price_at(
            kernel, *(self.factors[f].length(kept) for f in self.costs.kernels[kernel].factors)
        )

    def price_at(self, kernel: int, *lengths: int) -> float:
        key = (kernel, *lengths)
        if key not in self.prices:
            self.prices[key] = self.costs.kernels[kernel].cost(*lengths)
        return self.prices[key]

    def lost(self, kept: Sequence[int]) -> float:
        """Importance."""
        return sum(float(of.lost[len(of.units) - n]) for of, n in zip(self.classes, kept, strict=True))

    def greedily(self, goal: float) -> tuple[int, ...] | None:
        """Kept counts within the goal: class by class the step that loses least for what it saves, then back up
        where the goal leaves room. None where single steps do not lead there."""
        kept = [len(of.units) for of in self.classes]
        left = self.cost(kept)
        touched = [
            [
                k
                for k, kernel in enumerate(self.costs.kernels)
                if any(i in dict(self.factors[f].parts) for f in kernel.factors)
            ]
            for i in range(len(kept))
        ]

        def steps(index: int, counts: Counts) -> Iterator[tuple[float, float, int]]:
            """(importance lost, cost added, count) of what the limits allow."""
            of, before = self.classes[index], kept[index]
            spent = sum(self.price(kernel, kept) for kernel in touched[index])
            for count in counts.tolist():
                kept[index] = count
                if self.fits(index, kept):
                    added = sum(self.price(kernel, kept) for kernel in touched[index]) - spent
                    whole = len(of.units)
                    yield float(of.lost[whole - count] - of.lost[whole - before]), added, count
            kept[index] = before

        best: dict[int, tuple[float, float, int]] = {}  # class -> (lost for saved, cost added, count)
        changed = set(range(len(kept)))
        while left > goal:
            for index in changed:
                counts = self.classes[index].counts
                down = [
                    (lost / -added, added, count)
                    for lost, added, count in steps(index, counts[counts < kept[index]])
                    if added < 0
                ]
                best[index] = min(down, default=(math.inf, 0.0, 0))
            index = min(best, key=lambda each: best[each])
            ratio, added, count = best[index]
            if ratio == math.inf:
                return None
            kept[index] = count
            left += added
            changed = {i for i in range(len(kept)) if set(touched[i]) & set(touched[index])}
        while True:
            up = [
                (lost, added, count, index)
                for index, of in enumerate(self.classes)
                for lost, added, count in steps(index, of.counts[of.counts > kept[index]])
                if left + added <= goal
            ]
            lost, added, count, index = min(up, default=(0.0, 0.0, 0, 0))
            if lost == 0:
                return tuple(kept)
            kept[index] = count
            left += added

    def fits(self, changed: int, kept: Sequence[int]) -> bool:
        """Whether the limits allow it, as far as one class has a part in it."""
        return all(
            self.allowed(layer, axis.length(kept))
            for layer, axis in self.layers.items()
            if changed in dict(axis.parts)
        ) and all(any(kept[i] for i in piece) for piece in self.pieces if changed in piece)

    def solve(self, goal: float, gap: float, time_limit_s: float) -> _Found | None:
        """The kept counts that lose least within the goal; None if there are none."""
        if not self.classes:
            return None
        greedy = self.greedily(goal)
        most = math.inf if greedy is None else self.lost(greedy)
        model = _Model(self, most)
        priced = np.flatnonzero(model.cost)
        model.row(priced, model.cost[priced] / goal, -np.inf, 1 - self.fixed / goal)
        scale = most if 0 < most < math.inf else 1.0  # the solver's tolerances are for numbers near 1
        counts, bound = model.minimise(model.lost / scale, gap, time_limit_s)
        candidates = [kept for kept in (counts, greedy) if kept is not None]
        if not candidates:
            return None
        kept = min(candidates, key=self.lost)
        lost = self.lost(kept)
        return _Found(kept, max(0.0, 1 - bound * scale / lost) if lost else 0.0)

    def cheapest(self, gap: float, time_limit_s: float) -> _Found:
        """The kept counts that cost least."""
        if not self.classes:
            return _Found((), 0.0)
        model = _Model(self, math.inf)
        whole = tuple(len(of.units) for of in self.classes)
        unpruned = self.cost(whole)
        counts, bound = model.minimise(model.cost / unpruned, gap, time_limit_s)
        kept = counts or whole
        return _Found(kept, max(0.0, 1 - (bound * unpruned + self.fixed) / self.cost(kept)))


class _Choice(NamedTuple):
    """A number that is chosen: its possible values, and the column that is 1 where the value is chosen."""

    values: Counts
    columns: Columns


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
        priced = [self.priced(program, index) for index in range(len(program.costs.kernels))]
        self.cost, self.lost = np.zeros((2, len(self.upper)))
        for columns, prices in priced:
            np.add.at(self.cost, columns, prices)
        for of, choice in zip(program.classes, self.classes, strict=True):
            self.lost[choice.columns] = of.losses(choice.values)

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

    def priced(self, program: _Program, kernel: int) -> tuple[Columns, npt.NDArray[np.float64]]:
        """Columns of the lengths that a kernel may have, and what it costs there; none if they are given."""
        axes = [program.factors[factor] for factor in program.costs.kernels[kernel].factors]
        choices = {axis.parts: self.total(axis.parts) for axis in axes if axis.parts}
        if not choices:
            return np.zeros(0, np.int64), np.zeros(0)
        lengths = np.meshgrid(*(choice.values for choice in choices.values()), indexing="ij")
        along = dict(zip(choices, lengths, strict=True))
        grid = [axis.fixed + along.get(axis.parts, np.zeros_like(lengths[0])) for axis in axes]
        columns = self.joint(*choices.values()) if len(choices) > 1 else next(iter(choices.values())).columns
        prices = [
            program.price_at(kernel, *each) for each in np.stack(grid, -1).reshape(-1, len(axes)).tolist()
        ]
        return columns.ravel(), np.array(prices)

    def minimise(
        self, objective: npt.NDArray[np.float64], gap: float, time_limit_s: float
    ) -> tuple[tuple[int, ...] | None, float]:
        """The counts chosen, and a lower bound of the objective; None where there are none."""
        count = len(self.upper)
        indices = np.concatenate([np.full(len(columns), row) for row, (columns, *_) in enumerate(self.rows)])
        columns, values = (np.concatenate([row[part] for row in self.rows]) for part in (0, 1))
        low, high = np.array([row[2:] for row in self.rows]).T
        matrix = coo_matrix((values, (indices, columns)), shape=(len(self.rows), count)).tocsr()
        result = milp(
            objective,
            integrality=(np.arange(count) < self.whole).astype(np.int64),
            bounds=Bounds(0, np.array(self.upper)),
            constraints=LinearConstraint(matrix, low, high),
            options={"mip_rel_gap": gap, "time_limit": time_limit_s},
        )
        bound = -math.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
        if result.x is None:
            return None, bound if result.status == TIME_LIMIT else math.inf
        return tuple(
            int(choice.values[np.argmax(result.x[choice.columns])]) for choice in self.classes
        ), bound
