"""Does latency follow the MACs? NanoDet-g in eleven steps on this machine's CPU, measured interleaved.

    python benchmarks/experiments/latency_against_macs.py          # about 12 minutes on two quiet cores
    python benchmarks/experiments/latency_against_macs.py --again  # measure what is there once more

Two runs: any number of channels, and multiples of 8 (--channel-multiple 8). Nothing is fine-tuned and few images are
used: the widths decide the latency, not the weights. Reads coco-person of the maintainers' data folder
(EDGEPRUNE_SHARED). The runs lie in build/experiments, and an interrupted call goes on.

Writes benchmarks/results/latency_against_macs/: the report of each run, without frames; latency_against_macs.json with
the realised speed-up of each step, latency's reduction over the MACs', and where layers lose it; a plot of these. Aim:
0.9 and more at each step.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgeprune.benchmarks.figures import svg_file
from edgeprune.benchmarks.layers import channel_block, shortfalls
from edgeprune.benchmarks.provenance import provenance, without_folders
from edgeprune.benchmarks.records import Report, ReportRow
from edgeprune.benchmarks.report import write_report
from edgeprune.benchmarks.runs import load_report
from edgeprune.benchmarks.summary import headline, row_figures
from edgeprune.data.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("EDGEPRUNE_SHARED", ROOT.parent / "shared" / "data")) / "coco-person"
WORK = ROOT / "build" / "experiments" / "latency_against_macs"
RESULTS = ROOT / "benchmarks" / "results" / "latency_against_macs"
RUNS = {"any-width": 1, "multiples-of-8": 8}  # by the channel multiple
IMAGES = {"train": 48, "val": 16}
AIM = 0.9
SHOWN = 3  # layers of a step that fell short
EDGEPRUNE = [sys.executable, "-c", "from edgeprune.cli import app; app()"]


def data(split: str) -> list[str]:
    """The options for the first images of a split, whose labels are written into the work folder."""
    whole = read_json(SHARED / f"person_{split}2017.json")
    images = whole["images"][: IMAGES[split]]
    ids = {image["id"] for image in images}
    boxes = [box for box in whole["annotations"] if box["image_id"] in ids]
    path = WORK / f"{split}.json"
    content = {**whole, "images": images, "annotations": boxes}
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != content:
        write_json(path, content)
    return [f"--{split}", str(path), f"--{split}-images", str(SHARED / f"{split}2017")]


def run(name: str, iterations: int, *, again: bool) -> Report:
    """Build and measure a run, or go on with it."""
    folder = WORK / f"{name}-{iterations}"
    options = f"--target host --input-size 320 --iterations {iterations} --remove 0.4 --per params".split()
    more = f"--finetune-epochs 0 --channel-multiple {RUNS[name]} --no-frames --resume --run-dir".split()
    command = [*EDGEPRUNE, "build", *options, *data("train"), *data("val"), *more, str(folder)]
    subprocess.run(command, check=True)
    if again:
        subprocess.run([*EDGEPRUNE, "bench", str(folder)], check=True)
    return load_report(folder)


def write_reports(report: Report, name: str, origin: dict[str, Any]) -> None:
    told = without_folders({**report.provenance, "experiment": origin})
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    write_report(replace(report, provenance=told), RESULTS / name)
    shutil.rmtree(RESULTS / name / "tensorboard", ignore_errors=True)


def steps(report: Report) -> list[dict[str, Any]]:
    """Each step's figures, and where it fell short of the aim the layers that lost most."""
    return [
        {name: figures[name] for name in STEP_FIGURES}
        | {"without_weights_ms": without_weights_ms(row), "lost_in": lost_in(report.rows[0], row, figures)}
        for row, figures in zip(report.rows, row_figures(report), strict=True)
    ]


STEP_FIGURES = (
    "iteration",
    "params",
    "macs",
    "latency_engine_p50_ms",
    "latency_engine_ratio",
    "latency_engine_ratio_low",
    "latency_engine_ratio_high",
    "realised_speedup",
    "disturbed",
)


def without_weights_ms(row: ReportRow) -> float | None:
    """Time of all that no layer with weights accounts for: resizing, shuffling, decoding."""
    if row.result is None or not row.layers:
        return None
    return sum(row.result.layer_times_ms.values()) - sum(layer.time_ms or 0 for layer in row.layers)


def lost_in(first: ReportRow, row: ReportRow, figures: Any) -> list[dict[str, Any]]:
    realised = figures["realised_speedup"]
    if realised is None or realised >= AIM or row.result is None:
        return []
    found = shortfalls(first.layers, row.layers, channel_block(row.result.device))
    return [asdict(layer) | {"lost_ms": layer.lost_ms} for layer in found[:SHOWN]]


def plot(found: dict[str, list[dict[str, Any]]]) -> None:
    with svg_file(RESULTS / "latency_against_macs.svg") as axes:
        axes.axhline(AIM, color="0.7", linewidth=1)
        for (name, rows), style in zip(found.items(), ("o-", "s--"), strict=True):
            measured = [row for row in rows if row["latency_engine_ratio"]]
            # The ratio's interval, carried over: a longer latency is less of the promise.
            realised = [row["realised_speedup"] for row in measured]
            errors = [
                [
                    value
                    * (
                        1
                        - row["latency_engine_ratio"]
                        / (row["latency_engine_ratio_high"] or row["latency_engine_ratio"])
                    )
                    for value, row in zip(realised, measured, strict=True)
                ],
                [
                    value
                    * (
                        row["latency_engine_ratio"]
                        / (row["latency_engine_ratio_low"] or row["latency_engine_ratio"])
                        - 1
                    )
                    for value, row in zip(realised, measured, strict=True)
                ],
            ]
            removed = [1 - row["macs"] / rows[0]["macs"] for row in measured]
            axes.errorbar(removed, realised, yerr=errors, fmt=style, capsize=3, label=name.replace("-", " "))
        axes.set(
            xlabel="share of the MACs removed", ylabel="speed-up, of what the MACs promise", ylim=(0, None)
        )
        axes.legend(frameon=False, loc="lower left")


def told(name: str, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        realised = row["realised_speedup"]
        print(
            f"{name}, iteration {row['iteration']}: realised {realised:.2f}" if realised else "not measured"
        )
        for layer in row["lost_in"]:
            print(
                f"    {layer['lost_ms']:.3f} ms lost in {layer['layer']} ({layer['channels']}): {layer['cause']}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--again", action="store_true", help="measure what is there once more")
    asked = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    origin = provenance(
        f"latency_against_macs.py --iterations {asked.iterations}", ("torch", "onnxruntime", "numpy")
    )
    found = {}
    for name in RUNS:
        report = run(name, asked.iterations, again=asked.again)
        write_reports(report, name, origin)
        found[name] = steps(report)
        print(headline(report).text)
    write_json(
        RESULTS / "latency_against_macs.json", {"schema_version": 1, "provenance": origin, "runs": found}
    )
    plot(found)
    for name, rows in found.items():
        told(name, rows)


if __name__ == "__main__":
    main()
