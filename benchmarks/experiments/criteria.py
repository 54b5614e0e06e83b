"""Which criterion keeps the most accuracy: every criterion through the same loop, seeds for the two best.

    python benchmarks/experiments/criteria.py            # all runs, about 90 minutes on two quiet cores
    python benchmarks/experiments/criteria.py --latency  # time each run's last step, interleaved, on a quiet machine
    python benchmarks/experiments/criteria.py --plot     # only gather what is there

Reads coco-person of the maintainers' data folder (EDGEPRUNE_SHARED), and for the runs called "vtest" the street video
with the labels that come with edgeprune. Runs are folders of steps under build/experiments/criteria, so an interrupted
call goes on where it stopped. Writes benchmarks/results/criteria.json and criteria.svg.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

import edgeprune.data
from edgeprune.benchmarks.engine_timing import time_networks
from edgeprune.benchmarks.figures import svg_file
from edgeprune.benchmarks.provenance import provenance
from edgeprune.data.dataset import load_dataset
from edgeprune.data.files import read_json, write_json
from edgeprune.deploy.session import local_session
from edgeprune.deploy.targets import load_target
from edgeprune.detectors.evaluation import evaluate
from edgeprune.detectors.protocol import Detector, Progress
from edgeprune.detectors.registry import load_detector
from edgeprune.detectors.training import FineTuneOptions, fine_tune
from edgeprune.pruning.checkpoint import RECORD, load_step
from edgeprune.pruning.groups import find_groups
from edgeprune.pruning.imitation import Imitation
from edgeprune.pruning.importance import Scores, Scoring, score
from edgeprune.pruning.schedule import PruningData, PruningOptions, prune_iteratively

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("EDGEPRUNE_SHARED", ROOT.parent / "shared" / "data"))
WORK, RESULTS = ROOT / "build" / "experiments" / "criteria", ROOT / "benchmarks" / "results"
LATENCY = WORK / "latency.json"
WEIGHTS = SHARED / "nanodet-g" / "nanodet_g_coco80_convs.npz"
SIZE = (320, 320)
COCO, VTEST = SHARED / "coco-person", Path(edgeprune.data.__file__).parent
LABELS = {
    "coco-person": (COCO / "person_train2017.json", COCO / "person_val2017.json"),
    "vtest": (VTEST / "vtest_train.json", VTEST / "vtest_test.json"),
}


LONGER = "longer.json"
MORE = FineTuneOptions(epochs=3, learning_rate=3e-4)
SEEDED = ("taylor-sum", "taylor-weight")  # the two best of the first seed
CRITERIA = ("taylor-sum", "magnitude", "taylor", "taylor-weight", "geometric-median", "random")


@dataclass(frozen=True)
class Run:
    """One way through the loop."""

    name: str
    options: PruningOptions
    data: str = "coco-person"
    unlabelled: bool = False
    """Whether frames of the street video are distilled on, too."""

    @property
    def fine_tuned_longer(self) -> bool:
        """The last step once more, for longer: the same recipe for every criterion, kept if held-out images agree."""
        return self.name.endswith("seed 0") or self.name.startswith("60 %")

    @property
    def folder(self) -> Path:
        return WORK / self.name.replace(" ", "-").replace("%", "percent")


def runs() -> list[Run]:
    base = PruningOptions(iterations=5, remove=0.4, finetune=FineTuneOptions(epochs=1))
    best = replace(base, finetune=FineTuneOptions(epochs=3, learning_rate=3e-4))
    untrained = FineTuneOptions(epochs=0)
    seeded = [(criterion, seed) for seed in (1, 2) for criterion in SEEDED]
    first, *others = (
        Run(f"{criterion} seed 0", replace(base, criterion=criterion)) for criterion in CRITERIA
    )
    return [
        first,
        Run("60 % of params", replace(best, remove=0.6)),
        Run("vtest 60 % of params", replace(best, remove=0.6), "vtest"),
        Run("25 % of MACs", replace(base, budget="macs", remove=0.25)),
        *others,
        *(
            Run(f"{criterion} seed {seed}", replace(base, criterion=criterion, seed=seed))
            for criterion, seed in seeded
        ),
        Run("taylor-sum, 10 iterations, no fine-tuning", replace(base, iterations=10, finetune=untrained)),
        Run("taylor-sum, with frames of a video", base, unlabelled=True),
        Run("taylor-sum, labels alone", replace(base, finetune=FineTuneOptions(epochs=1, distill=False))),
        Run("taylor-sum x taylor-weight", replace(base, criterion="criteria:joint")),
    ]


def joint(scoring: Scoring) -> Scores:
    """The geometric mean of two criteria; each has its own units."""
    first, second = (score(criterion, scoring) for criterion in SEEDED)
    return np.sqrt(first * second)


@contextmanager
def stage(what: str) -> Iterator[Progress]:
    start = time.monotonic()
    yield lambda done, total: None
    print(f"  {what}: {time.monotonic() - start:.1f} s", flush=True)


def data_of(run: Run) -> PruningData:
    labels = LABELS[run.data]
    train, select = load_dataset(labels[0]).hold_out(0.2, 0)
    unlabelled = (load_dataset(LABELS["vtest"][0]),) if run.unlabelled else ()
    return PruningData(train, select, load_dataset(labels[1]), unlabelled)


def execute(run: Run) -> None:
    data = data_of(run)
    detector = load_detector("nanodet-g", WEIGHTS, SIZE)
    print(run.name, flush=True)
    for pruned in prune_iteratively(
        "nanodet-g", detector, data, run.options, lambda i: run.folder / f"step-{i:02d}", stage=stage
    ):
        step = pruned.steps[-1]
        print(f"  {step.iteration}: AP50 {step.ap50_before:.3f} -> {step.ap50_after:.3f}", flush=True)
    if run.fine_tuned_longer and not (run.folder / LONGER).is_file():
        fine_tune_longer(run, data)


def fine_tune_longer(run: Run, data: PruningData) -> None:
    folder = last_step(run)
    assert folder is not None
    last, unpruned = load_step(folder), load_step(folder.with_name("step-00"))
    detector, network = cast(Detector, last.detector), last.network
    with stage(f"{MORE.epochs} more epochs at {MORE.learning_rate:g}"):
        result = fine_tune(
            detector,
            network,
            unpruned.network,
            data.train,
            data.select,
            MORE,
            seed=run.options.seed,
            checkpoint=run.folder / "longer.pt",
            follow=Imitation(find_groups(unpruned.network), network),
        )
    found = evaluate(detector, network, data.val)
    print(f"  longer: AP50 {found.ap50:.3f}", flush=True)
    record = {"epochs": MORE.epochs, "learning_rate": MORE.learning_rate, "best_epoch": result.best_epoch}
    write_json(run.folder / LONGER, record | {"ap": found.ap, "ap50": found.ap50})


def last_step(run: Run) -> Path | None:
    """The folder of the last step there is."""
    return max((path.parent for path in run.folder.glob(f"step-*/{RECORD}")), default=None)


def time_last_steps(all_runs: list[Run]) -> None:
    """All last steps beside the unpruned detector, in interleaved blocks, on this machine's CPU."""
    session = local_session(load_target("host"))
    folders = {run.name: folder for run in all_runs if (folder := last_step(run))}
    first = next(iter(folders.values())).with_name("step-00")
    steps = [load_step(folder) for folder in (first, *folders.values())]
    origin = provenance("criteria.py --latency", ("onnxruntime",))
    unpruned, *timed = time_networks(
        session, cast(Detector, steps[0].detector), [step.network for step in steps]
    )
    found = {name: each.to_json() for name, each in zip(folders, timed, strict=True)}
    write_json(LATENCY, {"provenance": origin, "unpruned_p50_ms": unpruned.p50_ms, "last_steps": found})


