"""What goes is exactly as much as was asked, from the least important on, and the limits hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import SIDE, Chain, Gated, Residual, groups_of, pictures, scoring_of, seeded
from torch import Tensor, nn
from zoo import C2f

from edgeprune.pruning.budget import COSTS, BudgetError, Choice, Limits, choose
from edgeprune.pruning.counting import count
from edgeprune.pruning.graph import trace
from edgeprune.pruning.groups import Groups, find_groups
from edgeprune.pruning.importance import Scores, score
from edgeprune.pruning.surgery import remove


class Pyramid(nn.Module):
    """Coupled laterals, concatenation, depth multiplier 2, grouped convolution, layers of unlike cost."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 20, 3, 2, 1, bias=False)
        self.one, self.two = nn.Conv2d(12, 8, 1), nn.Conv2d(20, 8, 1)
        self.twice, self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.Conv2d(16, 16, 1, groups=2)
        self.z = nn.Conv2d(16 + 12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.relu(self.stem(x))
        high = self.two(torch.relu(self.deep(low)))
        mixed = self.one(low) + nn.functional.interpolate(high, scale_factor=2.0)
        return self.z(torch.cat((self.grouped(self.twice(mixed)), low), 1))


class Res2Net(nn.Module):
    """Four slices of one layer; the second and third result are added to the slice after them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.first = width, nn.Conv2d(3, 4 * width, 1)
        self.rows = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.z = nn.Conv2d(4 * width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, *slices = torch.relu(self.first(x)).split(self.width, 1)
        results = [kept]
        for row, part in zip(self.rows, slices, strict=True):
            results.append(torch.relu(row(part if len(results) == 1 else part + results[-1])))
        return self.z(torch.cat(results, 1))


def c2f(half: int) -> nn.Module:
    """Of the first layer's two halves one is added to the last layer of a row, the other to none."""
    return nn.Sequential(C2f(3, 2 * half, 1), nn.Conv2d(2 * half, 2, 1))


NETWORKS = [
    groups_of(seeded(make))
    for make in (Pyramid, Residual, Gated, lambda: c2f(16), lambda: c2f(6), lambda: Res2Net(6))
]


def originals(groups: Groups) -> dict[str, int]:
    return {layer: len(ids) for layer, ids in groups.outputs.items()}


def chosen(groups: Groups, scores: Scores, share: float, **options: object) -> Choice:
    """Remove a share of the parameters unless the options say otherwise."""
    cost = str(options.get("cost", "params"))
    given = {"cost": cost, "per": "params", "limits": Limits(), "original": originals(groups), **options}
    return choose(groups, scores, goal=COSTS[cost](groups).total() * (1 - share), **given)  # type: ignore[arg-type]


def channels(groups: Groups, units: tuple[int, ...]) -> Mapping[str, int]:
    """Channels of each layer after physical removal."""
    return originals(find_groups(remove(groups, units)))


def cost_of(groups: Groups, units: tuple[int, ...], cost: str) -> float:
    """Counted on the narrowed network itself."""
    narrow = remove(groups, units)
    if cost == "channels":
        return sum(originals(find_groups(narrow)).values())
    return count(narrow).params if cost == "params" else count(narrow).macs


@st.composite
def requests(draw: st.DrawFn) -> tuple[Groups, Scores, dict[str, object]]:
    groups = draw(st.sampled_from(NETWORKS))
    # Few different values: many ties.
    values = draw(
        st.lists(
            st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]), min_size=groups.units + 1, max_size=groups.units + 1
        )
    )
    limits = Limits(
        min_channels=draw(st.integers(1, 3)),
        max_layer_ratio=draw(st.sampled_from([0.3, 0.5, 0.8, 1.0])),
        channel_multiple=draw(st.sampled_from([1, 2, 4, 8])),
    )
    options = {
        "cost": draw(st.sampled_from(sorted(COSTS))),
        "per": draw(st.sampled_from(["params", "macs", "none"])),
    }
    return groups, np.array(values), {**options, "limits": limits}


