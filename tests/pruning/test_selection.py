"""Channels chosen by latency: the best choice there is, within the goal and the limits."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import channels_of, table_of
from small import SIDE, Gated, Residual, groups_of, seeded
from torch import Tensor, nn

from edgeprune.pruning import selection
from edgeprune.pruning.budget import BudgetError, Limits
from edgeprune.pruning.footprint import footprint
from edgeprune.pruning.groups import Groups
from edgeprune.pruning.importance import Scores
from edgeprune.pruning.latency import LatencyTable, LatencyTableError
from edgeprune.pruning.memory import MemoryModel
from edgeprune.pruning.selection import (
    GAP,
    Budget,
    Selection,
    check_in_reach,
    latency_costs,
    memory_costs,
    select,
)
from edgeprune.pruning.surgery import remove


class Tiny(nn.Module):
    """A sum and a concatenation, with nine channels that can go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.d, self.z = nn.Conv2d(6, 3, 3, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.a(x))
        mixed = torch.cat((self.b(first) + first, self.c(first)), 1)
        return self.z(torch.relu(self.d(mixed)))


class Split(nn.Module):
    """Halves of one layer go different ways; one is added to another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.z = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.relu(self.a(x)).split((3, 3), 1)
        return self.z(torch.cat((first + self.b(second), second), 1))


class Pyramid(nn.Module):
    """Coupled laterals, concatenation, a depthwise convolution, layers of unlike cost."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 20, 3, 2, 1, bias=False)
        self.one, self.two = nn.Conv2d(12, 8, 1), nn.Conv2d(20, 8, 1)
        self.depth, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1)
        self.z = nn.Conv2d(16 + 12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.relu(self.stem(x))
        high = self.two(torch.relu(self.deep(low)))
        mixed = self.one(low) + nn.functional.interpolate(high, scale_factor=2.0)
        return self.z(torch.cat((self.point(self.depth(mixed)), low), 1))


def selected(
    groups: Groups, scores: Scores, table: LatencyTable, goal_ms: float, **given: object
) -> Selection:
    options = {"limits": Limits(), "original": channels_of(groups.network), **given}
    budgets = [Budget(latency_costs(groups, table), goal_ms)]
    return select(groups, scores, budgets, **options)  # type: ignore[arg-type]


@cache
def every_choice(
    make: Callable[[], nn.Module], step: int
) -> tuple[Groups, LatencyTable, dict[tuple[int, ...], float]]:
    """All sets of units that can go, with the latency of the network that surgery leaves."""
    groups = groups_of(seeded(make))
    table = table_of(groups.network, step)
    whole = [set(piece.tolist()) for piece in groups.pieces]
    found = {}
    for size in range(groups.units + 1):
        for units in itertools.combinations(range(1, groups.units + 1), size):
            if not any(piece <= set(units) for piece in whole):
                found[units] = table.predict_ms(remove(groups, units))
    return groups, table, found


@given(
    st.sampled_from([Tiny, Split]),
    st.sampled_from([1, 2]),
    st.floats(0.4, 0.99),
    st.integers(0, 1000),
)
@settings(max_examples=20)
def test_no_other_set_of_channels_is_better(
    make: Callable[[], nn.Module], step: int, share: float, seed: int
) -> None:
    """Against every set of channels of a small network, each narrowed by surgery and costed as it then is: none
    that meets the goal loses less importance."""
    groups, table, choices = every_choice(make, step)
    scores = np.random.default_rng(seed).integers(0, 20, groups.units + 1) / 4
    goal_ms = choices[()] * share
    losses = [scores[list(units)].sum() for units, ms in choices.items() if ms <= goal_ms]
    try:
        found = selected(groups, scores, table, goal_ms, gap=0.0)
    except BudgetError:
        assert not losses
        return
    assert found.left[0] == pytest.approx(choices[found.units])
    assert found.lost == pytest.approx(scores[list(found.units)].sum())
    if losses:
        assert found.stopped is None
        assert found.left[0] <= goal_ms
        assert found.lost == pytest.approx(min(losses), abs=1e-6)
    else:
        assert found.stopped is not None
        assert found.left[0] == pytest.approx(min(choices.values()))


MEMORY = MemoryModel(0.001, 1.2, 2.5, (), correction=1.1)


@cache
def every_memory(make: Callable[[], nn.Module], step: int) -> dict[tuple[int, ...], float]:
    """The memory of the network that surgery leaves, of all sets of units that can go."""
    groups, _, choices = every_choice(make, step)
    return {units: MEMORY.predict_mib(footprint(remove(groups, units), step)) for units in choices}


@given(
    st.sampled_from([(Tiny, 2), (Split, 1)]),
    st.one_of(st.none(), st.floats(0.4, 0.99)),
    st.floats(0.4, 0.99),
    st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_no_other_set_within_the_memory_is_better(
    network: tuple[Callable[[], nn.Module], int], latency_share: float | None, memory_share: float, seed: int
) -> None:
    """Against every set of channels of a small network, narrowed by surgery and costed as it then is: none that is
    within the memory, and the latency where there is a goal for it, loses less; where none is, that is said."""
    groups, table, latencies = every_choice(*network)
    table, memories = replace(table, memory=MEMORY), every_memory(*network)
    scores = np.random.default_rng(seed).integers(0, 20, groups.units + 1) / 4
    goal_ms, goal_mib = latencies[()] * (latency_share or 2.0), memories[()] * memory_share
    budgets = [Budget(memory_costs(groups, table), goal_mib)]
    budgets += [Budget(latency_costs(groups, table), goal_ms)] if latency_share else []
    within = [u for u, ms in latencies.items() if ms <= goal_ms and memories[u] <= goal_mib]
    given = {"limits": Limits(), "original": channels_of(groups.network)}
    if not within:
        with pytest.raises(BudgetError, match=f"MiB.*is the least that can be left where {goal_mib:.4g} MiB"):
            check_in_reach(groups, budgets, **given)  # type: ignore[arg-type]
        return
    check_in_reach(groups, budgets, **given)  # type: ignore[arg-type]
    found = select(groups, scores, budgets, gap=0.0, **given)  # type: ignore[arg-type]
    assert found.stopped is None
    assert found.left == pytest.approx((memories[found.units], latencies[found.units])[: len(budgets)])
    assert found.left[0] <= goal_mib * (1 + 1e-9)
    assert found.left[-1] <= (goal_ms if latency_share else goal_mib) * (1 + 1e-9)
    assert found.lost == pytest.approx(min(scores[list(units)].sum() for units in within), abs=1e-6)


def test_a_table_without_memory_has_no_memory_costs() -> None:
    """It is said, not taken for 0."""
    with pytest.raises(LatencyTableError, match="holds no memory"):
        memory_costs(NETWORKS[0], table_of(NETWORKS[0].network, 1))


NETWORKS = [groups_of(seeded(make)) for make in (Pyramid, Residual, Gated)]


@given(
    st.sampled_from(NETWORKS),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(2, 1.0, 1), (3, 0.5, 1), (2, 0.7, 2), (2, 1.0, 4)]),
    st.lists(st.floats(0.35, 0.99), min_size=2, max_size=4),
    st.integers(0, 1000),
)
@settings(max_examples=20)
def test_within_goal_and_limits(
    groups: Groups, step: int, bounds: tuple[int, float, int], shares: list[float], seed: int
) -> None:
    """The narrowed network costs what was said, within the goal; every limit holds; a higher goal never loses
    more, up to the gap; and what cannot be met says which limit binds."""
    limits = Limits(*bounds)
    table = table_of(groups.network, step)
    scores = np.random.default_rng(seed).lognormal(0, 1.5, groups.units + 1)
    original, whole_ms = channels_of(groups.network), table.predict_ms(groups.network)
    least = np.inf  # importance lost at lower goals
    for share in sorted(shares):
        try:
            found = selected(groups, scores, table, whole_ms * share, limits=limits)
        except BudgetError as error:
            assert "nothing can be removed" in str(error)
            continue
        narrow = remove(groups, found.units)
        assert table.predict_ms(narrow) == pytest.approx(found.left[0])
        for layer, left in channels_of(narrow).items():
            if left < original[layer]:
                assert left >= limits.min_channels
                assert original[layer] - left <= original[layer] * limits.max_layer_ratio + 1e-9
                assert left % limits.channel_multiple == 0
        if found.stopped is None:
            assert found.left[0] <= whole_ms * share * (1 + 1e-6)
            assert 0 <= found.gap <= GAP + 1e-9
            assert found.lost * (1 - found.gap) <= least + 1e-9
            least = min(least, found.lost)
        else:
            assert found.left[0] > whole_ms * share
            assert "--" in found.stopped


