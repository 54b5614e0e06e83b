"""Pruning to a latency: on a device that is known, what is asked is met, recorded, and the same after a stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import squares
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import Engines, channels_of, table_of
from small import groups_of, seeded
from torch import Tensor, nn

from edgeprune.pruning.budget import BudgetError, Limits
from edgeprune.pruning.checkpoint import load_step, trace_detector
from edgeprune.pruning.footprint import footprint
from edgeprune.pruning.graph import Network
from edgeprune.pruning.latency import LatencyTable, Surface
from edgeprune.pruning.memory import MemoryModel
from edgeprune.pruning.narrowing import CLOSE, TRIALS, Candidates, LatencyBudget, within_latency
from edgeprune.pruning.records import MeasuredLatency, PrunedDetector
from edgeprune.pruning.schedule import prune_iteratively
from edgeprune.pruning.surgery import remove

NO_TUNING: Mapping[str, Any] = {"finetune": {"epochs": 0}}


@pytest.fixture(scope="module")
def network(square_data: Path) -> Network:
    return trace_detector(squares.detector_of(square_data), (64, 64))


def prune(data: Path, folder: Path, latency: LatencyBudget, **options: Any) -> Iterator[PrunedDetector]:
    return prune_iteratively(
        squares.NAME,
        squares.detector_of(data),
        squares.data_of(data),
        squares.options_of({**NO_TUNING, "replacement": "zero", **options}),
        lambda iteration: folder / f"step-{iteration:02d}",
        stage=squares.stage_of(lambda: None),
        latency=latency,
    )


class Wide(nn.Module):
    """Many channels, so that there is a choice near every goal."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 96, 3), nn.Conv2d(96, 64, 1)
        self.d, self.z = nn.Conv2d(64, 64, 1), nn.Conv2d(64, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return self.z(torch.relu(x + self.d(torch.relu(x))))


@given(
    st.floats(0.8, 1.25), st.floats(0.8, 1.25), st.floats(0.9, 1.1), st.floats(1.1, 2.5), st.integers(0, 99)
)
@settings(max_examples=4, deadline=None)
def test_a_wrong_table_is_corrected(
    scale: float, first_scale: float, fixed: float, speedup: float, seed: int
) -> None:
    """A table that is off by a fifth, more for the first kernel and in what is fixed: at most 2 % above the
    goal after at most three engines."""
    groups = groups_of(seeded(Wide))
    table = table_of(groups.network, 4)
    kinds = [replace(table.kinds[0], aligned=scaled(table.kinds[0].aligned, first_scale)), *table.kinds[1:]]
    truth = replace(table, kinds=tuple(kinds), constant_ms=table.constant_ms * fixed)
    engines = Engines(truth, slower=scale)
    budget = LatencyBudget(table, speedup=speedup, measure=engines)
    first = budget.begin(groups.network, groups, Limits())
    scores = np.random.default_rng(seed).lognormal(0, 1, groups.units + 1)
    candidates = Candidates(groups, scores, lambda units: remove(groups, units), groups, Limits())
    narrow = within_latency(candidates, budget, budget.final(first), first, first)
    assert narrow.latency is not None
    assert narrow.latency.measured == engines(narrow.network)
    assert engines.timed <= 1 + TRIALS + 1
    # Below the goal by what a step of the stairs takes, at most: the least important may be a whole step.
    assert 1 - 3 * CLOSE < narrow.latency.ms / (first.ms / speedup) <= 1 + CLOSE


def scaled(surface: Surface, factor: float) -> Surface:
    return replace(surface, ms=tuple(tuple(factor * ms for ms in row) for row in surface.ms))


def test_each_iteration_has_its_goal(square_data: Path, network: Network, tmp_path: Path) -> None:
    """Goals go down in equal steps from the unpruned engine's latency; each is met, and what was asked,
    predicted and measured is recorded beside the shares."""
    truth = table_of(network, 1)
    engines = Engines(truth, slower=1.25)
    budget = LatencyBudget(truth, speedup=1.6, measure=engines)
    steps = list(prune(square_data, tmp_path, budget, iterations=3))
    first = steps[0].steps[-1].latency
    assert first is not None
    assert first.asked_ms is None
    assert first.measured is not None
    assert first.measured.ms == pytest.approx(truth.predict_ms(network) * 1.25)
    assert first.predicted_ms == pytest.approx(truth.predict_ms(network))
    for iteration, pruned in enumerate(steps[1:], 1):
        step, record = pruned.steps[-1], pruned.steps[-1].latency
        assert record is not None
        assert record.measured is not None
        goal_ms = first.measured.ms * (1 - (1 - 1 / 1.6) * iteration / 3)
        assert record.asked_ms == pytest.approx(goal_ms)
        assert record.predicted_ms == pytest.approx(record.measured.ms)  # corrected by the unpruned engine's
        assert 0.9 * goal_ms < record.measured.ms <= goal_ms * (1 + 1e-6)
        assert record.measured.ms == pytest.approx(engines(pruned.network).ms)
        assert step.requested_share == pytest.approx(1 - goal_ms / first.measured.ms)
        assert step.achieved_share == pytest.approx(1 - record.measured.ms / first.measured.ms)
        assert step.stopped is None
    assert len(steps) == 4


def test_without_a_device_the_prediction_holds(square_data: Path, network: Network, tmp_path: Path) -> None:
    """Nothing is measured, and that is what the record says; the network meets the goal by the table."""
    table = table_of(network, 2)
    goal_ms = table.predict_ms(network) * 0.7
    steps = list(prune(square_data, tmp_path, LatencyBudget(table, goal_ms=goal_ms), iterations=2))
    record = steps[-1].steps[-1].latency
    assert record is not None
    assert record.measured is None
    assert record.asked_ms == pytest.approx(goal_ms)
    assert table.predict_ms(steps[-1].network) == pytest.approx(record.predicted_ms)
    assert record.predicted_ms <= goal_ms * (1 + 1e-6)


def test_an_energy_is_a_latency_by_the_power(square_data: Path, network: Network, tmp_path: Path) -> None:
    """With 5 W, so many millijoules are a fifth of as many milliseconds; a table without power refuses."""
    table = replace(table_of(network, 2), power_w=5.0)
    goal_ms = table.predict_ms(network) * 0.7
    steps = list(prune(square_data, tmp_path, LatencyBudget(table, energy_mj=5 * goal_ms), iterations=1))
    assert table.predict_ms(steps[-1].network) <= goal_ms * (1 + 1e-6)
    with pytest.raises(BudgetError, match="--energy-budget-mj: the latency table holds no power"):
        LatencyBudget(table_of(network, 2), energy_mj=1.0)


MEMORY = MemoryModel(0.002, 1.0, 3.0, ())


def with_memory(network: Network, step: int) -> tuple[LatencyTable, float]:
    """A table, and the memory of the unpruned network by it."""
    table = replace(table_of(network, step), memory=MEMORY)
    return table, MEMORY.predict_mib(footprint(network, step))


@given(
    st.floats(0.8, 1.25),
    st.floats(0.7, 1.4),
    st.one_of(st.none(), st.floats(1.1, 2.0)),
    st.floats(0.4, 0.9),
    st.integers(0, 99),
)
@settings(max_examples=4, deadline=None)
def test_a_wrong_memory_model_is_corrected(
    scale: float, per_weight: float, speedup: float | None, share: float, seed: int
) -> None:
    """Off by a fifth, and more for weights: what is chosen is within the memory after at most three engines, and
    the nearer goal is met within a few steps of the stairs."""
    groups = groups_of(seeded(Wide))
    table, _ = with_memory(groups.network, 4)
    truth = replace(table, memory=replace(MEMORY, per_weight=per_weight, correction=scale))
    engines = Engines(truth)
    unpruned_mib = engines(groups.network).memory_mib
    assert unpruned_mib is not None
    budget = LatencyBudget(table, speedup=speedup, memory_mib=share * unpruned_mib, measure=engines)
    first = budget.begin(groups.network, groups, Limits())
    scores = np.random.default_rng(seed).lognormal(0, 1, groups.units + 1)
    candidates = Candidates(groups, scores, lambda units: remove(groups, units), groups, Limits())
    narrow = within_latency(candidates, budget, budget.final(first), first, first)
    record = narrow.latency
    assert record is not None and record.memory is not None
    assert record.measured == engines(narrow.network)
    assert record.memory.measured_mib == record.measured.memory_mib
    assert record.memory.asked_mib == share * unpruned_mib
    assert engines.timed <= 1 + 1 + TRIALS + 1
    taken = [record.memory.mib / record.memory.asked_mib]
    taken += [record.ms / record.asked_ms] if record.asked_ms is not None else []
    assert taken[0] <= 1
    assert 1 - 4 * CLOSE < max(taken) <= 1 + CLOSE


def test_memory_goes_down_in_equal_steps(square_data: Path, network: Network, tmp_path: Path) -> None:
    """With memory alone asked for no latency is; what was asked, predicted and measured of each iteration is
    recorded, and read back."""
    table, whole_mib = with_memory(network, 1)
    truth = replace(table, memory=replace(MEMORY, correction=1.25))
    engines = Engines(truth)
    budget = LatencyBudget(table, memory_mib=0.6 * 1.25 * whole_mib, measure=engines)
    steps = list(prune(square_data, tmp_path, budget, iterations=2))
    first = steps[0].steps[-1].latency
    assert first is not None and first.memory is not None
    assert first.memory.asked_mib is None
    assert first.memory.predicted_mib == pytest.approx(whole_mib)
    assert first.memory.measured_mib == pytest.approx(1.25 * whole_mib)
    for iteration, pruned in enumerate(steps[1:], 1):
        step, record = pruned.steps[-1], pruned.steps[-1].latency
        assert record is not None and record.memory is not None
        goal_mib = 1.25 * whole_mib * (1 - 0.4 * iteration / 2)
        assert record.asked_ms is None
        assert record.memory.asked_mib == pytest.approx(goal_mib)
        assert record.memory.predicted_mib == pytest.approx(
            record.memory.mib
        )  # corrected by the unpruned engine's
        assert 0.9 * goal_mib < record.memory.mib <= goal_mib
        assert record.memory.mib == engines(pruned.network).memory_mib
        assert step.requested_share == pytest.approx(0.4 * iteration / 2)
        assert step.achieved_share == pytest.approx(1 - record.memory.mib / first.memory.mib)
    assert load_step(tmp_path / "step-02").steps == steps[-1].steps


def test_latency_and_memory_are_met_together(square_data: Path, network: Network, tmp_path: Path) -> None:
    """By a table alone: whichever of the goals is the harder, no other is missed, and the energy of before still
    is a latency."""
    table, whole_mib = with_memory(network, 2)
    table = replace(table, power_w=5.0)
    whole_ms = table.predict_ms(network)
    for number, (ms, mib) in enumerate([(0.6, 0.95), (0.95, 0.6), (0.8, 2.0)]):
        budget = LatencyBudget(table, energy_mj=5.0 * ms * whole_ms, memory_mib=mib * whole_mib)
        [_, pruned] = prune(square_data, tmp_path / str(number), budget, iterations=1)
        assert table.predict_ms(pruned.network) <= ms * whole_ms * (1 + 1e-6)
        found_mib = MEMORY.predict_mib(footprint(pruned.network, 2))
        assert found_mib <= mib * whole_mib * (1 + 1e-6)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_ends_the_same(square_data: Path, network: Network, tmp_path: Path) -> None:
    """Stopped while an engine of the second iteration is timed, and while the second fine-tuning would begin:
    the steps are those of a run that was not stopped, to the byte."""
    table = table_of(network, 1)
    engines = Engines(table, slower=1.2)

    def run(folder: Path, stop_at: int | None = None) -> None:
        seen = 0

        def measure(network: Network) -> MeasuredLatency:
            nonlocal seen
            seen += 1
            if seen == stop_at:
                raise Interrupted
            return engines(network)

        for _ in prune(square_data, folder, LatencyBudget(table, speedup=1.5, measure=measure), iterations=2):
            pass

    run(tmp_path / "whole")
    for stop_at in (1, 2, 2):
        with pytest.raises(Interrupted):
            run(tmp_path / "stopped", stop_at)
    run(tmp_path / "stopped")
    for iteration in range(3):
        for name in ("detector.json", "weights.safetensors"):
            path = f"step-0{iteration}/{name}"
            assert (tmp_path / "stopped" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    assert load_step(tmp_path / "whole" / "step-02").steps[-1].latency is not None


def test_out_of_reach_is_said_at_once(square_data: Path, network: Network, tmp_path: Path) -> None:
    """A goal below the fastest network that the limits leave, and one that is met already, end the run before
    anything is pruned, with that latency."""
    table = table_of(network, 1)
    limits = {"max_layer_ratio": 0.25}
    with pytest.raises(BudgetError, match=r"ms is the least that can be left .*--max-layer-ratio 0.25"):
        list(prune(square_data, tmp_path / "far", LatencyBudget(table, speedup=50.0), limits=limits))
    ms = table.predict_ms(network)
    with pytest.raises(BudgetError, match=f"takes {ms:.4g} ms"):
        list(prune(square_data, tmp_path / "met", LatencyBudget(table, goal_ms=ms * 2)))
    table, mib = with_memory(network, 1)
    with pytest.raises(
        BudgetError, match=r"MiB is the least that can be left where 0.0001 MiB .*--min-channels 1"
    ):
        list(prune(square_data, tmp_path / "far", LatencyBudget(table, memory_mib=1e-4)))
    with pytest.raises(BudgetError, match=rf"takes {mib:.4g} MiB, no more than {2 * mib:.4g} MiB"):
        list(prune(square_data, tmp_path / "met", LatencyBudget(table, memory_mib=2 * mib)))
    assert not list(tmp_path.rglob("detector.json"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "--speedup"),
        ({"speedup": 0.5}, "above 1"),
        ({"goal_ms": -1.0}, "above 0"),
        ({"memory_mib": -1.0}, "above 0"),
        ({"memory_mib": 1.0}, "--memory-budget-mib: the latency table holds no memory"),
    ],
)
def test_budgets_check_themselves(network: Network, wrong: dict[str, float], words: str) -> None:
    """No goal, one that is none, and one that the table knows nothing of, are refused."""
    with pytest.raises(BudgetError, match=words):
        LatencyBudget(table_of(network, 1), **wrong)


def test_widths_are_chosen_on_steps(square_data: Path, network: Network, tmp_path: Path) -> None:
    """With stairs of 4 every pruned layer ends on a multiple of 4: the rest would be paid for and not used."""
    table: LatencyTable = table_of(network, 4)
    steps = list(prune(square_data, tmp_path, LatencyBudget(table, speedup=1.5), iterations=1))
    before, after = channels_of(network), channels_of(steps[-1].network)
    assert any(after[layer] < before[layer] for layer in after)
    assert all(after[layer] % 4 == 0 for layer in after if after[layer] < before[layer])