def gather(all_runs: list[Run], origin: dict[str, Any]) -> dict[str, Any]:
    latency = read_json(LATENCY) if LATENCY.is_file() else {"last_steps": {}}
    times = latency.pop("last_steps")
    return {
        "schema_version": 2,
        "provenance": origin,
        "data": "coco-person: 131 train and 33 held-out images, 188 validation images; NanoDet-g at 320",
        "latency": latency or None,
        "runs": [
            {
                "run": run.name,
                "criterion": run.options.criterion,
                "seed": run.options.seed,
                "per": run.options.per,
                "budget": run.options.budget,
                "asked": run.options.remove,
                "iterations": run.options.iterations,
                "epochs": run.options.finetune.epochs,
                "learning_rate": run.options.finetune.learning_rate,
                "unlabelled": run.unlabelled,
                "longer": read_json(longer) if (longer := run.folder / LONGER).is_file() else None,
                "latency_of_last_step": times.get(run.name),
                "steps": [{key: step[key] for key in STEP} for step in read_json(folder / RECORD)["steps"]],
            }
            for run in all_runs
            if (folder := last_step(run))
        ],
    }


STEP = ("iteration", "params", "macs", "ap_before", "ap50_before", "ap_after", "ap50_after")


def plot(result: dict[str, Any]) -> None:
    """Every criterion's first seed, with the same fine-tuning: its steps, and the latency of the last."""
    shown = [row for row in result["runs"] if row["run"].endswith("seed 0")]
    with svg_file(RESULTS / "criteria.svg", columns=3) as (params, macs, latency):
        for row in shown:
            whole, ap50 = row["steps"][0], [step["ap50_after"] for step in row["steps"]]
            for axes, cost in ((params, "params"), (macs, "macs")):
                left = [step[cost] / whole[cost] for step in row["steps"]]
                axes.plot([1 - share for share in left], ap50, marker="o", ms=3, label=row["criterion"])
            if timed := row["latency_of_last_step"]:
                error = [
                    [timed["ratio"] - timed["ratio_low"]],
                    [timed["ratio_high"] - timed["ratio"]],
                ]
                latency.errorbar(timed["ratio"], ap50[-1], xerr=error, fmt="o", ms=3, capsize=2)
        params.set(xlabel="share of the parameters removed", ylabel="AP50 after fine-tuning")
        macs.set(xlabel="share of the MACs removed")
        latency.set(xlabel="last step: latency as a share of the unpruned one's")
        for axes in (macs, latency):
            axes.sharey(params)
        params.legend(frameon=False)