@given(requests(), st.floats(0.01, 0.9))
@settings(deadline=None, max_examples=50)
def test_never_less_than_asked_and_not_one_unit_more(
    request: tuple[Groups, Scores, dict[str, object]], share: float
) -> None:
    """What is left, counted on the narrowed network, is the stated cost; it meets the request, by less than so many
    coupled channels as a multiple has, and did not before the last bundle; or the limits that stopped it are named.
    Every limit holds."""
    groups, scores, options = request
    cost, limits = str(options["cost"]), options["limits"]
    assert isinstance(limits, Limits)
    whole = COSTS[cost](groups).total()
    try:
        choice = chosen(groups, scores, share, **options)
    except BudgetError as error:
        assert "nothing can be removed" in str(error)
        return
    assert cost_of(groups, choice.units, cost) == choice.cost
    if choice.stopped is None:
        assert choice.cost <= whole * (1 - share)
        assert whole * (1 - share) - choice.cost < most_saved(groups, choice, options)
        # A request for a hair less than what is gone would have ended one bundle earlier.
        try:
            before = chosen(groups, scores, (whole - choice.cost) / whole, **options)
        except BudgetError:
            raise AssertionError("what was removed cannot be asked for") from None
        assert before.units == choice.units
        smaller = last_smaller(groups, scores, choice, options)
        assert smaller is None or smaller.cost > whole * (1 - share)
    else:
        assert choice.cost > whole * (1 - share)
        assert "--" in choice.stopped or "every tensor" in choice.stopped or "no other" in choice.stopped
    for layer, left in channels(groups, choice.units).items():
        original = originals(groups)[layer]
        assert left >= 1
        if left < original:
            assert left >= limits.min_channels
            assert original - left <= original * limits.max_layer_ratio + 1e-9
            assert left % limits.channel_multiple == 0


def most_saved(groups: Groups, choice: Choice, options: dict[str, object]) -> float:
    """The most that the last of the units can have saved, as many as a multiple has channels: what the dearest cost
    in the whole network."""
    terms, limits = COSTS[str(options["cost"])](groups), options["limits"]
    assert isinstance(limits, Limits)
    saved = []
    for unit in choice.units:
        sizes = terms.sizes.copy()
        for factor, positions in terms.members[unit].items():
            sizes[factor] -= positions
        saved.append(terms.total() - terms.total(sizes))
    return sum(sorted(saved)[-limits.channel_multiple :])


def last_smaller(groups: Groups, scores: Scores, choice: Choice, options: dict[str, object]) -> Choice | None:
    """The choice one bundle before: what the smallest request gives that does not end at the same units."""
    whole = COSTS[str(options["cost"])](groups).total()
    low, high = choice.cost, whole - 1  # a goal that gives the same, and one that may give less
    given = {"per": "params", "original": originals(groups), **options}
    before = choose(groups, scores, goal=high, **given)  # type: ignore[arg-type]
    if before.units == choice.units:
        return None
    while high - low > 1:
        middle = math.floor((low + high) / 2)
        found = choose(groups, scores, goal=middle, **given)  # type: ignore[arg-type]
        if found.units == choice.units:
            low = middle
        else:
            high, before = middle, found
    assert set(before.units) < set(choice.units)
    return before


@given(requests(), st.lists(st.floats(0.01, 0.95), min_size=2, max_size=5))
@settings(deadline=None, max_examples=30)
def test_more_asked_is_more_removed(
    request: tuple[Groups, Scores, dict[str, object]], shares: list[float]
) -> None:
    """A higher request removes a superset, whatever the limits, and the same request the same units."""
    groups, scores, options = request
    last: set[int] = set()
    for share in sorted(shares):
        try:
            units = chosen(groups, scores, share, **options).units
        except BudgetError:
            assert not last
            continue
        assert units == chosen(groups, scores.copy(), share, **options).units
        assert last <= set(units)
        last = set(units)


