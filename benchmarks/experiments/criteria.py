"""Which criterion keeps the most accuracy: every criterion through the same loop, seeds for the two best.

    python benchmarks/experiments/criteria.py            # all runs, about 70 minutes on two quiet cores
    python benchmarks/experiments/criteria.py --latency  # time each run's last step, interleaved, on a quiet machine
    python benchmarks/experiments/criteria.py --plot     # only gather what is there

Reads coco-person of the maintainers' data folder (EDGEPRUNE_SHARED), and for the runs called "vtest" the street video
with the labels that come with edgeprune. Runs are folders of steps under build/experiments/criteria, so an interrupted
call goes on where it stopped. Writes benchmarks/results/criteria.json and criteria.svg.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import edgeprune.data
from edgeprune.data.dataset import load_dataset
from edgeprune.data.files import write_json
from edgeprune.detectors.protocol import Progress
from edgeprune.detectors.registry import load_detector
from edgeprune.detectors.training import FineTuneOptions
from edgeprune.pruning.schedule import PruningData, PruningOptions, prune_iteratively

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("EDGEPRUNE_SHARED", ROOT.parent / "shared" / "data"))
WORK, RESULTS = ROOT / "build" / "experiments" / "criteria", ROOT / "benchmarks" / "results"
SIZE = (320, 320)
COCO, VTEST = SHARED / "coco-person", Path(edgeprune.data.__file__).parent
LABELS = {
    "coco-person": (COCO / "person_train2017.json", COCO / "person_val2017.json"),
    "vtest": (VTEST / "vtest_train.json", VTEST / "vtest_test.json"),
}


SEEDED = ("taylor-sum", "taylor-weight")  # the two best of the first seed
CRITERIA = ("taylor-sum", "magnitude", "taylor", "taylor-weight", "geometric-median", "random")


@dataclass(frozen=True)
class Run:
    """One way through the loop."""

    name: str
    options: PruningOptions
    data: str = "coco-person"

    @property
    def folder(self) -> Path:
        return WORK / self.name.replace(" ", "-").replace("%", "percent")


def runs() -> list[Run]:
    base = PruningOptions(iterations=5, remove=0.4, finetune=FineTuneOptions(epochs=1))
    best = replace(base, finetune=FineTuneOptions(epochs=3, learning_rate=3e-4))
    seeded = [(criterion, seed) for seed in (1, 2) for criterion in SEEDED]
    first, *others = (
        Run(f"{criterion} seed 0", replace(base, criterion=criterion)) for criterion in CRITERIA
    )
    return [
        first,
        Run("60 % of params", replace(best, remove=0.6)),
        Run("vtest 60 % of params", replace(best, remove=0.6), "vtest"),
        Run("25 % of MACs", replace(base, budget="macs", per="macs", remove=0.25)),
        *others,
        *(
            Run(f"{criterion} seed {seed}", replace(base, criterion=criterion, seed=seed))
            for criterion, seed in seeded
        ),
        Run("magnitude, 3 epochs of 3e-4", replace(best, criterion="magnitude")),
        Run("taylor-sum, 3 epochs of 3e-4", best),
    ]


@contextmanager
def stage(what: str) -> Iterator[Progress]:
    start = time.monotonic()
    yield lambda done, total: None
    print(f"  {what}: {time.monotonic() - start:.1f} s", flush=True)


def execute(run: Run) -> None:
    labels = LABELS[run.data]
    train, select = load_dataset(labels[0]).hold_out(0.2, 0)
    data = PruningData(train, select, load_dataset(labels[1]))
    detector = load_detector("nanodet-g", SHARED / "nanodet-g" / "nanodet_g_coco80_convs.npz", SIZE)
    print(run.name, flush=True)
    for pruned in prune_iteratively(
        "nanodet-g", detector, data, run.options, lambda i: run.folder / f"step-{i:02d}", stage=stage
    ):
        step = pruned.steps[-1]
        print(f"  {step.iteration}: AP50 {step.ap50_before:.3f} -> {step.ap50_after:.3f}", flush=True)


def gather(all_runs: list[Run]) -> dict[str, Any]:
    rows = []
    for run in all_runs:
        records = sorted(run.folder.glob("step-*/detector.json"))
        if records:
            steps = json.loads(records[-1].read_text())["steps"]
            rows.append(
                {
                    "run": run.name,
                    "criterion": run.options.criterion,
                    "seed": run.options.seed,
                    "per": run.options.per,
                    "budget": run.options.budget,
                    "asked": run.options.remove,
                    "steps": [
                        {
                            key: step[key]
                            for key in (
                                "iteration",
                                "params",
                                "macs",
                                "ap_before",
                                "ap50_before",
                                "ap_after",
                                "ap50_after",
                            )
                        }
                        for step in steps
                    ],
                }
            )
    return {
        "command": "python benchmarks/experiments/criteria.py",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads (training and AP; no latency)",
        "versions": {name: version(name) for name in ("torch", "numpy", "pycocotools", "edgeprune")},
        "data": "coco-person: 131 train and 33 held-out images, 188 validation images; NanoDet-g at 320",
        "options": '5 iterations; 1 epoch of distillation each at 1e-4 unless named otherwise; "60 %": 3 at 3e-4',
        "runs": rows,
    }


def plot(result: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for row in result["runs"]:
        if row["seed"] or row["budget"] != "params" or row["asked"] != 0.4:
            continue
        steps = row["steps"]
        whole = steps[0]
        left.plot(
            [1 - s["params"] / whole["params"] for s in steps],
            [s["ap50_after"] for s in steps],
            marker="o",
            ms=3,
            label=row["criterion"],
        )
        right.plot(
            [1 - s["macs"] / whole["macs"] for s in steps], [s["ap50_after"] for s in steps], marker="o", ms=3
        )
    left.set(xlabel="share of the parameters removed", ylabel="AP50 after fine-tuning, coco-person val")
    right.set(xlabel="share of the MACs removed")
    left.legend()
    figure.savefig(RESULTS / "criteria.svg")


def summary(result: dict[str, Any]) -> Iterator[str]:
    for row in result["runs"]:
        first, last = row["steps"][0], row["steps"][-1]
        yield (
            f"{row['run']:28s} {len(row['steps']) - 1:2d} steps  params {last['params'] / first['params']:.3f}  "
            f"MACs {last['macs'] / first['macs']:.3f}  AP {last['ap_before']:.3f} -> {last['ap_after']:.3f}  "
            f"AP50 {last['ap50_before']:.3f} -> {last['ap50_after']:.3f}"
        )
    for criterion in ("taylor-sum", "taylor"):
        ends = [
            row["steps"][-1]["ap50_after"]
            for row in result["runs"]
            if row["criterion"] == criterion and row["budget"] == "params" and row["asked"] == 0.4
        ]
        if len(ends) > 1:
            yield f"{criterion}: AP50 {statistics.mean(ends):.3f} +- {statistics.stdev(ends):.3f} ({len(ends)} seeds)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", action="store_true", help="gather and draw what is there")
    parser.add_argument("--only", default="", help="runs whose name holds this text")
    arguments = parser.parse_args()
    chosen = [run for run in runs() if arguments.only in run.name]
    for run in [] if arguments.plot else chosen:
        execute(run)
    result = gather(runs())
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "criteria.json", result)
    plot(result)
    print("\n".join(summary(result)))


if __name__ == "__main__":
    main()
