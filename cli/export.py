"""`export`: the run's own models, or the same steps for another target, precision, batch or input."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from edgeprune.cli import Json, Run, Step, Verbose, app


@dataclass(frozen=True)
class ExportVariant:
    """What a step is exported as. Unless it is what the run asks for, the file lies beside the run's own."""

    target: str | None = None  # the run's
    precision: Literal["fp32", "fp16", "int8"] | None = None  # the run's
    batch: str = "1"  # or "MIN:OPT:MAX"
    input: Literal["float32", "uint8"] = "float32"
    int8_calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    int8_ap_drop: float = 0.01

    def stem(self, target: str, precision: str) -> str:
        """Name of its files, without suffix; "model" for what a run of this target and precision measures."""
        own = self.target in (None, target) and self.precision in (None, precision)
        if own and self.batch == "1" and self.input == "float32":
            return "model"
        parts = [self.target or target, self.precision or precision]
        parts += [f"batch-{self.batch.replace(':', '-')}"] * (self.batch != "1")
        parts += [self.input] * (self.input != "float32")
        return "-".join(parts)


OWN = ExportVariant()


@app.command("export")
def _export(
    run: Run,
    step: Step = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Write files for this kind of device, beside the run's own. Default: the run's target.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"] | None,
        typer.Option(help="Number format of the engine. Default: the run's.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images that go through at once.")] = 1,
    dynamic_batch: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:OPT:MAX",
            help="Leave the batch free between MIN and MAX; the engine is fastest at OPT.",
            show_default=False,
        ),
    ] = None,
    input: Annotated[
        Literal["float32", "uint8"],
        typer.Option(
            help="uint8 takes the image's bytes and normalises on the device (TensorRT 8.6 and later)."
        ),
    ] = "float32",
    int8_calibration: Annotated[
        Literal["minmax", "entropy", "percentile"],
        typer.Option(help="How int8's ranges follow from the activations on training images."),
    ] = "minmax",
    int8_ap_drop: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="AP that int8 may cost on held-out training images; layers that cost more stay in float.",
        ),
    ] = 0.01,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Second stage: write each step as ONNX, and check it against PyTorch and the target's TensorRT."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_rows

    if batch > 1 and dynamic_batch:
        raise typer.BadParameter("choose one of --batch and --dynamic-batch")
    variant = ExportVariant(
        target, precision, dynamic_batch or str(batch), input, int8_calibration, int8_ap_drop
    )
    print_rows(stages.export(run, step, variant), as_json=json)