def test_a_goal_that_is_met_takes_nothing() -> None:
    """Where the network is fast enough all channels stay."""
    groups = NETWORKS[0]
    table = table_of(groups.network, 4)
    found = selected(groups, np.ones(groups.units + 1), table, table.predict_ms(groups.network))
    assert (found.units, found.lost, found.gap, found.stopped) == ((), 0.0, 0.0, None)


def test_channels_go_by_whole_steps() -> None:
    """With equal importance and stairs of 8, what goes are whole stairs: a ranking one by one would leave counts
    that cost as much as the step above."""
    groups = groups_of(
        seeded(
            lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 2, 1))
        )
    )
    table = table_of(groups.network, 8)
    found = selected(groups, np.ones(groups.units + 1), table, table.predict_ms(groups.network) * 0.6)
    left = channels_of(remove(groups, found.units))
    assert left["0"] % 8 == left["2"] % 8 == 0
    assert sum(left.values()) < sum(channels_of(groups.network).values())


def test_protected_layers_stay_and_are_named() -> None:
    """What --protect keeps is kept; where nothing else can go the error says so."""
    groups = NETWORKS[0]
    table = table_of(groups.network, 4)
    whole_ms = table.predict_ms(groups.network)
    protected = groups.protect(["deep"])
    found = selected(protected, np.ones(groups.units + 1), table, whole_ms * 0.8)
    assert channels_of(remove(groups, found.units))["deep"] == 20
    with pytest.raises(BudgetError, match=r"nothing can be removed.*there is no other removable channel"):
        selected(groups.protect(["*"]), np.ones(groups.units + 1), table, whole_ms * 0.8)


