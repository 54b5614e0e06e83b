"""The `edgeprune` command: what each option means, and how errors reach a person.

torch and everything that imports it is loaded inside the commands, so that `edgeprune --help` is instant.
"""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from edgeprune.cli.config import BuildConfig

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class _Group(TyperGroup):
    """Turns what a user can act on into one line; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            _say(str(interrupt) or "Interrupted.")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            message = _one_line(error)
            if message is None:
                raise
            _say(f"Error: {message}")
            raise typer.Exit(EXIT_ERROR) from None


def _one_line(error: Exception) -> str | None:
    """What to tell a user about `error`, None where only a traceback helps."""
    from edgeprune.data.errors import EdgePruneError

    if isinstance(error, EdgePruneError):
        return " ".join(str(error).split())
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError):
        return "out of memory: a smaller --input-size needs less"
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "out of memory on the GPU: a smaller --input-size, or --train-device cpu, needs less of it"
    return None


def _say(line: str) -> None:
    sys.stdout.flush()
    typer.echo(line, err=True)


def _set_logging(verbose: bool) -> bool:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    return verbose


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prune a detector step by step, run each step on the device, and report what it lost and won.",
    epilog="Start with `edgeprune build --target host`: it needs no board and no data of yours.",
)

Run = Annotated[Path, typer.Argument(help="Run folder that `build` or `prune` made.", show_default=False)]
Step = Annotated[
    int | None,
    typer.Option(
        min=0, help="One step alone; 0 is the unpruned detector. Default: every step.", show_default=False
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the numbers as JSON on standard output, and nothing else.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", callback=_set_logging, help="Log what happens, to standard error.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with an interrupted run of the same options; starts it if there is none.",
    ),
]

Target = Annotated[
    str,
    typer.Option(
        help="Kind of device to prune for and measure on; `host` is this machine. It decides the ONNX "
        "opset and the channel counts that run fast."
    ),
]
Precision = Annotated[
    Literal["fp32", "fp16", "int8"],
    typer.Option(
        help="Number format of the engine on the device. Fewer bits are faster; the AP shows what they cost."
    ),
]
Detector = Annotated[str, typer.Option(help="Network to prune.")]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Its trained weights. Default: the published ones, fetched and checked.", show_default=False
    ),
]
InputSize = Annotated[
    int,
    typer.Option(min=32, help="Side in pixels of the square that images are scaled into; a multiple of 32."),
]
Train = Annotated[
    Path | None,
    typer.Option(
        help="COCO JSON of labelled images or video frames to score channels and fine-tune with. A part of "
        "it is held out to choose the best epoch. Default: frames of a street video whose labels come with "
        "edgeprune.",
        show_default=False,
    ),
]
TrainImages = Annotated[
    Path | None,
    typer.Option(
        help="Folder of its images. Default: beside the JSON, named like it or holding them.",
        show_default=False,
    ),
]
Val = Annotated[
    Path | None,
    typer.Option(
        help="COCO JSON that every AP of the report is measured on. It decides nothing. Default: later "
        "frames of the same video.",
        show_default=False,
    ),
]
ValImages = Annotated[
    Path | None, typer.Option(help="Folder of its images, like --train-images.", show_default=False)
]
Iterations = Annotated[
    int,
    typer.Option(
        min=1,
        help="Steps to reach --remove in. Each scores, removes and fine-tunes; more steps lose less AP.",
    ),
]
Remove = Annotated[
    float,
    typer.Option(
        min=0.01, max=0.95, help="Share of the detector's parameters to remove in all: 0.4 is 40 %."
    ),
]
Criterion = Annotated[
    Literal["taylor", "magnitude", "random"],
    typer.Option(
        help="What makes a channel important: taylor, how much the loss would change without it; magnitude, "
        "the size of its weights; random, nothing (the baseline to beat)."
    ),
]
Per = Annotated[
    Literal["params", "macs", "none"],
    typer.Option(
        help="Rank channels by importance per parameter saved, per multiply-accumulate saved, or by "
        "importance alone."
    ),
]
TrainDevice = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Where to fine-tune; auto takes a CUDA GPU if there is one."),
]
FineTuneEpochs = Annotated[
    int, typer.Option("--finetune-epochs", min=0, help="Passes over the training images after each removal.")
]
LearningRate = Annotated[
    float, typer.Option(min=0.0, help="Step size of fine-tuning. Too high a rate destroys what pruning left.")
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice. The same seed gives the same weights.")]
RunDir = Annotated[
    Path | None,
    typer.Option(
        help="Run folder to write. Default: runs/DETECTOR-TARGET-CRITERION.",
        show_default=False,
    ),
]


def _config(options: dict[str, Any]) -> "BuildConfig":
    from edgeprune.cli.config import BuildConfig

    try:
        return BuildConfig.from_options(options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def build(
    target: Target,
    detector: Detector = "nanodet-g",
    weights: Weights = None,
    input_size: InputSize = 320,
    train: Train = None,
    train_images: TrainImages = None,
    val: Val = None,
    val_images: ValImages = None,
    iterations: Iterations = 10,
    remove: Remove = 0.4,
    criterion: Criterion = "taylor",
    per: Per = "none",
    train_device: TrainDevice = "auto",
    finetune_epochs: FineTuneEpochs = 10,
    learning_rate: LearningRate = 3e-4,
    seed: Seed = 0,
    precision: Precision = "fp32",
    run_dir: RunDir = None,
    resume: Resume = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Prune, export, deploy and measure a detector: the whole way from weights to a report."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_report

    print_report(*stages.build(_config(locals()), run_dir, resume=resume), as_json=json)


@app.command()
def prune(
    target: Target,
    detector: Detector = "nanodet-g",
    weights: Weights = None,
    input_size: InputSize = 320,
    train: Train = None,
    train_images: TrainImages = None,
    val: Val = None,
    val_images: ValImages = None,
    iterations: Iterations = 10,
    remove: Remove = 0.4,
    criterion: Criterion = "taylor",
    per: Per = "none",
    train_device: TrainDevice = "auto",
    finetune_epochs: FineTuneEpochs = 10,
    learning_rate: LearningRate = 3e-4,
    seed: Seed = 0,
    precision: Precision = "fp32",
    run_dir: RunDir = None,
    resume: Resume = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """First stage alone: prune and fine-tune. `build --resume` with the same options does the rest."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_report

    print_report(stages.prune(_config(locals()), run_dir, resume=resume), as_json=json)