def test_the_least_important_go_first() -> None:
    """On a chain with equal costs, by hand: the two smallest of layer a."""
    groups = groups_of(seeded(Chain)).protect(["b"])
    scores = np.full(groups.units + 1, 9.0)
    a = groups.channels("a")
    scores[a] = [3, 1, 4, 1.5, 5, 9]
    per_channel = 3 * 9 + 1 + 5 * 9
    choice = choose(
        groups,
        scores,
        cost="params",
        goal=count(groups.network).params - per_channel - 1,
        per="params",
        limits=Limits(),
        original=originals(groups),
    )
    assert choice.units == tuple(sorted((int(a[1]), int(a[3]))))
    assert choice.stopped is None


@pytest.mark.parametrize("per", ["params", "macs"])
def test_importance_for_what_is_saved(per: str) -> None:
    """With equal importances the unit whose removal saves most, counted on narrowed networks, goes first."""
    groups = NETWORKS[0]
    left = [cost_of(groups, (unit,), per) for unit in range(1, groups.units + 1)]
    first = chosen(groups, np.ones(groups.units + 1), 1e-6, per=per).units
    assert first == (1 + left.index(min(left)),)
    assert max(left) > min(left)


def test_ties_do_not_over_prune() -> None:
    """All scores equal, 2 % asked: torch-pruning removes 60 of 112 channels, here one channel goes."""
    groups = groups_of(seeded(lambda: nn.Sequential(nn.Conv2d(3, 112, 3), nn.ReLU(), nn.Conv2d(112, 2, 1))))
    choice = chosen(groups, np.ones(113), 0.02, per="none")
    assert len(choice.units) == 3  # 2 % of 112 channels
    choice = chosen(groups, np.ones(113), 0.008, per="none")
    assert len(choice.units) == 1


@pytest.mark.parametrize("share", [0.3, 0.7, 0.9, 0.95])
def test_multiples_never_prune_less_for_more(share: float) -> None:
    """Multiples of 16: torch-pruning keeps 9,878 parameters at 0.7 and 24,086 at 0.9 (nothing pruned)."""
    groups = groups_of(
        seeded(
            lambda: nn.Sequential(
                nn.Conv2d(3, 32, 3),
                nn.ReLU(),
                nn.Conv2d(32, 64, 3),
                nn.ReLU(),
                nn.Conv2d(64, 24, 3),
                nn.Conv2d(24, 5, 1),
            )
        )
    )
    scores = score("magnitude", scoring_of(groups, pictures(1)))
    choice = chosen(groups, scores, share, limits=Limits(channel_multiple=16))
    left = channels(groups, choice.units)
    assert left["5"] == 5  # the output
    assert all(left[layer] % 16 == 0 and left[layer] > 0 for layer in ("0", "2")) and left["4"] in (16, 24)
    if choice.stopped is None:
        assert choice.cost <= (1 - share) * count(groups.network).params
    else:
        assert (left["0"], left["2"], left["4"]) == (16, 16, 16)
        assert "--channel-multiple 16" in choice.stopped


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (lambda: c2f(16), {"0.first.0": 16, "0.rows.0.body.0.0": 8, "0.rows.0.body.1.0": 8, "0.last.0": 8}),
        (lambda: c2f(12), {"0.first.0": 16, "0.rows.0.body.0.0": 8, "0.rows.0.body.1.0": 8, "0.last.0": 8}),
        (lambda: Res2Net(16), {"first": 24, "rows.0": 8, "rows.1": 8, "rows.2": 8}),
        (lambda: Res2Net(12), {"first": 24, "rows.0": 8, "rows.1": 8, "rows.2": 8}),
    ],
)
def test_multiples_where_layers_overlap_in_part(make: Callable[[], nn.Module], least: dict[str, int]) -> None:
    """Whatever the order of importance all layers come down to multiples of 8: what is coupled to a narrower layer
    to 8 channels, and the rest of the wide one to 8 more; by hand. On the way no request is exceeded by the cost of
    8 channels."""
    groups = groups_of(seeded(make))
    for seed in range(10):
        scores = np.random.default_rng(seed).random(groups.units + 1)
        choice = chosen(groups, scores, 0.999, limits=Limits(channel_multiple=8))
        left = channels(groups, choice.units)
        assert {layer: left[layer] for layer in least} == least
        options: dict[str, object] = {"cost": "params", "limits": Limits(channel_multiple=8)}
        for share in (0.05, 0.2, 0.35):
            choice = chosen(groups, scores, share, **options)
            excess = COSTS["params"](groups).total() * (1 - share) - choice.cost
            assert 0 <= excess < most_saved(groups, choice, options)


