"""The options that decide a run's result; commands that prune take them all, as one `config`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgeprune.cli.option_group import take

if TYPE_CHECKING:
    from edgeprune.cli.config import BuildConfig

Target = Annotated[
    str,
    typer.Option(
        help="Kind of device to prune for and measure on; `host` is this machine, `auto` asks the device, "
        "`edgeprune targets` lists them. It decides the ONNX opset and the channel counts that run fast."
    ),
]
Precision = Annotated[
    Literal["fp32", "fp16", "int8"],
    typer.Option(
        help="Number format of the engine on the device. Fewer bits are faster; the AP shows what they cost."
    ),
]
Detector = Annotated[
    str,
    typer.Option(
        help="Network: nanodet-g, tiny-yolov2, yolox-nano, yolox-tiny, yolox-s, a Darknet .cfg file, or your own, "
        "package.module:function or file.py:function (docs/own-detector.md)."
    ),
]
Classes = Annotated[
    str,
    typer.Option(
        help="What to detect, separated by commas. Of weights for more classes, the rows of these are kept."
    ),
]
AdaptEpochs = Annotated[
    int,
    typer.Option(
        min=0,
        help="Passes over the training images before the first step, where the weights' classes differ from "
        "--classes and compete, as in tiny-yolov2: then keeping rows alone changes every score.",
    ),
]
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
        help="Labelled images or video frames to score channels and fine-tune with. A part of "
        "it is held out to choose the best epoch. Default: frames of a street video whose labels come with "
        "edgeprune.",
        show_default=False,
    ),
]
TrainImages = Annotated[
    Path | None,
    typer.Option(
        help="Folder of its images. Default: beside the labels, named like them or holding them.",
        show_default=False,
    ),
]
Select = Annotated[
    Path | None,
    typer.Option(
        help="Labelled images to choose the best epoch by, instead of a held-out part of --train. Nothing of --val may "
        "be in it.",
        show_default=False,
    ),
]
Unlabelled = Annotated[
    list[Path],
    typer.Option(
        help="Further images to follow the unpruned detector on, without labels: a folder, a video, or its frames "
        "FIRST to LAST as video.avi#FIRST-LAST. Nothing of --val or --select, or held out, may be in it. May be given "
        "several times.",
        show_default=False,
    ),
]
Val = Annotated[
    Path | None,
    typer.Option(
        help="Labelled images that every AP of the report is measured on. They decide nothing. Default: later "
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
    float | None,
    typer.Option(
        min=0.01,
        max=0.95,
        help="Share of the detector's --budget to remove in all: 0.4 is 40 %.",
        show_default="0.4",
    ),
]
Budget = Annotated[
    Literal["params", "macs", "channels"] | None,
    typer.Option(
        help="What --remove is a share of: parameters, multiply-accumulates or channels.",
        show_default="params",
    ),
]
LatencyBudgetMs = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Instead of --remove: prune until an image takes so many milliseconds in the engine, measured on the "
        "device.",
        show_default=False,
    ),
]
Speedup = Annotated[
    float | None,
    typer.Option(
        min=1.0,
        help="Instead of --remove: prune until the engine, measured on the device, is so many times as fast as the "
        "unpruned one: 1.5 takes two thirds of its time.",
        show_default=False,
    ),
]
EnergyBudgetMj = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Instead of --remove, or beside the two above: millijoules an image may take, of the engine alone, at "
        "the power that the latency table tells: the board's, idle power included, while the unpruned network ran.",
        show_default=False,
    ),
]
MemoryBudgetMib = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Instead of --remove, or beside the three above: MiB that the engine may hold, weights and activations, "
        "on a device that tells.",
        show_default=False,
    ),
]
LatencyTable = Annotated[
    Path | None,
    typer.Option(
        help="What kernels cost on the target's device, from `edgeprune latency-table measure`, for the four above. "
        "Default: measured on the device when the run begins.",
        show_default=False,
    ),
]
Schedule = Annotated[
    Literal["linear", "geometric"],
    typer.Option(
        help="linear: every step removes the same share of the original; geometric: of what is left."
    ),
]
Criterion = Annotated[
    str,
    typer.Option(
        help="What makes a channel important. taylor-sum: how much the loss would change without it; taylor: the "
        "same per position, normalised layer by layer, as Molchanov et al. 2017; taylor-weight: their 2019 form; "
        "magnitude, magnitude-l1: the size of its weights; geometric-median; batchnorm; random, the baseline to "
        "beat; or your own, package.module:function or file.py:function."
    ),
]
Per = Annotated[
    Literal["params", "macs", "none"] | None,
    typer.Option(
        help="Rank channels by importance per parameter saved, per multiply-accumulate saved, or by "
        "importance alone. Not where a latency, energy or memory is asked for.",
        show_default="params",
    ),
]
Replacement = Annotated[
    Literal["linear", "mean", "zero"],
    typer.Option(
        help="What stands in for a removed channel: its prediction from those that stay, its mean, or nothing."
    ),
]
MinChannels = Annotated[int, typer.Option(min=1, help="Channels that every layer keeps at least.")]
MaxLayerRatio = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="Share of a layer's channels that may go at most.")
]
ChannelMultiple = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Channels are removed down to multiples of this. Default: what runs fast on the target.",
        show_default=False,
    ),
]
Protect = Annotated[
    list[str],
    typer.Option(
        help="Layer, by name or pattern (head.*), that keeps all its channels. May be given several times.",
        show_default=False,
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
BodyShare = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of --learning-rate for all layers but the last, which make the outputs. 1 for a network whose "
        "weights are random.",
    ),
]
Distill = Annotated[
    bool,
    typer.Option(
        help="Fine-tune towards the unpruned detector's outputs and activations, or towards the labels alone."
    ),
]
Mosaic = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of the training images that are put together from windows of four: more and smaller objects, in "
        "new surroundings.",
    ),
]
MinAp = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="End the run before the step whose AP on held-out training data falls below this; that step is dropped.",
        show_default=False,
    ),
]
StopApDrop = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="End the run before the step that lost more AP than this, against the unpruned detector, on held-out "
        "training data; that step is dropped.",
        show_default=False,
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Refuse data of which anything would be dropped or cut, before any work. Default: leave it out, say so, "
        "and count it in the record.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice. The same seed gives the same weights.")]


def _options(
    *,
    target: Target,
    detector: Detector = "nanodet-g",
    weights: Weights = None,
    classes: Classes = "person",
    adapt_epochs: AdaptEpochs = 20,
    input_size: InputSize = 320,
    train: Train = None,
    train_images: TrainImages = None,
    select: Select = None,
    unlabelled: Unlabelled = [],  # noqa: B006 - typer reads it, nothing writes it
    val: Val = None,
    val_images: ValImages = None,
    iterations: Iterations = 10,
    remove: Remove = None,
    budget: Budget = None,
    speedup: Speedup = None,
    latency_budget_ms: LatencyBudgetMs = None,
    energy_budget_mj: EnergyBudgetMj = None,
    memory_budget_mib: MemoryBudgetMib = None,
    latency_table: LatencyTable = None,
    schedule: Schedule = "linear",
    criterion: Criterion = "taylor-sum",
    per: Per = None,
    replacement: Replacement = "linear",
    min_channels: MinChannels = 1,
    max_layer_ratio: MaxLayerRatio = 1.0,
    channel_multiple: ChannelMultiple = None,
    protect: Protect = [],  # noqa: B006
    train_device: TrainDevice = "auto",
    finetune_epochs: FineTuneEpochs = 10,
    learning_rate: LearningRate = 1e-4,
    distill: Distill = True,
    mosaic: Mosaic = 0.0,
    min_ap: MinAp = None,
    stop_ap_drop: StopApDrop = None,
    seed: Seed = 0,
    precision: Precision = "fp32",
) -> None:
    """The options, in the order in which help shows them."""


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a command, which takes them as one `config`."""
    return take(command, "config", _options, _config, first=True)


def _config(chosen: Mapping[str, Any]) -> "BuildConfig":
    from edgeprune.cli.config import BuildConfig

    try:
        return BuildConfig.from_options(chosen)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