@app.command()
def export(run: Run, step: Step = None, json: Json = False, verbose: Verbose = False) -> None:
    """Second stage: write each step as ONNX for the run's target and check it against PyTorch."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_rows

    print_rows(stages.export(run, step), as_json=json)


@app.command()
def deploy(run: Run, step: Step = None, json: Json = False, verbose: Verbose = False) -> None:
    """Third stage: build each step's engine on the device."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_rows

    print_rows(stages.deploy(run, step), as_json=json)


@app.command()
def bench(run: Run, json: Json = False, verbose: Verbose = False) -> None:
    """Fourth stage: measure latency and AP of all steps on the device, interleaved."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_report

    print_report(stages.bench(run), as_json=json)


@app.command()
def report(run: Run, json: Json = False, verbose: Verbose = False) -> None:
    """Last stage: write report.html and report.json and print the table."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_report

    print_report(*stages.report(run), as_json=json)


@app.command()
def evaluate(
    run: Run,
    step: Step = None,
    val: Annotated[
        Path | None, typer.Option(help="COCO JSON to score on. Default: the run's own.", show_default=False)
    ] = None,
    val_images: ValImages = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure the AP of a run's steps with PyTorch on this machine."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_rows

    print_rows(stages.evaluate(run, step, val, val_images), as_json=json)