def summary(result: dict[str, Any]) -> Iterator[str]:
    for row in result["runs"]:
        first, last = row["steps"][0], row["steps"][-1]
        yield (
            f"{row['run']:28s} {len(row['steps']) - 1:2d} steps  params {last['params'] / first['params']:.3f}  "
            f"MACs {last['macs'] / first['macs']:.3f}  AP {last['ap_before']:.3f} -> {last['ap_after']:.3f}  "
            f"AP50 {last['ap50_before']:.3f} -> {last['ap50_after']:.3f}"
            + (f", longer {longer['ap50']:.3f}" if (longer := row["longer"]) else "")
            + (f"  latency {timed['ratio']:.3f}" if (timed := row["latency_of_last_step"]) else "")
        )
    for criterion in SEEDED:
        ends = [
            row["steps"][-1]["ap50_after"]
            for row in result["runs"]
            if row["run"].startswith(f"{criterion} seed")
        ]
        if len(ends) > 1:
            yield f"{criterion}: AP50 {statistics.mean(ends):.3f} +- {statistics.stdev(ends):.3f} ({len(ends)} seeds)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latency", action="store_true", help="time what is there, on a quiet machine")
    parser.add_argument("--plot", action="store_true", help="gather and draw what is there")
    parser.add_argument("--only", default="", help="runs whose name holds this text")
    arguments = parser.parse_args()
    inputs = [WEIGHTS, *(path for pair in LABELS.values() for path in pair)]
    origin = provenance("criteria.py", ("torch", "numpy", "pycocotools"), inputs)
    chosen = [run for run in runs() if arguments.only in run.name]
    if arguments.latency:
        time_last_steps(runs())
    elif not arguments.plot:
        for run in chosen:
            execute(run)
    result = gather(runs(), origin)
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "criteria.json", result)
    plot(result)
    print("\n".join(summary(result)))


if __name__ == "__main__":
    main()
