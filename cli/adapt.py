"""`adapt`: from a detector of many classes to the ones asked for, fine-tuned on images of one's own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from edgeprune.cli import Json, Resume, Verbose, app
from edgeprune.cli.run_options import (
    BodyShare,
    Classes,
    Detector,
    InputSize,
    LearningRate,
    Mosaic,
    Seed,
    Strict,
    TrainDevice,
    TrainImages,
    ValImages,
    Weights,
)

if TYPE_CHECKING:
    from edgeprune.detectors.protocol import Detector as DetectorProtocol


@app.command("adapt")
def _adapt(
    train: Annotated[
        Path,
        typer.Option(
            help="Labelled images to fine-tune on. A part of them is held out to choose the best epoch.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write. Default: adapted/DETECTOR-CLASSES.", show_default=False),
    ] = None,
    detector: Detector = "nanodet-g",
    weights: Weights = None,
    classes: Classes = "person",
    input_size: InputSize = 320,
    train_images: TrainImages = None,
    val: Annotated[
        Path | None,
        typer.Option(
            help="Labelled images to measure AP on before and after. They decide nothing.", show_default=False
        ),
    ] = None,
    val_images: ValImages = None,
    epochs: Annotated[int, typer.Option(min=0, help="Passes over the training images.")] = 20,
    freeze: Annotated[
        list[str],
        typer.Option(
            help="Layers or parameters, by name or pattern (layers.[0-9].*), that are not trained. May be given "
            "several times.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 - typer reads it, nothing writes it
    unfreeze_epoch: Annotated[
        int | None,
        typer.Option(
            min=2, help="First epoch that trains what is frozen. Default: none.", show_default=False
        ),
    ] = None,
    learning_rate: LearningRate = 1e-2,
    body_share: BodyShare = 0.001,
    mosaic: Mosaic = 0.0,
    train_device: TrainDevice = "auto",
    seed: Seed = 0,
    resume: Resume = False,
    strict: Strict = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Keep a detector's rows for some of its classes and fine-tune it on images labelled with them."""
    from dataclasses import asdict

    from edgeprune.cli.adaptation import WEIGHTS, Request, adapt_in, adaptation_folder
    from edgeprune.cli.build import SELECT_SHARE, load_labels, training_device
    from edgeprune.cli.config import absolute_detector, class_names
    from edgeprune.cli.output import print_json, print_rows
    from edgeprune.cli.progress import progress
    from edgeprune.cli.run_folder import contents_of
    from edgeprune.data.files import sha256_of
    from edgeprune.detectors.adaptation import AdaptOptions
    from edgeprune.detectors.evaluation import evaluate
    from edgeprune.detectors.registry import load_detector, slug

    options = AdaptOptions(epochs, learning_rate, body_share, mosaic, tuple(freeze), unfreeze_epoch)
    names, name = class_names(classes), absolute_detector(detector)
    device = training_device(train_device)
    size = (input_size, input_size)
    folder = out or Path("adapted") / f"{slug(name)}-{'-'.join(names)}"
    run = adaptation_folder(folder, resume=resume)
    labelled = load_labels(train, train_images, names, strict=strict)
    reported = load_labels(val, val_images, names, strict=strict) if val else None
    loaded = load_detector(name, weights, size, names)
    request = Request(
        name,
        loaded,
        sha256_of(weights) if weights else None,
        *labelled.hold_out(SELECT_SHARE, seed),
        options=options,
        seed=seed,
        data=contents_of(labelled),
    )
    with run.lock():
        before = None
        if reported is not None:
            with progress("AP before, on the validation images") as update:
                before = asdict(evaluate(cast("DetectorProtocol", loaded), loaded, reported, progress=update))
        try:
            record = adapt_in(folder, request, device)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"Interrupted; {folder} keeps what is done. --resume goes on.") from None
        if reported is not None:
            kept = load_detector(name, folder / WEIGHTS, size, names)
            with progress("AP after, on the validation images") as update:
                record = {
                    **record,
                    "val_before": before,
                    "val_after": asdict(
                        evaluate(cast("DetectorProtocol", kept), kept, reported, progress=update)
                    ),
                }
    if json:
        print_json({**record, "weights": str(folder / WEIGHTS)})
        return
    result = record["result"]
    first = {"epoch": 0, "loss": None, "learning_rate": None, "ap": result["before"]["ap"]}
    first |= {"ap50": result["before"]["ap50"], "ema_ap": None, "ema_ap50": None}
    print_rows([first, *result["epochs"]], as_json=False)
    typer.echo(
        f"kept: epoch {result['best_epoch']}, AP {result['after']['ap']:.3f} on {record['select_images']} images "
        "held out"
    )
    if reported is not None:
        typer.echo(
            f"validation: AP {record['val_before']['ap']:.3f} before, {record['val_after']['ap']:.3f} after"
        )
    typer.echo(
        f"edgeprune build --detector {detector} --weights {folder / WEIGHTS} --classes {classes} prunes it"
    )
