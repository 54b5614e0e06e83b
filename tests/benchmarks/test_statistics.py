"""Percentiles and interval estimates against what they must be by hand, by scipy and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from edgeprune.benchmarks.statistics import MIN_BLOCKS, paired_ratio, summarise


def test_percentiles_by_hand() -> None:
    """Of 1 to 101 ms: median 51, p90 91, p99 100; the rank of p among n sorted values is 1 + p (n - 1)."""
    latency = summarise([float(ms) for ms in range(101, 0, -1)], "engine")
    assert (latency.p50_ms, latency.p90_ms, latency.p99_ms) == (51, 91, 100)
    assert (latency.mean_ms, latency.runs, latency.scope) == (51, 101, "engine")
    assert latency.std_ms == pytest.approx(math.sqrt(101 * 102 / 12))  # of the integers 1 to n, n - 1 below


@pytest.mark.parametrize("samples", [[], [1.0, 0.0], [1.0, -1.0], [math.nan], [math.inf]])
def test_a_failed_run_is_no_latency(samples: list[float]) -> None:
    """No samples, zero, negative or not finite: refused, never summarised as 0."""
    with pytest.raises(ValueError, match="engine"):
        summarise(samples, "engine")


def test_one_run_has_no_spread() -> None:
    """The standard deviation of a single run is not measured."""
    assert summarise([3.0], "engine").std_ms is None


def test_ratio_by_hand() -> None:
    """Block ratios 1/2, 1/4 and 1/8 have the geometric mean 1/4; three blocks carry no interval."""
    ratio = paired_ratio({0: [1.0], 1: [1.0], 2: [1.0], 9: [7.0]}, {0: [2.0], 1: [4.0], 2: [8.0], 8: [7.0]})
    assert ratio is not None
    assert ratio.value == pytest.approx(0.25)
    assert (ratio.low, ratio.high, ratio.blocks) == (None, None, 3)
    assert not ratio.shows_difference


def test_no_shared_block_is_no_ratio() -> None:
    """Blocks that were not measured together are not compared."""
    assert paired_ratio({0: [1.0]}, {1: [1.0]}) is None


@given(
    st.lists(
        st.tuples(st.floats(0.5, 50), st.floats(0.5, 50), st.floats(0.1, 10)),
        min_size=MIN_BLOCKS,
        max_size=12,
    )
)
def test_drift_between_blocks_cancels(blocks: list[tuple[float, float, float]]) -> None:
    """Slowing the device down by any factor per block changes neither the ratio nor its interval."""
    steady = paired_ratio(
        {k: [a] for k, (a, _, _) in enumerate(blocks)}, {k: [b] for k, (_, b, _) in enumerate(blocks)}
    )
    drifting = paired_ratio(
        {k: [a * f] for k, (a, _, f) in enumerate(blocks)}, {k: [b * f] for k, (_, b, f) in enumerate(blocks)}
    )
    assert steady is not None and drifting is not None
    assert (drifting.value, drifting.low, drifting.high) == pytest.approx(
        (steady.value, steady.low, steady.high)
    )


@pytest.mark.parametrize("blocks", [MIN_BLOCKS, 10, 20])
def test_the_interval_covers_as_often_as_it_says(blocks: int) -> None:
    """In 600 simulated benchmarks the 95 % interval holds the truth 95 % of the time, within 3.4 sigma."""
    rng = np.random.default_rng(blocks)
    held = 0
    for seed in range(600):
        noise = rng.lognormal(0, 0.02, (2, blocks))
        ratio = paired_ratio(
            {k: [0.9 * float(noise[0, k])] for k in range(blocks)},
            {k: [float(noise[1, k])] for k in range(blocks)},
            resamples=400,
            seed=seed,
        )
        assert ratio is not None and ratio.low is not None and ratio.high is not None
        held += ratio.low <= 0.9 <= ratio.high
    assert 0.92 <= held / 600 <= 0.98


def test_the_interval_is_near_students() -> None:
    """For symmetric noise the bootstrap agrees with Student's interval within a tenth of its width."""
    logs = np.random.default_rng(1).normal(-0.1, 0.03, 15)
    ratio = paired_ratio({k: [float(np.exp(x))] for k, x in enumerate(logs)}, {k: [1.0] for k in range(15)})
    assert ratio is not None and ratio.low is not None and ratio.high is not None
    low, high = stats.t.interval(0.95, 14, loc=logs.mean(), scale=stats.sem(logs))
    width = high - low
    assert math.log(ratio.low) == pytest.approx(low, abs=0.1 * width)
    assert math.log(ratio.high) == pytest.approx(high, abs=0.1 * width)
