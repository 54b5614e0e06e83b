"""A run as the benchmarks see it, with figures chosen by hand. Not measured anywhere."""

from collections.abc import Mapping, Sequence

import numpy as np

from edgeprune.benchmarks.records import (
    BenchmarkResult,
    Block,
    Device,
    LayerTime,
    Report,
    ReportRow,
    SampleDetections,
)
from edgeprune.benchmarks.statistics import summarise
from edgeprune.pruning.records import FineTuneRecord, PruningStep

HOST = Device(
    "host",
    "onnxruntime",
    "x86_64 example processor",
    {
        "machine": "x86_64",
        "l4t": None,
        "backends": {"onnxruntime": {"version": "1.18"}},
        "power_mode": None,
        "clocks_locked": None,
    },
)
LAYERS = {
    "backbone.conv1": 24,
    **{f"backbone.stage{s}.{b}.conv": 58 * 2 ** (s - 2) for s in (2, 3, 4) for b in range(4)},
    "head.cls.0": 96,
}


TELEMETRY = {
    "before": {"power_mode": None},
    "after": {"power_mode": None},
    "samples": [
        {
            "time_s": float(second),
            "load": 1 + 0.1 * (second % 3),
            "temperatures_c": {"cpu": 40 + 8 * (1 - 0.95**second)},
            "power_mw": {},
        }
        for second in range(90)
    ],
}


def layers(iteration: int) -> tuple[LayerTime, ...]:
    """Every layer takes 4 us a channel, but for one that keeps its time."""
    kept = step(iteration).channels
    return tuple(
        LayerTime(
            layer,
            0.4 if layer == "backbone.stage3.1.conv" else 0.004 * kept[layer],
            kept[layer],
            kept[layer],
            4.5 * kept[layer],  # 3 x 3
        )
        for layer in LAYERS
    )


def step(iteration: int, share_removed: float = 0.04) -> PruningStep:
    """Iteration 0 is unpruned; every later one removes `share_removed` of the original channels more."""
    kept = {layer: round(width * (1 - share_removed * iteration)) for layer, width in LAYERS.items()}
    before = {
        layer: round(width * (1 - share_removed * max(iteration - 1, 0))) for layer, width in LAYERS.items()
    }
    return PruningStep(
        iteration=iteration,
        criterion="taylor" if iteration else "none",
        removed={layer: before[layer] - kept[layer] for layer in LAYERS},
        channels=kept,
        channels_removed=sum(before.values()) - sum(kept.values()),
        requested_share=0.04 * iteration,
        achieved_share=0.04 * iteration,
        params=950_000 - 38_000 * iteration,
        macs=300_000_000 - 11_000_000 * iteration,
        activation_bytes=9_000_000 - 200_000 * iteration,
        importance={layer: (1e-6 * w, 1e-5 * w, 3e-5 * w, 1e-4 * w, 1e-3 * w) for layer, w in kept.items()}
        if iteration
        else {},
        ap_before=0.302 - 0.006 * iteration,
        ap50_before=0.601 - 0.009 * iteration,
        ap_after=0.302 - 0.002 * iteration,
        ap50_after=0.601 - 0.003 * iteration,
        finetune=FineTuneRecord(10, 0.001, 8, "ema", False, (1.5, 1.2), (0.3, 0.31)) if iteration else None,
    )


def result(iteration: int, blocks: int = 12, runs: int = 25, device: Device = HOST) -> BenchmarkResult:
    """Latencies around 12 ms - 0.35 ms an iteration, with a little noise, from a fixed seed."""
    rng = np.random.default_rng(iteration)

    def samples(middle_ms: float) -> tuple[float, ...]:
        return tuple(float(x) for x in middle_ms * rng.lognormal(0, 0.03, runs))

    measured = tuple(
        Block(
            k,
            float(k),
            k + 0.9,
            {"engine": samples(12 - 0.35 * iteration), "end_to_end": samples(14 - 0.35 * iteration)},
        )
        for k in range(blocks)
    )
    return BenchmarkResult(
        model_sha256=f"{iteration:064x}",
        precision="fp32",
        device=device,
        engine_size_bytes=3_900_000 - 150_000 * iteration,
        engine_build_s=0.5,
        ap=0.301 - 0.002 * iteration,
        ap50=0.600 - 0.003 * iteration,
        images=40,
        boxes=300,
        not_finite=0,
        latencies=tuple(
            summarise([ms for block in measured for ms in block.samples_ms[scope]], scope)
            for scope in ("engine", "end_to_end")
        ),
        blocks=measured,
        disturbed=None,
        layer_times_ms={},
        energy=None,
        samples=tuple(
            SampleDetections(
                image_id,
                ((60.0 + 2 * iteration, 40.0, 130.0 + 2 * iteration, 220.0),),
                (0.9 - 0.02 * iteration,),
            )
            for image_id in (7, 8)
        ),
        telemetry=TELEMETRY,
        warmup_runs=20,
        timer_overhead_ms=0.0001,
        threads=1,
    )


def report(
    iterations: int = 11,
    results: Sequence[BenchmarkResult | None] | None = None,
    provenance: Mapping[str, object] | None = None,
) -> Report:
    measured = [result(i) for i in range(iterations)] if results is None else results
    rows = tuple(
        ReportRow(step(i), 3_800_000 - 150_000 * i, measured[i], layers(i) if measured[i] else ())
        for i in range(iterations)
    )
    return Report(
        "example",
        rows,
        provenance or {"command": "edgeprune build --target host", "versions": {"torch": "2"}},
    )
