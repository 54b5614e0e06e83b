"""`data`: look at a data set, convert it, split it, and have a detector label new images."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli import Json, Verbose, app
from edgeprune.cli.run_options import InputSize, Seed, Strict, Weights

if TYPE_CHECKING:
    from edgeprune.data.dataset import Dataset

PROBLEMS_SHOWN = 20
NOTES = {"box_heights_px": " (smallest, quartiles, largest)"}

data_app = typer.Typer(
    no_args_is_help=True,
    help="Look at a data set, convert it, split it, and have a detector label new images.",
)
app.add_typer(data_app, name="data")

Source = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="COCO JSON, a folder of Pascal VOC, YOLO (data.yaml) or MOT (gt.txt), or CrowdHuman's odgt.",
        show_default=False,
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(help="Folder of its images. Default: where the format has them.", show_default=False),
]
Classes = Annotated[
    str | None,
    typer.Option(
        help="Classes to keep, separated by commas. Default: person, pedestrian and people, all as person.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option(help="COCO JSON to write.", show_default=False)]


@data_app.command("inspect")
def _inspect(
    source: Source,
    images: Images = None,
    classes: Classes = None,
    preview: Annotated[
        Path | None,
        typer.Option(
            help="PNG to write: a sheet of images of each part with their boxes.", show_default=False
        ),
    ] = None,
    strict: Strict = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Recognise a data set's format and print what it holds, with its problems by file and line."""
    import cv2
    import numpy as np

    from edgeprune.cli.output import print_json
    from edgeprune.data.files import write_bytes
    from edgeprune.data.readers import parts
    from edgeprune.data.summary import preview as sheet
    from edgeprune.data.summary import summarise

    datasets = [_load(path, images, classes, strict=strict) for path in parts(source)]
    summaries = [asdict(summarise(dataset)) for dataset in datasets]
    if preview is not None:
        sheets = np.concatenate([sheet(dataset) for dataset in datasets])
        write_bytes(preview, cv2.imencode(".png", sheets)[1].tobytes())
    if json:
        print_json(summaries[0] if len(summaries) == 1 else summaries)
        return
    for summary in summaries:
        problems = summary.pop("problems")
        for name, value in summary.items():
            typer.echo(f"{name.replace('_', ' '):22}{_shown(value)}{NOTES.get(name, '')}")
        typer.echo(f"{'problems':22}{len(problems)}")
        for problem in problems[:PROBLEMS_SHOWN]:
            typer.echo(f"  {problem}")
        if len(problems) > PROBLEMS_SHOWN:
            typer.echo(f"  ... and {len(problems) - PROBLEMS_SHOWN} more: --json lists all")


@data_app.command("convert")
def _convert(
    source: Source,
    out: Out,
    images: Images = None,
    classes: Classes = None,
    strict: Strict = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a data set as COCO JSON; the images stay where they are."""
    dataset = _load(source, images, classes, strict=strict)
    _write(dataset, {out: dataset}, as_json=json)


@data_app.command("split")
def _split(
    source: Source,
    out: Annotated[
        Path, typer.Option(help="Folder to write train.json and val.json into.", show_default=False)
    ],
    share: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share of the images that goes into val.json.")
    ] = 0.2,
    images: Images = None,
    classes: Classes = None,
    seed: Seed = 0,
    strict: Strict = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Split a data set in two without leaking: whole videos, or the end of the only one; stills by lot."""
    from edgeprune.cli.run_folder import RunError
    from edgeprune.data.splitting import split

    dataset = _load(source, images, classes, strict=strict)
    train, val = split(dataset, share, seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {out}: {error.strerror}") from error
    _write(dataset, {out / "train.json": train, out / "val.json": val}, as_json=json)


@data_app.command("autolabel")
def _autolabel(
    source: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="Folder of images, or a video.", show_default=False),
    ],
    out: Out,
    detector: Annotated[str, typer.Option(help="Network that labels.")] = "nanodet-g",
    weights: Weights = None,
    input_size: InputSize = 416,
    threshold: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Lowest score of a box to write.")
    ] = 0.4,
    every: Annotated[int, typer.Option(min=1, help="Of a video, label every so many frames.")] = 10,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Label images or a video with a detector, for a person to correct: its boxes are guesses, not truth."""
    from edgeprune.cli.progress import progress
    from edgeprune.data.dataset import load_images
    from edgeprune.data.writing import labelled_by
    from edgeprune.detectors.evaluation import detect
    from edgeprune.detectors.registry import load_detector

    network = load_detector(detector, weights, (input_size, input_size))
    dataset = load_images(source, every).decodable()
    with progress(f"labelling {len(dataset)} images") as update:
        found = detect(network, network, dataset, progress=update)  # type: ignore[arg-type]
    _write(dataset, {out: labelled_by(dataset, found, threshold)}, as_json=json)


def _load(path: Path, images: Path | None, classes: str | None, *, strict: bool) -> "Dataset":
    from edgeprune.cli.progress import progress
    from edgeprune.data.dataset import load_dataset

    names = [name.strip() for name in classes.split(",") if name.strip()] if classes else None
    dataset = load_dataset(path, images, names)
    if strict:
        with progress(f"decoding {len(dataset)} images") as update:
            dataset = dataset.decodable(update)
        dataset.refuse_problems()
    return dataset


def _write(source: "Dataset", parts: Mapping[Path, "Dataset"], *, as_json: bool) -> None:
    """Write the files made of a data set, and say what they hold and what of it could not be used."""
    from edgeprune.cli.output import print_json
    from edgeprune.data.writing import write_coco

    files = [
        {
            "file": str(out),
            "images": len(part),
            "boxes": sum(len(sample.boxes) for sample in part.samples),
            "images_folder": None if (folder := write_coco(part, out)) is None else str(folder),
        }
        for out, part in parts.items()
    ]
    found = source.contents
    if as_json:
        print_json({"source": str(source.path), **asdict(found), "files": files})
        return
    if source.problems:
        dropped = f"{found.dropped_images} images and {found.dropped_boxes} boxes were dropped"
        typer.echo(
            f"{source.path}: {dropped}, {found.clipped_boxes} boxes cut: `edgeprune data inspect` lists them"
        )
    for file in files:
        typer.echo(f"{file['file']}: {file['images']} images, {file['boxes']} boxes")
        if file["images_folder"]:
            how = "name this folder where you use it (--train-images, --images)"
            typer.echo(f"its images are in {file['images_folder']}: {how}")


def _shown(value: object) -> str:
    if isinstance(value, dict | list | tuple) and not value:
        return "none"
    if isinstance(value, dict):
        shown = [f"{name}: {count}" for name, count in list(value.items())[:6]]
        return ", ".join(shown) + (f", ... {len(value)} in all" if len(value) > len(shown) else "")
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
