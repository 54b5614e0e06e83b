"""Percentiles of latencies, and confidence intervals of latency ratios measured in interleaved blocks."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from edgeprune.benchmarks.records import Latency, Ratio

# With 5 blocks the interval below held the truth in 92 % of simulated benchmarks, with 8 in 94.5 %:
# fewer than 8 give no interval, rather than one that is too narrow.
MIN_BLOCKS = 8


def summarise(samples_ms: Sequence[float], scope: str) -> Latency:
    """Summarise the latencies of single runs; percentiles interpolate linearly (numpy's default).

    Raises:
        ValueError: If there are no samples, or one is not positive and finite: a failed run is no latency.
    """
    samples = np.asarray(samples_ms, dtype=np.float64)
    if samples.size == 0:
        raise ValueError(f"no {scope} latencies to summarise")
    if not np.all(np.isfinite(samples) & (samples > 0)):
        raise ValueError(f"{scope} latencies must be positive and finite")
    p50, p90, p99 = (float(p) for p in np.percentile(samples, [50, 90, 99]))
    return Latency(
        scope=scope,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        mean_ms=float(samples.mean()),
        std_ms=float(samples.std(ddof=1)) if samples.size > 1 else None,
        runs=int(samples.size),
    )


def paired_ratio(
    blocks_ms: Mapping[int, Sequence[float]],
    baseline_ms: Mapping[int, Sequence[float]],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Ratio | None:
    """Compare a step's latency with the baseline's, block by block.

    Blocks of the same index were measured within seconds of each other, so the ratio of their medians is
    free of slow drift (heat, clocks). The estimate is the geometric mean of these ratios. The interval is a
    bootstrap over whole blocks, because runs within a block are not independent; its percentiles are widened
    for few blocks as in Hesterberg 2014 ("expanded percentile interval", arXiv:1411.5279).

    Args:
        blocks_ms: block index -> latencies of the step in that block.
        baseline_ms: the same for the baseline; only blocks that both have are used.

    Returns:
        The ratio step / baseline (below 1: the step is faster), or None where they share no block. With fewer
        than `MIN_BLOCKS` shared blocks the interval is None.
    """
    shared = sorted(blocks_ms.keys() & baseline_ms.keys())
    if not shared:
        return None
    logs = np.array([np.log(np.median(blocks_ms[b]) / np.median(baseline_ms[b])) for b in shared])  # (B,)
    estimate = float(np.exp(logs.mean()))
    if len(shared) < MIN_BLOCKS:
        return Ratio(estimate, None, None, len(shared))
    count = len(shared)
    picks = np.random.default_rng(seed).integers(0, count, size=(resamples, count))
    means = logs[picks].mean(axis=1)  # (resamples,)
    t = stats.t.ppf((1 + confidence) / 2, count - 1)
    tail = float(stats.norm.cdf(-np.sqrt(count / (count - 1)) * t))
    low, high = np.exp(np.quantile(means, [tail, 1 - tail]))
    return Ratio(estimate, float(low), float(high), count)
