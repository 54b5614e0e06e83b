"""Time and memory of scoring and removal, beside torch-pruning on the same network and batches.

    python benchmarks/experiments/scoring_against_torch_pruning.py

NanoDet-g at 320, 64 training images of coco-person (EDGEPRUNE_SHARED) in batches of 8, no fine-tuning, CPU. Each run
is a process of its own, so that its peak memory is its own; the contenders take turns, and ratios are taken within
each round. Reading and preparing the images is not counted, nor is importing code: torch.export, which the tracing
uses, imports over a thousand modules at its first call (`import_s`; in the memory of both they are included). Writes
benchmarks/results/scoring_against_torch_pruning.{json,svg}.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.benchmarks.figures import svg_file
from edgeprune.benchmarks.provenance import provenance
from edgeprune.data.dataset import load_dataset
from edgeprune.data.files import write_json
from edgeprune.detectors.batches import batches
from edgeprune.detectors.canvases import Canvases
from edgeprune.detectors.protocol import Targets
from edgeprune.detectors.registry import load_detector
from edgeprune.pruning.budget import Limits, choose
from edgeprune.pruning.checkpoint import trace_detector
from edgeprune.pruning.counting import parameter_terms
from edgeprune.pruning.graph import trace
from edgeprune.pruning.groups import find_groups
from edgeprune.pruning.importance import Scoring, score
from edgeprune.pruning.replacement import REPLACEMENTS
from edgeprune.pruning.schedule import SCORING_BATCH, PruningOptions
from edgeprune.pruning.surgery import remove

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SHARED = Path(os.environ.get("EDGEPRUNE_SHARED", ROOT.parent / "shared" / "data"))
LABELS = SHARED / "coco-person" / "person_train2017.json"
WEIGHTS = SHARED / "nanodet-g" / "nanodet_g_coco80_convs.npz"
SIZE = (320, 320)
SHARE = 0.4  # of the parameters
CHANNEL_RATIO = 0.25  # of the channels, with which torch-pruning removes about as much

Batches = Sequence[tuple[torch.Tensor, Sequence[Targets]]]


def ours(detector: Any, found: Batches, replacement: str) -> dict[str, float]:
    """Tracing, scores, choice and removal of an iteration; its proof that removal is exact is not counted."""
    start = time.perf_counter()
    network = trace_detector(detector, SIZE).eval()
    groups = find_groups(network)
    traced = time.perf_counter()
    scoring = Scoring(groups, detector, lambda: found, replacement=replacement)
    scores = score(PruningOptions().criterion, scoring)
    scored = time.perf_counter()
    choice = choose(
        groups,
        scores,
        cost="params",
        goal=parameter_terms(groups).total() * (1 - SHARE),
        per=PruningOptions().per,
        limits=Limits(),
        original=groups.channel_counts,
    )
    narrow = remove(groups, choice.units, REPLACEMENTS[replacement](groups, choice.units, scoring.statistics))
    end = time.perf_counter()
    return {
        "groups_s": traced - start,
        "scores_s": scored - traced,
        "removal_s": end - scored,
        "params": sum(parameter.numel() for parameter in narrow.parameters()),
    }


def torch_pruning(detector: Any, found: Batches) -> dict[str, float]:
    """Its TaylorImportance (weight x gradient) with its dependency graph and pruner."""
    import torch_pruning as tp

    start = time.perf_counter()
    outputs = [
        part
        for name, part in detector.named_modules()
        if isinstance(part, nn.Conv2d) and part.out_channels == 45
    ]
    assert len(outputs) == 3
    pruner = tp.pruner.BasePruner(
        detector,
        torch.zeros(1, 3, *SIZE),
        importance=tp.importance.TaylorImportance(),
        global_pruning=True,
        pruning_ratio=CHANNEL_RATIO,
        ignored_layers=outputs,
    )
    traced = time.perf_counter()
    for images, targets in found:
        torch.autograd.backward(detector.loss(detector(images), targets).sum())
    scored = time.perf_counter()
    pruner.step()
    end = time.perf_counter()
    return {
        "groups_s": traced - start,
        "scores_s": scored - traced,
        "removal_s": end - scored,
        "params": sum(parameter.numel() for parameter in detector.parameters()),
    }


CONTENDERS: dict[str, Callable[[Any, Batches], dict[str, float]]] = {
    "edgeprune, zero": lambda detector, found: ours(detector, found, "zero"),
    "edgeprune, linear": lambda detector, found: ours(detector, found, "linear"),
    "torch-pruning": torch_pruning,
}


def child(contender: str, images: int) -> dict[str, float]:
    torch.set_num_threads(1)
    dataset = load_dataset(LABELS, LABELS.parent / "train2017").subset(range(images))
    detector: Any = load_detector("nanodet-g", WEIGHTS, SIZE).eval()
    canvases = Canvases(dataset, SIZE, detector.preprocessing)
    found = [
        (batch.images, batch.targets)
        for batch in batches(canvases, batch_size=SCORING_BATCH, augmentation=None)
    ]
    before, start = peak_bytes(), time.process_time()
    if contender == "torch-pruning":
        importlib.import_module("torch_pruning")
    else:
        trace(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 1, 1))
    cpu = time.process_time()
    result = CONTENDERS[contender](detector, found)
    result["total_s"] = result["groups_s"] + result["scores_s"] + result["removal_s"]
    result["cpu_s"] = time.process_time() - cpu
    result["import_s"] = cpu - start
    result["peak_bytes"] = peak_bytes()
    result["peak_over_loading_bytes"] = peak_bytes() - before
    return result


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plot(median: dict[str, dict[str, float]]) -> None:
    with svg_file(RESULTS / "scoring_against_torch_pruning.svg", height_in=2.2) as axes:
        left = dict.fromkeys(median, 0.0)
        for stage in ("groups_s", "scores_s", "removal_s"):
            seconds = [found[stage] for found in median.values()]
            axes.barh(list(median), seconds, left=list(left.values()), label=stage.removesuffix("_s"))
            left = {name: left[name] + found[stage] for name, found in median.items()}
        axes.set(xlabel="seconds, one thread", xlim=(0, 1.3 * max(left.values())))
        axes.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.images)))
        return
    origin = provenance("scoring_against_torch_pruning.py", ("torch", "torch-pruning"), [LABELS, WEIGHTS])
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number in range(arguments.rounds):
        names = list(CONTENDERS)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            command = [sys.executable, __file__, "--child", name, "--images", str(arguments.images)]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(number + 1, name, done.stdout.splitlines()[-1], flush=True)
    baseline = runs["torch-pruning"]
    ratios = {
        name: {
            quantity: statistics.median(
                run[quantity] / base[quantity] for run, base in zip(runs[name], baseline, strict=True)
            )
            for quantity in ("total_s", "cpu_s", "peak_bytes")
        }
        for name in runs
        if name != "torch-pruning"
    }
    record = {
        "schema_version": 1,
        "provenance": origin,
        "images": arguments.images,
        "batch": SCORING_BATCH,
        "threads": 1,
        "median": {
            name: {quantity: statistics.median(run[quantity] for run in each) for quantity in each[0]}
            for name, each in runs.items()
        },
        "median_ratio_to_torch_pruning": ratios,
        "runs": runs,
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "scoring_against_torch_pruning.json", record)
    plot(record["median"])
    print(json.dumps(ratios, indent=2))


if __name__ == "__main__":
    main()
