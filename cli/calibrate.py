"""`calibrate`: the score from which a step is to report, for what its user can bear."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli import Json, Run, Step, Verbose, app
from edgeprune.cli.run_options import ValImages

if TYPE_CHECKING:
    from edgeprune.data.dataset import Dataset
    from edgeprune.data.operating_point import Calibration


@app.command("calibrate")
def _calibrate(
    run: Run,
    step: Step = None,
    precision: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1.0,
            help="Share of detections that are to be right, 0.9 for 90 %.",
            show_default=False,
        ),
    ] = None,
    false_positives_per_minute: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Most false detections a minute, instead of --precision.", show_default=False
        ),
    ] = None,
    frames_per_second: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Images that the camera will look at in a second, which false detections a minute are counted "
            "with. Default: of frames of a video, the video's own.",
            show_default=False,
        ),
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(
            help="Labelled images of what the camera will see. Default: the run's own.", show_default=False
        ),
    ] = None,
    val_images: ValImages = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Choose the score from which the camera reports a person, and keep it as threshold.json in the step."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_json, print_rows
    from edgeprune.cli.progress import say

    if (precision is None) == (false_positives_per_minute is None):
        raise typer.BadParameter("give either --precision or --false-positives-per-minute")

    def wish(dataset: "Dataset") -> Any:
        from edgeprune.data.operating_point import Wish

        rate = frames_per_second or _frames_per_second(dataset, needed=false_positives_per_minute is not None)
        return Wish(precision, false_positives_per_minute, rate)

    dataset, found = stages.calibrate(run, step, val, val_images, wish)
    rows = [_row(iteration, calibration) for iteration, calibration in found.items()]
    if json:
        print_json(rows)
        return
    print_rows([_shown(row) for row in rows], as_json=False)
    point = next(iter(found.values())).point
    say(
        f"On {point.images} images with {point.boxes} boxes; in brackets where 95 % of such data sets would lie."
    )
    say(f"Kept in each step's threshold.json: `edgeprune camera {run}` reports from there.")
    if any(sample.frame for sample in dataset.samples):
        say("Frames of a video resemble each other: other scenes may differ by more than that.")


def _frames_per_second(dataset: "Dataset", *, needed: bool) -> float | None:
    """The rate of the videos whose frames these are; None where there is no one rate, and none is needed."""
    from edgeprune.cli.run_folder import RunError
    from edgeprune.data.errors import DataError
    from edgeprune.data.video import frames_per_second

    try:
        rates = {frames_per_second(video) for video in dataset.videos.values()}
    except DataError:
        rates = set()
    if len(rates) == 1 and all(sample.frame for sample in dataset.samples):
        return rates.pop()
    if needed:
        raise RunError(
            f"{dataset.path} does not say how many images the camera will look at in a second: give "
            "--frames-per-second"
        )
    return None


def _row(iteration: int, calibration: "Calibration") -> dict[str, Any]:
    point = calibration.point
    rate = point.false_positives_per_minute_interval
    return {
        "iteration": iteration,
        "threshold": point.threshold,
        "precision": point.precision,
        "precision_low": point.precision_interval.low,
        "precision_high": point.precision_interval.high,
        "recall": point.recall,
        "recall_low": point.recall_interval.low,
        "recall_high": point.recall_interval.high,
        "false_positives_per_minute": point.false_positives_per_minute,
        "false_positives_per_minute_low": rate.low if rate else None,
        "false_positives_per_minute_high": rate.high if rate else None,
        "frames_per_second": calibration.wish.frames_per_second,
        "detections": point.detections,
        "false_positives": point.false_positives,
        "images": point.images,
        "boxes": point.boxes,
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """The row for a person: each figure with its interval in one cell."""

    def cell(name: str) -> str | None:
        if row[name] is None:
            return None
        return f"{row[name]:.3g} ({row[f'{name}_low']:.3g} to {row[f'{name}_high']:.3g})"

    return {
        "iteration": row["iteration"],
        "threshold": f"{row['threshold']:.4f}",
        **{name: cell(name) for name in ("precision", "recall", "false_positives_per_minute")},
        "detections": row["detections"],
        "false_positives": row["false_positives"],
    }