@pytest.mark.parametrize("width", [10, 12, 13, 26])
def test_layers_at_no_multiple_come_there_by_the_fewest_channels(width: int) -> None:
    """Found by trying all counts of the three kinds of the first layer's channels: in the first two slices, and in
    each of those that a narrower layer is added to."""
    groups = groups_of(seeded(lambda: Res2Net(width))).protect(["rows.2"])
    scores = np.ones(groups.units + 1)

    def fine(left: int, before: int) -> bool:
        return left == before or (left % 8 == 0 and left >= 8)

    fewest = min(
        free + one + two
        for free, one, two in itertools.product(range(9), repeat=3)
        if one + two
        and fine(4 * width - free - one - two, 4 * width)
        and fine(width - one, width)
        and fine(width - two, width)
    )
    choice = chosen(groups, scores, 1e-6, per="none", limits=Limits(channel_multiple=8))
    assert len(choice.units) == fewest


def test_a_layer_narrower_than_the_multiple_stays() -> None:
    """12 channels and multiples of 16: the layer keeps its 12; alone, the error names the option."""
    groups = groups_of(seeded(lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 2, 1))))
    with pytest.raises(BudgetError, match=r"nothing can be removed.*--channel-multiple 16"):
        chosen(groups, np.ones(13), 0.5, limits=Limits(channel_multiple=16))


def test_the_cap_counts_original_channels_over_rounds() -> None:
    """A cap of 0.5 with global ranking leaves half of the original channels after any number of rounds
    (torch-pruning: cap 0.3, 64 -> 8)."""
    groups = groups_of(seeded(Chain))
    original = originals(groups)
    scores = score("magnitude", scoring_of(groups, pictures(1)))
    scores[groups.channels("a")] = 0  # all of one layer first
    for _ in range(10):
        try:
            choice = chosen(groups, scores, 0.15, limits=Limits(max_layer_ratio=0.5), original=original)
        except BudgetError as error:
            assert "--max-layer-ratio 0.5" in str(error)
            break
        groups = find_groups(remove(groups, choice.units))
        scores = np.zeros(groups.units + 1)
    else:
        raise AssertionError("the cap never bound")
    assert originals(groups) == {"a": 3, "b": 3, "z": 2}


def test_protected_layers_keep_their_channels() -> None:
    """By name or pattern, with all they are coupled to; an unknown name is an error that lists the layers."""
    groups = groups_of(seeded(Residual))
    for pattern in ("b", "[b-c]"):
        with pytest.raises(BudgetError, match=r"kept whole: b \(protected by name\)"):
            chosen(groups.protect([pattern]), np.zeros(groups.units + 1), 0.1)
    pyramid = groups_of(seeded(Pyramid))
    protected = pyramid.protect(["st*"])
    choice = chosen(protected, np.zeros(pyramid.units + 1), 0.9)
    left = channels(pyramid, choice.units)
    assert left["stem"] == 12
    assert left["deep"] < 20


def test_outputs_keep_their_channels() -> None:
    """Everything asked for: each layer keeps a channel, the output all; the message says what binds."""
    groups = groups_of(seeded(Chain))
    choice = chosen(groups, np.ones(groups.units + 1), 0.999)
    assert channels(groups, choice.units) == {"a": 1, "b": 1, "z": 2}
    assert choice.stopped is not None
    assert "--min-channels 1" in choice.stopped


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (Limits(min_channels=6), "--min-channels 6"),
        (Limits(max_layer_ratio=0.1), "--max-layer-ratio 0.1"),
        (Limits(channel_multiple=7), "--channel-multiple 7"),
    ],
)
def test_nothing_to_remove_names_the_limit(limits: Limits, named: str) -> None:
    """Where no channel can go the error says which limit binds and no other."""
    groups = groups_of(seeded(Chain))
    with pytest.raises(BudgetError) as raised:
        chosen(groups, np.ones(groups.units + 1), 0.1, limits=limits)
    assert named in str(raised.value)
    assert str(raised.value).count("--") == 1