class Shuffled(nn.Module):
    """Units of ShuffleNet: half of the channels pass, the other half is convolved, all are shuffled."""

    def __init__(self, units: int = 8, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.units = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width // 2, width // 2, 1),
                nn.ReLU(),
                nn.Conv2d(width // 2, width // 2, 3, padding=1, groups=width // 2),
                nn.Conv2d(width // 2, width // 2, 1),
                nn.ReLU(),
            )
            for _ in range(units)
        )
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for unit in self.units:
            left, right = x.split((x.shape[1] // 2,) * 2, 1)
            joined = torch.cat((left, unit(right)), 1)
            n, c, h, w = joined.shape
            x = joined.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x)


@pytest.mark.parametrize("memory_share", [None, 0.8])
def test_a_coupled_network_is_solved_quickly(memory_share: float | None) -> None:
    """Shuffled channels couple all units; the gap is closed in seconds, also with a second budget."""
    groups = groups_of(seeded(Shuffled))
    table = replace(table_of(groups.network, 8), memory=MEMORY)
    scores = np.random.default_rng(0).lognormal(0, 1.5, groups.units + 1)
    budgets = [Budget(latency_costs(groups, table), table.predict_ms(groups.network) / 1.5)]
    if memory_share is not None:
        memory = memory_costs(groups, table)
        budgets.append(Budget(memory, memory_share * memory.of(())))
    begun = time.monotonic()
    found = select(groups, scores, budgets, limits=Limits(), original=channels_of(groups.network))
    assert found.stopped is None
    assert found.gap <= GAP
    assert time.monotonic() - begun < 20
    assert all(left <= budget.goal * (1 + 1e-6) for left, budget in zip(found.left, budgets, strict=True))
    narrow = remove(groups, found.units)
    assert table.predict_ms(narrow) == pytest.approx(found.left[0])
    with torch.no_grad():
        assert narrow(torch.zeros(1, 3, SIDE, SIDE)).shape == (1, 4, SIDE // 2, SIDE // 2)


def coupled(speedup: float) -> tuple[Groups, list[Budget]]:
    """A network that takes HiGHS a while, and what it may take."""
    groups = groups_of(seeded(Shuffled))
    table = table_of(groups.network, 8)
    return groups, [Budget(latency_costs(groups, table), table.predict_ms(groups.network) / speedup)]


def choose(groups: Groups, budgets: list[Budget], time_limit_s: float) -> Selection:
    return select(
        groups,
        np.ones(groups.units + 1),
        budgets,
        limits=Limits(),
        original=channels_of(groups.network),
        time_limit_s=time_limit_s,
    )


def test_without_time_for_a_bound_the_gap_is_whole() -> None:
    """The choice made greedily holds; all that is known is that no choice loses less than nothing."""
    groups, budgets = coupled(1.5)
    found = choose(groups, budgets, 1e-9)
    assert found.stopped is None
    assert found.left[0] <= budgets[0].goal
    assert found.gap == 1.0


@pytest.mark.parametrize("greedily", [True, False])
def test_what_may_be_in_reach_is_not_refused(greedily: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where time is up before HiGHS has any choice, neither a goal that is reached greedily nor one of which nothing
    is known."""
    groups, budgets = coupled(1.5)
    if not greedily:
        monkeypatch.setattr(selection._Program, "greedily", lambda program: None)
    monkeypatch.setattr(selection, "TIME_LIMIT_S", 1e-9)
    check_in_reach(groups, budgets, limits=Limits(), original=channels_of(groups.network))


def test_only_the_bound_shows_what_is_out_of_reach() -> None:
    """Where the nearest choice is known to a hundredth, a goal just below it may yet be reached; what lies below the
    bound may not, and the error names the least."""
    groups, budgets = coupled(1000.0)
    least_ms = choose(groups, budgets, 20).left[0]
    nearest = selection._Program.nearest

    def within_a_hundredth(program: selection._Program, gap: float, time_limit_s: float) -> selection._Found:
        return nearest(program, gap, time_limit_s)._replace(gap=0.01)

    def check(goal_ms: float) -> None:
        goals = [Budget(budgets[0].costs, goal_ms)]
        check_in_reach(groups, goals, limits=Limits(), original=channels_of(groups.network))

    with mock.patch.object(selection._Program, "nearest", within_a_hundredth):
        check(0.995 * least_ms)
        with pytest.raises(BudgetError, match=f"{least_ms:.4g} ms is the least that can be left"):
            check(0.985 * least_ms)


def test_a_goal_met_by_the_nearest_choice_does_not_stop() -> None:
    """Where the solver ran out of time while it looked for the least loss, but not for the nearest choice."""
    groups, budgets = coupled(1.5)
    with mock.patch.object(selection._Program, "solve", return_value=None):
        found = choose(groups, budgets, 20)
    assert (found.stopped, found.gap) == (None, 1.0)
    assert found.left[0] <= budgets[0].goal * (1 + 1e-6)
