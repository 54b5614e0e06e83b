"""A report's figures under their names in report.json, and the headline drawn from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeprune.benchmarks.ranking import fastest, is_ranked, on_front
from edgeprune.benchmarks.records import BenchmarkResult, Ratio, Report, ReportRow, samples_by_block
from edgeprune.benchmarks.statistics import paired_ratio
from edgeprune.data.precision import QUALITY_FIGURES
from edgeprune.pruning.records import FineTuneRecord

FLAG_AP_DROP = 0.01  # a lower AP on the device than on the host by more is worth a warning
NEAR_AP50 = 0.01  # what a step may lose and still stand for the unpruned detector

_TIMES, _MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"

Figures = Mapping[str, Any]  # units in the names; None is "not measured"


def row_figures(report: Report) -> list[Figures]:
    """One flat mapping a row, units in the names, None where something was not measured."""
    first = report.rows[0]
    # All steps were timed beside each other: without the unpruned one any other tells what drifted.
    baseline = next((row.result for row in report.rows if row.result), None)
    rows = [_figures(row, first, baseline) for row in report.rows]
    return [{**row, "on_front": on_front(row, rows)} for row in rows]


def speed_ratio(result: BenchmarkResult, baseline: BenchmarkResult, scope: str) -> Ratio | None:
    """Latency of `result` / latency of `baseline` over the valid blocks that were measured together."""
    own, other = (samples_by_block(each.counted_blocks, scope) for each in (result, baseline))
    return paired_ratio(own, other)


def _figures(row: ReportRow, first: ReportRow, baseline: BenchmarkResult | None) -> Figures:
    step, result = row.step, row.result
    energy = result.energy if result else None
    paired = speed_ratio(result, baseline, "engine") if result and baseline else None
    ratio = paired if first.result else None
    figures: dict[str, Any] = {
        "iteration": step.iteration,
        "criterion": step.criterion,
        "params": step.params,
        "macs": step.macs,
        "activation_bytes": step.activation_bytes,
        "channels_removed": sum(first.step.channels.values()) - sum(step.channels.values()),
        "channels_removed_this_step": step.channels_removed,
        "fine_tuning": _fine_tuning(step.finetune),
        "ap_before": step.ap_before,
        "ap50_before": step.ap50_before,
        "ap_after": step.ap_after,
        "ap50_after": step.ap50_after,
        "ap75_after": step.ap75_after,
        "device_ap": result.ap if result else None,
        "device_ap50": result.ap50 if result else None,
    }
    for scope in ("engine", "engine_with_copies", "end_to_end"):
        latency = result.latency(scope) if result else None
        for name in ("p50_ms", "p90_ms", "p99_ms", "mean_ms", "std_ms", "runs"):
            figures[f"latency_{scope}_{name}"] = getattr(latency, name) if latency else None
    asked = step.latency
    measured, memory = (asked.measured, asked.memory) if asked else (None, None)
    figures |= {
        "latency_asked_ms": asked.asked_ms if asked else None,
        "latency_predicted_ms": asked.predicted_ms if asked else None,
        # Before fine-tuning, which does not change it.
        "latency_chosen_ms": measured.ms if measured else None,
        "latency_chosen_low_ms": measured.low_ms if measured else None,
        "latency_chosen_high_ms": measured.high_ms if measured else None,
        "memory_asked_mib": memory.asked_mib if memory else None,
        "memory_predicted_mib": memory.predicted_mib if memory else None,
        "memory_chosen_mib": memory.measured_mib if memory else None,
    }
    figures |= step.quality.figures() if step.quality else dict.fromkeys(QUALITY_FIGURES)
    figures |= {
        **_paired(paired, baseline),
        "latency_engine_ratio": ratio.value if ratio else None,
        "latency_engine_ratio_low": ratio.low if ratio else None,
        "latency_engine_ratio_high": ratio.high if ratio else None,
        # 1: the latency fell by the factor by which the MACs did.
        "realised_speedup": step.macs / (first.step.macs * ratio.value) if ratio else None,
        "fps": result.fps if result else None,
        "throughput_images_per_s": result.throughput if result else None,
        "timer_overhead_ms": result.timer_overhead_ms if result else None,
        "model_size_bytes": row.model_size_bytes,
        "model_sha256": result.model_sha256 if result else None,
        "precision": result.precision if result else None,
        "engine_threads": result.threads if result else None,
        "engine_size_bytes": result.engine_size_bytes if result else None,
        "engine_build_s": result.engine_build_s if result else None,
        "parity_max_box_difference_px": row.parity.max_box_difference_px if row.parity else None,
        "parity_max_score_difference": row.parity.max_score_difference if row.parity else None,
        "disturbed": result.disturbed if result else None,
        "watts": energy.watts if energy else None,
        "joules_per_image": energy.joules_per_image if energy else None,
        "idle_watts": energy.idle_watts if energy else None,
        "joules_per_image_above_idle": energy.joules_per_image_above_idle if energy else None,
    }
    return figures


def _paired(ratio: Ratio | None, baseline: BenchmarkResult | None) -> dict[str, float | None]:
    """Latencies free of drift: a ratio to the baseline times its p50, and what of it ranks the steps."""
    names = [f"latency_engine_paired{end}_ms" for end in ("", "_low", "_high")] + ["latency_ranked_ms"]
    engine = baseline.latency("engine") if baseline else None
    if ratio is None or engine is None:
        return dict.fromkeys(names)
    # A step that shows no difference is neither faster nor slower, whatever the noise says.
    shares = (ratio.value, ratio.low, ratio.high, ratio.value if ratio.shows_difference else 1.0)
    return {
        name: None if share is None else share * engine.p50_ms
        for name, share in zip(names, shares, strict=True)
    }


def _fine_tuning(tuned: FineTuneRecord | None) -> str:
    if tuned is None:
        return "none"
    rolled_back = ", rolled back" if tuned.rolled_back else ""
    return f"{tuned.epochs} epochs, learning rate {tuned.learning_rate:g}{rolled_back}"


@dataclass(frozen=True)
class Fact:
    """One number of the headline: "40.1 %", "fewer parameters", and where it comes from."""

    value: str
    what: str
    detail: str


@dataclass(frozen=True)
class Headline:
    """How much smaller, how much faster, how much AP lost, on which device, measured how, and what to ship."""

    iteration: int
    smaller: Fact
    faster: Fact
    accuracy: Fact
    device: str
    measured: str
    choice: str | None  # which iteration to ship; None: nothing was measured to choose by

    @property
    def facts(self) -> tuple[Fact, Fact, Fact]:
        return (self.smaller, self.faster, self.accuracy)

    @property
    def text(self) -> str:
        facts = "; ".join(f"{fact.value} {fact.what} ({fact.detail})" for fact in self.facts)
        against = f"Iteration {self.iteration} against the unpruned detector"
        return f"{against}: {facts}. {self.device}. {self.measured}."


def headline(report: Report) -> Headline:
    """Compare the last step with the unpruned detector; what was not measured is said to be so."""
    rows = row_figures(report)
    first, last = rows[0], rows[-1]
    return Headline(
        iteration=last["iteration"],
        smaller=Fact(
            f"{1 - last['params'] / first['params']:.1%}".replace("%", " %"),
            "fewer parameters",
            f"{first['params']:,} → {last['params']:,}; "
            + f"{1 - last['macs'] / first['macs']:.1%} fewer MACs".replace("%", " %"),
        ),
        faster=_faster(first, last),
        accuracy=_accuracy(first, last),
        device=report.device.line if report.device else "Device: not measured",
        measured=_measured(report.rows[-1].result),
        choice=_choice(rows),
    )


def _choice(rows: list[Figures]) -> str | None:
    ranked = [row for row in rows if is_ranked(row)]
    if not ranked:
        return None
    front = ", ".join(str(row["iteration"]) for row in ranked if row["on_front"])
    front = f"Pareto front of AP50 against latency: {front}"
    unpruned = rows[0]
    if not is_ranked(unpruned):
        return f"{front}; the unpruned was not measured"
    near = fastest(row for row in ranked if row["device_ap50"] >= unpruned["device_ap50"] - NEAR_AP50)
    within = f"within {NEAR_AP50:g} AP50 of the unpruned"
    if near["latency_ranked_ms"] >= unpruned["latency_ranked_ms"]:
        return f"{front}; {within} none is shown to be faster than it"
    faster = f"{_times_as_fast(near)} as fast ({_interval(near)})"
    return f"{front}; fastest {within}: iteration {near['iteration']}, {faster}"


def _faster(first: Figures, last: Figures) -> Fact:
    ratio, low, high = (last[f"latency_engine_ratio{end}"] for end in ("", "_low", "_high"))
    if ratio is None:
        return Fact("not measured", "latency", "no benchmark of both steps")
    before, after = first["latency_engine_paired_ms"], last["latency_engine_paired_ms"]
    change = f"engine p50 {before:.2f} → {after:.2f} ms"
    if last["latency_asked_ms"] is not None:
        change += f", {last['latency_asked_ms']:.2f} ms asked"
    if low is None or high is None:
        return Fact(_times_as_fast(last), "as fast", f"{change}; too few interleaved blocks for an interval")
    shown = "as fast" if high < 1 or low > 1 else "as fast, no difference shown"
    return Fact(_times_as_fast(last), shown, f"{change}; 95 % interval {_interval(last)}")


def _times_as_fast(row: Figures) -> str:
    return f"{1 / row['latency_engine_ratio']:.2f}{_TIMES}"


def _interval(row: Figures) -> str:
    """Of how many times as fast the row is; only where it has one."""
    return f"{1 / row['latency_engine_ratio_high']:.2f} to {1 / row['latency_engine_ratio_low']:.2f}"


def _accuracy(first: Figures, last: Figures) -> Fact:
    for where, name in (("on the device", "device_{}"), ("on the host", "{}_after")):
        ap, ap50 = ((first[name.format(kind)], last[name.format(kind)]) for kind in ("ap", "ap50"))
        if None not in (*ap, *ap50):
            detail = f"{ap50[0]:.3f} → {ap50[1]:.3f}; AP {ap[0]:.3f} → {ap[1]:.3f}"
            return Fact(f"{ap50[1] - ap50[0]:+.3f}".replace("-", _MINUS), f"AP50 {where}", detail)
    return Fact("not measured", "AP50", "no validation of both steps")


def ap_drops(report: Report, limit: float = FLAG_AP_DROP) -> list[str]:
    """Steps whose AP on the device is more than `limit` below the host's, each with the likely cause."""
    found = []
    for row, figures in zip(report.rows, row_figures(report), strict=True):
        host, device = figures["ap_after"], figures["device_ap"]
        if row.result is not None and host is not None and host - device > limit:
            drop = f"iteration {row.step.iteration}: AP {device:.3f} on the device, {host:.3f} on the host"
            found.append(f"{drop}; {_likely_cause(row.result)}")
    return found


def _likely_cause(result: BenchmarkResult) -> str:
    if result.not_finite:
        overflow = f"{result.not_finite} candidates were no numbers"
        return f"{overflow}: {result.precision} overflows; try fp32"
    if result.precision == "int8":
        return "int8 calibration is the likely cause: give it more, and typical, images"
    if result.precision == "fp16":
        return "fp16 rounding is the likely cause: measure with fp32 to be sure"
    return "the same precision on both sides: look at the preprocessing and the library that resizes"


def _measured(result: BenchmarkResult | None) -> str:
    latency = result.latency("engine") if result else None
    if result is None or latency is None:
        return "Latency not measured"
    if result.disturbed:
        return f"Batch 1, {result.precision}, {latency.runs} runs a step, disturbed ({result.disturbed})"
    valid = sum(block.invalid is None for block in result.blocks)
    left_out = len(result.blocks) - valid
    blocks = f" in {valid} blocks interleaved over all steps" if valid > 1 else ""
    excluded = f", {left_out} disturbed blocks left out" if left_out else ""
    return f"Batch 1, {result.precision}, {latency.runs} runs a step{blocks}{excluded}"
