"""The `edgeprune` command: what each option means, and how errors reach a person.

torch and everything that imports it is loaded inside the commands, so that `edgeprune --help` is instant.
"""

import errno
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from edgeprune.cli.device_options import with_device
from edgeprune.cli.interrupt import handled
from edgeprune.cli.run_options import Strict, ValImages, with_config

if TYPE_CHECKING:
    from edgeprune.cli.config import BuildConfig
    from edgeprune.deploy.connection import Connection

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class _Group(TyperGroup):
    """Turns what a user can act on into one line; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with handled():
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
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"cannot write {error.filename or 'a file'}: {error.strerror}"
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
Frames = Annotated[
    bool,
    typer.Option(
        "--frames/--no-frames",
        help="Draw detections before and after on a few validation images. A report that is published may "
        "need to leave the pictures out.",
    ),
]
FlagApDrop = Annotated[
    float,
    typer.Option(min=0.0, help="Warn where AP on the device is lower than on the host by more than this."),
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

RunDir = Annotated[
    Path | None,
    typer.Option(
        help="Run folder to write. Default: runs/DETECTOR-TARGET-CRITERION.",
        show_default=False,
    ),
]


@app.command("build")
@with_config
@with_device
def _build(
    config: "BuildConfig",
    connection: "Connection",
    run_dir: RunDir = None,
    resume: Resume = False,
    strict: Strict = False,
    frames: Frames = True,
    flag_ap_drop: FlagApDrop = 0.01,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Prune, export, deploy and measure a detector: the whole way from weights to a report."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_report
    from edgeprune.cli.processes import together

    options = stages.ReportOptions(frames, flag_ap_drop)
    with together(config.train_device):
        report = stages.build(config, run_dir, connection, resume=resume, strict=strict, options=options)
    if report:
        print_report(*report, as_json=json, flag_ap_drop=flag_ap_drop)


@app.command("prune")
@with_config
@with_device
def _prune(
    config: "BuildConfig",
    connection: "Connection",
    run_dir: RunDir = None,
    resume: Resume = False,
    strict: Strict = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """First stage alone: prune and fine-tune. `build --resume` with the same options does the rest."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_report
    from edgeprune.cli.processes import together

    with together(config.train_device):
        report = stages.prune(config, run_dir, connection, resume=resume, strict=strict)
    if report:
        print_report(report, as_json=json)


@app.command("deploy")
def _deploy(run: Run, step: Step = None, json: Json = False, verbose: Verbose = False) -> None:
    """Third stage: build each step's engine on the device."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_rows

    print_rows(stages.deploy(run, step), as_json=json)


@app.command("bench")
def _bench(run: Run, json: Json = False, verbose: Verbose = False) -> None:
    """Fourth stage: measure latency and AP of all steps on the device, interleaved."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_report

    print_report(stages.bench(run), as_json=json)


@app.command("report")
def _report(
    run: Run,
    frames: Frames = True,
    flag_ap_drop: FlagApDrop = 0.01,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Last stage: write report.html and report.json and print the table."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_report

    report = stages.report(run, stages.ReportOptions(frames, flag_ap_drop))
    print_report(*report, as_json=json, flag_ap_drop=flag_ap_drop)


@app.command("evaluate")
def _evaluate(
    run: Run,
    step: Step = None,
    val: Annotated[
        Path | None,
        typer.Option(help="Labelled images to score on. Default: the run's own.", show_default=False),
    ] = None,
    val_images: ValImages = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1.0,
            help="Score from which the detector is to report, for precision and recall. Default: what `calibrate` "
            "chose, or else 0.3.",
            show_default=False,
        ),
    ] = None,
    strict: Strict = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure with PyTorch on this machine: AP, its 95 % interval, by size, and misses of a run's steps."""
    from edgeprune.cli import build as stages
    from edgeprune.cli.output import print_quality

    rows = stages.evaluate(run, step, val, val_images, threshold=threshold, strict=strict)
    print_quality(rows, as_json=json)


import edgeprune.cli.adapt  # noqa: E402  these modules' commands register themselves
import edgeprune.cli.calibrate  # noqa: E402
import edgeprune.cli.camera  # noqa: E402
import edgeprune.cli.check  # noqa: E402
import edgeprune.cli.compare  # noqa: E402
import edgeprune.cli.data  # noqa: E402
import edgeprune.cli.device  # noqa: E402
import edgeprune.cli.export  # noqa: E402
import edgeprune.cli.latency_table  # noqa: E402, F401
