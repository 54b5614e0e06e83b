"""Does pruning by measured latency keep more AP50 at the same latency than by parameters, MACs or multiples?

    python benchmarks/experiments/latency_budget.py            # coco-person, about 40 minutes on two quiet cores
    python benchmarks/experiments/latency_budget.py --video    # the street video whose labels come with edgeprune

NanoDet-g at 320, this machine's CPU as the device. For each speed-up the run by latency comes first. The
others get the share of their own budget at which one removal is as fast (found by bisection, engines timed beside the
unpruned one), then the same iterations and fine-tuning. At last all are timed together. Reads
coco-person and the weights of the maintainers' data folder (EDGEPRUNE_SHARED). Runs lie in build/experiments, and
an interrupted call goes on. Writes benchmarks/results/latency_budget[_video].{json,svg}.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

import edgeprune.data
from edgeprune.benchmarks.engine_timing import EngineTimer, exporter, time_networks
from edgeprune.benchmarks.figures import svg_file
from edgeprune.benchmarks.provenance import provenance
from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.data.files import read_json, write_json
from edgeprune.data.precision import Matches, match_detections
from edgeprune.deploy.device.bench import ENGINE
from edgeprune.deploy.session import Session, local_session
from edgeprune.deploy.targets import load_target
from edgeprune.detectors.batches import batches
from edgeprune.detectors.canvases import Canvases
from edgeprune.detectors.evaluation import detect
from edgeprune.detectors.protocol import Detector
from edgeprune.detectors.registry import load_detector
from edgeprune.pruning.budget import COSTS, Limits, choose
from edgeprune.pruning.checkpoint import load_step, trace_detector
from edgeprune.pruning.groups import Groups, find_groups
from edgeprune.pruning.importance import LossBatch, Scores, Scoring, score
from edgeprune.pruning.records import PrunedDetector
from edgeprune.pruning.schedule import SCORING_BATCH, PruningOptions
from edgeprune.pruning.surgery import remove

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("EDGEPRUNE_SHARED", ROOT.parent / "shared" / "data"))
EXAMPLE = Path(edgeprune.data.__file__).parent  # holds the labels of the street video
WORK, RESULTS = ROOT / "build" / "experiments" / "latency_budget", ROOT / "benchmarks" / "results"

SPEEDUPS = (1.25, 1.5, 2.0)


class Rival(NamedTuple):
    """A budget that is no latency. Ranked per parameter, the default, which for MACs, too, keeps the most."""

    name: str
    budget: str
    multiple: int

    @property
    def options(self) -> list[str]:
        return ["--budget", self.budget, "--channel-multiple", str(self.multiple)]


RIVALS = (
    Rival("params", "params", 1),
    Rival("macs", "macs", 1),
    Rival("params, multiples of 8", "params", 8),
    Rival("params, multiples of 16", "params", 16),
)
SIZE = 320
WEIGHTS = SHARED / "nanodet-g" / "nanodet_g_coco80_convs.npz"
PROBES = 5  # of a bisection; the share is then known to 0.03
AT_50 = 0  # the first of COCO's IoU thresholds
REPLICATES = 1000


class Experiment:
    """The runs on one data set, and what they have in common."""

    def __init__(self, video: bool, iterations: int, epochs: int) -> None:
        self.name = "latency_budget_video" if video else "latency_budget"
        self.iterations, self.epochs = iterations, epochs
        coco = SHARED / "coco-person"
        self.labels = (
            (EXAMPLE / "vtest_train.json", EXAMPLE / "vtest_test.json")
            if video
            else (coco / "person_train2017.json", coco / "person_val2017.json")
        )
        self.data = [] if video else ["--train", str(self.labels[0]), "--val", str(self.labels[1])]
        self.train, self.val = map(load_dataset, self.labels)
        self.session: Session = local_session(load_target("host"))

    def prune(self, name: str, *options: str, iterations: int, epochs: int) -> Path:
        """The folder of a run, which goes on where it stopped."""
        run = WORK / self.name / name.replace(" ", "-").replace(",", "")
        command = [sys.executable, "-c", "from edgeprune.cli import app; app()", "prune", "--target", "host"]
        command += ["--weights", str(WEIGHTS), "--input-size", str(SIZE), *self.data]
        command += ["--iterations", str(iterations), "--finetune-epochs", str(epochs), "--resume"]
        subprocess.run([*command, "--run-dir", str(run), *options], check=True)
        return run

    def share_for(self, rival: Rival, ratio: float) -> float:
        """The share of its budget at which one removal by a rival leaves `ratio` of the unpruned network's time."""
        record = WORK / self.name / f"share-{rival.name.replace(' ', '-').replace(',', '')}-{ratio:.3f}.json"
        if not record.is_file():
            low, high = 0.02, 0.95
            for _ in range(PROBES):
                middle = (low + high) / 2
                low, high = (middle, high) if self.ratio_of(rival, middle) > ratio else (low, middle)
            write_json(record, {"share": round((low + high) / 2, 3)})
        share: float = read_json(record)["share"]
        return share

    def ratio_of(self, rival: Rival, share: float) -> float:
        """Of the engine that a rival leaves to the unpruned one's."""
        groups, scores, timer = self.unpruned
        whole = COSTS[rival.budget](groups).total()
        choice = choose(
            groups,
            scores,
            cost=rival.budget,
            goal=whole * (1 - share),
            per=PruningOptions().per,
            limits=Limits(channel_multiple=rival.multiple),
            original=groups.channel_counts,
        )
        return timer(remove(groups, choice.units)).ms

    @cached_property
    def unpruned(self) -> tuple[Groups, Scores, EngineTimer]:
        """The network with the importance of its units, and what times others beside it."""
        detector = load_detector("nanodet-g", WEIGHTS, (SIZE, SIZE))
        protocol = cast(Detector, detector)
        network = trace_detector(detector, (SIZE, SIZE)).eval()
        groups = find_groups(network)
        canvases = Canvases(self.train, (SIZE, SIZE), protocol.preprocessing)

        def give() -> Iterator[LossBatch]:
            for batch in batches(canvases, batch_size=SCORING_BATCH, augmentation=None):
                yield batch.images, batch.targets

        options = PruningOptions()
        scores = score(options.criterion, Scoring(groups, protocol, give, replacement=options.replacement))
        export = exporter(protocol, self.session.target, "fp32")
        timer = EngineTimer(self.session, self.session.build, export, protocol.preprocessing, network, 1.0)
        return groups, scores, timer

    def measured(self, runs: Mapping[str, Path]) -> list[dict[str, Any]]:
        """All last steps together, the unpruned detector first; AP50 with PyTorch."""
        steps = {"unpruned": load_step(next(iter(runs.values())) / "step-00")}
        steps |= {name: last_step(run) for name, run in runs.items()}
        detector = cast(Detector, steps["unpruned"].detector)
        timed = time_networks(self.session, detector, [step.network for step in steps.values()])
        matches = {name: matches_of(step, self.val) for name, step in steps.items()}
        rows = []
        for (name, step), found in zip(steps.items(), timed, strict=True):
            record = step.steps[-1]
            rows.append(
                {
                    "run": name,
                    **found.to_json(),
                    "params": record.params,
                    "macs": record.macs,
                    "latency": record.to_json()["latency"],
                    **ap50_of(matches[name], len(self.val)),
                }
            )
        for row in rows:
            ours = f"latency {row['run'].rsplit(' ', 1)[-1]}"
            if row["run"] not in ("unpruned", ours):
                row.update(ap50_difference(matches[ours], matches[row["run"]], len(self.val)))
        return rows