def test_a_floor_in_one_layer_does_not_end_its_group() -> None:
    """Units of layer a alone still go after a unit shared with a full layer had to stay."""

    class Overlap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.z = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.a(x).split((4, 4), 1)
            return self.z(torch.cat((first + self.b(x), second), 1))

    groups = groups_of(seeded(Overlap))
    scores = np.ones(groups.units + 1)
    scores[groups.channels("b")] = 0
    choice = chosen(groups, scores, 0.8, per="none", limits=Limits(min_channels=2))
    assert channels(groups, choice.units) == {"a": 3, "b": 2, "z": 2}  # the other half of a keeps one


def test_frozen_layers_are_pruned_and_stay_frozen() -> None:
    """torch-pruning silently leaves frozen parameters out; here they go like others and stay frozen."""
    module = seeded(Chain)
    module.get_submodule("a").requires_grad_(False)
    groups = groups_of(module)
    scores = score("magnitude", scoring_of(groups, pictures(1)))
    scores[groups.channels("a")[:3]] = 0
    narrow = remove(groups, chosen(groups, scores, 0.3).units)
    assert narrow.get_parameter("a.weight").shape[0] < 6
    assert not narrow.get_parameter("a.weight").requires_grad
    assert narrow.get_parameter("b.weight").requires_grad


def test_functional_convolutions_count() -> None:
    """A convolution called as a function has MACs and is pruned by them (torch-pruning counts 0)."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.z = nn.Parameter(torch.randn(10, 3, 3, 3)), nn.Conv2d(10, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.z(torch.relu(nn.functional.conv2d(x, self.w, padding=1)))

    groups = find_groups(trace(seeded(Functional), torch.zeros(1, 3, SIDE, SIDE)))
    assert COSTS["macs"](groups).total() == SIDE * SIDE * 10 * (27 + 2)
    choice = chosen(groups, np.ones(groups.units + 1), 0.5, cost="macs")
    assert len(choice.units) == 5
    assert choice.cost == SIDE * SIDE * 5 * (27 + 2) == count(remove(groups, choice.units)).macs


@pytest.mark.parametrize("share", [0.1, 0.4, 0.5])
def test_a_ratio_is_one_of_parameters(share: float) -> None:
    """0.4 removes 40 % of the parameters (torch-pruning's 0.4 of the channels removed 64 %)."""
    groups = NETWORKS[0]
    choice = chosen(groups, np.arange(groups.units + 1.0), share)
    assert choice.stopped is None
    removed = 1 - count(remove(groups, choice.units)).params / count(groups.network).params
    assert share <= removed < share + 0.1


def test_rounding_does_not_cost_a_channel() -> None:
    """1 - 0.9 is a little less than 0.1 in binary; 90 % of 100 channels are 90."""
    groups = groups_of(seeded(lambda: nn.Sequential(nn.Conv2d(3, 100, 1, bias=False), nn.Conv2d(100, 2, 1))))
    whole = 3 * 100 + 2 * 100  # and the output's two biases, which stay
    choice = choose(
        groups,
        np.ones(101),
        cost="params",
        goal=(whole * (1 - 0.9)) + 2 - 1e-12,
        per="none",
        limits=Limits(),
        original=originals(groups),
    )
    assert len(choice.units) == 90


@pytest.mark.parametrize(
    "wrong",
    [{"min_channels": 0}, {"max_layer_ratio": 0.0}, {"max_layer_ratio": 1.5}, {"channel_multiple": 0}],
)
def test_limits_check_themselves(wrong: dict[str, float]) -> None:
    """A value out of its range is refused by its option's name."""
    with pytest.raises(BudgetError, match="--" + next(iter(wrong)).replace("_", "-")):
        Limits(**wrong)  # type: ignore[arg-type]
