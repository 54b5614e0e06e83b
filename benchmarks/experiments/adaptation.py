"""What `edgeprune adapt` does by default: nothing worse where there is nothing to learn, a lost class, a new camera.

    python benchmarks/experiments/adaptation.py     # about 5 minutes of one processor

Reads coco-person, the street video and NanoDet-g's weights of the maintainers' data folder (EDGEPRUNE_SHARED). Each
case is a folder under build/experiments/adaptation, so an interrupted call goes on where it stopped. Writes
benchmarks/results/adaptation.{json,svg}.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import edgeprune.data
from edgeprune.benchmarks.figures import svg_file
from edgeprune.benchmarks.provenance import provenance
from edgeprune.data.dataset import Dataset, load_dataset
from edgeprune.data.files import read_json, write_json
from edgeprune.detectors.adaptation import AdaptOptions, adapt
from edgeprune.detectors.evaluation import evaluate
from edgeprune.detectors.protocol import Progress
from edgeprune.detectors.registry import load_detector

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("EDGEPRUNE_SHARED", ROOT.parent / "shared" / "data"))
WORK, RESULTS = ROOT / "build" / "experiments" / "adaptation", ROOT / "benchmarks" / "results"
WEIGHTS = SHARED / "nanodet-g" / "nanodet_g_coco80_convs.npz"
SIZE = (320, 320)
SELECT_SHARE = 0.2


@dataclass(frozen=True)
class Case:
    """One adaptation of NanoDet-g's COCO weights to person."""

    name: str
    data: str
    """coco-person: images as those the weights were trained on; street: a camera that they never saw."""
    forget: bool
    """Whether the rows of person are drawn anew before."""
    options: AdaptOptions


CASES = (
    Case("a new camera", "street", False, AdaptOptions(epochs=5)),
    Case("person forgotten", "coco-person", True, AdaptOptions(epochs=3)),
    Case("nothing to learn", "coco-person", False, AdaptOptions(epochs=3)),
    Case("person forgotten, half mosaics", "coco-person", True, AdaptOptions(epochs=3, mosaic=0.5)),
)


def data_of(name: str) -> tuple[Dataset, Dataset]:
    """Images to adapt with, and others to report on."""
    if name == "coco-person":
        folder = SHARED / "coco-person"
        return load_dataset(folder / "person_train2017.json"), load_dataset(folder / "person_val2017.json")
    labels, video = Path(edgeprune.data.__file__).parent, SHARED / "pets-vtest"
    return load_dataset(labels / "vtest_train.json", video), load_dataset(labels / "vtest_test.json", video)


def forget_person(detector: nn.Module) -> None:
    """Draw the rows of person anew, as a detector begins its training: every score near 0.01."""
    torch.manual_seed(0)
    for head in detector.heads:  # type: ignore[union-attr]
        nn.init.normal_(head.output.weight[:1].detach(), std=0.01)
        nn.init.constant_(head.output.bias[:1].detach(), -4.6)


@contextmanager
def stage(what: str) -> Iterator[Progress]:
    print(f"  {what}", flush=True)
    yield lambda done, total: None


def execute(case: Case) -> dict[str, Any]:
    folder = WORK / case.name.replace(", ", "-").replace(" ", "-")
    record = folder / "record.json"
    if record.is_file():
        return dict(read_json(record))
    print(case.name, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    detector: Any = load_detector("nanodet-g", WEIGHTS, SIZE)
    if case.forget:
        forget_person(detector)
    images, val = data_of(case.data)
    train, select = images.hold_out(SELECT_SHARE, 0)
    before = evaluate(detector, detector, val)
    result = adapt(
        detector,
        train,
        select,
        case.options,
        seed=0,
        folder=folder,
        progress=stage,
        on_epoch=lambda epoch: print(f"  {epoch}", flush=True),
    )
    found = {
        "case": case.name,
        "data": case.data,
        "train_images": len(train),
        "select_images": len(select),
        "options": asdict(case.options),
        "val_before": asdict(before),
        "val_after": asdict(evaluate(detector, detector, val)),
        "select_before": asdict(result.before),
        "select_after": asdict(result.after),
        "best_epoch": result.best_epoch,
        "epochs": [asdict(epoch) for epoch in result.epochs],
    }
    write_json(record, found)
    return found


def plot(rows: list[dict[str, Any]]) -> None:
    with svg_file(RESULTS / "adaptation.svg", height_in=2.4) as axes:
        for index, row in enumerate(rows):
            before, after = row["val_before"]["ap"], row["val_after"]["ap"]
            axes.annotate("", (after, index), (before, index), arrowprops={"arrowstyle": "->"})
            axes.plot(before, index, "o", color="0.6")
            axes.plot(after, index, "o", color="C0")
        axes.set(yticks=range(len(rows)), yticklabels=[row["case"] for row in rows], xlim=(0, 1))
        axes.set(xlabel="AP on validation images, before (grey) and after", ylim=(len(rows) - 0.5, -0.5))


def main() -> None:
    origin = provenance("adaptation.py", ("torch", "numpy", "pycocotools"), [WEIGHTS])
    rows = []
    for case in CASES:
        rows.append(execute(case))
        before, after = rows[-1]["val_before"], rows[-1]["val_after"]
        print(
            f"{case.name:30s} AP {before['ap']:.3f} -> {after['ap']:.3f}  AP50 {before['ap50']:.3f} -> "
            f"{after['ap50']:.3f}  best epoch {rows[-1]['best_epoch']}",
            flush=True,
        )
        RESULTS.mkdir(exist_ok=True)
        write_json(
            RESULTS / "adaptation.json",
            {
                "provenance": origin,
                "detector": "NanoDet-g at 320, the rows of person of its COCO weights",
                "sha256_of_train_and_val": {
                    name: [dataset.sha256 for dataset in data_of(name)] for name in ("coco-person", "street")
                },
                "cases": rows,
            },
        )
    plot(rows)


if __name__ == "__main__":
    main()