def last_step(run: Path) -> PrunedDetector:
    return load_step(max(path.parent for path in run.glob("step-*/detector.json")))


def matches_of(step: PrunedDetector, val: Dataset) -> Matches:
    return match_detections(val, detect(cast(Detector, step.detector), step.network, val))


def ap50_of(matches: Matches, images: int) -> dict[str, float]:
    """AP50 with a 95 % interval, bootstrap over images."""
    low, high = np.quantile(resampled(matches, images), [0.025, 0.975])
    return {"ap50": ap50(matches, np.ones(images, np.int64)), "ap50_low": low, "ap50_high": high}


def ap50_difference(ours: Matches, theirs: Matches, images: int) -> dict[str, float]:
    """By latency minus the other's, both on the same drawn images."""
    drawn = resampled(ours, images) - resampled(theirs, images)
    low, high = np.quantile(drawn, [0.025, 0.975])
    whole = np.ones(images, np.int64)
    difference = ap50(ours, whole) - ap50(theirs, whole)
    return {"ours_minus_this": difference, "difference_low": low, "difference_high": high}


def resampled(matches: Matches, images: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """AP50 of images drawn with replacement, the same draws in each call."""
    rng = np.random.default_rng(0)
    draws = (np.bincount(rng.integers(0, images, images), minlength=images) for _ in range(REPLICATES))
    return np.array([ap50(matches, times) for times in draws])


def ap50(matches: Matches, times: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Of each image taken so many times."""
    found = matches.average_precision(times)
    return float("nan") if found is None else float(found[AT_50])


def plot(result: Mapping[str, Any], path: Path) -> None:
    first, *rows = result["rows"]
    with svg_file(path) as axes:
        for name in ("latency", *(rival.name for rival in RIVALS)):
            own = [first, *(row for row in rows if row["run"].rsplit(" ", 1)[0] == name)]
            axes.errorbar(
                [row["p50_ms"] for row in own],
                [row["ap50"] for row in own],
                yerr=[
                    [row["ap50"] - row["ap50_low"] for row in own],
                    [row["ap50_high"] - row["ap50"] for row in own],
                ],
                marker="o",
                capsize=2,
                label=f"by {name}",
            )
        axes.set(xlabel="latency p50 ms (engine), this machine's CPU", ylabel="AP50 (95 % bootstrap)")
        axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--video", action="store_true", help="the street video instead of coco-person")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning after each iteration")
    parser.add_argument(
        "--speedups", type=float, nargs="+", default=SPEEDUPS, help="what is asked (default: 1.25 1.5 2.0)"
    )
    given = parser.parse_args()
    experiment = Experiment(given.video, given.iterations, given.epochs)
    origin = provenance(
        " ".join(["latency_budget.py", *sys.argv[1:]]),
        ("torch", "onnxruntime", "scipy"),
        [WEIGHTS, *experiment.labels],
    )
    how = {"iterations": given.iterations, "epochs": given.epochs}
    runs: dict[str, Path] = {}
    for speedup in given.speedups:
        name = f"latency {speedup:g}"
        runs[name] = experiment.prune(name, "--speedup", str(speedup), **how)
    for speedup in given.speedups:
        for rival in RIVALS:
            share = experiment.share_for(rival, 1 / speedup)
            name = f"{rival.name} {speedup:g}"
            runs[name] = experiment.prune(name, *rival.options, "--remove", str(share), **how)
    rows = experiment.measured(runs)
    for row in rows:
        if row["run"].startswith("latency"):
            asked = float(row["run"].split()[1])
            row["realised_over_asked"] = 1 / row["ratio"] / asked
            row["realised_over_predicted"] = row["latency"]["predicted_ms"] / row["latency"]["measured"]["ms"]
    result = {"origin": origin, "device": "this machine's CPU", "scope": ENGINE, **how, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{experiment.name}.json", result)
    plot(result, RESULTS / f"{experiment.name}.svg")
    for row in rows:
        told = f"{row['run']:28s} {1 / row['ratio']:.3f}x  {row['p50_ms']:.2f} ms  AP50 {row['ap50']:.3f}"
        if "ours_minus_this" in row:
            told += f"  by latency {row['ours_minus_this']:+.3f}"
            told += f" ({row['difference_low']:+.3f} to {row['difference_high']:+.3f})"
        print(told)


if __name__ == "__main__":
    main()
